"""Who gets a work folder, and who is refused."""

import os
import stat
import time
from pathlib import Path

import pytest

from tests.storage.processes import fork, kill, wait, wait_for
from xent_quant.errors import ExportError
from xent_quant.storage import Move, PositionalFile, Shared, Target, Workspace, publish


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_kept_until_published(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    targets = [Target(output / "a.gguf"), Target(output / "folder", folder=True)]
    with Workspace.open(output, targets, force=False) as workspace:
        assert workspace.fresh
        assert stat.S_IMODE(workspace.path.stat().st_mode) == 0o700
        assert workspace.path.parent == output
        with PositionalFile.create(workspace.path / "a") as file:
            file.write_at(bytes(5000), 0)
            file.truncate(10**9)
        assert workspace.nbytes() >= 5000
    assert names(output) == [workspace.path.name]
    with Workspace.open(output, targets[::-1], force=False) as again:
        assert again.path == workspace.path
        assert not again.fresh
        again.clear()
        assert again.nbytes() == 0
        (again.path / "a").write_bytes(b"a")
        (again.path / "b").mkdir()
        (again.path / "b" / "c").write_bytes(b"c")
        publish(
            again,
            [Move(again.path / "a", targets[0].path), Move(again.path / "b", targets[1].path)],
            [Shared(output / "README.md", lambda old, names: repr(old).encode())],
        )
    assert names(output) == ["README.md", "a.gguf", "folder"]
    assert (output / "a.gguf").read_bytes() == b"a"
    assert (output / "folder" / "c").read_bytes() == b"c"
    assert (output / "README.md").read_bytes() == b"None"


def test_an_empty_one_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Workspace.open(tmp_path, [Target(tmp_path / "a")], force=False):
        raise KeyError
    assert names(tmp_path) == []


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_bytes(b"old")
    folder.mkdir()
    (tmp_path / "link").symlink_to("absent")

    def refused(*targets: Target, force: bool) -> str:
        with pytest.raises(ExportError) as caught, Workspace.open(targets[0].path.parent, targets, force=force):
            raise AssertionError
        return str(caught.value)

    for target in (Target(file), Target(folder, True), Target(tmp_path / "link")):
        message = refused(Target(tmp_path / "new"), target, force=False)
        assert message == f"{target.path}: exists already; add --force to replace it, or choose another --output"
        with Workspace.open(tmp_path, [target], force=True):
            pass
    for force in (False, True):
        assert "is a folder, where a file is to be written" in refused(Target(folder), force=force)
        assert "is a file, where a folder is to be written" in refused(Target(file, True), force=force)
        assert "is a file; choose a folder as --output" in refused(Target(file / "a"), force=force)
    assert names(tmp_path) == ["file", "folder", "link"]
    with pytest.raises(ValueError, match="not distinct names"), Workspace.open(tmp_path, [Target(file / "a")], force=True):
        pass


def test_an_empty_work_folder_goes_even_where_the_target_exists(tmp_path: Path) -> None:
    """What a run left that was killed between the last two calls of its publication."""
    target = Target(tmp_path / "a")
    with Workspace.open(tmp_path, [target], force=False) as workspace:
        pass
    workspace.path.mkdir(0o700)
    target.path.write_bytes(b"published")
    with pytest.raises(ExportError, match="exists already"), Workspace.open(tmp_path, [target], force=False):
        raise AssertionError
    assert names(tmp_path) == ["a"]


def test_errors_of_the_system_in_one_line(tmp_path: Path) -> None:
    targets = [Target(tmp_path / "a")]
    with pytest.raises(ExportError, match=r"/absent: No such file"), Workspace.open(tmp_path, targets, force=False):
        (tmp_path / "absent").read_bytes()


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"precious")
    targets = [Target(output / "a")]

    def refused(match: str, path: Path, to: Path) -> None:
        path.symlink_to(to)
        with pytest.raises(ExportError, match=match), Workspace.open(output, targets, force=True):
            raise AssertionError
        path.unlink()
        assert names(output) == []

    with Workspace.open(output, targets, force=False) as workspace:
        pass
    refused("own", workspace.path, elsewhere)
    refused("own", workspace.path, tmp_path / "absent")
    for name in (".a.lock", ".xent-quant.lock"):
        refused("is a link", output / name, elsewhere / "file")
        refused("is a link", output / name, elsewhere / "absent")
    workspace.path.write_bytes(b"")
    with pytest.raises(ExportError, match="own"), Workspace.open(output, targets, force=True):
        raise AssertionError
    workspace.path.unlink()

    with Workspace.open(output, targets, force=False) as workspace:
        staged = workspace.path / "a"
        staged.symlink_to(elsewhere / "file")
        with pytest.raises(ExportError):
            PositionalFile.create(staged)
        with pytest.raises(ExportError, match="is a link"):
            publish(workspace, [Move(staged, output / "a")])
        staged.unlink()
        staged.write_bytes(b"new")
        (output / "README.md").symlink_to(elsewhere / "file")
        with pytest.raises(ExportError, match="is a link"):
            publish(workspace, [Move(staged, output / "a")], [Shared(output / "README.md", lambda old, names: b"")])
        (output / "README.md").unlink()
        publish(workspace, [Move(staged, output / "a")])
    assert names(output) == ["a"]
    assert names(elsewhere) == ["file"]
    assert (elsewhere / "file").read_bytes() == b"precious"


