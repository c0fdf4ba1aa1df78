"""Stock llama.cpp's programs, and exports of the miniature for them, made once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import xent_quant
from scripts import stock_llama
from tests.stock.programs import Programs


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread: None) -> None:
    """For every test here."""


@pytest.fixture(scope="session")
def stock() -> Programs:
    """Fails where the programs are missing: who asks for these tests is not to take a run without them for a good one."""
    try:
        return Programs(stock_llama.home())
    except stock_llama.Missing as error:
        reason = str(error)
    pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """export("Q4_K_M", **options) is the miniature's GGUF of that type, rounded quickly and without padding unless `options` say
    otherwise; not to be changed."""
    made: dict[str, Path] = {}

    def make(kind: str, **options: Any) -> Path:
        key = json.dumps([kind, options], default=str)
        if key not in made:
            chosen = {"method": "rtn", "effort": "fast", "pad": "never", "name": "mini", **options}
            done = xent_quant.quantize(None, type=kind, output=tmp_path_factory.mktemp(kind), **chosen)
            made[key] = done.exports[0]
        return made[key]

    return make
