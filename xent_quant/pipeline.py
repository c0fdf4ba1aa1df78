"""The whole job as library calls: open, plan, quantise and export. Knows interfaces only; draws and prints nothing."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent_quant.errors import ConfigError, ExportError, ValidationError
from xent_quant.options import CalibrationOptions, Options, SensitivityOptions, ValidationOptions, takes
from xent_quant.progress import Progress, Silent

if TYPE_CHECKING:
    from calibration.coverage import Coverage
    from calibration.imatrix import Imatrix
    from calibration.session import Session
    from exporters.interface import Exporter, PlanSummary
    from xent_quant.checkpoint.reader import Checkpoint
    from xent_quant.sensitivities import Sensitivity
    from xent_quant.validation.report import Report
    from xent_quant.walk.resources import Resources
    from xent_quant.walk.saliency import Dropping


@dataclass(frozen=True)
class QuantizeResult:
    """What an export wrote."""

    files: tuple[Path, ...]
    exports: tuple[Path, ...]
    """What to open of each: a GGUF file (the first shard), a folder of the others."""
    plans: tuple["PlanSummary", ...]
    source_bytes: int
    seconds: float
    threads: int
    notes: tuple[str, ...]
    coverage: "Coverage | None" = None
    resumed: int = 0
    """Layers that earlier, interrupted runs had done."""
    walk_seconds: float = 0.0
    """Of the walk over the layers, in these runs too."""

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
            "resumed_layers": self.resumed,
            "walk_seconds": self.walk_seconds,
            "weights_per_second": sum(plan.n_weights for plan in self.plans) / max(self.walk_seconds, 1e-9),
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


@dataclass(frozen=True)
class SensitivityResult:
    """What was measured, and the file that keeps it."""

    file: Path
    sensitivity: "Sensitivity"
    tokens: int
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "losses": {place: dict(losses) for place, losses in self.sensitivity.losses.items()},
        }


def _open(model: str | Path | None) -> "Checkpoint":
    from xent_quant.checkpoint import hub
    from xent_quant.checkpoint.reader import Checkpoint

    return Checkpoint.open(hub.resolve(model))


@takes(Options)
def plan(model: str | Path | None = None, **options: Any) -> tuple["PlanSummary", ...]:
    """What `quantize` would write with the same options, one summary for each export, from headers alone."""
    prepared = _prepare(model, Options(**options))
    return tuple(replace(exporter.summary, notes=(*prepared.notes, *exporter.summary.notes)) for exporter in prepared.exporters)


def _hessians(exporters: "Sequence[Exporter]") -> list[bool]:
    """Which of them have a method that needs Hessians."""
    return [exporter.method is not None and exporter.method.needs_hessian for exporter in exporters]


@takes(Options)
def resources(model: str | Path | None = None, **options: Any) -> "tuple[Resources, tuple[str, ...]]":
    """What `quantize` would take with the same options: memory, disk, and time by a few seconds' measurement on this machine;
    and what is to be said of the text."""
    from xent_quant.model.sizes import SALIENCY_TOKENS
    from xent_quant.walk import resources

    wanted = Options(**options)
    _set_threads(wanted.threads)
    prepared = _prepare(model, wanted)
    session = _session(prepared, wanted)
    architecture, exporters = prepared.checkpoint.architecture, prepared.exporters
    hessian = _hessians(exporters)
    followers, tokens = sum(hessian) if session else 0, session.text.windows.size if session else 0
    if not prepared.measure:  # no more of it is run than what says which experts stay
        tokens = min(tokens, SALIENCY_TOKENS)
    devices, vram = session.devices if session and prepared.measure else (), None
    device = devices[0] if devices else None
    length = session.length if session else 0
    if device is None:
        room = resources.room(architecture, followers, length, wanted.memory_bytes)
        memory = resources.memory(architecture, followers, length, room)
    else:
        room = resources.device_room(architecture, followers, length, device, wanted.vram_bytes, memory=wanted.memory_bytes)
        sharing = resources.helping(architecture, followers, length, room, devices, Silent(), memory=wanted.memory_bytes)
        devices = (device, *sharing)
        memory = resources.beside_device(architecture, followers, length, room, device, len(devices))
        vram = resources.vram(architecture, followers, length, room)
    products = session.narrow if session and not any(hessian) else None
    taken = resources.Resources(
        memory=memory,
        disk=resources.disk(architecture, tokens, followers, device, measured=prepared.measure) if session else 0,
        result=sum(exporter.nbytes for exporter in exporters),
        tokens=tokens,
        seconds=None if vram or wanted.ray else resources.seconds(architecture, exporters, tokens, hessian, products),
        vram=vram,
        devices=len(devices),
    )
    said = _said(prepared, session)
    if session and prepared.measure and not any(hessian) and len(session.text.spare):
        most = tokens + session.text.spare.size
        said += (
            f"Where experts are rarely chosen, up to {most:,} tokens are run, not {tokens:,}: time and disk grow with them.",
        )
    return taken, said


@dataclass(frozen=True)
class _Prepared:
    """A checkpoint with exporters that are planned; `matrix` is a file of statistics, `measure` tells that text is to be run
    for some, `options` are those asked for with what this machine has, of which something is `said`. Where experts are
    dropped it is a view without any of so many, until it is known which they are."""

    checkpoint: "Checkpoint"
    exporters: "list[Exporter]"
    matrix: "Imatrix | None"
    measure: bool
    options: Options
    said: tuple[str, ...]

    @property
    def runs_text(self) -> bool:
        return self.measure or self.checkpoint.kept is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the checkpoint's own files have to say."""
        from exporters.base_model import BaseModel

        return (*self.checkpoint.notes, *BaseModel.of(self.checkpoint.path).notes)


