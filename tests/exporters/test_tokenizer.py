"""Tokenizers: llama.cpp's ids equal Hugging Face's, and what cannot be expressed is refused before a weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xent_quant
from exporters.gguf import tokenizer, tokenizer_check
from exporters.gguf.llama_tokenizer import LlamaTokenizer
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import CheckpointError, UnsupportedError
from xent_quant.validation.llama_cpp import LlamaCpp

Edit = Callable[[dict[str, Any]], None]


def edited(folder: Path, edit: Edit) -> Path:
    value = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    edit(value)
    (folder / "tokenizer.json").write_text(json.dumps(value), "utf-8")
    return folder


def agrees_with_llama_cpp(folder: Path, output: Path) -> None:
    """Stock llama.cpp, our account of it and Hugging Face give the same ids on the sample."""
    checkpoint = Checkpoint.open(folder)
    ours = LlamaTokenizer(tokenizer.load(folder, checkpoint.architecture))
    reference = load_tokenizer(folder)
    done = xent_quant.quantize(folder, method="rtn", type="Q8_0", output=output)
    with LlamaCpp(done.files[0]) as llama:
        for text in tokenizer_check.sample():
            ids = llama.tokenize(text)
            assert ids == ours.encode(text)
            assert ids == reference.encode(text, add_special_tokens=False).ids


def test_byte_fallback_with_user_defined_token(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(num_hidden_layers=1)
    agrees_with_llama_cpp(folder, tmp_path / "out")


def legacy(add_prefix_space: bool) -> Edit:
    def edit(value: dict[str, Any]) -> None:
        parts = [value["pre_tokenizer"]["pretokenizers"][0], value["decoder"]["decoders"][0]]
        for part in parts:
            part.pop("prepend_scheme")
            part["add_prefix_space"] = add_prefix_space

    return edit


@pytest.mark.parametrize("prefix", [True, False])
def test_fields_of_older_versions_are_migrated(checkpoint, tmp_path: Path, prefix: bool) -> None:
    folder = edited(checkpoint(num_hidden_layers=1), legacy(prefix))
    encoding = load_tokenizer(folder).encode("the")
    assert encoding.tokens == (["▁the"] if prefix else ["the"])
    agrees_with_llama_cpp(folder, tmp_path / "out")


def normaliser(value: dict[str, Any]) -> None:
    value["normalizer"] = {"type": "NFKC"}


def crossing(value: dict[str, Any]) -> None:
    value["model"]["vocab"]["a,"] = 300
    value["model"]["merges"].append(["a", ","])


def reordered(value: dict[str, Any]) -> None:
    """Hugging Face merges only the pair that is listed; llama.cpp forms "the" of any two neighbours."""
    value["model"]["merges"] = [["h", "e"], ["t", "he"], ["▁", "the"], ["t", "h"], ["in", "g"]]


@pytest.mark.parametrize(
    ("edit", "words"),
    [(normaliser, "normalizer NFKC"), (crossing, "crosses a split"), (reordered, "tokenise differently")],
)
def test_what_llama_cpp_cannot_express_is_refused_or_told(checkpoint, tmp_path: Path, edit: Edit, words: str) -> None:
    folder = edited(checkpoint(num_hidden_layers=1), edit)
    if edit is reordered:  # "ing" is a token that no listed merge of "i" "ng" makes
        edited(folder, lambda value: value["model"]["vocab"].update({"he": 301}))
    with pytest.raises(UnsupportedError, match=words) as caught:
        xent_quant.quantize(folder, method="rtn", type="Q8_0", output=tmp_path / "out")
    assert "--allow-tokenizer-mismatch" in str(caught.value)
    assert not (tmp_path / "out").exists()
    done = xent_quant.quantize(folder, method="rtn", type="Q8_0", output=tmp_path / "out", allow_tokenizer_mismatch=True)
    assert any(words in note for note in done.notes)


def test_damaged_tokenizers_are_named(checkpoint) -> None:
    folder = edited(checkpoint(), lambda value: value["model"].pop("merges"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(folder)
