"""Qwen3's mixtures of experts: no shared experts, queries and keys normed head by head, heads of a size of their own.

Source: transformers' models/qwen3_moe; llama.cpp's src/models/qwen3moe.cpp.
"""

from typing import TYPE_CHECKING

from xent_quant.checkpoint.families.interface import FUSED_EXPERTS, GGUF, Family, Keys
from xent_quant.errors import UnsupportedError

if TYPE_CHECKING:
    from xent_quant.checkpoint.architecture import Architecture


def gguf(model: "Architecture", width: int) -> GGUF:
    if not model.norm_topk_prob:
        raise UnsupportedError("norm_topk_prob is false: llama.cpp's qwen3moe always renormalises the experts' weights")
    return GGUF("qwen3moe", model.dense_size, {"expert_feed_forward_length": width})


FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    model_class="Qwen3MoeForCausalLM",
    gguf=gguf,
    keys=Keys(width="moe_intermediate_size", dense_width="intermediate_size", experts=("num_experts", "num_local_experts")),
    defaults={
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "norm_topk_prob": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    neutral={"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, []), "use_sliding_window": (None, False)},
    qk_norm="head",
    free_head_dim=True,
    no_bnb=FUSED_EXPERTS,
)
