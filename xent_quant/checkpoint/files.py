"""Which file of a checkpoint folder holds which tensor: found in transformers' order, one file for each name."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from xent_quant.checkpoint.headers import DAMAGED, Location, read_json, scan
from xent_quant.errors import CheckpointError

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")
KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


def locate(folder: Path) -> dict[str, Location]:
    """Every tensor of a checkpoint folder: model.safetensors, else the shards of its index, else pytorch_model.bin, else the
    shards of its index, else shards that are all there without one.

    Raises CheckpointError naming the file that is missing, truncated or damaged, or the tensor that two files hold.
    """
    for stem, suffix in KINDS:
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return scan(single)
        if index.is_file():
            return _indexed(index)
    for stem, suffix in KINDS:
        shards = [match for path in sorted(folder.glob(f"{stem}-*{suffix}")) if (match := SHARD.fullmatch(path.name))]
        if shards:
            return _unlisted(folder, shards)
    raise CheckpointError(
        f"{folder}: no model.safetensors, no pytorch_model.bin and no shards in this folder; {_instead(folder)}"
    )


def _indexed(index: Path) -> dict[str, Location]:
    """The index decides where two shards hold a name."""
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) and len(shard) < 256 for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor to file; {DAMAGED}")
    found: dict[str, Location] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if Path(shard).name != shard or not file.is_file():
            raise CheckpointError(f"{file}: missing, {index.name} lists it; {DAMAGED}")
        for name, location in scan(file).items():
            if weight_map.get(name, shard) != shard:
                continue
            _add(found, name, location, f"{index.name} does not say which counts; remove one")
    absent = next((name for name in weight_map if name not in found), None)
    if absent is not None:
        raise CheckpointError(f"{index.parent / weight_map[absent]}: {absent}: not there, {index.name} lists it; {DAMAGED}")
    return found


def _unlisted(folder: Path, shards: Sequence["re.Match[str]"]) -> dict[str, Location]:
    """Shards without an index, where none is missing."""
    counts = {int(shard["count"]) for shard in shards}
    if len(counts) > 1:
        raise CheckpointError(
            f"{folder}: shards of {' and of '.join(map(str, sorted(counts)))} files, and no index; keep one set"
        )
    (count,), first = counts, shards[0]
    numbers = {int(shard["number"]) for shard in shards}
    missing = next((number for number in range(1, count + 1) if number not in numbers), None)
    if missing is not None:
        name = f"{first['stem']}-{missing:05d}-of-{first['count']}{first['suffix']}"
        raise CheckpointError(f"{folder / name}: missing, its other shards are there; {DAMAGED}")
    found: dict[str, Location] = {}
    for shard in shards:
        for name, location in scan(folder / shard[0]).items():
            _add(found, name, location, "and there is no index to say which counts; remove one")
    return found


def _add(found: dict[str, Location], name: str, location: Location, why: str) -> None:
    if name in found:
        raise CheckpointError(f"{location.file}: {name}: {found[name].file.name} holds it too, {why}")
    found[name] = location


def _instead(folder: Path) -> str:
    """What to do about a folder without weights, by what it has."""
    others = sorted(path.name for path in _weights(folder))
    if (folder / "adapter_config.json").is_file():
        return "it holds a LoRA alone: merge it into its base model (peft's merge_and_unload) and give the result"
    if others:
        return f"it holds {', '.join(others[:3])}{', …' if len(others) > 3 else ''}: rename, or convert with transformers"
    return DAMAGED


def _weights(folder: Path) -> Iterator[Path]:
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"):
        yield from folder.glob(pattern)
