"""The searches on tensors against the kernels': the same bytes."""

import numpy as np
import pytest
import torch

from xent_quant import formats
from xent_quant.device.method import Job, OnDevice
from xent_quant.errors import QuantizationError
from xent_quant.formats.base import Effort, QuantFormat
from xent_quant.formats.int_group import IntGroup
from xent_quant.methods import METHODS
from xent_quant.methods.search import Search
from xent_quant.tensors import InputStatistics

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(3)
COLUMNS = 512
WEIGHTS = (RANDOM.standard_t(4, (20, COLUMNS)) * 0.02).astype(np.float32)
WEIGHTS[3] = 0
WEIGHTS[4, :300] *= 1e-6
WEIGHTS[5] *= 1e3
WEIGHTS[6, 5:] = 0
WEIGHTS[7] = 0.01
WEIGHTS[8] = np.sign(WEIGHTS[8]) * np.float32(0.02)
IMPORTANCE = RANDOM.exponential(size=COLUMNS).astype(np.float32)
KINDS = [
    *filter(OnDevice.here, map(formats.get, formats.NAMES)),
    *(IntGroup(bits, 64, symmetric, scale) for bits in (4, 8) for symmetric in (True, False) for scale in ("F16", "BF16")),
]


def test_every_type_but_floats_is_searched_on_the_device() -> None:
    assert {name for name in formats.NAMES if not OnDevice.here(formats.get(name))} == {"F32", "F16", "BF16"}


@pytest.mark.parametrize(
    "effort", ["normal", pytest.param("fast", marks=pytest.mark.slow), pytest.param("high", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bytes_are_the_kernels(kind: QuantFormat, effort: Effort) -> None:
    known = InputStatistics(IMPORTANCE, None, 100)
    method = Search(effort)
    wanted = method.quantize(WEIGHTS, kind, known, name="w")
    (made,) = OnDevice(method, CPU).quantize_together([Job("w", torch.from_numpy(WEIGHTS), known)], kind)
    assert np.array_equal(made.packed, wanted)
    assert np.array_equal(made.values.numpy(), kind.dequantize(wanted))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ4_XS", "IQ3_S", "IQ1_M"])
def test_pieces_of_rows_change_nothing(monkeypatch, name: str) -> None:
    kind, method = formats.get(name), METHODS["rtn"]("normal")
    for module in ("search", "codebooks"):
        monkeypatch.setattr(f"xent_quant.device.{module}.MAX_LANES", 1)
    wanted = method.quantize(WEIGHTS, kind, None, name="w")
    assert np.array_equal(OnDevice(method, CPU).quantize(WEIGHTS, kind, None, name="w"), wanted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Q4_0", np.nan),
        ("Q4_0", np.inf),
        ("Q4_0", 3e4 * 200),
        ("NVFP4", np.nan),
        ("NVFP4", -2689),
        ("NVFP4", 1e20),
        ("IQ3_S", 1e8),
        ("IQ1_M", np.inf),
    ],
)
def test_what_the_kernels_refuse_is_refused(name: str, value: float) -> None:
    kind, method = formats.get(name), Search()
    bad = WEIGHTS.copy()
    bad[2, 3] = value
    with pytest.raises(QuantizationError) as wanted:
        method.quantize(bad, kind, None, name="layer.weight")
    with pytest.raises(QuantizationError) as found:
        OnDevice(method, CPU).quantize(bad, kind, None, name="layer.weight")
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.name in formats.NAMES])
def test_scales_beyond_float16_are_refused_as_by_the_kernels(name: str) -> None:
    for bad in (WEIGHTS * np.float32(1e10), np.where(WEIGHTS > 0.01, WEIGHTS, 0) * np.float32(1e10)):
        found = []
        for method in (Search(), OnDevice(Search(), CPU)):
            try:
                found.append(method.quantize(bad.astype(np.float32), formats.get(name), None, name="w").tobytes())
            except QuantizationError as error:
                found.append(str(error).encode())
        assert found[0] == found[1]


def test_of_rows_that_are_worked_on_together_the_right_tensor_is_named() -> None:
    """q, k and v of the same statistics are rows of one weight, of which k's scales leave float16."""
    known, bad = InputStatistics(IMPORTANCE, None, 100), WEIGHTS.copy()
    bad[2, 3] = 3e4 * 200
    jobs = [Job(name, torch.from_numpy(rows), known) for name, rows in (("q", WEIGHTS), ("k", bad), ("v", WEIGHTS))]
    with pytest.raises(QuantizationError, match=r"^k: a block's scale exceeds"):
        OnDevice(Search(), CPU).quantize_together(jobs, formats.get("Q4_0"))


def test_types_that_are_not_searched_there_come_from_the_cpu() -> None:
    kind, method = formats.get("F16"), Search("fast")
    (made,) = OnDevice(method, CPU).quantize_together([Job("w", torch.from_numpy(WEIGHTS[:2]))], kind)
    assert np.array_equal(made.packed, method.quantize(WEIGHTS[:2], kind, None, name="w"))
    assert np.array_equal(made.values.numpy(), kind.dequantize(made.packed))
