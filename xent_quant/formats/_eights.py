"""Types whose weights come eight at a time from a list of points, each of whose values is one of three levels.

weight = ±d·(2s+1)·unit·level, s in 0…top per group (IQ2_XXS, IQ2_XS, IQ2_S; `x` below is a weight's magnitude); or, signs being
the levels' own, d·(2s+1)·(level ± delta) with one sign of delta per run of vectors (IQ1_S, IQ1_M).

At a scale, a vector's point is the one of least Σw·l·(l − 2x/scale), looked for among ALL points (ggml looks at neighbours of the
rounded vector). A point is two halves of four levels, of which there are 81: the sums of all of them are made once, each as
(0 + 1) + (2 + 3). Points that share their last half are a family: in each the least first half is found, then the family of the
least sum; of equal ones the first. The sign of delta is that of the least sum over its run, plus where they are equal.

The search, sixteen rows in SIMD lanes as in `_search`:

1. Per group, a ladder of scales, each weight taking its own level as if all combinations were points, which costs little. The
   scale of least error stays, with its signs of delta.
2. Multiples of it, with points and signs of delta chosen for each; again the least error's stay.
3. Per block, `rounds` times: d rounded to float16, at first from the largest scale, at s = top; every group tries the s nearest
   to its own scale and both neighbours, points chosen anew for each (or levels, where step 2 had no multiples). With points
   chosen at the best, d is fitted to them by least squares and rounded; the block's error with it follows in closed form. The
   best round stays.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xent_quant.compilation import jit
from xent_quant.formats._chunks import TOO_LARGE, in_chunks
from xent_quant.formats._codebook import CodebookFormat
from xent_quant.formats._codes import Efforts
from xent_quant.formats._lanes import WIDTH, absolute, half, larger, load, rint, smaller, spread, store, store_bytes, where_less
from xent_quant.formats._search import HUGE, LARGEST, ONE, TINY, TWO, ZERO, empty, fill
from xent_quant.formats._vectors import Choice, Flags, VectorFormat, Vectors, chosen, inverted
from xent_quant.formats.base import F32, U8, Effort

HALF = np.float32(0.5)
HALVES = 81
"""Halves of a point: four of three levels."""


@jit
def half_sums(x, start, w, twice, low, middle, high, pairs, out):  # type: ignore[no-untyped-def]
    """Fill out [81 · 16] with Σw·l·(l − x·twice) over the four weights from `start` on; levels count as digits of base 3, the
    first weight's the lowest. `pairs` [18 · 16] is room."""
    for part in range(2):
        i = start + 2 * part
        t, u = load(x, i) * twice, load(x, i + 1) * twice
        a0, a1, a2 = w[i] * low * (low - t), w[i] * middle * (middle - t), w[i] * high * (high - t)
        b0, b1, b2 = w[i + 1] * low * (low - u), w[i + 1] * middle * (middle - u), w[i + 1] * high * (high - u)
        store(pairs, 9 * part, a0 + b0)
        store(pairs, 9 * part + 1, a1 + b0)
        store(pairs, 9 * part + 2, a2 + b0)
        store(pairs, 9 * part + 3, a0 + b1)
        store(pairs, 9 * part + 4, a1 + b1)
        store(pairs, 9 * part + 5, a2 + b1)
        store(pairs, 9 * part + 6, a0 + b2)
        store(pairs, 9 * part + 7, a1 + b2)
        store(pairs, 9 * part + 8, a2 + b2)
    for j in range(9):
        b = load(pairs, 9 + j)
        for i in range(9):
            store(out, 9 * j + i, load(pairs, i) + b)


@jit
def closest(x, start, w, inverse, shift, levels, begin, firsts, room, families):  # type: ignore[no-untyped-def]
    """The least sum of the vector at x[start]; `families` [16] gets the last half of its point, `room` holds the sums of halves.

    Points begin[j] … begin[j + 1] have the last half j; firsts [points] holds their first halves.
    """
    pairs, first, last = room
    low, middle, high = shift + levels[0], shift + levels[1], shift + levels[2]
    twice = inverse * TWO
    half_sums(x, start, w, twice, low, middle, high, pairs, first)
    half_sums(x, start + 4, w, twice, low, middle, high, pairs, last)
    family, least = spread(ZERO), spread(HUGE)
    for j in range(HALVES):
        best = spread(HUGE)
        for point in range(begin[j], begin[j + 1]):
            best = smaller(best, load(first, firsts[point]))  # unsigned: numba need not look for negative indices
        score = load(last, j) + best
        family = where_less(score, least, np.float32(j), family)
        least = smaller(score, least)
    store(families, 0, family)
    return least


