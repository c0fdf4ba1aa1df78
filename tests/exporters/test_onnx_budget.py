"""Plans for a budget of ONNX: within it, no worse than without a plan, and what the exporter then writes and stock runs."""

from itertools import product
from math import inf
from pathlib import Path

import numpy as np
import pytest

import xent_quant
from exporters.budgets import Goal
from exporters.onnx.budget import ERROR, LIKE, planned
from exporters.onnx.export import ONNXExporter
from exporters.onnx.plan import ALIGNMENT, ONNXPlan, Settings, node, plan
from tests.conftest import Command
from tests.exporters.test_gguf_budget import sensitivity
from tests.exporters.test_gguf_plan import architecture
from tests.exporters.test_onnx_exact import IDS, expected, typical
from tests.walking import export
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ConfigError, ExportError
from xent_quant.formats.int_group import IntGroup, int_group
from xent_quant.machine import Card
from xent_quant.methods.search import Search
from xent_quant.planning import Choice
from xent_quant.sensitivities import place
from xent_quant.validation.onnx_runtime import OnnxModel

MODEL = architecture(num_hidden_layers=3)
HEADER = 100_000


def made(model=MODEL, settings: Settings | None = None, **goal: float) -> ONNXPlan:
    return planned(model, sensitivity(model), Goal(name="test", **goal), settings or Settings(), header=HEADER)


def bits(of: ONNXPlan) -> dict[str, int]:
    """By operator."""
    kinds = {node(weight.name): weight.kind for weight in of.weights.values() if weight.pieces}
    return {name: kind.bits for name, kind in kinds.items() if isinstance(kind, IntGroup)}


@pytest.mark.parametrize("grid", LIKE, ids=str)
def test_codes_err_as_much_as_is_planned_with(grid: tuple[int, bool]) -> None:
    rows = np.random.default_rng(0).standard_normal((256, 4096)).astype(np.float32)

    def error(kind) -> float:
        return float(np.square(rows - kind.dequantize(kind.quantize(rows))).sum())

    like = error(formats.get(LIKE[grid]))
    found = {size: error(int_group(grid[0], size, grid[1], "F16")) / like for size in ERROR[grid]}
    assert found == pytest.approx(ERROR[grid], rel=0.01)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_is_the_best_of_all_plans_of_no_more_bytes(tied: bool, symmetric: bool) -> None:
    model = architecture(num_hidden_layers=1, tie_word_embeddings=tied)
    settings = Settings(symmetric=symmetric)
    plans = {}
    for size in (850_000_000, 900_000_000, 1_000_000_000, 1_250_000_000):
        plans[size] = made(model, settings, size=size)
    names = list(bits(plans[850_000_000]))
    assert len(names) == 6 + (not tied)  # q, k and v; o; the experts; shared up and down; embedding; head
    for size, each in plans.items():
        assert each.expected is not None
        assert each.expected.nbytes == each.data_bytes + HEADER <= size
    every = {number: made(model, settings, size=10**10 if number == 8 else smallest(model, settings)) for number in (4, 8)}

    def choice(name: str, number: int) -> Choice:
        weights = [weight for weight in every[number].weights.values() if node(weight.name) == name and weight.pieces]
        nbytes = sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for weight in weights for part in weight.parts)
        places = {place(piece.source) for weight in weights for piece in weight.pieces}
        if tied and name == "embedding":
            places.add("output")
        known = sensitivity(model)
        loss = sum(known.loss(each, LIKE[number, symmetric], gptq=True) for each in places)
        return Choice(str(number), nbytes, loss * ERROR[number, symmetric][settings.block_size])

    table = {(name, number): choice(name, number) for name in names for number in (4, 8)}
    kept = every[4].data_bytes + HEADER - sum(table[name, 4].nbytes for name in names)
    for size, each in plans.items():
        least = inf
        for numbers in product((4, 8), repeat=len(names)):
            some = [table[key] for key in zip(names, numbers, strict=True)]
            if kept + sum(one.nbytes for one in some) <= size:
                least = min(least, sum(one.loss for one in some))
        assert each.expected is not None
        assert each.expected.kl == pytest.approx(least, rel=1e-12)


def smallest(model, settings: Settings) -> int:
    """Bytes of the smallest plan, as the refusal of a smaller one says."""
    with pytest.raises(ExportError, match=r"--size 1 B: too small by .*; the smallest plan .* bytes\)") as refused:
        made(model, settings, size=1)
    return int(str(refused.value).split("(")[1].split()[0])


def test_a_budget_too_small_says_what_would_fit() -> None:
    least = smallest(MODEL, Settings())
    ours = made(size=least)
    assert ours.expected is not None
    assert ours.expected.nbytes == least
    assert set(bits(ours).values()) == {4}
    with pytest.raises(ExportError, match=rf"--fit .*: too small by .* needs .* \({ours.vram_bytes(512)} bytes\)"):
        made(vram=least, context=512)


def test_a_gpu_of_that_size_holds_it() -> None:
    for item, dtype in ((2, "fp16"), (4, "fp32")):
        limit = int(2.6e9)
        ours = made(vram=limit, context=2048, settings=Settings(onnx_dtype=dtype))
        assert ours.vram_bytes(2048) <= limit
        assert ours.context == 2048
        assert {4, 8} == set(bits(ours).values())
        cache = 2 * item * 2048 * MODEL.num_layers * MODEL.kv_size
        assert ours.vram_bytes(2048) - ours.vram_bytes(1024) == cache // 2


