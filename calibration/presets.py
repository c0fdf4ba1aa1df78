"""Presets from the Hub: named data sets, each pinned to a commit, of which one file is downloaded and passages are drawn.

The licences are those that the data sets' pages state (docs/calibration.md). What is drawn depends on the seed, the file, how
much is wanted, and for conversations the model's chat template. Held are the passages drawn so far, at most twice what is
wanted, and what `calibration.documents` holds of the file.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from calibration.chat import ChatTemplate
from calibration.documents import TEXT_FIELD, Reading, of_file
from calibration.notes import Notes
from xent_quant.checkpoint.hub import failures, reason
from xent_quant.errors import CalibrationError

PREFIX = "hub:"

PASSAGE = 8192
"""Characters of a passage: books are cut into such, of other rows the beginning is taken."""


@dataclass(frozen=True)
class Preset:
    """A data set on the Hub at a commit, and how its rows are read: the `field` of text, rows whose column `where[0]` holds
    `where[1]` (None: all), and whether a row is a book of Project Gutenberg, which is cut into passages."""

    repository: str
    commit: str
    files: tuple[str, ...]
    licence: str
    field: str = TEXT_FIELD
    where: tuple[str, str] | None = None
    books: bool = False

    @property
    def origin(self) -> str:
        """What a record of a run says of the text."""
        return f"{self.repository}@{self.commit}, {self.licence}"


GUTENBERG = ("manu/project_gutenberg", "1bd0ba9dfce67e6e137a8fffd3dab386a690a871")
WILDCHAT = ("allenai/WildChat-1M", "7d6490e462285cf85d91eabea0f9a954fbddcd1f")
C4 = ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2")
BOOKS = (
    "00000-of-00052-7cda8f63c262acf8",
    "00001-of-00052-5c2b3fd5e60f0124",
    "00002-of-00052-835bd07d97f52cbd",
    "00003-of-00052-3827386b583e4d76",
    "00010-of-00052-2226b3722aa696eb",
    "00011-of-00052-6c9ae05ed451701f",
    "00013-of-00052-a66a5e317603bb21",
    "00020-of-00052-31ef1cece5305678",
    "00021-of-00052-82812d42cefe9a5b",
    "00026-of-00052-8719637a331ec653",
)
CHATS = tuple(f"data/train-{number:05}-of-00014.parquet" for number in range(14))

HUB: dict[str, Preset] = {
    "fiction-zh": Preset(
        *GUTENBERG, ("data/zh-00000-of-00001-bca42330c6f1826c.parquet",), "Project Gutenberg License", books=True
    ),
    "fiction-en": Preset(*GUTENBERG, tuple(f"data/en-{name}.parquet" for name in BOOKS), "Project Gutenberg License", books=True),
    "conversation-zh": Preset(*WILDCHAT, CHATS, "ODC-By 1.0", "conversation", ("language", "Chinese")),
    "conversation-en": Preset(*WILDCHAT, CHATS, "ODC-By 1.0", "conversation", ("language", "English")),
    "webcc-zh": Preset(
        *C4, tuple(f"multilingual/c4-zh-validation.tfrecord-{number:05}-of-00002.json.gz" for number in range(2)), "ODC-By 1.0"
    ),
    "webcc-en": Preset(*C4, tuple(f"en/c4-validation.{number:05}-of-00008.json.gz" for number in range(8)), "ODC-By 1.0"),
}
"""By domain and language, as the bundled suites are called."""


def download(suite: str, seed: int) -> Path:
    """One file of a preset, which `seed` chooses, in the Hub's cache. Raises CalibrationError saying what to do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    preset = HUB[suite]
    file = random.Random(f"{seed} {suite}").choice(preset.files)
    try:
        return Path(hf_hub_download(preset.repository, file, repo_type="dataset", revision=preset.commit))
    except LocalEntryNotFoundError as error:
        raise CalibrationError(
            f"--calib {PREFIX}{suite}: {preset.repository} is not in the Hub's cache, and the Hub could not be reached; "
            "run this once online, or leave it out: the bundled text needs no download"
        ) from error
    except GatedRepoError as error:
        raise CalibrationError(
            f"--calib {PREFIX}{suite}: {preset.repository} asks for terms to be accepted on its page of the Hub; do so and log "
            "in (hf auth login), or leave it out: the bundled text needs no download"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise CalibrationError(
            f"--calib {PREFIX}{suite}: {preset.repository} has no {file} at {preset.commit} any more; give other text, "
            f"such as --calib {suite}, the bundled one"
        ) from error
    except failures() as error:
        raise CalibrationError(
            f"--calib {PREFIX}{suite}: {file} of {preset.repository} could not be downloaded ({reason(error)}); try again, or "
            "leave it out: the bundled text needs no download"
        ) from error


MARK = r"\*\*\*\s?{} OF [^*]{{0,400}}\*\*\*"
BEGIN, END = re.compile(MARK.format("START")), re.compile(MARK.format("END"))
"""Between these lies the text of a book of Project Gutenberg."""

CUT = re.compile(rf"(?s).{{1,{PASSAGE}}}(?:\n|\Z)|.{{{PASSAGE}}}")
"""A passage: whole lines, or as much of one that is longer."""


class Draw:
    """Of the texts that come, about `room` characters, each with the same chance; at most twice as many are held."""

    def __init__(self, chance: random.Random, room: int) -> None:
        self._chance, self._room = chance, room
        self._held: list[tuple[float, str]] = []
        self._size = 0
        self._limit = 1.0  # a lot behind this would not be kept
        self._lot = 0.0

    def lot(self) -> bool:
        """Draw the lot of the next text: whether it may be kept."""
        self._lot = self._chance.random()
        return self._lot < self._limit

    def add(self, text: str) -> None:
        """A text whose lot was drawn."""
        self._held.append((self._lot, text))
        self._size += len(text)
        if self._size > 2 * self._room:
            self._drop()

    def texts(self) -> list[str]:
        """In the order of their lots."""
        self._drop()
        return [text for _, text in self._held]

    def _drop(self) -> None:
        self._held.sort()
        self._size = kept = 0
        for lot, text in self._held:
            if self._size >= self._room:
                self._limit = lot
                break
            self._size += len(text)
            kept += 1
        del self._held[kept:]


def passages(suite: str, path: Path, seed: int, room: int, chat: ChatTemplate | None, notes: Notes) -> list[str]:
    """Of a preset's file about `room` characters, passages that `seed` draws. Raises CalibrationError naming file and row."""
    preset = HUB[suite]
    draw = Draw(random.Random(f"{seed} {suite} passages"), room)
    if preset.books:
        for book in of_file(path, Reading(preset.field, notes=notes)):
            for passage in _cut(book):
                if draw.lot():
                    draw.add(passage)
    else:
        for text in of_file(path, Reading(preset.field, chat, PASSAGE, notes, preset.where, draw.lot)):
            draw.add(text)
    return draw.texts()


def _cut(book: str) -> Iterator[str]:
    """A book's passages, without what Project Gutenberg writes before and behind it."""
    begin = BEGIN.search(book)
    start = begin.end() if begin else 0
    end = END.search(book, start)
    for found in CUT.finditer(book, start, end.start() if end else len(book)):
        if passage := found[0].strip():
            yield passage
