"""Compares how llama.cpp will tokenise, from the keys that a GGUF is going to hold, with Hugging Face.

Three kinds of texts: those that a model of English and Chinese meets, which must agree; others, where a difference is told;
and such with special tokens inside, as chat programs make them.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.gguf.llama_tokenizer import LlamaTokenizer
from exporters.gguf.tokenizer_spec import CONTROL, USER_DEFINED, TokenizerSpec
from xent_quant.checkpoint import sentencepiece_model
from xent_quant.checkpoint.headers import read_json
from xent_quant.checkpoint.tokenizer import load_tokenizer, tokenizer_path
from xent_quant.errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEYOND = "<|beyond|>"
WHITE_SPACE = (
    "a\r\nb\r\n\r\nc\n\n\n d\n \n\t\n  e   \n\n   f\t\tg \t h  ",
    "\n\nstarts with two newlines, ends with three\n\n\n",
    "x     y          z                    w\t\t\t\tv\n\n\n\n\n\nu",
    "if x:\n    for y in z:\n        print(y)\n\n\ndef f(a, b=1):\n\treturn a+b  # sum\n",
    "第一行\n\n　　第二行，前有全角空格。\r\n\t第三行\u3000\n\n\n。\n！\n",
)
LEADING_SPACE = (" starts with a space", "   starts with three", " ", "   ")
SPECIAL_TOKENS_TRIED = 12


@cache
def _paragraphs() -> tuple[tuple[str, ...], tuple[str, ...]]:
    text = (resources.files("exporters.gguf") / "tokenizer_sample.txt").read_text("utf-8")
    ordinary, beyond = text.split(f"\n\n{BEYOND}\n\n")
    return tuple(p for p in ordinary.split("\n\n") if p), tuple(p for p in beyond.split("\n\n") if p)


def sample() -> list[str]:
    """English and Chinese, code, numbers, white space, punctuation: on these ids must be equal."""
    paragraphs, _ = _paragraphs()
    return [*paragraphs, *WHITE_SPACE, "\n\n".join(paragraphs)]


def beyond() -> list[str]:
    """What an export may get otherwise, if it says so: other scripts, combining marks, emoji that hold them, text that begins
    with a space."""
    return [*_paragraphs()[1], *LEADING_SPACE]


def with_special_tokens(spec: TokenizerSpec) -> list[str]:
    """Texts that hold the tokenizer's special and user-defined tokens."""
    kinds = {CONTROL: [], USER_DEFINED: []}  # type: dict[int, list[str]]
    for token, kind in zip(spec.tokens, spec.types, strict=True):
        if kind in kinds:
            kinds[kind].append(token)
    roles = [spec.tokens[index] for index in spec.special.values()]
    tokens = list(dict.fromkeys([*roles, *kinds[CONTROL][:SPECIAL_TOKENS_TRIED], *kinds[USER_DEFINED][:SPECIAL_TOKENS_TRIED]]))
    texts = [f"{token}Hello{token}\n你好 {token} 12 {token}" for token in tokens[: 2 * SPECIAL_TOKENS_TRIED]]
    return [*texts, *(f"{first}user\nHi!{second}\n" for first, second in pairwise(tokens))]


def first_difference(
    reference: "Tokenizer", ours: LlamaTokenizer, texts: Iterable[str], *, special: bool = False, around: bool = False
) -> str | None:
    """Where the two tokenise one of `texts` differently: the text around, for a message; None where all ids are equal.

    `special`: special tokens inside a text are parsed. `around`: those that are added at its ends are compared, too.
    """
    for text in texts:
        wanted = reference.encode(text, add_special_tokens=around).ids
        got = ours.encode(text, parse_special=special, add_special=around)
        if wanted != got:
            index = next(
                (i for i, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), min(len(wanted), len(got))
            )
            near = reference.decode(wanted[max(0, index - 4) : index + 4], skip_special_tokens=False)
            return f"{near!r}: Hugging Face {wanted[index : index + 4]}, llama.cpp {got[index : index + 4]}"
    return None


def first_that_agrees(reference: "Tokenizer", candidates: Iterable[TokenizerSpec]) -> TokenizerSpec:
    """Of what llama.cpp offers the first with which all texts agree that must; else that with which most do."""
    best: tuple[int, ...] | None = None
    for candidate in candidates:
        ours, special = LlamaTokenizer(candidate), with_special_tokens(candidate)

        def agreeing(texts: Sequence[str], parse_special: bool = False, ours: LlamaTokenizer = ours) -> int:
            return sum(
                reference.encode(text, add_special_tokens=False).ids == ours.encode(text, parse_special=parse_special)
                for text in texts
            )

        rank = (agreeing(sample()), agreeing(special, True), agreeing(beyond()))
        if best is None or rank > best:
            best, chosen = rank, candidate
        if rank[:2] == (len(sample()), len(special)):
            break
    return chosen


def _kind(folder: Path) -> str:
    """A tokenizer's steps in words, for a message."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "tokenizer.model"
    value = read_json(path)

    def names(step: object, key: str) -> list[str]:
        if not isinstance(step, dict):
            return []
        return [name for part in step[key] for name in names(part, key)] if key in step else [str(step.get("type"))]

    steps = [
        f"{word} {', '.join(found)}"
        for word, key, nested in (
            ("normalizer", "normalizer", "normalizers"),
            ("pre-tokenizer", "pre_tokenizer", "pretokenizers"),
        )
        if (found := names(value.get(key), nested))
    ]
    return "; ".join([str(value["model"].get("type", "BPE")), *steps])


def verify(folder: Path, spec: TokenizerSpec, *, strict: bool = True) -> tuple[str, ...]:
    """Compare a chosen spec with Hugging Face. Notes for the person: where ids will differ, or a known exception.

    Raises UnsupportedError where they differ, unless `strict` is false.
    """
    path = tokenizer_path(folder)
    reference, ours, notes = load_tokenizer(folder), LlamaTokenizer(spec), list(spec.notes)

    def refuse(message: str) -> None:
        message = f"{path}: {message}"
        if strict:
            raise UnsupportedError(f"{message}; --allow-tokenizer-mismatch exports it all the same")
        notes.append(message)

    if path.name == "tokenizer.model":
        text = sentencepiece_model.difference(path, reference, sample())
        if text is not None:
            refuse(f"cannot be reproduced, at {text[:60]!r}")
    ordinary = difference = first_difference(reference, ours, sample())
    if difference:
        refuse(f"llama.cpp will tokenise differently ({_kind(folder)}), first at {difference}")
    difference = first_difference(reference, ours, with_special_tokens(spec), special=True)
    if difference and spec.add_space_prefix:
        notes.append(f"Text after a special token gets a space from llama.cpp, not from Hugging Face: first at {difference}")
    elif difference:
        refuse(f"llama.cpp will tokenise text around special tokens differently, first at {difference}")
    difference = None if ordinary else first_difference(reference, ours, beyond())
    if difference:
        notes.append(
            "Token ids equal Hugging Face's on English and Chinese; other text llama.cpp may split differently "
            f"(pre-tokenizer {spec.pre}): first at {difference}"
        )
    return tuple(notes)
