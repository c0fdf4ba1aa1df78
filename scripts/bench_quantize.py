#!/usr/bin/env python3
"""Prints, per quant type, weights/s with importance and weighted squared error, ours against stock ggml, same threads.

    scripts/bench_quantize.py [--types Q4_K Q6_K] [--rows 512] [--columns 2560 1792] [--threads 1 2]

Both sides run in turn, the best of `--repeats`; stock ggml_quantize_chunk is single-threaded by design and is run on that
many Python threads over row ranges (it releases the interpreter lock), on fewer rows where it is slow. "of peak" is the
larger of two shares of what this machine reaches with as many threads, both measured here: float32 operations (those of the
search's passes over the weights, counted in `operations`; peak: independent multiplications and additions in registers),
and memory (4 bytes read and the packed bytes written per weight; peak: a copy of 256 MB). Ours stretches the scales of few bits,
as methods do (`formats/_gain.py`); errors are those of the search before it. Sources of the error columns:
the miniature's expert weights, Gaussian, and heavy-tailed with outlier columns; below stock is below 1.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np

from xent_quant import formats
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.compilation import jit
from xent_quant.formats._codebook import CodebookFormat
from xent_quant.formats._codes import AffineFormat, SearchedFormat, SymmetricFormat, rises
from xent_quant.formats._eights import EightsFormat, ShiftedFormat
from xent_quant.formats._lanes import WIDTH, load, store
from xent_quant.formats._vectors import VectorFormat
from xent_quant.formats.base import Effort, QuantFormat
from xent_quant.validation.llama_cpp import quantize_chunk


def best_of(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def error(kind: QuantFormat, weights: np.ndarray, packed: np.ndarray, importance: np.ndarray) -> float:
    return float((importance * np.square((weights - kind.dequantize(packed)).astype(np.float64))).sum())


def operations(kind: QuantFormat, effort: Effort) -> float:
    """float32 operations per weight of the passes that the search makes (a comparison with its choice counts as one)."""
    moments, encode = 10, 6
    if isinstance(kind, EightsFormat | ShiftedFormat):
        multiples, rounds = getattr(kind.efforts, effort)
        signs = 2 if isinstance(kind, ShiftedFormat) else 1
        rounded, pointed = 12, (80 + 36 + 2 * 81 + 3 * 81 + len(kind.points)) / 8
        moves = 3 * rounds * (pointed if len(multiples) else rounded)
        return signs * (len(kind.ladder) * rounded + len(multiples) * pointed) + moves + rounds * pointed
    if isinstance(kind, CodebookFormat):
        candidates, rounds = getattr(kind.efforts, effort)
        points, dim = kind.points.shape
        return (len(candidates) + 3 * rounds + 1) * points * (2 * dim + 4) / dim
    if not isinstance(kind, SearchedFormat):
        return 0.0
    candidates, rounds = getattr(kind.efforts, effort)
    nested = kind.block_size > kind.group_size
    if isinstance(kind, AffineFormat):
        return moments + encode + 11 * (len(candidates) + rounds * (6 if nested else 1))
    table = len(rises(kind.searched if isinstance(kind, SymmetricFormat) else kind.levels))
    one = 6 + 2 * table if table else 9
    return moments + encode + one * (len(candidates) + rounds * (3 if nested else 1))


@jit
def _arithmetic(x, count):  # type: ignore[no-untyped-def]
    """Eight independent chains of multiply and add."""
    a, b, c, d = load(x, 0), load(x, 1), load(x, 2), load(x, 3)
    e, f, g, h = load(x, 4), load(x, 5), load(x, 6), load(x, 7)
    scale, shift = load(x, 8), load(x, 9)
    for _ in range(count):
        a, b, c, d = a * scale + shift, b * scale + shift, c * scale + shift, d * scale + shift
        e, f, g, h = e * scale + shift, f * scale + shift, g * scale + shift, h * scale + shift
    store(x, 0, a + b + c + d + e + f + g + h)


def peaks(threads: int) -> tuple[float, float]:
    """float32 operations a second, and bytes a second read and written, over `threads` threads."""
    count = 1 << 18
    arrays = [np.full(10 * WIDTH, 0.5, np.float32) for _ in range(threads)]
    sources = [np.ones(1 << 27 >> 2, np.float32) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    with ThreadPoolExecutor(threads) as pool:

        def compute() -> None:
            list(pool.map(lambda array: _arithmetic(array, count), arrays))

        def copy() -> None:
            list(pool.map(lambda pair: np.copyto(*pair), zip(targets, sources, strict=True)))

        compute()
        copy()
        return threads * 16 * WIDTH * count / best_of(compute, 40), threads * 2 * sources[0].nbytes / best_of(copy, 10)


def stock_speed(kind: QuantFormat, weights: np.ndarray, importance: np.ndarray, threads: int, repeats: int) -> float:
    """Weights a second of ggml_quantize_chunk, on so many rows as take about half a second."""
    row_bytes = kind.row_bytes(weights.shape[1])
    quantize_chunk(kind.ggml_type, row_bytes, weights[:1], importance)  # makes its tables
    start = time.perf_counter()
    quantize_chunk(kind.ggml_type, row_bytes, weights[:4], importance)
    rows = int(0.5 * threads / (time.perf_counter() - start) * 4)
    weights = weights[: max(4 * threads, min(rows, len(weights)))]
    parts = np.array_split(weights, threads)
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            list(pool.map(lambda part: quantize_chunk(kind.ggml_type, row_bytes, part, importance), parts))

        return weights.size / best_of(run, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=[name for name in formats.NAMES if formats.get(name).block_size > 1])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, nargs="+", default=[2560, 1792])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--effort", default="normal", choices=["fast", "normal", "high"], help="for the speeds")
    parser.add_argument("--efforts", nargs="+", default=["fast", "normal", "high"], help="for the errors")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    speeds, errors = [], []
    random = np.random.default_rng(0)
    trained = Checkpoint.open(miniature()).read("model.layers.1.mlp.experts.3.gate_proj.weight")
    heavy = (random.standard_t(4, (256, 2560)) * 0.02).astype(np.float32)
    heavy[:, ::97] *= 8
    sources = {"miniature": trained, "gaussian": (random.standard_normal((256, 2560)) * 0.02).astype(np.float32), "heavy": heavy}

    limits = {threads: peaks(threads) for threads in options.threads}
    for threads, (arithmetic, memory) in limits.items():
        print(f"{threads} thread(s) reach {arithmetic / 1e9:.0f} G float32 operations/s and {memory / 1e9:.1f} GB/s")
    print(f"\n{'type':7} {'columns':>7} {'threads':>7} {'ours M/s':>9} {'stock M/s':>9} {'ratio':>6} {'of peak':>8}")
    for name in options.types:
        kind = formats.get(name)
        for columns in options.columns:
            weights = (random.standard_normal((options.rows, columns)) * 0.02).astype(np.float32)
            importance = random.exponential(size=columns).astype(np.float32)
            kind.unshrunk(kind.quantize(weights[:2], importance, effort=options.effort), weights[:2], importance)  # compiles
            for threads in options.threads:
                numba.set_num_threads(threads)
                theirs = stock_speed(kind, weights, importance, threads, options.repeats)

                def run(kind: QuantFormat = kind, weights: np.ndarray = weights, importance: np.ndarray = importance) -> None:
                    kind.unshrunk(kind.quantize(weights, importance, effort=options.effort), weights, importance)

                ours = weights.size / best_of(run, options.repeats)
                arithmetic, memory = limits[threads]
                compute = ours * operations(kind, options.effort) / arithmetic
                transfer = ours * (4 + kind.bits_per_weight / 8) / memory
                speeds.append(
                    {"type": name, "columns": columns, "threads": threads, "M weights/s": ours / 1e6, "stock": theirs / 1e6}
                )
                share = f"{max(compute, transfer):5.0%} {'a' if compute > transfer else 'm'}"
                print(
                    f"{name:7} {columns:7} {threads:7} {ours / 1e6:9.1f} {theirs / 1e6:9.2f} {ours / theirs:6.2f} {share:>8}",
                    flush=True,
                )
    print("\nWeighted squared error, ours / stock\n" + f"{'type':7} {'effort':7}" + "".join(f" {name:>10}" for name in sources))
    for name in options.types:
        kind = formats.get(name)
        slow = isinstance(kind, VectorFormat)
        parts = {key: weights[: 8 if slow else None] for key, weights in sources.items()}
        scales = {key: random.exponential(size=weights.shape[1]).astype(np.float32) for key, weights in parts.items()}
        theirs = {}
        for key, weights in parts.items():
            packed = quantize_chunk(kind.ggml_type, kind.row_bytes(weights.shape[1]), weights, scales[key])
            theirs[key] = error(kind, weights, packed, scales[key])
        for effort in options.efforts:
            ratios = {}
            for key, weights in parts.items():
                packed = kind.quantize(weights, scales[key], effort=effort)
                ratios[key] = error(kind, weights, packed, scales[key]) / theirs[key]
            errors.append({"type": name, "effort": effort, **ratios})
            print(f"{name:7} {effort:7}" + "".join(f" {ratio:10.4f}" for ratio in ratios.values()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"speeds": speeds, "errors, ours / stock": errors}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
