"""Statistics of the rows that a text sends through a model, stage by stage."""

from collections.abc import Iterable
from copy import copy
from math import inf
from typing import Any

import torch
from torch import Tensor

from calibration.correction import Measured, Regression
from calibration.moments import Moments
from calibration.rare import FEWEST_ROWS, fewest_rows
from xent_quant.errors import CalibrationError
from xent_quant.model.sizes import HELD_OUT_ROWS
from xent_quant.model.stages import Batch, Stage
from xent_quant.tensors import Role

HELD_OUT_SHARE = 32
"""One window in so many is held out, at least; fewer where that would be more than is kept."""


class Measuring:
    """Measures one stream of a pass over windows [n_windows, length], the stages in their order.

    With `hessian` some windows feed `InputStatistics.held_out` alone. With `gated`, an expert's inputs weigh as much as the
    square of the gate that scales its output. Holds the statistics of a layer's shared rows, with what drifted there, and of
    one stage.
    """

    def __init__(
        self,
        stream: int,
        windows: Tensor,
        *,
        hessian: bool,
        gated: bool = False,
        device: torch.device | None = None,
        furthest: float = inf,
    ) -> None:
        """`device`: see `Moments`; `furthest`: see `Correction`."""
        self._device, self._furthest = device, furthest
        self.stream, self._hessian, self._gated = stream, hessian, gated
        count, length = windows.shape
        mask = _held_out(count, length) if hessian else torch.zeros(count, dtype=torch.bool)
        self._held_out = mask.repeat_interleave(length).to(windows.device)  # by token
        # Else the first of them alone would be kept, which are of one kind of text.
        some = -(-int(mask.sum()) * length // HELD_OUT_ROWS)
        self._judged = self._held_out & (self._held_out.cumsum(0) % max(1, some) == 0)
        self._layer: Moments | None = None  # of all tokens in front of the current layer's experts
        self.drifted: Regression[Any] | None = None
        """What drifted there: for the router, and for every expert's gate and up."""

    def of(self, tokens: Tensor) -> "Measuring":
        """The same for a pass over some of the tokens [n], ascending, in the same layer."""
        found = copy(self)
        found._held_out, found._judged = self._held_out[tokens], self._judged[tokens]
        return found

    def on(self, device: torch.device) -> "Measuring":
        """The same for the experts of the same layer on another device."""
        found = copy(self)
        found._held_out, found._judged = self._held_out.to(device), self._judged.to(device)
        found._device, found._layer = device, self._layer and self._layer.on(device)
        found.drifted = self.drifted and self.drifted.on(device)
        return found

    def fewest(self, columns: int) -> int:
        """Rows on which the statistics of a weight of so many columns must stand."""
        return fewest_rows(columns, self._hessian)

    def measure(self, stage: Stage) -> Measured:
        """Look at all rows of a stage. Raises CalibrationError where they are NaN or infinite."""
        first = stage.weights[0]
        moments = Moments(first.shape[-1], self._hessian, self._device)
        for batch in stage.batches(self.stream):
            judged = self._judged[batch.tokens] if first.expert is None else None  # of an expert's there are few
            moments.add(batch, self._held_out[batch.tokens], self._gated, judged=judged)
        if not torch.isfinite(moments.squares).all():
            raise CalibrationError(f"{first.name}: its inputs are NaN or infinite; the checkpoint is damaged")
        if first.expert is not None and first.role is not Role.DOWN:
            return Measured(moments.statistics(self._layer), self.drifted)
        prior = self._others(stage, moments) if first.expert is not None else None
        statistics = moments.statistics(prior)
        correction = moments.correction(statistics, prior, self._furthest) if statistics else None
        if first.role is Role.ROUTER:
            moments.forget_drift()
            self._layer, self.drifted = moments, Regression.of(correction) if correction else None
        return Measured(statistics, correction)

    def _others(self, stage: Stage, moments: Moments) -> Moments | None:
        """A sample of the layer's tokens as a rare expert's down projection would see them; every 16th is held out."""
        fewest = self.fewest(moments.columns)
        others = sample(stage, self.stream, moments.rows + sum(len(rows) for rows in moments.held_out), fewest)
        if others is None:
            return None
        made = Moments(moments.columns, self._hessian, self._device)
        number = torch.arange(len(others.tokens), device=others.tokens.device)
        made.add(others, number % 16 == 15 if self._hessian else None)
        return made


def sample(stage: Stage, stream: int, seen: int, fewest: int) -> Batch | None:
    """Rows of the layer's tokens with which an expert that has `seen` fewer than `fewest` is made up; None where it has enough,
    or the layer no more."""
    rows = stage.others(stream, fewest) if seen < fewest else None
    return None if rows is None or seen >= len(rows.tokens) else rows


def _held_out(windows: int, length: int) -> Tensor:
    """Mask [windows]: evenly spaced windows of about 4 · HELD_OUT_ROWS tokens, but at most one in HELD_OUT_SHARE (and one, if
    there are two or more)."""
    mask = torch.zeros(windows, dtype=torch.bool)
    if windows > 1:
        share = min(windows, max(HELD_OUT_SHARE, windows * length // (4 * HELD_OUT_ROWS)))
        mask[share - 1 :: share] = True
    return mask


def sums(stage: Stage) -> tuple[Tensor, ...]:
    """Σx² [in] and rows, and of experts Σ(g·x)² and Σg², float64 on the CPU: what an importance matrix keeps. Of an expert's down
    projection also Σx² and rows of the sample that makes it up, 0 where there is none."""
    found = _sums(stage.batches(0))
    first = stage.weights[0]
    if first.expert is None or first.role is not Role.DOWN:
        return found
    rows = sample(stage, 0, int(found[1]), FEWEST_ROWS)
    made = _sums([rows]) if rows is not None else tuple(map(torch.zeros_like, found[:2]))
    return (*found, *made)


def _sums(batches: Iterable[Batch]) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for batch in batches:
        squares = batch.inputs.float().square()
        rows = torch.tensor(len(squares))
        if batch.gates is None:
            parts = [squares.sum(0), rows]
        else:  # an expert's, so on one thread
            weights = batch.gates.float().square()
            plain, gated = torch.stack([torch.ones_like(weights), weights]) @ squares
            parts = [plain, rows, gated, weights.sum()]
        wide = [part.cpu().double() for part in parts]
        found = [own.add_(more) for own, more in zip(found, wide, strict=True)] if found else wide
    return tuple(found)
