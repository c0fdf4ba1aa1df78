"""The real command: what it prints, how it fails, what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xent_quant
from tests.conftest import Command
from xent_quant.cli.main import main
from xent_quant.errors import ConfigError
from xent_quant.methods import METHODS
from xent_quant.options import Options, StatisticsOptions

COMMAND = [sys.executable, "-m", "xent_quant.cli.main"]


PLAIN = ("--method", "rtn")
"""Without calibration, which has its own tests."""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


def fails(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_quantises_and_reports_json(checkpoint, command: Command, tmp_path: Path) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    result = run(folder, *PLAIN, "--type", "Q8_0", "--output", out, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert {Path(file).name for file in facts["files"]} == {"model-Q8_0.gguf", "README.md", "model-Q8_0.Modelfile"}
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model-Q8_0.Modelfile", "model-Q8_0.gguf"]
    described = json.loads(command("inspect", out / "model-Q8_0.gguf", "--json").stdout)
    assert described["general.architecture"] == "bailingmoe"
    fails(command(folder, *PLAIN, "--type", "Q8_0", "--output", out), "exists already", "--force")
    assert command(folder, *PLAIN, "--type", "Q8_0", "--output", out, "--force").returncode == 0


def test_dry_run_writes_nothing(checkpoint, command: Command, tmp_path: Path) -> None:
    result = command(checkpoint(), "--dry-run", "--output", tmp_path / "out")
    assert result.returncode == 0
    assert "blk.1.ffn_down_exps.weight" in result.stdout
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_2(command: Command) -> None:
    for arguments in (["--bits", "7"], ["--nonsense"], ["inspect"], ["a", "b"]):
        assert command(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["config.json", "missing"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors"]),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), ["tokenizer.json"]),
        (lambda folder: os.truncate(folder / "model.safetensors", 100_000), ["model.safetensors", "truncated"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), ["model.safetensors", "not safetensors"]),
        (lambda folder: rewrite(folder, "model_type", "mamba"), ["model_type", "mamba"]),
        (lambda folder: rewrite(folder, "intermediate_size", 128), ["gate_proj.weight", "shape"]),
        (lambda folder: poison(folder, np.nan), ["experts.4.up_proj.weight", "NaN"]),
        (lambda folder: poison(folder, np.inf), ["experts.4.up_proj.weight", "infinite"]),
    ],
)
def test_damaged_checkpoints_fail_in_one_line(checkpoint, tmp_path: Path, capsys, damage, words: list[str]) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    damage(folder)
    told(capsys, [folder, *PLAIN, "--output", out, "--type", "Q8_0"], words)
    assert not out.exists() or not list(out.iterdir())


def rewrite(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))


def poison(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.experts.4.up_proj.weight"][3, 7] = value
    save_file(weights, folder / "model.safetensors")


def told(capsys: pytest.CaptureFixture[str], arguments: Sequence[object], words: Sequence[str]) -> None:
    """Exit 1 with one line that has the words; in this process, so that it costs no start."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    fails(subprocess.CompletedProcess([], int(str(stopped.value.code)), *capsys.readouterr()), *words)


WRONG_NAMES: list[tuple[list[object], list[str]]] = [
    (["--type", "Q9_X"], ["Q9_X", "Q4_K_M"]),
    (["--bits", 16], ["--bits 16", "there are"]),
    (["--bits", 5, "--format", "onnx"], ["--bits 5", "4, 8 or 16"]),
    (["--bits", 6, "--format", "bnb"], ["--bits 6", "4 and 8"]),
    (["--block-size", 128, "--format", "onnx", "--active-bits", 4], ["--block-size 128", "320", "--block-size 32 or 64"]),
    (["--tensor-type", "oops"], ["REGEX=TYPE"]),
    (["--tensor-type", "ffn_nothing=Q4_K"], ["ffn_nothing", "matches no tensor"]),
    (["--name", "a/b"], ["--name 'a/b'"]),
    (["--threads", 0], ["--threads"]),
    (["--split-size", "lots"], ["--split-size", "4G"]),
    (["--split-size", 0], ["--split-size"]),
    (["--tokens", "many"], ["--tokens", "500k"]),
    (["--seqlen", 1], ["--seqlen 1"]),
    (["--method", "gptq", "--imatrix", "x.gguf"], ["--method gptq", "--imatrix"]),
    (["--calib", "webcc", "--imatrix", "x.gguf"], ["--calib"]),
    (["--imatrix", "x.gguf"], ["x.gguf"]),
]


