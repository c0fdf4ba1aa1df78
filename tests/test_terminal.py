"""What is printed is plain text, whatever names and messages hold, and nothing that a stream does ends a run."""

import io
import json
import logging
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import xent_quant
from calibration.coverage import Coverage
from tests.conftest import TINY, random_weights, write_checkpoint
from tests.test_command import COMMAND, told
from xent_quant.cli import show, show_validation, terminal
from xent_quant.cli.main import main
from xent_quant.pipeline import CalibrateResult
from xent_quant.plain import markdown, plain, readable_json
from xent_quant.validation.gates import TIERS
from xent_quant.validation.html import page
from xent_quant.validation.measures import Estimate
from xent_quant.validation.report import Finding, Report, SuiteResult, Suspicion
from xent_quant.validation.scoring import CrossCheck
from xent_quant.validation.weights import TensorError
from xent_quant.validation.write import write

EVIL = "\x1b]0;title\x07\x1b[31mred\r\nnew\x9b\u202eline\u2066\ud800[/b][red]<b>&"
"""Terminal escapes, ends of lines, bidirectional overrides, half of a pair, rich's markup and HTML's."""
SHOWN = r"\x1b]0;title\x07\x1b[31mred\r\nnew\x9b\u202eline\u2066\ud800[/b][red]<b>&"

PLAIN = ("--method", "rtn", "--type", "Q8_0", "--threads", "1")


def assert_plain(text: str) -> None:
    odd = [c for c in text.replace("\n", "") if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert not odd, odd


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, SHOWN),
        ("夜　色 é 😀 [b] a/b", "夜　色 é 😀 [b] a/b"),  # an ideographic space is one
        ("a\tb\x00c\x7fd\x85e", r"a\tb\x00c\x7fd\x85e"),
        ("\u2028\u2029\u061c\ufeff\u00ad", r"\u2028\u2029\u061c\ufeff\xad"),
        ("\udce5\udca4\udc9c", "夜"),  # a name under LC_ALL=C
        ("bad\udcff\x1b", r"bad\udcff\x1b"),
        (7, "7"),
    ],
)
def test_plain(text: object, shown: str) -> None:
    assert plain(text) == shown
    assert_plain(plain(text))


def test_markdown_and_json_and_one_line() -> None:
    assert markdown("XVERSE-Ent_A4.2B") == "XVERSE-Ent_A4.2B"
    assert markdown("[x](y) <b>`c`*\n") == r"\[x\](y) \<b\>\`c\`\*\\n"
    assert readable_json({"a": "夜"}) == '{"a": "夜"}'
    for value, encoding in ((EVIL, "utf-8"), ("夜", "cp1252")):
        text = readable_json([value], encoding)
        assert text.isascii()
        assert json.loads(text) == [value]
    assert terminal.one_line("first\n  second\x1b[1m\r\nthird\n") == r"first second\x1b[1m third"
    endless = terminal.one_line(f"model.safetensors: {'x' * 70_000} is in no shard; fetch the index again")
    assert endless.startswith("model.safetensors: xxx")
    assert endless.endswith("xxx is in no shard; fetch the index again")
    assert len(endless) == terminal.LONGEST_LINE + 3
    record = logging.LogRecord("xent_quant", logging.WARNING, "", 1, "of %s", (EVIL,), None)
    assert_plain(terminal.Record("%(levelname)s %(message)s").format(record))


def _report(name: str) -> Report:
    finding, estimate = Finding(Estimate(1.0, 0.1), 1.1, "undecided"), Estimate(9.0, 0.1)
    suite = SuiteResult(
        name, 512, 1, estimate, 9.0, 2.2, 1.0, 1.0, finding, finding, 0.1, 0.2, finding, 1.0, (0, 5, *[0] * 14)
    )  # fmt: skip
    tensor = TensorError(f"model.layers.0.mlp.experts.0.up_proj.weight{name}", "Q8_0", 64, 0.5, 0.5, 0, 0, 0.0)
    return Report(
        name, name, "gguf", "llama.cpp", name, TIERS["8bit"], 512, (suite,), (), (tensor,), (Suspicion(tensor, f"is {name}"),),
        CrossCheck(0.1, 0.1, 99), "out", (0.1,), ((1, 0),), 100, 200, 64, 1.0, f"xent-quant {name}", {name: name}, (name,)
    )  # fmt: skip


