"""Mixes against llama-quantize's rules, written out by hand for whole models."""

import pytest

from xent_quant import formats
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.errors import ConfigError
from xent_quant.recipes import BITS, MIXES, OWN, Layers, Role, fitting, planned_recipe, recipe


def model(layers: int = 28, heads: int = 32, kv_heads: int = 32, experts: int = 64) -> Architecture:
    return Architecture.from_config(
        {
            "model_type": "xverse",
            "vocab_size": 1000,
            "hidden_size": 80 * heads,
            "intermediate_size": 1728,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_experts": experts,
            "moe_top_k": 6,
            "num_shared_experts": 2,
        }
    )


# use_more_bits of llama-quant.cpp, by hand: n/8 = 3 first, from 7n/8 = 24 on, and 3 + 2, 5 + 3, …
MORE_OF_28 = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}
# n/8 = 4 first, from 28 on; 4 + 2, …
MORE_OF_32 = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
# n/8 = 0: none first, from 7·2/8 = 1 on; none with remainder 2
MORE_OF_2 = {1}


@pytest.mark.parametrize(("layers", "wanted"), [(28, MORE_OF_28), (32, MORE_OF_32), (2, MORE_OF_2)])
def test_layers_of_more_bits(layers: int, wanted: set[int]) -> None:
    assert {layer for layer in range(layers) if Layers.MORE_BITS.contains(layer, layers)} == wanted


