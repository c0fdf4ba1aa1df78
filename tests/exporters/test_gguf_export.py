"""Bytes on disk: values, padding, keys, splits, memory, and what is left after failures."""

import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import xent_quant
from calibration.correction import NOTHING
from exporters.base_model import BaseModel
from exporters.gguf.export import GGUFExporter
from exporters.gguf.plan import GGUFPlan, layout, plan
from tests.reference.forward import forward
from tests.walking import export
from xent_quant import formats
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, ExportError
from xent_quant.methods.search import Search
from xent_quant.recipes import recipe
from xent_quant.tensors import InputStatistics, Role, StatisticsSource, TensorSpec
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.walk.lanes import Lane

IDS = [2, 17, 300, 5, 9, 42, 260, 261, 11, 7]


def write_plan(
    checkpoint: Checkpoint, planned: GGUFPlan, output: Path, name: str, statistics=None, provenance=None, force=False, **options
) -> list[Path]:
    exporter = GGUFExporter(checkpoint, planned, output, name, Search("fast"), **options)
    return list(export(checkpoint, [exporter], output, statistics, provenance=provenance, force=force)[0].files)


def write(folder: Path, output: Path, *, type: str = "Q8_0", name: str = "Tiny", **options) -> list[Path]:
    checkpoint = Checkpoint.open(folder)
    return write_plan(checkpoint, plan(checkpoint.architecture, recipe(type=type)), output, name, **options)


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Row-major float32, by gguf-py's own dequantisers."""
    shape = [int(n) for n in reversed(tensor.shape)]
    return gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(shape)


def keys(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [({"num_experts": 8}, 2), ({"norm_topk_prob": False}, 2), ({"num_experts": 64, "moe_top_k": 6}, 1)],
    ids=["8 experts", "weights not renormalised", "64 experts, top 6"],
)
def test_f32_logits_equal_the_reference(checkpoint, tmp_path: Path, changes: dict[str, object], layers: int) -> None:
    folder = checkpoint(**changes, num_hidden_layers=layers)
    file = write(folder, tmp_path / "out", type="F32")[0]
    wanted = forward(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), IDS)
    with LlamaCpp(file) as llama:
        assert np.abs(llama.logits(IDS) - wanted).max() < 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"num_shared_experts": 1, "num_key_value_heads": 2}, {"num_shared_experts": 0}, {"num_experts": 0}]
)
def test_padded_f32_experts_compute_the_same(checkpoint, tmp_path: Path, changes: dict[str, object]) -> None:
    """Padding is only taken for block types, so lay floats out by hand in the width that Q4_K_M takes."""
    opened = Checkpoint.open(checkpoint(intermediate_size=480, **changes))
    folder, planned = opened.path, plan(opened.architecture, recipe(bits=4))
    assert planned.expert_width == 512
    floats = recipe(type="F32")
    padded = replace(planned, tensors=layout(opened.architecture, floats, 512), recipe=floats)
    files = write_plan(opened, padded, tmp_path / "out", "Padded")
    wanted = forward(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), IDS)
    with LlamaCpp(files[0]) as llama:
        assert np.abs(llama.logits(IDS) - wanted).max() < 1e-3


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K_S", "Q4_K_M", "Q3_K_M", "Q2_K"])
@pytest.mark.parametrize("measured", [False, True])
def test_padding_dequantises_to_exact_zeros(checkpoint, tmp_path: Path, kind: str, measured: bool) -> None:
    folder = checkpoint(intermediate_size=480, num_hidden_layers=1)
    random = np.random.default_rng(1)

    class Statistics(StatisticsSource):
        def get(self, tensor: TensorSpec) -> InputStatistics | None:
            if tensor.layer is None or not tensor.measured:
                return None
            return InputStatistics(random.uniform(0, 2, tensor.shape[-1]).astype(np.float32), None, 100)

    file = write(folder, tmp_path, type=kind, statistics=Statistics() if measured else None)[0]
    weights, found = load_file(folder / "model.safetensors"), tensors(file)
    layer = "model.layers.0.mlp."
    for projection in ("gate", "up", "down"):
        for name, own in (("exps", 480), ("shexp", 960)):
            got = values(found[f"blk.0.ffn_{projection}_{name}.weight"])
            got = got if got.ndim == 3 else got[None]
            padded_axis = 2 if projection == "down" else 1
            real, padding = np.split(got, [own], axis=padded_axis)
            assert not padding.any()
            wanted = [
                weights[f"{layer}{f'experts.{index}' if name == 'exps' else 'shared_experts'}.{projection}_proj.weight"]
                for index in range(len(got))
            ]
            error = np.linalg.norm(real - np.stack(wanted)) / np.linalg.norm(wanted)
            assert error < {"Q6_K": 0.03, "Q5_K_S": 0.05, "Q4_K_M": 0.1, "Q3_K_M": 0.2, "Q2_K": 0.4}[kind]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_K_M", "Q4_0"])
