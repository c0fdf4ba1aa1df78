"""What is done with a layer's stages: rows measured, weights quantised, streams gone on with. By the walk, or for one expert by a
process elsewhere: the same code, so the same bytes."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numba
import numpy as np

from calibration.correction import NOTHING, Measured
from xent_quant import memory, parallel
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32
from xent_quant.progress import Progress
from xent_quant.tensors import ATTENTION_ROLES, Role, TensorSpec
from xent_quant.walk.lanes import Given, Lane

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calibration.measuring import Measuring
    from xent_quant.device.upload import Weights
    from xent_quant.model.stages import Pass, Stage


class Reports:
    """A Progress for jobs side by side."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._one = progress, threading.Lock()

    def phase(self, text: str) -> None:
        """See `Progress.phase`."""
        with self._one:
            self._progress.phase(text)

    def advance(self, amount: int) -> None:
        """See `Progress.advance`."""
        with self._one:
            self._progress.advance(amount)


class Work:
    """On the stages of `run`, for lanes that listen to its streams.

    Holds a stage's weights, with what each lane makes of them and what its method holds, for each expert that is under way,
    outside routed experts for each of at most so many streams `together` (None: one for each thread). Raises what reading,
    measuring and quantising raise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        lanes: Sequence[Lane],
        run: "Pass | None",
        measuring: "Sequence[Measuring]",
        reports: Reports,
        together: int | None = None,
    ) -> None:
        self._together = together
        self.checkpoint, self.lanes, self.run, self.reports = checkpoint, lanes, run, reports
        self.measuring: dict[int | None, Measuring] = {each.stream: each for each in measuring}
        self.by_stream: dict[int | None, list[Lane]] = {}
        for lane in lanes:
            self.by_stream.setdefault(lane.stream, []).append(lane)

    @property
    def device(self) -> "torch.device | None":
        """Where methods compute, the same for all lanes that have one."""
        return next((lane.device.device for lane in self.lanes if lane.device is not None), None)

    def on(self, run: "Pass") -> "Work":
        """The same for experts on the device of `run`; see `Lane.on`."""
        measuring = [each.on(run.device) for each in self.measuring.values()]
        return Work(self.checkpoint, [lane.on(run.device) for lane in self.lanes], run, measuring, self.reports)

    def stages(self, stages: "Iterable[tuple[Stage, ...]]") -> None:
        """Stages of a layer one after the other, or the same stages of several experts; those of another expert may be under way
        beside them."""
        for together, weights in self._with_weights(stages):
            if together[0].weights:
                self.reports.phase(said(together[0].weights[0], self.checkpoint.architecture.num_layers))
            self._stage(together, weights)
        memory.give_back()

    def measure(self, stream: int | None, stage: "Stage") -> Measured:
        """What lanes that listen to a stream are told of a stage's rows."""
        return self.measuring[stream].measure(stage) if stream in self.measuring else NOTHING

    def _with_weights(self, stages: "Iterable[tuple[Stage, ...]]") -> "Iterator[tuple[tuple[Stage, ...], Weights]]":
        """Stages with the model's weights, as read and as streams take them; for a device the next ones are read ahead."""
        assert self.run is not None
        if self.device is None:
            for together in stages:
                read = {tensor.name: self.checkpoint.read(tensor.name) for stage in together for tensor in stage.weights}
                yield together, {name: (weights, self.run.tensor(weights)) for name, weights in read.items()}
            return
        from xent_quant.device.upload import ahead

        every = list(stages)
        names = [[tensor.name for stage in together for tensor in stage.weights] for together in every]
        yield from zip(every, ahead(self.checkpoint.read, self.device, names), strict=True)

    def _stage(self, stages: "tuple[Stage, ...]", exact: "Weights") -> None:
        assert self.run is not None
        tensors = [tensor for stage in stages for tensor in stage.weights]
        weights = [{name: tensor for name, (_, tensor) in exact.items()} for _ in self.run.streams]
        work, threads = partial(self._listening, stages, exact, weights), numba.get_num_threads()
        own = [number for number in self.by_stream if number]
        together = min(len(own), self._together or len(own), threads) if self.device is None else 1
        beside = own if together > 1 else []  # never of an expert, which has one thread
        for number in self.by_stream:
            if number not in beside:  # what one of them measured is let go before the next one measures
                work(number)
        if beside:
            parallel.run([partial(work, number) for number in beside], together, each=threads // together)
        for stage in stages:
            stage.advance(weights)
        self.reports.advance(sum(tensor.n_weights for tensor in tensors))

    def _listening(
        self, stages: "tuple[Stage, ...]", exact: "Weights", weights: "list[dict[str, Tensor]]", number: int | None
    ) -> None:
        """Stages for the lanes that listen to a stream; what they make of `exact` weights goes into those of their streams."""
        assert self.run is not None
        known = [self.measure(number, stage) if stage.weights else NOTHING for stage in stages]
        given = [
            Given(tensor, 0, exact[tensor.name][0], self._told(number, tensor, measured), exact[tensor.name][1])
            for stage, measured in zip(stages, known, strict=True)
            for tensor in stage.weights
        ]
        for lane in self.by_stream[number]:
            for each, made in zip(given, self._put(lane, given), strict=True):
                if lane.stream and made is not None:
                    weights[lane.stream][each.tensor.name] = self.run.tensor(made)

    def _told(self, stream: int | None, tensor: TensorSpec, measured: Measured) -> Measured:
        """What lanes are told of one of a stage's weights. A router's numbers stay whole, but they move with what drifted."""
        if tensor.role is Role.ROUTER and stream in self.measuring:
            return Measured(None, self.measuring[stream].drifted)
        return measured if tensor.measured else NOTHING

    def _put(self, lane: Lane, given: Sequence[Given]) -> "list[F32 | Tensor | None]":
        """Whole tensors; by the CPU in the same slices as if they were read in them: what they become depends on where they are
        cut."""
        if lane.device is not None:
            return lane.put_together(given)
        found: list[F32 | Tensor | None] = []
        for tensor, _, weights, known, _ in given:
            made = []
            step = max(1, self.checkpoint.SLICE // weights.shape[1]) if lane.takes_slices(tensor) else len(weights)
            for start in range(0, len(weights), step):
                read = lane.put(tensor, start, weights[start : start + step], known)
                if read is not None:
                    made.append(read)
            found.append(np.concatenate(made) if len(made) > 1 else np.ascontiguousarray(made[0]) if made else None)
        return found


def said(tensor: TensorSpec, layers: int) -> str:
    """Where in a model of so many layers work is."""
    if tensor.expert is not None:
        where = f"expert {tensor.expert + 1}"
    else:
        where = "attention" if tensor.role in ATTENTION_ROLES else "router" if tensor.role is Role.ROUTER else "shared experts"
    return f"layer {(tensor.layer or 0) + 1} of {layers}, {where}"
