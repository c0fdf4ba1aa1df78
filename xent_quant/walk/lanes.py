"""An export on its way through the walk: what it makes of each tensor."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from calibration.correction import Measured
from exporters.interface import Choices, Slot, Writer
from xent_quant.errors import CalibrationError
from xent_quant.formats.base import F32, U8, Encoding
from xent_quant.linalg import Matrix
from xent_quant.methods.rtn import RoundToNearest
from xent_quant.tensors import InputStatistics, Role, StatisticsSource, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from xent_quant.device.method import Job, OnDevice
    from xent_quant.device.statistics import DeviceStatistics

    Padded = dict[tuple[int, int], tuple[DeviceStatistics | InputStatistics, DeviceStatistics | InputStatistics]]
    """Statistics by their identity and the columns that they were padded to, and with that many."""

ALWAYS_WITHOUT = (Role.EMBEDDING, Role.HEAD)
"""Roles for which llama-imatrix collects nothing: nobody need be told that there is nothing."""


Packed = tuple[str, int, int, U8]
"""Of a tensor by its name, which of its slots, from which row, and rows as they are put there."""


class Given(NamedTuple):
    """Rows `start`… [rows, columns] of a tensor, a vector as [1, n], and what is known of their inputs; `there` are the same rows
    on the device, where they are there already."""

    tensor: TensorSpec
    start: int
    weights: F32
    known: Measured
    there: "Tensor | None" = None


@dataclass
class Lane:
    """One export: what its plan chose, its writer, and where its statistics come from.

    `stream` is the one whose rows its method is told of: 0 the exact stream, above 0 its own, of its own quantised weights; None
    where no text is measured for it, and `file` may know something. `device` is its method where that computes on one.
    `unmeasured` are tensors that had no statistics, `measured` counts the others.
    """

    choices: Choices
    writer: Writer
    stream: int | None
    file: StatisticsSource | None = None
    device: "OnDevice | None" = None
    unmeasured: list[str] = field(default_factory=list)
    measured: int = 0

    def __post_init__(self) -> None:
        self._slots = self.choices.slots
        self._seen: set[str] = set()
        self._noting = threading.Lock()

    def resume(self, unmeasured: Sequence[str], measured: int) -> None:
        """What an earlier run found."""
        self.unmeasured, self.measured, self._seen = list(unmeasured), measured, set(unmeasured)

    def on(self, device: "torch.device") -> "Lane":
        """The same export on another device; what is noted there `made_elsewhere` takes."""
        return Lane(self.choices, self.writer, self.stream, self.file, self.device and self.device.on(device))

    def made_elsewhere(self, rows: "Iterable[Packed]", unmeasured: Sequence[str], measured: int) -> None:
        """What another lane of the same export, in another process or on another device, put and noted."""
        for name, number, start, packed in rows:
            self.writer.put(self._slots[name][number], start, packed)
        with self._noting:
            new = [label for label in unmeasured if label not in self._seen]
            self.unmeasured += new
            self._seen.update(new)
            self.measured += measured

    def slots_of(self, names: Iterable[str]) -> dict[str, Sequence[Slot]]:
        """All of some tensors."""
        return {name: self._slots[name] for name in names}

    def slots(self, tensor: TensorSpec, head: bool) -> Sequence[Slot]:
        """Where a tensor goes at the head, or anywhere else: a tied embedding goes to both."""
        return [slot for slot in self._slots[tensor.name] if (slot.role is Role.HEAD) == head]

    def takes_slices(self, tensor: TensorSpec) -> bool:
        """Whether rows of a tensor may come a few at a time."""
        return all(slot.encoding.by_rows for slot in self._slots[tensor.name])

    def put(self, tensor: TensorSpec, start: int, weights: F32, known: Measured, *, head: bool = False) -> "F32 | Tensor | None":
        """Quantise rows `start`… [rows, columns] of a tensor, a vector as [1, n], and write them wherever they go. Returns what
        a runtime will read there, in the same shape; None where that is not asked for, since no stream of this lane's goes on
        with it.

        Holds the packed rows, and what the method holds.
        """
        given = Given(tensor, start, weights, known)
        if self.device is not None:
            return self.put_together([given], head=head)[0]
        return self._put(given, head)

    def put_together(self, given: Sequence[Given], *, head: bool = False) -> "list[F32 | Tensor | None]":
        """As `put`, of several tensors at a time, by a method that computes on a device; what a runtime will read lies there.

        Holds what the method holds for all of those that have the same encoding.
        """
        assert self.device is not None
        made: list[F32 | Tensor | None] = [None] * len(given)
        waiting: dict[Encoding, list[tuple[int, Slot, Job]]] = {}
        padded: Padded = {}
        for number, each in enumerate(given):
            slots = self.slots(each.tensor, head)
            here = any(self.device.here(slot.encoding) for slot in slots)
            if not here and each.known.correction is None and isinstance(each.known.statistics, InputStatistics | None):
                made[number] = self._put(each, head)
                continue
            for slot, job in self._jobs(each, slots, padded):
                waiting.setdefault(slot.encoding, []).append((number, slot, job))
        for encoding, waiting_for in waiting.items():
            results = self.device.quantize_together([job for *_, job in waiting_for], encoding)
            for (number, slot, _), result in zip(waiting_for, results, strict=True):
                rows, columns = given[number].weights.shape
                self.writer.put(slot, given[number].start, result.packed)
                if self.stream:
                    made[number] = result.values[:rows, :columns]
        return made

    def _jobs(self, given: Given, slots: Sequence[Slot], padded: "Padded") -> "Iterator[tuple[Slot, Job]]":
        """What the device is asked for, for each slot. Statistics are padded once for all weights that share them."""
        import torch
        import torch.nn.functional as F

        from xent_quant.device.method import Job

        assert self.device is not None
        tensor, start, weights, known, there = given
        statistics = known.statistics if self.stream is not None else self._from_file(tensor)
        there = torch.from_numpy(weights).to(self.device.device) if there is None else there
        there, pull = _moved(given, there)
        for slot in slots:
            use = statistics if self._wanted(slot) else None
            if not start and tensor.measured:
                self._note(slot, use)
            if use is not None:
                key = id(use), slot.columns
                if key not in padded:
                    padded[key] = use, use.padded(slot.columns)
                use = padded[key][1]
            rows, columns = self._missing(slot, start, weights)
            around = (0, columns, 0, rows)
            wide = there if not any(around) else F.pad(there, around)
            yield slot, Job(tensor.name, wide, use, pull if pull is None or not any(around) else F.pad(pull, around))

    def _put(self, given: Given, head: bool) -> F32 | None:
        """By the CPU's kernels."""
        tensor, start, weights, known, _ = given
        statistics = known.statistics if self.stream is not None else self._from_file(tensor)
        weights, pull = _moved(given, weights)
        read: F32 | None = None
        for slot in self.slots(tensor, head):
            use = statistics if self._wanted(slot) else None
            packed = self._quantise(slot, start, weights, use, pull)
            self.writer.put(slot, start, packed)
            if not start and tensor.measured:
                self._note(slot, use)
            if self.stream:
                read = slot.encoding.read(packed, (slot.rows, slot.columns))[: len(weights), : weights.shape[1]]
        return read

    @staticmethod
    def _wanted(slot: Slot) -> bool:
        """Whether statistics say anything of a slot's weights."""
        return slot.role not in (Role.NORM, Role.ROUTER, Role.EMBEDDING)

    @staticmethod
    def _missing(slot: Slot, start: int, weights: F32) -> tuple[int, int]:
        """Rows and columns of zeros that follow in the slot."""
        whole = len(slot.tensor.shape) > 1
        last = whole and start + len(weights) == slot.tensor.shape[0]
        return slot.rows - slot.tensor.shape[0] if last else 0, slot.columns - weights.shape[1]

    def _from_file(self, tensor: TensorSpec) -> InputStatistics | None:
        return self.file.get(tensor) if self.file else None

    def _quantise(
        self, slot: Slot, start: int, weights: F32, known: "InputStatistics | DeviceStatistics | None", pull: F32 | None
    ) -> U8:
        assert known is None or isinstance(known, InputStatistics)
        missing = self._missing(slot, start, weights)
        if any(missing):
            around = (0, missing[0]), (0, missing[1])
            weights, pull = np.pad(weights, around), None if pull is None else np.pad(pull, around)
        method = self.choices.method or RoundToNearest()
        statistics = known and known.padded(slot.columns)
        return method.quantize(weights, slot.encoding, statistics, name=slot.tensor.name, pull=pull)

    def _note(self, slot: Slot, known: "InputStatistics | DeviceStatistics | None") -> None:
        if slot.role in ALWAYS_WITHOUT:
            return
        with self._noting:
            if slot.label in self._seen:
                return
            if known is None:
                self._seen.add(slot.label)
                self.unmeasured.append(slot.label)
            else:
                self.measured += 1


def _moved(given: Given, weights: Matrix) -> tuple[Matrix, Matrix | None]:
    """See `Correction.moved`. Raises CalibrationError where float32 does not hold what the weights make of their inputs."""
    if given.known.correction is None:
        return weights, None
    try:
        moved, pull = given.known.correction.moved(given.start, weights)
    except FloatingPointError:
        raise CalibrationError(f"{given.tensor.name}: what it makes of its inputs is infinite; the weights are damaged") from None
    return moved, pull