def test_wrong_names_fail_in_one_line(checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(hidden_size=320)
    for arguments, words in WRONG_NAMES:
        told(capsys, [folder, *arguments], words)
    with pytest.raises(ConfigError, match="--effort slow: choose fast, normal, high"):
        xent_quant.plan(folder, effort="slow")
    with pytest.raises(TypeError, match="bitz"):
        xent_quant.plan(folder, bitz=4)
    assert get_args(get_type_hints(StatisticsOptions)["method"]) == ("auto", *METHODS)
    assert {*signature(xent_quant.quantize).parameters} == {"model", "progress", *(field.name for field in fields(Options))}


def test_wrong_names_are_told_before_torch_is_loaded(checkpoint) -> None:
    script = """
import sys
from xent_quant.cli.main import main
for arguments in eval(sys.argv[2]):
    try:
        main([sys.argv[1], *map(str, arguments)])
    except SystemExit as stopped:
        assert stopped.code == 1 and "torch" not in sys.modules, arguments
"""
    wrong = repr([arguments for arguments, _ in WRONG_NAMES])
    done = subprocess.run([sys.executable, "-c", script, checkpoint(hidden_size=320), wrong], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_paths_and_text_fail_in_one_line(checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint()
    told(capsys, [tmp_path / "nowhere"], ["no such folder"])
    told(capsys, [folder / "config.json"], ["config.json", "is a file"])
    told(capsys, ["inspect", folder / "config.json"], ["config.json", "not a .gguf file"])
    told(capsys, ["inspect", tmp_path], ["model.onnx", "config.json"])
    told(capsys, ["calibrate", folder, "--output", tmp_path], ["is a folder", "imatrix.gguf"])
    told(capsys, [folder, "--calib", tmp_path / "no.txt"], ["no.txt", "preset"])
    told(capsys, [folder, "--seqlen", 100_000], ["--seqlen", "512"])
    told(capsys, [folder, "--calib-mix", "fun=1"], ["--calib-mix", "fiction"])
    told(capsys, [folder, "--imatrix", folder / "config.json"], ["imatrix"])
    (tmp_path / "file").write_text("x")
    told(capsys, [folder, *PLAIN, "--output", tmp_path / "file"], ["file: is a file", "--output"])
    told(capsys, [folder, *PLAIN, "--output", tmp_path / "file" / "x"], ["file", "--output"])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_leaves_nothing_that_looks_finished(checkpoint, tmp_path: Path, how: signal.Signals) -> None:
    folder, out = checkpoint(num_experts=12, intermediate_size=512), tmp_path / "out"
    # A type that takes its time, and low priority: the process must not end before it is told to.
    arguments = [*COMMAND, str(folder), *PLAIN, "--type", "IQ3_S", "--threads", "1", "--output", str(out)]
    process = subprocess.Popen(
        ["nice", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not list(out.glob(".xent-quant-*/*.gguf")):
        time.sleep(0.002)
    assert process.poll() is None
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if how is signal.SIGKILL else 130), errors
    if how is not signal.SIGKILL:
        kept = list(out.glob(".xent-quant-*"))
        became = "the same command goes on where this one stopped" if kept else "nothing unfinished was left behind"
        assert errors == f"xent-quant: interrupted; {became}.\n"
        assert kept or not list(out.iterdir())
    assert not [path for path in out.glob("*") if not path.name.startswith(".")]
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert len(list(out.iterdir())) == 3  # and nothing hidden
