"""What leaves the command for a terminal, a pipe or a log: plain text, in characters that the stream has, and nothing that can
end a run of hours because nobody reads it any more."""

import codecs
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from xent_quant.plain import plain

ERRORS = "xent_quant.spelled"
"""Name of the error handler of streams whose encoding lacks a character."""

SPELLED = {"→": "->", "…": "...", "×": "x", "·": "*", "—": "-", "±": "+-", "≤": "<=", "≥": ">=", "✓": "ok", "‖": "||", "−": "-"}
"""Characters that the command prints itself, for such streams."""

LONGEST_LINE = 1600
"""Of a message, in characters."""

GONE = (errno.EPIPE, errno.EIO, *((errno.EINVAL,) if os.name == "nt" else ()))
"""What writing to a pipe whose reader has ended, or a terminal that was closed, gives."""


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """A codecs error handler: one of our own characters in ASCII, any other as Python writes it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or c.encode("unicode_escape").decode() for c in lacking), error.end


codecs.register_error(ERRORS, _spelled)


class _Stream(io.FileIO):
    """A standard stream that takes everything as written once nobody reads it; of messages a full disk takes none either."""

    lost = False

    def write(self, data: Any) -> int:
        """Raises OSError where results, which go to standard output, cannot be written."""
        if not self.lost:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error.errno in GONE
                if self.fileno() == 1 and not self.lost:
                    self.lost = True
                    error.filename = "standard output"
                    raise
        return len(data)


def _opened(stream: TextIO | None) -> TextIO:
    """The stream that takes the place of one of the system's; of a closed one, one that goes nowhere."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a test's, or a notebook's
        number = -1
    if number not in (1, 2) or (os.name == "nt" and stream.isatty()):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Stream(number, "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, ERRORS, line_buffering=number == 2 or stream.isatty())


@contextmanager
def streams() -> Iterator[None]:
    """Within it standard output and standard error write what they can, and are there."""
    for number in range(3):  # else the next file that is opened becomes standard output, and libraries write into it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_opened, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Terminal(Console):
    """A console that prints strings as they are, without markup, and plain."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, alone or within a table, comes by here."""
        return super().render_str(plain(text), **options)


class Record(logging.Formatter):
    """A log record in one plain line, and the traceback behind it, if any."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return one_line(super().formatMessage(record))


def one_line(message: str) -> str:
    """A message, of a library perhaps, without the ends of its lines, and without its middle where a name in it has no end: who
    failed stands at its beginning, the remedy at its end."""
    line = plain(" ".join(line.strip() for line in message.splitlines() if line.strip()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"


def say(message: str) -> None:
    """One line to standard error."""
    print(one_line(message), file=sys.stderr, flush=True)
