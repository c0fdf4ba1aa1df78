"""A checkpoint's tokenizer as GGUF keys, so that llama.cpp's token ids equal Hugging Face's.

What llama.cpp offers for each kind of tokenizer is tried, and compared with Hugging Face on texts made to tell them apart:
the first that agrees is taken. Nothing is chosen by name.

- Byte-level BPE: model `gpt2` with the pre-tokenizer that splits alike.
- Byte-fallback BPE: model `llama` with score = −(merge rank), whose greedy merging of the best-scored pair is then BPE's
  order; else `gpt2` with a pre-tokenizer that escapes spaces, which merges by rank.
- Unigram: model `t5`.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.gguf import tokenizer_check
from exporters.gguf.llama_tokenizer import ENDS_BY_TEXT, TURN_ENDS, LlamaTokenizer
from exporters.gguf.pretokenizers import ESCAPED_PRE_TOKENIZERS, PRE_TOKENIZERS, PreTokenizer, byte_encoded, decoded, split
from exporters.gguf.tokenizer_spec import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    TokenizerSpec,
    write,
)
from xent_quant.checkpoint import special_tokens
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.chat_template import chat_template
from xent_quant.checkpoint.headers import DAMAGED
from xent_quant.checkpoint.special_tokens import SpecialTokens
from xent_quant.checkpoint.tokenizer import charsmap, from_value, tokenizer_path, tokenizer_value, vocabulary
from xent_quant.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WRITTEN_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
UNUSED_SCORE = -10000.0
LARGEST_SCORE = 3.4e38
"""Of those that float32, as which GGUF has them, holds; about."""

Inexact = Callable[[str], None]


def load(folder: Path, architecture: Architecture, *, strict: bool = True) -> TokenizerSpec:
    """Read a checkpoint's tokenizer. Raises CheckpointError where it is damaged, UnsupportedError where llama.cpp
    cannot express it; without `strict` that is told in the spec's notes where something near can be written."""
    notes: list[str] = []

    def inexact(message: str) -> None:
        if strict:
            raise UnsupportedError(f"{message}; --allow-tokenizer-mismatch exports it all the same")
        notes.append(message)

    path, value = tokenizer_path(folder), tokenizer_value(folder)
    reference = from_value(path, value)
    special = special_tokens.read(folder, reference, architecture.vocab_size)
    spec = _tokens(path, value, special, architecture.vocab_size)
    spec = replace(spec, chat_template=chat_template(folder))
    kind, parts = value["model"].get("type", "BPE"), _parts(value.get("pre_tokenizer"))
    if kind == "Unigram":
        candidates = _unigram(path, spec, value)
    elif kind == "BPE" and value["model"].get("byte_fallback"):
        candidates = _byte_fallback(path, spec, value, reference, inexact)
    elif kind == "BPE" and "ByteLevel" in [part.get("type") for part in (*parts, *_parts(value.get("decoder"), "decoders"))]:
        candidates = _byte_level(path, spec, value, reference, inexact)
    elif kind == "BPE":
        raise UnsupportedError(f"{path}: neither byte-fallback nor byte-level BPE; llama.cpp has no such tokenizer")
    else:
        raise UnsupportedError(f"{path}: a {kind} tokenizer; only BPE and Unigram can be written for llama.cpp")
    chosen = tokenizer_check.first_that_agrees(reference, candidates)
    if chosen.pre in PRE_TOKENIZERS and chosen.model == "gpt2":
        _refuse_tokens_across_splits(path, reference, chosen, inexact)
    return replace(chosen, notes=(*chosen.notes, *special.notes, *notes))


