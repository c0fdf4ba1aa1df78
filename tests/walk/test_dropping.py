"""--drop-experts: what is exported is what a checkpoint without those experts becomes, whatever is done to the run."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import xent_quant
from calibration.session import Session
from tests.checkpoint.folders import with_experts
from tests.conftest import TINY, random_weights, write_checkpoint
from tests.reference.forward import forward
from tests.walk.conftest import CONFIG, LAYERS, export, tree
from xent_quant import inspection, sensitivities
from xent_quant.checkpoint.architecture import EXPERTS_KEY
from xent_quant.checkpoint.dropping import GGUF_KEYS
from xent_quant.checkpoint.headers import read_json
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ConfigError, ExportError, Interrupted
from xent_quant.options import CalibrationOptions
from xent_quant.progress import Silent
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.validation.validate import open_export
from xent_quant.validation.weights import compare_all
from xent_quant.walk import job, saliency

FAST = {"effort": "fast", "threads": 1}
DROP = {"drop_experts": 2}
IDS = [2, 17, 300, 5, 9, 42, 260, 261, 11, 7, 290, 33]


def numbers_in(file: Path, layers: int = LAYERS) -> list[list[int]]:
    """The experts that a GGUF says that it has, by layer."""
    flat = gguf.GGUFReader(file).fields[GGUF_KEYS["kept"]].contents()
    return np.reshape(flat, (layers, -1)).tolist()


def data(file: Path) -> dict[str, tuple[Any, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(file).tensors}


def test_exports_are_those_of_a_checkpoint_that_has_the_others_alone(model: Path, text: Any, tmp_path: Path) -> None:
    options = {"type": "Q4_0", "formats": ["gguf", "onnx", "bnb"], "method": "gptq", **FAST, **text}
    dropped = export(model, tmp_path / "dropped", **DROP, **options)
    numbers = numbers_in(dropped.exports[0])
    session = Session(Checkpoint.open(model), CalibrationOptions(**text))
    assert numbers == saliency.most_salient(saliency.saliency(session.checkpoint, session.sample(10**6)), 4)
    assert numbers[0] != numbers[1]  # or a test of which layer has which would not be one
    smaller = export(with_experts(model, tmp_path / "Smaller", numbers), tmp_path / "smaller", **options)
    assert data(dropped.exports[0]) == data(smaller.exports[0])
    for file in ("onnx/model.onnx", "onnx/model.onnx.data", "bnb/model.safetensors"):
        assert (tmp_path / "dropped" / file).read_bytes() == (tmp_path / "smaller" / file).read_bytes(), file
    for folder in ("onnx", "bnb"):
        config, plain = (read_json(tmp_path / name / folder / "config.json") for name in ("dropped", "smaller"))
        assert config.pop(EXPERTS_KEY) == {"kept": numbers, "of": 6, "text": text["calib"][0]}
        assert config == plain
    for card in ("README.md", "onnx/README.md", "bnb/README.md"):
        said = (tmp_path / "dropped" / card).read_text()
        assert "Of 6 experts in each layer 2 are left out: " in said
        assert f"those of least router-weighted saliency (REAP) on {text['calib'][0]}.\n" in said
        assert "left out" not in (tmp_path / "smaller" / card).read_text()
    assert dropped.exports[0].name == "Model-drop2-Q4_0.gguf"
    assert dropped.source_bytes == Checkpoint.open(model).nbytes
    assert [plan.nbytes for plan in dropped.plans] == [plan.nbytes for plan in smaller.plans]


def test_without_statistics_text_says_no_more_than_which(model: Path, text: Any, tmp_path: Path) -> None:
    made = export(model, tmp_path / "rtn", type="Q4_0", method="rtn", **DROP, **FAST, **text).exports[0]
    numbers = numbers_in(made)
    assert numbers == numbers_in(export(model, tmp_path / "gptq", type="Q8_0", **DROP, **FAST, **text).exports[0])
    smaller = with_experts(model, tmp_path / "Smaller", numbers)
    assert data(made) == data(export(smaller, tmp_path / "smaller", type="Q4_0", method="rtn", threads=1).exports[0])
    assert not [key for key in gguf.GGUFReader(made).fields if "imatrix" in key]


def test_what_is_made_of_an_export_without_some_is_beside_that(model: Path, text: Any, tmp_path: Path) -> None:
    """A folder in bfloat16 is a checkpoint again: its files say of which of the first one's experts they are, no others do."""
    floats = {"formats": ["bnb"], "bits": 16, "threads": 1}
    first = export(model, tmp_path / "first", **floats, **DROP, **text).exports[0]
    second = export(first, tmp_path / "second", **floats).exports[0]
    third = export(first, tmp_path / "third", drop_experts=1, **floats, **text).exports[0]
    for made, of, experts in ((first, model, 4), (second, first, 4), (third, first, 3)):
        opened = open_export(made, "checkpoint", Checkpoint.open(of))
        assert opened.source.architecture.num_experts == experts
        assert (opened.checkpoint.kept is None) == (made == second)
        assert max(tensor.error for tensor in compare_all(opened.checkpoint, opened.source, Silent())) < 0.01


