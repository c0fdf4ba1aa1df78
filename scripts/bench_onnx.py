#!/usr/bin/env python3
"""Latency of one decoder layer of XVERSE-Ent-A4.2B's shapes in stock ONNX Runtime on the CPU, by export setting.

    scripts/bench_onnx.py [--threads 2] [--repeats 40] [--past 128] [--folder DIR]

Every export is written with random weights (one expert's bytes stand for all, which changes no timing), loaded, and run for
1 and for 64 new tokens after `--past` cached ones. The vocabulary is cut to 512, so embedding and head do not count. For
comparison: the float32 products of the active experts alone, six for one token, as torch computes them with the
weights out of cache. DIR (default: a temporary folder) needs 1 GB, with --float 4.5 GB.
"""

import argparse
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch

from exporters.onnx.export import ONNXExporter
from exporters.onnx.plan import Settings, plan
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32, U8, QuantFormat
from xent_quant.methods.search import Search
from xent_quant.tensors import InputStatistics, TensorInfo
from xent_quant.validation.onnx_runtime import OnnxModel
from xent_quant.walk.job import run

CONFIG = {
    "model_type": "xverse",
    "hidden_size": 2560,
    "intermediate_size": 1728,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_experts": 64,
    "moe_top_k": 6,
    "num_shared_experts": 2,
    "rope_theta": 500000.0,
    "vocab_size": 512,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
SETTINGS = (
    Settings(),
    Settings(onnx_dtype="fp32"),
    Settings(symmetric=False),
    Settings(block_size=32),
    Settings(block_size=128),
    Settings(active_bits=4),
    Settings(active_bits=4, accuracy_level=0),
    Settings(active_bits=4, accuracy_level=0, onnx_dtype="fp32"),
    Settings(bits=8),
    Settings(bits=8, onnx_dtype="fp32"),
)
TOKENS = (1, 64)


class Repeated:
    """A Method that quantises the first weight of every shape and hands out its bytes for the others."""

    name = "repeated"
    needs_hessian = False

    def __init__(self) -> None:
        self._search, self._known = Search("fast"), {}

    def quantize(
        self, weights: F32, kind: QuantFormat, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        key = (kind.name, weights.shape)
        if key not in self._known:
            self._known[key] = self._search.quantize(weights, kind, statistics, name=name)
        return self._known[key]


class RandomCheckpoint(Checkpoint):
    """One weight of every shape; norms are ones."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        return weights_of(self.infos[name].shape)[start:stop]


@cache
def weights_of(shape: tuple[int, ...]) -> F32:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)


def write(settings: Settings, output: Path) -> tuple[Path, int]:
    """The export's folder and its bytes."""
    model, lent = Architecture.from_config(CONFIG), vars(Checkpoint.open(miniature()))  # lends tokenizer files
    infos = {name: TensorInfo(name, spec.shape, "F32") for name, spec in model.tensors().items()}
    checkpoint = RandomCheckpoint(**lent | {"architecture": model, "config": CONFIG, "infos": infos})
    exporter = ONNXExporter(checkpoint, plan(model, settings), output, "bench", Repeated())
    run(checkpoint, [exporter], output, force=True)
    return exporter.target, exporter.plan.data_bytes


def fastest_ms(call, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def layer(folder: Path, threads: int, past: int, repeats: int) -> list[float]:
    """Milliseconds of a call with 1 and with 64 new tokens."""
    model = OnnxModel(folder, threads=threads)
    random = np.random.default_rng(1)
    _, cache = model.run(random.integers(4, 512, (1, past)))
    return [
        fastest_ms(lambda count=count: model.run(random.integers(4, 512, (1, count)), cache=cache), repeats) for count in TOKENS
    ]


def float_experts(threads: int, repeats: int) -> list[float]:
    """The same of the active experts' float32 products alone: gate, up, down."""
    hidden, width, experts, top = (CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_experts", "moe_top_k"))
    held = [torch.randn(3 * width, hidden) for _ in range(16)]  # 850 MB, far beyond any cache
    torch.set_num_threads(threads)

    def products(tokens: int) -> None:
        active = min(experts, top * tokens)
        x = torch.ones(max(1, top * tokens // active), hidden)
        for index in range(active):
            both = x @ held[index % 16][: 2 * width].T
            both[:, :width] @ held[index % 16][2 * width :]

    with torch.inference_mode():
        return [fastest_ms(lambda count=count: products(count), max(3, repeats // 4)) for count in TOKENS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--float", action="store_true", help="also the float32 MoE operator (--bits 16)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="bench-onnx-"))
    chosen = (*SETTINGS, Settings(bits=16, onnx_dtype="fp32")) if arguments.float else SETTINGS
    print(f"{arguments.threads} threads, {arguments.past} cached tokens, fastest of {arguments.repeats}")
    print("| experts | others | zero points | block | computes in | accuracy level | MB | 1 token, ms | 64 tokens, ms a token |")
    print("|---|---|---|---|---|---|---|---|---|")
    try:
        for settings in chosen:
            path, nbytes = write(settings, folder)
            one, many = layer(path, arguments.threads, arguments.past, arguments.repeats)
            kind = "no" if settings.symmetric else "yes"
            print(
                f"| {settings.name} | {settings.active.name.split('_')[0]} | {kind} | {settings.block_size} "
                f"| {settings.onnx_dtype} | {settings.accuracy_level} | {nbytes / 1e6:.0f} | {one:.2f} | {many / 64:.2f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(folder / "onnx", ignore_errors=True)
    one, many = float_experts(arguments.threads, arguments.repeats)
    print(f"| float32 products of the active experts alone | | | | | | | {one:.2f} | {many / 64:.2f} |")


if __name__ == "__main__":
    main()
