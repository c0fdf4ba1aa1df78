"""Files that are damaged, or made to harm: the command says so in one line that names the file, at once and in little memory.

`scripts/fuzz.py` looks for more of them. Values of config.json are tests/checkpoint/test_config.py's, tokenizers
tests/checkpoint/test_tokenizer.py's.
"""

import json
import os
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.checkpoint.folders import SMALL, write
from tests.conftest import random_weights
from xent_quant.cli.main import main
from xent_quant.errors import ExportError
from xent_quant.journal import Journal

SECONDS, BYTES = 5.0, 1 << 28

pytestmark = pytest.mark.usefixtures("one_thread")


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(autouse=True, scope="module")
def imports_done() -> None:
    """Which cost seconds, and memory, once in a process."""
    for module in ("bitsandbytes", "onnx", "onnxruntime", "pyarrow.parquet", "transformers"):
        import_module(module)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused(file, *command) runs the command and returns the line in which it refuses `file`."""

    def run(file: Path, *command: object) -> str:
        before, started = peak(), time.process_time()
        with pytest.raises(SystemExit) as stopped:
            main([str(part) for part in command])
        assert time.process_time() - started < SECONDS
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


def validation(exported: Path, model: Path, runtime: str = "torch") -> list[object]:
    """The command that compares an export with its checkpoint, on a few words."""
    suite = model.parent / "suite.txt"
    suite.write_text("the night, " * 10)
    short = ["--suite-file", f"own={suite}", "--context", 16]
    return ["validate", exported, "--reference", model, "--runtime", runtime, *short, "--report", model.parent / "report"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


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
        "validate": validation(file, model),
    }
    assert "truncated or not a GGUF file" in refused(file, *commands[use])


def tensor_info(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    return struct.pack(f"<Q{len(name)}sI{len(shape)}QIQ", len(name), name, len(shape), *shape, kind, offset)


TENSORS = {
    "five dimensions": (tensor_info(b"t", [1] * 5, 0, 0), "truncated or not a GGUF file"),
    "a million dimensions": (struct.pack("<Q1sI", 1, b"t", 10**6), "truncated or not a GGUF file"),
    "no elements": (tensor_info(b"t", [0], 0, 0), "t: shape [0]"),
    "half a block": (tensor_info(b"t", [31], 8, 0), "t: shape [31] is none of type Q8_0"),
    "2^62 elements": (tensor_info(b"t", [2**62], 0, 0), "t: ends beyond the file"),
    "an unknown type": (tensor_info(b"t", [32], 9999, 0), "t: quant type 9999"),
    "far away": (tensor_info(b"t", [8], 0, 2**40), "t: lies at"),
    "another's bytes": (tensor_info(b"t", [8], 0, 0) + tensor_info(b"u", [8], 0, 0), "u: lies at 0, 32 was expected"),
    "the same name": (tensor_info(b"t", [8], 0, 0) + tensor_info(b"t", [8], 0, 32), "t: comes twice"),
    "a name that is no text": (tensor_info(b"\xff", [8], 0, 0), "truncated or not a GGUF file"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_gguf_tensors(tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    infos, reason = TENSORS[case]
    file = tmp_path / "file.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2 if case in ("another's bytes", "the same name") else 1, 0) + infos)
    file.write_bytes(file.read_bytes() + bytes(-file.stat().st_size % 32) + bytes(64))
    assert reason in refused(file, "inspect", file)


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
    for command in (["inspect", wide], validation(wide, model)):
        assert "experts.0.gate_proj" in refused(wide, *command)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocksize", 0),
        ("blocksize", 32),
        ("blocksize", "64"),
        ("nested_blocksize", -1),
        ("nested_offset", "x"),
        ("dtype", "float99"),
        ("shape", [64]),
    ],
)
def test_bitsandbytes_states(tmp_path: Path, refused: Callable[..., str], key: str, value: Any) -> None:
    folder = four_bit(tmp_path / "folder")
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if "quant_state" in name)
    state = {**json.loads(stored[name].tobytes()), key: value}
    stored[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    save_file(stored, folder / "model.safetensors")
    assert name.partition(".quant_state")[0] in refused(folder, "inspect", folder)


@pytest.mark.parametrize(("part", "value"), [("nested_absmax", np.inf), ("quant_map", np.nan)])
def test_weights_of_an_export_that_are_not_finite(
    model: Path, tmp_path: Path, refused: Callable[..., str], part: str, value: float
) -> None:
    folder = four_bit(tmp_path / "folder")
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith(f".{part}"))
    stored[name] = np.full_like(stored[name], value)
    save_file(stored, folder / "model.safetensors")
    line = refused(folder, *validation(folder, model))
    assert f"{name.removesuffix(f'.{part}')}: NaN or infinite weights" in line


def test_an_export_that_computes_infinities(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = four_bit(tmp_path / "folder")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    stored[name] = np.full_like(stored[name], 3e38)
    save_file(stored, folder / "model.safetensors")
    assert "layer 0, attention: NaN or infinite activations" in refused(folder, *validation(folder, model))


def message(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer."""
    return bytes([number << 3 | 2, len(content)]) + content


