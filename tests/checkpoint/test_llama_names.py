"""Names as gguf-py's tables of llama.cpp's architectures have them."""

from typing import Any

import gguf
import pytest

from tests.conftest import TINY
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.llama_names import HEAD, llama_name

MODELS: dict[str, dict[str, Any]] = {
    "bailingmoe": {},
    "granitemoe": {"num_shared_experts": 0},
    "xverse": {"num_experts": 0},
}


def architecture(**changes: Any) -> Architecture:
    return Architecture.from_config({**TINY, **changes})


@pytest.mark.parametrize("arch", MODELS)
def test_names_are_those_of_the_architecture(arch: str) -> None:
    model = architecture(**MODELS[arch])
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[number]}
    for tensor in model.tensors().values():
        base = llama_name(tensor).removesuffix(".weight")
        assert base.replace(f"blk.{tensor.layer}.", "blk.{bid}.") in known, tensor.name


def test_each_by_hand() -> None:
    specs = architecture(num_hidden_layers=2).tensors()
    wanted = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.layers.0.mlp.router.weight": "blk.0.ffn_gate_inp.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight": "blk.0.ffn_gate_exps.weight",
        "model.layers.0.mlp.experts.5.gate_proj.weight": "blk.0.ffn_gate_exps.weight",
        "model.layers.0.mlp.experts.5.up_proj.weight": "blk.0.ffn_up_exps.weight",
        "model.layers.0.mlp.experts.5.down_proj.weight": "blk.0.ffn_down_exps.weight",
        "model.layers.1.mlp.shared_experts.gate_proj.weight": "blk.1.ffn_gate_shexp.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight": "blk.1.ffn_up_shexp.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight": "blk.1.ffn_down_shexp.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": HEAD,
    }
    assert {name: llama_name(specs[name]) for name in wanted} == wanted


def test_only_experts_share_a_name() -> None:
    specs = architecture(num_hidden_layers=2).tensors().values()
    shared: dict[str, int] = {}
    for spec in specs:
        shared[llama_name(spec)] = shared.get(llama_name(spec), 0) + 1
    experts = {llama_name(spec) for spec in specs if spec.expert is not None}
    assert {name for name, count in shared.items() if count > 1} == experts
    assert {shared[name] for name in experts} == {6}


def test_a_dense_mlp_and_a_tied_head() -> None:
    specs = architecture(num_experts=0, tie_word_embeddings=True).tensors()
    assert llama_name(specs["model.layers.0.mlp.down_proj.weight"]) == "blk.0.ffn_down.weight"
    assert HEAD not in {llama_name(spec) for spec in specs.values()}
