"""The walk over a checkpoint: the one place where it is decided what happens when.

    for every layer, for every stage (those of different experts side by side):
        measure      the rows in front of the stage's weights, once for each stream that a lane listens to
        quantise     every weight for every lane, and hand the bytes to its writer
        advance      every stream with its own weights: the model's, or what a lane made of them
        commit       (behind every layer) all of it to the disk, and the journal

Without text there are no streams, and only the second line is left.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from calibration.correction import NOTHING, Measured
from xent_quant import parallel
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats._lanes import WIDTH
from xent_quant.formats.base import F32
from xent_quant.journal import Journal
from xent_quant.model.sizes import PIECE
from xent_quant.progress import Progress, Silent
from xent_quant.tensors import ATTENTION_ROLES, Role, TensorSpec
from xent_quant.walk.lanes import Given, Lane

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calibration.measuring import Measuring
    from xent_quant.device.upload import Weights
    from xent_quant.model.stages import Stage
    from xent_quant.model.streams import Streams

LEAST_SECONDS = 2.0
"""Between two commits where no text is run: a layer may take less, and syncing is not free."""


class Walk:
    """One pass over a checkpoint for any number of lanes. Every tensor of it is read once for each stage that needs it.

    Holds an expert for each thread, one layer's attention or shared MLP, or a slice of `Checkpoint.SLICE` weights, with what each
    lane makes of it and what its method holds; and what `Streams` holds. Without text a piece of PIECE weights for each thread,
    or a tensor for lanes that take it whole. Raises what reading, measuring and quantising raise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        lanes: Sequence[Lane],
        journal: Journal,
        streams: "Streams | None" = None,
        measuring: "Sequence[Measuring]" = (),
        progress: Progress | None = None,
        experts: int | None = None,
    ) -> None:
        """`experts` of a layer are worked on at a time, at most: in threads, or together by methods that compute on a device."""
        self.checkpoint, self.lanes, self.journal, self.streams = checkpoint, lanes, journal, streams
        self._side_by_side = experts
        self._measuring: dict[int | None, Measuring] = {each.stream: each for each in measuring}
        self._by_stream: dict[int | None, list[Lane]] = {}
        for lane in lanes:
            self._by_stream.setdefault(lane.stream, []).append(lane)
        self._report, self._reporting = progress or Silent(), threading.Lock()
        self._tensors = checkpoint.architecture.tensors()
        self._layers = checkpoint.architecture.num_layers
        self._seconds, self._begun = journal.seconds, time.perf_counter()
        self._saved = self._begun

    def run(self) -> None:
        """All steps that the journal does not have yet."""
        steps: list[tuple[str, Callable[[], None]]] = [
            ("embedding", self._embedding),
            *((f"layer {index + 1} of {self._layers}", lambda index=index: self._layer(index)) for index in range(self._layers)),
            ("head", self._head),
        ]
        if self.streams:
            self.streams.swapped = self.journal.swapped
        weights = [self._weights(number) for number in range(len(steps))]
        self._report.start("Quantising", sum(weights), done=sum(weights[: self.journal.done]))
        for number in range(self.journal.done, len(steps)):
            label, step = steps[number]
            self._report.phase(label)
            step()
            self._commit(number + 1, number + 1 == len(steps))
        self._report.finish()

    def _weights(self, step: int) -> int:
        layer = step - 1 if 0 < step <= self._layers else None
        roles = (Role.EMBEDDING,) if not step else (Role.HEAD, Role.NORM)
        of_step = [t for t in self._tensors.values() if t.layer == layer and (layer is not None or t.role in roles)]
        return sum(tensor.n_weights for tensor in of_step)

    def _commit(self, done: int, last: bool) -> None:
        now = time.perf_counter()
        if not self.streams and not last and now - self._saved < LEAST_SECONDS:
            return
        for lane in self.lanes:
            lane.writer.sync()
        if self.streams:
            self.streams.sync()
            self.journal.swapped = self.streams.swapped
        self.journal.done = done
        self.journal.unmeasured = [lane.unmeasured for lane in self.lanes]
        self.journal.measured = [lane.measured for lane in self.lanes]
        self.journal.seconds = self._seconds + now - self._begun
        self.journal.save()
        self._saved = now

    def _embedding(self) -> None:
        tensor = self.checkpoint.architecture.embedding
        if not self.streams:
            self._pass([tensor], self.lanes)
            return
        for start, rows in self.checkpoint.slices(tensor.name):
            self.streams.embed(0, start, rows)
            for lane in self.lanes:
                read = lane.put(tensor, start, rows, NOTHING)
                if lane.stream and read is not None:
                    self.streams.embed(lane.stream, start, read)
            self._report.advance(rows.size)

    def _layer(self, index: int) -> None:
        tensors = [tensor for tensor in self._tensors.values() if tensor.layer == index]
        self._pass([tensor for tensor in tensors if not self.streams or tensor.role is Role.NORM], self.lanes)
        if not self.streams:
            return
        stages = self.streams.run.layer(index)
        for routed, group in groupby(stages, key=lambda stage: stage.expert is not None):
            if routed:
                experts = [list(chain) for _, chain in groupby(group, key=lambda stage: stage.expert)]
                if self._device is not None:
                    step = self._side_by_side or 1
                    parts = [experts[start : start + step] for start in range(0, len(experts), step)]
                    self._stages(index, [same for part in parts for same in zip(*part, strict=True)])
                    continue
                parallel.run([partial(self._stages, index, zip(chain)) for chain in experts], self._side_by_side)
            else:
                self._stages(index, zip(group))

    @property
    def _device(self) -> "torch.device | None":
        """Where methods compute, the same for all lanes that have one."""
        return next((lane.device.device for lane in self.lanes if lane.device is not None), None)

    def _with_weights(self, stages: "Iterable[tuple[Stage, ...]]") -> "Iterator[tuple[tuple[Stage, ...], Weights]]":
        """Stages with the model's weights, as read and as streams take them; for a device the next ones are read ahead."""
        assert self.streams is not None
        if self._device is None:
            for together in stages:
                read = {tensor.name: self.checkpoint.read(tensor.name) for stage in together for tensor in stage.weights}
                yield together, {name: (weights, self.streams.tensor(weights)) for name, weights in read.items()}
            return
        from xent_quant.device.upload import ahead

        every = list(stages)
        names = [[tensor.name for stage in together for tensor in stage.weights] for together in every]
        yield from zip(every, ahead(self.checkpoint.read, self._device, names), strict=True)

    def _stages(self, index: int, stages: "Iterable[tuple[Stage, ...]]") -> None:
        """Stages of a layer one after the other, or the same stages of several experts; those of another expert may be under way
        beside them."""
        assert self.streams is not None
        for together, weights in self._with_weights(stages):
            stage = together[0]
            first = stage.weights[0] if stage.weights else None
            if first:
                with self._reporting:
                    self._report.phase(f"layer {index + 1} of {self._layers}, {_said(first)}")
            self._stage(together, weights)
            if first and first.role is Role.ROUTER:
                listened = max((number for number in self._measuring if number), default=0)
                self.journal.coverage = [*self.journal.coverage[:index], self.streams.run.expert_tokens(listened)]

    def _head(self) -> None:
        self._pass([self.checkpoint.architecture.final_norm], self.lanes)
        tensor = self.checkpoint.architecture.head
        stage = self.streams.run.head() if self.streams else None
        for number, lanes in self._by_stream.items():
            wanted = [lane for lane in lanes if lane.slots(tensor, head=True)]
            if wanted:
                self._pass([tensor], wanted, self._measure(number, stage) if stage else NOTHING, head=True)

    def _pass(
        self, tensors: Sequence[TensorSpec], lanes: Sequence[Lane], known: Measured = NOTHING, *, head: bool = False
    ) -> None:
        """Tensors that no stream goes on with: in slices to all lanes that take them, whole to the others. Where no text tells
        anything of them the slices are small and go side by side."""
        jobs: list[Callable[[], None]] = []
        for tensor in tensors:
            sliced = [lane for lane in lanes if lane.takes_slices(tensor)]
            size = (PIECE, WIDTH) if known is NOTHING else (self.checkpoint.SLICE, 1)
            for start, read in self.checkpoint.pieces(tensor.name, *size) if sliced else ():
                jobs.append(partial(self._give, tensor, start, read, sliced, known, head))
        if known is NOTHING:
            parallel.run(jobs)
        else:
            for job in jobs:
                job()
        for tensor in tensors:
            whole = [lane for lane in lanes if not lane.takes_slices(tensor)]
            if whole:
                self._give(tensor, 0, partial(self.checkpoint.read, tensor.name), whole, NOTHING, head)

    def _give(
        self, tensor: TensorSpec, start: int, read: Callable[[], F32], lanes: Sequence[Lane], known: Measured, head: bool
    ) -> None:
        parallel.check()
        rows = read()
        for lane in lanes:
            lane.put(tensor, start, rows, known, head=head)
        with self._reporting:
            self._report.advance(rows.size * len(lanes) // len(self.lanes))

    def _stage(self, stages: "tuple[Stage, ...]", exact: "Weights") -> None:
        assert self.streams is not None
        tensors = [tensor for stage in stages for tensor in stage.weights]
        weights = [{name: tensor for name, (_, tensor) in exact.items()} for _ in self.streams.run.streams]
        for number, lanes in self._by_stream.items():  # what one of them measured is let go before the next one measures
            known = [self._measure(number, stage) if stage.weights else NOTHING for stage in stages]
            given = [
                Given(tensor, 0, exact[tensor.name][0], measured if tensor.measured else NOTHING, exact[tensor.name][1])
                for stage, measured in zip(stages, known, strict=True)
                for tensor in stage.weights
            ]
            for lane in lanes:
                for each, made in zip(given, self._put(lane, given), strict=True):
                    if lane.stream and made is not None:
                        weights[lane.stream][each.tensor.name] = self.streams.tensor(made)
            del known, given
        for stage in stages:
            stage.advance(weights)
        with self._reporting:
            self._report.advance(sum(tensor.n_weights for tensor in tensors))

    def _measure(self, stream: int | None, stage: "Stage") -> Measured:
        return self._measuring[stream].measure(stage) if stream in self._measuring else NOTHING

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
            found.append(np.concatenate(made) if made else None)
        return found


def _said(tensor: TensorSpec) -> str:
    """Where in a layer it is."""
    if tensor.expert is not None:
        return f"expert {tensor.expert + 1}"
    return "attention" if tensor.role in ATTENTION_ROLES else "router" if tensor.role is Role.ROUTER else "shared experts"
