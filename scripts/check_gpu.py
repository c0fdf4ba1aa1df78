#!/usr/bin/env python3
"""Prints what a device makes of this project: parity with the CPU's kernels, seconds by phase, memory, exports that run there.

    scripts/check_gpu [--device cuda] [--tokens 32k] [--experts 8] [--type Q4_K] [--json FILE]
    scripts/check_gpu --device cpu          the same code without a GPU, at small sizes

parity: for every type that is searched for on the device, the share of rows that get the kernels' bytes by the search and by
GPTQ, and the error e H eᵀ over the kernels'; millions of weights a second by the search, from the device to bytes. layer: the
weights of one layer of XVERSE-Ent-A4.2B's shapes on random rows, of which as many experts as are named are worked on together and
counted for all 64, without attention, norms, routing and files of states; on CUDA the peak of memory, beside the plan for a walk.
end to end: the bundled miniature by the device and by the kernels, each once, with their KL divergence from the model, and on
CUDA the peak of memory beside the plan. exports: ONNX on the CUDA provider (fp16, bf16) and by onnxruntime-genai, bitsandbytes
on CUDA: logits beside the CPU's, tokens a second. What is not installed is said and left out. Ends with 1 where a part failed;
the others are shown.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.correction import Correction, Regression
from calibration.moments import Moments
from xent_quant import formats, pipeline
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import miniature
from xent_quant.device import method as methods
from xent_quant.device.choice import ON_CPU, choose
from xent_quant.device.method import Job, OnDevice
from xent_quant.errors import ConfigError
from xent_quant.formats.base import QuantFormat
from xent_quant.formats.int_group import int_group
from xent_quant.linalg import linear
from xent_quant.methods import METHODS
from xent_quant.model.sizes import DEVICE_PART_TOKENS
from xent_quant.model.stages import Batch
from xent_quant.options import CalibrationOptions
from xent_quant.progress import Silent
from xent_quant.tensors import InputStatistics
from xent_quant.units import human_bytes, human_seconds
from xent_quant.validation.onnx_runtime import OnnxModel, generate
from xent_quant.walk import resources

A42B = {
    "model_type": "xverse", "architectures": ["XverseForCausalLM"], "hidden_size": 2560, "intermediate_size": 1728,
    "num_hidden_layers": 28, "num_attention_heads": 32, "num_experts": 64, "moe_top_k": 6, "num_shared_experts": 2,
    "vocab_size": 100534, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_experts": 8, "moe_top_k": 2}
"""Instead, where there is no GPU."""
HELD_OUT = 32
"""One row in so many."""


class Clock:
    """Seconds by phase, each begun and ended with an idle device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent = device, dict[str, float]()

    def wait(self) -> None:
        if self.device.type == "mps":
            torch.mps.synchronize()
        elif self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)

    @contextmanager
    def phase(self, name: str, factor: float = 1.0) -> Iterator[None]:
        self.wait()
        begun = time.perf_counter()
        yield
        self.wait()
        self.spent[name] = self.spent.get(name, 0.0) + factor * (time.perf_counter() - begun)


def inputs(rows: int, columns: int, seed: int) -> np.ndarray:
    """[rows, columns] float32 whose columns hang together and have very different energies, as hidden states."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((columns, columns)) * np.geomspace(1, 0.02, columns)[:, None]
    return (random.standard_normal((rows, columns)) @ mixing).astype(np.float32)


def parity(device: torch.device, small: bool) -> dict[str, dict[str, float]]:
    """Of every type by the search and by GPTQ: the share of rows with the kernels' bytes, and the error over theirs."""
    rows, columns = (16, 256) if small else (128, 1024)
    weights = (np.random.default_rng(1).standard_normal((rows, columns)) * 0.02).astype(np.float32)
    seen = inputs(5 * columns, columns, 2)
    known = InputStatistics(
        np.square(seen[:-256]).mean(0), seen[:-256].T @ seen[:-256] / len(seen[:-256]), len(seen), seen[-256:]
    )
    assert known.curvature is not None
    kinds = [formats.get(name) for name in formats.NAMES if OnDevice.here(formats.get(name))]
    kinds += [int_group(bits, 64, symmetric, "F16") for bits in (4, 8) for symmetric in (True, False)]
    many = torch.randn(rows * (1 if small else 32), columns, device=device) * 0.02
    found = {}
    for kind in kinds:
        assert isinstance(kind, QuantFormat)
        said: dict[str, float] = {}
        for name in ("imatrix", "gptq"):
            method = METHODS[name]("normal")
            theirs = method.quantize(weights, kind, known, name="parity")
            ours = OnDevice(method, device).quantize(weights, kind, known, name="parity")
            said[f"{name}: same rows"] = float((theirs == ours).all(1).mean())
            errors = [
                float(((error @ known.curvature.hessian) * error).sum())
                for error in (weights - kind.dequantize(packed).astype(np.float64) for packed in (ours, theirs))
            ]
            said[f"{name}: error ratio"] = errors[0] / errors[1]
        clock, method = Clock(device), OnDevice(METHODS["imatrix"]("normal"), device)
        method.quantize_together([Job("warm", many)], kind)
        with clock.phase("search"):
            method.quantize_together([Job("search", many)], kind)
        found[kind.name] = {**said, "M weights/s to bytes": many.numel() / clock.spent["search"] / 1e6}
    return found


