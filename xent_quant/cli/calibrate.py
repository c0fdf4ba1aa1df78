"""`xent-quant calibrate MODEL --output FILE`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from xent_quant.cli.options import Json, Threads, Verbose, group
from xent_quant.options import CalibrationOptions


def calibrate(
    model: Annotated[str | None, Parameter(help="Checkpoint folder or Hub id. Default: the bundled miniature.")] = None,
    /,
    *,
    output: Annotated[Path, Parameter(help="The file to write, in llama-imatrix's GGUF format.")] = Path("imatrix.gguf"),
    calibration: Annotated[CalibrationOptions, group("Calibration", 2)] = CalibrationOptions(),
    force: Annotated[bool, Parameter(help="Replace an existing file.")] = False,
    restart: Annotated[bool, Parameter(help="Begin anew instead of going on with what an interrupted run left.")] = False,
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Run text through MODEL and keep the activations' statistics, per expert, for --imatrix or llama-quantize."""
    from xent_quant import pipeline
    from xent_quant.cli import show

    with show.progress() as progress:
        result = pipeline.calibrate(
            model, output=output, force=force, restart=restart, threads=threads, progress=progress, **calibration.given
        )
    show.as_json(result.to_json()) if json else show.calibrated(result)
