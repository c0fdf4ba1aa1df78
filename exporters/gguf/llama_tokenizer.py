"""Tokenises as llama.cpp will, from the keys that a GGUF is going to hold.

Written from llama.cpp's src/llama-vocab.cpp (tokenizer_st_partition and the sessions of its SPM, BPE and UGM tokenizers): the
check of an export needs no llama.cpp, so that it runs before a weight is read; the tests hold it against stock llama.cpp.
"""

import heapq
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from exporters.gguf.pretokenizers import ESCAPED_PRE_TOKENIZERS, PRE_TOKENIZERS, byte_encoded, split
from exporters.gguf.tokenizer_spec import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, TokenizerSpec

ENDS_BY_TEXT = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
"""Tokens that end a text for llama.cpp, whatever the file says; it takes them for control tokens."""

TURN_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
    ]
)
"""Among them those that end a turn (eot)."""

RENDERED = frozenset(["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"])
"""Tokens that llama.cpp takes for user-defined."""

UNKNOWN_PENALTY = 10.0
Found = tuple[float, int, int, str]
Candidate = Callable[[int, int], Found | None]


class LlamaTokenizer:
    """`encode` is llama_tokenize."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec
        self._ids = {token: index for index, token in enumerate(spec.tokens)}
        self._bytes = {int(spec.tokens[i][3:5], 16): i for i, kind in enumerate(spec.types) if kind == BYTE}
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(spec.merges):
            cut = merge.find(" ", 1)
            self._ranks.setdefault((merge[:cut], merge[cut + 1 :]), rank)
        self._pre = (PRE_TOKENIZERS | ESCAPED_PRE_TOKENIZERS).get(spec.pre, PRE_TOKENIZERS["default"])
        self._words: dict[str, list[int]] = {}

    @cached_property
    def _whole(self) -> list[tuple[str, int, bool]]:
        """(text, id, only where special tokens are parsed) of what a text is cut at, the longest first."""
        found = []
        for index, (token, kind) in enumerate(zip(self._spec.tokens, self._spec.types, strict=True)):
            if token in RENDERED:
                found.append((token, index, False))
            elif kind in (CONTROL, UNKNOWN) or token in ENDS_BY_TEXT:
                found.append((token, index, True))
            elif kind == USER_DEFINED:
                found.append((token, index, False))
        return sorted(found, key=lambda item: -len(item[0].encode()))

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        spec = self._spec
        ids = [spec.special["bos"]] if add_special and spec.add_bos else []
        after_special = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            elif spec.model == "gpt2":
                ids += self._encode_bpe(part)
            elif spec.model == "t5":
                ids += self._unigram.encode(part)
            else:
                ids += self._encode_spm((" " if after_special and spec.add_space_prefix else "") + part)
            after_special = isinstance(part, int)
        return ids + ([spec.special["eos"]] if add_special and spec.add_eos else [])

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        parts: list[str | int] = [text] if text else []
        for token, index, special in self._whole:
            if token not in text or (special and not parse_special):
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int) or token not in part:
                    cut.append(part)
                    continue
                for number, piece in enumerate(part.split(token)):
                    cut += [index] if number else []
                    cut += [piece] if piece else []
            parts = cut
        return parts

    def _encode_spm(self, text: str) -> list[int]:
        """Greedy merging of the best-scored pair of neighbours that is a token; the leftmost of equals."""
        spec, ids = self._spec, self._ids
        pieces: list[str | None] = list(text.replace(" ", "▁"))

        def score(left: int, right: int) -> Found | None:
            joined = f"{pieces[left]}{pieces[right]}"
            return (-spec.scores[ids[joined]], left, right, joined) if joined in ids else None

        return [index for piece in merged(pieces, score) for index in self._resolve(piece)]

    def _resolve(self, piece: str) -> list[int]:
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._bytes.get(byte, -1) for byte in piece.encode("utf-8")]

    def _encode_bpe(self, text: str) -> list[int]:
        """Words by the pre-tokenizer's regexes, merges by rank."""
        result: list[int] = []
        for word in split(self._pre, text):
            found = self._words.get(word)
            if found is None:
                self._words[word] = found = self._encode_word(word if self._pre.escape_spaces else byte_encoded(word))
            result += found
        return result

    def _encode_word(self, word: str) -> list[int]:
        lone_newlines = self._pre.word_prefix and not word.strip("\n")
        if (self._pre.ignore_merges or lone_newlines) and word in self._ids:
            return [self._ids[word]]
        pieces: list[str | None] = list(word)

        def rank(left: int, right: int) -> Found | None:
            pair = (str(pieces[left]), str(pieces[right]))
            return (self._ranks[pair], left, right, "".join(pair)) if pair in self._ranks else None

        result: list[int] = []
        for piece in merged(pieces, rank):
            if piece in self._ids:
                result.append(self._ids[piece])
            else:  # what has no token is left out
                names = [f"<0x{byte:02X}>" if self._pre.escape_spaces else chr(byte) for byte in piece.encode()]
                result += [self._ids[name] for name in names if name in self._ids]
        return result

    @cached_property
    def _unigram(self) -> "_Unigram":
        return _Unigram(self._spec)


