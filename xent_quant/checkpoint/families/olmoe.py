"""OLMoE: no shared experts, queries and keys normed over their whole width, the experts' weights not renormalised.

Source: transformers' models/olmoe; llama.cpp's src/models/olmoe.cpp.
"""

from typing import TYPE_CHECKING

from xent_quant.checkpoint.families.interface import FUSED_EXPERTS, GGUF, Family, Keys
from xent_quant.errors import UnsupportedError

if TYPE_CHECKING:
    from xent_quant.checkpoint.architecture import Architecture


def gguf(model: "Architecture", width: int) -> GGUF:
    if model.norm_topk_prob:
        raise UnsupportedError("norm_topk_prob is true: llama.cpp's olmoe never renormalises the experts' weights")
    if model.num_kv_heads != model.num_heads:
        raise UnsupportedError(
            f"num_key_value_heads {model.num_kv_heads}: llama.cpp's olmoe norms keys that are as wide as queries only"
        )
    return GGUF("olmoe", width, own_head=True)


FAMILY = Family(
    model_type="olmoe",
    title="OLMoE",
    model_class="OlmoeForCausalLM",
    gguf=gguf,
    keys=Keys(experts=("num_experts", "num_local_experts")),
    defaults={
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    neutral={"clip_qkv": (None,)},
    qk_norm="width",
    no_bnb=FUSED_EXPERTS,
)
