r"""How stock llama.cpp cuts a text into words, for every `tokenizer.ggml.pre` that behaves differently.

Which regexes belong to which name is read from llama.cpp's src/llama-vocab.cpp (llm_tokenizer_bpe), how they are applied from
src/unicode.cpp (unicode_regex_split): one after the other, each on the pieces that the one before left. Where a regex names
Unicode categories, every character beyond ASCII is first replaced by one that stands for its category, white space by a
vertical tab; so "É" is neither in [A-Z] nor in [^a-z]'s complement, which is why upper and lower case beyond ASCII, and
combining marks, can be cut differently from Hugging Face. Names that llama.cpp treats alike appear once.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

N3_FROM_RIGHT = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?![\p{N}]))"
"""llama.cpp has this one in C++: digits in threes from the right, the first of them with all that precedes it."""

_CASELESS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _CASELESS + "|" + _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CASELESS + "|" + _WORD + r"|\p{N}" + _REST
_QWEN35 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_CHEAP_UPPER, _CHEAP_LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_MARKED_UPPER, _MARKED_LOWER = r"((?=[\p{L}\p{M}])([^a-z]))", r"((?=[\p{L}\p{M}])([^A-Z]))"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
LATIN = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d"
    "\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-"
    "\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-"
    "\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-"
    "\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    "\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-"
    "\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80"
    "-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters of alphabets with upper and lower case, as DeepSeek lists them."""


