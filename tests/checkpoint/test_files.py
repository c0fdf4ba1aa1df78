"""Which file holds which tensor: transformers' order, indexes, shards without one, what lies there instead of weights."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.folders import index, save, weights_of, write
from xent_quant.checkpoint import hub
from xent_quant.checkpoint.files import locate
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, UnsupportedError

HEAD = "lm_head.weight"
NAMES = list(weights_of())
HALF = len(NAMES) // 2


def filled(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in weights_of().items()}


def part(weights: dict[str, torch.Tensor], first: bool) -> dict[str, torch.Tensor]:
    return {name: weights[name] for name in (NAMES[:HALF] if first else NAMES[HALF:])}


def sharded(folder: Path, value: float, suffix: str = ".safetensors") -> dict[str, str]:
    """Two shards; returns their weight_map."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    files = [f"{stem}-0000{number}-of-00002{suffix}" for number in (1, 2)]
    for file, first in zip(files, (True, False), strict=True):
        save(part(filled(value), first), folder / file)
    return {name: files[number >= HALF] for number, name in enumerate(NAMES)}


def test_files_are_looked_for_in_transformers_order(tmp_path: Path) -> None:
    """Each kind of file holds another number; transformers says which it loads, and that kind is then removed."""
    from transformers import AutoModelForCausalLM

    import xent_quant

    xent_quant.register_with_transformers()
    folder = write(tmp_path / "model", filled(1))
    index(folder, sharded(folder, 2))
    save(filled(3), folder / "pytorch_model.bin")
    index(folder, sharded(folder, 4, ".bin"), "pytorch_model.bin")
    for value, files in enumerate(("model.safetensors", "model*", "pytorch_model.bin", "pytorch_model*"), start=1):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert Checkpoint.open(folder).read(HEAD)[0, 0] == model.lm_head.weight[0, 0].item() == value
        for file in folder.glob(files):
            file.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors, no pytorch_model\.bin"):
        locate(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_an_index_are_read_when_all_are_there(tmp_path: Path, suffix: str) -> None:
    folder = write(tmp_path, file=None)
    files = dict.fromkeys(sharded(folder, 5, suffix).values())
    assert all((Checkpoint.open(folder).read(name) == 5).all() for name in NAMES)
    _, second = files
    (folder / second).unlink()
    with pytest.raises(CheckpointError, match=f"{second}: missing"):
        locate(folder)
    save(part(filled(5), False), folder / second.replace("00002-of-00002", "00003-of-00003"))
    with pytest.raises(CheckpointError, match="shards of 2 and of 3 files"):
        locate(folder)


def test_the_index_decides_which_shard_counts(tmp_path: Path) -> None:
    folder = write(tmp_path, file=None)
    weight_map = sharded(folder, 1)
    for number in (1, 2):  # the head is in both, once as zeros
        file = folder / f"model-0000{number}-of-00002.safetensors"
        save({**part(filled(1), number == 1), HEAD: torch.full((320, 64), float(number - 1))}, file)
        index(folder, {**weight_map, HEAD: file.name})
        assert (Checkpoint.open(folder).read(HEAD) == number - 1).all()
    index(folder, {name: file for name, file in weight_map.items() if name != HEAD})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: model-00001-of-00002\.safetensors holds it too.*index"):
        locate(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: model-00001-of-00002\.safetensors holds it too"):
        locate(folder)


def header(folder: Path, text: str, data: bytes = b"") -> Path:
    raw = text.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return folder


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [%s, 4]}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'{{"a": {ENTRY % 0}, "a": {ENTRY % 0}}}', "'a' comes twice"),
        (f'{{"a": {ENTRY % "Infinity"}}}', "Infinity is no finite number"),
        (f'{{"a": {ENTRY % "1e400"}}}', "1e400 is no finite number"),
        (f'{{"a": {ENTRY % "0.0"}}}', "float in place of a size"),
        (f'{{"a": {ENTRY % "true"}}}', "bool in place of a size"),
        (f'{{"a": {ENTRY % ("9" * 5000)}}}', "4300"),
        (f'{{"a": {ENTRY % ("9" * 4000)}}}', "int in place of a size"),
        (f'{{"\\ud800": {ENTRY % 0}}}', "surrogates"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("[]", "damaged safetensors header"),
        ('{"a": 3}', "damaged safetensors header"),
    ],
    ids=lambda value: value if len(value) < 40 else None,
)
def test_damaged_headers_are_told_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as told:
        locate(header(tmp_path, text, b"\0" * 4))
    assert "model.safetensors" in str(told.value)
    assert len(str(told.value)) < 500


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 51500000000\n"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs_are_told_apart(tmp_path: Path, file: str) -> None:
    from xent_quant.checkpoint.tokenizer import load_tokenizer

    folder = write(tmp_path, file=None if file == "pytorch_model.bin" else "model.safetensors")
    (folder / file).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{file}: is a git-lfs pointer, not the file itself; run `git lfs pull`"):
        load_tokenizer(Checkpoint.open(folder).path)


