"""From files to documents: texts of .txt, .md, .jsonl, .json, .csv, .tsv, .parquet and .epub, packed by .gz or .zst or not.

Nothing is held but the document that is being read, and that is cut at the length that can be used: neither a file of many
gigabytes nor one that unpacks to them is read whole. A row's text is a string, or a conversation (OpenAI's messages, ShareGPT's
conversations), which goes through the model's chat template.
"""

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration.characters import CHUNK, PACKED, characters, clean, kind, lines, one_line, seekable, unpacked
from calibration.chat import ChatTemplate, Refused, is_conversation, messages, plain
from calibration.epub import book
from calibration.json_rows import ROW, JsonStream, TooLongError, json_rows
from calibration.notes import Notes
from xent_quant.errors import CalibrationError

SEPARATOR = "<|document|>"
TEXT_FIELD = "text"
CHATS = ("messages", "conversations")
"""Fields that are taken where there is no `text`."""

LONGEST = 1 << 23
"""Characters of a document, unless the caller says otherwise."""

SHOWN = 12
"""Fields that an error lists."""


@dataclass(frozen=True)
class Reading:
    """How documents are read: the field of text, the chat template, characters of a document, and where notes go.

    Of a Parquet file only the rows whose column `where[0]` holds `where[1]` are read, if given; of rows of .json, .jsonl and
    .parquet those of which `wanted`, asked once for each, says so.
    """

    text_field: str = TEXT_FIELD
    chat: ChatTemplate | None = None
    longest: int = LONGEST
    notes: Notes = field(default_factory=Notes)
    where: tuple[str, str] | None = None
    wanted: Callable[[], bool] = lambda: True


def documents(
    path: Path,
    text_field: str = TEXT_FIELD,
    *,
    chat: ChatTemplate | None = None,
    longest: int = LONGEST,
    notes: Notes | None = None,
) -> Iterator[str]:
    """Texts of a file or of all readable files of a folder, in order of their names, each of at most `longest` characters; empty
    ones are left out.

    Raises CalibrationError naming file, line and remedy.
    """
    reading = Reading(text_field, chat, longest, notes or Notes())
    for file in _files(path, reading.notes) if path.is_dir() else [path]:
        yield from of_file(file, reading)


def have_fields(path: Path) -> bool:
    """Whether any file there is of rows with fields, of which one holds the text."""
    files = _files(path, Notes()) if path.is_dir() else [path]
    return any(READERS.get(kind(file)) not in (_plain, _epub) for file in files)


def of_file(path: Path, reading: Reading) -> Iterator[str]:
    """The texts of one file, see `documents`."""
    reader = READERS.get(kind(path))
    if reader is None:
        raise CalibrationError(
            f"{path}: cannot read {path.suffix or 'such'} files; give {', '.join(READERS)} (or .gz, .zst of them), or a folder"
        )
    try:
        for text in reader(path, reading):
            text = clean(text[: reading.longest], path, reading.notes)
            if text.strip():
                yield text
    except (OSError, MemoryError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "out of memory") or one_line(error)
        raise CalibrationError(f"{path}: {reason}") from error


def _files(folder: Path, notes: Notes) -> list[Path]:
    """Readable files of a folder in the order of their names, without hidden ones and what macOS and Jupyter leave behind."""
    found: list[Path] = []
    hidden = 0
    others: dict[str, int] = {}

    def failed(error: OSError) -> None:
        raise CalibrationError(f"{error.filename}: {error.strerror or error}") from error

    for root, folders, names in os.walk(folder, onerror=failed):
        left_out = [name for name in folders if _is_hidden(name)]
        hidden += sum(kind(file) in READERS for name in left_out for file in Path(root, name).rglob("*"))
        folders[:] = [name for name in folders if name not in left_out]
        for file in (Path(root, name) for name in names):
            if kind(file) not in READERS:
                others[file.suffix.lower() or "no suffix"] = others.get(file.suffix.lower() or "no suffix", 0) + 1
            elif _is_hidden(file.name):
                hidden += 1
            elif file.is_file():
                found.append(file)
    if not found:
        raise CalibrationError(f"{folder}: holds no {', '.join(READERS)} file; give text to calibrate on")
    notes.add("{n} hidden file{s} left out", folder, hidden)
    if others:
        kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(others.items())[:SHOWN])
        notes.add("{n} file{s} of other kinds left out", folder, sum(others.values()), kinds)
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


