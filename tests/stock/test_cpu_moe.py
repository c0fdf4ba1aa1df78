"""What stock llama.cpp keeps in RAM with --n-cpu-moe is what plans count there."""

import re
from pathlib import Path

import pytest

from exporters.gguf.plan import Placement, moved, plan
from tests.exporters.test_gguf_memory import write_holes
from tests.exporters.test_gguf_plan import architecture
from tests.stock.programs import Programs
from xent_quant.recipes import recipe

pytestmark = pytest.mark.stock

SMALL = {"num_hidden_layers": 12, "vocab_size": 64, "num_experts": 4, "moe_top_k": 2, "intermediate_size": 32}


@pytest.mark.parametrize("layers", [0, 1, 5, 12])
def test_the_experts_of_the_first_layers_and_nothing_else(layers: int, stock: Programs, tmp_path: Path) -> None:
    planned = plan(architecture(**SMALL), recipe(type="Q4_0"))
    write_holes(planned, tmp_path / "holes.gguf")
    once = ["-p", "1", "-n", "0", "-r", "1", "-t", "1", "--no-warmup"]
    said = stock.run("bench", "-m", tmp_path / "holes.gguf", "-ncmoe", str(layers), "-v", *once)
    overridden = set(re.findall(r"tensor (\S+) \(.*\) buffer type overridden to CPU", said))
    assert overridden == {tensor.name for tensor in planned.tensors if moved(tensor, Placement(cpu_layers=layers))}
    assert len(overridden) == 3 * layers
