"""llama.cpp's convert_hf_to_gguf.py beside us on the same checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xent_quant
from scripts.stock_llama import converter
from tests.conftest import TINY, random_weights, small_tokenizer, write_checkpoint
from tests.stock.gguf_files import keys, tensors
from tests.stock.programs import Programs, said

pytestmark = pytest.mark.stock

CARD = {"general.base_model.count", "general.base_model.0.name", "general.tags"}
"""What the model was made of, and is."""
SIZES = {"attention.key_length", "attention.value_length"}
"""Written out where the converter leaves them to llama.cpp's defaults, which are the same numbers."""
TOKENIZER = {f"tokenizer.ggml.{key}" for key in ("scores", "add_space_prefix", "add_bos_token", "add_eos_token")}
"""Without scores, which are the order of merges, and with its own defaults for the others llama.cpp finds other ids than Hugging
Face."""
TITLE = {"general.name"}
"""The converter writes a folder's name with capitals, and a finetune's apart: the model's own name is ours."""
SIZE_LABEL = {"general.size_label"}
"""All parameters and the active ones, as XVERSE names its models; the converter writes experts times the size of one."""


def convert(stock: Programs, folder: Path, target: Path, *before: str) -> Path:
    """What the converter makes of a checkpoint in float32, with statements run `before` it."""
    said(*converter(stock.folder, *before), folder, "--outtype", "f32", "--outfile", target)
    return target


def known(file: Path) -> dict[str, Any]:
    """Keys without the architecture in front."""
    found = keys(file)
    return {key.removeprefix(f"{found['general.architecture']}."): value for key, value in found.items()}


def compare(stock: Path, ours: Path, ours_alone: set[str], others: set[str]) -> None:
    """Keys: all that the converter writes are there, and the same but for those named, which must differ indeed."""
    one, other = known(stock), known(ours)
    assert not set(one) - set(other)
    assert set(other) - set(one) == ours_alone
    assert {key for key in one if one[key] != other[key]} == others


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_dense_xverse(stock: Programs, tmp_path: Path, tied: bool) -> None:
    """The architecture that the converter knows by its name. It needs a tokenizer_config.json, and a token for every id."""
    mixture = {"num_experts", "moe_top_k", "num_shared_experts"}  # of which an XVERSE-7B's config has none
    config: dict[str, Any] = {key: value for key, value in TINY.items() if key not in mixture}
    config |= {"intermediate_size": 160, "vocab_size": small_tokenizer().get_vocab_size(), "tie_word_embeddings": tied}
    folder = write_checkpoint(tmp_path / "model", config, random_weights(config))
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "sep_token": "<sep>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    (ours,) = xent_quant.quantize(folder, type="F32", output=tmp_path / "ours").exports
    theirs = convert(stock, folder, tmp_path / "stock.gguf")
    compare(theirs, ours, CARD | SIZES | TOKENIZER | {"attention.head_count_kv", "vocab_size"}, TITLE)
    found = tensors(ours)
    if tied:  # llama.cpp does not load a file of this architecture without it, the converter's therefore
        assert found.pop("output.weight") == found["token_embd.weight"]
    assert found == tensors(theirs)


def as_bailing(config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """A checkpoint under the names of Ling's."""
    config |= {
        "architectures": ["BailingMoeForCausalLM"],
        "moe_intermediate_size": config["intermediate_size"],
        "num_experts_per_tok": config.pop("moe_top_k"),
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
    }
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        parts = [weights.pop(f"{base}self_attn.{part}_proj.weight") for part in "qkv"]
        weights[f"{base}attention.query_key_value.weight"] = np.concatenate(parts)
        weights[f"{base}attention.dense.weight"] = weights.pop(f"{base}self_attn.o_proj.weight")
        weights[f"{base}mlp.gate.weight"] = weights.pop(f"{base}mlp.router.weight")
    weights["model.word_embeddings.weight"] = weights.pop("model.embed_tokens.weight")


def as_granite(config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """A checkpoint without shared experts under the names of Granite's mixtures."""
    config |= {
        "architectures": ["GraniteMoeForCausalLM"],
        "num_local_experts": config.pop("num_experts"),
        "num_experts_per_tok": config.pop("moe_top_k"),
        "logits_scaling": 1.0,
    }
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        gate, up, down = (
            np.stack([weights.pop(f"{base}mlp.experts.{i}.{part}_proj.weight") for i in range(config["num_local_experts"])])
            for part in ("gate", "up", "down")
        )
        weights[f"{base}block_sparse_moe.input_linear.weight"] = np.concatenate([gate, up], 1)
        weights[f"{base}block_sparse_moe.output_linear.weight"] = down
        weights[f"{base}block_sparse_moe.router.layer.weight"] = weights.pop(f"{base}mlp.router.weight")


MIXTURES: dict[str, Any] = {
    "bailingmoe": ({"num_key_value_heads": 4}, as_bailing, "bailingmoe.BailingMoeModel"),
    "bailingmoe, grouped-query": ({"num_key_value_heads": 2}, as_bailing, "bailingmoe.BailingMoeModel"),
    "granitemoe": ({"num_shared_experts": 0, "num_key_value_heads": 2}, as_granite, "granite.GraniteMoeModel"),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_mixture_of_experts(stock: Programs, checkpoint: Callable[..., Path], tmp_path: Path, case: str) -> None:
    """The same function under the names of the architecture that we write. Its tokenizer is of another kind, and left out."""
    overrides, renamed, converter = MIXTURES[case]
    folder = checkpoint(**overrides)
    (ours,) = xent_quant.quantize(folder, type="F32", output=tmp_path / "ours").exports
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    renamed(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    module, kind = converter.split(".")
    patch = f"from conversion.{module} import {kind}; {kind}.set_vocab = lambda self: None"
    theirs = convert(stock, folder, tmp_path / "stock.gguf", patch)
    tokenizer = {key for key in keys(ours) if key.startswith("tokenizer.")}
    compare(theirs, ours, CARD | SIZES | tokenizer, TITLE | SIZE_LABEL)
    assert tensors(ours) == tensors(theirs)
