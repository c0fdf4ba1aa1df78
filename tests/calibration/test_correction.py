"""Weights that make up for drifted inputs, against least squares on the rows themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from calibration.correction import FURTHEST, Correction, Regression, furthest
from calibration.moments import Moments
from xent_quant import formats
from xent_quant.linalg import DAMPING, FEW_ROWS
from xent_quant.methods.rtn import rounding_error
from xent_quant.model.stages import Batch
from xent_quant.validation import gates

RANDOM = np.random.default_rng(5)
COLUMNS, ROWS = 24, 10
MIXING = np.diag(2.0 ** -np.arange(COLUMNS)) @ RANDOM.normal(size=(COLUMNS, COLUMNS))


@pytest.fixture(autouse=True, params=[7, 2048])
def added_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are made of few rows at a time, or of more than there are."""
    monkeypatch.setattr("calibration.moments.ADDED_ROWS", request.param)


GAP = RANDOM.normal(size=(COLUMNS, ROWS))


def problem(rows: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact inputs whose energy falls over the columns, inputs with white noise, and a gap that hangs on the inputs a little."""
    exact = RANDOM.normal(size=(rows, COLUMNS)) @ MIXING
    inputs = exact + noise * RANDOM.normal(size=exact.shape)
    gap = 0.1 * inputs @ GAP + 0.1 * RANDOM.normal(size=(rows, ROWS))
    return exact.astype(np.float32), inputs.astype(np.float32), gap.astype(np.float32)


def corrected(rows: int, noise: float, gaps: bool) -> tuple[Correction, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """From moments fed in two parts: (correction, rows it was made from, rows held out)."""
    moments = Moments(COLUMNS, hessian=True)
    seen, apart = problem(rows, noise), problem(100, noise)
    together = [torch.from_numpy(np.concatenate(pair)) for pair in zip(seen, apart, strict=True)]
    mask = torch.arange(rows + 100) >= rows
    for part in torch.split(torch.arange(rows + 100), rows // 2):
        exact, inputs, gap = (side[part] for side in together)
        moments.add(Batch(inputs, part, exact=exact, residual=gap if gaps else None), mask[part])
    statistics = moments.statistics()
    assert statistics is not None
    found = moments.correction(statistics)
    assert found is not None
    return found, seen, apart


def target(correction: Correction, weights: np.ndarray, start: int = 0) -> np.ndarray:
    return weights + correction.curvature.solve(correction.pull(start, weights))


@pytest.mark.parametrize("gaps", [False, True])
def test_equals_ridge_regression_on_all_rows(gaps) -> None:
    correction, (exact, inputs, gap), (exact_apart, inputs_apart, gap_apart) = corrected(400, 0.3, gaps)
    weights = RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    wide = inputs.astype(np.float64)
    products = wide.T @ wide
    share = 400 / (400 + FEW_ROWS * COLUMNS)
    ridge = share * products + np.diag((1 - share) * products.diagonal() + DAMPING * products.diagonal().mean())
    drift = (exact - wide).T @ wide
    drift = share * drift + np.diag((1 - share) * drift.diagonal())
    change = np.linalg.solve(ridge, (weights @ drift + (gap.T @ wide if gaps else 0)).T).T
    reach = inputs_apart @ change.T
    wish = (exact_apart - inputs_apart) @ weights.T + (gap_apart if gaps else 0)
    share = min((wish * reach).sum() / np.square(reach).sum(), 1)
    assert share > 0.3
    np.testing.assert_allclose(target(correction, weights), weights + share * change, rtol=1e-3, atol=1e-3)
    halves = [target(correction, weights[start : start + 5], start) for start in (0, 5)]
    assert np.concatenate(halves).shape == weights.shape  # rows find their own gaps; how far they go is theirs as well


@pytest.mark.parametrize("rows", [26, 60, 400])
def test_never_worse_on_held_out_rows_however_few_the_others(rows) -> None:
    correction, _, (exact, inputs, _) = corrected(rows, 0.3, False)
    weights = RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    wanted = exact @ weights.T
    before, after = (np.square(inputs @ side.T - wanted).sum() for side in (weights, target(correction, weights)))
    assert after < before


def test_a_rare_experts_drift_is_made_up_with_rows_that_have_none(monkeypatch) -> None:
    monkeypatch.setattr("calibration.rare.FEWEST_ROWS", 1)
    rare, layer = Moments(COLUMNS, hessian=True), Moments(COLUMNS, hessian=True)
    own, others = problem(10, 0.3), problem(300, 0.3)
    for moments, (exact, inputs, _) in ((rare, own), (layer, others)):
        mask = torch.arange(len(inputs)) % 5 == 4
        known = torch.from_numpy(exact) if moments is rare else None
        moments.add(Batch(torch.from_numpy(inputs), mask, exact=known), mask)
    statistics = rare.statistics(layer)
    assert statistics is not None
    found = rare.correction(statistics, layer)
    assert found is not None
    exact, inputs = (rows[np.arange(len(rows)) % 5 != 4].astype(np.float64) for rows in own[:2])
    wanted = (exact - inputs).T @ inputs / COLUMNS  # 8 rows and 16 without drift
    wanted *= np.where(np.eye(COLUMNS), 1, 8 / (8 + FEW_ROWS * COLUMNS))  # as of a Hessian of so few rows
    np.testing.assert_allclose(found.drift, wanted, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(found.inputs, own[1][4::5])


def test_what_drifted_in_a_layer_moves_the_weights_of_all_its_experts() -> None:
    """Where a weight reads all of the layer's rows, as its own correction does."""
    correction, _, (exact, inputs, _) = corrected(400, 0.3, False)
    weights = RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    moved, pull = Regression.of(correction).moved(0, weights)
    assert pull is None
    np.testing.assert_allclose(moved, target(correction, weights), rtol=1e-4, atol=1e-4)
    before, after = (np.square(inputs @ side.T - exact @ weights.T).sum() for side in (weights, moved))
    assert after < before
    misled = replace(Regression.of(correction), drifts=-correction.drifts)
    np.testing.assert_array_equal(misled.moved(0, weights)[0], weights)


def test_mixtures_of_many_rows_know_about_how_far_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    correction, *_ = corrected(60, 0.3, False)
    correction = replace(correction, drifts=np.float32(0.4) * correction.drifts)  # held-out rows drift less: not all the way
    weights = RANDOM.normal(size=(200, COLUMNS)).astype(np.float32)
    of_all = Regression.of(correction)
    monkeypatch.setattr("calibration.correction.MIXED", 64)
    mixed = Regression.of(correction)
    assert (len(of_all.inputs), len(mixed.inputs), len(mixed.drifts)) == (100, 64, 64)
    all_the_way, shares = weights @ of_all.matrix, []
    for known in (of_all, mixed):
        change = known.moved(0, weights)[0] - weights
        shares.append((change * all_the_way).sum() / np.square(all_the_way).sum())
        np.testing.assert_allclose(change, shares[-1] * all_the_way, atol=1e-5)
    assert 0.1 < shares[0] < 0.95
    assert abs(shares[1] / shares[0] - 1) < 0.15


def test_weights_whose_inputs_have_no_energy_stay() -> None:
    moments = Moments(COLUMNS, hessian=True)
    moments.add(Batch(torch.zeros(64, COLUMNS), torch.arange(64), exact=torch.zeros(64, COLUMNS)), torch.arange(64) > 50)
    statistics = moments.statistics()
    assert statistics is not None
    assert moments.correction(statistics) is None


def test_a_regression_that_misleads_is_not_followed() -> None:
    correction, _, _ = corrected(400, 0.3, False)
    weights = RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    against = replace(correction, drifts=-correction.drifts)
    assert np.array_equal(target(against, weights), weights)
    nowhere = replace(correction, known=replace(correction.known, held_out=np.zeros_like(correction.inputs)))
    assert np.array_equal(target(nowhere, weights), weights)


def test_no_row_moves_further_than_allowed() -> None:
    """By its own norm; rows that ask for less move as before."""
    correction, _, _ = corrected(400, 0.3, True)
    weights = RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32) * np.geomspace(0.1, 10, ROWS, dtype=np.float32)[:, None]

    def shares(known: Correction | Regression) -> np.ndarray:
        moved, pull = known.moved(0, weights)
        change = moved - weights if pull is None else correction.curvature.solve(pull)
        return np.linalg.norm(change, axis=1) / np.linalg.norm(weights, axis=1)

    for known in (correction, Regression.of(correction)):
        asked = shares(known)
        for most in (np.sort(asked)[ROWS // 2] * 1.001, 0.01):
            np.testing.assert_allclose(shares(replace(known, furthest=most)), np.minimum(asked, most), rtol=1e-3)


def test_an_export_moves_weights_as_its_coarsest_type_asks() -> None:
    kinds = [formats.get(name) for name in ("F32", "Q8_0", "Q4_K")]
    assert furthest(kinds) == furthest([*kinds, formats.get("Q6_K")]) == FURTHEST * rounding_error(formats.get("Q4_K"))
    assert rounding_error(formats.get("F32")) == 0
    assert rounding_error(formats.get("Q8_0")) == pytest.approx(0.006, abs=0.002)
    for name in formats.NAMES:  # with the rounding of what was moved beside it, still within what validate allows
        error = rounding_error(formats.get(name))
        if gates.bits_of(name) in (8, 6, 5, 4, 3, 2):
            assert np.hypot(FURTHEST * error, 1.25 * error) < gates.WEIGHTS[gates.bits_of(name)][0], name
