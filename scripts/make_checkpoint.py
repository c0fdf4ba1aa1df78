#!/usr/bin/env python3
"""Writes a random checkpoint of any shape and of any family that is read: sharded safetensors, config, tokenizer. For measuring
memory and speed.

    scripts/make_checkpoint.py --preset A4.2B --layers 4 --output DIR
    scripts/make_checkpoint.py --config config.json --output DIR [--layers N] [--dtype bf16] [--seed 0]

Weights are Gaussian of standard deviation in_features ** -0.5, smaller where they write to the residual stream; norms
are near 1. The tokenizer is the bundled miniature's, followed by pairs of Chinese characters and by single characters until the
vocabulary is full; A5.7B's by none that is Chinese, since it is a model of English. Holds one shard (SHARD bytes), or one tensor
where that is larger.
"""

import argparse
import json
import shutil
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import miniature
from xent_quant.tensors import Role, TensorSpec

SHARD = 2 * 10**9
DTYPES = {"bf16": (torch.bfloat16, 2), "f16": (torch.float16, 2), "f32": (torch.float32, 4)}
COMMON: dict[str, Any] = {
    "architectures": ["XverseForCausalLM"],
    "model_type": "xverse",
    "num_experts": 64,
    "moe_top_k": 6,
    "num_shared_experts": 2,
    "num_attention_heads": 32,
    "intermediate_size": 1728,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    **{f"{name}_token_id": COMMON[f"{name}_token_id"] for name in ("pad", "bos", "eos")},  # the tokenizer is the miniature's
}
PRESETS = {
    "A4.2B": {**COMMON, "hidden_size": 2560, "num_hidden_layers": 28, "vocab_size": 100534},
    # The English model's expert width is not published; 1728 gives its 36 B parameters.
    "A5.7B": {**COMMON, "hidden_size": 3072, "num_hidden_layers": 32, "vocab_size": 128256},
    "Qwen3-30B-A3B": QWEN3,
}
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


ENGLISH = ("A5.7B",)
CHINESE = 0.3


def write_tokenizer(output: Path, vocab_size: int, english: bool = False) -> None:
    """The miniature's tokenizer, extended by single characters of planes 0 to 3 that it does not have yet. For English none is
    Chinese, else pairs of Chinese ones come before them, as a tokenizer of words has: CHINESE of what is added."""
    source = miniature()
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    if vocab_size < len(vocab):
        raise SystemExit(f"vocab_size {vocab_size} is below the {len(vocab)} tokens of the bundled tokenizer")
    han = [token for token in vocab if len(token) == 1 and "\u4e00" <= token <= "\u9fff"]
    pairs = islice(map("".join, product(han, han)), 0 if english else int(CHINESE * (vocab_size - len(vocab))))
    left_out = [(0xD800, 0xE000), (0x4E00, 0xA000)] if english else [(0xD800, 0xE000)]
    codes = (code for code in range(0xA1, 0x3FFFF) if not any(first <= code < end for first, end in left_out))
    tokens = chain(pairs, map(chr, codes))
    while len(vocab) < vocab_size:
        vocab.setdefault(next(tokens), len(vocab))
    (output / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, output / name)


def random_tensor(random: np.random.Generator, spec: TensorSpec, layers: int) -> torch.Tensor:
    shape = spec.shape
    values = random.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        values = 1 + 0.05 * values
    else:
        deep = spec.role in (Role.ATTENTION_OUTPUT, Role.DOWN)
        values *= np.float32(shape[-1] ** -0.5 / ((2 * layers) ** 0.5 if deep else 1))
    return torch.from_numpy(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--config", type=Path, help="a config.json")
    chosen.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="instead of the config's number")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    config = dict(PRESETS[options.preset] if options.preset else json.loads(options.config.read_text("utf-8")))
    if options.layers:
        config["num_hidden_layers"] = options.layers
    dtype, item = DTYPES[options.dtype]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    model = Architecture.from_config(config)
    options.output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.output, model.vocab_size, options.preset in ENGLISH)

    shards: list[list[str]] = [[]]
    size = total = 0
    tensors = model.tensors()
    for name, spec in tensors.items():
        nbytes = spec.n_weights * item
        if shards[-1] and size + nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    random = np.random.default_rng(options.seed)
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        part = {name: random_tensor(random, tensors[name], model.num_layers).to(dtype) for name in names}
        save_file(part, options.output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(f"{options.output / file}", flush=True)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.output / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1), "utf-8")
    (options.output / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    print(f"{total / 1e9:.2f} GB, {total // item:,} weights")


if __name__ == "__main__":
    main()