SHARED_IN, EXPERTS_IN = 2, 4
"""Places in a layer's work of what reads the same states: the shared experts' gate and up, and the routed ones'."""


def stage(
    device: torch.device,
    clock: Clock,
    shapes: list[tuple[int, int]],
    rows: int,
    experts: int,
    kind: QuantFormat,
    factor: float,
    drifted: Regression[torch.Tensor] | None = None,
) -> Correction[torch.Tensor] | None:
    """Weights [out, in] that read the same rows, of `experts` experts together: measured, corrected (by what `drifted` in their
    layer, where it is given), rounded, multiplied; the seconds count `factor` times. Gives the last one's own correction."""
    correction = None
    method, columns = OnDevice(METHODS["gptq"]("normal"), device), shapes[0][1]
    jobs, mixing = [], torch.randn(columns, columns, device=device) * torch.logspace(0, -1.5, columns, device=device)[:, None]
    for number in range(experts):
        # In memory, as a walk's rows are in files: on the device there is a part of them at a time.
        moments, parts, numbers = (
            Moments(columns, True, device),
            [],
            torch.split(torch.arange(rows, device=device), DEVICE_PART_TOKENS),
        )
        for part in numbers:
            exact = torch.randn(len(part), columns, device=device) @ mixing
            parts.append((exact.cpu(), (exact + 0.03 * exact.std() * torch.randn_like(exact)).cpu()))
        del exact
        memory = [torch.randn(shape) * 0.02 for shape in shapes]
        with clock.phase("upload of weights", factor):
            weights = [(each.pin_memory() if device.type == "cuda" else each).to(device) for each in memory]
        with clock.phase("statistics", factor):
            for part, states in zip(numbers, parts, strict=True):
                exact, inputs = (each.to(device) for each in states)
                moments.add(Batch(inputs, part, exact=None if drifted else exact), part % HELD_OUT == 0)
            statistics = moments.statistics()
        with clock.phase("factorisation", factor):
            assert statistics is not None
            assert statistics.curvature is not None
            statistics.curvature.solve(torch.zeros(1, columns, device=device))
        with clock.phase("correction", factor):
            correction = moments.correction(statistics)
            moving = drifted or correction
            assert moving is not None
            for weight in weights:
                moved, pull = moving.moved(0, weight)
                jobs.append(Job(f"{number}", moved, statistics, pull))
        with clock.phase("products with the weights", factor):
            for states in parts:
                for each in states:
                    there = each.to(device)
                    for weight in weights:
                        linear(there, weight)
        del exact, inputs, moments, there
    with clock.phase("rounding and packing", factor):
        method.quantize_together(jobs, kind)
    return correction


