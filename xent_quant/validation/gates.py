"""What is tolerated: tiers by bits, and a verdict that knows how sure a measurement is.

The bounds of 8 to 4 bits are what llama.cpp publishes for its best mixes, a little rounded up; those of 3 and 2 bits only
catch a broken export. A measurement is within its bound if it is by two standard errors, out if it is out by two, else the text
was too short to say: undecided.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from xent_quant.errors import ConfigError
from xent_quant.validation.measures import Estimate
from xent_quant.validation.weights import TensorError

Verdict = Literal["within", "undecided", "out"]
ORDER: tuple[Verdict, ...] = ("within", "undecided", "out")
ERRORS = 2.0
"""Standard errors by which a measurement must clear its bound."""


@dataclass(frozen=True)
class Tier:
    """Bounds for every suite: perplexity ratio and mean KL divergence at most, top-1 agreement at least."""

    name: str
    ppl: float
    kld: float
    top1: float


TIERS = {
    "8bit": Tier("8bit", 1.005, 0.005, 0.97),
    "6bit": Tier("6bit", 1.01, 0.01, 0.96),
    "5bit": Tier("5bit", 1.02, 0.02, 0.94),
    "4bit": Tier("4bit", 1.03, 0.03, 0.92),
    "3bit": Tier("3bit", 1.12, 0.12, 0.84),
    "2bit": Tier("2bit", 1.6, 0.6, 0.65),
}

WEIGHTS: dict[int, tuple[float, float]] = {
    16: (0.005, 0.02),
    8: (0.03, 0.25),
    6: (0.07, 0.4),
    5: (0.15, 0.6),
    4: (0.3, 0.9),
    3: (0.6, 1.6),
    2: (0.95, 3.0),
    1: (3.0, 9.0),
}
"""Bits to the largest relative error of a tensor and of a block of 32 weights: bits of the tensor's type or, for a weight that
calibration moves to make up for others, of the coarsest type in the export. What that does to the miniature, whose weights
differ twice as much as after plain rounding, stays below them by a factor of 1.28 (Q1_0) to 2.3 (Q8_0). A doubled scale
gives an error of 1 or more: it is seen in every block of 8 to 5 bits, of Q4_K and IQ4_XS, and in 99 of 100 of Q4_0; at 3 and 2
bits a single wrong scale mostly passes, a wrong tensor does not. At 1 bit even a tensor of zeros passes, for moved weights differ
by more than their norm: there only what the model says is judged. scripts/validation_bounds.py prints all of these."""

ROUTER = 0.5
"""Share of these bounds, of 2 bits at least, that a router is held to: it moves, but is not rounded."""

ROW_WISE = ("INT8",)
"""Types with one scale for a whole row: a block of small weights in it may lose everything."""

CROSS_KL, CROSS_NLL = 0.004, 0.02
"""Runtime against exact path: mean KL divergence and mean difference of log-likelihood, nats per token. llama.cpp rounds
activations to 8 bits, which costs 0.0003 and under 0.005 on the miniature at any type."""


def bits_of(kind: str) -> int:
    """Bits of a type by its name: Q4_K, IQ4_XS, NF4, INT8, BF16 …; 16 for floats, 1 for ternary types."""
    match = re.search(r"\d+", kind)
    if kind.startswith("TQ"):
        return 1
    bits = int(match[0]) if match else 16
    return min((known for known in WEIGHTS if known >= min(bits, 16)), default=16)


def tier(kind: str | None, bits_per_weight: float) -> Tier:
    """The tier of a file: by the name of its mix (Q4_K_M), else by its bits per weight."""
    bits = bits_of(kind) if kind else max((bits for bits in (2, 3, 4, 5, 6, 8) if bits <= bits_per_weight), default=2)
    return TIERS[f"{min(max(bits, 2), 8)}bit"]


def parse(text: str, default: Tier) -> Tier:
    """--tolerance: a tier's name, or `ppl=1.03,kld=0.03,top1=0.92` over the default. Raises ConfigError."""
    if text in TIERS:
        return TIERS[text]
    bounds: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if key not in ("ppl", "kld", "top1") or not equals or not re.fullmatch(r"\d+(\.\d+)?([eE]-?\d+)?", value):
            raise ConfigError(f"--tolerance {text}: give {', '.join(TIERS)}, or for example ppl=1.03,kld=0.03,top1=0.92")
        bounds[key] = float(value)
    merged = {"ppl": default.ppl, "kld": default.kld, "top1": default.top1} | bounds
    return Tier("own", **merged)


def judge(measured: Estimate, bound: float, at_most: bool = True) -> Verdict:
    """Whether a measurement clears its bound by ERRORS standard errors."""
    excess = measured.value - bound if at_most else bound - measured.value
    if measured.error == 0:
        return "out" if excess > 0 else "within"
    if excess > ERRORS * measured.error:
        return "out"
    return "within" if excess < -ERRORS * measured.error else "undecided"


def worst(verdicts: list[Verdict]) -> Verdict:
    return max(verdicts, key=ORDER.index, default="within")


def coarsest(tensors: Sequence[TensorError]) -> int:
    """Bits of the coarsest type in an export."""
    return min((bits_of(tensor.type) for tensor in tensors), default=16)


def _bounds(tensor: TensorError, least: int) -> tuple[float, float]:
    if tensor.name.endswith("router.weight"):
        whole, block = WEIGHTS[max(least, 2)]
        return ROUTER * whole, ROUTER * block
    moved = not tensor.name.endswith(("norm.weight", "embed_tokens.weight"))
    return WEIGHTS[min(bits_of(tensor.type), least) if moved else bits_of(tensor.type)]


def suspicious(tensor: TensorError, least: int) -> str | None:
    """What is wrong with a tensor's bytes, or None where they are as its type allows in an export of so many bits at least."""
    whole, block = _bounds(tensor, least)
    if tensor.padding:
        return f"its padding holds values up to {tensor.padding:.3g} instead of zeros"
    if not tensor.error <= whole:
        return f"it differs by {tensor.error:.1%} of its norm, {whole:.1%} is allowed"
    if tensor.type not in ROW_WISE and not tensor.worst <= block:
        place = f"row {tensor.row}, columns {tensor.column} to {tensor.column + 31}"
        return f"{place} differ by {tensor.worst:.0%} of their norm, {block:.0%} is allowed"
    return None


def severity(tensor: TensorError, least: int) -> float:
    """How far beyond its bounds a tensor is; 1 is at the bound."""
    whole, block = _bounds(tensor, least)
    return max(tensor.error / whole, 0.0 if tensor.type in ROW_WISE else tensor.worst / block, float(tensor.padding > 0) * 10)
