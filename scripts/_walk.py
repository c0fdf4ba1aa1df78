"""Walks whose results stay in memory, and what else scripts share: they look at statistics and weights that no file holds.

Exports that are files are `xent_quant.walk.job.run`'s, here too.
"""

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from calibration.correction import NOTHING, Measured, furthest
from calibration.coverage import Coverage
from calibration.imatrix import Imatrix
from calibration.measuring import Measuring
from calibration.session import Session, Windows
from exporters.interface import Slot
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32, U8, QuantFormat
from xent_quant.journal import FILE, Journal
from xent_quant.methods.interface import Method
from xent_quant.model.stages import Stage
from xent_quant.model.streams import Streams
from xent_quant.progress import Silent
from xent_quant.tensors import Role, StatisticsSource, TensorSpec
from xent_quant.walk.collecting import collect
from xent_quant.walk.lanes import Lane
from xent_quant.walk.loop import Walk

Slots = Mapping[str, Sequence[Slot]]
"""By the checkpoint's name of a tensor where it goes. One that is missing goes nowhere; the model runs on with it as it is."""
Receive = Callable[[Slot, U8], None]
"""Gets a slot and all its packed rows [rows, row_bytes], padding included."""


def slot(tensor: TensorSpec, encoding: QuantFormat) -> Slot:
    """A tensor in one encoding, its rows padded to whole blocks."""
    rows, columns = tensor.shape
    return Slot(tensor, tensor.role, encoding, rows, columns + -columns % encoding.block_size)


