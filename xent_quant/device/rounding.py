"""GPTQ as in `methods.gptq`, of a stack of weights at once, on any device.

Everything lies column after column, [stack, columns, rows], so that a column of all rows is contiguous; what is done for one
column is done for all rows of all weights of the stack together.
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from xent_quant.device import codebooks
from xent_quant.device.codebooks import Points, Vectors
from xent_quant.device.curvature import Curvature
from xent_quant.device.found import joined
from xent_quant.device.search import Coded, Scales, search, table, unshrunk
from xent_quant.formats._codes import CodedFormat, SearchedFormat
from xent_quant.formats._vectors import VectorFormat
from xent_quant.formats.base import F32, Effort
from xent_quant.formats.prescaled import InMemory
from xent_quant.methods.gptq import lumps
from xent_quant.parallel import check

C = TypeVar("C", Coded, Points)

TOGETHER = 64
"""Columns that pass errors on among themselves, and turn to their gradient, one by one; to others by one matrix product."""

COPIES = 13
"""Of the weights that are under way, about: they, those read ahead, pulls, targets, errors, codes, and what comes out."""
HESSIANS = 10
"""Of their size is held, about: sums and means, drift, damped, root, factor, what is stacked of them, and what was not padded."""


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


class Rows(ABC, Generic[C]):
    """Weights under way, [stack, columns, rows] float32: `weights`, their `errors` (less what was chosen stands for), and what is
    `chosen`; see `methods.gptq.Rows`. `weighting` [stack, columns] is of each block of the type alone."""

    chosen: C

    def __init__(
        self,
        weights: Tensor,
        kind: CodedFormat | VectorFormat,
        curvature: Curvature,
        weighting: Tensor,
        effort: Effort,
        pull: Tensor | None = None,
    ) -> None:
        self.weights, self.curvature, self.pull, self.effort = weights, curvature, pull, effort
        self.errors = torch.zeros_like(weights)
        self.weighting, self._step = weighting, kind.block_size

    def feed(self) -> None:
        """The first pass: fills `chosen` and `errors`."""
        step, factor, pivots = self._step, self.curvature.factor, self.curvature.pivots
        pulled = self.weights if self.pull is None else self.weights + self.curvature.solve_half(self.pull)
        found = []
        for start, stop in lumps(self.weights.shape[1], self._step):
            check()
            targets = pulled[:, start:stop] + factor[:, :start, start:stop].mT @ self.errors[:, :start]
            for first in range(start, stop, step):
                last, here = first + step, slice(first, first + step)
                block = targets[:, first - start : last - start]
                scales = self.search(block, first, last)
                made, errors = self.round(self.weights[:, here], block, factor[:, here, here], pivots[:, here], scales)
                found.append(made)
                self.errors[:, here] = errors
                if last < stop:
                    targets[:, last - start :] += factor[:, here, last:stop].mT @ errors
        self.chosen = joined(found)

    def sweep(self, rounds: int) -> None:
        """The second pass, over what `feed` made, with so many rounds of coordinate descent; changes it where that lowers the
        loss."""
        step, hessian = self._step, self.curvature.hessian
        for start, stop in lumps(self.weights.shape[1], self._step):
            check()
            gradient = hessian[:, start:stop] @ self.errors  # H e at these columns
            if self.pull is not None:
                gradient += self.pull[:, start:stop]
            for first in range(start, stop, step):
                last = first + step
                change = self._again(first, last, gradient[:, first - start : last - start])
                gradient += hessian[:, start:stop, first:last] @ change
            self.descend(start, stop, gradient, rounds)

    @abstractmethod
    def search(self, targets: Tensor, first: int, last: int) -> Any:
        """Scales for columns first…last."""

    @abstractmethod
    def round(self, weights: Tensor, targets: Tensor, factor: Tensor, pivots: Tensor, scales: Any) -> tuple[C, Tensor]:
        """What is chosen with error feedback for scales that were searched for, and the errors. Changes `targets`."""

    @abstractmethod
    def descend(self, start: int, stop: int, gradient: Tensor, rounds: int) -> None:
        """Coordinate descent in columns start…stop. Changes `gradient`."""

    def _again(self, first: int, last: int, gradient: Tensor) -> Tensor:
        """Quantise columns first…last for the errors of all others; `gradient` is H e there. The change of the errors."""
        inverses, factors, pivots = self.curvature.blocks(last - first)
        number = first // (last - first)
        here = slice(first, last)
        # The least of e H eᵀ over these columns alone lies where their gradient vanishes.
        targets = self.weights[:, here] - self.errors[:, here] + inverses[:, number] @ gradient
        scales = self.search(targets, first, last)
        made, errors = self.round(targets, targets.clone(), factors[:, number], pivots[:, number], scales)
        errors += self.weights[:, here] - targets
        change = errors - self.errors[:, here]
        better = _rise(change, gradient, self.curvature.hessian[:, here, here]) < 0
        change = change.masked_fill_(~better[:, None], 0)
        self.chosen.put(number, better, made)
        self.errors[:, here] += change
        return change


def _rise(change: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """Of the loss [stack, rows], were errors changed by so much."""
    return ((2 * gradient + hessian @ change) * change).sum(1)


class CodedRows(Rows[Coded]):
    """Of a type with one code for each weight."""

    def __init__(self, weights: Tensor, kind: SearchedFormat | InMemory, *others: Any, scales: Scales | None = None) -> None:
        """Within `scales` where they are given."""
        super().__init__(weights, kind, *others)
        self.kind, self._scales = kind, scales
        self._levels = Levels(kind, weights.device)

    def search(self, targets: Tensor, first: int, last: int) -> Scales:
        """See `Rows`."""
        if self._scales is not None:
            return self._scales.columns(first, last, self.weights.shape[1])
        weighting = self.weighting[:, first:last]
        assert isinstance(self.kind, SearchedFormat)
        scales = search(self.kind, targets, weighting, self.effort)
        return unshrunk(self.kind, targets, weighting, scales)

    def round(self, weights: Tensor, targets: Tensor, factor: Tensor, pivots: Tensor, scales: Scales) -> tuple[Coded, Tensor]:
        """See `Rows`."""
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
        return Coded(self.kind, codes, scales), errors

    def descend(self, start: int, stop: int, gradient: Tensor, rounds: int) -> None:
        """See `methods.gptq.descend`. The gradient follows one by one within TOGETHER columns, at once beyond."""
        group, scales = self.kind.group_size, self.chosen.scales
        weights, errors, codes = (each[:, start:stop] for each in (self.weights, self.errors, self.chosen.codes))
        hessian = self.curvature.hessian[:, start:stop, start:stop]
        diagonal = hessian.diagonal(dim1=1, dim2=2)[..., None]  # [stack, columns, 1]
        for _ in range(rounds):
            for first in range(0, stop - start, TOGETHER):
                last = min(first + TOGETHER, stop - start)
                near, changes = gradient[:, first:last].clone(), torch.zeros_like(gradient[:, first:last])
                for j in range(first, last):
                    index = (start + j) // group
                    scale, offset = scales.scale[:, index], scales.offset[:, index]
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


class VectorRows(Rows[Points]):
    """Of a type that shares codes among weights: vector by vector, see `methods.gptq.round_vectors` and `descend_vectors`."""

    def __init__(self, weights: Tensor, kind: VectorFormat, *others: Any) -> None:
        super().__init__(weights, kind, *others)
        self.kind = kind

    def search(self, targets: Tensor, first: int, last: int) -> Points:
        """See `Rows`."""
        return codebooks.search(self.kind, targets, self.weighting[:, first:last], self.effort)

    def round(self, weights: Tensor, targets: Tensor, factor: Tensor, pivots: Tensor, scales: Points) -> tuple[Points, Tensor]:
        """See `Rows`."""
        size, errors = codebooks.size(self.kind), torch.empty_like(weights)
        own = _diagonal(factor, size)
        weighting = own.square() @ torch.unflatten(pivots, 1, (-1, size))[..., None]  # [stack, vectors, size, 1]
        vectors = Vectors(scales, weighting.flatten(1))
        one = torch.eye(size, device=own.device).expand_as(own)
        inverse = torch.linalg.solve_triangular(own, one, upper=True, unitriangular=True).mT
        for vector in range(own.shape[1]):
            here, later = slice(vector * size, (vector + 1) * size), slice((vector + 1) * size, None)
            moved = weights[:, here] + inverse[:, vector] @ (targets[:, here] - weights[:, here])
            choice = vectors.choose(vector, moved)
            vectors.keep(vector, choice)
            errors[:, here] = weights[:, here] - choice.values
            targets[:, later] += factor[:, here, later].mT @ errors[:, here]
        return scales, errors

    def descend(self, start: int, stop: int, gradient: Tensor, rounds: int) -> None:
        """See `Rows`. The gradient follows vector by vector within TOGETHER columns, at once beyond."""
        hessian = self.curvature.hessian
        here = self.chosen.columns(start, stop, self.weights.shape[1])
        vectors = Vectors(here, hessian.diagonal(dim1=1, dim2=2)[:, start:stop])
        size = codebooks.size(self.kind)
        inverses = self.curvature.blocks(size)[0]
        for _ in range(rounds):
            for first in range(start, stop, TOGETHER):
                last = min(first + TOGETHER, stop)
                near = gradient[:, first - start : last - start].clone()
                changes = torch.zeros_like(near)
                for column in range(first, last, size):
                    own, inside = slice(column, column + size), slice(column - first, column - first + size)
                    errors, slope, block = self.errors[:, own], near[:, inside], hessian[:, own, own]
                    wanted = self.weights[:, own] - errors + inverses[:, column // size] @ slope
                    choice = vectors.choose((column - start) // size, wanted)
                    change = self.weights[:, own] - choice.values - errors
                    better = _rise(change, slope, block) < 0
                    vectors.keep((column - start) // size, choice, better)
                    change.masked_fill_(~better[:, None], 0)
                    errors += change
                    changes[:, inside] = change
                    near += hessian[:, first:last, own] @ change
                gradient += hessian[:, start:stop, first:last] @ changes


def _diagonal(matrices: Tensor, size: int) -> Tensor:
    """The blocks along the diagonals of [stack, n, n], [stack, n / size, size, size]."""
    apart = torch.unflatten(torch.unflatten(matrices, 2, (-1, size)), 1, (-1, size))
    found: Tensor = apart.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return found
