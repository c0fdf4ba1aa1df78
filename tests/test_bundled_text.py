"""The bundled texts: calibration text and validation suites. `scripts/measure_text.py` measures what takes longer."""

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from calibration import text
from xent_quant.checkpoint.hub import miniature
from xent_quant.validation.suites import NAMES, SEPARATOR, bundled

DATA = miniature().parent
FILES = [(folder, name) for folder in ("calibration", "suites") for name in NAMES]
DOMAINS = ("Xfiction", "Xconversation", "Xwebcc")
N = 8
WORD = re.compile(r"[㐀-鿿]|(?:(?![㐀-鿿_])\w)+(?:'(?:(?![㐀-鿿_])\w)+)*")
"""A Chinese character or a run of other letters and digits."""

Grams = dict[tuple[str, ...], str]


def path(folder: str, name: str) -> Path:
    return DATA / folder / f"{name}.txt"


def documents(folder: str, name: str) -> list[str]:
    return path(folder, name).read_text("utf-8").removesuffix("\n").split(f"\n{SEPARATOR}\n")


def words(document: str) -> list[str]:
    return WORD.findall(document.replace("’", "'").lower())


def shared(texts: Iterator[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """8-grams of words in two of the named documents: (passage, first document, later document)."""
    first: Grams = {}
    found = []
    for where, document in texts:
        listed = words(document)
        for gram in zip(*(listed[start:] for start in range(N)), strict=False):
            if first.setdefault(gram, where) != where:
                found.append((" ".join(gram), first[gram], where))
    return found


def named() -> Iterator[tuple[str, str]]:
    for folder, name in FILES:
        for number, document in enumerate(documents(folder, name), 1):
            yield f"{folder}/{name} #{number}", document


@pytest.mark.parametrize(("folder", "name"), FILES)
def test_files_are_well_formed(folder: str, name: str) -> None:
    raw = path(folder, name).read_bytes().decode("utf-8")
    assert raw == unicodedata.normalize("NFC", raw)
    assert raw.endswith("\n")
    assert not raw.endswith("\n\n")
    assert not [char for char in set(raw) if unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") and char != "\n"]
    lines = raw.split("\n")
    assert all(line == line.rstrip() for line in lines)
    assert all(line == SEPARATOR for line in lines if "<|" in line)
    assert not [line for line in lines if line.startswith("```")]
    assert SEPARATOR not in (lines[0], lines[-2])
    assert not [pair for pair in pairwise(line for line in lines if line) if set(pair) == {SEPARATOR}]
    found = documents(folder, name)
    assert all(len(words(document)) >= 50 for document in found)
    assert len(set(found)) == len(found)


def test_both_readers_see_the_same_documents() -> None:
    for suite in text.SUITES:
        file = text.suite_path(suite)
        assert list(text.documents(file)) == documents("calibration", file.stem)
    for name in NAMES:
        assert bundled(name).text == "\n\n".join(documents("suites", name))


def test_no_passage_is_in_two_documents() -> None:
    """Nor in the two sets: a model must not be judged on what it was calibrated on."""
    assert not shared(named())


def test_a_shared_passage_is_found() -> None:
    """Whatever its case and punctuation; seven words are none."""
    one = "We crossed at dawn: the ferry, the mule, and one very old clock."
    two = "then WE crossed at dawn the ferry the mule — later"
    assert shared(iter([("a", one), ("b", two)])) == [("we crossed at dawn the ferry the mule", "a", "b")]
    assert not shared(iter([("a", one), ("b", "crossed at dawn, the ferry, the mule!")]))
    assert not shared(iter([("a", one + one)]))
    assert len(shared(iter([("a", "“他，转过身来，看着那扇门。”"), ("b", "他转过身来看着那扇窗")]))) == 2


@pytest.mark.parametrize(
    ("folder", "language", "least"),
    [("calibration", "EN", 70_000), ("calibration", "ZH", 100_000), ("suites", "EN", 60_000), ("suites", "ZH", 75_000)],
)
def test_sizes_and_balance(folder: str, language: str, least: int) -> None:
    """English words or Chinese characters over the three domains; the domains' characters are within 25 % of each other."""
    texts = {domain: "".join(documents(folder, domain + language)) for domain in DOMAINS}
    chinese = re.compile("[㐀-鿿]")
    assert sum(len(chinese.findall(found) if language == "ZH" else words(found)) for found in texts.values()) >= least
    sizes = [len(found) for found in texts.values()]
    assert max(sizes) <= 1.25 * min(sizes)