def first_layers(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The same without its last layers."""
    return replace(checkpoint, architecture=replace(checkpoint.architecture, num_layers=count))


class _Missing:
    """Counts the rows that are still to come, in all lanes."""

    def __init__(self, lanes: Sequence[Slots]) -> None:
        self._rows = sum(each.rows for slots in lanes for group in slots.values() for each in group)
        self._counting = threading.Lock()

    def less(self, rows: int) -> bool:
        """Whether these were the last."""
        with self._counting:  # experts come side by side
            self._rows -= rows
            return not self._rows


@dataclass
class _Receiver:
    """A Writer that hands on whole tensors, and an Exporter as far as a Lane asks."""

    slots: Slots
    method: Method
    receive: Receive
    missing: _Missing
    parts: dict[tuple[str, Role], list[U8]] = field(default_factory=dict)

    def put(self, slot: Slot, start: int, packed: U8) -> None:
        """See `Writer.put`; slices come in order. Raises _Done behind the last of all lanes."""
        parts = self.parts.setdefault((slot.tensor.name, slot.role), [])
        parts.append(packed)
        count = len(packed) if slot.encoding.by_rows else slot.rows
        if not slot.encoding.by_rows or sum(map(len, parts)) == slot.rows:
            del self.parts[slot.tensor.name, slot.role]
            self.receive(slot, np.concatenate(parts))
        if self.missing.less(count):
            raise _Done

    def sync(self) -> None:
        """Nothing is kept."""


class _Done(Exception):
    """Every slot is full, and the walk need not go on."""


class _Measuring(Measuring):
    """Of the stages that hold a weight with slots in `names` (None: of all), and of routers, whose rows rare experts borrow."""

    names: Slots | None = None

    def measure(self, stage: Stage) -> Measured:
        """See `Measuring.measure`."""
        asked = self.names is None or any(spec.role is Role.ROUTER or self.names.get(spec.name) for spec in stage.weights)
        return super().measure(stage) if asked else NOTHING


def walk(checkpoint: Checkpoint, slots: Slots, method: Method, receive: Receive, **options: Any) -> None:
    """`walk_together` for one."""
    walk_together(checkpoint, [(slots, receive)], method, **options)


def walk_together(
    checkpoint: Checkpoint,
    wanted: Sequence[tuple[Slots, Receive]],
    method: Method,
    *,
    windows: Tensor | None = None,
    statistics: StatisticsSource | None = None,
    follow: bool = True,
    gated: bool = False,
    measure_all: bool = False,
) -> None:
    """Quantise what the slots ask for, with statistics of a file or of `windows` that run along, until the last slot is full.

    A method that needs Hessians follows the model that it quantises, each of `wanted` its own, as in an export, unless `follow`
    is False. `gated` as of `Measuring`. Weights that go nowhere are not measured unless `measure_all` is given.
    """
    tensors = checkpoint.architecture.tensors()
    every = [{name: slots.get(name, ()) for name in tensors} for slots, _ in wanted]
    missing = _Missing(every)
    receivers = [_Receiver(slots, method, receive, missing) for slots, (_, receive) in zip(every, wanted, strict=True)]
    lanes = [Lane(cast(Any, receiver), cast(Any, receiver), None, statistics) for receiver in receivers]
    with tempfile.TemporaryDirectory() as temporary:
        folder, streams, measuring = Path(temporary), None, []
        if windows is not None:
            own = follow and method.needs_hessian
            for number, lane in enumerate(lanes, 1):
                lane.stream = number if own else 0
            listened = sorted({cast(int, lane.stream) for lane in lanes})
            streams = Streams(checkpoint, windows, folder, torch.float32, max(listened) + 1, fresh=True)
            most = [furthest(slot.encoding for slots in each.values() for slot in slots) for each in every] if own else [inf]
            measuring = [
                _Measuring(number, windows, hessian=method.needs_hessian, gated=gated, furthest=far)
                for number, far in zip(listened, most, strict=True)
            ]
            for each in measuring:
                each.names = (
                    None if measure_all else {name: [slot for slots in every for slot in slots[name]] for name in tensors}
                )
            embedding = checkpoint.architecture.embedding.name
            unread = [number for number, slots in enumerate(every, 1) if own and not slots[embedding]]
            for start, rows in checkpoint.slices(embedding) if unread else ():
                for number in unread:
                    streams.embed(number, start, rows)
        with suppress(_Done):
            Walk(checkpoint, lanes, Journal(folder / FILE, {}), streams, measuring).run()
        if streams:
            streams.close()


class Weights:
    """A WeightSource over arrays."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.architecture = checkpoint.architecture
        self.arrays: dict[str, F32] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """See `WeightSource.read`."""
        return self.arrays[name][start:stop]


def quantised(checkpoint: Checkpoint, slots: Slots, method: Method, **options: Any) -> Weights:
    """The model as an export with these slots would have it, dequantised; `options` are those of `walk_together`."""
    return quantised_together(checkpoint, [slots], method, **options)[0]


def quantised_together(checkpoint: Checkpoint, wanted: Sequence[Slots], method: Method, **options: Any) -> list[Weights]:
    """As `quantised`, of one run of the text. Holds all of them, in float32."""
    found = [Weights(checkpoint) for _ in wanted]

    def receive(into: Weights, slot: Slot, packed: U8) -> None:
        shape = slot.tensor.shape
        rows = slot.encoding.read(packed, (slot.rows, slot.columns))
        into.arrays[slot.tensor.name] = np.ascontiguousarray(rows[: shape[0], : shape[1]] if len(shape) > 1 else rows[0])

    walk_together(
        checkpoint, [(slots, partial(receive, each)) for slots, each in zip(wanted, found, strict=True)], method, **options
    )
    return found


class _Given(Windows):
    """Windows, with what else `collect` asks of a Session."""

    def __init__(self, checkpoint: Checkpoint, windows: Tensor) -> None:
        super().__init__(windows)
        self.checkpoint, self.text = checkpoint, SimpleNamespace(names=())


def imatrix(checkpoint: Checkpoint, windows: Tensor) -> tuple[Imatrix, Coverage]:
    """The importance matrix of windows [n, length], as `xent-quant calibrate` makes it."""
    with tempfile.TemporaryDirectory() as folder:
        session = cast(Session, _Given(checkpoint, windows))
        return collect(session, Path(folder) / "imatrix.gguf", force=False, restart=False, progress=Silent())
