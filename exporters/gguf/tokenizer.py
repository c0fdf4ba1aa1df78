"""tokenizer.json as GGUF keys, so that llama.cpp's token ids equal Hugging Face's.

Byte-fallback BPE goes to llama.cpp's model `llama` with score = −(merge rank): its greedy merging of the best-scored
pair is then BPE's order. Byte-level BPE goes to `gpt2` with the pre-tokenizer whose regex is the same.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.headers import read_json
from xent_quant.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REGEX_BY_PRE = {"llama-bpe": LLAMA3, "qwen2": QWEN2, "gpt-2": GPT2}


@dataclass(frozen=True)
class TokenizerSpec:
    """What goes into the GGUF: tokens by id with type and score, and for `gpt2` the merges."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool
    notes: tuple[str, ...]


def load(folder: Path, architecture: Architecture, *, strict: bool = True) -> TokenizerSpec:
    """Read a checkpoint's tokenizer. Raises CheckpointError where it is damaged, UnsupportedError where llama.cpp
    cannot express it; without `strict` that is told in the spec's notes where something near can be written."""
    notes: list[str] = []

    def inexact(message: str) -> None:
        if strict:
            raise UnsupportedError(f"{message}; --allow-tokenizer-mismatch exports it all the same")
        notes.append(message)

    path = folder / "tokenizer.json"
    value = read_json(path)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    try:
        model = value["model"]
        kind, vocab = model["type"], model["vocab"]
        added = {int(token["id"]): token for token in value.get("added_tokens") or []}
        if kind != "BPE":
            raise UnsupportedError(f"{path}: a {kind} tokenizer; only BPE can be written for llama.cpp")
        by_id: dict[int, str] = {int(index): token for token, index in vocab.items()}
        by_id |= {index: token["content"] for index, token in added.items()}
        merges = [tuple(item.split(" ", 1)) if isinstance(item, str) else tuple(item) for item in model["merges"]]
        if any(len(merge) != 2 for merge in merges):
            raise CheckpointError(f"{path}: a merge is not a pair; the file is damaged, download it again")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a tokenizer ({type(error).__name__}: {error}); download it again") from error
    if value.get("normalizer"):
        inexact(f"{path}: normalizer {value['normalizer'].get('type')} cannot be expressed in llama.cpp")
    size = architecture.vocab_size
    if by_id and max(by_id) >= size:
        raise CheckpointError(
            f"{path}: token id {max(by_id)} does not fit config.json's vocab_size {size}; they belong to different models"
        )
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    parts = _parts(value.get("pre_tokenizer"))
    kinds = [part.get("type") for part in parts]
    byte_fallback = bool(model.get("byte_fallback"))
    types = [_token_type(index, tokens[index], index in by_id, added, byte_fallback) for index in range(size)]
    add = (bool(settings.get("add_bos_token", False)), bool(settings.get("add_eos_token", False)))
    if byte_fallback:
        others = set(kinds) - {"Metaspace", "Digits", "Punctuation", None}
        if others:
            inexact(f"{path}: pre-tokenizer {', '.join(sorted(map(str, others)))} with byte fallback cannot be expressed")
        prefix = next((_prefix(part) for part in parts if part.get("type") == "Metaspace"), False)
        crossing = _crossing(kinds, [token for index, token in by_id.items() if types[index] == NORMAL])
        if crossing:
            inexact(f"{path}: {crossing}; llama.cpp would form it, Hugging Face never does")
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        # Only merged tokens are ever looked up by score; characters and bytes need none.
        scores = [-float(ranks.get(token, 0)) for token in tokens]
        return TokenizerSpec("llama", "default", tuple(tokens), tuple(types), tuple(scores), (), prefix, *add, tuple(notes))
    if "ByteLevel" not in kinds:
        raise UnsupportedError(f"{path}: neither byte-fallback nor byte-level BPE; llama.cpp has no such tokenizer")
    regex = next((part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"), GPT2)
    pre = next((name for name, known in REGEX_BY_PRE.items() if known == regex), None)
    if pre is None:
        inexact(f"{path}: its splitting regex is none of those that llama.cpp knows ({', '.join(REGEX_BY_PRE)})")
        pre = "llama-bpe"
    joined = tuple(f"{left} {right}" for left, right in merges)
    return TokenizerSpec("gpt2", pre, tuple(tokens), tuple(types), (0.0,) * size, joined, False, *add, tuple(notes))


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]


def _prefix(metaspace: dict[str, Any]) -> bool:
    """Whether a space is put before the text; `add_prefix_space` is how tokenizers before 0.19 wrote it."""
    scheme = metaspace.get("prepend_scheme")
    return scheme != "never" if scheme is not None else bool(metaspace.get("add_prefix_space", True))


def _token_type(index: int, token: str, present: bool, added: dict[int, Any], byte_fallback: bool) -> int:
    if not present:
        return UNUSED
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    if byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return BYTE
    return UNKNOWN if token == "<unk>" else NORMAL


def _crossing(kinds: list[str | None], tokens: list[str]) -> str | None:
    """Digits and Punctuation only split; llama.cpp needs no such step as long as no token crosses a split. The first that
    does, in words."""
    from tokenizers import pre_tokenizers

    splitters = {
        "Digits": pre_tokenizers.Digits(individual_digits=True),
        "Punctuation": pre_tokenizers.Punctuation("isolated"),
    }
    for kind, splitter in splitters.items():
        if kind in kinds:
            crossing = next((token for token in tokens if len(token) > 1 and len(splitter.pre_tokenize_str(token)) > 1), None)
            if crossing is not None:
                return f"token {crossing!r} crosses a {kind} split"
    return None


def write(writer: gguf.GGUFWriter, spec: TokenizerSpec, architecture: Architecture) -> None:
    """Add every tokenizer key to the file."""
    writer.add_tokenizer_model(spec.model)
    writer.add_tokenizer_pre(spec.pre)
    writer.add_token_list([token.encode("utf-8") for token in spec.tokens])
    writer.add_token_types(list(spec.types))
    if spec.model == "llama":
        writer.add_token_scores(list(spec.scores))
    else:
        writer.add_token_merges(list(spec.merges))
    writer.add_add_space_prefix(spec.add_space_prefix)
    writer.add_add_bos_token(spec.add_bos)
    writer.add_add_eos_token(spec.add_eos)
    for token, add in (
        (architecture.bos_token_id, writer.add_bos_token_id),
        (architecture.eos_token_id, writer.add_eos_token_id),
        (architecture.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)


__all__ = ["TokenizerSpec", "load", "write"]
