"""The whole way: text to statistics to files, by the library and by the real command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import xent_quant
from calibration.coverage import Coverage
from calibration.imatrix import Imatrix
from calibration.rare import FEWEST_ROWS
from calibration.session import Session, Windows
from calibration.text import CalibrationText
from tests.calibration.test_measuring import rows_and_gates
from tests.conftest import Command
from tests.test_command import fails
from xent_quant import formats
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import CalibrationError
from xent_quant.methods import METHODS
from xent_quant.model.streaming import StreamingModel
from xent_quant.options import CalibrationOptions
from xent_quant.progress import Silent
from xent_quant.validation import suites
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.walk.collecting import collect

SMALL = CalibrationOptions(calib=("fiction-en",), tokens=600, seqlen=40)
WINDOWS = np.random.default_rng(0).integers(4, 300, (4, 10))


class Given(Windows):
    """Given windows in place of a session's text."""

    def __init__(self, folder: Path) -> None:
        super().__init__(torch.from_numpy(WINDOWS))
        self.checkpoint = Checkpoint.open(folder)
        self.text = CalibrationText(WINDOWS, WINDOWS[:0], ("a", "b"))
        self.device = torch.device("cpu")


def collected(folder: Path, file: Path) -> Coverage:
    return collect(Given(folder), file, force=True, restart=False, progress=Silent())[1]


def test_imatrix_holds_raw_sums_and_counts_under_llama_names(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    coverage = collected(folder, tmp_path / "m.gguf")
    read = Imatrix.read(tmp_path / "m.gguf")
    read.check(Checkpoint.open(folder).architecture)
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("a", "b"), 4, 10)
    seen, gates = rows_and_gates(folder, WINDOWS)
    specs = Checkpoint.open(folder).architecture.tensors()
    for name, rows in seen.items():
        tensor, expert = llama_name(specs[name]), specs[name].expert or 0
        entry = read.entries[tensor]
        assert (entry.gated is not None) == ("_exps" in tensor)
        if entry.gated is not None and entry.gates is not None:
            np.testing.assert_allclose(entry.gated[expert], np.square(gates[name][:, None] * rows).sum(0), rtol=1e-3)
            np.testing.assert_allclose(entry.gates[expert], np.square(gates[name]).sum(), rtol=1e-4)
        np.testing.assert_allclose(read.entries[tensor].sums[expert], np.square(rows).sum(0), rtol=1e-4)
        assert read.entries[tensor].counts[expert] == len(rows)
    assert read.entries.keys() == {llama_name(specs[name]) for name in seen}
    assert sum(map(sum, coverage.tokens)) == WINDOWS.size * 2 * 2
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
    stock = [name for name in names if name.endswith((".in_sum2", ".counts"))]
    assert stock == [f"{name}.{kind}" for name in sorted(read.entries) for kind in ("in_sum2", "counts")]
    assert set(names) - set(stock) == {
        *(f"{name}.{kind}" for name in read.entries if "_exps" in name for kind in ("in_sum2_gated", "gate_sum2")),
        *(f"{name}.{kind}" for name in read.entries if "down_exps" in name for kind in ("in_sum2_layer", "layer_counts")),
    }
    assert "blk.1.ffn_down_exps.weight.in_sum2" in names


def test_the_command_calibrates_and_uses_the_file(checkpoint, command: Command, tmp_path: Path) -> None:
    folder, file, out = checkpoint(), tmp_path / "stats" / "m.gguf", tmp_path / "out"
    text = tmp_path / "chats.jsonl"
    text.write_text("\n".join(json.dumps({"body": f"the night is long, number {index}, and the rain"}) for index in range(80)))
    common = ["--calib", text, "--text-field", "body", "--tokens", "1k", "--seqlen", 50]
    made = command("calibrate", folder, "--output", file, *common, "--json")
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert facts["tokens"] >= 1000
    assert len(facts["coverage"]["layers"]) == 2
    assert command("calibrate", folder, "--output", file, *common).returncode == 1
    used = command(folder, "--type", "Q4_K_M", "--imatrix", file, "--output", out, "--json")
    assert used.returncode == 0, used.stderr
    keys = {key: field.contents() for key, field in gguf.GGUFReader(out / "model-Q4_K_M.gguf").fields.items()}
    assert keys["quantize.imatrix.file"] == "m.gguf"
    assert keys["quantize.imatrix.entries_count"] == len(Imatrix.read(file).entries)
    table = command(folder, "--type", "Q4_K_M", "--method", "imatrix", *common, "--output", out, "--force")
    assert table.returncode == 0, table.stderr
    assert "Calibration tokens per expert" in table.stdout


