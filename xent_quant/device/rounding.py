"""GPTQ as in `methods.gptq`, of a stack of weights at once, on any device.

Everything lies column after column, [stack, columns, rows], so that a column of all rows is contiguous; what is done for one
column is done for all rows of all weights of the stack together.
"""

import numpy as np
import torch
from torch import Tensor

from xent_quant.device.curvature import Curvature
from xent_quant.device.search import Scales, joined, search, table, unshrunk
from xent_quant.formats._codes import CodedFormat
from xent_quant.formats.base import F32, Effort
from xent_quant.methods.gptq import LAZY, TOGETHER

COPIES = 13
"""Of the weights that are under way, about: they, those read ahead, pulls, targets, errors, codes, and what comes out."""
HESSIANS = 8
"""Of their size is held, about: sums and means, drift, damped, root, factor, and what is stacked of them."""


class Levels:
    """What codes of a type may stand for, on a device."""

    def __init__(self, kind: CodedFormat, device: torch.device) -> None:
        levels: F32 = kind.grid(np.zeros((1, kind.block_bytes), np.uint8)).levels
        self._table = table(levels, device)
        self._lowest, self._top = float(levels[0]), float(len(levels) - 1)
        self.reach = float(np.diff(levels).min() * np.float32(0.499))
        """In units of a scale: within it the code that is there is the nearest."""

    def nearest(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, levels) nearest to x, both float32; the lowest where the scale is 0."""
        zero = scale == 0
        if self._table:
            levels, middles = self._table
            index = torch.bucketize(x, middles).masked_fill_(zero, 0)
            return index.float(), levels[index]
        codes = (x.round() - self._lowest).clamp_(0, self._top).masked_fill_(zero, 0)
        return codes, codes + self._lowest


class Rows:
    """Weights under way, [stack, columns, rows] float32: `weights`, their `errors` (less what the codes stand for), `codes`
    (uint8) and `scales`; see `methods.gptq.Rows`. `weighting` [stack, columns] is of each block of the type alone."""

    def __init__(
        self,
        weights: Tensor,
        kind: CodedFormat,
        curvature: Curvature,
        weighting: Tensor,
        effort: Effort,
        pull: Tensor | None = None,
    ) -> None:
        self.weights, self.kind, self.curvature, self.pull = weights, kind, curvature, pull
        self._weighting, self._effort = weighting, effort
        self._levels = Levels(kind, weights.device)
        self.errors = torch.zeros_like(weights)
        self.codes = torch.zeros(weights.shape, dtype=torch.uint8, device=weights.device)
        self.scales: Scales

    def _lumps(self) -> list[tuple[int, int]]:
        columns, block = self.weights.shape[1], self.kind.block_size
        size = max(block, LAZY // block * block)
        return [(start, min(start + size, columns)) for start in range(0, columns, size)]

    def feed(self) -> None:
        """The first pass: fills `codes`, `scales` and `errors`."""
        step, factor = self.kind.block_size, self.curvature.factor
        pulled = self.weights if self.pull is None else self.weights + self.curvature.solve_half(self.pull)
        found = []
        for start, stop in self._lumps():
            targets = pulled[:, start:stop] + factor[:, :start, start:stop].mT @ self.errors[:, :start]
            for first in range(start, stop, step):
                last = first + step
                block = targets[:, first - start : last - start]
                scales = self._search(block, first, last)
                codes, errors = self._round(self.weights[:, first:last], block, factor[:, first:last, first:last], scales)
                found.append(scales)
                self.codes[:, first:last], self.errors[:, first:last] = codes, errors
                if last < stop:
                    targets[:, last - start :] += factor[:, first:last, last:stop].mT @ errors
        self.scales = joined(found)

    def sweep(self, rounds: int) -> None:
        """The second pass, over what `feed` made, with so many rounds of coordinate descent; changes it where that lowers the
        loss."""
        step, hessian = self.kind.block_size, self.curvature.hessian
        for start, stop in self._lumps():
            gradient = hessian[:, start:stop] @ self.errors  # H e at these columns
            if self.pull is not None:
                gradient += self.pull[:, start:stop]
            for first in range(start, stop, step):
                last = first + step
                change = self._again(first, last, gradient[:, first - start : last - start])
                gradient += hessian[:, start:stop, first:last] @ change
            self._descend(start, stop, gradient, rounds)

    def _search(self, targets: Tensor, first: int, last: int) -> Scales:
        weighting = self._weighting[:, first:last]
        scales = search(self.kind, targets, weighting, self._effort)
        return unshrunk(self.kind, targets, weighting, scales)

    def _round(self, weights: Tensor, targets: Tensor, factor: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """Codes with error feedback for these scales: (codes uint8, errors). Changes `targets`."""
        codes, errors = torch.empty_like(weights, dtype=torch.uint8), torch.empty_like(weights)
        columns, group = weights.shape[1], self.kind.group_size
        for start in range(0, columns, TOGETHER):
            stop = min(start + TOGETHER, columns)
            for j in range(start, stop):
                scale, offset = scales.scale[:, j // group], scales.offset[:, j // group]
                code, level = self._levels.nearest((targets[:, j] - offset) / scale, scale)
                error = weights[:, j] - (scale * level + offset)
                codes[:, j], errors[:, j] = code, error
                if j + 1 < stop:
                    targets[:, j + 1 : stop] += factor[:, j, j + 1 : stop, None] * error[:, None]
            if stop < columns:
                targets[:, stop:] += factor[:, start:stop, stop:].mT @ errors[:, start:stop]
        return codes, errors

    def _again(self, first: int, last: int, gradient: Tensor) -> Tensor:
        """Quantise columns first…last for the errors of all others; `gradient` is H e there. The change of the errors."""
        inverses, factors = self.curvature.blocks(last - first)
        number = first // (last - first)
        here = slice(first, last)
        # The least of e H eᵀ over these columns alone lies where their gradient vanishes.
        targets = self.weights[:, here] - self.errors[:, here] + inverses[:, number] @ gradient
        scales = self._search(targets, first, last)
        codes, errors = self._round(targets, targets.clone(), factors[:, number], scales)
        errors += self.weights[:, here] - targets
        change = errors - self.errors[:, here]
        rise = ((2 * gradient + self.curvature.hessian[:, here, here] @ change) * change).sum(1)
        better = rise < 0
        change = change.masked_fill_(~better[:, None], 0)
        self.codes[:, here] = torch.where(better[:, None], codes, self.codes[:, here])
        self.scales.replace(number, better, scales)
        self.errors[:, here] += change
        return change

    def _descend(self, start: int, stop: int, gradient: Tensor, rounds: int) -> None:
        """See `methods.gptq.descend`. The gradient follows one by one within TOGETHER columns, at once beyond."""
        group = self.kind.group_size
        weights, errors, codes = (each[:, start:stop] for each in (self.weights, self.errors, self.codes))
        hessian = self.curvature.hessian[:, start:stop, start:stop]
        diagonal = hessian.diagonal(dim1=1, dim2=2)[..., None]  # [stack, columns, 1]
        for _ in range(rounds):
            for first in range(0, stop - start, TOGETHER):
                last = min(first + TOGETHER, stop - start)
                near, changes = gradient[:, first:last].clone(), torch.zeros_like(gradient[:, first:last])
                for j in range(first, last):
                    index = (start + j) // group
                    scale, offset = self.scales.scale[:, index], self.scales.offset[:, index]
                    slope, steep = near[:, j - first], diagonal[:, j]
                    x = (weights[:, j] - errors[:, j] + slope / steep - offset) / scale
                    code, level = self._levels.nearest(x, scale)
                    moved = (slope.abs() > self._levels.reach * scale.abs() * steep) & (scale != 0) & (code != codes[:, j])
                    error = torch.where(moved, weights[:, j] - (scale * level + offset), errors[:, j])
                    change = error - errors[:, j]
                    codes[:, j] = torch.where(moved, code.to(torch.uint8), codes[:, j])
                    errors[:, j], changes[:, j - first] = error, change
                    near += hessian[:, first:last, j, None] * change[:, None]
                gradient += hessian[:, :, first:last] @ changes
