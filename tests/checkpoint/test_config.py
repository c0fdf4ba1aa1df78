"""config.json: what an absent key means is said once, and hostile values end in one line at once."""

import inspect
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xent_quant
from tests.checkpoint.folders import SMALL, weights_of, write
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.headers import read_json
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, ConfigError, UnsupportedError, XentQuantError
from xent_quant.model.configuration_xverse import XverseConfig
from xent_quant.model.streaming import StreamingModel

xent_quant.register_with_transformers()
REQUIRED: dict[str, Any] = {
    "model_type": "xverse",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""All that a config.json must have; what the released dense models lack too: num_experts, rope_theta."""
MIXTURE = {**REQUIRED, "num_experts": 3, "moe_top_k": 2}
IDS = [2, 17, 300, 5, 9, 42, 260, 261, 11, 7, 290, 33]


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("required", [REQUIRED, MIXTURE], ids=["dense", "mixture"])
def test_every_key_that_may_be_absent_means_one_thing(required: dict[str, Any], value: object) -> None:
    """Held for every parameter of XverseConfig, so that a new one cannot be forgotten."""
    optional = set(inspect.signature(XverseConfig.__init__).parameters) - {"self", "kwargs", *required}
    optional -= {"initializer_range", "use_cache", "output_router_logits"}  # not part of the function
    given = required if value == "absent" else required | dict.fromkeys(optional)
    ours, theirs = Architecture.from_config(given), XverseConfig(**{**given, "model_type": "xverse"})
    assert Architecture.from_config(theirs.to_dict()) == ours
    assert Architecture.from_config(json.loads(theirs.to_json_string())) == ours  # what save_pretrained writes
    assert Architecture.from_config(ours.to_config()) == ours
    told, absent = XverseConfig(**ours.to_config()).to_dict(), theirs.to_dict()
    assert {key: told.get(key) for key in optional} == {key: absent.get(key) for key in optional}


@torch.no_grad()
def llama(weights: dict[str, torch.Tensor], **config: Any) -> np.ndarray:
    """Logits of transformers' own Llama, which a dense XVERSE is to the letter, with Llama's defaults (rope_theta 10000)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    keys = {key: value for key, value in REQUIRED.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**{"max_position_embeddings": 8192, **keys, **config})).eval()
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    return model(torch.tensor([IDS])).logits[0].numpy()


def streamed(folder: Path) -> np.ndarray:
    model = StreamingModel(Checkpoint.open(folder))
    return model.logits(model.hidden_states(torch.tensor([IDS])))[0].numpy()


def test_a_dense_model_with_the_fewest_keys_is_llamas_in_every_export(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from xent_quant.validation.llama_cpp import LlamaCpp
    from xent_quant.validation.onnx_runtime import OnnxModel

    weights = {name: value.bfloat16().float() for name, value in weights_of(REQUIRED).items()}
    folder = write(tmp_path / "model", weights, REQUIRED)
    wanted = llama(weights)
    assert np.abs(wanted - llama(weights, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})).max() > 0.01
    options: dict[str, Any] = {"bits": 16, "onnx_dtype": "fp32", "output": tmp_path / "out"}
    done = xent_quant.quantize(folder, type="F32", formats=["gguf", "onnx", "bnb"], **options)
    got = {"streamed": streamed(folder), "onnx": OnnxModel(tmp_path / "out" / "onnx", threads=1).logits(IDS)}
    with LlamaCpp(done.files[0]) as model:
        got["gguf"] = model.logits(IDS)
    for name, path in (("checkpoint", folder), ("bnb", tmp_path / "out" / "bnb")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            got[name] = model(torch.tensor([IDS])).logits[0].numpy()
    assert {name: bool(np.abs(value - wanted).max() < 1e-3) for name, value in got.items()} == dict.fromkeys(got, True)
    for name in ("onnx", "bnb"):
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert Architecture.from_config({**config, "model_type": "xverse"}) == Architecture.from_config(REQUIRED)
        assert {*Architecture.from_config(REQUIRED).to_config()} <= {*config}


def test_a_dense_model_in_four_bits_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write(tmp_path / "model", weights_of(REQUIRED), REQUIRED)
    xent_quant.quantize(folder, formats=["bnb"], output=tmp_path / "out")
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "bnb", output_loading_info=True)
    assert model.config.num_experts == 0
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