@jit
def find(families, shifts, begin, firsts, first, energies, numbers, floats):  # type: ignore[no-untyped-def]
    """Fill numbers [16] with the points that `closest` found; returns their Σw·l². `energies` [signs, 2, 81] is of the vector."""
    for lane in range(WIDTH):
        j = int(families[lane])
        number, best = begin[j], HUGE
        for point in range(begin[j], begin[j + 1]):
            value = first[firsts[point] * WIDTH + lane]
            if value < best:
                best, number = value, point
        numbers[lane] = number
        sign = 1 if shifts[lane] < ZERO else 0
        floats[lane] = energies[sign, 0, firsts[number]] + energies[sign, 1, j]
    return load(floats, 0)


@jit
def rounded(x, start, size, w, twice, shift, levels):  # type: ignore[no-untyped-def]
    """Σw·l·(l − x·twice) where each weight takes the level that makes it least."""
    low, middle, high = shift + levels[0], shift + levels[1], shift + levels[2]
    total = spread(ZERO)
    for i in range(start, start + size):
        t = load(x, i) * twice
        total = total + smaller(smaller(low * (low - t), middle * (middle - t)), high * (high - t)) * w[i]
    return total


@jit
def rough_least(x, start, size, w, scale, run, delta, choose, shifts, levels):  # type: ignore[no-untyped-def]
    """As `group_least`, were every combination of levels a point."""
    twice = where_less(ZERO, scale, ONE / scale, ZERO) * TWO
    total = spread(ZERO)
    for r in range(start // 8 // run, (start + size) // 8 // run):
        shift = spread(delta) if choose else load(shifts, r)
        least = rounded(x, 8 * r * run, 8 * run, w, twice, shift, levels)
        if choose:
            minus = rounded(x, 8 * r * run, 8 * run, w, twice, spread(-delta), levels)
            store(shifts, r, where_less(minus, least, -delta, spread(delta)))
            least = smaller(minus, least)
        total = total + least
    return total


@jit
def group_least(x, start, size, w, scale, run, delta, choose, shifts, levels, begin, firsts, room, families):  # type: ignore[no-untyped-def]
    """The least sum of a group at `scale`. shifts [runs · 16] holds ± delta of the runs; with `choose` it is filled."""
    inverse = where_less(ZERO, scale, ONE / scale, ZERO)
    total = spread(ZERO)
    for r in range(start // 8 // run, (start + size) // 8 // run):
        least = minus = spread(ZERO)
        shift = spread(delta) if choose else load(shifts, r)
        for vector in range(r * run, (r + 1) * run):
            least = least + closest(x, vector * 8, w, inverse, shift, levels, begin, firsts, room, families)
        if choose:
            for vector in range(r * run, (r + 1) * run):
                minus = minus + closest(x, vector * 8, w, inverse, spread(-delta), levels, begin, firsts, room, families)
            store(shifts, r, where_less(minus, least, -delta, spread(delta)))
            least = smaller(minus, least)
        total = total + least
    return total


@jit
def group_sums(x, start, size, w, scale, run, shifts, levels, begin, firsts, energies, room, lanes, numbers):  # type: ignore[no-untyped-def]
    """Σwl² and Σwxl of a group whose vectors take their best points at `scale` with `shifts`; 0 is a scale too. numbers
    [vectors · 16] gets the points."""
    families, floats, signs = lanes
    inverse = where_less(ZERO, scale, ONE / scale, ZERO)
    sll = sxl = spread(ZERO)
    for vector in range(start // 8, (start + size) // 8):
        shift = load(shifts, vector // run)
        store(signs, 0, shift)
        least = closest(x, vector * 8, w, inverse, shift, levels, begin, firsts, room, families)
        out = numbers[vector * WIDTH : (vector + 1) * WIDTH]
        energy = find(families, signs, begin, firsts, room[1], energies[vector], out, floats)
        sll = sll + energy
        sxl = sxl + (energy - least) * HALF * scale
    return sll, sxl


@jit
def energies_of(w, levels, delta, out):  # type: ignore[no-untyped-def]
    """Fill out [32, 2 signs, 2 halves, 81] with Σw·l² of every half of every vector."""
    for vector in range(len(out)):
        for sign in range(2):
            shift = -delta if sign else delta
            for part in range(2):
                base = vector * 8 + part * 4
                for number in range(HALVES):
                    a = levels[number % 3] + shift
                    b = levels[number // 3 % 3] + shift
                    c = levels[number // 9 % 3] + shift
                    e = levels[number // 27] + shift
                    ab = w[base] * a * a + w[base + 1] * b * b
                    out[vector, sign, part, number] = ab + (w[base + 2] * c * c + w[base + 3] * e * e)


@jit
def eights(weights, importance, ladder, fine, rounds, size, unit, top, delta, run, families, numbers, signs, inner, outer):  # type: ignore[no-untyped-def]
    """Fill numbers [rows, columns / 8] u16, signs [rows, columns / 8 / run] u8 (1: minus delta), inner [rows, blocks · groups]
    u8 (s) and outer [rows, blocks] f32 (d), for `weights` in groups of `size`. `ladder` holds the levels at which a group's
    weight of largest magnitude is put, `fine` the multiples of the scale found there; delta 0 asks for no choice of signs.
    `families` is a Families."""
    begin, firsts, levels = families
    groups, runs = 256 // size, 32 // run
    shape = groups * WIDTH
    x = np.empty(256 * WIDTH, np.float32)
    room = (np.empty(18 * WIDTH, np.float32), np.empty(HALVES * WIDTH, np.float32), np.empty(HALVES * WIDTH, np.float32))
    lanes = (np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32))
    energies = np.empty((32, 2, 2, HALVES), np.float32)
    found, best_found = np.empty(32 * WIDTH, np.uint16), np.empty(32 * WIDTH, np.uint16)
    shifts, best_shifts = np.empty(runs * WIDTH, np.float32), np.empty(runs * WIDTH, np.float32)
    sxx, scale = np.empty(shape, np.float32), np.empty(shape, np.float32)
    s, best_s = np.empty(shape, np.float32), np.empty(shape, np.float32)
    inner_bytes, sign_bytes = np.empty(shape, np.uint8), np.empty(runs * WIDTH, np.uint8)
    outer_floats = np.empty(WIDTH, np.float32)
    choose = delta > ZERO
    zero = spread(ZERO)
    for block in range(weights.shape[1] // 256):
        w = importance[block * 256 : (block + 1) * 256]
        energies_of(w, levels, delta, energies)
        for first in range(0, weights.shape[0], WIDTH):
            fill(weights, first, block * 256, 256, x)
            for r in range(runs):
                store(shifts, r, spread(delta))
                store(best_shifts, r, spread(delta))
            largest = zero
            for g in range(groups):
                peak = sxx_g = zero
                for i in range(g * size, (g + 1) * size):
                    value = load(x, i)
                    peak = larger(absolute(value), peak)
                    sxx_g = sxx_g + value * w[i] * value
                a = least = zero
                for k in range(len(ladder)):
                    try_a = where_less(TINY, peak, peak / ladder[k], ZERO)
                    error = try_a * try_a * rough_least(x, g * size, size, w, try_a, run, delta, choose, shifts, levels)
                    for r in range(g * size // 8 // run, (g + 1) * size // 8 // run):
                        store(best_shifts, r, where_less(error, least, load(shifts, r), load(best_shifts, r)))
                    a, least = where_less(error, least, try_a, a), smaller(error, least)
                rough = a
                least = zero
                for k in range(len(fine)):
                    try_a = rough * fine[k]
                    error = try_a * try_a * group_least(
                        x, g * size, size, w, try_a, run, delta, choose, shifts, levels, begin, firsts, room, lanes[0]
                    )  # fmt: skip
                    for r in range(g * size // 8 // run, (g + 1) * size // 8 // run):
                        store(best_shifts, r, where_less(error, least, load(shifts, r), load(best_shifts, r)))
                    a, least = where_less(error, least, try_a, a), smaller(error, least)
                store(sxx, g, sxx_g)
                store(scale, g, a)
                largest = larger(a, largest)
            d = half(largest / (unit * (TWO * top + ONE)))
            least, best_d = spread(HUGE), d
            for g in range(groups):
                store(best_s, g, zero)
            for _ in range(rounds):
                inverse_d = where_less(ZERO, d, ONE / (d * unit), ZERO)
                energy = aa = ax = zero
                for g in range(groups):
                    own = rint((load(scale, g) * inverse_d - ONE) * HALF)
                    s_g, error_g = zero, spread(HUGE)
                    for move in range(3):
                        try_s = larger(smaller(own + np.float32((move + 1) % 3 - 1), top), ZERO)
                        a = d * unit * (TWO * try_s + ONE)
                        if len(fine):
                            total = group_least(
                                x, g * size, size, w, a, run, delta, False, best_shifts, levels, begin, firsts, room, lanes[0]
                            )  # fmt: skip
                        else:
                            total = rough_least(x, g * size, size, w, a, run, delta, False, best_shifts, levels)
                        error = a * a * total
                        s_g, error_g = where_less(error, error_g, try_s, s_g), smaller(error, error_g)
                    odd = TWO * s_g + ONE
                    a = d * unit * odd
                    sll, sxl = group_sums(
                        x, g * size, size, w, a, run, best_shifts, levels, begin, firsts, energies, room, lanes, found
                    )  # fmt: skip
                    store(s, g, s_g)
                    store(scale, g, a)
                    energy = energy + load(sxx, g)
                    aa, ax = aa + odd * odd * sll, ax + odd * sxl
                new_d = half(ax / (aa * unit))
                d = where_less(ZERO, new_d, where_less(LARGEST, absolute(new_d), d, new_d), d)
                a = d * unit
                total = energy + a * a * aa - TWO * a * ax
                for g in range(groups):
                    store(best_s, g, where_less(total, least, load(s, g), load(best_s, g)))
                store(lanes[0], 0, total - least)
                for lane in range(WIDTH):
                    if lanes[0][lane] < ZERO:
                        for vector in range(32):
                            best_found[vector * WIDTH + lane] = found[vector * WIDTH + lane]
                best_d = where_less(total, least, d, best_d)
                least = smaller(total, least)
            for g in range(groups):
                store_bytes(inner_bytes, g, load(best_s, g))
            for r in range(runs):
                store_bytes(sign_bytes, r, where_less(load(best_shifts, r), ZERO, ONE, zero))
            store(outer_floats, 0, best_d)
            empty(best_found, first, block * 32, 32, numbers)
            empty(sign_bytes, first, block * runs, runs, signs)
            empty(inner_bytes, first, block * groups, groups, inner)
            empty(outer_floats, first, block, 1, outer)


class Families(NamedTuple):
    """Points by their last half, for `closest`: begin [82] uint64 and firsts [points] int64; the three levels, [3] float32."""

    begin: NDArray[np.uint64]
    firsts: NDArray[np.int64]
    levels: F32

    @classmethod
    def of(cls, points: F32) -> "Families":
        """Of points [points, 8] float32, sorted by their last half as ggml's are."""
        levels = np.unique(points)
        digits = np.searchsorted(levels, points)
        powers = 3 ** np.arange(4)
        lasts = digits[:, 4:] @ powers
        begin = np.searchsorted(lasts, np.arange(HALVES + 1)).astype(np.uint64)
        return cls(begin, digits[:, :4] @ powers, levels.astype(np.float32))


class EightsFormat(CodebookFormat):
    """Signs beside magnitudes. Subclasses set what CodebookFormat asks for."""

    families: Families
    ladder = np.geomspace(30, 120, 12, dtype=np.float32)
    efforts = Efforts(
        fast=(np.array([1], np.float32), 1),
        normal=(np.array([1, 1.15, 1.3], np.float32), 1),
        high=(np.geomspace(0.7, 1.8, 12, dtype=np.float32), 2),
    )
    """Candidates: multiples of the scale that the ladder finds."""

    def search(self, magnitudes: F32, importance: F32, effort: Effort) -> tuple[NDArray[np.uint16], U8, F32]:
        rows, columns = magnitudes.shape
        blocks, groups = columns // 256, 256 // self.group_size
        numbers, signs = np.empty((rows, columns // 8), np.uint16), np.empty((rows, blocks * groups), np.uint8)
        inner, outer = np.empty((rows, blocks * groups), np.uint8), np.empty((rows, blocks), np.float32)
        candidates, rounds = getattr(self.efforts, effort)
        run = self.group_size // 8
        eights(
            magnitudes, importance, self.ladder, candidates, rounds, self.group_size, self.unit, np.float32(15), ZERO, run,
            self.families, numbers, signs, inner, outer,
        )  # fmt: skip
        return numbers, inner, outer


class ShiftedPoints(NamedTuple):
    """What the search chose, per block: point numbers [n, 32] uint16, the runs whose delta is subtracted [n, 32 / run] uint8 (1),
    s [n, groups] uint8 and d [n, 1] float32."""

    numbers: NDArray[np.uint16]
    minus: U8
    s: U8
    d: F32


class ShiftedFormat(VectorFormat):
    """w = d·(2s+1)·(level ± delta), levels −1, 0 and 1, s in 0…7. Subclasses set what follows, and write `store` and `load`
    of `ShiftedPoints`."""

    delta = np.float32(0.125)
    run: int
    """Vectors of eight that share a sign of delta."""
    families: Families
    ladder = np.geomspace(1, 5, 12, dtype=np.float32)
    efforts = Efforts(
        fast=(np.empty(0, np.float32), 1),
        normal=(np.empty(0, np.float32), 1),
        high=(np.array([0.9, 1, 1.1], np.float32), 3),
    )
    """Candidates as of EightsFormat. 2048 points are nearly all that there is to find: looking among them earlier than for the
    weights themselves costs half of the speed and takes half a hundredth off the error."""

    def quantize_rows(self, weights: F32, importance: F32 | None, packed: U8, effort: Effort) -> str:
        weighting = np.ones(weights.shape[1], np.float32) if importance is None else importance
        candidates, rounds = getattr(self.efforts, effort)

        def work(part: F32, out: U8) -> str:
            rows, columns = part.shape
            blocks, groups = columns // 256, 256 // self.group_size
            numbers, minus = np.empty((rows, columns // 8), np.uint16), np.empty((rows, columns // 8 // self.run), np.uint8)
            inner, outer = np.empty((rows, blocks * groups), np.uint8), np.empty((rows, blocks), np.float32)
            eights(
                part, weighting, self.ladder, candidates, rounds, self.group_size, ONE, np.float32(7), self.delta, self.run,
                self.families, numbers, minus, inner, outer,
            )  # fmt: skip
            if not (outer <= LARGEST).all():
                return TOO_LARGE
            found = ShiftedPoints(
                numbers.reshape(-1, 32), minus.reshape(-1, 32 // self.run), inner.reshape(-1, groups), outer.reshape(-1, 1)
            )
            self.store(out.reshape(-1, self.block_bytes), found)
            return ""

        return in_chunks(weights, packed, work)

    def scale(self, points: ShiftedPoints) -> F32:
        """Of every group, [n, groups]."""
        return points.d * (2 * points.s.astype(np.float32) + 1)

    def vectors(self, packed: U8) -> Vectors:
        """See `VectorFormat.vectors`."""
        return ShiftedVectors(self, packed)

    def dequantize_rows(self, packed: U8) -> F32:
        found = self.load(packed.reshape(-1, self.block_bytes))
        scale = self.scale(found)
        levels = self.points[found.numbers].reshape(len(scale), 32 // self.run, -1)
        levels += np.where(found.minus > 0, -self.delta, self.delta)[:, :, None]
        values: F32 = levels.reshape(len(scale), -1, self.group_size) * scale[:, :, None]
        return values.reshape(len(packed), -1)


class ShiftedVectors(Vectors):
    """Of a ShiftedFormat. A sign of delta that is one vector's own is chosen with it."""

    size = 8

    def __init__(self, kind: ShiftedFormat, packed: U8) -> None:
        self._kind, self._packed = kind, packed
        self._found = kind.load(packed.reshape(-1, kind.block_bytes))
        self._scale = kind.scale(self._found).reshape(len(packed), -1)
        self._numbers = self._found.numbers.astype(np.uint16).reshape(len(packed), -1)
        self._minus = (self._found.minus > 0).reshape(len(packed), -1)

    def choose(self, vector: int, targets: F32, weights: F32) -> Choice:
        """See `Vectors.choose`."""
        kind, run = self._kind, vector // self._kind.run
        scale = np.ascontiguousarray(self._scale[:, vector * 8 // kind.group_size, None])
        levels = targets * inverted(scale)
        minus = self._minus[:, run, None]
        if kind.run == 1:
            found = [chosen(levels - shift, weights, kind.points) for shift in (kind.delta, -kind.delta)]
            losses = [
                loss[:, 0] + ((levels - shift) ** 2 * weights).sum(axis=1)
                for (_, loss), shift in zip(found, (kind.delta, -kind.delta), strict=True)
            ]
            minus = (losses[1] < losses[0])[:, None]
            numbers = np.where(minus, found[1][0], found[0][0])
        else:
            numbers, _ = chosen(levels - np.where(minus, -kind.delta, kind.delta), weights, kind.points)
        values = (kind.points[numbers[:, 0]] + np.where(minus, -kind.delta, kind.delta)) * scale
        return Choice(values, numbers, minus)

    def keep(self, vector: int, choice: Choice, rows: Flags) -> None:
        """See `Vectors.keep`."""
        self._numbers[rows, vector] = choice.numbers[rows, 0]
        self._minus[rows, vector // self._kind.run] = choice.flags[rows, 0]

    def packed(self) -> U8:
        """See `Vectors.packed`."""
        packed = self._packed.copy()
        blocks = packed.reshape(-1, self._kind.block_bytes)
        minus = self._minus.reshape(len(blocks), -1).astype(np.uint8)
        self._kind.store(blocks, self._found._replace(numbers=self._numbers.reshape(len(blocks), -1), minus=minus))
        return packed
