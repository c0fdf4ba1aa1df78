"""Rotary scaling: our tables and every export against transformers' own Llama, which a dense XVERSE is; or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xent_quant
from exporters.gguf.plan import plan as gguf_plan
from tests.checkpoint.folders import weights_of, write
from tests.checkpoint.test_config import REQUIRED
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import UnsupportedError, ValidationError
from xent_quant.model.layers import rotary_tables
from xent_quant.model.modeling_xverse import XverseConfig
from xent_quant.model.modeling_xverse import rotary_tables as remote_tables
from xent_quant.model.streaming import StreamingModel
from xent_quant.recipes import recipe
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.validation.onnx_runtime import OnnxModel

xent_quant.register_with_transformers()
pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = {**REQUIRED, "hidden_size": 128, "max_position_embeddings": 64}  # heads of 32
IDS = [int(token) for token in np.random.default_rng(0).integers(4, 300, 48)]
CASES: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, theta within": {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 32, "rope_theta": 500000.0},
    "yarn, attention_factor": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8},
    "yarn, mscale": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, no factor": {"type": "yarn", "original_max_position_embeddings": 16},
}
ELSEWHERE: dict[str, dict[str, Any]] = {
    "yarn, betas": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 2},
    "yarn, not truncated": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
}
"""What llama.cpp does not compute for these models."""
DYNAMIC = {"type": "dynamic", "factor": 3.0}


def llama_config(scaling: dict[str, Any], **more: Any) -> Any:
    from transformers import LlamaConfig

    keys = {key: value for key, value in {**CONFIG, **more}.items() if key != "model_type"}
    rope = {"rope_theta": 10000.0, **{key: value for key, value in scaling.items() if key != "type"}}
    rope["rope_type"] = scaling.get("rope_type", scaling.get("type"))
    if rope["rope_type"] == "yarn":
        rope.setdefault("factor", None)  # transformers then takes the ratio of the contexts
    for key in ("factor", "beta_fast", "beta_slow"):
        if rope.get(key):
            rope[key] = float(rope[key])
    config = LlamaConfig(**keys)
    config.rope_parameters = rope
    return config


@torch.no_grad()
def llama(weights: dict[str, torch.Tensor], scaling: dict[str, Any], ids: list[int] = IDS, **more: Any) -> np.ndarray:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(scaling, **more)).eval()
    model.load_state_dict(weights)
    return model(torch.tensor([ids])).logits[0].numpy()


def streamed(folder: Path, ids: list[int] = IDS) -> np.ndarray:
    model = StreamingModel(Checkpoint.open(folder))
    return model.logits(model.hidden_states(torch.tensor([ids])))[0].numpy()


@torch.no_grad()
def loaded(folder: Path, ids: list[int] = IDS) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("scaling", [*CASES.values(), *ELSEWHERE.values(), DYNAMIC], ids=[*CASES, *ELSEWHERE, "dynamic"])
def test_both_tables_are_transformers(scaling: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = 200  # beyond every context
    positions = torch.arange(length)[None]
    wanted = LlamaRotaryEmbedding(llama_config(scaling))(torch.zeros(1), positions)
    config = {**CONFIG, "rope_scaling": scaling}
    model = Architecture.from_config(config)
    for got in (rotary_tables(length, model, torch.float32), remote_tables(positions, XverseConfig(**config), torch.float32)):
        for ours, theirs in zip(got, wanted, strict=True):
            assert (ours.reshape(length, -1) - theirs[0]).abs().max() < 1e-4  # theirs are computed in float32
    plain = rotary_tables(length, Architecture.from_config(CONFIG), torch.float32)
    assert (plain[0] - wanted[0][0]).abs().max() > 0.1


@pytest.mark.parametrize("scaling", CASES.values(), ids=CASES)
def test_every_export_computes_it(tmp_path: Path, scaling: dict[str, Any]) -> None:
    weights = {name: value.bfloat16().float() for name, value in weights_of(CONFIG).items()}
    folder = write(tmp_path / "model", weights, CONFIG, rope_scaling=scaling)
    wanted = llama(weights, scaling)
    assert np.abs(wanted - streamed(write(tmp_path / "plain", weights, CONFIG))).max() > 0.01
    options: dict[str, Any] = {"bits": 16, "onnx_dtype": "fp32", "output": tmp_path / "out"}
    done = xent_quant.quantize(folder, type="F32", formats=["gguf", "onnx", "bnb"], **options)
    got = {"streamed": streamed(folder), "loaded": loaded(folder), "bnb": loaded(tmp_path / "out" / "bnb")}
    got["onnx"] = OnnxModel(tmp_path / "out" / "onnx", threads=1).logits(IDS)
    with LlamaCpp(done.files[0]) as model:
        got["gguf"] = model.logits(IDS)
    assert {name: bool(np.abs(value - wanted).max() < 1e-3) for name, value in got.items()} == dict.fromkeys(got, True)
    model = Checkpoint.open(folder).architecture
    for name in ("onnx", "bnb"):
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert Architecture.from_config({**config, "model_type": "xverse"}) == model
    GGUFSource(GGUFFile(done.files[0]), model)
    with pytest.raises(ValidationError, match=r"rope\.scaling\."):  # validate sees a scaling that is not the reference's
        GGUFSource(GGUFFile(done.files[0]), Architecture.from_config({**CONFIG, "rope_theta": model.rope_theta}))


@pytest.mark.parametrize("shared", [1, 0], ids=["bailingmoe", "granitemoe"])
@pytest.mark.parametrize("kind", ["linear", "yarn, mscale"])
def test_llama_cpp_computes_it_for_mixtures_too(tmp_path: Path, kind: str, shared: int) -> None:
    """Against our forward, which the tests above hold to transformers."""
    config = {**CONFIG, "num_experts": 3, "moe_top_k": 2, "num_shared_experts": shared, "rope_scaling": CASES[kind]}
    folder = write(tmp_path / "model", weights_of(config), config)
    done = xent_quant.quantize(folder, type="F32", output=tmp_path / "out")
    with LlamaCpp(done.files[0]) as model:
        assert np.abs(model.logits(IDS) - streamed(folder)).max() < 1e-3


def test_dynamic_follows_the_text_in_transformers_and_ends_with_the_tables_in_onnx(tmp_path: Path) -> None:
    weights = {name: value.bfloat16().float() for name, value in weights_of(CONFIG).items()}
    folder = write(tmp_path / "model", weights, CONFIG, rope_scaling=DYNAMIC, max_position_embeddings=16)
    options: dict[str, Any] = {"bits": 16, "onnx_dtype": "fp32", "output": tmp_path / "out"}
    done = xent_quant.quantize(folder, formats=["onnx", "bnb"], **options)
    assert any("Dynamic rope scaling begins beyond 16 tokens" in note for note in done.plans[0].notes)
    for ids in (IDS[:12], IDS):
        wanted = llama(weights, DYNAMIC, ids, max_position_embeddings=16)
        for got in (streamed(folder, ids), loaded(folder, ids), loaded(tmp_path / "out" / "bnb", ids)):
            assert np.abs(got - wanted).max() < 1e-3
    got = OnnxModel(tmp_path / "out" / "onnx", threads=1).logits(IDS[:16])
    assert np.abs(got - llama(weights, DYNAMIC, IDS[:16])).max() < 1e-3


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (DYNAMIC, "'dynamic': llama.cpp has no dynamic NTK"),
        (ELSEWHERE["yarn, betas"], "'yarn' with beta_fast 4, beta_slow 2: llama.cpp"),
        (ELSEWHERE["yarn, not truncated"], "'yarn' with truncate false"),
    ],
    ids=["dynamic", "betas", "truncate"],
)
def test_what_llama_cpp_cannot_is_refused_at_planning(scaling: dict[str, Any], words: str) -> None:
    model = Architecture.from_config({**CONFIG, "rope_scaling": scaling})
    with pytest.raises(UnsupportedError, match=words):
        gguf_plan(model, recipe(bits=16, type="F32", tensor_types=(), imatrix=False))


def test_what_is_not_known_is_refused_everywhere() -> None:
    for scaling in ({"rope_type": "llama3", "factor": 8.0}, {"type": "longrope", "factor": 4.0}, {"type": "ntk", "factor": 2.0}):
        kind = scaling.get("rope_type", scaling.get("type"))
        with pytest.raises(UnsupportedError, match=f"type '{kind}' is not supported"):
            Architecture.from_config({**CONFIG, "rope_scaling": scaling})
        with pytest.raises(ValueError, match=f"type '{kind}' is not supported"):
            XverseConfig(**CONFIG, rope_scaling=scaling)
