"""Small random checkpoints of every family that is read besides XVERSE: written by transformers where it has the family."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from tests.conftest import TINY, random_weights, small_tokenizer
from tests.reference.forward import forward
from xent_quant.checkpoint.architecture import Architecture

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2}
QWEN3 = {**SIZES, **MIXTURE, "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 96, "intermediate_size": 320}
OWN: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 160, "tie_word_embeddings": True},
    "qwen3_moe": {**QWEN3, "norm_topk_prob": True, "rope_theta": 1e6},
    "olmoe": {**SIZES, **MIXTURE, "intermediate_size": 96},
}
"""Families that transformers has."""
LING = {
    **QWEN3,
    "model_type": "bailing_moe",
    "head_dim": 64,
    "num_shared_experts": 2,
    "norm_topk_prob": True,
    "rope_theta": 6e5,
    "rms_norm_eps": 1e-6,
}
FAMILIES = (*OWN, "bailing_moe")


def write(folder: Path, family: str, *, fused: bool = False, **changes: Any) -> Path:
    """A float32 checkpoint; `fused`: as transformers 5 holds experts, one tensor for all of a layer."""
    if family == "bailing_moe":
        _write_ling(folder, {**LING, **changes})
    else:
        _write_own(folder, family, {**OWN[family], **changes}, fused)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _write_own(folder: Path, family: str, config: dict[str, Any], fused: bool) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **config))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.2 if weight.dim() == 1 else 1.5 * weight.shape[-1] ** -0.5
            weight.copy_(torch.randn(weight.shape) * scale + (weight.dim() == 1))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, save_original_format=not fused)


def _write_ling(folder: Path, config: dict[str, Any]) -> None:
    """By the published names: transformers does not have it."""
    weights = random_weights(config)
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}.attention"
        parts = [weights.pop(f"{base}.{which}_proj.weight") for which in "qkv"]
        weights[f"{base}.query_key_value.weight"] = np.concatenate(parts)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BailingMoeForCausalLM"]}))


@torch.no_grad()
def logits(folder: Path, ids: list[int]) -> np.ndarray:
    """What the family computes [len(ids), vocab]: by transformers in float32, else by the slow reference of XVERSE's layers."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] in OWN:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(torch.tensor([ids])).logits[0].numpy()
    weights = {}
    width = config["num_attention_heads"] * config["head_dim"]
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith("query_key_value.weight"):
            parts = np.split(value, [width, width + config["num_key_value_heads"] * config["head_dim"]])
            named = [name.replace("attention.query_key_value", f"self_attn.{which}_proj") for which in "qkv"]
            weights |= dict(zip(named, parts, strict=True))
        else:
            for theirs, ours in (
                ("word_embeddings", "embed_tokens"),
                ("attention.dense", "self_attn.o_proj"),
                ("mlp.gate.weight", "mlp.router.weight"),
            ):
                name = name.replace(theirs, ours)
            weights[name] = value
    return forward(weights, {**config, "moe_top_k": config["num_experts_per_tok"]}, ids)


def architecture(family: str, **changes: Any) -> Architecture:
    """Of the same configs, without files; of XVERSE too."""
    base = {"xverse": TINY, "bailing_moe": LING, **OWN}[family]
    return Architecture.from_config({**base, "model_type": family, **changes})
