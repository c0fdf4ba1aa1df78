"""Ways to choose quantised values. Adding one: a file here, a line in METHODS, a reference and a test."""

from collections.abc import Callable

from xent_quant.formats.base import Effort
from xent_quant.methods.gptq import GPTQ
from xent_quant.methods.interface import Method
from xent_quant.methods.rtn import RoundToNearest
from xent_quant.methods.search import Search

METHODS: dict[str, Callable[[Effort], Method]] = {
    "rtn": lambda effort: RoundToNearest(),
    "imatrix": Search,
    "gptq": GPTQ,
}

WITH_FILE = "imatrix"
"""The one that a file of statistics serves: it has no Hessians."""

AUTO = "gptq"
"""What `auto` is where text is at hand: at every type the closest to the original model (docs/calibration.md has the figures)."""