def test_a_sentencepiece_model_whose_complaint_is_no_text(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    pytest.importorskip("sentencepiece")
    (model / "tokenizer.json").unlink()
    file = model / "tokenizer.model"
    file.write_bytes(message(1, message(1, b"<unk>") + bytes([3 << 3, 2])) + 2 * message(1, message(1, b"\xff")))
    assert "not a SentencePiece model" in refused(file, model, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vocab": [["a", -1.0], ["<0x61>", -2.0]], "unk_id": None, "byte_fallback": True},
            "there is text that it cannot tokenise",
        ),
        ({"vocab": [["<unk>", 0.0], ["a", 1e308]], "unk_id": 0}, "token 'a' has the score 1e+308, which float32 does not hold"),
    ],
    ids=["unknown", "score"],
)
def test_unigram_tokenizers(model: Path, tmp_path: Path, refused: Callable[..., str], changes: Any, said: str) -> None:
    file = model / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", **changes}}))
    (model / "tokenizer_config.json").write_text("{}")
    assert said in refused(file, model, "--method", "rtn", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "odd", [bytes([3 << 3, 5]), message(1, message(1, b"x") + message(2, b"score"))], ids=["normaliser", "score"]
)
def test_a_sentencepiece_model_with_a_field_of_another_kind(
    model: Path, tmp_path: Path, refused: Callable[..., str], odd: bytes
) -> None:
    """SentencePiece itself passes over such fields."""
    pytest.importorskip("sentencepiece")
    (model / "tokenizer.json").unlink()
    file = model / "tokenizer.model"
    pieces = [message(1, message(1, b"<unk>") + bytes([3 << 3, 2])), *(message(1, message(1, text)) for text in (b"a", b"b"))]
    file.write_bytes(b"".join(pieces) + odd)
    assert "not a SentencePiece model" in refused(file, model, "--output", tmp_path / "out")


def test_a_pickle_is_not_advised_to_be_run(model: Path, refused: Callable[..., str]) -> None:
    import torch

    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": os.system}, model / "pytorch_model.bin")
    line = refused(model / "pytorch_model.bin", "inspect", model)
    assert "weights_only" not in line


def test_a_pickle_that_ends_within_a_word(model: Path, refused: Callable[..., str]) -> None:
    """torch raises struct.error then."""
    import torch

    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(2)}, model / "whole.bin")
    with zipfile.ZipFile(model / "whole.bin") as whole, zipfile.ZipFile(model / "pytorch_model.bin", "w") as cut:
        for name in whole.namelist():
            data = whole.read(name)
            cut.writestr(name, data[: data.index(b"model.norm") - 2] if name.endswith("data.pkl") else data)
    assert "torch cannot map it" in refused(model / "pytorch_model.bin", "inspect", model)


def test_a_lora_of_something_odd(model: Path, refused: Callable[..., str]) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": [1] * 1000}))
    assert "is a LoRA of a model that it does not name" in refused(model, "inspect", model)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, bytes(100)])
