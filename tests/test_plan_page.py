"""The page of a plan: everything is in it, in its place, and nothing from outside is markup."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

import xent_quant
from exporters.interface import Alternative, PlanSummary
from tests.conftest import Command
from tests.test_command import told
from xent_quant.checkpoint.hub import miniature
from xent_quant.cli.main import main
from xent_quant.cli.plan_page import measured, sections
from xent_quant.page import document
from xent_quant.units import human_bytes


def page(name: str, planned: PlanSummary, reports: Sequence[Alternative] = ()) -> str:
    return document(name, sections(name, planned, reports))


SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def drawn(text: str) -> ElementTree.Element:
    """The one drawing of a page; attributes without quotes get theirs."""
    (svg,) = SVG.findall(text)
    return ElementTree.fromstring(svg.replace("class=soft", 'class="soft"'))


@pytest.fixture(scope="module")
def planned() -> PlanSummary:
    (summary,) = xent_quant.plan(size="9MiB")
    return summary


def test_marks_lie_where_their_figures_say(planned: PlanSummary) -> None:
    expected = planned.expected
    assert expected is not None
    reports = [Alternative("made.gguf", 8 * 2**20, 3e-3)]
    text = page("a model", planned, reports)
    picture = drawn(text)
    marks = {}
    for group in picture.iter("g"):
        name, size, kl = re.fullmatch(r"(.+): (.+ MiB), (?:expected|measured) (.+)", group.findtext("title")).groups()
        circle, square = group.find("circle"), group.find("rect")
        if circle is not None:
            at = float(circle.attrib["cx"]), float(circle.attrib["cy"])
        else:
            at = tuple(map(float, re.match(r"translate\((\S+) (\S+)\)", square.attrib["transform"]).groups()))
        marks[name] = (float(size.split()[0]), float(kl), *at)
    mixes = {row.name: row for row in expected.beside if "eighth" not in row.name}
    assert marks.keys() == {*mixes, "this plan", "made.gguf"}
    for name, row in mixes.items():
        assert human_bytes(row.nbytes) == f"{marks[name][0]:.1f} MiB"
    by_size, by_loss = sorted(marks.values()), sorted(marks.values(), key=lambda mark: -mark[1])
    assert [x for _, _, x, _ in by_size] == sorted(x for _, _, x, _ in marks.values())
    assert [y for *_, y in by_loss] == sorted(y for *_, y in marks.values())  # less loss is further down
    curve = [tuple(map(float, point.split(","))) for point in picture.find("polyline").attrib["points"].split()]
    assert [y for _, y in curve] == sorted(y for _, y in curve)
    # On the curve, which holds corners of the hull only, or a little above it.
    _, _, x, y = marks["this plan"]
    left = max(point for point in curve if point[0] <= x)
    right = min(point for point in curve if point[0] >= x)
    assert left[1] - 1 <= y <= right[1] + 1


def test_types_and_figures_are_all_told(planned: PlanSummary) -> None:
    text = page("a model", planned)
    for tensor in planned.tensors:
        assert tensor.type == "F32" or f">{tensor.type}</td>" in text
    assert all(note in text for note in planned.notes)
    assert "nothing was measured" in text


def test_names_are_no_markup(planned: PlanSummary) -> None:
    evil = "<script>alert(1)</script>"
    text = page(evil, replace(planned, notes=(evil,), command=evil), [Alternative(evil, 2**23, 1e-3)])
    assert "<script" not in text
    drawn(text)


def test_the_command_draws_what_was_measured_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "pages" / "plan.html"
    report = out / "validation" / "xent-mini-8MiB" / "report.json"
    report.parent.mkdir(parents=True)
    suite = {"kl": {"value": {"value": 0.0025, "error": 0.0001}, "bound": 1, "verdict": "within"}}
    report.write_text(json.dumps({"exported": "/x/xent-mini-8MiB.gguf", "nbytes": 8 * 2**20, "averages": [suite], "suites": []}))
    (out / "validation" / "other").mkdir()
    (out / "validation" / "other" / "report.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        main(["--size", "9MiB", "--dry-run", "--tokens", "2k", "--output", str(out), "--plan-page", str(file)])
    assert not ended.value.code
    assert measured(out / "validation", "gguf") == [Alternative("xent-mini-8MiB.gguf", 8 * 2**20, 0.0025)]
    assert not measured(out / "validation", "onnx")
    assert "xent-mini-8MiB.gguf: 8.0 MiB, measured 0.0025" in file.read_text("utf-8")
    assert not [path for path in out.iterdir() if path.name != "validation"]
    capsys.readouterr()
    told(capsys, [miniature(), "--dry-run", "--plan-page", file], ["--plan-page", "--size, --max-kl, --fit or --ram"])
    for nowhere in (report / "x.html", out):
        told(capsys, [miniature(), "--size", "9MiB", "--plan-page", nowhere], ["--plan-page", str(nowhere), "another name"])


def test_plans_of_several_formats_are_all_drawn(tmp_path: Path, command: Command) -> None:
    file, formats = tmp_path / "plan.html", ("gguf", "onnx", "bnb")
    asked = [part for name in formats for part in ("--format", name)]
    done = command(*asked, "--size", "12MiB", "--method", "rtn", "--dry-run", "--plan-page", file)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("--format")] == [f"--format {name}" for name in formats]
    text = file.read_text("utf-8")
    assert [f"<h1>xent-mini, {name}</h1>" in text for name in formats] == [True] * 3
    pictures = [ElementTree.fromstring(svg.replace("class=soft", 'class="soft"')) for svg in SVG.findall(text)]
    assert len(pictures) == 3
    circles = {group.findtext("title"): group.find("circle") for group in pictures[2].iter("g")}
    (whole,) = (circle for title, circle in circles.items() if title.startswith("BF16: "))
    curve = [tuple(map(float, point.split(","))) for point in pictures[2].find("polyline").attrib["points"].split()]
    assert max(y for _, y in curve) < float(whole.attrib["cy"])
    assert not [text.text for text in pictures[2].iter("text") if "e-" in text.text]  # no powers of rounding
    others = [float(circle.attrib["cy"]) for circle in circles.values() if circle is not whole]
    assert float(whole.attrib["cy"]) > max(others)  # what loses nothing is on the edge
    assert all(0 < float(circle.attrib["cx"]) < 860 for circle in circles.values())
