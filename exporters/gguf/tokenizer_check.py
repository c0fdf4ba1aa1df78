"""Tokenises as llama.cpp will, from the keys that a GGUF is going to hold, and compares with Hugging Face.

Written from llama.cpp's src/llama-vocab.cpp (llm_tokenizer_spm_session, llm_tokenizer_bpe_session): the check needs no
llama.cpp, so that it runs before a weight is read; the tests hold it against stock llama.cpp.
"""

import heapq
from functools import cache
from importlib import resources
from pathlib import Path

from exporters.gguf.tokenizer import BYTE, REGEX_BY_PRE, USER_DEFINED, TokenizerSpec
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import UnsupportedError

WHOLE_WORDS_FIRST = {"llama-bpe"}
"""Pre-tokenizers with which llama.cpp takes a word that is a token as it is, without merging."""


def sample() -> list[str]:
    """The bundled bilingual texts, one a paragraph: punctuation, digits, spaces, emoji, rare characters."""
    text = (resources.files("exporters.gguf") / "tokenizer_sample.txt").read_text("utf-8")
    return [paragraph for paragraph in text.split("\n\n") if paragraph]


def first_difference(folder: Path, spec: TokenizerSpec, texts: list[str]) -> str | None:
    """Where the two tokenise one of `texts` differently: the text around, for a message; None where all ids are equal.

    Raises CheckpointError where Hugging Face cannot load the tokenizer.
    """
    reference, ours = load_tokenizer(folder), LlamaTokenizer(spec)
    for text in texts:
        wanted, got = reference.encode(text, add_special_tokens=False).ids, ours.encode(text)
        if wanted != got:
            index = next(
                (i for i, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), min(len(wanted), len(got))
            )
            return (
                f"{reference.decode(wanted[max(0, index - 4) : index + 4])!r}: Hugging Face {wanted[index : index + 4]}, "
                f"llama.cpp {got[index : index + 4]}"
            )
    return None


def verify(folder: Path, spec: TokenizerSpec, *, strict: bool = True) -> tuple[str, ...]:
    """Compare on the bundled sample. Notes for the person: where ids will differ, or a known exception.

    Raises UnsupportedError where they differ, unless `strict` is false.
    """
    difference = first_difference(folder, spec, sample())
    if difference:
        message = f"{folder / 'tokenizer.json'}: llama.cpp will tokenise differently, at {difference}"
        if strict:
            raise UnsupportedError(f"{message}; --allow-tokenizer-mismatch exports it all the same")
        return (*spec.notes, message)
    return (*spec.notes, SPACE_PREFIX_NOTE) if spec.add_space_prefix else spec.notes


SPACE_PREFIX_NOTE = (
    "Token ids equal Hugging Face's, except that llama.cpp puts one more space before a text that begins with one, and "
    "before text after a special token."
)


class LlamaTokenizer:
    """Plain text to ids, special tokens not parsed."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec
        self._ids: dict[str, int] = {}
        for index, token in enumerate(spec.tokens):
            self._ids.setdefault(token, index)
        self._bytes = {int(spec.tokens[i][3:5], 16): i for i, kind in enumerate(spec.types) if kind == BYTE}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(spec.merges)}
        self._whole = sorted(
            (token for token, kind in zip(spec.tokens, spec.types, strict=True) if kind == USER_DEFINED and token),
            key=len,
            reverse=True,
        )

    def encode(self, text: str) -> list[int]:
        if self._spec.model == "gpt2":
            return [index for part in self._partition(text) for index in self._encode_bpe(part)]
        ids: list[int] = []
        first = True
        for part in self._partition(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_spm((" " if first and self._spec.add_space_prefix else "") + part)
            first = False
        return ids

    def _partition(self, text: str) -> list[str | int]:
        """Text cut at user-defined tokens, longest first."""
        parts: list[str | int] = [text] if text else []
        for token in self._whole:
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int) or token not in part:
                    cut.append(part)
                    continue
                for number, piece in enumerate(part.split(token)):
                    cut += [self._ids[token]] if number else []
                    cut += [piece] if piece else []
            parts = cut
        return parts

    def _encode_spm(self, text: str) -> list[int]:
        """Greedy merging of the best-scored pair of neighbours that is a token; the leftmost of equals."""
        spec, ids = self._spec, self._ids
        pieces: list[str | None] = list(text.replace(" ", "▁"))

        def score(left: int, right: int) -> tuple[float, int, int, str] | None:
            joined = f"{pieces[left]}{pieces[right]}"
            return (-spec.scores[ids[joined]], left, right, joined) if joined in ids else None

        return [index for piece in self._merge(pieces, score) for index in self._resolve(piece)]

    def _resolve(self, piece: str) -> list[int]:
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._bytes[byte] for byte in piece.encode("utf-8")]

    def _encode_bpe(self, part: str | int) -> list[int]:
        """Byte-level BPE: words by the pre-tokenizer's regex, merges by rank."""
        if isinstance(part, int):
            return [part]
        result: list[int] = []
        for word, _ in _splitter(self._spec.pre).pre_tokenize_str(part):
            if self._spec.pre in WHOLE_WORDS_FIRST and word in self._ids:
                result.append(self._ids[word])
                continue
            pieces: list[str | None] = list(word)

            def rank(left: int, right: int, pieces: list[str | None] = pieces) -> tuple[float, int, int, str] | None:
                pair = (str(pieces[left]), str(pieces[right]))
                return (self._ranks[pair], left, right, "".join(pair)) if pair in self._ranks else None

            result += [self._ids[piece] for piece in self._merge(pieces, rank)]
        return result

    @staticmethod
    def _merge(pieces, candidate) -> list[str]:  # type: ignore[no-untyped-def]
        """Merge neighbours, least candidate first, until none is left. `pieces` is used up."""
        following = [*range(1, len(pieces)), -1]
        before = [*range(-1, len(pieces) - 1)]
        queue = [found for left in range(len(pieces) - 1) if (found := candidate(left, left + 1))]
        heapq.heapify(queue)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if pieces[left] is None or pieces[right] is None or pieces[left] + pieces[right] != joined:
                continue  # a neighbour was merged meanwhile
            pieces[left], pieces[right] = joined, None
            following[left] = following[right]
            if following[right] >= 0:
                before[following[right]] = left
            if before[left] >= 0 and (found := candidate(before[left], left)):
                heapq.heappush(queue, found)
            if following[left] >= 0 and (found := candidate(left, following[left])):
                heapq.heappush(queue, found)
        return [piece for piece in pieces if piece is not None]


@cache
def _splitter(pre: str):  # type: ignore[no-untyped-def]
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(REGEX_BY_PRE[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
