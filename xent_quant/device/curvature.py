"""`linalg.Curvature` of a stack of Hessians on any device."""

import torch
from torch import Tensor

from xent_quant.linalg import DAMPING
from xent_quant.parallel import once


def root(hessians: Tensor) -> Tensor:
    """U [..., n, n] float32, upper triangular, with hessian = U Uᵀ. In float64, on the CPU, where rounding leaves one not
    positive definite; raises torch.linalg.LinAlgError where it is not in truth."""
    turned = hessians.flip(-1, -2)
    lower, failed = torch.linalg.cholesky_ex(turned)
    if bool(failed.any()):
        bad = failed > 0
        lower[bad] = torch.linalg.cholesky(turned[bad].cpu().double()).float().to(hessians.device)
    upper: Tensor = lower.flip(-1, -2)
    return upper


class Curvature:
    """Damped Hessians [stack, n, n] float32 and what is made of them, on their device. Right sides and solutions lie column after
    column, [stack, n, rows].

    Holds the Hessians, their roots and factors, and the blocks along the diagonals.
    """

    def __init__(self, hessians: Tensor, share: float = 1.0) -> None:
        """Takes what `hessians` have beside their diagonals at `share`. Columns whose diagonal is 0 are padding."""
        self.hessian = hessians * share
        """H + λ."""
        diagonal = hessians.diagonal(dim1=1, dim2=2)
        here = diagonal.cpu().double()
        mean = here.sum(1, keepdim=True) / (here != 0).sum(1, keepdim=True).clamp_min(1)
        damping = (DAMPING * mean).float().to(hessians.device)
        self.hessian.diagonal(dim1=1, dim2=2).copy_(diagonal + damping)
        self._blocks: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @once
    def _root(self) -> Tensor:
        return root(self.hessian)

    @once
    def factor(self) -> Tensor:
        """U [stack, n, n], unit upper triangular, with H + λ = U diag(D) Uᵀ."""
        return self._root / self._root.diagonal(dim1=1, dim2=2)[:, None]

    @property
    def pivots(self) -> Tensor:
        """D of `factor`, [stack, n]."""
        return self._root.diagonal(dim1=1, dim2=2).square()

    @classmethod
    def stacked(cls, parts: "list[Curvature]") -> "Curvature":
        """All of them, as one. The roots of each are not made again."""
        if len(parts) == 1:
            return parts[0]
        made = cls.__new__(cls)
        made.hessian, made._blocks = torch.cat([part.hessian for part in parts]), {}
        made._root = torch.cat([part._root for part in parts])
        return made

    def solve_columns(self, columns: Tensor) -> Tensor:
        """(H + λ)⁻¹ columns, [stack, n, m] to the same."""
        half = torch.linalg.solve_triangular(self._root, columns, upper=True)
        solved: Tensor = torch.linalg.solve_triangular(self._root.mT, half, upper=False)
        return solved

    def solve(self, rows: Tensor) -> Tensor:
        """rows (H + λ)⁻¹, [m, n] to the same, of a stack of one."""
        return self.solve_columns(rows.mT[None])[0].mT

    def solve_half(self, columns: Tensor) -> Tensor:
        """Uᵀ (H + λ)⁻¹ columns, [stack, n, m] to the same, for half the price, with U as of `factor`."""
        half = torch.linalg.solve_triangular(self._root, columns, upper=True)
        scaled: Tensor = half / self._root.diagonal(dim1=1, dim2=2)[:, :, None]
        return scaled

    def blocks(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The inverses of the Hessian of every `size` columns alone, their factors, both [stack, n / size, size, size], and their
        pivots [stack, n / size, size]."""
        if size not in self._blocks:
            apart = self.hessian.reshape(len(self.hessian), -1, size, self.hessian.shape[2] // size, size)
            upper = root(apart.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous())
            one = torch.eye(size, device=upper.device).expand_as(upper)
            half = torch.linalg.solve_triangular(upper, one, upper=True)
            inverses = torch.linalg.solve_triangular(upper.mT, half, upper=False)
            diagonal = upper.diagonal(dim1=-2, dim2=-1)
            self._blocks[size] = inverses, upper / diagonal[..., None, :], diagonal.square()
        return self._blocks[size]
