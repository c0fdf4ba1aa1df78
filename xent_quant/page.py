"""One HTML page that needs nothing else: inline SVG, dark and light by the reader's own setting."""

import html
from collections.abc import Iterable

from xent_quant.plain import plain

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #5c6672; --line: #dfe3e8;
  --bar: #3b6fd4; --track: #e9edf3; --good: #1a7f45; --warn: #946200; --bad: #c22f2f; --good-bg: #e2f4e8; --warn-bg: #fbf0d3;
  --bad-bg: #fbe3e1; --heat: 59, 111, 212; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1e24; --ink: #e6e9ee; --soft: #98a2b0; --line:
  #2d343d;
  --bar: #6f9df2; --track: #262c35; --good: #5cc98a; --warn: #e0b04a; --bad: #f2807a; --good-bg: #16301f; --warn-bg: #352a10;
  --bad-bg: #3a1b1b; --heat: 111, 157, 242; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans",
  "Noto Sans CJK SC", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 26px; margin: 0; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 0 0 2px; }
p { margin: 4px 0 12px; } .soft { color: var(--soft); } .small { font-size: 13px; }
section, header { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; margin: 0
  0 16px; }
.verdict { display: inline-flex; gap: 8px; align-items: center; border-radius: 999px; padding: 4px 14px 4px 10px;
  font-weight: 650;
  margin: 0 0 10px; }
.within { color: var(--good); } .undecided { color: var(--warn); } .out { color: var(--bad); }
.verdict.within { background: var(--good-bg); } .verdict.undecided { background: var(--warn-bg); } .verdict.out { background:
  var(--bad-bg); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.tile { border-top: 2px solid var(--line); padding-top: 8px; } .tile b { display: block; font-size: 21px; font-weight: 620;
  font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: 13px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 18px 26px; } .panels.wide {
  grid-template-columns: minmax(0, 1fr); } .panels h3 {
  font-size: 14px;
  margin: 8px 0 4px; font-weight: 620; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif;
  font-variant-numeric: tabular-nums; } svg .soft { fill: var(--soft); } svg .good { fill: var(--good); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric:
  tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); padding: 4px 6px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td { text-align: right; padding: 4px 6px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } tr.mean td { color: var(--soft); }
.heat { border-collapse: separate; border-spacing: 2px; width: auto; min-width: 40%; }
.heat td, .heat th { border: 0; text-align: center; padding: 3px 6px; border-radius: 4px; }
.heat td:first-child, .heat th:first-child { text-align: right; color: var(--soft); padding-right: 10px; }
.cells th { padding: 0; font-weight: 400; } .cells td { padding: 0; width: 14px; min-width: 9px; height: 16px; border-radius:
  3px; }
.wrong { border-left: 4px solid var(--bad); padding: 2px 0 2px 12px; margin: 6px 0; } code { font: 13px ui-monospace, Menlo,
  monospace;
  overflow-wrap: anywhere; } pre { background: var(--page); border-radius: 8px; padding: 10px 12px; overflow-x: auto; margin:
  6px 0 12px;
  white-space: pre-wrap; }
"""


def escape(text: str) -> str:
    """Text from outside, as HTML shows it."""
    return html.escape(plain(text))


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page, UTF-8 text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>" + "".join(parts) + "</main></body></html>\n"
    )


def section(title: str, lead: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="soft small">{lead}</p>{body}</section>'


def rect(x: float, y: float, width: float, height: float, fill: str = "var(--bar)") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{fill}"/>'


def label(x: float, y: float, text: str, anchor: str = "middle", soft: bool = False) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{" class=soft" if soft else ""}>{escape(text)}</text>'
