"""How far the weights of a GGUF file are from the checkpoint that it was made from, tensor by tensor."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf.export import rotary_rows
from exporters.gguf.plan import layout
from xent_quant import formats
from xent_quant.checkpoint.dropping import compared_with_gguf
from xent_quant.checkpoint.gguf_header import GGUFTensor, read_gguf
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, UnsupportedError
from xent_quant.progress import Progress, Silent
from xent_quant.recipes import recipe

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorError:
    """`error` is the root of Σ(w − ŵ)² / Σw² over a tensor, `worst_expert` that of its worst expert (alone: the same)."""

    name: str
    type: str
    weights: int
    nbytes: int
    error: float
    worst_expert: float


def shards(path: Path) -> list[Path]:
    """Every file of a split GGUF, given any; a file that is not split is alone."""
    match = SHARD.search(path.name)
    if not match:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    return [path.with_name(f"{stem}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]


def tensor_errors(path: Path, checkpoint: Checkpoint, progress: Progress | None = None) -> Iterator[TensorError]:
    """Every tensor of a GGUF file (all shards of a split one) against `checkpoint`, in the file's order.

    Holds one slice of a tensor, dequantised. Weights that the file pads with count as zeros of the checkpoint; experts that it
    says were dropped do not. Raises CheckpointError for a file that is not readable or not of this model, UnsupportedError for
    types that `formats` lacks.
    """
    report = progress or Silent()
    stored: dict[str, GGUFTensor] = {}
    metadata: dict[str, Any] = {}
    for shard in shards(path):
        header = read_gguf(shard)
        stored |= header.tensors
        metadata = header.metadata | metadata
    checkpoint = compared_with_gguf(checkpoint, metadata, str(path))
    model = checkpoint.architecture
    gate = next((tensor for name, tensor in stored.items() if name.startswith("blk.0.ffn_gate") and "inp" not in name), None)
    if gate is None:
        raise CheckpointError(f"{path}: has no blk.0.ffn_gate tensor; it is not a model of this architecture")
    shared = stored.get("blk.0.ffn_gate_exps.weight", gate)
    wanted = {
        tensor.name: tensor for tensor in layout(model, recipe(type="F32"), shared.shape[-2] if len(shared.shape) > 1 else 1)
    }
    if set(wanted) != set(stored):
        odd = sorted(set(wanted) ^ set(stored))
        raise CheckpointError(f"{path}: {odd[0]} is in the file or the checkpoint but not in both; compare with its own model")
    report.start("Comparing", sum(slot.source_weights for slot in wanted.values()))
    for name, tensor in stored.items():
        slot = wanted[name]
        if tensor.type not in formats.NAMES:
            raise UnsupportedError(f"{path}: {name}: quant type {tensor.type} is not known here")
        kind = formats.get(tensor.type)
        if tensor.shape != tuple(slot.shape):
            raise CheckpointError(f"{path}: {name}: shape {list(tensor.shape)}, this checkpoint needs {list(slot.shape)}")
        mapped = np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        packed = mapped.reshape(len(slot.sources), slot.rows, -1)
        losses, energies = [], []
        for index, source in enumerate(slot.sources):
            loss = energy = 0.0
            for start, weights in checkpoint.slices(source.name):
                rows = np.arange(start, start + len(weights))
                if slot.heads:
                    rows = rotary_rows(rows, slot.rows // slot.heads)
                with np.errstate(all="ignore"):  # told in the next line
                    got = kind.dequantize(np.ascontiguousarray(packed[index][rows]))
                if not np.isfinite(got).all():
                    raise CheckpointError(f"{tensor.file}: {name}: NaN or infinite weights; export it again")
                got[:, : weights.shape[1]] -= weights
                loss += float(np.einsum("ij,ij->", got, got, dtype=np.float64))
                energy += float(np.einsum("ij,ij->", weights, weights, dtype=np.float64))
                report.advance(weights.size)
            losses.append(loss)
            energies.append(energy)
        worst = max(_relative(loss, energy) for loss, energy in zip(losses, energies, strict=True))
        yield TensorError(
            name, kind.name, slot.source_weights, tensor.nbytes, _relative(sum(losses), sum(energies)), worst
        )  # fmt: skip
    report.finish()


def _relative(loss: float, energy: float) -> float:
    return sqrt(loss / energy) if energy else (0.0 if not loss else float("inf"))
