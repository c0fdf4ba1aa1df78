"""Writes a folder that transformers loads as it is: quantised by bitsandbytes weight by weight, or plain bfloat16.

No model is built.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.bitsandbytes import folder
from exporters.bitsandbytes.kinds import Whole, bitsandbytes_functional
from exporters.bitsandbytes.plan import BnbPlan, PlannedTensor, shards
from exporters.bitsandbytes.shard import Shard, header_bytes
from exporters.budgets import TEXT_BYTES
from exporters.card import calibrated
from exporters.hub_files import json_bytes
from exporters.interface import Exported, PlanSummary, TensorRow
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import U8
from xent_quant.methods.interface import Method
from xent_quant.storage import Move, Target, replace_bytes, sync

FOLDER = "bnb"
INDEX_BYTES = 48
"""Of each entry of the index, besides the tensor's name."""


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
        method: Method | None = None,
        *,
        split_size: int | None = None,
        within: Callable[[int], BnbPlan] | None = None,
    ) -> None:
        """`within` makes another plan, for a budget, when told how many bytes the files have besides weights."""
        if plan.bits < 16:
            bitsandbytes_functional()
        self.target, self.method = output / FOLDER, method
        self._lay_out(checkpoint, plan, name, split_size)
        if within:
            header = self._beside_weights() + TEXT_BYTES
            self._lay_out(checkpoint, within(header), name, split_size)
            if len(self.parts) > 1 and (more := self._beside_weights() + TEXT_BYTES) > header:  # it took more files
                self._lay_out(checkpoint, within(more), name, split_size)
        count = len(self.parts)
        self.shards = [
            "model.safetensors" if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors"
            for index in range(1, count + 1)
        ]

    def _lay_out(self, checkpoint: Checkpoint, plan: BnbPlan, name: str, split_size: int | None) -> None:
        self.plan, self.files = plan, folder.files(checkpoint, plan, name)
        self.parts = shards(plan.tensors, split_size)

    @property
    def summary(self) -> PlanSummary:
        plan = self.plan
        rows = tuple(TensorRow(t.name, t.shape, t.type, t.nbytes) for t in plan.tensors)
        return PlanSummary("bnb", rows, plan.vram_bytes(plan.context), plan.notes, plan.expected, plan.context)

    @property
    def targets(self) -> tuple[Target, ...]:
        return (Target(self.target, folder=True),)

    @property
    def slots(self) -> dict[str, list[PlannedTensor]]:
        return self.plan.slots()

    @property
    def identity(self) -> dict[str, Any]:
        """See `Exporter.identity`."""
        return {
            "type": self.plan.type,
            "modules in bfloat16": self.plan.whole,
            "expert width": self.plan.width,
            "files": sorted(self.files),
            "tensors of each file (--split-size)": [len(part) for part in self.parts],
        }

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes + self._beside_weights()

    def _beside_weights(self) -> int:
        """Bytes of headers, of the index, and of what is known before any weight is."""
        headers = [header_bytes([part for tensor in tensors for part in tensor.parts]) for tensors in self.parts]
        names = sum(len(part.name) + INDEX_BYTES for tensor in self.plan.tensors for part in tensor.parts)
        return sum(headers) + (len(headers) > 1) * names + sum(map(len, self.files.values()))

    def check(self, force: bool) -> None:
        """See `Exporter.check`."""

    def open(self, work: Path, provenance: Mapping[str, str | int], *, fresh: bool) -> "BnbWriter":
        """See `Exporter.open`."""
        if fresh:
            (work / FOLDER).mkdir()
        return BnbWriter(self, work, provenance, fresh=fresh)


class BnbWriter:
    """See `Writer`."""

    def __init__(self, exporter: BnbExporter, work: Path, provenance: Mapping[str, str | int], *, fresh: bool) -> None:
        self._exporter, self._staged, self._provenance = exporter, work / FOLDER, provenance
        self._shards: dict[str, Shard] = {}
        self._of: dict[str, Shard] = {}
        for file, tensors in zip(exporter.shards, exporter.parts, strict=True):
            parts = [part for tensor in tensors for part in tensor.parts]
            self._shards[file] = Shard(self._staged / file, work / f"{file}.bounded", parts, fresh=fresh)
            self._of |= {tensor.name: self._shards[file] for tensor in tensors}

    def put(self, slot: PlannedTensor, start: int, packed: U8) -> None:
        """See `Writer.put`."""
        shard, parts = self._of[slot.name], slot.parts
        if isinstance(slot.encoding, Whole):
            for part, data in zip(parts, slot.encoding.split(packed, parts), strict=True):
                shard.write(part, data)
        else:
            shard.write(parts[0], packed, start * packed.shape[1])

    def sync(self) -> None:
        """See `Writer.sync`."""
        for shard in self._shards.values():
            shard.sync()
        sync(self._staged)

    def finish(self, notes: Sequence[str]) -> Exported:
        """See `Writer.finish`."""
        exporter = self._exporter
        weight_map = {name: file for file, shard in self._shards.items() for name in shard.finish()}
        files = dict(exporter.files)
        if exporter.method:
            said = ["", "Scales are bitsandbytes' own; codes were chosen within them by GPTQ.", "", *calibrated(self._provenance)]
            files["README.md"] += "\n".join(said).encode()
        if len(self._shards) > 1:
            total = sum(shard.nbytes for shard in self._shards.values())
            files[folder.INDEX] = json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, content in files.items():
            replace_bytes(self._staged / name, content)
        names = ("config.json", *exporter.shards, *(name for name in files if name != "config.json"))
        return Exported(
            (Move(self._staged, exporter.target),), tuple(exporter.target / name for name in names), notes=tuple(notes)
        )

    def close(self) -> None:
        """See `Writer.close`."""
        for shard in self._shards.values():
            shard.close()
