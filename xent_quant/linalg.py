"""Matrix products and factorisations whose bits do not depend on the number of threads. Imports torch when called."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's results depend on the number of threads; ours must not."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def factorise(hessian: F64) -> F32:
    """U, unit upper triangular, with hessian = U diag(D) Uᵀ; [n, n] float64 to float32, computed in float64."""
    import torch

    with one_thread():
        lower = torch.linalg.cholesky(torch.from_numpy(hessian[::-1, ::-1].copy())).numpy()
    upper = lower[::-1, ::-1]
    return np.ascontiguousarray(upper / upper.diagonal(), dtype=np.float32)


def inverse(hessian: F64) -> F32:
    """Of a positive definite matrix [n, n] float64, to float32, computed in float64."""
    import torch

    with one_thread():
        found: F32 = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(hessian))).float().numpy()
    return found


DAMPING = 0.01
"""Added to a Hessian's diagonal before it is factorised, as a share of the diagonal's mean."""


class Curvature:
    """A damped Hessian [n, n] and what is made of it, each thing once and when it is first asked for.

    Holds the Hessian in float64 and float32, and what was asked for: up to two more [n, n] float32, and the blocks along the
    diagonal, less than another two for blocks of half the columns or fewer. Raises numpy's and torch's errors for one that is not
    positive definite.
    """

    def __init__(self, hessian: F32) -> None:
        self._wide = hessian.astype(np.float64)
        self._wide[np.diag_indices_from(self._wide)] += DAMPING * self._wide.diagonal().mean()
        self._blocks: dict[tuple[int, int], tuple[F32, F32, F32]] = {}

    @cached_property
    def hessian(self) -> F32:
        """H + λ."""
        return self._wide.astype(np.float32)

    @cached_property
    def inverse(self) -> F32:
        """(H + λ)⁻¹."""
        return inverse(self._wide)

    @cached_property
    def factor(self) -> F32:
        """U of H + λ, see `factorise`."""
        return factorise(self._wide)

    def block(self, first: int, last: int) -> tuple[F32, F32, F32]:
        """The Hessian of columns first…last alone, its inverse, and its factor."""
        if (first, last) not in self._blocks:
            hessian = np.ascontiguousarray(self.hessian[first:last, first:last])
            wide = hessian.astype(np.float64)
            self._blocks[first, last] = hessian, inverse(wide), factorise(wide)
        return self._blocks[first, last]


def product(a: F32, b: F32) -> F32:
    """a @ b, [n, k] and [k, m] to [n, m]."""
    import torch

    result: F32 = torch.mm(torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b))).numpy()
    return result
