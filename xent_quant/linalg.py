"""Matrix products and factorisations whose bits do not depend on the number of threads. Imports torch when called."""

from collections.abc import Iterator
from contextlib import contextmanager

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


def damped(hessian: F32, share: float) -> F64:
    """H [n, n] with `share` of its mean diagonal added to the diagonal; float32 to float64."""
    wide = hessian.astype(np.float64)
    wide[np.diag_indices_from(wide)] += share * wide.diagonal().mean()
    return wide


def product(a: F32, b: F32) -> F32:
    """a @ b, [n, k] and [k, m] to [n, m]."""
    import torch

    result: F32 = torch.mm(torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b))).numpy()
    return result
