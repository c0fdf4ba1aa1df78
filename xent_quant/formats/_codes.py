"""Types that hold one integer code per weight: weight = scale·levels[code] (+ offset), scales per group of a block.

Where a type keeps the bits of its codes is data (`planes`); reading, storing and dequantising are the same for all.
Layouts are numpy; the search (`_search`) knows codes and scales, no bytes.
"""

from abc import abstractmethod
from typing import NamedTuple

import numpy as np

from xent_quant.compilation import jit
from xent_quant.formats import _search
from xent_quant.formats._chunks import TOO_LARGE, in_chunks
from xent_quant.formats._gain import stretched, within_float16
from xent_quant.formats.base import F32, U8, Effort, Grid, QuantFormat


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
        if self.bits == self.run == 1:  # numpy's own is several times as fast
            return np.unpackbits(blocks[:, self.start : self.stop], axis=1, bitorder="little")
        raw = blocks[:, self.start : self.stop].reshape(len(blocks), -1, 1, self.run)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)[:, None]
        return ((raw >> shifts) & np.uint8(2**self.bits - 1)).reshape(len(blocks), -1)

    def write(self, blocks: U8, codes: U8, shift: int = 0) -> None:
        """The inverse: `bits` bits, from bit `shift` up, of codes [n, block_size]."""
        if self.bits == self.run == 1:
            blocks[:, self.start : self.stop] = np.packbits(codes >> np.uint8(shift) & 1, axis=1, bitorder="little")
            return
        _joined(codes, np.uint8(shift), self.bits, self.run, blocks[:, self.start : self.stop])


