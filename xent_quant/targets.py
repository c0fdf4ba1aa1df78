"""From options to exporters, one for each format and type asked for. Adding a format: a function here, and a line in
FORMATS."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from xent_quant.errors import ExportError, UnsupportedError
from xent_quant.options import AUTO, OnnxOptions, Options
from xent_quant.plain import plain

if TYPE_CHECKING:
    from exporters.bitsandbytes.plan import BnbPlan
    from exporters.budgets import Goal
    from exporters.gguf.plan import GGUFPlan
    from exporters.interface import Exporter
    from exporters.onnx.plan import ONNXPlan
    from xent_quant.checkpoint.dropping import KeptExperts
    from xent_quant.checkpoint.reader import Checkpoint
    from xent_quant.methods.interface import Method
    from xent_quant.sensitivities import Sensitivity
    from xent_quant.validation.runtimes import Kind


class Methods:
    """The method that the options name, by `name`; a new one for each export, since it keeps what its weights share.
    `use_statistics` tells whether there is anything to measure for."""

    def __init__(self, options: Options) -> None:
        from xent_quant.methods import AUTO, WITH_FILE

        self._effort = options.effort
        automatic = AUTO if options.imatrix is None else WITH_FILE
        self.name: str = automatic if options.method == "auto" else options.method
        self.use_statistics = self.name != "rtn" and bool(options.quantised)

    def new(self) -> "Method":
        """The method for one more export."""
        from xent_quant.methods import METHODS

        return METHODS[self.name](self._effort)


def exporters_of(checkpoint: "Checkpoint", options: Options, methods: Methods, said: tuple[str, ...] = ()) -> "list[Exporter]":
    """One exporter for each format asked for, and of GGUF for each type, in that order; plans have `said` what is known of this
    machine. Raises what planning raises: what can be refused is refused here."""
    from exporters.base_model import BaseModel

    fewer = f"-drop{checkpoint.kept.dropped}" if checkpoint.kept else ""
    name = plain(BaseModel.of(checkpoint.path).name + fewer if options.name is None else options.name)
    for option, given in (("--name", name), *([("--output", plain(options.file.name))] if options.file else ())):
        if not given or given.startswith(".") or any(character in given for character in "/\\<>"):
            raise ExportError(f"{option} '{given}': not a file name; give one without slashes, < > and control characters")
    exporters = [
        exporter for kind in options.formats for exporter in FORMATS[kind].plan(checkpoint, options, name, methods, said)
    ]
    _refuse_the_model_itself(checkpoint.path, options.folder, exporters)
    return exporters


def _refuse_the_model_itself(model: Path, output: Path, exporters: "list[Exporter]") -> None:
    """Raise ExportError where an export, or the card beside it, would replace files of the checkpoint."""
    folder = model.resolve()
    targets = [target.path.resolve() for exporter in exporters for target in exporter.targets if target.folder]
    if (
        output.resolve() == folder
        or (output.exists() and output.samefile(folder))
        or any(folder.is_relative_to(target) for target in targets)
    ):
        raise ExportError(f"{output}: is where the model itself lies, whose files would be replaced; choose another --output")


Plan = TypeVar("Plan", "GGUFPlan", "ONNXPlan", "BnbPlan")


def _told(plan: Plan, kept: "KeptExperts | None", said: tuple[str, ...] = ()) -> Plan:
    """The plan with notes on what it stands on and on experts that are left out."""
    from exporters.card import without

    notes = [*said, *plan.notes]
    if kept:
        notes.insert(0, without(kept))
        notes += ["What the experts that are left out lose comes on top of that."] if plan.expected else []
    return replace(plan, notes=tuple(notes))


def _gguf(checkpoint: "Checkpoint", options: Options, name: str, methods: Methods, said: tuple[str, ...]) -> "Iterator[Exporter]":
    from exporters.gguf import budget
    from exporters.gguf.export import GGUFExporter
    from exporters.gguf.plan import plan
    from xent_quant.machine import Machine
    from xent_quant.recipes import recipe

    def exporter(chosen: "GGUFPlan | Callable[[int], GGUFPlan]") -> GGUFExporter:
        return GGUFExporter(
            checkpoint,
            chosen,
            options.folder,
            name,
            methods.new(),
            stem=plain(options.file.stem) if options.file else None,
            split_size=options.split_bytes,
            allow_tokenizer_mismatch=options.allow_tokenizer_mismatch,
        )

    if known := _Budget.of(checkpoint, options, said):
        model, asked = checkpoint.architecture, known
        for_machine = options.fit is not None or options.ram is not None
        goal = budget.Goal(
            **(vars(known.goal) | {"vram": None}),
            machine=Machine(vram=options.fit_bytes, ram=options.ram_bytes, **options.bandwidths) if for_machine else None,
            speed=options.speed,
            kv=options.kv,
        )

        def planned(header: int) -> "GGUFPlan":
            made = budget.planned(model, asked.sensitivity, goal, header=header, method=methods.name, pad=options.pad)
            return _told(made, checkpoint.kept, asked.said)

        yield exporter(planned)
        return
    done: set[str] = set()
    for kind in options.mixes or (None,):
        chosen = recipe(
            bits=options.n_bits,
            type=kind,
            tensor_types=options.tensor_types,
            imatrix=methods.use_statistics,
            experts=checkpoint.architecture.num_experts > 0,
        )
        if chosen.name in done:
            continue
        done.add(chosen.name)
        yield exporter(_told(plan(checkpoint.architecture, chosen, pad=options.pad), checkpoint.kept))


@dataclass(frozen=True)
class _Budget:
    """What a plan is made of: its goal, what it stands on, and what is to be said of the machine."""

    goal: "Goal"
    sensitivity: "Sensitivity"
    said: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: "Checkpoint", options: Options, said: tuple[str, ...]) -> "_Budget | None":
        """None where the options ask for no plan."""
        if not options.planned:
            return None
        from exporters.budgets import Goal
        from exporters.interface import usual_context
        from xent_quant import sensitivities

        context = options.context or usual_context(checkpoint.architecture)
        goal = Goal(name=options.planned, size=options.size_bytes, max_kl=options.max_kl, vram=options.fit_bytes, context=context)
        return cls(goal, sensitivities.of(checkpoint.whole or checkpoint, options.sensitivity), said)


def with_this_machine(options: Options) -> tuple[Options, tuple[str, ...]]:
    """The options with what this machine has where they ask for it, and what is to be said of that. Once for a run: a measured
    bandwidth is another the next time."""
    asked = {field for field in ("fit", "ram") if getattr(options, field) == AUTO}
    if not asked:
        return options, ()
    from xent_quant import machine

    beside_ram = options.ram is not None
    measure = beside_ram and options.ram_bandwidth is None
    found, said = machine.read(fit="fit" in asked, ram="ram" in asked, beside_ram=beside_ram, measure=measure)
    if "gguf" not in options.formats:
        found.pop("vram_bandwidth", None)
    kept = {field: value for field, value in options.given.items() if value is not None and field not in asked}
    return Options(**found | kept), (said,)


def _onnx(checkpoint: "Checkpoint", options: Options, name: str, methods: Methods, said: tuple[str, ...]) -> "Iterator[Exporter]":
    try:
        from exporters.onnx.export import ONNXExporter
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise UnsupportedError("--format onnx: the package onnx is not installed: pip install 'xent-quant[onnx]'") from error
    from exporters.onnx import budget
    from exporters.onnx.plan import Settings, plan

    model = checkpoint.architecture
    settings = Settings(bits=options.n_bits, **{field.name: getattr(options, field.name) for field in fields(OnnxOptions)})
    known = _Budget.of(checkpoint, options, said)

    def within(header: int) -> "ONNXPlan":
        assert known is not None
        made = budget.planned(model, known.sensitivity, known.goal, settings, header=header, method=methods.name)
        return _told(made, checkpoint.kept, known.said)

    usual = _told(plan(model, settings), checkpoint.kept)
    yield ONNXExporter(checkpoint, usual, options.folder, name, methods.new(), within if known else None)


def _bnb(checkpoint: "Checkpoint", options: Options, name: str, methods: Methods, said: tuple[str, ...]) -> "Iterator[Exporter]":
    from exporters.bitsandbytes import budget
    from exporters.bitsandbytes.export import BnbExporter
    from exporters.bitsandbytes.plan import plan

    model, known = checkpoint.architecture, _Budget.of(checkpoint, options, said)
    kinds: dict[str, Any] = {"bits": options.n_bits, "bnb_type": options.bnb_type, "pad": options.pad}
    method = methods.new() if "bnb" in options.quantised else None

    def within(header: int) -> "BnbPlan":
        assert known is not None
        made = budget.planned(model, known.sensitivity, known.goal, **kinds, header=header, gptq=method is not None)
        return _told(made, checkpoint.kept, known.said)

    usual = _told(plan(model, **kinds), checkpoint.kept)
    yield BnbExporter(
        checkpoint, usual, options.folder, name, method, split_size=options.split_bytes, within=within if known else None
    )


@dataclass(frozen=True)
class FileFormat:
    """A format that can be asked for: `plan` makes its exporters; `kinds` is what `validate` takes its files for, by whether
    they are quantised."""

    plan: "Callable[[Checkpoint, Options, str, Methods, tuple[str, ...]], Iterator[Exporter]]"
    kinds: "dict[bool, Kind]"

    def kind(self, bits: int) -> "Kind":
        return self.kinds[bits < 16]


FORMATS: dict[str, FileFormat] = {
    "gguf": FileFormat(_gguf, {True: "gguf", False: "gguf"}),
    "onnx": FileFormat(_onnx, {True: "onnx", False: "onnx"}),
    "bnb": FileFormat(_bnb, {True: "bitsandbytes", False: "checkpoint"}),
}
"""By the name that --format takes."""
