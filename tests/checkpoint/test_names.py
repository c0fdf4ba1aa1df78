"""What tensors are called, and what becomes of those that nothing uses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.folders import SMALL, weights_of, write
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, UnsupportedError


def wrapped(kind: str) -> dict[str, torch.Tensor]:
    """The names that the wrapper itself gives."""
    from xent_quant.model.modeling_xverse import XverseConfig, XverseForCausalLM

    model = XverseForCausalLM(XverseConfig(**SMALL))
    model.load_state_dict(weights_of())
    if kind == "torch.compile":
        return torch.compile(model).state_dict()
    if kind == "torch.compile of a layer":
        model.model.layers[1] = torch.compile(model.model.layers[1])
        return model.state_dict()
    if kind == "DataParallel":
        return torch.nn.DataParallel(model).state_dict()
    if kind == "both":
        return torch.nn.DataParallel(torch.compile(model)).state_dict()
    assert kind == "peft"  # which is not installed here; PeftModel holds base_model (a LoraModel), and that one model
    return {f"base_model.model.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["torch.compile", "torch.compile of a layer", "DataParallel", "both", "peft"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, kind: str) -> None:
    weights = wrapped(kind)
    assert set(weights) != set(weights_of())
    checkpoint = Checkpoint.open(write(tmp_path, weights))
    for name, value in weights_of().items():
        assert np.array_equal(checkpoint.read(name), value.numpy())
    (note,) = checkpoint.notes
    assert "without the prefix" in note


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    weights = weights_of()
    name = "model.norm.weight"
    with pytest.raises(CheckpointError, match=rf"module\.{name}: {name} is the same tensor|{name}: module\.{name} is the same"):
        Checkpoint.open(write(tmp_path, {**weights, f"module.{name}": weights[name] + 1}))


def test_a_model_saved_without_its_head_is_read_where_it_is_tied(tmp_path: Path) -> None:
    config = {**SMALL, "tie_word_embeddings": True}
    bare = {name.removeprefix("model."): value for name, value in weights_of(config).items()}
    checkpoint = Checkpoint.open(write(tmp_path, bare, config))
    assert all(np.array_equal(checkpoint.read(name), value.numpy()) for name, value in weights_of(config).items())
    with pytest.raises(CheckpointError, match=r'lm_head\.weight: missing.*set "tie_word_embeddings": true'):
        Checkpoint.open(write(tmp_path, bare, config, tie_word_embeddings=False))


LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{LAYER}self_attn.q_proj.bias", "a bias that XVERSE's layers do not have"),
        (f"{LAYER}mlp.experts.0.up_proj.bias", "a bias"),
        (f"{LAYER}mlp.router.e_score_correction_bias", "a bias"),
        ("lm_head.bias", "a bias"),
        ("model.norm.bias", "a bias"),
        (f"{LAYER}mlp.shared_expert_gate.weight", "a gate"),
        (f"{LAYER}mlp.gate.weight", "a gate"),
        (f"{LAYER}self_attn.q_norm.weight", "a tensor that XVERSE's layers do not have"),
        (f"{LAYER}mlp.experts.3.up_proj.weight", "a tensor"),
        (f"{LAYER}self_attn.q_proj.lora_A.default.weight", "LoRA that is not merged"),
        (f"base_model.model.{LAYER}self_attn.q_proj.lora_B.weight", "LoRA that is not merged"),
        (f"{LAYER}self_attn.q_proj.weight_scale", "no quantization_config"),
    ],
)
def test_what_changes_the_function_is_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as told:
        Checkpoint.open(write(tmp_path, {**weights_of(), name: torch.zeros(4)}))
    assert name.removeprefix("base_model.model.") in str(told.value)


def test_what_nothing_uses_is_named_in_a_note(tmp_path: Path) -> None:
    extra = ["v_head.weight", "model.layers.2.mlp.gate_proj.weight", "model.mtp.proj.weight", "score.weight"]
    quiet = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    checkpoint = Checkpoint.open(write(tmp_path, weights_of() | {name: torch.zeros(4) for name in [*extra, *quiet]}))
    assert checkpoint.ignored == tuple(sorted([*extra, *quiet]))
    assert checkpoint.notes == (
        "Not part of the model, and not exported: model.layers.2.mlp.gate_proj.weight, model.mtp.proj.weight, score.weight"
        " and 1 more.",
    )
    assert Checkpoint.open(write(tmp_path, weights_of() | {quiet[0]: torch.zeros(4)})).notes == ()


def test_a_head_beside_a_tied_embedding_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, weights_of(), tie_word_embeddings=True))
    assert checkpoint.notes == ("lm_head.weight is not used: config.json ties the head to the embedding.",)


def test_notes_reach_the_person(tmp_path: Path) -> None:
    import xent_quant

    folder = write(tmp_path / "model", weights_of() | {"v_head.weight": torch.zeros(4)})
    (folder / "README.md").write_text("---\nlicense: [apache\n---\n# Card\n")
    notes = xent_quant.plan(folder, type="F32")[0].notes
    assert any("v_head.weight" in note for note in notes)
    assert any("README.md: its header is not YAML" in note for note in notes)
    done = xent_quant.quantize(folder, type="F32", output=tmp_path / "out")
    assert {note for note in notes if "v_head" in note or "README" in note} <= set(done.notes)
