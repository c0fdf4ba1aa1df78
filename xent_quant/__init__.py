"""xent-quant: XVERSE mixture-of-experts checkpoints as files that consumer machines run.

`xent_quant.quantize(model, bits=4, formats=["gguf"])` is the whole of it; names load on first use, so that importing
the package costs nothing. Importing it also makes XVERSE known to transformers' Auto classes, imported before or after.
"""

from typing import TYPE_CHECKING, Any

from xent_quant.model.import_hook import register_with_transformers

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "calibrate",
    "describe",
    "plan",
    "quantize",
    "register_with_transformers",
    "resources",
    "sensitivity",
    "validate",
]

if TYPE_CHECKING:
    from xent_quant.inspection import describe
    from xent_quant.pipeline import calibrate, plan, quantize, resources, sensitivity, validate


register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in ("calibrate", "describe", "plan", "quantize", "resources", "sensitivity", "validate"):
        from importlib import import_module

        return getattr(import_module("xent_quant.inspection" if name == "describe" else "xent_quant.pipeline"), name)
    raise AttributeError(f"module 'xent_quant' has no attribute {name!r}")
