"""A plan as one HTML page: the curve of all sizes with the plan and the mixes by name, its types by layer, and how to run it."""

import json
from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from pathlib import Path

from exporters.interface import Alternative, Expected, PlanSummary
from xent_quant.cli.show import bits_of, type_map
from xent_quant.errors import ConfigError, ExportError
from xent_quant.page import document, escape, label, section
from xent_quant.storage import can_be_written, replace_bytes
from xent_quant.units import human_bytes

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 120, 14, 44
"""Of the drawing, in pixels, and what is left around the curve."""
HUES = ((8, 215), (6, 190), (5, 145), (4, 55), (3, 25), (0, 0))
"""Hues, in degrees, of types with so many bits per weight or more: warmer is fewer."""


def measured(folder: Path, kind: str) -> list[Alternative]:
    """What the reports of `validate` in `folder` say of files of a format: KL divergence over all suites. What is no report is
    passed over."""
    found: list[Alternative] = []
    for file in sorted(folder.glob("*/report.json")):
        try:
            report = json.loads(file.read_text("utf-8"))
            kl = (report["averages"] or report["suites"])[-1]["kl"]["value"]["value"]
            name = Path(report["exported"]).name
            if kind == ("gguf" if name.endswith(".gguf") else name):  # others are folders that are called by it
                found.append(Alternative(name, int(report["nbytes"]), float(kl)))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return found


def check(path: Path) -> None:
    """Raise ConfigError, before the work, for a page that could not be written."""
    if not can_be_written(path):
        raise ConfigError(f"--plan-page {path}: no file can be written there; choose another name")


def write(path: Path, name: str, summaries: Sequence[PlanSummary], reports: Path) -> None:
    """The page of the plans among `summaries` to `path`, whose folder is made, with what the `reports` in a folder measured.
    Raises ExportError where it cannot be written."""
    parts = []
    for summary in (each for each in summaries if each.expected):
        title = name if len(summaries) == 1 else f"{name}, {summary.format}"
        parts += sections(title, summary, measured(reports, summary.format))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, document(f"{name}: a plan", parts).encode())
    except OSError as error:
        raise ExportError(f"--plan-page {path}: cannot be written ({error.strerror})") from error


def sections(title: str, planned: PlanSummary, reports: Sequence[Alternative] = ()) -> list[str]:
    """HTML of a plan that has an expectation."""
    expected = planned.expected
    assert expected is not None
    return [_head(title, planned, expected), _sizes(expected, reports), _types(planned), _beside(expected, reports)]


def _head(name: str, planned: PlanSummary, expected: Expected) -> str:
    tiles = [
        (human_bytes(expected.nbytes), "file, at most"),
        (f"{expected.kl:.2g}", "expected KL divergence, nats per token"),
        (f"{planned.bits_per_weight:.2f}", "bits per weight"),
    ]
    if expected.at_work:
        work = expected.at_work
        tiles += [
            (human_bytes(work.vram_bytes), "of VRAM"),
            (human_bytes(work.ram_bytes), f"of RAM; experts of {work.cpu_layers} layers"),
            (f"{work.speed:.1f}", "tokens per second, at most"),
        ]
    drawn = "".join(f'<div class="tile"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in tiles)
    notes = "".join(f"<p>{escape(note)}</p>" for note in planned.notes)
    command = f"<pre><code>{escape(planned.command)}</code></pre>" if planned.command else ""
    return f'<header><h1>{escape(name)}</h1><div class="tiles">{drawn}</div><div class="small">{notes}</div>{command}</header>'


def _axes(points: Sequence[tuple[float, float]]) -> tuple[Callable[[float], float], Callable[[float], float], str]:
    """From bytes and from nats to pixels, and the axes, with lines at round GiB and at powers of ten."""
    found = [kl for _, kl in points if kl > 0]
    low, high = floor(log10(min(found))), ceil(log10(max(found)))
    least, most = min(size for size, _ in points), max(size for size, _ in points)
    span = (most - least) or 1.0
    least, most = least - 0.03 * span, most + 0.03 * span

    def x(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (size - least) / (most - least)

    def y(kl: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - log10(kl)) / max(high - low, 1)

    unit, title = (2**30, "GiB") if most > 2**30 else (2**20, "MiB")
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if span / unit / step <= 9 or step == 100)
    drawn = []
    for number in range(ceil(least / unit / step), floor(most / unit / step) + 1):
        at = x(number * step * unit)
        drawn.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--line)"/>')
        drawn.append(label(at, HEIGHT - BOTTOM + 16, f"{number * step:g}", soft=True))
    for power in range(low, high + 1):
        at = y(10.0**power)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>')
        drawn.append(label(LEFT - 6, at + 4, f"{10.0**power:g}", "end", soft=True))
    drawn.append(label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, f"size of the file, {title}", soft=True))
    return x, y, "".join(drawn)


