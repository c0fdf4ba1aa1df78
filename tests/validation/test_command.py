"""The real command: exit status, what it prints and writes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.test_command import fails, run
from tests.validation.test_validate import _zero_expert
from xent_quant.checkpoint.hub import miniature
from xent_quant.validation import suites
from xent_quant.validation.suites import Suite, bundled

QUICK = ("--max-tokens", 1024, "--threads", 1, "--suite", "XfictionEN")


def test_json_takes_no_option_for_its_file(command: Command, export: Callable[[str], Path]) -> None:
    for typed in (["--json", "--max-tokens=2048"], ["--json", "-v"]):
        result = command("validate", export("Q8_0"), *QUICK, "--reference", miniature(), *typed)
        assert result.returncode == 2, result.stderr
        assert "--json" in result.stderr
        assert "takes a file, or - for stdout" in result.stderr


def test_exit_3_and_the_reports(export: Callable[[str], Path], tmp_path: Path) -> None:
    own = tmp_path / "mine.txt"
    own.write_text("The lamp in the window went out, and nobody came. " * 120, "utf-8")
    file = Path(shutil.copy(export("Q8_0"), tmp_path / "broken-Q8_0.gguf"))
    _zero_expert(file)
    written = tmp_path / "found.json"
    options = (*QUICK, "--suite-file", f"mine={own}", "--report", tmp_path / "report", "--json", written)
    result = run("validate", file, *options, "--reference", miniature())
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


def test_json_goes_to_stdout_alone(command: Command, export: Callable[[str], Path], tmp_path: Path) -> None:
    options = (*QUICK, "--tolerance", "ppl=2,kld=1,top1=0.1", "--report", tmp_path, "--json", "-")
    result = command("validate", export("Q8_0"), *options, "--reference", miniature())
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["verdict"] == "within"


def test_errors_are_one_line(command: Command, export: Callable[[str], Path], tmp_path: Path) -> None:
    file, options = export("Q8_0"), ("--reference", miniature(), "--report", tmp_path)
    fails(command("validate", tmp_path / "none.gguf", *options), "none.gguf", "no such file")
    fails(command("validate", file, *options, "--suite", "Xpoetry"), "Xpoetry", "XwebccZH")
    fails(command("validate", file, *options, "--max-tokens", 9), "fewer than one window")
    fails(command("validate", file, *options, "--max-tokens", -9), "--max-tokens -9")
    fails(command("validate", file, "--reference", miniature(), "--report", file), "--report", "is a file", "name a folder")
    fails(command("validate", file, "--reference", miniature(), "--json", tmp_path), "--json", "is a folder", "name the file")
    for option in ("--json", "--report"):  # before the work, not behind it
        there = ("--reference", miniature(), option, file / "below")
        fails(command("validate", file, *there), f"{option} {file / 'below'}", "nothing can be written there")
    (tmp_path / "empty.txt").touch()
    fails(command("validate", file, *options, "--suite-file", f"mine={tmp_path / 'empty.txt'}"), "suite mine is empty")


def _gguf(folder: Path) -> Path:
    file = folder / "model.gguf"
    file.touch()
    return file


def _onnx(folder: Path) -> Path:
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).touch()
    return folder


def _bnb(folder: Path) -> Path:
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    return folder


@pytest.mark.parametrize(
    ("make", "package", "extra", "other_way"),
    [
        (_gguf, "xllamacpp", "llama", True),
        (_onnx, "onnx", "onnx", False),
        (_onnx, "onnxruntime", "onnx", True),
        (_bnb, "bitsandbytes", "bnb", True),
        (_bnb, "accelerate", "bnb", True),
    ],
)
def test_a_runtime_that_is_not_installed_is_one_line_before_anything_is_read(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[Path], Path],
    package: str,
    extra: str,
    other_way: bool,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = command("validate", make(tmp_path), "--reference", miniature(), "--report", tmp_path / "report")
    fails(found, package, f"pip install 'xent-quant[{extra}]'")
    assert ("--runtime torch" in found.stderr) == other_way
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("gguf", "xllamacpp", "llama"), ("onnx", "onnxruntime", "onnx"), ("bnb", "accelerate", "bnb")],
)
def test_a_missing_runtime_is_told_before_the_export_that_it_was_to_judge(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    format: str,
    package: str,
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = command(miniature(), "--format", format, "--output", tmp_path / "out", "--validate")
    fails(found, package, f"pip install 'xent-quant[{extra}]'")
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_undecided_and_exits_0(command: Command, export: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--max-tokens", 512, "--threads", 1, "--suite", "XfictionEN", "--reference", miniature())
    result = command("validate", export("Q8_0"), *options, "--report", tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("undecided: too little text to tell")
    assert "One window is too few" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "undecided"


def test_export_and_validate_in_one_command(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the beginning of one suite; all six are a slow test."""
    beginning = Suite("beginning", bundled("XfictionEN").text[:6000])
    monkeypatch.setattr(suites, "choose", lambda names, files: [beginning])
    options = ("--bits", 8, "--format", "gguf", "--method", "rtn", "--effort", "fast", "--threads", 1)
    result = command(miniature(), *options, "--output", tmp_path, "--validate", "--json")
    (report,) = json.loads(result.stdout)["validation"]
    assert (result.returncode, report["verdict"]) == (0, "within")
    assert [suite["name"] for suite in report["suites"]] == ["beginning"]
    assert (tmp_path / "validation" / "xent-mini-Q8_0" / "report.html").is_file()


@pytest.mark.slow
def test_the_miniature_is_exported_with_defaults_and_validated(tmp_path: Path) -> None:
    result = run(miniature(), "--bits", 4, "--format", "gguf", "--output", tmp_path, "--validate", "--json")
    assert result.returncode == 0, result.stderr
    (report,) = json.loads(result.stdout)["validation"]
    assert report["verdict"] == "within"
    assert (tmp_path / "validation" / "xent-mini-XENT4" / "report.html").is_file()