def test_a_lora_is_told_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "xverse/XVERSE-Ent-A4.2B"}))
    for folder in (tmp_path, write(tmp_path)):  # an adapter beside whole weights would be applied by transformers
        with pytest.raises(UnsupportedError, match=r"is a LoRA of xverse/XVERSE-Ent-A4\.2B.*merge_and_unload"):
            Checkpoint.open(folder)


def test_weights_of_another_name_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, file="consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"it holds consolidated\.safetensors: rename"):
        locate(folder)


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, lambda value: value.to(torch.bfloat16)], ids=["parameters", "bfloat16"])
def test_pickles_of_parameters_are_read(tmp_path: Path, wrap) -> None:
    weights = {name: wrap(value) for name, value in weights_of().items()}
    checkpoint = Checkpoint.open(write(tmp_path, weights, file="pytorch_model.bin"))
    for name, value in weights.items():
        assert np.array_equal(checkpoint.read(name), value.detach().float().numpy())
        assert np.array_equal(checkpoint.read(name, 1, 3), value.detach().float().numpy()[1:3])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"state_dict": weights_of(), "epoch": 3}, r"lie under 'state_dict'.*torch\.save"),
        ({"step": 3}, "does not hold a plain dictionary of tensors"),
        ([1], "does not hold a plain dictionary of tensors"),
    ],
    ids=["trainer", "numbers", "list"],
)
def test_pickles_of_something_else_are_told_with_the_fix(tmp_path: Path, value: object, words: str) -> None:
    folder = write(tmp_path, file=None)
    torch.save(value, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        locate(folder)


def cache(tmp_path: Path, *commits: str) -> Path:
    """The Hub's cache of a model, as huggingface_hub lays it out."""
    folder = tmp_path / "models--xverse--XVERSE-Ent-A4.2B"
    for commit in commits:
        write(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    return folder


def test_the_folder_of_the_hubs_cache_stands_for_its_snapshot(tmp_path: Path) -> None:
    old, new = "3f2a9c1d", "77aa0b12"
    folder = cache(tmp_path, old, new)
    with pytest.raises(CheckpointError, match=r"no refs/main to choose by; it holds 3f2a9c1d, 77aa0b12"):
        hub.resolve(folder)
    (folder / "refs" / "main").write_text(new)
    assert hub.resolve(folder) == hub.resolve(folder / "snapshots") == folder / "snapshots" / new
    assert hub.resolve(folder / "snapshots" / old).name == old
    for bad in ("../..", "gone", "/"):
        (folder / "refs" / "main").write_text(bad)
        with pytest.raises(CheckpointError, match="refs/main does not name one"):
            hub.resolve(folder)


def test_the_only_snapshot_needs_no_reference(tmp_path: Path) -> None:
    assert hub.resolve(str(cache(tmp_path, "3f2a9c1d"))).name == "3f2a9c1d"
