"""Streams a planned GGUF to disk: header first, then every tensor expert by expert, in slices of rows.

Holds one slice of at most SLICE weights in float32 with its packed bytes (q and k, whose rows change places, whole).
Files are written under a temporary name beside the target, synced, and renamed at success only.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from exporters.atomic import staged
from exporters.gguf import card, metadata, tokenizer
from exporters.gguf.plan import GGUFPlan, PlannedTensor
from exporters.interface import Exported, Importance
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint, check_free_space
from xent_quant.errors import ExportError
from xent_quant.formats.base import F32, U8, Effort
from xent_quant.progress import Progress
from xent_quant.recipes import Role

SLICE = 16 * 1024 * 1024
"""Weights quantised at once, at most (one row at least)."""

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


def export_gguf(
    checkpoint: Checkpoint,
    plan: GGUFPlan,
    output: Path,
    name: str,
    *,
    importance: Importance | None,
    imatrix_keys: Mapping[str, str | int],
    split_size: int | None,
    effort: Effort,
    progress: Progress,
    force: bool,
) -> Exported:
    """Write `output/name-TYPE.gguf` (or its shards), a Modelfile and a model card.

    `importance(tensor, expert)` gives [source_columns] float32 or None. Raises ExportError where the output exists
    without `force`, cannot be written or does not fit, and what reading and quantising raise; after any error none of
    these files is left, unless it was there before.
    """
    if not name or name.startswith(".") or any(char in name for char in "/\\\0"):
        raise ExportError(f"--name {name!r}: not a file name; give one without slashes")
    spec = tokenizer.load(checkpoint.path, checkpoint.architecture)
    header_bytes = (
        65536 + sum(len(token.encode()) + 16 for token in spec.tokens) + sum(len(merge.encode()) + 8 for merge in spec.merges)
    )
    parts = shards(plan.tensors, split_size, header_bytes)
    stem = f"{name}-{plan.recipe.name}"
    count = len(parts)
    targets = [
        output / (f"{stem}.gguf" if count == 1 else f"{stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)
    ]
    base = card.BaseModel.of(checkpoint.path)
    extras = {
        output / "README.md": card.readme(base, plan, targets, name),
        output / "Modelfile": card.modelfile(targets, stem),
    }
    unmeasured: set[str] = set()

    def measured(tensor: str, expert: int) -> F32 | None:
        found = importance(tensor, expert) if importance else None
        if found is None:
            unmeasured.add(tensor)
        return found

    try:
        output.mkdir(parents=True, exist_ok=True)
        taken = [path for path in (*targets, *extras) if path.exists()]
        if taken and not force:
            raise ExportError(f"{taken[0]}: exists already; add --force to replace it, or choose another --output")
        check_free_space(output, plan.nbytes + header_bytes + sum(_info_bytes(tensor) for tensor in plan.tensors))
        progress.start(f"Writing {plan.recipe.name}", sum(tensor.n_weights for tensor in plan.tensors))
        try:
            with staged([*targets, *extras]) as temporary:
                for index, part in enumerate(parts):
                    writer = gguf.GGUFWriter(temporary[index], plan.arch)
                    if index == 0:
                        metadata.write(writer, plan, name, base)
                        tokenizer.write(writer, spec, checkpoint.architecture)
                        for key, value in imatrix_keys.items():
                            writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
                    else:
                        writer.kv_data[0].clear()  # general.architecture: all metadata is in the first shard
                    if count > 1:
                        writer.add_uint16("split.no", index)
                        writer.add_uint16("split.count", count)
                        writer.add_int32("split.tensors.count", len(plan.tensors))
                    _write(writer, part, checkpoint, measured, effort, progress)
                for path, text in zip(temporary[count:], extras.values(), strict=True):
                    path.write_text(text, "utf-8")
        finally:
            progress.finish()
    except OSError as error:
        raise ExportError(f"{error.filename or output}: {error.strerror or error}; nothing was written") from error
    return Exported((*targets, *extras), _notes(plan, unmeasured) if importance else ())


def _notes(plan: GGUFPlan, unmeasured: set[str]) -> tuple[str, ...]:
    missing = [tensor.name for tensor in plan.tensors if tensor.name in unmeasured and tensor.role not in STATISTICS_FREE]
    if not missing:
        return ()
    return (f"The imatrix has no statistics for {len(missing)} tensors ({missing[0]}, …): quantised without.",)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _info_bytes(tensor: PlannedTensor) -> int:
    """Bound on the header's entry: name, number of dimensions, dimensions, type, offset."""
    return len(tensor.name) + 8 + 4 + 8 * len(tensor.shape) + 4 + 8


def _write(
    writer: gguf.GGUFWriter,
    tensors: Sequence[PlannedTensor],
    checkpoint: Checkpoint,
    importance: Importance,
    effort: Effort,
    progress: Progress,
) -> None:
    """Write one file through gguf-py: header, keys and tensor infos by its writer, data appended here in slices."""
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
        for tensor in tensors:
            written = 0
            for packed in packed_slices(tensor, checkpoint, importance, effort):
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


def packed_slices(tensor: PlannedTensor, checkpoint: Checkpoint, importance: Importance, effort: Effort) -> Iterator[U8]:
    """Packed rows [rows, row_bytes] uint8 of all experts in order, padding included, at most SLICE weights at a time.

    Padding rows and columns are zeros, of importance 0.
    """
    kind = formats.get(tensor.type)
    rows_at_once = max(1, SLICE // tensor.columns)
    for expert, source in enumerate(tensor.sources):
        weight_of = importance(tensor.name, expert)
        if weight_of is not None and len(weight_of) < tensor.columns:
            weight_of = np.pad(weight_of, (0, tensor.columns - len(weight_of)))
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
            yield kind.quantize(weights, weight_of, effort=effort, name=source)


def permute(weights: F32, heads: int) -> F32:
    """Rows of q or k from rotate_half order to the interleaved one that llama.cpp rotates: [heads·head_dim, in]."""
    rows, columns = weights.shape
    return np.ascontiguousarray(weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(rows, columns)
