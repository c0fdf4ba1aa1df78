"""One process at a time, and none after its death."""

import json
import os
import platform
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.storage.processes import fork, kill, wait, wait_for
from xent_quant.errors import ExportError
from xent_quant.storage import lock
from xent_quant.storage.locks import remove_if_dead

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def hold(path: Path, ready: Path, what: str = "it") -> None:
    with lock(path, what):
        ready.touch()
        time.sleep(60)


def test_the_file_names_its_holder_and_goes(tmp_path: Path) -> None:
    path = tmp_path / ".a.lock"
    with lock(path, "a"):
        holder = json.loads(path.read_bytes())
        assert (holder["pid"], holder["host"]) == (os.getpid(), platform.node())
        assert abs((datetime.now().astimezone() - datetime.fromisoformat(holder["since"])).total_seconds()) < 60
        with pytest.raises(ExportError, match="a: process"), lock(path, "a"):
            raise AssertionError
        assert path.exists()
    assert not path.exists()
    with lock(path, "a"):
        pass


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_processes_one_gets_in(count: int, tmp_path: Path) -> None:
    path, gate = tmp_path / ".a.lock", tmp_path / "gate"

    def compete(index: int) -> None:
        wait_for(gate)
        try:
            with lock(path, "a.gguf"):
                (tmp_path / "winner").write_text(str(os.getpid()))
                deadline = time.monotonic() + 20
                while len(list(tmp_path.glob("refused-*"))) < count - 1:
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
        except ExportError as error:
            (tmp_path / f"message-{index}").write_text(str(error))
            (tmp_path / f"message-{index}").rename(tmp_path / f"refused-{index}")

    processes = [fork(lambda index=index: compete(index)) for index in range(count)]
    gate.touch()
    assert [wait(process) for process in processes] == [0] * count
    winner = int((tmp_path / "winner").read_text())
    refused = list(tmp_path.glob("refused-*"))
    assert len(refused) == count - 1
    assert winner in processes
    for message in refused:
        assert message.read_text().startswith(f"a.gguf: process {winner} on {platform.node()} has been writing it since 20")
        assert message.read_text().endswith("; wait for it, or stop it")
    assert not path.exists()


def test_exclusive_under_contention(tmp_path: Path) -> None:
    """Lock files that are removed and made all the time never let two in."""
    path, inside = tmp_path / ".a.lock", tmp_path / "inside"

    def work() -> None:
        for _ in range(25):
            with lock(path, "a", wait=30):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is in
                inside.unlink()

    processes = [fork(work) for _ in range(4)]
    assert [wait(process) for process in processes] == [0] * 4


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path, ready = tmp_path / ".a.lock", tmp_path / "ready"
    process = fork(lambda: hold(path, ready))
    wait_for(ready)
    with pytest.raises(ExportError, match=f"process {process} "), lock(path, "a"):
        raise AssertionError
    kill(process)
    assert path.exists()
    with lock(path, "a"):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_nor_do_its_workers(tmp_path: Path) -> None:
    path, ready = tmp_path / ".a.lock", tmp_path / "ready"

    def hold_with_worker() -> None:
        with lock(path, "a"):
            worker = fork(lambda: time.sleep(60))
            (tmp_path / "worker").write_text(str(worker))
            ready.touch()
            time.sleep(60)

    process = fork(hold_with_worker)
    wait_for(ready)
    kill(process)
    try:
        with lock(path, "a"):
            pass
    finally:
        os.kill(int((tmp_path / "worker").read_text()), 9)


def test_a_forked_child_does_not_release(tmp_path: Path) -> None:
    path = tmp_path / ".a.lock"
    manager = lock(path, "a")
    with manager:
        assert wait(fork(lambda: manager.__exit__(None, None, None))) == 0
        assert path.exists()
        with pytest.raises(ExportError), lock(path, "a"):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_waiting(tmp_path: Path) -> None:
    path, ready = tmp_path / ".a.lock", tmp_path / "ready"

    def briefly() -> None:
        with lock(path, "a"):
            ready.touch()
            time.sleep(0.3)

    process = fork(briefly)
    wait_for(ready)
    started = time.monotonic()
    with pytest.raises(ExportError), lock(path, "a", wait=0.1):
        raise AssertionError
    assert time.monotonic() - started >= 0.1
    with lock(path, "a", wait=20):
        pass
    assert wait(process) == 0


def test_links_are_not_followed(tmp_path: Path) -> None:
    for content in (None, b"precious"):
        if content:
            (tmp_path / "elsewhere").write_bytes(content)
        (tmp_path / ".a.lock").unlink(missing_ok=True)
        (tmp_path / ".a.lock").symlink_to("elsewhere")
        with pytest.raises(ExportError, match="is a link"), lock(tmp_path / ".a.lock", "a"):
            raise AssertionError
        remove_if_dead(tmp_path / ".a.lock")
        assert (tmp_path / ".a.lock").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_files_of_others_are_no_dead_locks(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"42"), ("json", b'{"pid": 1}')):
        (tmp_path / f".{name}.lock").write_bytes(content)
        remove_if_dead(tmp_path / f".{name}.lock")
        assert (tmp_path / f".{name}.lock").read_bytes() == content
    with lock(tmp_path / ".a.lock", "a"):
        remove_if_dead(tmp_path / ".a.lock")
        assert (tmp_path / ".a.lock").exists()
        assert json.loads((tmp_path / ".a.lock").read_bytes())["pid"] == os.getpid()
