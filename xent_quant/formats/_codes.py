"""Types that hold one integer code per weight: weight = scale·levels[code] (+ offset), scales per group of a block.

Where a type keeps the bits of its codes is data (`planes`); reading, storing and dequantising are the same for all.
Layouts are numpy; the searches (`_superblock`, `_block32`, `_levels`) know codes and scales, no bytes.
"""

from abc import abstractmethod
from typing import NamedTuple

import numpy as np

from xent_quant.formats.base import F32, U8, Grid, QuantFormat


class Plane(NamedTuple):
    """Bytes start…stop of a block hold `bits` bits of every code, the lowest plane first.

    A byte holds the bits of 8/bits codes that are `run` apart, from its lowest bits up; `run` bytes side by side hold
    neighbours. So bytes [g, run] are codes [g, 8/bits, run].
    """

    start: int
    stop: int
    bits: int
    run: int

    def read(self, blocks: U8) -> U8:
        """[n, block_bytes] to [n, block_size], the plane's bits of each code."""
        raw = blocks[:, self.start : self.stop].reshape(len(blocks), -1, 1, self.run)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        return ((raw >> shifts) & np.uint8(2**self.bits - 1)).reshape(len(blocks), -1)

    def write(self, blocks: U8, codes: U8) -> None:
        """The inverse: the low `bits` bits of codes [n, block_size]."""
        parts = codes.reshape(len(codes), -1, 8 // self.bits, self.run)
        mask = np.uint8(2**self.bits - 1)
        joined = parts[:, :, 0] & mask
        for index in range(1, 8 // self.bits):
            joined |= (parts[:, :, index] & mask) << np.uint8(index * self.bits)
        blocks[:, self.start : self.stop] = joined.reshape(len(codes), -1)


class CodedFormat(QuantFormat):
    """Subclasses set `planes`, `levels` and `group_size`, and write `scales` and the search.

    `levels` ascends. `stored` [len(levels)] uint8 is what the bytes hold for each level where that is not its index.
    """

    planes: tuple[Plane, ...]
    levels: F32
    group_size: int
    stored: U8 | None = None

    @abstractmethod
    def scales(self, blocks: U8) -> tuple[F32, F32 | None]:
        """Scale and offset [n, groups] float32 of blocks [n, block_bytes]; None where the type has no offset."""

    def codes(self, packed: U8) -> U8:
        """[rows, row_bytes] to [rows, columns] uint8, indices into `levels`."""
        blocks = packed.reshape(-1, self.block_bytes)
        found = self.planes[0].read(blocks)
        shift = self.planes[0].bits
        for plane in self.planes[1:]:
            found |= plane.read(blocks) << np.uint8(shift)
            shift += plane.bits
        if self.stored is not None:
            levels = np.zeros(256, np.uint8)
            levels[self.stored] = np.arange(len(self.stored), dtype=np.uint8)
            found = levels[found]
        return found.reshape(len(packed), -1)

    def store_codes(self, packed: U8, codes: U8) -> None:
        """Put codes [rows, columns], indices into `levels`, into packed rows; nothing else in them changes."""
        blocks = packed.reshape(-1, self.block_bytes)
        codes = codes.reshape(-1, self.block_size)
        if self.stored is not None:
            codes = self.stored[codes]
        shift = 0
        for plane in self.planes:
            plane.write(blocks, codes >> np.uint8(shift) if shift else codes)
            shift += plane.bits

    def dequantize_rows(self, packed: U8) -> F32:
        blocks = packed.reshape(-1, self.block_bytes)
        scale, offset = self.scales(blocks)
        values = self.levels[self.codes(packed)].reshape(len(blocks), -1, self.group_size)
        values *= scale[:, :, None]
        if offset is not None:
            values += offset[:, :, None]
        return values.reshape(len(packed), -1)

    def grid(self, packed: U8) -> Grid:
        scale, offset = self.scales(packed.reshape(-1, self.block_bytes))
        scale = scale.reshape(len(packed), -1)
        return Grid(scale, np.zeros_like(scale) if offset is None else offset.reshape(len(packed), -1), self.levels)

    def with_codes(self, packed: U8, codes: U8) -> U8:
        result = packed.copy()
        self.store_codes(result, codes)
        return result


def integers(lowest: int, highest: int) -> F32:
    """The levels lowest, lowest + 1, …, highest."""
    return np.arange(lowest, highest + 1, dtype=np.float32)


def halves(raw: U8) -> F32:
    """[..., 2n] uint8 to [..., n] float32 of little-endian float16."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)
