"""The real command: exit status, what it prints and writes."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.test_command import fails, run
from tests.validation.test_validate import _zero_expert
from xent_quant.checkpoint.hub import miniature

QUICK = ("--max-tokens", 1024, "--threads", 1, "--suite", "XfictionEN")


def validate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run("validate", *arguments, "--reference", miniature())


def test_exit_3_and_the_reports(export: Callable[[str], Path], tmp_path: Path) -> None:
    own = tmp_path / "mine.txt"
    own.write_text("The lamp in the window went out, and nobody came. " * 120, "utf-8")
    file = Path(shutil.copy(export("Q8_0"), tmp_path / "broken-Q8_0.gguf"))
    _zero_expert(file)
    written = tmp_path / "found.json"
    options = (*QUICK, "--suite-file", f"mine={own}", "--report", tmp_path / "report", "--json", written)
    result = validate(file, *options)
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("OUT OF TOLERANCE")
    assert "model.layers.1.mlp.experts.5.down_proj.weight" in result.stdout
    found = json.loads(written.read_text())
    assert found == json.loads((tmp_path / "report" / "report.json").read_text())
    assert [suite["name"] for suite in found["suites"]] == ["XfictionEN", "mine"]
    assert found["verdict"] == "out"
    assert found["command"].startswith("xent-quant validate")
    assert "Out of tolerance" in (tmp_path / "report" / "report.html").read_text("utf-8")
    assert len(list((tmp_path / "report" / "references").iterdir())) == 2


def test_json_goes_to_stdout_alone(export: Callable[[str], Path], tmp_path: Path) -> None:
    result = validate(export("Q8_0"), *QUICK, "--tolerance", "ppl=2,kld=1,top1=0.1", "--report", tmp_path, "--json", "-")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["verdict"] == "within"


def test_errors_are_one_line(export: Callable[[str], Path], tmp_path: Path) -> None:
    file = export("Q8_0")
    fails(validate(tmp_path / "none.gguf"), "none.gguf", "no such file")
    fails(validate(file, "--suite", "Xpoetry"), "Xpoetry", "XwebccZH")
    fails(validate(file, "--max-tokens", 9, "--report", tmp_path), "fewer than one window")


@pytest.mark.slow
def test_export_and_validate_in_one_command(tmp_path: Path) -> None:
    result = run("--type", "Q8_0", "--effort", "fast", "--output", tmp_path, "--validate", "--json", "--threads", 2)
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout)["validation"]
    assert report["verdict"] == "within"
    assert (tmp_path / "validation" / "xent-mini-Q8_0" / "report.html").is_file()
