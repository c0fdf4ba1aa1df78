"""XVERSE, dense and mixture of experts. Source: the modelling file and config released with XVERSE-MoE-A4.2B."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xent_quant.checkpoint.families import bailing_moe
from xent_quant.checkpoint.families.interface import GGUF, Family, Keys, Modelling, Names
from xent_quant.errors import UnsupportedError

if TYPE_CHECKING:
    from xent_quant.checkpoint.architecture import Architecture

DEFAULTS: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "num_experts": 0,
    "num_shared_experts": 0,
}
"""The released dense models' code knows no rope_theta and computes with 10000, llama.cpp likewise. XverseConfig repeats these, as
it must stand alone; a test holds it to them."""


def gguf(model: "Architecture", width: int) -> GGUF:
    """llama.cpp's own `xverse` is dense; its mixtures are other families' there, which compute the same."""
    if not model.num_experts:
        layout = {"tensor_data_layout": "Meta AI original pth"}  # q and k as llama.cpp rotates them
        return GGUF("xverse", width, layout, interleaved=True, own_head=True)
    if model.num_shared_experts:
        return replace(bailing_moe.gguf(model, width), feed_forward_length=width)
    if not model.norm_topk_prob:
        raise UnsupportedError("norm_topk_prob is false and there are no shared experts: llama.cpp has no architecture for that")
    # The other scales of that architecture are left out: absent means that nothing is scaled.
    return GGUF("granitemoe", width, {"logit_scale": 1.0}, interleaved=True, own_head=True)


FAMILY = Family(
    model_type="xverse",
    title="XVERSE",
    model_class="XverseForCausalLM",
    gguf=gguf,
    names=Names(router="mlp.router"),
    keys=Keys(experts=("num_experts",), experts_per_token="moe_top_k", shared_experts="num_shared_experts"),
    defaults=DEFAULTS,
    modelling=Modelling(
        ("configuration_xverse.py", "modeling_xverse.py"),
        {
            "AutoConfig": "configuration_xverse.XverseConfig",
            "AutoModel": "modeling_xverse.XverseModel",
            "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM",
        },
    ),
    repetition_penalty=1.1,
    released={"XVERSE-Ent-A4.2B": "xverse/XVERSE-Ent-A4.2B", "XVERSE-Ent-A5.7B": "xverse/XVERSE-Ent-A5.7B"},
)
