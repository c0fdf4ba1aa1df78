"""Models of other families that know some language: four bits by the command's defaults, judged in stock llama.cpp."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import OWN
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.cli.main import main

STEPS, BATCH, LENGTH = 200, 16, 64
SIZES = {"vocab_size": 4096, "num_hidden_layers": 2, "max_position_embeddings": 1024, "bos_token_id": 2, "eos_token_id": 3}
TEXTS = Path(str(miniature())).parent / "calibration"


def trained(folder: Path, family: str) -> Path:
    """transformers' own model of the family, with the miniature's tokenizer, after some steps on the bundled text."""
    import transformers

    tokenizer = load_tokenizer(miniature())
    text = "\n".join(file.read_text("utf-8") for file in sorted(TEXTS.glob("X*.txt")))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**OWN[family], **SIZES})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    decline = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, STEPS)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decline.step()
    assert loss.item() < 0.8 * np.log(SIZES["vocab_size"])  # it has learnt something
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=True)
    return folder


def ling(folder: Path) -> Path:
    """The miniature by Ling's names: the same function."""
    source = miniature()
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    weights = {}
    stored = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    for layer in range(config["num_hidden_layers"]):
        parts = [stored.pop(f"model.layers.{layer}.self_attn.{which}_proj.weight") for which in "qkv"]
        weights[f"model.layers.{layer}.attention.query_key_value.weight"] = torch.cat(parts)
    for name, value in stored.items():
        for ours, theirs in (
            ("embed_tokens", "word_embeddings"),
            ("self_attn.o_proj", "attention.dense"),
            ("mlp.router.weight", "mlp.gate.weight"),
        ):
            name = name.replace(ours, theirs)
        weights[name] = value
    config |= {
        "model_type": "bailing_moe",
        "architectures": ["BailingMoeForCausalLM"],
        "num_experts_per_tok": config.pop("moe_top_k"),
        "moe_intermediate_size": config["intermediate_size"],
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "norm_topk_prob": True,
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", [*OWN, "bailing_moe"])
def test_four_bits_stay_within_tolerance_in_llama_cpp(tmp_path: Path, family: str) -> None:
    folder = ling(tmp_path / "model") if family == "bailing_moe" else trained(tmp_path / "model", family)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(miniature() / name, folder / name)
    arguments = ["--bits", "4", "--format", "gguf", "--output", str(tmp_path / "out"), "--tokens", "32k", "--validate"]
    with pytest.raises(SystemExit) as ended:
        main([str(folder), *arguments])
    assert ended.value.code == 0
    (report,) = (tmp_path / "out").rglob("report.json")
    assert json.loads(report.read_text())["verdict"] == "within"
