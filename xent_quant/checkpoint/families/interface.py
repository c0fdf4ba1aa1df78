"""What a family of models is to this program, as data: what its config.json and its tensors are called, what its layers compute
besides, and how llama.cpp, transformers and bitsandbytes know it. `xent_quant.checkpoint.families` has the table of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from xent_quant.checkpoint.architecture import Architecture

QkNorm = Literal["head", "width"]
"""RMS norms of queries and keys between projection and rotation: of each head alone, or of all heads together."""

FUSED_EXPERTS = dict.fromkeys(
    (4, 8),
    "transformers keeps the experts of a layer in one parameter, which bitsandbytes does not quantise; "
    "use --format gguf or onnx, or --bits 16",
)
"""`Family.no_bnb` of mixtures that transformers computes by its own code."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a checkpoint calls its tensors where families differ. What stands in a layer is given without `model.layers.N.` before
    it, and all of it without `.weight` behind."""

    embedding: str = "model.embed_tokens"
    attention: str = "self_attn"
    output: str = "o_proj"
    fused_qkv: str | None = None
    """One tensor, within `attention`, of the rows of q, k and v in that order."""
    router: str = "mlp.gate"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What config.json calls what families call differently."""

    width: str = "intermediate_size"
    """Of one expert, or of the dense MLP."""
    dense_width: str | None = None
    """Of the MLP in layers without experts, where config.json speaks of those though there are none."""
    experts: tuple[str, ...] = ()
    """Any of these; the first is written."""
    experts_per_token: str = "num_experts_per_tok"
    shared_experts: str | None = None


@dataclass(frozen=True)
class GGUF:
    """A model as stock llama.cpp knows it. `keys` are hyperparameters besides those that every model has, without `arch.` before
    them. `interleaved`: it rotates neighbouring dimensions, so that rows of q and k change places. `own_head`: there must be an
    output.weight even where the checkpoint ties the head to the embedding."""

    arch: str
    feed_forward_length: int
    keys: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    interleaved: bool = False
    own_head: bool = False


@dataclass(frozen=True)
class Modelling:
    """A family's code for transformers, which does not have it: files of `xent_quant.model` that exports carry, and the auto_map
    of config.json that names the classes in them."""

    files: tuple[str, ...]
    auto_map: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """`gguf` makes of a model, and the width that its experts (or its dense MLP) have in the file, what llama.cpp calls that; it
    raises UnsupportedError where llama.cpp has no graph that computes the same."""

    model_type: str
    """config.json's, by which the family is found."""
    title: str
    model_class: str
    """transformers' class with a head: config.json's `architectures`."""
    gguf: Callable[["Architecture", int], GGUF]
    names: Names = Names()
    keys: Keys = Keys()
    defaults: Mapping[str, Any]
    """What a key that config.json does not have stands for: at least that of rope_theta, rms_norm_eps, max_position_embeddings
    and tie_word_embeddings, of a mixture also norm_topk_prob. A number of experts of 0 here means that there may be none."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that would change the function computed, with the values of which that is computed; None stands for an absent key."""
    qk_norm: QkNorm | None = None
    free_head_dim: bool = False
    """Whether heads × head_dim may be another width than the hidden size."""
    modelling: Modelling | None = None
    no_bnb: Mapping[int, str] = field(default_factory=dict)
    """Bits in which bitsandbytes and transformers cannot hold the model, with the reason."""
    repetition_penalty: float | None = None
    """With which the model's authors generate, where generation_config.json names none."""
    released: Mapping[str, str] = field(default_factory=dict)
    """Models by the name of their folder, with their id on the Hub."""
