"""What we export is the same function in stock llama.cpp."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import xent_quant
from exporters.gguf import plan as plan_module
from tests.reference.forward import forward
from xent_quant import formats
from xent_quant.methods import METHODS
from xent_quant.validation.llama_cpp import LlamaCpp

CASES = {
    "multi-head, 2 shared": {},
    "grouped-query": {"num_key_value_heads": 2},
    "1 shared": {"num_shared_experts": 1},
    "head_dim 80": {"hidden_size": 320, "intermediate_size": 64},
    "no shared": {"num_shared_experts": 0},
    "dense": {"num_experts": 0, "intermediate_size": 160},
    "tied head": {"tie_word_embeddings": True},
}
IDS = [2, 17, 300, 5, 9, 42, 260, 261, 11, 7, 290, 33]


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_f32_logits_equal_the_reference(checkpoint, tmp_path: Path, overrides) -> None:
    folder = checkpoint(**overrides)
    done = xent_quant.quantize(folder, type="F32", output=tmp_path / "out")
    wanted = forward(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), IDS)
    with LlamaCpp(done.files[0]) as llama:
        got = llama.logits(IDS)
    assert np.abs(got - wanted).max() < 1e-3


def test_padding_leaves_the_function_unchanged(checkpoint, tmp_path: Path, monkeypatch) -> None:
    folder = checkpoint(intermediate_size=480)
    (padded,) = xent_quant.plan(folder, type="Q4_K_M")
    assert any("padded" in note for note in padded.notes)
    assert padded.nbytes < xent_quant.plan(folder, type="Q4_K_M", pad="never")[0].nbytes

    # F32 rows gain nothing from padding, so `auto` leaves them; force it to see exactness without rounding.
    f32 = xent_quant.quantize(folder, type="F32", output=tmp_path / "plain", force=True)
    monkeypatch.setattr(plan_module, "_saved", lambda *_: 1)
    forced = xent_quant.quantize(folder, type="F32", output=tmp_path / "forced", force=True)
    assert forced.plans[0].nbytes > f32.plans[0].nbytes
    with LlamaCpp(f32.files[0]) as one, LlamaCpp(forced.files[0]) as two:
        assert np.abs(one.logits(IDS) - two.logits(IDS)).max() < 1e-3


def test_token_ids_equal_hugging_face(tmp_path: Path) -> None:
    from xent_quant.checkpoint.hub import miniature

    done = xent_quant.quantize(None, type="F32", output=tmp_path)
    tokenizer = Tokenizer.from_file(str(miniature() / "tokenizer.json"))
    texts = (
        "The old lamp in the window — “half-lit”, at 10:45 — went out.",
        "夜色渐深，他推开门，说：“你来了？”\n\n第2章　雨",
        "emoji 👩‍🚀 and rare 𠮷 characters\ttabs  double  spaces",
        "Don't stop... 3.14159, 100%!",
    )
    with LlamaCpp(done.files[0]) as llama:
        for text in texts:
            assert llama.tokenize(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "MXFP4_MOE", "IQ3_XS", "IQ2_M", "IQ1_S", "TQ1_0"])
def test_every_mix_generates(tmp_path: Path, kind: str) -> None:
    done = xent_quant.quantize(None, method="rtn", type=kind, output=tmp_path, effort="fast")
    with LlamaCpp(done.files[0], context=64) as llama:
        text = llama.detokenize(llama.generate(llama.tokenize("The old lamp"), 8))
    assert text.strip()


BLOCK_TYPES = [name for name in formats.NAMES if formats.get(name).block_size > 1]


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_type_computes_what_its_weights_say(checkpoint, tmp_path: Path, kind: str) -> None:
    """llama.cpp on blocks against llama.cpp on the same weights in F32: it rounds activations to 8 bits, no more. Dense, as a
    router would turn a small difference into a large one."""
    folder = checkpoint(num_experts=0, num_hidden_layers=1, intermediate_size=256)
    types = ["(ffn_(gate|up|down)|attn_(q|k|v|output)).weight=" + kind]
    blocks = xent_quant.quantize(folder, method="rtn", type="F32", tensor_types=types, output=tmp_path / "blocks").files[0]
    file = folder / "model.safetensors"
    weights = {
        name: formats.get(kind).dequantize(METHODS["rtn"]("fast").quantize(value, formats.get(kind), None, name=name))
        if "_proj" in name
        else value
        for name, value in load_file(file).items()
    }
    save_file(weights, file)
    same = xent_quant.quantize(folder, type="F32", output=tmp_path / "same").files[0]
    with LlamaCpp(blocks) as one, LlamaCpp(same) as other:
        got, wanted = one.logits(IDS), other.logits(IDS)
    # 0.018 to 0.024 for all types, from the activations; the types' own errors are 0.02 (Q8_0) to 0.75 (Q2_K) here.
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)


def test_splits_load(checkpoint, tmp_path: Path) -> None:
    done = xent_quant.quantize(checkpoint(), method="rtn", type="Q8_0", output=tmp_path / "out", split_size=500_000)
    shards = [path for path in done.files if path.suffix == ".gguf"]
    assert len(shards) > 2
    with LlamaCpp(shards[0]) as llama:
        assert np.isfinite(llama.logits(IDS)).all()


def test_same_bytes_at_any_thread_count(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    one, two = (
        xent_quant.quantize(folder, method="rtn", output=tmp_path / str(n), threads=n).files[0].read_bytes() for n in (1, 2)
    )
    assert one == two
