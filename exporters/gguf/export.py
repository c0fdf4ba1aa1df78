"""Writes a planned GGUF: header first, then every tensor's rows at their offsets as the checkpoint streams by.

Holds the slice that it is given and its packed bytes. Files are written under a temporary name beside the target, synced,
and renamed at success only.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from exporters.atomic import staged, write_at, writing
from exporters.base_model import BaseModel
from exporters.gguf import card, metadata, tokenizer, tokenizer_check
from exporters.gguf.plan import GGUFPlan, PlannedTensor
from exporters.interface import CONTEXT, Exported, PlanSummary, TensorRow, unmeasured_notes
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint, check_free_space
from xent_quant.errors import ExportError
from xent_quant.formats.base import F32, U8
from xent_quant.methods.interface import Method
from xent_quant.recipes import Role
from xent_quant.tensors import InputStatistics

ALIGNMENT = int(gguf.GGUF_DEFAULT_ALIGNMENT)
MAX_SHARDS = 65535  # split.count is a u16

STATISTICS_FREE = {Role.NORM, Role.ROUTER, Role.EMBEDDING, Role.HEAD}
"""Roles for which llama-imatrix collects nothing, or that are not quantised."""


def shards(tensors: Sequence[PlannedTensor], split_size: int | None, header_bytes: int = 0) -> list[list[PlannedTensor]]:
    """Tensors in file order, cut so that no file exceeds `split_size` bytes unless one tensor alone does.

    `header_bytes` bounds what precedes the first file's data.
    """
    result: list[list[PlannedTensor]] = [[]]
    size = header_bytes
    for tensor in tensors:
        nbytes = _aligned(tensor.nbytes) + _info_bytes(tensor)
        if split_size and result[-1] and size + nbytes > split_size:
            result.append([])
            size = 1024  # the split keys
        result[-1].append(tensor)
        size += nbytes
    if len(result) > MAX_SHARDS:
        raise ExportError(f"--split-size {split_size}: makes {len(result)} files, GGUF allows {MAX_SHARDS}; choose a larger size")
    return result


class GGUFExporter:
    """`output/name-TYPE.gguf` (or its shards of at most `split_size` bytes), a Modelfile and a model card.

    Raises ExportError for an impossible name, and what reading the tokenizer raises.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: GGUFPlan,
        output: Path,
        name: str,
        method: Method,
        *,
        split_size: int | None = None,
        force: bool = False,
        allow_tokenizer_mismatch: bool = False,
    ) -> None:
        if not name or name.startswith(".") or any(char in name for char in "/\\\0"):
            raise ExportError(f"--name {name!r}: not a file name; give one without slashes")
        self.checkpoint, self.plan, self.output, self.name, self.method = checkpoint, plan, output, name, method
        self.force = force
        strict = not allow_tokenizer_mismatch
        self.tokenizer = tokenizer.load(checkpoint.path, checkpoint.architecture, strict=strict)
        self.tokenizer_notes = tokenizer_check.verify(checkpoint.path, self.tokenizer, strict=strict)
        self.base = BaseModel.of(checkpoint.path)
        self.header_bytes = 65536 + self.tokenizer.nbytes
        self.parts = shards(plan.tensors, split_size, self.header_bytes)
        self.stem = f"{name}-{plan.recipe.name}"
        count = len(self.parts)
        self.targets = [
            output / (f"{self.stem}.gguf" if count == 1 else f"{self.stem}-{index:05d}-of-{count:05d}.gguf")
            for index in range(1, count + 1)
        ]
        self.extras = {
            output / "README.md": card.readme(self.base, plan, self.targets, name),
            output / "Modelfile": card.modelfile(self.targets, self.stem),
        }

    @property
    def summary(self) -> PlanSummary:
        rows = tuple(TensorRow(t.name, t.shape, t.type, t.nbytes) for t in self.plan.tensors)
        return PlanSummary("gguf", rows, self.plan.vram_bytes(CONTEXT), self.plan.notes)

    @contextmanager
    def open(self, provenance: Mapping[str, str | int]) -> Iterator["GGUFSink"]:
        """See `Exporter.open`. Raises ExportError where the output exists without `force`, cannot be written or does not
        fit; after any error none of these files is left, unless it was there before."""
        if provenance:
            provenance = {"quantize.imatrix.file": f"xent-quant --method {self.method.name}", **provenance}
        targets = [*self.targets, *self.extras]
        with writing(targets, force=self.force):
            infos = sum(_info_bytes(tensor) for tensor in self.plan.tensors)
            check_free_space(self.output, self.plan.nbytes + self.header_bytes + infos)
            with staged(targets) as temporary, ExitStack() as files:
                places: dict[str, list[_Place]] = {}
                for index, (path, part) in enumerate(zip(temporary[: len(self.parts)], self.parts, strict=True)):
                    self._write_header(path, part, index, provenance)
                    stream = files.enter_context(path.open("r+b"))
                    offset = stream.seek(0, os.SEEK_END)  # aligned by _write_header
                    for tensor in part:
                        for expert, source in enumerate(tensor.sources):
                            own = offset + expert * (tensor.nbytes // len(tensor.sources))
                            places.setdefault(source, []).append(_Place(tensor, stream.fileno(), own))
                        offset += _aligned(tensor.nbytes)
                    stream.truncate(offset)
                for path, text in zip(temporary[len(self.parts) :], self.extras.values(), strict=True):
                    path.write_text(text, "utf-8")
                sink = GGUFSink(self, places)
                yield sink
                if not sink.finished:
                    raise AssertionError("an export was left without finish()")

    def _write_header(
        self, path: Path, tensors: Sequence[PlannedTensor], index: int, provenance: Mapping[str, str | int]
    ) -> None:
        """Everything up to the tensor data, through gguf-py."""
        writer = gguf.GGUFWriter(path, self.plan.arch)
        if index == 0:
            metadata.write(writer, self.plan, self.name, self.base)
            tokenizer.write(writer, self.tokenizer, self.checkpoint.architecture)
            for key, value in provenance.items():
                writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
        else:
            writer.kv_data[0].clear()  # general.architecture: all metadata is in the first shard
        if len(self.parts) > 1:
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", len(self.parts))
            writer.add_int32("split.tensors.count", len(self.plan.tensors))
        for tensor in tensors:
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


@dataclass(frozen=True)
class _Place:
    """Where one source's rows go: an open file, and the offset of its first row."""

    tensor: PlannedTensor
    file: int
    offset: int


class GGUFSink:
    """See `Sink`. Rows of q and k change places on the way; padding rows and columns are zeros, of importance 0."""

    def __init__(self, exporter: GGUFExporter, places: Mapping[str, Sequence[_Place]]) -> None:
        self._exporter = exporter
        self._places = places
        self._written = 0
        self._measured: dict[str, bool] = {}
        self.finished = False

    def put(self, name: str, start: int, weights: F32, statistics: InputStatistics | None) -> Callable[[], F32]:
        """See `Sink.put`."""
        for place in self._places[name]:
            tensor, kind = place.tensor, formats.get(place.tensor.type)
            last = start + len(weights) == tensor.source_rows
            missing = (tensor.rows - tensor.source_rows if last else 0, tensor.columns - tensor.source_columns)
            padded = np.pad(weights, ((0, missing[0]), (0, missing[1]))) if any(missing) else weights
            known = statistics and statistics.padded(tensor.columns)
            packed = self._exporter.method.quantize(padded, kind, known, name=name)
            self._write(place, start, packed)
            if tensor.role not in STATISTICS_FREE:
                self._measured[tensor.name] = known is not None and self._measured.get(tensor.name, True)
        return lambda: kind.dequantize(packed)[: len(weights), : weights.shape[1]]

    def _write(self, place: _Place, start: int, packed: U8) -> None:
        """Packed rows [rows, row_bytes] to their places."""
        if place.tensor.heads:
            rows = rotary_rows(np.arange(start, start + len(packed)), place.tensor.source_rows // place.tensor.heads)
            for row, data in zip(rows, packed, strict=True):
                write_at(place.file, data, place.offset + int(row) * packed.shape[1])
        else:
            write_at(place.file, packed, place.offset + start * packed.shape[1])
        self._written += packed.nbytes

    def finish(self) -> Exported:
        """See `Sink.finish`."""
        exporter = self._exporter
        if self._written != exporter.plan.nbytes:
            raise AssertionError(f"{self._written} bytes written, {exporter.plan.nbytes} planned")
        self.finished = True
        return Exported((*exporter.targets, *exporter.extras), (*exporter.tokenizer_notes, *unmeasured_notes(self._measured)))


def rotary_rows(rows: NDArray[np.int64], head_dim: int) -> NDArray[np.int64]:
    """Where rows of q or k go: from rotate_half order to the interleaved one that llama.cpp rotates."""
    head, within = np.divmod(rows, head_dim)
    part, index = np.divmod(within, head_dim // 2)
    moved: NDArray[np.int64] = head * head_dim + 2 * index + part
    return moved


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _info_bytes(tensor: PlannedTensor) -> int:
    """Bound on the header's entry: name, number of dimensions, dimensions, type, offset."""
    return len(tensor.name) + 8 + 4 + 8 * len(tensor.shape) + 4 + 8