def _parts(step: Any, key: str = "pretokenizers") -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, normalizer or decoder, sequences opened."""
    if not isinstance(step, dict):
        return []
    return [part for nested in step.get(key, ()) for part in _parts(nested, key)] if step.get("type") == "Sequence" else [step]


def _tokens(path: Path, value: dict[str, Any], special: SpecialTokens, size: int) -> TokenizerSpec:
    """Tokens, types and special ids, which no candidate changes."""
    added = {int(token["id"]): token for token in value["added_tokens"]}
    by_id = {index: token for token, index in vocabulary(value).items()} | {i: token["content"] for i, token in added.items()}
    if by_id and max(by_id) >= size:
        raise CheckpointError(
            f"{path}: token id {max(by_id)} does not fit config.json's vocab_size {size}; they belong to different models"
        )
    model = value["model"]
    unknown = model.get("unk_token") or ""
    if isinstance(model.get("unk_id"), int):
        unknown = by_id.get(model["unk_id"], "")
    tokens, notes = _texts(by_id, size)
    kept = {index: token for index, token in by_id.items() if token == tokens[index]}
    types = [_type(index, kept.get(index), added, bool(model.get("byte_fallback")), unknown) for index in range(size)]
    ids = {role: special.ids[role] for role in WRITTEN_ROLES if role in special.ids}
    if unknown in by_id.values():
        ids["unk"] = next(index for index, token in by_id.items() if token == unknown)
    notes += _ends(ids, special, tokens)
    return TokenizerSpec(
        model="gpt2",
        pre="default",
        tokens=tuple(tokens),
        types=tuple(types),
        add_bos=special.add_bos,
        add_eos=special.add_eos,
        special=ids,
        notes=tuple(notes),
    )


def _texts(by_id: dict[int, str], size: int) -> tuple[list[str], list[str]]:
    """The tokens by id, and notes. llama.cpp wants each text once, none empty, and reads up to a zero character."""
    taken, tokens, renamed = set(by_id.values()), [], 0
    for index in range(size):
        token = by_id.get(index)
        if token is None or not token or "\0" in token:
            renamed += token is not None
            token = f"[PAD{index}]"
            while token in taken:
                token = f"[{token}]"
            taken.add(token)
        tokens.append(token)
    told = f"llama.cpp cannot hold {renamed} tokens that are empty or contain a zero character; their text is lost"
    return tokens, [told] if renamed else []


def _type(index: int, token: str | None, added: dict[int, Any], byte_fallback: bool, unknown: str) -> int:
    if token is None:
        return UNUSED
    if unknown and token == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    if byte_fallback and token.startswith("<0x") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return BYTE
    return NORMAL


def _ends(ids: dict[str, int], special: SpecialTokens, tokens: list[str]) -> list[str]:
    """Put further end tokens, of a chat's turn say, where llama.cpp looks for them; into `ids`, and notes."""
    notes = []
    others = list(special.ends[1:])
    if others:
        turn = next((index for index in others if tokens[index] in TURN_ENDS), others[0])
        ids["eot"] = turn
        others.remove(turn)
    unseen = [index for index in others if tokens[index] not in ENDS_BY_TEXT]
    if unseen:
        ids["eom"] = unseen[0]
    if len(unseen) > 1:
        names = ", ".join(repr(tokens[index]) for index in unseen[1:])
        notes.append(f"generation should end at {names} too; llama.cpp has no place for more end tokens")
    if "eos" not in ids:
        notes.append("no file names the token that ends a text; llama.cpp takes one of its own choice")
    elif "bos" not in ids:  # else llama.cpp takes the token of id 1, or 11
        ids["bos"] = ids["eos"]
    return notes


