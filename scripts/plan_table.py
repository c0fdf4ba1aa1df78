#!/usr/bin/env python3
"""Prints plans for the released models' shapes, from their configs alone: no weights are there, so the sensitivity is the prior.

    scripts/plan_table.py [--size 6 8 10 12 16 24] [--fit 8 12 16 24] [--context 8192] [--prior]

--size: files of so many GiB. --fit: GPUs of so many GiB with the KV cache of --context tokens (q8_0 where llama.cpp takes it,
else f16) and buffers. Types are those of most weights of each kind, with the number of types that there are; KL divergence is
expected, in nats per token, with GPTQ; "best mix" is the one by name of least expected loss among those of no more bytes.
--prior: prints what the prior holds instead, KL divergence without GPTQ, first layer / second layer.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from math import log

from make_checkpoint import PRESETS

from exporters.gguf.budget import Goal, layouts, named_mixes, planned
from exporters.gguf.plan import GGUFPlan, PlannedTensor
from exporters.interface import Alternative
from xent_quant import sensitivities
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ExportError
from xent_quant.tensors import ATTENTION_ROLES, KEPT_ROLES, Role

KINDS = ("experts gate, up", "experts down", "attention", "shared", "embedding", "head")
SHOWN = ("Q8_0", "Q6_K", "Q4_K", "IQ3_S", "Q2_K")
"""Types of the prior that are printed."""
HEADER = 3 * 2**20
"""Bytes of a header with a vocabulary of 128K, about."""


def kind(tensor: PlannedTensor) -> str:
    """The column that a tensor is counted in."""
    if tensor.routed:
        return "experts down" if tensor.role is Role.DOWN else "experts gate, up"
    return "attention" if tensor.role in ATTENTION_ROLES else "shared" if tensor.shared else str(tensor.role)


def row(model: Architecture, goal: Goal, named: Sequence[Alternative]) -> list[str]:
    """What is printed of a plan, beside the mixes by name."""
    try:
        plan: GGUFPlan = planned(model, sensitivities.prior(model), goal, header=HEADER, compare=False)
    except ExportError as error:
        return [str(error).split(": ", 1)[1], *[""] * (len(KINDS) + 3)]
    assert plan.expected is not None
    weights: dict[str, Counter[str]] = {each: Counter() for each in KINDS}
    for tensor in plan.tensors:
        if tensor.role not in KEPT_ROLES:
            weights[kind(tensor)][tensor.type] += tensor.n_weights
    cells = [f"{plan.expected.nbytes / 2**30:.2f}", f"{plan.bits_per_weight:.2f}"]
    for counts in weights.values():
        most = counts.most_common(1)[0][0]
        cells.append(most if len(counts) == 1 else f"{most} ({len(counts)})")
    mixes = [mix for mix in named if mix.nbytes <= plan.expected.nbytes]
    best = min(mixes, key=lambda mix: mix.kl, default=None)
    return [*cells, f"{plan.expected.kl:.2g}", f"{best.name} {best.kl:.2g}" if best else "none"]


def print_prior() -> None:
    """What was measured on the miniature, by place without its layer; the sums, and how far layers are apart."""
    miniature = Checkpoint.open(resolve(None))
    losses = sensitivities.of(miniature, sensitivities.PRIOR_FILE).losses
    rows: dict[str, list[str]] = {}
    for place in losses:
        rows.setdefault(sensitivities.part(place), []).append(place)
    print("| place | " + " | ".join(SHOWN) + " |\n|" + "---|" * (1 + len(SHOWN)))
    for part, places in rows.items():
        cells = (" / ".join(f"{1e3 * losses[place][kind]:.3f}" for place in places) for kind in SHOWN)
        print(f"| `{part}` | " + " | ".join(cells) + " |")
    for kind in SHOWN:
        apart = {part: losses[places[0]][kind] / losses[places[-1]][kind] for part, places in rows.items()}
        farthest = max(apart, key=lambda part: abs(log(apart[part])))
        whole = 1e3 * sum(by[kind] for by in losses.values())
        print(f"{kind}: {whole:.2f} in all; {farthest} {apart[farthest]:.1f} times as much in the first layer as in the second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, nargs="*", default=[6, 8, 10, 12, 16, 24])
    parser.add_argument("--fit", type=float, nargs="*", default=[8, 12, 16, 24])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--prior", action="store_true")
    options = parser.parse_args()
    if options.prior:
        print_prior()
        return
    print("| model | budget | file GiB | bits | " + " | ".join(KINDS) + " | KL | best mix |")
    print("|---" * (6 + len(KINDS)) + "|")
    for name in ("A4.2B", "A5.7B"):
        model = Architecture.from_config(PRESETS[name])
        goals = [Goal(name=f"--size {size:g}GiB", size=int(size * 2**30)) for size in options.size]
        kv = "f16" if model.head_dim % 32 else "q8_0"
        for size in options.fit:
            fit = int(size * 2**30)
            goals.append(Goal(name=f"--fit {size:g}GiB --kv {kv}", fit=fit, context=options.context, kv=kv))
        named = list(named_mixes(layouts(model, sensitivities.prior(model), method="gptq", pad="auto")[0], HEADER))
        for goal in goals:
            print(f"| {name} | `{goal.name}` | " + " | ".join(row(model, goal, named)) + " |", flush=True)


if __name__ == "__main__":
    main()
