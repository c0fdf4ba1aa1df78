"""What a person sees: progress on stderr, tables on stdout."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table
from rich.text import Text

from exporters.interface import Alternative, TypeRow
from xent_quant.cli import show_progress
from xent_quant.cli.terminal import Terminal
from xent_quant.plain import readable_json
from xent_quant.progress import Progress
from xent_quant.units import human_bytes, human_count, human_seconds

if TYPE_CHECKING:
    from calibration.coverage import Coverage
    from exporters.interface import Expected, PlanSummary
    from xent_quant.pipeline import CalibrateResult, QuantizeResult, SensitivityResult
    from xent_quant.walk.resources import Resources

HEAT = ((8, "on blue"), (6, "on cyan"), (5, "on green"), (4, "on yellow"), (3, "on magenta"), (0, "on red"))
"""Colours of types with so many bits per weight or more."""

out = Terminal(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)  # no names broken in a pipe
err = Terminal(stderr=True)


def note(message: str) -> None:
    err.print(message, style="dim")


def as_json(value: Any) -> None:
    print(readable_json(value, sys.stdout.encoding or "ascii", indent=2))


def progress() -> "AbstractContextManager[Progress]":
    """See `show_progress`, on stderr."""
    return show_progress.progress(err)


def new_table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table


def plans(summaries: "Sequence[PlanSummary]") -> None:
    """--dry-run: every tensor, then the totals, of each format."""
    for summary in summaries:
        if len({each.format for each in summaries}) > 1:
            out.print(f"--format {summary.format}", style="bold")
        _plan(summary)


def _plan(summary: "PlanSummary") -> None:
    if summary.expected:
        _heat_map(summary)
        totals(summary)
        _alternatives(summary.expected)
        return
    table = new_table("tensor", ">shape", "type", ">bytes", ">bits/weight")
    for tensor in summary.tensors:
        shape = " × ".join(str(size) for size in tensor.shape)
        table.add_row(tensor.name, shape, tensor.type, f"{tensor.nbytes:,}", f"{tensor.bits_per_weight:.2f}")
    out.print(table)
    out.print()
    totals(summary)


class TypeMap(NamedTuple):
    """A plan's types: `rows` of layers and their types by part, the columns; neighbouring layers that are alike share one.
    `outside` of layers by name."""

    parts: list[str]
    rows: list[tuple[str, dict[str, str]]]
    outside: dict[str, str]


def type_map(plan: "PlanSummary") -> TypeMap:
    """Of llama.cpp's names, an ONNX graph's or transformers', of which experts' are told once; no vectors, nothing in F32."""
    layers: dict[str, dict[str, str]] = {}
    for tensor in plan.tensors:
        name = re.sub(r"\.experts\.\d+", ".experts", tensor.name.removeprefix("model.").removesuffix(".weight"))
        _, layer, part = name.split(".", 2) if name.startswith(("blk.", "layers.")) else ("", "", name)
        if len(tensor.shape) > 1 and tensor.type != "F32":
            bare = re.sub(r"^(attn_|ffn_|self_attn\.|attention\.|mlp\.)|_proj$", "", part)
            bare = bare.replace("shared_experts", "shared")
            short = re.sub(r"(^|\.)(gate|up)(?=_(?!up)|$)", r"\1gate, up", bare)  # they have one type
            layers.setdefault(layer, {})[short] = tensor.type
    outside = layers.pop("", {})
    parts = list(dict.fromkeys(part for by in layers.values() for part in by))
    rows = []
    for by, alike in groupby(layers, key=lambda layer: list(layers[layer].items())):
        numbers = list(alike)
        rows.append((numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", dict(by)))
    return TypeMap(parts, rows, outside)


def bits_of(plan: "PlanSummary") -> dict[str, float]:
    """Bits per weight of each type of a plan; "" has none."""
    return {row.type: row.bits_per_weight for row in plan.by_type()}


def _heat_map(plan: "PlanSummary") -> None:
    """Types by layer and projection; warmer is fewer bits."""
    found, bits = type_map(plan), bits_of(plan)

    def warm(kind: str) -> Text:
        return Text(kind, style=next(style for least, style in HEAT if bits[kind] >= least)) if kind else Text()

    table = new_table(">layers", *found.parts)
    for label, row in found.rows:
        table.add_row(label, *(warm(row.get(part, "")) for part in found.parts))
    out.print(table)
    if found.outside:
        table = new_table(*found.outside)
        table.add_row(*(warm(kind) for kind in found.outside.values()))
        out.print(table)
    out.print()


def _alternatives(expected: "Expected") -> None:
    """The plan among what else there would be, by size."""
    speed = expected.at_work.speed if expected.at_work else None
    table = new_table("file", ">size", ">expected KL", *([">tokens/s, at most"] if speed else []))
    rows = [*expected.beside, Alternative("this plan", expected.nbytes, expected.kl, speed)]
    for row in sorted(rows, key=lambda row: -row.nbytes):
        ours = "bold" if row.name == "this plan" else ""
        fast = [f"{row.speed:.1f}" if row.speed else "too large"] if speed else []
        table.add_row(row.name, human_bytes(row.nbytes), f"{row.kl:.2g}", *fast, style=ours)
    out.print()
    out.print(table)


def sensed(done: "SensitivityResult") -> None:
    """Where the model loses most, at four bits."""
    losses = {place: by["Q4_K"] for place, by in done.sensitivity.losses.items()}
    table = new_table("place", ">expected KL at Q4_K", title="Most sensitive")
    for place in sorted(losses, key=lambda place: -losses[place])[:10]:
        table.add_row(place, f"{losses[place]:.2g}")
    out.print(table)
    out.print(f"{done.tokens:,} tokens in {done.seconds:.1f} s")
    for line in done.notes:
        out.print(line)
    out.print(f"  {done.file}", soft_wrap=True)


def _types(rows: Sequence[TypeRow]) -> None:
    """Totals of each type, and of all."""
    table = new_table("type", ">tensors", ">weights", ">size", ">bits/weight")
    total = TypeRow("total", *(sum(getattr(row, field) for row in rows) for field in ("tensors", "weights", "nbytes")))
    for row in (*rows, total):
        if row is total:
            table.add_section()
        table.add_row(row.type, str(row.tensors), human_count(row.weights), human_bytes(row.nbytes), f"{row.bits_per_weight:.2f}")
    out.print(table)


def totals(summary: "PlanSummary") -> None:
    _types(summary.by_type())
    for line in summary.notes:
        out.print(line)
    out.print(
        f"All on a GPU with {summary.context:,} tokens of context: about {human_bytes(summary.vram_bytes)} of VRAM.",
    )
    if summary.command:
        out.print(f"  {summary.command}", soft_wrap=True)


def resources(taken: "Resources", notes: Sequence[str]) -> None:
    """--dry-run: what the run would take."""
    for line in notes:
        out.print(line)
    work = f", {human_bytes(taken.disk)} for work until it is done" if taken.disk else ""
    each = f" on each of {taken.devices} devices" if taken.devices > 1 else ""
    vram = f" VRAM for the work: about {human_bytes(taken.vram)}{each}." if taken.vram else ""
    out.print(f"RAM: about {human_bytes(taken.memory)}.{vram} Disk: {human_bytes(taken.result)}{work}.")
    if taken.seconds is not None:
        text = f" with {taken.tokens:,} tokens of text" if taken.tokens else ""
        out.print(f"Time on this machine{text}: about {human_seconds(taken.seconds)}.")


def result(done: "QuantizeResult") -> None:
    """The closing table."""
    for summary in done.plans:
        totals(summary)
    weights = sum(plan.n_weights for plan in done.plans)
    out.print(
        f"{human_bytes(done.source_bytes)} → {human_bytes(done.nbytes)} in {done.seconds:.1f} s "
        f"({human_count(weights / max(done.walk_seconds, 1e-9))} weights/s, {done.threads} threads)",
    )
    if done.coverage:
        coverage(done.coverage)
    for line in done.notes:
        out.print(line)
    for path in done.files:
        out.print(f"  {path}", soft_wrap=True)


def coverage(found: "Coverage") -> None:
    """Experts by the calibration tokens that they saw, per layer."""
    rows = found.rows()
    if not rows:
        return
    table = new_table(
        ">layer", ">fewest", ">median", ">most", ">never", f">below {found.floor}", title="Calibration tokens per expert"
    )
    for row in rows:
        table.add_row(*(f"{value:,.0f}" for value in (row.layer, row.least, row.middle, row.most, row.never, row.rare)))
    out.print(table)


def calibrated(done: "CalibrateResult") -> None:
    coverage(done.coverage)
    out.print(f"{done.tokens:,} tokens in {done.seconds:.1f} s ({done.tokens / max(done.seconds, 1e-9):,.0f} tokens/s)")
    for line in done.notes:
        out.print(line)
    out.print(f"  {done.file}", soft_wrap=True)


def description(facts: dict[str, Any]) -> None:
    """`inspect`: facts as two columns, then the per-type table."""
    table = new_table("", "")
    table.show_header = False
    for key, value in facts.items():
        if key not in ("tensors", "types", "bits_per_weight", "errors", "notes"):
            whole = isinstance(value, int) and not isinstance(value, bool)
            shown = human_bytes(value) if key.endswith("bytes") else f"{value:,}" if whole else str(value)
            table.add_row(key.replace("_", " "), shown)
    out.print(table)
    out.print()
    _types([TypeRow(**row) for row in facts["types"]])
    for line in facts.get("notes", ()):
        out.print(line)
    if facts.get("errors"):
        errors = new_table("tensor", "type", ">weights", ">bits/weight", ">relative error", ">worst expert")
        for row in facts["errors"]:
            errors.add_row(
                row["name"].removesuffix(".weight"),
                row["type"],
                human_count(row["weights"]),
                f"{8 * row['nbytes'] / row['weights']:.2f}",
                f"{row['error']:.2%}",
                f"{row['worst_expert']:.2%}",
            )
        out.print()
        out.print(errors)
