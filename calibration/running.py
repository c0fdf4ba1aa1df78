"""A calibration pass that runs along with the walk over the checkpoint: layer by layer and expert by expert, just ahead."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.correction import Correction
from calibration.coverage import Coverage
from calibration.moments import HELD_OUT_ROWS, Moments, fewest_rows
from xent_quant.checkpoint import architecture as names
from xent_quant.errors import CalibrationError
from xent_quant.model.streaming import Step, StreamingModel
from xent_quant.progress import Progress
from xent_quant.tensors import InputStatistics, StatisticsSource

HELD_OUT_SHARE = 32
"""One window in so many is held out, at least; fewer where that would be more than is kept."""

PROJECTION_SUFFIX = ".down_proj.weight"


@dataclass(frozen=True)
class _Known:
    statistics: InputStatistics | None
    correction: Correction | None


class RunningCalibration(StatisticsSource):
    """A StatisticsSource over token ids `windows` [n_windows, length]; see `StreamingModel.steps` for what the pass holds.

    Beside that it holds the statistics of one layer's attention and shared MLP and of one expert. With `hessian`, one
    window in HELD_OUT_SHARE feeds `InputStatistics.held_out` alone. With `gated`, an expert's inputs weigh as much as the square
    of the gate that scales its output. `coverage` is complete when the walk is.

    With `follow`, statistics are of the inputs that come out of the weights quantised so far, of which it must be told, and
    `target` makes up for what they lost; the weights of one layer's attention or one expert are held beside. Needs `hessian`.
    """

    def __init__(
        self,
        model: StreamingModel,
        windows: Tensor,
        *,
        hessian: bool,
        gated: bool = False,
        follow: bool = False,
        progress: Progress | None = None,
    ) -> None:
        architecture = model.architecture
        self._hessian, self._gated, self._follow = hessian, gated, follow
        self._order = {name: index for index, name in enumerate(architecture.tensors())}
        if architecture.tie_word_embeddings:  # the head's inputs come last; the embedding, asked first, has no statistics
            self._order.pop(names.EMBEDDING)
        self._shapes = architecture.tensors()
        self._windows = windows.to(model.device)
        self._held_out = _held_out(len(windows), windows.shape[1]) if hessian else torch.zeros(len(windows), dtype=torch.bool)
        self._held_out = self._held_out.to(model.device)
        fewest = fewest_rows(architecture.intermediate_size, hessian) if architecture.num_experts else 0
        self._open: dict[tuple[str, ...], Moments] = {}
        self._ready: dict[str, _Known] = {}
        self._layer: Moments | None = None  # of all tokens at the current layer's experts
        self._quantized: dict[str, list[NDArray[np.float32]]] = {}
        self.embedded = torch.zeros(0)
        if follow:
            self.embedded = torch.zeros(*windows.shape, architecture.hidden_size, dtype=model.dtype, device=model.device)
        follower = self if follow else None
        self._steps: Generator[Step, None, Tensor] | None = model.steps(windows, fewest, progress, follower=follower)
        self.coverage = Coverage(architecture.num_layers, architecture.num_experts, fewest)

    def get(self, name: str) -> InputStatistics | None:
        """See `StatisticsSource`. Raises CalibrationError as the pass does, or where the walk has gone past `name`."""
        if not self._measured(name):
            return None
        while name not in self._ready:
            if self._steps is None:
                raise CalibrationError(f"{name}: asked for after the calibration pass has gone by")
            try:
                self._take(next(self._steps))
            except StopIteration:
                self._steps = None
        position = self._order[name]
        self._ready = {other: found for other, found in self._ready.items() if self._order[other] >= position}
        return self._ready[name].statistics

    def _measured(self, name: str) -> bool:
        return len(self._shapes[name]) > 1 and name != names.EMBEDDING and not name.endswith(".router.weight")

    def target(self, name: str, start: int, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `StatisticsSource` and `Correction.target`; after `get`."""
        correction = self._ready[name].correction if self._measured(name) else None
        return correction.target(start, weights) if correction else weights

    def quantized(self, name: str, start: int, weights: Callable[[], NDArray[np.float32]]) -> None:
        """See `StatisticsSource`."""
        if not self._follow:
            return
        if name == names.EMBEDDING:
            rows = torch.from_numpy(weights()).to(self.embedded)
            here = (self._windows >= start) & (self._windows < start + len(rows))
            self.embedded[here] = rows[self._windows[here] - start]
        elif self._measured(name) and name != names.HEAD:  # nothing comes behind the head
            self._quantized.setdefault(name, []).append(weights())

    def read(self, name: str) -> NDArray[np.float32]:
        """See `Follower`."""
        return np.concatenate(self._quantized.pop(name))

    def _take(self, step: Step) -> None:
        moments = self._open.setdefault(step.weights, Moments(step.inputs.shape[1], self._hessian))
        held_out = self._held_out[step.tokens // self._windows.shape[1]]
        moments.add(step.inputs, held_out, step.gates if self._gated else None, step.exact, step.gap)
        if not step.last:
            return
        del self._open[step.weights]
        if not torch.isfinite(moments.squares).all():
            raise CalibrationError(f"{step.weights[0]}: its inputs are NaN or infinite; the checkpoint is damaged")
        prior = None
        if step.gates is not None:
            prior = self._layer
            if step.weights[0].endswith(PROJECTION_SUFFIX):
                prior = _of_others(step.others, self._hessian)
            else:
                self.coverage.count(step.weights[0], moments.rows + sum(len(rows) for rows in moments.held_out))
        elif step.weights[0].endswith(".router.weight"):
            self._layer = moments
        statistics = moments.statistics(prior)
        known = _Known(statistics, moments.correction(statistics, prior) if statistics else None)
        self._ready.update({name: known for name in step.weights if name in self._order})


def _of_others(others: Tensor | None, hessian: bool) -> Moments | None:
    """A sample of the layer's tokens as one expert's down projection would see them; every 16th is held out."""
    if others is None:
        return None
    moments = Moments(others.shape[1], hessian)
    moments.add(others, torch.arange(len(others), device=others.device) % 16 == 15 if hessian else None)
    return moments


def _held_out(windows: int, length: int) -> Tensor:
    """Mask [windows]: evenly spaced windows of about 4 · HELD_OUT_ROWS tokens, but at most one in HELD_OUT_SHARE (and one, if
    there are two or more)."""
    mask = torch.zeros(windows, dtype=torch.bool)
    if windows > 1:
        share = max(min(HELD_OUT_SHARE, windows), windows * length // (4 * HELD_OUT_ROWS))
        mask[share - 1 :: share] = True
    return mask
