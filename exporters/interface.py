"""What exporters share. The pipeline walks the checkpoint once and hands every tensor to every exporter's Sink."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.formats.base import F32
from xent_quant.tensors import InputStatistics

CONTEXT = 8192
"""Tokens for which the memory on a GPU is estimated: the released models' context."""


@dataclass(frozen=True)
class TensorRow:
    """A tensor as it is, or will be, in a file: `shape` includes padding, `nbytes` scales."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "type": self.type,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclass(frozen=True)
class TypeRow:
    """Totals of one quant type within a plan."""

    type: str
    tensors: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class PlanSummary:
    """What an export in `format` will write, tensor by tensor, before any weight is read. Bytes are of tensor data.

    `vram_bytes` is what the model takes on a GPU whole with CONTEXT tokens, about; `notes` are for the person.
    """

    format: str
    tensors: tuple[TensorRow, ...]
    vram_bytes: int
    notes: tuple[str, ...]

    @property
    def n_weights(self) -> int:
        """Weights written, zero padding included."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_weights

    def by_type(self) -> list[TypeRow]:
        return type_totals([(tensor.type, tensor.n_weights, tensor.nbytes) for tensor in self.tensors])

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "types": [asdict(row) for row in self.by_type()],
            "bytes": self.nbytes,
            "weights": self.n_weights,
            "bits_per_weight": self.bits_per_weight,
            "vram_bytes": self.vram_bytes,
            "vram_context": CONTEXT,
            "notes": list(self.notes),
        }


def type_totals(tensors: Sequence[tuple[str, int, int]]) -> list[TypeRow]:
    """Totals per type of (type, weights, bytes) triples, largest first."""
    rows: dict[str, TypeRow] = {}
    for kind, weights, nbytes in tensors:
        old = rows.get(kind, TypeRow(kind, 0, 0, 0))
        rows[kind] = TypeRow(kind, old.tensors + 1, old.weights + weights, old.nbytes + nbytes)
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def kv_cache_bytes(model: Architecture, context: int, item: int = 2) -> int:
    """Keys and values of `context` tokens, in numbers of `item` bytes."""
    return 2 * item * context * model.num_layers * model.num_kv_heads * model.head_dim


@dataclass(frozen=True)
class Exported:
    """Files written, the one to open first; `notes` for the person."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def unmeasured_notes(measured: Mapping[str, bool]) -> tuple[str, ...]:
    """For the person: which tensors had no statistics, where others had; `measured` is tensor to whether it had."""
    missing = [name for name, known in measured.items() if not known]
    if not missing or len(missing) == len(measured):
        return ()
    return (f"There are no statistics for {len(missing)} tensors ({missing[0]}, …): quantised without.",)


class Sink(Protocol):
    """An export under way; bytes go to temporary names."""

    def put(self, name: str, start: int, weights: F32, statistics: InputStatistics | None) -> Callable[[], F32]:
        """Rows `start`… of the checkpoint tensor `name`: [rows, columns] float32, a vector as [1, n].

        Tensors come in the order of `Architecture.tensors()`, each once and whole: in one piece, or, where it is larger
        than `Checkpoint.SLICE` weights, in consecutive slices of rows. `weights` belongs to the caller and is not changed.
        Returns what makes the rows as the export has them, dequantised, in the same shape.
        """

    def finish(self) -> Exported:
        """All tensors were put: write what is left. The files appear under their names when the context ends."""


class Exporter(Protocol):
    """An export, planned from headers: everything that can be refused has been refused when it exists."""

    @property
    def summary(self) -> PlanSummary: ...

    def open(self, provenance: Mapping[str, str | int]) -> AbstractContextManager[Sink]:
        """Check the target and start writing. `provenance` is what a file can say of the statistics that it was made with, as
        `quantize.imatrix.*` keys of GGUF. Leaving the context without `finish` removes everything written."""
