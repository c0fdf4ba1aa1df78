"""Plans for a budget of bitsandbytes: within it, no worse than without a plan, and what transformers makes of the folder."""

import json
from itertools import product
from math import inf, prod
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch

import xent_quant
from exporters.bitsandbytes.budget import LIKE, planned
from exporters.bitsandbytes.kinds import FourBit, Int8
from exporters.bitsandbytes.plan import BnbPlan, module, plan
from exporters.budgets import Goal
from tests.conftest import Command
from tests.exporters.test_bnb import IDS, load
from tests.exporters.test_gguf_budget import sensitivity
from tests.exporters.test_gguf_plan import architecture
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ExportError
from xent_quant.model.streaming import StreamingModel
from xent_quant.sensitivities import place
from xent_quant.tensors import ATTENTION_ROLES
from xent_quant.validation.bnb_source import BnbSource

MODEL = architecture(num_hidden_layers=1)
HEADER = 100_000
KINDS = {"NF4": FourBit("nf4"), "FP4": FourBit("fp4"), "INT8": Int8()}


def made(bits: int = 4, **goal: float) -> BnbPlan:
    return planned(MODEL, sensitivity(MODEL), Goal(name="test", **goal), bits=bits, bnb_type="nf4", header=HEADER)


@pytest.mark.parametrize("kind", LIKE)
def test_codes_err_as_much_as_is_planned_with(kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((256, 4096)).astype(np.float32)
    like, error = formats.get(LIKE[kind][0]), np.square(rows - KINDS[kind].read(KINDS[kind].quantize(rows), rows.shape)).sum()
    found = error / np.square(rows - like.dequantize(like.quantize(rows))).sum()
    assert found == pytest.approx(LIKE[kind][1], rel=0.01)


def test_is_the_best_of_all_plans_of_no_more_bytes() -> None:
    plain, known = plan(MODEL), sensitivity(MODEL)
    together: dict[str, list] = {}
    for tensor in plain.tensors:
        if tensor.type == "NF4":
            label = "experts" if tensor.tensor.expert is not None else place(tensor.tensor)
            together.setdefault(label, []).append(tensor)
    assert len(together) == 7  # q, k, v, o; experts; shared up and down
    few = {label: sum(tensor.nbytes for tensor in some) for label, some in together.items()}
    names = {label: {module(tensor.tensor) for tensor in some} for label, some in together.items()}
    whole = {
        label: sum(2 * prod(tensor.shape) for tensor in some) + sum(len(name) + 12 for name in names[label])
        for label, some in together.items()
    }
    loss = {}
    for label, some in together.items():
        places = {place(tensor.tensor) for tensor in some}
        loss[label] = LIKE["NF4"][1] * sum(known.loss(each, "Q4_0", gptq=False) for each in places)
    kept = plain.nbytes - sum(few.values()) + HEADER
    for size in (1_500_000_000, 1_530_000_000, 1_600_000_000, 3_000_000_000):
        least = inf
        for chosen in product((False, True), repeat=len(together)):
            taken = dict(zip(together, chosen, strict=True))
            if kept + sum((whole if taken[label] else few)[label] for label in together) <= size:
                least = min(least, sum(loss[label] for label in together if not taken[label]))
        ours = made(size=size)
        assert ours.expected is not None
        assert ours.expected.kl == pytest.approx(least, rel=1e-12)
        assert ours.nbytes + HEADER <= ours.expected.nbytes <= size
        left = {module(tensor.tensor) for tensor in ours.tensors if tensor.type == "BF16" and tensor.role in ATTENTION_ROLES}
        assert left <= set(ours.whole) or ours.type == "BF16"


def test_a_budget_too_small_says_what_would_fit() -> None:
    plain = plan(MODEL)
    with pytest.raises(ExportError, match=rf"--size 1 B: too small by .* \({plain.nbytes + HEADER} bytes\)"):
        made(size=1)
    least = made(size=plain.nbytes + HEADER)
    assert not least.whole
    with pytest.raises(ExportError, match=rf"--fit .*: too small by .* needs .* \({plain.vram_bytes(512)} bytes\)"):
        made(vram=plain.nbytes, context=512)


def test_room_is_kept_for_what_is_dequantised() -> None:
    """No embedding, and nothing of a model in bfloat16."""
    small, whole = plan(MODEL), plan(MODEL, bits=16)
    largest = max(prod(tensor.shape) for tensor in small.tensors if tensor.type == "NF4")
    assert largest < MODEL.embedding.n_weights
    assert small.beside_weights(512) - whole.beside_weights(512) == 2 * largest


def test_a_gpu_of_that_size_holds_it() -> None:
    limit = plan(MODEL).vram_bytes(2048) + 50_000_000
    ours = made(vram=limit, context=2048)
    assert ours.whole
    assert ours.vram_bytes(2048) <= limit
    assert limit - ours.vram_bytes(2048) < 50_000_000


def test_a_bound_on_the_loss_leaves_the_rest_in_8_bits() -> None:
    worst = made(bits=8, size=plan(MODEL, bits=8).nbytes + HEADER)
    assert worst.expected is not None
    ours = made(bits=8, max_kl=worst.expected.kl / 2)
    assert ours.expected is not None
    assert ours.expected.kl <= worst.expected.kl / 2
    assert {"INT8", "BF16"} <= {tensor.type for tensor in ours.tensors if tensor.role in ATTENTION_ROLES}
    nothing = made(bits=8, max_kl=1e-12)  # what is quantised nowhere is not bitsandbytes'
    assert nothing.type == "BF16"
    assert nothing.quantization_config() is None


def test_what_takes_more_files_than_without_a_plan_counts_their_index(tmp_path: Path) -> None:
    (quantised,) = xent_quant.plan(formats=["bnb"])
    size, split = int(1.35 * quantised.nbytes), int(1.02 * quantised.nbytes)
    done = xent_quant.quantize(formats=["bnb"], size=size, split_size=split, output=tmp_path)
    files = list((tmp_path / "bnb").iterdir())
    assert "model.safetensors.index.json" in {path.name for path in files}
    assert done.plans[0].expected is not None
    assert sum(path.stat().st_size for path in files) <= done.plans[0].expected.nbytes <= size


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_loads_the_modules_as_they_were_planned(checkpoint, tmp_path: Path, command: Command, bits: int) -> None:
    source = checkpoint(hidden_size=128, intermediate_size=64)
    (summary,) = xent_quant.plan(source, formats=["bnb"], bits=bits, size="1G")
    assert summary.expected is not None
    sizes = {row.name: row.nbytes for row in summary.expected.beside}
    size = (min(sizes.values()) + 4 * max(sizes.values())) // 5
    asked = (source, "--format", "bnb", "--bits", bits, "--size", size)
    shown = command(*asked, "--dry-run")
    assert "lm_head" in shown.stdout
    done = command(*asked, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "bnb"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= size
    skipped = json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert any(name.endswith(".experts") for name in skipped)
    assert f"-{size}\n" in (folder / "README.md").read_text()
    model = load(folder)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".layers." in name and "router" not in name:
            whole = any(name == each or name.startswith(f"{each}.") for each in skipped)
            assert whole == (not isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)), name
    forward = StreamingModel(BnbSource(folder, Checkpoint.open(source).architecture))
    wanted = forward.logits(forward.hidden_states(IDS))
    with torch.no_grad():
        got = model(IDS).logits.float()
    assert float((got - wanted).abs().median() / wanted.abs().max()) < 0.02
