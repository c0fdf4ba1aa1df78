"""Work that other processes do, on this machine or others: a layer's routed experts, and weights of which no text tells anything.

Whoever helps reads the weights from the checkpoint, which must lie under the same path there. An expert's rows are sent, and what
it makes of them comes back with its bytes; everything else of a layer is done here. What is sent is plain data, pickled.
"""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import llvmlite.binding
import numba

from calibration.correction import NOTHING
from exporters.interface import Slot
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ExportError
from xent_quant.formats.base import F32, U8
from xent_quant.journal import software
from xent_quant.methods.interface import Method
from xent_quant.progress import Progress, Silent
from xent_quant.tensors import StatisticsSource, TensorSpec
from xent_quant.walk.cluster import Cluster
from xent_quant.walk.lanes import Lane, Packed
from xent_quant.walk.work import Reports, Work, said

if TYPE_CHECKING:
    import torch

    from calibration.measuring import Measuring
    from xent_quant.model.alone import Seen
    from xent_quant.model.stages import Stage

Slots = Mapping[str, Sequence[Slot]]

SLICE = 1 << 24
"""Weights of a job, where no text is run: what it takes to send one is little beside them."""


@dataclass(frozen=True)
class Export:
    """What a lane knows of its export; `stream` and `file` as of `Lane`."""

    method: Method | None
    stream: int | None
    file: StatisticsSource | None


@dataclass(frozen=True)
class Run:
    """The same for all jobs. `version` is the software of the one who sends them."""

    checkpoint: Checkpoint
    exports: tuple[Export, ...]
    version: Mapping[str, str]
    dtype: "torch.dtype | None" = None
    kept_rows: int = 0
    products: "torch.dtype | None" = None


@dataclass(frozen=True)
class OfLayer:
    """The same for a layer's experts: what is known of its rows, and `model.alone.samples`."""

    measuring: "tuple[Measuring, ...]"
    samples: Mapping[int, F32]


@dataclass(frozen=True)
class Result:
    """Of every lane what `Lane.made_elsewhere` takes; of every stream what `model.alone.add` takes; and whose work it was."""

    lanes: tuple[tuple[list[Packed], list[str], int], ...]
    rows: tuple[F32, ...]
    host: str
    processor: str