def _prepare(model: str | Path | None, wanted: Options) -> _Prepared:
    """Names are checked and targets planned before the text is read, which takes torch."""
    from xent_quant.targets import Methods, exporters_of, with_this_machine

    methods = Methods(wanted)
    checkpoint = _open(model)
    wanted, said = with_this_machine(wanted)
    matrix = _read_imatrix(wanted, checkpoint)
    if wanted.drop_experts is not None:
        checkpoint = _without_some(checkpoint, wanted)
    exporters = exporters_of(checkpoint, wanted, methods, said)
    return _Prepared(checkpoint, exporters, matrix, matrix is None and methods.use_statistics, wanted, said)


def _without_some(checkpoint: "Checkpoint", wanted: Options) -> "Checkpoint":
    """A view with as many experts as are to stay, the first ones. Raises ConfigError where that cannot be."""
    from xent_quant.checkpoint.dropping import KeptExperts, keep

    model, asked = checkpoint.architecture, f"--drop-experts {wanted.drop_experts}"
    if not model.num_experts:
        raise ConfigError(f"{asked}: the model has no experts, it is dense; drop the option")
    most = model.num_experts - model.experts_per_token
    count = wanted.experts_dropped(model.num_experts)
    if not count:
        raise ConfigError(f"{asked}: is less than one of {model.num_experts} experts; give a larger share, or a number")
    if count > most:
        raise ConfigError(
            f"{asked}: leaves {max(0, model.num_experts - count)} of {model.num_experts} experts, and every token uses "
            f"{model.experts_per_token}; at most {most} can be left out"
        )
    return keep(checkpoint, KeptExperts((tuple(range(model.num_experts - count)),) * model.num_layers, model.num_experts))


def _session(prepared: _Prepared, wanted: CalibrationOptions) -> "Session | None":
    """The text, of the whole checkpoint; on the CPU where it is run for nothing but which experts stay."""
    if not prepared.runs_text:
        return None
    from calibration.session import Session

    if not prepared.measure:
        settings = {field.name: getattr(wanted, field.name) for field in fields(CalibrationOptions)}
        wanted = CalibrationOptions(**(settings | {"device": "cpu"}))
    checkpoint = prepared.checkpoint
    return Session(checkpoint.whole or checkpoint, wanted, spare=prepared.measure)


def _said(prepared: _Prepared, session: "Session | None") -> tuple[str, ...]:
    """Of the text: how well it calibrates experts only where that is what it is for."""
    return () if session is None else session.notes if prepared.measure else session.text.notes


def _dropping(prepared: _Prepared, session: "Session") -> "Dropping":
    """For `job.run`: how the experts that stay are found, and everything planned anew for those."""
    from xent_quant.checkpoint.dropping import KeptExperts, keep
    from xent_quant.targets import Methods, exporters_of
    from xent_quant.walk.saliency import Dropping

    def view(kept: KeptExperts) -> "tuple[Checkpoint, Sequence[Exporter], Session | None]":
        smaller, options = keep(session.checkpoint, kept), prepared.options
        exporters = exporters_of(smaller, options, Methods(options), prepared.said)
        return smaller, exporters, session.of(smaller) if prepared.measure else None

    return Dropping(session, prepared.checkpoint.architecture.num_experts, view)


