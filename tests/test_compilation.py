"""Kernels where nothing can be kept, where what was kept is damaged or another user's, and over threads."""

import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import xent_quant
from xent_quant import compilation, formats

PROGRAM = """
import logging, numpy as np
logging.basicConfig()
from xent_quant import formats
print(formats.get("MXFP4").quantize(np.linspace(-1, 1, 512, dtype=np.float32)[None], effort="fast").tobytes().hex())
"""


def test_where_nothing_can_be_kept_it_compiles_anew_and_says_so(tmp_path: Path) -> None:
    """A file stands where the folder should be: a read-only one would not stop root."""
    (tmp_path / "home").write_text("")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA", "XDG"))}
    environment |= {"PYTHONPATH": str(Path(xent_quant.__file__).parents[1]), "HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1
    weights = np.linspace(-1, 1, 512, dtype=np.float32)[None]
    assert done.stdout.strip() == formats.get("MXFP4").quantize(weights, effort="fast").tobytes().hex()


KERNEL = """
from xent_quant.compilation import jit

@jit
def twice(x):
    return {factor} * x
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for compiled kernels, an empty one of this test's own."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python's own cache takes a change within a second for none
    compilation.folder.cache_clear()
    compilation._sources.cache_clear()
    yield tmp_path / "xent-quant" / "kernels"
    compilation.folder.cache_clear()


def kernel(file: Path, factor: int = 2) -> Any:
    """`twice` of a new process's module, as far as compiled code goes."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(KERNEL.format(factor=factor))
    compilation._sources.cache_clear()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.twice


class Bomb:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self._mark, "loaded")


def flipped(raw: bytes) -> bytes:
    """One bit in the middle: of the machine code, in a data file."""
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


def sealed(content: bytes) -> bytes:
    """Behind a digest, but one of something else's."""
    return hashlib.sha256(content).digest() + content


DAMAGE: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda raw, mark: b"",
    "cut short": lambda raw, mark: raw[: len(raw) // 2],
    "garbage": lambda raw, mark: bytes(range(256)) * 8,
    "a flipped bit": lambda raw, mark: flipped(raw),
    "another pickle": lambda raw, mark: pickle.dumps(Bomb(mark)),
    "another pickle behind a digest": lambda raw, mark: sealed(pickle.dumps(Bomb(mark))),
}


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_kernels_are_compiled_again(
    kept: Path, tmp_path: Path, suffix: str, damage: Callable[[bytes, Path], bytes]
) -> None:
    module, mark = tmp_path / "source" / "module.py", tmp_path / "mark"
    assert kernel(module)(21) == 42
    (file,) = kept.rglob(f"*{suffix}")
    whole = file.read_bytes()
    file.write_bytes(damage(whole, mark))
    again = kernel(module)
    assert again(21) == 42
    assert again.stats.cache_hits == {}
    assert not mark.exists()  # what is not ours is not unpickled
    third = kernel(module)
    assert third(21) == 42
    assert len(third.stats.cache_hits) == 1


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_file_without_an_end_is_not_read(kept: Path, tmp_path: Path, suffix: str) -> None:
    module = tmp_path / "source" / "module.py"
    assert kernel(module)(21) == 42
    (file,) = kept.rglob(f"*{suffix}")
    file.unlink()
    file.symlink_to("/dev/zero")
    assert kernel(module)(21) == 42


def test_a_changed_neighbour_makes_kernels_stale(kept: Path, tmp_path: Path) -> None:
    """Kernels of other files of a folder are compiled into a kernel."""
    module = tmp_path / "source" / "module.py"
    assert kernel(module)(21) == 42
    (module.parent / "neighbour.py").write_text("")
    again = kernel(module)
    assert again(21) == 42
    assert again.stats.cache_hits == {}
    assert kernel(module, factor=3)(21) == 63


def test_kernels_lie_where_only_their_owner_writes(kept: Path, tmp_path: Path) -> None:
    kept.mkdir(parents=True, mode=0o777)
    kept.chmod(0o777)  # by an older version, or by hand
    assert kernel(tmp_path / "source" / "module.py")(21) == 42
    for path in (kept, *(path for path in kept.rglob("*") if path.is_dir())):
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["link", "other"])
def test_a_folder_that_is_not_ones_own_is_not_used(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    kept.parent.mkdir(parents=True)
    if what == "link":
        (tmp_path / "elsewhere").mkdir()
        kept.symlink_to(tmp_path / "elsewhere")
    else:
        kept.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert compilation.folder() is None
    assert kernel(tmp_path / "source" / "module.py")(21) == 42
    assert not list(tmp_path.rglob("*.nb?"))


def test_a_full_disk_costs_no_run(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compilation._Sealed, "_write", full)
    assert kernel(tmp_path / "source" / "module.py")(21) == 42


@pytest.mark.parametrize("name", [name for name in formats.NAMES if formats.get(name).block_size > 1])
def test_threads_and_neighbouring_rows_change_no_byte(name: str) -> None:
    """The chunks and the lanes that a row lands in must not matter: these rows of 256 are several chunks."""
    kind = formats.get(name)
    rows = 2100
    weights = np.random.default_rng(2).standard_normal((rows, 256)).astype(np.float32)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = kind.quantize(weights, effort="fast")
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
        assert np.array_equal(kind.quantize(weights, effort="fast"), one)
    finally:
        numba.set_num_threads(before)
    for start, stop in ((0, 1), (3, 20), (rows - 5, rows)):
        assert np.array_equal(kind.quantize(weights[start:stop], effort="fast"), one[start:stop])
