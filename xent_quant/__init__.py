"""xent-quant: XVERSE mixture-of-experts checkpoints as files that consumer machines run.

`xent_quant.quantize(model, bits=4, formats=["gguf"])` is the whole of it; names load on first use, so that importing
the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "describe", "plan", "quantize"]

if TYPE_CHECKING:
    from xent_quant.pipeline import describe, plan, quantize


def __getattr__(name: str) -> Any:
    if name in ("describe", "plan", "quantize"):
        from xent_quant import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'xent_quant' has no attribute {name!r}")
