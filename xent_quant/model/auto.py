"""XVERSE's configuration as the Auto classes get it: it registers the model classes when one is first needed.

Registering those at once would import torch and most of transformers, half of it from within its own imports. The Auto
classes make a configuration before they look for a model, and then no module of theirs is half imported.
"""

from typing import Any

from transformers.models.auto.configuration_auto import AutoConfig

from xent_quant.model import configuration_xverse


class XverseConfig(configuration_xverse.XverseConfig):
    __doc__ = configuration_xverse.XverseConfig.__doc__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from transformers import AutoModel, AutoModelForCausalLM

        from xent_quant.model.modeling_xverse import XverseForCausalLM, XverseModel

        AutoModel.register(XverseConfig, XverseModel, exist_ok=True)
        AutoModelForCausalLM.register(XverseConfig, XverseForCausalLM, exist_ok=True)


def register() -> None:
    AutoConfig.register("xverse", XverseConfig, exist_ok=True)
