"""Text from outside, made safe to show: a name, a path or a library's message moves no cursor, hides nothing and ends no line."""

import json
import os
import unicodedata
from contextlib import suppress
from typing import Any

CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of characters that are not shown but do something: control characters, those that direct how others are
written (bidirectional overrides, joiners), halves of surrogate pairs, ends of lines and paragraphs."""


def plain(text: object) -> str:
    """`text` with such characters as Python writes them: an escape is \\x1b, a new line \\n, a right-to-left override \\u202e.
    A name of a file that the system's encoding lacks is what it is in UTF-8."""
    shown = str(text)
    if shown.isprintable():
        return shown
    with suppress(UnicodeError):
        shown = shown.encode("utf-8", "surrogateescape").decode("utf-8")
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in CONTROLS else character
        for character in shown
    )


def file_name(text: str) -> str:
    """What the system calls a file of that name."""
    return os.fsdecode(text.encode())


def markdown(text: object) -> str:
    """`text` as Markdown shows it, without being taken for markup."""
    return "".join(f"\\{character}" if character in "\\`*[]<>|&" else character for character in plain(text))


def readable_json(value: Any, encoding: str = "utf-8", **options: Any) -> str:
    """json.dumps as people read it; in ASCII where there is a character that does something, or that the encoding lacks."""
    text = json.dumps(value, ensure_ascii=False, **options)
    readable = encoding.lower().startswith("utf") and all(line == plain(line) for line in text.split("\n"))
    return text if readable else json.dumps(value, **options)
