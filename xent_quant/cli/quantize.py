"""`xent-quant MODEL`: the main command."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from xent_quant.cli.options import EXIT_OUT_OF_TOLERANCE, Json, Verbose, group
from xent_quant.errors import ConfigError
from xent_quant.options import OnnxOptions, Options, OutputOptions, StatisticsOptions, TargetOptions, TensorOptions

if TYPE_CHECKING:
    from exporters.interface import PlanSummary
    from xent_quant.validation.report import Report

WRITING = group("Where and how to write", 4)


def quantize(
    model: Annotated[
        str | None,
        Parameter(help="Checkpoint folder, or Hub id such as xverse/XVERSE-Ent-A4.2B. Default: the bundled miniature."),
    ] = None,
    /,
    *,
    target: Annotated[TargetOptions, group("What to make", 1)] = TargetOptions(),
    statistics: Annotated[StatisticsOptions, group("Calibration", 2)] = StatisticsOptions(),
    tensors: Annotated[TensorOptions, group("Which type each tensor gets", 2)] = TensorOptions(),
    onnx: Annotated[OnnxOptions, group("ONNX only", 3, negative_bool="a")] = OnnxOptions(),  # --symmetric, --asymmetric
    writing: Annotated[OutputOptions, WRITING] = OutputOptions(),
    dry_run: Annotated[
        bool,
        Parameter(
            group=WRITING.group,
            help="Print every tensor, its type and bytes (of a plan its types by layer, and what else there would be), and what "
            "the run takes: VRAM, RAM, disk, time; write nothing.",
        ),
    ] = False,
    validate: Annotated[
        bool,
        Parameter(
            group=WRITING.group,
            help="Then measure every export against MODEL on the six suites; reports in OUTPUT/validation; exit 3 if one is out.",
        ),
    ] = False,
    plan_page: Annotated[
        Path | None,
        Parameter(
            group=WRITING.group,
            help="Of a plan (--size, --max-kl, --fit, --ram): draw it to this HTML file, with what else there would be, and with "
            "what reports in OUTPUT/validation measured.",
        ),
    ] = None,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Quantise MODEL and export it."""
    from xent_quant import pipeline
    from xent_quant.cli import show

    options = Options(**target.given, **statistics.given, **tensors.given, **onnx.given, **writing.given)
    if model is None:
        show.note("No MODEL given: using the bundled miniature, xent-mini.")
    if plan_page:
        from xent_quant.cli import plan_page as drawing

        if not options.planned:
            raise ConfigError(f"--plan-page {plan_page}: draws a plan; give --size, --max-kl, --fit or --ram, too")
        drawing.check(plan_page)
    if validate:
        pipeline.require_runtimes(options.formats, options.n_bits)
    if dry_run:
        plans = pipeline.plan(model, **options.given)
        _draw(plan_page, model, plans, options)
        taken, notes = pipeline.resources(model, **options.given)
        if json:
            show.as_json({"plans": [plan.to_json() for plan in plans], "resources": taken.to_json(), "notes": list(notes)})
        else:
            show.plans(plans)
            show.resources(taken, notes)
        return
    with show.progress() as progress:
        result = pipeline.quantize(model, progress=progress, **options.given)
    if not json:
        show.result(result)
    reports = _validate(result.exports, model, options, json) if validate else []
    _draw(plan_page, model, result.plans, options)
    if json:
        show.as_json(result.to_json() | ({"validation": [report.to_json() for report in reports]} if validate else {}))
    if any(report.verdict == "out" for report in reports):
        sys.exit(EXIT_OUT_OF_TOLERANCE)


def _draw(page: Path | None, model: str | None, plans: "Sequence[PlanSummary]", options: Options) -> None:
    """The page that --plan-page asks for."""
    if page:
        from xent_quant.cli import plan_page, show

        name = options.name or (Path(model).resolve().name if model else "xent-mini")
        plan_page.write(page, name, plans, options.folder / "validation")
        show.note(f"The plan: {page}")


def _validate(exports: Sequence[Path], model: str | None, options: Options, json: bool) -> "list[Report]":
    """Reports of the exports; their references are computed once."""
    from xent_quant import pipeline
    from xent_quant.cli import show, show_validation

    reports, validation = [], options.folder / "validation"
    for path in exports:
        folder = validation / path.stem
        with show.progress() as progress:
            report = pipeline.validate(
                path,
                model,
                threads=options.threads,
                report=folder,
                cache=validation / "references",
                command=shlex.join(["xent-quant", *sys.argv[1:]]),
                progress=progress,
            )
        if not json:
            show.out.print()
            show_validation.report(report, folder)
        reports.append(report)
    return reports
