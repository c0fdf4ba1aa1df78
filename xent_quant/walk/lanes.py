"""An export on its way through the walk: what it makes of each tensor."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.correction import Measured
from exporters.interface import Exporter, Slot, Writer
from xent_quant.formats._prescaled import Prescaled
from xent_quant.formats.base import F32, U8, QuantFormat
from xent_quant.methods.rtn import RoundToNearest
from xent_quant.tensors import InputStatistics, Role, StatisticsSource, TensorSpec

ALWAYS_WITHOUT = (Role.EMBEDDING, Role.HEAD)
"""Roles for which llama-imatrix collects nothing: nobody need be told that there is nothing."""


@dataclass
class Lane:
    """One export: its plan, its writer, and where its statistics come from.

    `stream` is the one whose rows its method is told of: 0 the exact stream, above 0 its own, of its own quantised weights; None
    where no text is measured for it, and `file` may know something. `unmeasured` are tensors that had no statistics, `measured`
    counts the others.
    """

    exporter: Exporter
    writer: Writer
    stream: int | None
    file: StatisticsSource | None = None
    unmeasured: list[str] = field(default_factory=list)
    measured: int = 0

    def __post_init__(self) -> None:
        self._slots = self.exporter.slots
        self._seen: set[str] = set()
        self._noting = threading.Lock()

    def resume(self, unmeasured: Sequence[str], measured: int) -> None:
        """What an earlier run found."""
        self.unmeasured, self.measured, self._seen = list(unmeasured), measured, set(unmeasured)

    def slots(self, tensor: TensorSpec, head: bool) -> Sequence[Slot]:
        """Where a tensor goes at the head, or anywhere else: a tied embedding goes to both."""
        return [slot for slot in self._slots[tensor.name] if (slot.role is Role.HEAD) == head]

    def takes_slices(self, tensor: TensorSpec) -> bool:
        """Whether rows of a tensor may come a few at a time."""
        return all(slot.encoding.by_rows for slot in self._slots[tensor.name])

    def put(self, tensor: TensorSpec, start: int, weights: F32, known: Measured, *, head: bool = False) -> F32 | None:
        """Quantise rows `start`… [rows, columns] of a tensor, a vector as [1, n], and write them wherever they go. Returns what
        a runtime will read there, in the same shape; None where that is not asked for, since no stream of this lane's goes on
        with it.

        Holds the packed rows, and what the method holds.
        """
        statistics = known.statistics if self.stream is not None else self._from_file(tensor)
        pull = known.correction.pull(start, weights) if known.correction else None
        read: F32 | None = None
        for slot in self.slots(tensor, head):
            use = statistics if slot.role not in (Role.NORM, Role.ROUTER, Role.EMBEDDING) else None
            packed = self._quantise(slot, start, weights, use, pull)
            self.writer.put(slot, start, packed)
            if not start and tensor.measured:
                self._note(slot, use)
            if self.stream and isinstance(slot.encoding, QuantFormat):
                read = slot.encoding.dequantize(packed)[: len(weights), : weights.shape[1]]
            elif self.stream and isinstance(slot.encoding, Prescaled):
                read = slot.encoding.dequantize(packed, (slot.rows, slot.columns))[: len(weights), : weights.shape[1]]
        return read

    def _from_file(self, tensor: TensorSpec) -> InputStatistics | None:
        return self.file.get(tensor) if self.file else None

    def _quantise(self, slot: Slot, start: int, weights: F32, known: InputStatistics | None, pull: F32 | None) -> U8:
        last = len(slot.tensor.shape) == 1 or start + len(weights) == slot.tensor.shape[0]
        missing = (
            slot.rows - slot.tensor.shape[0] if last and len(slot.tensor.shape) > 1 else 0,
            slot.columns - weights.shape[1],
        )
        if any(missing):
            around = (0, missing[0]), (0, missing[1])
            weights, pull = np.pad(weights, around), None if pull is None else np.pad(pull, around)
        method = self.exporter.method or RoundToNearest()
        statistics = known and known.padded(slot.columns)
        return method.quantize(weights, slot.encoding, statistics, name=slot.tensor.name, pull=pull)

    def _note(self, slot: Slot, known: InputStatistics | None) -> None:
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
