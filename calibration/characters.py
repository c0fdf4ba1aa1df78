"""From a file's bytes to its characters, in pieces: unpacked (.gz, .zst), decoded, never the whole file at once.

UTF-8 unless a byte order mark or the bytes say otherwise. Of what is not UTF-8, charset-normalizer judges the first piece that
is not ASCII, among encodings that text is found in; the person is told. A NUL is in no text: such a file is refused.
"""

import codecs
import gzip
import io
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Protocol

from calibration.notes import Notes
from xent_quant.errors import CalibrationError

PACKED = (".gz", ".zst")
CHUNK = 1 << 16
"""Bytes or characters that are read at a time."""

SAMPLE = 1 << 18
"""Bytes that the encoding is judged by."""

UNPACKED = 1 << 30
"""Bytes that a packed file may have where a reader has to seek in it."""

DAMAGED = "download or copy it again"
WIDE = f"{DAMAGED}; if it was made with --long, unpack it by zstd -d --long=31"
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which begins it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CANDIDATES = ["gb18030", "cp950", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1252"]
CALLED = {"cp950": "Big5", "big5hkscs": "Big5-HKSCS", "cp932": "Shift JIS", "cp949": "EUC-KR", "cp1252": "Windows-1252"}
CHAOS = 0.5
"""charset-normalizer's threshold. At its default of 0.2, one Chinese sample of 200 to 1,000 characters in 15 has no encoding;
at 0.5 none, and what is taken for another encoding are samples of 40 characters as before."""

EVIDENCE = 64
"""Bytes beyond ASCII below which a guess between Chinese, Japanese and Korean encodings is a gamble."""

BROKEN = 0.05
"""Text with so few wrong bytes for every right character beyond ASCII is damaged UTF-8, not another encoding."""


class Readable(Protocol):
    """Bytes, some at a time."""

    def read(self, size: int, /) -> bytes: ...


class _Unpacked:
    """A decompressor whose errors are one line."""

    def __init__(self, path: Path, stream: Readable, failures: tuple[type[Exception], ...], remedy: str) -> None:
        self._path, self._stream, self._failures, self._remedy = path, stream, failures, remedy

    def read(self, size: int, /) -> bytes:
        try:
            return self._stream.read(size)
        except self._failures as error:
            raise CalibrationError(f"{self._path}: cannot be unpacked ({one_line(error)}); {self._remedy}") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def kind(path: Path) -> str:
    """The suffix that tells what is in a file, packed or not: .jsonl of a.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


def _opened(path: Path) -> BinaryIO:
    """Raises CalibrationError where it is no file: opening a pipe that nobody writes to would never return."""
    if path.exists() and not path.is_file():
        raise CalibrationError(f"{path}: is not a regular file; give one, or a folder")
    return path.open("rb")


@contextmanager
def unpacked(path: Path) -> Iterator[Readable]:
    """The bytes of a file, .gz and .zst unpacked. Raises OSError, and CalibrationError for damaged ones."""
    with _opened(path) as file:
        match path.suffix.lower():
            case ".gz":
                with gzip.GzipFile(fileobj=file) as stream:
                    yield _Unpacked(path, stream, (gzip.BadGzipFile, EOFError, zlib.error), DAMAGED)
            case ".zst":
                try:
                    import pyarrow
                except ImportError as error:
                    raise CalibrationError(
                        f"{path}: reading .zst needs pyarrow; pip install 'xent-quant[parquet]', or unpack it by zstd -d"
                    ) from error
                yield _Unpacked(path, pyarrow.CompressedInputStream(file, "zstd"), (pyarrow.ArrowException, OSError), WIDE)
            case _:
                yield file


@contextmanager
def seekable(path: Path) -> Iterator[IO[bytes]]:
    """A file that can be sought in; a packed one is unpacked to a temporary file first. Raises as `unpacked` does."""
    if path.suffix.lower() not in PACKED:
        with _opened(path) as file:
            yield file
        return
    with unpacked(path) as stream, tempfile.TemporaryFile() as copy:
        while piece := stream.read(CHUNK):
            if copy.tell() + len(piece) > UNPACKED:
                raise CalibrationError(f"{path}: unpacks to more than {UNPACKED >> 30} GiB; unpack it yourself")
            copy.write(piece)
        copy.seek(0)
        yield copy


def characters(stream: Readable, path: Path, notes: Notes) -> Iterator[str]:
    """The text of a stream in pieces, line ends as \\n, without byte order mark. Raises CalibrationError naming the byte."""
    piece = _at_least(stream, b"", max(CHUNK, 4))  # a byte order mark in one piece
    encoding, ended, offset = "", not piece, 0
    for mark, name in MARKS:
        if piece.startswith(mark):
            piece, encoding, offset = piece[len(mark) :], name, len(mark)
            if name != "utf-8":
                notes.add(f"read as {name[:6].upper()} (byte order mark)", path)
            break
    decoder = codecs.getincrementaldecoder(encoding or "ascii")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    while piece or not ended:
        if not encoding and not piece.isascii():
            piece = _at_least(stream, piece, SAMPLE)
            if b"\0" not in piece:
                encoding = _detect(piece, path, offset, notes)
                decoder = codecs.getincrementaldecoder(encoding)()
        held = len(decoder.getstate()[0])
        try:
            # A NUL comes first: of a binary file nobody wants to know where it stops to be text.
            text = "\0" if not encoding and b"\0" in piece else decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise CalibrationError(_undecodable(path, encoding, offset - held + error.start)) from error
        if "\0" in text:
            raise CalibrationError(f"{path}: a binary file, not text (it holds NUL bytes); if it is text, convert it to UTF-8")
        yield newlines.decode(text, final=not piece)
        offset += len(piece)
        ended = not piece
        piece = stream.read(CHUNK)


def _at_least(stream: Readable, piece: bytes, size: int) -> bytes:
    pieces, there = [piece], len(piece)
    while there < size and (more := stream.read(size - there)):
        pieces.append(more)
        there += len(more)
    return b"".join(pieces)


def _undecodable(path: Path, encoding: str, byte: int) -> str:
    name = CALLED.get(encoding, encoding.upper())
    return f"{path}: not {name} at byte {byte:,}; convert it, for example: iconv -c -f {encoding.upper()} -t UTF-8"


def _detect(sample: bytes, path: Path, offset: int, notes: Notes) -> str:
    """The encoding of a sample that is not ASCII."""
    decoder = codecs.getincrementaldecoder("utf-8")
    try:
        decoder().decode(sample, final=len(sample) < SAMPLE)
    except UnicodeDecodeError as error:
        text = sample.decode("utf-8", "replace")
        wrong = text.count("�")
        if wrong <= BROKEN * (sum(char > "\x7f" for char in text) - wrong):
            raise CalibrationError(_undecodable(path, "utf-8", offset + error.start)) from error
    else:
        return "utf-8"
    from charset_normalizer import from_bytes

    if len(sample) >= SAMPLE:  # cut behind a line, else a character may be cut in two
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    for cut in range(4):
        best = from_bytes(sample[: len(sample) - cut], cp_isolation=CANDIDATES, threshold=CHAOS).best()
        if best is not None:
            break
    beyond = sum(byte > 127 for byte in sample)
    # Windows-1252 gives every byte a meaning, but Western text is ASCII for the most part.
    if best is None or (beyond > len(sample) / 4 if best.encoding == "cp1252" else beyond < EVIDENCE):
        raise CalibrationError(f"{path}: neither UTF-8 nor another encoding that can be told; convert it to UTF-8")
    encoding = best.encoding
    if encoding == "big5hkscs" and _decodes(sample, "cp950"):  # Windows' Big5 is the common one; they differ in signs
        encoding = "cp950"
    notes.add(f"read as {CALLED.get(encoding, encoding.upper())} (detected; convert to UTF-8 if that is wrong)", path)
    return encoding


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


def lines(pieces: Iterator[str], longest: int) -> Iterator[str]:
    """Lines with their ends; what is longer than `longest` comes in parts without."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        start = 0
        while (end := piece.find("\n", start) + 1) > 0:
            yield "".join(held) + piece[start:end]
            held, size, start = [], 0, end
        if start < len(piece):
            held.append(piece[start:])
            size += len(piece) - start
            if size >= longest:
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)


NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
"""Control characters, byte order marks and lone halves of surrogate pairs."""


def clean(text: str, path: Path, notes: Notes) -> str:
    """Without the characters that are no text; form feeds end a line."""
    if not NO_TEXT.search(text):
        return text
    text, removed = NO_TEXT.subn("", text.replace("\f", "\n").replace("\v", "\n"))
    notes.add("{n} control character{s} (or halves of characters) left out", path, removed)
    return text
