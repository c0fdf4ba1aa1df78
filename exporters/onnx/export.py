"""Writes a planned ONNX folder: model.onnx.data row by row at its offsets, in any order, and what lies beside it.

Holds, of a gate or up projection, the rows between which its own go.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from exporters.budgets import TEXT_BYTES
from exporters.card import calibrated
from exporters.interface import Exported, PlanSummary, TensorRow
from exporters.onnx import card, config
from exporters.onnx.graph import DATA_FILE, build
from exporters.onnx.plan import FLOATS, ONNXPlan, ONNXSlot, Part
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.rope import frequencies
from xent_quant.formats.base import U8
from xent_quant.formats.int_group import IntGroup
from xent_quant.methods.interface import Method
from xent_quant.storage import Move, PositionalFile, Target, replace_bytes, sync

FOLDER = "onnx"
POSITIONS = 16384
"""Rows of the rotary tables that are computed at a time."""


class ONNXExporter:
    """`output/onnx`: model.onnx and its data, genai_config.json, tokenizer and configuration files, card, run_onnx.py.

    Raises CheckpointError where the checkpoint has no tokenizer or its configuration files are damaged.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ONNXPlan,
        output: Path,
        name: str,
        method: Method,
        within: Callable[[int], ONNXPlan] | None = None,
    ) -> None:
        """`within` makes another plan, for a budget, when told how many bytes the files have besides the data file."""
        self.method, self.target = method, output / FOLDER
        self._lay_out(checkpoint, plan, name)
        if within:
            self._lay_out(checkpoint, within(self._beside_data + TEXT_BYTES), name)

    def _lay_out(self, checkpoint: Checkpoint, plan: ONNXPlan, name: str) -> None:
        self.plan, self.files = plan, config.files(checkpoint, plan) | card.files(checkpoint.path, plan, name)
        self._beside_data: int = build(plan).ByteSize() + sum(map(len, self.files.values()))

    @property
    def summary(self) -> PlanSummary:
        plan = self.plan
        rows = tuple(TensorRow(t.name, t.shape, t.type, t.nbytes) for t in plan.weights.values() if t.pieces)
        return PlanSummary("onnx", rows, plan.vram_bytes(plan.context), plan.notes, plan.expected, plan.context)

    @property
    def targets(self) -> tuple[Target, ...]:
        return (Target(self.target, folder=True),)

    @property
    def slots(self) -> dict[str, list[ONNXSlot]]:
        return self.plan.slots()

    @property
    def identity(self) -> dict[str, Any]:
        """See `Exporter.identity`."""
        return {
            "settings": asdict(self.plan.settings),
            "types": {weight.name: weight.type for weight in self.plan.weights.values()},
            "expert width": self.plan.expert_width,
            "files": sorted(self.files),
        }

    @property
    def nbytes(self) -> int:
        return self.plan.data_bytes + self._beside_data

    def check(self, force: bool) -> None:
        """See `Exporter.check`."""

    def open(self, folder: Path, provenance: Mapping[str, str | int], *, fresh: bool) -> "ONNXWriter":
        """See `Exporter.open`."""
        staged = folder / FOLDER
        if fresh:
            staged.mkdir()
            data = PositionalFile.create(staged / DATA_FILE)
            data.truncate(self.plan.data_bytes)
        else:
            data = PositionalFile.open(staged / DATA_FILE)
        writer = ONNXWriter(self, staged, data, provenance)
        if fresh:
            writer.write_tables()
        return writer


class ONNXWriter:
    """See `Writer`."""

    def __init__(self, exporter: ONNXExporter, staged: Path, data: PositionalFile, provenance: Mapping[str, str | int]) -> None:
        self._exporter, self._staged, self._data, self._provenance = exporter, staged, data, provenance
        self._interleaving = threading.Lock()  # held from reading what lies between rows to writing it back

    def put(self, slot: ONNXSlot, start: int, packed: U8) -> None:
        """See `Writer.put`."""
        kind, piece = slot.weight.kind, slot.piece
        planes = [plane for plane in kind.split(packed) if plane is not None] if isinstance(kind, IntGroup) else [packed]
        for part, rows in zip(slot.weight.parts, planes, strict=True):
            self._write(part, piece.first + piece.stride * start, piece.stride, rows)

    def _write(self, part: Part, first: int, stride: int, rows: U8) -> None:
        """Rows [n, row_bytes] to the part's rows first, first + stride, …"""
        offset = part.offset + first * part.row_bytes
        if stride == 1:
            self._data.write_at(rows, offset)
            return
        span = (stride * (len(rows) - 1) + 1) * part.row_bytes
        with self._interleaving:
            between = self._data.read_at(span, offset).reshape(-1, part.row_bytes)
            between[::stride] = rows
            self._data.write_at(between, offset)

    def write_tables(self) -> None:
        """cos and sin of every position times the frequencies of the architecture's rotary embedding, computed in float64."""
        plan = self._exporter.plan
        model, kind = plan.architecture, formats.get(FLOATS[plan.settings.onnx_dtype])
        found, factor = frequencies(model.rope_theta, model.rope_scaling, model.head_dim, model.max_position_embeddings)
        for start in range(0, model.max_position_embeddings, POSITIONS):
            positions = np.arange(start, min(start + POSITIONS, model.max_position_embeddings))
            angles = positions[:, None] * found
            for part, values in zip(plan.tables, (np.cos(angles), np.sin(angles)), strict=True):
                rows = kind.quantize((values * factor).astype(np.float32), name=f"rope_scaling, {part.name}")
                self._data.write_at(rows, part.offset + start * part.row_bytes)

    def sync(self) -> None:
        """See `Writer.sync`."""
        self._data.sync()
        sync(self._staged)

    def finish(self, notes: Sequence[str]) -> Exported:
        """See `Writer.finish`."""
        exporter = self._exporter
        files = {"model.onnx": build(exporter.plan).SerializeToString(deterministic=True), **exporter.files}
        files["README.md"] += "\n".join(["", *calibrated(self._provenance)]).encode()
        for name, content in files.items():
            replace_bytes(self._staged / name, content)
        names = ("model.onnx", DATA_FILE, *exporter.files)
        return Exported(
            (Move(self._staged, exporter.target),), tuple(exporter.target / name for name in names), notes=tuple(notes)
        )

    def close(self) -> None:
        """See `Writer.close`."""
        self._data.close()
