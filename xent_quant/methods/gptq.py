"""GPTQ inside any grid: codes chosen column by column, every column's rounding error passed on to those not yet rounded.

With H = mean x xᵀ (damped) the output error of a row is e H eᵀ, e = w − ŵ. H = U D Uᵀ, U unit upper triangular, turns it
into Σ_j D_j (e U)_j²: column j rounds w_j + Σ_{i<j} e_i U_ij, and nothing chosen later can mend what is left of it. This is
GPTQ (Frantar et al., 2022) without the inverse of H: the LDLQ form, equal to it by theorem 6 of QuIP (Chee et al., 2023).

1. `Rows.feed`: block after block of the type, scales by the weighted search on weights that already make up for all errors
   before them, then codes with error feedback. (Where scales are made of the whole weight beforehand, as bitsandbytes does,
   they stay.)
2. `Rows.sweep`: every block once more, scales and codes, for the errors of all others, before and after it, kept in those
   rows where e H eᵀ falls; then rounds of coordinate descent on single codes, which only lower it.
3. On held-out inputs, every row keeps the better of this and the weighted search.

Types that share codes among weights (codebooks) do the same vector by vector (block LDLQ, as in QuIP#, Tseng et al., 2024):
a vector's errors are passed on together, its point is the nearest by the diagonal of what its errors cost. All of that little
matrix instead of its diagonal was tried: the same loss within 1 %.

Rows are independent of each other. Floats, and weights without a Hessian or without held-out rows, are left to the weighted
search.
"""

import itertools
from functools import partial

import numpy as np
from numpy.typing import NDArray

from xent_quant import parallel
from xent_quant.compilation import jit
from xent_quant.errors import QuantizationError
from xent_quant.formats._codes import CodedFormat
from xent_quant.formats._lanes import (
    WIDTH,
    absolute,
    larger,
    load,
    rint,
    smaller,
    spread,
    store,
    store_bytes,
    where_less,
)
from xent_quant.formats._vectors import VectorFormat, Vectors
from xent_quant.formats.base import F32, U8, Effort, Encoding
from xent_quant.formats.prescaled import Prescaled
from xent_quant.linalg import Curvature, product, row_chunks
from xent_quant.methods.search import Search, searched
from xent_quant.tensors import InputStatistics

F64 = NDArray[np.float64]

TOGETHER = 128
"""Columns that pass errors on among themselves one by one; what they leave to later ones of a block is one matrix product."""

LAZY = 256
"""Columns between two updates of all later columns by one matrix product; those that coordinate descent turns to together."""

EFFORTS: dict[Effort, tuple[int, int, int]] = {"fast": (0, 0, 0), "normal": (1, 3, 1), "high": (3, 3, 3)}
"""Sweeps, and rounds of coordinate descent in each: of codes, and of vectors, which take longer."""

Gridded = CodedFormat | VectorFormat
"""What is rounded here."""


@jit
def nearest(x, lowest, top, steps, levels):  # type: ignore[no-untyped-def]
    """(codes, levels) nearest to x, lane by lane; NaN gets code 0. `steps`: levels are the integers from `lowest` on."""
    if steps:
        code = smaller(larger(rint(x) - lowest, np.float32(0)), top)
        return code, code + lowest
    code, level = spread(np.float32(0)), spread(levels[0])
    for index in range(len(levels) - 1):
        middle = (levels[index] + levels[index + 1]) * np.float32(0.5)
        code = where_less(middle, x, np.float32(index + 1), code)
        level = where_less(middle, x, levels[index + 1], level)
    return code, level


