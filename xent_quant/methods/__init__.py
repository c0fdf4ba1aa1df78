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

SEARCHED = frozenset({"Q2_K"})
"""Where most weights of an export are of one of these types, GPTQ did not bring the whole model closer to the original than the
weighted search, though it halves the output error of most weights; KL divergence over stock ggml's by scripts/bench_quality.py
--tokens 100000: Q2_K 0.958 ± 0.015 against 0.945 ± 0.010, Q2_K_S 0.892 ± 0.014 against 0.914 ± 0.008."""


def auto(bulk: str) -> str:
    """The name in METHODS of the method that measured best for exports most of whose weights are of the type `bulk`."""
    return "imatrix" if bulk in SEARCHED else "gptq"
