"""Exports without some experts beside the checkpoint that has them: weights are compared with the right ones, in every format."""

from pathlib import Path

import numpy as np
import pytest

import xent_quant
from tests.validation.test_validate import run
from xent_quant.checkpoint.dropping import GGUF_KEYS
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.progress import Silent
from xent_quant.validation.validate import open_export
from xent_quant.validation.weights import compare_all


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the miniature in 8 bits, in every format, without 4 of its 16 experts."""
    output = tmp_path_factory.mktemp("dropped")
    options = {"formats": ["gguf", "onnx", "bnb"], "bits": 8, "method": "rtn", "tokens": "1k", "threads": 1}
    xent_quant.quantize(None, output=output, name="mini", drop_experts=4, **options)
    return output


@pytest.mark.parametrize("file", ["mini-Q8_0.gguf", "onnx", "bnb"])
def test_an_export_is_the_smaller_model_in_its_runtime(dropped: Path, mini: Checkpoint, cache: Path, file: str) -> None:
    found = run(dropped / file, mini, cache)
    assert not found.suspicions
    assert {len(layer) for layer in found.coverage} == {12}
    assert found.cross_verdict == "within", found.cross_check  # the runtime and our own forward of what is in the file
    assert found.n_weights < mini.n_weights
    # Text is the whole model's: what 8 bits lose is a hundredth of that.
    assert all(suite.kl.value.value > 0.02 for suite in found.suites)
    assert any("Of 16 experts in each layer 4 are left out." in note for note in found.notes)


def test_weights_of_other_experts_are_seen(dropped: Path, mini: Checkpoint, tmp_path: Path) -> None:
    """One number of the list in the file changed: the weights of that expert are none of what it says that they are."""
    file = dropped / "mini-Q8_0.gguf"
    opened = open_export(file, "gguf", mini)
    assert max(tensor.error for tensor in compare_all(opened.checkpoint, opened.source, Silent())) < 0.02
    assert opened.checkpoint.kept is not None
    numbers = [list(layer) for layer in opened.checkpoint.kept.numbers]
    raw = np.array(numbers, "<i4").tobytes()
    other = next(number for number in range(15, 0, -1) if number not in numbers[1])
    place = sum(number < other for number in numbers[1]) - 1  # the next lower one: the list stays in order
    numbers[1][place] = other
    content = file.read_bytes()
    assert content.count(raw) == 1
    assert GGUF_KEYS["kept"].encode() in content
    damaged = tmp_path / file.name
    damaged.write_bytes(content.replace(raw, np.array(numbers, "<i4").tobytes()))
    opened = open_export(damaged, "gguf", mini)
    wrong = {tensor.name for tensor in compare_all(opened.checkpoint, opened.source, Silent()) if tensor.error > 0.1}
    projections = {f"model.layers.1.mlp.experts.{place}.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert wrong == projections | {"model.layers.1.mlp.router.weight"}
