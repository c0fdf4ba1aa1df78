"""The methods without a Hessian, where they do more than the type's own search."""

import numpy as np
import pytest

from xent_quant import formats
from xent_quant.methods.interface import Method
from xent_quant.methods.rtn import RoundToNearest
from xent_quant.methods.search import Search
from xent_quant.tensors import InputStatistics

RANDOM = np.random.default_rng(3)
COLUMNS = 512
ALONG = RANDOM.choice([-1, 1], COLUMNS)
WEIGHTS = (0.02 * (RANDOM.standard_normal((16, COLUMNS)) + 0.5 * ALONG)).astype(np.float32)
INPUTS = RANDOM.lognormal(0, 0.5, COLUMNS) * (RANDOM.standard_normal((400, COLUMNS)) + RANDOM.standard_normal((400, 1)) * ALONG)
FEW_BITS = ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q3_K", "Q2_K", "TQ2_0", "TQ1_0", "Q1_0"]
KNOWN = InputStatistics(np.square(INPUTS).mean(0).astype(np.float32), None, len(INPUTS))


@pytest.mark.parametrize("method", [Search("fast"), RoundToNearest()], ids=lambda method: method.name)
@pytest.mark.parametrize("name", FEW_BITS)
def test_few_bits_do_not_make_weights_smaller(name: str, method: Method) -> None:
    """Least squares does, all in one direction: of inputs that have one in common, as weights have, it loses more."""
    kind, importance = formats.get(name), KNOWN.importance if method.name == "imatrix" else None
    least = kind.dequantize(kind.quantize(WEIGHTS, importance, effort="fast")).astype(np.float64)
    found = kind.dequantize(method.quantize(WEIGHTS, kind, KNOWN, name="w")).astype(np.float64)
    weighted = WEIGHTS.astype(np.float64) * (1 if importance is None else importance)

    def gain(values: np.ndarray) -> np.ndarray:
        energy, kept = ((weighted * side).reshape(-1, kind.block_size).sum(1) for side in (WEIGHTS, values))
        return kept / energy

    assert gain(least).mean() < 0.99
    np.testing.assert_allclose(gain(found), 1, atol=1e-3)
    blocks, stretched = (side.reshape(-1, kind.block_size) for side in (least, found))
    factor = (stretched * blocks).sum(1, keepdims=True) / np.square(blocks).sum(1, keepdims=True)
    np.testing.assert_allclose(stretched, factor * blocks, atol=2e-3 * np.abs(blocks).max())  # scales aside nothing is different
    lost, before = (np.square(INPUTS @ (WEIGHTS - side).T).sum() for side in (found, least))
    assert lost < 0.9 * before, f"{lost / before:.3f}"


def test_types_of_more_bits_stay() -> None:
    for name in ("Q4_K", "Q8_0", "MXFP4", "BF16"):
        kind = formats.get(name)
        assert np.array_equal(Search().quantize(WEIGHTS, kind, None, name="w"), kind.quantize(WEIGHTS, name="w"))
