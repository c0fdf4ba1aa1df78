"""Our shards and llama-gguf-split's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.stock.gguf_files import keys, tensors
from tests.stock.programs import Programs
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource

pytestmark = pytest.mark.stock


def test_llama_gguf_split_merges_our_shards(stock: Programs, export: Callable[..., Path], tmp_path: Path) -> None:
    """The same file as one that was never split, but that it says so."""
    first, whole, merged = export("Q4_K_M", split_size="1500K"), export("Q4_K_M"), tmp_path / "merged.gguf"
    shards = sorted(first.parent.glob("*.gguf"))
    assert first == shards[0]
    assert len(shards) > 3
    stock.run("gguf-split", "--merge", first, merged)
    found = keys(merged)
    assert found.pop("split.count") == 0
    assert {name: value for name, value in found.items() if not name.startswith("split.")} == keys(whole)
    assert tensors(merged) == tensors(whole)
    assert list(tensors(merged)) == list(tensors(whole))


def test_shards_of_llama_gguf_split_are_read(stock: Programs, export: Callable[..., Path], tmp_path: Path) -> None:
    stock.run("gguf-split", "--split", "--split-max-tensors", "7", export("Q4_K_M"), tmp_path / "part")
    shards = sorted(tmp_path.glob("part-*.gguf"))
    assert len(shards) > 3
    model = Checkpoint.open(miniature()).architecture
    split, whole = (GGUFSource(GGUFFile(file), model) for file in (shards[0], export("Q4_K_M")))
    assert split.file.files == shards
    for name in model.tensors():
        np.testing.assert_array_equal(split.read(name), whole.read(name), name)
