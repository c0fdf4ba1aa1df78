"""The report as one HTML page: verdict first."""

from collections.abc import Callable, Iterable, Sequence
from math import log10

from xent_quant.page import document, escape, label, rect, section
from xent_quant.validation.gates import WEIGHTS, bits_of
from xent_quant.validation.report import KL_EDGES, Finding, Report, SuiteResult
from xent_quant.validation.weights import TensorError

NAME = 16
"""Letters of a suite's name that there is room for beside a bar."""

MARKS = {"within": "✓", "undecided": "?", "out": "✗"}
SENTENCES = {
    "within": "Within tolerance",
    "undecided": "Undecided: too little text to tell",
    "out": "Out of tolerance",
}


def page(report: Report) -> str:
    """The whole page, UTF-8 text."""
    name = report.exported.replace("\\", "/").rstrip("/").split("/")[-1]
    parts = [
        _head(report, name),
        _wrong(report),
        _suites(report),
        _histogram(report),
        _layers(report),
        _tensors(report),
        _coverage(report),
        _sizes(report),
        _how(report),
    ]
    return document(f"{name}: {SENTENCES[report.verdict]}", filter(None, parts))


def _size(amount: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def _head(report: Report, name: str) -> str:
    counts = {kind: sum(suite.verdict == kind for suite in report.suites) for kind in MARKS}
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    whole = report.averages[-1] if report.averages else report.suites[0]
    tiles = [
        (f"{whole.ratio.value.value:.4f}", f"perplexity ratio, {whole.perplexity.value:.2f} / {whole.reference_perplexity:.2f}"),
        (f"{whole.kl.value.value:.4f}", "mean KL divergence, nats per token"),
        (f"{whole.top1.value.value:.1%}", "same likeliest token"),
        (_size(report.nbytes), f"from {_size(report.reference_bytes)}"),
        (f"{report.bits_per_weight:.2f}", "bits per weight on disk"),
    ]
    drawn = "".join(f'<div class="tile"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in tiles)
    verdict = report.verdict
    how = "computed from its dequantised weights" if report.runtime == "torch" else f"run by {escape(report.runtime)}"
    return (
        f'<header><div class="verdict {verdict}"><span>{MARKS[verdict]}</span>{SENTENCES[verdict]}</div>'
        f"<h1>{escape(name)}</h1>"
        f'<p class="soft">{escape(report.kind)} against <code>{escape(report.reference)}</code>, '
        f"{how}. Suites: {listed}.</p>"
        f'<div class="tiles">{drawn}</div></header>'
    )


def _wrong(report: Report) -> str:
    """What a person must look at first, if anything."""
    lines = [f"<code>{escape(name)}</code>{escape(reason)}." for name, reason in map(_split, report.damage)]
    lead = (
        "Weights that are not what their type allows: the export is damaged." if lines else "The weights are as they should be."
    )
    if report.cross_verdict == "out" and report.cross_check:
        worst = max(report.tensors, key=lambda tensor: tensor.error)
        lines.append(
            f"{escape(report.runtime)} computes something else than the file's weights say "
            f"(KL divergence {report.cross_check.kl:.4f}); most differs <code>{escape(worst.name)}</code> ({worst.error:.1%})."
        )
    if not lines:
        return ""
    body = "".join(f'<div class="wrong">{line}</div>' for line in lines)
    return section("What is wrong", lead, body)


def _split(sentence: str) -> tuple[str, str]:
    """A tensor's name, and what is said of it."""
    name, colon, reason = sentence.partition(":")
    return name, colon + reason


def short(name: str) -> str:
    """A suite's name, cut where it is too long."""
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _bars(results: Sequence[SuiteResult], pick: Callable[[SuiteResult], Finding], zero: float, digits: int, at_most: bool) -> str:
    """Horizontal bars from `zero` with two-standard-error whiskers and the bound as a line."""
    findings = [pick(result) for result in results]
    spans = [2 * f.value.error if f.value.error < 1e9 else 0.0 for f in findings]
    bound = findings[0].bound
    values = [f.value.value for f in findings]
    low = min(zero, bound, *(v - s for v, s in zip(values, spans, strict=True)))
    high = max(zero, bound, *(v + s for v, s in zip(values, spans, strict=True)))
    margin = 0.06 * (high - low or 1.0)
    low, high = (low - margin if low < zero else low), (high + margin if high > zero else high)
    left, width, step = 118, 190, 25
    height = step * len(results) + 24

    def x(value: float) -> float:
        return left + width * (value - low) / (high - low or 1.0)

    shapes = [f'<line x1="{x(zero):.1f}" x2="{x(zero):.1f}" y1="2" y2="{height - 22}" stroke="var(--line)"/>']
    for row, (result, finding, span) in enumerate(zip(results, findings, spans, strict=True)):
        y, value = row * step + 13, finding.value.value
        start, end = sorted((x(zero), x(value)))
        colour = {"within": "var(--bar)", "undecided": "var(--warn)", "out": "var(--bad)"}[finding.verdict]
        error = f" ± {finding.value.error:.{digits}f}" if finding.value.error < 1e9 else ""
        shapes.append(
            f"<g><title>{escape(result.name)}: {value:.{digits + 1}f}{error}, {finding.verdict}</title>"
            f"{label(left - 8, y + 4, short(result.name), 'end')}{rect(start, y - 7, max(end - start, 1), 14, colour)}"
            f'<path d="M{x(value - span):.1f} {y}H{x(value + span):.1f}m0 -4v8M{x(value - span):.1f} {y - 4}v8" '
            'stroke="var(--ink)" stroke-width="1.2" fill="none"/>'
            f'<text x="{left + width + 8}" y="{y + 4}">{value:.{digits}f} {MARKS[finding.verdict]}</text></g>'
        )
    shapes.append(
        f'<line x1="{x(bound):.1f}" x2="{x(bound):.1f}" y1="2" y2="{height - 20}" stroke="var(--bad)" stroke-width="1.5" '
        'stroke-dasharray="4 3"/>'
        f'<text x="{min(max(x(bound), left + 26), left + width - 10):.1f}" y="{height - 6}" text-anchor="middle" class="soft">'
        f"{'≤' if at_most else '≥'} {bound:g}</text>"
    )
    return f'<svg viewBox="0 0 {left + width + 72} {height}" role="img">{"".join(shapes)}</svg>'


def _suites(report: Report) -> str:
    panels = (
        ("Perplexity ratio", _bars(report.suites, lambda r: r.ratio, 1.0, 4, True)),
        ("KL divergence, nats per token", _bars(report.suites, lambda r: r.kl, 0.0, 4, True)),
        ("Same likeliest token", _bars(report.suites, lambda r: r.top1, 1.0, 3, False)),
    )
    drawn = "".join(f"<div><h3>{title}</h3>{svg}</div>" for title, svg in panels)
    rows = []
    for result in (*report.suites, *report.averages):
        mean = result in report.averages
        verdict = "" if mean else f'<span class="{result.verdict}">{MARKS[result.verdict]} {result.verdict}</span>'
        error = f" ± {result.perplexity.error:.2f}" if result.perplexity.error < 1e9 else ""
        cells = (
            f"{result.tokens:,}",
            f"{result.perplexity.value:.2f}{error}",
            f"{result.reference_perplexity:.2f}",
            f"{result.nll:.4f}",
            f"{result.bits_per_byte:.3f}",
            f"{result.reference_bits_per_byte:.3f}",
            f"{result.kl_99:.3f}",
            f"{result.kl_max:.3f}",
            "–" if result.tokenizer is None else f"{result.tokenizer:.1%}",
            verdict,
        )
        rows.append(
            f"<tr{' class=mean' if mean else ''}><td>{escape(result.name)}</td>"
            + "".join(f"<td>{c}</td>" for c in cells)
            + "</tr>"
        )
    heads = (
        "suite",
        "tokens",
        "perplexity",
        "reference",
        "NLL",
        "bits/byte",
        "reference",
        "KL 99%",
        "KL max",
        "ids",
        "verdict",
    )
    table = f'<div class="scroll"><table><tr>{"".join(f"<th>{h}</th>" for h in heads)}</tr>{"".join(rows)}</table></div>'
    lead = f"Whiskers are two standard errors, over windows of {report.context} tokens; the dashed line is the bound."
    return section("Suites", lead, f'<div class="panels">{drawn}</div><div style="height:14px"></div>{table}')


def _histogram(report: Report) -> str:
    counts = [sum(column) for column in zip(*(suite.kl_histogram for suite in report.suites), strict=True)]
    total, top = sum(counts), max(counts)
    seen = [index for index, count in enumerate(counts) if count]
    shown = range(max(min(seen[0] - 1, seen[-1] - 8), 0), min(seen[-1] + 2, len(counts)))
    width, height, left = 58, 150, 8
    bars = []
    for index in shown:
        count = counts[index]
        x, tall = left + (index - shown.start) * width, height * count / top
        low = f"{KL_EDGES[index - 1]:.0e}" if index else "0"
        high = f"{KL_EDGES[index]:.0e}" if index < len(KL_EDGES) else "∞"
        share = "<0.1%" if count < 0.001 * total else f"{count / total:.1%}"
        value_label = label(x + width / 2, height + 13 - tall, share) if count else ""
        bar = rect(x + 2, height + 18 - tall, width - 4, max(tall, 0.5))
        bars.append(f"<g><title>{low} to {high}: {count:,} tokens</title>{bar}{value_label}</g>")
    ticks = "".join(
        label(left + (index + 1 - shown.start) * width, height + 34, _power(edge), soft=True)
        for index, edge in enumerate(KL_EDGES)
        if index % 2 == 0 and shown.start <= index < shown.stop - 1
    )
    wide = width * len(shown)
    svg = (
        f'<svg style="max-width:{2 * left + wide}px" viewBox="0 0 {2 * left + wide} {height + 42}" role="img">'
        f'<line x1="{left}" x2="{left + wide}" y1="{height + 18}" y2="{height + 18}" stroke="var(--line)"/>'
        f"{''.join(bars)}{ticks}</svg>"
    )
    return section("KL divergence per token", "Share of scored tokens by KL divergence in nats; every bin is half a decade.", svg)


def _power(value: float) -> str:
    exponent = round(log10(value))
    return "1" if exponent == 0 else f"10{''.join('⁻⁰¹²³⁴⁵⁶⁷⁸⁹'['-0123456789'.index(c)] for c in str(exponent))}"


def _place(tensor: TensorError) -> tuple[str, int | None]:
    """(row of the heat map, layer) of a checkpoint tensor."""
    parts = tensor.name.removesuffix(".weight").split(".")
    if "layers" not in parts:
        return {"embed_tokens": "embedding", "lm_head": "head", "norm": "final norm"}.get(parts[-1], parts[-1]), None
    what = parts[-1].removesuffix("_proj")
    if "experts" in parts:
        what = f"experts {what}"
    elif "shared_experts" in parts:
        what = f"shared {what}"
    return what, int(parts[2])


ORDER = (
    "q",
    "k",
    "v",
    "o",
    "gate",
    "up",
    "down",
    "experts gate",
    "experts up",
    "experts down",
    "shared gate",
    "shared up",
    "shared down",
)


def _heat_cell(value: float | None, top: float, text: str, title: str) -> str:
    if value is None:
        return "<td></td>"
    share = value / top if top else 0.0
    return f'<td style="background:rgba(var(--heat),{0.08 + 0.62 * share:.2f})" title="{escape(title)}">{text}</td>'


def _layers(report: Report) -> str:
    """Heat map of relative weight errors, projections by layers; the residual stream's error below."""
    sums: dict[tuple[str, int], list[TensorError]] = {}
    for tensor in report.tensors:
        what, layer = _place(tensor)
        if layer is not None and what in ORDER:
            sums.setdefault((what, layer), []).append(tensor)
    layers = range(len(report.layer_errors))
    means = {key: sum(t.error for t in found) / len(found) for key, found in sums.items()}
    top = max(means.values(), default=1.0)
    small = len(layers) <= 12
    rows = []
    for what in ORDER:
        if not any((what, layer) in means for layer in layers):
            continue
        cells = []
        for layer in layers:
            value = means.get((what, layer))
            found = sums.get((what, layer), [])
            worst = max(found, key=lambda t: t.error, default=None)
            title = f"layer {layer}, {what}: {value:.2%}" if value is not None else ""
            if worst and len(found) > 1:
                title += f"; worst {worst.error:.2%} ({worst.name})"
            text = f"{value:.2%}" if small and value is not None else ""
            cells.append(_heat_cell(value, top, text, title))
        rows.append(f"<tr><td>{what}</td>{''.join(cells)}</tr>")
    numbers = (str(layer) if small or layer % 4 == 0 else "" for layer in layers)
    head = "<tr><th></th>" + "".join(f"<th>{number}</th>" for number in numbers) + "</tr>"
    classes = "heat" if small else "heat cells"
    table = f'<div class="scroll"><table class="{classes}">{head}{"".join(rows)}</table></div>'
    top_error = max(report.layer_errors, default=0.0) or 1.0
    left, step, tall = 44, max(14, min(60, 900 // max(len(layers), 1))), 110
    roomy = step >= 44
    bars = []
    for layer, error in enumerate(report.layer_errors):
        x, height = left + layer * step, tall * error / top_error
        value_label = label(x + step / 2, tall + 11 - height, f"{error:.1%}") if roomy or error == top_error else ""
        number = label(x + step / 2, tall + 32, str(layer), soft=True) if roomy or layer % 4 == 0 else ""
        bar = rect(x + 2, tall + 16 - height, step - 4, max(height, 0.5))
        bars.append(f"<g><title>behind layer {layer}: {error:.3%}</title>{bar}{value_label}{number}</g>")
    wide = left + step * len(layers) + 10
    svg = (
        f'<svg style="max-width:{wide}px" viewBox="0 0 {wide} {tall + 40}" role="img">'
        f'<text class="soft" x="0" y="{tall + 32}">layer</text>'
        f'<line x1="{left}" x2="{wide}" y1="{tall + 16}" y2="{tall + 16}" stroke="var(--line)"/>{"".join(bars)}</svg>'
    )
    body = (
        f'<div class="panels{"" if small else " wide"}"><div><h3>Relative error of the weights, by projection and layer</h3>'
        f"{table}</div>"
        f"<div><h3>Relative error of the residual stream behind each layer</h3>{svg}</div></div>"
    )
    return section(
        "Where it is lost",
        "Weights: ‖stored − checkpoint‖ / ‖checkpoint‖, mean over experts (hover for the worst). Residual stream: "
        "all layers before it quantised too, no activation rounding.",
        body,
    )


def _tensors(report: Report) -> str:
    ranked = sorted(report.tensors, key=lambda tensor: -tensor.error)[:10]
    rows = "".join(
        f"<tr><td><code>{escape(t.name)}</code></td><td>{escape(t.type)}</td><td>{t.n_weights:,}</td><td>{t.error:.2%}</td>"
        f"<td>{WEIGHTS[bits_of(t.type)][0]:.1%}</td><td>{t.worst:.1%}</td><td>{WEIGHTS[bits_of(t.type)][1]:.0%}</td></tr>"
        for t in ranked
    )
    heads = "".join(f"<th>{h}</th>" for h in ("tensor", "type", "weights", "error", "allowed", "worst block", "allowed"))
    table = f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div>'
    return section("Tensors that differ most", "Relative error of the whole tensor and of its worst block of 32 weights.", table)


def _coverage(report: Report) -> str:
    if not report.coverage:
        return ""
    flat = [count for layer in report.coverage for count in layer]
    top, idle = max(flat), sum(count == 0 for count in flat)
    rows = "".join(
        f"<tr><td>{layer}</td>"
        + "".join(
            _heat_cell(count, top, "", f"layer {layer}, expert {index}: {count} tokens") for index, count in enumerate(counts)
        )
        + "</tr>"
        for layer, counts in enumerate(report.coverage)
    )
    lead = (
        f"Tokens that each expert saw in the exact path's run (layers down, experts across): from {min(flat):,} to {top:,}. "
        + (f"{idle} experts saw none: their weights were compared, their effect was not." if idle else "Every expert was used.")
    )
    return section("Expert coverage", lead, f'<div class="scroll"><table class="heat cells">{rows}</table></div>')


def _sizes(report: Report) -> str:
    totals: dict[str, tuple[int, int]] = {}
    for tensor in report.tensors:
        count, weights = totals.get(tensor.type, (0, 0))
        totals[tensor.type] = (count + 1, weights + tensor.n_weights)
    rows = "".join(
        f"<tr><td>{escape(kind)}</td><td>{count:,}</td><td>{weights:,}</td><td>{weights / report.n_weights:.1%}</td></tr>"
        for kind, (count, weights) in sorted(totals.items(), key=lambda item: -item[1][1])
    )
    heads = "".join(f"<th>{h}</th>" for h in ("type", "tensors", "weights", "share"))
    share = report.nbytes / report.reference_bytes
    svg = (
        '<svg viewBox="0 0 480 62" style="max-width:560px" role="img">'
        '<rect x="0" y="4" width="300" height="20" rx="3" fill="var(--track)"/>'
        f'<text x="308" y="19">{_size(report.reference_bytes)} checkpoint</text>'
        f'<rect x="0" y="34" width="{min(300 * share, 300):.1f}" height="20" rx="3" fill="var(--bar)"/>'
        f'<text x="{min(300 * share, 300) + 8:.1f}" y="49">{_size(report.nbytes)} ({share:.0%})</text></svg>'
    )
    body = f'<div class="panels"><div>{svg}</div><div class="scroll"><table><tr>{heads}</tr>{rows}</table></div></div>'
    return section("Size", f"{report.bits_per_weight:.2f} bits on disk per weight of the checkpoint.", body)


def _how(report: Report) -> str:
    lines: Iterable[str] = report.notes
    if report.cross_check:
        check = report.cross_check
        lines = (
            *lines,
            f"Cross-check: {report.runtime} against the dequantised weights over {check.tokens:,} tokens: "
            f"KL divergence {check.kl:.5f}, log-likelihood {check.nll_difference:+.5f} nats per token.",
        )
    notes = "".join(f"<p>{escape(line)}</p>" for line in lines)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return section(
        "How this was made",
        escape(f"{report.runtime} {report.runtime_version}; {report.seconds:.0f} seconds."),
        f"<pre><code>{escape(report.command)}</code></pre>{notes}<p class='soft small'>{escape(versions)}</p>",
    )
