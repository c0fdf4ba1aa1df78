"""`xent-quant inspect FILE --reference MODEL`: errors of what is in the file against the checkpoint."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from exporters.gguf.compare import tensor_errors
from tests.exporters.test_gguf_export import tensors, values, write
from xent_quant import inspection
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("changes", [{}, {"num_experts": None}, {"num_key_value_heads": 2, "tie_word_embeddings": True}])
def test_a_file_in_f32_has_no_error(checkpoint, tmp_path: Path, changes: dict[str, object]) -> None:
    folder = checkpoint(**changes)
    file = write(folder, tmp_path / "out", type="F32")[0]
    found = list(tensor_errors(file, Checkpoint.open(folder)))
    assert {tensor.name for tensor in found} == set(tensors(file))
    assert all(tensor.error == tensor.worst_expert == 0 for tensor in found)


def test_errors_are_those_of_the_values_in_the_file(checkpoint, tmp_path: Path) -> None:
    """Q4_K_M pads the experts' width; the split file is read whole from its second shard."""
    folder = checkpoint(intermediate_size=224)
    written = write(folder, tmp_path / "out", type="Q4_K_M", split_size=1_000_000)
    files = [file for file in written if file.suffix == ".gguf"]
    assert len(files) > 1
    source = load_file(folder / "model.safetensors")
    found = {tensor.name: tensor for tensor in tensor_errors(files[1], Checkpoint.open(folder))}
    stored = {name: tensor for file in files for name, tensor in tensors(file).items()}
    assert set(found) == set(stored)
    name = "blk.1.ffn_down_exps.weight"
    got = values(stored[name]).astype(np.float64)  # [experts, hidden, padded width]
    ratios = []
    for expert in range(6):
        wanted = source[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].astype(np.float64)
        ratios.append((np.square(got[expert][:, :224] - wanted).sum(), np.square(wanted).sum()))
    loss, energy = np.sum(ratios, axis=0)
    assert found[name].error == pytest.approx(np.sqrt(loss / energy), rel=1e-5)
    assert found[name].worst_expert == pytest.approx(max(np.sqrt(a / b) for a, b in ratios), rel=1e-5)
    assert found["blk.0.attn_q.weight"].type == "Q4_K"
    assert 0.02 < found["blk.0.attn_q.weight"].error < 0.12


def test_another_model_is_refused(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    file = write(folder, tmp_path / "out", type="Q8_0")[0]
    for changes in ({"num_hidden_layers": 1}, {"num_experts": 4}, {"hidden_size": 512}):
        with pytest.raises(CheckpointError, match=r"Tiny.*\.gguf: "):
            list(tensor_errors(file, Checkpoint.open(checkpoint(**changes))))
    with pytest.raises(ConfigError, match="--reference"):
        inspection.describe(folder, folder)
    (tmp_path / "bad.gguf").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated or not a GGUF file"):
        list(tensor_errors(tmp_path / "bad.gguf", Checkpoint.open(folder)))