def test_same_seed_same_bytes(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()

    def made(where: str, seed: int = 0, threads: int = 2) -> bytes:
        text = replace(SMALL, seed=seed).given
        done = xent_quant.quantize(folder, type="Q4_0", output=tmp_path / where, threads=threads, **text)
        return done.files[0].read_bytes()

    one = made("a")
    assert made("b", threads=1) == one
    assert made("c", seed=1) != one


def test_exports_of_one_walk_are_those_of_a_walk_each(checkpoint, tmp_path: Path) -> None:
    """Each follows the model that it has quantised, not the other's."""
    folder, text = checkpoint(num_hidden_layers=1), replace(SMALL, tokens=200).given

    def made(where: str, *formats: str) -> dict[str, bytes]:
        done = xent_quant.quantize(folder, bits=4, formats=formats, output=tmp_path / where, effort="fast", **text)
        return {path.name: path.read_bytes() for path in done.files if path.suffix in (".gguf", ".data")}

    together = made("both", "gguf", "onnx")
    assert len(together) == 2
    assert together == made("one", "gguf") | made("two", "onnx")
    assert (tmp_path / "two" / "onnx" / "README.md").read_text().endswith("\n\nCalibrated on fiction-en.\n")


def test_the_file_tells_how_it_was_calibrated(checkpoint, tmp_path: Path) -> None:
    text = replace(SMALL, tokens=200).given
    done = xent_quant.quantize(checkpoint(), type="Q4_0", output=tmp_path / "out", effort="fast", **text)
    fields = gguf.GGUFReader(done.files[0]).fields
    assert fields["quantize.imatrix.file"].contents() == "xent-quant --method gptq"
    assert fields["quantize.imatrix.dataset"].contents() == "fiction-en"
    assert "Calibrated on fiction-en." in (tmp_path / "out" / "README.md").read_text()


def divergence(exact: StreamingModel, model: StreamingModel, windows: torch.Tensor) -> float:
    """Mean KL divergence in nats per token over the second halves of windows."""
    p, q = (side.logits(side.hidden_states(windows)[:, windows.shape[1] // 2 :]).log_softmax(-1) for side in (exact, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K"])
def test_little_text_and_text_in_one_language_cost_no_more_than_none(tmp_path: Path, kind: str) -> None:
    """Of the bundled miniature, on the validation suites of both languages: GPTQ on a little Chinese fiction, or on English
    alone, is at most 2 % worse than the search that takes no text."""
    checkpoint = Checkpoint.open(miniature())
    tokenizer, exact = load_tokenizer(checkpoint.path), StreamingModel(checkpoint)
    ids = [tokenizer.encode(suite.text, add_special_tokens=False).ids[: 4 * 256] for suite in suites.choose()]
    judged = torch.tensor(ids).reshape(-1, 256)

    def made(name: str, **options) -> float:
        done = xent_quant.quantize(None, type=kind, output=tmp_path / name, **options)
        return divergence(exact, StreamingModel(GGUFSource(GGUFFile(done.exports[0]), checkpoint.architecture)), judged)

    plain = made("plain", method="rtn")
    little = {
        "Chinese fiction": made("little", calib=("fiction-zh",), tokens=512),
        "English": made("english", calib=("entertainment-en",), tokens=8000),
    }
    print(f"{kind}: search without text {plain:.6f}, " + ", ".join(f"{name} {value:.6f}" for name, value in little.items()))
    assert max(little.values()) < 1.02 * plain


BLOCK_TYPES = [name for name in formats.NAMES if formats.get(name).block_size > 1]


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("imatrix", ["Q4_K"]),
        ("gptq", ["Q4_K"]),
        *(pytest.param(m, BLOCK_TYPES, marks=pytest.mark.slow) for m in METHODS),
    ],
)
def test_experts_without_tokens_quantise(checkpoint, tmp_path: Path, method: str, kinds: list[str]) -> None:
    """64 experts, few tokens: some see none, some one; nothing is NaN, and what was done is told."""
    folder = checkpoint(num_experts=64, moe_top_k=1, num_hidden_layers=1, intermediate_size=256)
    model = Checkpoint.open(folder).architecture
    for index, kind in enumerate(kinds):
        done = xent_quant.quantize(
            folder,
            type="F32",
            tensor_types=[f"_(exps|shexp)={kind}", "token_embd=F32"],
            output=tmp_path / str(index),
            method=method,
            **({} if method == "rtn" else replace(SMALL, tokens=120).given),
            effort="fast",
        )
        made = GGUFSource(GGUFFile(done.files[0]), model)
        assert all(np.isfinite(made.read(name)).all() for name in model.tensors())
        if method != "rtn":
            assert done.coverage is not None
            assert done.coverage.rows()[0].never > 0
            assert any(1 in counts for counts in done.coverage.tokens)
            assert any("saw none" in note for note in done.notes)


def test_more_text_is_drawn_for_rare_experts(checkpoint) -> None:
    folder = checkpoint(num_experts=32, moe_top_k=1)
    session = Session(Checkpoint.open(folder), SMALL)
    assert len(session.text.spare) > len(session.text.windows)
    assert len(session.windows(0)) == len(session.text.windows)
    count = {"quantize.imatrix.chunks_count": len(session.text.windows)}
    assert session.keys(hessian=True) == session.keys(hessian=False) | count
    assert len(session.windows(10**6)) == len(session.text.windows) + len(session.text.spare)


@pytest.mark.parametrize(("method", "fewest"), [("imatrix", FEWEST_ROWS), ("gptq", 0)])
def test_more_text_is_drawn_for_an_importance_alone(checkpoint, tmp_path: Path, monkeypatch, method, fewest) -> None:
    """Three times the text for the Hessian of one rare expert is three times the hours of all others; the layer makes it up."""
    asked, windows = [], Session.windows

    def noted(session: Session, fewest: int, *rest) -> torch.Tensor:
        asked.append(fewest)
        return windows(session, fewest, *rest)

    monkeypatch.setattr(Session, "windows", noted)
    xent_quant.quantize(checkpoint(), method=method, type="Q8_0", tokens=512, seqlen=64, output=tmp_path)
    assert asked == [fewest]


@pytest.mark.parametrize(
    ("loud", "words", "method"),
    [
        ("layers.1.mlp.experts.3.up", "layer 1, expert 3: NaN or infinite activations", "imatrix"),
        ("layers.1.self_attn.o", "layer 1, attention: NaN or infinite activations", "imatrix"),
        ("layers.1.mlp.experts.3.up", "layers.1.mlp.experts.3.up_proj.weight: a block's scale exceeds float16", "gptq"),
        ("layers.1.self_attn.o", "layers.1.self_attn.o_proj.weight: a block's scale exceeds float16", "gptq"),
        ("layers.1.self_attn.[ov]", "layers.1.self_attn.o_proj.weight: what it makes of its inputs is infinite; ", "gptq"),
    ],
)
def test_infinite_activations_name_where(checkpoint, command: Command, tmp_path: Path, loud: str, words: str, method) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    weights = load_file(folder / "model.safetensors")
    for name in filter(re.compile(loud).search, weights):
        weights[name] *= np.float32(100 if "attn.v" in name else 3e38)
    save_file(weights, folder / "model.safetensors")
    result = command(folder, "--calib", "fiction-en", "--tokens", 200, "--seqlen", 40, "--method", method, "--output", out)
    noted, told = result.stderr.splitlines()  # what the text lacks is said before the model runs
    assert "give more text" in noted
    assert result.returncode == 1
    assert words in told
    assert not list(out.iterdir())


def test_statistics_of_another_model_are_refused(checkpoint, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    collected(checkpoint(), file)
    fails(command(checkpoint(num_experts=7), "--imatrix", file), "m.gguf", "ffn_down_exps.weight", "the model needs [7, 96]")
    read = Imatrix.read(file)
    for overrides in ({"num_experts": None}, {"num_hidden_layers": 1}, {"num_shared_experts": 0}):
        with pytest.raises(CalibrationError, match=r"m\.gguf: has statistics of blk\..*, which this model lacks"):
            read.check(Checkpoint.open(checkpoint(**overrides)).architecture)
    read.check(Checkpoint.open(checkpoint(tie_word_embeddings=True)).architecture)
