"""The texts beside GGUF files: one model card for all of a folder (Hub YAML front matter), and ollama's Modelfile for each."""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.base_model import BaseModel
from exporters.card import PROMPT, calibrated, opening, table, tags
from exporters.gguf.plan import GGUFPlan, PlannedTensor
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ExportError
from xent_quant.plain import markdown, plain
from xent_quant.tensors import Role
from xent_quant.units import human_bytes

TAGS = ("gguf", "quantized")
CARDS_GIB = (8, 12, 16, 24)
SAMPLING = {
    "repetition_penalty": ("--repeat-penalty", "repeat_penalty"),
    "temperature": ("--temp", "temperature"),
    "top_k": ("--top-k", "top_k"),
    "top_p": ("--top-p", "top_p"),
    "min_p": ("--min-p", "min_p"),
}
"""By generation_config.json's names llama.cpp's options and ollama's parameters."""
SECTION = re.compile(r"<!-- xent-quant: (.+?) -->\n(.*?)\n<!-- /xent-quant -->", re.DOTALL)
"""What a README.md says of one export, and its name."""
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


def _group(tensor: PlannedTensor) -> str:
    """What to call a tensor in the table."""
    return ("expert " if tensor.routed else "shared expert " if tensor.shared else "") + tensor.role


def section(
    plan: GGUFPlan,
    files: Sequence[Path],
    stem: str,
    modelfile: str,
    provenance: Mapping[str, str | int],
    *,
    chat: bool,
    sampling: Mapping[str, float],
) -> str:
    """What the model card says of one export; `files` are its GGUF files in order, `sampling` its `sampling`."""
    first, modelfile = shlex.quote(plain(files[0].name)), shlex.quote(plain(modelfile))
    lines = [
        f"## {markdown(stem)}",
        "",
        f"{human_bytes(plan.nbytes)}, {plan.bits_per_weight:.2f} bits per weight.",
        "",
        *calibrated(provenance),
        *table((_group(tensor), tensor.type, tensor.nbytes) for tensor in plan.tensors if tensor.role is not Role.NORM),
        *(f"{note}\n" for note in plan.notes),
        "```",
        f"llama-completion -m {first} {'' if chat else '-no-cnv '}"
        + "".join(f"{SAMPLING[key][0]} {value:g} " for key, value in sampling.items())
        + f'-c {plan.context} -p "{PROMPT}"',
        server(plan, first),
        "```",
        "",
    ]
    if len(files) > 1:
        lines += [
            "llama.cpp loads the first file and finds the others. ollama wants a single one:",
            "",
            "```",
            f"llama-gguf-split --merge {first} {shlex.quote(stem)}.gguf",
        ]
    else:
        lines += ["With ollama:", "", "```"]
    tag = re.sub(r"[^a-z0-9._-]+", "-", stem.lower())
    lines += [f"ollama create {tag} -f {modelfile}", f'ollama run {tag} "{PROMPT}"', "```", ""]
    if plan.architecture.num_experts:
        cache = "" if plan.kv == "f16" else f" in a cache of {plan.kv}"
        lines += [
            f"On a GPU add `-ngl {all_layers(plan)}` and, where it does not fit, leave the experts of some layers in RAM. "
            f"With {plan.context:,} tokens of context{cache} ({human_bytes(plan.vram_bytes())} in all, estimated):",
            "",
            "| VRAM | option |",
            "|---|---|",
        ]
        for size in CARDS_GIB:
            moved = plan.least_cpu_layers(size << 30)
            advice = "too small, lower `-ngl`" if moved is None else f"`--n-cpu-moe {moved}`" if moved else "none, it fits"
            lines.append(f"| {size} GiB | {advice} |")
        lines.append("")
    return "\n".join(lines)


def check_readme(path: Path, force: bool) -> None:
    """Raise ExportError where the card is not one of ours and `force` is False, or is something that is never replaced."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ExportError(f"{path}: is a link or a folder, where the card is to be written; move it away")
    if path.is_file() and not force and not SECTION.search(path.read_text("utf-8", errors="replace")):
        raise ExportError(
            f"{path}: exists already and is not xent-quant's; add --force to replace it, or choose another --output"
        )


def joined(
    base: BaseModel, model: Architecture, chat: bool, stem: str, section: str, before: bytes | None, names: Collection[str]
) -> bytes:
    """README.md of a folder of GGUF files with the section of `stem` in it, in place of an older one; sections of which the
    files are still among the `names` in the folder are kept."""
    known = {found[1]: found[2] for found in SECTION.finditer(before.decode("utf-8", "replace"))} if before else {}
    there = {plain(SHARD.sub("", name).removesuffix(".gguf")) for name in names if name.endswith(".gguf")}
    known = {name: text for name, text in known.items() if name in there}
    known[stem] = section
    head = opening(base, "gguf", (*TAGS, *tags(model)), f"{base.name} GGUF", "in GGUF for llama.cpp and ollama", chat=chat)
    parts = [f"<!-- xent-quant: {name} -->\n{known[name].strip()}\n<!-- /xent-quant -->\n" for name in sorted(known)]
    return "\n".join([*head, *parts]).encode()


def all_layers(plan: GGUFPlan) -> int:
    """llama.cpp's -ngl for all of them and the head: 99, as people write it, unless there are more."""
    return max(99, plan.architecture.num_layers + 1)


def server(plan: GGUFPlan, file: str) -> str:
    """The command that serves a `file`, quoted for a shell, as it was planned: on a GPU where there is one."""
    moved = plan.placement.cpu_layers
    layers = f"-ngl {all_layers(plan) if plan.placement.gpu else 0}" + (f" --n-cpu-moe {moved}" if moved else "")
    cache = "" if plan.kv == "f16" else f" -fa on -ctk {plan.kv} -ctv {plan.kv}"
    prompts = " --cache-ram 0" if moved or not plan.placement.gpu else ""  # else up to 8 GiB of RAM keep prompts that were left
    return f"llama-server -m {file} {layers} -c {plan.context} -np 1{cache}{prompts}"


def sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Of a generation_config.json what llama.cpp and ollama have too, by its names."""
    found = {key: generation.get(key) for key in SAMPLING}
    return {key: value for key, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def modelfile(plan: GGUFPlan, files: Sequence[Path], stem: str, *, chat: bool, sampling: Mapping[str, float]) -> str:
    """ollama's recipe: the base model's generation defaults (`sampling`), and raw completion unless there is a `chat` template,
    which ollama takes from the file. It wants one file, so shards must be merged into `stem`.gguf first."""
    parts = f"{shlex.quote(plain(files[0].name))} {shlex.quote(stem)}.gguf"
    head = [f"# First: llama-gguf-split --merge {parts}"] if len(files) > 1 else []
    if plan.placement.cpu_layers:
        head.append(
            f"# Planned for llama.cpp's --n-cpu-moe {plan.placement.cpu_layers}; ollama's num_gpu counts whole layers instead."
        )
    if plan.kv != "f16":
        head.append(
            f"# Planned for a smaller cache, as ollama serves with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={plan.kv}."
        )
    return "\n".join(
        [
            *head,
            f"FROM ./{stem}.gguf",
            *([] if chat else ['TEMPLATE "{{ .Prompt }}"']),
            *(f"PARAMETER {SAMPLING[key][1]} {value:g}" for key, value in sampling.items()),
            f"PARAMETER num_ctx {plan.context}",
            "",
        ]
    )
