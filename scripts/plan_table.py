#!/usr/bin/env python3
"""Prints plans for the released models' shapes, from their configs alone: no weights are there, so the sensitivity is the prior.

    scripts/plan_table.py [--size 6 8 10 12 16 24] [--fit 8 12 16 24] [--context 8192] [--prior]
    scripts/plan_table.py --ram 32 [--fit 8 12] [--speed 20 40]
    scripts/plan_table.py --mixes XENT4 Q4_K_M [--context 8192]

--size: files of so many GiB. --fit: GPUs of so many GiB with the KV cache of --context tokens (q8_0 where llama.cpp takes it,
else f16) and buffers. Types are those of most weights of each kind, with the number of types that there are; KL divergence is
expected, in nats per token, with GPTQ; "best mix" is the one by name of least expected loss among those of no more bytes.
--ram: instead of those, machines with so many GiB of RAM, beside each of the GPUs and without one, at the speed that is chosen
and at each --speed; bandwidths are the defaults.
--mixes: instead, of mixes by name: GiB of weights, those that a token reads, and tokens per second at most on a GPU whole, with
the default bandwidth and half of the cache full.
--prior: prints what the prior holds instead, KL divergence without GPTQ, first layer / second layer.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import product
from math import log

from make_checkpoint import PRESETS

from exporters.gguf.budget import Goal, layouts, named_mixes, planned
from exporters.gguf.plan import VRAM, GGUFPlan, PlannedTensor, plan
from exporters.interface import Alternative
from xent_quant import sensitivities
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ExportError
from xent_quant.machine import Machine
from xent_quant.recipes import recipe
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
        made: GGUFPlan = planned(model, sensitivities.prior(model), goal, header=HEADER, compare=False)
    except ExportError as error:
        return [str(error).split(": ", 1)[1], *[""] * (len(KINDS) + 3)]
    assert made.expected is not None
    weights: dict[str, Counter[str]] = {each: Counter() for each in KINDS}
    for tensor in made.tensors:
        if tensor.role not in KEPT_ROLES:
            weights[kind(tensor)][tensor.type] += tensor.n_weights
    cells = [f"{made.expected.nbytes / 2**30:.2f}", f"{made.bits_per_weight:.2f}"]
    for counts in weights.values():
        most = counts.most_common(1)[0][0]
        cells.append(most if len(counts) == 1 else f"{most} ({len(counts)})")
    mixes = [mix for mix in named if mix.nbytes <= made.expected.nbytes]
    best = min(mixes, key=lambda mix: mix.kl, default=None)
    return [*cells, f"{made.expected.kl:.2g}", f"{best.name} {best.kl:.2g}" if best else "none"]


def print_machine(model: Architecture, name: str, goal: Goal) -> None:
    """Where layers' experts are, what both memories hold, and how fast bandwidth lets it be."""
    try:
        made = planned(model, sensitivities.prior(model), goal, header=HEADER, compare=False)
    except ExportError as error:
        print(f"| {name} | `{goal.name}` | {str(error).split(': ', 1)[1]} |" + " |" * 6, flush=True)
        return
    assert made.expected is not None
    assert made.expected.at_work is not None
    there = made.expected.at_work
    sizes = " | ".join(f"{nbytes / 2**30:.2f}" for nbytes in (made.expected.nbytes, there.vram_bytes, there.ram_bytes))
    moved = f"{there.cpu_layers} of {model.num_layers}" if made.placement.gpu else "all"
    figures = f"{made.bits_per_weight:.2f} | {made.expected.kl:.2g} | {there.speed:.1f}"
    print(f"| {name} | `{goal.name}` | {moved} | {sizes} | {figures} |", flush=True)


def print_mix(model: Architecture, name: str, mix: str, context: int) -> None:
    """What a token reads of it."""
    made = plan(model, recipe(type=mix, imatrix=True))
    weights, speed = made.needs_of_weights().read[VRAM], 1 / Machine().seconds(made.needs(context=context).read)
    print(f"| {name} | {mix} | {made.nbytes / 2**30:.2f} | {weights / 2**30:.2f} | {speed:.0f} |")


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
    parser.add_argument("--ram", type=float, nargs="*", default=[])
    parser.add_argument("--speed", type=float, nargs="*", default=[])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--mixes", nargs="*", default=[])
    parser.add_argument("--prior", action="store_true")
    options = parser.parse_args()
    if options.prior:
        print_prior()
        return
    if options.mixes:
        print("| model | mix | GiB | GiB a token | tokens/s |\n" + "|---" * 5 + "|")
    elif options.ram:
        print("| model | machine | experts in RAM | file GiB | VRAM GiB | RAM GiB | bits | KL | tokens/s |\n" + "|---" * 9 + "|")
    else:
        print(
            "| model | budget | file GiB | bits | " + " | ".join(KINDS) + " | KL | best mix |\n" + "|---" * (6 + len(KINDS)) + "|"
        )
    for name in ("A4.2B", "A5.7B"):
        model = Architecture.from_config(PRESETS[name])
        kv = "f16" if model.head_dim % 32 else "q8_0"
        for mix in options.mixes:
            print_mix(model, name, mix, options.context)
        if options.mixes:
            continue
        if options.ram:
            for ram, fit, speed in product(options.ram, [*options.fit, None], [None, *options.speed]):
                asked = {"--fit": fit and f"{fit:g}GiB", "--ram": f"{ram:g}GiB", "--speed": speed and f"{speed:g}", "--kv": kv}
                said = " ".join(f"{option} {value}" for option, value in asked.items() if value)
                machine = Machine(vram=int(fit * 2**30) if fit else None, ram=int(ram * 2**30))
                print_machine(model, name, Goal(name=said, machine=machine, speed=speed, context=options.context, kv=kv))
            continue
        goals = [Goal(name=f"--size {size:g}GiB", size=int(size * 2**30)) for size in options.size]
        for size in options.fit:
            machine = Machine(vram=int(size * 2**30))
            goals.append(Goal(name=f"--fit {size:g}GiB --kv {kv}", machine=machine, context=options.context, kv=kv))
        named = list(named_mixes(layouts(model, sensitivities.prior(model), method="gptq", pad="auto")[0], HEADER))
        for goal in goals:
            print(f"| {name} | `{goal.name}` | " + " | ".join(row(model, goal, named)) + " |", flush=True)


if __name__ == "__main__":
    main()
