"""The streaming forward against the slow reference, and against stock llama.cpp's perplexity."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.exporters.test_gguf_exact import CASES, IDS
from tests.reference.forward import forward
from tests.walking import stages
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CalibrationError
from xent_quant.model.layers import swiglu
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.progress import Silent
from xent_quant.tensors import Role


@pytest.mark.parametrize("overrides", [*CASES.values(), {"norm_topk_prob": False}], ids=[*CASES.keys(), "not renormalised"])
def test_equals_the_slow_reference(checkpoint, overrides) -> None:
    folder = checkpoint(**overrides)
    wanted = forward(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), IDS)
    source = Checkpoint.open(folder)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = StreamingModel(source, dtype)
        got = model.logits(model.hidden_states(torch.tensor([IDS, IDS])))
        assert np.abs(got[1].numpy() - wanted).max() / np.abs(wanted).max() < bound


def test_log_probabilities_stream_the_head(checkpoint, monkeypatch) -> None:
    source = Checkpoint.open(checkpoint())
    model = StreamingModel(source, torch.float64)
    hidden = model.hidden_states(torch.tensor([IDS]))[0]
    targets = torch.tensor(IDS)
    wanted = model.logits(hidden).log_softmax(-1)[torch.arange(len(IDS)), targets]
    monkeypatch.setattr("xent_quant.model.streaming.HEAD_WEIGHTS", 7 * source.architecture.hidden_size)
    assert torch.allclose(model.log_probabilities(hidden, targets), wanted, rtol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_show_every_weight_every_token_in_order(threads: int, checkpoint, monkeypatch) -> None:
    """Routed experts have their turns, side by side with several threads: the largest first. Each one's stages, and all others,
    keep the order of the checkpoint."""
    monkeypatch.setattr("xent_quant.parallel.numba.get_num_threads", lambda: threads)
    source = Checkpoint.open(checkpoint())
    model = source.architecture
    whole = StreamingModel(source, torch.float64).hidden_states(torch.tensor([IDS, IDS[::-1]]))
    monkeypatch.setattr("xent_quant.model.stages.PART_TOKENS", 3)
    rows: Counter[str] = Counter()
    finished: list[str] = []

    def observe(stage: Stage) -> None:
        for batch in stage.batches(0):
            assert batch.gates is None or len(batch.gates) == len(batch.inputs)
            for spec in stage.weights:
                rows[spec.name] += len(batch.inputs)
                assert batch.inputs.shape == (len(batch.tokens), source.infos[spec.name].shape[1])
        assert not set(finished) & {spec.name for spec in stage.weights}
        finished.extend(spec.name for spec in stage.weights)

    in_parts = StreamingModel(source, torch.float64).hidden_states(torch.tensor([IDS, IDS[::-1]]), observe)
    assert torch.allclose(in_parts, whole, rtol=1e-10)
    experts = sum(count for name, count in rows.items() if ".experts." in name and "gate_proj" in name)
    assert experts == 2 * len(IDS) * model.experts_per_token * model.num_layers
    assert rows["lm_head.weight"] == rows["model.layers.0.self_attn.q_proj.weight"] == 2 * len(IDS)
    tensors = model.tensors()
    wanted = [name for name, spec in tensors.items() if spec.measured or spec.role is Role.ROUTER]
    assert sorted(finished) == sorted(wanted)
    early = [name for name in finished if "shared_experts" not in name or "down" in name]
    own: dict[int | None, list[str]] = {}
    for name in early:
        own.setdefault(tensors[name].expert, []).append(name)
    if threads == 1:
        for layer in range(model.num_layers):
            turns = [name for name in finished if ".experts." in name and "down" in name and tensors[name].layer == layer]
            counts = [rows[name] for name in turns]
            assert counts == sorted(counts, reverse=True)
            assert len(set(counts)) > 1
    assert all(names == [name for name in wanted if name in names] for names in own.values())


def test_an_interrupted_run_goes_on_behind_its_last_layer(checkpoint, tmp_path) -> None:
    source, windows = Checkpoint.open(checkpoint(num_hidden_layers=3)), torch.tensor([IDS, IDS[::-1]])
    whole = StreamingModel(source).hidden_states(windows)

    class Stops(Silent):
        def phase(self, text: str) -> None:
            if text == "layer 3 of 3":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StreamingModel(source).hidden_states(windows, progress=Stops(), folder=tmp_path)
    seen: list[int] = []
    again = StreamingModel(source).hidden_states(windows, after_layer=lambda layer, _: seen.append(layer), folder=tmp_path)
    assert seen == [2]
    assert torch.equal(again, whole)


def test_a_rare_expert_shows_what_it_would_see_of_other_tokens(checkpoint) -> None:
    source = Checkpoint.open(checkpoint())
    seen = 0
    for stage in stages(source, torch.tensor([IDS]), torch.float32):
        others = stage.others(0, 4)
        if others is None:
            continue
        seen += 1
        assert others.inputs.shape == (4, stage.weights[0].shape[1])
        same = {int(token): row for batch in stage.batches(0) for token, row in zip(batch.tokens, batch.inputs, strict=True)}
        for token, row in zip(range(0, len(IDS), len(IDS) // 4), others.inputs, strict=False):
            assert token not in same or torch.allclose(same[token], row, atol=1e-6)
    assert seen == source.architecture.num_experts * source.architecture.num_layers


def test_a_state_of_next_to_nothing_has_a_size(checkpoint) -> None:
    source = Checkpoint.open(checkpoint())
    stage = next(stages(source, torch.tensor([IDS]), torch.float32))
    tokens, states = torch.arange(len(IDS)), stage.run.streams[0].x.read(0, len(IDS))
    wanted = np.sqrt(np.square(states.numpy()).mean(1) + 1e-6)
    np.testing.assert_allclose(stage.run.sizes(0, tokens), wanted, rtol=1e-5)
    states[3] = 0
    stage.run.streams[0].x.write(0, states)
    wanted[3] = 0.25 * np.sort(np.append(np.delete(wanted, 3), 0))[(len(IDS) - 1) // 2]
    np.testing.assert_allclose(stage.run.sizes(0, tokens), wanted, rtol=1e-5)
    assert not len(stage.run.sizes(0, tokens[:0]))


def test_overflowing_activations_are_refused(checkpoint) -> None:
    class Loud:
        def __init__(self, inner: Checkpoint) -> None:
            self.inner, self.architecture, self.path = inner, inner.architecture, inner.path

        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            return self.inner.read(name, start, stop) * (np.float32(1e38) if "experts.2.up" in name else 1)

    with pytest.raises(CalibrationError, match="model: layer 0, expert 2"):
        StreamingModel(Loud(Checkpoint.open(checkpoint()))).hidden_states(torch.tensor([IDS * 4]))


def test_a_text_shorter_than_a_window_is_refused(checkpoint) -> None:
    with pytest.raises(CalibrationError, match="fewer than one window"):
        StreamingModel(Checkpoint.open(checkpoint())).perplexity(IDS)


class Rough:
    """The model with every matrix but the routers rounded to eighths of its largest magnitude; a WeightSource."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.architecture = checkpoint, checkpoint.architecture

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        weights = self.checkpoint.read(name)
        if weights.ndim > 1 and "router" not in name:
            step = np.abs(weights).max() / 8
            weights = np.rint(weights / step) * step
        return weights[start:stop]


