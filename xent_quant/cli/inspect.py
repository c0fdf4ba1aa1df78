"""`xent-quant inspect PATH`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from xent_quant.cli.options import Json, Verbose


def inspect(
    path: Annotated[Path, Parameter(help="Checkpoint folder, exported folder or .gguf file.")],
    /,
    *,
    reference: Annotated[
        str | None, Parameter(help="The checkpoint that the .gguf file was made from: print every tensor's error.")
    ] = None,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Describe a checkpoint or an exported file."""
    from xent_quant import inspection
    from xent_quant.cli import show

    with show.progress() as progress:
        description = inspection.describe(path, reference, progress=progress)
    show.as_json(description) if json else show.description(description)
