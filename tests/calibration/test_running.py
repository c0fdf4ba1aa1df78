"""Statistics of the running pass against a float64 pass that keeps every row."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from calibration.moments import COLUMN_FLOOR, fewest_rows
from calibration.running import RunningCalibration
from tests.reference.forward import forward
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CalibrationError
from xent_quant.model.streaming import StreamingModel

RANDOM = np.random.default_rng(0)
WINDOWS = RANDOM.integers(4, 300, (5, 12))


def rows_and_gates(folder, windows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    seen: dict[str, list[np.ndarray]] = {}
    gates: dict[str, list[float]] = {}
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for window in windows:
        forward(weights, config, window.tolist(), seen, gates)
    return {name: np.array(rows) for name, rows in seen.items()}, {name: np.array(rows) for name, rows in gates.items()}


def rows_seen(folder, windows: np.ndarray) -> dict[str, np.ndarray]:
    return rows_and_gates(folder, windows)[0]


def running(folder, hessian: bool, gated: bool = False) -> RunningCalibration:
    model = StreamingModel(Checkpoint.open(folder))
    return RunningCalibration(model, torch.from_numpy(WINDOWS), hessian=hessian, gated=gated)


@pytest.mark.parametrize("overrides", [{}, {"num_experts": None}, {"num_shared_experts": 0}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("hessian", [False, True])
def test_equals_a_pass_that_keeps_all_rows(checkpoint, monkeypatch, overrides, hessian) -> None:
    monkeypatch.setattr("xent_quant.model.streaming.PART_TOKENS", 24)
    monkeypatch.setattr("calibration.moments.FEWEST_ROWS", 1)  # no expert is rare: nothing is made up
    monkeypatch.setattr("calibration.moments.FEWEST_ROWS_PER_COLUMN", 0)
    folder = checkpoint(**overrides)
    wanted = rows_seen(folder, WINDOWS[:-1] if hessian else WINDOWS)  # the last window is held out
    apart = rows_seen(folder, WINDOWS[-1:])
    source = running(folder, hessian)
    for name in Checkpoint.open(folder).infos:
        found = source.get(name)
        if name not in wanted or name == "model.embed_tokens.weight":
            assert found is None or name not in wanted
            continue
        assert found is not None
        rows = wanted[name]
        assert found.rows == len(rows)
        mean = np.square(rows).mean(0)
        np.testing.assert_allclose(found.importance, np.maximum(mean, COLUMN_FLOOR * mean.mean()), rtol=2e-4)
        assert (found.hessian is not None) == hessian
        if found.hessian is not None:
            product = rows.T @ rows / len(rows)
            off = ~np.eye(len(product), dtype=bool)
            assert np.abs(found.hessian - product)[off].max() < 1e-5 * np.abs(product).max()
            if name in apart:
                np.testing.assert_allclose(found.held_out, apart[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hessian", [False, True])
def test_gated_rows_weigh_the_square_of_their_gate(checkpoint, monkeypatch, hessian) -> None:
    monkeypatch.setattr("calibration.moments.FEWEST_ROWS", 1)
    monkeypatch.setattr("calibration.moments.FEWEST_ROWS_PER_COLUMN", 0)
    folder = checkpoint()
    rows, gates = rows_and_gates(folder, WINDOWS[:-1] if hessian else WINDOWS)
    source = running(folder, hessian, gated=True)
    for name in Checkpoint.open(folder).infos:
        found = source.get(name)
        if found is None or name not in rows:
            continue
        weights = gates.get(name, np.ones(len(rows[name]))) ** 2
        mean = weights @ np.square(rows[name]) / weights.sum()
        np.testing.assert_allclose(found.importance, np.maximum(mean, COLUMN_FLOOR * mean.mean()), rtol=5e-4)
        if found.hessian is not None:
            product = (rows[name].T * weights) @ rows[name] / weights.sum()
            off = ~np.eye(len(product), dtype=bool)
            assert np.abs(found.hessian - product)[off].max() < 1e-5 * np.abs(product).max()


@pytest.mark.parametrize("hessian", [False, True])
def test_rare_experts_are_made_up_with_the_layers(checkpoint, hessian) -> None:
    """Twelve experts share sixty tokens: all of them are rare for a Hessian, most for an importance."""
    folder = checkpoint(num_experts=12, moe_top_k=1)
    wanted = rows_seen(folder, WINDOWS[:-1] if hessian else WINDOWS)
    source = running(folder, hessian)
    checked = 0
    for name in Checkpoint.open(folder).infos:
        found = source.get(name)
        if ".experts." not in name:
            continue
        assert found is not None
        assert np.isfinite(found.importance).all()
        assert (found.importance > 0).all()
        if hessian:
            assert found.hessian is not None
            assert np.isfinite(found.hessian).all()
        if "gate" in name:
            layer = wanted[name.split(".mlp")[0] + ".mlp.shared_experts.gate_proj.weight"]
            own = wanted.get(name, np.zeros((0, layer.shape[1])))
            assert found.rows == len(own)
            missing = max(0, fewest_rows(layer.shape[1], hessian) - len(own))
            mean = (np.square(own).sum(0) + missing * np.square(layer).mean(0)) / (len(own) + missing)
            np.testing.assert_allclose(found.importance, np.maximum(mean, COLUMN_FLOOR * mean.mean()), rtol=1e-3)
            checked += missing > 0
    assert checked >= 20
    assert source.coverage.least == min(min(counts) for counts in source.coverage.tokens)
    assert sum(map(sum, source.coverage.tokens)) == WINDOWS.size * 2
    assert "made up" in source.coverage.notes()[0]


def test_never_reached_experts_get_the_layers(checkpoint) -> None:
    folder = checkpoint(num_experts=64, moe_top_k=1)
    source = running(folder, True)
    never = 0
    for name in Checkpoint.open(folder).infos:
        found = source.get(name)
        if ".experts." in name:
            assert found is not None
            assert found.hessian is not None
            assert found.importance.min() > 0
            assert np.isfinite(found.hessian).all()
            assert found.hessian.trace() > 0
            never += found.rows == 0
    assert never
    assert source.coverage.rows()[0].never > 0


def test_tensors_gone_by_are_refused(checkpoint) -> None:
    source = running(checkpoint(), False)
    source.get("lm_head.weight")
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj"):
        source.get("model.layers.0.self_attn.q_proj.weight")
