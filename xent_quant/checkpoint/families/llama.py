"""Llama and what is built like it, dense. Source: transformers' models/llama; llama.cpp's src/models/llama.cpp."""

from typing import TYPE_CHECKING

from xent_quant.checkpoint.families.interface import GGUF, Family

if TYPE_CHECKING:
    from xent_quant.checkpoint.architecture import Architecture


def gguf(model: "Architecture", width: int) -> GGUF:
    return GGUF("llama", width, interleaved=True)


FAMILY = Family(
    model_type="llama",
    title="Llama",
    model_class="LlamaForCausalLM",
    gguf=gguf,
    defaults={
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    neutral={"mlp_bias": (None, False)},
    free_head_dim=True,
)
