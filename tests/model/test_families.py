"""Every family's streamed forward pass is the one that its own code computes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import families
from tests.exporters.test_gguf_exact import IDS
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.model.states import States
from xent_quant.model.streaming import StreamingModel

CASES = {
    **{family: (family, {}) for family in families.FAMILIES},
    "experts of a layer in one tensor": ("qwen3_moe", {"fused": True}),
    "keys fewer than queries": ("olmoe", {"num_key_value_heads": 2}),
    "gates as they are": ("qwen3_moe", {"norm_topk_prob": False}),
    "renormalised": ("olmoe", {"norm_topk_prob": True}),
    "heads of another size": ("llama", {"head_dim": 48, "tie_word_embeddings": False}),
    "another base and a scaled context": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ),
}


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_logits_are_those_of_the_familys_own_code(tmp_path: Path, family: str, changes: dict) -> None:
    folder = families.write(tmp_path / "model", family, **changes)
    wanted = families.logits(folder, IDS)
    model = StreamingModel(Checkpoint.open(folder))
    got = model.logits(model.hidden_states(torch.tensor([IDS, IDS])))[1].numpy()
    assert np.abs(wanted).max() > 1
    assert np.abs(got - wanted).max() < 1e-4


def test_attention_of_another_width_is_gone_on_with(tmp_path: Path) -> None:
    """States in files, a run that is interrupted in its last layer, and the same in memory."""
    source = Checkpoint.open(families.write(tmp_path / "model", "qwen3_moe"))
    assert source.architecture.attention_size != source.architecture.hidden_size
    windows = torch.tensor([IDS, IDS[::-1]])

    def stop(layer: int, states: States) -> None:
        if layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StreamingModel(source).hidden_states(windows, after_layer=stop, folder=tmp_path)
    again = StreamingModel(source).hidden_states(windows, folder=tmp_path)
    assert torch.equal(again, StreamingModel(source).hidden_states(windows))
