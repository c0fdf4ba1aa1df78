"""config.json of model_type `xverse` for transformers 4.57 and 5.

Self-contained: exported folders carry a copy, which `trust_remote_code=True` loads where xent-quant is not installed.
"""

import math
from typing import Any

from transformers.configuration_utils import PretrainedConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn")
NEUTRAL = {
    "attention_bias": (False,),
    "pretraining_tp": (1,),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1,),
}
"""Keys that would change the function computed, and the values of the released models."""


def rope_settings(
    rope_parameters: dict[str, Any] | None,
    rope_scaling: dict[str, Any] | None,
    rope_theta: float,
    max_position_embeddings: int,
    original: int | None,
) -> dict[str, Any]:
    """rope_parameters of transformers 5 with every value that the type needs written out, from either spelling.

    Raises ValueError for a type that is not implemented.
    """
    parts = [part for part in (rope_parameters, rope_scaling) if part]
    kinds = {part.get("rope_type", part.get("type", "default")) for part in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"rope_parameters and rope_scaling name different types ({', '.join(sorted(map(str, kinds)))}); keep one"
        )
    kind = kinds.pop() if kinds else "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_scaling of type {kind!r} is not supported; remove it to use the native context")
    given = {key: value for part in parts for key, value in part.items() if value is not None}
    if given.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor {given['partial_rotary_factor']!r} is not supported; heads are rotated whole")
    told: dict[str, Any] = {"rope_type": kind, "rope_theta": float(given.get("rope_theta", rope_theta))}
    if kind in ("linear", "dynamic"):
        if "factor" not in given:
            raise ValueError(f"rope_scaling of type {kind!r} has no factor")
        return {**told, "factor": float(given["factor"])}
    if kind == "yarn":
        original = original or given.get("original_max_position_embeddings", max_position_embeddings)
        factor = float(given.get("factor", max_position_embeddings / original))
        top, bottom = given.get("mscale") or 0.0, given.get("mscale_all_dim") or 0.0
        if not top or not bottom:
            top, bottom = 1.0, 0.0
        attention = (0.1 * top * math.log(factor) + 1.0) / (0.1 * bottom * math.log(factor) + 1.0)
        told |= {
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": float(given.get("attention_factor", attention)),
            "beta_fast": float(given.get("beta_fast") or 32),
            "beta_slow": float(given.get("beta_slow") or 1),
            "truncate": bool(given.get("truncate", True)),
        }
    return told


class XverseConfig(PretrainedConfig):
    """An XVERSE model, mixture of experts or (num_experts None or 0) dense.

    Sizes default to XVERSE-Ent-A4.2B's; a key that a config.json may lack defaults to what it means there: dense, no shared
    experts, rope_theta 10000, no special tokens. None stands for the default. `intermediate_size` is the width of ONE expert; the
    shared MLP is num_shared_experts times as wide. Raises ValueError for what would change the function computed and is not
    implemented (attention bias, other rope scalings, tensor-parallel slices, other activations), rather than ignoring it.
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
        num_experts: int | None = None,
        moe_top_k: int | None = None,
        num_shared_experts: int | None = None,
        norm_topk_prob: bool | None = True,
        rope_theta: float | None = 10000.0,
        rms_norm_eps: float | None = 1e-6,
        max_position_embeddings: int | None = 8192,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        output_router_logits: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool | None = False,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for key, neutral in NEUTRAL.items():
            if kwargs.get(key) not in (None, *neutral):
                raise ValueError(f"{key} {kwargs[key]!r} is not supported; the released models have {neutral[0]!r}")
        for key, flag in (("tie_word_embeddings", tie_word_embeddings), ("norm_topk_prob", norm_topk_prob)):
            if not isinstance(flag, bool | None):
                raise ValueError(f"{key} must be true or false, it is {flag!r}")
        if num_experts and not moe_top_k:
            raise ValueError(f"moe_top_k is missing, of a model with {num_experts} experts")
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
        self.moe_top_k = moe_top_k or 0
        self.num_shared_experts = num_shared_experts or 0
        self.norm_topk_prob = True if norm_topk_prob is None else norm_topk_prob
        self.max_position_embeddings = max_position_embeddings or 8192
        self.rope_parameters = rope_settings(
            rope_parameters,
            rope_scaling,
            rope_theta or 10000.0,
            self.max_position_embeddings,
            kwargs.get("original_max_position_embeddings"),
        )
        self.rope_theta = self.rope_parameters["rope_theta"]
        self.rms_norm_eps = rms_norm_eps or 1e-6
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.output_router_logits = output_router_logits
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=bool(tie_word_embeddings),
            **kwargs,
        )


__all__ = ["XverseConfig"]
