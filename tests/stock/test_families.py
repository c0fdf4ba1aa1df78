"""llama.cpp's convert_hf_to_gguf.py beside us on a checkpoint of every family: the same tensors, keys and token ids."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import xent_quant
from scripts.stock_llama import TOLD_PRE_TOKENIZER
from tests import families
from tests.stock.gguf_files import keys, tensors
from tests.stock.programs import Programs
from tests.stock.test_converter import CARD, SIZE_LABEL, SIZES, TITLE, compare, convert
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.validation.llama_cpp import LlamaCpp

pytestmark = pytest.mark.stock
ALONE: dict[str, set[str]] = {
    "llama": set(),
    "qwen3_moe": {"rope.dimension_count", "vocab_size"},
    "olmoe": {"rope.dimension_count", "vocab_size", *SIZES},
    "bailing_moe": set(),
}
"""Written out where the converter leaves them to llama.cpp's defaults, which are the same numbers."""
ENDS = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"}
TEXTS = ("Hello, world! 12345 it's", "第2章 雨 — “x”", "  double\n\ttabs\n\n\nend  ", "def f(x):\n    return x**2 # ok")
PRE = TOLD_PRE_TOKENIZER.format("smollm")


def byte_level(folder: Path) -> None:
    """Byte-level BPE that splits as SmolLM2's does, with a few merges; ids below 320."""
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("l", "l"), ("Ġ", "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    made.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


CASES = [*((family, False) for family in families.FAMILIES), ("qwen3_moe", True)]


@pytest.mark.parametrize(("family", "fused"), CASES)
def test_the_converter_writes_the_same(stock: Programs, tmp_path: Path, family: str, fused: bool) -> None:
    changes: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "bailing_moe":
        changes["first_k_dense_replace"] = 0  # the converter wants it
    folder = families.write(tmp_path / "model", family, fused=fused, **changes)
    byte_level(folder)
    (ours,) = xent_quant.quantize(folder, type="F32", output=tmp_path / "ours").exports
    theirs = convert(stock, folder, tmp_path / "stock.gguf", PRE)
    label: set[str] = set() if family == "llama" else SIZE_LABEL
    alone = CARD | ALONE[family] | (set(keys(ours)) & ENDS - set(keys(theirs)))
    compare(theirs, ours, alone, TITLE | label)
    assert tensors(ours) == tensors(theirs)
    reference = load_tokenizer(folder)
    with LlamaCpp(theirs) as one, LlamaCpp(ours) as other:
        for text in TEXTS:
            assert one.tokenize(text) == other.tokenize(text) == reference.encode(text, add_special_tokens=False).ids
