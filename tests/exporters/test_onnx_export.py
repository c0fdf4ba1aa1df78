"""The exported ONNX folder: its files, their bytes, what is refused, and what is left after failures."""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import xent_quant
from calibration.correction import NOTHING
from exporters.onnx.export import ONNXExporter
from exporters.onnx.plan import ALIGNMENT, Settings, plan
from tests.walking import export
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, ConfigError, ExportError, UnsupportedError
from xent_quant.methods.search import Search
from xent_quant.storage.files import PositionalFile
from xent_quant.tensors import InputStatistics, Role, StatisticsSource, TensorSpec
from xent_quant.validation import onnx_runtime
from xent_quant.validation.onnx_source import OnnxSource
from xent_quant.walk.lanes import Lane

FILES = {
    "model.onnx",
    "model.onnx.data",
    "genai_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "run_onnx.py",
}


def write(folder: Path, output: Path, settings: Settings | None = None, statistics=None, *, force: bool = False) -> Path:
    checkpoint = Checkpoint.open(folder)
    planned = plan(checkpoint.architecture, settings or Settings())
    export(checkpoint, [ONNXExporter(checkpoint, planned, output, "Tiny", Search("fast"))], output, statistics, force=force)
    return output / "onnx"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_and_its_configuration(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(num_key_value_heads=2)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": [3, 0]}))
    folder = write(source, tmp_path)
    assert {path.name for path in folder.iterdir()} == FILES
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"]["eos_token_id"] == [3, 0]
    assert genai["model"]["decoder"]["num_key_value_heads"] == 2
    assert genai["search"]["temperature"] == 0.5
    assert genai["search"]["repetition_penalty"] == 1.1
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.1
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["source_model_type"], config["moe_top_k"]) == ("mixtral", "xverse", 2)
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "onnxruntime"
    assert "| experts | INT4_G64_F16 |" in card


def test_places_in_the_data_file(checkpoint, tmp_path: Path) -> None:
    """Aligned, apart from each other, and all inside; a tied head has the embedding's bytes."""
    folder = write(checkpoint(tie_word_embeddings=True), tmp_path, Settings(symmetric=False))
    size = (folder / "model.onnx.data").stat().st_size
    spans = {}
    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            spans[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    assert all(offset % ALIGNMENT == 0 and offset + length <= size for offset, length in spans.values())
    for part in ("codes", "scales", "zero_points"):
        assert spans.pop(f"head.{part}") == spans[f"embedding.{part}"]
    ordered = sorted(spans.values())
    assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(ordered))


WIDE_BLOCKS = (Settings(block_size=128), Settings(block_size=128, symmetric=False, bits=8, onnx_dtype="bf16"))


@pytest.mark.parametrize("settings", WIDE_BLOCKS)
@pytest.mark.parametrize("measured", [False, True])
def test_padding_is_exactly_zero_and_weights_are_near(checkpoint, tmp_path: Path, settings: Settings, measured: bool) -> None:
    source = checkpoint(intermediate_size=96, num_hidden_layers=1)

    class Statistics(StatisticsSource):
        def get(self, tensor: TensorSpec) -> InputStatistics | None:
            columns = tensor.shape[-1]
            random = np.random.default_rng(columns)
            return InputStatistics(random.uniform(0.1, 2, columns).astype(np.float32), None, 100)

    weights = load_file(source / "model.safetensors")
    folder = write(source, tmp_path, settings, Statistics() if measured else None)
    exported = OnnxSource(folder)
    for name, wanted in weights.items():
        assert exported.padding(name) == 0
        got = exported.read(name)
        assert got.shape == wanted.shape
        bound = 0.12 if exported.type(name) == "INT4" else 0.01
        assert np.linalg.norm(got - wanted) < bound * np.linalg.norm(wanted)
    stored = exported._stored("layers.0.experts.gate_up")
    place = exported._place("model.layers.0.mlp.experts.5.up_proj.weight")
    assert stored.values.dims[1] == 256
    assert not exported._rows(place, 96, 128).any()