@takes(Options)
def quantize(model: str | Path | None = None, *, progress: Progress | None = None, **options: Any) -> QuantizeResult:
    """Quantise a checkpoint and write it in each of `formats` under `output`, from one pass over its weights.

    `model` is a folder, a Hub id, or None for the bundled miniature; `options` are the fields of `xent_quant.options.Options`.
    Statistics come from the file `imatrix`, or from a pass over the text `calib` that runs along. Holds an expert for each
    thread, or a slice of a tensor; the text's hidden states are files. Raises the errors of `xent_quant.errors`; nothing that
    looks finished is left after one.
    """
    from xent_quant.walk.job import run

    started = time.perf_counter()
    wanted = Options(**options)
    used = _set_threads(wanted.threads)
    prepared = _prepare(model, wanted)
    checkpoint, exporters, matrix = prepared.checkpoint, prepared.exporters, prepared.matrix
    identity: dict[str, str] = {"--effort": wanted.effort}
    if matrix is not None:
        identity["--imatrix"] = hashlib.sha256(Path(wanted.imatrix or "").read_bytes()).hexdigest()
    session = _session(prepared, wanted)
    dropping = None
    if session and checkpoint.kept:
        dropping = _dropping(prepared, session)
        identity |= {"--drop-experts": str(checkpoint.kept.dropped), **session.identity}
    text = session if prepared.measure else None
    for note in (*prepared.said, *_said(prepared, session)):
        (progress or Silent()).note(note)
    if session or any(exporter.method is None for exporter in exporters):  # bitsandbytes runs on torch
        import torch

        torch.set_num_threads(used)
    done = run(
        checkpoint,
        exporters,
        wanted.folder,
        statistics=matrix,
        text=text,
        provenance=matrix.keys() if matrix else text.keys(all(_hessians(exporters))) if text else {},
        identity=identity,
        dropping=dropping,
        force=wanted.force,
        restart=wanted.restart,
        memory=wanted.memory_bytes,
        vram=wanted.vram_bytes,
        ray=wanted.ray,
        progress=progress,
    )
    coverage = done.coverage
    return QuantizeResult(
        files=tuple(dict.fromkeys(file for exported in done.exported for file in exported.files)),  # a card is shared
        exports=tuple(exporter.targets[0].path for exporter in exporters),
        plans=done.plans,
        source_bytes=(checkpoint.whole or checkpoint).nbytes,
        seconds=time.perf_counter() - started,
        threads=used,
        notes=prepared.notes
        + tuple(dict.fromkeys(note for exported in done.exported for note in exported.notes))
        + _said(prepared, session)
        + (coverage.notes() if coverage else ()),
        coverage=coverage,
        resumed=done.resumed,
        walk_seconds=done.seconds,
    )


