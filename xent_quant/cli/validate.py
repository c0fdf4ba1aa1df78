"""`xent-quant validate EXPORTED --reference MODEL`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from xent_quant.cli.options import EXIT_OUT_OF_TOLERANCE, Verbose

TEXT = Group("What is scored", sort_key=1)
JUDGE = Group("How it is judged", sort_key=2)
RESULT = Group("Results", sort_key=3)


def validate(
    exported: Annotated[Path, Parameter(help="A .gguf file (the first shard of several), or an exported folder.")],
    /,
    *,
    reference: Annotated[
        str | None,
        Parameter(help="The checkpoint that it was made from: folder or Hub id. Default: the bundled miniature."),
    ] = None,
    suite: Annotated[
        list[str],
        Parameter(
            group=TEXT,
            negative="",
            consume_multiple=False,
            show_default=False,
            help="A bundled suite, XfictionZH for example; repeatable. Default: all six.",
        ),
    ] = [],  # noqa: B006  (cyclopts shows the default; it is never mutated)
    suite_file: Annotated[
        list[str],
        Parameter(
            group=TEXT,
            negative="",
            consume_multiple=False,
            show_default=False,
            help="NAME=PATH of a UTF-8 text of your own; repeatable.",
        ),
    ] = [],  # noqa: B006
    max_tokens: Annotated[int | None, Parameter(group=TEXT, help="Tokens of each suite, at most. Default: all.")] = None,
    context: Annotated[int, Parameter(group=TEXT, help="Length of the windows, of which the second half is scored.")] = 512,
    tolerance: Annotated[
        str | None,
        Parameter(
            group=JUDGE, help="8bit, 6bit, 5bit, 4bit, 3bit, 2bit, or ppl=1.03,kld=0.03,top1=0.92. Default: by the file's bits."
        ),
    ] = None,
    runtime: Annotated[
        Literal["auto", "llama.cpp", "onnxruntime", "transformers", "torch"],
        Parameter(
            group=JUDGE,
            help="What runs the export. torch: the exact path, weights dequantised and streamed, for what does not fit.",
        ),
    ] = "auto",
    threads: Annotated[int | None, Parameter(group=JUDGE, help="CPU threads. Default: all.")] = None,
    report: Annotated[
        Path | None,
        Parameter(
            group=RESULT,
            help="Folder for report.html, report.json and the reference's results, which by default go to ~/.cache/xent-quant.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        Parameter(group=RESULT, allow_leading_hyphen=True, help="Write the result to this file as JSON; - for stdout."),
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
            suites=suite,
            suite_files=suite_file,
            max_tokens=max_tokens,
            context=context,
            tolerance=tolerance,
            runtime=runtime,
            threads=threads,
            report=report,
            json=json if json and str(json) != "-" else None,
            command=shlex.join(["xent-quant", *sys.argv[1:]]),
            progress=progress,
        )
    show.as_json(result.to_json()) if str(json) == "-" else show_validation.report(result, report)
    if result.verdict == "out":
        sys.exit(EXIT_OUT_OF_TOLERANCE)