def test_a_journal(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "journal.json"
    assert Journal.load(file, {}) is None
    Journal(file, {"a": 1}, done=3).save()
    found = Journal.load(file, {"a": 1})
    assert found is not None
    assert found.done == 3
    file.write_bytes(damage)
    with pytest.raises(ExportError, match=rf"{file}: damaged"):
        Journal.load(file, {"a": 1})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx")
    assert done(write(root / "model"), "--format", "onnx", "--method", "rtn", "--effort", "fast", "--output", root)
    return root / "onnx"


@contextmanager
def changed(file: Path) -> Iterator[bytes]:
    """Its bytes, to write others in their place for a while."""
    good = file.read_bytes()
    try:
        yield good
    finally:
        file.write_bytes(good)


@contextmanager
def changed_graph(exported: Path) -> Iterator[tuple[Path, Any]]:
    """model.onnx, and its graph, which is there to be changed and written."""
    onnx = pytest.importorskip("onnx")
    with changed(exported / "model.onnx") as good:
        yield exported / "model.onnx", onnx.load_model_from_string(good)


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
    with changed_graph(exported) as (file, model):
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value
        file.write_bytes(model.SerializeToString())
        assert tensor.name in refused(file, "inspect", exported)
        refused(file, *validation(exported, exported.parent / "model", "onnxruntime"))


def test_experts_without_scales_in_an_onnx_graph(exported: Path, refused: Callable[..., str]) -> None:
    """ONNX Runtime loads it, and ends the process."""
    with changed_graph(exported) as (file, model):
        node = next(node for node in model.graph.node if node.op_type == "QMoE")
        scales, node.input[6] = node.input[6], ""
        file.write_bytes(model.SerializeToString())
        assert f"'{scales}': does not go where" in refused(file, *validation(exported, exported.parent / "model", "onnxruntime"))


def test_a_dimension_of_an_onnx_graph_whose_name_is_no_text(exported: Path, refused: Callable[..., str]) -> None:
    with changed_graph(exported) as (file, model):
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "nameless"
        file.write_bytes(model.SerializeToString().replace(b"nameless", b"nameles\xe8"))
        refused(file, *validation(exported, exported.parent / "model", "onnxruntime"))


def test_a_tokenizer_of_an_onnx_export(exported: Path, refused: Callable[..., str]) -> None:
    pytest.importorskip("onnxruntime")
    file = exported / "tokenizer.json"
    with changed(file) as good:
        file.write_bytes(good.replace(b'"id": 3', b'"id": -3', 1))
        refused(file, *validation(exported, exported.parent / "model", "onnxruntime"))


def test_an_onnx_export_of_65535_layers(exported: Path, refused: Callable[..., str]) -> None:
    file = exported / "config.json"
    with changed(file) as good:
        file.write_bytes(json.dumps(json.loads(good) | {"num_hidden_layers": 65535}).encode())
        assert "layers.2.attention.norm" in refused(exported / "model.onnx", "inspect", exported)


ROWS = np.ones((1, 64), np.float32)
STATISTICS: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "float16": ({"t.in_sum2": ROWS.astype(np.float16), "t.counts": ROWS[0, :1]}, {}, "t.in_sum2: statistics of type F16"),
    "no counts": ({"t.in_sum2": ROWS}, {}, "t: sums without counts"),
    "two counts": ({"t.in_sum2": ROWS, "t.counts": ROWS[0, :2]}, {}, "t: 1 matrices but 2 counts"),
    "other columns": (
        {"t.in_sum2": ROWS, "t.counts": ROWS[0, :1], "t.in_sum2_layer": ROWS[:, :32], "t.layer_counts": ROWS[0, :1]},
        {},
        "t.in_sum2_layer: has not the columns",
    ),
    "not finite": ({"t.in_sum2": ROWS * np.inf, "t.counts": ROWS[0, :1]}, {}, "t: negative or non-finite"),
    "2^40 chunks": ({"t.in_sum2": ROWS, "t.counts": ROWS[0, :1]}, {"imatrix.chunk_count": 2**40}, "chunk_count is 1099511627776"),
    "means beyond float32": (
        {"blk.0.attn_q.weight.in_sum2": ROWS * np.float32(1e30), "blk.0.attn_q.weight.counts": ROWS[0, :1] * np.float32(1e-37)},
        {},
        "attn_q.weight: means up to 1e+67, beyond float32",
    ),
    "none": ({"t.counts": ROWS[0, :1]}, {}, "holds no statistics"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics(model: Path, tmp_path: Path, refused: Callable[..., str], case: str) -> None:
    tensors, numbers, reason = STATISTICS[case]
    file = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(file, "")
    writer.add_string("general.type", "imatrix")
    for name, number in numbers.items():
        writer.add_uint64(name, number)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert reason in refused(Path(file.name), model, "--imatrix", file, "--output", tmp_path / "out")


def test_a_gigabyte_where_a_text_is_expected(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    suite, template = tmp_path / "own.txt", model / "chat_template.jinja"
    command = ["validate", model, "--reference", model, "--suite-file", f"own={suite}", "--report", tmp_path / "report"]
    assert "no such file" in refused(suite, *command)
    for file in (suite, template):
        file.touch()
        os.truncate(file, 1 << 30)
    assert "larger than 64 MiB" in refused(suite, *command)
    assert "too large for a chat template" in refused(template, model, "--method", "rtn", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ({"x": 2}, "added token 'x' has id 2, which '<|startoftext|>' has too"),
        ({"a": 319}, "added token 'a' has id 319, and elsewhere 261"),
    ],
)
def test_added_tokens_that_contradict_the_tokenizer(
    model: Path, tmp_path: Path, refused: Callable[..., str], tokens: dict[str, int], reason: str
) -> None:
    (model / "added_tokens.json").write_text(json.dumps(tokens))
    assert reason in refused(model, model, "--method", "rtn", "--output", tmp_path / "out")


def test_names_without_end(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": {"x" * 70_000: "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not done("inspect", model)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"xent-quant: error: {model}/model-00001-of-00001.safetensors: xxx")
    assert len(line) < 2000
