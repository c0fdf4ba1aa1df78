"""XVERSE's architecture as data: what config.json says, and which tensors of which shapes must exist.

The one definition of names and shapes; the reader checks against it, the streaming forward, the exporters and the
transformers class read from it. Source: the released XVERSE-MoE-A4.2B modelling file and config.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.tensors import Role, TensorSpec

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def input_norm(layer: int) -> str:
    return f"model.layers.{layer}.input_layernorm.weight"


def post_attention_norm(layer: int) -> str:
    return f"model.layers.{layer}.post_attention_layernorm.weight"


def attention(layer: int, which: Literal["q", "k", "v", "o"]) -> str:
    return f"model.layers.{layer}.self_attn.{which}_proj.weight"


def router(layer: int) -> str:
    return f"model.layers.{layer}.mlp.router.weight"


def expert(layer: int, index: int, projection: Projection) -> str:
    return f"model.layers.{layer}.mlp.experts.{index}.{projection}_proj.weight"


def shared_expert(layer: int, projection: Projection) -> str:
    return f"model.layers.{layer}.mlp.shared_experts.{projection}_proj.weight"


def dense_mlp(layer: int, projection: Projection) -> str:
    return f"model.layers.{layer}.mlp.{projection}_proj.weight"


@dataclass(frozen=True)
class Architecture:
    """A config.json of model_type `xverse`, validated. `num_experts` 0 is a dense model.

    `intermediate_size` is the width of ONE expert (of the MLP when dense); the shared MLP is
    `num_shared_experts * intermediate_size` wide.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int
    experts_per_token: int
    num_shared_experts: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    norm_topk_prob: bool
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def shared_size(self) -> int:
        """Width of the shared MLP; 0 where there is none."""
        return self.num_shared_experts * self.intermediate_size if self.num_experts else 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> "Architecture":
        """Validate a parsed config.json; `source` names the file in messages.

        Raises ConfigError for a missing or impossible value, UnsupportedError for what would change the function
        that the exports compute (other model_type, attention bias, rope scaling).
        """

        def refuse(text: str) -> ConfigError:
            return ConfigError(f"{source}: {text}")

        def integer(key: str, default: int | None = None, minimum: int = 1) -> int:
            value = config.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise refuse(f"{key} must be an integer of at least {minimum}, it is {value!r}")
            return value

        def number(key: str, default: float | None, value: Any = None) -> float:
            value = config.get(key, default) if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise refuse(f"{key} must be a positive number, it is {value!r}")
            return float(value)

        def token_id(key: str) -> int | None:
            value = config.get(key)
            if isinstance(value, list):  # several end a text; special_tokens.read knows them all
                value = value[0] if value else None
            if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
                raise refuse(f"{key} must be a token id below vocab_size {vocab_size}, it is {value!r}")
            return value

        model_type = config.get("model_type")
        if model_type != "xverse":
            raise UnsupportedError(
                f"{source}: model_type is {model_type!r}; this toolkit reads 'xverse' (dense and MoE) checkpoints only"
            )
        if config.get("attention_bias"):
            raise UnsupportedError(f"{source}: attention_bias is true; the target runtimes' graphs have no such biases")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(f"{source}: hidden_act is {config['hidden_act']!r}; only 'silu' can be exported")
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling")
        kind = (scaling or rope).get("rope_type", (scaling or rope).get("type", "default"))
        if kind != "default":
            raise UnsupportedError(
                f"{source}: rope_scaling of type {kind!r} is not supported; remove it to use the native context"
            )
        if config.get("pretraining_tp", 1) not in (1, None):
            raise UnsupportedError(
                f"{source}: pretraining_tp {config['pretraining_tp']} is not supported; set it to 1 if the weights are whole"
            )

        vocab_size = integer("vocab_size")
        heads = integer("num_attention_heads")
        hidden = integer("hidden_size")
        kv_heads = integer("num_key_value_heads", default=heads)
        if hidden % heads or (hidden // heads) % 2:
            raise refuse(f"hidden_size {hidden} must be an even multiple of num_attention_heads {heads}")
        if config.get("head_dim") not in (None, hidden // heads):
            raise UnsupportedError(f"{source}: head_dim {config['head_dim']} differs from hidden_size / num_attention_heads")
        if heads % kv_heads:
            raise refuse(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
        experts = integer("num_experts", default=0, minimum=0)
        per_token = integer("moe_top_k") if experts else 0
        if per_token > experts:
            raise refuse(f"moe_top_k {per_token} exceeds num_experts {experts}")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size"),
            num_layers=integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            num_experts=experts,
            experts_per_token=per_token,
            num_shared_experts=integer("num_shared_experts", default=0, minimum=0) if experts else 0,
            rope_theta=number("rope_theta", 10000.0, rope.get("rope_theta")),
            rms_norm_eps=number("rms_norm_eps", 1e-6),
            max_position_embeddings=integer("max_position_embeddings", default=8192),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            norm_topk_prob=bool(config.get("norm_topk_prob", True)),
            bos_token_id=token_id("bos_token_id"),
            eos_token_id=token_id("eos_token_id"),
            pad_token_id=token_id("pad_token_id"),
        )

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor that the checkpoint must hold, by name, in storage order."""
        return {spec.name: spec for spec in self._tensors()}

    def _tensors(self) -> Iterator[TensorSpec]:
        hidden, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        yield TensorSpec(EMBEDDING, (self.vocab_size, hidden), Role.EMBEDDING)
        for layer in range(self.num_layers):
            yield TensorSpec(input_norm(layer), (hidden,), Role.NORM, layer)
            yield TensorSpec(attention(layer, "q"), (hidden, hidden), Role.ATTENTION_Q, layer)
            yield TensorSpec(attention(layer, "k"), (kv, hidden), Role.ATTENTION_K, layer)
            yield TensorSpec(attention(layer, "v"), (kv, hidden), Role.ATTENTION_V, layer)
            yield TensorSpec(attention(layer, "o"), (hidden, hidden), Role.ATTENTION_OUTPUT, layer)
            yield TensorSpec(post_attention_norm(layer), (hidden,), Role.NORM, layer)
            yield from self._mlp(layer)
        yield TensorSpec(FINAL_NORM, (hidden,), Role.NORM)
        if not self.tie_word_embeddings:
            yield TensorSpec(HEAD, (self.vocab_size, hidden), Role.HEAD)

    def _mlp(self, layer: int) -> Iterator[TensorSpec]:
        """One layer's router, experts and shared MLP, or its dense MLP."""

        def swiglu(names: Sequence[str], width: int, **where: Any) -> Iterator[TensorSpec]:
            gate, up, down = names
            yield TensorSpec(gate, (width, self.hidden_size), Role.GATE, layer, **where)
            yield TensorSpec(up, (width, self.hidden_size), Role.UP, layer, **where)
            yield TensorSpec(down, (self.hidden_size, width), Role.DOWN, layer, **where)

        if not self.num_experts:
            yield from swiglu([dense_mlp(layer, projection) for projection in PROJECTIONS], self.intermediate_size)
            return
        yield TensorSpec(router(layer), (self.num_experts, self.hidden_size), Role.ROUTER, layer)
        for index in range(self.num_experts):
            own = [expert(layer, index, projection) for projection in PROJECTIONS]
            yield from swiglu(own, self.intermediate_size, expert=index)
        if self.num_shared_experts:
            yield from swiglu([shared_expert(layer, projection) for projection in PROJECTIONS], self.shared_size, shared=True)
