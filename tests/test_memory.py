"""What is let go is given back, on Linux with glibc."""

import subprocess
import sys

import pytest

from xent_quant.memory import _libc

PROGRAM = """
import sys
import numpy as np
from xent_quant import memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

if sys.argv[1] == "settled":
    memory.settle()
np.ones(30 << 17)  # 30 MiB that are let go: from now on glibc itself takes arrays up to that size from its heap
arrays = [np.ones(10 << 17) for _ in range(20)]
before = resident()
del arrays[::2]
print(before - resident())
"""


@pytest.mark.skipif(_libc() is None, reason="glibc's allocator")
def test_matrices_leave_no_holes() -> None:
    """Of twenty of 10 MiB every other one is let go."""
    given_back = {
        way: float(subprocess.run([sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, text=True).stdout)
        for way in ("settled", "as it is")
    }
    assert given_back["settled"] > 95
    assert given_back["as it is"] < 50