@takes(CalibrationOptions)
def calibrate(
    model: str | Path | None = None,
    *,
    output: str | Path,
    force: bool = False,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CalibrateResult:
    """Run text through a checkpoint, on so many CPU threads (None: all), and write an importance matrix to the file `output`.

    `options` are the fields of `xent_quant.options.CalibrationOptions`. Holds an expert for each thread; the text's
    states are files. Raises the errors of `xent_quant.errors`.
    """
    started = time.perf_counter()
    wanted, used = CalibrationOptions(**options), _set_threads(threads)
    checkpoint = _open(model)
    file = _file_to_write(output, checkpoint, such_as="imatrix.gguf")
    import torch

    from calibration.session import Session
    from xent_quant.walk.collecting import collect

    torch.set_num_threads(used)
    session = Session(checkpoint, wanted)
    for note in session.notes:
        (progress or Silent()).note(note)
    matrix, coverage = collect(
        session,
        file,
        force=force,
        restart=restart,
        progress=progress or Silent(),
        memory=wanted.memory_bytes,
        vram=wanted.vram_bytes,
    )
    seconds = time.perf_counter() - started
    notes = (*checkpoint.notes, *session.notes, *coverage.notes())
    return CalibrateResult(file, matrix.chunk_count * matrix.chunk_size, seconds, coverage, notes)


@takes(SensitivityOptions)
def sensitivity(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SensitivityResult:
    """Measure what a checkpoint loses by each quant type in each of its places, for plans (`size`, `max_kl`, `fit` of
    `quantize`), on so many CPU threads (None: all), and keep it in the file `output`; by default where they look for it, under
    ~/.cache/xent-quant.

    `options` are the fields of `xent_quant.options.SensitivityOptions`. Holds one expert, or one layer's attention, at a time;
    hidden states lie beside the file until it is done. Raises the errors of `xent_quant.errors`.
    """
    started = time.perf_counter()
    wanted, used = SensitivityOptions(**options), _set_threads(threads)
    checkpoint = _open(model)
    import torch

    from calibration.session import Session
    from xent_quant import sensitivities
    from xent_quant.walk.sensing import measure

    torch.set_num_threads(used)
    if output is None:
        file = sensitivities.kept(checkpoint)
        file.parent.mkdir(parents=True, exist_ok=True)
        force = True  # its own, measured anew
    else:
        file = _file_to_write(output, checkpoint, such_as="sensitivity.json")
    settings = {field.name: getattr(wanted, field.name) for field in fields(SensitivityOptions)}
    session = Session(checkpoint, CalibrationOptions(**settings, device="cpu"), spare=False)
    for note in session.notes:
        (progress or Silent()).note(note)
    found = measure(session, file, force=force, progress=progress)
    notes = (*checkpoint.notes, *session.notes)
    return SensitivityResult(file, found, session.text.windows.size, time.perf_counter() - started, notes)


def _file_to_write(output: str | Path, checkpoint: "Checkpoint", such_as: str) -> Path:
    """`output`. Raises ExportError where that is a folder or a file of the model itself (a .gguf beside it is none)."""
    file = Path(output)
    if file.is_dir():
        raise ExportError(f"{file}: is a folder; name the file to write, such as {file / such_as}")
    if file.exists() and any(file.samefile(part) for part in checkpoint.path.glob("*") if part.suffix != ".gguf"):
        raise ExportError(f"{file}: is a file of the model itself; choose another --output")
    return file


def require_runtimes(formats: Sequence[str], bits: int) -> None:
    """Raise, before the work of an export, where a runtime that `validate` would judge it in is not installed."""
    from xent_quant.targets import FORMATS
    from xent_quant.validation import runtimes

    for kind in (FORMATS[name].kind(bits) for name in formats):
        runtimes.require(kind, runtimes.NATIVE[kind])


@takes(ValidationOptions)
def validate(
    exported: str | Path,
    reference: str | Path | None = None,
    *,
    report: str | Path | None = None,
    json: str | Path | None = None,
    cache: str | Path | None = None,
    command: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> "Report":
    """Measure an export against its checkpoint on bundled suites and files (`NAME=PATH`); `verdict` of the result says
    whether it is within tolerance.

    `options` are the fields of `xent_quant.options.ValidationOptions`. Writes report.html and report.json into the folder
    `report`, and the JSON to `json`, where they are given. What the reference says is kept in `cache`; by default in `report`,
    else in ~/.cache/xent-quant. Raises the errors of `xent_quant.errors` for what cannot be compared.
    """
    wanted = ValidationOptions(**options)
    folder = Path(report) if report else None
    if folder and folder.exists() and not folder.is_dir():
        raise ValidationError(f"--report {folder}: is a file; name a folder for report.html and report.json")
    if json and Path(json).is_dir():
        raise ValidationError(f"--json {json}: is a folder; name the file to write")
    from xent_quant.storage import can_be_written

    for option, name, file in (("--report", folder, folder and folder / "report.html"), ("--json", json, json and Path(json))):
        if file and not can_be_written(file):
            raise ValidationError(f"{option} {name}: nothing can be written there; choose another")
    used = _set_threads(wanted.threads)
    checkpoint = _open(reference)
    from xent_quant.validation import suites, validate, write

    found = validate.validate(
        Path(exported),
        checkpoint,
        suites.choose(wanted.suites, wanted.suite_files),
        cache=Path(cache) if cache else (folder or Path.home() / ".cache" / "xent-quant") / "references",
        context=wanted.context,
        max_tokens=wanted.max_tokens,
        tolerance=wanted.tolerance,
        runtime=wanted.runtime,
        threads=used,
        command=command,
        progress=progress,
    )
    write.write(found, folder, Path(json) if json else None)
    return found


def _read_imatrix(options: Options, checkpoint: "Checkpoint") -> "Imatrix | None":
    if options.imatrix is None:
        return None
    from calibration.imatrix import Imatrix

    statistics = Imatrix.read(Path(options.imatrix))
    statistics.check(checkpoint.architecture)
    return statistics


def _set_threads(threads: int | None) -> int:
    """Threads that kernels use; all that there are where None is given."""
    import numba

    available = int(numba.config.NUMBA_NUM_THREADS)
    if threads is not None and not 1 <= threads <= available:
        raise ConfigError(f"--threads: {threads} is not between 1 and the {available} that this machine offers")
    numba.set_num_threads(threads or available)
    return threads or available
