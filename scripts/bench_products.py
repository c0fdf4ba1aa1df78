#!/usr/bin/env python3
"""Prints how fast one thread multiplies in float32: torch's own product beside that of xent_quant.linalg, which runs of text use.

    scripts/bench_products.py [--seconds 1]

Shapes are those of XVERSE-Ent-A4.2B: gate (2,560 to 1,728 columns), down (the other way) and attention, for the rows that a rare
expert, an expert and a dense weight get at a time; then, where the processor has bfloat16, float32 rows by weights in that; the
last lines are a Hessian's sum over 2,048 rows and what solves as many by its factors, their making left out of torch's. The
figure is the best of as many repetitions as fit into so many seconds, GFLOP/s. ONEDNN_MAX_CPU_ISA=AVX2 shows a processor without
AVX-512.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F

from calibration.moments import Moments
from xent_quant.linalg import Curvature, linear, multiplies_bfloat16, root
from xent_quant.model.stages import Batch


def rate(work: Callable[[], object], operations: int, seconds: float) -> float:
    """GFLOP/s at best."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        work()
        best = min(best, time.perf_counter() - begun)
    return operations / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    seconds, found = options.seconds, []
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread, GFLOP/s")
    print(f"{'rows':>6} {'in':>6} {'out':>6} {'torch':>7} {'ours':>7} {'ratio':>6}")
    kinds = (torch.float32, torch.bfloat16) if multiplies_bfloat16() else (torch.float32,)
    for kind, rows in product(kinds, (16, 384, 2048)):
        for columns, out in ((2560, 1728), (1728, 2560), (2560, 2560)):
            x, weight = torch.randn(rows, columns), torch.randn(out, columns)
            operations = 2 * rows * columns * out
            theirs = rate(lambda x=x, weight=weight: F.linear(x, weight), operations, seconds)  # type: ignore[misc]
            weight = weight.to(kind)
            ours = rate(lambda x=x, weight=weight: linear(x, weight), operations, seconds)  # type: ignore[misc]
            label = str(kind).removeprefix("torch.")
            found.append({"rows": rows, "in": columns, "out": out, "by": label, "torch GFLOP/s": theirs, "GFLOP/s": ours})
            print(f"{rows:>6} {columns:>6} {out:>6} {theirs:>7.0f} {ours:>7.0f} {ours / theirs:>6.2f}  {label}", flush=True)
    rows = torch.randn(2048, 2560)
    batch, operations = Batch(rows, torch.arange(2048)), 2048 * 2560**2  # half of it: the rest is mirrored
    theirs = rate(lambda: rows.T @ rows, 2 * operations, seconds) / 2
    ours = rate(lambda: Moments(2560, True).add(batch), operations, seconds)
    found.append({"rows": 2048, "in": 2560, "out": "sum of x xᵀ", "torch GFLOP/s": theirs, "GFLOP/s": ours})
    print(f"sum of x xᵀ over 2,048 rows of 2,560: {theirs:.0f} of what is needed, ours {ours:.0f}, {ours / theirs:.2f}")
    known = Curvature(rows.T.numpy() @ rows.numpy() / np.float32(2048))
    upper = torch.from_numpy(root(known.hessian))
    operations = 2 * 2048 * 2560**2

    def solved() -> torch.Tensor:
        half = torch.linalg.solve_triangular(upper.T, rows, upper=False, left=False)
        return torch.linalg.solve_triangular(upper, half, upper=True, left=False)

    theirs, ours = rate(solved, operations, seconds), rate(lambda: known.solve(rows.numpy()), operations, seconds)
    found.append({"rows": 2048, "in": 2560, "out": "x (H + λ)⁻¹", "torch GFLOP/s": theirs, "GFLOP/s": ours})
    print(f"x (H + λ)⁻¹ of 2,048 rows of 2,560, by its factors: {theirs:.0f}, ours {ours:.0f}, {ours / theirs:.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
