"""From what the files call their tensors to what the architecture calls them, and what is left over."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from xent_quant.checkpoint.architecture import FINAL_NORM, HEAD, Architecture
from xent_quant.checkpoint.headers import Location
from xent_quant.errors import CheckpointError, UnsupportedError

WRAPPERS = ("module.", "base_model.model.")
"""What data parallelism and peft put before a model's names."""
INNER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile and wrappers of layers put anywhere into them."""
SILENT = re.compile(r"(?:^|\.)rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$")
"""Computed from config.json, whatever the files say."""
QUANTISED = re.compile(r"\.(?:weight_scale(?:_inv)?|weight_zero_point|weight_shape|weight_packed|weight_g_idx)$")
ACTIVATIONS = re.compile(
    r"\.(?:(?:input|output|activation)_(?:scale|zero_point|global_scale)|(?:kv|[kvq])_scale|[kv]_zero_point)$"
)
"""How a runtime rounds activations: no business of the weights."""
GATE = re.compile(r"(?:\.|_)gate(?:\.weight)?$")
SHOWN = 3


def plain(locations: Mapping[str, Location], model: Architecture, folder: Path) -> tuple[dict[str, Location], tuple[str, ...]]:
    """The same by the names that the architecture uses: without wrappers' prefixes, with the `model.` that a model saved without
    its head lacks; and notes on what was taken off. Raises CheckpointError where two names become one."""
    found: dict[str, Location] = {}
    taken: dict[str, None] = {}
    for name, location in locations.items():
        short, prefix = _unwrapped(name)
        if prefix:
            taken[prefix] = None
        if short in found:
            raise CheckpointError(
                f"{location.file}: {name}: {found[short].info.name} is the same tensor without its prefix; remove one of them"
            )
        found[short] = location
    notes = [f"Tensors are taken without the prefix {prefix!r} that a wrapper left in their names." for prefix in taken]
    embedding = model.embedding.name
    if embedding.removeprefix("model.") in found and embedding not in found:
        found = {name if name.startswith("lm_head.") else f"model.{name}": location for name, location in found.items()}
        notes.append("Tensors are named without 'model.', as of a model saved without its head.")
    return found, tuple(notes)


def _unwrapped(name: str) -> tuple[str, str]:
    """A name without wrappers, and what was taken off ("" for nothing)."""
    short = INNER.sub("", name)
    while wrapper := next((each for each in WRAPPERS if short.startswith(each)), None):
        short = INNER.sub("", short.removeprefix(wrapper))
    if name.endswith(short):
        return short, name.removesuffix(short)
    inside = INNER.search(name)
    return short, inside[0] if inside else ""


def missing(name: str, names: Iterable[str], folder: Path) -> CheckpointError:
    """What to say of a tensor that is not there."""
    if name == HEAD:
        return CheckpointError(
            f"{folder}: {name}: missing, and config.json says that the head is not tied to the embedding; "
            'if it is, set "tie_word_embeddings": true there, else download the rest'
        )
    wrapped = next((other for other in names if other.endswith(f".{name}")), None)
    hint = f"; the files call it {wrapped}, rename it" if wrapped else ""
    return CheckpointError(f"{folder}: {name}: missing; the download is incomplete, or config.json is another model's{hint}")


def leftover(names: Iterable[str], model: Architecture, folder: Path, *, quantised: bool) -> tuple[str, ...]:
    """Notes on tensors that nothing uses. Raises UnsupportedError for those that would change the function that the model
    computes: biases, gates and whatever else stands within its layers, and LoRA's."""
    quiet: list[str] = []
    outer = [name.removesuffix("weight") for name in (FINAL_NORM, HEAD, model.embedding.name)]
    for name in sorted(names):
        if SILENT.search(name) or (quantised and ACTIVATIONS.search(name)):
            continue
        if "lora_" in name or ".base_layer." in name or ".modules_to_save." in name:
            raise UnsupportedError(
                f"{folder}: {name}: is part of a LoRA that is not merged; merge it (peft's merge_and_unload) and give the result"
            )
        if QUANTISED.search(name) and not quantised:
            raise UnsupportedError(
                f"{folder}: {name}: belongs to a quantised weight, but config.json has no quantization_config; restore that"
            )
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        inside = layer is not None and int(layer[1]) < model.num_layers
        outside = name.endswith(".bias") and name.removesuffix("bias") in outer
        if inside or outside:
            what = "a bias" if name.endswith("bias") else "a gate" if GATE.search(name) else "a tensor"
            raise UnsupportedError(
                f"{folder}: {name}: {what} that {model.family.title}'s layers do not have; it would change what the model "
                "computes, so this is another architecture, or a modified one"
            )
        quiet.append(name)
    notes = []
    if HEAD in quiet:
        quiet.remove(HEAD)
        notes.append(f"{HEAD} is not used: config.json ties the head to the embedding.")
    if quiet:
        more = f" and {len(quiet) - SHOWN} more" if len(quiet) > SHOWN else ""
        notes.append(f"Not part of the model, and not exported: {', '.join(quiet[:SHOWN])}{more}.")
    return tuple(notes)
