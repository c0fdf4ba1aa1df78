"""Importance matrices between us and stock llama.cpp: ours in llama-quantize, llama-imatrix's in ours, and both of one text."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

import xent_quant
from calibration.imatrix import Imatrix
from tests.stock.gguf_files import keys, tensors
from tests.stock.programs import EXACT, THREADS, Programs
from xent_quant.validation.llama_cpp import quantize_chunk
from xent_quant.validation.suites import bundled

pytestmark = pytest.mark.stock

WINDOW, WINDOWS = 512, 12
TYPES = ["Q4_K_M", "Q2_K_S", "IQ4_XS", "IQ3_XXS", "IQ1_S"]
"""K types, and those which llama-quantize makes with an importance matrix alone."""


@dataclass(frozen=True)
class Measured:
    """Two files of the same tokens."""

    ours: Path
    stock: Path


@pytest.fixture(scope="module")
def measured(stock: Programs, export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The BOS stands in the text: we put one before each document, llama-imatrix one before each window or, here, none."""
    folder = tmp_path_factory.mktemp("imatrix")
    text = folder / "text.txt"
    text.write_text("<|startoftext|>" + bundled("XfictionEN").text[:9000] + bundled("XconversationZH").text[:6000])
    with pytest.MonkeyPatch.context() as exact:
        exact.setattr("calibration.session.multiplies_bfloat16", lambda: False)  # llama.cpp multiplies float32 here
        done = xent_quant.calibrate(None, output=folder / "ours.gguf", calib=(str(text),), tokens=WINDOW * WINDOWS, seqlen=WINDOW)
    assert done.tokens == WINDOW * WINDOWS
    stock.run(
        "imatrix",
        *("-m", export("F32"), "-f", text, "--parse-special", "--no-escape", "-o", folder / "stock.gguf"),
        *("--process-output", "--no-ppl", "-c", str(WINDOW), "--chunks", str(WINDOWS), *THREADS, *EXACT),
    )
    return Measured(folder / "ours.gguf", folder / "stock.gguf")


def test_sums_and_counts_are_llama_imatrixs(measured: Measured) -> None:
    """It looks at routers too, which no file of either quantises. Its sums are added up in float32, one row at a time."""
    ours, stock = Imatrix.read(measured.ours), Imatrix.read(measured.stock)
    routers = {name for name in stock.entries if "ffn_gate_inp" in name}
    assert set(ours.entries) == set(stock.entries) - routers
    assert len(routers) == 2
    assert (ours.chunk_count, ours.chunk_size) == (stock.chunk_count, stock.chunk_size) == (WINDOWS, WINDOW)
    for name, entry in ours.entries.items():
        np.testing.assert_array_equal(entry.counts, stock.entries[name].counts, name)
        np.testing.assert_allclose(entry.sums, stock.entries[name].sums, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", TYPES)
def test_llama_quantize_takes_ours(
    stock: Programs, export: Callable[..., Path], measured: Measured, tmp_path: Path, kind: str
) -> None:
    """Every tensor finds its importance, the mean of x² of its own expert: each row is what ggml makes of it."""
    said = stock.run("quantize", "--imatrix", measured.ours, export("F32"), tmp_path / "out.gguf", kind, "1")
    assert re.findall("did not find weights for (.*)", said) == ["token_embd.weight"]
    importances = {name: entry.sums / entry.counts[:, None] for name, entry in Imatrix.read(measured.ours).entries.items()}
    source = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(export("F32")).tensors}
    quantised = [tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors if tensor.tensor_type.name != "F32"]
    assert set(importances) < {tensor.name for tensor in quantised}
    for tensor in quantised:
        weights = source[tensor.name]
        importance = importances.get(tensor.name, [None] * len(weights))
        packed = np.array(tensor.data)
        for expert, matrix in enumerate(weights if weights.ndim == 3 else weights[None]):
            wanted = quantize_chunk(tensor.tensor_type.value, packed.shape[-1], matrix, importance[expert])
            got = packed[expert] if packed.ndim == 3 else packed
            np.testing.assert_array_equal(got, wanted, f"{tensor.name} {expert}")


def test_ours_takes_llama_imatrixs(stock: Programs, export: Callable[..., Path], measured: Measured, tmp_path: Path) -> None:
    """The keys that llama-quantize notes, its types, and with the same importances no tensor further off than its own."""
    stock.run("quantize", "--imatrix", measured.stock, export("F32"), tmp_path / "stock.gguf", "Q4_K_M", "1")
    ours = export("Q4_K_M", method="imatrix", imatrix=measured.stock)
    wanted, found = keys(tmp_path / "stock.gguf"), keys(ours)
    noted = [key for key in wanted if key.startswith("quantize.imatrix.")]
    assert len(noted) == 4
    assert {key: found[key] for key in noted[1:]} == {key: wanted[key] for key in noted[1:]}
    assert found[noted[0]] == Path(wanted[noted[0]]).name
    one, other = tensors(tmp_path / "stock.gguf"), tensors(ours)
    assert {name: value[:2] for name, value in one.items()} == {name: value[:2] for name, value in other.items()}
    source = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(export("F32")).tensors}
    for name, entry in Imatrix.read(measured.stock).entries.items():
        if "ffn_gate_inp" in name:
            continue
        importance = (entry.sums / entry.counts[:, None])[:, None]  # [experts, 1, columns]
        weights = source[name].reshape(len(importance), -1, importance.shape[-1])
        errors = [
            float((importance * (_values(file, name).reshape(weights.shape) - weights) ** 2).sum(dtype=np.float64))
            for file in (ours, tmp_path / "stock.gguf")
        ]
        assert errors[0] <= errors[1], (name, errors)


def _values(file: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type)
