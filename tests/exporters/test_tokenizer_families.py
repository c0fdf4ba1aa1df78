"""Tokenizers of well-known families: stock llama.cpp gives Hugging Face's ids, from nothing but the keys that we write."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from exporters.gguf import tokenizer_check
from exporters.gguf.llama_tokenizer import LlamaTokenizer
from exporters.gguf.pretokenizers import ESCAPED_PRE_TOKENIZERS, PRE_TOKENIZERS
from exporters.gguf.tokenizer_spec import TokenizerSpec
from tests.exporters import tokenizer_families as families
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import CheckpointError, UnsupportedError
from xent_quant.validation.llama_cpp import Vocabulary

REPOSITORY = Path(__file__).parents[2]
PREFIXED = ("llama-2-metaspace", "xverse")
"""Hugging Face puts a space before the first word only, and only where there is none; llama.cpp after special tokens, too."""
ODD = "aB1 2\n\t'sS.,!é É你好，。　ＡÀß३ıⅧ²½😀️\u0301\r\u00a0/-_({})[]\\\"ll"


@cache
def corpus() -> tuple[str, ...]:
    """Documents of the shared corpus, where this checkout has one beside it."""
    folders = (root / "shared" / "corpus" / "valid" for root in (REPOSITORY, REPOSITORY.parent))
    folder = next((folder for folder in folders if folder.is_dir()), None)
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").split("\n")] if folder else []
    return tuple(json.loads(line)["text"] for line in lines if line) or tuple(tokenizer_check.sample())


def suites() -> list[str]:
    """A slice of bundled text that no tokenizer of these tests is chosen by."""
    return [file.read_text("utf-8")[:4000] for file in sorted((REPOSITORY / "xent_quant/data/suites").glob("*.txt"))]


def equal(reference: Tokenizer, stock: Vocabulary, texts: Iterable[str], *, parse_special: bool = False) -> None:
    for text in texts:
        assert stock.tokenize(text, parse_special=parse_special) == reference.encode(text, add_special_tokens=False).ids, text[
            :80
        ]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_family(tmp_path: Path, family: str) -> None:
    folder = families.make(tmp_path / "model", family)
    spec = families.loaded(folder)
    notes = tokenizer_check.verify(folder, spec)
    assert spec.pre == (families.BYTE_LEVEL[family][0] if family in families.BYTE_LEVEL else "default")
    assert any("after a special token" in note for note in notes) == (family in PREFIXED)
    reference, ours = load_tokenizer(folder), LlamaTokenizer(spec)
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "vocabulary.gguf")) as stock:
        equal(reference, stock, [*tokenizer_check.sample(), *suites()])
        if family not in PREFIXED:
            equal(reference, stock, tokenizer_check.with_special_tokens(spec), parse_special=True)
        for text in (*tokenizer_check.beyond(), *tokenizer_check.with_special_tokens(spec)):
            assert stock.tokenize(text, parse_special=True) == ours.encode(text, parse_special=True)
            assert stock.tokenize(text, parse_special=False) == ours.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_family_on_the_corpus(tmp_path: Path, family: str) -> None:
    folder = families.make(tmp_path / "model", family)
    spec = families.loaded(folder)
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "vocabulary.gguf")) as stock:
        equal(load_tokenizer(folder), stock, corpus())


@cache
def crossing_spec() -> TokenizerSpec:
    """Merges learnt across words, so that ids change wherever a split does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Split("\n\n", "isolated")
    made.normalizer = normalizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, max_token_length=12
    )
    made.train_from_iterator((line for text in families.training_text() for line in text.split("\n")), trainer)
    value = json.loads(made.to_str())["model"]
    tokens = tuple(sorted(value["vocab"], key=value["vocab"].__getitem__))
    return TokenizerSpec("gpt2", "gpt-2", tokens, (1,) * len(tokens), merges=tuple(map(" ".join, value["merges"])))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_splits_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    spec, draw = replace(crossing_spec(), pre=pre), random.Random(0)
    texts = ["".join(draw.choices(ODD, k=60)) for _ in range(100)]
    ours = LlamaTokenizer(spec)
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "vocabulary.gguf")) as stock:
        for text in (*tokenizer_check.sample(), *tokenizer_check.beyond(), *texts):
            assert stock.tokenize(text) == ours.encode(text), text


@pytest.mark.parametrize("pre", ESCAPED_PRE_TOKENIZERS)
def test_escapes_as_llama_cpp_does(tmp_path: Path, pre: str) -> None:
    folder = families.make(tmp_path / "model", "gemma")
    value = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    value["added_tokens"].append(value["added_tokens"][-1] | {"id": 6000, "content": "<mask>"})  # llama.cpp's mmbert needs one
    folder = families.saved(folder, value)
    spec = families.loaded(folder)
    merges = tuple(map(" ".join, value["model"]["merges"]))
    spec = replace(spec, model="gpt2", pre=pre, merges=merges, scores=(), add_space_prefix=False)
    ours = LlamaTokenizer(spec)
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "vocabulary.gguf")) as stock:
        for text in (*tokenizer_check.sample(), *tokenizer_check.beyond()):
            assert stock.tokenize(text) == ours.encode(text), text


