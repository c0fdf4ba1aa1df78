"""Sources of calibration text, shares, windows, and one-line errors."""

import json
from pathlib import Path

import numpy as np
import pytest

from calibration import text
from calibration.documents import SEPARATOR
from calibration.text import CalibrationText, Source, documents, is_chinese, load, sources
from tests.conftest import small_tokenizer
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import CalibrationError


def test_bundled_suites_hold_documents_of_both_languages() -> None:
    for suite in text.SUITES:
        found = list(documents(text.suite_path(suite)))
        assert len(found) >= 30
        assert all(SEPARATOR not in document for document in found)
        assert sum(len(document.encode()) for document in found) >= 110_000
        chinese = sum("一" <= char <= "鿿" for document in found for char in document)
        assert (chinese > 20_000) == suite.endswith("zh")


def test_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("one\n<|document|>\ntwo\nlines\n<|document|>\n\n")
    (tmp_path / "b.md").write_text("# three")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "four", "body": "vier"}\n\n{"text": "five", "body": "fünf"}\n')
    parquet.write_table(pyarrow.table({"text": ["six", None], "body": ["sechs", "x"]}), tmp_path / "sub" / "d.parquet")
    (tmp_path / "ignored.pdf").write_text("x")
    assert list(documents(tmp_path)) == ["one", "two\nlines", "# three", "four", "five", "six"]
    assert list(documents(tmp_path / "sub" / "c.jsonl", "body")) == ["vier", "fünf"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"content": "x"}', ["line 1", "'content'", "--text-field"]),
        ("a.jsonl", b"{", ["line 1", "not JSON"]),
        ("a.txt", "naïve é ü".encode() * 9 + b"\xff", ["not UTF-8", "byte 108"]),
        ("a.pdf", b"x", [".pdf"]),
        ("a.parquet", b"x", ["Parquet"]),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        list(documents(tmp_path / name))
    for word in (name, *words):
        assert word in str(error.value)


def test_empty_and_short_texts_and_bad_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the night")
    for name, message in (("empty.txt", "no text"), ("short.txt", "one window of 64")):
        with pytest.raises(CalibrationError, match=message):
            load([Source(name, tmp_path / name)], small_tokenizer(), tokens=1000, length=64)
    with pytest.raises(CalibrationError, match="holds no"):
        list(documents(tmp_path.joinpath("x").mkdir() or tmp_path / "x"))
    with pytest.raises(CalibrationError, match="entertainment, "):
        sources(["nonsense"], None, True)
    with pytest.raises(CalibrationError, match="no such file"):
        sources(["夜色" * 5000 + "\n"], None, True)
    with pytest.raises(CalibrationError, match="NAME=WEIGHT"):
        sources([], "klingon=3", True)
    with pytest.raises(CalibrationError, match="every weight is 0"):
        sources(["webcc"], "webcc=0", True)


def test_mix_follows_the_models_language_or_the_option() -> None:
    weights = {source.name: source.weight for source in sources([], None, chinese=True)}
    assert weights["fiction-zh"] == weights["fiction-en"]
    weights = {source.name: source.weight for source in sources([], None, chinese=False)}
    assert weights["webcc-en"] == 3 * weights["webcc-zh"]
    weights = {
        source.name: source.weight for source in sources(["fiction", "conversation-en"], "en=2,fiction=5,fiction-zh=0", True)
    }
    assert weights == {"fiction-en": 10, "conversation-en": 2}
    assert is_chinese(load_tokenizer(miniature()))
    assert not is_chinese(small_tokenizer())


def test_windows_keep_shares_order_and_seed(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, word in zip(files, ("the", "ing"), strict=True):
        file.write_text("\n".join(json.dumps({"text": f"{word} " * 20 + str(index)}) for index in range(60)))
    found = [Source("a", files[0], 3.0), Source("b", files[1], 1.0)]

    def made(**options) -> CalibrationText:
        return load(found, tokenizer, **{"tokens": 800, "length": 50, "bos": 2, "spare": 200, **options})

    one = made()
    assert one.windows.shape == (16, 50)
    assert one.spare.shape == (4, 50)
    assert one.windows[0, 0] == 2
    the = tokenizer.token_to_id("▁the")
    assert (one.windows[:12] == the).any(1).all()
    assert not (one.windows[12:] == the).any()
    assert np.array_equal((made(spare=800).spare == the).any(1), [True, True, False, True] * 4)  # in the same shares, mixed
    assert np.array_equal(one.windows, made().windows)
    assert not np.array_equal(one.windows, made(seed=1).windows)
    scarce = load([found[0], Source("b", files[1], 99.0)], tokenizer, tokens=10**6, length=50)
    assert scarce.windows.size > one.windows.size
    assert (scarce.windows == the).any()


def test_shares_fill_up() -> None:
    assert text._shares([100, 1000], [0.5, 0.5], 400) == [100, 300]
    assert text._shares([10, 10], [0.9, 0.1], 400) == [10, 10]
    assert sum(text._shares([500, 500, 500], [0.2, 0.3, 0.5], 1000)) == 1000
