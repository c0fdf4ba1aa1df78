"""GGUF quant types by llama.cpp's name. Adding one: a file here, a line in `_MODULES`, a reference and a test."""

from functools import cache
from importlib import import_module

from xent_quant.errors import ConfigError
from xent_quant.formats.base import QuantFormat

_MODULES: dict[str, tuple[str, str]] = {
    "F32": ("floats", "F32Format"),
    "F16": ("floats", "F16Format"),
    "BF16": ("floats", "BF16Format"),
    "Q8_0": ("q8_0", "Q80"),
    "Q6_K": ("q6_k", "Q6K"),
    "Q5_K": ("q5_k", "Q5K"),
    "Q5_1": ("q5_1", "Q51"),
    "Q5_0": ("q5_0", "Q50"),
    "Q4_K": ("q4_k", "Q4K"),
    "IQ4_NL": ("iq4_nl", "IQ4NL"),
    "IQ4_XS": ("iq4_xs", "IQ4XS"),
    "NVFP4": ("nvfp4", "NVFP4Format"),
    "MXFP4": ("mxfp4", "MXFP4Format"),
    "Q4_1": ("q4_1", "Q41"),
    "Q4_0": ("q4_0", "Q40"),
    "Q3_K": ("q3_k", "Q3K"),
    "IQ3_S": ("iq3_s", "IQ3S"),
    "IQ3_XXS": ("iq3_xxs", "IQ3XXS"),
    "Q2_K": ("q2_k", "Q2K"),
    "IQ2_S": ("iq2_s", "IQ2S"),
    "IQ2_XS": ("iq2_xs", "IQ2XS"),
    "IQ2_XXS": ("iq2_xxs", "IQ2XXS"),
    "TQ2_0": ("tq2_0", "TQ20"),
    "IQ1_M": ("iq1_m", "IQ1M"),
    "TQ1_0": ("tq1_0", "TQ10"),
    "IQ1_S": ("iq1_s", "IQ1S"),
    "Q1_0": ("q1_0", "Q10"),
}
"""Name to (module, class); modules load on first use, since each compiles its kernel."""

NAMES = tuple(_MODULES)


@cache
def get(name: str) -> QuantFormat:
    """The format of this name. Raises ConfigError that lists the names there are."""
    if name not in _MODULES:
        raise ConfigError(f"{name}: no such quant type; there are {', '.join(NAMES)}")
    module, kind = _MODULES[name]
    instance: QuantFormat = getattr(import_module(f"xent_quant.formats.{module}"), kind)()
    return instance