def test_a_link_that_is_replaced_keeps_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "a").symlink_to("elsewhere")
    with Workspace.open(tmp_path, [Target(tmp_path / "a")], force=True) as workspace:
        (workspace.path / "a").write_bytes(b"new")
        publish(workspace, [Move(workspace.path / "a", tmp_path / "a")])
    assert names(tmp_path) == ["a", "elsewhere"]
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_the_output_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    target = tmp_path / "out" / "a"
    with Workspace.open(tmp_path / "out", [Target(target)], force=False) as workspace:
        (workspace.path / "a").write_bytes(b"new")
        publish(workspace, [Move(workspace.path / "a", target)])
    assert names(tmp_path / "disk") == ["a"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_work_folder_is_refused(tmp_path: Path) -> None:
    with Workspace.open(tmp_path, [Target(tmp_path / "a")], force=False) as workspace:
        pass
    workspace.path.mkdir()
    os.chown(workspace.path, 12345, 12345)
    with pytest.raises(ExportError, match="own"), Workspace.open(tmp_path, [Target(tmp_path / "a")], force=False):
        raise AssertionError


@pytest.mark.parametrize("count", [2, 4])
def test_of_several_runs_one_gets_in(count: int, tmp_path: Path) -> None:
    """Each with a name of its own besides, so that only the lock of the common one is between them."""
    output = tmp_path / "out"

    def compete(index: int) -> None:
        wait_for(tmp_path / "gate")
        try:
            with Workspace.open(output, [Target(output / "a"), Target(output / f"b{index}")], force=False):
                (tmp_path / "winner").write_text(str(os.getpid()))
                deadline = time.monotonic() + 20
                while len(list(tmp_path.glob("refused-*"))) < count - 1:
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
        except ExportError as error:
            (tmp_path / f"message-{index}").write_text(str(error))
            (tmp_path / f"message-{index}").rename(tmp_path / f"refused-{index}")

    processes = [fork(lambda index=index: compete(index)) for index in range(count)]
    (tmp_path / "gate").touch()
    assert [wait(process) for process in processes] == [0] * count
    winner = (tmp_path / "winner").read_text()
    for message in tmp_path.glob("refused-*"):
        assert message.read_text().startswith(f"{output / 'a'}: process {winner} on ")
    assert names(output) == []


def test_runs_of_different_names_go_on_beside_each_other(tmp_path: Path) -> None:
    """Each contributes to the same README, none is lost, and none is disturbed by another's recovery."""
    output = tmp_path / "out"

    def run(index: int) -> None:
        wait_for(tmp_path / "gate")
        for _ in range(5):
            target = output / f"file-{index}"
            with Workspace.open(output, [Target(target)], force=True) as workspace:
                staged = workspace.path / "file"
                staged.write_bytes(b"%d" % index)
                publish(
                    workspace,
                    [Move(staged, target)],
                    [Shared(output / "README.md", lambda old, names: (old or b"") + b"%d\n" % index)],
                )

    processes = [fork(lambda index=index: run(index)) for index in range(4)]
    (tmp_path / "gate").touch()
    assert [wait(process) for process in processes] == [0] * 4
    assert names(output) == ["README.md", *(f"file-{index}" for index in range(4))]
    assert sorted((output / "README.md").read_text().split()) == sorted("0123" * 5)


def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    targets = [Target(output / "a")]

    def run() -> None:
        with Workspace.open(output, targets, force=False) as workspace:
            (workspace.path / "part").write_bytes(b"half")
            (tmp_path / "ready").touch()
            time.sleep(60)

    process = fork(run)
    wait_for(tmp_path / "ready")
    with pytest.raises(ExportError, match=f"process {process} "), Workspace.open(output, targets, force=True):
        raise AssertionError
    kill(process)
    with Workspace.open(output, targets, force=False) as workspace:
        assert not workspace.fresh
        assert names(workspace.path) == ["part"]
        workspace.clear()
    assert names(output) == []
