"""scripts/stock_llama: where its programs are looked for, and that half a build is never taken for one."""

import subprocess
from pathlib import Path

import pytest

from scripts import stock_llama


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XENT_QUANT_STOCK", str(folder))
    return folder


def test_missing_programs_are_told_with_the_command_that_builds_them(cache: Path) -> None:
    with pytest.raises(stock_llama.Missing, match="is not there: scripts/stock_llama builds"):
        stock_llama.program("quantize")


def test_what_others_can_write_to_is_not_run(cache: Path) -> None:
    folder = cache / f"llama.cpp-{stock_llama.VERSION}"
    folder.mkdir(parents=True)
    assert stock_llama.program("quantize").parent == folder / "bin"
    for writable in (cache, folder):
        before = writable.stat().st_mode
        writable.chmod(0o777)
        with pytest.raises(stock_llama.Missing, match=f"others can write to {writable}: chmod go-w"):
            stock_llama.home()
        writable.chmod(before)


@pytest.mark.parametrize("program", ["-m", "--build", "cmake"])
def test_a_build_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path, program: str) -> None:
    """At any of its steps: pip, cmake, the compiler."""

    def run(*command: object) -> None:
        if program in command:
            raise subprocess.CalledProcessError(1, [str(word) for word in command])

    monkeypatch.setattr(stock_llama, "run", run)
    monkeypatch.setattr(stock_llama.shutil, "which", lambda name: name)
    monkeypatch.setattr(stock_llama.shutil, "unpack_archive", lambda archive, folder: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "llama.tar.gz"]))
    with pytest.raises(subprocess.CalledProcessError):
        stock_llama.build(1)
    assert list(cache.iterdir()) == []
