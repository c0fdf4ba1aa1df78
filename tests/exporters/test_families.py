"""Every family's exports are the function that its own code computes, and no code but its adapter knows its name."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import xent_quant
from exporters.gguf.plan import plan
from tests import families
from tests.exporters.test_gguf_exact import IDS
from xent_quant.checkpoint.families import FAMILIES
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import UnsupportedError
from xent_quant.model.streaming import StreamingModel
from xent_quant.recipes import recipe
from xent_quant.validation.bnb_source import BnbSource
from xent_quant.validation.llama_cpp import LlamaCpp

pytestmark = pytest.mark.usefixtures("one_thread")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in families.FAMILIES},
    "experts of a layer in one tensor": ("olmoe", {"fused": True}),
    "tied heads": ("olmoe", {"tie_word_embeddings": True}),
    "heads of another size": ("llama", {"head_dim": 48, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_stock_runtimes_compute_the_family(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    from xent_quant.validation.onnx_runtime import OnnxModel

    folder = families.write(tmp_path / "model", family, **changes)
    wanted = families.logits(folder, IDS)
    options = {"bits": 16, "onnx_dtype": "fp32", "output": tmp_path / "out", "formats": ["gguf", "onnx"]}
    done = xent_quant.quantize(folder, type="F32", **options)
    with LlamaCpp(done.files[0]) as llama:
        assert np.abs(llama.logits(IDS) - wanted).max() < 1e-3
    onnx = tmp_path / "out" / "onnx"
    assert np.abs(OnnxModel(onnx, threads=1).logits(IDS) - wanted).max() < 1e-3
    assert json.loads((onnx / "config.json").read_text())["source_model_type"] == family


@pytest.mark.parametrize("family", families.FAMILIES)
def test_names_are_those_of_the_architecture(family: str) -> None:
    model = families.architecture(family)
    arch = plan(model, recipe(type="F32")).arch
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[number]}
    for tensor in model.tensors().values():
        base = llama_name(tensor).removesuffix(".weight")
        assert base.replace(f"blk.{tensor.layer}.", "blk.{bid}.") in known, tensor.name


def test_a_tied_embedding_that_is_the_only_one_has_the_heads_type() -> None:
    """As llama-quantize has it."""
    tensors = {t.name: t.type for t in plan(families.architecture("llama"), recipe(type="Q4_K_M")).tensors}
    assert tensors["token_embd.weight"] == "Q6_K"
    assert "output.weight" not in tensors
    copied = {t.name: t.type for t in plan(families.architecture("olmoe", tie_word_embeddings=True), recipe()).tensors}
    assert (copied["token_embd.weight"], copied["output.weight"]) == ("Q4_K", "Q6_K")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_moe": ("gguf", {"norm_topk_prob": False}, "norm_topk_prob is false: llama.cpp's qwen3moe"),
    "olmoe": ("gguf", {"norm_topk_prob": True}, "norm_topk_prob is true"),
    "olmoe, keys fewer than queries": ("gguf", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
    "bailing_moe": ("gguf", {"num_shared_experts": 0}, "num_shared_experts is 0"),
    "qwen3_moe, bnb": ("bnb", {}, "Qwen3-MoE: transformers keeps the experts of a layer in one parameter"),
    "olmoe, bnb": ("bnb", {}, "OLMoE: transformers keeps the experts"),
    "bailing_moe, bnb": ("bnb", {}, "Ling: its own modelling code"),
}


@pytest.mark.parametrize(("case", "refused"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_expressed_is_refused_at_planning(case: str, refused: tuple[str, dict[str, Any], str]) -> None:
    from exporters.bitsandbytes.plan import plan as plan_bnb

    kind, changes, words = refused
    model = families.architecture(case.split(",")[0], **changes)
    with pytest.raises(UnsupportedError, match=words):
        plan(model, recipe()) if kind == "gguf" else plan_bnb(model)


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("qwen3_moe", 16)])
def test_transformers_loads_what_bitsandbytes_can_hold(tmp_path: Path, family: str, bits: int) -> None:
    from transformers import AutoModelForCausalLM

    folder = families.write(tmp_path / "model", family)
    xent_quant.quantize(folder, formats=["bnb"], bits=bits, output=tmp_path / "out")
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "bnb", dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    got = model(torch.tensor([IDS])).logits[0].detach().float()
    out, architecture = tmp_path / "out" / "bnb", Checkpoint.open(folder).architecture
    exact = StreamingModel(BnbSource(out, architecture) if bits == 4 else Checkpoint.open(out))
    wanted = exact.logits(exact.hidden_states(torch.tensor([IDS])))[0]
    assert (got - wanted).norm() < 0.03 * wanted.norm()  # bfloat16's


def test_no_other_code_names_a_family() -> None:
    """llama is left out, the runtime's name, and the table of llama.cpp's pre-tokenizers, which has one called like a family."""
    names = {word for family in FAMILIES.values() for word in (family.model_type, family.model_class, family.title)}
    names |= {"bailingmoe", "granitemoe", "qwen3moe"}
    words = "|".join(re.escape(name) for name in names if "llama" not in name.lower())
    pattern = re.compile(rf"\b({words})\b|checkpoint\.families\.(?!interface)", re.IGNORECASE)
    root = Path(xent_quant.__file__).parent
    paths = [path for package in ("exporters", "calibration") for path in (root.parent / package).rglob("*.py")]
    paths += [path for package in ("walk", "methods", "formats", "validation") for path in (root / package).rglob("*.py")]
    paths += [root / "model" / f"{name}.py" for name in ("stages", "layers", "states", "sizes", "streams", "streaming")]
    paths += [root / f"{name}.py" for name in ("recipes", "pipeline", "targets", "inspection", "tensors", "options", "journal")]
    found = {path.name: pattern.findall(path.read_text()) for path in paths if path.name != "pretokenizers.py"}
    assert len(found) > 80
    assert {name: words for name, words in found.items() if words} == {}
