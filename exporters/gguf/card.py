"""The texts beside a GGUF: the model card (Hub YAML front matter) and ollama's Modelfile."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from exporters.gguf.plan import GGUFPlan
from xent_quant.errors import CheckpointError
from xent_quant.recipes import Role

CARDS_GB = (8, 12, 16, 24)
CONTEXT = 8192
REPEAT_PENALTY = 1.1
TAGS = ("gguf", "quantized", "mixture-of-experts", "xverse")
KNOWN = {"XVERSE-Ent-A4.2B": "xverse/XVERSE-Ent-A4.2B", "XVERSE-Ent-A5.7B": "xverse/XVERSE-Ent-A5.7B"}
PROMPT = "The old lamp in the window"


@dataclass(frozen=True)
class BaseModel:
    """What is known of the quantised model: its name, its Hub id if any, and its own card's licence and languages."""

    name: str
    repository: str | None
    licence: str | None
    licence_name: str | None
    licence_link: str | None
    languages: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> "BaseModel":
        """Read the folder's README.md, if there is one. The Hub id comes from the Hub's cache folder, or a released
        model's name. Raises CheckpointError for a header that is not YAML.
        """
        folder = folder.resolve()
        cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", folder.as_posix() + "/")
        repository = f"{cached[1]}/{cached[2]}" if cached else KNOWN.get(folder.name)
        header = _front_matter(folder / "README.md")

        def text(key: str) -> str | None:
            value = header.get(key)
            return value.strip() or None if isinstance(value, str) else None

        named = header.get("language")
        languages = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        return cls(
            name=repository.split("/")[1] if repository else folder.name,
            repository=repository,
            licence=text("license"),
            licence_name=text("license_name"),
            licence_link=text("license_link"),
            languages=tuple(item for item in languages if isinstance(item, str)),
        )


def _front_matter(readme: Path) -> dict[str, object]:
    if not readme.is_file():
        return {}
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text("utf-8", errors="replace"), re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{readme}: its header is not YAML ({first}); mend it, or remove the file") from error
    return header if isinstance(header, dict) else {}


def short_count(count: int) -> str:
    """25_776_000_000 -> 26B, 4_216_000_000 -> 4.2B, 17_300_000 -> 17M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 10 * unit else 1}f}{letter}"
    return str(count)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.1f} MB"


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
    return [f"| {kind} | {', '.join(sorted(types))} | {_size(nbytes)} |" for kind, (types, nbytes) in rows.items()]


def readme(base: BaseModel, plan: GGUFPlan, targets: Sequence[Path], name: str) -> str:
    """The model card. `targets` are the GGUF files in order."""

    def quoted(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)  # JSON strings and lists are YAML

    header = [
        "---",
        f"base_model: {quoted(base.repository or base.name)}",
        "base_model_relation: quantized",
        *([f"license: {quoted(base.licence)}"] if base.licence else []),
        *([f"license_name: {quoted(base.licence_name)}"] if base.licence_name else []),
        *([f"license_link: {quoted(base.licence_link)}"] if base.licence_link else []),
        *([f"language: {quoted(list(base.languages))}"] if base.languages else []),
        "library_name: gguf",
        "pipeline_tag: text-generation",
        f"tags: {quoted(list(TAGS))}",
        "---",
    ]
    origin = f"[{base.repository}](https://huggingface.co/{base.repository})" if base.repository else base.name
    terms = base.licence_name or base.licence
    first, stem = targets[0].name, f"{name}-{plan.recipe.name}"
    lines = [
        f"# {stem}",
        "",
        f"{origin} in GGUF for llama.cpp and ollama: {_size(plan.nbytes)}, {plan.bits_per_weight:.2f} bits per weight. "
        f"Made by xent-quant. The weights keep the base model's licence{f' ({terms})' if terms else '; see there'}.",
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
            f"With {CONTEXT:,} tokens of context ({_size(plan.vram_bytes(CONTEXT))} in all, estimated):",
            "",
            "| VRAM | option |",
            "|---|---|",
        ]
        for size in CARDS_GB:
            moved = experts_on_cpu(plan, size * 10**9)
            advice = "too small, lower `-ngl`" if moved is None else f"`--n-cpu-moe {moved}`" if moved else "none, it fits"
            lines.append(f"| {size} GB | {advice} |")
        lines.append("")
    return "\n".join([*header, "", *lines])


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
