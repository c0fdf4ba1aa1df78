"""Plans for a budget: within it, no worse than any mix by name, and what the exporter then writes."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

import xent_quant
from exporters.gguf import card
from exporters.gguf.budget import Goal, Layout, layouts, named_mixes, planned
from exporters.gguf.plan import VRAM, GGUFPlan, Placement, beside_weights, plan
from tests.exporters.test_gguf_plan import architecture
from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.cli import show
from xent_quant.errors import ConfigError, ExportError
from xent_quant.machine import Machine
from xent_quant.options import Options
from xent_quant.recipes import recipe
from xent_quant.sensitivities import TYPES, Sensitivity, places
from xent_quant.targets import Methods, exporters_of
from xent_quant.tensors import KEPT_ROLES
from xent_quant.units import human_bytes

MODEL = architecture(num_hidden_layers=3)
DENSE = {"model_type": "llama", "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
DENSE |= {"num_attention_heads": 4, "tie_word_embeddings": True}
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
    with pytest.raises(ExportError, match=r"--max-kl 1e-12: the least that is expected .*, or --type BF16$"):
        made(max_kl=1e-12)


def test_a_tied_embedding_without_a_head_of_its_own_counts_as_both() -> None:
    model = Architecture.from_config(DENSE)
    known = sensitivity(model)
    groups = Layout(model, 512, known, method="imatrix").groups.values()
    (both,) = (group for group in groups if group.label == "token_embd output")
    assert both.choices[0].loss == known.losses["token_embd"]["Q8_0"] + known.losses["output"]["Q8_0"]
    assert "output" not in {group.label for group in groups}
    plan = planned(model, known, Goal(name="test", machine=Machine(vram=310_000_000), context=128))
    beside = beside_weights(model, 512, 128, "f16", Placement())
    assert plan.vram_bytes() == plan.nbytes + beside.held[0]  # the GPU has a copy of it, as head
    assert f"weights {human_bytes(plan.nbytes)}" in plan.notes[-2]


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
    goal = Goal(name="test", machine=Machine(vram=budget), context=4096)
    made = planned(MODEL, sensitivity(MODEL), goal, header=10**9)
    assert 0.99 * budget <= made.vram_bytes() <= budget
    assert {tensor.name: tensor.type for tensor in made.tensors}["token_embd.weight"] == "Q8_0"  # in RAM, so it costs nothing
    assert "of VRAM: weights" in made.notes[-2]
    with pytest.raises(
        ExportError, match=r"--fit 476\.8 MiB: too small by .*; the smallest plan of this model needs .*; with --ram"
    ):
        planned(MODEL, sensitivity(MODEL), Goal(name="test", machine=Machine(vram=500_000_000)))


def test_what_is_shown_is_of_the_context_that_was_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    (summary,) = xent_quant.plan(fit="400MiB", context=512, method="rtn")
    assert summary.to_json()["vram_context"] == 512
    show.plans([summary])
    assert "All on a GPU with 512 tokens of context" in capsys.readouterr().out


def test_what_llama_cpp_refuses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--kv q8_0: llama\.cpp takes that for heads of a multiple of 32 dimensions, .* 80"):
        planned(MODEL, sensitivity(MODEL), Goal(name="test", machine=Machine(vram=10**10), kv="q8_0"))
    with pytest.raises(ConfigError, match="--context 16384: the model's is 8192"):
        planned(MODEL, sensitivity(MODEL), Goal(name="test", machine=Machine(vram=10**10), context=16384))


def test_rows_that_no_type_divides_are_floats() -> None:
    """Experts' down projections of 172 columns; padded, they have types. Rows of 16 columns have none."""
    narrow = architecture(num_hidden_layers=2, hidden_size=64, intermediate_size=172, num_attention_heads=2)
    known = sensitivity(narrow)
    (whole, padded) = layouts(narrow, known, method="gptq", pad="auto")
    down = ("blk.0.ffn_down_exps",)
    assert [choice.type for choice in whole.groups[down].choices] == ["F16"]
    assert "Q4_K" in {choice.type for choice in padded.groups[down].choices}
    for goal in (Goal(name="test", size=10**9), Goal(name="test", max_kl=1.0)):
        made = planned(narrow, known, goal, pad="never")
        assert {tensor.type for tensor in made.tensors if "ffn_down_exps" in tensor.name} == {"F16"}
    smallest = planned(narrow, known, Goal(name="test", max_kl=100.0), pad="auto")
    assert smallest.expert_width == 256


