"""GPTQ against the paper's loop, its invariants, and what it is for: less output error on inputs that it has not seen."""

import itertools
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from tests.reference import gptq as reference
from xent_quant import formats, linalg
from xent_quant.device.statistics import DeviceStatistics
from xent_quant.formats._eights import ShiftedFormat
from xent_quant.formats.base import QuantFormat
from xent_quant.formats.int_group import IntGroup
from xent_quant.methods import METHODS, gptq
from xent_quant.methods.gptq import GPTQ, Curvature, Rows
from xent_quant.methods.search import Search
from xent_quant.tensors import InputStatistics

RANDOM = np.random.default_rng(0)
COLUMNS = 512
MIXING = RANDOM.standard_normal((COLUMNS, COLUMNS)) * np.geomspace(1, 0.02, COLUMNS)[:, None]
INPUTS = (RANDOM.standard_normal((3000, COLUMNS)) @ MIXING).astype(np.float32)
WEIGHTS = (RANDOM.standard_normal((24, COLUMNS)) * 0.02).astype(np.float32)
CODEBOOKS = ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"]
FAMILIES = ["Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K", *CODEBOOKS]


def statistics(columns: int = COLUMNS) -> InputStatistics:
    seen, unseen = INPUTS[:2500, :columns], INPUTS[2500:, :columns]
    return InputStatistics(np.square(seen).mean(0), seen.T @ seen / len(seen), len(seen), unseen)


def kind_of(name: str) -> gptq.Gridded:
    kind = formats.get(name)
    assert isinstance(kind, gptq.Gridded)
    return kind


def fed(kind: gptq.Gridded, columns: int = COLUMNS, count: int = len(WEIGHTS)) -> Rows:
    known = statistics(columns)
    assert known.hessian is not None
    weights = np.ascontiguousarray(WEIGHTS[:count, :columns])
    rows = Rows(weights, kind, Curvature(known.hessian), known.importance, "fast", "w")
    rows.feed()
    return rows


@pytest.mark.parametrize("rows", [3, 500])
def test_of_few_rows_little_is_believed_beside_the_diagonal(rows) -> None:
    """A share of rows / (rows + 2 · columns), in memory and on a device, whether columns of zeros follow or not."""
    known = statistics(64)
    assert known.hessian is not None
    known, wanted = replace(known, rows=rows), known.hessian.astype(np.float64) * rows / (rows + 2 * 64)
    np.fill_diagonal(wanted, known.hessian.diagonal() + 0.01 * known.hessian.diagonal().mean(dtype=np.float64))
    device = DeviceStatistics.of(known, torch.device("cpu"))
    assert known.curvature is not None
    assert device is not None
    assert device.curvature is not None
    padded = known.padded(96)
    of_device = DeviceStatistics.of(padded, torch.device("cpu"))
    assert padded.curvature is not None
    assert of_device is not None
    assert of_device.curvature is not None
    np.testing.assert_allclose(known.curvature.hessian, wanted, rtol=1e-6)
    np.testing.assert_array_equal(device.curvature.hessian[0].numpy(), known.curvature.hessian)
    wider = np.diag(np.full(96, 0.01 * known.hessian.diagonal().mean(dtype=np.float64), np.float32))
    wider[:64, :64] = known.curvature.hessian
    np.testing.assert_allclose(padded.curvature.hessian, wider, rtol=1e-6)
    np.testing.assert_array_equal(of_device.curvature.hessian[0].numpy(), padded.curvature.hessian)


@pytest.mark.parametrize("columns", [64, 512])
def test_what_is_made_of_a_padded_hessian_is_what_a_wider_one_gives(columns: int) -> None:
    known, wide = statistics(columns), columns + 96
    ours = known.padded(wide)
    assert ours.curvature is not None
    zeros = ((0, 96), (0, 96))
    theirs = Curvature(np.pad(known.hessian, zeros), linalg.believed(known.rows, known.importance))
    rows = RANDOM.standard_normal((40, wide)).astype(np.float32)
    parts = ours.curvature.lump(32, 96), theirs.lump(32, 96)
    for found, wanted in (
        (ours.curvature.hessian, theirs.hessian),
        (ours.curvature.pivots, theirs.pivots),
        *zip(*parts, strict=True),
        (ours.curvature.solve(rows), theirs.solve(rows)),
        (ours.curvature.solve_half(rows), theirs.solve_half(rows)),
        (ours.reaching, theirs.solve(np.pad(known.held_out, ((0, 0), (0, 96))))),
    ):
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def loss(rows: Rows) -> np.ndarray:
    errors = rows.errors.astype(np.float64)
    return ((errors @ rows.curvature.hessian) * errors).sum(1)


