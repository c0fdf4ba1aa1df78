"""Tells transformers' Auto classes of XVERSE without importing transformers before its user does.

`import xent_quant` calls `register_with_transformers`. Where transformers' table of configurations is loaded already,
XVERSE is registered at once; else an import hook waits for that one module, registers after it and steps aside.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Make AutoConfig, AutoModel and AutoModelForCausalLM know model_type `xverse`, now or once they are imported."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


class _Hook(MetaPathFinder):
    """Lets TABLE be found and loaded as ever, and registers XVERSE after it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from xent_quant.model import auto

    auto.register()
