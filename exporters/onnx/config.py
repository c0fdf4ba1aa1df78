"""The configuration files beside an exported graph: genai_config.json, config.json, generation defaults, tokenizer."""

from typing import Any

from exporters.hub_files import generation_config, json_bytes, tokenizer_files
from exporters.onnx.plan import ONNXPlan
from xent_quant.checkpoint.reader import Checkpoint

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
OPTIMUM_TYPE = "mixtral"
"""The model_type of config.json. optimum opens only types that it knows, and takes nothing from it but the number and size
of layers and heads, and the way inputs are prepared; Mixtral is the nearest. The checkpoint's own type is kept beside it."""


def files(checkpoint: Checkpoint, plan: ONNXPlan) -> dict[str, bytes]:
    """File name to content. Raises CheckpointError where tokenizer.json is missing or a file is not JSON."""
    generation = generation_config(checkpoint)
    return {
        **tokenizer_files(checkpoint),
        "config.json": json_bytes(_config(checkpoint)),
        "generation_config.json": json_bytes(generation),
        "genai_config.json": json_bytes(_genai(plan, generation)),
    }


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    model = checkpoint.architecture
    return {
        **model.carried(checkpoint.config),
        "model_type": OPTIMUM_TYPE,
        "architectures": [model.family.model_class],
        "source_model_type": model.model_type,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
        **(checkpoint.kept.to_config() if checkpoint.kept else {}),
    }


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
