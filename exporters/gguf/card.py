"""The texts beside a GGUF: the model card (Hub YAML front matter) and ollama's Modelfile."""

import re
from collections.abc import Sequence
from pathlib import Path

from exporters.base_model import BaseModel, human_size
from exporters.gguf.plan import GGUFPlan
from xent_quant.recipes import Role

CARDS_GB = (8, 12, 16, 24)
CONTEXT = 8192
REPEAT_PENALTY = 1.1
TAGS = ("gguf", "quantized", "mixture-of-experts", "xverse")
PROMPT = "The old lamp in the window"


def experts_on_cpu(plan: GGUFPlan, vram: int) -> int | None:
    """Least --n-cpu-moe (the first layers, whose experts stay in RAM) with which the model and CONTEXT tokens fit into
    `vram` bytes; None where they do not with all of them there."""
    needed = plan.vram_bytes(CONTEXT)
    for layer in range(plan.architecture.num_layers + 1):
        if needed <= vram:
            return layer
        needed -= sum(tensor.nbytes for tensor in plan.tensors if tensor.layer == layer and "_exps." in tensor.name)
    return None


def _types(plan: GGUFPlan) -> list[str]:
    """Table rows: kind of tensor, its types, size."""
    rows: dict[str, tuple[set[str], int]] = {}
    for tensor in plan.tensors:
        if tensor.role is Role.NORM:
            continue
        prefix = "expert " if "_exps." in tensor.name else "shared expert " if "_shexp." in tensor.name else ""
        types, nbytes = rows.get(prefix + tensor.role, (set(), 0))
        rows[prefix + tensor.role] = (types | {tensor.type}, nbytes + tensor.nbytes)
    return [f"| {kind} | {', '.join(sorted(types))} | {human_size(nbytes)} |" for kind, (types, nbytes) in rows.items()]


def readme(base: BaseModel, plan: GGUFPlan, targets: Sequence[Path], name: str) -> str:
    """The model card. `targets` are the GGUF files in order."""

    first, stem = targets[0].name, f"{name}-{plan.recipe.name}"
    lines = [
        f"# {stem}",
        "",
        f"{base.link} in GGUF for llama.cpp and ollama: {human_size(plan.nbytes)}, {plan.bits_per_weight:.2f} bits per weight. "
        f"Made by xent-quant. {base.terms}",
        "",
        "| tensors | type | size |",
        "|---|---|---|",
        *_types(plan),
        "",
        *(f"{note}\n" for note in plan.notes),
        "## Run it",
        "",
        "A base model: it continues text, there is no chat template.",
        "",
        "```",
        f'llama-completion -m {first} -no-cnv --repeat-penalty {REPEAT_PENALTY} -c {CONTEXT} -p "{PROMPT}"',
        "```",
        "",
    ]
    if len(targets) > 1:
        lines += [
            "llama.cpp loads the first file and finds the others. ollama wants a single one:",
            "",
            "```",
            f"llama-gguf-split --merge {first} {stem}.gguf",
        ]
    else:
        lines += ["With ollama:", "", "```"]
    tag = re.sub(r"[^a-z0-9._-]+", "-", stem.lower())
    lines += [f"ollama create {tag} -f Modelfile", f'ollama run {tag} "{PROMPT}"', "```", ""]
    if plan.architecture.num_experts:
        lines += [
            f"On a GPU add `-ngl 99` and, where it does not fit, leave the experts of some layers in RAM. "
            f"With {CONTEXT:,} tokens of context ({human_size(plan.vram_bytes(CONTEXT))} in all, estimated):",
            "",
            "| VRAM | option |",
            "|---|---|",
        ]
        for size in CARDS_GB:
            moved = experts_on_cpu(plan, size * 10**9)
            advice = "too small, lower `-ngl`" if moved is None else f"`--n-cpu-moe {moved}`" if moved else "none, it fits"
            lines.append(f"| {size} GB | {advice} |")
        lines.append("")
    return "\n".join([*base.front_matter("gguf", TAGS), "", *lines])


def modelfile(targets: Sequence[Path], stem: str) -> str:
    """ollama's recipe: raw completion with the base model's generation defaults. It wants one file, so shards must be
    merged into `stem`.gguf first."""
    merge = [f"# First: llama-gguf-split --merge {targets[0].name} {stem}.gguf"] if len(targets) > 1 else []
    return "\n".join(
        [
            *merge,
            f"FROM ./{stem}.gguf",
            'TEMPLATE "{{ .Prompt }}"',
            f"PARAMETER repeat_penalty {REPEAT_PENALTY}",
            f"PARAMETER num_ctx {CONTEXT}",
            "",
        ]
    )