# mix: (base, head, {role: {type: layers}}); a role that is not named has the base, 28 layers, multi-head attention
ALL = set(range(28))
BY_HAND = {
    "F32": ("F32", "F32", {}),
    "F16": ("F16", "F16", {}),
    "BF16": ("BF16", "BF16", {}),
    "Q8_0": ("Q8_0", "Q8_0", {}),
    "Q6_K": ("Q6_K", "Q6_K", {}),
    "Q5_K_M": ("Q5_K", "Q6_K", {Role.ATTENTION_V: {"Q6_K": MORE_OF_28}, Role.DOWN: {"Q6_K": MORE_OF_28}}),
    "Q5_K_S": ("Q5_K", "Q6_K", {}),
    "Q5_1": ("Q5_1", "Q6_K", {}),
    "Q5_0": ("Q5_0", "Q6_K", {}),
    "Q4_K_M": ("Q4_K", "Q6_K", {Role.ATTENTION_V: {"Q6_K": MORE_OF_28}, Role.DOWN: {"Q6_K": MORE_OF_28}}),
    "Q4_K_S": ("Q4_K", "Q6_K", {Role.ATTENTION_V: {"Q5_K": {0, 1, 2, 3}}, Role.DOWN: {"Q5_K": {0, 1, 2}}}),
    "Q4_1": ("Q4_1", "Q6_K", {}),
    "Q4_0": ("Q4_0", "Q6_K", {}),
    "IQ4_NL": ("IQ4_NL", "Q6_K", {Role.DOWN: {"Q5_K": {0, 1, 2}}}),
    "IQ4_XS": ("IQ4_XS", "Q6_K", {Role.DOWN: {"Q5_K": {0, 1, 2}}}),
    "IQ3_M": (
        "IQ3_S",
        "Q6_K",
        {Role.ATTENTION_V: {"Q4_K": ALL}, Role.DOWN: {"Q4_K": {0, 1, 2}}, Role.ATTENTION_OUTPUT: {"Q4_K": ALL}},
    ),
    "IQ3_S": ("IQ3_S", "Q6_K", {}),
    "IQ3_XS": (
        "IQ3_S",
        "Q6_K",
        {
            Role.ATTENTION_Q: {"IQ3_XXS": ALL},
            Role.ATTENTION_K: {"IQ3_XXS": ALL},
            Role.GATE: {"IQ3_XXS": ALL - {0, 1, 2, 24, 25, 26, 27}},
            Role.UP: {"IQ3_XXS": ALL - {0, 1, 2, 24, 25, 26, 27}},
        },
    ),
    "IQ3_XXS": (
        "IQ3_XXS",
        "Q5_K",
        {
            Role.EMBEDDING: {"IQ3_S": ALL},
            Role.ATTENTION_Q: {"IQ2_S": ALL},
            Role.ATTENTION_K: {"IQ2_S": ALL},
            Role.ATTENTION_V: {"IQ3_S": ALL},
            Role.DOWN: {"Q4_K": {0, 1, 2}, "Q3_K": ALL - {0, 1, 2}},
            Role.ATTENTION_OUTPUT: {"IQ3_S": ALL},
        },
    ),
    "Q3_K_L": (
        "Q3_K",
        "Q6_K",
        {Role.ATTENTION_V: {"Q5_K": ALL}, Role.DOWN: {"Q5_K": ALL}, Role.ATTENTION_OUTPUT: {"Q5_K": ALL}},
    ),
    "Q3_K_M": (
        "Q3_K",
        "Q6_K",
        {
            Role.ATTENTION_V: {"Q5_K": {0, 1}, "Q4_K": ALL - {0, 1}},
            Role.DOWN: {"Q5_K": {0}, "Q4_K": ALL - {0}},
            Role.ATTENTION_OUTPUT: {"Q4_K": ALL},
        },
    ),
    "Q3_K_S": ("Q3_K", "Q6_K", {}),
    "Q2_K": (
        "Q2_K",
        "Q6_K",
        {Role.ATTENTION_V: {"Q3_K": ALL}, Role.DOWN: {"Q3_K": ALL}, Role.ATTENTION_OUTPUT: {"Q3_K": ALL}},
    ),
    "Q2_K_S": ("Q2_K", "Q6_K", {Role.DOWN: {"Q4_K": {0, 1, 2}}}),
    "IQ2_M": (
        "IQ2_S",
        "Q5_K",
        {
            Role.EMBEDDING: {"IQ3_S": ALL},
            Role.ATTENTION_V: {"Q4_K": ALL},
            Role.DOWN: {"IQ3_S": {0, 1}},
            Role.ATTENTION_OUTPUT: {"IQ3_S": ALL},
        },
    ),
    "IQ2_S": (
        "IQ2_XS",
        "Q5_K",
        {
            Role.EMBEDDING: {"IQ3_S": ALL},
            Role.ATTENTION_V: {"Q4_K": ALL},
            Role.DOWN: {"IQ3_S": {0, 1}},
            Role.ATTENTION_OUTPUT: {"IQ3_S": ALL},
        },
    ),
    "IQ2_XS": (
        "IQ2_XS",
        "Q5_K",
        {Role.EMBEDDING: {"Q2_K": ALL}, Role.ATTENTION_V: {"Q4_K": ALL}, Role.DOWN: {"Q2_K": {0, 1}}},
    ),
    "IQ2_XXS": (
        "IQ2_XXS",
        "Q5_K",
        {Role.EMBEDDING: {"Q2_K": ALL}, Role.ATTENTION_V: {"Q4_K": ALL}, Role.DOWN: {"Q2_K": {0, 1}}},
    ),
    "IQ1_M": (
        "IQ1_M",
        "Q5_K",
        {
            Role.EMBEDDING: {"Q2_K": ALL},
            Role.ATTENTION_V: {"Q4_K": ALL},
            Role.DOWN: {"Q2_K": {0, 1}},
            Role.ATTENTION_OUTPUT: {"IQ2_XXS": ALL},
        },
    ),
    "IQ1_S": (
        "IQ1_S",
        "Q5_K",
        {
            Role.EMBEDDING: {"Q2_K": ALL},
            Role.ATTENTION_V: {"Q4_K": ALL},
            Role.DOWN: {"Q2_K": {0, 1}},
            Role.ATTENTION_OUTPUT: {"IQ2_XXS": ALL},
        },
    ),
    "TQ2_0": ("TQ2_0", "Q6_K", {Role.EMBEDDING: {"Q4_K": ALL}}),
    "TQ1_0": ("TQ1_0", "Q6_K", {Role.EMBEDDING: {"Q4_K": ALL}}),
    "Q1_0": ("Q1_0", "Q6_K", {}),
    "MXFP4_MOE": ("Q8_0", "Q8_0", {}),
}
AVAILABLE = [name for name, mix in MIXES.items() if name not in OWN and mix.types <= set(formats.NAMES)]


