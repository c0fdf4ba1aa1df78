"""The transformers class against the slow reference and the streaming forward; cache, padding, generation, registration."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import xent_quant
from tests.exporters.test_gguf_exact import CASES, IDS
from tests.reference.forward import forward
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.model.modeling_xverse import XverseConfig, XverseForCausalLM, XverseMLP
from xent_quant.model.streaming import StreamingModel

xent_quant.register_with_transformers()
ALL_CASES = {**CASES, "not renormalised": {"norm_topk_prob": False}}


def load(folder: Path, dtype: torch.dtype = torch.float64, **options) -> XverseForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: XverseForCausalLM, ids: list[int], **options) -> np.ndarray:
    return model(torch.tensor([ids]), **options).logits[0].numpy()


@pytest.mark.parametrize("overrides", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_names_and_shapes_are_the_architectures(overrides) -> None:
    from tests.conftest import TINY

    config = {**TINY, **overrides}
    with torch.device("meta"):
        model = XverseForCausalLM(XverseConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # a tied head is listed once
    assert shapes == {name: spec.shape for name, spec in Architecture.from_config(config).tensors().items()}


@pytest.mark.parametrize("overrides", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_equals_the_slow_reference_and_the_streaming_forward(checkpoint, overrides) -> None:
    folder, ids = checkpoint(**overrides), IDS[:7]
    wanted = forward(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), ids)
    streaming = StreamingModel(Checkpoint.open(folder))
    streamed = streaming.logits(streaming.hidden_states(torch.tensor([ids])))[0].numpy()
    for attention in ("sdpa", "eager"):
        double = load(folder, attn_implementation=attention)
        assert np.abs(logits(double, ids) - wanted).max() < 1e-9
        single = logits(double.float(), ids)
        assert np.abs(single - streamed).max() / np.abs(streamed).max() < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(checkpoint, side, attention) -> None:
    model = load(checkpoint(num_key_value_heads=2, hidden_size=64, intermediate_size=32), attn_implementation=attention)
    texts = [IDS, IDS[2:7], IDS[::-1][:9]]
    width = max(map(len, texts)) + 2
    ids, mask = torch.full((3, width), 1), torch.zeros(3, width, dtype=torch.long)
    for row, text in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
    for row, text in enumerate(texts):
        assert np.abs(batch[row][mask[row].bool()].numpy() - logits(model, text)).max() < 1e-9


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]], ids=["whole", "token by token", "chunks"])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # transformers' names for it before and since 5.24
def test_cached_equals_uncached(checkpoint, cache, chunks, name) -> None:
    model = load(checkpoint(num_key_value_heads=2, hidden_size=64, intermediate_size=32))
    past = DynamicCache(config=model.config) if cache is DynamicCache else StaticCache(model.config, max_cache_len=16)
    parts = []
    for part in torch.tensor([IDS]).split(chunks, 1):
        with torch.no_grad():
            parts.append(model(part, **{name: past}).logits[0])
    assert np.abs(torch.cat(parts).numpy() - logits(model, IDS, use_cache=False)).max() < 1e-9


def test_generates_in_padded_batches_as_alone(checkpoint) -> None:
    model = load(checkpoint(hidden_size=64, intermediate_size=32))
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 1}
    alone = IDS[:5]
    for _ in range(12):
        alone = [*alone, int(logits(model, alone)[-1].argmax())]
    padded = [1, 1, 1, *IDS[:5]]
    ids = torch.tensor([padded, IDS[:8]])
    out = model.generate(ids, attention_mask=(ids != 1).long(), **options)
    assert out[0, 3:].tolist() == alone
    slow = model.generate(ids, attention_mask=(ids != 1).long(), use_cache=False, **options)
    assert torch.equal(out, slow)
    beams = model.generate(torch.tensor([IDS[:5]]), num_beams=3, **options)
    assert beams.shape == (1, 17)


def test_hidden_states_attentions_and_router_logits_on_request(checkpoint) -> None:
    folder = checkpoint()
    model = load(folder, attn_implementation="eager")
    with torch.no_grad():
        out = model(
            torch.tensor([IDS]), output_hidden_states=True, output_attentions=True, output_router_logits=True, logits_to_keep=1
        )
        plain = model(torch.tensor([IDS]))
        as_tuple = model(torch.tensor([IDS]), return_dict=False)
    assert plain.hidden_states is plain.attentions is plain.router_logits is None
    assert torch.equal(as_tuple[0], plain.logits)
    assert out.logits.shape == (1, 1, 320)
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(torch.tensor([IDS])))
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), plain.logits)
    for probabilities, scores in zip(out.attentions, out.router_logits, strict=True):
        assert torch.allclose(probabilities.sum(-1), torch.ones(1, 4, len(IDS), dtype=torch.float64))
        assert scores.shape == (len(IDS), 6)
        assert scores.dtype == torch.float64


def test_idle_experts_do_not_run(checkpoint) -> None:
    model = load(checkpoint())
    ran: list[int] = []
    for layer in model.model.layers:
        for expert in layer.mlp.experts:
            expert.register_forward_hook(lambda module, inputs, output: ran.append(len(inputs[0])))
    logits(model, IDS[:1])
    assert ran == [1] * model.config.moe_top_k * model.config.num_hidden_layers
    ran.clear()
    logits(model, IDS)
    assert sum(ran) == len(IDS) * model.config.moe_top_k * model.config.num_hidden_layers
    assert len(ran) <= model.config.num_experts * model.config.num_hidden_layers


def test_loss_and_gradients_with_and_without_checkpointing(checkpoint) -> None:
    model = load(checkpoint())
    ids = torch.tensor([IDS, IDS[::-1]])
    wanted = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 4.57
            enable({"use_reentrant": False})
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        assert abs(loss.item() - wanted.item()) < 1e-6  # transformers computes the loss in float32
        loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-9, atol=1e-12) for name in gradients[0])
    assert gradients[0]["model.layers.1.mlp.router.weight"].abs().max() > 0


def test_router_stays_float32_in_a_bfloat16_model_and_saving_keeps_every_bit(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(tie_word_embeddings=False)
    model = load(folder, torch.bfloat16)
    assert model.model.layers[0].mlp.router.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.experts[0].gate_proj.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert Checkpoint.open(tmp_path / "saved").architecture == Checkpoint.open(folder).architecture


def test_a_fresh_model_has_ordinary_weights() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    config = XverseConfig(**sizes, num_experts=64, moe_top_k=6, num_shared_experts=2)
    model = XverseForCausalLM(config)
    assert sum(isinstance(module, XverseMLP) for module in model.modules()) == 65
    assert 0.015 < model.model.layers[0].mlp.router.weight.std() < 0.025


@pytest.mark.parametrize(
    "bad",
    [
        {"attention_bias": True},
        {"pretraining_tp": 2},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"tie_word_embeddings": "false"},
        {"head_dim": 32},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_what_is_not_implemented_is_refused(bad) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        XverseConfig(**bad)
    assert XverseConfig(attention_bias=False, pretraining_tp=1, hidden_act="silu", rope_scaling=None, head_dim=80)


def test_rope_parameters_of_transformers_5_are_read() -> None:
    assert XverseConfig(rope_parameters={"rope_type": "default", "rope_theta": 1234.0}).rope_theta == 1234.0
    assert XverseConfig().rope_theta == 10000.0


REGISTRATION = """
import sys
{first}
{second}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("xverse", hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                              vocab_size=99, num_experts=3, moe_top_k=2)
print(type(AutoModelForCausalLM.from_config(config)).__name__, type(AutoModel.from_config(config)).__name__)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import xent_quant; assert 'transformers' not in sys.modules", ""),
        pytest.param("from transformers import AutoModelForCausalLM", "import xent_quant", marks=pytest.mark.slow),
        pytest.param("import xent_quant", "import transformers.modeling_layers", marks=pytest.mark.slow),
        pytest.param("import transformers", "import xent_quant", marks=pytest.mark.slow),
    ],
    ids=["before", "after", "deep inside", "between"],
)
def test_importing_the_package_registers_it(first, second) -> None:
    script = REGISTRATION.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["XverseForCausalLM", "XverseModel"], done.stderr


def test_a_checkpoint_with_remote_code_of_its_own_is_loaded_by_ours(checkpoint) -> None:
    auto_map = {"AutoConfig": "configuration_xverse.XverseConfig", "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM"}
    assert type(load(checkpoint(auto_map=auto_map, hidden_size=64))) is XverseForCausalLM


def test_the_registered_configuration_survives_pickling(checkpoint) -> None:
    import pickle

    config = AutoConfig.from_pretrained(checkpoint())
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
