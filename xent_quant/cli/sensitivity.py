"""`xent-quant sensitivity MODEL`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from xent_quant.cli.options import Json, Threads, Verbose, group
from xent_quant.options import SensitivityOptions


def sensitivity(
    model: Annotated[str | None, Parameter(help="Checkpoint folder or Hub id. Default: the bundled miniature.")] = None,
    /,
    *,
    output: Annotated[Path | None, Parameter(help="The file to write. Default: where plans look for it.")] = None,
    text: Annotated[SensitivityOptions, group("Text", 2)] = SensitivityOptions(),
    force: Annotated[bool, Parameter(help="Replace an existing file.")] = False,
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Measure what each quant type loses in each place of MODEL, for --size, --max-kl, --fit and --ram."""
    from xent_quant import pipeline
    from xent_quant.cli import show

    with show.progress() as progress:
        result = pipeline.sensitivity(model, output=output, force=force, threads=threads, progress=progress, **text.given)
    show.as_json(result.to_json()) if json else show.sensed(result)
