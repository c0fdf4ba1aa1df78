"""Several devices that share a layer's routed experts: what one of them writes alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

import xent_quant
from calibration.moments import Moments
from tests.device.card import SECOND, card
from tests.walk.conftest import LAYERS, Notes, export, tree
from tests.walk.test_device import real_sizes
from xent_quant import linalg, pipeline
from xent_quant.device import choice
from xent_quant.errors import ConfigError, ExportError, Interrupted
from xent_quant.model.sizes import Room
from xent_quant.model.stages import ExpertIn, Pass
from xent_quant.walk import job, resources
from xent_quant.walk.work import Work

ONE, TWO, THREE = (",".join(["torch-cpu"] * count) for count in (1, 2, 3))
GPTQ = {"type": "Q4_0", "method": "gptq", "effort": "fast", "threads": 1}


@pytest.fixture(autouse=True)
def two_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer's six experts."""
    monkeypatch.setattr(resources, "EXPERTS_TOGETHER", 2)


@pytest.mark.parametrize(
    "options",
    [GPTQ, {**GPTQ, "formats": ["gguf", "onnx", "bnb"], "threads": 2}, {**GPTQ, "method": "imatrix"}],
    ids=["gptq", "all formats", "imatrix"],
)
def test_what_several_devices_write_is_what_one_writes(
    model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Each with its share of every layer's experts."""
    shares, run = [], Work.stages

    def watched(self: Work, stages: Any) -> None:
        every = list(stages)
        if isinstance(every[0][0], ExpertIn):
            shares.append((id(self.run), len(every)))
        run(self, every)

    noted: list[Any] = []
    monkeypatch.setattr(Work, "stages", watched)
    monkeypatch.setattr(job, "unmeasured_notes", lambda *arguments: noted.append(arguments) or ())
    notes, layers = Notes(), 0
    for device, count in ((ONE, 1), (TWO, 2), (THREE, 3)):
        shares.clear()
        export(model, tmp_path / device, device=device, progress=notes, **options, **text)
        layers = layers or len(shares)
        assert len(shares) == count * layers
        assert len({run for run, _ in shares}) >= count
        assert sum(stages for _, stages in shares) == 6 * layers  # three pairs of experts, two stages each
        assert tree(tmp_path / device) == tree(tmp_path / ONE)
    third = len(noted) // 3
    assert noted[0][1]  # of how many weights statistics are known
    assert noted[third : 2 * third] == noted[2 * third :] == noted[:third]
    assert [note for note in notes.said if "share" in note] == [
        "cpu, cpu share each layer's experts.",
        "cpu, cpu, cpu share each layer's experts.",
    ]


def test_rare_experts_are_made_up_on_every_device(
    model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their layer's rows, which only the first has measured."""
    moved, on = [], Moments.on
    monkeypatch.setattr(Moments, "on", lambda self, device: moved.append(self.rows) or on(self, device))
    few = {**text, "tokens": 40}
    for device in (ONE, TWO):
        export(model, tmp_path / device, device=device, **GPTQ, **few)
    assert moved
    assert all(moved)
    assert tree(tmp_path / TWO) == tree(tmp_path / ONE)


def test_nothing_of_a_run_is_on_the_other_card(model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both compute is what the CPU does alone."""
    monkeypatch.setattr(linalg, "FEWEST_COLUMNS", 1 << 30)  # products of all by the same library
    monkeypatch.setattr(choice, "_count", lambda kind: 2 * (kind == "cuda"))
    monkeypatch.setattr(choice, "_name", lambda device: "a card")
    monkeypatch.setattr(choice, "free_bytes", lambda device: 6 * 2**30 if device.type == "cuda" else None)
    options = {**GPTQ, **text, "tokens": 40}
    used, on = [], Pass.on
    monkeypatch.setattr(Pass, "on", lambda self, device: used.append(device) or on(self, device))
    with card():
        export(model, tmp_path / "two", device="cuda", **options)
        xent_quant.calibrate(model, output=tmp_path / "two.gguf", device="cuda", **text)
    assert used == [SECOND] * len(used)
    assert len(used) == 2 * LAYERS
    export(model, tmp_path / "one", device=ONE, **options)
    xent_quant.calibrate(model, output=tmp_path / "one.gguf", device=ONE, **text)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_statistics_of_several_devices_are_those_of_one(
    model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, on = set(), Pass.on

    def moved(self: Pass, device: torch.device) -> Pass:
        used.add(device)
        return on(self, device)

    monkeypatch.setattr(Pass, "on", moved)
    for device in (ONE, TWO):
        assert not used
        xent_quant.calibrate(model, output=tmp_path / f"{device}.gguf", device=device, **text)
    assert used
    assert (tmp_path / f"{TWO}.gguf").read_bytes() == (tmp_path / f"{ONE}.gguf").read_bytes()


@pytest.mark.parametrize(("first", "then"), [(ONE, THREE), (TWO, ONE)])
def test_a_run_goes_on_with_more_or_fewer_devices(
    model: Path, text: Any, tmp_path: Path, interrupt: Any, first: str, then: str
) -> None:
    interrupt(2)
    with pytest.raises(Interrupted):
        export(model, tmp_path / "out", device=first, **GPTQ, **text)
    interrupt(None)
    assert export(model, tmp_path / "out", device=then, **GPTQ, **text).resumed
    export(model, tmp_path / "whole", device=ONE, **GPTQ, **text)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("first", [True, False], ids=["the first", "another"])
def test_one_of_several_without_memory_ends_the_run_which_goes_on(
    model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """In the second layer. The others do not wait for it."""
    step, own, calls = Work._stage, [], []

    def scarce(self: Work, stages: Any, exact: Any) -> None:
        own.append(self.run)
        if isinstance(stages[0], ExpertIn) and (self.run is own[0]) == first:
            calls.append(stages[0].mlp.layer)
            if calls.count(1) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        step(self, stages, exact)

    monkeypatch.setattr(Work, "_stage", scarce)
    with pytest.raises(ExportError, match=r"--device cpu,cpu: its memory ran out; .* --vram less"):
        export(model, tmp_path / "out", device=TWO, **GPTQ, **text)
    assert export(model, tmp_path / "out", device=TWO, **GPTQ, **text).resumed
    export(model, tmp_path / "whole", device=ONE, **GPTQ, **text)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_cards_like_the_first_are_used_or_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["RTX 3090", "GT 1030", "RTX 3090"]
    monkeypatch.setattr(choice, "_count", lambda kind: 3 * (kind == "cuda"))
    monkeypatch.setattr(choice, "_name", lambda device: names[device.index])
    cards = [torch.device("cuda", number) for number in range(3)]
    assert choice.choose("auto") == choice.choose("cuda") == (cards[0], cards[2])
    assert choice.choose("cuda:1") == (cards[1],)
    assert choice.choose("cuda:1,cuda:0") == (cards[1], cards[0])
    for name in ("cuda:0,cuda:0", "cuda,cuda:2", "cuda:0,torch-cpu"):
        with pytest.raises(ConfigError, match=rf"--device {name}: name devices of one kind, each once"):
            choice.choose(name)
    with pytest.raises(ConfigError, match=r"--device cuda:0,cuda:3: torch \S+ sees no cuda:3; there is cuda:0, cuda:1, cuda:2"):
        choice.choose("cuda:0,cuda:3")


def test_a_card_that_is_full_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one for which there is no RAM; what the first one holds is the same."""
    model, gibibytes = real_sizes(), [20, 2, 20, 20]
    cards = [torch.device("cuda", number) for number in range(4)]
    monkeypatch.setattr(choice, "free_bytes", lambda device: gibibytes[device.index] * 2**30)
    room, notes = Room(0, 8), Notes()
    assert resources.helping(model, 1, 512, room, cards, notes) == (cards[2], cards[3])
    assert notes.said[0].startswith("cuda:1 takes no part: ")
    assert notes.said[0].endswith("of its memory are needed, 2.00 GiB are free.")
    assert notes.said[1:] == ["cuda:0, cuda:2, cuda:3 share each layer's experts."]
    least = resources.beside_device(model, 1, 512, room, cards[0], 2)
    assert resources.beside_device(model, 1, 512, room, cards[0]) < least
    assert resources.helping(model, 1, 512, room, cards, notes, memory=least) == (cards[2],)
    assert notes.said[-2].startswith("cuda:3 takes no part: about ")
    few = real_sizes(num_experts=16)
    assert resources.helping(few, 1, 512, Room(0, 16), cards[::2], notes) == ()
    assert notes.said[-1] == "cuda:2 takes no part: there are no more stacks of a layer's experts than devices before it."
    assert resources.helping(few, 1, 512, Room(0, 16), cards[::2], notes, stacks=False) == (cards[2],)
    assert resources.helping(few, 1, 512, room, cards, notes) == (
        cards[2],
    )  # the second is full, for the fourth there is no stack

    def busy(device: torch.device) -> int:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(choice, "free_bytes", busy)
    assert resources.helping(model, 1, 512, room, cards[:2], notes) == ()
    assert notes.said[-1] == "cuda:1 takes no part: CUDA error: out of memory"
    dense = real_sizes(num_experts=0, moe_top_k=0, num_shared_experts=0)
    assert resources.helping(dense, 1, 512, room, cards, notes) == ()


def test_a_dry_run_tells_of_all_devices(model: Path, text: Any) -> None:
    taken = {device: pipeline.resources(model, device=device, **text)[0] for device in (ONE, THREE)}
    assert (taken[ONE].devices, taken[THREE].devices) == (1, 3)
    assert taken[THREE].vram == taken[ONE].vram
    assert taken[THREE].memory >= taken[ONE].memory + 2 * (taken[ONE].vram or 0)


@pytest.mark.slow
def test_two_devices_write_the_miniature_as_one(tmp_path: Path) -> None:
    """Its products are large enough for torch to cut them by threads."""
    for device in (ONE, TWO):
        xent_quant.quantize(None, output=tmp_path / device, device=device, type="Q4_K_M", tokens="2k", threads=2)
    assert tree(tmp_path / TWO) == tree(tmp_path / ONE)
