"""Exports of the miniature, made once, and short texts. Fixed seeds; one thread: small matrices on a busy machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

import xent_quant
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def mini() -> Checkpoint:
    return Checkpoint.open(miniature())


QUICK = {"method": "rtn", "effort": "fast"}


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """export("Q4_K_M") is the miniature's GGUF of that type, made quickly, or with method and effort of the command line as
    export("Q4_K_M", defaults=True); not to be changed."""
    made: dict[tuple[str, bool], Path] = {}

    def make(kind: str, defaults: bool = False) -> Path:
        if (kind, defaults) not in made:
            folder = tmp_path_factory.mktemp(kind)
            done = xent_quant.quantize(None, type=kind, output=folder, name="mini", **({} if defaults else QUICK))
            made[kind, defaults] = next(path for path in done.files if path.suffix == ".gguf")
        return made[kind, defaults]

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests, so that the reference is computed once."""
    return tmp_path_factory.mktemp("references")
