"""A safetensors file written in any order: places are fixed from the plan, the header comes last.

Layout: u64 little-endian header length, JSON header padded with spaces, data without gaps. Parts are ordered by falling
item size, so that each begins at a multiple of its own; those of bounded length close the file, as only then is it known
where they begin.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from exporters.atomic import write_at
from exporters.bitsandbytes.kinds import ITEM_SIZE, Part

ALIGNMENT = 8


class Shard:
    """Holds bounded parts in memory until `finish`; everything else goes to the file at once."""

    def __init__(self, path: Path, parts: Sequence[Part]) -> None:
        self._parts = sorted(parts, key=lambda part: (part.bounded, -ITEM_SIZE[part.dtype]))
        self._bounded: dict[str, NDArray[np.uint8]] = {}
        self._offsets: dict[str, int] = {}
        end = 0
        for part in self._parts:
            self._offsets[part.name] = end
            end += part.nbytes
        longest = len(json.dumps(self._header({part.name: part.nbytes for part in self._parts}))) + 8 * len(self._parts)
        self._data = -(-(8 + longest) // ALIGNMENT) * ALIGNMENT
        self._file: BinaryIO = path.open("w+b")
        self.nbytes = 0

    def write(self, part: Part, data: NDArray[np.uint8], offset: int = 0) -> None:
        """Bytes of a part from its byte `offset` on; those of a bounded part whole."""
        if part.bounded:
            if data.size > part.nbytes:
                raise AssertionError(f"{part.name}: {data.size} bytes, planned for at most {part.nbytes}")
            self._bounded[part.name] = data.reshape(-1).copy()
        else:
            write_at(self._file.fileno(), data, self._data + self._offsets[part.name] + offset)

    def finish(self) -> list[str]:
        """Write what was held, and the header. Returns the tensors' names; `nbytes` is then their data's size."""
        sizes = {part.name: self._bounded[part.name].size if part.bounded else part.nbytes for part in self._parts}
        header = self._header(sizes)
        for name, data in self._bounded.items():
            write_at(self._file.fileno(), data, self._data + header[name]["data_offsets"][0])
        text = json.dumps(header).encode()
        length = self._data - 8
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + text.ljust(length))
        self.nbytes = sum(sizes.values())
        self._file.truncate(self._data + self.nbytes)
        self._file.flush()
        return list(sizes)

    def close(self) -> None:
        self._file.close()

    def _header(self, sizes: dict[str, int]) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in self._parts:
            size = sizes[part.name]
            shape = [size] if part.bounded else list(part.shape)
            header[part.name] = {"dtype": part.dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        return header