@pytest.mark.parametrize("overrides", [{}, {"num_experts": None}, {"num_shared_experts": 0}, {"tie_word_embeddings": True}])
def test_a_follower_runs_as_it_would_alone_and_shows_the_models_rows(checkpoint, monkeypatch, overrides) -> None:
    """Rows, and what one residual stream holds more than the other, against both models run apart."""
    monkeypatch.setattr("xent_quant.model.stages.PART_TOKENS", 7)
    source, windows = Checkpoint.open(checkpoint(**overrides)), torch.tensor([IDS, IDS[::-1]])
    rough = Rough(source)
    rows: list[dict[str, dict[int, torch.Tensor]]] = []
    streams: list[list[torch.Tensor]] = []
    for weights in (source, rough):
        seen: dict[str, dict[int, torch.Tensor]] = {}

        def observe(stage: Stage, seen=seen) -> None:
            for batch in stage.batches(0):
                for spec in stage.weights:
                    seen.setdefault(spec.name, {}).update(zip(batch.tokens.tolist(), batch.inputs.clone(), strict=True))

        behind = [torch.from_numpy(weights.read("model.embed_tokens.weight"))[windows].double()]
        model = StreamingModel(weights, torch.float64)
        model.hidden_states(
            windows, observe, after_layer=lambda layer, x, behind=behind: behind.append(x.rows.clone().view(*windows.shape, -1))
        )
        rows.append(seen)
        streams.append(behind)
    exact, own = rows

    elsewhere = compared = residuals = 0
    for stage in stages(source, windows, torch.float64, rough):
        for batch, spec in ((batch, spec) for batch in stage.batches(1) for spec in stage.weights):
            name = spec.name
            assert (batch.exact is None) == (spec.expert is not None and spec.role is not Role.DOWN)
            for index, token in enumerate(batch.tokens.tolist()):
                assert torch.allclose(batch.inputs[index], own[name].pop(token), rtol=1e-9, atol=1e-12)
                if batch.exact is None:
                    continue
                if token in exact[name]:
                    assert torch.allclose(batch.exact[index], exact[name][token], rtol=1e-9, atol=1e-12)
                    compared += 1
                else:
                    elsewhere += 1  # the two chose different experts
            to_stream = spec.role is Role.ATTENTION_OUTPUT or (spec.role is Role.DOWN and spec.expert is None)
            assert (batch.residual is not None) == to_stream
            if batch.residual is None or spec.layer is None:
                continue
            down = spec.role is Role.DOWN
            states = [stream[spec.layer + down].flatten(0, 1)[batch.tokens] for stream in streams]
            if down:  # before this last output was added
                for side, (weights, inputs) in enumerate(((source, batch.exact), (rough, batch.inputs))):
                    states[side] = states[side] - inputs @ torch.from_numpy(weights.read(name)).double().T
            assert torch.allclose(batch.residual, states[0] - states[1], rtol=1e-8, atol=1e-10)
            residuals += 1
    assert not any(own.values())
    assert residuals
    assert compared > 100
    assert elsewhere or not source.architecture.num_experts


