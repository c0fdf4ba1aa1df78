"""Presets from the Hub, on a cache laid out as huggingface_hub lays it out: what is drawn, what is recorded, what is refused."""

import gzip
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration import presets, text
from calibration.notes import Notes
from calibration.presets import HUB, Draw, passages
from calibration.text import CalibrationText, load, sources
from tests.conftest import small_tokenizer
from xent_quant.errors import CalibrationError

ENGLISH, CHINESE = "The rain went on all night, said keeper number {}.", "第{}位守塔人说，雨下了一整夜。"
BOOK = (
    "The Project Gutenberg EBook of X\n\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n{}\n*** END OF THE EBOOK ***\nlicence"
)


def written(path: Path, suite: str, rows: int) -> None:
    """A file as the preset's data set has them."""
    table: list[dict[str, Any]]
    language = ENGLISH if suite.endswith("en") else CHINESE
    if HUB[suite].books:
        table = [
            {"id": f"{n}-0", "text": BOOK.format("\n".join([language.format(f"{n} {line}") for line in range(600)]))}
            for n in range(rows // 10)
        ]
    elif suite.startswith("conversation"):
        table = [
            {
                "conversation": [
                    {"content": (ENGLISH, CHINESE)[n % 2].format(n) * 3, "role": role, "turn_identifier": n}
                    for role in ("user", "assistant")
                ],
                "language": ("English", "Chinese")[n % 2],
            }
            for n in range(2 * rows)
        ]
    else:
        table = [{"text": language.format(n) * 8, "timestamp": "2019", "url": "x"} for n in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in table).encode()))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=100)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a preset's files into the Hub's cache; nothing outside is asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(suite: str, rows: int = 300) -> Path:
        preset = HUB[suite]
        folder = tmp_path / "hub" / f"datasets--{preset.repository.replace('/', '--')}" / "snapshots" / preset.commit
        first, *others = [folder / file for file in preset.files]
        written(first, suite, rows)
        for file in others:
            file.unlink(missing_ok=True)
            file.hardlink_to(first)
        return folder

    return put


def drawn(*calib: str, seed: int = 0, **options: Any) -> CalibrationText:
    wanted: dict[str, Any] = {"tokens": 2000, "length": 50, "bos": 2, "seed": seed, **options}
    return load(sources(calib, None, False, seed), small_tokenizer(), **wanted)


@pytest.mark.parametrize("suite", HUB)
def test_a_seed_draws_the_same_text_and_another_seed_another(cache, suite: str) -> None:
    pytest.importorskip("pyarrow")
    cache(suite)
    one = drawn(f"hub:{suite}")
    assert one.windows.shape == (40, 50)
    assert (drawn(f"hub:{suite}").windows == one.windows).all()
    assert (drawn(f"hub:{suite}", seed=1).windows != one.windows).any()
    (name,) = one.names
    assert name.startswith(f"hub:{suite} ({HUB[suite].repository}@{HUB[suite].commit}, ")
    said = small_tokenizer().decode(one.windows.flatten().tolist())
    assert "Gutenberg" not in said
    assert "licence" not in said
    assert ("keeper" in said) == suite.endswith("en")


def test_every_suite_has_one_pinned_by_a_commit() -> None:
    assert HUB.keys() == set(text.SUITES)
    for preset in HUB.values():
        assert len(preset.commit) == 40
        assert set(preset.commit) <= set("0123456789abcdef")
        assert len(set(preset.files)) == len(preset.files)
        assert preset.where is None or all(file.endswith(".parquet") for file in preset.files)


def test_presets_mix_with_bundled_text(cache) -> None:
    for suite in ("webcc-zh", "webcc-en"):
        cache(suite)
    found = sources(("webcc", "hub:webcc"), "zh=2,webcc=3", False)
    assert [(source.name, source.weight) for source in found] == [
        ("webcc-zh", 6),
        ("webcc-en", 3),
        ("hub:webcc-zh", 6),
        ("hub:webcc-en", 3),
    ]
    assert [source.name for source in sources(("hub:webcc",), "zh=0", False)] == ["hub:webcc-en"]
    with pytest.raises(CalibrationError, match="--text-field body: has no effect"):
        load(found, small_tokenizer(), tokens=200, length=40, text_field="body")


