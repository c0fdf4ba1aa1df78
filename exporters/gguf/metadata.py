"""Every key of a GGUF file besides its tokenizer and tensors (docs/gguf.md of ggml, llama-arch.cpp of llama.cpp)."""

import gguf

from exporters.gguf.plan import GGUFPlan


def write(writer: gguf.GGUFWriter, plan: GGUFPlan, name: str, licence: str | None) -> None:
    """Add general, architecture and hyperparameter keys. `writer` was made for `plan.arch`."""
    model = plan.architecture
    writer.add_type("model")
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    writer.add_file_type(plan.recipe.mix.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(plan.expert_width)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    if model.num_experts:
        writer.add_expert_count(model.num_experts)
        writer.add_expert_used_count(model.experts_per_token)
    if plan.arch == "bailingmoe":
        writer.add_leading_dense_block_count(0)
        writer.add_expert_feed_forward_length(plan.expert_width)
        writer.add_expert_shared_count(model.num_shared_experts)
        writer.add_expert_weights_scale(1.0)
        writer.add_expert_weights_norm(model.norm_topk_prob)
    if plan.arch == "granitemoe":
        writer.add_logit_scale(1.0)
