"""Small tokenizers with the structure of well-known families: their published pre-tokenizers, merges learnt from bundled text."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from exporters.gguf import tokenizer, tokenizer_check
from exporters.gguf.pretokenizers import LATIN
from tests.conftest import TINY
from xent_quant.checkpoint.architecture import Architecture

SPECIALS = ["<|pad|>", "<|begin|>", "<|end_of_all|>"]
VOCABULARY = 6000

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES


def cased(suffix: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{UPPER}*{LOWER}+{suffix}|{start}{UPPER}+{LOWER}*{suffix}"
    return words + f"|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES


O200K = cased(CONTRACTION + "?", r"\p{N}{1,3}")
TEKKEN = cased("", r"\p{N}")
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{LATIN}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+".replace(r"\u3000", "\u3000"),
    r"\s+$",
    "[一-龥\u0800-一가-\ud7ff]+",
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def splits(*regexes: str) -> list[pre_tokenizers.PreTokenizer]:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [*(pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes), byte_level]


def digits(individual: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Digits(individual_digits=individual)


def gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def three_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")


Steps = Callable[[], list[pre_tokenizers.PreTokenizer]]
BYTE_LEVEL: dict[str, tuple[str, Steps]] = {
    "gpt-2": ("gpt-2", lambda: [gpt2()]),
    "llama-3": ("llama-bpe", lambda: splits(LLAMA3)),
    "qwen2": ("qwen2", lambda: splits(QWEN2)),
    "qwen3.5": ("qwen35", lambda: splits(QWEN35)),
    "gpt-4o": ("gpt-4o", lambda: splits(O200K)),
    "deepseek-llm": ("deepseek-llm", lambda: [*splits(*DEEPSEEK_LLM)[:-1], digits(), *splits()]),
    "deepseek-coder": (
        "deepseek-coder",
        lambda: [*splits("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+")[:-1], digits(), *splits()],
    ),
    "deepseek-v3": ("deepseek-v3", lambda: splits(r"\p{N}{1,3}", CJK, DEEPSEEK_V3)),
    "smollm": ("smollm", lambda: [digits(), gpt2()]),
    "starcoder": ("smollm", lambda: [digits(), gpt2()]),
    "command-r": ("smollm", lambda: [digits(), gpt2()]),
    "falcon": (
        "falcon",
        lambda: [pre_tokenizers.Punctuation("contiguous"), gpt2(), digits(individual=False), three_digits()],
    ),
    "tekken": ("tekken", lambda: splits(TEKKEN)),
    "bloom": ("bloom", lambda: splits(BLOOM)),
    "viking": ("viking", lambda: [*splits(BLOOM)[:-1], digits(), *splits()]),
    "bailing": (
        "qwen2",
        lambda: splits(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        ),
    ),
    "seed-coder": (
        "seed-coder",
        lambda: splits(
            CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}" + "\r\n" + r"]+|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
}
"""Family to the name that llama.cpp has for its splitting, and the steps of its pre-tokenizer."""

IGNORING_MERGES = {"llama-3", "tekken"}
NFC = {"qwen2", "qwen3.5", "command-r"}
BYTE_FALLBACK = ("llama-2", "llama-2-metaspace", "xverse", "gemma")
FAMILIES = [*BYTE_LEVEL, *BYTE_FALLBACK]


TRAINED_BYTES = 16_000
"""Of each bundled text."""


def training_text() -> Iterator[str]:
    yield from tokenizer_check.sample()
    for path in sorted((Path(__file__).parents[2] / "xent_quant/data").rglob("*.txt")):
        yield from path.read_bytes()[:TRAINED_BYTES].decode("utf-8", "ignore").split("\n\n")


def saved(folder: Path, value: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    vocab = value["model"]["vocab"]
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    config = TINY | {"vocab_size": 1 + max([*ids, *(token["id"] for token in value["added_tokens"])])}
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    return folder


def byte_level(
    folder: Path,
    steps: list[pre_tokenizers.PreTokenizer],
    *,
    ignore_merges: bool = False,
    nfc: bool = False,
    text: list[str] | None = None,
    size: int = VOCABULARY,
) -> Path:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.normalizer = normalizers.NFC() if nfc else None
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(training_text() if text is None else text, trainer)
    return saved(folder, json.loads(made.to_str()))


def byte_fallback(folder: Path, family: str) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("▁", prepend_scheme="always"), digits(), pre_tokenizers.Punctuation("isolated")]
    )
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*SPECIALS, "<unk>", *names], limit_alphabet=900, show_progress=False
    )
    made.train_from_iterator(training_text(), trainer)
    value = json.loads(made.to_str())
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] not in names]
    value["model"]["byte_fallback"] = True
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoder = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    value["decoder"] = {"type": "Sequence", "decoders": decoder}
    if family == "llama-2":
        value["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        value["pre_tokenizer"] = None
        value["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    elif family == "llama-2-metaspace":
        value["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        value["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    elif family == "gemma":
        value["normalizer"] = replace
        value["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        value["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
    return saved(folder, value)


def make(folder: Path, family: str) -> Path:
    if family in BYTE_FALLBACK:
        return byte_fallback(folder, family)
    return byte_level(folder, BYTE_LEVEL[family][1](), ignore_merges=family in IGNORING_MERGES, nfc=family in NFC)


def vocabulary_only(spec: Any, target: Path) -> Path:
    """A GGUF without weights: stock llama.cpp loads it for its tokenizer alone."""
    writer = gguf.GGUFWriter(target, "llama")
    tokenizer.write(writer, spec)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return target


def loaded(folder: Path, *, strict: bool = True) -> Any:
    architecture = Architecture.from_config(json.loads((folder / "config.json").read_text()))
    return tokenizer.load(folder, architecture, strict=strict)
