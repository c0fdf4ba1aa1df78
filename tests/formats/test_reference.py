"""Every block type byte for byte against the slow reference; and its bytes as gguf-py and stock ggml read them."""

import ctypes

import gguf
import numpy as np
import pytest

from tests.reference import gguf_types, search
from xent_quant import formats
from xent_quant.formats._codebook import CodebookFormat
from xent_quant.formats._codes import AffineFormat, SearchedFormat
from xent_quant.formats._eights import EightsFormat, ShiftedFormat
from xent_quant.formats._vectors import VectorFormat
from xent_quant.formats.base import Effort
from xent_quant.validation import llama_cpp

Searched = SearchedFormat | VectorFormat
TYPES = [name for name in formats.NAMES if isinstance(formats.get(name), Searched)]
SIZE_ONLY = {"Q1_0"}
"""gguf-py knows the size of their blocks and cannot read them; stock ggml can."""
RANDOM = np.random.default_rng(5)
IMPORTANCE = RANDOM.exponential(size=256).astype(np.float32) + np.float32(0.01)


def ladder() -> np.ndarray:
    """Rows [n, 256] float32 from zeros through subnormals to large weights, and the odd ones."""
    base = RANDOM.standard_normal((7, 256)).astype(np.float32)
    scales = np.array([0, 1e-40, 1e-9, 6e-8, 0.02, 1, 1e4], np.float32)[:, None]
    odd = [
        np.full(256, 0.25),  # one value
        np.full(256, -0.25),
        np.eye(1, 256, 7)[0] * 3,  # one outlier, else zeros
        -np.abs(base[4]),  # all negative
        np.abs(base[5]) + 5,  # all positive, far from zero
        np.where(np.arange(256) % 64 < 32, base[6], 0),  # zero groups
        np.repeat([1.0, -1.0], 128),
    ]
    return np.concatenate([base * scales, np.array(odd, np.float32)])


def held(kind: formats.QuantFormat) -> np.ndarray:
    """The rows of `ladder` that a type can hold: NVFP4 ends at 2688."""
    rows = ladder()
    return rows[np.abs(rows).max(axis=1) < 2688] if kind.name == "NVFP4" else rows


def expected(kind: Searched, row: np.ndarray, importance: np.ndarray, effort: Effort) -> bytes:
    """The reference's bytes of a row."""
    candidates, rounds = getattr(kind.efforts, effort)
    groups = kind.block_size // kind.group_size
    packed = b""
    for start in range(0, len(row), kind.block_size):
        x, w = list(row[start : start + kind.block_size]), list(importance[start : start + kind.block_size])
        if isinstance(kind, EightsFormat):
            negative, y = search.signs_and_magnitudes(x, w, kind.even_signs)
            size, unit = kind.group_size, float(kind.unit)
            pointed = search.eights(
                y, w, size, unit, 15, kind.points, 0, size // 8, list(kind.ladder), list(candidates), rounds
            )  # fmt: skip
            pointed.negative = negative
            packed += gguf_types.PACK_POINTS[kind.name](pointed)
            continue
        if isinstance(kind, ShiftedFormat):
            pointed = search.eights(
                x, w, kind.group_size, 1, 7, kind.points, 0.125, kind.run, list(kind.ladder), list(candidates), rounds
            )  # fmt: skip
            packed += gguf_types.PACK_POINTS[kind.name](pointed)
            continue
        if isinstance(kind, CodebookFormat):
            pointed = search.codebook(
                x, w, kind.group_size, float(kind.unit), kind.points, kind.even_signs, list(candidates), rounds
            )  # fmt: skip
            packed += gguf_types.PACK_POINTS[kind.name](pointed)
            continue
        if isinstance(kind, AffineFormat):
            found = search.affine(x, w, groups, len(kind.levels) - 1, kind.scale_top, list(map(tuple, candidates)), rounds)
        elif kind.name == "MXFP4":
            found = search.powers(x, w, list(kind.levels), list(candidates))
        elif kind.name == "NVFP4":
            found = search.small_floats(x, w, list(kind.levels), list(candidates), rounds)
        else:
            found = search.symmetric(x, w, groups, list(kind.searched), kind.scale_low, list(candidates), rounds)
        packed += gguf_types.PACK[kind.name](found)
    return packed


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_equal_the_slow_reference(name: str, weighted: bool) -> None:
    kind = formats.get(name)
    assert isinstance(kind, Searched)
    weights = held(kind)
    importance = IMPORTANCE / IMPORTANCE.mean(dtype=np.float64).astype(np.float32) if weighted else np.ones(256, np.float32)
    packed = kind.quantize(weights, IMPORTANCE if weighted else None, effort="fast")
    with np.errstate(all="ignore"):
        for row, got in zip(weights, packed, strict=True):
            assert got.tobytes() == expected(kind, row, importance, "fast")


