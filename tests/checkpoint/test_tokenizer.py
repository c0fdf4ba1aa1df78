"""Hostile tokenizers: one CheckpointError line each, never a panic or a traceback; and fields of older versions."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.gguf import tokenizer, tokenizer_check
from tests.conftest import TINY, small_tokenizer
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.tokenizer import load_tokenizer, tokenizer_json
from xent_quant.errors import CheckpointError, UnsupportedError, XentQuantError

SIZE = 320
VALUE = json.loads(small_tokenizer().to_str())
Edit = Callable[[dict[str, Any]], Any]


def written(folder: Path, edit: Edit) -> Path:
    value = copy.deepcopy(VALUE)
    edit(value)
    (folder / "tokenizer.json").write_text(json.dumps(value), "utf-8")
    return folder


def read(folder: Path) -> None:
    """Everything that an export does with a tokenizer."""
    load_tokenizer(folder)
    tokenizer_json(folder)
    spec = tokenizer.load(folder, Architecture.from_config(TINY | {"vocab_size": SIZE}), strict=False)
    tokenizer_check.verify(folder, spec, strict=False)


def vocab(**entries: Any) -> Edit:
    return lambda value: value["model"]["vocab"].update(entries)


HOSTILE: dict[str, Edit] = {
    "no model": lambda value: value.pop("model"),
    "model is a list": lambda value: value.update(model=[]),
    "no vocabulary": lambda value: value["model"].pop("vocab"),
    "vocabulary is a number": lambda value: value["model"].update(vocab=3),
    "vocabulary of numbers": lambda value: value["model"].update(vocab=[1, 2]),
    "no merges": lambda value: value["model"].pop("merges"),
    "merges is a text": lambda value: value["model"].update(merges="a b"),
    "negative id": vocab(x1=-1),
    "fractional id": vocab(x1=1.5),
    "id is a text": vocab(x1="7"),
    "id is true": vocab(x1=True),
    "id is null": vocab(x1=None),
    "huge id": vocab(x1=10**30),
    "id beyond the model": vocab(x1=5000),
    "two tokens with one id": vocab(x1=9),
    "a million characters": vocab(**{"x" * 10**6: 310}),
    "lone surrogate": vocab(**{"\ud800": 310}),
    "merge of unknown tokens": lambda value: value["model"]["merges"].append(["q", "zz"]),
    "merge to an unknown token": lambda value: value["model"]["merges"].append(["q", "z"]),
    "merge of three": lambda value: value["model"]["merges"].append(["a", "b", "c"]),
    "merge of numbers": lambda value: value["model"]["merges"].append([1, 2]),
    "merge is null": lambda value: value["model"]["merges"].append(None),
    "merge of lists": lambda value: value["model"]["merges"].append([["a"], ["b"]]),
    "added token without id": lambda value: value["added_tokens"][0].pop("id"),
    "added token without text": lambda value: value["added_tokens"][0].pop("content"),
    "added token is a text": lambda value: value["added_tokens"].append("x"),
    "added token of a negative id": lambda value: value["added_tokens"][0].update(id=-3),
    "added token that is another": lambda value: value["added_tokens"][0].update(id=7),
    "added token with a surrogate": lambda value: value["added_tokens"][0].update(content="\udfff"),
    "added tokens is an object": lambda value: value.update(added_tokens={"a": 1}),
    "unknown pre-tokenizer": lambda value: value.update(pre_tokenizer={"type": "Nonsense"}),
    "pre-tokenizer is a list": lambda value: value.update(pre_tokenizer=[]),
    "sequence of numbers": lambda value: value.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [1, 2]}),
    "sequence without steps": lambda value: value.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 3}),
    "bad regex": lambda value: value.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
    ),
    "charsmap": lambda value: value.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "charsmap that is no base64": lambda value: value.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "%"}),
    "unigram without scores": lambda value: value.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a"], ["b"]]}),
    "unigram without a vocabulary": lambda value: value.update(model={"type": "Unigram", "unk_id": 0, "vocab": []}),
    "unigram with an unknown beyond": lambda value: value.update(
        model={"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}, added_tokens=[]
    ),
    "unigram with a token twice": lambda value: value.update(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["a", 0.0]]}, added_tokens=[]
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tokenizer(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        read(written(tmp_path, HOSTILE[kind]))
    message = str(caught.value)
    message.encode()
    assert "\n" not in message
    assert len(message) < 1000
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"model": ' + '{"a":' * 100_000,
        '{"model": {"vocab": {}, "merges": []}, "pre_tokenizer": '
        + '{"type": "Sequence", "pretokenizers": [' * 400
        + "]}" * 400
        + "}",
        "",
        "null",
        '{"model": {"vocab": {"a": 1e999}, "merges": []}}',
        '{"model": {"vocab": {"a": NaN}, "merges": []}}',
        "{" + '"a": 1, ' * 3,
    ],
    ids=["deep list", "deep object", "deep sequence", "empty", "null", "infinite id", "NaN id", "cut off"],
)
def test_hostile_text(tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "elsewhere"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "y"}}}),
        ("added_tokens.json", {"y": "z"}),
        ("added_tokens.json", {"y": -5}),
        ("added_tokens.json", {"\ud800": 305}),
        ("special_tokens_map.json", [1]),
    ],
)
def test_hostile_neighbours(tmp_path: Path, name: str, value: Any) -> None:
    folder = written(tmp_path, lambda value: None)
    (folder / name).write_text(json.dumps(value))
    with pytest.raises(CheckpointError):
        read(folder)


def test_settings_of_odd_types_say_nothing(tmp_path: Path) -> None:
    folder = written(tmp_path, lambda value: None)
    odd = {"bos_token": 3, "eos_token": [], "pad_token": {}, "add_bos_token": "yes", "additional_special_tokens": [1, None, {}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(odd))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x", -1, True, 10**40, None, 4.5]}))
    read(folder)


def test_an_unknown_token_that_is_none(tmp_path: Path) -> None:
    read(written(tmp_path, lambda value: value["model"].update(unk_token="<missing>")))


def test_holes_in_the_vocabulary_are_padded(tmp_path: Path) -> None:
    folder = written(tmp_path, vocab(**{"x1": 318, "[PAD317]": 316}))
    spec = tokenizer.load(folder, Architecture.from_config(TINY | {"vocab_size": SIZE}), strict=False)
    assert spec.tokens[318] == "x1"
    assert spec.tokens[316:318] == ("[PAD317]", "[[PAD317]]")
    assert len(set(spec.tokens)) == SIZE


def test_tokens_that_llama_cpp_cannot_hold_are_told(tmp_path: Path) -> None:
    """It reads a token up to a zero character, and ends the process where two are alike."""
    folder = written(tmp_path, vocab(**{"\0": 317, "a\0": 318, "": 319}))
    spec = tokenizer.load(folder, Architecture.from_config(TINY | {"vocab_size": SIZE}))
    assert len(set(spec.tokens)) == SIZE
    assert not any("\0" in token or not token for token in spec.tokens)
    assert any("3 tokens" in note for note in spec.notes)


def test_truncation_and_padding_are_left_out(tmp_path: Path) -> None:
    made = small_tokenizer()
    made.enable_truncation(2)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    assert 2 < len(load_tokenizer(tmp_path).encode("abcdef").ids) < 50


def test_random_damage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Values of a tokenizer.json replaced by others: it is read, or refused in one line."""
    draw = random.Random(0)
    junk: list[Any] = [None, True, -1, 3, 1e9, "", "x", "\ud800", [], [1], {}, {"type": "BPE"}, 2**40]
    refused: list[str] = []
    for _ in range(150):
        value = copy.deepcopy(VALUE)
        place: Any = value
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
                place = place[key]
                continue
            place[key] = draw.choice(junk)
            break
        (tmp_path / "tokenizer.json").write_text(json.dumps(value))
        try:
            load_tokenizer(tmp_path)
            tokenizer.load(tmp_path, Architecture.from_config(TINY | {"vocab_size": SIZE}), strict=False)
        except XentQuantError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not any("\n" in message for message in refused)
    assert "panicked" not in capfd.readouterr().err
