"""The streaming forward against the slow reference, and against stock llama.cpp's perplexity."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.exporters.test_gguf_exact import CASES, IDS
from tests.reference.forward import forward
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CalibrationError
from xent_quant.model.streaming import StreamingModel


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


def test_observer_sees_every_weight_and_every_token(checkpoint) -> None:
    source = Checkpoint.open(checkpoint())
    rows: Counter[str] = Counter()

    def observe(weights: tuple[str, ...], inputs: torch.Tensor, gates: torch.Tensor | None) -> None:
        for name in weights:
            rows[name] += len(inputs)
            assert inputs.shape[1] == source.infos[name].shape[1]
        assert gates is None or len(gates) == len(inputs)

    StreamingModel(source).hidden_states(torch.tensor([IDS]), observe)
    experts = sum(count for name, count in rows.items() if ".experts." in name and "gate_proj" in name)
    assert experts == len(IDS) * source.architecture.experts_per_token * source.architecture.num_layers
    assert rows["lm_head.weight"] == rows["model.layers.0.self_attn.q_proj.weight"] == len(IDS)


def test_overflowing_activations_are_refused(checkpoint) -> None:
    class Loud:
        def __init__(self, inner: Checkpoint) -> None:
            self.inner, self.architecture = inner, inner.architecture

        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            return self.inner.read(name, start, stop) * (np.float32(1e38) if "experts.2.up" in name else 1)

    with pytest.raises(CalibrationError, match="expert 2"):
        StreamingModel(Loud(Checkpoint.open(checkpoint()))).hidden_states(torch.tensor([IDS * 4]))


def test_a_text_shorter_than_a_window_is_refused(checkpoint) -> None:
    with pytest.raises(CalibrationError, match="fewer than one window"):
        StreamingModel(Checkpoint.open(checkpoint())).perplexity(IDS)
