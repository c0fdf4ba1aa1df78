"""What exporters share. An exporter plans, and places bytes; the walk (`xent_quant.walk`) decides which, and when."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.formats.base import U8, Encoding
from xent_quant.methods.interface import Method
from xent_quant.storage import Move, Shared, Target
from xent_quant.tensors import Role, TensorSpec

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
class Alternative:
    """Another file of the same model: bytes of the file, the KL divergence (nats per token) that is expected of it, and, where
    the plan is for a machine that can run it, the tokens per second that the memories' bandwidth allows."""

    name: str
    nbytes: int
    kl: float
    speed: float | None = None


@dataclass(frozen=True)
class AtWork:
    """What a model takes of the machine that it was planned for: bytes of VRAM and RAM; the first layers whose experts stay in
    RAM; and tokens per second as of `Alternative`."""

    vram_bytes: int
    ram_bytes: int
    cpu_layers: int
    speed: float


@dataclass(frozen=True)
class Expected:
    """What is expected of a file that was planned for a budget: `kl` as of `Alternative`, `nbytes` of the file, at most;
    `source` says what the expectation stands on, `beside` is what else there would be, largest first; `at_work` is there where
    it was planned for a machine. `frontier` are bytes and expected loss of the best files of all sizes, some of them, smallest
    first."""

    kl: float
    nbytes: int
    source: str
    beside: tuple[Alternative, ...]
    at_work: AtWork | None = None
    frontier: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PlanSummary:
    """What an export in `format` will write, tensor by tensor, before any weight is read. Bytes are of tensor data.

    `vram_bytes` is what the model takes on a GPU whole with `context` tokens, about; `notes` are for the person; `expected`
    is there where the types were planned for a budget, and `command` runs it as it was planned.
    """

    format: str
    tensors: tuple[TensorRow, ...]
    vram_bytes: int
    notes: tuple[str, ...]
    expected: Expected | None = None
    context: int = CONTEXT
    command: str = ""

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
            "vram_context": self.context,
            "notes": list(self.notes),
            "expected": asdict(self.expected) if self.expected else None,
            "command": self.command,
        }


def type_totals(tensors: Sequence[tuple[str, int, int]]) -> list[TypeRow]:
    """Totals per type of (type, weights, bytes) triples, largest first."""
    rows: dict[str, TypeRow] = {}
    for kind, weights, nbytes in tensors:
        old = rows.get(kind, TypeRow(kind, 0, 0, 0))
        rows[kind] = TypeRow(kind, old.tensors + 1, old.weights + weights, old.nbytes + nbytes)
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def usual_context(model: Architecture) -> int:
    """CONTEXT, or the model's own where that is shorter."""
    return min(CONTEXT, model.max_position_embeddings)


def kv_cache_bytes(model: Architecture, context: int, item: float = 2) -> int:
    """Keys and values of `context` tokens, in numbers of `item` bytes."""
    return int(2 * item * context * model.num_layers * model.num_kv_heads * model.head_dim)


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the checkpoint goes in an export, and as what. Exporters add what places it in their files.

    `role` is what it does there: a tied embedding may be written once as embedding and once as head. `rows` and `columns` are the
    extents of its matrix in the file, padding included; a vector has one row.
    """

    tensor: TensorSpec
    role: Role
    encoding: Encoding
    rows: int
    columns: int

    @property
    def label(self) -> str:
        """What to call it before a person."""
        return self.tensor.name


@dataclass(frozen=True)
class Exported:
    """A complete export under its staged names: what gets which name (the one to open first comes first), files that it shares
    with other exports of its folder, all files as they will be called, and notes for the person."""

    moves: tuple[Move, ...]
    files: tuple[Path, ...]
    shared: tuple[Shared, ...] = ()
    notes: tuple[str, ...] = ()


def unmeasured_notes(missing: Sequence[str], measured: int) -> tuple[str, ...]:
    """For the person: tensors that had no statistics, where `measured` others had some."""
    if not missing or not measured:
        return ()
    return (f"There are no statistics for {len(missing)} tensors ({min(missing)}, …): quantised without.",)


class Writer(Protocol):
    """An export under way, in files of a private folder."""

    def put(self, slot: Any, start: int, packed: U8) -> None:
        """Rows `start`… of a slot as its encoding packs them, [rows, row_bytes], padding included; of an encoding that is not
        `by_rows` all of it, [1, bytes]. In any order, from several threads at a time; the same rows may come
        again, with the same bytes."""

    def sync(self) -> None:
        """What was put is safe from a loss of power when this returns."""

    def finish(self, notes: Sequence[str]) -> Exported:
        """Everything was put: write what is left. May be called again, in another process too, when the files were not
        published."""

    def close(self) -> None:
        """Let go of the files; they stay."""


class Choices(Protocol):
    """What becomes of weights in an export."""

    @property
    def slots(self) -> Mapping[str, Sequence[Slot]]:
        """By the checkpoint's name of the tensor; every tensor has at least one."""

    @property
    def method(self) -> Method | None:
        """What chooses the codes; None where the encodings know one way only."""


class Exporter(Choices, Protocol):
    """An export, planned from headers: everything that can be refused has been refused when it exists."""

    @property
    def summary(self) -> PlanSummary: ...

    @property
    def targets(self) -> tuple[Target, ...]:
        """What appears, the one to open first at the beginning; no other run may write these at the same time."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the bytes depend on besides the checkpoint, the statistics and the method, as JSON."""

    @property
    def nbytes(self) -> int:
        """Of all files together, about and at most."""

    def check(self, force: bool) -> None:
        """Raise ExportError for what stands in the way besides `targets`; looked at once more before any work."""

    def open(self, folder: Path, provenance: Mapping[str, str | int], *, fresh: bool) -> Writer:
        """Begin in the private `folder`, or go on there. `provenance` is what a file can say of the statistics that it was made
        with, as `quantize.imatrix.*` keys of GGUF."""