def _cased(upper: str, lower: str, suffix: str, digits: str, newline: str = "[\\r\\n/]*") -> str:
    """o200k's shape: words cut before an upper-case letter, with their contraction."""
    words = f"[^\\r\\n\\p{{L}}\\p{{N}}]?{upper}*{lower}+{suffix}|[^\\r\\n\\p{{L}}\\p{{N}}]?{upper}+{lower}*{suffix}"
    return f"{words}|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+{newline}{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """`ignore_merges`: a word that is a token is taken as it is, without merging. `escape_spaces`: text is not byte-encoded;
    a space becomes ▁, and what is no token the byte tokens <0xXX>. `word_prefix`: then every line starts with ▁, and every ▁
    starts a word."""

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    escape_spaces: bool = False
    word_prefix: bool = False


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "qwen2": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "gpt-4o": PreTokenizer((_cased(_CHEAP_UPPER, _CHEAP_LOWER, _CASELESS + "?", r"\p{N}{1,3}"),)),
    "tekken": PreTokenizer((_cased(_CHEAP_UPPER, _CHEAP_LOWER, "", r"\p{N}"),), ignore_merges=True),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _PUNCTUATED + "[\r\n]*" + _SPACES)),
    "deepseek-llm": PreTokenizer(
        ("[\r\n]", rf"\s?[{LATIN}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom": PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "viking": PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
    "bailingmoe": PreTokenizer(
        (rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
    ),
    "seed-coder": PreTokenizer((rf"{_CASELESS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}",)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", rf"{_CASELESS}|{_WORD}|\p{{N}}+{_REST}"), ignore_merges=True),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "ufakzeka": PreTokenizer((_WORD + r"|\p{N}" + _REST,)),
    "tiny_aya": PreTokenizer((N3_FROM_RIGHT, _cased(_UPPER, _LOWER, _CASELESS + "?", r"\p{N}{1,3}"))),
    "granite-embed-multi-97m": PreTokenizer(
        (_cased(_MARKED_UPPER, _MARKED_LOWER, _CASELESS + "?", r"\p{N}{1,3}"),), ignore_merges=True
    ),
    "youtu": PreTokenizer(
        (
            "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
            _cased(_UPPER, _LOWER, _CASELESS + "?", r"\p{N}"),
        ),
        ignore_merges=True,
    ),
    "spark2_5": PreTokenizer(
        (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _PUNCTUATED + "|[\r\n]" + r"|\s+(?!\S)|\s+", r"\p{N}"),
    ),
    "afmoe": PreTokenizer(
        (
            N3_FROM_RIGHT,
            "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-"
            "\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            _PUNCTUATED + r"[\r\n]*" + _SPACES,
        )
    ),
    "exaone-moe": PreTokenizer(
        (
            rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "jais-2": PreTokenizer(
        (
            rf"{_CASELESS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
            + "".join(rf"|\s{{{size}}}(?!\S)" for size in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
            + r"|\s{1}",
        )
    ),
    "kimi-k2": PreTokenizer(
        (
            rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}\p{{Han}}]?\p{{L}}+{_CASELESS}?|\p{{N}}{{1,3}}"
            r"| ?[^\s\p{L}\p{N}\p{Han}]+[\r\n]*" + _SPACES,
        )
    ),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        )
    ),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
"""Byte-level ones, the commonest first."""

ESCAPED_PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "sarvam-moe": PreTokenizer((r"[^\n]+|[\n]+",), escape_spaces=True),
    "mmbert": PreTokenizer((r"[^\n]+|[\n]+",), escape_spaces=True, word_prefix=True),
}
"""For byte-fallback BPE, merged by rank as Hugging Face does."""

_CATEGORY = {"N": "\xd1", "L": "\xd2", "P": "\xd3", "M": "\xd4", "S": "\xd5"}
_OTHER, _HAN = "\xd0", "\xd6"
_ASCII = {
    "N": "0-9",
    "L": "A-Za-z",
    "P": r"!-#%-*,-/:;?@\[-\]_\{\}",
    "M": "",
    "S": r"$+<->^`|~",
}
_WHITE = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
_HAN_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2EBEF), (0x2F800, 0x2FA1F))


class _Table(dict[int, str]):
    """For str.translate: computes what stands for a character when it is first met."""

    def __init__(self, stand_in: Callable[[int], str]) -> None:
        super().__init__()
        self._stand_in = stand_in

    def __missing__(self, code: int) -> str:
        self[code] = value = chr(code) if code < 128 else self._stand_in(code)
        return value


def _category(code: int) -> str:
    return "\x0b" if code in _WHITE else _CATEGORY.get(unicodedata.category(chr(code))[0], _OTHER)


_COLLAPSED = _Table(_category)
_COLLAPSED_BUT_HAN = _Table(lambda code: _HAN if any(a <= code <= b for a, b in _HAN_RANGES) else _category(code))
_PLAIN = _Table(lambda code: "\x0b" if code in _WHITE else chr(code))


@cache
def _compiled(regex: str) -> tuple[re.Pattern[str], _Table]:
    """A regex of the table for Python, and what its text is translated by. `$` of std::regex is the very end; `\\s` and `\\d`
    know ASCII alone."""
    table = _COLLAPSED_BUT_HAN if r"\p{Han}" in regex else _COLLAPSED if r"\p{" in regex else _PLAIN
    inside, result = False, ""
    for part in re.findall(r"\\p\{\w+\}|\\.|.", regex, re.DOTALL):
        if part.startswith(r"\p{"):
            name = part[3:-1]
            chars = _HAN if name == "Han" else _CATEGORY[name[0]] + _ASCII[name[0]]
            result += chars if inside else f"[{chars}]"
            continue
        inside = (inside or part == "[") and part != "]"
        result += r"\Z" if part == "$" and not inside else part
    return re.compile(result, re.ASCII), table


def split(pre: PreTokenizer, text: str) -> list[str]:
    """The words that llama.cpp merges within, not yet byte-encoded."""
    if pre.escape_spaces:
        text = text.replace(" ", "▁")
    words = [text]
    for regex in pre.regexes:
        pattern, table = _compiled(regex)
        pieces: list[str] = []
        for word in words:
            end = 0
            for match in pattern.finditer(word.translate(table)):
                pieces += [word[end : match.start()], match.group() and word[match.start() : match.end()]]
                end = match.end()
            pieces.append(word[end:])
        words = [piece for piece in pieces if piece]
    if not pre.word_prefix:
        return words
    lines = [line if not line.strip("\n") or line.startswith("▁") else "▁" + line for line in words]
    return [word for line in lines for word in ([line] if not line.strip("\n") else re.findall("▁[^▁]*", line))]


@cache
def _byte_characters() -> dict[int, str]:
    """GPT-2's stand-ins: a printable character for each byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


def byte_encoded(word: str) -> str:
    characters = _byte_characters()
    return "".join(characters[byte] for byte in word.encode("utf-8"))


def decoded(word: str) -> str:
    """The text of a byte-encoded word; empty where its bytes alone are none."""
    bytes_by_character = {character: byte for byte, character in _byte_characters().items()}
    try:
        return bytes(bytes_by_character[character] for character in word).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return ""