def _sizes(expected: Expected, reports: Sequence[Alternative]) -> str:
    """KL divergence against size: the curve of plans, the plan, the mixes by name, and what was measured."""
    mixes = [row for row in expected.beside if " " not in row.name and not row.name.startswith("--")]
    ours = Alternative("this plan", expected.nbytes, expected.kl)
    every = [*expected.frontier, *((row.nbytes, row.kl) for row in (*mixes, ours, *reports))]
    x, y, shapes = _axes(every)
    curve = " ".join(f"{x(size):.1f},{y(kl):.1f}" for size, kl in expected.frontier if kl > 0)
    shapes += f'<polyline points="{curve}" fill="none" stroke="var(--bar)" stroke-width="2"/>'

    def low(kl: float) -> float:
        return y(kl) if kl > 0 else HEIGHT - BOTTOM  # nothing is lost: on the edge

    for row in (*mixes, ours):
        radius, colour = (7, "var(--good)") if row is ours else (4, "var(--soft)")
        shapes += (
            f"<g><title>{escape(row.name)}: {human_bytes(row.nbytes)}, expected {row.kl:.2g}</title>"
            f'<circle cx="{x(row.nbytes):.1f}" cy="{low(row.kl):.1f}" r="{radius}" fill="{colour}"/></g>'
        )
    for report in reports:
        if report.kl > 0:
            shapes += (
                f"<g><title>{escape(report.name)}: {human_bytes(report.nbytes)}, measured {report.kl:.2g}</title>"
                f'<rect x="-5" y="-5" width="10" height="10" fill="var(--bad)" '
                f'transform="translate({x(report.nbytes):.1f} {y(report.kl):.1f}) rotate(45)"/></g>'
            )
    above = (x(ours.nbytes) - 28, low(ours.kl) - 12), ours.name
    for at, name in _apart(above, [(x(row.nbytes), low(row.kl), row.name) for row in (*mixes, *reports)]):
        shapes += label(*at, name, "start")
    marks = "The curve is the best that can be planned at each size; grey dots are mixes by name, "
    marks += "red squares were measured by validate on its suites." if reports else "and nothing was measured."
    lead = f"Expected KL divergence in nats per token, from {escape(expected.source)}. {marks}"
    return section("Size and loss", lead, f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{shapes}</svg>')


def _apart(
    first: tuple[tuple[float, float], str], named: Sequence[tuple[float, float, str]]
) -> list[tuple[tuple[float, float], str]]:
    """Where labels begin beside the first: right of their marks, left where there is no room, or further down where another one
    is."""
    placed = [first]

    def free(x: float, y: float, name: str) -> bool:
        return all(abs(y - low) >= 12 or x >= left + 7 * len(said) or left >= x + 7 * len(name) for (left, low), said in placed)

    for x, y, name in sorted(named, key=lambda each: (each[1], each[0])):
        size = 7 * len(name)
        left, low = (x + 9 if x + 9 + size <= WIDTH else max(0, x - 9 - size)), y + 4
        while not free(left, low, name):
            low += 4
        placed.append(((left, low), name))
    return placed


def _cell(kind: str, bits: float) -> str:
    if not kind:
        return "<td></td>"
    hue = next(hue for least, hue in HUES if bits >= least)
    return f'<td style="background:hsl({hue} 70% 50% / .32)" title="{bits:.2f} bits per weight">{escape(kind)}</td>'


def _types(planned: PlanSummary) -> str:
    """Types by layer and projection; neighbouring layers that are alike share a row."""
    found, bits = type_map(planned), bits_of(planned)

    def cell(kind: str) -> str:
        return _cell(kind, bits.get(kind, 0))

    head = "".join(f"<th>{escape(part)}</th>" for part in found.parts)
    rows = "".join(
        f"<tr><td>{escape(layers)}</td>{''.join(cell(types.get(part, '')) for part in found.parts)}</tr>"
        for layers, types in found.rows
    )
    outside = "".join(f"<tr><td>{escape(name)}</td>{cell(kind)}</tr>" for name, kind in found.outside.items())
    body = (
        f'<div class="scroll"><table class="heat"><tr><th>layers</th>{head}</tr>{rows}</table>'
        f'<table class="heat" style="margin-top:10px">{outside}</table></div>'
    )
    return section("Types", "Warmer is fewer bits per weight.", body)


def _beside(expected: Expected, reports: Sequence[Alternative]) -> str:
    speed = expected.at_work.speed if expected.at_work else None
    rows = [*expected.beside, Alternative("this plan", expected.nbytes, expected.kl, speed)]
    body = ""
    for row in sorted(rows, key=lambda row: -row.nbytes):
        cells = [human_bytes(row.nbytes), f"{row.kl:.2g}"]
        if speed:
            cells.append(f"{row.speed:.1f}" if row.speed else "too large")
        name = f"<b>{escape(row.name)}</b>" if row is rows[-1] else escape(row.name)
        body += f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    heads = ["file", "size", "expected KL", *(["tokens/s, at most"] if speed else [])]
    table = f'<div class="scroll"><table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{body}</table></div>'
    if reports:
        rows_of = "".join(
            f"<tr><td>{escape(r.name)}</td><td>{human_bytes(r.nbytes)}</td><td>{r.kl:.2g}</td></tr>" for r in reports
        )
        table += (
            f'<h3>Measured</h3><div class="scroll"><table><tr><th>file</th><th>size</th><th>KL</th></tr>{rows_of}</table></div>'
        )
    return section("What else there would be", "Other plans, and the mixes by name.", table)
