"""Importance matrices in llama-imatrix's GGUF format: per tensor and expert, the sum of squared inputs of each column.

Layout (llama.cpp tools/imatrix): `general.type` = "imatrix", `imatrix.datasets`, `imatrix.chunk_count`,
`imatrix.chunk_size`; per weight tensor `<name>.in_sum2` [n_expert, n_column] raw sums of x², and `<name>.counts`
[n_expert, 1] rows seen. Dense tensors have one matrix. Tensor names are llama.cpp's.

Ours hold for experts `<name>.in_sum2_gated` and `<name>.gate_sum2` as well: sums of (g·x)² and of g² [n_expert, 1], g being the
gate that scales the expert's output for that row; and for their down projections `<name>.in_sum2_layer` and
`<name>.layer_counts`: the same as the first two over a sample of the layer's tokens, for those experts that are rare (0 for
others). llama.cpp reads past tensors of other suffixes than its two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import gguf
import numpy as np

from calibration.rare import FEWEST_ROWS, floored, missing_rows
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.gguf_header import read_gguf
from xent_quant.checkpoint.llama_names import HEAD, llama_name
from xent_quant.checkpoint.rope import shown
from xent_quant.errors import CalibrationError, CheckpointError
from xent_quant.formats.base import F32
from xent_quant.tensors import InputStatistics, Role, StatisticsSource, TensorSpec

GATED, GATES = ".in_sum2_gated", ".gate_sum2"
LAYER, LAYER_COUNTS = ".in_sum2_layer", ".layer_counts"


@dataclass(frozen=True)
class Entry:
    """Statistics of one weight tensor: `sums` [n_experts, n_columns] float32 Σx², `counts` [n_experts] float32 rows; `gated`
    Σ(g·x)² and `gates` Σg² of the same shapes, None outside experts and where a file lacks them; `layer` and `layer_counts` as
    `sums` and `counts` of a sample of the layer's tokens, None outside experts' down projections and where a file lacks them."""

    sums: F32
    counts: F32
    gated: F32 | None = None
    gates: F32 | None = None
    layer: F32 | None = None
    layer_counts: F32 | None = None


@dataclass(frozen=True)
class Imatrix(StatisticsSource):
    """All entries of a file, by llama.cpp tensor name (`blk.0.ffn_down_exps.weight`)."""

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    source: str = field(default="", compare=False)

    @classmethod
    def read(cls, path: Path) -> "Imatrix":
        """Read a GGUF imatrix, stock llama-imatrix's or ours. Raises CalibrationError for anything else."""
        if not path.is_file():
            raise CalibrationError(f"{path}: no such file; make one with llama-imatrix --output-format gguf")
        try:
            header = read_gguf(path)
        except CheckpointError as error:
            raise CalibrationError(f"{error}; the older .dat kind must be converted with llama-imatrix") from error
        if header.metadata.get("general.type") != "imatrix":
            raise CalibrationError(f"{path}: a GGUF, but not an imatrix (general.type is not 'imatrix')")
        tensors: dict[str, F32] = {}
        for name, tensor in header.tensors.items():
            if tensor.type != "F32":
                raise CalibrationError(f"{path}: {name}: statistics of type {tensor.type}, not F32; calibrate again")
            count = prod(tensor.shape)
            tensors[name] = np.fromfile(path, "<f4", count, offset=tensor.offset).reshape(tensor.shape)

        def count_of(key: str) -> int:
            number = header.metadata.get(key, 0)
            if not isinstance(number, int) or not 0 <= number < 1 << 32:
                raise CalibrationError(f"{path}: {key} is {shown(number)}; calibrate again")
            return number

        entries: dict[str, Entry] = {}
        for name, sums in tensors.items():
            if not name.endswith(".in_sum2"):
                continue
            base = name.removesuffix(".in_sum2")
            if base + ".counts" not in tensors:
                raise CalibrationError(f"{path}: {base}: sums without counts; the file is incomplete, calibrate again")
            parts: list[F32 | None] = [sums.reshape(-1, sums.shape[-1]), tensors[base + ".counts"].reshape(-1)]
            experts = sums.size // sums.shape[-1]
            for matrices, vector in ((GATED, GATES), (LAYER, LAYER_COUNTS)):
                pair = [tensors.get(base + matrices), tensors.get(base + vector)]
                whole = [part for part in pair if part is not None]
                if whole and whole[0].shape[-1] != sums.shape[-1]:
                    raise CalibrationError(f"{path}: {base + matrices}: has not the columns of its sums; calibrate again")
                parts += [whole[0].reshape(-1, sums.shape[-1]), whole[1].reshape(-1)] if len(whole) == 2 else [None, None]
            for part in parts:
                if part is not None and len(part) != experts:
                    raise CalibrationError(f"{path}: {base}: {experts} matrices but {len(part)} counts; calibrate again")
                if part is not None and not (np.isfinite(part).all() and (part >= 0).all()):
                    raise CalibrationError(f"{path}: {base}: negative or non-finite statistics; calibrate again")
            entries[base] = Entry(*parts)  # type: ignore[arg-type]
        if not entries:
            raise CalibrationError(f"{path}: holds no statistics; calibrate again")
        datasets = header.metadata.get("imatrix.datasets")
        return cls(
            entries,
            datasets=tuple(str(item) for item in datasets) if isinstance(datasets, list) else (),
            chunk_count=count_of("imatrix.chunk_count"),
            chunk_size=count_of("imatrix.chunk_size"),
            source=path.name,
        )

    def write(self, path: Path) -> None:
        """Write the file as llama-imatrix does (names sorted, dense tensors 1-D), so that llama-quantize reads it."""
        writer = gguf.GGUFWriter(path, "")
        writer.kv_data[0].clear()  # llama-imatrix writes no general.architecture
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(self.datasets) or ["unknown"])
        writer.add_uint32("imatrix.chunk_count", self.chunk_count)
        writer.add_uint32("imatrix.chunk_size", self.chunk_size)
        for name in sorted(self.entries):
            entry = self.entries[name]
            dense = len(entry.sums) == 1
            writer.add_tensor(name + ".in_sum2", entry.sums[0] if dense else entry.sums)
            writer.add_tensor(name + ".counts", entry.counts if dense else entry.counts[:, None])
            if entry.gated is not None and entry.gates is not None:
                writer.add_tensor(name + GATED, entry.gated)
                writer.add_tensor(name + GATES, entry.gates[:, None])
            if entry.layer is not None and entry.layer_counts is not None and (entry.counts < FEWEST_ROWS).any():
                writer.add_tensor(name + LAYER, entry.layer)
                writer.add_tensor(name + LAYER_COUNTS, entry.layer_counts[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def keys(self) -> dict[str, str | int]:
        """What llama-quantize notes in the files that it makes with this matrix."""
        return {
            "quantize.imatrix.file": self.source,
            "quantize.imatrix.dataset": ", ".join(self.datasets),
            "quantize.imatrix.entries_count": len(self.entries),
            "quantize.imatrix.chunks_count": self.chunk_count,
        }

    def check(self, model: Architecture) -> None:
        """Refuse statistics of another model: all their tensors must be there, with their experts and columns; and those that
        cannot be used. Raises CalibrationError."""
        wanted: dict[str, tuple[int, int]] = {}
        for spec in model.tensors().values():
            wanted[llama_name(spec)] = ((spec.expert or 0) + 1, spec.shape[-1])
        for tensor in sorted(self.entries):
            if tensor == HEAD and model.tie_word_embeddings:
                continue
            if tensor not in wanted:
                raise CalibrationError(f"{self.source}: has statistics of {tensor}, which this model lacks; calibrate this model")
            found = self.entries[tensor].sums.shape
            if found != wanted[tensor]:
                raise CalibrationError(
                    f"{self.source}: {tensor} has statistics of shape {list(found)}, the model needs {list(wanted[tensor])}; "
                    "calibrate this model"
                )
            for expert in range(found[0]):
                self.importance(tensor, expert)

    def get(self, tensor: TensorSpec) -> InputStatistics | None:
        """See `StatisticsSource`. A tied head has the embedding's name, and the statistics of llama.cpp's output.weight."""
        name, expert = HEAD if tensor.role is Role.EMBEDDING else llama_name(tensor), tensor.expert or 0
        importance = self.importance(name, expert)
        return None if importance is None else InputStatistics(importance, None, int(self.entries[name].counts[expert]))

    def importance(self, name: str, expert: int = 0) -> F32 | None:
        """Mean x² per input column of one matrix, [n_columns] float32, or None where the file has no such tensor.

        A rare expert is made up with the layer's sample, in a file without one with the tensor's average over experts, see
        `calibration.rare`. None as well for an expert that saw nothing where there is neither. Raises CalibrationError for means
        that float32 does not hold.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        total = float(entry.counts.sum(dtype=np.float64))
        if total == 0:
            return None
        rows = float(entry.counts[expert])
        missing = missing_rows(rows, FEWEST_ROWS)
        sums = entry.sums[expert].astype(np.float64)
        if entry.layer is not None and entry.layer_counts is not None:
            sampled = float(entry.layer_counts[expert])
            missing = missing if sampled else 0.0
            sums += missing * (entry.layer[expert].astype(np.float64) / max(1.0, sampled))
        elif missing:  # a sum over all experts, for each of them
            sums += missing * (entry.sums.sum(axis=0, dtype=np.float64) / total)
        if not rows + missing:
            return None
        means = sums / (rows + missing)
        if means.max() > np.finfo(np.float32).max:
            raise CalibrationError(f"{self.source}: {name}: means up to {means.max():g}, beyond float32; calibrate again")
        return floored(means)