def test_values_are_the_formats_own(checkpoint, tmp_path: Path, kind: str) -> None:
    folder = checkpoint(num_key_value_heads=2)
    weights, found = load_file(folder / "model.safetensors"), tensors(write(folder, tmp_path, type=kind)[0])
    planned = plan(Checkpoint.open(folder).architecture, recipe(type=kind))
    assert [tensor.name for tensor in planned.tensors] == list(found)
    for tensor in planned.tensors:
        stored = found[tensor.name]
        kind_of = formats.get(tensor.type)
        assert stored.tensor_type == kind_of.ggml_type
        assert stored.n_bytes == tensor.nbytes
        for index, source in enumerate(tensor.sources):
            plain = np.atleast_2d(weights[source.name])
            if tensor.heads:  # row 2i of a head is row i, row 2i + 1 is row i + half
                half = plain.shape[0] // tensor.heads // 2
                order = [h * 2 * half + i + part * half for h in range(tensor.heads) for i in range(half) for part in (0, 1)]
                plain = plain[order]
            wanted = kind_of.dequantize(kind_of.quantize(np.ascontiguousarray(plain), None, effort="fast"))
            got = values(stored)
            got = np.atleast_2d(got[index] if got.ndim == 3 else got)
            np.testing.assert_array_equal(got, wanted, err_msg=tensor.name)