def test_a_context_has_as_many_tokens_as_llama_cpp_makes_of_it() -> None:
    odd, even = (beside_weights(MODEL, 1792, tokens, "f16", Placement()) for tokens in (4100, 4352))
    assert odd == even
    assert even.held[VRAM] > beside_weights(MODEL, 1792, 4096, "f16", Placement()).held[VRAM]


MACHINE = Machine(vram=int(1.5e9), ram=int(4.5e9))


def split(machine: Machine = MACHINE, speed: float | None = None, compare: bool = False) -> GGUFPlan:
    goal = Goal(name="test", machine=machine, speed=speed, context=1024)
    return planned(MODEL, sensitivity(MODEL), goal, compare=compare)


def test_experts_of_the_first_layers_stay_in_ram_where_vram_does_not_hold_them() -> None:
    made = split()
    assert made.expected is not None
    at_work = made.expected.at_work
    assert at_work is not None
    assert 0 < at_work.cpu_layers <= MODEL.num_layers
    in_ram = [t for t in made.tensors if t.name == "token_embd.weight" or (t.routed and (t.layer or 0) < at_work.cpu_layers)]
    assert at_work.ram_bytes == sum(tensor.nbytes for tensor in in_ram) + 2 * 10**9 <= MACHINE.ram
    beside = beside_weights(MODEL, made.expert_width, 1024, "f16", Placement()).held[VRAM]
    upload = max(tensor.nbytes for tensor in in_ram if tensor.routed)
    assert at_work.vram_bytes == made.nbytes - sum(t.nbytes for t in in_ram) + beside + upload <= MACHINE.vram
    # Time: what a token reads of each memory, experts by how many of them it is routed to, half of a full cache.
    chosen = MODEL.experts_per_token / MODEL.num_experts
    read = {True: 0.0, False: 1024 * MODEL.num_layers * MODEL.kv_size * 2 * 2 / 2}
    for tensor in made.tensors:
        share = chosen if tensor.routed else 1 / MODEL.vocab_size if tensor.name == "token_embd.weight" else 1
        read[tensor in in_ram] += share * tensor.nbytes
    seconds = read[False] / MACHINE.vram_bandwidth + read[True] / MACHINE.ram_bandwidth
    assert at_work.speed == pytest.approx(1 / seconds)
    assert f"the experts of the first {at_work.cpu_layers} layers" in made.notes[-2]


def test_the_card_says_which_command_it_was_planned_for() -> None:
    made = split()
    layers = made.placement.cpu_layers
    text = card.section(made, [Path("m.gguf")], "m", "m.Modelfile", {}, chat=True, sampling={})
    assert f"\nllama-server -m m.gguf -ngl 99 --n-cpu-moe {layers} -c 1024 -np 1 --cache-ram 0\n" in text
    assert all(note in text for note in made.notes)
    told = f"# Planned for llama.cpp's --n-cpu-moe {layers}; ollama's num_gpu counts whole layers instead.\nFROM ./m.gguf\n"
    assert card.modelfile(made, [Path("m.gguf")], "m", chat=True, sampling={}).startswith(told)
    small = card.modelfile(replace(made, kv="q8_0"), [Path("m.gguf")], "m", chat=True, sampling={})
    assert "OLLAMA_KV_CACHE_TYPE=q8_0" in small
    assert "in a cache of q8_0 (" in card.section(
        replace(made, kv="q8_0"), [Path("m.gguf")], "m", "m", {}, chat=True, sampling={}
    )
    deep = replace(made, architecture=replace(MODEL, num_layers=126), placement=Placement())
    assert card.server(deep, "m") == "llama-server -m m -ngl 127 -c 1024 -np 1"
    assert "n-cpu-moe" not in card.modelfile(split(Machine(vram=int(2.5e9))), [Path("m.gguf")], "m", chat=True, sampling={})


