"""The texts beside a GGUF: the model card (Hub YAML front matter) and ollama's Modelfile."""

import json
import re
from pathlib import Path

from exporters.gguf.plan import GGUFPlan
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.recipes import Role

CARDS_GB = (8, 12, 16, 24)
CONTEXT = 8192


def licence(folder: Path) -> str | None:
    """The licence as the base model's own card names it, or None."""
    base = folder / "README.md"
    match = re.match(r"---\n(.*?)\n---", base.read_text("utf-8", errors="replace"), re.DOTALL) if base.is_file() else None
    found = re.search(r"^license:\s*(\S+)\s*$", match[1], re.MULTILINE) if match else None
    return found[1].strip("\"'") if found else None


def _experts_on_cpu(plan: GGUFPlan, vram: int) -> int | None:
    """Least --n-cpu-moe with which the model fits into `vram` bytes with CONTEXT tokens; None where none does."""
    layers = plan.architecture.num_layers
    needed = plan.vram_bytes(CONTEXT)
    per_layer = sum(tensor.nbytes for tensor in plan.tensors if "_exps." in tensor.name) / layers
    for moved in range(layers + 1):
        if needed - moved * per_layer <= vram:
            return moved
    return None


def readme(checkpoint: Checkpoint, plan: GGUFPlan, targets: list[Path], name: str) -> str:
    """The model card."""
    terms = licence(checkpoint.path)
    header = [
        "---",
        f"base_model: {json.dumps(name, ensure_ascii=False)}",
        "base_model_relation: quantized",
        *([f"license: {terms}"] if terms else []),
        "library_name: gguf",
        "pipeline_tag: text-generation",
        "tags: [gguf, quantized, mixture-of-experts]",
        "---",
    ]
    first = targets[0].name
    rows: dict[str, set[str]] = {}
    for tensor in plan.tensors:
        if tensor.role is not Role.NORM:
            rows.setdefault(_kind(tensor.name, tensor.role), set()).add(tensor.type)
    lines = [
        f"# {name} {plan.recipe.name}",
        "",
        f"{plan.nbytes / 1e9:.2f} GB, {8 * plan.nbytes / sum(t.n_weights for t in plan.tensors):.2f} bits per weight, "
        f"made by xent-quant from {name}. The licence of the weights is the base model's{f' ({terms})' if terms else ''}.",
        "",
        "| tensors | type |",
        "|---|---|",
        *(f"| {kind} | {', '.join(sorted(types))} |" for kind, types in rows.items()),
        "",
        *(f"{note}\n" for note in plan.notes),
        "## Run it",
        "",
        "A base model: it continues text, there is no chat template.",
        "",
        "```",
        f'llama-cli -m {first} -no-cnv --repeat-penalty 1.1 -c {CONTEXT} -p "The old lamp in the window"',
    ]
    lines += [f"ollama create {name.lower()} -f Modelfile && ollama run {name.lower()}"] if len(targets) == 1 else []
    lines += ["```", ""]
    if len(targets) > 1:
        lines += [
            "llama.cpp loads the first shard and finds the others; ollama wants a single file (llama-gguf-split --merge).",
            "",
        ]
    if plan.architecture.num_experts:
        lines += [f"With a GPU, `-ngl 99` and, for {CONTEXT:,} tokens of context:", "", "| VRAM | option |", "|---|---|"]
        for size in CARDS_GB:
            moved = _experts_on_cpu(plan, size * 10**9)
            advice = "does not fit; lower -ngl" if moved is None else f"`--n-cpu-moe {moved}`" if moved else "all of it fits"
            lines.append(f"| {size} GB | {advice} |")
        lines.append("")
    return "\n".join([*header, "", *lines])


def _kind(name: str, role: Role) -> str:
    prefix = "expert " if "_exps." in name else "shared expert " if "_shexp." in name else ""
    return prefix + role


def modelfile(targets: list[Path]) -> str:
    """ollama's recipe: raw completion with the base model's generation defaults."""
    return f'FROM ./{targets[0].name}\nTEMPLATE "{{{{ .Prompt }}}}"\nPARAMETER repeat_penalty 1.1\nPARAMETER num_ctx {CONTEXT}\n'
