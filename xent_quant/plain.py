"""Text from outside, made safe to show: a name, a path or a library's message moves no cursor, hides nothing and ends no line."""

import unicodedata

CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of characters that are not shown but do something: control characters, those that direct how others are
written (bidirectional overrides, joiners), halves of surrogate pairs, ends of lines and paragraphs."""


def plain(text: object) -> str:
    """`text` with such characters as Python writes them: an escape is \\x1b, a new line \\n, a right-to-left override \\u202e."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in CONTROLS else character
        for character in shown
    )


def markdown(text: object) -> str:
    """`text` as Markdown shows it, without being taken for markup."""
    return "".join(f"\\{character}" if character in "\\`*[]<>|&" else character for character in plain(text))
