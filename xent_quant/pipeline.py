"""The whole job as library calls: open, plan, quantise and export. Knows interfaces only; draws and prints nothing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent_quant.errors import CheckpointError, ConfigError, ExportError, UnsupportedError
from xent_quant.progress import Progress

if TYPE_CHECKING:
    from calibration.coverage import Coverage
    from calibration.imatrix import Imatrix
    from calibration.session import Session, Settings
    from exporters.interface import Exporter, PlanSummary
    from xent_quant.checkpoint.reader import Checkpoint
    from xent_quant.formats.base import Effort
    from xent_quant.methods.interface import Method
    from xent_quant.validation.report import Report
    from xent_quant.validation.runtimes import RuntimeName


@dataclass(frozen=True)
class QuantizeResult:
    """What an export wrote."""

    files: tuple[Path, ...]
    plans: tuple["PlanSummary", ...]
    source_bytes: int
    seconds: float
    threads: int
    notes: tuple[str, ...]
    coverage: "Coverage | None" = None

    @property
    def exports(self) -> tuple[Path, ...]:
        """What to open of each format: a GGUF file (the first shard), a folder of the others."""
        files = [path for path in self.files if path.suffix == ".gguf"][:1]
        return (*files, *(path.parent for path in self.files if path.name == "config.json"))

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files)

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [str(path) for path in self.files],
            "source_bytes": self.source_bytes,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "threads": self.threads,
            "notes": list(self.notes),
            "plans": [plan.to_json() for plan in self.plans],
            "coverage": self.coverage.to_json() if self.coverage else None,
        }


@dataclass(frozen=True)
class CalibrateResult:
    """A file of statistics, and what it rests on."""

    file: Path
    tokens: int
    seconds: float
    coverage: "Coverage"
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "coverage": self.coverage.to_json(),
        }


def _open(model: str | Path | None) -> "Checkpoint":
    from xent_quant.checkpoint import hub
    from xent_quant.checkpoint.reader import Checkpoint

    return Checkpoint.open(hub.resolve(model))


Keys = dict[str, str | int] | None
"""What a file says of the statistics that it was made with; None where there were none."""


@dataclass(frozen=True)
class Target:
    """What to make of a checkpoint, and where. `type` to `allow_tokenizer_mismatch` concern GGUF, `pad` and `split_size` (in
    bytes) bitsandbytes too, `onnx_dtype` to `active_bits` ONNX (see `exporters.onnx.plan.Settings`)."""

    formats: Sequence[str] = ("gguf",)
    bits: int = 4
    output: Path = Path("out")
    name: str | None = None
    force: bool = False
    type: str | None = None
    tensor_types: Sequence[str] = ()
    pad: str = "auto"
    split_size: int | None = None
    allow_tokenizer_mismatch: bool = False
    onnx_dtype: str = "fp16"
    block_size: int = 64
    accuracy_level: int = 4
    symmetric: bool = True
    active_bits: int | None = None
    bnb_type: str = "nf4"


def plan(
    model: str | Path | None = None,
    *,
    formats: Sequence[str] = ("gguf",),
    bits: int = 4,
    type: str | None = None,
    tensor_types: Sequence[str] = (),
    imatrix: str | Path | None = None,
    method: str = "auto",
    pad: str = "auto",
    onnx_dtype: str = "fp16",
    block_size: int = 64,
    accuracy_level: int = 4,
    symmetric: bool = True,
    active_bits: int | None = None,
    bnb_type: str = "nf4",
) -> tuple["PlanSummary", ...]:
    """What `quantize` would write with the same options, one summary for each format, from headers alone."""
    checkpoint = _open(model)
    target = Target(
        formats=formats,
        bits=bits,
        type=type,
        tensor_types=tensor_types,
        pad=pad,
        onnx_dtype=onnx_dtype,
        block_size=block_size,
        accuracy_level=accuracy_level,
        symmetric=symmetric,
        active_bits=active_bits,
        bnb_type=bnb_type,
    )
    _read_imatrix(imatrix, checkpoint)
    chosen = _method(method, imatrix)
    keys: Keys = None if chosen == "rtn" else {}
    return tuple(exporter.summary for exporter in _exporters(checkpoint, target, _Methods(chosen, "fast"), keys))


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
    method: str = "auto",
    calibration: "Settings | None" = None,
    pad: str = "auto",
    split_size: int | None = None,
    allow_tokenizer_mismatch: bool = False,
    onnx_dtype: str = "fp16",
    block_size: int = 64,
    accuracy_level: int = 4,
    symmetric: bool = True,
    active_bits: int | None = None,
    bnb_type: str = "nf4",
    threads: int | None = None,
    effort: "Effort" = "normal",
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantise a checkpoint and write it in each of `formats` under `output`, from one pass over its weights.

    `model` is a folder, a Hub id, or None for the bundled miniature; `split_size` is in bytes. Statistics come from the file
    `imatrix`, or from a pass over the text of `calibration` that runs along; `method` is one of METHODS or "auto". Holds one
    expert, or one slice of a tensor, at a time, and the hidden states of the text. Raises the errors of
    `xent_quant.errors`; nothing that looks finished is left after one.
    """
    from exporters.stream import export

    started = time.perf_counter()
    used = _set_threads(threads)
    checkpoint = _open(model)
    target = Target(
        formats=formats,
        bits=bits,
        output=Path(output),
        name=name,
        force=force,
        type=type,
        tensor_types=tensor_types,
        pad=pad,
        split_size=split_size,
        allow_tokenizer_mismatch=allow_tokenizer_mismatch,
        onnx_dtype=onnx_dtype,
        block_size=block_size,
        accuracy_level=accuracy_level,
        symmetric=symmetric,
        active_bits=active_bits,
        bnb_type=bnb_type,
    )
    chosen = _method(method, imatrix)
    if imatrix is not None and calibration is not None and calibration.calib:
        raise ConfigError("--imatrix and --calib: statistics come from a file or from text, not from both")
    matrix = _read_imatrix(imatrix, checkpoint)
    session = None
    if matrix is None and chosen != "rtn" and _uses_statistics(target):
        session = _session(checkpoint, calibration)
    keys = matrix.keys() if matrix else session.keys() if session else None
    methods = _Methods(chosen, effort)
    exporters = _exporters(checkpoint, target, methods, keys)
    running = session.running(methods.need_hessian, progress) if session else None
    done = export(checkpoint, exporters, matrix or running, progress)
    notes = tuple(note for exported in done for note in exported.notes)
    return QuantizeResult(
        files=tuple(file for exported in done for file in exported.files),
        plans=tuple(exporter.summary for exporter in exporters),
        source_bytes=checkpoint.nbytes,
        seconds=time.perf_counter() - started,
        threads=used,
        notes=(*notes, *running.coverage.notes()) if running else notes,
        coverage=running.coverage if running else None,
    )


