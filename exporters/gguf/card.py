"""The texts beside a GGUF: the model card (Hub YAML front matter) and ollama's Modelfile."""

import re
from collections.abc import Sequence
from pathlib import Path

from exporters.base_model import BaseModel, human_size
from exporters.card import PROMPT, opening
from exporters.gguf.plan import GGUFPlan, PlannedTensor
from exporters.hub_files import REPETITION_PENALTY
from exporters.interface import CONTEXT
from xent_quant.recipes import Role

TAGS = ("gguf", "quantized")
CARDS_GB = (8, 12, 16, 24)


def experts_on_cpu(plan: GGUFPlan, vram: int) -> int | None:
    """Least --n-cpu-moe (the first layers, whose experts stay in RAM) with which the model and CONTEXT tokens fit into
    `vram` bytes; None where they do not with all of them there."""
    needed = plan.vram_bytes(CONTEXT)
    for layer in range(plan.architecture.num_layers + 1):
        if needed <= vram:
            return layer
        needed -= sum(tensor.nbytes for tensor in plan.tensors if tensor.layer == layer and "_exps." in tensor.name)
    return None


def _group(tensor: PlannedTensor) -> str:
    """What to call a tensor in the table."""
    prefix = "expert " if "_exps." in tensor.name else "shared expert " if "_shexp." in tensor.name else ""
    return prefix + tensor.role


def readme(base: BaseModel, plan: GGUFPlan, targets: Sequence[Path], name: str) -> str:
    """The model card. `targets` are the GGUF files in order."""

    first, stem = targets[0].name, f"{name}-{plan.recipe.name}"
    lines = [
        *opening(
            base,
            "gguf",
            TAGS,
            stem,
            f"in GGUF for llama.cpp and ollama: {human_size(plan.nbytes)}, {plan.bits_per_weight:.2f} bits per weight",
            [(_group(tensor), tensor.type, tensor.nbytes) for tensor in plan.tensors if tensor.role is not Role.NORM],
            plan.notes,
        ),
        "```",
        f'llama-completion -m {first} -no-cnv --repeat-penalty {REPETITION_PENALTY} -c {CONTEXT} -p "{PROMPT}"',
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
    return "\n".join(lines)


def modelfile(targets: Sequence[Path], stem: str) -> str:
    """ollama's recipe: raw completion with the base model's generation defaults. It wants one file, so shards must be
    merged into `stem`.gguf first."""
    merge = [f"# First: llama-gguf-split --merge {targets[0].name} {stem}.gguf"] if len(targets) > 1 else []
    return "\n".join(
        [
            *merge,
            f"FROM ./{stem}.gguf",
            'TEMPLATE "{{ .Prompt }}"',
            f"PARAMETER repeat_penalty {REPETITION_PENALTY}",
            f"PARAMETER num_ctx {CONTEXT}",
            "",
        ]
    )
