"""Files that are damaged, or made to harm: the command says so in one line that names the file, at once and in little memory.

`scripts/fuzz.py` looks for more of them; what it found is here, one of each kind.
"""

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checkpoint.folders import SMALL, write
from tests.conftest import random_weights
from xent_quant.cli.main import main

SECONDS, BYTES = 5.0, 1 << 28

pytestmark = pytest.mark.usefixtures("one_thread")


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(file, *command) runs the command and returns the line in which it refuses `file`."""

    def run(file: Path, *command: object) -> str:
        before, started = peak(), time.perf_counter()
        with pytest.raises(SystemExit) as stopped:
            main([str(part) for part in command])
        assert time.perf_counter() - started < SECONDS
        assert peak() - before < BYTES
        assert stopped.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("xent-quant: error: ")
        assert "internal error" not in line
        assert str(file) in line
        assert len(line) < 600
        return line

    return run


def done(*command: object) -> bool:
    """Whether a command ends well."""
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in command])
    return stopped.value.code == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def config(model: Path, key: str, value: str) -> Path:
    """config.json with `key` as this text."""
    file = model / "config.json"
    rest = {name: each for name, each in json.loads(file.read_text()).items() if name != key}
    file.write_text(json.dumps(rest)[:-1] + f', "{key}": {value}}}')
    return file


CONFIGS = {
    "beyond a float": ("rope_theta", "1e400", "1e400"),
    "nested 10^5 deep": ("x", "[" * 10**5 + "]" * 10**5, "nested too deeply"),
    "objects 10^5 deep": ("x", '{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
    "an integer of 5,000 digits": ("hidden_size", "9" * 5000, "not valid JSON"),
    "an integer of 4,000 digits": ("hidden_size", "9" * 4000, "hidden_size must be an integer"),
    "half of a surrogate pair": ("architectures", '["\\ud800"]', "surrogates"),
    "a key of half a pair": ("x\\udfff", "1", "surrogates"),
    "num_experts 1e9": ("num_experts", "1e9", "num_experts must be an integer"),
    "num_experts 1000000000": ("num_experts", "1000000000", "no model has so many tensors"),
    "a boolean in quotes": ("tie_word_embeddings", '"false"', "tie_word_embeddings must be true or false"),
    "not a number": ("rms_norm_eps", "NaN", "NaN"),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_config(model: Path, tmp_path: Path, refused: Callable[..., str], case: str, command: str) -> None:
    key, value, reason = CONFIGS[case]
    file = config(model, key, value)
    line = refused(file, *(["inspect", model] if command == "inspect" else [model, "--output", tmp_path / "out"]))
    assert reason in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_what_is_no_file(model: Path, tmp_path: Path, refused: Callable[..., str], name: str, what: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name) if what == "fifo" else (model / name).symlink_to(what)
    refused(model, model, "--method", "rtn", "--format", "onnx", "--output", tmp_path / "out")


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl", "text.txt.gz", "text.epub", "text.parquet"])
def test_text_that_is_no_file(model: Path, tmp_path: Path, refused: Callable[..., str], name: str) -> None:
    os.mkfifo(tmp_path / name)
    line = refused(tmp_path / name, "calibrate", model, "--calib", tmp_path / name, "--output", tmp_path / "m.gguf")
    assert "not a regular file" in line


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e400", "9" * 5000, str(2**70), "1.5", '"0"', "true"])
def test_safetensors_offsets(model: Path, refused: Callable[..., str], value: str) -> None:
    header = f'{{"model.embed_tokens.weight": {{"dtype": "F32", "shape": [320, 64], "data_offsets": [0, {value}]}}}}'.encode()
    file = model / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(81920))
    assert "damaged safetensors header" in refused(file, "inspect", model)


@pytest.mark.parametrize("length", [0, 2**40, 2**64 - 1])
def test_safetensors_header_length(model: Path, refused: Callable[..., str], length: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(file, "inspect", model)


def key(kind: int, value: bytes) -> bytes:
    """A GGUF of one key, "a"."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", kind) + value