def test_logits_in_llama_cpp_are_those_of_the_others_alone(text: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", TINY, random_weights(TINY))
    made = xent_quant.quantize(folder, type="F32", output=tmp_path / "out", drop_experts="34%", **text).exports[0]
    weights = load_file(with_experts(folder, tmp_path / "smaller", numbers_in(made)) / "model.safetensors")
    wanted = forward(weights, {**TINY, "num_experts": 4}, IDS)
    with LlamaCpp(made) as llama:
        assert np.abs(llama.logits(IDS) - wanted).max() < 1e-3
    assert np.abs(forward(load_file(folder / "model.safetensors"), TINY, IDS) - wanted).max() > 0.1
    (worst,) = {row["error"] for row in inspection.describe(made, folder)["errors"]}
    assert worst == 0


def test_an_interrupted_run_goes_on_with_the_same_experts(model: Path, text: Any, tmp_path: Path, interrupt, monkeypatch) -> None:
    options = {"type": "Q4_0", **FAST, **text}
    export(model, tmp_path / "whole", **DROP, **options)
    interrupt(2)
    with pytest.raises(Interrupted):
        export(model, tmp_path / "out", **DROP, **options)
    interrupt(None)
    with monkeypatch.context() as patched:
        patched.setattr(saliency, "saliency", lambda *_: pytest.fail("measured again"))
        for other in ({"tokens": 200}, {"seqlen": 10}):
            with pytest.raises(ExportError, match=r"text .* changed"):
                export(model, tmp_path / "out", **DROP, **{**options, **other})
        with pytest.raises(ExportError, match='--drop-experts was "2", is "1"'):
            export(model, tmp_path / "out", drop_experts=1, name="Model-drop2", **options)
        assert export(model, tmp_path / "out", **DROP, **options).resumed == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_run_killed_when_no_more_is_known_than_which(
    method: str, model: Path, text: Any, tmp_path: Path, interrupt, monkeypatch
) -> None:
    options = {"type": "Q4_0", "method": method, **FAST, **DROP, **text}
    export(model, tmp_path / "whole", **options)
    interrupt(0)
    with monkeypatch.context() as patched:
        patched.setattr(job, "kept", lambda *_: nullcontext())  # as a killed process does not
        with pytest.raises(KeyboardInterrupt):
            export(model, tmp_path / "out", **options)
    interrupt(None)
    (work,) = (tmp_path / "out").iterdir()
    (work / "Model-drop2-Q4_0.gguf").write_bytes(b"what it had begun")
    monkeypatch.setattr(saliency, "saliency", lambda *_: pytest.fail("measured again"))
    export(model, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_plans_are_of_what_is_left(model: Path) -> None:
    whole, fewer = (xent_quant.plan(model, type="Q4_0", **options)[0] for options in ({}, DROP))
    for before, after in zip(whole.tensors, fewer.tensors, strict=True):
        routed = "_exps" in before.name or "ffn_gate_inp" in before.name
        assert after.nbytes * (3 if routed else 1) == before.nbytes * (2 if routed else 1), before.name
    assert fewer.notes[0] == "Of 6 experts in each layer 2 are left out: those of least router-weighted saliency (REAP)."
    planned = xent_quant.plan(None, size="6MiB", sensitivity=sensitivities.PRIOR_FILE, drop_experts="25%")[0]
    assert planned.notes[-1] == "What the experts that are left out lose comes on top of that."
    loss = planned.expected.kl  # as many bytes for fewer weights
    assert loss < xent_quant.plan(None, size="6MiB", sensitivity=sensitivities.PRIOR_FILE)[0].expected.kl


def test_what_cannot_be_left_out_is_refused(tmp_path: Path) -> None:
    for wanted, words in (
        (5, "--drop-experts 5: leaves 1 of 6 experts, and every token uses 2; at most 4 can be left out"),
        (99, "leaves 0 of 6 experts"),
        ("16%", "--drop-experts 16%: is less than one of 6 experts"),
    ):
        folder = write_checkpoint(tmp_path / "moe", CONFIG, random_weights(CONFIG))
        with pytest.raises(ConfigError, match=words):
            xent_quant.plan(folder, drop_experts=wanted)
    assert xent_quant.plan(folder, drop_experts=4)
    config = {**CONFIG, "num_experts": 0}
    with pytest.raises(ConfigError, match="has no experts, it is dense"):
        xent_quant.plan(write_checkpoint(tmp_path / "dense", config, random_weights(config)), drop_experts=1)


@pytest.mark.parametrize("options", [{"method": "rtn", "type": "Q4_0"}, {"formats": ["bnb"]}])
def test_a_cpu_finds_which_stay_where_nothing_else_is_measured(
    options: dict[str, Any], model: Path, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.session.choose", lambda name: {"cpu": ()}[name])
    assert export(model, tmp_path, **options, **DROP, **text).exports
    assert xent_quant.resources(model, **options, **DROP, **text)[0].vram is None


def test_a_plan_that_is_another_when_the_run_goes_on_is_refused(
    model: Path, text: Any, tmp_path: Path, interrupt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bandwidth of RAM is measured anew, and the first plan may be the same while the one of what stays is not."""
    options = {"type": "Q4_0", **FAST, **DROP, **text}
    interrupt(2)
    with pytest.raises(Interrupted):
        export(model, tmp_path / "out", **options)
    interrupt(None)
    applied = saliency.Dropping.applied

    def other(dropping: Any, numbers: Any) -> Any:
        checkpoint, exporters, session = applied(dropping, numbers)
        monkeypatch.setattr(type(exporters[0]), "identity", property(lambda exporter: {"plan": "another"}))
        return checkpoint, exporters, session

    monkeypatch.setattr(saliency.Dropping, "applied", other)
    with pytest.raises(ExportError, match="an unfinished run lies here that was not this one"):
        export(model, tmp_path / "out", **options)