@contextmanager
def _pieces(path: Path, reading: Reading) -> Iterator[Iterator[str]]:
    with unpacked(path) as stream:
        yield characters(stream, path, reading.notes)


def _plain(path: Path, reading: Reading) -> Iterator[str]:
    held: list[str] = []
    size = 0
    begins = True
    with _pieces(path, reading) as pieces:
        for line in lines(pieces, CHUNK):
            if begins and line.strip() == SEPARATOR:
                if size <= reading.longest:
                    yield "".join(held).strip("\n")
                held, size = [], 0
            elif size <= reading.longest:
                held.append(line)
                size += len(line)
                if size > reading.longest:  # what follows up to the next separator is passed over
                    yield "".join(held).strip("\n")
                    held = []
            begins = line.endswith("\n")
    yield "".join(held).strip("\n")


def _epub(path: Path, reading: Reading) -> Iterator[str]:
    with seekable(path) as file:
        yield book(file, path, reading.longest, reading.notes)


class _Rows:
    """What the rows of one file give. Where all conversations were refused, `finish` raises."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self._path, self._reading = path, reading
        self._rendered = self._refused = 0
        self._reason = ""

    def field(self, names: Mapping[str, Any] | list[str], where: str) -> str:
        """Which field holds the text. Raises CalibrationError listing the fields."""
        wanted = self._reading.text_field
        if wanted in names:
            return wanted
        chats = [name for name in CHATS if name in names]
        if wanted == TEXT_FIELD and len(chats) == 1:
            self._reading.notes.add(f"no field {wanted!r}; {chats[0]!r} is taken", self._path)
            return chats[0]
        listed = [repr(name[:40]) for name in names][:SHOWN]
        there = ", ".join(listed) + (", …" if len(names) > SHOWN else "") if listed else "none"
        raise CalibrationError(
            f"{self._path}{where}: no text in field {wanted!r} (there are {there}); name the field by --text-field"
        )

    def of_object(self, row: Any, where: str) -> Iterator[str]:
        """The text of a JSON value: a string, or an object with a field of text."""
        if isinstance(row, str):
            yield row
        elif isinstance(row, dict):
            name = self.field(row, where)
            yield from self.of_value(row[name], name, where)
        else:
            raise CalibrationError(f"{self._path}{where}: {_called(row)} instead of an object with a field of text")

    def of_value(self, value: Any, name: str, where: str) -> Iterator[str]:
        """The text in a field: a string or a conversation; nothing where there is none."""
        if isinstance(value, str):
            yield value
        elif value is None or value == []:
            self._reading.notes.add("{n} row{s} without text (null) left out", self._path)
        elif is_conversation(value):
            yield from self._conversation(value)
        else:
            raise CalibrationError(
                f"{self._path}{where}: field {name!r} holds {_called(value)}, not text; name a field of text by --text-field"
            )

    def _conversation(self, value: list[dict[str, Any]]) -> Iterator[str]:
        conversation, dropped = messages(value)
        notes, template = self._reading.notes, self._reading.chat
        notes.add("{n} part{s} of messages left out, since no text (images, tool calls)", self._path, dropped)
        if template is None or not template.there:
            notes.add('{n} conversation{s} as lines "Role: text", since the model has no chat template', self._path)
            yield plain(conversation)
            return
        try:
            text = template.render(conversation, self._reading.longest)
        except Refused as error:
            self._refused += 1
            self._reason = self._reason or str(error)
            return
        self._rendered += 1
        yield text

    def finish(self) -> None:
        """To be called behind the last row."""
        if self._refused and not self._rendered:
            raise CalibrationError(
                f"{self._path}: the model's chat template refuses every conversation ({self._reason}); give them as text"
            )
        if self._refused:
            what = "{n} conversation{s} left out that the model's chat template refuses"
            self._reading.notes.add(what, self._path, self._refused, self._reason)


def _called(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case _:
            return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _json(path: Path, reading: Reading) -> Iterator[str]:
    rows = _Rows(path, reading)
    with _pieces(path, reading) as pieces:
        stream = JsonStream(pieces, path, reading.longest)
        try:
            for row, where in json_rows(stream, (reading.text_field, *CHATS), path):
                if reading.wanted():
                    yield from rows.of_object(row, where)
        except TooLongError:
            raise CalibrationError(
                f"{path}, line {stream.line()}: a row of more than {ROW:,} characters; give shorter ones"
            ) from None
    rows.finish()


def _csv(path: Path, reading: Reading) -> Iterator[str]:
    delimiter = "\t" if kind(path) == ".tsv" else ","
    rows = _Rows(path, reading)
    with _pieces(path, reading) as pieces:
        bounded = _bounded(lines(pieces, ROW), path)
        header = next((line for line in bounded if line.strip()), "")
        if delimiter == "," and header.count(";") > header.count(","):  # Excel's, where a comma is the decimal sign
            delimiter = ";"
        reader = csv.reader(_then(header, bounded), delimiter=delimiter, strict=True)
        names = _next_row(reader, path)
        if not names:
            return
        column = names.index(rows.field(names, ""))
        while (row := _next_row(reader, path)) is not None:
            if row:
                yield from rows.of_value(row[column] if column < len(row) else None, names[column], f", line {reader.line_num}")
    rows.finish()


def _bounded(found: Iterator[str], path: Path) -> Iterator[str]:
    for line in found:
        if len(line) >= ROW:
            raise CalibrationError(f"{path}: a line of more than {ROW:,} characters; give .txt or .jsonl")
        yield line


def _then(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _next_row(reader: Any, path: Path) -> list[str] | None:
    before = csv.field_size_limit(ROW)  # of the whole process, so it is put back
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise CalibrationError(
            f"{path}, line {reader.line_num}: not {kind(path)} ({one_line(error)}); quotes within quotes are doubled. "
            "Correct it, or give .jsonl"
        ) from error
    finally:
        csv.field_size_limit(before)
    return row


def _parquet(path: Path, reading: Reading) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(f"{path}: reading .parquet needs pyarrow; pip install 'xent-quant[parquet]'") from error
    rows = _Rows(path, reading)
    number = 0
    with seekable(path) as stream:
        try:
            file = parquet.ParquetFile(stream, buffer_size=CHUNK)
            names = file.schema_arrow.names
            name = rows.field(names, "")
            if names.count(name) > 1:
                raise CalibrationError(f"{path}: several columns are called {name!r}; rename them")
            kind_ = file.schema_arrow.field(name).type
            if not _may_hold_text(kind_):
                raise CalibrationError(f"{path}: column {name!r} holds {kind_}, not text; name a column of text by --text-field")
            chooser, choice = reading.where or (name, None)
            if chooser not in names:
                raise CalibrationError(
                    f"{path}: has no column {chooser!r} to choose rows by (there are {', '.join(names[:SHOWN])})"
                )
            # Few rows at a time: a row may be a book.
            for batch in file.iter_batches(batch_size=64, columns=[name, chooser]):
                chosen = batch.column(chooser)
                for index, value in enumerate(batch.column(name)):
                    number += 1
                    if (choice is None or chosen[index].as_py() == choice) and reading.wanted():
                        yield from rows.of_value(value.as_py(), name, f", row {number}")
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError, ValueError, OverflowError) as error:
            raise CalibrationError(f"{path}: not a readable Parquet file ({one_line(error)}); download it again") from error
    rows.finish()


def _may_hold_text(kind_: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind_):
        kind_ = kind_.value_type
    text = types.is_string(kind_) or types.is_large_string(kind_) or types.is_string_view(kind_) or types.is_null(kind_)
    chats = (types.is_list(kind_) or types.is_large_list(kind_)) and types.is_struct(kind_.value_type)
    return bool(text or chats)


READERS: dict[str, Callable[[Path, Reading], Iterator[str]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".epub": _epub,
}
SUFFIXES = (*READERS, *(suffix + packed for suffix in READERS for packed in PACKED))
"""Ends of the names of files that can be read."""
