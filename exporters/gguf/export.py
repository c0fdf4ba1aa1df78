"""Writes a planned GGUF: header first, then every tensor's rows at their offsets, in any order. Holds nothing."""

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from exporters.base_model import BaseModel
from exporters.gguf import card, metadata, tokenizer, tokenizer_check
from exporters.gguf.plan import ALIGNMENT, GGUFPlan, GGUFSlot, PlannedTensor
from exporters.gguf.plan import plan as plan_tensors
from exporters.hub_files import generation_config
from exporters.interface import Exported, PlanSummary, TensorRow
from xent_quant import formats
from xent_quant.checkpoint.chat_template import chat_template
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ExportError
from xent_quant.formats.base import U8
from xent_quant.methods.interface import Method
from xent_quant.plain import file_name, plain
from xent_quant.recipes import recipe
from xent_quant.storage import Move, PositionalFile, Shared, Target, replace_bytes

MAX_SHARDS = 65535  # split.count is a u16
SPLIT_BYTES = 1024
"""Bound on what a shard's header has besides its tensors' entries."""
PROVENANCE_BYTES = 4096
"""Room for what the file says of the statistics that it was made with."""


def shards(tensors: Sequence[PlannedTensor], split_size: int | None, header_bytes: int = 0) -> list[list[PlannedTensor]]:
    """Tensors in file order, cut so that no file exceeds `split_size` bytes unless one tensor alone does.

    `header_bytes` bounds what precedes the first file's data.
    """
    result: list[list[PlannedTensor]] = [[]]
    size = header_bytes
    for tensor in tensors:
        nbytes = tensor.aligned_bytes + _info_bytes(tensor)
        if split_size and result[-1] and size + nbytes > split_size:
            result.append([])
            size = SPLIT_BYTES
        result[-1].append(tensor)
        size += nbytes
    if len(result) > MAX_SHARDS:
        raise ExportError(f"--split-size {split_size}: makes {len(result)} files, GGUF allows {MAX_SHARDS}; choose a larger size")
    return result


class GGUFExporter:
    """`output/name-TYPE.gguf`, or `output/stem.gguf` where a stem is given (or its shards of at most `split_size` bytes), its
    Modelfile, and a section of the folder's README.md.

    `plan` may be what makes one when told how many bytes the file has besides tensor data. Raises what reading the tokenizer and
    planning raise.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: GGUFPlan | Callable[[int], GGUFPlan],
        output: Path,
        name: str,
        method: Method,
        *,
        stem: str | None = None,
        split_size: int | None = None,
        allow_tokenizer_mismatch: bool = False,
    ) -> None:
        self.checkpoint, self.output, self.name, self.method = checkpoint, output, name, method
        strict = not allow_tokenizer_mismatch
        self.tokenizer = tokenizer.load(checkpoint.path, checkpoint.architecture, strict=strict)
        self.tokenizer_notes = tokenizer_check.verify(checkpoint.path, self.tokenizer, strict=strict)
        self.base = BaseModel.of(checkpoint.path)
        self.chat = chat_template(checkpoint.path) is not None
        self.header_bytes = 65536 + self.tokenizer.nbytes
        if kept := checkpoint.kept:
            self.header_bytes += 4 * sum(map(len, kept.numbers)) + len(kept.text.encode())
        self.plan = plan if isinstance(plan, GGUFPlan) else plan(self._overhead(split_size))
        plan = self.plan
        self.parts = shards(plan.tensors, split_size, self.header_bytes)
        self.stem = stem or f"{name}-{plan.recipe.name}"
        count = len(self.parts)
        on_disk = file_name(self.stem)
        self.files = [
            output / (f"{on_disk}.gguf" if count == 1 else f"{on_disk}-{index:05d}-of-{count:05d}.gguf")
            for index in range(1, count + 1)
        ]
        self.modelfile = output / f"{on_disk}.Modelfile"

    def _overhead(self, split_size: int | None) -> int:
        """Bytes of the files besides tensor data, at most and nearly: a header of these tensors is made, whose length does not
        depend on their types."""
        any_types = plan_tensors(self.checkpoint.architecture, recipe(type="F32"), pad="never")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header"
            self._write_header(path, any_types, [any_types.tensors], 0, {})
            header = path.stat().st_size
        shards = -(-any_types.nbytes // split_size) if split_size else 1
        return header + PROVENANCE_BYTES + (shards - 1) * (SPLIT_BYTES + ALIGNMENT)

    @property
    def summary(self) -> PlanSummary:
        rows = tuple(TensorRow(t.name, t.shape, t.type, t.nbytes) for t in self.plan.tensors)
        plan = self.plan
        for_machine = plan.expected is not None and plan.expected.at_work is not None
        command = card.server(plan, shlex.quote(plain(self.files[0].name))) if for_machine else ""
        return PlanSummary("gguf", rows, plan.vram_bytes(), plan.notes, plan.expected, plan.context, command)

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(Target(path, folder=False) for path in (*self.files, self.modelfile))

    @property
    def slots(self) -> dict[str, list[GGUFSlot]]:
        return self.plan.slots()

    @property
    def identity(self) -> dict[str, Any]:
        """See `Exporter.identity`."""
        return {
            "files": [path.name for path in self.files],
            "tensors of each file (--split-size)": [len(part) for part in self.parts],
            "types": {tensor.name: tensor.type for tensor in self.plan.tensors},
            "expert width": self.plan.expert_width,
            "base model": asdict(self.base),
        }

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes + self.header_bytes + sum(_info_bytes(tensor) for tensor in self.plan.tensors)

    def check(self, force: bool) -> None:
        """See `Exporter.check`."""
        card.check_readme(self.output / "README.md", force)

    def open(self, folder: Path, provenance: Mapping[str, str | int], *, fresh: bool) -> "GGUFWriter":
        """See `Exporter.open`."""
        if provenance:
            provenance = {"quantize.imatrix.file": f"xent-quant --method {self.method.name}", **provenance}
        if self.plan.expected:  # names of many texts must not take the file beyond what it was planned for
            provenance = {key: _cut(value) if isinstance(value, str) else value for key, value in provenance.items()}
        files: list[PositionalFile] = []
        offsets: dict[str, tuple[PositionalFile, int]] = {}
        for index, (target, part) in enumerate(zip(self.files, self.parts, strict=True)):
            path = folder / target.name
            if fresh:
                self._write_header(path, self.plan, self.parts, index, provenance)
            files.append(PositionalFile.open(path))
            end = files[-1].size
            sizes = [tensor.aligned_bytes for tensor in part]
            offset = end if fresh else end - sum(sizes)  # the header ends aligned
            for tensor, size in zip(part, sizes, strict=True):
                offsets[tensor.name] = files[-1], offset
                offset += size
            if fresh:
                files[-1].truncate(offset)
        return GGUFWriter(self, folder, files, offsets, provenance)

    def _write_header(
        self,
        path: Path,
        plan: GGUFPlan,
        parts: Sequence[Sequence[PlannedTensor]],
        index: int,
        provenance: Mapping[str, str | int],
    ) -> None:
        """Everything of one of a plan's parts up to the tensor data, through gguf-py."""
        writer = gguf.GGUFWriter(path, plan.arch)
        if index == 0:
            metadata.write(writer, plan, self.name, self.base, self.checkpoint.kept)
            tokenizer.write(writer, self.tokenizer, self.checkpoint.architecture)
            for key, value in provenance.items():
                writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
        else:
            writer.kv_data[0].clear()  # general.architecture: all metadata is in the first shard
        if len(parts) > 1:
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", len(parts))
            writer.add_int32("split.tensors.count", len(plan.tensors))
        for tensor in parts[index]:
            kind = formats.get(tensor.type)
            # Said to be bytes whatever the type: gguf-py then derives the shape from `raw_dtype`, BF16's too.
            shape = (*tensor.shape[:-1], kind.row_bytes(tensor.columns))
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=gguf.GGMLQuantizationType(kind.ggml_type)
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            stream = writer.fout[0]
            writer.write_padding(stream, stream.tell())
        finally:
            writer.close()


