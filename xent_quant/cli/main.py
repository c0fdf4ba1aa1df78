"""The command line: options in, one library call, tables out.

Exit 0 done, 1 a user's error in one line (traceback with -vv), 2 usage, 3 validation out of tolerance, 130 interrupted.
Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

import sys
import traceback
from types import FrameType
from typing import NoReturn

from cyclopts import App, CycloptsError, UnusedCliTokensError

from xent_quant import __version__, memory
from xent_quant.cli import terminal
from xent_quant.cli.calibrate import calibrate
from xent_quant.cli.inspect import inspect
from xent_quant.cli.options import EVERY
from xent_quant.cli.quantize import quantize
from xent_quant.cli.sensitivity import sensitivity
from xent_quant.cli.validate import validate
from xent_quant.errors import XentQuantError, is_interrupt
from xent_quant.plain import plain

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
CALLED_BY_LLVM = "_raw_object_cache_"
"""What llvmlite's functions begin with that LLVM calls when something was compiled."""

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
app.command(sensitivity)
app.command(validate)


def _verbosity(arguments: list[str]) -> int:
    """How often -v was given; read apart from parsing, since it decides how parsing errors are shown too."""
    return sum(
        len(argument) - 1 if argument.startswith("-v") and set(argument[1:]) == {"v"} else argument == "--verbose"
        for argument in arguments
    )


def _fail(message: str) -> NoReturn:
    terminal.say(f"xent-quant: error: {message}")
    sys.exit(EXIT_ERROR)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal; a little later where LLVM is calling back, since ctypes would swallow what is raised there, and numba go
    on without what it compiled."""
    # What LLVM calls is the first of Python's that runs behind it, so no frame but this one is looked at.
    if frame is not None and frame.f_code.co_name.startswith(CALLED_BY_LLVM):
        import signal
        import threading

        threading.Timer(0.05, signal.raise_signal, (number,)).start()
        return
    raise KeyboardInterrupt


def _log(verbosity: int) -> None:
    """Warnings and, with -v, more to standard error."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(terminal.Record("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.captureWarnings(True)
    for ours in ("xent_quant", "exporters", "calibration"):
        logging.getLogger(ours).setLevel(logging.WARNING - 10 * min(verbosity, 2))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    import os

    # Threads of torch and llama.cpp wait for one another by spinning unless libgomp reads this when it is loaded. Beside other
    # work on the same cores two spinning threads are slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    memory.settle()
    with terminal.streams():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> None:
    """The command; what goes wrong becomes a line and an exit status."""
    import signal

    verbosity = _verbosity(arguments)
    _log(verbosity)
    try:
        for polite in ("SIGINT", "SIGTERM", "SIGHUP"):  # they end as Ctrl-C does; Windows has but the first two
            number = getattr(signal, polite, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _interrupt)
        try:
            app(arguments, exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()
    except UnusedCliTokensError as error:
        odd = " ".join(error.unused_tokens or ())
        terminal.say(f"xent-quant: {odd!r} is one argument too many. See xent-quant --help.")
        sys.exit(EXIT_USAGE)
    except CycloptsError as error:
        terminal.say(f"xent-quant: {error} See xent-quant --help.")
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt as stop:
        terminal.say(f"xent-quant: interrupted{f'; {stop}' if stop.args else ''}.")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if is_interrupt(error):
            terminal.say("xent-quant: interrupted.")
            sys.exit(EXIT_INTERRUPTED)
        if verbosity >= 2:
            for line in traceback.format_exc().split("\n"):
                print(plain(line), file=sys.stderr)
        if isinstance(error, XentQuantError):
            _fail(str(error))
        if isinstance(error, OSError):
            _fail(f"{error.filename or 'system'}: {error.strerror or error}")
        _fail(f"internal error ({type(error).__name__}: {error}); run again with -vv and report what it prints")


if __name__ == "__main__":
    main()