def layer(device: torch.device, options: argparse.Namespace, small: bool) -> dict[str, Any]:
    """Seconds of one layer by phase, memory, and what a whole model would take."""
    model = Architecture.from_config({**A42B, **(SMALL if small else {})})
    tokens = CalibrationOptions(tokens=options.tokens).n_tokens
    hidden, inner, shared = model.hidden_size, model.intermediate_size, model.shared_size
    experts = min(options.experts, model.num_experts or 1)
    kind, clock = formats.get(options.type), Clock(device)
    assert isinstance(kind, QuantFormat)
    wide = inner + -inner % kind.block_size, shared + -shared % kind.block_size  # padded, as in a file
    each = max(1, tokens * model.experts_per_token // (model.num_experts or 1))
    work = [
        ([(hidden, hidden)] * 3, tokens, 1, 1.0),
        ([(hidden, hidden)], tokens, 1, 1.0),
        ([(wide[1], hidden)] * 2, tokens, 1, 1.0),
        ([(hidden, wide[1])], tokens, 1, 1.0),
        ([(wide[0], hidden)] * 2, each, experts, (model.num_experts or 1) / experts),
        ([(hidden, wide[0])], each, experts, (model.num_experts or 1) / experts),
    ]
    stage(device, Clock(device), [(hidden, hidden)], min(tokens, 2048), 1, kind, 1.0)  # libraries load, memory is taken
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    packing: list[float] = []
    plain = methods._pack

    def pack(*arguments: Any) -> None:
        begun = time.perf_counter()
        plain(*arguments)
        packing.append(time.perf_counter() - begun)

    methods._pack = pack
    try:
        made: list[Correction[torch.Tensor] | None] = []
        for shapes, rows, together, factor in work:
            known = made[SHARED_IN] if len(made) == EXPERTS_IN else None
            made.append(stage(device, clock, shapes, rows, together, kind, factor, known and Regression.of(known)))
    finally:
        methods._pack = plain
    seconds = sum(clock.spent.values())
    room = resources.Room(experts=experts)
    return {
        "shapes": f"hidden {hidden}, experts {model.num_experts} × {inner}, shared {shared}",
        "tokens": tokens,
        "experts together": experts,
        "seconds": {name: spent for name, spent in clock.spent.items() if spent},
        "seconds of threads that pack (of the experts that were run)": sum(packing),
        "seconds a layer": seconds,
        "peak of device memory, of one stream's weights": peak(device),
        "memory planned for a walk with two streams": resources.vram(model, 1, 512, room),
        f"{model.num_layers} layers, of this alone": seconds * model.num_layers,
    }


def peak(device: torch.device) -> int | None:
    """Bytes that torch gave out at most since it was last told to count anew."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def end_to_end(name: str, small: bool) -> dict[str, dict[str, Any]]:
    """The miniature by the device and by the kernels."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as room:
        for device in (name, "cpu"):
            options: dict[str, Any] = {"type": "Q4_K_M", "tokens": "2k" if small else "32k", "device": device}
            counted = next(iter(choose(device)), None)
            if counted is not None and counted.type == "cuda":
                torch.cuda.reset_peak_memory_stats(counted)
            done = pipeline.quantize(None, output=Path(room) / str(len(found)), **options)
            taken = None if counted is None else peak(counted)
            report = pipeline.validate(
                done.exports[0], miniature(), runtime="torch", suites=("XfictionEN",), max_tokens=1024 if small else 20480
            )
            kl = report.suites[0].kl.value
            found[device] = {"seconds of the walk": done.walk_seconds, "KL": kl.value, "standard error": kl.error}
            if taken is not None:
                planned = pipeline.resources(None, output=Path(room) / "plan", **options)[0].vram
                found[device] |= {"peak of memory": human_bytes(taken), "planned": human_bytes(planned or 0)}
    return found


class _Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def several(name: str) -> dict[str, Any]:
    """The miniature by one device, and by all cards like it (the CPU twice), which share its experts."""
    first, *others = choose(name)
    if first.type != "cpu" and not others:
        return {"left out": "there is one card of this kind"}
    every = ",".join(map(str, (first, *others))) if others else f"{name},{name}"
    files, seconds, notes = [], {}, _Notes()
    with tempfile.TemporaryDirectory() as room:
        for device in (every.partition(",")[0], every):
            output = Path(room) / str(len(files))
            done = pipeline.quantize(None, output=output, type="Q4_K_M", tokens="2k", device=device, progress=notes)
            seconds[device] = done.walk_seconds
            files.append(done.exports[0].read_bytes())
    who = [note for note in notes.said if "share each" in note or "takes no part" in note]
    if not any("share each" in note for note in who):
        return {"left out": "; ".join(who)}
    if files[0] != files[1]:
        raise AssertionError(f"{every} writes other bytes than {first}")
    return {"seconds of the walk": seconds, "bytes": "the same", "who": "; ".join(who)}


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    return {
        "largest difference of logits": float(np.abs(ours - theirs).max()),
        "same likeliest token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def onnx(device: torch.device, dtype: str) -> dict[str, Any]:
    """An export of the miniature on the provider of the device beside the CPU's in float32."""
    import onnxruntime

    wanted = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        return {"left out": f"onnxruntime {onnxruntime.__version__} has no {wanted}"}
    if dtype == "bf16" and device.type != "cuda":
        return {"left out": "bf16 is for GPUs only"}
    with tempfile.TemporaryDirectory() as room:
        folders = {}
        for kind in (dtype, "fp32"):
            made = pipeline.quantize(None, output=Path(room) / kind, formats=("onnx",), method="rtn", onnx_dtype=kind)
            folders[kind] = made.exports[0]
        reference = OnnxModel(folders["fp32"])
        ids = reference.tokenize("The night is long, and the rain sings in the thin wind. " * 12)[:128]
        model = OnnxModel(folders[dtype], providers=dict.fromkeys((wanted, "CPUExecutionProvider")))
        used = model.session.get_providers()[0]
        found: dict[str, Any] = {"first provider that loaded": used, **_agreement(model.logits(ids), reference.logits(ids))}
        begun = time.perf_counter()
        model.logits(ids)
        found["prompt tokens/s"] = len(ids) / (time.perf_counter() - begun)
        begun = time.perf_counter()
        made_tokens = generate(folders[dtype], ids, 32, "cuda" if device.type == "cuda" else None)
        found["genai tokens/s, loading and prompt among them"] = len(made_tokens) / (time.perf_counter() - begun)
        return found


def bitsandbytes(device: torch.device) -> dict[str, Any]:
    """An NF4 export of the miniature in transformers on the device, beside the CPU."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as room:
        folder = pipeline.quantize(None, output=Path(room), formats=("bnb",)).exports[0]
        ids = torch.arange(5, 133)[None]
        said, clock = [], Clock(device)
        for place in ("cpu", str(device)):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=place).eval()
            with torch.inference_mode():
                model(ids.to(model.device))
                clock.wait()
                begun = time.perf_counter()
                said.append(model(ids.to(model.device)).logits[0].float().cpu().numpy())
                seconds = time.perf_counter() - begun
        return {**_agreement(said[1], said[0]), "prompt tokens/s": ids.numel() / seconds}


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(title: str, found: dict[str, Any]) -> None:
    """Rows of figures; rows of as many figures each as a table."""
    print(f"\n{title}", flush=True)
    if all(isinstance(value, dict) for value in found.values()) and len(found) > 2:
        heads = list(dict.fromkeys(key for value in found.values() for key in value))
        print(" " * 18 + "".join(f"{head:>24}" for head in heads))
        for name, value in found.items():
            print(f"  {name:16}" + "".join(f"{shown(value[head]):>24}" for head in heads), flush=True)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {shown(each)}" for key, each in value.items())
        elif isinstance(value, int) and "memory" in name:
            value = human_bytes(value)
        elif isinstance(value, float) and "layers" in name:
            value = human_seconds(value)
        print(f"  {name}: {shown(value)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, xpu, mps; cpu: the same code without one")
    parser.add_argument("--tokens", help="of the layer; default: 32k, or 2k at small sizes")
    parser.add_argument("--experts", type=int, default=8, help="worked on together")
    parser.add_argument("--type", default="Q4_K", help="of the layer's weights")
    parser.add_argument("--real-sizes", action="store_true", help="A4.2B's sizes on the CPU too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    name = ON_CPU if options.device == "cpu" else options.device
    try:
        devices = choose(name)
    except ConfigError as error:
        sys.exit(f"check_gpu: {error}")
    device = devices[0]
    small = device.type == "cpu" and not options.real_sizes
    options.tokens = options.tokens or ("2k" if small else "32k")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    found: dict[str, Any] = {"device": card, "torch": torch.__version__, "small sizes": small}
    show("device", found)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "parity with the CPU's kernels": partial(parity, device, small),
        "one layer": partial(layer, device, options, small),
        "the miniature, end to end": partial(end_to_end, name, small),
        "the miniature, by several devices": partial(several, name),
        "ONNX, fp16": partial(onnx, device, "fp16"),
        "ONNX, bf16": partial(onnx, device, "bf16"),
        "bitsandbytes, NF4": partial(bitsandbytes, device),
    }
    failed = []
    for title, part in parts.items():
        begun = time.perf_counter()
        try:
            found[title] = part()
        except ImportError as error:
            found[title] = {"left out": str(error)}
        except Exception:  # each part is on its own: the table shows the others
            traceback.print_exc()
            failed.append(title)
            continue
        show(f"{title} ({time.perf_counter() - begun:.0f} s)", found[title])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
