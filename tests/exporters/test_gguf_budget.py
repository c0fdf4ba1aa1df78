"""Plans for a budget: within it, no worse than any mix by name, and what the exporter then writes."""

from pathlib import Path

import pytest

import xent_quant
from exporters.gguf.budget import Goal, Layout, layouts, named_mixes, planned
from exporters.gguf.plan import GGUFPlan, beside_weights, plan
from tests.exporters.test_gguf_plan import architecture
from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.cli import show
from xent_quant.errors import ConfigError, ExportError
from xent_quant.options import Options
from xent_quant.recipes import recipe
from xent_quant.sensitivities import TYPES, Sensitivity, places
from xent_quant.targets import Methods, exporters_of
from xent_quant.tensors import KEPT_ROLES
from xent_quant.units import human_bytes

MODEL = architecture(num_hidden_layers=3)
WEIGHTS = {"attn_v": 30.0, "attn_output": 10.0, "ffn_down_exps": 3.0, "output": 40.0}


def sensitivity(model: Architecture) -> Sensitivity:
    """Four times less loss for a bit more; the first layer is the most sensitive."""
    return Sensitivity(
        {
            name: {
                kind: 1e-1
                * (4 if name.startswith("blk.0.") else 1)
                * WEIGHTS.get(name.split(".")[-1], 1.0)
                * 4.0 ** -formats.get(kind).bits_per_weight
                for kind in TYPES
            }
            for name in places(model)
        },
        "made up",
    )