def test_slices_change_no_byte_and_bound_the_memory(checkpoint, tmp_path: Path, monkeypatch) -> None:
    source = checkpoint(vocab_size=20_000, intermediate_size=480, num_hidden_layers=1)
    whole = contents(write(source, tmp_path / "whole"))
    monkeypatch.setattr(Checkpoint, "SLICE", 64 * 1024)
    opened = Checkpoint.open(source)
    exporter = ONNXExporter(opened, plan(opened.architecture, Settings()), tmp_path / "sliced", "Tiny", Search("fast"))
    lane = Lane(exporter, exporter.open(tmp_path, {}, fresh=True), None)
    tracemalloc.start()
    for tensor in opened.architecture.tensors().values():
        for start, weights in opened.slices(tensor.name):
            lane.put(tensor, start, weights, NOTHING, head=tensor.role is Role.HEAD)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sliced = lane.writer.finish(()).moves[0].staged
    lane.writer.close()
    assert peak < 5 * 4 * Checkpoint.SLICE
    assert contents(sliced) == whole


def test_gate_and_up_at_the_same_time(checkpoint, tmp_path: Path, monkeypatch) -> None:
    """Their rows lie in turns, and each is written with what lies between."""
    source = checkpoint(num_hidden_layers=1)
    whole = contents(write(source, tmp_path / "whole"))
    opened, read_at = Checkpoint.open(source), PositionalFile.read_at
    exporter = ONNXExporter(opened, plan(opened.architecture, Settings()), tmp_path / "threads", "Tiny", Search("fast"))
    lane = Lane(exporter, exporter.open(tmp_path, {}, fresh=True), None)

    def slowly(*arguments):
        found = read_at(*arguments)
        time.sleep(0.01)
        return found

    def put(tensor: TensorSpec) -> None:
        lane.put(tensor, 0, next(opened.slices(tensor.name))[1], NOTHING, head=tensor.role is Role.HEAD)

    monkeypatch.setattr(PositionalFile, "read_at", slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, opened.architecture.tensors().values()))
    threads = lane.writer.finish(()).moves[0].staged
    lane.writer.close()
    assert contents(threads) == whole


