"""The whole job as library calls: open, plan, quantise and export. Knows interfaces only; draws and prints nothing."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent_quant.errors import CheckpointError, ConfigError
from xent_quant.progress import Progress

if TYPE_CHECKING:
    from calibration.imatrix import Imatrix
    from exporters.gguf.plan import GGUFPlan, PlannedTensor
    from xent_quant.checkpoint.reader import Checkpoint
    from xent_quant.formats.base import Effort

VRAM_CONTEXT = 8192


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
    """What an export will write, tensor by tensor, before any weight is read. Bytes are of tensor data."""

    tensors: tuple["PlannedTensor", ...]
    vram_bytes: int
    vram_context: int
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
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "type": t.type, "bytes": t.nbytes, "bits_per_weight": t.bits_per_weight}
                for t in self.tensors
            ],
            "types": [asdict(row) for row in self.by_type()],
            "bytes": self.nbytes,
            "weights": self.n_weights,
            "bits_per_weight": self.bits_per_weight,
            "vram_bytes": self.vram_bytes,
            "vram_context": self.vram_context,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class QuantizeResult:
    """What an export wrote."""

    files: tuple[Path, ...]
    plan: PlanSummary
    source_bytes: int
    nbytes: int
    seconds: float
    threads: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [str(path) for path in self.files],
            "source_bytes": self.source_bytes,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "threads": self.threads,
            "notes": list(self.notes),
            "plan": self.plan.to_json(),
        }


def type_totals(tensors: Sequence[tuple[str, int, int]]) -> list[TypeRow]:
    """Totals per type of (type, weights, bytes) triples, largest first."""
    rows: dict[str, TypeRow] = {}
    for kind, weights, nbytes in tensors:
        old = rows.get(kind, TypeRow(kind, 0, 0, 0))
        rows[kind] = TypeRow(kind, old.tensors + 1, old.weights + weights, old.nbytes + nbytes)
    return sorted(rows.values(), key=lambda row: -row.nbytes)


def _open(model: str | Path | None) -> "Checkpoint":
    from xent_quant.checkpoint import hub
    from xent_quant.checkpoint.reader import Checkpoint

    return Checkpoint.open(hub.resolve(model))


def _plan(
    checkpoint: "Checkpoint", bits: int, type: str | None, tensor_types: Sequence[str], pad: str, imatrix: bool
) -> tuple["GGUFPlan", PlanSummary]:
    from exporters.gguf import plan as gguf_plan
    from xent_quant import recipes

    recipe = recipes.recipe(bits=bits, type=type, tensor_types=tensor_types, imatrix=imatrix)
    planned = gguf_plan.plan(checkpoint.architecture, recipe, pad=pad)
    return planned, PlanSummary(planned.tensors, planned.vram_bytes(VRAM_CONTEXT), VRAM_CONTEXT, planned.notes)


def plan(
    model: str | Path | None = None,
    *,
    bits: int = 4,
    type: str | None = None,
    tensor_types: Sequence[str] = (),
    imatrix: str | Path | None = None,
    pad: str = "auto",
) -> PlanSummary:
    """What `quantize` would write with the same options, from headers alone."""
    checkpoint = _open(model)
    _read_imatrix(imatrix, checkpoint)
    return _plan(checkpoint, bits, type, tensor_types, pad, imatrix is not None)[1]


def quantize(
    model: str | Path | None = None,
    *,
    bits: int = 4,
    formats: Sequence[str] = ("gguf",),
    output: str | Path = "out",
    name: str | None = None,
    type: str | None = None,
    tensor_types: Sequence[str] = (),
    imatrix: str | Path | None = None,
    pad: str = "auto",
    split_size: int | None = None,
    threads: int | None = None,
    effort: "Effort" = "normal",
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantise a checkpoint and write it in each of `formats` under `output`.

    `model` is a folder, a Hub id, or None for the bundled miniature; `split_size` is in bytes. Holds one expert, or
    one slice of a tensor, at a time. Raises the errors of `xent_quant.errors`; nothing that looks finished is left
    after one.
    """
    import numba

    from exporters.gguf.export import GGUFExporter
    from exporters.stream import export
    from xent_quant.methods.search import Search

    unknown = set(formats) - {"gguf"}
    if unknown or not formats:
        raise ConfigError(f"--format: {', '.join(sorted(unknown)) or 'none given'}; there is gguf")
    available = numba.config.NUMBA_NUM_THREADS
    if threads is not None and not 1 <= threads <= available:
        raise ConfigError(f"--threads: {threads} is not between 1 and the {available} that this machine offers")
    numba.set_num_threads(threads or available)

    started = time.perf_counter()
    checkpoint = _open(model)
    statistics = _read_imatrix(imatrix, checkpoint)
    planned, summary = _plan(checkpoint, bits, type, tensor_types, pad, imatrix is not None)
    exporter = GGUFExporter(
        checkpoint,
        planned,
        Path(output),
        name or checkpoint.path.resolve().name,
        Search(effort),
        imatrix_keys=statistics.keys() if statistics else None,
        split_size=split_size,
        force=force,
    )
    done = export(checkpoint, [exporter], statistics, progress)
    files = tuple(file for exported in done for file in exported.files)
    return QuantizeResult(
        files=files,
        plan=summary,
        source_bytes=checkpoint.nbytes,
        nbytes=sum(path.stat().st_size for path in files if path.suffix == ".gguf"),
        seconds=time.perf_counter() - started,
        threads=threads or available,
        notes=tuple(note for exported in done for note in exported.notes),
    )


def _read_imatrix(path: str | Path | None, checkpoint: "Checkpoint") -> "Imatrix | None":
    if path is None:
        return None
    from calibration.imatrix import Imatrix

    statistics = Imatrix.read(Path(path))
    statistics.check(checkpoint.architecture)
    return statistics


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a checkpoint folder or a GGUF file, as plain values; from headers alone."""
    path = Path(path)
    if path.is_dir():
        return _describe_checkpoint(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    return _describe_gguf(path)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from xent_quant.checkpoint.reader import Checkpoint

    checkpoint = Checkpoint.open(path)
    model = checkpoint.architecture
    idle = model.num_experts - model.experts_per_token
    expert = 3 * model.hidden_size * model.intermediate_size
    return {
        "path": str(path),
        "kind": "checkpoint",
        "parameters": checkpoint.n_weights,
        "active_parameters": checkpoint.n_weights - model.num_layers * idle * expert,
        "bytes": checkpoint.nbytes,
        **asdict(model),
        "types": [asdict(row) for row in type_totals([(i.dtype, i.n_weights, i.nbytes) for i in checkpoint.infos.values()])],
    }


def _describe_gguf(path: Path) -> dict[str, Any]:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file ({error}); it may be truncated, export it again") from error
    tensors = [(t.tensor_type.name, int(t.n_elements), int(t.n_bytes)) for t in reader.tensors]
    short = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key != "tokenizer.chat_template"
    }
    return {
        "path": str(path),
        "kind": "gguf",
        "bytes": path.stat().st_size,
        "parameters": sum(weights for _, weights, _ in tensors),
        **{key: value for key, value in short.items() if not isinstance(value, list)},
        "types": [asdict(row) for row in type_totals(tensors)],
        "tensors": [
            {"name": t.name, "shape": [int(n) for n in reversed(t.shape)], "type": t.tensor_type.name, "bytes": int(t.n_bytes)}
            for t in reader.tensors
        ],
    }
