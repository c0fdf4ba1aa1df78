"""Matrix products and factorisations whose bits do not depend on the number of threads. Imports torch when called."""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from xent_quant import parallel
from xent_quant.parallel import once

if TYPE_CHECKING:
    from torch import Tensor

    Parts = list[tuple[slice, slice, Tensor, Tensor]]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Matrix = TypeVar("Matrix", F32, "Tensor")
"""Float32 in memory, or on any device."""

DAMPING = 0.01
"""Added to a Hessian's diagonal before it is factorised, as a share of the diagonal's mean."""

FEW_ROWS = 2.0
"""Rows for each column with which half is believed of what a Hessian has beside its diagonal."""

CHUNK_ROWS = 512
"""Of a weight, that are solved or rounded as one job."""

BLOCK_ROWS = 512
"""Multiplied by a matrix at a time: oneDNN makes code and room for each number of rows that it meets."""

FEWEST_ROWS = 16
"""Multiplied at a time at least, and numbers of rows are made up to its multiples: with fewer, a product's last bits depend on
their number and on the threads'."""

FEWEST_COLUMNS = 32
"""Of what oneDNN multiplies: for a codebook's vectors its preparations cost more than they save."""


SOLVED = 512
"""Columns of a triangular system that are solved by the inverse of their own part; the fewer, the more shapes of products."""


def row_chunks(rows: int) -> list[slice]:
    """Where a weight of so many rows is cut into jobs: whatever the number of threads."""
    return [slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS)]


@cache
def _on_cpu() -> "Callable[[Tensor, Tensor], Tensor]":
    """x Wᵀ in float32, W of either order. By oneDNN, for which torch has no public name outside its compiler: its library for
    this is MKL, which knows AVX-512 on Intel's processors alone, so that oneDNN takes half the time on AMD's."""
    import torch
    import torch.nn.functional as F

    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # shapes; of 1,024, its default, half a GiB was seen
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor does so by itself, and oneDNN with it, unless that is told to be content with less."""
    import llvmlite.binding
    import torch

    here = llvmlite.binding.get_host_cpu_features()
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and any(here.get(name) for name in ("avx512bf16", "amx-bf16"))


def linear(x: "Tensor", weight: "Tensor") -> "Tensor":
    """x Wᵀ, [n, in] and [out, in] to [n, out]. A row's bits depend on that row alone, not on how many come with it, nor on
    threads, for FEWEST_COLUMNS or more. Float32 rows and a bfloat16 weight are multiplied in bfloat16, summed in float32, rounded
    to bfloat16, and float32 again. Copies a weight that is a part of a larger one's columns, or of its rows transposed."""
    import torch
    import torch.nn.functional as F

    if weight.dtype == torch.bfloat16 and x.dtype == torch.float32:
        return linear(x.bfloat16(), weight).float()

    def made_up(rows: "Tensor", multiply: "Callable[[Tensor, Tensor], Tensor]") -> "Tensor":
        missing = -len(rows) % FEWEST_ROWS
        return multiply(F.pad(rows, (0, 0, 0, missing)), weight)[: len(rows)] if missing else multiply(rows, weight)

    known = (torch.float32, torch.bfloat16) if multiplies_bfloat16() else (torch.float32,)
    if x.device.type != "cpu" or x.dtype not in known or x.shape[1] < FEWEST_COLUMNS or not len(x) or not len(weight):
        return made_up(x, F.linear) if len(x) < FEWEST_ROWS else F.linear(x, weight)
    multiply = _on_cpu()
    if not (weight.is_contiguous() or weight.T.is_contiguous()):  # else oneDNN takes code that is a hundred times as slow
        weight = weight.contiguous() if weight.stride(1) == 1 else weight.T.contiguous().T
    if x.stride(1) != 1:
        x = x.contiguous()
    if len(x) <= BLOCK_ROWS:
        return made_up(x, multiply)
    found = x.new_empty(len(x), len(weight))
    for rows, out in zip(torch.split(x, BLOCK_ROWS), torch.split(found, BLOCK_ROWS), strict=True):
        out.copy_(made_up(rows, multiply))
    return found


def product(a: Matrix, b: Matrix) -> Matrix:
    """a @ b, [n, k] and [k, m] to [n, m], as `linear`."""
    import torch

    parallel.check()
    if isinstance(a, torch.Tensor):
        return linear(a, b.T)
    result: F32 = linear(torch.from_numpy(a), torch.from_numpy(b).T).numpy()
    return result


