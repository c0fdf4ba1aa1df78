"""Bytes at offsets, rows on disk, files replaced whole; also by what systems without the newer calls offer."""

import errno
import os
import stat
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from xent_quant.errors import ExportError
from xent_quant.storage import PositionalFile, Rows, check_free_space, files, free_bytes, replace_bytes

LACKING = {
    "all calls": (),
    "no preadv": ("preadv",),
    "seek and read": ("preadv", "pread", "pwrite"),
}


@pytest.fixture(params=LACKING)
def calls(request, monkeypatch) -> str:
    for name in LACKING[request.param]:
        monkeypatch.delattr(os, name, raising=False)
    return request.param


def test_bytes_at_offsets(calls, tmp_path: Path) -> None:
    data = np.arange(256, dtype=np.uint8)
    with PositionalFile.create(tmp_path / "file") as file:
        file.write_at(data, 10)
        file.write_at(b"head", 0)
        file.write_at(memoryview(b"tail"), 266)
        file.write_at(data.reshape(16, 16).T, 300)
        file.write_at(b"", 5)
        file.sync()
        assert file.size == 556
        np.testing.assert_array_equal(file.read_at(256, 10), data)
        assert file.read_at(0, 9999).size == 0
        pair = np.zeros(2, "<u2")
        file.read_into(pair, 10)
        assert pair.tolist() == [0x0100, 0x0302]
        file.truncate(600)
    content = (tmp_path / "file").read_bytes()
    assert content == b"head" + bytes(6) + data.tobytes() + b"tail" + bytes(30) + data.reshape(16, 16).T.tobytes() + bytes(44)
    with PositionalFile.open(tmp_path / "file", write=False) as file:
        assert file.read_at(600, 0).tobytes() == content
        with pytest.raises(OSError, match="file"):  # the error names it
            file.write_at(b"x", 0)
    file.close()


def test_large_transfers_take_several_calls(calls, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "CALL_BYTES", 7)
    data = np.random.default_rng(0).integers(0, 256, 100).astype(np.uint8)
    with PositionalFile.create(tmp_path / "file") as file:
        file.write_at(data, 3)
        np.testing.assert_array_equal(file.read_at(100, 3), data)


def test_a_short_file_is_named(calls, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with PositionalFile.open(tmp_path / "short") as file, pytest.raises(ExportError, match="short: ends at byte 10, before"):
        file.read_at(8, 4)


@pytest.mark.parametrize("nofollow", [True, False])
def test_links_and_special_files_are_refused(nofollow: bool, tmp_path: Path, monkeypatch) -> None:
    if not nofollow:
        monkeypatch.delattr(os, "O_NOFOLLOW", raising=False)
        monkeypatch.setattr(files, "OPEN_FLAGS", getattr(os, "O_NONBLOCK", 0))
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, wanted in (("link", "is a link"), ("nowhere", "is a link"), ("folder", "regular file"), ("pipe", "regular file")):
        for write in (False, True):
            with pytest.raises(ExportError, match=wanted):
                PositionalFile.open(tmp_path / name, write=write)
    for name in ("file", "link", "nowhere", "folder", "pipe"):
        with pytest.raises(ExportError):
            PositionalFile.create(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        PositionalFile.open(tmp_path / "absent")
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        PositionalFile.create(tmp_path / "file").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.float64])
def test_rows_equal_numpy(calls, dtype, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    wanted = np.zeros((200, 7), dtype)
    with Rows.create(tmp_path / "rows", 200, 7, dtype) as rows:
        for _ in range(20):
            start, stop = sorted(random.integers(0, 201, 2))
            wanted[start:stop] = random.integers(0, 999, (stop - start, 7))
            rows.write(int(start), wanted[start:stop])
            indices = np.flatnonzero(random.random(200) < random.choice([0.0, 0.1, 0.9, 1.0]))
            values = random.integers(0, 999, (7, len(indices))).astype(dtype).T  # not contiguous
            wanted[indices] = values
            rows.put(indices, values)
            indices = np.flatnonzero(random.random(200) < random.choice([0.0, 0.1, 0.9, 1.0]))
            got = rows.take(indices)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, wanted[indices])
            np.testing.assert_array_equal(rows.read(int(start), int(stop)), wanted[start:stop])
        rows.sync()
    with Rows.open(tmp_path / "rows", 200, 7, dtype) as rows:
        np.testing.assert_array_equal(rows.read(0, 200), wanted)


def test_rows_refuse(tmp_path: Path) -> None:
    with Rows.create(tmp_path / "rows", 10, 3) as rows:
        for indices in ([1, 1], [2, 1], [-1, 2], [8, 10]):
            with pytest.raises(ValueError, match=r"ascend|rows"):
                rows.take(np.array(indices))
        for start, values in ((0, np.zeros((2, 4), np.float32)), (0, np.zeros((2, 3))), (9, np.zeros((2, 3), np.float32))):
            with pytest.raises(ValueError, match=r"rows|in place of"):
                rows.write(start, values)
        with pytest.raises(ValueError, match="in place of"):
            rows.put(np.array([1]), np.zeros((2, 3), np.float32))
    with pytest.raises(ExportError, match="holds 120 bytes"):
        Rows.open(tmp_path / "rows", 11, 3)
    with pytest.raises(ExportError, match="exists already"):
        Rows.create(tmp_path / "rows", 10, 3)
    (tmp_path / "link").symlink_to("rows")
    with pytest.raises(ExportError, match="is a link"):
        Rows.open(tmp_path / "link", 10, 3)


def test_scattered_rows_are_fast_and_take_no_memory_besides(tmp_path: Path) -> None:
    count, columns = 24_000, 640  # 61 MB; every second row
    indices = np.arange(0, count, 2)
    with Rows.create(tmp_path / "rows", count, columns) as rows:
        rows.put(indices, np.ones((len(indices), columns), np.float32))
        tracemalloc.start()
        got = rows.take(indices)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert got.min() == 1
        assert peak < got.nbytes + 2_000_000
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            rows.take(indices)
            seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1  # 0.03 on an idle machine


def test_replacing_is_whole(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "journal.json"
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / ".journal.json.part").symlink_to("elsewhere")  # planted, or left by a killed run
    replace_bytes(path, b"one")
    replace_bytes(path, b"two")
    assert path.read_bytes() == b"two"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="space"):
            replace_bytes(path, b"three")
    assert path.read_bytes() == b"two"
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "journal.json"]


def test_free_space(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 0
    check_free_space(tmp_path, 1)
    with pytest.raises(ExportError, match=r"1000000000\.0 GB are needed, .* GB are free; make room"):
        check_free_space(tmp_path, 10**18)
