"""A safetensors file written in any order: places are fixed from the plan, the header comes last.

Layout: u64 little-endian header length, JSON header padded with spaces, data without gaps. Parts are ordered by falling
item size, so that each begins at a multiple of its own; those of bounded length close the file, as only then is it known
where they begin. Until then they lie in a second file, each in a place of its greatest length behind a u16 with its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.bitsandbytes.kinds import ITEM_SIZE, Part
from xent_quant.formats.base import U8
from xent_quant.storage import PositionalFile

ALIGNMENT = 8
LENGTH_BYTES = 2


def _header(parts: Sequence[Part], sizes: dict[str, int]) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        size = sizes[part.name]
        shape = [size] if part.bounded else list(part.shape)
        header[part.name] = {"dtype": part.dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header


def header_bytes(parts: Sequence[Part]) -> int:
    """What precedes the data of a file of such parts, at most and nearly."""
    longest = len(json.dumps(_header(parts, {part.name: part.nbytes for part in parts}))) + 8 * len(parts)
    return -(-(8 + longest) // ALIGNMENT) * ALIGNMENT


class Shard:
    """Holds nothing: what was written is in the files, and another process may go on with them."""

    def __init__(self, path: Path, bounded: Path, parts: Sequence[Part], *, fresh: bool) -> None:
        self._parts = sorted(parts, key=lambda part: (part.bounded, -ITEM_SIZE[part.dtype]))
        self._offsets: dict[str, int] = {}
        ends = {False: 0, True: 0}
        for part in self._parts:
            self._offsets[part.name] = ends[part.bounded]
            ends[part.bounded] += part.nbytes + LENGTH_BYTES * part.bounded
        self._data = header_bytes(self._parts)
        self._fixed = ends[False]
        self._file, self._bounded = ((PositionalFile.create if fresh else PositionalFile.open)(each) for each in (path, bounded))
        if fresh:
            self._bounded.truncate(ends[True])
        self.nbytes = 0

    def write(self, part: Part, data: U8, offset: int = 0) -> None:
        """Bytes of a part from its byte `offset` on; those of a bounded part whole."""
        if part.bounded:
            if data.size > part.nbytes:
                raise AssertionError(f"{part.name}: {data.size} bytes, planned for at most {part.nbytes}")
            length = np.frombuffer(data.size.to_bytes(LENGTH_BYTES, "little"), np.uint8)
            self._bounded.write_at(np.concatenate([length, data]), self._offsets[part.name])
        else:
            self._file.write_at(data, self._data + self._offsets[part.name] + offset)

    def finish(self) -> list[str]:
        """Write the bounded parts, and the header. Returns the tensors' names; `nbytes` is then their data's size."""
        held = {part.name: self._held(part) for part in self._parts if part.bounded}
        sizes = {part.name: held[part.name].size if part.bounded else part.nbytes for part in self._parts}
        header = _header(self._parts, sizes)
        if held:
            self._file.write_at(np.concatenate(list(held.values())), self._data + self._fixed)
        text = json.dumps(header).encode()
        length = self._data - 8
        self._file.write_at(length.to_bytes(8, "little") + text.ljust(length), 0)
        self.nbytes = sum(sizes.values())
        self._file.truncate(self._data + self.nbytes)
        return list(sizes)

    def _held(self, part: Part) -> U8:
        raw = self._bounded.read_at(LENGTH_BYTES + part.nbytes, self._offsets[part.name])
        return raw[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(raw[:LENGTH_BYTES].tobytes(), "little")]

    def sync(self) -> None:
        self._file.sync()
        self._bounded.sync()

    def close(self) -> None:
        self._file.close()
        self._bounded.close()
