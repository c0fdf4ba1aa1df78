"""The grid of every type with one code per weight: what error feedback rounds onto and writes back."""

import gguf
import numpy as np
import pytest

from xent_quant import formats
from xent_quant.formats._codes import CodedFormat

CODED = [kind for kind in map(formats.get, formats.NAMES) if isinstance(kind, CodedFormat)]
RANDOM = np.random.default_rng(1)
WEIGHTS = (RANDOM.standard_normal((6, 512)) * 0.02).astype(np.float32)


def ids(kind: CodedFormat) -> str:
    return kind.name


@pytest.mark.parametrize("kind", CODED, ids=ids)
def test_weights_are_scale_times_level_plus_offset(kind: CodedFormat) -> None:
    packed = kind.quantize(WEIGHTS, effort="fast")
    grid, codes = kind.grid(packed), kind.codes(packed)
    assert (np.diff(grid.levels) > 0).all()
    assert grid.scale.shape == grid.offset.shape == (6, 512 // kind.group_size)
    group = np.arange(512) // grid.group_size(512)
    want = grid.scale[:, group] * grid.levels[codes] + grid.offset[:, group]
    assert want.dtype == np.float32
    assert np.array_equal(kind.dequantize(packed), want)
    if kind.name != "Q1_0":  # which gguf-py cannot read
        assert np.array_equal(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind.ggml_type)), want)


@pytest.mark.parametrize("kind", CODED, ids=ids)
def test_storing_its_own_codes_changes_nothing(kind: CodedFormat) -> None:
    packed = kind.quantize(WEIGHTS, effort="fast")
    before = packed.copy()
    assert np.array_equal(kind.with_codes(packed, kind.codes(packed)), before)
    assert np.array_equal(packed, before)


@pytest.mark.parametrize("kind", CODED, ids=ids)
def test_any_codes_come_back_and_scales_stay(kind: CodedFormat) -> None:
    packed = kind.quantize(WEIGHTS, effort="fast")
    grid = kind.grid(packed)
    codes = RANDOM.integers(0, len(grid.levels), WEIGHTS.shape, dtype=np.uint8)
    changed = kind.with_codes(packed, codes)
    assert np.array_equal(kind.codes(changed), codes)
    after = kind.grid(changed)
    assert np.array_equal(after.scale, grid.scale)
    assert np.array_equal(after.offset, grid.offset)


def test_floats_have_no_grid() -> None:
    assert formats.get("F16").grid(formats.get("F16").quantize(WEIGHTS)) is None
