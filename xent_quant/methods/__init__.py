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

AUTO_WITH_TEXT, AUTO_WITH_FILE = "gptq", "imatrix"
"""What `auto` is: GPTQ, which keeps the search in rows where held-out inputs favour it, but a file has no Hessians."""
