"""Whole runs whose methods compute on a device: the same code on the CPU, and on a GPU that is none."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import xent_quant
from tests.conftest import random_weights, write_checkpoint
from tests.device.card import card
from tests.walk.conftest import CONFIG, Notes, export, tree
from xent_quant import linalg, pipeline
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.device import choice
from xent_quant.device.method import OnDevice
from xent_quant.errors import ConfigError, ExportError, Interrupted
from xent_quant.model.sizes import Room
from xent_quant.model.streaming import StreamingModel
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.walk import collecting, job, resources

CPU = torch.device("cpu")
FAST = {"effort": "fast", "threads": 1}


@pytest.fixture
def smaller(tmp_path: Path) -> Path:
    """One layer of three experts."""
    config = {**CONFIG, "num_hidden_layers": 1, "num_experts": 3, "moe_top_k": 1, "num_shared_experts": 1}
    return write_checkpoint(tmp_path / "Model", config, random_weights(config))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cuda` means the GPU that is none, which has 6 GiB."""
    monkeypatch.setattr(choice, "_count", lambda kind: int(kind == "cuda"))
    monkeypatch.setattr(choice, "free_bytes", lambda device: 6 * 2**30 if device.type == "cuda" else None)


def test_a_search_on_the_exact_stream_writes_the_kernels_files(smaller: Path, text: Any, tmp_path: Path) -> None:
    options = {"type": ["Q4_0", "IQ4_NL"], "formats": ["gguf", "onnx"], "method": "imatrix", **FAST, **text}
    export(smaller, tmp_path / "kernels", device="cpu", **options)
    export(smaller, tmp_path / "device", device="torch-cpu", **options)
    assert tree(tmp_path / "device") == tree(tmp_path / "kernels")


@pytest.mark.parametrize(
    "choices",
    [{"type": "Q4_0", "tensor_types": ["attn_q=F16"]}, {"type": "IQ3_XXS"}, {"formats": ["bnb"]}],
    ids=["codes", "points", "bitsandbytes"],
)
def test_nothing_of_a_whole_run_is_on_another_device(
    smaller: Path, text: Any, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]
) -> None:
    """By GPTQ, with a tensor that the device leaves to the CPU; what it computes is the CPU's."""
    monkeypatch.setattr(linalg, "FEWEST_COLUMNS", 1 << 30)  # products of both by the same library
    options = {**choices, "method": "gptq", **FAST, **text, "tokens": 40}
    for device, context in (("cuda", card()), ("torch-cpu", nullcontext())):
        with context:
            export(smaller, tmp_path / device, device=device, **options)
    assert tree(tmp_path / "cuda") == tree(tmp_path / "torch-cpu")


def divergence(checkpoint: Checkpoint, file: Path, windows: torch.Tensor) -> float:
    """Mean KL divergence of an export from its model."""
    said = []
    for source in (checkpoint, GGUFSource(GGUFFile(file), checkpoint.architecture)):
        running = StreamingModel(source)
        said.append(running.logits(running.hidden_states(windows)).double().log_softmax(-1))
    exact, ours = said
    return float((exact.exp() * (exact - ours)).sum(-1).mean())


