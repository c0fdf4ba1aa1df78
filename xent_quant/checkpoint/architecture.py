"""A model's architecture as data: what config.json says, and which tensors of which shapes must exist.

The one definition of names and shapes; the reader checks against it, the streaming forward, the exporters and the
transformers class read from it. What families of models differ in is `xent_quant.checkpoint.families`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from xent_quant.checkpoint import rope
from xent_quant.errors import ConfigError, UnsupportedError
from xent_quant.tensors import Role, TensorSpec

if TYPE_CHECKING:
    from xent_quant.checkpoint.families.interface import Family, QkNorm

FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
EXPERTS_KEY = "xent_quant_experts"
"""Of an export's config.json: `dropping.KeptExperts`, its experts among those of the checkpoint that it was made from."""
STORAGE_KEYS = ("quantization_config", "compression_config", "rope_parameters", "auto_map", "dtype", "torch_dtype", EXPERTS_KEY)
LARGEST = 2**31 - 1
MOST_MATRICES = 1_000_000
"""Experts and other matrices, all layers together: a config that asks for more would fill the memory with their names."""


class Swiglu(NamedTuple):
    """The matrices of an MLP: [width, hidden], [width, hidden], [hidden, width]."""

    gate: TensorSpec
    up: TensorSpec
    down: TensorSpec


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer, each made when it is asked for."""

    model: "Architecture"
    index: int

    def _spec(self, name: str, shape: tuple[int, ...], role: Role, **where: Any) -> TensorSpec:
        return TensorSpec(f"model.layers.{self.index}.{name}.weight", shape, role, self.index, **where)

    def _projection(self, which: str, rows: int, role: Role) -> TensorSpec:
        attention = self.model.family.names.attention
        return self._spec(f"{attention}.{which}_proj", (rows, self.model.hidden_size), role)

    def _mlp(self, name: str, width: int, **where: Any) -> Swiglu:
        hidden = self.model.hidden_size
        return Swiglu(
            self._spec(f"{name}.gate_proj", (width, hidden), Role.GATE, **where),
            self._spec(f"{name}.up_proj", (width, hidden), Role.UP, **where),
            self._spec(f"{name}.down_proj", (hidden, width), Role.DOWN, **where),
        )

    @property
    def attention_norm(self) -> TensorSpec:
        return self._spec("input_layernorm", (self.model.hidden_size,), Role.NORM, normed="attention")

    @property
    def q(self) -> TensorSpec:
        return self._projection("q", self.model.attention_size, Role.ATTENTION_Q)

    @property
    def k(self) -> TensorSpec:
        return self._projection("k", self.model.kv_size, Role.ATTENTION_K)

    @property
    def v(self) -> TensorSpec:
        return self._projection("v", self.model.kv_size, Role.ATTENTION_V)

    @property
    def qk_norms(self) -> tuple[TensorSpec, TensorSpec] | None:
        """Of queries and keys: [head_dim], or as wide as all heads together; None where the family has none."""
        model = self.model
        if model.qk_norm is None:
            return None
        sizes = (model.head_dim,) * 2 if model.qk_norm == "head" else (model.attention_size, model.kv_size)
        attention = model.family.names.attention
        return (
            self._spec(f"{attention}.q_norm", sizes[:1], Role.NORM, normed="q"),
            self._spec(f"{attention}.k_norm", sizes[1:], Role.NORM, normed="k"),
        )

    @property
    def output(self) -> TensorSpec:
        """Of the attention."""
        model = self.model
        name = f"{model.family.names.attention}.{model.family.names.output}"
        return self._spec(name, (model.hidden_size, model.attention_size), Role.ATTENTION_OUTPUT)

    @property
    def mlp_norm(self) -> TensorSpec:
        return self._spec("post_attention_layernorm", (self.model.hidden_size,), Role.NORM, normed="mlp")

    @property
    def router(self) -> TensorSpec | None:
        """None in a dense model."""
        model = self.model
        if not model.num_experts:
            return None
        return self._spec(model.family.names.router, (model.num_experts, model.hidden_size), Role.ROUTER)

    def expert(self, number: int) -> Swiglu:
        return self._mlp(f"mlp.experts.{number}", self.model.intermediate_size, expert=number)

    @property
    def experts(self) -> Iterator[Swiglu]:
        return map(self.expert, range(self.model.num_experts))

    @property
    def mlp(self) -> Swiglu | None:
        """What every token uses: the shared experts as one, or the MLP of a dense model."""
        model = self.model
        if not model.num_experts:
            return self._mlp("mlp", model.intermediate_size)
        return self._mlp("mlp.shared_experts", model.shared_size, shared=True) if model.num_shared_experts else None

    def tensors(self) -> Iterator[TensorSpec]:
        """All of them, in storage order."""
        yield from (self.attention_norm, self.q, self.k, self.v, *(self.qk_norms or ()), self.output, self.mlp_norm)
        if self.router:
            yield self.router
        for expert in self.experts:
            yield from expert
        if self.mlp:
            yield from self.mlp

    def fused_experts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the experts are called where each kind is one 3-D tensor: gate and up together, and down."""
        gate_up, down = (f"model.layers.{self.index}.mlp.experts.{which}_proj" for which in ("gate_up", "down"))
        return (gate_up, f"{gate_up}.weight"), (down, f"{down}.weight")

    def fused_qkv(self) -> tuple[str, dict[Role, int]] | None:
        """What q, k and v are called where they are one tensor, and the first row of each; None where the family has no such."""
        names, model = self.model.family.names, self.model
        if names.fused_qkv is None:
            return None
        name = f"model.layers.{self.index}.{names.attention}.{names.fused_qkv}.weight"
        q, kv = model.attention_size, model.kv_size
        return name, {Role.ATTENTION_Q: 0, Role.ATTENTION_K: q, Role.ATTENTION_V: q + kv}