@dataclass
class _Kept:
    """An export's choices for some weights, and a Writer that keeps what is put."""

    slots: Slots
    method: Method | None
    parts: list[Packed] = field(default_factory=list)

    def put(self, slot: Slot, start: int, packed: U8) -> None:
        """See `Writer.put`."""
        same = self.slots[slot.tensor.name]
        self.parts.append((slot.tensor.name, next(n for n, each in enumerate(same) if each is slot), start, packed))

    def sync(self) -> None:
        """Nothing is on a disk."""

    def finish(self, notes: Sequence[str]) -> Any:
        """Not called here."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


def expert(run: Run, layer: OfLayer, slots: Sequence[Slots], seen: "Seen") -> Result:
    """Do the stages of an expert that has `seen` rows, on one thread. Raises ConfigError where this is other software, and what
    `Work` raises.

    Holds those rows twice, what it makes of them, and what `Work` holds.
    """
    import torch

    from xent_quant.model.alone import Alone

    assert run.dtype is not None
    _check(run)
    torch.set_num_threads(1)
    alone = Alone(run.checkpoint, seen, layer.samples, run.dtype, run.kept_rows, run.products)
    lanes = _lanes(run, slots)
    tokens = torch.from_numpy(seen.tokens)
    work = Work(run.checkpoint, lanes, alone.run, [each.of(tokens) for each in layer.measuring], Reports(Silent()))
    _here(lambda: work.stages(zip(alone.stages)))
    return _result(lanes, alone.made)


def weights(run: Run, slots: Sequence[Slots], tensor: TensorSpec, start: int, stop: int, head: bool) -> Result:
    """Quantise rows start:stop of a tensor, a vector whole, on one thread. Raises as `expert`. Holds them and their bytes."""
    _check(run)
    lanes = _lanes(run, slots)

    def put() -> None:
        rows = run.checkpoint.read(tensor.name, start, stop)
        for lane in lanes:
            lane.put(tensor, start, rows.reshape(-1, rows.shape[-1]), NOTHING, head=head)

    _here(put)
    return _result(lanes, ())


def _check(run: Run) -> None:
    if run.version != software():
        here = socket.gethostname()
        changed = [name for name, number in software().items() if run.version.get(name) != number]
        raise ExportError(f"--ray: {here} has another {', '.join(changed) or 'version'}; install the same on all machines")
    numba.set_num_threads(1)


def _lanes(run: Run, slots: Sequence[Slots]) -> list[Lane]:
    kept = [_Kept(own, export.method) for own, export in zip(slots, run.exports, strict=True)]
    return [Lane(each, each, export.stream, export.file) for each, export in zip(kept, run.exports, strict=True)]


def _here(work: Callable[[], None]) -> None:
    """Raises ExportError, naming this machine, where files of the checkpoint are not there."""
    try:
        work()
    except OSError as error:
        what = f"{error.filename or 'the checkpoint'}: {error.strerror or error}"
        raise ExportError(f"{socket.gethostname()}: {what}; it must lie under the same path on all machines") from None


def _result(lanes: Sequence[Lane], rows: Sequence[F32]) -> Result:
    made = tuple((cast(_Kept, lane.writer).parts, lane.unmeasured, lane.measured) for lane in lanes)
    return Result(made, tuple(rows), socket.gethostname(), processor())


@cache
def processor() -> str:
    """The kind that last bits of sums may depend on."""
    return str(llvmlite.binding.get_host_cpu_name())


class Elsewhere:
    """The side that sends: gives a cluster jobs for a walk's `work`, and takes what comes back in their order.

    Holds an expert's rows while they are packed, and what one job made.
    """

    def __init__(self, cluster: Cluster, work: Work, progress: Progress) -> None:
        self._cluster, self._work, self._progress = cluster, work, progress
        run, exports = work.run, tuple(Export(lane.choices.method, lane.stream, lane.file) for lane in work.lanes)
        facts = (run.dtype, run.kept_rows, run.products) if run else ()
        self._run = cluster.keep(Run(work.checkpoint, exports, software(), *facts))
        self._told: set[str] = set()

    def experts(self, experts: "Sequence[Sequence[Stage]]") -> None:
        """The stages of a layer's routed experts."""
        from xent_quant.model.alone import Seen, add, samples

        run, lanes = self._work.run, self._work.lanes
        assert run is not None
        down = experts[0][-1].weights[0]
        counts = {number: each.fewest(down.shape[-1]) for number, each in self._work.measuring.items() if number is not None}
        layer = self._cluster.keep(OfLayer(tuple(self._work.measuring.values()), samples(run, counts)))

        def jobs() -> "Iterator[tuple[Any, ...]]":
            for stages in experts:
                names = [tensor.name for stage in stages for tensor in stage.weights]
                yield self._run, layer, [lane.slots_of(names) for lane in lanes], Seen.by(stages)

        for stages, made in zip(experts, self._cluster.run(expert, jobs()), strict=True):
            first = stages[0].weights[0]
            self._work.reports.phase(said(first, run.architecture.num_layers))
            add(stages, made.rows)
            self._take(made, sum(tensor.n_weights for stage in stages for tensor in stage.weights))

    def weights(self, tensors: Sequence[TensorSpec], lanes: Sequence[Lane], *, head: bool) -> None:
        """Tensors of which no text tells anything: in slices for lanes that take them, whole for the others."""
        every, jobs, amounts = self._work.lanes, [], []
        for tensor in tensors:
            sliced = [lane for lane in lanes if lane.takes_slices(tensor)]
            whole = [lane for lane in lanes if not lane.takes_slices(tensor)]
            for some, step in ((sliced, self._work.checkpoint.rows_together(tensor.name, SLICE)), (whole, tensor.shape[0])):
                slots = [lane.slots_of([tensor.name]) if lane in some else {tensor.name: ()} for lane in every]
                for start in range(0, tensor.shape[0] if some else 0, step):
                    stop = min(start + step, tensor.shape[0])
                    jobs.append((self._run, slots, tensor, start, stop, head))
                    amounts.append((stop - start) * (tensor.n_weights // tensor.shape[0]) * len(some) // len(every))
        for amount, made in zip(amounts, self._cluster.run(weights, jobs), strict=True):
            self._take(made, amount)

    def _take(self, made: Result, amount: int) -> None:
        for lane, facts in zip(self._work.lanes, made.lanes, strict=True):
            lane.made_elsewhere(*facts)
        self._work.reports.advance(amount)
        if made.processor != processor() and made.host not in self._told:
            self._told.add(made.host)
            self._progress.note(
                f"{made.host} has another kind of processor ({made.processor}, here {processor()}): last bits may differ."
            )
