"""Bundled text beside a person's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.session import Session
from calibration.supplement import lacking
from calibration.text import load, sources
from tests.conftest import small_tokenizer
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.options import CalibrationOptions

OPTIONS = CalibrationOptions(tokens=3000, seqlen=64)


def session(**options) -> Session:
    return Session(Checkpoint.open(miniature()), replace(OPTIONS, **options))


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A file of a few windows in both languages."""
    file = tmp_path / "short.txt"
    file.write_text("The rain had come again. 雨又下了起来。" * 30)
    return str(file)


def test_short_text_is_filled_up(short: str) -> None:
    alone, filled = session(calib=(short,), tokens=256), session(calib=(short,))
    assert alone.text.names == (short,)
    assert alone.notes[0].startswith("256 tokens are about")
    assert len(filled.text.windows) == 3000 // 64
    assert np.array_equal(filled.text.windows[:4], alone.text.windows)
    assert filled.text.names == (short, *(source.name for source in sources((), None, chinese=True)))
    assert len(filled.text.spare)
    (note, *_) = filled.notes
    assert "--tokens asks for 3,000, the text has" in note
    own = int(note.removesuffix(" leaves them out)").rsplit(" ", 1)[1])
    assert session(calib=(short,), tokens=own).text.names == (short,)


def test_bundled_text_that_the_mix_leaves_out_does_not_fill_up(short: str) -> None:
    assert session(calib=(short,), calib_mix="zh=0,fiction=0").text.names == (short, "conversation-en", "webcc-en")
    left = session(calib=(short,), calib_mix="zh=0,en=0")
    assert left.text.names == (short,)
    assert "--tokens asks for 3,000, and there are" in left.notes[0]


@pytest.mark.parametrize(("language", "other", "called"), [("en", "zh", "Chinese"), ("zh", "en", "English")])
def test_the_language_that_text_lacks_goes_with_it(language: str, other: str, called: str) -> None:
    own = session(calib=(f"fiction-{language}",), calib_mix=f"{other}=0")
    made = session(calib=(f"fiction-{language}",))
    assert own.text.names == (f"fiction-{language}",)
    assert np.array_equal(made.text.windows[: len(own.text.windows)], own.text.windows)
    assert len(made.text.windows) == len(own.text.windows) + 8
    assert all(name.endswith(other) for name in made.text.names[1:])
    assert lacking(load_tokenizer(miniature()), made.text.windows, chinese=True) is None
    assert f"next to no {called}, without which {called} suffers: 512 tokens" in made.notes[0]
    large = session(calib=(f"fiction-{language}",), tokens=9000)
    assert len(large.text.windows) == 9000 // 64 * 9 // 8


def test_a_model_of_english_needs_no_chinese(checkpoint) -> None:
    english = load(sources(["fiction-en"], None, chinese=False), small_tokenizer(), tokens=3000, length=64)
    assert lacking(small_tokenizer(), english.windows, chinese=False) is None
    assert Session(Checkpoint.open(checkpoint()), replace(OPTIONS, calib=("fiction-en",))).text.names == ("fiction-en",)