def test_every_available_mix_is_written_out_here() -> None:
    assert set(AVAILABLE) == set(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_mix_follows_llama_quantize(name: str) -> None:
    base, head, differing = BY_HAND[name]
    chosen = recipe(type=name)
    assert chosen.type_of("output.weight", Role.HEAD, 0, model()) == head
    embedding = next(iter(differing.get(Role.EMBEDDING, {base: ALL})))
    assert chosen.type_of("token_embd.weight", Role.EMBEDDING, 0, model()) == embedding
    for role in set(Role) - {Role.HEAD, Role.EMBEDDING}:
        for layer in ALL:
            wanted = next((kind for kind, layers in differing.get(role, {}).items() if layer in layers), base)
            wanted = "F32" if role in (Role.NORM, Role.ROUTER) else wanted
            assert chosen.type_of("x", role, layer, model()) == wanted, (role, layer)


def test_grouped_queries_and_imatrix_change_what_llama_quantize_changes() -> None:
    def value(name: str, kv_heads: int) -> str:
        return recipe(type=name).type_of("x", Role.ATTENTION_V, 9, model(kv_heads=kv_heads))

    assert [value("Q2_K", kv) for kv in (32, 16, 8, 4)] == ["Q3_K", "Q3_K", "Q4_K", "Q4_K"]
    assert [value("Q2_K_S", kv) for kv in (16, 8)] == ["Q2_K", "Q4_K"]
    assert [value("IQ4_XS", kv) for kv in (16, 8)] == ["IQ4_XS", "Q5_K"]
    assert [value("IQ3_XS", kv) for kv in (16, 8)] == ["IQ3_S", "Q4_K"]
    assert [value("IQ3_XXS", kv) for kv in (16, 8)] == ["IQ3_S", "Q4_K"]
    with_imatrix = recipe(type="IQ3_XXS", imatrix=True)
    assert {with_imatrix.type_of("x", role, 0, model()) for role in (Role.ATTENTION_V, Role.DOWN)} == {"IQ3_XXS"}
    assert recipe(type="IQ4_XS", imatrix=True).type_of("x", Role.DOWN, 0, model()) == "IQ4_XS"
    for name, kind in (("Q4_0", "Q4_1"), ("Q5_0", "Q5_1")):
        types = [recipe(type=name, imatrix=True).type_of("x", Role.DOWN, layer, model()) for layer in range(28)]
        assert types == [kind] * 3 + [name] * 25


def test_mixes_of_two_bits_count_down_projections_not_layers() -> None:
    """In the order of llama-quantize: routed experts of layer 0, shared ones of layer 0, routed experts of layer 1, …"""
    chosen = recipe(type="IQ2_XS")

    def ups(part: str, model: Architecture) -> list[int]:
        name = f"ffn_down{part}.weight"
        return [layer for layer in range(28) if chosen.type_of(f"blk.{layer}.{name}", Role.DOWN, layer, model) == "Q2_K"]

    assert (ups("_exps", model()), ups("_shexp", model())) == ([0, 1], [0])
    assert ups("", model(experts=0)) == [0, 1, 2]


def test_mixes_of_two_bits_give_values_more_where_they_are_few_or_experts_many() -> None:
    def value(heads: int, experts: int, name: str) -> str:
        return recipe(type=name).type_of("x", Role.ATTENTION_V, 9, model(kv_heads=heads, experts=experts))

    few = [(32, 0), (16, 0), (8, 0), (32, 6), (32, 64)]
    assert [value(*case, "IQ1_S") for case in few] == ["Q2_K", "Q2_K", "Q4_K", "Q4_K", "Q4_K"]
    assert [value(*case, "IQ2_M") for case in few] == ["IQ3_S", "IQ3_S", "Q4_K", "Q4_K", "Q4_K"]


def test_mxfp4_moe_is_for_routed_experts_alone() -> None:
    chosen = recipe(type="mxfp4_moe")
    for role, part in ((Role.GATE, "gate"), (Role.UP, "up"), (Role.DOWN, "down")):
        for experts in (8, 64):
            assert chosen.type_of(f"blk.3.ffn_{part}_exps.weight", role, 3, model(experts=experts)) == "MXFP4"
            assert chosen.type_of(f"blk.3.ffn_{part}_shexp.weight", role, 3, model(experts=experts)) == "Q8_0"
        assert chosen.type_of(f"blk.3.ffn_{part}.weight", role, 3, model(experts=0)) == "Q8_0"


@pytest.mark.parametrize("name", ["IQ2_M", "IQ2_XXS", "IQ1_S"])
def test_eight_experts_of_two_bits(name: str) -> None:
    chosen, eight = recipe(type=name), model(experts=8)
    assert chosen.type_of("x", Role.ATTENTION_K, 5, eight) == chosen.type_of("x", Role.ATTENTION_V, 5, eight) == "Q4_K"
    assert chosen.type_of("x", Role.ATTENTION_OUTPUT, 5, eight) == "Q5_K"


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("IQ3_XS", "Q5_K"),
        ("IQ3_XXS", "Q5_K"),
        ("TQ2_0", "TQ2_0"),
        ("MXFP4_MOE", "Q8_0"),
        ("Q4_K_M", "Q5_K"),
        ("Q5_K_M", "Q5_K"),
        ("Q2_K", "Q5_K"),
        ("Q6_K", "Q6_K"),
        ("Q3_K_L", "Q3_K"),
        ("F16", "F16"),
    ],
)
def test_eight_experts_are_quantised_as_mixtral(name: str, output: str) -> None:
    eight, chosen = model(experts=8), recipe(type=name)
    attention = "F16" if name == "F16" else "Q8_0"
    assert chosen.type_of("x", Role.ATTENTION_K, 5, eight) == chosen.type_of("x", Role.ATTENTION_V, 5, eight) == attention
    assert chosen.type_of("x", Role.ATTENTION_OUTPUT, 5, eight) == output


