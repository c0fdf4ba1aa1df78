"""Writes a folder that transformers loads as it is: quantised by bitsandbytes weight by weight, or plain bfloat16.

Holds one weight, and what bitsandbytes takes to quantise it; no model is built. The folder appears under its name when it
is complete.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from exporters.bitsandbytes import folder
from exporters.bitsandbytes.kinds import bitsandbytes_functional
from exporters.bitsandbytes.plan import BnbPlan, PlannedTensor, shards
from exporters.bitsandbytes.shard import Shard
from exporters.folder import exported_folder
from exporters.hub_files import json_bytes
from exporters.interface import CONTEXT, Exported, PlanSummary, TensorRow
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32
from xent_quant.tensors import InputStatistics

FOLDER = "bnb"


class BnbExporter:
    """`output/bnb`: shards of safetensors, config.json, the modelling files, tokenizer, card.

    Raises CheckpointError where the tokenizer is missing or damaged, ConfigError where bitsandbytes is not installed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: BnbPlan,
        output: Path,
        name: str,
        *,
        split_size: int | None = None,
        force: bool = False,
    ) -> None:
        if plan.bits < 16:
            bitsandbytes_functional()
        self.plan, self.target, self.force = plan, output / FOLDER, force
        self.files = folder.files(checkpoint, plan, name)
        self.parts = shards(plan.tensors, split_size)
        count = len(self.parts)
        self.shards = [
            "model.safetensors" if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors"
            for index in range(1, count + 1)
        ]

    @property
    def summary(self) -> PlanSummary:
        rows = tuple(TensorRow(t.name, t.shape, t.type, t.nbytes) for t in self.plan.tensors)
        return PlanSummary("bnb", rows, self.plan.vram_bytes(CONTEXT), self.plan.notes)

    @contextmanager
    def open(self, provenance: Mapping[str, str | int]) -> Iterator["BnbSink"]:
        """See `Exporter.open` and `exported_folder`."""
        with exported_folder(self.target, self.files, self.plan.nbytes, force=self.force) as temporary:
            sink = BnbSink(self, temporary)
            try:
                yield sink
            finally:
                sink.close()
            if not sink.finished:
                raise AssertionError("an export was left without finish()")


class BnbSink:
    """See `Sink`."""

    def __init__(self, exporter: BnbExporter, temporary: Path) -> None:
        self._exporter, self._folder = exporter, temporary
        self._shards: dict[str, Shard] = {}
        self._places: dict[str, tuple[PlannedTensor, Shard]] = {}
        for file, tensors in zip(exporter.shards, exporter.parts, strict=True):
            self._shards[file] = Shard(temporary / file, [part for tensor in tensors for part in tensor.parts])
            self._places |= {tensor.name: (tensor, self._shards[file]) for tensor in tensors}
        self._source_shapes = exporter.plan.architecture.tensors()
        self._slices: list[F32] = []
        self._missing = sum(shape[0] if len(shape) > 1 else 1 for shape in self._source_shapes.values())
        self.finished = False

    def put(self, name: str, start: int, weights: F32, statistics: InputStatistics | None) -> Callable[[], F32]:
        """See `Sink.put`. bitsandbytes' levels are fixed and its scales are maxima: statistics have no say."""
        tensor, shard = self._places[name]
        if tensor.kind.by_rows:
            # Rows are not padded where a kind is written by rows: only quantised weights are.
            (part,) = tensor.parts
            row_bytes = part.nbytes // (part.shape[0] if len(part.shape) > 1 else 1)
            (data,) = tensor.kind.encode(name, weights)
            shard.write(part, data, start * row_bytes)
        else:
            whole = self._whole(name, start, weights)
            if whole is not None:
                missing = [(0, wanted - given) for wanted, given in zip(tensor.shape, whole.shape, strict=True)]
                padded = np.pad(whole, missing) if any(after for _, after in missing) else whole
                for part, data in zip(tensor.parts, tensor.kind.encode(name, padded), strict=True):
                    shard.write(part, data)
        self._missing -= len(weights)
        return lambda: weights  # no calibration goes on with them

    def _whole(self, name: str, start: int, weights: F32) -> F32 | None:
        """The tensor once its last slice is there, else None; slices before it are held."""
        rows = self._source_shapes[name][0]
        if len(weights) == rows:
            return weights
        self._slices.append(weights.copy())
        if start + len(weights) < rows:
            return None
        whole = np.concatenate(self._slices)
        self._slices.clear()
        return whole

    def finish(self) -> Exported:
        """See `Sink.finish`."""
        if self._missing:
            raise AssertionError(f"{self._missing} rows were not put")
        exporter = self._exporter
        weight_map = {name: file for file, shard in self._shards.items() for name in shard.finish()}
        names = [*exporter.shards, *exporter.files]
        if len(self._shards) > 1:
            total = sum(shard.nbytes for shard in self._shards.values())
            index = json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
            (self._folder / folder.INDEX).write_bytes(index)
            names.append(folder.INDEX)
        self.finished = True
        return Exported(tuple(exporter.target / name for name in ("config.json", *(n for n in names if n != "config.json"))), ())

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