def gaussian(rows: int, like: Matrix) -> Matrix:
    """[rows, n] float32 of standard normal numbers, always the same, for a matrix [m, n], and where that is."""
    import torch

    found = np.random.default_rng(0).standard_normal((rows, like.shape[1]), np.float32)
    return torch.from_numpy(found).to(like.device) if isinstance(like, torch.Tensor) else found


def dot(a: Matrix, b: Matrix) -> float:
    """Σ a · b over all elements of two matrices of one shape. In float64, which not every device has: there within columns."""
    if isinstance(a, np.ndarray):
        return float(np.multiply(a, b, dtype=np.float64).sum())
    return float((a * b).sum(0).cpu().double().sum())


def root(hessian: F32) -> F32:
    """U, upper triangular, with hessian = U Uᵀ; [n, n] float32. In float64 where rounding leaves it not positive definite;
    raises torch.linalg.LinAlgError where it is not in truth."""
    import torch

    with parallel.one_thread():
        found = torch.from_numpy(hessian.copy())
        if not _rooted(found):
            turned = torch.from_numpy(hessian[::-1, ::-1].astype(np.float64))
            found = torch.linalg.cholesky(turned).float().flip(0, 1)
    return found.numpy()


def _rooted(hessian: "Tensor") -> bool:
    """Make U of a matrix as `root` says, SOLVED columns after SOLVED from the last ones on, by products; False where it fails."""
    import torch

    for stop in range(len(hessian), 0, -SOLVED):
        here = slice(max(0, stop - SOLVED), stop)
        if stop < len(hessian):
            hessian[:stop, here] -= linear(hessian[:stop, stop:], hessian[here, stop:])
        turned, failed = torch.linalg.cholesky_ex(hessian[here, here].flip(0, 1))
        if failed:
            return False
        own = hessian[here, here] = turned.flip(0, 1)
        if here.start:
            inverse = torch.linalg.solve_triangular(own, torch.eye(len(own)), upper=True)
            hessian[: here.start, here] = linear(hessian[: here.start, here], inverse)
    hessian.triu_()
    return True


def _solved(rows: F32, triangle: F32, parts: "Parts | None" = None, *, upper: bool) -> F32:
    """rows triangle⁻¹, [m, n] and [n, n] to [m, n]; by the `parts` of the triangle, where there are some."""
    import torch

    given, by = torch.from_numpy(rows), torch.from_numpy(triangle)
    solve: Callable[[Tensor], Tensor] = partial(torch.linalg.solve_triangular, by, upper=upper, left=False)
    if parts:
        solve = partial(_by_parts, parts)
    found: F32 = torch.cat(parallel.run([partial(solve, given[part]) for part in row_chunks(len(rows))])).numpy()
    return found


def _parts(triangle: F32, *, upper: bool) -> "Parts":
    """For SOLVED columns after SOLVED of what solves a triangle, in the order in which they are solved: which they are, which are
    solved before them, the triangle's part for those [SOLVED, before], and the inverse of their own, transposed. None where there
    are no more."""
    import torch

    by, found = torch.from_numpy(triangle), []
    with parallel.one_thread():  # as in `root`, so that bits do not depend on how many there are
        for start in range(0, len(by), SOLVED) if len(by) > SOLVED else ():
            here = slice(start, min(start + SOLVED, len(by)))
            before = slice(0, start) if upper else slice(here.stop, len(by))
            inverse = torch.linalg.solve_triangular(by[here, here], torch.eye(here.stop - start), upper=upper)
            found.append((here, before, by[before, here].T.contiguous(), inverse.T.contiguous()))
    return found if upper else found[::-1]


def _by_parts(parts: "Parts", given: "Tensor") -> "Tensor":
    """given triangle⁻¹ [m, n], by what `_parts` made of the triangle."""
    import torch

    found = torch.empty_like(given)
    for here, before, others, inverse in parts:
        left = given[:, here] - linear(found[:, before], others) if before.stop > before.start else given[:, here]
        found[:, here] = linear(left, inverse)
    return found


def _widened(matrix: F32, columns: int, diagonal: np.float32) -> F32:
    """[n, n] to [columns, columns]: on the diagonal behind it `diagonal`, zeros elsewhere."""
    found = np.zeros((columns, columns), np.float32)
    found[: len(matrix), : len(matrix)] = matrix
    np.fill_diagonal(found[len(matrix) :, len(matrix) :], diagonal)
    return found


