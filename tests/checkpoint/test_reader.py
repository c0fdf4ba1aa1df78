"""Values against safetensors' and torch's own readers, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, random_weights, write_checkpoint
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.sources import widen
from xent_quant.errors import CheckpointError, UnsupportedError
from xent_quant.values import largest

CONFIG = {**TINY, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 2}
ROUTER = "model.layers.0.mlp.router.weight"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in stored(folder).items()}
    how(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "Model", CONFIG, random_weights(CONFIG))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pickled", [False, True])
def test_values(dtype: torch.dtype, pickled: bool, folder: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in stored(folder).items()}
    save_file(weights, folder / "model.safetensors")
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.infos.keys() == weights.keys()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in weights.values())
    assert checkpoint.n_weights == sum(tensor.numel() for tensor in weights.values())
    for name, tensor in weights.items():
        wanted = tensor.float().numpy()
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, wanted)
        np.testing.assert_array_equal(checkpoint.read(name, 1, 2), wanted[1:2])
        np.testing.assert_array_equal(checkpoint.read(name, len(wanted), len(wanted)), wanted[:0])
        assert torch.equal(checkpoint.read_torch(name, torch.bfloat16), tensor.to(torch.bfloat16))


@pytest.mark.parametrize("slice_", [1, 33, 64, 100, 10**6])
def test_slices_make_the_tensor(slice_: int, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(Checkpoint, "SLICE", slice_)
    checkpoint = Checkpoint.open(folder)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.experts.1.down_proj.weight"):
        whole = checkpoint.read(name)
        parts = list(checkpoint.slices(name))
        rows = max(1, slice_ // whole.shape[1])
        assert [start for start, _ in parts] == list(range(0, len(whole), rows))
        assert all(part.size <= max(slice_, whole.shape[1]) for _, part in parts)
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), whole)
    ((start, vector),) = checkpoint.slices("model.norm.weight")
    assert start == 0
    np.testing.assert_array_equal(vector, checkpoint.read("model.norm.weight")[None])


def test_pieces_are_of_whole_steps_and_read_when_called_for(folder: Path, monkeypatch) -> None:
    name = "model.layers.0.mlp.experts.1.down_proj.weight"  # [32, 16]
    checkpoint = Checkpoint.open(folder)
    for weights, step, rows in ((1, 8, 8), (9 * 16, 8, 8), (24 * 16 + 15, 8, 24), (10**6, 8, 10**6), (5 * 16, 1, 5)):
        pieces = list(checkpoint.pieces(name, weights, step))
        assert [start for start, _ in pieces] == list(range(0, 32, rows))
        np.testing.assert_array_equal(np.concatenate([read() for _, read in pieces]), checkpoint.read(name))
    pieces = list(checkpoint.pieces("model.norm.weight", 1))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read too early"))
    assert len(pieces) == 1
    assert len(list(checkpoint.pieces(name, 16))) == 32


def test_the_largest_magnitude() -> None:
    for values, wanted in (
        ([1, -3.5, 2], 3.5),
        ([-0.0, 0.0], 0),
        ([], 0),
        ([1e-45, -2e-45], np.float32(2e-45)),
        ([1, -np.inf, 3e38], np.inf),
        ([np.inf, -np.nan, 1], np.nan),
    ):
        np.testing.assert_equal(largest(np.array(values, np.float32)), np.float32(wanted))


def test_widening_is_exact() -> None:
    every = np.arange(1 << 16, dtype="<u2")
    halves = widen(every.view(np.uint8), "F16")
    np.testing.assert_array_equal(halves, every.view("<f2").astype(np.float32))
    brain = torch.from_numpy(every.view("<i2").copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(widen(every.view(np.uint8), "BF16"), brain)
    np.testing.assert_array_equal(widen(np.array([0, 0, 192, 63], np.uint8), "F32"), [1.5])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named_with_its_row(value: float, folder: Path) -> None:
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    change(folder, lambda weights: weights[name][7].__setitem__(3, value))
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.read(name, 0, 7)) == 7
    for start in (0, 5):
        with pytest.raises(CheckpointError, match=rf"{name}: NaN or infinite weight in row 7"):
            checkpoint.read(name, start)


def test_what_is_not_finite_in_bfloat16_is_named_too(folder: Path) -> None:
    """Read without float32 on the way."""
    name, file = "model.layers.0.mlp.experts.1.up_proj.weight", folder / "model.safetensors"
    weights = {each: tensor.bfloat16() for each, tensor in load_file(file).items()}
    save_file(weights, file)
    assert torch.equal(Checkpoint.open(folder).read_torch(name, torch.bfloat16), weights[name])
    weights[name][7, 3] = float("inf")
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=rf"{name}: NaN or infinite weight in row 7"):
        Checkpoint.open(folder).read_torch(name, torch.bfloat16)


def test_a_file_that_became_shorter(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    last = max(checkpoint.locations, key=lambda name: checkpoint.locations[name].offset or 0)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{last}: the file ends before the tensor does"):
        checkpoint.read(last)


def test_what_does_not_belong_there_is_left_out(folder: Path) -> None:
    change(folder, lambda weights: weights.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert checkpoint.ignored[0] not in checkpoint.infos


def test_wrong_tensors_are_refused_from_headers(folder: Path) -> None:
    def refused(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            Checkpoint.open(folder)

    change(folder, lambda weights: weights.__setitem__(ROUTER, weights[ROUTER].to(torch.int8)))
    refused(CheckpointError, f"{ROUTER}: dtype I8; only F32, F16 and BF16")
    change(folder, lambda weights: weights.__setitem__(ROUTER, torch.ones(3, 32)))
    refused(CheckpointError, rf"{ROUTER}: shape \[3, 32\], config.json asks for \[2, 32\]")
    change(folder, lambda weights: weights.pop(ROUTER))
    refused(CheckpointError, f"{ROUTER}: missing")
    (folder / "model.onnx").touch()
    refused(UnsupportedError, "is an ONNX model")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    refused(UnsupportedError, r"quantised already \(gptq\)")
