"""A small model and a small text, made once; and runs that are interrupted behind their commits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from safetensors.torch import save_file

import xent_quant
from tests.conftest import TINY, random_weights, write_checkpoint
from xent_quant.journal import Journal
from xent_quant.pipeline import QuantizeResult
from xent_quant.progress import Silent
from xent_quant.walk import loop

CONFIG = {**TINY, "hidden_size": 64, "intermediate_size": 32, "max_position_embeddings": 64}
LAYERS = int(CONFIG["num_hidden_layers"])

Tree = dict[str, bytes]


class Notes(Silent):
    """Keeps what is `said`."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def tree(folder: Path) -> Tree:
    """Path to content of every file, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def export(model: Path, output: Path, **options: Any) -> QuantizeResult:
    return xent_quant.quantize(model, output=output, **options)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("walk") / "Model", CONFIG, random_weights(CONFIG))


@pytest.fixture(scope="session")
def stored_in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, rounded."""
    weights = random_weights(CONFIG)
    folder = write_checkpoint(tmp_path_factory.mktemp("bfloat16") / "Model", CONFIG, weights)
    save_file({name: torch.from_numpy(values).bfloat16() for name, values in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def narrow(stored_in_bfloat16: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That model, on a processor that multiplies bfloat16 by itself, or as if this one did."""
    monkeypatch.setattr("calibration.session.multiplies_bfloat16", lambda: True)
    return stored_in_bfloat16


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a calibration on a few windows."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"the night is long, number {i}, and the rain sings in the thin wind" for i in range(12)))
    return {"calib": (str(file),), "tokens": 80, "seqlen": 20}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, since threads of small matrices wait for one another on a busy machine; a commit behind every step."""
    monkeypatch.setattr(loop, "LEAST_SECONDS", 0.0)
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.fixture
def behind_commit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """behind_commit(act) has `act` called with the number of finished steps after every save of a walk's journal."""
    save = Journal.save

    def install(act: Callable[[int], None]) -> None:
        def saved(journal: Journal) -> None:
            save(journal)
            if journal.path.parent.name.startswith(".xent-quant-"):  # not the probe's
                act(journal.done)

        monkeypatch.setattr(Journal, "save", saved)

    return install


@pytest.fixture
def interrupt(behind_commit: Callable[[Callable[[int], None]], None]) -> Callable[[int | None], None]:
    """interrupt(done) has runs end behind the commit of so many steps; None lets them finish."""
    wanted: list[int | None] = [None]

    def act(done: int) -> None:
        if done == wanted[0]:
            raise KeyboardInterrupt

    behind_commit(act)
    return lambda done: wanted.__setitem__(0, done)