@pytest.mark.parametrize(
    ("kind", "columns", "wanted"),
    [
        ("Q4_K", 1792, "Q4_K"),
        ("Q4_K", 1728, "Q5_0"),
        ("Q5_K", 1728, "Q5_1"),
        ("Q6_K", 1728, "Q8_0"),
        ("Q3_K", 1728, "Q4_0"),
        ("Q2_K", 1728, "Q4_0"),
        ("IQ4_XS", 1728, "IQ4_NL"),
        ("IQ2_XXS", 1728, "IQ4_NL"),
        ("IQ1_M", 1728, "IQ4_NL"),
        ("TQ1_0", 1728, "Q4_0"),
        ("Q1_0", 1792, "Q1_0"),
        ("NVFP4", 1728, "NVFP4"),
        ("NVFP4", 1760, "F16"),
        ("Q4_K", 1744, "F16"),
        ("Q8_0", 1728, "Q8_0"),
        ("Q8_0", 1744, "F16"),
        ("F32", 7, "F32"),
        ("BF16", 7, "BF16"),
    ],
)
def test_fallbacks_are_llama_quantize_s(kind: str, columns: int, wanted: str) -> None:
    assert fitting(kind, columns) == wanted


def test_a_head_falls_back_to_eight_bits() -> None:
    assert [fitting("Q5_K", columns, head=True) for columns in (2560, 2592, 2600)] == ["Q5_K", "Q8_0", "F16"]
    assert fitting("Q5_K", 2592) == "Q5_1"