def test_more_context_than_the_model_has_is_refused() -> None:
    for kind in ("gguf", "onnx", "bnb"):
        with pytest.raises(ConfigError, match="--context 100000: the model's is 8192"):
            xent_quant.plan(formats=[kind], fit="6G", context=100_000)


@pytest.mark.parametrize("kinds", [["onnx"], ["bnb"], ["gguf", "onnx", "bnb"]], ids=" ".join)
def test_this_machines_card(monkeypatch: pytest.MonkeyPatch, kinds: list[str]) -> None:
    monkeypatch.setattr("xent_quant.machine.card", lambda system: Card("NVIDIA GeForce RTX 3060", 12 * 2**30))
    for summary in xent_quant.plan(formats=kinds, fit="auto"):
        assert summary.expected is not None
        assert any("RTX 3060" in note for note in summary.notes)


def test_columns_of_a_dense_graph(checkpoint, command: Command) -> None:
    done = command(checkpoint(num_experts=None), "--format", "onnx", "--size", "1G", "--dry-run")
    assert done.stdout.split()[:5] == ["layers", "qkv", "output", "gate_up", "down"]


def test_a_bound_on_the_loss_gives_the_smallest_files() -> None:
    usual, largest = made(size=smallest(MODEL, Settings())), made(size=10**11)
    assert usual.expected is not None
    assert largest.expected is not None
    bound = (usual.expected.kl * largest.expected.kl) ** 0.5
    ours = made(max_kl=bound)
    assert ours.expected is not None
    assert ours.expected.kl <= bound
    smaller = made(size=ours.expected.nbytes - 1)
    assert smaller.expected is not None
    assert smaller.expected.kl > bound
    with pytest.raises(ExportError, match="--max-kl 1e-12: the least that is expected"):
        made(max_kl=1e-12)


def test_what_else_there_would_be() -> None:
    ours = made(size=int(2.2e9))
    assert ours.expected is not None
    rows = {row.name: row for row in ours.expected.beside}
    assert rows.keys() == {"INT8", "INT4", "INT4-active4", "an eighth smaller", "an eighth larger"}
    assert rows["INT8"].kl < rows["INT4"].kl < rows["INT4-active4"].kl
    assert ours.expected.frontier[0] == (rows["INT4-active4"].nbytes, pytest.approx(rows["INT4-active4"].kl))
    assert ours.expected.frontier[-1] == (rows["INT8"].nbytes, pytest.approx(rows["INT8"].kl))


def test_operators_of_4_and_of_8_bits_in_one_graph(checkpoint, tmp_path: Path) -> None:
    """In stock ONNX Runtime, both of each kind."""
    settings = Settings(onnx_dtype="fp32", accuracy_level=0)
    source = Checkpoint.open(checkpoint(num_hidden_layers=2))
    names = list(bits(plan(source.architecture, settings)))
    mixed = plan(source.architecture, settings, {name: 4 if name.startswith(("layers.0", "head")) else 8 for name in names})
    assert bits(mixed)["layers.0.experts"] == bits(mixed)["head"] == 4
    assert bits(mixed)["layers.1.experts"] == bits(mixed)["embedding"] == 8
    export(source, [ONNXExporter(source, mixed, tmp_path, "Tiny", Search("fast"))], tmp_path)
    folder = tmp_path / "onnx"
    assert typical(OnnxModel(folder, threads=1).logits(IDS), expected(folder)) < 4e-2  # 8-bit experts round activations


def test_the_files_have_the_size_that_was_asked_for(tmp_path: Path) -> None:
    size = 12 * 2**20
    done = xent_quant.quantize(formats=["onnx"], size=size, method="rtn", output=tmp_path)
    (made,), (summary,) = done.exports, done.plans
    assert summary.expected is not None
    written = sum(path.stat().st_size for path in made.iterdir())
    assert written <= summary.expected.nbytes <= size
    assert summary.expected.nbytes - written < 8192
    assert f"-{size}-ONNX" in (made / "README.md").read_text()
    types = {tensor.type for tensor in summary.tensors if "experts" not in tensor.name}
    assert {"INT4_G64_F16", "INT8_G64_F16"} <= types


def test_bits_are_of_a_dense_models_mlps() -> None:
    """They are what a mixture's experts are; else --bits would change nothing there."""
    dense = architecture(num_hidden_layers=2, num_experts=0, num_shared_experts=0)
    assert bits(plan(dense, Settings(bits=4))) == {
        "embedding": 8,
        "head": 8,
        **{f"layers.{layer}.attention.{name}": 8 for layer in range(2) for name in ("qkv", "output")},
        **{f"layers.{layer}.mlp.{name}": 4 for layer in range(2) for name in ("gate_up", "down")},
    }
    assert set(bits(plan(dense, Settings(bits=8))).values()) == {8}
    mixture = bits(plan(MODEL, Settings(bits=4)))
    assert {name.split(".")[2] for name, each in mixture.items() if each == 4} == {"experts"}
    sizes = {each.name: each.nbytes for each in made(dense, size=10**10).expected.beside}
    assert sizes["INT4-active4"] < sizes["INT4"] < sizes["INT8"]