def believed(rows: int, importance: F32) -> float:
    """Share, 0 to 1, of what a Hessian of so many rows has beside its diagonal that is no accident of these rows, about. Its
    columns without `importance` [n] float32 are padding. A covariance is so shrunk after Ledoit and Wolf (2004); how far, was
    measured (docs/calibration.md, Few rows)."""
    return rows / (rows + FEW_ROWS * np.count_nonzero(importance))


class Curvature:
    """A damped Hessian [n, n] and what is made of it, each thing once and when it is first asked for.

    Holds it and what was asked for: up to three more [n, n] float32, and the blocks along the diagonal, less than another two for
    blocks of half the columns or fewer. Raises torch's errors for one that is not positive definite. Columns whose diagonal is 0
    are padding.

    float32 is enough: with the damping a Hessian scaled to a diagonal of ones, which is what matters to a factorisation's
    rounding, has a condition of 10⁵ at most in practice.
    """

    def __init__(self, hessian: F32, share: float = 1.0) -> None:
        """Takes what `hessian` has beside its diagonal at `share`."""
        self.hessian = hessian * np.float32(share)
        """H + λ."""
        diagonal = hessian.diagonal()
        mean = diagonal.sum(dtype=np.float64) / max(1, np.count_nonzero(diagonal))
        self._damping = np.float32(DAMPING * mean)
        np.fill_diagonal(self.hessian, diagonal + self._damping)
        self._inner: Curvature | None = None
        self._blocks: dict[tuple[int, int], tuple[F32, F32, F32]] = {}
        self._lumps: dict[tuple[int, int], tuple[F32, F32]] = {}

    def padded(self, columns: int) -> "Curvature":
        """The same of inputs that are followed by zeros up to `columns`; its root is not computed again. Holds this one, too."""
        found = Curvature.__new__(Curvature)
        found.hessian = _widened(self.hessian, columns, self._damping)
        found._damping, found._inner, found._blocks, found._lumps = self._damping, self, {}, {}
        return found

    @once
    def _root(self) -> F32:
        if self._inner is not None:
            return _widened(self._inner._root, len(self.hessian), np.sqrt(self._damping))
        return root(self.hessian)

    @property
    def pivots(self) -> F32:
        """D [n], with H + λ = U diag(D) Uᵀ, U unit upper triangular."""
        return np.square(self._root.diagonal())

    def lump(self, start: int, stop: int) -> tuple[F32, F32]:
        """U's columns start…stop, those of its rows that are before them, [start, stop − start], and their own."""
        if (start, stop) not in self._lumps:
            here = slice(start, stop)
            scaled = self._root[:stop, here] / self._root.diagonal()[here]
            self._lumps[start, stop] = scaled[:start], scaled[start:]
        return self._lumps[start, stop]

    @once
    def _lower(self) -> "Parts":
        return _parts(self._root.T, upper=False)

    @once
    def _upper(self) -> "Parts":
        return _parts(self._root, upper=True)

    def _half(self, rows: F32) -> F32:
        return _solved(rows, self._root.T, self._lower, upper=False)

    def solve(self, rows: F32) -> F32:
        """rows (H + λ)⁻¹, [m, n] to the same."""
        return _solved(self._half(rows), self._root, self._upper, upper=True)

    def solve_half(self, rows: F32) -> F32:
        """rows (H + λ)⁻¹ U for half the price."""
        return self._half(rows) / self._root.diagonal()

    def prepare(self, lumps: Sequence[tuple[int, int]], block: int) -> None:
        """Make what rounding asks for, so that jobs which share it need not wait for one another: these of `lump`, and each
        `block` of so many columns; 0: none."""
        for start, stop in lumps:
            self.lump(start, stop)
        for first in range(0, len(self.hessian), block) if block else ():
            self.block(first, first + block)

    def block(self, first: int, last: int) -> tuple[F32, F32, F32]:
        """Of the Hessian of columns first…last alone its inverse, its factor, and its pivots."""
        if (first, last) not in self._blocks:
            upper = root(self.hessian[first:last, first:last])
            found = _solved(_solved(np.eye(last - first, dtype=np.float32), upper.T, upper=False), upper, upper=True)
            self._blocks[first, last] = found, upper / upper.diagonal(), np.square(upper.diagonal())
        return self._blocks[first, last]
