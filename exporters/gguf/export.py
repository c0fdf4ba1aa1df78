"""Streams a planned GGUF to disk: header first, then every tensor expert by expert, or slice by slice of rows.

Holds one expert, or one slice of at most SLICE weights, with its packed bytes. Files are written under a temporary
name beside the target, synced, and renamed at success only.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from exporters.gguf import card, metadata, tokenizer
from exporters.gguf.plan import GGUFPlan, PlannedTensor
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint, check_free_space
from xent_quant.errors import ExportError
from xent_quant.formats.base import F32, U8, Effort
from xent_quant.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    Importance = Callable[[str, int], F32 | None]

SLICE = 16 * 1024 * 1024
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
HEADER_ROOM = 64 * 1024 * 1024  # metadata and tensor infos, a generous bound for the free-space check


@dataclass(frozen=True)
class Exported:
    """Files written, GGUF first; `notes` for the person."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def shards(tensors: Sequence[PlannedTensor], split_size: int | None) -> list[list[PlannedTensor]]:
    """Tensors in file order, cut so that no shard's data exceeds `split_size` bytes unless one tensor alone does."""
    result: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if split_size and result[-1] and size + nbytes > split_size:
            result.append([])
            size = 0
        result[-1].append(tensor)
        size += nbytes
    return result


def export_gguf(
    checkpoint: Checkpoint,
    plan: GGUFPlan,
    output: Path,
    name: str,
    *,
    importance: "Importance | None",
    imatrix_keys: dict[str, str | int],
    split_size: int | None,
    effort: Effort,
    progress: Progress,
    force: bool,
) -> Exported:
    """Write `output/name-TYPE.gguf` (or its shards), a Modelfile and a model card.

    `importance(tensor, expert)` gives [source_columns] float32 or None. Raises ExportError where the output exists
    without `force`, cannot be written or does not fit, and what reading and quantising raise.
    """
    if not name or any(char in name for char in "/\\\0"):
        raise ExportError(f"--name {name!r}: not a file name")
    spec = tokenizer.load(checkpoint.path, checkpoint.architecture)
    parts = shards(plan.tensors, split_size)
    stem = f"{name}-{plan.recipe.name}"
    targets = [
        output / (f"{stem}.gguf" if len(parts) == 1 else f"{stem}-{index + 1:05d}-of-{len(parts):05d}.gguf")
        for index in range(len(parts))
    ]
    extras = {output / "README.md": card.readme(checkpoint, plan, targets, name), output / "Modelfile": card.modelfile(targets)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        taken = [path for path in (*targets, *extras) if path.exists()]
        if taken and not force:
            raise ExportError(f"{taken[0]}: exists already; add --force to replace it, or choose another --output")
        check_free_space(output, plan.nbytes + HEADER_ROOM)
        progress.start(f"Writing {plan.recipe.name}", sum(tensor.n_weights for tensor in plan.tensors))
        temporary = [path.with_name(f".{path.name}.part") for path in targets]
        licence = card.licence(checkpoint.path)
        try:
            for index, (part, path) in enumerate(zip(parts, temporary, strict=True)):
                writer = gguf.GGUFWriter(path, plan.arch)
                if index == 0:
                    metadata.write(writer, plan, name, licence)
                    tokenizer.write(writer, spec, checkpoint.architecture)
                    for key, value in imatrix_keys.items():
                        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
                else:
                    writer.kv_data[0].clear()
                if len(parts) > 1:
                    writer.add_uint16("split.no", index)
                    writer.add_uint16("split.count", len(parts))
                    writer.add_int32("split.tensors.count", len(plan.tensors))
                _write(writer, part, checkpoint, importance, effort, progress)
            for path, text in extras.items():
                path.with_name(f".{path.name}.part").write_text(text, "utf-8")
            for path in (*targets, *extras):
                os.replace(path.with_name(f".{path.name}.part"), path)
        finally:
            for path in (*targets, *extras):
                path.with_name(f".{path.name}.part").unlink(missing_ok=True)
            progress.finish()
    except OSError as error:
        raise ExportError(f"{error.filename or output}: {error.strerror or error}; nothing was written") from error
    return Exported((*targets, *extras), ())


def _write(
    writer: gguf.GGUFWriter,
    tensors: Sequence[PlannedTensor],
    checkpoint: Checkpoint,
    importance: "Importance | None",
    effort: Effort,
    progress: Progress,
) -> None:
    """Write one file through gguf-py: header, keys and tensor infos by its writer, data appended here in slices."""
    for tensor in tensors:
        kind = formats.get(tensor.type)
        writer.add_tensor_info(
            tensor.name,
            (*tensor.shape[:-1], kind.row_bytes(tensor.columns)) if kind.ggml_type not in (0, 1) else tensor.shape,
            np.dtype(np.uint8) if kind.ggml_type not in (0, 1) else np.dtype(np.float32 if kind.ggml_type == 0 else np.float16),
            tensor.nbytes,
            raw_dtype=gguf.GGMLQuantizationType(kind.ggml_type),
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = writer.fout[0]
        writer.write_padding(stream, stream.tell())
        for tensor in tensors:
            written = 0
            for packed in _packed(tensor, checkpoint, importance, effort):
                stream.write(packed.data)
                written += packed.nbytes
                progress.advance(packed.shape[0] * tensor.columns)
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: {written} bytes written, {tensor.nbytes} planned")
            writer.write_padding(stream, written)
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        writer.close()


def _packed(tensor: PlannedTensor, checkpoint: Checkpoint, importance: "Importance | None", effort: Effort) -> Iterator[U8]:
    """Packed rows [rows, row_bytes] of all experts in order, padding included, in slices of at most SLICE weights."""
    kind = formats.get(tensor.type)
    rows_at_once = max(1, SLICE // tensor.columns)
    for expert, source in enumerate(tensor.sources):
        weights_importance = importance(tensor.name, expert) if importance else None
        if weights_importance is not None and len(weights_importance) < tensor.columns:
            weights_importance = np.pad(weights_importance, (0, tensor.columns - len(weights_importance)))
        permuted = permute(checkpoint.read(source), tensor.heads) if tensor.heads else None
        for start in range(0, tensor.rows, rows_at_once):
            stop = min(start + rows_at_once, tensor.rows)
            if permuted is not None:
                weights = permuted[start:stop]
            elif len(tensor.shape) == 1:
                weights = checkpoint.read(source)[None]
            else:
                weights = checkpoint.read(source, min(start, tensor.source_rows), min(stop, tensor.source_rows))
            missing = (stop - start - weights.shape[0], tensor.columns - weights.shape[1])
            if any(missing):
                weights = np.pad(weights, ((0, missing[0]), (0, missing[1])))
            yield kind.quantize(weights, weights_importance, effort=effort, name=source)


def permute(weights: F32, heads: int) -> F32:
    """Rows of q or k from rotate_half order to the interleaved one that llama.cpp rotates: [heads·head_dim, in]."""
    rows, columns = weights.shape
    return np.ascontiguousarray(weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(rows, columns)