def test_both_formats_from_one_pass(checkpoint, tmp_path: Path) -> None:
    source = checkpoint()
    done = xent_quant.quantize(source, method="rtn", formats=["gguf", "onnx"], output=tmp_path / "both", effort="fast", threads=1)
    assert {"model-XENT4.gguf", "model.onnx.data"} <= {path.name for path in done.files}
    assert [summary.format for summary in done.plans] == ["gguf", "onnx"]
    alone = xent_quant.quantize(source, method="rtn", formats=["onnx"], output=tmp_path / "one", effort="fast", threads=2)
    assert all(path.is_file() for path in alone.files)
    assert contents(tmp_path / "both" / "onnx") == contents(tmp_path / "one" / "onnx")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"hidden_size": 320},
            {"block_size": 128},
            r"--block-size 128: does not divide hidden_size 320; use --block-size 32 or 64",
        ),
        ({"hidden_size": 32 * 4}, {"block_size": 48}, "--block-size 48: choose 32, 64, 128"),
        ({}, {"bits": 5}, "--bits 5: .* 4, 8 or 16"),
        ({}, {"active_bits": 6}, "--active-bits 6"),
        ({}, {"onnx_dtype": "fp8"}, "--onnx-dtype fp8"),
        ({}, {"accuracy_level": 2}, "--accuracy-level 2"),
    ],
)
def test_what_cannot_be_is_refused_by_the_options_name(checkpoint, tmp_path: Path, changes, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        xent_quant.quantize(checkpoint(**changes), method="rtn", formats=["onnx"], output=tmp_path, **options)
    assert not (tmp_path / "onnx").exists()


def test_a_missing_package_is_named(checkpoint, monkeypatch) -> None:
    for name in list(sys.modules):
        if name.startswith("exporters.onnx"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match=r"onnx is not installed: pip install 'xent-quant\[onnx\]'"):
        xent_quant.plan(checkpoint(), formats=["onnx"])


def test_inspect_describes_the_folder(checkpoint, tmp_path: Path) -> None:
    source = checkpoint()
    done = xent_quant.quantize(source, method="rtn", formats=["onnx"], output=tmp_path, effort="fast", block_size=32)
    facts = xent_quant.describe(tmp_path / "onnx")
    assert facts["kind"] == "onnx"
    assert facts["parameters"] == done.plans[0].n_weights == sum(w.size for w in load_file(source / "model.safetensors").values())
    assert sum(row["nbytes"] for row in facts["types"]) == done.plans[0].nbytes
    assert {row["type"] for row in facts["types"]} == {"INT4", "INT8", "F32", "F16"}


def test_odd_heads_are_refused(checkpoint) -> None:
    with pytest.raises(UnsupportedError, match="head_dim 8"):
        xent_quant.plan(checkpoint(hidden_size=64, num_attention_heads=8), formats=["onnx"])


def test_missing_tokenizer_is_refused(checkpoint, tmp_path: Path) -> None:
    source = checkpoint()
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        write(source, tmp_path)


def test_failure_leaves_the_folder_as_it_was(checkpoint, tmp_path: Path) -> None:
    source = checkpoint()
    good = load_file(source / "model.safetensors")
    bad = {**good, "lm_head.weight": good["lm_head.weight"] * np.nan}
    save_file(bad, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: NaN"):
        write(source, tmp_path)
    assert not list(tmp_path.glob("onnx")) + list(tmp_path.glob(".*"))
    save_file(good, source / "model.safetensors")
    before = contents(write(source, tmp_path))
    with pytest.raises(ExportError, match="exists already"):
        write(source, tmp_path)
    save_file(bad, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        write(source, tmp_path, force=True)
    assert contents(tmp_path / "onnx") == before
    save_file(good, source / "model.safetensors")
    assert contents(write(source, tmp_path, Settings(bits=8), force=True)) != before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "onnx"}


def test_full_disk_leaves_nothing(checkpoint, tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse the write as a full disk does."""
    script = (
        "import resource, sys\nfrom pathlib import Path\nimport xent_quant\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\n"
        "xent_quant.quantize(Path(sys.argv[1]), method='rtn', formats=['onnx'], output=sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(checkpoint()), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode
    assert re.search("ExportError.*put that right", result.stderr)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_leaves_nothing_that_looks_finished(checkpoint, tmp_path: Path, how: signal.Signals) -> None:
    # Enough to do, at low priority, that the process does not end before it is told to.
    source, out = checkpoint(num_experts=24, num_hidden_layers=3, intermediate_size=480), tmp_path / "out"
    options = ["--format", "onnx", "--method", "rtn", "--threads", "1", "--output", str(out)]
    command = [sys.executable, "-m", "xent_quant.cli.main", str(source), *options]
    process = subprocess.Popen(["nice", *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not list(out.glob(".*/onnx/model.onnx.data")):
        time.sleep(0.002)
    assert process.poll() is None
    process.send_signal(how)
    assert process.wait(60) != 0
    assert not list(out.glob("onnx"))
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [path.name for path in out.iterdir()] == ["onnx"]


def test_an_older_runtime_is_refused_by_name_and_version(monkeypatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.30.1")
    with pytest.raises(UnsupportedError, match=r"onnxruntime 1\.30\.1 is too old.*onnxruntime>=1\.31"):
        onnx_runtime.require_runtime()


def test_the_script_in_the_folder_generates(tmp_path: Path) -> None:
    done = xent_quant.quantize(None, method="rtn", formats=["onnx"], output=tmp_path, effort="fast")
    script = next(path for path in done.files if path.name == "run_onnx.py")
    assert len(script.read_text().splitlines()) < 30
    result = subprocess.run([sys.executable, str(script), "夜色渐深，他"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("夜色渐深，他")
    assert len(result.stdout) > 30