def _calibrated(name: str) -> CalibrateResult:
    coverage = Coverage(1, 2, 1)
    coverage.count(0, [3, 0])
    return CalibrateResult(Path(name), 99, 1.0, coverage, (f"…of {name}",))


def test_an_html_report_shows_names_as_they_are(tmp_path: Path) -> None:
    text = page(_report(EVIL))
    assert_plain(text)
    assert "<b>&" not in text
    assert r"\x1b[31mred\r\nnew\x9b\u202eline\u2066\ud800[/b][red]&lt;b&gt;&amp;" in text
    write(_report(EVIL), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["exported"] == EVIL


def test_names_of_every_kind_are_printed_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "mo[b]del", TINY, random_weights(TINY))
    header = json.dumps({"license": EVIL.replace("\ud800", ""), "license_name": "<script>x\n</script>"})
    (model / "README.md").write_text(f"---\n{header}\n---\n# Card\n")
    output = tmp_path / "out[/b]\x1b[31m\n"
    with pytest.raises(SystemExit, match="0"):
        main([str(model), *PLAIN, "--output", str(output)])
    printed = capsys.readouterr()
    assert_plain(printed.out + printed.err)
    assert r"out[/b]\x1b[31m\n/mo[b]del-Q8_0.gguf" in printed.out
    card = (output / "README.md").read_text()
    assert_plain(card)
    assert r"# mo\[b\]del GGUF" in card
    assert "<script>" not in card.split("---")[2]
    assert yaml.safe_load(card.split("---")[1])["license_name"] == r"<script>x\n</script>"

    file = tmp_path / "evil.gguf"
    writer = gguf.GGUFWriter(file, "bailingmoe")
    writer.add_string("general.name", EVIL.replace("\ud800", ""))
    writer.add_tensor(f"blk.{EVIL[:9]}", np.zeros((2, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    for more in ((), ("--json",)):
        with pytest.raises(SystemExit, match="0"):
            main(["inspect", str(file), *more])
        printed = capsys.readouterr()
        assert_plain(printed.out + printed.err)
    assert json.loads(printed.out)["general.name"] == EVIL.replace("\ud800", "")

    show_validation.report(_report(EVIL), Path(EVIL))
    show.calibrated(_calibrated(EVIL))
    show.note(EVIL)
    with show.progress() as progress:
        progress.start(EVIL, 2)
        progress.note(EVIL)
    printed = capsys.readouterr()
    assert_plain(printed.out + printed.err)
    assert SHOWN in printed.out


def test_errors_show_names_plain(tmp_path: Path, checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint()
    told(capsys, [folder, "--name", "a\x1b\n"], [r"--name 'a\x1b\n'", "not a file name"])
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.\x1b[31m[/b]": np.zeros(3, np.float32)}, folder / "model.safetensors")
    told(capsys, [folder, *PLAIN, "--output", tmp_path / "out"], [r"model.layers.0.\x1b[31m[/b]"])
    told(capsys, [tmp_path / "\x1b[31m[/b]"], [r"\x1b[31m[/b]"])
    with pytest.raises(SystemExit, match="2"):
        main([f"--{EVIL}"])
    assert_plain(capsys.readouterr().err)
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "\x1b[31m"), "-vv"])
    told_more = capsys.readouterr().err
    assert "Traceback" in told_more
    assert_plain(told_more)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gb18030"])
def test_a_terminal_that_lacks_characters(checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Everything is done and told, in what there is; ASCII has arrows of its own."""
    folder, output = checkpoint(), tmp_path / "夜é"
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding, newline="\n"))
    commands = ["--help", "validate --help"] if encoding == "ascii" else []
    for arguments in (
        *(c.split() for c in commands),
        [str(folder), *PLAIN, "-o", str(output)],
        ["inspect", str(folder), "--json"],
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    with terminal.streams():
        show_validation.report(_report("夜é"), output)
        show.calibrated(_calibrated("夜é"))
        show.as_json({"path": "夜é"})
        terminal.say("夜é")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    printed = raw["stdout"].getvalue().decode(encoding)
    shown = "夜é".encode(encoding, "backslashreplace").decode(encoding)
    assert f"{shown}/model-Q8_0.gguf" in printed
    assert shown in raw["stderr"].getvalue().decode(encoding)
    arrow = {"ascii": "->", "cp1252": "->", "gb18030": "→"}[encoding]
    assert f" {arrow} " in printed
    assert json.loads(printed[printed.rindex("{") :]) == {"path": "夜é"}
    assert len(list(output.iterdir())) == 3


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """become(stream, file): standard output (1) or standard error (2) is that file descriptor from now on."""
    kept = {number: os.dup(number) for number in (1, 2)}

    def change(number: int, file: int) -> None:
        os.dup2(file, number)
        stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        monkeypatch.setattr(sys, {1: "stdout", 2: "stderr"}[number], stream)

    yield change
    for number, file in kept.items():
        os.dup2(file, number)
        os.close(file)


def _unread() -> int:
    """A pipe whose reader has ended."""
    reader, end = os.pipe()
    os.close(reader)
    return end


def test_nobody_reads(checkpoint, tmp_path: Path, become: Callable[[int, int], None]) -> None:
    folder = checkpoint()
    for number in (1, 2):
        become(number, _unread())
    for arguments in (
        ["--help"],
        [str(folder), *PLAIN, "--output", str(tmp_path / "out")],
        [str(folder), *PLAIN, "--output", str(tmp_path / "out"), "--force", "--json"],
        ["inspect", str(folder)],
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    assert len(list((tmp_path / "out").iterdir())) == 3
    with pytest.raises(SystemExit, match="1"):  # the status is what it is, said or not
        main(["inspect", str(tmp_path / "none")])
    with terminal.streams(), show.progress() as progress:
        progress.note("x" * 100_000)
        show_validation.report(_report("x"), None)
        show.calibrated(_calibrated("x"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
def test_a_full_disk_takes_no_results_but_stops_no_work(checkpoint, tmp_path: Path, become: Callable[[int, int], None]) -> None:
    folder, full = checkpoint(), os.open("/dev/full", os.O_WRONLY)
    become(2, full)
    with pytest.raises(SystemExit, match="0"):
        main([str(folder), *PLAIN, "--output", str(tmp_path / "out"), "-v"])
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    become(2, log)
    become(1, full)
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(folder), "--json"])
    assert (tmp_path / "log").read_text() == "xent-quant: error: standard output: No space left on device\n"


def test_closed_streams_and_a_system_without_utf_8(checkpoint, tmp_path: Path) -> None:
    """Standard output and error are closed before the start: no file becomes either of them."""
    model = checkpoint().rename(tmp_path / "模型")
    expected = xent_quant.quantize(model, method="rtn", type="Q8_0", output=tmp_path / "a").files[0]
    command = " ".join([*COMMAND, '"$0"', *PLAIN, "--output", '"$1"', ">&-", "2>&-"])
    system = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(["sh", "-c", command, str(model), str(tmp_path / "夜")], env=system, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "夜" / "模型-Q8_0.gguf").read_bytes() == expected.read_bytes()
    assert (tmp_path / "夜" / "模型-Q8_0.Modelfile").read_text("utf-8").startswith("FROM ./模型-Q8_0.gguf\n")