class GGUFWriter:
    """See `Writer`. Rows of q and k change places on the way."""

    def __init__(
        self,
        exporter: GGUFExporter,
        folder: Path,
        files: Sequence[PositionalFile],
        offsets: Mapping[str, tuple[PositionalFile, int]],
        provenance: Mapping[str, str | int],
    ) -> None:
        self._exporter, self._folder, self._files, self._offsets = exporter, folder, files, offsets
        self._provenance = provenance

    def put(self, slot: GGUFSlot, start: int, packed: U8) -> None:
        """See `Writer.put`."""
        tensor, row_bytes = slot.planned, packed.shape[1]
        file, offset = self._offsets[tensor.name]
        offset += slot.matrix * (tensor.nbytes // len(tensor.sources))
        if tensor.heads:
            rows = rotary_rows(np.arange(start, start + len(packed)), tensor.rows // tensor.heads)
            for row, data in zip(rows, packed, strict=True):
                file.write_at(data, offset + int(row) * row_bytes)
        else:
            file.write_at(packed, offset + start * row_bytes)

    def sync(self) -> None:
        """See `Writer.sync`."""
        for file in self._files:
            file.sync()

    def finish(self, notes: Sequence[str]) -> Exported:
        """See `Writer.finish`."""
        exporter = self._exporter
        modelfile = self._folder / exporter.modelfile.name
        known: dict[str, Any] = {"chat": exporter.chat, "sampling": card.sampling(generation_config(exporter.checkpoint))}
        replace_bytes(modelfile, card.modelfile(exporter.plan, exporter.files, exporter.stem, **known).encode())
        moves = [Move(self._folder / path.name, path) for path in exporter.files]
        section = card.section(exporter.plan, exporter.files, exporter.stem, exporter.modelfile.name, self._provenance, **known)
        joined = partial(card.joined, exporter.base, exporter.plan.architecture, exporter.chat, exporter.stem, section)
        readme = Shared(exporter.output / "README.md", joined)
        return Exported(
            (*moves, Move(modelfile, exporter.modelfile)),
            (*exporter.files, readme.target, exporter.modelfile),
            (readme,),
            (*exporter.tokenizer_notes, *notes),
        )

    def close(self) -> None:
        """See `Writer.close`."""
        for file in self._files:
            file.close()


def rotary_rows(rows: NDArray[np.int64], head_dim: int) -> NDArray[np.int64]:
    """Where rows of q or k go: from rotate_half order to the interleaved one that llama.cpp rotates."""
    head, within = np.divmod(rows, head_dim)
    part, index = np.divmod(within, head_dim // 2)
    moved: NDArray[np.int64] = head * head_dim + 2 * index + part
    return moved


def _cut(text: str) -> str:
    """A text of at most a third of PROVENANCE_BYTES."""
    raw = text.encode()
    return text if len(raw) <= PROVENANCE_BYTES // 3 else f"{raw[: PROVENANCE_BYTES // 3 - 4].decode('utf-8', 'ignore')} …"


def _info_bytes(tensor: PlannedTensor) -> int:
    """Bound on the header's entry: name, number of dimensions, dimensions, type, offset."""
    return len(tensor.name) + 8 + 4 + 8 * len(tensor.shape) + 4 + 8
