"""The real command: what it prints, how it fails, what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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


def test_quantises_and_reports_json(checkpoint, tmp_path: Path) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    result = run(folder, *PLAIN, "--type", "Q8_0", "--output", out, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert {Path(file).name for file in facts["files"]} == {"model-Q8_0.gguf", "README.md", "Modelfile"}
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "model-Q8_0.gguf"]
    described = json.loads(run("inspect", out / "model-Q8_0.gguf", "--json").stdout)
    assert described["general.architecture"] == "bailingmoe"
    fails(run(folder, *PLAIN, "--type", "Q8_0", "--output", out), "exists already", "--force")
    assert run(folder, *PLAIN, "--type", "Q8_0", "--output", out, "--force").returncode == 0


def test_dry_run_writes_nothing(checkpoint, tmp_path: Path) -> None:
    result = run(checkpoint(), "--dry-run", "--output", tmp_path / "out")
    assert result.returncode == 0
    assert "blk.1.ffn_down_exps.weight" in result.stdout
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_2() -> None:
    for arguments in (["--bits", "7"], ["--nonsense"], ["inspect"]):
        assert run(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["config.json", "missing"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors"]),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), ["tokenizer.json"]),
        (lambda folder: os.truncate(folder / "model.safetensors", 100_000), ["model.safetensors", "truncated"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), ["model.safetensors", "not safetensors"]),
        (lambda folder: rewrite(folder, "model_type", "llama"), ["model_type", "llama"]),
        (lambda folder: rewrite(folder, "intermediate_size", 128), ["gate_proj.weight", "shape"]),
        (lambda folder: poison(folder, np.nan), ["experts.4.up_proj.weight", "NaN"]),
        (lambda folder: poison(folder, np.inf), ["experts.4.up_proj.weight", "infinite"]),
    ],
)
def test_damaged_checkpoints_fail_in_one_line(checkpoint, tmp_path: Path, damage, words: list[str]) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    damage(folder)
    fails(run(folder, *PLAIN, "--output", out, "--type", "Q8_0"), *words)
    assert not out.exists() or not list(out.iterdir())


def rewrite(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))


def poison(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.experts.4.up_proj.weight"][3, 7] = value
    save_file(weights, folder / "model.safetensors")


def test_wrong_paths_and_options_fail_in_one_line(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    fails(run(tmp_path / "nowhere"), "no such folder")
    fails(run(folder, "--type", "Q9_X"), "Q9_X", "Q4_K_M")
    fails(run(folder, "--bits", 16), "--bits 16", "there are")
    fails(run(folder, "--tensor-type", "oops"), "REGEX=TYPE")
    fails(run(folder, "--threads", 0), "--threads")
    fails(run(folder, "--split-size", "lots"), "--split-size")
    fails(run(folder, "--tokens", "many"), "--tokens")
    fails(run(folder, "--calib", tmp_path / "no.txt"), "no.txt", "preset")
    fails(run(folder, "--seqlen", 100_000), "--seqlen", "512")
    fails(run(folder, "--calib-mix", "fun=1"), "--calib-mix", "fiction")
    fails(run(folder, "--method", "gptq", "--imatrix", "x.gguf"), "--method gptq", "--imatrix")
    fails(run(folder, "--calib", "webcc", "--imatrix", "x.gguf"), "--calib")
    fails(run(folder, "--imatrix", folder / "config.json"), "imatrix")
    (tmp_path / "file").write_text("x")
    fails(run(folder, *PLAIN, "--output", tmp_path / "file", "--type", "Q8_0"), "file")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_leaves_nothing_that_looks_finished(checkpoint, tmp_path: Path, how: signal.Signals) -> None:
    folder, out = checkpoint(num_experts=32, num_hidden_layers=6, intermediate_size=480), tmp_path / "out"
    arguments = [*COMMAND, str(folder), *PLAIN, "--type", "Q8_0", "--output", str(out)]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not list(out.glob(".*.part")):
        time.sleep(0.002)
    process.send_signal(how)
    assert process.wait(60) != 0
    assert not [path for path in out.glob("*") if not path.name.startswith(".")]
    if how is not signal.SIGKILL:
        assert not list(out.glob(".*"))
    assert run(folder, *PLAIN, "--type", "Q8_0", "--output", out).returncode == 0
