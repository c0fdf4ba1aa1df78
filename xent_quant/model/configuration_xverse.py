"""config.json of model_type `xverse` for transformers 4.57 and 5.

Self-contained: exported folders carry a copy, which `trust_remote_code=True` loads where xent-quant is not installed.
"""

from typing import Any

from transformers.configuration_utils import PretrainedConfig


class XverseConfig(PretrainedConfig):
    """An XVERSE model, mixture of experts or (num_experts None or 0) dense; defaults are XVERSE-Ent-A4.2B's.

    `intermediate_size` is the width of ONE expert; the shared MLP is num_shared_experts times as wide. Raises
    ValueError for what would change the function computed and is not implemented (attention bias, rope scaling,
    tensor-parallel slices, other activations), rather than ignoring it.
    """

    model_type = "xverse"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (transformers' own convention)

    def __init__(
        self,
        vocab_size: int = 100534,
        hidden_size: int = 2560,
        intermediate_size: int = 1728,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        num_experts: int | None = 64,
        moe_top_k: int | None = 6,
        num_shared_experts: int | None = 2,
        norm_topk_prob: bool = True,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        output_router_logits: bool = False,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 2,
        eos_token_id: int | None = 3,
        tie_word_embeddings: bool = False,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        rope = rope_parameters or rope_scaling or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope_scaling of type {kind!r} is not supported; remove it to use the native context")
        for key, neutral in (("attention_bias", (False, None)), ("pretraining_tp", (1, None)), ("hidden_act", ("silu",))):
            if kwargs.get(key, neutral[0]) not in neutral:
                raise ValueError(f"{key} {kwargs[key]!r} is not supported; the released models have {neutral[0]!r}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = kwargs.pop("head_dim", None) or hidden_size // num_attention_heads
        if self.head_dim * num_attention_heads != hidden_size:
            raise ValueError(f"head_dim {self.head_dim} times {num_attention_heads} heads is not hidden_size {hidden_size}")
        self.num_experts = num_experts or 0
        self.moe_top_k = moe_top_k
        self.num_shared_experts = num_shared_experts or 0
        self.norm_topk_prob = norm_topk_prob
        self.rope_theta = rope.get("rope_theta", rope_theta)
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )


__all__ = ["XverseConfig"]
