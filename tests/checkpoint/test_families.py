"""What config.json means in each family, and what is refused there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import families
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.families import FAMILIES
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, ConfigError, UnsupportedError

NAMED = sorted(FAMILIES)


@pytest.mark.parametrize("family", NAMED)
def test_a_config_says_all_of_its_architecture(family: str) -> None:
    model = families.architecture(family)
    assert Architecture.from_config(model.to_config()) == model
    assert Architecture.from_config(model.carried({"model_type": family, "torch_dtype": "float16"})) == model


@pytest.mark.parametrize("family", NAMED)
def test_a_name_is_one_tensors(family: str) -> None:
    model = families.architecture(family)
    specs = list(model.each_tensor())
    assert len({spec.name for spec in specs}) == len(specs)
    assert model.head.name in {spec.name for spec in specs}


def test_what_the_families_have() -> None:
    qwen3, olmoe, ling, llama = (families.architecture(name) for name in ("qwen3_moe", "olmoe", "bailing_moe", "llama"))
    assert (qwen3.attention_size, qwen3.kv_size, qwen3.hidden_size) == (128, 64, 256)
    assert [spec.shape for spec in qwen3.layer(1).qk_norms or ()] == [(32,), (32,)]
    assert [spec.shape for spec in olmoe.layer(1).qk_norms or ()] == [(256,), (256,)]
    assert (qwen3.norm_topk_prob, olmoe.norm_topk_prob, ling.norm_topk_prob) == (True, False, True)
    assert (qwen3.dense_size, olmoe.dense_size, ling.shared_size) == (320, 0, 2 * 96)
    assert qwen3.layer(0).mlp is None
    assert ling.layer(0).fused_qkv() is not None
    assert (llama.num_experts, llama.layer(0).router, llama.head.name) == (0, None, "model.embed_tokens.weight")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dense layers between": ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is list of 1; only"),
    "every other layer": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1 can be exported"),
    "a sliding window": ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; only null can be exported"),
    "heads that do not make up the width": ("olmoe", {"head_dim": 32}, "head_dim 32 differs"),
    "biases": ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    "a base of three": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "'llama3' is not supported .* is another model",
    ),
    "dense first": ("bailing_moe", {"first_k_dense_replace": 1}, "first_k_dense_replace is 1"),
    "a normed head": ("bailing_moe", {"norm_head": True}, "norm_head is True"),
    "the second generation": ("bailing_moe", {"score_function": "sigmoid"}, "score_function is 'sigmoid'; only 'softmax'"),
}


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_function_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        families.architecture(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be an integer from 1"),
        ("qwen3_moe", {"head_dim": 33}, "head_dim 33 must be even"),
        ("olmoe", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds num_experts 6"),
    ],
)
def test_what_cannot_be(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        families.architecture(family, **changes)


def test_experts_by_transformers_newer_name() -> None:
    config = families.architecture("qwen3_moe").to_config()
    config["num_local_experts"] = config.pop("num_experts")
    assert Architecture.from_config(config) == families.architecture("qwen3_moe")


def test_q_k_and_v_are_rows_of_one_tensor(tmp_path: Path) -> None:
    folder = families.write(tmp_path / "model", "bailing_moe")
    stored = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    for index in range(2):
        layer, whole = checkpoint.architecture.layer(index), stored[f"model.layers.{index}.attention.query_key_value.weight"]
        parts = [checkpoint.read(spec.name) for spec in (layer.q, layer.k, layer.v)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        np.testing.assert_array_equal(checkpoint.read(layer.k.name, 3, 9), whole[256 + 3 : 256 + 9])
    assert checkpoint.ignored == ()
    name = "model.layers.1.attention.query_key_value.weight"
    save_file({**stored, name: stored[name][1:].copy()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: shape \[511, 256\], config.json asks for \[512, 256\]"):
        Checkpoint.open(folder)