GGUFS = {
    "an array of 2^40 bytes": key(9, struct.pack("<IQ", 0, 2**40)),
    "an array of 2^40 texts": key(9, struct.pack("<IQ", 8, 2**40)),
    "an array of 2^40 arrays": key(9, struct.pack("<IQ", 9, 2**40)),
    "arrays within arrays": key(9, struct.pack("<IQ", 9, 1) * 10_000),
    "a text of 2^60 bytes": key(8, struct.pack("<Q", 2**60)),
    "a key of 2^62 bytes": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62),
    "2^60 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
    "2^60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
    "a value of type 99": key(99, b""),
    "nothing": b"",
}


@pytest.mark.parametrize("case", GGUFS)
@pytest.mark.parametrize("use", ["inspect", "--imatrix", "--reference", "validate"])
def test_gguf(model: Path, tmp_path: Path, refused: Callable[..., str], case: str, use: str) -> None:
    file = tmp_path / "file.gguf"
    file.write_bytes(GGUFS[case])
    assert len(GGUFS["an array of 2^40 bytes"]) == 49
    commands: dict[str, list[object]] = {
        "inspect": ["inspect", file],
        "--imatrix": [model, "--imatrix", file, "--output", tmp_path / "out"],
        "--reference": ["inspect", file, "--reference", model],
        "validate": ["validate", file, "--reference", model, "--runtime", "torch", "--report", tmp_path / "report"],
    }
    assert "truncated or not a GGUF file" in refused(file, *commands[use])


def four_bit(folder: Path, **config: Any) -> Path:
    """A pre-quantised NF4 checkpoint, made from the layout: its codes are all 0. `config` is what it says of itself."""
    stored: dict[str, np.ndarray] = {}
    for name, weight in random_weights(SMALL).items():
        if "_proj.weight" not in name:
            stored[name] = weight
            continue
        blocks = weight.size // 64
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        stored |= {
            name: np.zeros((weight.size // 2, 1), np.uint8),
            f"{name}.absmax": np.zeros(blocks, np.uint8),
            f"{name}.quant_map": np.zeros(16, np.float32),
            f"{name}.nested_absmax": np.zeros(-(-blocks // 256), np.float32),
            f"{name}.nested_quant_map": np.zeros(256, np.float32),
            f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        }
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps({**SMALL, "quantization_config": method, **config}))
    return folder


def test_a_bitsandbytes_config_that_asks_for_64_gib(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert done("inspect", four_bit(tmp_path / "right"), "--json")
    wide = four_bit(tmp_path / "wide", intermediate_size=2**28)  # a projection of 64 x 2^28 float32
    validate = ["validate", wide, "--reference", model, "--runtime", "torch", "--report", tmp_path / "report"]
    for command in (["inspect", wide], validate):
        assert "experts.0.gate_proj" in refused(wide, *command)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    assert done(write(root / "model"), "--format", "onnx", "--method", "rtn", "--effort", "fast", "--output", root)
    return root / "onnx"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../onnx/model.onnx.data"),
        ("location", "../secret"),
        ("location", "/etc/passwd"),
        ("location", "config.json"),
        ("offset", "-65536"),
        ("offset", str(2**62)),
        ("offset", "x"),
        ("length", str(2**40)),
    ],
)
def test_onnx_external_data(exported: Path, refused: Callable[..., str], key: str, value: str) -> None:
    onnx = pytest.importorskip("onnx")
    file = exported / "model.onnx"
    good = file.read_bytes()
    try:
        graph = onnx.load_model_from_string(good)
        tensor = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value
        file.write_bytes(graph.SerializeToString())
        assert tensor.name in refused(file, "inspect", exported)
        validate = ["validate", exported, "--reference", exported.parent / "model", "--report", exported.parent / "report"]
        refused(file, *validate)
    finally:
        file.write_bytes(good)
