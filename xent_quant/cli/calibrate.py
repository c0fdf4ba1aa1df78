"""`xent-quant calibrate MODEL --output FILE`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from xent_quant.cli.options import Calib, CalibMix, Device, Json, Seed, SeqLen, TextField, Tokens, Verbose, parse_tokens


def calibrate(
    model: Annotated[str | None, Parameter(help="Checkpoint folder or Hub id. Default: the bundled miniature.")] = None,
    /,
    *,
    output: Annotated[Path, Parameter(help="The file to write, in llama-imatrix's GGUF format.")] = Path("imatrix.gguf"),
    calib: Calib = [],  # noqa: B006
    calib_mix: CalibMix = None,
    text_field: TextField = "text",
    tokens: Tokens = "128k",
    seqlen: SeqLen = 512,
    seed: Seed = 0,
    device: Device = "auto",
    force: Annotated[bool, Parameter(negative="", help="Replace an existing file.")] = False,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Run text through MODEL and keep the activations' statistics, per expert, for --imatrix or llama-quantize."""
    from calibration.session import Settings
    from xent_quant import pipeline
    from xent_quant.cli import show

    settings = Settings(calib, calib_mix, text_field, parse_tokens(tokens), seqlen, seed, device)
    with show.progress() as progress:
        result = pipeline.calibrate(model, output=output, calibration=settings, force=force, progress=progress)
    show.as_json(result.to_json()) if json else show.calibrated(result)