@jit
def _joined(codes, shift, bits, run, out):  # type: ignore[no-untyped-def]
    """`Plane.write` of codes [n, block_size] into out [n, bytes]."""
    each, mask = 8 // bits, np.uint8(2**bits - 1)
    for block in range(len(out)):
        for part in range(out.shape[1] // run):
            for position in range(each):
                first, up = (part * each + position) * run, np.uint8(position * bits)
                for i in range(run):
                    code = np.uint8(np.uint8(codes[block, first + i] >> shift & mask) << up)
                    out[block, part * run + i] = code if not position else out[block, part * run + i] | code


@jit
def _values(codes, levels, scale, offset, group, out):  # type: ignore[no-untyped-def]
    """What codes [rows, columns] stand for within a Grid, into out."""
    for row in range(len(codes)):
        for g in range(codes.shape[1] // group):
            s, m = scale[row, g], offset[row, g]
            for j in range(g * group, (g + 1) * group):
                out[row, j] = s * levels[codes[row, j]] + m


class CodedFormat(QuantFormat):
    """Subclasses set `planes`, `levels` and `group_size`, and write `scales`.

    `levels` ascends; the bytes hold a level's index, or that xor `flip`.
    """

    planes: tuple[Plane, ...]
    levels: F32
    group_size: int
    flip: int = 0
    outer_halves: tuple[int, ...] = ()
    """Where a block has the float16 that all its weights are multiples of; none where `unshrunk` changes nothing."""

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
        if self.flip:
            found ^= np.uint8(self.flip)
        return found.reshape(len(packed), -1)

    def store_codes(self, packed: U8, codes: U8) -> None:
        """Put codes [rows, columns], indices into `levels`, into packed rows; nothing else in them changes."""
        blocks = packed.reshape(-1, self.block_bytes)
        codes = codes.reshape(-1, self.block_size)
        if self.flip:
            codes = codes ^ np.uint8(self.flip)
        shift = 0
        for plane in self.planes:
            plane.write(blocks, codes, shift)
            shift += plane.bits

    def dequantize_rows(self, packed: U8) -> F32:
        grid, codes = self.grid(packed), self.codes(packed)
        values = np.empty(codes.shape, np.float32)
        _values(codes, self.levels, grid.scale, grid.offset, self.group_size, values)
        return values

    def unshrunk(self, packed: U8, weights: F32, importance: F32 | None) -> U8:
        """See `QuantFormat.unshrunk`."""
        return stretched(self, packed, weights, importance) if self.outer_halves else packed

    def stretch(self, blocks: U8, gains: F32) -> None:
        """See `Stretched`."""
        for start in self.outer_halves:
            blocks[:, start : start + 2] = half_bytes(within_float16(halves(blocks[:, start : start + 2]) * gains))

    def grid(self, packed: U8) -> Grid:
        scale, offset = self.scales(packed.reshape(-1, self.block_bytes))
        scale = scale.reshape(len(packed), -1)
        return Grid(scale, np.zeros_like(scale) if offset is None else offset.reshape(len(packed), -1), self.levels)

    def with_codes(self, packed: U8, codes: U8) -> U8:
        result = packed.copy()
        self.store_codes(result, codes)
        return result


class Found(NamedTuple):
    """What a search chose: codes [rows, columns] uint8, integer scales inner [blocks, n] uint8, outer [blocks, n] float32.

    A block's inner holds s of its groups, then their m where the type has minima; outer d, then dmin. n is 0 for inner where
    the type has no integer scales; negative s are in two's complement.
    """

    codes: U8
    inner: U8
    outer: F32


class SearchedFormat(CodedFormat):
    """A type whose codes and scales `_search` chooses. Subclasses write `search` and `store_scales`."""

    largest_scale = _search.LARGEST
    largest_weight: float = np.inf
    too_large = TOO_LARGE
    """What is said of a weight or a scale beyond these."""

    @abstractmethod
    def search(self, weights: F32, importance: F32, effort: Effort) -> Found:
        """Codes and scales for weights [rows, columns], checked to be finite."""

    @abstractmethod
    def store_scales(self, blocks: U8, found: Found) -> None:
        """Put the scales into blocks [n, block_bytes]."""

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        weighting = np.ones(weights.shape[1], np.float32) if importance is None else importance

        def work(part: F32, out: U8) -> str:
            if self.largest_weight < np.inf and np.abs(part).max() > self.largest_weight:
                return self.too_large
            found = self.search(part, weighting, effort)
            if not (np.abs(found.outer) <= self.largest_scale).all():
                return self.too_large
            self.store_scales(out.reshape(-1, self.block_bytes), found)
            self.store_codes(out, found.codes)
            return ""

        return in_chunks(weights, packed, work)


def integers(lowest: int, highest: int) -> F32:
    """The levels lowest, lowest + 1, …, highest."""
    return np.arange(lowest, highest + 1, dtype=np.float32)


def halves(raw: U8) -> F32:
    """[..., 2n] uint8 to [..., n] float32 of little-endian float16."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def half_bytes(values: F32) -> U8:
    """[..., n] float32 that float16 holds to [..., 2n] uint8, little-endian."""
    return np.ascontiguousarray(values).astype("<f2").view(np.uint8)


def ladder(*rungs: tuple[float, float, int]) -> F32:
    """Candidates of a search: for each (from, to, count), that many values evenly spaced."""
    return np.concatenate([np.linspace(*rung, dtype=np.float32) for rung in rungs])


def plane(top: int, spread: float, steps: int, shift: float, shifts: int) -> F32:
    """Candidates of an affine search, [steps · shifts, 2]: top ± spread steps over the range, moved by ± shift steps."""
    moves = np.linspace(-shift, shift, shifts) if shifts > 1 else np.zeros(1)
    return np.array(
        [(reach, move / reach) for reach in np.linspace(top - spread, top + spread, steps) for move in moves], np.float32
    )


class Efforts(NamedTuple):
    """Per effort: the candidates of a search, and the rounds that refine the block's scales."""

    fast: tuple[F32, int]
    normal: tuple[F32, int]
    high: tuple[F32, int]


class AffineFormat(SearchedFormat):
    """w = d·s·q − dmin·m, q in 0…top. Subclasses set `scale_top`, the largest s and m (1: none), and `efforts`."""

    scale_top: int = 1
    efforts: Efforts
    """Candidates as of `plane`."""

    def search(self, weights: F32, importance: F32, effort: Effort) -> Found:
        rows, columns = weights.shape
        groups, blocks = self.block_size // self.group_size, columns // self.block_size
        codes = np.empty((rows, columns), np.uint8)
        inner = np.empty((rows, blocks * 2 * groups), np.uint8)
        outer = np.empty((rows, blocks * 2), np.float32)
        _search.affine(
            weights, importance, *getattr(self.efforts, effort), self.block_size, groups,
            self.levels[-1], np.float32(self.scale_top), codes.view(np.uint32), inner, outer,
        )  # fmt: skip
        return Found(codes, inner.reshape(-1, 2 * groups), outer.reshape(-1, 2))


class SymmetricFormat(SearchedFormat):
    """w = d·s·level. Subclasses set `scale_low`, the lowest s (0: none), and `efforts`."""

    scale_low: int = 0
    unused: int = 0
    """Levels at the lower end that the search leaves out."""
    unused_above: int = 0
    """Levels at the upper end that it leaves out."""
    efforts: Efforts
    """Candidates as of `ladder`: levels at which a group's largest weight is put."""

    @property
    def searched(self) -> F32:
        """The levels that the search chooses from."""
        return self.levels[self.unused : len(self.levels) - self.unused_above]

    def search(self, weights: F32, importance: F32, effort: Effort) -> Found:
        rows, columns = weights.shape
        groups, blocks = self.block_size // self.group_size, columns // self.block_size
        codes = np.empty((rows, columns), np.uint8)
        inner = np.empty((rows, blocks * groups), np.uint8)
        outer = np.empty((rows, blocks), np.float32)
        levels = self.searched
        _search.symmetric(
            weights, importance, *getattr(self.efforts, effort), self.block_size, groups, levels[0], levels[-1],
            rises(levels), np.float32(self.scale_low), codes.view(np.uint32), inner, outer,
        )  # fmt: skip
        codes += np.uint8(self.unused)
        return Found(codes, inner.reshape(-1, groups), outer.reshape(-1, 1))


def rises(levels: F32) -> F32:
    """`_search.table_sums`'s table; empty for integers in a row, which need none."""
    steps = np.diff(levels)
    if (steps == 1).all():
        return np.empty((0, 2), np.float32)
    return np.stack([levels[:-1] + steps / 2, steps], axis=1)
