"""ONNX Runtime's integer groups: bytes of the slow reference, and the initialisers that the runtime reads."""

import numpy as np
import pytest

from tests.reference import int_group as reference
from xent_quant.errors import ConfigError, QuantizationError
from xent_quant.formats.int_group import EFFORTS, IntGroup, int_group

KINDS = [
    int_group(bits, group, symmetric, scale)
    for bits, group, symmetric, scale in [
        (4, 64, True, "F32"),
        (4, 32, True, "F16"),
        (4, 64, False, "F16"),
        (4, 32, False, "BF16"),
        (8, 64, True, "F16"),
        (8, 32, False, "F32"),
        (8, 64, True, "BF16"),
    ]
]
RANDOM = np.random.default_rng(3)
COLUMNS = 192
IMPORTANCE = RANDOM.exponential(size=COLUMNS).astype(np.float32) + np.float32(0.05)


def ladder() -> np.ndarray:
    """Zeros, subnormals, ordinary and large rows, constants, one outlier, all of one sign. [n, COLUMNS] float32."""
    base = RANDOM.standard_normal((6, COLUMNS)).astype(np.float32)
    scales = np.array([0, 1e-40, 6e-8, 0.02, 1, 1e3], np.float32)[:, None]
    special = np.stack([np.full(COLUMNS, 0.25), np.eye(1, COLUMNS, 7)[0], -np.abs(base[0]), 3 + np.abs(base[1])])
    ragged = base[2] * np.where(np.arange(COLUMNS) % 64 < 32, 1, 0)
    return np.concatenate([base * scales, special.astype(np.float32), ragged[None].astype(np.float32)])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bytes_equal_the_slow_reference(kind: IntGroup) -> None:
    weights = ladder()
    importance = np.maximum(IMPORTANCE / IMPORTANCE.mean(dtype=np.float64).astype(np.float32), np.float32(1e-6))
    packed = kind.quantize(weights, IMPORTANCE)
    candidates, rounds = EFFORTS[kind.bits, kind.symmetric].normal
    for row, got in zip(weights, packed, strict=True):
        wanted = b""
        for start in range(0, COLUMNS, kind.group_size):
            part = slice(start, start + kind.group_size)
            arguments = (kind.bits, kind.symmetric, kind.scale_type)
            codes, scale, zero = reference.quantize_group(list(row[part]), list(importance[part]), *arguments, candidates, rounds)
            wanted += reference.pack_group(codes, scale, zero, *arguments)
        assert got.tobytes() == wanted


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_split_holds_what_dequantize_says(kind: IntGroup) -> None:
    weights = ladder()
    packed = kind.quantize(weights)
    codes, scales, zeros = kind.split(packed)
    if kind.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(weights), -1)
    if kind.scale_type == "BF16":
        scale = (scales.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        scale = scales.view({"F32": "<f4", "F16": "<f2"}[kind.scale_type]).astype(np.float32)
    zero = np.full(scale.shape, 2 ** (kind.bits - 1))
    if zeros is not None:
        zero = zeros if kind.bits == 8 else np.stack([zeros & 15, zeros >> 4], -1).reshape(len(weights), -1)[:, : scale.shape[1]]
    wide = [np.repeat(part.astype(np.float64), kind.group_size, axis=1) for part in (scale, zero)]
    wanted = wide[0] * (codes - wide[1])
    got = kind.dequantize(packed)
    assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert np.array_equal(got[0], np.zeros(COLUMNS))
    assert not got[-1][32:64].any()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_grid_and_codes(kind: IntGroup) -> None:
    packed = kind.quantize((RANDOM.standard_normal((5, COLUMNS)) * 0.02).astype(np.float32))
    grid = kind.grid(packed)
    assert grid.group_size(COLUMNS) == kind.group_size
    codes = RANDOM.integers(0, 2**kind.bits, (5, COLUMNS), dtype=np.uint8)
    changed = kind.with_codes(packed, codes)
    group = np.arange(COLUMNS) // kind.group_size
    assert np.array_equal(kind.dequantize(changed), grid.scale[:, group] * grid.levels[codes] + grid.offset[:, group])
    assert np.array_equal(kind.with_codes(changed, kind.codes(packed)), packed)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_beats_rounding_to_nearest(bits: int) -> None:
    """Rounding to nearest: the scale that reaches the largest weight, as ONNX Runtime's own quantisers."""
    weights = (RANDOM.standard_t(5, (64, 512)) * 0.02).astype(np.float32)
    groups = weights.reshape(64, -1, 64)
    limit = 2 ** (bits - 1)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = (extreme / -limit).astype(np.float16).astype(np.float32)
    nearest = (np.clip(np.rint(groups / scale), -limit, limit - 1) * scale).reshape(64, 512)
    importance = RANDOM.exponential(size=512).astype(np.float32)

    def error(values: np.ndarray) -> float:
        return float((importance * np.square(values - weights)).sum())

    symmetric, asymmetric = (int_group(bits, 64, kind, "F16") for kind in (True, False))
    found = [error(kind.dequantize(kind.quantize(weights, importance))) for kind in (symmetric, asymmetric)]
    assert found[0] < error(nearest) * (0.85 if bits == 4 else 0.95)
    assert found[1] < found[0]


def test_refusals() -> None:
    kind = int_group(4, 64, True, "F16")
    with pytest.raises(QuantizationError, match=r"x: .*float16"):
        kind.quantize(np.full((1, 64), 1e9, np.float32), name="x")
    with pytest.raises(QuantizationError, match="x: NaN"):
        kind.quantize(np.full((1, 64), np.nan, np.float32), name="x")
    with pytest.raises(QuantizationError, match="multiple"):
        kind.quantize(np.zeros((1, 96), np.float32))
    with pytest.raises(ConfigError, match="4 and 8"):
        IntGroup(5, 64, True, "F16")
    with pytest.raises(ConfigError, match="48"):
        IntGroup(4, 48, True, "F16")
