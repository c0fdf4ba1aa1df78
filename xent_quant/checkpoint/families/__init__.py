"""The families of models that are read, by config.json's model_type. To add one: a module beside this, and a line here."""

from xent_quant.checkpoint.families import bailing_moe, llama, olmoe, qwen3_moe, xverse
from xent_quant.checkpoint.families.interface import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (xverse, bailing_moe, llama, olmoe, qwen3_moe)
}
