"""How far a run came, and with what: a file in its private folder that is replaced after every step.

A run goes on only where nothing has changed that its bytes depend on; what differs is named.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from xent_quant.errors import ExportError
from xent_quant.storage import read_bytes, replace_bytes, sealed, unsealed

FILE = "journal.json"
PACKAGES = ("torch", "numpy", "numba", "tokenizers", "bitsandbytes")
"""Others whose versions decide bits."""


@dataclass
class Journal:
    """`identity` is what the bytes depend on; `done` counts the finished steps (the embedding is the first, the head the
    last); `swapped` tells which of a stream's two files holds the states; `room` is `model.sizes.Room` of a run on a device,
    where it may decide last bits; `experts` are those that stay of each layer where others are dropped, and `exports` what is
    then planned for these; the rest is what the steps behind the next one must know."""

    path: Path
    identity: Mapping[str, Any]
    done: int = 0
    windows: int | None = None
    swapped: bool = False
    room: dict[str, Any] | None = None
    coverage: list[list[int]] = field(default_factory=list)
    unmeasured: list[list[str]] = field(default_factory=list)
    measured: list[int] = field(default_factory=list)
    seconds: float = 0.0
    experts: list[list[int]] | None = None
    exports: list[dict[str, Any]] = field(default_factory=list)

    def layers(self, count: int) -> int:
        """How many of the model's `count` layers are done."""
        return max(0, min(self.done - 1, count))

    def save(self) -> None:
        """Replace the file (JSON behind its digest); it is safe from a loss of power when this returns. Raises OSError."""
        facts = {key: value for key, value in asdict(self).items() if key != "path"}
        replace_bytes(self.path, sealed(json.dumps(facts, indent=1, default=str).encode()))

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any]) -> "Journal | None":
        """What an earlier run left; None where it was killed before its first step was done. Raises ExportError, naming what
        differs, where that run was another one, and for a damaged file."""
        raw = read_bytes(path)
        if raw is None:
            return None
        whole = unsealed(raw)
        if whole is None:
            raise ExportError(f"{path}: damaged, so the run that it is of cannot be gone on with; remove its folder")
        before = cls(path, **json.loads(whole))
        before.check("", before.identity, identity)
        return before

    def check(self, label: str, before: Any, now: Any) -> None:
        """Raise ExportError, naming what differs, where something of the run was not what it is now."""
        if differing := list(_differences(label, before, json.loads(json.dumps(now, default=str)))):
            what = "; ".join(differing[:3])
            raise ExportError(
                f"{self.path.parent}: an unfinished run lies here that was not this one ({what}); repeat that command to go on "
                "with it, or add --restart to begin anew"
            )


def _differences(label: str, before: Any, now: Any) -> Iterator[str]:
    """What differs between two values of JSON, each thing in a few words."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(f"{label} {key}".strip(), before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for each in zip(before, now, strict=True):
            yield from _differences(label, *each)
    else:
        short = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
        yield f"{label} was {short[0]}, is {short[1]}" if max(map(len, short)) <= 60 else f"{label} changed"


@cache
def software() -> dict[str, str]:
    """Versions that decide bytes: this project's by a hash of its sources, others' by their numbers."""
    digest = hashlib.sha256()
    for package in ("xent_quant", "exporters", "calibration"):
        root = Path(__file__).parents[1] / package
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    found = {"xent-quant": digest.hexdigest()[:16]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
