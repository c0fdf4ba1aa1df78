"""The command line: options in, one library call, tables out.

Exit 0 done, 1 a user's error in one line (traceback with -vv), 2 usage, 3 validation out of tolerance, 130 interrupted.
Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

import sys
from typing import NoReturn

from cyclopts import App, CycloptsError, UnusedCliTokensError

from xent_quant import __version__
from xent_quant.cli.calibrate import calibrate
from xent_quant.cli.inspect import inspect
from xent_quant.cli.options import EVERY
from xent_quant.cli.quantize import quantize
from xent_quant.cli.validate import validate
from xent_quant.errors import XentQuantError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = App(
    name="xent-quant",
    version=__version__,
    help="Quantise an XVERSE mixture-of-experts checkpoint for the runtimes that people have.",
    help_format="plaintext",
    default_parameter=EVERY,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # main says what became of the files
)
app.default(quantize)
app.command(calibrate)
app.command(inspect)
app.command(validate)


def _verbosity(arguments: list[str]) -> int:
    """How often -v was given; read apart from parsing, since it decides how parsing errors are shown too."""
    return sum(
        len(argument) - 1 if argument.startswith("-v") and set(argument[1:]) == {"v"} else argument == "--verbose"
        for argument in arguments
    )


def _fail(message: str) -> NoReturn:
    print(f"xent-quant: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    import logging
    import os
    import signal

    # Threads of torch and llama.cpp wait for one another by spinning unless libgomp reads this when it is loaded. Beside other
    # work on the same cores two spinning threads are slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = sys.argv[1:] if arguments is None else arguments
    verbosity = _verbosity(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for ours in ("xent_quant", "exporters", "calibration"):
        logging.getLogger(ours).setLevel(logging.WARNING - 10 * min(verbosity, 2))
    try:
        for polite in ("SIGTERM", "SIGHUP"):  # they end as Ctrl-C does; Windows has but the first
            number = getattr(signal, polite, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _interrupt)
        app(arguments, exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        odd = " ".join(error.unused_tokens or ())
        print(f"xent-quant: {odd!r} is one argument too many. See xent-quant --help.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except CycloptsError as error:
        print(f"xent-quant: {' '.join(str(error).split())} See xent-quant --help.", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt as stop:
        print(f"xent-quant: interrupted{f'; {stop}' if stop.args else ''}.", file=sys.stderr)
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