def test_half_the_loss_is_worth_twice_the_time_unless_a_speed_is_wanted() -> None:
    made = split(compare=True)
    assert made.expected is not None
    assert made.expected.at_work is not None
    ours = made.expected.kl / made.expected.at_work.speed
    others = [row for row in made.expected.beside if row.name.startswith("--speed")]
    assert len(others) > 1
    for row in others:
        assert row.speed is not None
        assert row.kl / row.speed >= ours
        wanted = float(row.name.split()[1])
        bounded = split(speed=wanted)
        assert bounded.expected is not None
        assert bounded.expected.at_work is not None
        assert (bounded.expected.nbytes, bounded.expected.kl) == (row.nbytes, row.kl)
        assert bounded.expected.at_work.speed == row.speed >= wanted
    for slow, fast in pairwise(sorted(others, key=lambda row: row.speed or 0)):
        assert slow.kl < fast.kl


def test_without_a_gpu_all_is_in_ram() -> None:
    made = split(Machine(ram=int(4.5e9)))
    assert made.expected is not None
    at_work = made.expected.at_work
    assert at_work is not None
    assert at_work.vram_bytes == 0
    assert made.nbytes < at_work.ram_bytes <= 4.5e9
    with pytest.raises(ExportError, match=r"--ram 953\.7 MiB: too small by .*; the smallest plan of this model needs "):
        split(Machine(ram=10**9))


def test_which_limit_is_too_narrow_is_told_and_what_would_do() -> None:
    for option, narrow, what in (
        ("fit", replace(MACHINE, vram=10**8), "with all experts in RAM needs"),
        ("ram", replace(MACHINE, ram=2 * 10**9), "beside that VRAM needs"),
    ):
        with pytest.raises(
            ExportError, match=rf"--{option} .*: too small by .*; the smallest plan of this model {what}"
        ) as refused:
            split(narrow)
        least = int(str(refused.value).split("(")[1].split()[0])
        field = "vram" if option == "fit" else "ram"
        split(replace(narrow, **{field: least}))
        with pytest.raises(ExportError):
            split(replace(narrow, **{field: least - 1}))
    dense = Architecture.from_config(DENSE)
    goal = Goal(name="test", machine=Machine(vram=10**8, ram=10**10), context=128)
    with pytest.raises(ExportError, match=r"plan of this model needs .*; without experts all of it lies on the GPU: give --ram"):
        planned(dense, sensitivity(dense), goal)
    with pytest.raises(ExportError, match=r"--speed 1e\+06: bandwidth allows the smallest plan of this model") as refused:
        split(speed=1e6)
    fastest = float(str(refused.value).split("model ")[1].split()[0])
    split(speed=fastest)
    with pytest.raises(ExportError):
        split(speed=fastest + 0.1)


def test_the_plan_of_a_machine_says_how_it_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (summary,) = xent_quant.plan(fit="370M", ram="3G", context=512, method="rtn", output=tmp_path)
    assert summary.expected is not None
    assert summary.expected.at_work is not None
    layers = summary.expected.at_work.cpu_layers
    moved, prompts = (f" --n-cpu-moe {layers}", " --cache-ram 0") if layers else ("", "")
    assert summary.command == f"llama-server -m xent-mini-fit370M-ram3G.gguf -ngl 99{moved} -c 512 -np 1{prompts}"
    show.plans([summary])
    shown = capsys.readouterr().out
    assert summary.command in shown
    assert "tokens/s" in shown
    (alone,) = xent_quant.plan(ram="3G", method="rtn")
    assert "-ngl 0" in alone.command