def calibrate(
    model: str | Path | None = None,
    *,
    output: str | Path,
    calibration: "Settings | None" = None,
    force: bool = False,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Run the text of `calibration` through a checkpoint and write an importance matrix to the file `output`.

    Holds the hidden states of the text and one expert. Raises the errors of `xent_quant.errors`.
    """
    from exporters.atomic import staged

    started = time.perf_counter()
    checkpoint, file = _open(model), Path(output)
    if file.exists() and not force:
        raise ExportError(f"{file}: exists already; add --force to replace it, or choose another --output")
    matrix, coverage = _session(checkpoint, calibration).imatrix(progress)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with staged([file]) as temporary:
            matrix.write(temporary[0])
    except OSError as error:
        raise ExportError(f"{error.filename or file}: {error.strerror or error}; nothing was written") from error
    seconds = time.perf_counter() - started
    return CalibrateResult(file, matrix.chunk_count * matrix.chunk_size, seconds, coverage, coverage.notes())


def _session(checkpoint: "Checkpoint", calibration: "Settings | None") -> "Session":
    from calibration.session import Session, Settings

    return Session(checkpoint, calibration or Settings())


def _method(name: str, imatrix: str | Path | None) -> str:
    """`name`, or the one method that goes with a file of statistics. Raises ConfigError for another, or an unknown one."""
    from xent_quant.methods import METHODS, WITH_FILE

    if name != "auto" and name not in METHODS:
        raise ConfigError(f"--method {name}: there are auto, {', '.join(METHODS)}")
    if imatrix is None:
        return name
    if name not in ("auto", WITH_FILE):
        raise ConfigError(f"--method {name}: does not use an importance matrix; drop --imatrix, or use --method {WITH_FILE}")
    return WITH_FILE


class _Methods:
    """The method of a name, for "auto" that of an export's type; each made once, since a method keeps what weights share."""

    def __init__(self, name: str, effort: "Effort") -> None:
        self._name, self._effort = name, effort
        self._made: dict[str, Method] = {}

    def for_type(self, bulk: str) -> "Method":
        """The method for an export most of whose weights are of the type `bulk`."""
        from xent_quant.methods import METHODS, auto

        name = auto(bulk) if self._name == "auto" else self._name
        if name not in self._made:
            self._made[name] = METHODS[name](self._effort)
        return self._made[name]

    @property
    def need_hessian(self) -> bool:
        """Whether any of those in use does."""
        return any(method.needs_hessian for method in self._made.values())


def _uses_statistics(target: Target) -> bool:
    """Whether a Method quantises anything: neither floats nor bitsandbytes' types are its business."""
    whole = (target.type.upper() in ("F32", "F16", "BF16") if target.type else target.bits == 16) and not target.tensor_types
    return not whole and any(kind != "bnb" for kind in target.formats)


def _exporters(checkpoint: "Checkpoint", target: Target, methods: _Methods, keys: Keys) -> list["Exporter"]:
    """One exporter for each format, in the order asked for. Raises ConfigError for an unknown one."""
    unknown = set(target.formats) - EXPORTERS.keys()
    if unknown or not target.formats:
        raise ConfigError(f"--format: {', '.join(sorted(unknown)) or 'none given'}; there is {', '.join(EXPORTERS)}")
    named = replace(target, name=target.name or checkpoint.path.resolve().name)
    return [EXPORTERS[kind](checkpoint, named, methods, keys) for kind in dict.fromkeys(target.formats)]


def _gguf(checkpoint: "Checkpoint", target: Target, methods: _Methods, keys: Keys) -> "Exporter":
    from exporters.gguf.export import GGUFExporter
    from exporters.gguf.plan import plan
    from exporters.interface import type_totals
    from xent_quant.recipes import recipe

    chosen = recipe(bits=target.bits, type=target.type, tensor_types=target.tensor_types, imatrix=keys is not None)
    planned = plan(checkpoint.architecture, chosen, pad=target.pad)
    totals = type_totals([(tensor.type, tensor.n_weights, tensor.nbytes) for tensor in planned.tensors])
    method = methods.for_type(max(totals, key=lambda row: row.weights).type)
    return GGUFExporter(
        checkpoint,
        planned,
        target.output,
        target.name or "",
        method,
        imatrix_keys=keys and {"quantize.imatrix.file": f"xent-quant --method {method.name}", **keys},
        split_size=target.split_size,
        force=target.force,
        allow_tokenizer_mismatch=target.allow_tokenizer_mismatch,
    )


def _onnx(checkpoint: "Checkpoint", target: Target, methods: _Methods, keys: Keys) -> "Exporter":
    try:
        from exporters.onnx.export import ONNXExporter
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise UnsupportedError("--format onnx: the package onnx is not installed: pip install 'xent-quant[onnx]'") from error
    from exporters.onnx.plan import Settings, plan

    settings = Settings(
        bits=target.bits,
        dtype=target.onnx_dtype,
        block_size=target.block_size,
        accuracy_level=target.accuracy_level,
        symmetric=target.symmetric,
        active_bits=target.active_bits,
    )
    planned = plan(checkpoint.architecture, settings)
    method = methods.for_type(f"INT{target.bits}")
    return ONNXExporter(checkpoint, planned, target.output, target.name or "", method, force=target.force)


def _bnb(checkpoint: "Checkpoint", target: Target, methods: _Methods, keys: Keys) -> "Exporter":
    from exporters.bitsandbytes.export import BnbExporter
    from exporters.bitsandbytes.plan import plan

    if target.bits < 16:
        import numba
        import torch

        torch.set_num_threads(numba.get_num_threads())  # --threads, for bitsandbytes
    planned = plan(checkpoint.architecture, bits=target.bits, bnb_type=target.bnb_type, pad=target.pad)
    return BnbExporter(checkpoint, planned, target.output, target.name or "", split_size=target.split_size, force=target.force)


EXPORTERS: dict[str, Callable[["Checkpoint", Target, _Methods, Keys], "Exporter"]] = {
    "gguf": _gguf,
    "onnx": _onnx,
    "bnb": _bnb,
}
"""Format to the function that plans it."""


def _set_threads(threads: int | None) -> int:
    """Threads that kernels use; all that there are where None is given."""
    import numba

    available = int(numba.config.NUMBA_NUM_THREADS)
    if threads is not None and not 1 <= threads <= available:
        raise ConfigError(f"--threads: {threads} is not between 1 and the {available} that this machine offers")
    numba.set_num_threads(threads or available)
    return threads or available


def _read_imatrix(path: str | Path | None, checkpoint: "Checkpoint") -> "Imatrix | None":
    if path is None:
        return None
    from calibration.imatrix import Imatrix

    statistics = Imatrix.read(Path(path))
    statistics.check(checkpoint.architecture)
    return statistics


def require_runtimes(formats: Sequence[str], bits: int) -> None:
    """Raise, before the work of an export, where a runtime that `validate` would judge it in is not installed."""
    from xent_quant.validation import runtimes

    kinds: dict[str, runtimes.Kind] = {"gguf": "gguf", "onnx": "onnx", "bnb": "bitsandbytes" if bits < 16 else "checkpoint"}
    for kind in (kinds[name] for name in formats if name in kinds):
        runtimes.require(kind, runtimes.NATIVE[kind])


def validate(
    exported: str | Path,
    reference: str | Path | None = None,
    *,
    suites: Sequence[str] = (),
    suite_files: Sequence[str] = (),
    max_tokens: int | None = None,
    context: int = 512,
    tolerance: str | None = None,
    runtime: "RuntimeName" = "auto",
    threads: int | None = None,
    report: str | Path | None = None,
    json: str | Path | None = None,
    cache: str | Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> "Report":
    """Measure an export against its checkpoint on bundled suites and files (`NAME=PATH`); `verdict` of the result says
    whether it is within tolerance.

    Writes report.html and report.json into the folder `report`, and the JSON to `json`, where they are given. What the
    reference says is kept in `cache`; by default in `report`, else in ~/.cache/xent-quant. Raises the
    errors of `xent_quant.errors` for what cannot be compared.
    """
    from xent_quant.validation import suites as texts
    from xent_quant.validation.validate import validate as measure
    from xent_quant.validation.write import write

    used = _set_threads(threads)
    folder = Path(report) if report else None
    found = measure(
        Path(exported),
        _open(reference),
        texts.choose(suites, suite_files),
        cache=Path(cache) if cache else (folder or Path.home() / ".cache" / "xent-quant") / "references",
        context=context,
        max_tokens=max_tokens,
        tolerance=tolerance,
        runtime=runtime,
        threads=used,
        command=command,
        progress=progress,
    )
    write(found, folder, Path(json) if json else None)
    return found


def describe(path: str | Path, reference: str | Path | None = None, *, progress: Progress | None = None) -> dict[str, Any]:
    """Facts about a checkpoint folder, an ONNX folder or a GGUF file, as plain values; from headers alone.

    With `reference`, the checkpoint (folder or Hub id) that a GGUF file was made from, "errors" is added: the tensors of
    `exporters.gguf.compare.tensor_errors`, for which the weights of both are read.
    """
    path = Path(path)
    if reference is not None:
        if path.suffix != ".gguf" or not path.is_file():
            raise ConfigError(f"--reference: {path} is not a GGUF file; there is nothing to compare")
        from exporters.gguf.compare import tensor_errors

        return {
            **_describe_gguf(path),
            "errors": [asdict(tensor) for tensor in tensor_errors(path, _open(reference), progress)],
        }
    if (path / "model.onnx").is_file():
        return _describe_onnx(path)
    if path.is_dir():
        return _describe_checkpoint(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    return _describe_gguf(path)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    from exporters.interface import type_totals
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


def _describe_onnx(path: Path) -> dict[str, Any]:
    from exporters.interface import type_totals
    from xent_quant.validation.onnx_source import OnnxSource

    source = OnnxSource(path)
    stored = source.stored()
    return {
        "path": str(path),
        "kind": "onnx",
        "bytes": sum(file.stat().st_size for file in path.glob("model.onnx*")),
        "parameters": sum(weights for _, weights, _ in stored),
        **asdict(source.architecture),
        "types": [asdict(row) for row in type_totals(stored)],
    }


def _describe_gguf(path: Path) -> dict[str, Any]:
    import gguf

    from exporters.interface import type_totals

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