HOSTILE: dict[str, tuple[str, str]] = {
    "theta beyond a float": ('"rope_theta": 1e400', "1e400 is no finite number"),
    "epsilon beyond float32": ('"rms_norm_eps": 1e308', "rms_norm_eps must be a positive number, it is 1e\\+308"),
    "epsilon that float32 turns to 0": ('"rms_norm_eps": 1e-50', "rms_norm_eps must be a positive number, it is 1e-50"),
    "theta infinite": ('"rope_theta": Infinity', "Infinity is no finite number"),
    "theta not a number": ('"rope_theta": NaN', "NaN is no finite number"),
    "theta an integer beyond a float": (f'"rope_theta": {"9" * 400}', "rope_theta must be a positive number"),
    "theta a text": ('"rope_theta": "10000"', "rope_theta must be a positive number"),
    "theta true": ('"rope_theta": true', "rope_theta must be a positive number"),
    "deep": ('"x": ' + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep objects": ('"x": ' + '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "5,000 digits": (f'"vocab_size": {"9" * 5000}', "4300 digits"),
    "4,000 digits": (f'"vocab_size": {"9" * 4000}', "vocab_size must be an integer from 1 to"),
    "4,000 digits of a token": (f'"bos_token_id": {"9" * 4000}', "bos_token_id must be a token id"),
    "half of a pair": ('"architectures": ["\\ud800"]', "surrogates"),
    "half of a pair as a name": ('"\\udfff": 1', "surrogates"),
    "a billion experts": ('"num_experts": 1000000000, "moe_top_k": 2', "no model has so many tensors"),
    "a billion experts, written short": ('"num_experts": 1e9, "moe_top_k": 2', "num_experts must be an integer"),
    "a billion layers": ('"num_hidden_layers": 1000000000', "no model has so many tensors"),
    "many layers": ('"num_hidden_layers": 100000', "layers.2.*missing"),
    "many experts": ('"num_experts": 100000, "moe_top_k": 2', "mlp.router.weight: missing"),
    "tied by a text": ('"tie_word_embeddings": "false"', "tie_word_embeddings must be true or false, it is 'false'"),
    "tied by a number": ('"tie_word_embeddings": 1', "tie_word_embeddings must be true or false"),
    "renormalised by a text": ('"norm_topk_prob": "no"', "norm_topk_prob must be true or false"),
    "biases by a text": ('"attention_bias": "false"', "attention_bias must be true or false"),
    "a token that is true": ('"eos_token_id": true', "eos_token_id must be a token id"),
    "a list for a type": ('"model_type": ["xverse"]', "model_type is list of 1"),
    "half a rotation": ('"partial_rotary_factor": 0.5', "partial_rotary_factor is 0.5"),
    "scaling by a text": ('"rope_scaling": "linear"', "rope_scaling is 'linear'"),
    "scaling for each layer": ('"rope_parameters": {"full_attention": {"rope_type": "default"}}', "one set of parameters"),
    "scaling without a factor": ('"rope_scaling": {"type": "linear"}', "factor must be a number of at least 1"),
    "scaling by half": ('"rope_scaling": {"type": "linear", "factor": 0.5}', "factor must be a number of at least 1"),
    "scaling by a list": ('"rope_scaling": {"type": ["yarn"], "factor": 2}', "its type must be a name, it is list of 1"),
    "an unknown scaling": ('"rope_scaling": {"rope_type": "longrope", "factor": 2}', "'longrope' is not supported"),
    "an unknown key": ('"rope_scaling": {"type": "linear", "factor": 2, "low_freq_factor": 1}', "has no 'low_freq_factor'"),
    "two scalings": (
        '"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "dynamic", "factor": 2}',
        "name different types",
    ),
    "yarn from a context beyond 32 bits": (
        '"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 4294967296}',
        "must be an integer from 1 to 2147483647, it is 4294967296",
    ),
    "yarn's scales beyond float32": (
        '"rope_scaling": {"type": "yarn", "factor": 1e30, "mscale": 1e38, "mscale_all_dim": 1e-30}',
        r"mscale and mscale_all_dim make an attention_factor of 6\.9",
    ),
    "yarn on nothing": ('"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}', "not defined for rope_theta 1"),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_end_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    folder = write(tmp_path, weights_of(REQUIRED), REQUIRED)
    plain = {key: value for key, value in REQUIRED.items() if f'"{key}"' not in text}
    (folder / "config.json").write_text(json.dumps(plain)[:-1] + f", {text}}}")
    begun = time.process_time()
    with pytest.raises(XentQuantError, match=words) as told:
        Checkpoint.open(folder)
    assert time.process_time() - begun < 1
    assert str(folder) in str(told.value)
    assert len(str(told.value)) < 500
    assert "\n" not in str(told.value)


def test_they_take_no_memory(tmp_path: Path) -> None:
    """The command, in one process of 2 GB for all of them: one line each, never an internal error."""
    folder = write(tmp_path / "model", weights_of(REQUIRED), REQUIRED)
    configs = [json.dumps(REQUIRED)[:-1] + f", {text}}}" for text, _ in HOSTILE.values()]
    script = """
import json, sys
from pathlib import Path
from xent_quant.cli.main import main
for config in json.load(sys.stdin):
    (Path(sys.argv[1]) / "config.json").write_text(config)
    try:
        main([sys.argv[1], "--dry-run"])
    except SystemExit as stopped:
        assert stopped.code == 1, config[-200:]
"""
    done = subprocess.run(
        [sys.executable, "-c", script, folder],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30)),
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(configs)
    assert not [line for line in lines if "internal error" in line or not line.startswith("xent-quant: error: ")]


def test_a_fifo_is_no_config(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is not a regular file"):
        Checkpoint.open(folder)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Checkpoint.open(folder).architecture == Architecture.from_config(SMALL)
    (folder / "config.json").write_bytes(text.encode("utf-16"))
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        Checkpoint.open(folder)


def test_whole_pairs_are_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "😀"}


def test_errors_are_of_the_kind_that_callers_catch() -> None:
    with pytest.raises(ConfigError):
        Architecture.from_config({**REQUIRED, "rms_norm_eps": 0})
    with pytest.raises(UnsupportedError):
        Architecture.from_config({**REQUIRED, "attention_bias": True})
