"""Plans: sizes against llama-quantize's, padding decisions, completeness."""

import pytest

from exporters.gguf.plan import plan
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.recipes import MIXES, Role, recipe

A42B = {
    "model_type": "xverse",
    "vocab_size": 100534,
    "hidden_size": 2560,
    "intermediate_size": 1728,
    "num_hidden_layers": 28,
    "num_attention_heads": 32,
    "num_experts": 64,
    "moe_top_k": 6,
    "num_shared_experts": 2,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}


def architecture(**changes: object) -> Architecture:
    return Architecture.from_config({**A42B, **changes})


# MiB of tensor data that llama-quantize writes for XVERSE-Ent-A4.2B's shapes, and with the expert width padded to 1792;
# measured with stock llama.cpp.
@pytest.mark.parametrize(
    ("name", "stock", "ours"),
    [
        ("Q2_K", 10067, 9345),
        ("Q3_K_M", 12751, 12206),
        ("Q4_K_M", 16366, 15459),
        ("Q5_K_M", 18666, 18093),
        ("Q6_K", 22069, 20892),
        ("Q8_0", 26134, 26134),
    ],
)
def test_sizes_of_the_real_model(name: str, stock: int, ours: int) -> None:
    chosen = recipe(type=name)
    assert round(plan(architecture(), chosen, pad="never").nbytes / 2**20) == stock
    planned = plan(architecture(), chosen)
    assert round(planned.nbytes / 2**20) == ours
    assert planned.expert_width == (1792 if ours < stock else 1728)


@pytest.mark.parametrize("width", [96, 256, 480, 1408, 1728])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_padding_never_makes_a_file_larger(width: int, shared: int) -> None:
    model = architecture(intermediate_size=width, num_shared_experts=shared, num_hidden_layers=4)
    for name in ("F32", "Q8_0", "Q6_K", "Q5_K_S", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"):
        plain, best = plan(model, recipe(type=name), pad="never"), plan(model, recipe(type=name))
        assert best.nbytes <= plain.nbytes, name
        assert (best.expert_width != width) == (best.nbytes < plain.nbytes)


def test_shared_width_stays_expert_width_times_count() -> None:
    planned = {tensor.name: tensor for tensor in plan(architecture(), recipe(bits=4)).tensors}
    assert planned["blk.0.ffn_gate_exps.weight"].shape == (64, 1792, 2560)
    assert planned["blk.0.ffn_gate_shexp.weight"].shape == (3584, 2560)
    assert planned["blk.0.ffn_down_shexp.weight"].shape == (2560, 3584)


@pytest.mark.parametrize("changes", [{}, {"num_experts": None}, {"num_shared_experts": 0}, {"num_key_value_heads": 8}])
@pytest.mark.parametrize("tied", [False, True])
def test_every_checkpoint_tensor_is_written_once(changes: dict[str, object], tied: bool) -> None:
    model = architecture(**changes, tie_word_embeddings=tied)
    planned = plan(model, recipe(bits=6))
    wanted = model.tensors()
    sources = [source.name for tensor in planned.tensors for source in tensor.sources]
    assert set(sources) == set(wanted)
    assert len(sources) == len(set(sources)) + tied  # output.weight repeats the embedding
    assert len({tensor.name for tensor in planned.tensors}) == len(planned.tensors)
    for tensor in planned.tensors:
        assert tensor.source_weights == sum(wanted[source.name].n_weights for source in tensor.sources)
        assert tensor.heads == {Role.ATTENTION_Q: 32, Role.ATTENTION_K: model.num_kv_heads}.get(tensor.role, 0)


def test_architectures() -> None:
    assert plan(architecture(), recipe()).arch == "bailingmoe"
    assert plan(architecture(num_shared_experts=0), recipe()).arch == "granitemoe"
    assert plan(architecture(num_experts=None), recipe()).arch == "xverse"
    with pytest.raises(UnsupportedError, match="norm_topk_prob"):
        plan(architecture(num_shared_experts=0, norm_topk_prob=False), recipe())


def test_routers_and_norms_are_float_whatever_is_asked() -> None:
    for name in MIXES:
        if name.startswith("IQ"):
            continue
        for tensor in plan(architecture(num_hidden_layers=2), recipe(type=name, tensor_types=[".=Q8_0"])).tensors:
            assert (tensor.type == "F32") == (tensor.role in (Role.NORM, Role.ROUTER))


def test_an_override_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--tensor-type 'ffn_dwn=Q6_K': matches no tensor"):
        plan(architecture(), recipe(tensor_types=["ffn_dwn=Q6_K"]))


def test_fallbacks_are_told() -> None:
    notes = plan(architecture(), recipe(bits=4), pad="never").notes
    assert notes == (
        "Q4_K does not divide some rows: Q5_0 there, as llama-quantize does.",
        "Q6_K does not divide some rows: Q8_0 there, as llama-quantize does.",
    )
    (note,) = plan(architecture(intermediate_size=96), recipe(type="Q1_0"), pad="never").notes
    assert note == "Q1_0 does not divide some rows: F16 there, where llama-quantize stops."
    (note,) = plan(architecture(), recipe(bits=4)).notes
    assert "1728 padded with zeros to 1792" in note


def test_bits_per_weight_counts_padding_as_cost() -> None:
    padded = plan(architecture(), recipe(bits=4))
    weights = sum(tensor.source_weights for tensor in padded.tensors)
    assert weights == 25_778_352_640  # the card's 25.8 B
    assert padded.bits_per_weight == pytest.approx(8 * padded.nbytes / weights)


def test_vram_is_weights_cache_and_buffers() -> None:
    planned = plan(architecture(), recipe(bits=4))
    embedding = planned.tensors[0]
    cache_and_mask = planned.vram_bytes(8192) - planned.vram_bytes(0)
    assert cache_and_mask == 2 * 2 * 8192 * 28 * 32 * 80 + 2 * 512 * 8192
    buffers = planned.vram_bytes(0) - (planned.nbytes - embedding.nbytes)
    assert 0.3e9 < buffers < 1e9
