"""XVERSE, mixture of experts or dense, for transformers 4.57 and 5: KV cache, generate, eager and SDPA attention.

Self-contained: exported folders carry a copy, which `trust_remote_code=True` loads where xent-quant is not installed.
Experts are nn.Linear, so that bitsandbytes and LoRA reach each of them; the router is not, so that they leave it alone.
Norms, rotary embedding, routing and the sum over experts are computed in float32 at least, whatever the model's dtype.

Shapes in comments: B sequences of L tokens, T = B·L, H hidden_size, D head_dim.
"""

import inspect
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_xverse import XverseConfig

MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters
"""transformers 4.57 says input_embeds and wants cache_position, 5 says inputs_embeds and has no cache_position."""

CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the KV cache of a model's output: `cache` since 5.24. Models here take either name."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class XverseRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


def rotary_frequencies(powers: Tensor, config: XverseConfig, length: Tensor) -> tuple[Tensor, float]:
    """Angles per position [D / 2] from 2i / D [D / 2], and the factor of cos and sin; `length` is the text's, which dynamic NTK
    goes by. transformers' formulas (modeling_rope_utils.py)."""
    rope, size = config.rope_parameters, config.head_dim
    theta, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor", 1.0)
    if kind == "dynamic":
        native = config.max_position_embeddings
        stretch = factor * length.clamp(min=native) / native - (factor - 1)
        theta = theta * stretch.to(powers.dtype) ** (size / (size - 2))
    plain = theta**-powers
    if kind == "linear":
        return plain / factor, 1.0
    if kind != "yarn":
        return plain, 1.0

    def dimension(rotations: float) -> float:
        """Where a pair turns so often within the context that the model was trained with."""
        turned = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return float(size * math.log(turned) / (2 * math.log(theta)))

    low, high = dimension(rope["beta_fast"]), dimension(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(size // 2, dtype=powers.dtype, device=powers.device) - low) / width).clamp(0, 1)
    return plain / factor * interpolated + plain * (1 - interpolated), rope["attention_factor"]


def rotary_tables(positions: Tensor, config: XverseConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, D] of positions [B, L]; angles in float64, as float32 is off by 1e-3 at position 8192.

    Computed anew at each forward: a buffer would have to survive meta devices, dtype casts and remote-code loading.
    """
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    powers = torch.arange(0, config.head_dim, 2, dtype=exact, device=positions.device) / config.head_dim
    frequencies, factor = rotary_frequencies(powers, config, positions.max() + 1)
    angles = positions[:, None, :, None].to(exact) * frequencies
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * factor).to(wide(dtype)), (angles.sin() * factor).to(wide(dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, L, D] over the whole head, rotate_half layout."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return (torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: query [B, heads, L, D], key and value [B, kv_heads, S, D] to [B, L, heads, D] and the
    probabilities [B, heads, L, S]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1, dtype=wide(scores.dtype)).to(query.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class XverseAttention(nn.Module):
    is_causal = True

    def __init__(self, config: XverseConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # SDPA's interface reads it
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        cache_position: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length, _ = x.shape
        query, key, value = (
            project(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, heads, L, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *tables), rotate(key, *tables)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": cache_position})
        name = self.config._attn_implementation
        attend = eager_attention if name in ("eager", None) else ALL_ATTENTION_FUNCTIONS[name]
        mixed, probabilities = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.o_proj(mixed.reshape(batch, length, -1)), probabilities


class XverseMLP(nn.Module):
    """SwiGLU: one expert, the shared experts together, or a dense model's MLP."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class XverseRouter(nn.Module):
    """Scores of every expert [T, experts], in float32 at least."""

    def __init__(self, config: XverseConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class XverseSparseMoeBlock(nn.Module):
    def __init__(self, config: XverseConfig) -> None:
        super().__init__()
        self.top_k = config.moe_top_k
        self.renormalise = config.norm_topk_prob
        self.router = XverseRouter(config)
        self.experts = nn.ModuleList(XverseMLP(config.hidden_size, config.intermediate_size) for _ in range(config.num_experts))
        shared = config.num_shared_experts * config.intermediate_size
        self.shared_experts = XverseMLP(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, H] to the same, and the router's logits [T, experts]."""
        flat = x.flatten(0, 1)
        logits = self.router(flat)
        gates, chosen = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        gates, chosen = gates[:, : self.top_k], chosen[:, : self.top_k]
        if self.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)
        # The T · top_k choices grouped by expert: each expert that was chosen runs once over all of its tokens.
        grouped, order = chosen.flatten().sort(stable=True)
        busy, counts = grouped.unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        y = torch.zeros_like(flat, dtype=gates.dtype)
        tokens = (order // self.top_k).split(sizes)
        weights = gates.flatten()[order].split(sizes)
        for expert, rows, weight in zip(busy.tolist(), tokens, weights, strict=True):
            y.index_add_(0, rows, self.experts[expert](flat[rows]).to(y.dtype) * weight[:, None])
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.to(x.dtype).view_as(x), logits


class XverseDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: XverseConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = XverseAttention(config, layer_idx)
        self.mlp = XverseSparseMoeBlock(config) if config.num_experts else XverseMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = XverseRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = XverseRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states [B, L, H], attention probabilities if the implementation has them, router logits if any."""
        mixed, probabilities = self.self_attn(self.input_layernorm(x), **kwargs)
        x = x + mixed
        out = self.mlp(self.post_attention_layernorm(x))
        out, router_logits = out if isinstance(out, tuple) else (out, None)
        return x + out, probabilities, router_logits


class XversePreTrainedModel(PreTrainedModel):
    config: XverseConfig
    config_class = XverseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["XverseDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(config)
        # Released checkpoints hold routers in float32. transformers 4.57 refuses names that the model does not have.
        self._keep_in_fp32_modules_strict = {"router"} if config.num_experts else set()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, XverseRouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class XverseModel(XversePreTrainedModel):
    """The decoder without the head."""

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(XverseDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = XverseRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Token ids or embeddings to hidden states; arguments as in every transformers decoder."""

        def wanted(flag: bool | None, key: str) -> bool:
            return bool(getattr(self.config, key, False) if flag is None else flag)

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        recomputing = self.gradient_checkpointing and self.training
        cache = past_key_values if cache is None else cache
        if cache is None and wanted(use_cache, "use_cache") and not recomputing:
            cache = DynamicCache(config=self.config)

        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = cache.get_seq_length() if cache is not None else 0
            cache_position = torch.arange(x.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = cache_position[None]
        mask_arguments = {
            "config": self.config,
            "inputs_embeds": x,
            "input_embeds": x,
            "attention_mask": attention_mask,
            "cache_position": cache_position,
            CACHE: cache,
            "position_ids": position_ids,
        }
        mask = create_causal_mask(**{key: value for key, value in mask_arguments.items() if key in MASK_PARAMETERS})
        tables = rotary_tables(position_ids, self.config, x.dtype)

        states: tuple[Tensor, ...] | None = () if wanted(output_hidden_states, "output_hidden_states") else None
        attentions: tuple[Tensor | None, ...] | None = () if wanted(output_attentions, "output_attentions") else None
        router_logits: tuple[Tensor | None, ...] | None = () if wanted(output_router_logits, "output_router_logits") else None
        for layer in self.layers:
            states = None if states is None else (*states, x)
            x, probabilities, logits = layer(
                x,
                tables=tables,
                attention_mask=mask,
                cache=cache,
                cache_position=cache_position,
                position_ids=position_ids,
                **kwargs,
            )
            attentions = None if attentions is None else (*attentions, probabilities)
            router_logits = None if router_logits is None else (*router_logits, logits)
        x = self.norm(x)
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if states is None else (*states, x),
            attentions=attentions,
            router_logits=router_logits,
            **{CACHE: cache},
        )


class XverseForCausalLM(XversePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(config)
        self.model = XverseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, L, vocab] (of the last `logits_to_keep` tokens, if given) and, with `labels` [B, L], the mean
        cross-entropy of each next token."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["XverseForCausalLM", "XverseModel", "XversePreTrainedModel"]
