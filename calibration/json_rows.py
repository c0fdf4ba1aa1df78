"""JSON in pieces: the rows of .json and .jsonl files of any size, of which one at a time is held."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibration.characters import kind, one_line
from calibration.chat import is_conversation
from xent_quant.errors import CalibrationError

ROW = 1 << 24
"""Characters of a row that are held. In a longer one, strings are cut at an eighth of it while reading."""


class TooLongError(Exception):
    """A value of more than ROW characters, even with its strings cut."""


class JsonStream:
    """JSON values one after the other out of a text that is never held whole."""

    _decode = json.JSONDecoder().raw_decode
    _space = re.compile(r"[ \t\n\r]*")

    def __init__(self, pieces: Iterator[str], path: Path, longest: int) -> None:
        self._pieces, self._path, self._longest = pieces, path, min(longest, ROW // 8)
        self._text, self._at = "", 0
        self._counted, self._line = 0, 1  # a position in the text and its line, so that no line end is counted twice
        self._cut = False

    def line(self) -> int:
        """The line that is being read."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            match = self._space.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, *expected: str) -> str:
        """One of these characters."""
        char = self.peek()
        if char not in expected or not char:
            raise self.error(f"expecting {' or '.join(map(repr, expected))}")
        self._at += 1
        return char

    def value(self) -> Any:
        """The next value, long strings cut. Raises TooLongError, and CalibrationError naming the line."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._unfinished(error) and self._more():
                    continue
                raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested too deeply
                raise self.error(one_line(error)) from error
            if end == len(self._text) and self._text[self._at] not in '[{"' and self._more():  # 12 may go on as 123
                continue
            self._at = end
            return value

    def error(self, message: str, at: int | None = None) -> CalibrationError:
        """Names file and line, of a position in the text that is held."""
        line = self.line() + (self._text.count("\n", self._at, at) if at else 0)
        remedy = "a .jsonl file has one object a line" if kind(self._path) == ".jsonl" else "a .json file is an array of objects"
        return CalibrationError(f"{self._path}, line {line}: not JSON ({message}); {remedy}")

    def _unfinished(self, error: json.JSONDecodeError) -> bool:
        # An unfinished string is complained of where it starts; everything else at most a word before the end.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 12

    def _more(self) -> bool:
        """Twice as much text as is held; False at the end."""
        held = len(self._text) - self._at
        if held >= ROW:
            if self._cut:
                raise TooLongError
            self._cut = True
            self.line()
            whole, rest = self._text[self._at :], self._pieces
            self._pieces = _cut_strings((piece for part in ([whole], rest) for piece in part), self._longest)
            self._text, self._at, self._counted = next(self._pieces, ""), 0, 0
            return True
        pieces: list[str] = []
        size = 0
        while size < max(held, 1):
            piece = next(self._pieces, None)
            if piece is None:
                break
            pieces.append(piece)
            size += len(piece)
        self.line()
        self._text, self._at, self._counted = self._text[self._at :] + "".join(pieces), 0, 0
        return size > 0


STRING_PART = re.compile(r'[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u]|"')
STRING_PARTS = re.compile(r'(?:[^"\\]+|\\u[0-9a-fA-F]{4}|\\[^u])++|"')  # possessive: no way back is kept


def _cut_strings(pieces: Iterator[str], longest: int) -> Iterator[str]:
    """JSON text with its strings cut at `longest` characters, written as they are; begins outside of a string."""
    inside, kept, rest = False, 0, ""
    for piece in pieces:
        piece, at = rest + piece, 0
        rest = ""
        made: list[str] = []
        while at < len(piece):
            if not inside:
                end = piece.find('"', at) + 1 or len(piece)
                inside, kept = piece[end - 1] == '"', 0
                made.append(piece[at:end])
                at = end
                continue
            part = (STRING_PART if kept < longest else STRING_PARTS).match(piece, at)
            if part is None and len(piece) - at < 6:  # an escape that goes on in the next piece
                rest = piece[at:]
                break
            token = part[0] if part else piece[at]
            if token == '"' or not part:
                inside = not part
                made.append(token)
            elif kept < longest and token[0] == "\\":
                made.append(token if kept + len(token) <= longest else "")
                kept += len(token)
            else:
                made.append(token[: max(0, longest - kept)])
                kept += len(token)
            at += len(token)
        yield "".join(made)
    yield rest


def json_rows(stream: JsonStream, fields: tuple[str, ...], path: Path) -> Iterator[tuple[Any, str]]:
    """Rows and where they are: elements of arrays, objects one after the other, or the elements of the one list of an object that
    has none of `fields` itself; .jsonl has nothing but one row after the other."""
    line_wise = kind(path) == ".jsonl"
    before = 0
    while char := stream.peek():
        where = f", line {stream.line()}"
        if char == "[" and not line_wise:
            yield from _elements(stream)
        elif char != "{" or line_wise:
            yield stream.value(), where
        else:
            try:
                row = stream.value()
            except TooLongError:
                yield from _elements_of_object(stream)
            else:
                if before or stream.peek():  # a file of lines, whatever its name
                    yield row, where
                else:
                    yield from _rows_of_object(row, fields, where, path)
        before += 1


def _rows_of_object(row: dict[str, Any], fields: tuple[str, ...], where: str, path: Path) -> Iterator[tuple[Any, str]]:
    lists = [name for name, value in row.items() if isinstance(value, list)]
    is_row = any(name in row and (name not in lists or is_conversation(row[name])) for name in fields)
    if is_row or not lists:
        yield row, where
    elif len(lists) > 1:
        raise CalibrationError(f"{path}: an object with several lists ({', '.join(lists[:12])}); give an array of objects")
    else:
        for number, element in enumerate(row[lists[0]], 1):
            yield element, f", row {number}"


def _elements(stream: JsonStream) -> Iterator[tuple[Any, str]]:
    stream.take("[")
    number = 0
    if stream.peek() == "]":
        stream.take("]")
        return
    while True:
        number += 1
        yield stream.value(), f", row {number}"
        if stream.take(",", "]") == "]":
            return


def _elements_of_object(stream: JsonStream) -> Iterator[tuple[Any, str]]:
    """Of an object too long to be held, the elements of its one list."""
    stream.take("{")
    lists = 0
    while True:
        if stream.peek() != '"':
            raise stream.error("expecting a name in double quotes")
        stream.value()
        stream.take(":")
        if stream.peek() != "[":
            stream.value()
        elif lists:
            raise stream.error("an object with several lists")
        else:
            lists += 1
            yield from _elements(stream)
        if stream.take(",", "}") == "}":
            return
