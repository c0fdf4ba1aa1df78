"""Recipes: from bits, or a mix by llama.cpp's name, to a type for every tensor.

A mix that carries llama.cpp's name follows llama-quantize's rule for that name (llama-quant.cpp,
`llama_tensor_get_type_impl`) as far as it concerns these models (no 8 experts, no 70B special cases); where its K type
cannot divide a row, the same fallback type is taken. Routers and norms stay F32.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from xent_quant import formats
from xent_quant.errors import ConfigError


class Role(StrEnum):
    """What a tensor does; decides its type together with its depth."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    ROUTER = "router"
    ATTENTION_Q = "attention q"
    ATTENTION_K = "attention k"
    ATTENTION_V = "attention v"
    ATTENTION_OUTPUT = "attention output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True)
class Mix:
    """One of llama.cpp's file types: `base` for everything, and what differs. `number` is its LLAMA_FTYPE."""

    base: str
    number: int
    head: str | None = None
    value: str | None = None  # attn_v in layers that get more bits
    value_rest: str | None = None
    down: str | None = None  # ffn_down in layers that get more bits
    down_rest: str | None = None
    attention_output: str | None = None


MIXES: dict[str, Mix] = {
    "F32": Mix("F32", 0),
    "F16": Mix("F16", 1),
    "BF16": Mix("BF16", 32),
    "Q8_0": Mix("Q8_0", 7),
    "Q6_K": Mix("Q6_K", 18),
    "Q5_K_M": Mix("Q5_K", 17, head="Q6_K", value="Q6_K", down="Q6_K"),
    "Q5_K_S": Mix("Q5_K", 16, head="Q6_K"),
    "Q4_K_M": Mix("Q4_K", 15, head="Q6_K", value="Q6_K", down="Q6_K"),
    "Q4_0": Mix("Q4_0", 2, head="Q6_K"),
}
BITS: dict[int, str] = {8: "Q8_0", 6: "Q6_K", 5: "Q5_K_M", 4: "Q4_K_M"}
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""llama-quantize's replacement where rows are not a multiple of 256."""


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class Recipe:
    """A named mix, and overrides that come first: (compiled pattern of GGUF tensor names, type)."""

    name: str
    mix: Mix
    overrides: tuple[tuple[re.Pattern[str], str], ...] = ()

    def type_of(self, name: str, role: Role, layer: int, layers: int) -> str:
        """The type asked for, before any fallback for the row length."""
        if role in (Role.NORM, Role.ROUTER):
            return "F32"
        for pattern, kind in self.overrides:
            if pattern.search(name):
                return kind
        mix = self.mix
        if role is Role.HEAD:
            return mix.head or mix.base
        if role is Role.ATTENTION_V:
            return (mix.value if more_bits(layer, layers) else mix.value_rest) or mix.base
        if role is Role.DOWN:
            return (mix.down if more_bits(layer, layers) else mix.down_rest) or mix.base
        if role is Role.ATTENTION_OUTPUT:
            return mix.attention_output or mix.base
        return mix.base


def recipe(*, bits: int = 4, type: str | None = None, tensor_types: Sequence[str] = ()) -> Recipe:
    """The recipe for `--bits`, `--type` and `--tensor-type REGEX=TYPE`. Raises ConfigError naming the option."""
    if type is None:
        if bits not in BITS:
            raise ConfigError(f"--bits {bits}: no mix of that size yet; there are {', '.join(map(str, sorted(BITS)))}")
        name = BITS[bits]
    else:
        name = type.upper()
    mix = MIXES.get(name)
    if mix is None:
        if name not in formats.NAMES:
            raise ConfigError(f"--type {type}: unknown; mixes: {', '.join(MIXES)}; single types: {', '.join(formats.NAMES)}")
        mix = Mix(name, {"Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q3_K": 11, "Q2_K": 10}[name])
    overrides = []
    for item in tensor_types:
        pattern, separator, kind = item.rpartition("=")
        if not separator or not pattern:
            raise ConfigError(f"--tensor-type {item!r}: write REGEX=TYPE, for example 'ffn_down_exps=Q6_K'")
        if kind.upper() not in formats.NAMES:
            raise ConfigError(f"--tensor-type {item!r}: no quant type {kind!r}; there are {', '.join(formats.NAMES)}")
        try:
            overrides.append((re.compile(pattern), kind.upper()))
        except re.error as error:
            raise ConfigError(f"--tensor-type {item!r}: not a regular expression: {error}") from error
    return Recipe(name, mix, tuple(overrides))


def fitting(kind: str, columns: int) -> str:
    """`kind`, or llama-quantize's fallback where its blocks do not divide rows of `columns` weights; F16 at the end."""
    while columns % formats.get(kind).block_size:
        kind = FALLBACK.get(kind, "F16")
    return kind
