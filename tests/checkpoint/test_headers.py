"""Where tensors lie, against what safetensors and torch wrote; and files that lie about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from xent_quant.checkpoint.files import locate
from xent_quant.checkpoint.headers import read_json
from xent_quant.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.arange(4, dtype=torch.float16),
    "c": torch.linspace(-1, 1, 8).bfloat16().reshape(4, 2),
}
SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def header(entries: dict[str, Any], data: int, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def test_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    found = locate(tmp_path)
    assert found.keys() == TENSORS.keys()
    raw = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in TENSORS.items():
        location = found[name]
        assert location.info.shape == tuple(tensor.shape)
        assert location.info.nbytes == tensor.numel() * SIZES[location.info.dtype]
        assert location.offset is not None
        stored = raw[location.offset : location.offset + location.info.nbytes]
        assert stored == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert [found[name].info.dtype for name in "abc"] == ["F16", "F32", "BF16"]


def test_shards_and_their_index(tmp_path: Path) -> None:
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    for shard in set(files.values()):
        save_file({name: TENSORS[name] for name, file in files.items() if file == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert {name: location.file.name for name, location in locate(tmp_path).items()} == files

    def refused(weight_map: Any, match: str) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=match):
            locate(tmp_path)

    refused({**files, "d": "model-2.safetensors"}, "model-2.safetensors: d: not there")
    refused({**files, "d": "model-3.safetensors"}, "model-3.safetensors: missing")
    refused({**files, "d": "../model-1.safetensors"}, "missing")
    refused({**files, "d": 3}, "no weight_map")
    refused(None, "no weight_map")
    refused({**files, "d": "x" * 70_000}, "no weight_map")
    (tmp_path / "model-1.safetensors").unlink()
    refused(files, "model-1.safetensors: missing")


def test_a_pickle(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    found = locate(tmp_path)
    assert {name: (location.info.dtype, location.info.shape, location.offset) for name, location in found.items()} == {
        "a": ("F16", (4,), None),
        "b": ("F32", (2, 3), None),
        "c": ("BF16", (4, 2), None),
    }
    save_file({"a": TENSORS["a"]}, tmp_path / "model.safetensors")
    assert locate(tmp_path).keys() == {"a"}  # before the pickle, where there are both


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors, no pytorch_model\.bin"):
        locate(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "truncated or not safetensors"),
        (b"\x01\x00\x00", "truncated or not safetensors"),
        (header({}, 0, length=10**12), "truncated or not safetensors"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "damaged safetensors header"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{]", "damaged safetensors header"),
        (header({"a": {"dtype": "F32", "shape": [2]}}, 8), "damaged safetensors header"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8), "damaged safetensors header"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": []}}, 8), "damaged safetensors header"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8), "damaged safetensors header"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7), "truncated"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9), "its header says"),
        (header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8), "do not make shape"),
        (header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, 8), "overlapping or missing"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, 12), "overlapping or missing"),
        (
            header(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                },
                12,
            ),
            "b: overlapping",
        ),
    ],
)
def test_hostile_headers(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        locate(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_empty_tensors_and_unknown_types_have_a_place(tmp_path: Path) -> None:
    entries = {
        "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]},
        "ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
    }
    (tmp_path / "model.safetensors").write_bytes(header(entries, 8))
    found = locate(tmp_path)
    assert found["none"].info.shape == (0, 3)
    assert found["ids"].info.dtype == "I64"


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="missing"):
        read_json(file)
    for content, match in ((b"{", "not valid JSON"), (b"\xff{}", "not valid JSON"), (b"[1]", "expected a JSON object")):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            read_json(file)
    file.write_text('{"名": 1}', "utf-8")
    assert read_json(file) == {"名": 1}


def test_offsets_beyond_what_an_index_holds_are_refused_without_overflow(tmp_path: Path) -> None:
    huge = 2**63
    (tmp_path / "model.safetensors").write_bytes(
        header({"a": {"dtype": "F32", "shape": [huge // 4], "data_offsets": [0, huge]}}, 8)
    )
    with pytest.raises(CheckpointError, match="truncated"):
        locate(tmp_path)
