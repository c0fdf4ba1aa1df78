"""Recipes: from bits, or a mix by llama.cpp's name, to a quant type for every tensor.

A mix that carries llama.cpp's name follows llama-quantize's rule for that name (`llama_tensor_get_type_impl` and
`tensor_type_fallback` in llama.cpp's src/llama-quant.cpp, read in November 2026), so its file has the quality that people
know under that name. Routers and norms stay F32.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ConfigError
from xent_quant.tensors import KEPT_ROLES, Role


class Layers(Enum):
    """The layers that a rule is about; llama-quantize's integer divisions."""

    ALL = auto()
    FIRST_2 = auto()
    FIRST_4 = auto()
    FIRST_EIGHTH = auto()
    FIRST_EIGHTH_COUNTED = auto()  # by tensors of the role, of which a layer with shared experts has two: routed, then shared
    FIRST_SIXTEENTH = auto()
    MIDDLE = auto()  # neither in the first nor in the last eighth
    MORE_BITS = auto()  # the first and the last eighth, and every third between

    def contains(self, layer: int, layers: int) -> bool:
        match self:
            case Layers.ALL:
                return True
            case Layers.FIRST_2:
                return layer < 2
            case Layers.FIRST_4:
                return layer < 4
            case Layers.FIRST_EIGHTH | Layers.FIRST_EIGHTH_COUNTED:
                return layer < layers // 8
            case Layers.FIRST_SIXTEENTH:
                return layer < layers // 16
            case Layers.MIDDLE:
                return layers // 8 <= layer < 7 * layers // 8
            case Layers.MORE_BITS:
                return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


class When(Enum):
    """What else a rule asks for."""

    ALWAYS = auto()
    GROUPED_QUERIES = auto()  # four or more query heads to a key head: attn_v is small, bits there are cheap
    GROUPED_QUERIES_OR_EXPERTS = auto()  # that, or four or more experts
    WITH_IMATRIX = auto()
    WITHOUT_IMATRIX = auto()


@dataclass(frozen=True)
class Rule:
    """Tensors of this role, in these layers, get `type`. The first rule that holds decides.

    With a `part`, of the MLP's roles only the tensors that have it in their name: ROUTED experts', or SHARED ones', which every
    token uses.
    """

    role: Role
    type: str
    layers: Layers = Layers.ALL
    when: When = When.ALWAYS
    part: str = ""


ROUTED, SHARED = "_exps.", "_shexp."


@dataclass(frozen=True)
class Mix:
    """One of llama.cpp's file types: `number` is its LLAMA_FTYPE, `base` the type where no rule holds.

    `eight_experts_output` is the type of the attention output in models of 8 experts, which llama-quantize takes for
    Mixtral; None leaves the base. `eight_experts_kv` is that of their keys and values.
    """

    number: int
    base: str
    rules: tuple[Rule, ...] = ()
    head: str = "Q6_K"
    eight_experts_output: str | None = None
    eight_experts_kv: str = "Q8_0"

    @property
    def types(self) -> set[str]:
        return {self.base, self.head, *(rule.type for rule in self.rules)}


Q, K, V, OUTPUT = Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_OUTPUT
EMBEDDING, GATE, UP, DOWN = Role.EMBEDDING, Role.GATE, Role.UP, Role.DOWN


def _very_low(number: int, base: str, step_up: str, output: str | None, embedding: str) -> Mix:
    """llama-quantize's rules for the mixes of 1 and 2 bits but Q2_K's: `step_up` where a tensor deserves more."""
    rules = (
        Rule(EMBEDDING, embedding),
        Rule(V, "Q4_K", when=When.GROUPED_QUERIES_OR_EXPERTS),
        Rule(V, step_up),
        Rule(DOWN, step_up, Layers.FIRST_EIGHTH_COUNTED),
        Rule(OUTPUT, output or base),
    )
    return Mix(number, base, rules, head="Q5_K", eight_experts_output="Q5_K", eight_experts_kv="Q4_K")


