"""GPTQ on tensors against the kernels'.

Given the same numbers, rounding a block and descending in it give the same bits. What comes before, products and solutions of
whole matrices, differs in the last bits, so that of two candidates whose errors are nearly the same another one may win; a row
in which that happens goes a way of its own from there on, as good as the other.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from exporters.bitsandbytes.kinds import FourBit, Int8, Whole
from tests.device.card import DEVICE, card
from xent_quant import formats, linalg, parallel
from xent_quant.device import codebooks, rounding
from xent_quant.device import curvature as curvatures
from xent_quant.device.curvature import Curvature
from xent_quant.device.found import over
from xent_quant.device.method import Job, OnDevice
from xent_quant.device.rounding import CodedRows, VectorRows
from xent_quant.device.statistics import DeviceStatistics
from xent_quant.formats._codes import CodedFormat
from xent_quant.formats._vectors import VectorFormat
from xent_quant.formats.base import Effort, QuantFormat, weighting
from xent_quant.formats.int_group import IntGroup
from xent_quant.methods import METHODS, gptq
from xent_quant.methods.gptq import GPTQ
from xent_quant.tensors import InputStatistics

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
COLUMNS = 512
MIXING = RANDOM.standard_normal((COLUMNS, COLUMNS)) * np.geomspace(1, 0.02, COLUMNS)[:, None]
INPUTS = (RANDOM.standard_normal((2000, COLUMNS)) @ MIXING).astype(np.float32)
WEIGHTS = (RANDOM.standard_normal((64, COLUMNS)) * 0.02).astype(np.float32)
PULL = (RANDOM.standard_normal((64, COLUMNS)) * 1e-3).astype(np.float32)
KINDS = [
    *map(formats.get, ("Q8_0", "Q6_K", "Q5_1", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "NVFP4", "Q3_K", "Q2_K")),
    IntGroup(4, 64, symmetric=False, scale="F16"),
    IntGroup(8, 64, symmetric=True, scale="F16"),
]


CODEBOOKS = [formats.get(name) for name in formats.NAMES if isinstance(formats.get(name), VectorFormat)]
ALL = [*KINDS, *CODEBOOKS]


def known(seed: int = 0, columns: int = COLUMNS) -> InputStatistics:
    rows = INPUTS[np.random.default_rng(seed).permutation(len(INPUTS)), :columns]
    seen, apart = rows[:1600], rows[1600 : 1900 + 10 * seed]
    return InputStatistics(np.square(seen).mean(0), seen.T @ seen / np.float32(len(seen)), len(seen), apart)


def turned(rows: np.ndarray) -> Tensor:
    """[rows, columns] as a stack of one, column after column."""
    return torch.from_numpy(np.ascontiguousarray(rows.T))[None]


def blockwise(importance: np.ndarray, kind: QuantFormat) -> Tensor:
    parts = [weighting(importance[start : start + kind.block_size]) for start in range(0, len(importance), kind.block_size)]
    return torch.from_numpy(np.concatenate([part for part in parts if part is not None]))[None]


def both(kind: Any, columns: int) -> tuple[gptq.Rows, Any]:
    """The kernels' rows and these, with the same numbers of the same Hessian."""
    statistics = known(columns=columns)
    assert statistics.hessian is not None
    weights = np.ascontiguousarray(WEIGHTS[:, :columns])
    reference = linalg.Curvature(statistics.hessian)
    ours = Curvature(torch.from_numpy(statistics.hessian.copy())[None])
    np.testing.assert_array_equal(ours.hessian[0].numpy(), reference.hessian)
    _, factor = reference.lump(0, columns)
    np.testing.assert_allclose(ours.factor[0].numpy(), factor, atol=1e-5)
    ours.factor.copy_(torch.from_numpy(factor)[None])
    theirs = gptq.Rows(weights, kind, reference, statistics.importance, "normal", "w")
    made = VectorRows if isinstance(kind, VectorFormat) else CodedRows
    return theirs, made(turned(weights), kind, ours, blockwise(statistics.importance, kind), "normal")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rounding_of_the_same_numbers_gives_the_same_bits(kind: CodedFormat) -> None:
    """64 columns pass errors on one by one; what goes beyond them is a matrix product."""
    theirs, ours = both(kind, max(kind.block_size, 64))
    theirs.feed()
    ours.feed()
    codes, errors = ours.chosen.codes[0].T.numpy(), ours.errors[0].T.numpy()
    assert np.array_equal(codes[:, :64], kind.codes(theirs.packed)[:, :64])
    assert np.array_equal(errors[:, :64], theirs.errors[:, :64])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_descent_of_the_same_numbers_gives_the_same_bits(monkeypatch, kind: CodedFormat) -> None:
    columns = max(kind.block_size, 64)
    monkeypatch.setattr("xent_quant.device.rounding.TOGETHER", columns)
    theirs, ours = both(kind, columns)
    theirs.feed()
    ours.feed()
    ours.chosen.codes[:], ours.errors[:] = turned(kind.codes(theirs.packed)), turned(theirs.errors)
    before = kind.codes(theirs.packed)
    gradient = linalg.product(theirs.errors, theirs.curvature.hessian)
    ours.descend(0, columns, turned(gradient), 2)
    theirs._descend(0, columns, gradient, 2)
    after = kind.codes(theirs.packed)
    assert (after != before).any()
    assert np.array_equal(ours.chosen.codes[0].T.numpy(), after)
    assert np.array_equal(ours.errors[0].T.numpy(), theirs.errors)


