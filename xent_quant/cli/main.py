"""The command line: options in, one library call, tables out.

Exit 0 done, 1 a user's error in one line (traceback with -vv), 2 usage, 3 validation out of tolerance, 130 interrupted.
Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter

from xent_quant import __version__
from xent_quant.errors import XentQuantError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

QUANTISE = Group("What to make", sort_key=1)
TENSORS = Group("Which type each tensor gets", sort_key=2)
WRITING = Group("Where and how to write", sort_key=3)

app = App(
    name="xent-quant",
    version=__version__,
    help="Quantise an XVERSE mixture-of-experts checkpoint for the runtimes that people have.",
    help_format="plaintext",
    version_flags=["--version"],
)

Verbose = Annotated[int, Parameter(name=["-v", "--verbose"], count=True, help="Log what is done; -vv: tracebacks too.")]
Json = Annotated[bool, Parameter(negative="", help="Print the result to stdout as JSON.")]


@app.default
def quantize(
    model: Annotated[
        str | None,
        Parameter(help="Checkpoint folder, or Hub id such as xverse/XVERSE-Ent-A4.2B. Default: the bundled miniature."),
    ] = None,
    /,
    *,
    bits: Annotated[Literal[2, 3, 4, 5, 6, 8], Parameter(group=QUANTISE, help="Bits per weight, roughly; picks the mix.")] = 4,
    format: Annotated[
        list[Literal["gguf"]], Parameter(group=QUANTISE, negative="", consume_multiple=False, help="File format; repeatable.")
    ] = ["gguf"],  # noqa: B006  (cyclopts shows the default; it is never mutated)
    imatrix: Annotated[
        Path | None, Parameter(group=QUANTISE, help="Importance matrix (llama-imatrix's GGUF format), used per expert.")
    ] = None,
    effort: Annotated[
        Literal["fast", "normal", "high"], Parameter(group=QUANTISE, help="How long to search for scales and codes.")
    ] = "normal",
    type: Annotated[
        str | None, Parameter(group=TENSORS, help="A type or mix by its llama.cpp name (Q4_K_M), instead of --bits.")
    ] = None,
    tensor_type: Annotated[
        list[str],
        Parameter(
            group=TENSORS,
            negative="",
            consume_multiple=False,
            show_default=False,
            help="REGEX=TYPE on GGUF tensor names; repeatable, first match wins.",
        ),
    ] = [],  # noqa: B006
    pad: Annotated[
        Literal["auto", "never"],
        Parameter(group=TENSORS, help="Zero-pad the expert width where that saves bytes; the function stays the same."),
    ] = "auto",
    output: Annotated[Path, Parameter(group=WRITING, help="Folder for the results.")] = Path("out"),
    name: Annotated[str | None, Parameter(group=WRITING, help="Name of the model in file names. Default: the folder's.")] = None,
    split_size: Annotated[str | None, Parameter(group=WRITING, help="Split into shards of at most this size, e.g. 4G.")] = None,
    threads: Annotated[int | None, Parameter(group=WRITING, help="CPU threads. Default: all.")] = None,
    force: Annotated[bool, Parameter(group=WRITING, negative="", help="Replace existing output.")] = False,
    dry_run: Annotated[
        bool,
        Parameter(group=WRITING, negative="", help="Print every tensor, its type and bytes, and the VRAM needed; write nothing."),
    ] = False,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Quantise MODEL and export it."""
    from xent_quant import pipeline
    from xent_quant.cli import show

    options: dict[str, Any] = {
        "bits": bits,
        "type": type,
        "tensor_types": tensor_type,
        "imatrix": imatrix,
        "pad": pad,
    }
    if model is None:
        show.note("No MODEL given: using the bundled miniature, xent-mini.")
    if dry_run:
        planned = pipeline.plan(model, **options)
        show.as_json(planned.to_json()) if json else show.plan(planned)
        return
    with show.progress() as progress:
        result = pipeline.quantize(
            model,
            formats=format,
            effort=effort,
            output=output,
            name=name,
            split_size=show.parse_size(split_size) if split_size else None,
            threads=threads,
            force=force,
            progress=progress,
            **options,
        )
    show.as_json(result.to_json()) if json else show.result(result)


@app.command
def inspect(
    path: Annotated[Path, Parameter(help="Checkpoint folder or .gguf file.")],
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


def _verbosity(arguments: list[str]) -> int:
    """How often -v was given; read apart from parsing, since it decides how parsing errors are shown too."""
    return sum(
        len(argument) - 1 if argument.startswith("-v") and set(argument[1:]) == {"v"} else argument == "--verbose"
        for argument in arguments
    )


def _fail(message: str) -> NoReturn:
    print(f"xent-quant: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    import logging
    import signal

    arguments = sys.argv[1:] if arguments is None else arguments
    verbosity = _verbosity(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for ours in ("xent_quant", "exporters", "calibration"):
        logging.getLogger(ours).setLevel(logging.WARNING - 10 * min(verbosity, 2))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as Ctrl-C does
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        print(f"xent-quant: {' '.join(str(error).split())} See xent-quant --help.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        print("xent-quant: interrupted; nothing unfinished was left behind.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except XentQuantError as error:
        if verbosity >= 2:
            raise
        _fail(str(error))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_ERROR)
    except OSError as error:
        if verbosity >= 2:
            raise
        _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except Exception as error:
        if verbosity >= 2:
            raise
        _fail(f"internal error ({type(error).__name__}: {error}); run again with -vv and report what it prints")


if __name__ == "__main__":
    main()
