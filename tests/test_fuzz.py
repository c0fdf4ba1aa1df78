"""The fuzzer itself, on a few inputs of every kind."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches memory through /proc")
def test_damaged_files_of_every_kind_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--inputs", "600", "--seed", "7", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "failures").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches memory through /proc")
def test_what_is_not_refused_in_one_line_is_a_failure(tmp_path: Path) -> None:
    """With a command that knows nothing of damage the fuzzer has to find some, and to keep it."""
    program = f"""
import runpy, sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
from scripts import _fuzz_kinds as kinds

def read(command):
    if b"the" not in Path(command[command.index("--calib") + 1]).read_bytes():
        raise KeyError("the")
    print("xent-quant: error: internal error (KeyError)" if b"T" not in Path(command[3]).read_bytes() else "", file=sys.stderr)

build = kinds.KINDS["text .txt"].build
def damaged(root):
    case = build(root)
    case.run, case.seeds = read, case.seeds[:1]
    return case
kinds.KINDS["text .txt"] = kinds.Kind(damaged, kinds.BYTES, 1)
sys.argv = ["fuzz.py", "--inputs", "60", "--kind", "text .txt", "--folder", {str(tmp_path)!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "KeyError escaped" in done.stdout
    assert list((tmp_path / "failures").glob("text-txt.0.*.txt"))
