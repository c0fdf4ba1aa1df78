"""Which file holds which tensor, and where: read from headers alone.

safetensors layout: u64 little-endian header length, JSON header, data; `data_offsets` count from the end of the header.
Offsets are read here rather than through safetensors' mmap because every mapped page that is touched counts as
resident memory: a 51 GB checkpoint must not pass through it.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from xent_quant.errors import CheckpointError
from xent_quant.tensors import TensorInfo

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER = 100_000_000  # safetensors' own limit
DAMAGED = "download or copy it again"


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes lie. `offset` is from the start of the file; None within a torch pickle."""

    info: TensorInfo
    file: Path
    offset: int | None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; is this a checkpoint folder?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); {DAMAGED}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply to be one of a checkpoint's files; {DAMAGED}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object; {DAMAGED}")
    return value


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
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        parsed = []
        for name, entry in entries.items():
            start, stop = map(int, entry["data_offsets"])
            parsed.append((name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start, stop))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged safetensors header ({type(error).__name__}: {error}); {DAMAGED}") from error
    found: dict[str, Location] = {}
    end = 0
    for name, dtype, shape, start, stop in sorted(parsed, key=lambda entry: entry[3]):
        if start != end or stop < start or any(n < 0 for n in shape):
            raise CheckpointError(f"{file}: {name}: overlapping or missing bytes in the header; {DAMAGED}")
        if dtype in ITEM_SIZE and prod(shape) * ITEM_SIZE[dtype] != stop - start:
            raise CheckpointError(f"{file}: {name}: {stop - start} bytes do not make shape {list(shape)} of {dtype}; {DAMAGED}")
        end = stop
        found[name] = Location(TensorInfo(name, shape, dtype), file, 8 + length + start)
    if 8 + length + end != size:
        raise CheckpointError(f"{file}: {size} bytes, its header says {8 + length + end}: truncated; {DAMAGED}")
    return found


def _pickle(file: Path) -> dict[str, Location]:
    from xent_quant.checkpoint.pickles import load

    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    return {
        name: Location(TensorInfo(name, tuple(value.shape), names.get(str(value.dtype), str(value.dtype))), file, None)
        for name, value in load(file).items()
    }


def locate(folder: Path) -> dict[str, Location]:
    """Every tensor of a checkpoint folder: single or sharded safetensors, else pytorch_model*.bin.

    Raises CheckpointError naming the file that is missing, truncated or damaged.
    """
    for stem, suffix, scan in (("model", ".safetensors", _safetensors), ("pytorch_model", ".bin", _pickle)):
        index = folder / f"{stem}{suffix}.index.json"
        single = folder / f"{stem}{suffix}"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise CheckpointError(f"{index}: has no weight_map of tensor to file; {DAMAGED}")
            found: dict[str, Location] = {}
            for shard in sorted(set(weight_map.values())):
                file = folder / shard
                if Path(shard).name != shard or not file.is_file():
                    raise CheckpointError(f"{file}: missing, {index.name} lists it; {DAMAGED}")
                found.update(scan(file))
            absent = [name for name in weight_map if name not in found]
            if absent:
                raise CheckpointError(
                    f"{folder / weight_map[absent[0]]}: {absent[0]}: not there, {index.name} lists it; {DAMAGED}"
                )
            return found
        if single.is_file():
            return scan(single)
    raise CheckpointError(
        f"{folder}: no model.safetensors, no pytorch_model.bin and no index of shards in this folder; {DAMAGED}"
    )
