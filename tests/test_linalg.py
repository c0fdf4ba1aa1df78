"""Products and what their bits depend on: the values alone, not on how many rows come together, their layout, or threads."""

import numpy as np
import pytest
import torch

from xent_quant.linalg import BLOCK_ROWS, CHUNK_ROWS, FEWEST_COLUMNS, SOLVED, Curvature, linear, multiplies_bfloat16, product

SHAPES = [(64, 40), (480, 256), (1728, 96), (FEWEST_COLUMNS, 33)]
"""in, out."""


@pytest.fixture(params=SHAPES, ids=str)
def operands(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    columns, out = request.param
    random = torch.Generator().manual_seed(columns)
    return torch.randn(2 * BLOCK_ROWS + 37, columns, generator=random), torch.randn(out, columns, generator=random)


def test_products_are_exact_within_float32(operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = operands
    exact = x.double() @ weight.double().T
    assert (linear(x, weight) - exact).abs().max() <= 1e-6 * len(weight.T) ** 0.5 * exact.abs().max()


def test_products_in_bfloat16_are_its_numbers_products(operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = operands[0], operands[1].bfloat16()
    exact = x.bfloat16().double() @ weight.double().T
    found = linear(x, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_however_many_come_with_it(
    operands: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, threads: int
) -> None:
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        pytest.skip("never asked for on this processor")
    x, weight = operands[0], operands[1].to(dtype)
    whole, before = linear(x, weight), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for start, count in ((0, 1), (3, 7), (5, 16), (0, 17), (40, 100), (11, BLOCK_ROWS), (1, BLOCK_ROWS + 1), (0, len(x))):
            assert torch.equal(linear(x[start : start + count], weight), whole[start : start + count]), (start, count)
    finally:
        torch.set_num_threads(before)


def test_layouts_have_the_same_bits(operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Parts of larger arrays, their columns, and what is transposed."""
    x, weight = operands
    whole, columns = linear(x, weight), x.shape[1]
    wide, wide_weight = (torch.cat([part, part + 1, part], 1) for part in (x, weight))
    turned, turned_weight = (torch.cat([part.T, part.T + 1]).contiguous().T for part in (x, weight))
    for rows in (x, wide[:, :columns], wide[:, 2 * columns :], x.T.contiguous().T, turned[:, :columns]):
        for by in (weight, wide_weight[:, :columns], weight.T.contiguous().T, turned_weight[:, :columns]):
            assert torch.equal(linear(rows, by), whole), (rows.stride(), by.stride())
    assert np.array_equal(product(x.numpy(), weight.T.numpy()), whole.numpy())
    assert np.array_equal(product(x.numpy(), np.ascontiguousarray(weight.T.numpy())), whole.numpy())


@pytest.mark.parametrize(("rows", "columns", "out"), [(0, 64, 5), (3, 0, 5), (3, 64, 0)])
def test_nothing_at_all(rows: int, columns: int, out: int) -> None:
    assert torch.equal(linear(torch.ones(rows, columns), torch.ones(out, columns)), torch.zeros(rows, out))


def test_few_columns() -> None:
    x, weight = torch.randn(600, FEWEST_COLUMNS - 1), torch.randn(33, FEWEST_COLUMNS - 1)
    assert torch.allclose(linear(x, weight).double(), x.double() @ weight.double().T, atol=1e-5)


def test_float64_stays_float64() -> None:
    x, weight = torch.randn(5, 48, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64)
    assert linear(x, weight).dtype == torch.float64
    assert torch.allclose(linear(x, weight), x @ weight.T, rtol=1e-12)


@pytest.mark.parametrize("columns", [SOLVED - 3, SOLVED + 64, 2 * SOLVED + 100])
def test_solutions_of_a_damped_hessian(columns: int) -> None:
    """By substitution or in parts: as near as float32 comes, and of each row alone."""
    random = np.random.default_rng(columns)
    seen = (random.standard_normal((2 * columns, columns)) * np.geomspace(1, 0.01, columns)).astype(np.float32)
    rows = random.standard_normal((CHUNK_ROWS + 40, columns)).astype(np.float32)
    known = Curvature(seen.T @ seen / np.float32(len(seen)))
    exact = rows @ np.linalg.inv(known.hessian.astype(np.float64))
    found = known.solve(rows)
    assert np.abs(found - exact).max() <= 2e-4 * np.abs(exact).max()
    half = rows @ np.linalg.inv(known.hessian.astype(np.float64)) @ known.lump(0, columns)[1]
    assert np.abs(known.solve_half(rows) - half).max() <= 2e-4 * np.abs(half).max()
    if columns > SOLVED:
        for start, count in ((0, 1), (3, 7), (CHUNK_ROWS - 5, 20), (0, CHUNK_ROWS + 40)):
            assert np.array_equal(known.solve(rows[start : start + count]), found[start : start + count]), (start, count)
