"""Sums over rows: what a rare expert's are made up with, and which rows judge."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from calibration.measuring import HELD_OUT_SHARE, Measuring, _held_out
from calibration.moments import Moments
from xent_quant.model.sizes import HELD_OUT_ROWS
from xent_quant.model.stages import Batch, Pass

COLUMNS = 96


def batch(rows: int, seed: int, size: float) -> Batch:
    random = np.random.default_rng(seed)
    inputs = torch.from_numpy(random.standard_normal((rows, COLUMNS)).astype(np.float32))
    sizes = torch.from_numpy((size * random.uniform(0.5, 2, rows)).astype(np.float32))
    return Batch(inputs, torch.arange(rows), sizes=sizes, exact=inputs * 1.01)


def mean(of: Batch) -> np.ndarray:
    assert of.sizes is not None
    inputs, weights = of.inputs.double().numpy(), 1 / of.sizes.double().numpy() ** 2
    return (inputs.T * weights) @ inputs / weights.sum()


@pytest.mark.parametrize("size", [0.03, 1.0, 30.0])
def test_a_rare_experts_share_is_its_rows_whatever_the_size_of_the_stream(size: float) -> None:
    own, layer = batch(24, 0, size), batch(400, 1, size)
    parts = []
    for each in (own, layer):
        moments = Moments(COLUMNS, hessian=True)
        moments.add(each)
        parts.append(moments)
    known = cast(Any, parts[0].statistics(parts[1]))
    wanted = (24 * mean(own) + (COLUMNS - 24) * mean(layer)) / COLUMNS
    np.testing.assert_allclose(known.hessian, wanted, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(known.importance, wanted.diagonal(), rtol=1e-3)


def test_an_expert_without_held_out_rows_is_judged_by_the_layers() -> None:
    own, layer = Moments(COLUMNS, hessian=True), Moments(COLUMNS, hessian=True)
    own.add(batch(2 * COLUMNS, 0, 1.0))
    layer.add(batch(400, 1, 1.0), torch.arange(400) % 16 == 15)
    known = cast(Any, own.statistics(layer))
    np.testing.assert_allclose(known.held_out, layer.held_out[0])
    alone = cast(Any, own.statistics())
    assert alone.held_out is None
    np.testing.assert_array_equal(known.hessian, alone.hessian)


@pytest.mark.parametrize("windows", [2, 3, 15, 16, 31, 32, 40, 250, 1000])
@pytest.mark.parametrize("length", [20, 512, 4096, 8192, 32768])
def test_some_windows_are_held_out_whatever_their_length(windows: int, length: int) -> None:
    apart = _held_out(windows, length).nonzero()[:, 0]
    assert 1 <= len(apart) <= max(1, windows // HELD_OUT_SHARE)
    assert len(apart) == 1 or len(apart) * length <= 8 * HELD_OUT_ROWS
    assert windows - int(apart[-1]) <= max(1, int(apart[0]) + 1)


@pytest.mark.parametrize(("windows", "length"), [(40, 16), (250, 512), (31, 8192)])
def test_rows_of_all_held_out_windows_judge(windows: int, length: int) -> None:
    measuring = Measuring(0, torch.zeros(windows, length, dtype=torch.long), hessian=True)
    judged = measuring._judged.view(windows, length).sum(1)
    apart = _held_out(windows, length)
    assert (judged[apart] > 0).all()
    assert not judged[~apart].any()
    assert min(HELD_OUT_ROWS // 2, int(apart.sum()) * length) <= int(judged.sum()) <= HELD_OUT_ROWS
    assert judged[apart].max() - judged[apart].min() <= 1


@pytest.mark.parametrize(("tokens", "count"), [(1990, 1000), (1000, 1000), (10, 1000), (31744, 1728), (1, 1)])
def test_a_sample_is_of_all_of_the_text(tokens: int, count: int) -> None:
    run: Any = SimpleNamespace(n_tokens=tokens, tokens=torch.arange)
    found = Pass.sampled(run, count)
    assert len(found) == min(count, tokens)
    steps = found.diff()
    assert not len(steps) or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
    assert int(found[0]) == 0
    assert tokens - int(found[-1]) <= -(-tokens // len(found))