@jit
def round_columns(weights, targets, factor, scale, offset, levels, uniform, start, stop, codes, errors):  # type: ignore[no-untyped-def]
    """Round columns start…stop of targets [rows, n] in order, passing errors on among them by `factor` [n, n] (U of the n).

    `targets` are `weights` [rows, n] with the errors of all columns before these passed on. `scale`, `offset` [rows, groups] and
    `levels` as in Grid; `uniform` tells that levels are consecutive integers. Fills codes [rows, n] u8 and errors [rows, n] f32,
    weights less what the codes stand for. Sixteen rows go through together.
    """
    rows, columns = targets.shape
    group = columns // scale.shape[1]
    count = stop - start
    top = np.float32(len(levels) - 1)
    passed = np.empty(count * count, np.float32)  # column after column
    for j in range(count):
        for i in range(j):
            passed[j * count + i] = factor[start + i, start + j]
    weight = np.zeros(count * WIDTH, np.float32)
    target, error = np.zeros_like(weight), np.zeros_like(weight)
    scales, offsets = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    chosen = np.zeros(count * WIDTH, np.uint8)
    for first in range(0, rows, WIDTH):
        lanes = min(WIDTH, rows - first)
        for lane in range(lanes):
            for j in range(count):
                weight[j * WIDTH + lane] = weights[first + lane, start + j]
                target[j * WIDTH + lane] = targets[first + lane, start + j]
        for j in range(count):
            if j == 0 or (start + j) % group == 0:
                for lane in range(lanes):
                    scales[lane] = scale[first + lane, (start + j) // group]
                    offsets[lane] = offset[first + lane, (start + j) // group]
            s, m, t = load(scales, 0), load(offsets, 0), load(target, j)
            for i in range(j):
                t = t + load(error, i) * passed[j * count + i]
            code, level = nearest((t - m) / s, levels[0], top, uniform, levels)
            code = where_less(np.float32(0), absolute(s), code, np.float32(0))
            level = where_less(np.float32(0), absolute(s), level, levels[0])
            store_bytes(chosen, j, code)
            store(error, j, load(weight, j) - (s * level + m))
        for lane in range(lanes):
            for j in range(count):
                codes[first + lane, start + j] = chosen[j * WIDTH + lane]
                errors[first + lane, start + j] = error[j * WIDTH + lane]


@jit
def descend(weights, gradient, hessian, scale, offset, levels, uniform, codes, errors):  # type: ignore[no-untyped-def]
    """One round of coordinate descent: every code in turn becomes the best one for the errors of all other columns.

    `gradient` [rows, n] is e H at these columns, `hessian` [n, n] the block of H; all three results are updated in place.
    """
    rows, columns = weights.shape
    group = columns // scale.shape[1]
    top = len(levels) - 1
    reach = np.diff(levels).min() * np.float32(0.499)  # within it the code that is there is the nearest
    for row in range(rows):
        for j in range(columns):
            s, m = scale[row, j // group], offset[row, j // group]
            if abs(gradient[row, j]) <= reach * abs(s) * hessian[j, j] or s == 0:
                continue
            x = (weights[row, j] - errors[row, j] + gradient[row, j] / hessian[j, j] - m) / s
            code = 0
            if uniform:
                x = np.rint(x) - levels[0]
                code = int(min(max(x, np.float32(0)), np.float32(top)))
            else:
                while code < top and x > (levels[code] + levels[code + 1]) * np.float32(0.5):
                    code += 1
            if code == codes[row, j]:
                continue
            codes[row, j] = code
            error = weights[row, j] - (s * levels[code] + m)
            change = error - errors[row, j]
            errors[row, j] = error
            for c in range(columns):
                gradient[row, c] += change * hessian[j, c]


def round_vectors(weights: F32, targets: F32, factor: F32, pivots: F32, vectors: Vectors) -> F32:
    """As `round_columns`, vector after vector of [rows, n]; `pivots` [n] is D. The errors.

    With the vector's own part U' of U and D' of D, and a the sum of what comes to it, what nothing after it can mend is
    (e U' + a) D' (e U' + a)ᵀ. So its weights should be moved by a U'⁻¹; by the diagonal of U' D' U'ᵀ its point is the nearest.
    """
    errors = np.empty(weights.shape, np.float32)
    for vector, start in enumerate(range(0, weights.shape[1], vectors.size)):
        own = slice(start, start + vectors.size)
        moved = weights[:, own] + product(targets[:, own] - weights[:, own], np.linalg.inv(factor[own, own]))
        choice = vectors.choose(vector, moved, np.square(factor[own, own]) @ pivots[own])
        vectors.keep(vector, choice, np.ones(len(weights), np.bool_))
        errors[:, own] = weights[:, own] - choice.values
        targets[:, own.stop :] += product(np.ascontiguousarray(errors[:, own]), factor[own, own.stop :])
    return errors


def descend_vectors(weights: F32, gradient: F32, hessian: F32, vectors: Vectors, errors: F32) -> None:
    """As `descend`, of vectors: each in turn takes the point nearest to where the gradient at its weights vanishes, in the rows
    where that lowers the loss. `gradient`, `vectors` and `errors` are updated in place."""
    for vector, start in enumerate(range(0, weights.shape[1], vectors.size)):
        own = slice(start, start + vectors.size)
        block = hessian[own, own]
        here, pulled = errors[:, own], gradient[:, own]
        wanted = weights[:, own] - here + product(pulled, np.linalg.inv(block.astype(np.float64)).astype(np.float32))
        choice = vectors.choose(vector, wanted, block.diagonal())
        change = weights[:, own] - choice.values - here
        better = ((2 * pulled + product(change, block)) * change).sum(axis=1) < 0
        vectors.keep(vector, choice, better)
        change[~better] = 0
        errors[:, own] += change
        gradient += product(change, hessian[own])


class GPTQ:
    """See the module."""

    name = "gptq"
    needs_hessian = True

    def __init__(self, effort: Effort = "normal") -> None:
        self.effort: Effort = effort
        self._search = Search(effort)

    def quantize(
        self, weights: F32, kind: Encoding, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        """See `Method.quantize`. Holds three copies of the weights, and what `Curvature` holds."""
        curvature = statistics.curvature if statistics else None
        if statistics is None or curvature is None:
            return self._search.quantize(weights, kind, statistics, name=name)
        if not np.isfinite(curvature.hessian).all():
            raise QuantizationError(f"{name}: the Hessian holds NaN or infinities; calibrate again")
        if statistics.held_out is not None and isinstance(kind, Gridded):
            return self._rounded(weights, None, kind, statistics, curvature, name, pull)
        wanted = weights if pull is None else weights + curvature.solve(pull)
        if statistics.held_out is not None and isinstance(kind, Prescaled):
            scaled = kind.scaled(wanted, name=name)
            if scaled is not None:
                return scaled.finish(self._rounded(weights, scaled.packed, scaled.kind, statistics, curvature, name, pull))
        return self._search.quantize(wanted, kind, statistics, name=name)

    def _rounded(
        self,
        weights: F32,
        scaled: U8 | None,
        kind: Gridded,
        statistics: InputStatistics,
        curvature: Curvature,
        name: str,
        pull: F32 | None,
    ) -> U8:
        """Packed rows of `kind`; within the scales of rows that are `scaled` already."""
        curvature.prepare(lumps(weights.shape[1], kind.block_size), kind.block_size if EFFORTS[self.effort][0] else 0)
        if pull is not None:
            _ = statistics.reaching
        work = partial(self._rows, kind=kind, statistics=statistics, curvature=curvature, name=name)
        given = (None if part is None else [part[rows] for rows in row_chunks(len(weights))] for part in (weights, scaled, pull))
        parts = [each or itertools.repeat(None) for each in given]
        return np.concatenate(parallel.run([partial(work, *row) for row in zip(*parts, strict=False)]))

    def _rows(
        self,
        weights: F32,
        scaled: U8 | None,
        pull: F32 | None,
        kind: Gridded,
        statistics: InputStatistics,
        curvature: Curvature,
        name: str,
    ) -> U8:
        searched = self._search.quantize(weights, kind, statistics, name=name) if scaled is None else scaled
        rows = Rows(weights, kind, curvature, statistics.importance, self.effort, name, pull, scaled)
        rows.feed()
        sweeps, *rounds = EFFORTS[self.effort]
        for _ in range(sweeps):
            rows.sweep(rounds[not isinstance(kind, CodedFormat)])
        pulled = None if pull is None else product(pull, statistics.reaching.T)
        ours = held_out_error(rows.errors, statistics, pulled)
        theirs = held_out_error(weights - kind.dequantize(searched), statistics, pulled)
        packed = rows.packed
        packed[ours > theirs] = searched[ours > theirs]
        return packed


def held_out_error(errors: F32, statistics: InputStatistics, pulled: F32 | None = None) -> F32:
    """Σ (x · e + p)² over the held-out inputs x, for every row e of [rows, columns] and p of `pulled` [rows, n] or 0; [rows]
    float32."""
    if statistics.held_out is None:
        raise ValueError("no held-out rows")
    outputs = product(errors, statistics.held_out.T)
    if pulled is not None:
        outputs += pulled
    found: F32 = np.einsum("ij,ij->i", outputs, outputs)
    return found


def lumps(columns: int, block: int) -> list[tuple[int, int]]:
    """Where so many columns are cut, in whole blocks of so many, see LAZY: (first, last + 1)."""
    size = max(block, LAZY // block * block)
    return [(start, min(start + size, columns)) for start in range(0, columns, size)]


class Rows:
    """Rows under way: `weights` and `errors` (weights less what the bytes stand for) [rows, columns].

    With a `pull` P what is lowered is the error of W + P H⁻¹, whose gradient is e H + P: the sum itself is never made.
    """

    def __init__(
        self,
        weights: F32,
        kind: Gridded,
        curvature: Curvature,
        importance: F32,
        effort: Effort,
        name: str,
        pull: F32 | None = None,
        scaled: U8 | None = None,
    ) -> None:
        self._scaled = scaled
        self.pull, self.weights, self.kind, self.curvature, self.importance = pull, weights, kind, curvature, importance
        self.effort: Effort = effort
        self.name = name
        self.errors = np.zeros_like(weights)
        self._packed = np.zeros((len(weights), kind.row_bytes(weights.shape[1])), np.uint8)
        """Bytes whose scales hold; their codes, where the type has some, are in `_codes`."""
        self._codes = np.empty(weights.shape if isinstance(kind, CodedFormat) else (0, 0), np.uint8)
        self._uniform = isinstance(kind, CodedFormat) and bool((np.diff(kind.levels) == 1).all())

    @property
    def packed(self) -> U8:
        """Their bytes."""
        return self.kind.with_codes(self._packed, self._codes) if isinstance(self.kind, CodedFormat) else self._packed

    def _bytes(self, start: int, stop: int) -> slice:
        return slice(start // self.kind.block_size * self.kind.block_bytes, stop // self.kind.block_size * self.kind.block_bytes)

    def feed(self) -> None:
        """The first pass."""
        step, pivots = self.kind.block_size, self.curvature.pivots
        pulled = self.weights if self.pull is None else self.weights + self.curvature.solve_half(self.pull)
        for start, stop in lumps(self.weights.shape[1], self.kind.block_size):
            before, factor = self.curvature.lump(start, stop)
            targets = pulled[:, start:stop] + product(self.errors[:, :start], before)
            for first in range(start, stop, step):
                last = first + step
                own, behind = slice(first - start, last - start), slice(last - start, None)
                block = np.ascontiguousarray(targets[:, own])
                packed = self._search(block, first, last)
                packed, codes, errors = self._round(
                    self.weights[:, first:last], block, factor[own, own], pivots[first:last], packed
                )
                self._packed[:, self._bytes(first, last)], self.errors[:, first:last] = packed, errors
                if codes is not None:
                    self._codes[:, first:last] = codes
                if last < stop:
                    targets[:, behind] += product(errors, factor[own, behind])

    def sweep(self, rounds: int) -> None:
        """The second pass."""
        step = self.kind.block_size
        for start, stop in lumps(self.weights.shape[1], self.kind.block_size):
            gradient = product(self.errors, self.curvature.hessian[start:stop].T)  # e H at these columns, H being symmetric
            if self.pull is not None:
                gradient += self.pull[:, start:stop]
            for first in range(start, stop, step):
                self._again(first, first + step, start, gradient)
            self._descend(start, stop, gradient, rounds)

    def _search(self, targets: F32, first: int, last: int) -> U8:
        if self._scaled is not None:
            return np.ascontiguousarray(self._scaled[:, self._bytes(first, last)])
        return searched(targets, self.kind, self.importance[first:last], self.effort, self.name)

    def _round(self, weights: F32, targets: F32, factor: F32, pivots: F32, packed: U8) -> tuple[U8, U8 | None, F32]:
        """Codes with error feedback within the grid of `packed`: (bytes with these scales, codes that they lack yet, errors)."""
        if not isinstance(self.kind, CodedFormat):
            vectors = self.kind.vectors(packed)
            errors = round_vectors(weights, targets, factor, pivots, vectors)
            return vectors.packed(), None, errors
        grid = self.kind.grid(packed)
        codes, errors = np.empty(weights.shape, np.uint8), np.empty(weights.shape, np.float32)
        weights, factor = np.ascontiguousarray(weights), np.ascontiguousarray(factor)
        columns = weights.shape[1]
        for start in range(0, columns, TOGETHER):
            stop = min(start + TOGETHER, columns)
            round_columns(
                weights, targets, factor, grid.scale, grid.offset, grid.levels, self._uniform, start, stop, codes, errors
            )
            if stop < columns:
                targets[:, stop:] += product(errors[:, start:stop], factor[start:stop, stop:])
        return packed, codes, errors

    def _again(self, first: int, last: int, start: int, gradient: F32) -> None:
        """Quantise columns first…last for the errors of all others; `gradient` is e H at `start`… and is kept up to date."""
        inverted, factor, pivots = self.curvature.block(first, last)
        own = slice(first - start, last - start)
        pulled, weights, errors = gradient[:, own], self.weights[:, first:last], self.errors[:, first:last]
        # The least of e H eᵀ over these columns alone lies where their gradient vanishes.
        targets = weights - errors + product(pulled, inverted)
        packed, codes, found = self._round(targets, targets.copy(), factor, pivots, self._search(targets, first, last))
        change = found + (weights - targets) - errors
        moved = product(change, self.curvature.hessian[first:last, start : start + gradient.shape[1]])
        better = np.einsum("ij,ij->i", 2 * pulled + moved[:, own], change) < 0
        change[~better] = 0
        moved[~better] = 0
        self._packed[better, self._bytes(first, last)] = packed[better]
        if codes is not None:
            self._codes[better, first:last] = codes[better]
        errors += change
        gradient += moved

    def _descend(self, start: int, stop: int, gradient: F32, rounds: int) -> None:
        here = self._bytes(start, stop)
        packed = np.ascontiguousarray(self._packed[:, here])
        if not isinstance(self.kind, CodedFormat):
            vectors = self.kind.vectors(packed)
            for _ in range(rounds):
                descend_vectors(
                    self.weights[:, start:stop],
                    gradient,
                    self.curvature.hessian[start:stop, start:stop],
                    vectors,
                    self.errors[:, start:stop],
                )
            self._packed[:, here] = vectors.packed()
            return
        grid, own = self.kind.grid(packed), slice(start, stop)
        weights, errors, codes = (np.ascontiguousarray(each[:, own]) for each in (self.weights, self.errors, self._codes))
        hessian = np.ascontiguousarray(self.curvature.hessian[own, own])
        for _ in range(rounds):
            descend(weights, gradient, hessian, grid.scale, grid.offset, grid.levels, self._uniform, codes, errors)
        self._codes[:, own], self.errors[:, own] = codes, errors
