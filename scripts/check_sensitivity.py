#!/usr/bin/env python3
"""Measures a model's sensitivity, and compares what it predicts with what plans then lose.

    scripts/check_sensitivity.py [--model DIR] [--plans 20] [--methods imatrix gptq] [--types Q4_K IQ3_S ...]
                                 [--tokens 6144] [--calib-mix MIX] [--judge-tokens 512]
                                 [--write FILE] [--read FILE] [--plot FILE.svg]

A random plan gives every place of the model one of the types near a random number of bits; --types adds plans of one type
everywhere but in the embedding, whose ratios of measured to predicted loss are what a method recovers (RECOVERY of
xent_quant/sensitivities.py). Statistics are of --tokens of the bundled calibration text; sensitivity is measured on
--judge-tokens of each bundled suite, plans on as many of what follows. Predictions are those of the search without GPTQ, KL
divergence is in nats per token. --write keeps the sensitivity, --read takes it from there instead of measuring. Holds the
model in float32.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _walk import quantised
from bench_quality import judge

from calibration.text import load, sources
from exporters.gguf.budget import Layout, places
from exporters.gguf.plan import layout, plan
from xent_quant import formats, sensitivities
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.methods import METHODS
from xent_quant.model.streaming import StreamingModel
from xent_quant.recipes import planned_recipe
from xent_quant.sensitivities import EMBEDDING, TYPES
from xent_quant.tensors import KEPT_ROLES
from xent_quant.validation import measures, suites
from xent_quant.walk.sensing import Sensing

LENGTH = 256


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def plot(points: dict[str, tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    """Measured against predicted loss, both logarithmic, as SVG; a colour for each method, and the diagonal."""
    every = np.log10(np.concatenate([np.concatenate(pair) for pair in points.values()]))
    low, high, size = np.floor(every.min()), np.ceil(every.max()), 480

    def at(value: float) -> float:
        return 40 + (size - 60) * (np.log10(value) - low) / (high - low)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" font-family="sans-serif" font-size="11">']
    parts.append(f'<line x1="40" y1="{size - 40}" x2="{size - 20}" y2="20" stroke="#999"/>')
    for power in range(int(low), int(high) + 1):
        x = at(10.0**power)
        parts.append(f'<text x="{x:.0f}" y="{size - 20}" text-anchor="middle">1e{power}</text>')
        parts.append(f'<text x="34" y="{size - x + 4:.0f}" text-anchor="end">1e{power}</text>')
    parts.append(f'<text x="{size / 2}" y="{size - 4}" text-anchor="middle">predicted KL divergence</text>')
    for number, (method, (predicted, measured)) in enumerate(points.items()):
        colour = ("#0b6", "#c40", "#06c")[number % 3]
        parts.append(f'<text x="50" y="{24 + 14 * number}" fill="{colour}">measured, {method}</text>')
        dots = zip(predicted, measured, strict=True)
        parts += [f'<circle cx="{at(x):.1f}" cy="{size - at(y):.1f}" r="3" fill="{colour}"/>' for x, y in dots]
    file.write_text("\n".join([*parts, "</svg>"]), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the bundled miniature")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--types", nargs="*", default=[], choices=TYPES)
    parser.add_argument("--methods", nargs="+", default=["imatrix"], choices=list(METHODS))
    parser.add_argument("--tokens", type=int, default=6144, help="of calibration text")
    parser.add_argument("--judge-tokens", type=int, default=512, help="of each suite")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--calib-mix")
    options = parser.parse_args()

    checkpoint = Checkpoint.open(resolve(options.model))
    model, tokenizer = checkpoint.architecture, load_tokenizer(checkpoint.path)
    text = load(
        sources([], options.calib_mix, chinese=True), tokenizer, tokens=options.tokens, length=LENGTH, bos=model.bos_token_id
    )
    windows, count = torch.from_numpy(text.windows), options.judge_tokens // LENGTH
    ids = [tokenizer.encode(suite.text, add_special_tokens=False).ids for suite in suites.choose()]
    every = [measures.windows(part[: 2 * count * LENGTH], LENGTH) for part in ids]
    sensed, judged = (
        torch.from_numpy(np.concatenate([part[half * count : (half + 1) * count] for part in every])) for half in (0, 1)
    )
    started = time.process_time()
    if options.read:
        found = sensitivities.of(checkpoint, options.read)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = Sensing(checkpoint, windows, sensed, TYPES, Path(folder)).run()
        print(f"sensitivity: {time.process_time() - started:.0f} s of CPU", flush=True)
    if options.write:
        sensitivities.save(found, checkpoint, options.write)

    width = -(-model.intermediate_size // 256) * 256
    known = Layout(model, width, found, method="imatrix")
    random = np.random.default_rng(0)
    plans: dict[str, dict[tuple[str, ...], str]] = {}
    for number in range(options.plans):
        centre = random.uniform(2.5, 7)
        near = np.array([np.exp(-((formats.get(kind).bits_per_weight - centre) ** 2)) for kind in TYPES])
        plans[f"random {number}"] = {where: str(random.choice(TYPES, p=near / near.sum())) for where in known.together}
    for kind in options.types:
        plans[kind] = {where: "Q8_0" if EMBEDDING in where else kind for where in known.together}
    reference = StreamingModel(checkpoint)
    print(f"{'plan':12} {'bits/w':>6} {'predicted':>10}" + "".join(f" {method:>10} {'ratio':>6}" for method in options.methods))
    results = []
    for name, types in plans.items():
        by_name = {tensor.name: types[places(tensor, model)] for tensor in known.tensors if tensor.role not in KEPT_ROLES}
        chosen = planned_recipe(name, by_name, {tensor.name: tensor.n_weights for tensor in known.tensors})
        tensors = layout(model, chosen, width)
        made = replace(plan(model, chosen, pad="never"), tensors=tensors, expert_width=width)
        row = [sum(known.loss(where, kind) for where, kind in types.items())]
        for method in options.methods:
            weights = quantised(checkpoint, made.slots(), METHODS[method]("normal"), windows=windows)
            row.append(float(judge(reference, StreamingModel(weights), judged)["kl"].mean()))
        cells = "".join(f" {lost:10.6f} {lost / row[0]:6.3f}" for lost in row[1:])
        print(f"{name:12} {made.bits_per_weight:6.2f} {row[0]:10.6f}{cells}", flush=True)
        results.append(row)
    table = np.array(results[: options.plans])
    if options.plans > 2:
        for column, method in enumerate(options.methods, 1):
            print(f"{method}: rank correlation {spearman(table[:, 0], table[:, column]):.4f}")
    if options.plot:
        every_row = np.array(results)
        plot({method: (every_row[:, 0], every_row[:, n]) for n, method in enumerate(options.methods, 1)}, options.plot)


if __name__ == "__main__":
    main()
