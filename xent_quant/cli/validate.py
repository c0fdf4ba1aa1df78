"""`xent-quant validate EXPORTED --reference MODEL`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from xent_quant.cli.options import EXIT_OUT_OF_TOLERANCE, Verbose, group
from xent_quant.options import JudgeOptions, SuiteOptions

RESULT = group("Results", 3).group


def _no_option(_: object, value: Path | None) -> None:
    """Raise ValueError for the option that stands where a file should."""
    if value is not None and str(value).startswith("-") and str(value) != "-":
        raise ValueError("takes a file, or - for stdout")


def validate(
    exported: Annotated[Path, Parameter(help="A .gguf file (the first shard of several), or an exported folder.")],
    /,
    *,
    reference: Annotated[
        str | None,
        Parameter(help="The checkpoint that it was made from: folder or Hub id. Default: the bundled miniature."),
    ] = None,
    text: Annotated[SuiteOptions, group("What is scored", 1)] = SuiteOptions(),
    judge: Annotated[JudgeOptions, group("How it is judged", 2)] = JudgeOptions(),
    report: Annotated[
        Path | None,
        Parameter(
            group=RESULT,
            help="Folder for report.html, report.json and the reference's results, which by default go to ~/.cache/xent-quant.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        Parameter(
            group=RESULT,
            allow_leading_hyphen=True,
            validator=_no_option,
            help="Write the result to this file as JSON; - for stdout.",
        ),
    ] = None,
    verbose: Verbose = 0,
) -> None:
    """Measure an export against its checkpoint; exit 0 within tolerance or undecided (too little text), 3 out of it."""
    from xent_quant import pipeline
    from xent_quant.cli import show, show_validation

    if reference is None:
        show.note("No --reference given: using the bundled miniature, xent-mini.")
    with show.progress() as progress:
        result = pipeline.validate(
            exported,
            reference,
            report=report,
            json=json if json and str(json) != "-" else None,
            command=shlex.join(["xent-quant", *sys.argv[1:]]),
            progress=progress,
            **text.given,
            **judge.given,
        )
    show.as_json(result.to_json()) if str(json) == "-" else show_validation.report(result, report)
    if result.verdict == "out":
        sys.exit(EXIT_OUT_OF_TOLERANCE)
