"""A checkpoint without some of its routed experts: a view that is read, planned and exported like any other checkpoint.

Nothing is written for it. Expert i of a layer is the checkpoint's expert `numbers[layer][i]`, and the router has those experts'
rows; all else is the checkpoint's own. An export says which they are, so that it can be compared with its checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from xent_quant.checkpoint.architecture import EXPERTS_KEY
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.sources import ChosenRows
from xent_quant.errors import ValidationError
from xent_quant.tensors import TensorInfo

GGUF_KEYS = {key: f"xent_quant.experts.{key}" for key in ("kept", "of", "text")}
"""Of a GGUF what EXPERTS_KEY is of a config.json; `kept` is one array, layer after layer."""


@dataclass(frozen=True)
class KeptExperts:
    """`numbers`: of each layer the checkpoint's numbers of the experts that are there, ascending, as many in every layer; `of`:
    how many the checkpoint has; `text`: what the text that they were judged by is called, or nothing."""

    numbers: tuple[tuple[int, ...], ...]
    of: int
    text: str = ""

    @property
    def dropped(self) -> int:
        """How many of a layer are not there."""
        return self.of - len(self.numbers[0])

    def to_config(self) -> dict[str, Any]:
        """What config.json says of it."""
        return {EXPERTS_KEY: {"kept": [list(layer) for layer in self.numbers], "of": self.of, "text": self.text}}


def keep(checkpoint: Checkpoint, kept: KeptExperts) -> Checkpoint:
    """The view with these experts, of a checkpoint that has all."""
    whole, model = checkpoint.architecture, replace(checkpoint.architecture, num_experts=len(kept.numbers[0]))
    stored = {spec.name: spec.name for spec in model.each_tensor()}
    chosen: dict[str, tuple[int, ...]] = {}
    for index, numbers in enumerate(kept.numbers):
        layer = model.layer(index)
        for expert, number in zip(layer.experts, numbers, strict=True):
            stored |= {ours.name: theirs.name for ours, theirs in zip(expert, whole.layer(index).expert(number), strict=True)}
        if layer.router:
            chosen[layer.router.name] = numbers
    infos = {
        spec.name: TensorInfo(spec.name, spec.shape, checkpoint.infos[stored[spec.name]].dtype) for spec in model.each_tensor()
    }
    sources = {name: checkpoint.sources[theirs] for name, theirs in stored.items()}
    sources |= {name: ChosenRows(sources[name], numbers) for name, numbers in chosen.items()}
    return replace(checkpoint, architecture=model, infos=infos, sources=sources, kept=kept, whole=checkpoint)


def compared_with(checkpoint: Checkpoint, told: Any, where: str) -> Checkpoint:
    """The view of a checkpoint that an export holds, by what its config.json says under EXPERTS_KEY; the checkpoint itself where
    that is nothing. Raises ValidationError where those are no experts of this checkpoint; `where` names the file and the key.
    """
    if told is None:
        return checkpoint
    model = checkpoint.architecture
    facts: dict[str, Any] = told if isinstance(told, dict) else {}
    rows, of = facts.get("kept"), facts.get("of")
    if not isinstance(rows, list) or of != model.num_experts or not all(_kept(row, model.num_experts) for row in rows):
        rows = []
    if len(rows) != model.num_layers or len({len(row) for row in rows}) > 1:
        raise ValidationError(f"{where}: names no experts of the reference; it is another model, or damaged")
    return keep(checkpoint, KeptExperts(tuple(map(tuple, rows)), model.num_experts, str(facts.get("text", ""))))


def _kept(row: Any, experts: int) -> bool:
    """Whether it is a list of numbers below `experts`, ascending, one at least."""
    if not isinstance(row, list) or not row or not all(type(number) is int for number in row):
        return False
    return row == sorted(set(row)) and row[0] >= 0 and row[-1] < experts


def compared_with_gguf(checkpoint: Checkpoint, metadata: Mapping[str, Any], where: str) -> Checkpoint:
    """As `compared_with`, of a GGUF's metadata."""
    flat, of, text = (metadata.get(key) for key in GGUF_KEYS.values())
    if flat is None:
        return checkpoint
    layers, rows = checkpoint.architecture.num_layers, None
    if isinstance(flat, list) and flat and not len(flat) % layers:
        size = len(flat) // layers
        rows = [flat[start : start + size] for start in range(0, len(flat), size)]
    return compared_with(checkpoint, {"kept": rows, "of": of, "text": text}, f"{where}: {GGUF_KEYS['kept']}")
