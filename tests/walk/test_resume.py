"""A run that was stopped anywhere and is repeated writes what an undisturbed one writes, byte for byte."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xent_quant
from exporters.gguf.export import GGUFWriter
from tests.walk.conftest import LAYERS, Tree, export, tree
from xent_quant.errors import ExportError, Interrupted
from xent_quant.model.sizes import STATE_FILES
from xent_quant.walk import collecting, job

STEPS = LAYERS + 2
FAST = {"effort": "fast", "threads": 1}
Interrupt = Callable[[int | None], None]

CASES: dict[str, dict[str, Any]] = {
    "gguf gptq": {"type": "Q4_0", **FAST},
    "onnx": {"formats": ["onnx"], **FAST},
    "bnb": {"formats": ["bnb"], "split_size": "100K", "threads": 1},
    "dropped": {"type": "Q4_0", "drop_experts": 2, **FAST},
    "two types": {"type": ["Q4_0", "Q8_0"], **FAST},
    "calibrate": {},
}


def make(case: str, model: Path, output: Path, text: dict[str, Any], **more: Any) -> int | None:
    """Layers that were done by an earlier run, where that is told."""
    if case == "calibrate":
        xent_quant.calibrate(model, output=output / "imatrix.gguf", **text, **more)
        return None
    options = CASES[case]
    return export(model, output, **options, **({} if "bnb" in options.get("formats", ()) else text), **more).resumed


@pytest.mark.parametrize("case", CASES)
def test_stopped_behind_every_commit_in_turn(case: str, model: Path, text: Any, tmp_path: Path, interrupt: Interrupt) -> None:
    output = tmp_path / "out"
    make(case, model, tmp_path / "whole", text)
    for done in range(STEPS + 1):
        interrupt(done)
        if not done and case == "bnb":
            continue  # nothing is committed before the first step
        with pytest.raises(KeyboardInterrupt) as stopped:
            make(case, model, output, text)
        names = [path.name for path in output.iterdir()]
        if done < 2 and case != "dropped":  # for which the model has run once by then
            assert names == []  # hardly anything was done
        else:
            assert "the same command goes on" in str(stopped.value)
            assert len(names) == 1
            assert names[0].startswith(".xent-quant-")
    interrupt(None)
    assert make(case, model, output, text) in (LAYERS, None)
    assert tree(output) == tree(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("done", range(STEPS + 1))
@pytest.mark.parametrize("case", CASES)
def test_stopped_behind_one_commit(case: str, done: int, model: Path, text: Any, tmp_path: Path, interrupt: Interrupt) -> None:
    if not done and case == "bnb":
        pytest.skip("nothing is committed before the first step")
    make(case, model, tmp_path / "whole", text)
    interrupt(done)
    with pytest.raises(KeyboardInterrupt):
        make(case, model, tmp_path / "out", text)
    interrupt(None)
    assert make(case, model, tmp_path / "out", text) in (min(done - 1, LAYERS) if done > 1 else 0, None)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_stopped_within_a_layer(model: Path, text: Any, tmp_path: Path, interrupt: Interrupt, monkeypatch) -> None:
    """What the layer has written so far, into files and streams, is written again."""
    make("gguf gptq", model, tmp_path / "whole", text)
    from xent_quant.walk.work import Work

    stage, left = Work._stage, [0]

    def stages(work: Work, *arguments: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        stage(work, *arguments)

    monkeypatch.setattr(Work, "_stage", stages)
    for count in (19, 9, 15):  # a layer has 16 stages, and there are two
        left[0] = count
        with pytest.raises(Interrupted):
            make("gguf gptq", model, tmp_path / "out", text)
    left[0] = 1000
    assert make("gguf gptq", model, tmp_path / "out", text) == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("case", ["gguf gptq", "calibrate"])
def test_killed_while_the_streams_were_made(case: str, model: Path, text: Any, tmp_path: Path, interrupt, monkeypatch) -> None:
    """A file that has its name, but not its size yet, behind the first commit."""
    make(case, model, tmp_path / "whole", text)
    module = collecting if case == "calibrate" else job
    monkeypatch.setattr(module, "kept", lambda *_: __import__("contextlib").nullcontext())  # as a killed process does not
    interrupt(0)
    with pytest.raises(KeyboardInterrupt):
        make(case, model, tmp_path / "out", text)
    (work,) = (tmp_path / "out").iterdir()
    for stream in range(2):
        for name in STATE_FILES:
            (work / f"{stream}.{name}").touch()
    interrupt(None)
    make(case, model, tmp_path / "out", text)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_threads_change_no_byte_of_a_resumed_run(model: Path, text: Any, tmp_path: Path, interrupt: Interrupt) -> None:
    options = {"type": "Q4_0", **text, "tokens": 80}
    export(model, tmp_path / "whole", threads=1, **options)
    interrupt(2)
    with pytest.raises(Interrupted):
        export(model, tmp_path / "out", threads=1, **options)
    interrupt(None)
    assert export(model, tmp_path / "out", threads=2, **options).resumed == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def stopped(case: str, model: Path, output: Path, text: Any, interrupt: Interrupt, **more: Any) -> Tree:
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        make(case, model, output, text, **more)
    interrupt(None)
    return tree(output)


def test_another_run_is_refused_and_named(model: Path, text: Any, tmp_path: Path, interrupt: Interrupt, monkeypatch) -> None:
    output = tmp_path / "out"
    make("gguf gptq", model, tmp_path / "whole", text)
    before = stopped("gguf gptq", model, output, text, interrupt)
    for change, words in (
        ({"effort": "normal"}, '--effort was "fast", is "normal"'),
        ({"tokens": 200}, "text (--calib, --tokens, --seqlen, --seed) changed"),
        ({"method": "imatrix"}, 'methods was "gptq", is "imatrix"'),
        ({"tensor_types": ["attn_q=Q8_0"]}, 'exports types blk.0.attn_q.weight was "Q4_0", is "Q8_0"'),
    ):
        with pytest.raises(ExportError, match="add --restart to begin anew") as caught:
            export(model, output, **{"type": "Q4_0", **FAST, **text, **change})
        assert words in str(caught.value)
    with monkeypatch.context() as patched:
        patched.setattr(job, "software", lambda: {"xent-quant": "another"})
        with pytest.raises(ExportError, match="version xent-quant was"):
            make("gguf gptq", model, output, text)
    assert tree(output) == before
    make("gguf gptq", model, output, text)
    assert tree(output) == tree(tmp_path / "whole")


def test_restart_begins_anew(model: Path, text: Any, tmp_path: Path, interrupt: Interrupt) -> None:
    stopped("gguf gptq", model, tmp_path / "out", text, interrupt)
    more = {**text, "tokens": 200}
    assert make("gguf gptq", model, tmp_path / "out", more, restart=True) == 0
    make("gguf gptq", model, tmp_path / "whole", more)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["gguf", "bnb"])
def test_files_cut_elsewhere_are_another_run(kind: str, model: Path, tmp_path: Path, interrupt: Interrupt) -> None:
    """The same number of files under the same names, though other tensors in each."""
    options = {"formats": [kind], "method": "rtn", "output": tmp_path, "type": ("Q4_0",) if kind == "gguf" else ()}
    interrupt(2)
    sizes = ("60K", "70K") if kind == "gguf" else ("200K", "210K")
    planned = [xent_quant.plan(model, **{**options, "split_size": size}) for size in sizes]
    assert planned[0][0].nbytes == planned[1][0].nbytes
    with pytest.raises(Interrupted):
        xent_quant.quantize(model, split_size=sizes[0], **options)
    interrupt(None)
    with pytest.raises(ExportError, match="--split-size"):
        xent_quant.quantize(model, split_size=sizes[1], **options)


def test_what_a_header_says_is_that_of_one_run(model: Path, tmp_path: Path, interrupt: Interrupt) -> None:
    """A file of statistics under another name, or another card of the checkpoint: the header holds the old one."""
    options = {"type": "Q4_0", "output": tmp_path / "out"}
    xent_quant.calibrate(model, output=tmp_path / "a.gguf", tokens=160, seqlen=40)
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    interrupt(2)
    with pytest.raises(Interrupted):
        xent_quant.quantize(model, imatrix=tmp_path / "a.gguf", **options)
    interrupt(None)
    with pytest.raises(ExportError, match=r'quantize\.imatrix\.file was "a\.gguf", is "b\.gguf"'):
        xent_quant.quantize(model, imatrix=tmp_path / "b.gguf", **options)


@pytest.fixture
def syncing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """syncing(act) has `act` called with the number of earlier syncs before each one of a GGUF file under way."""
    sync, count = GGUFWriter.sync, iter(range(1000))

    def install(act: Callable[[int], None]) -> None:
        def synced(writer: GGUFWriter) -> None:
            act(next(count))
            sync(writer)

        monkeypatch.setattr(GGUFWriter, "sync", synced)

    return install


def test_without_text_a_step_is_committed_beside_the_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncing: Any, behind_commit: Any
) -> None:
    """Of which the journal knows nothing yet."""
    put, puts, saved, seen = GGUFWriter.put, [], [], []
    monkeypatch.setattr(GGUFWriter, "put", lambda writer, *arguments: puts.append(arguments) or put(writer, *arguments))

    def act(number: int) -> None:
        before, until = len(puts), time.monotonic() + 20
        while not number and len(puts) == before and time.monotonic() < until:
            time.sleep(0.01)
        seen.append((len(puts) > before, list(saved)))

    syncing(act)
    behind_commit(saved.append)
    export(model, tmp_path / "out", method="rtn", type="Q4_0")
    assert seen[0] == (True, [])  # more was put while it waited
    assert saved == list(range(1, LAYERS + 3))


def test_a_disk_that_fails_beside_the_next_step_is_told(model: Path, tmp_path: Path, syncing: Any) -> None:
    def act(number: int) -> None:
        if number == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    syncing(act)
    options = {"method": "rtn", "type": "Q4_0"}
    with pytest.raises(ExportError, match=r"No space left .* the same command goes on where this one stopped"):
        export(model, tmp_path / "out", **options)
    assert export(model, tmp_path / "out", **options).resumed
    export(model, tmp_path / "whole", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
