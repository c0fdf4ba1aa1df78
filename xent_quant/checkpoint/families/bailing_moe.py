"""Ling (inclusionAI) of the first generation: shared experts as XVERSE has them; q, k and v are one tensor.

Source: the configuration of Ling-lite-1.5 and the modelling file that it names; llama.cpp's src/models/bailingmoe.cpp. The second
generation has the same model_type, and keys of its own by which it is told and refused.
"""

from typing import TYPE_CHECKING

from xent_quant.checkpoint.families.interface import GGUF, Family, Keys, Names
from xent_quant.errors import UnsupportedError

if TYPE_CHECKING:
    from xent_quant.checkpoint.architecture import Architecture

OWN_CODE = "its own modelling code would be needed, which fuses q, k and v; use --format gguf or onnx"


def gguf(model: "Architecture", width: int) -> GGUF:
    if not model.num_shared_experts:
        raise UnsupportedError("num_shared_experts is 0: llama.cpp's bailingmoe has some always")
    keys: dict[str, int | float | bool | str] = {
        "leading_dense_block_count": 0,
        "expert_feed_forward_length": width,
        "expert_shared_count": model.num_shared_experts,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": model.norm_topk_prob,  # llama.cpp's default is false
    }
    return GGUF("bailingmoe", model.dense_size, keys, interleaved=True, own_head=True)


FAMILY = Family(
    model_type="bailing_moe",
    title="Ling",
    model_class="BailingMoeForCausalLM",
    gguf=gguf,
    names=Names(embedding="model.word_embeddings", attention="attention", output="dense", fused_qkv="query_key_value"),
    keys=Keys(
        width="moe_intermediate_size",
        dense_width="intermediate_size",
        experts=("num_experts",),
        shared_experts="num_shared_experts",
    ),
    defaults={
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_shared_experts": 0,
    },
    neutral={
        "use_bias": (None, False),  # absent means true, with tensors that are refused by name
        "use_qkv_bias": (None, False),
        "use_sliding_window": (None, False),
        "first_k_dense_replace": (None, 0),
        "norm_head": (None, False),
        "norm_softmax": (None, False),
        "multi_gate": (None, False),
        "use_qk_norm": (None, False),
        "score_function": (None, "softmax"),
        "routed_scaling_factor": (None, 1.0),
        "moe_router_enable_expert_bias": (None, False),
        "n_group": (None, 0, 1),
        "num_nextn_predict_layers": (None, 0),
    },
    free_head_dim=True,
    no_bnb=dict.fromkeys((4, 8, 16), OWN_CODE),
)
