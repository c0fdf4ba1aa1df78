"""Kernels where nothing can be cached, and over threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import xent_quant
from xent_quant import formats

PROGRAM = """
import logging, numpy as np
logging.basicConfig()
from xent_quant import formats
print(formats.get("MXFP4").quantize(np.linspace(-1, 1, 512, dtype=np.float32)[None], effort="fast").tobytes().hex())
"""


def test_a_read_only_installation_compiles_anew_and_says_so(tmp_path: Path) -> None:
    """Files stand where numba wants its folders: read-only ones would not stop root."""
    package = tmp_path / "xent_quant"
    shutil.copytree(Path(xent_quant.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "miniature*"))
    (package / "formats" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA", "XDG", "PYTHON"))}
    environment |= {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1
    weights = np.linspace(-1, 1, 512, dtype=np.float32)[None]
    assert done.stdout.strip() == formats.get("MXFP4").quantize(weights, effort="fast").tobytes().hex()


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
