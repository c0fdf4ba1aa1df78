"""Statistics of the running pass against a float64 pass that keeps every row."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from calibration.coverage import Coverage
from calibration.rare import COLUMN_FLOOR, fewest_rows
from tests.conftest import TINY
from tests.model.test_streaming import Rough
from tests.reference.forward import forward
from tests.walking import measured
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CalibrationError
from xent_quant.linalg import DAMPING, FEW_ROWS
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.tensors import InputStatistics, Role

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


def statistics(folder, hessian: bool, gated: bool = False, counts: list[list[int]] | None = None) -> dict[str, InputStatistics]:
    known = measured(Checkpoint.open(folder), torch.from_numpy(WINDOWS), hessian=hessian, gated=gated, counts=counts)
    return {name: each.statistics for name, each in known.items() if each.statistics is not None}


@pytest.mark.parametrize("overrides", [{}, {"num_experts": None}, {"num_shared_experts": 0}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("hessian", [False, True])
def test_equals_a_pass_that_keeps_all_rows(checkpoint, monkeypatch, overrides, hessian) -> None:
    monkeypatch.setattr("xent_quant.model.stages.PART_TOKENS", 24)
    monkeypatch.setattr("calibration.moments.ADDED_ROWS", 7)
    monkeypatch.setattr("calibration.rare.FEWEST_ROWS", 1)  # no expert is rare: nothing is made up
    monkeypatch.setattr("calibration.rare.FEWEST_ROWS_PER_COLUMN", 0)
    folder = checkpoint(**overrides)
    wanted = rows_seen(folder, WINDOWS[:-1] if hessian else WINDOWS)  # the last window is held out
    apart = rows_seen(folder, WINDOWS[-1:])
    found_of = statistics(folder, hessian)
    assert wanted.keys() - {"model.embed_tokens.weight"} <= found_of.keys()
    for name, found in found_of.items():
        if name not in wanted or name == "model.embed_tokens.weight":
            continue
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
    monkeypatch.setattr("calibration.rare.FEWEST_ROWS", 1)
    monkeypatch.setattr("calibration.rare.FEWEST_ROWS_PER_COLUMN", 0)
    folder = checkpoint()
    rows, gates = rows_and_gates(folder, WINDOWS[:-1] if hessian else WINDOWS)
    for name, found in statistics(folder, hessian, gated=True).items():
        if name not in rows:
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
    counts: list[list[int]] = []
    known = statistics(folder, hessian, counts=counts)
    checked = 0
    for name in Checkpoint.open(folder).infos:
        found = known.get(name)
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
    coverage = Coverage(2, 12, fewest_rows(96, hessian))
    coverage.tokens = counts
    assert coverage.least == min(map(min, counts))
    assert sum(map(sum, counts)) == WINDOWS.size * 2
    assert "made up" in coverage.notes()[0]


def test_never_reached_experts_get_the_layers(checkpoint) -> None:
    folder = checkpoint(num_experts=64, moe_top_k=1)
    counts: list[list[int]] = []
    known = statistics(folder, True, counts=counts)
    never = 0
    for name in Checkpoint.open(folder).infos:
        found = known.get(name)
        if ".experts." in name:
            assert found is not None
            assert found.hessian is not None
            assert found.importance.min() > 0
            assert np.isfinite(found.hessian).all()
            assert found.hessian.trace() > 0
            never += found.rows == 0
    assert never
    assert 0 in counts[0]


@pytest.mark.parametrize("overrides", [{}, {"num_experts": None}, {"tie_word_embeddings": True}])
def test_following_measures_the_quantised_model_and_makes_up_for_it(checkpoint, monkeypatch, overrides) -> None:
    """Hessians and targets against least squares on the rows of both models, each run alone in float64."""
    monkeypatch.setattr("xent_quant.model.stages.PART_TOKENS", 40)
    monkeypatch.setattr("calibration.rare.FEWEST_ROWS", 1)
    monkeypatch.setattr("calibration.rare.FEWEST_ROWS_PER_COLUMN", 0)
    windows = torch.from_numpy(RANDOM.integers(4, 300, (6, 16)))
    source = Checkpoint.open(checkpoint(**overrides))
    rough = Rough(source)
    sides: list[dict[str, dict[int, np.ndarray]]] = []
    counted: dict[str, dict[int, float]] = {}  # by the last side, which is the follower
    for weights in (source, rough):
        seen: dict[str, dict[int, np.ndarray]] = {}

        def observe(stage: Stage, seen=seen) -> None:
            for batch in stage.batches(0):
                states = stage.run.streams[0].x.take(batch.tokens).numpy()
                for spec in stage.weights:
                    seen.setdefault(spec.name, {}).update(zip(batch.tokens.tolist(), batch.inputs.numpy().copy(), strict=True))
                    if spec.role in (Role.ATTENTION_OUTPUT, Role.DOWN):  # what their outputs are added to
                        counted.setdefault(spec.name, {}).update(
                            zip(batch.tokens.tolist(), 1 / (np.square(states).mean(1) + TINY["rms_norm_eps"]), strict=True)
                        )

        StreamingModel(weights, torch.float64).hidden_states(windows, observe)
        sides.append(seen)
    exact, own = sides

    known = measured(source, windows, hessian=True, follower=rough)
    apart = 5 * 16  # the last window is held out
    corrected = 0
    for name, (found, correction) in ((name, (each.statistics, each.correction)) for name, each in known.items()):
        weights = source.read(name)
        if found is not None:
            rows = {token: row for token, row in own[name].items() if token < apart}
            inputs = np.array(list(rows.values()))
            assert found.rows == len(inputs)
            weights_of_rows = np.array([counted[name][token] if name in counted else 1.0 for token in rows])
            product = inputs.T * weights_of_rows @ inputs / max(1e-9, weights_of_rows.sum())
            off = ~np.eye(len(product), dtype=bool)
            assert found.hessian is not None
            np.testing.assert_allclose(found.hessian[off], product[off], atol=1e-4 * np.abs(product).max())
            moved, pull = correction.moved(0, weights) if correction else (weights, None)
            expert = re.match(r"(.+)\.experts\.\d+\.(gate|up)", name)
            assert pull is None or not expert
            target = moved if pull is None else moved + correction.curvature.solve(pull)
            where = f"{expert[1]}.router.weight" if expert else name  # its layer's tokens say what drifted
            judged = [token for token in own[where] if token >= apart and token in exact[where]]
            if all(token in exact[where] for token in own[where]) and "o_proj" not in name and "down_proj" not in name:
                inputs = np.array([row for token, row in own[where].items() if token < apart])
                drift = np.array([exact[where][token] for token in own[where] if token < apart]) - inputs
                hessian = known[where].statistics.hessian
                believed = np.where(off, len(inputs) / (len(inputs) + FEW_ROWS * len(product)), 1)
                damped = believed * hessian + DAMPING * hessian.trace() / len(product) * ~off
                change = np.linalg.solve(damped, (weights @ (believed * (drift.T @ inputs / len(inputs)))).T).T
                held = np.array([own[where][token] for token in judged])
                wish = (np.array([exact[where][token] for token in judged]) - held) @ weights.T
                reach = held @ change.T
                share = np.clip((wish * reach).sum() / np.square(reach).sum(), 0, 1)
                np.testing.assert_allclose(target, weights + share * change, atol=2e-3 * np.abs(weights).max())
                corrected += share > 0.1
    assert corrected >= 3


def test_overflowing_inputs_name_the_weight(checkpoint) -> None:
    class Loud(Checkpoint):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            return super().read(name, start, stop) * np.float32(1e25 if "layers.1.mlp.up" in name else 1)

    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj\.weight: its inputs are NaN or infinite"):
        measured(Loud.open(checkpoint(num_experts=None)), torch.from_numpy(WINDOWS), hessian=True)
