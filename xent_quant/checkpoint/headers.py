"""What a file of weights holds, and where: read from its header alone. JSON files too.

safetensors layout: u64 little-endian header length, JSON header, data; `data_offsets` count from the end of the header.
Offsets are read here rather than through safetensors' mmap because every mapped page that is touched counts as
resident memory: a 51 GB checkpoint must not pass through it.
"""

import json
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

from xent_quant.errors import CheckpointError
from xent_quant.tensors import ITEM_SIZE, TensorInfo

MAX_HEADER = 100_000_000  # safetensors' own limit
MAX_JSON = 1 << 27  # bytes; the largest tokenizer.json that there is has a quarter of it
MAX_DIMENSIONS = 8
DTYPE = re.compile("[A-Z0-9_]{1,16}")
DAMAGED = "download or copy it again"
POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that git leaves in place of a file while git-lfs has not fetched it."""


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes lie. `offset` is from the start of the file; None within a torch pickle."""

    info: TensorInfo
    file: Path
    offset: int | None


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, for numbers beyond a float (Infinity, 1e400) and text that is no Unicode
    too; `unique`: for a name that comes twice."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; is this a checkpoint folder?") from None
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; {DAMAGED}")
    if facts.st_size > MAX_JSON:
        raise CheckpointError(f"{path}: too large for one of a checkpoint's JSON files; {DAMAGED}")
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    try:
        value = parse_json(raw, unique=unique)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {DAMAGED}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply to be one of a checkpoint's files; {DAMAGED}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object; {DAMAGED}")
    return value


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raise CheckpointError where a file is what git-lfs leaves in its place."""
    if beginning.startswith(POINTER):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in that folder")


def parse_json(raw: bytes, *, unique: bool) -> Any:
    """See `read_json`. A byte order mark is passed over. Raises ValueError, in one line."""

    def number(text: str) -> float:
        value = float(text)
        if not isfinite(value):
            raise ValueError(f"{text[:20]} is no finite number")
        return value

    def pairs(found: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(found)
        if len(value) != len(found):
            twice, _ = Counter(name for name, _ in found).most_common(1)[0]
            raise ValueError(f"{twice!r} comes twice")
        return value

    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text, parse_float=number, parse_constant=number, object_pairs_hook=pairs if unique else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, where half of a pair stands alone
    return value


def scan(file: Path) -> dict[str, Location]:
    """Every tensor of a .safetensors or .bin file. Raises CheckpointError naming the file, and the tensor if it is one."""
    with file.open("rb") as stream:
        refuse_pointer(file, stream.read(len(POINTER)))
    return _safetensors(file) if file.suffix == ".safetensors" else _pickle(file)


def _safetensors(file: Path) -> dict[str, Location]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{file}: truncated or not safetensors (header of {length} bytes in a file of {size}); {DAMAGED}"
            )
        raw = stream.read(length)
    try:
        header = parse_json(raw, unique=True)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        parsed = []
        for name, entry in entries.items():
            start, stop = map(_count, entry["data_offsets"])
            dtype = entry["dtype"]
            if not DTYPE.fullmatch(dtype):
                raise ValueError(f"{dtype[:40]!r} in place of a type")
            parsed.append((name, dtype, tuple(map(_count, entry["shape"])), start, stop))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged safetensors header ({type(error).__name__}: {error}); {DAMAGED}") from error
    found: dict[str, Location] = {}
    end = 0
    for name, dtype, shape, start, stop in sorted(parsed, key=lambda entry: entry[3:]):
        if start != end or stop < start or any(size < 0 for size in shape) or len(shape) > MAX_DIMENSIONS:
            raise CheckpointError(f"{file}: {name}: overlapping or missing bytes in the header; {DAMAGED}")
        if dtype in ITEM_SIZE and prod(shape) * ITEM_SIZE[dtype] != stop - start:
            raise CheckpointError(f"{file}: {name}: {stop - start} bytes do not make shape {list(shape)} of {dtype}; {DAMAGED}")
        end = stop
        found[name] = Location(TensorInfo(name, shape, dtype), file, 8 + length + start)
    if 8 + length + end != size:
        raise CheckpointError(f"{file}: {size} bytes, its header says {8 + length + end}: truncated; {DAMAGED}")
    return found


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        raise ValueError(f"{type(value).__name__} in place of a size")
    return value


def _pickle(file: Path) -> dict[str, Location]:
    from xent_quant.checkpoint.pickles import DTYPES, load

    return {
        name: Location(TensorInfo(name, tuple(value.shape), DTYPES.get(str(value.dtype), str(value.dtype))), file, None)
        for name, value in load(file).items()
    }