@pytest.mark.parametrize("name", TYPES)
def test_normal_effort_equals_the_slow_reference(name: str) -> None:
    kind = formats.get(name)
    assert isinstance(kind, Searched)
    row = (RANDOM.standard_t(4, (1, kind.block_size)) * 0.02).astype(np.float32)
    packed = kind.quantize(row)
    with np.errstate(all="ignore"):
        assert packed[0].tobytes() == expected(kind, row[0], np.ones(kind.block_size, np.float32), "normal")


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ1_S", "IQ1_M"])
def test_several_rounds_equal_the_slow_reference(name: str) -> None:
    """At high effort, since the other two make one round of the types of eight weights."""
    kind = formats.get(name)
    assert isinstance(kind, EightsFormat | ShiftedFormat)
    rows = (RANDOM.standard_t(4, (3, 256)) * 0.02).astype(np.float32)
    packed = kind.quantize(rows, IMPORTANCE, effort="high")
    importance = IMPORTANCE / IMPORTANCE.mean(dtype=np.float64).astype(np.float32)
    with np.errstate(all="ignore"):
        for row, got in zip(rows, packed, strict=True):
            assert got.tobytes() == expected(kind, row, importance, "high")


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_mean_what_the_layout_says(name: str) -> None:
    """Random bytes, scales finite: our dequantiser, the slow one, gguf-py's and stock ggml's."""
    kind = formats.get(name)
    packed = RANDOM.integers(0, 256, (6, kind.block_bytes), dtype=np.uint8)
    packed &= _finite_scales(kind)
    ours = kind.dequantize(packed)
    assert np.isfinite(ours).all()
    assert np.array_equal(ours, np.array([gguf_types.READ[name](row.tobytes()) for row in packed]))
    if name not in SIZE_ONLY:
        assert np.array_equal(ours, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind.ggml_type)))
    assert np.array_equal(ours, stock_dequantize(kind, packed))


def _finite_scales(kind: formats.QuantFormat) -> np.ndarray:
    """A mask [block_bytes] that keeps the exponents of float16 scales below the infinite one."""
    mask = np.full(kind.block_bytes, 255, np.uint8)
    last = {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q4_1": (1, 3), "Q5_1": (1, 3)}
    last |= {"TQ2_0": (65,), "TQ1_0": (53,), "IQ1_M": (55,)}
    mask[list(last.get(kind.name, (1,)))] = 0xBF
    if kind.name == "MXFP4":
        mask[0], mask[1] = 0x7F, 255
    if kind.name == "NVFP4":
        mask[1] = 255
    return mask


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def stock_dequantize(kind: formats.QuantFormat, packed: np.ndarray) -> np.ndarray:
    """What stock ggml's `to_float` makes of packed rows."""
    traits_of = llama_cpp.library().ggml_get_type_traits
    traits_of.restype, traits_of.argtypes = ctypes.POINTER(_Traits), [ctypes.c_int]
    traits = traits_of(kind.ggml_type).contents
    assert (traits.type_name.upper(), traits.blck_size, traits.type_size) == (
        kind.name.encode(),
        kind.block_size,
        kind.block_bytes,
    )
    values = np.empty((len(packed), packed.shape[1] // kind.block_bytes * kind.block_size), np.float32)
    packed = np.ascontiguousarray(packed)
    traits.to_float(packed.ctypes.data, values.ctypes.data, values.size)
    return values


@pytest.mark.parametrize("name", TYPES)
def test_stock_ggml_reads_what_we_write(name: str) -> None:
    kind = formats.get(name)
    packed = kind.quantize(held(kind), IMPORTANCE, effort="fast")
    assert np.array_equal(stock_dequantize(kind, packed), kind.dequantize(packed))


# Weights whose codes are known by hand. The largest magnitude fixes d exactly; the others are halves of it.
def test_rounding_ties_go_to_even() -> None:
    """Affine codes with d = 1 and no minimum: x.5 goes to the even neighbour; a table of levels to the lower level."""
    x = [np.float32(v) for v in (0.5, 1.5, 2.5, 13.5, 14.5, 0.49999997, 15.5, -0.5)]
    assert [int(q) for q in search.affine_codes(x, np.float32(0), np.float32(1), 15)] == [0, 2, 2, 14, 14, 0, 15, 0]
    levels = [np.float32(v) for v in gguf_types.KVALUES]
    assert [search.nearest(np.float32(v), levels) for v in (-115.5, -4.5, 7.0, 7.0000005, 45.5, 300, -300)] == [
        0,
        7,
        8,
        9,
        11,
        15,
        0,
    ]


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("effort", ["fast", "normal", "high"])
def test_ternary_weights_are_kept_exactly(name: str, effort: Effort) -> None:
    d = np.array([[0.0123], [3.5], [2e-5]], np.float16).astype(np.float32)
    weights = d * RANDOM.integers(-1, 2, (3, 512)).astype(np.float32)
    kind = formats.get(name)
    assert np.array_equal(kind.dequantize(kind.quantize(weights, np.resize(IMPORTANCE, 512), effort=effort)), weights)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_exact_weights_with_ties_are_kept(name: str) -> None:
    """All weights but two on the grid of d = −1; those two lie half-way, weigh nearly nothing and round to even."""
    kind = formats.get(name)
    row = np.zeros((1, 32), np.float32)
    lowest = -127 if name == "Q8_0" else int(kind.levels[0])
    row[0, :6] = [lowest, lowest + 1, 3, -2, 1, 2]
    row[0, 6:8] = [2.5, -1.5]
    importance = np.ones(32, np.float32)
    importance[6:8] = 0
    got = kind.dequantize(kind.quantize(row, importance))[0]
    assert got[:8].tolist() == [*row[0, :6].tolist(), 2, -2]