def test_a_device_without_memory_is_told_and_the_run_goes_on(model: Path, text: Any, tmp_path: Path, monkeypatch) -> None:
    options = {"type": "Q4_0", "method": "imatrix", "device": "torch-cpu", **FAST, **text}
    quantize, calls = OnDevice.quantize_together, []

    def scarce(self: OnDevice, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 10:  # in the second layer
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return quantize(self, *arguments)

    monkeypatch.setattr(OnDevice, "quantize_together", scarce)
    with pytest.raises(ExportError, match=r"--device cpu: its memory ran out; .* --vram less"):
        export(model, tmp_path / "out", **options)
    assert export(model, tmp_path / "out", **options).resumed
    export(model, tmp_path / "whole", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_calibrating_tells_of_memory_that_ran_out(
    model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(collecting, "sums", scarce)
    with pytest.raises(ExportError, match=r"--device cpu: its memory ran out; .* --vram less"):
        xent_quant.calibrate(model, output=tmp_path / "out.gguf", device="torch-cpu", **text)


def test_a_run_that_goes_on_works_on_as_many_experts_as_before(
    model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Any
) -> None:
    """How many are one stack may decide last bits. Where memory is short by then it goes on with fewer, and says so."""
    options = {"type": "Q4_0", "method": "imatrix", "device": "torch-cpu", **FAST, **text}
    walk, used, notes = job.Walk, [], Notes()

    def watched(*arguments: Any) -> Any:
        used.append(arguments[-3].experts)
        return walk(*arguments)

    monkeypatch.setattr(job, "Walk", watched)
    for most, done in ((3, 2), (8, 3)):
        monkeypatch.setattr(resources, "EXPERTS_TOGETHER", most)
        interrupt(done)
        with pytest.raises(Interrupted):
            export(model, tmp_path / "out", progress=notes, **options)
    assert used == [3, 3]
    assert not any("less memory" in note for note in notes.said)
    planned = resources.vram
    monkeypatch.setattr(resources, "vram", lambda *each: planned(*each) + 2**40 * (each[-1].experts > 2))
    interrupt(None)
    assert export(model, tmp_path / "out", vram="1T", progress=notes, **options).resumed
    assert used == [3, 3, 2]
    assert any("less memory" in note for note in notes.said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q3_K_M", "IQ4_XS", "Q4_0", "IQ3_S", "IQ2_XS", "IQ1_M"])
def test_exports_are_as_near_to_the_model_as_the_kernels(tmp_path: Path, kind: str) -> None:
    config = {**CONFIG, "hidden_size": 256, "intermediate_size": 256, "num_experts": 9, "num_shared_experts": 1}
    model = write_checkpoint(tmp_path / "model", config, random_weights(config))
    windows = torch.randint(4, 300, (24, 32), generator=torch.Generator().manual_seed(1))
    found = {}
    for device in ("cpu", "torch-cpu"):
        (file,) = export(model, tmp_path / device, type=kind, tokens="8k", seqlen=64, device=device, threads=1).exports
        found[device] = divergence(Checkpoint.open(model), file, windows)
    assert found["torch-cpu"] < 1.05 * found["cpu"], found


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_count", lambda kind: 0)


def test_devices_that_are_not_there_are_refused(model: Path, text: Any, tmp_path: Path, no_gpu: None) -> None:
    for device in ("cuda", "cuda:1", "xpu", "mps"):
        with pytest.raises(ConfigError, match=rf"--device {device}: torch \S+ sees no {device}; use --device cpu"):
            export(model, tmp_path / "out", device=device, **text)
    for device in ("gpu", "cuda:", "cuda:x", "meta"):
        with pytest.raises(ConfigError, match=r"--device \S+: choose auto, cpu, cuda"):
            export(model, tmp_path / "out", device=device, **text)
    assert not (tmp_path / "out").exists()


def test_a_device_is_chosen_before_text_is_read(model: Path, tmp_path: Path, no_gpu: None) -> None:
    """Text that is not there is what would be told else."""
    options = {"output": tmp_path / "out.gguf", "calib": (str(tmp_path / "no.txt"),), "seqlen": 20}
    for call in (xent_quant.quantize, xent_quant.calibrate):
        with pytest.raises(ConfigError, match=r"--vram 8G: has no effect, since --device auto finds no GPU; drop it"):
            call(model, vram="8G", **options)
        with pytest.raises(ConfigError, match="--device cuda: torch"):
            call(model, device="cuda", **options)


def test_the_second_card_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_count", lambda kind: 2 * (kind == "cuda"))
    assert choice.choose("cuda:0") == (torch.device("cuda", 0),)
    assert choice.choose("cuda:1") == (torch.device("cuda", 1),)
    with pytest.raises(ConfigError, match=r"--device cuda:2: .* there is cuda:0, cuda:1"):
        choice.choose("cuda:2")
    assert choice.choose("cpu") == ()


def test_vram_is_kept_or_refused(model: Path, text: Any, tmp_path: Path, gpu: None) -> None:
    with pytest.raises(ConfigError, match=r"--vram 8\.00 GiB: only 6\.00 GiB are free on cuda:0"):
        export(model, tmp_path / "out", device="cuda", vram="8G", **text)
    with pytest.raises(ConfigError, match=r"--vram 1\.0 MiB: about \S+ \S+ are needed; use --device cpu"):
        export(model, tmp_path / "out", device="cuda", vram="1M", **text)
    with pytest.raises(ConfigError, match="--vram 8G: has no effect with --device cpu"):
        export(model, tmp_path / "out", device="cpu", vram="8G", **text)


def real_sizes(hidden: int = 2560, inner: int = 1728, **changes: Any) -> Architecture:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 32, "num_experts": 64, "moe_top_k": 6}
    return Architecture.from_config({**CONFIG, **sizes, "num_hidden_layers": 28, "vocab_size": 100534, **changes})


def test_eight_gigabytes_do_for_the_real_sizes() -> None:
    """Both models, one type: experts together, and fewer of them with less."""
    for model in (real_sizes(), real_sizes(3072, 2048)):
        chosen = {size: resources.device_room(model, 1, 512, CPU, size * 2**30) for size in (5, 7, 24)}
        assert 1 <= (chosen[5].experts or 0) <= (chosen[7].experts or 0) <= (chosen[24].experts or 0)
        assert (chosen[7].experts or 0) > 1
        for gigabytes, room in chosen.items():
            assert resources.vram(model, 1, 512, room) <= gigabytes * 2**30


def test_a_device_holds_slices_of_the_vocabulary_and_a_layer_of_each_stream() -> None:
    """Not only what stages of experts hold: weights, their transpose and codes; Σ x xᵀ and drift of a layer's tokens."""
    small = real_sizes(256, 32, vocab_size=4096)
    wide = real_sizes(256, 32, vocab_size=65536)
    assert resources.vram(wide, 0, 32, Room(0, 1)) > 8 * Checkpoint.SLICE + resources.vram(small, 0, 32, Room(0, 1))
    flat = real_sizes(4096, 32, vocab_size=4096)
    assert resources.vram(flat, 4, 32, Room(0, 8)) > 3 * 8 * 4096**2 + resources.vram(flat, 1, 32, Room(0, 8))


def test_ram_is_kept_beside_a_device() -> None:
    """Of torch-cpu, which is in it, fewer experts; a GPU leaves less to RAM than the CPU's kernels take."""
    model, gpu = real_sizes(), torch.device("cuda", 0)
    free = resources.device_room(model, 1, 512, CPU, None)
    for gigabytes in (4, 6):
        room = resources.device_room(model, 1, 512, CPU, None, memory=gigabytes * 2**30)
        assert (room.experts or 0) < (free.experts or 0)
        assert resources.vram(model, 1, 512, room) < resources.beside_device(model, 1, 512, room, CPU) <= gigabytes * 2**30
    with pytest.raises(ConfigError, match=r"--memory 2\.00 GiB: about \S+ GiB are needed"):
        resources.device_room(model, 1, 512, CPU, None, memory=2 * 2**30)
    assert resources.beside_device(model, 1, 512, free, gpu) < resources.vram(model, 1, 512, free)


def test_a_dry_run_counts_the_ram_beside_the_device(model: Path, text: Any, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And caps nothing."""
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *arguments: pytest.fail("capped"))
    taken = {device: pipeline.resources(model, device=device, vram="4G", **text)[0] for device in ("cuda", "torch-cpu")}
    assert taken["torch-cpu"].memory == taken["cuda"].memory + (taken["cuda"].vram or 0)
    with pytest.raises(ConfigError, match=r"--memory 500\.0 MiB: about"):
        pipeline.resources(model, device="torch-cpu", memory="500M", **text)


def test_a_limit_is_kept_for_the_run_and_counts_what_torch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    gpu = torch.device("cuda", 0)
    assert choice.free_bytes(gpu) == int(0.9 * 8 * 2**30)
    with choice.memory_of([gpu]):
        assert not fractions
    with choice.memory_of([gpu, torch.device("cuda", 1)], 3 * 2**30):
        assert fractions == [0.25, 0.25]
    assert fractions == [0.25, 0.25, 1.0, 1.0]
