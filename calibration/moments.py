"""Sums over the input rows of one weight, and how a rare expert's are made up with its layer's.

Rows of `HELD_OUT` windows are kept apart: methods that fit the rows closely are judged on them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from calibration.correction import Correction
from calibration.rare import fewest_rows, floored, missing_rows
from xent_quant import parallel
from xent_quant.device.statistics import DeviceStatistics
from xent_quant.linalg import believed, linear
from xent_quant.model.sizes import ADDED_ROWS, HELD_OUT_ROWS
from xent_quant.model.stages import Batch
from xent_quant.tensors import InputStatistics

STRIPE = 256
"""Rows of a sum that are computed at a time; of Σ x xᵀ from their first column on: its lower half is the upper one mirrored."""

CPU = torch.device("cpu")


@dataclass
class Moments:
    """Σ w x² per column (`squares` [in] float64) and, if `hessian`, Σ w x xᵀ (`products` [in, in] float32, on and above the
    diagonal) over `rows` rows of weights w, which add up to `weight`. A row weighs 1 / s² where its batch knows the size s of
    what its output is added to: the next norm divides by that, so an error counts as much less there.

    Where the rows come with what they should have been, also Σ w (exact − x) xᵀ (`drift` [in, in]) and, where the output goes
    to the residual stream, Σ w r xᵀ of what that lacks (`residuals` [out, in]), both float32.

    What is made of them is for methods that compute on `device`; None: for the CPU's kernels. Products are of ADDED_ROWS rows,
    which wait here until there are so many: a sum is read and written once for all of them.
    """

    columns: int
    hessian: bool
    device: torch.device | None = None
    rows: int = 0
    weight: float = 0.0
    squares: Tensor = field(init=False)
    _sums: list[Tensor | None] = field(init=False, default_factory=lambda: [None] * 3)
    _waiting: list[Tensor | None] = field(init=False, default_factory=lambda: [None] * 3)
    _count: int = field(init=False, default=0)
    held_out: list[Tensor] = field(init=False, default_factory=list)
    held_out_drift: list[Tensor] = field(init=False, default_factory=list)
    held_out_residual: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.squares = torch.zeros(self.columns, dtype=torch.float64)

    def add(self, batch: Batch, held_out: Tensor | None = None, gated: bool = False, *, judged: Tensor | None = None) -> None:
        """The rows of a batch, whose weights are, if `gated`, multiplied by the square of their gates; those of the mask
        `held_out` [n] are left out, and HELD_OUT_ROWS of them (of those of the mask `judged` [n]) kept instead, times the root of
        their weight."""
        wide, exact, residual = batch.inputs.float(), batch.exact, batch.residual
        gates = batch.gates if gated else None
        weight = torch.ones(len(wide), device=wide.device) if gates is None else gates.float()
        drift = None if exact is None else exact.float() - wide
        if batch.sizes is not None:
            weight = weight / batch.sizes
        if gates is not None or batch.sizes is not None:
            wide = wide * weight[:, None]
            drift, residual = (None if rows is None else rows * weight[:, None] for rows in (drift, residual))
        if held_out is not None and held_out.any():
            chosen = (held_out if judged is None else judged).nonzero()[:, 0]
            chosen = chosen[: max(0, HELD_OUT_ROWS - sum(len(kept) for kept in self.held_out))]
            for rows, kept in ((wide, self.held_out), (drift, self.held_out_drift), (residual, self.held_out_residual)):
                if rows is not None and len(chosen):
                    kept.append(rows[chosen].float().to(self.device or CPU))
            wide, weight = wide[~held_out], weight[~held_out]
            drift, residual = (None if rows is None else rows[~held_out] for rows in (drift, residual))
        if not len(wide):
            return
        self.rows += len(wide)
        self.weight += float(weight.cpu().double().square().sum())
        self.squares += wide.square().sum(0).cpu().double()
        if not self.hessian:
            return
        self._wait((wide, drift, residual))

    def _wait(self, given: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        """[n, in], [n, in] and [n, out]; added up where there are enough."""
        start, total = 0, len(given[0])
        while start < total:
            stop = min(total, start + ADDED_ROWS - self._count)
            for number, rows in enumerate(given):
                if rows is not None:
                    there = self._waiting[number]
                    if there is None:
                        there = self._waiting[number] = torch.empty(ADDED_ROWS, rows.shape[1], device=rows.device)
                    there[self._count : self._count + stop - start] = rows[start:stop]
            self._count, start = self._count + stop - start, stop
            if self._count == ADDED_ROWS:
                self._add_up()

    def _add_up(self) -> None:
        """The rows that wait."""
        wide, drift, residual = (None if rows is None else rows[: self._count] for rows in self._waiting)
        if wide is None or not self._count:
            return
        self._count = 0
        turned, products = wide.T.contiguous(), self._sums[0]
        if products is None:
            products = self._sums[0] = torch.zeros(self.columns, self.columns, device=wide.device)
        jobs: list[Callable[[], None]] = []
        for start in range(0, self.columns, STRIPE):  # above the diagonal, and little below it
            here = slice(start, start + STRIPE)
            jobs.append(partial(_add_product, products[here, start:], turned[here], turned[start:]))
        for number, rows in ((1, drift), (2, residual)):
            if rows is None:
                continue
            own = self._sums[number]
            if own is None:
                own = self._sums[number] = torch.zeros(rows.shape[1], self.columns, device=wide.device)
            step = STRIPE if wide.device.type == "cpu" else len(own)
            for start in range(0, len(own), step):
                here = slice(start, start + step)
                jobs.append(partial(_add_product, own[here], rows[:, here].T, turned))
        parallel.run(jobs, None if wide.device.type == "cpu" else 1)

    def _sum(self, number: int) -> Tensor | None:
        self._add_up()
        self._waiting = [None] * 3
        return self._sums[number]

    @property
    def products(self) -> Tensor | None:
        """Σ w x xᵀ, on and above the diagonal."""
        return self._sum(0)

    @property
    def drift(self) -> Tensor | None:
        """Σ w (exact − x) xᵀ."""
        return self._sum(1)

    @property
    def residuals(self) -> Tensor | None:
        """Σ w r xᵀ."""
        return self._sum(2)

    def on(self, device: torch.device) -> "Moments":
        """What makes up a rare expert's, on another device."""
        found = Moments(self.columns, self.hessian, device, self.rows, self.weight)
        found.squares, products = self.squares, self.products
        found._sums[0] = None if products is None else products.to(device)
        found.held_out = [rows.to(device) for rows in self.held_out]
        return found

    def forget_drift(self) -> None:
        """Let go of the sum."""
        self._sums[1] = None

    def _shares(self, layer: "Moments | None") -> tuple[float, float]:
        """Factors of the own sums and of the layer's in means made up to `fewest_rows`; both 0 where there are no rows."""
        missing = missing_rows(self.rows, fewest_rows(self.columns, self.hessian)) if layer is not None and layer.rows else 0.0
        total = self.rows + missing
        own = self.rows / self.weight / total if self.weight else 0.0
        return own, missing / layer.weight / total if layer is not None and missing else 0.0

    def statistics(self, layer: "Moments | None" = None) -> InputStatistics | DeviceStatistics | None:
        """Means over the rows, made up to `fewest_rows` with the mean of `layer`, whose held-out rows serve where there are none;
        None where neither has any row.

        See `calibration.rare`; the diagonal of the Hessian keeps the floor too.
        """
        own, theirs = self._shares(layer)
        if not own and not theirs:
            return None
        squares = self.squares * own
        if theirs and layer is not None:
            squares += layer.squares * theirs
        importance = floored(squares.numpy())
        if not self.hessian:
            return InputStatistics(importance, None, self.rows)
        there, hessian = self.device or CPU, None
        for products, share in ((self.products, own), (layer.products if theirs and layer is not None else None, theirs)):
            if products is not None:
                part = products.to(there) * share
                hessian = part if hessian is None else hessian.add_(part)
        hessian = torch.zeros(self.columns, self.columns, device=there) if hessian is None else _mirrored(hessian)
        hessian.diagonal().copy_(torch.from_numpy(floored(hessian.diagonal().cpu().numpy())))
        rows = self.held_out or (layer.held_out if layer is not None else [])
        held_out = torch.cat(rows) if rows else None
        if self.device is not None:
            return DeviceStatistics(importance, hessian, self.rows, held_out)
        return InputStatistics(importance, hessian.numpy(), self.rows, None if held_out is None else held_out.numpy())

    def correction(
        self, statistics: InputStatistics | DeviceStatistics, layer: "Moments | None" = None, furthest: float = inf
    ) -> Correction[Any] | None:
        """For weights whose inputs have these `statistics`, drift and residuals made up alike, with rows that have none. Of the
        drift, too, what lies beside the diagonal is taken as far as so few rows are believed. None where nothing drifted, is
        held out, or has any energy."""
        drifted, lacked = self.drift, self.residuals
        if drifted is None or not self.held_out_drift or statistics.curvature is None:
            return None
        (own, _), there = self._shares(layer), self.device or CPU
        residual = torch.cat(self.held_out_residual) if self.held_out_residual else None
        residuals = None if lacked is None or residual is None else lacked.to(there) * own
        drift = drifted.to(there) * (own * believed(self.rows, statistics.importance))
        drift.diagonal().copy_(drifted.diagonal() * own)
        parts: list[Any] = [drift, residuals, torch.cat(self.held_out_drift), residual]
        if isinstance(statistics, InputStatistics):
            parts = [None if part is None else part.numpy() for part in parts]
        return Correction(*[statistics, *parts, furthest])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a bᵀ."""
    total += linear(a, b)


def _mirrored(hessian: Tensor) -> Tensor:
    """The same matrix [n, n], below its diagonal what is above it."""
    for start in range(0, len(hessian), STRIPE):
        here, behind = slice(start, start + STRIPE), slice(start + STRIPE, None)
        own = hessian[here, here]
        own.copy_(own.triu() + own.triu(1).T)
        hessian[behind, here] = hessian[here, behind].T
    return hessian