def wide_grid(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    grid = rows.kind.grid(rows.packed)
    group = grid.group_size(rows.weights.shape[1])
    return np.repeat(grid.scale, group, 1), np.repeat(grid.offset, group, 1), grid.levels


@pytest.mark.parametrize(
    "kind",
    [kind_of("Q4_0"), kind_of("IQ4_NL"), kind_of("Q4_K"), kind_of("Q2_K"), IntGroup(4, 64, symmetric=False, scale="F16")],
    ids=lambda kind: kind.name,
)
def test_codes_are_those_of_the_papers_loop(kind) -> None:
    rows = fed(kind, 256)
    wanted = reference.gptq(rows.weights, rows.curvature.hessian, *wide_grid(rows))
    assert np.array_equal(kind.codes(rows.packed), wanted)


def every_sign(points: np.ndarray) -> np.ndarray:
    """[n, size] magnitudes with all combinations of signs."""
    size = points.shape[1]
    signs = np.array(list(itertools.product((1, -1), repeat=size)))
    return (points[:, None, :] * signs).reshape(-1, size)


@pytest.mark.parametrize("name", ["IQ3_S", "IQ2_S", "IQ1_S"])
def test_points_are_those_of_block_elimination(name: str) -> None:
    kind = kind_of(name)
    rows = fed(kind, 256, 2)
    found = kind.load(rows.packed.reshape(-1, kind.block_bytes))
    shape, size = rows.weights.shape, kind.points.shape[1]
    scale = np.repeat(kind.scale(found).reshape(len(rows.weights), -1), kind.group_size, 1)
    if isinstance(kind, ShiftedFormat):
        points, shift = kind.points, np.repeat(np.where(found.minus, -kind.delta, kind.delta), 8 * kind.run, 1).reshape(shape)
    else:
        points, shift = every_sign(kind.points), np.zeros(shape)
    wanted = reference.vectors(rows.weights, rows.curvature.hessian, scale, size, points, shift)
    np.testing.assert_allclose(rows.weights - rows.errors, wanted, atol=1e-6)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_bytes_say_what_was_chosen(name: str) -> None:
    kind = kind_of(name)
    rows = fed(kind, 256, 16)
    vectors = kind.vectors(rows.packed)
    assert np.array_equal(vectors.packed(), rows.packed)
    first = slice(0, vectors.size)
    choice = vectors.choose(0, -rows.weights[:, first], np.ones(vectors.size, np.float32))
    some = np.arange(16) % 2 == 0
    if name == "IQ1_M" or not isinstance(kind, ShiftedFormat):  # IQ1_S has one sign of delta for four vectors
        vectors.keep(0, choice, some)
        values, before = kind.dequantize(vectors.packed()), kind.dequantize(rows.packed)
        np.testing.assert_array_equal(values[some, first], choice.values[some])
        np.testing.assert_array_equal(values[~some], before[~some])
        np.testing.assert_array_equal(values[:, vectors.size :], before[:, vectors.size :])
        assert not np.array_equal(values, before)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ4_NL"])
def test_descent_is_the_best_single_code(name: str) -> None:
    rows = fed(kind_of(name), 256, 3)
    wanted = reference.descend(
        rows.weights, rows.curvature.hessian.astype(np.float64), *wide_grid(rows), rows.kind.codes(rows.packed)
    )
    gradient = gptq.product(rows.errors, rows.curvature.hessian)
    rows._descend(0, 256, gradient, 1)
    assert np.array_equal(rows.kind.codes(rows.packed), wanted)
    before = fed(kind_of(name), 256, 3)
    assert not np.array_equal(wanted, before.kind.codes(before.packed))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_lazy_updates_do_not_change_the_answer(monkeypatch, name: str) -> None:
    whole = fed(kind_of(name))
    for columns in (32, 128, COLUMNS):
        monkeypatch.setattr(gptq, "LAZY", columns)
        again = fed(kind_of(name))
        assert (again.packed == whole.packed).mean() > 0.999
        np.testing.assert_allclose(loss(again), loss(whole), rtol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_step_lowers_the_loss(name: str) -> None:
    rows = fed(kind_of(name))
    before = loss(rows)
    for _ in range(2):
        rows.sweep(2)
        np.testing.assert_allclose(rows.errors, rows.weights - rows.kind.dequantize(rows.packed), atol=1e-6)
        after = loss(rows)
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < before.sum()
        before = after


@pytest.mark.parametrize(
    "kind",
    [*map(kind_of, FAMILIES), IntGroup(4, 32, symmetric=True, scale="F16"), IntGroup(8, 64, symmetric=False, scale="F16")],
    ids=lambda kind: kind.name,
)
def test_less_error_on_unseen_inputs_than_the_search(kind) -> None:
    known = statistics()
    assert known.held_out is not None
    fresh = (np.random.default_rng(1).standard_normal((2000, COLUMNS)) @ MIXING).astype(np.float32)

    def error(method) -> float:
        return float(np.square(fresh @ (WEIGHTS - kind.dequantize(method.quantize(WEIGHTS, kind, known, name="w"))).T).sum())

    assert error(GPTQ()) < 0.6 * error(Search())


def test_rows_that_the_search_serves_better_keep_it() -> None:
    """Held-out inputs of another kind than those of the Hessian: feedback for the wrong inputs does harm."""
    known, kind = statistics(), kind_of("Q4_0")
    lonely = InputStatistics(known.importance, known.hessian, known.rows, np.eye(COLUMNS, dtype=np.float32)[:200] * 9)
    chosen = GPTQ().quantize(WEIGHTS, kind, lonely, name="w")
    searched = Search().quantize(WEIGHTS, kind, lonely, name="w")
    assert (chosen == searched).all(1).mean() > 0.9
    errors = [gptq.held_out_error(WEIGHTS - kind.dequantize(packed), lonely) for packed in (chosen, searched)]
    assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ1_M"])
def test_slices_threads_and_padding_change_no_byte(name: str) -> None:
    kind, known, method = kind_of(name), statistics(480).padded(512), GPTQ()
    weights = np.pad(WEIGHTS[:, :480], ((0, 0), (0, 32)))
    whole = method.quantize(weights, kind, known, name="w")
    if kind.has_zero:
        assert not kind.dequantize(whole)[:, 480:].any()
    threads = numba.get_num_threads(), torch.get_num_threads()
    try:
        numba.set_num_threads(1)
        torch.set_num_threads(1)
        sliced = [GPTQ().quantize(weights[rows], kind, known, name="w") for rows in (slice(0, 7), slice(7, 24))]
    finally:
        numba.set_num_threads(threads[0])
        torch.set_num_threads(threads[1])
    assert np.array_equal(np.concatenate(sliced), whole)


EVERY_KIND = [
    *map(formats.get, formats.NAMES),
    *(IntGroup(bits, 64, symmetric, "F16") for bits in (4, 8) for symmetric in (True, False)),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.name)
def test_poor_statistics_do_no_harm(kind: QuantFormat, method: str) -> None:
    """One row, no energy at all, none of some columns: finite weights, near the plain ones."""
    one = INPUTS[:1]
    blind = np.where(np.arange(COLUMNS) % 3 == 0, 0, INPUTS[:400])
    for rows in (one, np.zeros_like(one), blind):
        known = InputStatistics(np.square(rows).mean(0), rows.T @ rows / len(rows), len(rows), rows)
        packed = METHODS[method]("fast").quantize(WEIGHTS, kind, known, name="w")
        values = kind.dequantize(packed)
        assert np.isfinite(values).all()
        assert np.square(values - WEIGHTS).sum() < 0.8 * np.square(WEIGHTS).sum()
