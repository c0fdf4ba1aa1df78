"""What we export is the same function in stock ONNX Runtime: against our float32 forward on the dequantised weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.onnx.export import ONNXExporter
from exporters.onnx.plan import Settings, plan
from tests.walking import export
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.methods.search import Search
from xent_quant.model.streaming import StreamingModel
from xent_quant.validation.onnx_runtime import OnnxModel, generate
from xent_quant.validation.onnx_source import OnnxSource

CASES: dict[str, dict[str, Any]] = {
    "multi-head, 2 shared": {},
    "grouped-query": {"num_key_value_heads": 2},
    "1 shared": {"num_shared_experts": 1, "intermediate_size": 128},
    "head_dim 80": {"hidden_size": 320, "intermediate_size": 64},
    "no shared": {"num_shared_experts": 0},
    "dense": {"num_experts": 0, "intermediate_size": 160},
    "tied head": {"tie_word_embeddings": True},
    "not renormalised": {"norm_topk_prob": False},
}
IDS = [2, 17, 300, 5, 9, 42, 260, 261, 11, 7, 290, 33]
pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = Settings(onnx_dtype="fp32", accuracy_level=0)


def write(folder: Path, output: Path, settings: Settings) -> Path:
    checkpoint = Checkpoint.open(folder)
    export(
        checkpoint, [ONNXExporter(checkpoint, plan(checkpoint.architecture, settings), output, "Tiny", Search("fast"))], output
    )
    return output / "onnx"


def expected(folder: Path, ids: list[int] = IDS) -> np.ndarray:
    """Our forward on what the exported bytes mean, [len(ids), vocab]."""
    model = StreamingModel(OnnxSource(folder))
    return model.logits(model.hidden_states(torch.tensor([ids])))[0].numpy()


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def typical(got: np.ndarray, wanted: np.ndarray) -> float:
    """As `relative`, of the median token: where activations are rounded, a near-tie in a router may send a token to another
    expert, and its logits differ wholly, by no fault of the export."""
    return float(np.median(np.abs(got - wanted).max(-1)) / np.abs(wanted).max())


def stepwise(model: OnnxModel, ids: list[int], prompt: int) -> np.ndarray:
    """Logits of a prompt and then of one token at a time with the cache, [len(ids), vocab]."""
    logits, cache = model.run(np.array([ids[:prompt]]))
    found = [logits[0]]
    for token in ids[prompt:]:
        logits, cache = model.run(np.array([[token]]), cache=cache)
        found.append(logits[0])
    return np.concatenate(found)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_float32_logits_equal_our_forward(checkpoint, tmp_path: Path, overrides, symmetric: bool) -> None:
    folder = write(checkpoint(**overrides), tmp_path, Settings(onnx_dtype="fp32", accuracy_level=0, symmetric=symmetric))
    wanted, model = expected(folder), OnnxModel(folder, threads=1)
    assert relative(model.logits(IDS), wanted) < 2e-5
    assert relative(stepwise(model, IDS, 5), wanted) < 2e-5


def test_right_padded_batches(checkpoint, tmp_path: Path) -> None:
    """Rows of different lengths, then two steps with the cache: every row as if it were alone."""
    folder = write(checkpoint(num_key_value_heads=2), tmp_path, EXACT)
    model, rows = OnnxModel(folder, threads=1), [IDS[:10], IDS[3:7], IDS[5:12]]
    longest = max(map(len, rows))
    ids = np.array([row + [1] * (longest - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits, cache = model.run(ids, mask)
    continued = [[], [], []]
    for step in ([8, 40, 50], [60, 61, 9]):
        # The next token goes behind each row's own last one, so the mask counts tokens: ones first, padding last.
        lengths = mask.sum(1) + 1
        mask = (np.arange(mask.shape[1] + 1) < lengths[:, None]).astype(np.int64)
        more, cache = model.run(np.array(step)[:, None], mask, cache)
        for index, token in enumerate(step):
            continued[index].append((token, more[index, 0]))
    for index, row in enumerate(rows):
        wanted = expected(folder, row + [token for token, _ in continued[index]])
        assert relative(logits[index, : len(row)], wanted[: len(row)]) < 2e-5
        assert relative(np.stack([found for _, found in continued[index]]), wanted[len(row) :]) < 2e-5


EXACT_SETTINGS = [
    Settings(onnx_dtype="fp32", accuracy_level=0, block_size=32),
    Settings(onnx_dtype="fp32", accuracy_level=0, block_size=128),
    Settings(onnx_dtype="fp32", accuracy_level=0, active_bits=4),
    Settings(onnx_dtype="fp32", bits=16),
    Settings(onnx_dtype="fp32", bits=16, active_bits=8, accuracy_level=0),
]
ROUNDING_SETTINGS = {
    Settings(onnx_dtype="fp16", bits=16): 2e-3,
    Settings(onnx_dtype="fp16", accuracy_level=0): 2e-3,
    Settings(onnx_dtype="fp16"): 4e-2,
    Settings(onnx_dtype="fp16", symmetric=False): 4e-2,
    Settings(onnx_dtype="fp32"): 4e-2,
    Settings(onnx_dtype="fp32", bits=8, accuracy_level=0): 4e-2,
    Settings(onnx_dtype="fp16", bits=8, symmetric=False): 4e-2,
}
"""Bounds of `typical`. fp16 rounds values to 11 bits; level 4, and INT8 experts always, round activations to 8."""


@pytest.mark.parametrize("settings", EXACT_SETTINGS, ids=str)
def test_exact_settings(checkpoint, tmp_path: Path, settings: Settings) -> None:
    folder = write(checkpoint(num_key_value_heads=2), tmp_path, settings)
    assert relative(OnnxModel(folder, threads=1).logits(IDS), expected(folder)) < 2e-5


@pytest.mark.parametrize(("settings", "bound"), ROUNDING_SETTINGS.items(), ids=str)
def test_settings_that_round(checkpoint, tmp_path: Path, settings: Settings, bound: float) -> None:
    folder = write(checkpoint(num_key_value_heads=2), tmp_path, settings)
    assert typical(OnnxModel(folder, threads=1).logits(IDS), expected(folder)) < bound


@pytest.fixture(scope="module")
def exact_miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(miniature(), tmp_path_factory.mktemp("exact"), EXACT)


@pytest.mark.parametrize("prompt", ["The old lamp in the window", "夜色渐深，他推开门"], ids=["English", "Chinese"])
def test_genai_generates_the_same_tokens(exact_miniature: Path, prompt: str) -> None:
    model = OnnxModel(exact_miniature, threads=1)
    ids = model.tokenize(prompt)
    tokens = generate(exact_miniature, ids, 64)
    assert len(tokens) == 64
    # One pass of our forward over the whole text: each token must be the likeliest after those before it.
    logits = expected(exact_miniature, ids + tokens)
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == tokens
    assert relative(model.logits(ids + tokens), logits) < 2e-5


@pytest.mark.parametrize(("settings", "bound"), [(Settings(), 1e-2), (Settings(bits=8), 1e-2)], ids=["INT4", "INT8"])
def test_defaults_on_the_miniature(tmp_path: Path, settings: Settings, bound: float) -> None:
    folder = write(miniature(), tmp_path, settings)
    model = OnnxModel(folder, threads=1)
    ids = model.tokenize("The old lamp in the window went out. 夜色渐深，他推开门。")
    assert typical(model.logits(ids), expected(folder, ids)) < bound
