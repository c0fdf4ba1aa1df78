"""The configuration files beside an exported graph: genai_config.json, config.json, generation defaults, tokenizer."""

import json
from typing import Any

from exporters.onnx.plan import ONNXPlan
from xent_quant.checkpoint.headers import read_json
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError

REPETITION_PENALTY = 1.1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
OPTIMUM_TYPE = "mixtral"
"""The model_type of config.json. optimum opens only types that it knows, and takes nothing from it but the number and size
of layers and heads, and the way inputs are prepared; Mixtral is the nearest. The checkpoint's own type is kept beside it."""


def files(checkpoint: Checkpoint, plan: ONNXPlan) -> dict[str, bytes]:
    """File name to content. Raises CheckpointError where tokenizer.json is missing or a file is not JSON."""
    folder = checkpoint.path
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder / 'tokenizer.json'}: missing; download the model's tokenizer too")
    read_json(folder / "tokenizer.json")
    found = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    generation = _generation(checkpoint)
    return {
        **found,
        "config.json": _json(_config(checkpoint)),
        "generation_config.json": _json(generation),
        "genai_config.json": _json(_genai(plan, generation)),
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    model, config = checkpoint.architecture, dict(checkpoint.config)
    config.pop("auto_map", None)  # names code that is not in this folder
    return {
        **config,
        "model_type": OPTIMUM_TYPE,
        "architectures": ["XverseForCausalLM"],
        "source_model_type": config["model_type"],
        "num_key_value_heads": model.num_kv_heads,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
    }


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's defaults, and the repetition penalty that the model's authors generate with."""
    path, model = checkpoint.path / "generation_config.json", checkpoint.architecture
    tokens = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    known = {key: value for key, value in tokens.items() if value is not None}
    given = read_json(path) if path.is_file() else {}
    return {**known, "repetition_penalty": REPETITION_PENALTY, **given}


def _genai(plan: ONNXPlan, generation: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai reads; it refuses keys that it does not know."""
    model = plan.architecture
    tokens = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation}
    return {
        "model": {
            "type": "decoder",
            **tokens,
            "vocab_size": model.vocab_size,
            "context_length": model.max_position_embeddings,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": model.head_dim,
                "hidden_size": model.hidden_size,
                "num_attention_heads": model.num_heads,
                "num_key_value_heads": model.num_kv_heads,
                "num_hidden_layers": model.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": model.max_position_embeddings,
            "past_present_share_buffer": True,
            **{key: generation[key] for key in SAMPLING if generation.get(key) is not None},
        },
    }