def test_bits_and_names() -> None:
    assert {bits: recipe(bits=bits).name for bits in BITS} == {
        8: "Q8_0",
        6: "Q6_K",
        5: "Q5_K_M",
        4: "Q4_K_M",
        3: "Q3_K_M",
        2: "Q2_K",
    }
    assert [recipe(bits=bits, experts=True).name for bits in BITS] == ["Q8_0", "XENT6", "XENT5", "XENT4", "XENT3", "XENT2"]
    assert recipe(type="q4_k_m", experts=True).name == recipe(type="q4_k_m").name == recipe(type="Q4_K").name == "Q4_K_M"
    assert recipe(type="Q5_K_S").mix.number == 16
    with pytest.raises(ConfigError, match=r"--bits 7: .*2, 3, 4, 5, 6, 8"):
        recipe(bits=7)
    with pytest.raises(ConfigError, match=r"--type Q9_X: unknown; there are .*Q4_K_M"):
        recipe(type="Q9_X")


def test_file_type_numbers_are_llama_cpp_s() -> None:
    from gguf import LlamaFileType

    for name, mix in MIXES.items():
        if name in OWN:
            experts = LlamaFileType(mix.number).name.removeprefix("MOSTLY_").removesuffix("_S")
            assert experts == mix.base.removesuffix("_S"), name
            continue
        member = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
        assert LlamaFileType[member] == mix.number, name


@pytest.mark.parametrize(
    ("name", "experts", "active"),
    [
        ("XENT6", "Q6_K", "Q8_0"),
        ("XENT5", "Q5_K", "Q8_0"),
        ("XENT4", "IQ4_XS", "Q8_0"),
        ("XENT3", "IQ3_S", "Q8_0"),
        ("XENT2", "IQ2_S", "Q6_K"),
    ],
)
def test_own_mixes_tell_what_every_token_uses_from_what_few_do(name: str, experts: str, active: str) -> None:
    chosen = recipe(type=name)
    for role, part in ((Role.GATE, "gate"), (Role.UP, "up"), (Role.DOWN, "down")):
        assert chosen.type_of(f"blk.3.ffn_{part}_exps.weight", role, 3, model()) == experts
        assert chosen.type_of(f"blk.3.ffn_{part}_shexp.weight", role, 3, model()) == active
        assert chosen.type_of(f"blk.3.ffn_{part}_exps.weight", role, 3, model(experts=8)) == experts
    for role in (Role.ATTENTION_Q, Role.ATTENTION_K, Role.ATTENTION_V, Role.ATTENTION_OUTPUT, Role.EMBEDDING, Role.HEAD):
        assert chosen.type_of("x.weight", role, 3, model()) == active
    assert chosen.type_of("blk.3.ffn_gate_inp.weight", Role.ROUTER, 3, model()) == "F32"


def test_a_plan_is_called_by_the_type_of_most_weights() -> None:
    types, weights = {"a": "Q6_K", "b": "Q6_K", "c": "Q3_K"}, {"a": 10, "b": 10, "c": 100}
    assert planned_recipe("12GiB", types, weights).mix.base == "Q3_K"
    assert planned_recipe("12GiB", types, weights | {"c": 19}).mix.base == "Q6_K"


def test_overrides_come_first_and_the_first_wins() -> None:
    chosen = recipe(bits=4, tensor_types=["ffn_down_exps=Q8_0", r"blk\.1\.ffn_=q6_K", ".=F16"])
    assert chosen.type_of("blk.1.ffn_down_exps.weight", Role.DOWN, 1, model()) == "Q8_0"
    assert chosen.type_of("blk.1.ffn_up_exps.weight", Role.UP, 1, model()) == "Q6_K"
    assert chosen.type_of("output.weight", Role.HEAD, 0, model()) == "F16"
    assert chosen.type_of("blk.1.ffn_gate_inp.weight", Role.ROUTER, 1, model()) == "F32"
    assert recipe(tensor_types=["a=b=Q8_0"]).overrides[0][0].pattern == "a=b"


@pytest.mark.parametrize("wrong", ["oops", "=Q8_0", "x=", "x=Q9", "(=Q8_0"])
def test_wrong_overrides_name_the_option(wrong: str) -> None:
    with pytest.raises(ConfigError, match="--tensor-type"):
        recipe(tensor_types=[wrong])