@pytest.mark.parametrize("overrides", [{}, {"num_experts": None}])
def test_inner_rows_that_are_kept_are_computed_once_and_are_the_same(checkpoint, monkeypatch, overrides) -> None:
    monkeypatch.setattr("xent_quant.model.stages.PART_TOKENS", 7)
    computed: list[int] = []

    def counted(rows: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        computed.append(len(rows))
        return swiglu(rows, gate, up)

    monkeypatch.setattr("xent_quant.model.stages.swiglu", counted)
    source, windows = Checkpoint.open(checkpoint(**overrides)), torch.tensor([IDS, IDS[::-1]])
    found: list[list[torch.Tensor]] = []
    for kept in (False, True):
        computed.clear()
        seen, work = [], 0
        for stage in stages(source, windows, torch.float64, Rough(source), inner=kept):
            shared = stage.weights and stage.weights[0].role is Role.DOWN and stage.expert is None
            before = sum(computed)
            for batch in (batch for stream in (1, 0, 1) for batch in stage.batches(stream)):
                seen += [part.clone() for part in (batch.inputs, batch.exact) if part is not None]
            work += (sum(computed) - before) * bool(shared)
        seen.append(stage.run.streams[1].x.rows.clone())
        found.append(seen)
        looks = 2 if kept else 5  # of either stream once; else at one, and at two each time that it is beside the exact one
        assert work == looks * windows.numel() * source.architecture.num_layers
    assert all(map(torch.equal, *found))