@dataclass(frozen=True)
class Architecture:
    """A config.json of a family that is known, validated. `num_experts` 0 is a dense model.

    `intermediate_size` is the width of ONE expert (of the MLP when dense); the shared MLP is `num_shared_experts *
    intermediate_size` wide. `dense_size` is the width that config.json gives for layers without experts though there are
    none, 0 where it gives none; `qk_norm` says which norms there are between the projections of queries and keys and their
    rotation.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    dense_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: "QkNorm | None"
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
    def family(self) -> "Family":
        from xent_quant.checkpoint.families import FAMILIES

        return FAMILIES[self.model_type]

    @property
    def attention_size(self) -> int:
        """Width of all queries of a token together; the hidden size in most families."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys of a token together."""
        return self.num_kv_heads * self.head_dim

    @property
    def shared_size(self) -> int:
        """Width of the shared MLP; 0 where there is none."""
        return self.num_shared_experts * self.intermediate_size if self.num_experts else 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> "Architecture":
        """Validate a parsed config.json; `source` names the file in messages.

        Raises ConfigError for a missing or impossible value, UnsupportedError for what would change the function
        that the exports compute (another model_type, attention bias, an unknown rope scaling).
        """
        from xent_quant.checkpoint.families import FAMILIES

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
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            known = ", ".join(map(repr, FAMILIES))
            raise UnsupportedError(
                f"{source}: model_type is {rope.shown(model_type)}; this toolkit reads {known} checkpoints only"
            )
        defaults, keys = family.defaults, family.keys
        if boolean("attention_bias", False):
            raise UnsupportedError(f"{source}: attention_bias is true; models with such biases cannot be exported")
        if config.get("hidden_act") not in (None, "silu"):
            raise UnsupportedError(f"{source}: hidden_act is {rope.shown(config['hidden_act'])}; only 'silu' can be exported")
        if config.get("pretraining_tp") not in (None, 1):
            raise UnsupportedError(
                f"{source}: pretraining_tp {rope.shown(config['pretraining_tp'])} is not supported; "
                "set it to 1 if the weights are whole"
            )
        for key, values in family.neutral.items():
            if config.get(key) not in values:
                only = " or ".join(rope.shown(value) for value in values if value is not None)
                raise UnsupportedError(f"{source}: {key} is {rope.shown(config[key])}; only {only or 'null'} can be exported")

        vocab_size = integer("vocab_size")
        heads = integer("num_attention_heads")
        hidden = integer("hidden_size")
        kv_heads = integer("num_key_value_heads", default=heads)
        if family.free_head_dim and config.get("head_dim") is not None:
            head_dim = integer("head_dim")
            if head_dim % 2:
                raise refuse(f"head_dim {head_dim} must be even")
        else:
            head_dim = hidden // heads
            if hidden % heads or head_dim % 2:
                raise refuse(f"hidden_size {hidden} must be an even multiple of num_attention_heads {heads}")
            if config.get("head_dim") not in (None, head_dim):
                raise UnsupportedError(
                    f"{source}: head_dim {rope.shown(config['head_dim'])} differs from hidden_size / num_attention_heads"
                )
        if heads % kv_heads:
            raise refuse(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
        layers = integer("num_hidden_layers")
        experts = 0
        if keys.experts:
            key = next((each for each in keys.experts if config.get(each) is not None), keys.experts[0])
            default = defaults.get(keys.experts[0])
            experts = integer(key, default, minimum=0 if default == 0 else 1)
        if layers * (experts + 4) > MOST_MATRICES:
            raise refuse(f"num_hidden_layers {layers} with num_experts {experts}: no model has so many tensors; mend the config")
        per_token = integer(keys.experts_per_token, defaults.get(keys.experts_per_token)) if experts else 0
        if per_token > experts:
            raise refuse(f"{keys.experts_per_token} {per_token} exceeds num_experts {experts}")
        shared = 0
        if experts and keys.shared_experts:
            shared = integer(keys.shared_experts, defaults.get(keys.shared_experts), minimum=0)
        positions = integer("max_position_embeddings", default=defaults["max_position_embeddings"])
        given_theta, scaling = rope.parse(config, source, positions)
        theta = given_theta or number("rope_theta", defaults["rope_theta"])
        if scaling and (head_dim == 2 or theta <= 1):
            raise refuse(f"rope_scaling: not defined for rope_theta {theta:g} and heads of {head_dim} dimensions")
        width = integer(keys.width)
        return cls(
            model_type=family.model_type,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=width,
            dense_size=integer(keys.dense_width, width) if keys.dense_width else 0,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            qk_norm=family.qk_norm,
            num_experts=experts,
            experts_per_token=per_token,
            num_shared_experts=shared,
            rope_theta=theta,
            rms_norm_eps=number("rms_norm_eps", defaults["rms_norm_eps"]),
            max_position_embeddings=positions,
            tie_word_embeddings=boolean("tie_word_embeddings", defaults["tie_word_embeddings"]),
            norm_topk_prob=boolean("norm_topk_prob", defaults.get("norm_topk_prob", True)),
            bos_token_id=token_id("bos_token_id"),
            eos_token_id=token_id("eos_token_id"),
            pad_token_id=token_id("pad_token_id"),
            rope_scaling=scaling,
        )

    def to_config(self) -> dict[str, Any]:
        """The keys of config.json that say all of this: nothing is left to anybody's defaults."""
        keys = self.family.keys
        told: dict[str, Any] = {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            keys.width: self.intermediate_size,
            **({keys.dense_width: self.dense_size} if keys.dense_width else {}),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            **({"head_dim": self.head_dim} if self.family.free_head_dim else {}),
        }
        if keys.experts:
            told |= {keys.experts[0]: self.num_experts, keys.experts_per_token: self.experts_per_token}
            told |= {keys.shared_experts: self.num_shared_experts} if keys.shared_experts else {}
            told["norm_topk_prob"] = self.norm_topk_prob
        return told | {
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
        again = {key: self.num_experts for key in self.family.keys.experts[1:] if key in kept}
        return {**kept, **self.to_config(), **again}

    @property
    def embedding(self) -> TensorSpec:
        name = f"{self.family.names.embedding}.weight"
        return TensorSpec(name, (self.vocab_size, self.hidden_size), Role.EMBEDDING)

    @property
    def final_norm(self) -> TensorSpec:
        return TensorSpec(FINAL_NORM, (self.hidden_size,), Role.NORM)

    @property
    def head(self) -> TensorSpec:
        """The embedding, where the head is tied to it."""
        if self.tie_word_embeddings:
            return self.embedding
        return TensorSpec(HEAD, (self.vocab_size, self.hidden_size), Role.HEAD)

    def layer(self, index: int) -> Layer:
        return Layer(self, index)

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor that the checkpoint must hold, by name, in storage order."""
        return {spec.name: spec for spec in self.each_tensor()}

    def each_tensor(self) -> Iterator[TensorSpec]:
        """The same one by one: whoever checks them against files need not hold what a wrong config asks for."""
        yield self.embedding
        for index in range(self.num_layers):
            yield from self.layer(index).tensors()
        yield self.final_norm
        if not self.tie_word_embeddings:
            yield self.head
