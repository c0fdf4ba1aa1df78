"""Types whose weights are sign · d·(2s+1)·unit · a point of a codebook: four or eight magnitudes share one number.

The search for points of four (IQ3_XXS, IQ3_S; of eight: `_eights`), sixteen rows in SIMD lanes as in `_search`; `x` is a weight's
magnitude:

1. Per group, a ladder of candidate scales; for each, every vector takes the point of least weighted squared error among ALL
   points (ggml looks at neighbours of the rounded vector), Σw·g² − 2Σw·(x/scale)·g, of which the first term is the same for
   all rows. Then the scale by least squares, the error in closed form; the best one stays.
2. Per block, `rounds` times: d rounded to float16 from the largest scale, at s = 15; every group tries the s nearest to its
   own scale and both neighbours, points chosen anew for each; d fitted again by least squares. The best round stays.

Signs are free, or (IQ3_XXS, IQ2_XS, IQ2_XXS) an even number of a vector's eight is negative: then the weight of least w·x² is
held for the other sign. There is no zero: a zero weight beside others becomes ± the least magnitude, unlike in the other types.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xent_quant.compilation import jit
from xent_quant.formats._chunks import TOO_LARGE, in_chunks
from xent_quant.formats._codes import Efforts
from xent_quant.formats._lanes import WIDTH, absolute, half, larger, load, rint, smaller, spread, store, store_bytes, where_less
from xent_quant.formats._search import HUGE, LARGEST, ONE, TINY, TWO, ZERO, empty, fill
from xent_quant.formats._vectors import Choice, Flags, VectorFormat, Vectors, chosen, closest, costs, inverted
from xent_quant.formats.base import F32, U8, Effort

U16 = NDArray[np.uint16]
HALF, TOP = np.float32(0.5), np.float32(15)


@jit
def group_sums(x, w, start, size, scale, cost, grid):  # type: ignore[no-untyped-def]
    """Σwg² and Σwxg of a group whose vectors take their best points at `scale`; 0 is a scale too."""
    dim = grid.shape[1]
    inverse = where_less(ZERO, scale, ONE / scale, ZERO)
    sll = sxl = spread(ZERO)
    for vector in range(start // dim, (start + size) // dim):
        _, energy, dot = closest(x, vector * dim, w, inverse, cost[vector], grid)
        sll = sll + energy
        sxl = sxl + dot * HALF * scale
    return sll, sxl


@jit
def codebook(weights, importance, ladder, rounds, size, unit, grid, numbers, inner, outer):  # type: ignore[no-untyped-def]
    """Fill numbers [rows, columns / dim] u16, inner [rows, blocks · groups] u8 (s) and outer [rows, blocks] f32 (d), for
    magnitudes `weights` in groups of `size`. `grid` [points, dim] f32; `ladder` holds the magnitudes at which a group's
    largest is put."""
    dim = grid.shape[1]
    groups = 256 // size
    x = np.empty(256 * WIDTH, np.float32)
    found = np.empty(256 // dim * WIDTH, np.float32)
    inner_bytes = np.empty(groups * WIDTH, np.uint8)
    outer_floats = np.empty(WIDTH, np.float32)
    shape = groups * WIDTH
    sxx, scale = np.empty(shape, np.float32), np.empty(shape, np.float32)
    s, best_s = np.empty(shape, np.float32), np.empty(shape, np.float32)
    cost = np.empty((256 // dim, len(grid)), np.float32)
    zero = spread(ZERO)
    for block in range(weights.shape[1] // 256):
        w = importance[block * 256 : (block + 1) * 256]
        for vector in range(256 // dim):
            costs(w[vector * dim : (vector + 1) * dim], grid, cost[vector])
        for first in range(0, weights.shape[0], WIDTH):
            fill(weights, first, block * 256, 256, x)
            largest = zero
            for g in range(groups):
                peak = sxx_g = zero
                for i in range(g * size, (g + 1) * size):
                    value = load(x, i)
                    peak = larger(value, peak)
                    sxx_g = sxx_g + value * w[i] * value
                a = gain = zero
                for k in range(len(ladder)):
                    try_a = where_less(TINY, peak, peak / ladder[k], ZERO)
                    sll, sxl = group_sums(x, w, g * size, size, try_a, cost, grid)
                    try_a = sxl / sll
                    a, gain = where_less(gain, try_a * sxl, try_a, a), larger(try_a * sxl, gain)
                store(sxx, g, sxx_g)
                store(scale, g, a)
                largest = larger(a, largest)
            d = half(largest / (unit * (TWO * TOP + ONE)))
            least, best_d = spread(HUGE), d
            for g in range(groups):
                store(best_s, g, zero)
            for _ in range(rounds):
                inverse_d = where_less(ZERO, d, ONE / (d * unit), ZERO)
                total = aa = ax = zero
                for g in range(groups):
                    own = rint((load(scale, g) * inverse_d - ONE) * HALF)
                    s_g = sll_g = sxl_g = zero
                    error_g = spread(HUGE)
                    for move in range(3):
                        try_s = larger(smaller(own + np.float32((move + 1) % 3 - 1), TOP), ZERO)
                        a = d * unit * (TWO * try_s + ONE)
                        sll, sxl = group_sums(x, w, g * size, size, a, cost, grid)
                        error = load(sxx, g) + a * a * sll - TWO * a * sxl
                        s_g = where_less(error, error_g, try_s, s_g)
                        sll_g, sxl_g = where_less(error, error_g, sll, sll_g), where_less(error, error_g, sxl, sxl_g)
                        error_g = smaller(error, error_g)
                    store(s, g, s_g)
                    odd = TWO * s_g + ONE
                    store(scale, g, d * unit * odd)
                    total = total + error_g
                    aa, ax = aa + odd * odd * sll_g, ax + odd * sxl_g
                for g in range(groups):
                    store(best_s, g, where_less(total, least, load(s, g), load(best_s, g)))
                best_d = where_less(total, least, d, best_d)
                least = smaller(total, least)
                new_d = half(ax / (aa * unit))
                d = where_less(ZERO, new_d, where_less(LARGEST, absolute(new_d), d, new_d), d)
            for g in range(groups):
                s_g = load(best_s, g)
                a = best_d * unit * (TWO * s_g + ONE)
                inverse = where_less(ZERO, a, ONE / a, ZERO)
                for vector in range(g * size // dim, (g + 1) * size // dim):
                    number, _, _ = closest(x, vector * dim, w, inverse, cost[vector], grid)
                    store(found, vector, number)
                store_bytes(inner_bytes, g, s_g)
            store(outer_floats, 0, best_d)
            empty(found, first, block * 256 // dim, 256 // dim, numbers)
            empty(inner_bytes, first, block * groups, groups, inner)
            empty(outer_floats, first, block, 1, outer)


class Points(NamedTuple):
    """What the search chose, per block: point numbers [n, 256 / dim] uint16, signs [n, 32] uint8 (bit i of byte j set where
    weight 8j+i is negative), s [n, groups] uint8 and d [n, 1] float32."""

    numbers: U16
    signs: U8
    s: U8
    d: F32


class CodebookFormat(VectorFormat):
    """Subclasses set what follows, and write `store` and `load` of `Points`."""

    unit: np.float32
    even_signs = False
    efforts: Efforts

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        weighting = np.ones(weights.shape[1], np.float32) if importance is None else importance

        def work(part: F32, out: U8) -> str:
            negative = part < 0
            magnitudes = np.abs(part)
            if self.even_signs:
                _make_even(negative, magnitudes, weighting)
            numbers, inner, outer = self.search(magnitudes, weighting, effort)
            if not (outer <= LARGEST).all():
                return TOO_LARGE
            signs = np.packbits(negative, axis=1, bitorder="little").reshape(-1, 32)
            found = Points(numbers.reshape(outer.size, -1), signs, inner.reshape(outer.size, -1), outer.reshape(-1, 1))
            self.store(out.reshape(-1, self.block_bytes), found)
            return ""

        return in_chunks(weights, packed, work)

    def search(self, magnitudes: F32, importance: F32, effort: Effort) -> tuple[U16, U8, F32]:
        """Point numbers [rows, columns / dim], s [rows, blocks · groups] and d [rows, blocks] for magnitudes [rows, columns]."""
        rows, columns = magnitudes.shape
        blocks, groups = columns // 256, 256 // self.group_size
        numbers = np.empty((rows, columns // self.points.shape[1]), np.uint16)
        inner, outer = np.empty((rows, blocks * groups), np.uint8), np.empty((rows, blocks), np.float32)
        candidates, rounds = getattr(self.efforts, effort)
        codebook(magnitudes, importance, candidates, rounds, self.group_size, self.unit, self.points, numbers, inner, outer)
        return numbers, inner, outer

    def scale(self, points: Points) -> F32:
        """Of every group, [n, groups]."""
        return points.d * self.unit * (2 * points.s.astype(np.float32) + 1)

    def vectors(self, packed: U8) -> Vectors:
        """See `VectorFormat.vectors`."""
        return SignedVectors(self, packed)

    def dequantize_rows(self, packed: U8) -> F32:
        found = self.load(packed.reshape(-1, self.block_bytes))
        scale = self.scale(found)
        points = self.points[found.numbers].reshape(len(scale), -1, self.group_size)
        points *= scale[:, :, None]
        values: F32 = points.reshape(len(packed), -1)
        np.negative(values, out=values, where=np.unpackbits(found.signs, bitorder="little").reshape(values.shape) > 0)
        return values


class SignedVectors(Vectors):
    """Of a CodebookFormat."""

    def __init__(self, kind: CodebookFormat, packed: U8) -> None:
        self._kind, self._packed = kind, packed
        self._found = kind.load(packed.reshape(-1, kind.block_bytes))
        dim = kind.points.shape[1]
        self.size = 8 if kind.even_signs else dim
        self._scale = kind.scale(self._found).reshape(len(packed), -1)
        self._numbers = self._found.numbers.astype(np.uint16).reshape(len(packed), -1, self.size // dim)
        signs = np.unpackbits(self._found.signs, axis=1, bitorder="little")
        self._negative = (signs > 0).reshape(len(packed), -1, self.size)

    def choose(self, vector: int, targets: F32, weights: F32) -> Choice:
        """See `Vectors.choose`."""
        scale = np.ascontiguousarray(self._scale[:, vector * self.size // self._kind.group_size, None])
        negative, magnitudes = targets < 0, np.abs(targets) * inverted(scale)
        if self._kind.even_signs:
            _make_even(negative, magnitudes, weights)
        numbers, _ = chosen(magnitudes, weights, self._kind.points)
        values = self._kind.points[numbers].reshape(targets.shape) * scale
        return Choice(np.where(negative, -values, values), numbers, negative)

    def keep(self, vector: int, choice: Choice, rows: Flags) -> None:
        """See `Vectors.keep`."""
        self._numbers[rows, vector] = choice.numbers[rows]
        self._negative[rows, vector] = choice.flags[rows]

    def packed(self) -> U8:
        """See `Vectors.packed`."""
        packed = self._packed.copy()
        blocks = packed.reshape(-1, self._kind.block_bytes)
        signs = np.packbits(self._negative.reshape(len(blocks), -1), axis=1, bitorder="little")
        self._kind.store(blocks, self._found._replace(numbers=self._numbers.reshape(len(blocks), -1), signs=signs))
        return packed


def _make_even(negative: NDArray[np.bool_], magnitudes: F32, importance: F32) -> None:
    """Give every eight weights an even number of negative signs: the one of least w·x² is held for the other sign."""
    signs, values = negative.reshape(-1, 8), magnitudes.reshape(-1, 8)
    odd = np.flatnonzero(signs.sum(axis=1) & 1)
    weights = np.broadcast_to(importance, magnitudes.shape).reshape(-1, 8)
    least = (weights[odd] * values[odd] * values[odd]).argmin(axis=1)
    signs[odd, least] ^= True
    values[odd, least] *= -1


SEVENS = np.array([0, 7, 14, 21], np.uint32)
"""Where a word of `signed_scales` has its four times seven signs."""


def with_eighth(sevens: U8) -> U8:
    """Seven signs a byte, and above them the one that makes the number of negative ones even."""
    return sevens | ((np.bitwise_count(sevens) & np.uint8(1)) << np.uint8(7))


def signed_scales(s: U8, signs: U8) -> U8:
    """[n, 32] uint8: per sub-block a little-endian word, s [n, 8] on top of the first seven of each eight signs [n, 32]."""
    sevens = (signs & np.uint8(127)).reshape(-1, 8, 4).astype(np.uint32)
    words: NDArray[np.uint32] = (sevens << SEVENS).sum(axis=2, dtype=np.uint32) | (s.astype(np.uint32) << np.uint32(28))
    raw: U8 = words.astype("<u4").view(np.uint8)
    return raw


def scales_and_signs(raw: U8) -> tuple[U8, U8]:
    """The inverse: s [n, 8] and signs [n, 32], the eighth as in `with_eighth`."""
    words = np.ascontiguousarray(raw).view("<u4").astype(np.uint32)  # [n, 8]
    sevens = ((words[:, :, None] >> SEVENS) & np.uint32(127)).astype(np.uint8).reshape(-1, 32)
    return (words >> np.uint32(28)).astype(np.uint8), with_eighth(sevens)
