"""The texts that are scored: six bundled suites, named as the released models' cards name them, and a person's own files.

A suite is text; the tokenizer comes from the model. The bundled files hold documents separated by a line `<|document|>`,
which become paragraphs of one text: what llama-perplexity would be given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from xent_quant.checkpoint.hub import expanded
from xent_quant.errors import ValidationError

NAMES = ("XfictionEN", "XfictionZH", "XconversationEN", "XconversationZH", "XwebccEN", "XwebccZH")
SEPARATOR = "<|document|>"
LARGEST = 1 << 26
"""Bytes of a suite; all of it is tokenised."""
GROUPS = {"fiction, conversation": ("Xfiction", "Xconversation"), "webcc": ("Xwebcc",)}
"""Suites that are averaged apart, by the beginning of their names, as the model card does."""


@dataclass(frozen=True)
class Suite:
    """A named text."""

    name: str
    text: str


def _suite(name: str, raw: str, source: str) -> Suite:
    documents = [part.strip("\n") for part in raw.replace("\r\n", "\n").split(f"{SEPARATOR}\n")]
    text = "\n\n".join(part for part in documents if part.strip())
    if not text:
        raise ValidationError(f"{source}: suite {name} is empty; put text in it")
    return Suite(name, text)


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValidationError(f"{path}: no such file; --suite-file takes NAME=PATH of a UTF-8 text")
    if path.stat().st_size > LARGEST:
        raise ValidationError(f"{path}: larger than {LARGEST >> 20} MiB, which is more than is ever scored; give a part of it")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path}: not UTF-8 (byte {error.start}); convert it") from error


def bundled(name: str) -> Suite:
    """One of NAMES. Raises ValidationError for another."""
    if name not in NAMES:
        raise ValidationError(f"--suite {name}: no such suite; there are {', '.join(NAMES)}, or give --suite-file {name}=PATH")
    path = Path(str(resources.files("xent_quant") / "data" / "suites" / f"{name}.txt"))
    return _suite(name, _read(path), str(path))


def choose(names: Sequence[str] = (), files: Sequence[str] = ()) -> list[Suite]:
    """Bundled suites by name and `NAME=PATH` files; all six where neither is given. Raises ValidationError."""
    if not names and not files:
        names = NAMES
    chosen = [bundled(name) for name in dict.fromkeys(names)]
    for item in files:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ValidationError(f"--suite-file {item}: write NAME=PATH")
        if name in {suite.name for suite in chosen}:
            raise ValidationError(f"--suite-file {item}: there is a suite {name} already; choose another name")
        chosen.append(_suite(name, _read(expanded(path)), path))
    return chosen