def _merges(value: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges in order of rank; of one that is listed twice Hugging Face takes the last, llama.cpp the first."""
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in value["model"]["merges"]]
    return list(dict.fromkeys(reversed(pairs)))[::-1]


def _unigram(path: Path, spec: TokenizerSpec, value: dict[str, Any]) -> Iterator[TokenizerSpec]:
    scores = [float(score) for _, score in value["model"]["vocab"]]
    for (token, _), score in zip(value["model"]["vocab"], scores, strict=True):
        if not abs(score) <= LARGEST_SCORE:
            raise CheckpointError(
                f"{path}: token {token[:100]!r} has the score {score:g}, which float32 does not hold; {DAMAGED}"
            )
    every = [UNUSED_SCORE if kind == UNUSED else 0.0 for kind in spec.types]
    every[: len(scores)] = scores
    table = charsmap(value.get("normalizer"))
    for prefix in (True, False):
        for merge in (False, True):
            yield replace(
                spec,
                model="t5",
                scores=tuple(every),
                add_space_prefix=prefix,
                remove_extra_whitespaces=merge,
                charsmap=table,
            )


def _byte_fallback(
    path: Path, spec: TokenizerSpec, value: dict[str, Any], reference: "Tokenizer", inexact: Inexact
) -> Iterator[TokenizerSpec]:
    tokens = set(spec.tokens)
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in tokens]
    if missing:  # llama.cpp ends the process over it
        raise UnsupportedError(f"{path}: byte fallback without a token for byte {missing[0]}; llama.cpp needs all 256")
    pairs = _merges(value)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    # A token that no merge makes comes last: llama.cpp makes it of any two neighbours that spell it. Single characters and
    # bytes are never looked up.
    scores = tuple(-float(ranks.get(token, len(pairs))) for token in spec.tokens)
    scored = replace(spec, model="llama", scores=scores)
    merging = replace(spec, merges=tuple(f"{left} {right}" for left, right in pairs if " " not in left + right))
    crossing = _crossing(reference, [t for t, kind in zip(spec.tokens, spec.types, strict=True) if kind == NORMAL])
    if crossing is not None:
        inexact(
            f"{path}: token {crossing!r} crosses a split of its pre-tokenizer; llama.cpp would form it, Hugging Face never does"
        )
    yield replace(scored, add_space_prefix=True)
    yield replace(scored, add_space_prefix=False)
    for name in ESCAPED_PRE_TOKENIZERS:
        yield replace(merging, pre=name)


def _crossing(reference: "Tokenizer", tokens: list[str]) -> str | None:
    """llama.cpp's model `llama` does not split a text before it merges; it needs not as long as no token crosses a split.
    The first that does."""
    return next((t for t in tokens if len(t) > 1 and len(_words(reference, t.replace("▁", " "))) > 1), None)


def _byte_level(
    path: Path, spec: TokenizerSpec, value: dict[str, Any], reference: "Tokenizer", inexact: Inexact
) -> Iterator[TokenizerSpec]:
    spec = replace(spec, merges=tuple(map(" ".join, _merges(value))))
    ordinary, others = _Splits(reference, tokenizer_check.sample()), _Splits(reference, tokenizer_check.beyond())
    names = [name for name, pre in PRE_TOKENIZERS.items() if ordinary.all_alike(pre)]
    if names:
        names.sort(key=lambda name: -others.alike(PRE_TOKENIZERS[name]))
    else:
        names = sorted(PRE_TOKENIZERS, key=lambda name: -ordinary.alike(PRE_TOKENIZERS[name]))
    ignore = bool(value["model"].get("ignore_merges"))
    same = [name for name in names if PRE_TOKENIZERS[name].ignore_merges == ignore]
    if not same:
        token = _unmerged(value)
        if token is not None:
            inexact(
                f"{path}: token {token!r} is {'taken whole' if ignore else 'not reached'} where its merges do not make it; "
                f"llama.cpp's pre-tokenizer {names[0]} does the opposite"
            )
        same = names
    for name in same:
        yield replace(spec, pre=name)


def _words(reference: "Tokenizer", text: str) -> list[str]:
    """What Hugging Face merges within, byte-encoded where it does so."""
    normal = text if reference.normalizer is None else reference.normalizer.normalize_str(text)
    steps = reference.pre_tokenizer
    return [normal] if steps is None else [word for word, _ in steps.pre_tokenize_str(normal)]


class _Splits:
    """How Hugging Face splits some texts, to compare with."""

    def __init__(self, reference: "Tokenizer", texts: list[str]) -> None:
        self._wanted = [(text, _words(reference, text)) for text in texts]

    def _compared(self, pre: PreTokenizer) -> Iterator[bool]:
        return (words == [byte_encoded(word) for word in split(pre, text)] for text, words in self._wanted)

    def alike(self, pre: PreTokenizer) -> int:
        """How many texts are split in the same way."""
        return sum(self._compared(pre))

    def all_alike(self, pre: PreTokenizer) -> bool:
        return all(self._compared(pre))


def _refuse_tokens_across_splits(path: Path, reference: "Tokenizer", spec: TokenizerSpec, inexact: Inexact) -> None:
    """Ids may be equal although the splits are not, as long as no token lies across one; so every token is tried as a text."""
    if _Splits(reference, tokenizer_check.sample()).all_alike(PRE_TOKENIZERS[spec.pre]):
        return
    texts = [decoded(token) for token, kind in zip(spec.tokens, spec.types, strict=True) if kind == NORMAL]
    difference = tokenizer_check.first_difference(reference, LlamaTokenizer(spec), [text for text in texts if text])
    if difference:
        inexact(f"{path}: llama.cpp's pre-tokenizer {spec.pre} is the nearest, and forms tokens otherwise, at {difference}")


def _unmerged(value: dict[str, Any]) -> str | None:
    """The first token that merging does not make, so that it matters whether merges are ignored; None where there is none."""
    from tokenizers import Tokenizer

    merging = Tokenizer.from_str(json.dumps(value | {"model": value["model"] | {"ignore_merges": False}}, ensure_ascii=False))
    added = {token["content"] for token in value["added_tokens"]}
    return next((t for t in vocabulary(value) if t not in added and len(merging.model.tokenize(t)) > 1), None)


__all__ = ["BYTE", "LlamaTokenizer", "TokenizerSpec", "load", "write"]
