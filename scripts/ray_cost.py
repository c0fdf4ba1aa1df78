#!/usr/bin/env python3
"""Reckons what GPTQ by Ray takes, from what one layer took on one thread; nothing is run.

    scripts/ray_cost.py SECONDS [--tokens 128k] [--cores 16] [--network 1.25] [--machines 1 4 16]

SECONDS of CPU are what `scripts/bench_layers.py` printed for a layer of A4.2B's shapes on one thread with as many tokens. Other
models' layers take that times their arithmetic (`walk.resources.arithmetic`). The command's machine does all but routed experts
by itself, with all its cores, while the others wait; experts then take the longer of their arithmetic on all cores and of sending
rows, both ways at once, GB a second by that machine's one link, to other machines' share of them. Not reckoned: packing, disks,
cores that wait for the last expert. Prints hours of the whole model, in one format.
"""

import argparse
from typing import Any

from make_checkpoint import COMMON, PRESETS

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.options import CalibrationOptions
from xent_quant.walk.resources import arithmetic

MEASURED = "A4.2B"
SHAPES: dict[str, dict[str, Any]] = {
    **{name: PRESETS[name] for name in (MEASURED, "A5.7B")},
    # 255 B parameters, 36 B of them for a token.
    "XVERSE-MoE-A36B": {
        **COMMON,
        "hidden_size": 6144,
        "intermediate_size": 4096,
        "num_hidden_layers": 50,
        "num_attention_heads": 48,
        "vocab_size": 100352,
    },
}
STREAMS = 2
"""The exact one and that of the format."""


def operations(model: Architecture, tokens: int, *, routed: bool) -> float:
    """Of all layers; factorisations with as many as their products of the same size would take."""
    flops, cubes = arithmetic(model, tokens, STREAMS - 1, routed=routed)
    return flops + cubes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--tokens", default="128k")
    parser.add_argument("--cores", type=int, default=16, help="of a machine")
    parser.add_argument("--network", type=float, default=1.25, help="GB a second; 10 GbE")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    tokens = CalibrationOptions(tokens=options.tokens).n_tokens
    models = {name: Architecture.from_config(config) for name, config in SHAPES.items()}
    known = models[MEASURED]
    rate = sum(operations(known, tokens, routed=routed) for routed in (False, True)) / known.num_layers / options.seconds
    print(f"{rate / 1e9:.1f} GFLOP/s of a core, all of its time counted")
    print(
        "| model | GB sent a layer, one way | of a layer's arithmetic not routed | "
        + " | ".join(map(str, options.machines))
        + " |"
    )
    print("|---|---|---|" + "---|" * len(options.machines))
    for name, model in models.items():
        here, there = (operations(model, tokens, routed=routed) / rate for routed in (False, True))
        sent = 4 * STREAMS * tokens * model.experts_per_token * model.hidden_size * model.num_layers
        hours = []
        for machines in options.machines:
            away = 1 - 1 / machines
            experts = max(there / options.cores / machines, away * sent / options.network / 1e9)
            hours.append(f"{(here / options.cores + experts) / 3600:.1f}")
        share = here / (here + there)
        print(f"| {name} | {sent / model.num_layers / 1e9:.1f} | {share:.0%} | " + " | ".join(hours) + " |")


if __name__ == "__main__":
    main()
