"""All or nothing, whichever call to the system is the last one, or fails."""

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.storage.processes import fork, wait
from xent_quant.errors import ExportError
from xent_quant.storage import Move, Shared, Target, Workspace, publish, recover

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
SCENARIOS = {
    "one file": ["a.gguf"],
    "shards": ["a-1.gguf", "a-2.gguf", "a-3.gguf", "a.imatrix"],
    "a folder": ["a/"],
    "file and folder": ["a.gguf", "a-onnx/"],
}
KILLED = 77
README = "README.md"


class Case:
    """A publication over an old result, in a folder of its own that can be made anew any number of times."""

    def __init__(self, folder: Path, names: list[str], shared: bool = True, old: bool = True) -> None:
        self.output = folder / "out"
        self.names = names
        self.shared = shared
        self.old_result = self.result("old") if old else {}
        self.new_result = self.result("new")
        if shared and old:
            self.new_result[README] = b"old\nnew\n"

    def result(self, age: str) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for name in self.names:
            if name.endswith("/"):
                files |= {f"{name}model": f"{age} {name}".encode(), f"{name}deep/{age}": b"", f"{name}deep/b": age.encode()}
            else:
                files[name] = f"{age} {name}".encode()
        return files | ({README: f"{age}\n".encode()} if self.shared else {})

    def make(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        for name, data in self.old_result.items():
            (self.output / name).parent.mkdir(parents=True, exist_ok=True)
            (self.output / name).write_bytes(data)

    @property
    def targets(self) -> list[Target]:
        return [Target(self.output / name, name.endswith("/")) for name in self.names]

    def open(self) -> Any:
        return Workspace.open(self.output, self.targets, force=True)

    def stage(self, workspace: Workspace) -> None:
        for name, data in self.new_result.items():
            if name != README:
                path = workspace.path / "parts" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def publish(self, workspace: Workspace) -> None:
        moves = [Move(workspace.path / "parts" / target.path.name, target.path) for target in self.targets]
        readme = Shared(self.output / README, lambda old, names: (old or b"") + b"new\n")
        publish(workspace, moves, [readme] if self.shared else [])

    def files(self) -> dict[str, bytes]:
        """All there is, but for work folders and locks."""
        return {
            path.relative_to(self.output).as_posix(): path.read_bytes()
            for path in self.output.rglob("*")
            if path.is_file() and not path.relative_to(self.output).parts[0].startswith(".")
        }

    def hidden(self) -> list[str]:
        return sorted(path.name for path in self.output.iterdir() if path.name.startswith("."))

    def check(self, *, recovered: bool = True) -> bool:
        """That all is old (False) or all is new (True), and nothing else is left but a work folder that can be resumed."""
        files = self.files()
        assert files in (self.old_result, self.new_result)
        if recovered:
            hidden = self.hidden()
            assert len(hidden) <= 1
            for name in hidden:
                work = self.output / name
                assert name.startswith(".xent-quant-")
                assert not {"publication.json", "published.json"} & {entry.name for entry in work.iterdir()}
                if files == self.new_result:
                    assert list(work.iterdir()) == []
        return files == self.new_result

    def check_in_between(self) -> None:
        """What holds at every instant: no old result is gone before all of the new one is there, and whoever can open the
        first file finds the others of the same run; a single file always has its name."""
        files = self.files()
        if files != self.new_result:
            contents = [path.read_bytes() for path in self.output.rglob("*") if path.is_file()]
            assert all(data in contents for data in self.old_result.values())
        main = {name: data for name, data in files.items() if name.startswith(self.names[0])}
        if len(self.names) > 1 and main:
            age = "new" if main.items() <= self.new_result.items() else "old"
            wanted = self.new_result if age == "new" else self.old_result
            assert {name: data for name, data in files.items() if name != README} == {
                name: data for name, data in wanted.items() if name != README
            }
        if self.old_result and len(self.names) == 1 and not self.names[0].endswith("/"):
            assert main

    def finish(self) -> None:
        """A second run publishes what the first has staged, or all of it again."""
        with self.open() as workspace:
            if workspace.fresh:
                self.stage(workspace)
            self.publish(workspace)
        assert self.check()
        assert self.hidden() == []


class Faults:
    """Counts the calls that change the file system, and does something before or after the one numbered `at`; `on`: and
    before or after all the later ones."""

    def __init__(
        self, at: int = -1, act: Callable[[], None] = lambda: None, *, after: bool = False, on: bool = False, calls=CALLS
    ) -> None:
        self.count = 0
        self.at = at
        self.act = act
        self.after = after
        self.on = on
        self.calls = calls

    def __enter__(self) -> "Faults":
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, self.wrap(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self.real.items():
            setattr(os, name, call)

    def wrap(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            hit = False
            if name in self.calls:
                hit = self.count == self.at or (self.on and self.count > self.at)
                self.count += 1
            if hit and not self.after:
                self.act()
            try:
                self.real[name](*arguments, **options)
            finally:
                if hit and self.after:
                    self.act()

        return call


def die() -> None:
    os._exit(KILLED)


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")


def interrupt() -> None:
    raise KeyboardInterrupt


def do_not_sync() -> None:
    """These tests kill processes, not machines."""
    os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def tmp_path(tmp_path_factory) -> Iterator[Path]:
    """In memory where that can be had: thousands of folders are made and removed."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("publication")
    with tempfile.TemporaryDirectory(prefix="xent-quant-test-", dir=parent) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def small_process() -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in a process without the libraries of other tests, which forks ten times as fast."""
    with multiprocessing.get_context("spawn").Pool(1, do_not_sync) as pool:
        yield lambda function, *arguments: pool.apply(function, arguments)


@pytest.fixture(params=SCENARIOS)
def case(request, tmp_path: Path) -> Case:
    return Case(tmp_path, SCENARIOS[request.param], shared=request.param != "a folder")


def killed_publication(case: Case, at: int, after: bool) -> bool:
    """Whether the run got as far as its call `at`."""
    case.make()

    def run() -> None:
        with case.open() as workspace:
            case.stage(workspace)
            with Faults(at, die, after=after):
                case.publish(workspace)

    code = wait(fork(run))
    assert code in (0, KILLED)
    return code == KILLED


def calls_to_publish(case: Case) -> int:
    case.make()
    with case.open() as workspace, Faults() as faults:
        case.stage(workspace)
        staging = faults.count
        case.publish(workspace)
    assert case.check()
    assert case.hidden() == []
    return faults.count - staging


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_call(case: Case, after: bool, small_process) -> None:
    small_process(kill_at_each_call, case, after)


def kill_at_each_call(case: Case, after: bool) -> None:
    outcomes = []
    for at in itertools.count():
        if not killed_publication(case, at, after):
            break
        case.check_in_between()
        recover(case.output)
        outcomes.append(case.check())
        recover(case.output)
        assert case.check() == outcomes[-1]
        if not outcomes[-1]:
            case.finish()
    assert len(outcomes) >= calls_to_publish(case) - 2
    assert outcomes == sorted(outcomes)  # forward from the journal on
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("lost", [False, True], ids=["forward", "back"])
def test_recovery_killed_at_any_call(lost: bool, tmp_path: Path, small_process) -> None:
    """`lost`: something staged has gone, so that the publication can only be undone."""
    small_process(kill_recovery_at_each_call, Case(tmp_path, ["a.gguf", "b.gguf", "c/"]), tmp_path / "kept", lost)


def kill_recovery_at_each_call(case: Case, kept: Path, lost: bool) -> None:
    undone = 0
    for at in range(0, calls_to_publish(case), 3):
        killed_publication(case, at, after=False)
        journals = list(case.output.glob(".xent-quant-*/publication.json"))
        if not journals:
            continue
        if lost:
            staged = journals[0].parent / "parts" / "a.gguf"
            if not staged.exists():
                continue
            staged.unlink()
            undone += 1
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(case.output, kept, copy_function=os.link)  # with second names kept second names
        for after in range(100):

            def run(after: int = after) -> None:
                with Faults(after, die):
                    recover(case.output)

            if wait(fork(run)) == 0:
                break
            case.check_in_between()
            recover(case.output)
            assert case.check() != lost
            shutil.rmtree(case.output)
            shutil.copytree(kept, case.output, copy_function=os.link)
        assert case.check() != lost
    assert not lost or undone > 2


@pytest.mark.parametrize("old", [True, False], ids=["over an old result", "beside nothing"])
@pytest.mark.parametrize("names", SCENARIOS.values(), ids=SCENARIOS)
def test_any_call_failing(names: list[str], old: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, names, old=old)
    failures = 0
    for at in range(calls_to_publish(case)):
        case.make()
        with case.open() as workspace:
            case.stage(workspace)
            staged = sorted(workspace.path.rglob("*"))
            message = ""
            with Faults(at, fail):
                try:
                    case.publish(workspace)
                except ExportError as error:
                    message = str(error)
            assert case.check(recovered=False) == (not message)
            if message:
                failures += 1
                assert "No space left" in message
                assert "\n" not in message
                assert sorted(path for path in workspace.path.rglob("*") if "shared" not in path.parts) == staged
                case.publish(workspace)
        recover(case.output)
        assert case.check()
        assert case.hidden() == []
    assert failures > 8


def test_the_message_of_a_failure(tmp_path: Path) -> None:
    case = Case(tmp_path, ["a.gguf"])
    case.make()
    with case.open() as workspace:
        case.stage(workspace)
        with Faults(0, fail, calls=("link",)):  # a file system that has none
            case.publish(workspace)
    assert case.check()
    case.make()
    with case.open() as workspace:
        case.stage(workspace)
        with Faults(2, fail, calls=("replace",)), pytest.raises(ExportError) as caught:
            case.publish(workspace)
    assert str(caught.value) == (
        f"some file: No space left on device; the old result is untouched, the new one is kept in {workspace.path}: "
        "put that right and run again"
    )
    case.finish()


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_at_any_call(case: Case, after: bool) -> None:
    for at in range(calls_to_publish(case)):
        case.make()
        with case.open() as workspace:
            case.stage(workspace)
            with Faults(at, interrupt, after=after), pytest.raises(KeyboardInterrupt):
                case.publish(workspace)
            if not case.check(recovered=False):
                case.publish(workspace)
        recover(case.output)
        assert case.check()


def test_failing_from_some_call_on(case: Case) -> None:
    """Not even the way back is open: whoever comes next goes on."""
    half = 0
    for at in range(calls_to_publish(case)):
        case.make()
        with case.open() as workspace:
            case.stage(workspace)
            with Faults(at, fail, on=True):
                try:
                    case.publish(workspace)
                except ExportError as error:
                    half += "half done" in str(error)
            case.check_in_between()
        recover(case.output)
        if not case.check():
            case.finish()
    assert half > 2


def test_without_hard_links(tmp_path: Path, small_process) -> None:
    small_process(kill_without_hard_links, Case(tmp_path, SCENARIOS["shards"]))


def kill_without_hard_links(case: Case) -> None:
    link = os.link

    def lacking(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.link = lacking
    try:
        for at in range(calls_to_publish(case)):
            killed_publication(case, at, after=False)
            recover(case.output)
            if not case.check():
                case.finish()
    finally:
        os.link = link


def test_the_next_run_recovers(case: Case) -> None:
    """Another one of the same folder, and of the same names."""
    middle = calls_to_publish(case) * 2 // 3
    killed_publication(case, middle, after=False)
    other = case.output / "other"
    with Workspace.open(case.output, [Target(other)], force=False) as workspace:
        assert case.check(recovered=False)
        (workspace.path / "other").write_bytes(b"")
        publish(workspace, [Move(workspace.path / "other", other)])
    other.unlink()
    assert case.hidden() == []
    killed_publication(case, middle, after=False)
    with case.open() as workspace:
        assert workspace.fresh
        assert case.check(recovered=False)


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    case = Case(tmp_path, ["a.gguf", "b.gguf"])
    for at in range(calls_to_publish(case)):
        killed_publication(case, at, after=False)
        if list(case.output.glob(".xent-quant-*/publication.json")) and not (case.output / "a.gguf").exists():
            break
    (case.output / "a.gguf").write_bytes(b"from a backup")
    for _ in range(2):
        with pytest.raises(ExportError, match=r"a\.gguf: appeared after"):
            recover(case.output)
    (case.output / "a.gguf").unlink()
    recover(case.output)
    assert case.check()


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"{}",
        b"[]",
        b'{"moves": [{"staged": "../../x", "target": "a", "replaces": false, "vacate": false}]}',
        b'{"moves": [{"staged": "/x", "target": "a", "replaces": false, "vacate": false}]}',
        b'{"moves": [{"staged": "x", "target": "../a", "replaces": false, "vacate": false}]}',
        b'{"moves": [{"staged": "x", "target": "..", "replaces": false, "vacate": false}]}',
        rb'{"moves": [{"staged": "x", "target": "\ud800", "replaces": false, "vacate": false}]}',
        rb'{"moves": [{"staged": "x\u0000", "target": "a", "replaces": false, "vacate": false}]}',
    ],
)
def test_hostile_journals(journal: bytes, tmp_path: Path) -> None:
    work = tmp_path / "out" / ".xent-quant-0123456789ab"
    work.mkdir(parents=True)
    (work / "publication.json").write_bytes(journal)
    with pytest.raises(ExportError, match="is no journal"):
        recover(tmp_path / "out")
    assert (work / "publication.json").read_bytes() == journal


def test_nothing_to_recover(tmp_path: Path) -> None:
    recover(tmp_path / "absent")
    recover(tmp_path)
    work = tmp_path / ".xent-quant-0123456789ab"
    work.mkdir()
    (work / "part").write_bytes(b"")
    (tmp_path / ".xent-quant-ffffffffffff").symlink_to(work)
    (work / "journal.json").write_text(json.dumps({}))
    recover(tmp_path)
    assert sorted(path.name for path in work.iterdir()) == ["journal.json", "part"]
