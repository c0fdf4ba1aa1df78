"""Text of an EPUB: its chapters in the order of the spine.

Markup is read by a scanner that knows no entities but HTML's named characters, resolves nothing outside the file and takes time
in proportion to its input: html.parser needs 30 s for 40 kB of `<a <a <a`, and XML's entities can grow without bound.
"""

import html
import lzma
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote

from calibration.characters import DAMAGED, characters, one_line
from calibration.notes import Notes
from xent_quant.errors import CalibrationError

LARGEST_PART = 1 << 24
"""Bytes of one file within a book."""

LARGEST_BOOK = 1 << 28
"""Bytes of all chapters of a book."""

SKIPPED = {"head", "script", "style", "template", "svg", "math", "rt", "rp"}
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "div", "dl", "dt", "figcaption", "figure"),
    *("footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section", "table"),
    *("tr", "ul"),
}
DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    KeyError,
    ValueError,
    OverflowError,
    MemoryError,
    IndexError,
)
"""What zipfile raises on hostile files; RuntimeError for encrypted ones."""

TAG = re.compile(r"<[A-Za-z/!?_:]")
TAG_NAME = re.compile(r"[^\s/>]*")
ATTRIBUTE = re.compile(r"""(?<![\w:.-])([\w:.-]++)\s*+=\s*(?:"([^"]*)"|'([^']*)')""")
QUOTE_OR_END = re.compile("[>\"']")
SPACES = re.compile("[ \t\r\n]+")
"""Without no-break and ideographic spaces, which are meant."""


def markup(text: str) -> Iterator[tuple[str, str]]:
    """("text", characters), ("start", inside of the tag), ("end", name) in order; comments and declarations left out."""
    at = 0
    while at < len(text):
        opening_tag = TAG.search(text, at)
        start = opening_tag.start() if opening_tag else len(text)
        if start > at:
            yield "text", html.unescape(text[at:start])
        if start == len(text):
            return
        for opening, closing in (("<!--", "-->"), ("<![CDATA[", "]]>"), ("<?", "?>")):
            if text.startswith(opening, start):
                end = text.find(closing, start + len(opening))
                end = end if end >= 0 else len(text)
                if opening == "<![CDATA[":
                    yield "text", text[start + len(opening) : end]
                at = end + len(closing)
                break
        else:
            end = start
            while (found := QUOTE_OR_END.search(text, end + 1)) and found[0] != ">":
                end = text.find(found[0], found.end())
                if end < 0:
                    return
            if not found:
                return
            inside, at = text[start + 1 : found.start()], found.end()
            if inside.startswith("/"):
                yield "end", _name(inside[1:])
            elif not inside.startswith("!"):
                yield "start", inside
                if inside.endswith("/"):
                    yield "end", _name(inside)


def _name(inside: str) -> str:
    match = TAG_NAME.match(inside)
    return match[0].lower().rpartition(":")[2] if match else ""


def _attributes(inside: str) -> dict[str, str]:
    return {name: html.unescape(double or single) for name, double, single in ATTRIBUTE.findall(inside)}


def chapter_text(text: str) -> str:
    """What a reader sees of an XHTML page: a line for every block, spaces as HTML has them."""
    made: list[str] = []
    inside: Counter[str] = Counter()
    for what, value in markup(text):
        if what == "text":
            if not inside.total():
                made.append(SPACES.sub(" ", value))
            continue
        name = _name(value) if what == "start" else value
        if name in SKIPPED:
            inside[name] = max(0, inside[name] + (1 if what == "start" else -1))
        elif name in BLOCKS:
            inside["rt"] = inside["rp"] = 0  # HTML lets their ends out
            made.append("\n")
    lines = (line.strip(" ") for line in "".join(made).split("\n"))
    return "\n".join(line for line in lines if line)


class _Book:
    def __init__(self, file: IO[bytes], path: Path, notes: Notes) -> None:
        self._archive, self._path, self._notes = zipfile.ZipFile(file), path, notes
        self._read = 0

    def part(self, name: str) -> str:
        """The text of a file within the book, cut at LARGEST_PART."""
        with self._archive.open(name) as stream:
            limited = _Limited(stream)
            # Notes on encodings are the book's.
            text = "".join(characters(limited, self._path, self._notes))
        self._read += limited.read_so_far
        if self._read > LARGEST_BOOK:
            raise CalibrationError(f"{self._path}: its chapters unpack to more than {LARGEST_BOOK >> 20} MiB; not a book")
        return text

    def has(self, name: str) -> bool:
        return name in self._archive.NameToInfo

    def chapters(self) -> list[str]:
        """Names of the spine's pages."""
        package = next(
            (
                _attributes(value).get("full-path", "")
                for what, value in markup(self.part("META-INF/container.xml"))
                if what == "start" and _name(value) == "rootfile"
            ),
            "",
        )
        pages: dict[str, str] = {}
        spine: list[str] = []
        for what, value in markup(self.part(package)):
            if what != "start":
                continue
            attributes = _attributes(value)
            if _name(value) == "item" and "html" in attributes.get("media-type", ""):
                pages[attributes.get("id", "")] = _joined(package, attributes.get("href", ""))
            elif _name(value) == "itemref":
                spine.append(attributes.get("idref", ""))
        return [pages[page] for page in dict.fromkeys(spine) if page in pages]

    def encrypted(self) -> set[str]:
        if not self.has("META-INF/encryption.xml"):
            return set()
        return {
            unquote(_attributes(value).get("URI", ""))
            for what, value in markup(self.part("META-INF/encryption.xml"))
            if what == "start" and _name(value) == "cipherreference"
        }


class _Limited:
    """The first LARGEST_PART bytes of a stream."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.read_so_far = 0

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(min(size, LARGEST_PART - self.read_so_far))
        self.read_so_far += len(piece)
        return piece


def _joined(package: str, href: str) -> str:
    """A path within the archive from the package file's; `..` goes no higher than the archive."""
    parts: list[str] = []
    for part in (*PurePosixPath(package).parent.parts, *unquote(href.partition("#")[0]).split("/")):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def book(file: IO[bytes], path: Path, longest: int, notes: Notes) -> str:
    """The text of an EPUB in the order of its spine, about `longest` characters at most. Raises CalibrationError."""
    try:
        opened = _Book(file, path, notes)
        chapters = opened.chapters()
        if not chapters:
            raise CalibrationError(f"{path}: an EPUB without pages in its spine; convert it to .txt")
        encrypted = opened.encrypted()
        if encrypted & set(chapters):
            raise CalibrationError(f"{path}: its pages are encrypted (DRM); give a book without")
        texts: list[str] = []
        size = missing = 0
        for chapter in chapters:
            if not opened.has(chapter):
                missing += 1
                continue
            text = chapter_text(opened.part(chapter))
            texts += [text] if text else []
            size += len(text)
            if size >= longest:
                break
        notes.add("{n} page{s} of the spine not in the file", path, missing)
    except DAMAGES as error:
        raise CalibrationError(f"{path}: not a readable EPUB ({one_line(error)}); {DAMAGED}") from error
    return "\n\n".join(texts)
