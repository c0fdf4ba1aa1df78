"""What every model card says: the Hub's header, what the model is, its sizes, and that it only continues text."""

from collections.abc import Iterable, Mapping, Sequence

from exporters.base_model import BaseModel
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.dropping import KeptExperts
from xent_quant.plain import markdown
from xent_quant.units import human_bytes

PROMPT = "The old lamp in the window"


def tags(model: Architecture) -> tuple[str, ...]:
    """What the Hub and GGUF files call the kind of model."""
    return (*(("mixture-of-experts",) if model.num_experts else ()), model.model_type)


def opening(base: BaseModel, library: str, tags: Sequence[str], title: str, sentence: str, *, chat: bool = False) -> list[str]:
    """Lines up to what is said of the export itself. `sentence` goes on after the base model's name; `chat`: it has a chat
    template."""
    return [
        *base.front_matter(library, tags),
        "",
        f"# {markdown(title)}",
        "",
        f"{base.link} {sentence}. Made by xent-quant. {base.terms}",
        "",
        "It has a chat template." if chat else "A base model: it continues text, there is no chat template.",
        "",
    ]


def calibrated(provenance: Mapping[str, str | int]) -> list[str]:
    """Lines on the text of the statistics, where `provenance` (see `Exporter.open`) names any."""
    text = provenance.get("quantize.imatrix.dataset")
    return [f"Calibrated on {markdown(text)}.", ""] if text else []


def without(kept: KeptExperts) -> str:
    """A plan's note on experts that are left out."""
    judged = f" on {markdown(kept.text)}" if kept.text else ""
    return (
        f"Of {kept.of} experts in each layer {kept.dropped} are left out: those of least router-weighted saliency (REAP){judged}."
    )


def table(tensors: Iterable[tuple[str, str, int]]) -> list[str]:
    """Lines of a table of (what to call it, type, bytes); tensors that are called the same share a row."""
    rows: dict[str, tuple[set[str], int]] = {}
    for group, kind, nbytes in tensors:
        types, size = rows.get(group, (set(), 0))
        rows[group] = (types | {kind}, size + nbytes)
    return [
        "| tensors | type | size |",
        "|---|---|---|",
        *(f"| {group} | {', '.join(sorted(types))} | {human_bytes(size)} |" for group, (types, size) in rows.items()),
        "",
    ]
