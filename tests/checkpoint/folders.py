"""Checkpoint folders of every shape, written by safetensors and torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, random_weights, small_tokenizer

SMALL: dict[str, Any] = {**TINY, "hidden_size": 64, "intermediate_size": 96, "num_experts": 3, "num_shared_experts": 1}


def weights_of(config: dict[str, Any] = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights by the architecture's names."""
    return {name: torch.from_numpy(value) for name, value in random_weights(config, seed).items()}


def write(
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] = SMALL,
    *,
    file: str | None = "model.safetensors",
    **more: Any,
) -> Path:
    """A folder with config.json (`config` and `more`), a tokenizer and, where `file` is given, the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    small_tokenizer().save(str(folder / "tokenizer.json"))
    if file:
        save(weights_of(config) if weights is None else weights, folder / file)
    return folder


def save(weights: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(weights, file)
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, file)


def index(folder: Path, weight_map: dict[str, str], stem: str = "model.safetensors") -> None:
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_experts(folder: Path, output: Path, numbers: list[list[int]]) -> Path:
    """The same checkpoint with these experts of each layer alone, written anew: other files of the folder are copied."""
    shutil.copytree(folder, output)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    found = {name: value for name, value in weights.items() if ".experts." not in name}
    for layer, kept in enumerate(numbers):
        base = f"model.layers.{layer}.mlp"
        for place, number in enumerate(kept):
            for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
                found[f"{base}.experts.{place}.{part}"] = weights[f"{base}.experts.{number}.{part}"]
        found[f"{base}.router.weight"] = torch.stack([weights[f"{base}.router.weight"][number] for number in kept])
    save(found, output / "model.safetensors")
    (output / "config.json").write_text(json.dumps({**config, "num_experts": len(numbers[0])}))
    return output
