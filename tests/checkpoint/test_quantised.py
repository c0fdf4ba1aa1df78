"""Checkpoints that are quantised already: what is read is what torch's arithmetic on the stored tensors gives, row by row too.

The stored tensors are made here from the layouts' descriptions, one code at a time where they are packed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.folders import SMALL, weights_of, write
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.sources import E4M3
from xent_quant.errors import CheckpointError, UnsupportedError

CONFIG = {**SMALL, "hidden_size": 192, "intermediate_size": 144, "num_hidden_layers": 1}
QUANTISED = [name for name in weights_of(CONFIG) if "_proj.weight" in name]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def test_every_fp8_code_means_what_torch_says() -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3, wanted, equal_nan=True)


def check(folder: Path, stored: dict[str, torch.Tensor], meant: dict[str, torch.Tensor], settings: dict[str, Any]) -> Checkpoint:
    """What was not quantised as it was, the rest as `meant`, whole and in slices that begin within blocks and words."""
    plain = {name: value.bfloat16() for name, value in weights_of(CONFIG).items() if name not in meant}
    checkpoint = Checkpoint.open(write(folder, plain | stored, CONFIG, quantization_config=settings))
    for name, value in ({name: value.float() for name, value in plain.items()} | meant).items():
        assert np.array_equal(checkpoint.read(name), value.numpy()), name
        for start, stop in ((1, 3), (len(value) - 1, len(value))):
            assert np.array_equal(checkpoint.read(name, start, stop), value.numpy()[start:stop]), name
    assert checkpoint.ignored == () or all("_scale" in name for name in checkpoint.ignored)
    (note,) = checkpoint.notes
    assert "dequantised on reading" in note
    assert checkpoint.nbytes == sum(
        v.nbytes for n, v in (plain | stored).items() if not n.endswith(("_shape", "input_scale", "kv_scale"))
    )
    return checkpoint


def test_fp8_in_blocks(tmp_path: Path) -> None:
    """DeepSeek's: one scale for 128 × 128 weights, the last blocks smaller."""
    stored, meant = {}, {}
    for name in QUANTISED:
        weight = weights_of(CONFIG)[name]
        rows, columns = weight.shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) * 1e-3 + 1e-4
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        stored[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = stored[name].float() * spread
    checkpoint = check(tmp_path, stored, meant, {**FP8, "weight_block_size": [128, 128]})
    assert checkpoint.infos[QUANTISED[0]].dtype == "F8_E4M3"


def test_transformers_dequantises_blocks_to_the_same(tmp_path: Path) -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(finegrained, "Fp8Dequantize"):
        pytest.skip("this transformers does not dequantise")
    name, shape = "lm_head.weight", (384, 256)  # whole blocks: transformers takes no others
    config = {**CONFIG, "hidden_size": 256, "vocab_size": 384}
    torch.manual_seed(0)
    codes, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(3, 2)
    stored = {**weights_of(config), name: codes, f"{name}_scale_inv": scale}
    checkpoint = Checkpoint.open(write(tmp_path, stored, config, quantization_config={**FP8, "weight_block_size": [128, 128]}))
    wanted = finegrained.Fp8Dequantize(None)._dequantize_one(codes, scale)
    assert torch.equal(checkpoint.read_torch(name), wanted)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_fp8_with_one_scale(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored, meant = {}, {}
    for number, name in enumerate(QUANTISED):
        scale = torch.full(shape, 0.01 * (number + 1))
        stored[name] = (weights_of(CONFIG)[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale"], stored[name.replace("weight", "input_scale")] = scale, torch.tensor(0.5)
        meant[name] = stored[name].float() * scale
    stored["model.layers.0.self_attn.kv_scale"] = torch.tensor(0.5)  # of a cache in FP8
    check(tmp_path, stored, meant, FP8)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, columns] of codes from −2^(bits − 1) on into int32 words along the columns, one code at a time."""
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int64)
    for column in range(columns):
        word, shift = divmod(column * bits, 32)
        words[:, word] |= (codes[:, column].long() + (1 << (bits - 1))) << shift
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def scheme(bits: int, kind: str = "int", layout: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": "group", "group_size": None, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "quantization_status": "compressed"}


@pytest.mark.parametrize("size", [48, None], ids=["groups", "channels"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_integers(tmp_path: Path, bits: int, symmetric: bool, size: int | None) -> None:
    torch.manual_seed(bits)
    stored, meant = {}, {}
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    for number, name in enumerate(QUANTISED):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        rows, columns = weights_of(CONFIG)[name].shape
        group = size or columns
        base = name.removesuffix("weight")
        codes = torch.randint(low, high, (rows, columns))
        scale = (torch.rand(rows, columns // group) * 0.01 + 1e-3).to(dtype)
        zeros = torch.zeros(rows, columns // group, dtype=torch.long)
        if not symmetric:
            zeros = torch.randint(low, high, zeros.shape)
            stored[f"{base}weight_zero_point"] = packed(zeros.T, bits).T
        stored[f"{base}weight_packed"] = packed(codes, bits)
        stored[f"{base}weight_scale"] = scale
        stored[f"{base}weight_shape"] = torch.tensor([rows, columns])
        spread = scale.repeat_interleave(group, 1)
        meant[name] = ((codes.to(dtype) - zeros.repeat_interleave(group, 1).to(dtype)) * spread).float()  # in the scales' type
    checkpoint = check(tmp_path, stored, meant, scheme(bits, group_size=size, symmetric=symmetric))
    assert checkpoint.infos[QUANTISED[0]].dtype == f"INT{bits}"


def test_columns_may_be_ordered_by_activation(tmp_path: Path) -> None:
    """actorder: weight_g_idx names the group of every column; −1 throughout stands for none."""
    torch.manual_seed(3)
    stored, meant = {}, {}
    for number, name in enumerate(QUANTISED):
        rows, columns = weights_of(CONFIG)[name].shape
        base, codes = name.removesuffix("weight"), torch.randint(-8, 8, (rows, columns))
        scale = torch.rand(rows, columns // 48)
        order = torch.arange(columns)[torch.randperm(columns)] // 48 if number % 2 else torch.full((columns,), -1)
        stored |= {f"{base}weight_packed": packed(codes, 4), f"{base}weight_scale": scale}
        stored |= {f"{base}weight_shape": torch.tensor([rows, columns]), f"{base}weight_g_idx": order.int()}
        meant[name] = codes.float() * (scale[:, order] if number % 2 else scale.repeat_interleave(48, 1))
    check(tmp_path, stored, meant, {**scheme(4, group_size=48, actorder="group"), "quantization_status": "frozen"})


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
def test_eight_bit_integers(tmp_path: Path, layout: str, asymmetric: bool) -> None:
    torch.manual_seed(8)
    stored, meant = {}, {}
    for name in QUANTISED:
        rows, columns = weights_of(CONFIG)[name].shape
        codes, scale = torch.randint(-128, 128, (rows, columns)), (torch.rand(rows, 1) * 0.01).bfloat16()
        zeros = torch.randint(-128, 128, (rows, 1)) if asymmetric else torch.zeros(rows, 1, dtype=torch.long)
        stored |= {name: codes.to(torch.int8), f"{name}_scale": scale}
        if asymmetric:
            stored[f"{name}_zero_point"] = zeros.to(torch.int8)
        meant[name] = ((codes - zeros).bfloat16() * scale).float()
    check(tmp_path, stored, meant, scheme(8, layout=layout, strategy="channel", symmetric=not asymmetric))


@pytest.mark.parametrize("block", [None, [64, 48]], ids=["channels", "blocks"])
def test_fp8_of_compressed_tensors(tmp_path: Path, block: list[int] | None) -> None:
    torch.manual_seed(9)
    stored, meant = {}, {}
    for name in QUANTISED:
        rows, columns = weights_of(CONFIG)[name].shape
        down, across = block or (1, columns)
        scale = (torch.rand(-(-rows // down), -(-columns // across)) * 0.01).bfloat16()
        spread = scale.repeat_interleave(down, 0)[:rows].repeat_interleave(across, 1)[:, :columns]
        stored |= {name: torch.randn(rows, columns).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        meant[name] = (stored[name].to(torch.bfloat16) * spread).float()
    more: dict[str, Any] = {"strategy": "block", "block_structure": block} if block else {"strategy": "channel"}
    check(tmp_path, stored, meant, scheme(8, "float", "float-quantized", **more))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantised already \\(gptq\\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised already \\(bitsandbytes\\)"),
        ("awq", "is quantised already \\(awq\\)"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size"),
        (scheme(4, layout="marlin-24"), "format 'marlin-24'"),
        (scheme(4, "float", "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (scheme(3), "3 bits"),
        ({**scheme(4), "quantization_status": "calibration"}, "quantization_status"),
        ({**scheme(4), "transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
        ({**scheme(4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ],
    ids=str,
)
def test_other_quantisations_are_refused(tmp_path: Path, settings: object, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        Checkpoint.open(write(tmp_path, None, CONFIG, quantization_config=settings))


NAME = QUANTISED[0]
BASE = NAME.removesuffix("weight")
PACKED = {
    f"{BASE}weight_packed": torch.zeros(192, 24, dtype=torch.int32),
    f"{BASE}weight_scale": torch.ones(192, 4),
    f"{BASE}weight_shape": torch.tensor([192, 192]),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{BASE}weight_packed": torch.zeros(192, 23, dtype=torch.int32)}, r"weight_packed: I32 \[192, 23\] does not hold"),
        ({f"{BASE}weight_packed": torch.zeros(192, 24)}, "weight_packed: F32"),
        ({f"{BASE}weight_scale": torch.ones(192, 3)}, r"weight_scale: shape \[192, 3\] does not fit"),
        ({f"{BASE}weight_scale": torch.ones(192, 4, dtype=torch.int32)}, "scales of type I32"),
        ({f"{BASE}weight_scale": None}, "without .*weight_scale"),
        ({f"{BASE}weight_shape": torch.tensor([192, 191])}, "config.json asks for"),
        ({f"{BASE}weight_shape": torch.tensor([192])}, "not two integers"),
        ({f"{BASE}weight_zero_point": torch.zeros(192, 4, dtype=torch.int32)}, r"I32 \[24, 4\] was expected"),
        ({f"{BASE}weight_g_idx": torch.full((192,), 4)}, "does not name a group"),
        ({f"{BASE}bias": torch.zeros(192)}, "a bias"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_parts_that_do_not_belong_together_are_told(tmp_path: Path, change, words: str) -> None:
    stored = {name: value for name, value in (weights_of(CONFIG) | PACKED | change).items() if value is not None and name != NAME}
    with pytest.raises((CheckpointError, UnsupportedError), match=words):
        Checkpoint.open(write(tmp_path, stored, CONFIG, quantization_config=scheme(4, group_size=48)))


def test_codes_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    stored = {**weights_of(CONFIG), NAME: torch.zeros(192, 192, dtype=torch.float8_e4m3fn), f"{NAME}_scale": torch.ones(1)}
    with pytest.raises(CheckpointError, match="dtype F8_E4M3; only F32, F16 and BF16"):
        Checkpoint.open(write(tmp_path, stored, CONFIG))


def test_nan_codes_are_told_by_row(tmp_path: Path) -> None:
    codes = torch.zeros(192, 192)
    codes[7, 5] = torch.nan
    stored = {**weights_of(CONFIG), NAME: codes.to(torch.float8_e4m3fn), f"{NAME}_scale": torch.ones(1)}
    checkpoint = Checkpoint.open(write(tmp_path, stored, CONFIG, quantization_config=FP8))
    with pytest.raises(CheckpointError, match=f"{NAME}: NaN or infinite weight in row 7"):
        checkpoint.read(NAME)


def test_exports_say_nothing_of_the_quantisation_they_came_from(tmp_path: Path) -> None:
    import json

    import xent_quant

    config = {**SMALL, "num_hidden_layers": 1}
    weights = weights_of(config)
    weights["lm_head.weight_scale"] = torch.ones(1)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float8_e4m3fn)
    folder = write(tmp_path / "model", weights, config, quantization_config=FP8)
    assert "F8_E4M3" in {row["type"] for row in xent_quant.describe(folder)["types"]}
    done = xent_quant.quantize(folder, formats=["onnx", "bnb"], bits=16, onnx_dtype="fp32", output=tmp_path / "out")
    assert any("dequantised on reading" in note for note in done.notes)
    for name in ("onnx", "bnb"):
        assert "quantization_config" not in json.loads((tmp_path / "out" / name / "config.json").read_text())
    exported = Checkpoint.open(tmp_path / "out" / "bnb").read("lm_head.weight")
    assert np.array_equal(exported, weights["lm_head.weight"].float().numpy())