def file_bytes(plan: GGUFPlan, header: int) -> int:
    return header + sum(-(-tensor.nbytes // 32) * 32 for tensor in plan.tensors)


def made(size: int | None = None, max_kl: float | None = None, model: Architecture = MODEL, header: int = 1000) -> GGUFPlan:
    return planned(model, sensitivity(model), Goal(name="test", size=size, max_kl=max_kl), header=header)


@pytest.mark.parametrize("gigabytes", [0.95, 1.4, 2.2])
def test_keeps_to_the_budget_and_uses_it(gigabytes: float) -> None:
    budget = int(gigabytes * 1e9)
    plan = made(budget)
    assert plan.expected is not None
    assert plan.expected.nbytes == file_bytes(plan, 1000)
    assert 0.99 * budget <= plan.expected.nbytes <= budget
    assert len({tensor.type for tensor in plan.tensors}) > 3


def test_is_no_worse_than_any_mix_of_no_more_bytes() -> None:
    for mix in ("Q6_K", "XENT4", "Q4_K_M", "Q2_K"):
        named = plan(MODEL, recipe(type=mix, imatrix=True))
        ours = made(file_bytes(named, 1000))
        assert ours.expected is not None
        beside = {row.name: row.kl for row in ours.expected.beside}
        assert ours.expected.kl < beside[mix]


def test_types_are_what_their_places_may_have() -> None:
    plan = made(int(1.2e9))
    by_name = {tensor.name: tensor.type for tensor in plan.tensors}
    for tensor in plan.tensors:
        assert tensor.type == "F32" if tensor.role in KEPT_ROLES else tensor.type in TYPES
        assert tensor.type == tensor.asked
        assert tensor.columns % formats.get(tensor.type).block_size == 0
        assert by_name[tensor.name.replace("_gate_exps", "_up_exps").replace("_gate_shexp", "_up_shexp")] == tensor.type
    assert plan.expert_width == 1792  # K types need it


def test_without_padding_rows_have_types_of_smaller_blocks() -> None:
    plan = planned(MODEL, sensitivity(MODEL), Goal(name="test", size=int(1.6e9)), pad="never")
    assert plan.expert_width == 1728
    assert {formats.get(tensor.type).block_size for tensor in plan.tensors if "ffn_down_exps" in tensor.name} == {32}


def test_a_budget_too_small_says_by_how_much_and_what_would_fit() -> None:
    with pytest.raises(ExportError, match=r"--size 476\.8 MiB: too small by .*; the smallest plan .* bytes\)") as refused:
        made(500_000_000)
    least = int(str(refused.value).split("(")[1].split()[0])
    smallest = made(least)
    assert smallest.expected is not None
    assert smallest.expected.nbytes == least
    with pytest.raises(ExportError):
        made(least - 1)


def test_a_bound_on_the_loss_gives_the_smallest_file() -> None:
    plan = made(max_kl=0.01)
    assert plan.expected is not None
    assert plan.expected.kl <= 0.01
    same_size = made(plan.expected.nbytes)
    assert same_size.expected is not None
    assert same_size.expected.kl <= plan.expected.kl
    smaller = made(plan.expected.nbytes - 32)
    assert smaller.expected is not None
    assert smaller.expected.kl > 0.01
    with pytest.raises(ExportError, match=r"--max-kl 1e-12: the least that is expected"):
        made(max_kl=1e-12)


def test_a_tied_embedding_without_a_head_of_its_own_counts_as_both() -> None:
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = Architecture.from_config({**config, "num_attention_heads": 4, "tie_word_embeddings": True})
    known = sensitivity(model)
    groups = Layout(model, 512, known, method="imatrix").groups(Goal(name="test", size=1))
    (both,) = (group for group in groups if group.label == "token_embd output")
    assert both.choices[0].loss == known.losses["token_embd"]["Q8_0"] + known.losses["output"]["Q8_0"]
    assert "output" not in {group.label for group in groups}
    plan = planned(model, known, Goal(name="test", fit=310_000_000, context=128))
    assert plan.vram_bytes() == plan.nbytes + beside_weights(model, 512, 128)  # the GPU has a copy of it, as head
    assert f"weights {human_bytes(plan.nbytes)}" in plan.notes[-1]


def test_the_file_has_the_size_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = xent_quant.quantize(size="7MiB", method="rtn", output=tmp_path)
    (file,) = done.exports
    assert file.name == "xent-mini-7MiB.gguf"
    assert 0.99 * 7 * 2**20 <= file.stat().st_size <= 7 * 2**20
    (summary,) = done.plans
    assert summary.expected is not None
    assert file.stat().st_size <= summary.expected.nbytes
    assert {tensor.name: tensor.type for tensor in summary.tensors}["output_norm.weight"] == "F32"
    assert "Planned for 7MiB" in (tmp_path / "README.md").read_text("utf-8")
    show.plans(done.plans)
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("gate,", "up_exps", "token_embd", "this plan", "an eighth smaller", "XENT2"))


@pytest.mark.parametrize("split", [None, "1M", "100K"])
def test_what_is_written_keeps_to_the_budget_whatever_is_said_of_the_text(split: str | None, tmp_path: Path) -> None:
    budget = 7 * 2**20
    options = Options(size=budget, split_size=split, output=tmp_path)
    (exporter,) = exporters_of(Checkpoint.open(miniature()), options, Methods(options))
    names = {f"quantize.imatrix.{key}": "夜" * 20000 for key in ("file", "dataset")}
    exporter.open(tmp_path, {**names, "quantize.imatrix.entries_count": 60}, fresh=True).close()
    files = list(tmp_path.glob("*.gguf"))
    assert len(files) == (len(exporter.targets) - 1) > (1 if split else 0)
    expected = exporter.summary.expected
    assert expected is not None
    assert sum(file.stat().st_size for file in files) <= expected.nbytes <= budget


def test_what_is_expected_of_rounding_is_said_to_be_unmeasured() -> None:
    (rounded,) = xent_quant.plan(size="7MiB", method="rtn")
    (searched,) = xent_quant.plan(size="7MiB", method="imatrix")
    assert any("what --method rtn loses was not measured" in note for note in rounded.notes)
    assert not any("not measured" in note for note in searched.notes)
    model = architecture(num_hidden_layers=8)
    of = sensitivity(model)
    named = {}
    for method in ("rtn", "gptq"):  # there are statistics, or there are none
        (known,) = layouts(model, of, method=method, pad="never")
        named[method] = {row.name: row.nbytes for row in named_mixes(known, 0)}["IQ4_XS"]
        assert named[method] == file_bytes(plan(model, recipe(type="IQ4_XS", imatrix=method != "rtn")), 0)
    assert named["rtn"] != named["gptq"]


def test_a_gpu_holds_weights_but_the_embedding_cache_and_buffers() -> None:
    budget = int(2.5e9)
    goal = Goal(name="test", fit=budget, context=4096, kv="f16")
    made = planned(MODEL, sensitivity(MODEL), goal, header=10**9)
    assert 0.99 * budget <= made.vram_bytes() <= budget
    assert {tensor.name: tensor.type for tensor in made.tensors}["token_embd.weight"] == "Q8_0"  # in RAM, so it costs nothing
    assert "of VRAM: weights" in made.notes[-1]
    with pytest.raises(ExportError, match=r"--fit 476\.8 MiB: too small by .*; the smallest plan of this model needs .*"):
        planned(MODEL, sensitivity(MODEL), Goal(name="test", fit=500_000_000))


def test_what_is_shown_is_of_the_context_that_was_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    (summary,) = xent_quant.plan(fit="400MiB", context=512, method="rtn")
    assert summary.to_json()["vram_context"] == 512
    show.plans([summary])
    assert "All on a GPU with 512 tokens of context" in capsys.readouterr().out


def test_what_llama_cpp_refuses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--kv q8_0: llama\.cpp takes that for heads of a multiple of 32 dimensions, .* 80"):
        planned(MODEL, sensitivity(MODEL), Goal(name="test", fit=10**10, kv="q8_0"))
    with pytest.raises(ConfigError, match="--context 16384: the model's is 8192"):
        planned(MODEL, sensitivity(MODEL), Goal(name="test", fit=10**10, context=16384))
