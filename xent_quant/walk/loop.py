"""The walk over a checkpoint: the one place where it is decided what happens when.

    for every layer, for every stage (those of different experts side by side):
        measure      the rows in front of the stage's weights, once for each stream that a lane listens to
        quantise     every weight for every lane, and hand the bytes to its writer
        advance      every stream with its own weights: the model's, or what a lane made of them
        commit       (behind every layer) all of it to the disk, and the journal

Without text there are no streams, and only the second line is left, and the last one, beside the next layer.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numba

from calibration.correction import NOTHING, Measured
from xent_quant import parallel
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats._lanes import WIDTH
from xent_quant.formats.base import F32
from xent_quant.journal import Journal
from xent_quant.model.sizes import PIECE, SLICES, Room
from xent_quant.progress import Progress, Silent
from xent_quant.tensors import Role, TensorSpec
from xent_quant.walk.elsewhere import Elsewhere
from xent_quant.walk.lanes import Lane
from xent_quant.walk.work import Reports, Work

if TYPE_CHECKING:
    import torch

    from calibration.measuring import Measuring
    from xent_quant.model.stages import Stage
    from xent_quant.model.streams import Streams
    from xent_quant.walk.cluster import Cluster

LEAST_SECONDS = 2.0
"""Between two commits where no text is run: a layer may take less, and syncing is not free."""


class Walk:
    """One pass over a checkpoint for any number of lanes. Every tensor of it is read once for each stage that needs it.

    Holds an expert for each thread, one layer's attention or shared MLP, or SLICES of `Checkpoint.SLICE` weights, with what each
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
        room: Room | None = None,
        cluster: "Cluster | None" = None,
        devices: "Sequence[torch.device]" = (),
    ) -> None:
        """So many experts of a layer as there is `room` for are worked on at a time: in threads, or together by methods that
        compute on a device, and on each of further `devices`. A `cluster` takes them instead, as do weights of which no text
        tells anything."""
        self._devices = devices
        self.checkpoint, self.lanes, self.journal, self.streams = checkpoint, lanes, journal, streams
        self._side_by_side, together = (room.experts, room.streams) if room else (None, None)
        self._progress = progress or Silent()
        self._reports = Reports(self._progress)
        self._work = Work(checkpoint, lanes, streams.run if streams else None, measuring, self._reports, together)
        self._elsewhere = Elsewhere(cluster, self._work, self._progress) if cluster else None
        self._tensors = checkpoint.architecture.tensors()
        self._layers = checkpoint.architecture.num_layers
        self._seconds, self._begun = journal.seconds, time.perf_counter()
        self._saved = self._begun
        self._saving: Future[None] | None = None

    def run(self) -> None:
        """All steps that the journal does not have yet."""
        with ThreadPoolExecutor(1) as self._saver:  # where it ends early, a commit that is under way is waited for
            self._run()

    def _run(self) -> None:
        steps: list[tuple[str, Callable[[], None]]] = [
            ("embedding", self._embedding),
            *((f"layer {index + 1} of {self._layers}", lambda index=index: self._layer(index)) for index in range(self._layers)),
            ("head", self._head),
        ]
        if self.streams:
            self.streams.swapped = self.journal.swapped
        weights = [self._weights(number) for number in range(len(steps))]
        self._progress.start("Quantising", sum(weights), done=sum(weights[: self.journal.done]))
        for number in range(self.journal.done, len(steps)):
            label, step = steps[number]
            self._reports.phase(label)
            step()
            self._commit(number + 1, number + 1 == len(steps))
        self._progress.finish()

    def _weights(self, step: int) -> int:
        layer = step - 1 if 0 < step <= self._layers else None
        roles = (Role.EMBEDDING,) if not step else (Role.HEAD, Role.NORM)
        of_step = [t for t in self._tensors.values() if t.layer == layer and (layer is not None or t.role in roles)]
        return sum(tensor.n_weights for tensor in of_step)

    def _commit(self, done: int, last: bool) -> None:
        """Without text beside the next step: the disk takes as long as the arithmetic, and what else is written meanwhile is of
        steps that the journal does not have."""
        now = time.perf_counter()
        if not self.streams and not last and now - self._saved < LEAST_SECONDS:
            return
        if self._saving:
            self._saving.result()
        known = [(list(lane.unmeasured), lane.measured) for lane in self.lanes]
        save = partial(self._save, done, known, self._seconds + now - self._begun)
        if self.streams or last:
            save()
        else:
            self._saving = self._saver.submit(save)
        self._saved = now

    def _save(self, done: int, known: Sequence[tuple[list[str], int]], seconds: float) -> None:
        for lane in self.lanes:
            lane.writer.sync()
        if self.streams:
            self.streams.sync()
            self.journal.swapped = self.streams.swapped
        self.journal.done, self.journal.seconds = done, seconds
        self.journal.unmeasured, self.journal.measured = [names for names, _ in known], [count for _, count in known]
        self.journal.save()

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
            self._reports.advance(rows.size)

    def _layer(self, index: int) -> None:
        tensors = [tensor for tensor in self._tensors.values() if tensor.layer == index]
        self._pass([tensor for tensor in tensors if not self.streams or tensor.role is Role.NORM], self.lanes)
        if not self.streams:
            return
        from xent_quant.model.stages import side_by_side

        run = self.streams.run
        for together in side_by_side(run.layer(index)):
            if together[0][0].expert is None:
                self._work.stages(zip(together[0]))
                continue
            listened = max((number for number in self._work.measuring if number), default=0)
            self.journal.coverage = [*self.journal.coverage[:index], run.expert_tokens(listened)]
            self._experts(together)

    def _experts(self, experts: "list[list[Stage]]") -> None:
        """The stages of a layer's routed experts: side by side in processes elsewhere or in threads, or as many as fit together
        on each device."""
        if self._work.device is not None:
            self._on_devices(experts)
        elif self._elsewhere:
            self._elsewhere.experts(experts)
        else:
            parallel.run([partial(self._work.stages, zip(chain)) for chain in experts], self._side_by_side)

    def _on_devices(self, experts: "list[list[Stage]]") -> None:
        from xent_quant.model.stages import dealt_out, on_devices

        step = self._side_by_side or 1
        dealt = dealt_out([experts[start : start + step] for start in range(0, len(experts), step)], self._devices)
        beside = [self._work.on(groups[0][0][0].run) for groups in dealt[1:]]
        jobs = []
        for work, groups in zip([self._work, *beside], dealt, strict=True):
            jobs.append(partial(work.stages, [same for group in groups for same in zip(*group, strict=True)]))
        on_devices(jobs)
        for work in beside:
            for lane, other in zip(self.lanes, work.lanes, strict=True):
                lane.made_elsewhere((), other.unmeasured, other.measured)

    def _head(self) -> None:
        self._pass([self.checkpoint.architecture.final_norm], self.lanes)
        tensor = self.checkpoint.architecture.head
        stage = self.streams.run.head() if self.streams else None
        for number, lanes in self._work.by_stream.items():
            wanted = [lane for lane in lanes if lane.slots(tensor, head=True)]
            if wanted:
                self._pass([tensor], wanted, self._work.measure(number, stage) if stage else NOTHING, head=True)

    def _pass(
        self, tensors: Sequence[TensorSpec], lanes: Sequence[Lane], known: Measured = NOTHING, *, head: bool = False
    ) -> None:
        """Tensors that no stream goes on with: in slices to all lanes that take them, whole to the others. Where no text tells
        anything of them the slices are small and there is one for each thread; else SLICES are side by side."""
        if known is NOTHING and self._elsewhere and not self.streams:
            self._elsewhere.weights(tensors, lanes, head=head)
            return
        jobs: list[Callable[[], None]] = []
        for tensor in tensors:
            sliced = [lane for lane in lanes if lane.takes_slices(tensor)]
            size = (PIECE, WIDTH) if known is NOTHING else (self.checkpoint.SLICE, 1)
            for start, read in self.checkpoint.pieces(tensor.name, *size) if sliced else ():
                jobs.append(partial(self._give, tensor, start, read, sliced, known, head))
        threads = numba.get_num_threads()
        together = min(len(jobs), threads, SLICES, self._side_by_side or SLICES)
        if known is NOTHING:
            parallel.run(jobs)
        elif together > 1 and self._work.device is None:
            parallel.run(jobs, together, each=threads // together)
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
        self._reports.advance(rows.size * len(lanes) // len(self.lanes))
