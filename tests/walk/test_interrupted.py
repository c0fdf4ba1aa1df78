"""What is said when a run ends early, and whether it is true."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llvmlite.binding import ExecutionEngine

from tests.walk.conftest import tree
from xent_quant.cli.main import CALLED_BY_LLVM, _interrupt, main
from xent_quant.walk import collecting, job

INTERRUPTED = 130
GOES_ON = "xent-quant: interrupted; the same command goes on where this one stopped.\n"
NOTHING = "xent-quant: interrupted; nothing unfinished was left behind.\n"
COMPLETE = "xent-quant: interrupted; the result was complete by then.\n"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def command(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_a_signal_that_comes_while_llvm_calls_back_is_not_lost() -> None:
    """ctypes prints what is raised there, and numba then lacks what it compiled."""
    assert any(name.startswith(CALLED_BY_LLVM) for name in vars(ExecutionEngine))
    done = []

    def _raw_object_cache_notify() -> None:
        signal.raise_signal(signal.SIGTERM)
        done.append("the rest of it")

    def compiles() -> None:
        ctypes.CFUNCTYPE(None)(_raw_object_cache_notify)()
        time.sleep(5)

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            compiles()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == ["the rest of it"]


def test_a_signal_that_c_code_goes_on_with(model: Path, tmp_path: Path, behind_commit, capsys) -> None:
    """Python makes it a SystemError: a function "returned a result with an exception set"."""
    wanted = [1]

    def stop(done: int) -> None:
        if done == wanted[0]:
            raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    behind_commit(stop)
    arguments = [model, "--method", "rtn", "--type", "Q8_0", "--output", tmp_path / "out"]
    for wanted[0], said in ((1, NOTHING), (3, GOES_ON)):
        assert command(*arguments) == INTERRUPTED
        assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_polite_signal(number: signal.Signals, model: Path, tmp_path: Path, behind_commit, capsys) -> None:
    wanted = [1]
    if number is not signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)  # the tests run under nohup
    behind_commit(lambda done: os.kill(os.getpid(), number) if done == wanted[0] else None)
    arguments = [model, "--method", "rtn", "--type", "Q8_0", "--output", tmp_path / "out"]
    assert command(*arguments) == INTERRUPTED
    assert capsys.readouterr().err.endswith(NOTHING)
    assert list((tmp_path / "out").iterdir()) == []
    wanted[0] = 3
    assert command(*arguments) == INTERRUPTED
    assert capsys.readouterr().err.endswith(GOES_ON)
    (work,) = (tmp_path / "out").iterdir()
    assert work.name.startswith(".xent-quant-")
    wanted[0] = 99
    assert command(*arguments) == 0
    assert not list((tmp_path / "out").glob(".*"))


def test_before_a_resumed_run_has_begun(
    model: Path, text: dict[str, Any], tmp_path: Path, behind_commit, monkeypatch, capsys
) -> None:
    """The earlier run's work is still there: nothing is said of it that is not so."""
    behind_commit(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 3 else None)
    fast = ["--effort", "fast", "--threads", 1]
    arguments = [model, "--type", "Q8_0", *fast, "--output", tmp_path, "--tokens", 160, "--seqlen", 40, "--calib", *text["calib"]]
    assert command(*arguments) == INTERRUPTED
    assert capsys.readouterr().err.endswith(GOES_ON)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibration.session.Session.__init__", interrupted)
    assert command(*arguments) == INTERRUPTED
    assert capsys.readouterr().err.endswith("xent-quant: interrupted.\n")
    assert list(tmp_path.glob(".xent-quant-*/journal.json"))


def test_nohup_is_respected(model: Path, tmp_path: Path, behind_commit) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    behind_commit(lambda done: os.kill(os.getpid(), signal.SIGHUP))
    assert command(model, "--method", "rtn", "--type", "Q8_0", "--output", tmp_path) == 0


@pytest.mark.parametrize("kind", ["quantize", "calibrate"])
def test_interrupted_while_it_publishes(
    kind: str, model: Path, text: dict[str, Any], tmp_path: Path, monkeypatch, capsys
) -> None:
    """Everything is done but for the names: that is worth going on with. Or the names are given: that is complete."""
    module: Any = job if kind == "quantize" else collecting
    output, publish = tmp_path / "out", module.publish
    arguments: list[object] = [model, "--method", "rtn", "--type", "Q8_0", "--output", output]
    if kind == "calibrate":
        arguments = [
            "calibrate",
            model,
            "--output",
            output / "m.gguf",
            "--tokens",
            160,
            "--seqlen",
            40,
            "--calib",
            *text["calib"],
        ]

    def stopping(before: bool) -> Callable[..., None]:
        def stopped(*arguments: Any) -> None:
            if not before:
                publish(*arguments)
            raise KeyboardInterrupt

        return stopped

    monkeypatch.setattr(module, "publish", stopping(before=True))
    assert command(*arguments) == INTERRUPTED
    assert capsys.readouterr().err.endswith(GOES_ON)
    monkeypatch.setattr(module, "publish", stopping(before=False))
    assert command(*arguments) == INTERRUPTED
    assert capsys.readouterr().err.endswith(COMPLETE)
    assert tree(output)
    assert not list(output.glob(".*"))


def test_calibrate_can_be_begun_anew(model: Path, text: dict[str, Any], tmp_path: Path, behind_commit, capsys) -> None:
    """As the message about an unfinished run advises."""
    wanted = [3]
    behind_commit(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == wanted[0] else None)

    def calibrate(tokens: int, *more: str) -> int:
        file = tmp_path / "m.gguf"
        return command("calibrate", model, "--output", file, "--seqlen", 40, "--calib", *text["calib"], "--tokens", tokens, *more)

    assert calibrate(160) == INTERRUPTED
    wanted[0] = 99
    assert calibrate(200) == 1
    assert "add --restart to begin anew" in capsys.readouterr().err
    assert calibrate(200, "--restart") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