MIXES: dict[str, Mix] = {
    "F32": Mix(0, "F32", head="F32"),
    "F16": Mix(1, "F16", head="F16"),
    "BF16": Mix(32, "BF16", head="BF16"),
    "Q8_0": Mix(7, "Q8_0", head="Q8_0"),
    "Q6_K": Mix(18, "Q6_K"),
    "Q5_K_M": Mix(17, "Q5_K", (Rule(V, "Q6_K", Layers.MORE_BITS), Rule(DOWN, "Q6_K", Layers.MORE_BITS))),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q5_0": Mix(8, "Q5_0", (Rule(DOWN, "Q5_1", Layers.FIRST_EIGHTH, When.WITH_IMATRIX),)),
    "Q4_K_M": Mix(
        15,
        "Q4_K",
        (Rule(V, "Q6_K", Layers.MORE_BITS), Rule(DOWN, "Q6_K", Layers.MORE_BITS)),
        eight_experts_output="Q5_K",
    ),
    "Q4_K_S": Mix(
        14,
        "Q4_K",
        (Rule(V, "Q5_K", Layers.FIRST_4), Rule(DOWN, "Q5_K", Layers.FIRST_EIGHTH)),
        eight_experts_output="Q5_K",
    ),
    "Q4_1": Mix(3, "Q4_1"),
    "Q4_0": Mix(2, "Q4_0", (Rule(DOWN, "Q4_1", Layers.FIRST_EIGHTH, When.WITH_IMATRIX),)),
    "IQ4_NL": Mix(
        25,
        "IQ4_NL",
        (Rule(V, "Q5_K", when=When.GROUPED_QUERIES), Rule(DOWN, "Q5_K", Layers.FIRST_EIGHTH, When.WITHOUT_IMATRIX)),
        eight_experts_output="Q5_K",
    ),
    "IQ4_XS": Mix(
        30,
        "IQ4_XS",
        (Rule(V, "Q5_K", when=When.GROUPED_QUERIES), Rule(DOWN, "Q5_K", Layers.FIRST_EIGHTH, When.WITHOUT_IMATRIX)),
        eight_experts_output="Q5_K",
    ),
    "IQ3_M": Mix(
        27,
        "IQ3_S",
        (Rule(V, "Q4_K"), Rule(DOWN, "Q4_K", Layers.FIRST_EIGHTH), Rule(OUTPUT, "Q4_K")),
        eight_experts_output="Q5_K",
    ),
    "IQ3_S": Mix(26, "IQ3_S", (Rule(V, "Q4_K", when=When.GROUPED_QUERIES),), eight_experts_output="Q5_K"),
    "IQ3_XS": Mix(
        22,
        "IQ3_S",
        (
            Rule(V, "Q4_K", when=When.GROUPED_QUERIES),
            Rule(Q, "IQ3_XXS"),
            Rule(K, "IQ3_XXS"),
            Rule(GATE, "IQ3_XXS", Layers.MIDDLE),
            Rule(UP, "IQ3_XXS", Layers.MIDDLE),
        ),
        eight_experts_output="Q5_K",
    ),
    "IQ3_XXS": Mix(
        23,
        "IQ3_XXS",
        (
            Rule(EMBEDDING, "IQ3_S"),
            Rule(V, "Q4_K", when=When.GROUPED_QUERIES),
            Rule(V, "IQ3_S", when=When.WITHOUT_IMATRIX),
            Rule(Q, "IQ2_S"),
            Rule(K, "IQ2_S"),
            Rule(DOWN, "Q4_K", Layers.FIRST_EIGHTH, When.WITHOUT_IMATRIX),
            Rule(DOWN, "Q3_K", when=When.WITHOUT_IMATRIX),
            Rule(OUTPUT, "IQ3_S"),
        ),
        head="Q5_K",
        eight_experts_output="Q5_K",
    ),
    "Q3_K_L": Mix(13, "Q3_K", (Rule(V, "Q5_K"), Rule(DOWN, "Q5_K"), Rule(OUTPUT, "Q5_K"))),
    "Q3_K_M": Mix(
        12,
        "Q3_K",
        (
            Rule(V, "Q5_K", Layers.FIRST_2),
            Rule(V, "Q4_K"),
            Rule(DOWN, "Q5_K", Layers.FIRST_SIXTEENTH),
            Rule(DOWN, "Q4_K"),
            Rule(OUTPUT, "Q4_K"),
        ),
        eight_experts_output="Q5_K",
    ),
    "Q3_K_S": Mix(11, "Q3_K", eight_experts_output="Q5_K"),
    "Q2_K": Mix(
        10,
        "Q2_K",
        (Rule(V, "Q4_K", when=When.GROUPED_QUERIES), Rule(V, "Q3_K"), Rule(DOWN, "Q3_K"), Rule(OUTPUT, "Q3_K")),
        eight_experts_output="Q5_K",
    ),
    "Q2_K_S": Mix(21, "Q2_K", (Rule(V, "Q4_K", when=When.GROUPED_QUERIES), Rule(DOWN, "Q4_K", Layers.FIRST_EIGHTH))),
    "IQ2_M": _very_low(29, "IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_S": _very_low(28, "IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_XS": _very_low(20, "IQ2_XS", "Q2_K", None, "Q2_K"),
    "IQ2_XXS": _very_low(19, "IQ2_XXS", "Q2_K", None, "Q2_K"),
    "IQ1_M": _very_low(31, "IQ1_M", "Q2_K", "IQ2_XXS", "Q2_K"),
    "IQ1_S": _very_low(24, "IQ1_S", "Q2_K", "IQ2_XXS", "Q2_K"),
    "TQ2_0": Mix(37, "TQ2_0", (Rule(EMBEDDING, "Q4_K"),)),
    "TQ1_0": Mix(36, "TQ1_0", (Rule(EMBEDDING, "Q4_K"),)),
    "Q1_0": Mix(40, "Q1_0"),
    "MXFP4_MOE": Mix(
        38,
        "Q8_0",
        tuple(Rule(role, "MXFP4", part=ROUTED) for role in (GATE, UP, DOWN)),
        head="Q8_0",
        eight_experts_output="Q8_0",
    ),
}
"""Every mix of llama.cpp's known here. Those whose types `formats` does not have yet are refused, not approximated.

llama-quantize refuses IQ3_XXS and every IQ2 and IQ1 type without an imatrix; here they are searched for without importance then.
"""


def _fine_grained(number: int, experts: str, active: str) -> Mix:
    """Routed experts, nine tenths of the weights of which a token uses few, in one type; what every token uses in another.

    `number` is llama.cpp's file type that names the experts' type.
    """
    rules = [Rule(role, active) for role in (EMBEDDING, Q, K, V, OUTPUT)]
    rules += [Rule(role, active, part=SHARED) for role in (GATE, UP, DOWN)]
    return Mix(number, experts, tuple(rules), head=active, eight_experts_output=active)


OWN = {
    "XENT6": _fine_grained(18, "Q6_K", "Q8_0"),
    "XENT5": _fine_grained(16, "Q5_K", "Q8_0"),
    "XENT4": _fine_grained(30, "IQ4_XS", "Q8_0"),
    "XENT3": _fine_grained(26, "IQ3_S", "Q8_0"),
    "XENT2": _fine_grained(28, "IQ2_S", "Q6_K"),
}
"""This project's own mixes for fine-grained mixtures of experts, chosen by measurement: docs/recipes.md."""
MIXES |= OWN

ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
"""Type names that llama-quantize reads as the name of a mix."""

BITS: dict[int, str] = {8: "Q8_0", 6: "Q6_K", 5: "Q5_K_M", 4: "Q4_K_M", 3: "Q3_K_M", 2: "Q2_K"}
"""The mix of so many bits for dense models."""
BITS_OF_EXPERTS = {bits: f"XENT{bits}" if f"XENT{bits}" in OWN else name for bits, name in BITS.items()}
"""And for mixtures of experts: of the released models about the bytes of llama.cpp's mix of as many bits; the loss is a fraction
of its loss on small ones (docs/recipes.md)."""

FALLBACK = {
    "Q6_K": "Q8_0",
    "Q5_K": "Q5_1",
    "Q4_K": "Q5_0",
    "Q3_K": "Q4_0",
    "Q2_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ1_S": "IQ4_NL",
    "TQ2_0": "Q4_0",
    "TQ1_0": "Q4_0",
}
"""llama-quantize's replacement where rows are not a multiple of 256."""

LAST_RESORT = "F16"


@dataclass(frozen=True)
class Recipe:
    """A named mix, and overrides that come first: (compiled pattern of GGUF tensor names, type). `types` are those that a plan
    chose, by the name of the tensor; no rule of the mix is asked then."""

    name: str
    mix: Mix
    overrides: tuple[tuple[re.Pattern[str], str], ...] = ()
    imatrix: bool = False
    types: Mapping[str, str] = field(default_factory=dict)

    def type_of(self, name: str, role: Role, layer: int, model: Architecture) -> str:
        """The type asked for, before any fallback for the row length, of a tensor that the file calls `name`. `layer` is ignored
        outside of layers."""
        if role in KEPT_ROLES:
            return "F32"
        for pattern, kind in self.overrides:
            if pattern.search(name):
                return kind
        if self.types:
            return self.types[name]
        mix = self.mix
        if role is Role.HEAD:
            return mix.head
        if model.num_experts == 8 and formats.get(mix.base).block_size > 1:
            if role in (Role.ATTENTION_K, Role.ATTENTION_V):
                return mix.eight_experts_kv
            if role is Role.ATTENTION_OUTPUT:
                return mix.eight_experts_output or mix.base
            if role is Role.DOWN and self.name == "IQ3_M" and Layers.MORE_BITS.contains(layer, model.num_layers):
                return "Q4_K"
        count = 2 * layer + (SHARED in name) if model.num_shared_experts else layer
        for rule in mix.rules:
            depth = count if rule.layers is Layers.FIRST_EIGHTH_COUNTED else layer
            if (
                rule.role is role
                and rule.part in name
                and rule.layers.contains(depth, model.num_layers)
                and self._holds(rule.when, model)
            ):
                return rule.type
        return mix.base

    def _holds(self, when: When, model: Architecture) -> bool:
        match when:
            case When.ALWAYS:
                return True
            case When.GROUPED_QUERIES:
                return model.num_heads // model.num_kv_heads >= 4
            case When.GROUPED_QUERIES_OR_EXPERTS:
                return model.num_heads // model.num_kv_heads >= 4 or model.num_experts >= 4
            case When.WITH_IMATRIX:
                return self.imatrix
            case When.WITHOUT_IMATRIX:
                return not self.imatrix


def recipe(
    *, bits: int = 4, type: str | None = None, tensor_types: Sequence[str] = (), imatrix: bool = False, experts: bool = False
) -> Recipe:
    """The recipe for `--bits` (of a model with `experts`), `--type` and `--tensor-type REGEX=TYPE`; `imatrix` tells whether there
    is one, which some of llama-quantize's rules ask. Raises ConfigError naming the option.
    """
    if type is None:
        if bits not in BITS:
            raise ConfigError(f"--bits {bits}: there are {', '.join(map(str, sorted(BITS)))}")
        name = (BITS_OF_EXPERTS if experts else BITS)[bits]
    else:
        name = ALIASES.get(type.upper(), type.upper())
    mix = MIXES.get(name)
    if mix is None or not mix.types <= set(formats.NAMES):
        there = (known for known, mix in MIXES.items() if mix.types <= set(formats.NAMES))
        raise ConfigError(f"--type {type}: {'unknown' if mix is None else 'not there yet'}; there are {', '.join(there)}")
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
    return Recipe(name, mix, tuple(overrides), imatrix)


def planned_recipe(name: str, types: Mapping[str, str], weights: Mapping[str, int]) -> Recipe:
    """The recipe of a plan: every tensor's type, and how many weights it has, by its name in the file. llama.cpp's file type is
    that of the mix whose base most weights have."""
    most = most_common((kind, weights[tensor]) for tensor, kind in types.items())
    number = next(mix.number for mix in MIXES.values() if mix.base == most)
    return Recipe(name, Mix(number, most), types=types)


def most_common(counted: Iterable[tuple[str, int]]) -> str:
    """The type that most weights have, of types and how many weights have them; of equal ones the first by name."""
    total: Counter[str] = Counter()
    for kind, weights in counted:
        total[kind] += weights
    return max(sorted(total), key=total.__getitem__)


def has_no_fallback(kind: str) -> bool:
    """Whether llama-quantize stops at rows that the type does not divide."""
    return kind not in FALLBACK and formats.get(kind).block_size > 32


def fitting(kind: str, columns: int, head: bool = False) -> str:
    """`kind`, or llama-quantize's fallback where its blocks do not divide rows of `columns` weights; for the `head` of a mix that
    is Q8_0.

    Where the fallback does not divide them either, F16 as llama-quantize; also where it knows no fallback and stops.
    """
    if columns % formats.get(kind).block_size == 0:
        return kind
    smaller = "Q8_0" if head else FALLBACK.get(kind, LAST_RESORT)
    return smaller if columns % formats.get(smaller).block_size == 0 else LAST_RESORT