@pytest.mark.parametrize("kind", CODEBOOKS, ids=lambda kind: kind.name)
def test_points_for_the_same_numbers_are_the_same(kind: VectorFormat) -> None:
    """Vector by vector, with weights that a Hessian's pivots might give; what is kept is packed as the kernels pack it."""
    packed = METHODS["imatrix"]("normal").quantize(np.ascontiguousarray(WEIGHTS[:, :256]), kind, None, name="w")
    chosen = codebooks.search(kind, turned(WEIGHTS[:, :256]), torch.ones(1, 256), "normal")
    weighting = RANDOM.exponential(size=256).astype(np.float32)
    theirs, ours = kind.vectors(packed), codebooks.Vectors(chosen, torch.from_numpy(weighting)[None])
    assert ours.size == theirs.size
    for vector in range(256 // ours.size):
        wanted = (RANDOM.standard_normal((64, ours.size)) * 0.02).astype(np.float32)
        wanted[:5] *= np.float32(1e-3)
        better = RANDOM.random(64) < 0.7
        found = ours.choose(vector, turned(wanted))
        expected = theirs.choose(vector, wanted, weighting[vector * ours.size :][: ours.size])
        assert np.array_equal(found.values[0].T.numpy(), expected.values)
        ours.keep(vector, found, torch.from_numpy(better)[None])
        theirs.keep(vector, expected, better)
    out = np.empty_like(packed)
    chosen.pack(kind, [each[0].movedim(-1, 0).contiguous().numpy() for each in chosen.stored()], out)
    assert np.array_equal(out, theirs.packed())
    assert not np.array_equal(out, packed)


def losses(
    kind: QuantFormat, found: Sequence[np.ndarray], statistics: InputStatistics, weights: np.ndarray, pull: np.ndarray
) -> list[np.ndarray]:
    """Errors of the wanted weights, by row, of each of the packed rows."""
    assert statistics.curvature is not None
    wanted = weights + statistics.curvature.solve(pull).astype(np.float64)
    errors = [wanted - kind.dequantize(packed) for packed in found]
    return [((each @ statistics.curvature.hessian) * each).sum(1) for each in errors]


class RoundedOnce(TorchFunctionMode):
    """Products, factorisations and solutions in float64, rounded to float32 at their end: the same numbers in whatever order."""

    INEXACT = (
        torch.mm,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.linalg.solve_triangular,
        torch.linalg.cholesky_ex,
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in self.INEXACT:
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda each: each.double() if isinstance(each, Tensor) else each, (args, kwargs or {}))
        return tree_map(lambda each: each.float() if each.is_floating_point() else each, function(*args, **kwargs))


def slow_but(*names: str, kinds: Sequence[QuantFormat] = KINDS) -> list[Any]:
    return [pytest.param(kind, marks=() if kind.name in names else pytest.mark.slow) for kind in kinds]


EFFORTS = ["normal", pytest.param("high", marks=pytest.mark.slow)]


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("kind", slow_but("Q6_K", "Q4_K"), ids=lambda kind: kind.name)
def test_whole_weights_are_the_kernels_where_sums_are(monkeypatch: pytest.MonkeyPatch, kind: CodedFormat, effort: Effort) -> None:
    """All that the two do otherwise is to add up in other orders: none is left where products are rounded once, and where
    descent has one order, which is within columns that are turned to TOGETHER."""
    for module in (gptq, rounding):
        monkeypatch.setattr(module, "TOGETHER", gptq.LAZY)
    monkeypatch.setattr(parallel, "run", lambda jobs: [job() for job in jobs])  # a mode is one thread's
    monkeypatch.setattr(linalg, "linear", lambda x, weight: torch.mm(x, weight.T))
    with RoundedOnce():
        theirs, ours = (
            method.quantize(WEIGHTS, kind, known(), name="w", pull=PULL) for method in (GPTQ(effort), OnDevice(GPTQ(effort), CPU))
        )
    assert np.array_equal(theirs, ours)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("kind", slow_but("Q6_K", "Q4_K", "Q4_0", "IQ3_XXS", "IQ1_M", kinds=ALL), ids=lambda kind: kind.name)
def test_whole_weights_are_as_good_as_the_kernels(kind: QuantFormat, effort: Effort) -> None:
    method, statistics = GPTQ(effort), known()
    theirs = method.quantize(WEIGHTS, kind, statistics, name="w", pull=PULL)
    ours = OnDevice(method, CPU).quantize(WEIGHTS, kind, statistics, name="w", pull=PULL)
    before, after = losses(kind, (theirs, ours), statistics, WEIGHTS, PULL)
    assert abs(after.sum() / before.sum() - 1) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("columns", [2560, 1792])
@pytest.mark.parametrize("name", [name for name in formats.NAMES if OnDevice.here(formats.get(name))])
def test_the_real_widths_differ_from_the_kernels_as_these_from_themselves(name: str, columns: int) -> None:
    """Columns of A4.2B's gate and up, and of its down projections with their padding. In so many, a candidate that is nearly as
    good as another is met in most rows of the types with minima: what the kernels make of a pull that is 10⁻⁶ larger says how
    much that changes."""
    kind, random, rows = formats.get(name), np.random.default_rng(7), 48
    inputs = random.standard_normal((2 * columns, columns)).astype(np.float32) * np.geomspace(1, 0.05, columns, dtype=np.float32)
    inputs += 0.5 * np.roll(inputs, 1, 1) + random.standard_normal((len(inputs), 1)).astype(np.float32) * 0.1
    seen, apart = inputs[512:], inputs[:512]
    statistics = InputStatistics(np.square(seen).mean(0), seen.T @ seen / np.float32(len(seen)), len(seen), apart)
    weights, pull = (random.standard_normal((rows, columns)).astype(np.float32) * np.float32(scale) for scale in (0.02, 1e-3))
    method = GPTQ()
    theirs, moved = (
        method.quantize(weights, kind, statistics, name="w", pull=pull * np.float32(factor)) for factor in (1, 1 + 1e-6)
    )
    ours = OnDevice(method, CPU).quantize(weights, kind, statistics, name="w", pull=pull)
    exact, yardstick, found = losses(kind, (theirs, moved, ours), statistics, weights, pull)
    scatter = (yardstick / exact).std()
    assert (found / exact).std() < 3 * max(scatter, 0.01)
    assert abs((found / exact).mean() - 1) < 0.02


PRESCALED = [FourBit("nf4"), FourBit("fp4"), Int8()]


@pytest.mark.parametrize("kind", PRESCALED, ids=lambda kind: kind.name)
def test_codes_within_scales_of_the_whole_weight_are_the_kernels(monkeypatch: pytest.MonkeyPatch, kind: Whole) -> None:
    """bitsandbytes' types; see `test_whole_weights_are_the_kernels_where_sums_are`. A weight without feedback is its own."""
    for module in (gptq, rounding):
        monkeypatch.setattr(module, "TOGETHER", gptq.LAZY)
    monkeypatch.setattr(parallel, "run", lambda jobs: [job() for job in jobs])
    monkeypatch.setattr(linalg, "linear", lambda x, weight: torch.mm(x, weight.T))
    statistics = known()
    with RoundedOnce():
        theirs = GPTQ().quantize(WEIGHTS, kind, statistics, name="w", pull=PULL)
        weights, there = torch.from_numpy(WEIGHTS), DeviceStatistics.of(statistics, CPU)
        jobs = [Job("w", weights, there, torch.from_numpy(PULL)), Job("plain", weights)]
        made, plain = OnDevice(GPTQ(), CPU).quantize_together(jobs, kind)
    assert np.array_equal(made.packed, theirs)
    assert np.array_equal(plain.packed, kind.quantize(WEIGHTS))
    assert not np.array_equal(made.packed, plain.packed)
    assert np.array_equal(made.values.numpy(), kind.read(theirs, (len(WEIGHTS), COLUMNS)))


def test_a_stack_is_as_good_as_its_weights_alone() -> None:
    """Two weights of each of two statistics, with a pull and without, and with different numbers of held-out rows."""
    kind = formats.get("Q4_K")
    first, other = (DeviceStatistics.of(known(seed), CPU) for seed in (0, 1))
    assert first is not None
    assert other is not None
    method, weights = OnDevice(GPTQ("fast"), CPU), torch.from_numpy(WEIGHTS)
    jobs = [
        Job("a", weights[:32], first, torch.from_numpy(PULL[:32])),
        Job("b", weights[32:48], other),
        Job("c", weights[32:64], first),
        Job("d", weights[48:], other, torch.from_numpy(PULL[48:])),
    ]
    together = method.quantize_together(jobs, kind)
    for job, made in zip(jobs, together, strict=True):
        (alone,) = method.quantize_together([job], kind)
        assert made.packed.shape == alone.packed.shape
        assert (made.packed == alone.packed).all(1).mean() > 0.9
        np.testing.assert_array_equal(made.values.numpy(), kind.dequantize(made.packed))


def test_rows_that_the_search_serves_better_keep_it() -> None:
    kind, statistics = formats.get("Q4_0"), known()
    far = InputStatistics(statistics.importance, statistics.hessian, statistics.rows, np.eye(COLUMNS, dtype=np.float32)[:200] * 9)
    theirs, ours = (method.quantize(WEIGHTS, kind, far, name="w") for method in (GPTQ(), OnDevice(GPTQ(), CPU)))
    assert np.array_equal(theirs, ours)
    assert np.array_equal(ours, GPTQ()._search.quantize(WEIGHTS, kind, far, name="w"))


def test_a_hessian_that_float32_cannot_factorise_is_factorised_in_float64(monkeypatch) -> None:
    rows = RANDOM.standard_normal((2, 80, 64)).astype(np.float32)
    stack = torch.from_numpy(rows.transpose(0, 2, 1) @ rows)
    whole = torch.linalg.cholesky_ex

    def fails(matrices: Tensor) -> tuple[Tensor, Tensor]:
        lower, failed = whole(matrices)
        lower[0], failed[0] = torch.nan, 7
        return lower, failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    upper = curvatures.root(stack)
    np.testing.assert_allclose(upper @ upper.mT, stack, atol=1e-5 * float(stack.max()))
    assert not upper.tril(-1).any()
    with pytest.raises(torch.linalg.LinAlgError):
        curvatures.root(-stack)


@pytest.mark.parametrize("name", ["rtn", "imatrix", "gptq"])
def test_no_tensor_is_on_another_device(name: str) -> None:
    """With tensors that say where they are, any operation that mixes devices fails; all kinds of types and of statistics."""
    statistics = known(columns=256)
    names = ("NVFP4", "IQ3_XXS", "IQ1_M") if name == "gptq" else ("Q4_K", "Q4_0", "NVFP4", "IQ4_XS", "IQ2_S", "F16")
    for kind in (*map(formats.get, names), KINDS[-2]):
        method, results = METHODS[name]("fast"), []
        for context in (card(), nullcontext(CPU)):
            with context as device:
                on_device = DeviceStatistics.of(statistics, device)
                weights, pull = (torch.from_numpy(rows[:24, :256].copy()).to(device) for rows in (WEIGHTS, PULL))
                jobs = [Job("a", weights, on_device, pull), Job("b", weights[:12], statistics), Job("c", weights[:12])]
                results.append(OnDevice(method, device).quantize_together(jobs, kind))
        for made, wanted in zip(*results, strict=True):
            assert made.values.device == DEVICE
            assert np.array_equal(made.packed, wanted.packed)
            assert np.array_equal(made.values.cpu().numpy(), kind.dequantize(made.packed))


def test_a_division_by_a_number_is_rounded_once() -> None:
    """A GPU multiplies with the number's inverse where it is the CPU's."""
    values = torch.from_numpy(WEIGHTS)
    with card() as device:
        there = values.to(device)
        assert not torch.equal((there / 15.0).cpu(), values / 15.0)
        assert torch.equal(over(there, 15.0).cpu(), values / 15.0)


def test_the_gpu_that_is_none_fails_as_one_does() -> None:
    with card() as device:
        there = torch.ones(3, device=device)
        assert there.device == torch.from_numpy(np.ones(3)).to(device).device == (there + 1)[:2].device == device
        assert there.cpu().device == CPU
        here = torch.ones(3)
        for wrong in (lambda: there + here, lambda: torch.stack([here, there]), lambda: here.mul_(there)):
            with pytest.raises(AssertionError, match="not on cuda"):
                wrong()
        with pytest.raises(TypeError, match="fetched"):
            there.numpy()
