#!/usr/bin/env python3
"""Prints, per quant type, weights/s with importance and weighted squared error, ours against stock ggml, same threads.

    scripts/bench_quantize.py [--types Q4_K Q6_K] [--rows 512] [--columns 2560 1792] [--threads 1 2]

Both sides run in turn, best of three; stock ggml_quantize_chunk is single-threaded by design and is run on that many
Python threads over row ranges (it releases the interpreter lock). Sources of the error columns: the miniature's
expert weights, Gaussian, and heavy-tailed with outlier columns.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from xent_quant import formats
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import QuantFormat
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=[name for name in formats.NAMES if formats.get(name).block_size > 1])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, nargs="+", default=[2560, 1792])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--effort", default="normal", choices=["fast", "normal", "high"])
    options = parser.parse_args()
    random = np.random.default_rng(0)
    trained = Checkpoint.open(miniature()).read("model.layers.1.mlp.experts.3.gate_proj.weight")
    heavy = (random.standard_t(4, (256, 2560)) * 0.02).astype(np.float32)
    heavy[:, ::97] *= 8
    sources = {"miniature": trained, "gaussian": (random.standard_normal((256, 2560)) * 0.02).astype(np.float32), "heavy": heavy}

    print(f"{'type':6} {'columns':>7} {'threads':>7} {'ours M/s':>9} {'stock M/s':>9} {'ratio':>6}")
    for name in options.types:
        kind = formats.get(name)
        for columns in options.columns:
            weights = (random.standard_normal((options.rows, columns)) * 0.02).astype(np.float32)
            importance = random.exponential(size=columns).astype(np.float32)
            kind.quantize(weights[:2], importance, effort=options.effort)  # compiles
            for threads in options.threads:
                numba.set_num_threads(threads)
                with ThreadPoolExecutor(threads) as pool:
                    parts = np.array_split(weights, threads)
                    row_bytes, number = kind.row_bytes(columns), kind.ggml_type

                    def stock(
                        pool: ThreadPoolExecutor = pool,
                        parts: list = parts,
                        args: tuple = (number, row_bytes),
                        imp: np.ndarray = importance,
                    ) -> None:
                        list(pool.map(lambda part: quantize_chunk(*args, part, imp), parts))

                    theirs = weights.size / best_of(stock) / 1e6
                ours = (
                    weights.size / best_of(lambda k=kind, w=weights, i=importance: k.quantize(w, i, effort=options.effort)) / 1e6
                )
                print(f"{name:6} {columns:7} {threads:7} {ours:9.1f} {theirs:9.1f} {ours / theirs:6.2f}")
    print(f"\nWeighted squared error, ours / stock\n{'type':6} " + " ".join(f"{source:>10}" for source in sources))
    for name in options.types:
        kind = formats.get(name)
        cells = []
        for weights in sources.values():
            importance = random.exponential(size=weights.shape[1]).astype(np.float32)
            ours = error(kind, weights, kind.quantize(weights, importance, effort=options.effort), importance)
            theirs = error(
                kind, weights, quantize_chunk(kind.ggml_type, kind.row_bytes(weights.shape[1]), weights, importance), importance
            )
            cells.append(f"{ours / theirs:10.4f}")
        print(f"{name:6} " + " ".join(cells))


if __name__ == "__main__":
    main()