def test_merges_by_rank_where_scores_do_not_do(tmp_path: Path) -> None:
    folder = families.make(tmp_path / "model", "gemma")
    value = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    # "the" is a token that "t" and "he" do not make: by its score llama.cpp would make it.
    short = [merge for merge in value["model"]["merges"] if len("".join(merge)) == 2 and "\n" not in merge]
    value["model"]["merges"] = [["h", "e"], ["t", "h"], ["th", "e"], *short]
    value["model"]["vocab"] |= {t: 6000 + i for i, t in enumerate(("he", "th", "the")) if t not in value["model"]["vocab"]}
    folder = families.saved(folder, value)
    spec = families.loaded(folder)
    reference = load_tokenizer(folder)
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "vocabulary.gguf")) as stock:
        equal(reference, stock, [*tokenizer_check.sample(), *suites(), "the then he"])
    assert (spec.model, spec.pre) == ("gpt2", "sarvam-moe")


def test_what_no_pre_tokenizer_does_is_refused_with_the_first_text(tmp_path: Path) -> None:
    words = [pre_tokenizers.Whitespace(), *families.splits()]
    folder = families.byte_level(tmp_path / "model", words)
    spec = families.loaded(folder, strict=False)
    with pytest.raises(UnsupportedError, match=r"pre-tokenizer Whitespace, ByteLevel\), first at '.+--allow-tokenizer-mismatch"):
        tokenizer_check.verify(folder, spec)


def test_letters_of_other_scripts_are_told(tmp_path: Path) -> None:
    """llama.cpp's o200k knows no upper case beyond ASCII; with merges that show it the note names a text."""
    steps = families.splits(families.O200K)
    folder = families.byte_level(tmp_path / "model", steps, text=[*tokenizer_check.beyond() * 5])
    spec = families.loaded(folder)
    assert spec.pre in ("gpt-4o", "granite-embed-multi-97m")
    assert any("other text" in note for note in tokenizer_check.verify(folder, spec))


def test_unigram(tmp_path: Path) -> None:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace("▁")
    trainer = trainers.UnigramTrainer(
        vocab_size=6000, special_tokens=[*families.SPECIALS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(families.training_text(), trainer)
    value = json.loads(made.to_str())
    # As SentencePiece has them. With more digits their rounding decides between "5" "55" and "55" "5", on some trainings.
    value["model"]["vocab"] = [[token, float(np.float32(score))] for token, score in value["model"]["vocab"]]
    folder = families.saved(tmp_path / "model", value)
    spec = families.loaded(folder)
    assert (spec.model, spec.remove_extra_whitespaces) == ("t5", False)
    tokenizer_check.verify(folder, spec)
    ours = LlamaTokenizer(spec)
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "vocabulary.gguf")) as stock:
        equal(load_tokenizer(folder), stock, [*tokenizer_check.sample(), *suites()])
        for text in tokenizer_check.beyond():
            assert stock.tokenize(text) == ours.encode(text)


SENTENCEPIECE: dict[str, tuple[dict[str, Any], tuple[str, bool, bool]]] = {
    "llama": (
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        ("llama", True, False),
    ),
    "no-prefix": (
        {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
        },
        ("llama", False, False),
    ),
    "unigram": ({"model_type": "unigram"}, ("t5", True, True)),
    "unigram-as-is": (
        {"model_type": "unigram", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        ("t5", True, False),
    ),
}


def sentencepiece_folder(folder: Path, options: dict[str, Any]) -> tuple[Path, Any]:
    package = pytest.importorskip("sentencepiece")
    folder.mkdir(parents=True)
    lines: Sequence[str] = [line for text in families.training_text() for line in text.split("\n") if line.strip()]
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=3000,
        user_defined_symbols=["<sep>"],
        num_threads=1,
        minloglevel=2,
        **options,
    )
    original = package.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    config = families.TINY | {"vocab_size": original.vocab_size(), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, original


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_tokenizer_model_alone(tmp_path: Path, kind: str) -> None:
    options, expected = SENTENCEPIECE[kind]
    folder, original = sentencepiece_folder(tmp_path / "model", options)
    spec = families.loaded(folder)
    tokenizer_check.verify(folder, spec)
    assert (spec.model, spec.add_space_prefix, spec.remove_extra_whitespaces) == expected
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "vocabulary.gguf")) as stock:
        for text in [*tokenizer_check.sample(), *suites()]:
            assert stock.tokenize(text) == original.encode(text)
        assert stock.tokenize("Hello", add_special=True) == [1, *original.encode("Hello")]


def test_a_normaliser_that_merges_spaces_is_refused_for_bpe(tmp_path: Path) -> None:
    folder, _ = sentencepiece_folder(tmp_path / "model", {"model_type": "bpe", "byte_fallback": True})
    with pytest.raises(UnsupportedError, match="will tokenise differently"):
        tokenizer_check.verify(folder, families.loaded(folder))


def test_tokenizer_model_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def absent(name: str, *arguments: Any) -> Any:
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_model_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    for data in (b"", b"\x00" * 50, b"not a model at all", bytes(range(256))):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)
