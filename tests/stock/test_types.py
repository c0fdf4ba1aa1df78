"""The type of every tensor of every mix, as llama-quantize chooses it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xent_quant
from calibration.imatrix import Entry, Imatrix
from exporters.gguf.plan import plan
from tests.conftest import TINY, random_weights, write_checkpoint
from tests.stock.programs import Programs
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.recipes import MIXES, OWN, recipe

pytestmark = pytest.mark.stock

WIDE = {"num_hidden_layers": 26, "intermediate_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "2 layers, narrow experts": {},
    "26 layers, grouped-query": {**WIDE, "num_experts": 3, "num_key_value_heads": 1, "num_shared_experts": 1},
    "26 layers, dense": {**WIDE, "num_experts": 0},
}
Model = tuple[Checkpoint, Path]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A checkpoint, and its file of 16 bits."""
    config, folder = {**TINY, **MODELS[request.param]}, tmp_path_factory.mktemp("types")
    write_checkpoint(folder / "model", config, random_weights(config))
    (file,) = xent_quant.quantize(folder / "model", type="F16", output=folder).exports
    return Checkpoint.open(folder / "model"), file


@pytest.mark.parametrize("kind", [name for name in MIXES if name not in OWN])
def test_every_tensor_has_llama_quantizes_type(stock: Programs, model: Model, tmp_path: Path, kind: str) -> None:
    checkpoint, file = model
    statistics = tmp_path / "imatrix.gguf"
    ones = np.ones((1, checkpoint.architecture.hidden_size), np.float32)
    Imatrix({"blk.0.attn_q.weight": Entry(ones, ones[:, 0])}, ("text",), 1, 512).write(statistics)
    for imatrix in (True, False):
        given = ("--imatrix", statistics) if imatrix else ()
        planned = plan(checkpoint.architecture, recipe(type=kind, imatrix=imatrix), pad="never")
        if any("llama-quantize stops" in note for note in planned.notes):
            with pytest.raises(AssertionError, match=f"no tensor type fallback is defined for type {kind.lower()}"):
                stock.run("quantize", "--dry-run", *given, file, kind)
            continue
        said = stock.run("quantize", "--dry-run", *given, file, kind)
        assert types(said) == {tensor.name: tensor.type for tensor in planned.tensors}, imatrix


def types(said: str) -> dict[str, str]:
    """The types that llama-quantize announces: the new one, or the one that a tensor has and keeps."""
    line = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\w+), size =.*?(?:\((\w+)\))?$", re.MULTILINE)
    return {found[1]: (found[3] or found[2]).upper() for found in line.finditer(said)}
