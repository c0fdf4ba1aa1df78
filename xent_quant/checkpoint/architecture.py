"""XVERSE's architecture as data: what config.json says, and which tensors of which shapes must exist.

The one definition of names and shapes; the reader checks against it, the streaming forward, the exporters and the
transformers class read from it. Source: the released XVERSE-MoE-A4.2B modelling file and config.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from xent_quant.checkpoint import rope
from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.tensors import Role, TensorSpec

Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
DEFAULTS: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
}
"""What a key that config.json does not have stands for; num_experts then is 0 (dense), num_key_value_heads the number of heads,
token ids none. The released dense models' code knows no rope_theta and computes with 10000, llama.cpp likewise.
XverseConfig repeats these, as it must stand alone; a test holds it to them."""
STORAGE_KEYS = ("quantization_config", "compression_config", "rope_parameters", "auto_map", "dtype", "torch_dtype")
LARGEST = 2**31 - 1
MOST_MATRICES = 1_000_000
"""Experts and other matrices, all layers together: a config that asks for more would fill the memory with their names."""


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


def fused_experts(layer: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a layer's experts are called where each kind is one 3-D tensor: gate and up together, and down."""
    gate_up, down = (f"model.layers.{layer}.mlp.experts.{which}_proj" for which in ("gate_up", "down"))
    return (gate_up, f"{gate_up}.weight"), (down, f"{down}.weight")


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
    rope_scaling: rope.RopeScaling | None = None

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
        that the exports compute (other model_type, attention bias, an unknown rope scaling).
        """

        def refuse(text: str) -> ConfigError:
            return ConfigError(f"{source}: {text}")

        def integer(key: str, default: int | None = None, minimum: int = 1) -> int:
            value = config.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST:
                raise refuse(f"{key} must be an integer from {minimum} to {LARGEST}, it is {rope.shown(value)}")
            return value

        def number(key: str, default: float) -> float:
            value = config.get(key)
            value = default if value is None else value
            if not rope.is_number(value) or not value > 0:
                raise refuse(f"{key} must be a positive number, it is {rope.shown(value)}")
            return float(value)

        def boolean(key: str, default: bool) -> bool:
            value = config.get(key)
            if value is not None and not isinstance(value, bool):
                raise refuse(f"{key} must be true or false, it is {rope.shown(value)}")
            return default if value is None else bool(value)

        def token_id(key: str) -> int | None:
            value = config.get(key)
            if isinstance(value, list):  # several end a text; special_tokens.read knows them all
                value = value[0] if value else None
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size):
                raise refuse(f"{key} must be a token id below vocab_size {vocab_size}, it is {rope.shown(value)}")
            return value

        model_type = config.get("model_type")
        if model_type != "xverse":
            raise UnsupportedError(
                f"{source}: model_type is {rope.shown(model_type)}; this toolkit reads 'xverse' (dense and MoE) checkpoints only"
            )
        if boolean("attention_bias", False):
            raise UnsupportedError(f"{source}: attention_bias is true; the target runtimes' graphs have no such biases")
        if config.get("hidden_act") not in (None, "silu"):
            raise UnsupportedError(f"{source}: hidden_act is {rope.shown(config['hidden_act'])}; only 'silu' can be exported")
        if config.get("pretraining_tp") not in (None, 1):
            raise UnsupportedError(
                f"{source}: pretraining_tp {rope.shown(config['pretraining_tp'])} is not supported; "
                "set it to 1 if the weights are whole"
            )

        vocab_size = integer("vocab_size")
        heads = integer("num_attention_heads")
        hidden = integer("hidden_size")
        kv_heads = integer("num_key_value_heads", default=heads)
        if hidden % heads or (hidden // heads) % 2:
            raise refuse(f"hidden_size {hidden} must be an even multiple of num_attention_heads {heads}")
        if config.get("head_dim") not in (None, hidden // heads):
            raise UnsupportedError(
                f"{source}: head_dim {rope.shown(config['head_dim'])} differs from hidden_size / num_attention_heads"
            )
        if heads % kv_heads:
            raise refuse(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
        layers = integer("num_hidden_layers")
        experts = integer("num_experts", default=0, minimum=0)
        if layers * (experts + 4) > MOST_MATRICES:
            raise refuse(f"num_hidden_layers {layers} with num_experts {experts}: no model has so many tensors; mend the config")
        per_token = integer("moe_top_k") if experts else 0
        if per_token > experts:
            raise refuse(f"moe_top_k {per_token} exceeds num_experts {experts}")
        positions = integer("max_position_embeddings", default=DEFAULTS["max_position_embeddings"])
        given_theta, scaling = rope.parse(config, source, positions)
        theta = given_theta or number("rope_theta", DEFAULTS["rope_theta"])
        if scaling and (hidden // heads == 2 or theta <= 1):
            raise refuse(f"rope_scaling: not defined for rope_theta {theta:g} and heads of {hidden // heads} dimensions")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            num_experts=experts,
            experts_per_token=per_token,
            num_shared_experts=integer("num_shared_experts", default=0, minimum=0) if experts else 0,
            rope_theta=theta,
            rms_norm_eps=number("rms_norm_eps", DEFAULTS["rms_norm_eps"]),
            max_position_embeddings=positions,
            tie_word_embeddings=boolean("tie_word_embeddings", DEFAULTS["tie_word_embeddings"]),
            norm_topk_prob=boolean("norm_topk_prob", DEFAULTS["norm_topk_prob"]),
            bos_token_id=token_id("bos_token_id"),
            eos_token_id=token_id("eos_token_id"),
            pad_token_id=token_id("pad_token_id"),
            rope_scaling=scaling,
        )

    def to_config(self) -> dict[str, Any]:
        """The keys of config.json that say all of this: nothing is left to anybody's defaults."""
        return {
            "model_type": "xverse",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "num_experts": self.num_experts,
            "moe_top_k": self.experts_per_token,
            "num_shared_experts": self.num_shared_experts,
            "norm_topk_prob": self.norm_topk_prob,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling.to_config() if self.rope_scaling else None,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }

    def carried(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's config.json as an export carries it: its own keys, with every value of this architecture written out,
        and without those that speak of how the checkpoint's weights are stored."""
        kept = {key: value for key, value in config.items() if key not in STORAGE_KEYS}
        return {**kept, **self.to_config()}

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor that the checkpoint must hold, by name, in storage order."""
        return {spec.name: spec for spec in self.each_tensor()}

    def each_tensor(self) -> Iterator[TensorSpec]:
        """The same one by one: whoever checks them against files need not hold what a wrong config asks for."""
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