def test_offline_is_one_line_that_says_what_to_do(cache) -> None:
    with pytest.raises(CalibrationError) as refused:
        sources(("hub:webcc-en",), None, False)
    assert str(refused.value) == (
        "--calib hub:webcc-en: allenai/c4 is not in the Hub's cache, and the Hub could not be reached; "
        "run this once online, or leave it out: the bundled text needs no download"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "EntryNotFoundError",
            r"allenai/c4 has no en/c4-validation\.0000\d-of-00008\.json\.gz at 1588.* any more; .*--calib",
        ),
        ("RepositoryNotFoundError", "allenai/c4 has no en/c4"),
        ("RevisionNotFoundError", "allenai/c4 has no en/c4"),
        ("HfHubHTTPError", r"could not be downloaded \(503 busy\); try again"),
        ("OSError", r"could not be downloaded \(503 busy\); try again"),
        ("ReadTimeout", r"could not be downloaded \(503 busy\); try again"),
        ("GatedRepoError", "allenai/c4 asks for terms to be accepted"),
    ],
)
def test_what_the_hub_refuses(error: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    import huggingface_hub
    from huggingface_hub import errors

    http = sys.modules[errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]  # httpx's or requests'
    kind = getattr(errors, error, None) or getattr(builtins, error, None) or getattr(http, error)

    def fail(*_: Any, **__: Any) -> str:
        raised = kind.__new__(kind)
        raised.args = ("503 busy\nand more",)
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CalibrationError, match=words) as refused:
        sources(("hub:webcc-en",), None, False)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("suite", "row", "words"),
    [
        ("fiction-zh", {"body": "x"}, "no text in field 'text'"),
        ("fiction-zh", {"text": 5}, "'text' holds int64"),
        ("conversation-en", {"conversation": [{"role": "user", "content": "x"}]}, "no column 'language'"),
        ("conversation-en", {"conversation": "x", "lang": "x"}, "no column 'language'"),
    ],
)
def test_a_row_of_the_wrong_shape_is_refused(cache, suite: str, row: dict[str, Any], words: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = cache(suite, 10)
    for file in HUB[suite].files:
        (folder / file).unlink()
        parquet.write_table(pyarrow.Table.from_pylist([row]), folder / file)
    with pytest.raises(CalibrationError, match=words) as refused:
        drawn(f"hub:{suite}")
    assert ".parquet" in str(refused.value)


def test_a_draw_is_fair_and_holds_no_more_than_twice_its_room() -> None:
    counts = [0] * 200
    for seed in range(200):
        draw = Draw(random.Random(seed), 400)
        most = 0
        for number in range(200):
            if draw.lot():
                draw.add(f"{number:010}")
            most = max(most, sum(len(held) for _, held in draw._held))
        found = draw.texts()
        assert most <= 810
        assert len(found) == 40
        for item in found:
            counts[int(item)] += 1
    # 40 each on average, with a standard deviation of 5.7: first, last and middle ones alike.
    for part in (counts[:50], counts[50:150], counts[150:]):
        assert 37 < sum(part) / len(part) < 43


def test_books_are_cut_at_line_ends_between_their_marks(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    written(tmp_path / "a.parquet", "fiction-en", 30)
    found = passages("fiction-en", tmp_path / "a.parquet", 0, 10**6, None, Notes())
    lines = [line for passage in found for line in passage.split("\n")]
    assert sorted(lines) == sorted(ENGLISH.format(f"{n} {line}") for n in range(3) for line in range(600))
    assert all(len(passage) <= presets.PASSAGE for passage in found)
    assert len(found) > 9


def test_nothing_of_a_line_that_is_longer_than_a_passage_is_lost() -> None:
    line = "夜色渐深" * 50_000
    began = time.process_time()
    found = list(presets._cut(f"first\n{line}\nlast"))
    assert time.process_time() - began < 2
    assert "".join(part.replace("\n", "") for part in found) == f"first{line}last"


def test_a_data_set_that_is_too_large_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import DatasetInfo

    files = [{"rfilename": f"part-{number}.jsonl", "size": 3 << 30} for number in range(2)]
    files += [{"rfilename": "pictures.tar", "size": 1 << 40}, {"rfilename": "unknown.txt"}]

    def of(*parts: dict[str, Any]) -> None:
        info = DatasetInfo(id="a/b", siblings=list(parts), private=False, downloads=0, likes=0, tags=[], sha="0" * 40)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "/snapshot/1234")
    of(*files)
    with pytest.raises(
        CalibrationError, match=r"--calib a/b: its files of text are 6\.0\d* GiB; .*hf download --repo-type dataset a/b"
    ):
        sources(("a/b",), None, False)
    of(*files[1:])
    (found,) = sources(("a/b",), None, False)
    assert found.path == Path("/snapshot/1234")
