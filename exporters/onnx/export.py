"""Writes a planned ONNX folder: model.onnx.data row by row at its offsets as the checkpoint streams by, then the rest.

Holds the slice that it is given, its packed bytes and, of a gate or up projection, the rows between which its own go.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from exporters.atomic import write_at
from exporters.folder import exported_folder
from exporters.interface import CONTEXT, Exported, PlanSummary, TensorRow, unmeasured_notes
from exporters.onnx import card, config
from exporters.onnx.graph import DATA_FILE, build
from exporters.onnx.plan import FLOATS, ONNXPlan, Part, Piece, Weight
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32, U8
from xent_quant.formats.int_group import IntGroup
from xent_quant.methods.interface import Method
from xent_quant.tensors import InputStatistics

FOLDER = "onnx"


class ONNXExporter:
    """`output/onnx`: model.onnx and its data, genai_config.json, tokenizer and configuration files, card, run_onnx.py.

    Raises CheckpointError where the checkpoint has no tokenizer or its configuration files are damaged.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: ONNXPlan, output: Path, name: str, method: Method, *, force: bool = False
    ) -> None:
        self.checkpoint, self.plan, self.method, self.force = checkpoint, plan, method, force
        self.target = output / FOLDER
        self.files = config.files(checkpoint, plan)
        self.files |= card.files(checkpoint.path, plan, name)

    @property
    def summary(self) -> PlanSummary:
        rows = tuple(TensorRow(t.name, t.shape, t.type, t.nbytes) for t in self.plan.weights.values() if t.pieces)
        return PlanSummary("onnx", rows, self.plan.vram_bytes(CONTEXT), self.plan.notes)

    @contextmanager
    def open(self, provenance: Mapping[str, str | int]) -> Iterator["ONNXSink"]:
        """See `Exporter.open` and `exported_folder`."""
        with exported_folder(self.target, self.files, self.plan.data_bytes, force=self.force) as folder:
            (folder / "model.onnx").write_bytes(build(self.plan).SerializeToString(deterministic=True))
            with (folder / DATA_FILE).open("w+b") as stream:
                stream.truncate(self.plan.data_bytes)
                sink = ONNXSink(self, stream.fileno())
                yield sink
            if not sink.finished:
                raise AssertionError("an export was left without finish()")


class ONNXSink:
    """See `Sink`."""

    def __init__(self, exporter: ONNXExporter, file: int) -> None:
        self._exporter, self._file = exporter, file
        self._places: dict[str, list[tuple[Weight, Piece]]] = {}
        for weight in exporter.plan.weights.values():
            for piece in weight.pieces:
                self._places.setdefault(piece.source, []).append((weight, piece))
        self._missing = sum(piece.rows for places in self._places.values() for _, piece in places)
        self._measured: dict[str, bool] = {}
        self.finished = False
        self._write_tables()

    def put(self, name: str, start: int, weights: F32, statistics: InputStatistics | None) -> Callable[[], F32]:
        """See `Sink.put`."""
        for weight, piece in self._places[name]:
            missing = weight.columns - piece.columns
            padded = np.pad(weights, ((0, 0), (0, missing))) if missing else weights
            if isinstance(weight.kind, IntGroup):
                known = statistics and statistics.padded(weight.columns)
                packed = self._exporter.method.quantize(padded, weight.kind, known, name=name)
                planes = [plane for plane in weight.kind.split(packed) if plane is not None]
                if ".layers." in name:
                    self._measured[name] = known is not None
            else:
                packed = weight.kind.quantize(padded, name=name)
                planes = [packed]
            for part, rows in zip(weight.parts, planes, strict=True):
                self._write(part, piece.first + piece.stride * start, piece.stride, rows)
            self._missing -= len(weights)
        return lambda: weight.kind.dequantize(packed)[:, : weights.shape[1]]

    def _write(self, part: Part, first: int, stride: int, rows: U8) -> None:
        """Rows [n, row_bytes] to the part's rows first, first + stride, …"""
        offset = part.offset + first * part.row_bytes
        if stride > 1:
            span = (stride * (len(rows) - 1) + 1) * part.row_bytes
            between = np.frombuffer(os.pread(self._file, span, offset), np.uint8).reshape(-1, part.row_bytes).copy()
            between[::stride] = rows
            rows = between
        write_at(self._file, rows, offset)

    def _write_tables(self) -> None:
        """cos and sin of position · theta^(−2i / head_dim), computed in float64."""
        plan = self._exporter.plan
        model, kind = plan.architecture, formats.get(FLOATS[plan.settings.onnx_dtype])
        frequencies = model.rope_theta ** (-np.arange(0, model.head_dim, 2) / model.head_dim)
        angles = np.arange(model.max_position_embeddings)[:, None] * frequencies
        for part, values in zip(plan.tables, (np.cos(angles), np.sin(angles)), strict=True):
            write_at(self._file, kind.quantize(values.astype(np.float32), name=part.name), part.offset)

    def finish(self) -> Exported:
        """See `Sink.finish`."""
        if self._missing:
            raise AssertionError(f"{self._missing} rows were not written")
        self.finished = True
        exporter = self._exporter
        names = ("model.onnx", DATA_FILE, *exporter.files)
        return Exported(tuple(exporter.target / name for name in names), unmeasured_notes(self._measured))
