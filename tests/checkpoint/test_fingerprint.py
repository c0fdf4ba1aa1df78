"""What changes a checkpoint's fingerprint, and what does not."""

import os
from pathlib import Path

import pytest

from tests.conftest import TINY, random_weights, write_checkpoint
from xent_quant.checkpoint.fingerprint import BLOCK_BYTES, BLOCKS, check_same, fingerprint, model_hash
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError

CONFIG = {**TINY, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "Model", CONFIG, random_weights(CONFIG))


def of(folder: Path) -> str:
    return fingerprint(Checkpoint.open(folder))


def test_the_same_for_the_same_files(folder: Path, tmp_path: Path) -> None:
    before = of(folder)
    assert of(folder) == before
    (folder / "README.md").write_text("a card")
    (tmp_path / "link").symlink_to(folder)
    assert of(tmp_path / "link") == before  # another way to it
    check_same(Checkpoint.open(folder), before)


def test_changes_with_weights_config_and_tokenizer(folder: Path) -> None:
    file = folder / "model.safetensors"
    found = {of(folder)}
    size, times = file.stat().st_size, file.stat()
    with file.open("r+b") as stream:  # in a place that is read, in place, and with the old time
        stream.seek(size * 40 // BLOCKS + BLOCK_BYTES // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    found.add(of(folder))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    found.add(of(folder))
    copy = file.with_suffix(".copy")  # another file of the same content and time
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    copy.rename(file)
    found.add(of(folder))
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text((folder / name).read_text() + " ")
        found.add(of(folder))
    (folder / "additional_chat_templates").mkdir()
    beside = ("generation_config.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/rag.jinja")
    for name in ("tokenizer_config.json", *beside):  # exports say something of all of these
        (folder / name).write_text("{}")
        found.add(of(folder))
    assert len(found) == 11


def test_a_model_is_known_by_its_weights_and_what_they_compute(folder: Path, tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    longer = {**CONFIG, "rope_theta": 10000.0}
    ends = {**CONFIG, "eos_token_id": 4}
    changed = {name: rows + 1 if "v_proj" in name else rows for name, rows in weights.items()}
    made = [(CONFIG, weights), (ends, weights), (longer, weights), (CONFIG, changed)]
    folders = [write_checkpoint(tmp_path / str(number), *each) for number, each in enumerate(made)]
    same, ended, *others = (model_hash(Checkpoint.open(each)) for each in folders)
    assert same == ended == model_hash(Checkpoint.open(folder))
    assert len({same, *others}) == 3


def test_a_change_is_told(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    before = fingerprint(checkpoint)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        check_same(checkpoint, before)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        check_same(checkpoint, before)
