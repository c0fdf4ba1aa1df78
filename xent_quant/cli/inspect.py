"""`xent-quant inspect PATH`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from xent_quant.cli.options import Json, Verbose


def inspect(
    path: Annotated[Path, Parameter(help="Checkpoint folder, ONNX folder or .gguf file.")],
    /,
    *,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Describe a checkpoint or an exported file."""
    from xent_quant import pipeline
    from xent_quant.cli import show

    description = pipeline.describe(path)
    show.as_json(description) if json else show.description(description)
