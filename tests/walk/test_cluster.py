"""Work that other processes do gives the bytes that one process writes."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

import xent_quant
from tests.walk.conftest import CONFIG, LAYERS, export, tree
from xent_quant.errors import ConfigError, ExportError
from xent_quant.walk import cluster, elsewhere
from xent_quant.walk.cluster import Kept

FAST = {"effort": "fast", "threads": 1}
CASES: dict[str, dict[str, Any]] = {
    "gguf and onnx by gptq": {"type": "Q4_0", "formats": ["gguf", "onnx"], **FAST},
    "two types": {"type": ["Q2_K", "Q8_0"], **FAST},
    "nf4 by gptq": {"formats": ["bnb"], "method": "gptq", "split_size": "100K", "threads": 1},
    "gptq beside plain nf4": {"formats": ["gguf", "bnb"], "bits": 4, **FAST},
    "imatrix": {"type": "Q4_0", "method": "imatrix", **FAST},
    "fewer experts": {"type": "Q4_0", "drop_experts": 2, **FAST},
    "rtn": {"type": "Q4_0", "method": "rtn", "threads": 1},
    "bitsandbytes": {"formats": ["bnb", "onnx"], "method": "rtn", "threads": 1},
}
NO_TEXT = ("rtn", "bitsandbytes")


class Pickled:
    """A Cluster of this process alone: everything is pickled on its way, there and back."""

    workers = 2

    def __init__(self) -> None:
        self.done: list[str] = []

    def keep(self, value: object) -> Kept:
        """See `Cluster.keep`."""
        return Kept(pickle.dumps(value))

    def run(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """See `Cluster.run`."""
        for job in jobs:
            self.done.append(function.__name__)
            sent = [each.reference if isinstance(each, Kept) else pickle.dumps(each) for each in job]
            yield pickle.loads(cluster._call(function, *sent))


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> Pickled:
    made = Pickled()

    @contextmanager
    def there(address: str) -> Iterator[Pickled]:
        yield made

    monkeypatch.setattr(cluster, "ray_cluster", there)
    return made


@pytest.mark.parametrize("case", CASES)
def test_what_was_done_elsewhere_is_the_same(case: str, model: Path, text: Any, tmp_path: Path, pickled: Pickled) -> None:
    options = CASES[case] | ({} if case in NO_TEXT else text)
    here = export(model, tmp_path / "here", **options)
    there = export(model, tmp_path / "there", ray="somewhere", **options)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert there.notes == here.notes
    if case in NO_TEXT:
        assert set(pickled.done) == {"weights"}
    else:
        experts = CONFIG["num_experts"] - options.get("drop_experts", 0)
        assert pickled.done == ["expert"] * LAYERS * experts


def test_statistics_by_products_in_bfloat16(narrow: Path, text: Any, tmp_path: Path, pickled: Pickled) -> None:
    for folder, more in (("here", {}), ("there", {"ray": "somewhere"})):
        export(narrow, tmp_path / folder, **CASES["imatrix"], **more, **text)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert set(pickled.done) == {"expert"}


def test_a_file_of_statistics(model: Path, text: Any, tmp_path: Path, pickled: Pickled) -> None:
    xent_quant.calibrate(model, output=tmp_path / "imatrix.gguf", **text)
    for folder, more in (("here", {}), ("there", {"ray": "somewhere"})):
        export(model, tmp_path / folder, type="Q4_0", imatrix=tmp_path / "imatrix.gguf", **FAST, **more)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert set(pickled.done) == {"weights"}


def test_weights_are_sent_in_slices(model: Path, tmp_path: Path, pickled: Pickled, monkeypatch: pytest.MonkeyPatch) -> None:
    export(model, tmp_path / "here", **CASES["rtn"])
    monkeypatch.setattr(elsewhere, "SLICE", 1000)
    export(model, tmp_path / "there", ray="somewhere", **CASES["rtn"])
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_interrupted_and_gone_on_with_alone(model: Path, text: Any, tmp_path: Path, pickled: Pickled, interrupt: Any) -> None:
    options = CASES["two types"] | text
    export(model, tmp_path / "here", **options)
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "there", ray="somewhere", **options)
    interrupt(None)
    assert export(model, tmp_path / "there", **options).resumed == 1
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_a_cluster_that_is_gone_costs_nothing_of_what_is_done(model: Path, text: Any, tmp_path: Path, interrupt: Any) -> None:
    options = CASES["two types"] | text
    export(model, tmp_path / "here", **options)
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "there", **options)
    interrupt(None)
    with pytest.raises(ConfigError, match=r"[Rr]ay"):
        export(model, tmp_path / "there", ray="127.0.0.1:1", **options)
    assert export(model, tmp_path / "there", **options).resumed == 1
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_other_software(model: Path, tmp_path: Path, pickled: Pickled, monkeypatch: pytest.MonkeyPatch) -> None:
    same, keep = elsewhere.software, pickled.keep

    def older(value: Any) -> Kept:
        monkeypatch.setattr(elsewhere, "software", lambda: same() | {"torch": "1.0"})
        return keep(value)

    monkeypatch.setattr(pickled, "keep", older)
    with pytest.raises(ExportError, match=r"--ray: .+ has another torch; install the same on all machines"):
        export(model, tmp_path / "out", ray="somewhere", **CASES["rtn"])


@pytest.mark.parametrize("case", ["rtn", "two types"])
def test_a_checkpoint_that_is_not_there(case: str, model: Path, text: Any, tmp_path: Path, pickled: Pickled, monkeypatch) -> None:
    """On the worker's machine."""
    folder, call = copytree(model, tmp_path / "Model"), cluster._call

    def without(*job: Any) -> bytes:
        folder.rename(tmp_path / "elsewhere")
        return call(*job)

    monkeypatch.setattr(cluster, "_call", without)
    with pytest.raises(ExportError, match=r"model\.safetensors: No such file or directory; it must lie under the same path"):
        export(folder, tmp_path / "out", ray="somewhere", **CASES[case], **({} if case in NO_TEXT else text))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "6G"}, "--memory 6G: has no effect beside --ray, since Ray's object store"),
        ({"device": "torch-cpu"}, "--ray auto: has no effect with --device torch-cpu, where no worker computes"),
    ],
)
def test_options_that_do_not_go_with_it(options: Any, said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        export(model, tmp_path, ray="auto", **options)


def test_without_ray(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'xent-quant\[ray\]'"):
        export(model, tmp_path, ray="auto", **CASES["rtn"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_local_cluster_of_ray_whose_workers_die() -> None:
    """Its own process, since Ray leaves threads behind."""
    script = Path(__file__).parents[2] / "scripts" / "check_ray.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
