"""Folders for transformers: bytes are bitsandbytes' own, every expert is a bitsandbytes layer, and they run on the CPU."""

import json
import logging
import subprocess
import sys
import venv
from collections import Counter
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import xent_quant
from exporters.bitsandbytes.kinds import FourBit, Int8
from exporters.bitsandbytes.plan import plan
from tests.conftest import TINY, Command
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import CheckpointError, ConfigError, ExportError, QuantizationError, UnsupportedError
from xent_quant.methods.gptq import GPTQ
from xent_quant.model.modeling_xverse import XverseConfig, XverseForCausalLM
from xent_quant.model.streaming import StreamingModel
from xent_quant.plain import markdown
from xent_quant.tensors import InputStatistics

IDS = torch.tensor([[2, 17, 300, 5, 9, 42, 260, 261, 11, 7, 290, 33]])
KINDS = {"nf4": {"bits": 4}, "fp4": {"bits": 4, "bnb_type": "fp4"}, "int8": {"bits": 8}}
SMALL = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.ERROR)


def export(folder: Path, output: Path, **options) -> Path:
    xent_quant.quantize(folder, formats=["bnb"], output=output, **options)
    return output / "bnb"


def load(folder: Path, **options) -> XverseForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def load_source(folder: Path) -> XverseForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def bnb_layer(weight: torch.Tensor, kind: str) -> torch.nn.Linear:
    """bitsandbytes' layer made from a weight in the way its documentation says."""
    shape = (weight.shape[1], weight.shape[0])
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*shape, bias=False, quant_type=kind, compress_statistics=True)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=True, module=layer)
    return layer.to("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [{"num_key_value_heads": 2}, {"num_experts": 0}], ids=["experts", "dense"])
def test_bytes_are_bitsandbytes_own(checkpoint, tmp_path: Path, kind, overrides) -> None:
    folder = checkpoint(**{**SMALL, **overrides})
    source, written = (
        load_file(folder / "model.safetensors"),
        load_file(export(folder, tmp_path, **KINDS[kind]) / "model.safetensors"),
    )
    wanted: dict[str, torch.Tensor] = {}
    for name, weight in source.items():
        if weight.ndim == 1 or "router" in name:
            wanted[name] = weight
        elif "embed_tokens" in name or "lm_head" in name:
            wanted[name] = weight.to(torch.bfloat16)
        else:
            layer = bnb_layer(weight.to(torch.bfloat16) if kind != "int8" else weight, kind)
            wanted |= {name.removesuffix("weight") + key: value for key, value in layer.state_dict().items()}
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("kind", [FourBit("nf4"), Int8()], ids=["nf4", "int8"])
def test_bytes_do_not_depend_on_the_number_of_threads(kind) -> None:
    weights = np.random.default_rng(0).standard_normal((2560, 2560), np.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([data.tobytes() for data in kind.encode("weight", weights)])
            assert torch.get_num_threads() == count
        torch.set_num_threads(1)
        layer = bnb_layer(
            torch.from_numpy(weights).to(torch.bfloat16 if kind.name == "NF4" else torch.float16), kind.name.lower()
        )
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]
    state = layer.state_dict()
    assert results[0] == [state[part.name].numpy().tobytes() for part in kind.parts("weight", weights.shape)]


ENCODINGS = [FourBit("nf4"), FourBit("fp4"), Int8()]


@pytest.mark.parametrize("kind", ENCODINGS, ids=KINDS)
def test_gptq_chooses_codes_within_bitsandbytes_scales(kind) -> None:
    """Inputs whose columns hang together: half of the error on unseen ones and less, nothing but the codes being other."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((256, 256)) * np.geomspace(1, 0.02, 256)[:, None]
    inputs = (random.standard_normal((3000, 256)) @ mixing).astype(np.float32)
    weights = (random.standard_normal((32, 256)) * 0.02).astype(np.float32)
    seen, held_out, fresh = np.split(inputs, [1500, 2000])
    known = InputStatistics(np.square(seen).mean(0), seen.T @ seen / len(seen), len(seen), held_out)
    plain, chosen = kind.quantize(weights), GPTQ().quantize(weights, kind, known, name="w")
    parts = kind.parts("weight", weights.shape)
    different = [part.name for part, *each in zip(parts, kind.split(plain, parts), kind.split(chosen, parts), strict=True)
                 if not np.array_equal(*each)]  # fmt: skip
    assert different == ["weight"]
    errors = [float(np.square(fresh @ (weights - kind.read(each, weights.shape)).T).sum()) for each in (plain, chosen)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("shape", [(32, 256), (33, 36)], ids=["blocks", "part of a block"])
@pytest.mark.parametrize("kind", ENCODINGS, ids=KINDS)
def test_read_as_bitsandbytes_does(kind, shape) -> None:
    weights = (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(np.float32)
    layer = bnb_layer(torch.from_numpy(weights).to(torch.float16 if kind.name == "INT8" else torch.bfloat16), kind.name.lower())
    if kind.name == "INT8":
        state = layer.state_dict()
        wanted = state["weight"].float() * state["SCB"][:, None] / 127
    else:
        wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    got = kind.read(kind.quantize(weights), weights.shape)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=2**-8, atol=1e-7)


def test_rows_of_broken_blocks_have_no_scales_of_their_own() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 96), np.float32)
    known = InputStatistics(np.ones(96, np.float32), np.eye(96, dtype=np.float32), 999, weights)
    kind = FourBit("nf4")
    assert kind.scaled(weights, name="w") is None
    assert np.array_equal(GPTQ().quantize(weights, kind, known, name="w"), kind.quantize(weights))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_calibrated_folders_load_and_lose_less(checkpoint, tmp_path: Path, kind) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The king in the night, the thing in the thin inn, the ink in the pen. " * 60)
    source = checkpoint(**{**SMALL, "num_experts": 2, "moe_top_k": 2})
    options = {"calib": [str(text)], "tokens": 1200, "seqlen": 40, "threads": 1}
    plain = export(source, tmp_path / "plain", **KINDS[kind])
    chosen = export(source, tmp_path / "chosen", **KINDS[kind], method="gptq", **options)
    ids = torch.tensor([load_tokenizer(source).encode("the thin king in the ink, the night in the inn").ids])
    with torch.no_grad():
        exact = load_source(source)(ids).logits
        losses = [float((dequantised(load(folder))(ids).logits - exact).square().mean()) for folder in (plain, chosen)]
    assert losses[1] < 0.7 * losses[0]
    card = (chosen / "README.md").read_text()
    assert "codes were chosen within them by GPTQ" in card
    assert card.endswith(f"Calibrated on {markdown(text)}.\n")
    assert "GPTQ" not in (plain / "README.md").read_text()
    assert {file.name for file in chosen.iterdir()} == {file.name for file in plain.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_a_bitsandbytes_layer_and_saving_keeps_every_bit(checkpoint, tmp_path: Path, kind) -> None:
    folder = export(checkpoint(num_key_value_heads=2, **SMALL), tmp_path, **KINDS[kind])
    model = load(folder)
    layer_type = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    kinds = Counter(type(module) for module in model.modules())
    assert kinds[layer_type] == 4 + 3 * (TINY["num_experts"] + 1)
    assert kinds[torch.nn.Linear] == 1  # the head
    experts = [module for name, module in model.named_modules() if ".experts." in name and name.endswith("_proj")]
    assert len(experts) == 3 * TINY["num_experts"]
    assert all(type(module) is layer_type for module in experts)
    assert kind != "int8" or all(module.state.threshold == 6.0 for module in experts)  # LLM.int8()'s
    assert model.model.layers[0].mlp.router.weight.dtype == torch.float32

    loaded, written = model.state_dict(), load_file(folder / "model.safetensors")
    assert loaded.keys() == written.keys()
    for name, tensor in written.items():
        wanted = tensor.to(loaded[name].dtype) if name.endswith("norm.weight") else tensor
        assert torch.equal(loaded[name], wanted), name
    model.save_pretrained(tmp_path / "again", save_original_format=False)  # True is not written for bitsandbytes in 5.23
    again = load(tmp_path / "again").state_dict()
    assert again.keys() == loaded.keys()
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)


def dequantised(model: XverseForCausalLM) -> XverseForCausalLM:
    """The same model in float32 with ordinary layers. To be called before the model runs."""
    config = XverseConfig(**{key: value for key, value in model.config.to_dict().items() if key != "quantization_config"})
    plain = XverseForCausalLM(config).eval()
    weights = {}
    for name, tensor in plain.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, bnb.nn.Linear4bit):
            weights[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).view_as(tensor)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weights[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            weights[name] = module.weight
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_the_cpu_as_its_weights_say(checkpoint, tmp_path: Path, kind) -> None:
    # Every expert is chosen, so that rounding cannot change which; experts of this width need padding for 4 bits.
    source = checkpoint(**{**SMALL, "intermediate_size": 96, "num_experts": 3, "moe_top_k": 3})
    folder = export(source, tmp_path, **KINDS[kind])
    model = load(folder)
    plain = dequantised(model)
    with torch.no_grad():
        wanted, got = plain(IDS).logits, model(IDS).logits.float()
        exact = load_source(source)(IDS).logits
    # Activations are rounded: to bfloat16, for INT8 to 8 bits; scales too, by the CPU kernel for 4 bits.
    assert (got - wanted).norm() / wanted.norm() < 0.05
    assert (wanted - exact).norm() / exact.norm() > 0.01  # these are not the source's weights
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 1}
    first, second = model.generate(IDS, **options), load(folder).generate(IDS, **options)
    assert first.shape == (1, 20)
    assert torch.equal(first, second)


def test_padded_experts_hold_zeros_only(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(hidden_size=128, intermediate_size=96, num_hidden_layers=1)
    folder = export(source, tmp_path)
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 128
    mlp = load(folder).model.layers[0].mlp
    for module, width in ((mlp.experts[3], 96), (mlp.shared_experts, 192)):
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = getattr(module, name).weight
            values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            pad = values[:, width:] if name == "down_proj" else values[width:]
            assert pad.numel()
            assert not pad.any()
    unpadded = export(source, tmp_path / "never", pad="never")
    assert json.loads((unpadded / "config.json").read_text())["intermediate_size"] == 96


def test_sixteen_bits_are_a_checkpoint_again(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tie_word_embeddings=True, **SMALL)
    folder = export(source, tmp_path, bits=16)
    again = Checkpoint.open(folder)
    for name in again.infos:
        exact = "norm" in name or "router" in name
        values = torch.from_numpy(Checkpoint.open(source).read(name))
        assert torch.equal(torch.from_numpy(again.read(name)), values if exact else values.to(torch.bfloat16).float())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    streaming = StreamingModel(again)
    streamed = streaming.logits(streaming.hidden_states(IDS))
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
    assert (got - streamed).abs().max() / streamed.abs().max() < 1e-5


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_slices_and_shards_change_no_tensor(checkpoint, tmp_path: Path, monkeypatch, bits) -> None:
    source = checkpoint(**SMALL)
    whole = load_file(export(source, tmp_path / "whole", bits=bits) / "model.safetensors")
    monkeypatch.setattr(Checkpoint, "SLICE", 1000)
    folder = export(source, tmp_path / "cut", bits=bits, split_size=50_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    cut: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            cut |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            assert all(index["weight_map"][name] == file for name in opened.keys())  # noqa: SIM118
    assert cut.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert load(folder).state_dict().keys() == whole.keys()


def test_tensors_lie_at_multiples_of_their_item_size(checkpoint, tmp_path: Path) -> None:
    file = export(checkpoint(**SMALL), tmp_path) / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert all((8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0 for entry in entries)
    assert 8 + length + max(entry["data_offsets"][1] for entry in entries) == len(raw)


def test_plan_matches_the_files(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(**SMALL)
    for options in (*KINDS.values(), {"bits": 16}):
        (summary,) = xent_quant.plan(source, formats=["bnb"], **options)
        written = load_file(export(source, tmp_path, force=True, **options) / "model.safetensors")
        size = sum(tensor.nbytes for tensor in written.values())
        assert 0 <= summary.nbytes - size <= 100 * len(summary.tensors)
        assert summary.vram_bytes > size
        types = {row.type for row in summary.by_type()}
        assert types == {"BF16", "F32", *({plan(Architecture.from_config(TINY), **options).type} - {"BF16"})}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_inspect_describes_the_folder(checkpoint, tmp_path: Path, options) -> None:
    source = checkpoint(**SMALL)
    folder = export(source, tmp_path, **options)
    facts = xent_quant.describe(folder)
    stored = load_file(folder / "model.safetensors")
    assert facts["kind"] == "bitsandbytes"
    (summary,) = xent_quant.plan(source, formats=["bnb"], **options)
    for found, planned in zip(facts["tensors"], summary.tensors, strict=True):
        assert (found["name"], found["type"], found["shape"]) == (planned.name, planned.type, [*planned.shape])
        layer = planned.name.removesuffix("weight")
        parts = [
            part
            for name, part in stored.items()
            if name.startswith(planned.name) or name in (f"{layer}SCB", f"{layer}weight_format")
        ]
        assert found["bytes"] == sum(part.nbytes for part in parts)
        assert found["bits_per_weight"] == 8 * found["bytes"] / planned.n_weights
    assert facts["parameters"] == summary.n_weights
    assert sum(row["nbytes"] for row in facts["types"]) == sum(part.nbytes for part in stored.values())


def test_real_shapes_need_no_padding_and_take_half_a_byte() -> None:
    model = Architecture.from_config(
        {**TINY, "hidden_size": 2560, "intermediate_size": 1728, "num_experts": 64, "moe_top_k": 6, "num_attention_heads": 32}
    )
    planned = plan(model)
    assert planned.width == 1728
    assert not planned.notes
    (expert,) = [tensor for tensor in planned.tensors if tensor.name == "model.layers.0.mlp.experts.0.up_proj.weight"]
    assert 4.12 < 8 * expert.nbytes / (1728 * 2560) < 4.14


def test_tokenizer_is_the_checkpoints_in_todays_form(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(**SMALL)
    value = json.loads((source / "tokenizer.json").read_text())
    for part in (value["pre_tokenizer"]["pretokenizers"][0], value["decoder"]["decoders"][0]):
        del part["prepend_scheme"]
        part["add_prefix_space"] = False
    (source / "tokenizer.json").write_text(json.dumps(value))
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_xverse.X", None]}}))
    folder = export(source, tmp_path, bits=16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "the thing in 你好, the night."
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, 1)
    (source / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        export(source, tmp_path / "none", bits=16)


def test_what_cannot_be_done_is_refused(checkpoint, tmp_path: Path, monkeypatch) -> None:
    source = checkpoint(**SMALL)
    with pytest.raises(ConfigError, match="--bits 6"):
        export(source, tmp_path, bits=6)
    with pytest.raises(ConfigError, match="--bnb-type int4"):
        export(source, tmp_path, bnb_type="int4")
    quantised = export(source, tmp_path / "quantised")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional")
    with pytest.raises(ConfigError, match=r"pip install 'xent-quant\[bnb\]'"):
        export(source, tmp_path)
    with pytest.raises(UnsupportedError, match="quantised already \\(bitsandbytes\\)"):
        Checkpoint.open(quantised)
    export(source, tmp_path, bits=16)  # needs no bitsandbytes
    with pytest.raises(ExportError, match="--force"):
        export(source, tmp_path, bits=16)


def test_failure_half_way_leaves_what_was_there(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(**SMALL)
    folder = export(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.experts.4.up_proj.weight"][3, 7] = 1e6  # beyond float16, in which INT8 is quantised
    from safetensors.torch import save_file

    save_file(weights, source / "model.safetensors")
    for output in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(QuantizationError, match=r"experts\.4\.up_proj"):
            export(source, output, bits=8, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bnb"]
    assert not list((tmp_path / "new").iterdir())


def test_the_command_writes_a_folder_that_transformers_loads(checkpoint, command: Command, tmp_path: Path) -> None:
    done = command(checkpoint(**SMALL), "--format", "bnb", "--output", tmp_path, "--bnb-type", "fp4", "--json")
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()
    facts = json.loads(done.stdout)
    assert Path(facts["files"][0]) == tmp_path / "bnb" / "config.json"
    assert all(Path(file).is_file() for file in facts["files"])
    assert load(tmp_path / "bnb").config.quantization_config.bnb_4bit_quant_type == "fp4"
    assert "auto_map" in json.loads((tmp_path / "bnb" / "config.json").read_text())


ALONE = """
import importlib.util, json, sys
assert importlib.util.find_spec("xent_quant") is None
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the thing in the night").input_ids])
with torch.no_grad():
    logits = model(ids).logits
layers = sum(type(module).__module__.startswith("bitsandbytes") for module in model.modules())
text = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=1)
torch.save({"version": transformers.__version__, "ids": ids, "logits": logits, "layers": layers, "text": text}, output)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("transformers", ["transformers>=5,<6", "transformers==4.57.6"])
def test_loads_without_this_package_in_a_fresh_environment(checkpoint, tmp_path: Path, monkeypatch, transformers) -> None:
    """Downloads torch and the rest into an environment of its own."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    torch_version = torch.__version__.partition("+")[0]
    for packages in ([f"torch=={torch_version}"], [transformers, "accelerate", f"bitsandbytes=={bnb.__version__}"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    source = checkpoint(**SMALL)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for kind, options in {**KINDS, "bf16": {"bits": 16}}.items():
        folder = export(source, tmp_path / kind, **options)
        done = subprocess.run([python, "-c", ALONE, folder, tmp_path / "seen.pt"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        seen = torch.load(tmp_path / "seen.pt")
        assert seen["version"][0] == transformers.partition("=")[2].lstrip("=")[0]
        model = load(folder)
        with torch.no_grad():
            assert torch.equal(model(seen["ids"]).logits, seen["logits"]), kind
        assert seen["layers"] == (0 if kind == "bf16" else 4 + 3 * (TINY["num_experts"] + 1))
        assert np.array_equal(
            model.generate(seen["ids"], do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=1), seen["text"]
        )