def test_metadata(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(num_key_value_heads=2, num_shared_experts=1)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: xverse\nlanguage:\n- zh\n- en\n---\n# A model\n")
    found = keys(write(folder, tmp_path / "out", type="Q4_K_M", provenance={"quantize.imatrix.entries_count": 7})[0])
    wanted = {
        "general.architecture": "bailingmoe",
        "general.type": "model",
        "general.name": "Tiny",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.license": "other",
        "general.license.name": "xverse",
        "general.languages": ["zh", "en"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "model",
        "bailingmoe.block_count": 2,
        "bailingmoe.context_length": 512,
        "bailingmoe.embedding_length": 256,
        "bailingmoe.feed_forward_length": 96,
        "bailingmoe.expert_feed_forward_length": 96,
        "bailingmoe.attention.head_count": 4,
        "bailingmoe.attention.head_count_kv": 2,
        "bailingmoe.attention.key_length": 64,
        "bailingmoe.attention.value_length": 64,
        "bailingmoe.rope.dimension_count": 64,
        "bailingmoe.rope.freq_base": 500000.0,
        "bailingmoe.expert_count": 6,
        "bailingmoe.expert_used_count": 2,
        "bailingmoe.expert_shared_count": 1,
        "bailingmoe.expert_weights_norm": True,
        "bailingmoe.leading_dense_block_count": 0,
        "bailingmoe.vocab_size": 320,
        "quantize.imatrix.entries_count": 7,
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["bailingmoe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_splits_hold_the_same_tensors(checkpoint, tmp_path: Path) -> None:
    folder, size = checkpoint(), 300_000
    (whole,) = (path for path in write(folder, tmp_path / "one") if path.suffix == ".gguf")
    parts = [path for path in write(folder, tmp_path / "many", split_size=size) if path.suffix == ".gguf"]
    count = len(parts)
    assert count > 3
    assert [path.name for path in parts] == [f"Tiny-Q8_0-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    expected, seen = tensors(whole), {}
    for index, path in enumerate(parts):
        found = tensors(path)
        assert path.stat().st_size <= size or len(found) == 1
        metadata = keys(path)
        assert (metadata["split.no"], metadata["split.count"], metadata["split.tensors.count"]) == (index, count, len(expected))
        assert ("tokenizer.ggml.tokens" in metadata) == (index == 0)
        seen |= found
    assert list(seen) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensor.data, seen[name].data)
    with LlamaCpp(whole) as one, LlamaCpp(parts[0]) as two:
        np.testing.assert_array_equal(one.logits(IDS), two.logits(IDS))
    assert f"--merge {parts[0].name}" in (tmp_path / "many" / "Tiny-Q8_0.Modelfile").read_text()


def test_slices_change_no_byte_and_bound_the_memory(checkpoint, tmp_path: Path, monkeypatch) -> None:
    folder = checkpoint(vocab_size=20_000, intermediate_size=480, num_hidden_layers=1)
    whole = write(folder, tmp_path / "whole", type="Q4_K_M")[0]  # compiles the kernels, too
    monkeypatch.setattr(Checkpoint, "SLICE", 64 * 1024)
    opened = Checkpoint.open(folder)
    assert opened.infos["model.embed_tokens.weight"].n_weights > 70 * Checkpoint.SLICE
    exporter = GGUFExporter(opened, plan(opened.architecture, recipe(type="Q4_K_M")), tmp_path / "sliced", "Tiny", Search("fast"))
    lane = Lane(exporter, exporter.open(tmp_path, {}, fresh=True), None)
    tracemalloc.start()
    for tensor in opened.architecture.tensors().values():
        for start, weights in opened.slices(tensor.name):
            lane.put(tensor, start, weights, NOTHING, head=tensor.role is Role.HEAD)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sliced = lane.writer.finish(()).moves[0].staged
    lane.writer.close()
    assert peak < 5 * 4 * Checkpoint.SLICE  # raw bytes, float32, checks and packed rows of a slice or two
    assert whole.read_bytes() == sliced.read_bytes()


def test_failure_in_the_last_tensor_leaves_nothing(checkpoint, tmp_path: Path) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][-1, -1] = np.nan
    save_file(weights, folder / "model.safetensors")
    for split in (None, 300_000):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: NaN"):
            write(folder, out, split_size=split)
        assert not list(out.iterdir())


def test_failure_under_force_keeps_the_old_files(checkpoint, tmp_path: Path) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    write(folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][-1, -1] = np.inf
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ExportError, match="exists already"):
        write(folder, out)
    with pytest.raises(CheckpointError, match="infinite"):
        write(folder, out, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_full_disk_leaves_nothing(checkpoint, tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse the write as a full disk does."""
    folder, out = checkpoint(), tmp_path / "out"
    script = (
        "import resource, sys\nfrom pathlib import Path\nimport xent_quant\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "xent_quant.quantize(Path(sys.argv[1]), method='rtn', type='Q8_0', output=sys.argv[2])\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder), str(out)], capture_output=True, text=True)
    assert result.returncode
    assert "ExportError" in result.stderr
    assert "put that right" in result.stderr
    assert not list(out.iterdir())


def test_impossible_names_are_refused(checkpoint) -> None:
    folder = checkpoint()
    for name in ("", "a/b", "a\\b", ".hidden", "a\nb", "a<b", "a\udc1b"):
        with pytest.raises(ExportError, match=r"--name .*not a file name"):
            xent_quant.plan(folder, name=name)


A42B = {"vocab_size": 100534, "hidden_size": 2560, "intermediate_size": 1728, "num_hidden_layers": 28, "num_attention_heads": 32}


def test_card_and_modelfile(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: zh\n---\n")
    write(folder, tmp_path / "out", type="Q4_K_M")
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model_relation"] == "quantized"
    assert (header["base_model"], header["license"], header["language"]) == ("model", "apache-2.0", ["zh"])
    assert header["tags"] == ["gguf", "quantized", "mixture-of-experts", "xverse"]
    assert "| router | F32 |" in text
    assert "llama-completion -m Tiny-Q4_K_M.gguf" in text
    assert (tmp_path / "out" / "Tiny-Q4_K_M.Modelfile").read_text() == (
        'FROM ./Tiny-Q4_K_M.gguf\nTEMPLATE "{{ .Prompt }}"\nPARAMETER repeat_penalty 1.1\nPARAMETER num_ctx 512\n'
    )


def test_a_dense_model_is_not_called_a_mixture(checkpoint, tmp_path: Path) -> None:
    file, *_ = write(checkpoint(num_experts=0), tmp_path / "out", type="Q8_0")
    header = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert header["tags"] == ["gguf", "quantized", "xverse"]
    assert gguf.GGUFReader(file).fields["general.tags"].contents() == header["tags"]


def test_advice_for_cards_that_the_model_does_not_fit_on() -> None:
    from xent_quant.checkpoint.architecture import Architecture

    model = Architecture.from_config({"model_type": "xverse", "num_experts": 64, "moe_top_k": 6, "num_shared_experts": 2, **A42B})
    planned = plan(model, recipe(bits=4))
    moved = {size: planned.least_cpu_layers(size * 10**9) for size in (4, 8, 12, 16, 24)}
    assert moved[24] == 0
    assert 0 < moved[16] < moved[12] < moved[8] <= 28
    assert moved[4] is None
    for size in (8, 12, 16):
        left = [t.nbytes for t in planned.tensors if t.routed and t.layer < moved[size]]
        assert planned.vram_bytes(8192) - sum(left) <= size * 10**9


@pytest.mark.parametrize(
    ("folder", "repository"),
    [
        ("hub/models--xverse--XVERSE-Ent-A4.2B/snapshots/0123abcd", "xverse/XVERSE-Ent-A4.2B"),
        ("XVERSE-Ent-A5.7B", "xverse/XVERSE-Ent-A5.7B"),
        ("mine", None),
    ],
)
def test_base_model_is_found(tmp_path: Path, folder: str, repository: str | None) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    assert BaseModel.of(path).repository == repository
    (path / "README.md").write_text("---\nlicense: [\n---\n")
    assert "README.md: its header is not YAML" in BaseModel.of(path).notes[0]


def test_notes_of_a_persons_own_are_not_replaced(checkpoint, tmp_path: Path) -> None:
    model, notes = checkpoint(num_hidden_layers=1), tmp_path / "README.md"
    notes.write_text("# Notes\n\nFiles of xent-quant, and what I think of them.\n")
    with pytest.raises(ExportError, match=r"README\.md: exists already and is not xent-quant's; add --force"):
        xent_quant.quantize(model, method="rtn", type="Q8_0", output=tmp_path, name="Tiny")
    notes.unlink()
    for kind in ("Q8_0", "Q4_0"):  # its own goes on
        xent_quant.quantize(model, method="rtn", type=kind, output=tmp_path, name="Tiny")
    assert notes.read_text().count("<!-- xent-quant: ") == 2