def merged(pieces: list[str | None], candidate: Candidate) -> list[str]:
    """Merge neighbours, least candidate first, until none is left. `pieces` is used up."""
    following = [*range(1, len(pieces)), -1]
    before = [*range(-1, len(pieces) - 1)]
    queue = [found for left in range(len(pieces) - 1) if (found := candidate(left, left + 1))]
    heapq.heapify(queue)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        first, second = pieces[left], pieces[right]
        if first is None or second is None or first + second != joined:
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


class _Best(NamedTuple):
    score: float
    token: int
    start: int


class _Unigram:
    """The likeliest cut of a text into tokens."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec
        self._unknown = spec.special.get("unk", 2)
        scores = [float(np.float32(score)) for score in spec.scores]
        normal = [score for score, kind in zip(scores, spec.types, strict=True) if kind == NORMAL]
        self._unknown_score = min(normal, default=0.0) - UNKNOWN_PENALTY
        self._tokens = {
            token: (index, 0.0 if kind == USER_DEFINED else scores[index])
            for index, (token, kind) in enumerate(zip(spec.tokens, spec.types, strict=True))
            if kind in (NORMAL, USER_DEFINED, UNUSED)
        }
        self._longest = max((len(token) for token in self._tokens), default=1)
        self._whole = [t for t, kind in zip(spec.tokens, spec.types, strict=True) if kind == USER_DEFINED]
        self._charsmap = _Charsmap(spec.charsmap) if spec.charsmap else None

    def encode(self, text: str) -> list[int]:
        text = self._normalized(text)
        best = [_Best(0.0, self._unknown, 0)] + [_Best(-np.finfo(float).max, self._unknown, 0)] * len(text)
        for start in range(len(text)):
            single = False
            for end in range(start + 1, min(start + self._longest, len(text)) + 1):
                found = self._tokens.get(text[start:end])
                if found is not None:
                    single = single or end == start + 1
                    if best[start].score + found[1] > best[end].score:
                        best[end] = _Best(best[start].score + found[1], found[0], start)
            if not single and best[start].score + self._unknown_score > best[start + 1].score:
                best[start + 1] = _Best(best[start].score + self._unknown_score, self._unknown, start)
        ids: list[int] = []
        at = len(text)
        while at:
            if not (ids and ids[-1] == self._unknown == best[at].token):
                ids.append(best[at].token)
            at = best[at].start
        return ids[::-1]

    def _normalized(self, text: str) -> str:
        spec = self._spec
        merge, result, prepended, inside = spec.remove_extra_whitespaces, "", False, False
        for char in self._mapped(text):
            if char != " ":
                if not inside and ((spec.add_space_prefix and not prepended) or merge):
                    result += "▁"
                    prepended = True
                inside = True
                result += char
            else:
                inside = False
                result += "" if merge else "▁"
        return result

    def _mapped(self, text: str) -> str:
        if self._charsmap is None:
            return text
        data, result, at = text.encode(), b"", 0
        whole = [token.encode() for token in self._whole]
        while at < len(data):
            token = max((token for token in whole if data.startswith(token, at)), key=len, default=b"")
            size, replacement = (len(token), token) if token else self._charsmap.longest(data, at)
            result += replacement
            at += size
        return result.decode("utf-8", "replace")


class _Charsmap:
    """SentencePiece's map of prefixes to replacements: a XOR-compressed double array, then the texts, each ending in a zero."""

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        self._nodes = np.frombuffer(data[4 : 4 + size], "<u4").tolist()
        self._texts = data[4 + size :]

    def longest(self, data: bytes, at: int) -> tuple[int, bytes]:
        """(bytes used, what replaces them) at an offset of a text; a character that is not in the map stays."""
        nodes = self._nodes

        def base(node: int) -> int:
            return int((node >> 10) << ((node & 0x200) >> 6))

        index, size, found = base(nodes[0]), 0, -1
        for offset in range(at, len(data)):
            index ^= data[offset]
            if data[offset] == 0 or index >= len(nodes) or nodes[index] & 0x800000FF != data[offset]:
                break
            leaf = nodes[index] >> 8 & 1
            index ^= base(nodes[index])
            if leaf:
                size, found = offset - at + 1, nodes[index] & 0x7FFFFFFF
        if size:
            return size, self._texts[found : self._texts.index(0, found)]
        size = next((n for n in (1, 2, 3) if at + n >= len(data) or data[at + n] & 0xC0 != 0x80), 4)
        return size, data[at : at + size]
