"""Experts as one 3-D tensor, which transformers 5 writes: each is read alone, and is what torch's own slicing gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.folders import SMALL, weights_of, write
from xent_quant.checkpoint import sources
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError

EXPERTS, WIDTH, HIDDEN = 3, 96, 64


def fused(turned: bool, suffix: str = "", seed: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights as stored, what they mean by the architecture's names)."""
    torch.manual_seed(seed)
    stored = {name: value for name, value in weights_of().items() if ".experts." not in name}
    meant = dict(stored)
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).bfloat16()
        down = torch.randn(EXPERTS, HIDDEN, WIDTH).bfloat16()
        for expert in range(EXPERTS):  # as transformers 5 computes: gate, up = linear(x, gate_up[e]).chunk(2)
            gate, up = gate_up[expert].chunk(2)
            for name, value in (("gate", gate), ("up", up), ("down", down[expert])):
                meant[f"{base}.{expert}.{name}_proj.weight"] = value.float()
        stored[f"{base}.gate_up_proj{suffix}"] = gate_up.mT if turned else gate_up
        stored[f"{base}.down_proj{suffix}"] = down.mT if turned else down
    return stored, meant


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("turned", [False, True], ids=["out, in", "in, out"])
def test_experts_are_slices(tmp_path: Path, turned: bool, suffix: str, file: str) -> None:
    stored, meant = fused(turned, suffix)
    checkpoint = Checkpoint.open(write(tmp_path, stored, file=file))
    assert set(checkpoint.infos) == set(meant)
    for name, value in meant.items():
        assert np.array_equal(checkpoint.read(name), value.numpy()), name
        assert np.array_equal(checkpoint.read(name, 1, 3), value.numpy()[1:3]), name
    assert checkpoint.nbytes == sum(value.nbytes for value in stored.values())
    assert checkpoint.notes == ()


def test_one_expert_is_read_at_a_time(tmp_path: Path, monkeypatch) -> None:
    read: list[int] = []
    real = sources.stored
    monkeypatch.setattr(sources, "stored", lambda place, first, count: read.append(count) or real(place, first, count))
    for turned in (False, True):
        checkpoint = Checkpoint.open(write(tmp_path, fused(turned)[0]))
        checkpoint.read("model.layers.1.mlp.experts.2.up_proj.weight")
        checkpoint.read("model.layers.1.mlp.experts.2.down_proj.weight")
    assert max(read) == 2 * WIDTH * HIDDEN
    read.clear()
    for _, piece in checkpoint.pieces("model.layers.1.mlp.experts.2.up_proj.weight", 1):
        piece()
    assert read == [2 * WIDTH * HIDDEN]  # of one that lies the other way each piece would read all


@pytest.mark.parametrize("change", [{"num_experts": 4}, {"num_experts": 2}, {"intermediate_size": 95}, {"hidden_size": 32}])
def test_other_shapes_are_refused(tmp_path: Path, change) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json asks for"):
        Checkpoint.open(write(tmp_path, fused(False)[0], **change))


def test_one_half_alone_is_missing(tmp_path: Path) -> None:
    stored, _ = fused(False)
    del stored["model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.gate_proj\.weight: missing"):
        Checkpoint.open(write(tmp_path, stored))


def test_a_layer_of_transformers_5_says_the_same(tmp_path: Path) -> None:
    """Mixtral's experts module of this transformers, on the tensors as they are stored, against ours on what is read."""
    import transformers
    from transformers.models.mixtral import modeling_mixtral as mixtral

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 has no fused experts")
    stored, _ = fused(False)
    checkpoint = Checkpoint.open(write(tmp_path, stored))
    config = mixtral.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=2, hidden_act="silu"
    )
    config._experts_implementation = "eager"
    module = mixtral.MixtralExperts(config)
    base = "model.layers.1.mlp.experts"
    module.load_state_dict({name: stored[f"{base}.{name}"].float() for name in ("gate_up_proj", "down_proj")})
    x, chosen, gates = torch.randn(5, HIDDEN), torch.tensor([[0, 2]] * 5), torch.tensor([[0.25, 0.75]] * 5)
    wanted = module(x, chosen, gates).detach()
    got = torch.zeros(5, HIDDEN)
    for expert, gate in ((0, 0.25), (2, 0.75)):
        g, u, d = (checkpoint.read_torch(f"{base}.{expert}.{name}_proj.weight") for name in ("gate", "up", "down"))
        got += gate * (torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-3)
    assert SMALL["num_experts"] == EXPERTS
