"""What a person sees of a validation in the terminal: verdict first."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from xent_quant.cli.show import new_table, out
from xent_quant.units import human_bytes

if TYPE_CHECKING:
    from xent_quant.validation.report import Finding, Report

STYLES = {"within": "green", "undecided": "yellow", "out": "bold red"}
WORDS = {"within": "within tolerance", "undecided": "undecided: too little text to tell", "out": "OUT OF TOLERANCE"}


LINES = 8
"""Of damage, at most; the report has all."""


def _cell(finding: "Finding", digits: int, gated: bool) -> Text:
    text = f"{finding.value.value:.{digits}f}"
    if finding.value.error < 1e9:
        text += f" ±{finding.value.error:.{digits}f}"
    return Text(text, style=STYLES[finding.verdict] if gated else "dim")


def report(found: "Report", folder: Path | None) -> None:
    out.print(Text(WORDS[found.verdict], style=STYLES[found.verdict]), "—", found.exported, soft_wrap=True)
    wide = out.width >= 118
    details = (">perplexity", ">bf16", ">KL 99 %", ">KL max", ">bits/byte", ">token ids") if wide else ()
    rows = new_table("suite", ">ratio", ">KL divergence", ">top-1", "verdict", *details)
    for result in (*found.suites, *found.averages):
        gated = result in found.suites
        if not gated and result is found.averages[0]:
            rows.add_section()
        more = (
            f"{result.perplexity.value:.2f}",
            f"{result.reference_perplexity:.2f}",
            f"{result.kl_99:.3f}",
            f"{result.kl_max:.3f}",
            f"{result.bits_per_byte:.3f}",
            "–" if result.tokenizer is None else f"{result.tokenizer:.1%}",
        )
        rows.add_row(
            result.name,
            _cell(result.ratio, 4, gated),
            _cell(result.kl, 4, gated),
            _cell(result.top1, 3, gated),
            Text(result.verdict, style=STYLES[result.verdict]) if gated else "",
            *more[: len(details)],
        )
    out.print(rows)
    for line in found.damage[:LINES]:
        out.print(line, style=STYLES["out"], soft_wrap=True)
    if len(found.damage) > LINES:
        out.print(f"… and {len(found.damage) - LINES} more", style=STYLES["out"])
    if found.cross_check:
        agree = (
            "agree" if found.cross_verdict == "within" else "DISAGREE: the runtime computes something else than these bytes say"
        )
        out.print(
            f"{found.runtime} and the dequantised weights {agree}: KL divergence {found.cross_check.kl:.5f}, "
            f"log-likelihood {found.cross_check.nll_difference:+.5f} over {found.cross_check.tokens} tokens.",
            style=None if found.cross_verdict == "within" else STYLES["out"],
        )
        if found.cross_verdict == "out":
            worst = max(found.tensors, key=lambda tensor: tensor.error)
            out.print(f"The tensor that differs most from the checkpoint is {worst.name}: {worst.error:.1%}.")
    for line in found.notes:
        out.print(line, style="dim")
    sizes = f"{human_bytes(found.reference_bytes)} → {human_bytes(found.nbytes)}, {found.bits_per_weight:.2f} bits per weight"
    out.print(f"{sizes}; {found.runtime}, {found.seconds:.0f} s")
    if folder:
        out.print(f"  {folder / 'report.html'}", soft_wrap=True)
