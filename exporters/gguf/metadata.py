"""Every key of a GGUF file besides its tokenizer and tensors (docs/gguf.md of ggml, llama-arch.cpp of llama.cpp)."""

from collections.abc import Callable
from math import log

import gguf

from exporters import card
from exporters.base_model import BaseModel
from exporters.gguf.card import TAGS
from exporters.gguf.plan import GGUFPlan
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.dropping import GGUF_KEYS, KeptExperts
from xent_quant.units import short_count


def size_label(model: Architecture) -> str:
    """Parameters, and of a mixture those active in a token: `26B-A4.2B`."""
    total, active = parameters(model)
    return short_count(total) if total == active else f"{short_count(total)}-A{short_count(active)}"


def parameters(model: Architecture) -> tuple[int, int]:
    """(all, active in one token) of the checkpoint's tensors."""
    total = sum(tensor.n_weights for tensor in model.tensors().values())
    idle = max(model.num_experts - model.experts_per_token, 0)
    return total, total - model.num_layers * idle * 3 * model.hidden_size * model.intermediate_size


def write(writer: gguf.GGUFWriter, plan: GGUFPlan, name: str, base: BaseModel, kept: KeptExperts | None = None) -> None:
    """Add general, architecture and hyperparameter keys, and which experts are there where some are not. `writer` was made for
    `plan.arch`."""
    model = plan.architecture
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label(model))
    writer.add_file_type(plan.recipe.mix.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if base.licence:
        writer.add_license(base.licence)
    if base.licence_name:
        writer.add_license_name(base.licence_name)
    if base.licence_link:
        writer.add_license_link(base.licence_link)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.name)
    if base.repository:
        writer.add_base_model_organization(0, base.repository.split("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base.repository}")
    if base.languages:
        writer.add_languages(list(base.languages))
    writer.add_tags([*TAGS, *card.tags(model)])

    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(plan.llama.feed_forward_length)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    if model.rope_scaling:
        scaling = model.rope_scaling
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
            # llama.cpp multiplies this onto the 0.1 · ln(factor) + 1 that it takes for itself.
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / (0.1 * log(scaling.factor) + 1.0))
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    if model.num_experts:
        writer.add_expert_count(model.num_experts)
        writer.add_expert_used_count(model.experts_per_token)
    if kept:
        numbers, of, text = GGUF_KEYS.values()
        writer.add_array(numbers, [number for layer in kept.numbers for number in layer])  # int32
        writer.add_uint32(of, kept.of)
        writer.add_string(text, kept.text)
    for key, value in plan.llama.keys.items():
        add: dict[type, Callable[..., None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](f"{plan.arch}.{key}", value)
