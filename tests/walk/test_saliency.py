"""Saliency of experts: against a forward pass of one token and one expert at a time in float64."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from calibration.session import Session
from tests.conftest import random_weights, write_checkpoint
from tests.reference.forward import forward
from tests.walk.conftest import CONFIG
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.options import CalibrationOptions
from xent_quant.walk.saliency import most_salient, saliency

WINDOWS = [[2, 17, 300, 5, 9], [42, 260, 261, 11, 7]]


def reference(folder: Path) -> np.ndarray:
    """[layers, experts] of WINDOWS, by the definition."""
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    found = np.zeros((config["num_hidden_layers"], config["num_experts"]))
    inner: dict[str, list[np.ndarray]] = {}
    gates: dict[str, list[float]] = {}
    for window in WINDOWS:
        forward(weights, config, window, inner, gates)
    for layer, expert in np.ndindex(found.shape):
        name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
        down = weights[name].astype(np.float64)
        parts = [
            gate * np.sqrt(((down @ row) ** 2).sum()) for gate, row in zip(gates.get(name, []), inner.get(name, []), strict=True)
        ]
        found[layer, expert] = sum(parts) / len(parts) if parts else 0.0
    return found


def test_saliency_is_the_mean_of_gate_times_norm_over_an_experts_own_tokens(tmp_path: Path) -> None:
    for name, changes in {"few": {}, "not renormalised": {"norm_topk_prob": False}, "rare": {"num_experts": 24}}.items():
        config = {**CONFIG, **changes}
        folder = write_checkpoint(tmp_path / name, config, random_weights(config))
        wanted = reference(folder)
        found = saliency(Checkpoint.open(folder), torch.tensor(WINDOWS))
        assert found.shape == (config["num_hidden_layers"], config["num_experts"])
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
        assert len(set(wanted[wanted > 0])) > 8
        assert (wanted == 0).any() == (name == "rare")  # of 24 experts some see none of 20 choices
        with_files = saliency(Checkpoint.open(folder), torch.tensor(WINDOWS), folder=tmp_path / name)
        assert np.array_equal(found, with_files)


def test_the_sample_is_spread_over_the_text(model: Path, text: Any) -> None:
    session = Session(Checkpoint.open(model), CalibrationOptions(**text))
    windows = session.text.windows
    assert len(windows) == 4
    for tokens, step in ((1, 4), (39, 4), (40, 2), (60, 2), (79, 2), (80, 1), (10**6, 1)):
        assert np.array_equal(session.sample(tokens).numpy(), windows[::step]), tokens


def test_of_equal_ones_the_lower_number_stays() -> None:
    found = np.array([[1.0, 2, 2, 0, 0], [0, 0, 0, 0, 0], [3, 1, 1, 1, 5]])
    assert most_salient(found, 1) == [[1], [0], [4]]
    assert most_salient(found, 3) == [[0, 1, 2], [0, 1, 2], [0, 1, 4]]
    assert most_salient(found, 4) == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 4]]
