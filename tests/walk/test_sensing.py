"""Sensitivity: what the walk measures against models that are rounded in one place, and what becomes of the file."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xent_quant
from calibration.session import Session
from tests.conftest import random_weights, write_checkpoint
from xent_quant import formats, sensitivities
from xent_quant.checkpoint.fingerprint import model_hash
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.cli.main import main
from xent_quant.errors import CalibrationError, ConfigError, ExportError
from xent_quant.formats.base import F32
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.sensitivities import TYPES, place, places
from xent_quant.validation.measures import kl_divergence, log_softmax, scored
from xent_quant.walk import sensing
from xent_quant.walk.sensing import REFERENCE, Sensing

LENGTH = 20
KINDS = (REFERENCE, "Q8_0", "Q5_1")


def token_ids(count: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(4, 320, (count, LENGTH)))


@pytest.fixture(scope="module")
def sensed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sensing, dict[str, dict[str, float]], dict[str, F32]]:
    """A pass over the small model, what it found, and every weight as it was rounded to the reference."""
    made: dict[str, F32] = {}
    run = Sensing(Checkpoint.open(model), token_ids(6, 0), token_ids(3, 1), KINDS, tmp_path_factory.mktemp("states"))
    rounded = run._rounded

    def recording(spec: Any, rows: F32, known: Any, kind: str = REFERENCE) -> F32:
        found = rounded(spec, rows, known, kind)
        if kind == REFERENCE and rows.shape == spec.shape:
            made[spec.name] = found
        return found

    run._rounded = recording  # type: ignore[method-assign]
    return run, dict(run.run().losses), made  # type: ignore[arg-type]


def test_what_is_open_and_held_does_not_grow_with_the_places(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    logits = StreamingModel.logits

    def counted(running: StreamingModel, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.untyped_storage().nbytes() <= 4 * sensing.LOGIT_ROWS * hidden.shape[-1]
        alive[:] = [one for one in alive if one() is not None] + [weakref.ref(hidden)]
        assert len(alive) <= 2
        return logits(running, hidden)

    monkeypatch.setattr(StreamingModel, "logits", counted)
    monkeypatch.setattr(sensing, "LOGIT_ROWS", 8)
    run = Sensing(Checkpoint.open(model), token_ids(2, 0), token_ids(2, 1), ("Q8_0",), tmp_path)
    run.run()
    assert len(run.places) > 8 >= len(list(tmp_path.iterdir()))


class Replaced:
    """A checkpoint with some weights changed."""

    def __init__(self, checkpoint: Checkpoint, arrays: dict[str, F32]) -> None:
        self.checkpoint, self.architecture, self.arrays = checkpoint, checkpoint.architecture, arrays

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        return self.arrays[name][start:stop] if name in self.arrays else self.checkpoint.read(name, start, stop)


def log_probabilities(source: Any, windows: torch.Tensor) -> np.ndarray:
    running = StreamingModel(source)
    positions, _ = scored(LENGTH)
    return log_softmax(running.logits(running.hidden_states(windows)[:, positions]).numpy()).reshape(-1, 320)


def test_the_reference_loses_what_a_model_rounded_there_alone_loses(sensed: Any) -> None:
    run, losses, made = sensed
    checkpoint, judged = run.checkpoint, run.rounded.windows
    model = checkpoint.architecture
    assert list(losses) == places(model)
    exact = log_probabilities(checkpoint, judged)
    for name in ("token_embd", "blk.0.attn_v", "blk.1.attn_output", "blk.0.ffn_gate_up_exps", "blk.1.ffn_down_shexp", "output"):
        there = {spec.name: made[spec.name] for spec in model.tensors().values() if spec.name in made and place(spec) == name}
        assert there
        expected = kl_divergence(exact, log_probabilities(Replaced(checkpoint, there), judged)).mean()
        assert losses[name][REFERENCE] == pytest.approx(expected, rel=1e-2)


def test_other_types_lose_by_the_ratio_of_their_output_errors(sensed: Any) -> None:
    run, losses, _ = sensed
    checkpoint = run.checkpoint
    spec = checkpoint.architecture.layer(1).output
    rows: list[torch.Tensor] = []

    def observe(stage: Stage) -> None:
        if spec in stage.weights:
            rows.extend(batch.inputs.clone() for batch in stage.batches(0))  # the pass uses its buffers again

    StreamingModel(checkpoint).run(run.exact.windows, observe)
    measured = torch.cat(rows)[~run._measuring._held_out]
    importance = (measured.square().sum(0).double() / len(measured)).numpy()  # summed in float32, so that no near-tie falls apart
    inputs, weights = measured.numpy(), checkpoint.read(spec.name)
    errors = {}
    for kind in KINDS:
        encoding = formats.get(kind)
        change = encoding.dequantize(encoding.quantize(weights, importance.astype(np.float32))) - weights
        errors[kind] = np.square(inputs @ change.T, dtype=np.float64).sum()
    found = losses[place(spec)]
    for kind in KINDS[1:]:
        assert found[kind] / found[REFERENCE] == pytest.approx(errors[kind] / errors[REFERENCE], rel=1e-3)
    assert found["Q8_0"] < 0.1 * found["Q5_1"] < found[REFERENCE]


def test_the_file_is_what_plans_stand_on(
    model: Path, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensing, "TYPES", TYPES[:9])  # kernels take seconds to compile
    monkeypatch.setattr(sensitivities, "TYPES", TYPES[:9])
    kept = tmp_path / "kept.json"
    monkeypatch.setattr(sensitivities, "kept", lambda _: kept)
    checkpoint = Checkpoint.open(model)
    assert sensitivities.of(checkpoint).source.startswith("a prior")
    options = {**text, "tokens": 240}
    done = xent_quant.sensitivity(model, **options)
    assert done.file == kept
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    found = sensitivities.of(checkpoint)
    assert found.source.startswith("measured on this model")
    assert found.losses == done.sensitivity.losses
    assert sensitivities.of(checkpoint, kept).source == "from kept.json"  # which cards say, so no path
    with pytest.raises(ExportError, match="exists"):
        xent_quant.sensitivity(model, output=kept, **options)
    with pytest.raises(CalibrationError, match="windows of 20 tokens are too few, there must be 8"):
        xent_quant.sensitivity(model, output=tmp_path / "other.json", **text)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_the_command_measures_and_says_what_it_knows_of_the_text(
    model: Path,
    text: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sensing, "TYPES", ("Q4_K",))
    measure, spare = sensing.measure, []

    def measured(session: Session, *rest: Any, **named: Any) -> sensitivities.Sensitivity:
        spare.append(session.text.spare.size)
        return measure(session, *rest, **named)

    monkeypatch.setattr(sensing, "measure", measured)
    file = tmp_path / "sensitivity.json"
    command = ["sensitivity", str(model), "--calib", *text["calib"], "--tokens", "240", "--seqlen", "20", "--output", str(file)]
    note = "240 tokens are about 80 for each of 6 experts"
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--json"])
    out, errors = capsys.readouterr()
    made = json.loads(out)
    assert made["losses"] == json.loads(file.read_bytes())["losses"]
    assert [Path(made["file"]), made["tokens"]] == [file, 240]
    assert note in made["notes"][0]
    assert note in errors
    with pytest.raises(SystemExit, match="1"):
        main(command)
    assert "--force" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--force"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("expected KL at Q4_K", "token_embd", note, str(file)))
    assert not any(spare)  # nothing is chosen by how rare experts are


def told(losses: dict[str, Any], model: str = "another") -> bytes:
    return json.dumps({"format": sensitivities.FORMAT, "model": model, "losses": losses}).encode()


def test_the_file_is_of_the_model_and_not_of_the_copy(model: Path, tmp_path: Path) -> None:
    copy = Checkpoint.open(Path(shutil.copytree(model, tmp_path / "copy")))
    known = sensitivities.prior(copy.architecture)
    sensitivities.save(known, Checkpoint.open(model), tmp_path / "sensitivity.json")
    assert sensitivities.of(copy, tmp_path / "sensitivity.json").losses == known.losses
    assert sensitivities.kept(copy) == sensitivities.kept(Checkpoint.open(model))
    config = json.loads((model / "config.json").read_text())
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", config, random_weights(config, seed=1)))
    with pytest.raises(ConfigError, match="was measured on another model; measure this one with xent-quant sensitivity"):
        sensitivities.of(other, tmp_path / "sensitivity.json")


def test_the_prior_is_the_miniatures_own() -> None:
    assert sensitivities.of(Checkpoint.open(miniature()), sensitivities.PRIOR_FILE).losses["output"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a file of xent-quant sensitivity"),
        (b"\xff\xfe", "not a file of xent-quant sensitivity"),
        (b"[1]", "not a file of xent-quant sensitivity"),
        (b'{"format": "another"}', "not a file of xent-quant sensitivity"),
        (told({"output": {"Q8_0": "x"}}), "damaged"),
        (told({"output": {"Q8_0": 10**400}}), "damaged"),
        (told({"output": {"Q8_0": -1}}), "negative"),
        (told({"output": {"Q8_0": float("nan")}}), "no numbers"),
        (told({}), "was measured on another model"),
        (told({}, model="model"), "says nothing of token_embd"),
    ],
)
def test_other_files_are_refused(content: bytes, why: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    file.write_bytes(content.replace(b'"model": "model"', f'"model": "{model_hash(Checkpoint.open(model))}"'.encode()))
    with pytest.raises(ConfigError, match=why) as refused:
        xent_quant.plan(model, size="1M", sensitivity=file)
    assert str(file) in str(refused.value)
    with pytest.raises(OSError, match=r"missing\.json"):
        xent_quant.plan(model, size="1M", sensitivity=tmp_path / "missing.json")


def test_a_file_that_is_too_large_is_not_read(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    sensitivities.save(sensitivities.prior(Checkpoint.open(model).architecture), Checkpoint.open(model), file)
    with file.open("ab") as stream:
        stream.write(b" " * sensitivities.LARGEST)
    with pytest.raises(ConfigError, match="not a file of xent-quant sensitivity"):
        sensitivities.of(Checkpoint.open(model), file)


def test_the_prior_spreads_a_projections_loss_over_the_layers(model: Path) -> None:
    shape = Checkpoint.open(model).architecture
    told = json.loads(sensitivities.PRIOR_FILE.read_text())["losses"]
    found = sensitivities.prior(shape).losses
    whole = sum(told[f"blk.{layer}.attn_v"]["Q4_K"] for layer in range(2))
    assert found["blk.1.attn_v"]["Q4_K"] == pytest.approx(whole / shape.num_layers)
    assert found["output"]["Q4_K"] == told["output"]["Q4_K"]


@pytest.mark.parametrize(("windows", "judged"), [(7, 0), (8, 1), (31, 3), (64, 8), (79, 8), (250, 8), (1000, 8)])
def test_the_judged_windows_are_of_all_of_the_text(windows: int, judged: int) -> None:
    places = [index for index, chosen in enumerate(sensing.judged_windows(windows)) if chosen]
    assert len(places) == judged
    assert windows - max(places, default=0) <= max(8, windows // 8)
    assert len(set(np.diff(places))) <= 1
