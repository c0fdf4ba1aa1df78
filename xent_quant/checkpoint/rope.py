"""How rotary embeddings are scaled beyond the context that a model was trained with: what config.json says, and the frequencies.

The formulas are transformers' (modeling_rope_utils.py): linear interpolation, dynamic NTK, YaRN (arXiv:2309.00071).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import ConfigError, UnsupportedError

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LONGEST = 2**31 - 1
"""Context, in tokens."""
Kind = Literal["linear", "dynamic", "yarn"]
KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
        | {"original_max_position_embeddings"}
    ),
}
"""What each type reads, besides its own name and rope_theta."""
EVERYWHERE = frozenset({"llama3", "longrope", "su"})
"""Types that are not known here and cannot be left out."""
WITHOUT_EFFECT = frozenset({"partial_rotary_factor", "finetuned", "original_max_position_embeddings"})
"""Keys that transformers too reads for nothing, of types that KEYS does not give them to; the first is refused unless it is 1."""


@dataclass(frozen=True)
class RopeScaling:
    """`original_context` is the context that the model was trained with, from which dynamic and yarn count; 0 for linear. cos and
    sin are multiplied by `attention_factor`; it, the betas and `truncate` are yarn's."""

    kind: Kind
    factor: float
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def to_config(self) -> dict[str, Any]:
        """As config.json's `rope_scaling`, every value written out."""
        told: dict[str, Any] = {"rope_type": self.kind, "type": self.kind, "factor": self.factor}
        if self.kind == "yarn":
            told |= {
                "original_max_position_embeddings": self.original_context,
                "attention_factor": self.attention_factor,
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "truncate": self.truncate,
            }
        return told


def frequencies(theta: float, scaling: RopeScaling | None, head_dim: int, length: int) -> tuple[NDArray[np.float64], float]:
    """Angle per position of each pair of dimensions, [head_dim / 2], and the factor of cos and sin. `length` is that of the
    text, on which dynamic depends."""
    powers = np.arange(0, head_dim, 2) / head_dim
    if scaling is None:
        return theta**-powers, 1.0
    factor = scaling.factor
    if scaling.kind == "linear":
        return theta**-powers / factor, 1.0
    if scaling.kind == "dynamic":
        longest = max(length, scaling.original_context)
        stretch = factor * longest / scaling.original_context - (factor - 1)
        return (theta * stretch ** (head_dim / (head_dim - 2))) ** -powers, 1.0

    def dimension(rotations: float) -> float:
        """Where a pair turns so often within the original context."""
        return head_dim * log(scaling.original_context / (rotations * 2 * pi)) / (2 * log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    plain = theta**-powers
    return plain / factor * interpolated + plain * (1 - interpolated), scaling.attention_factor


def parse(config: Mapping[str, Any], source: str, max_position_embeddings: int) -> tuple[float | None, RopeScaling | None]:
    """(rope_theta, None where it is not given; scaling) of a config.json, in the spellings of transformers 4 and 5.

    Raises ConfigError for what is not a number where one must be, UnsupportedError for a type or a key that is not known here.
    """

    def refuse(text: str) -> ConfigError:
        return ConfigError(f"{source}: {text}")

    parts = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    for key, value in parts.items():
        if value and (not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values())):
            raise UnsupportedError(f"{source}: {key} is {shown(value)}; one set of parameters for all layers can be exported")
    both = [value for value in parts.values() if value]
    named = [value.get("rope_type", value.get("type", "default")) for value in both]
    for kind in named:
        if not isinstance(kind, str):
            raise refuse(f"rope_scaling: its type must be a name, it is {shown(kind)}")
    kinds = set(named)
    if len(kinds) > 1:
        raise refuse(f"rope_parameters and rope_scaling name different types ({', '.join(map(shown, sorted(kinds)))}); keep one")
    given: dict[str, Any] = {key: value for part in both for key, value in part.items()}  # rope_scaling wins, as in transformers
    kind = kinds.pop() if kinds else "default"
    for value in (config.get("partial_rotary_factor"), given.get("partial_rotary_factor")):
        if value not in (None, 1):
            raise UnsupportedError(
                f"{source}: partial_rotary_factor is {shown(value)}; only heads that are rotated whole can be exported"
            )
    if kind not in KEYS:
        native = "remove it to use the native context"
        remedy = "it changes short texts too, so without it this is another model" if kind in EVERYWHERE else native
        raise UnsupportedError(
            f"{source}: rope_scaling of type {shown(kind)} is not supported (there are {', '.join(KEYS)}); {remedy}"
        )
    unknown = set(given) - KEYS[kind] - WITHOUT_EFFECT - {"rope_type", "type", "rope_theta"}
    if unknown:
        raise UnsupportedError(f"{source}: rope_scaling of type {kind!r} has no {shown(min(unknown))}; remove it, or the scaling")

    def number(key: str, default: float | None, least: float = 0.0) -> float:
        value: Any = given.get(key)
        value = default if value is None else value
        if not is_number(value) or value < least or value <= 0:
            at_least = f" of at least {least:g}" if least else " above 0"
            raise refuse(f"rope_scaling: {key} must be a number{at_least}, it is {shown(value)}")
        return float(value)

    theta = number("rope_theta", None) if given.get("rope_theta") is not None else None
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor", None, 1.0))
    if kind == "dynamic":
        return theta, RopeScaling("dynamic", number("factor", None, 1.0), max_position_embeddings)
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = max_position_embeddings if original is None else original
    if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original <= LONGEST:
        raise refuse(
            f"rope_scaling: original_max_position_embeddings must be an integer from 1 to {LONGEST}, it is {shown(original)}"
        )
    factor = number("factor", max_position_embeddings / original, 1.0)
    truncate = given.get("truncate")
    if truncate not in (None, True, False):
        raise refuse(f"rope_scaling: truncate must be true or false, it is {shown(truncate)}")

    def attention(scale: float) -> float:
        return 0.1 * scale * log(factor) + 1.0

    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    default = (
        attention(number("mscale", None)) / attention(number("mscale_all_dim", None)) if mscale and all_dim else attention(1)
    )
    attention_factor = number("attention_factor", None) if given.get("attention_factor") is not None else default
    if not is_number(attention_factor):
        raise refuse(f"rope_scaling: mscale and mscale_all_dim make an attention_factor of {attention_factor:g}")
    scaling = RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=attention_factor,
        beta_fast=number("beta_fast", None) if given.get("beta_fast") else 32.0,
        beta_slow=number("beta_slow", None) if given.get("beta_slow") else 1.0,
        truncate=truncate is not False,
    )
    return theta, scaling


def is_number(value: Any) -> bool:
    """A number, no boolean, that is one in float32 too, as files and runtimes hold it: neither beyond it nor 0 in it."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def shown(value: Any) -> str:
    """A value of a config within a message: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return "an integer beyond 10^18"
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
