"""The graph of a planned export: one function per block. Weights stay in the data file; the graph names their places.

Operators of ONNX Runtime's com.microsoft domain: QMoE or MoE, MatMulNBits, GatherBlockQuantized, GroupQueryAttention,
SkipSimplifiedLayerNormalization (ContribOperators.md). Shapes in brackets: B batch, S new tokens, T tokens with the past,
H hidden size.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporters.onnx.plan import FLOATS, ONNXPlan, Part, Weight
from xent_quant.formats.int_group import IntGroup

DATA_FILE = "model.onnx.data"
MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 21, 10
ELEMENTS = {
    "U8": TensorProto.UINT8,
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
}


class _Graph:
    """Collects nodes and initialisers. Node methods return the name of the first output, which is the node's name."""

    def __init__(self, plan: ONNXPlan) -> None:
        self.plan, self.model, self.settings = plan, plan.architecture, plan.settings
        self.element = ELEMENTS[FLOATS[plan.settings.onnx_dtype]]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def standard(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node of the ONNX standard."""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def microsoft(self, operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        """A node of ONNX Runtime's own."""
        node = helper.make_node(operator, inputs, list(outputs), name=outputs[0], domain=MICROSOFT, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, values: list[int] | int) -> str:
        """A small int64 constant, kept in the graph."""
        self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def stored(self, part: Part) -> str:
        """An initialiser in the data file."""
        tensor = onnx.TensorProto(
            name=part.name, data_type=ELEMENTS[part.type], dims=part.shape, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", DATA_FILE), ("offset", part.offset), ("length", part.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return part.name

    def weight(self, name: str) -> tuple[Weight, list[str]]:
        """A planned weight and the names of its initialisers."""
        weight = self.plan.weights[name]
        return weight, [self.stored(part) for part in weight.parts]


def build(plan: ONNXPlan) -> onnx.ModelProto:
    """The model, without the bytes of its data file: input_ids and attention_mask [B, S] and [B, T] int64, past keys and
    values [B, kv heads, past, head_dim] in; float32 logits [B, S, vocabulary] and present keys and values out."""
    graph = _Graph(plan)
    lengths = _lengths(graph)
    residual, update = _embedding(graph), None
    for layer in range(plan.architecture.num_layers):
        normed, residual = _norm(graph, residual, update, f"layers.{layer}.attention.norm")
        attended = _attention(graph, layer, normed, lengths)
        normed, residual = _norm(graph, residual, attended, f"layers.{layer}.mlp.norm")
        update = _mlp(graph, layer, normed)
    normed, _ = _norm(graph, residual, update, "norm")
    logits = _linear(graph, normed, "head")
    graph.standard("Cast", [logits], "logits", to=TensorProto.FLOAT)
    inputs, outputs = _interface(graph)
    body = helper.make_graph(graph.nodes, plan.architecture.model_type, inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="xent-quant")


def _interface(graph: _Graph) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    model = graph.model
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        value("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", "sequence", model.vocab_size])]
    for layer in range(model.num_layers):
        for kind in ("key", "value"):
            past, present = (["batch", model.num_kv_heads, length, model.head_dim] for length in ("past", "total"))
            inputs.append(value(f"past_key_values.{layer}.{kind}", graph.element, past))
            outputs.append(value(f"present.{layer}.{kind}", graph.element, present))
    return inputs, outputs


def _lengths(graph: _Graph) -> tuple[str, str]:
    """From the mask: index of each row's last token [B] int32, and the padded length T, int32. Rows may end in padding
    (right-padded), not begin with it."""
    one, axis = graph.constant("one", 1), graph.constant("last_axis", [1])
    counts = graph.standard("ReduceSum", ["attention_mask", axis], "token_counts", keepdims=0)
    last = graph.standard("Cast", [graph.standard("Sub", [counts, one], "last_index")], "last_index_32", to=TensorProto.INT32)
    shape = graph.standard("Shape", ["attention_mask"], "mask_shape")
    total = graph.standard("Gather", [shape, one], "total_length", axis=0)
    return last, graph.standard("Cast", [total], "total_length_32", to=TensorProto.INT32)


def _embedding(graph: _Graph) -> str:
    """[B, S] ids to [B, S, H]."""
    weight, stored = graph.weight("embedding")
    if not isinstance(weight.kind, IntGroup):
        return graph.standard("Gather", [stored[0], "input_ids"], "embedded", axis=0)
    return graph.microsoft(
        "GatherBlockQuantized",
        [stored[0], "input_ids", *stored[1:]],
        "embedded",
        bits=weight.kind.bits,
        block_size=weight.kind.group_size,
        gather_axis=0,
        quantize_axis=1,
    )


def _norm(graph: _Graph, residual: str, update: str | None, name: str) -> tuple[str, str]:
    """(RMS norm of residual + update, that sum)."""
    _, (scale,) = graph.weight(name)
    epsilon = graph.model.rms_norm_eps
    normed, total = f"{name}.normed", f"{name}.residual"
    if update is None:
        graph.standard("SimplifiedLayerNormalization", [residual, scale], normed, epsilon=epsilon, axis=-1, stash_type=1)
        return normed, residual
    graph.microsoft("SkipSimplifiedLayerNormalization", [residual, update, scale], normed, "", "", total, epsilon=epsilon)
    return normed, total


def _linear(graph: _Graph, x: str, name: str) -> str:
    """[..., in] times a weight [out, in] to [..., out]."""
    weight, stored = graph.weight(name)
    output = f"{name}.product"
    if not isinstance(weight.kind, IntGroup):
        return graph.microsoft("FusedMatMul", [x, stored[0]], output, transB=1)
    return graph.microsoft(
        "MatMulNBits",
        [x, *stored],
        output,
        K=weight.shape[1],
        N=weight.shape[0],
        bits=weight.kind.bits,
        block_size=weight.kind.group_size,
        accuracy_level=graph.settings.accuracy_level,
    )


def _attention(graph: _Graph, layer: int, x: str, lengths: tuple[str, str]) -> str:
    """Causal attention with rotary embedding and the KV cache inside, [B, S, H] to the same. q, k and v go in as one tensor, or
    apart where the first two are normed."""
    model, name = graph.model, f"layers.{layer}.attention"
    if layer == 0:
        for table in graph.plan.tables:
            graph.stored(table)
    cos, sin = graph.plan.tables
    past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
    present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    qkv = [_linear(graph, x, f"{name}.qkv"), "", ""]
    if model.qk_norm:
        qkv = _normed_qkv(graph, layer, qkv[0])
    mixed = graph.microsoft(
        "GroupQueryAttention",
        [*qkv, *past, *lengths, cos.name, sin.name],
        f"{name}.mixed",
        *present,
        num_heads=model.num_heads,
        kv_num_heads=model.num_kv_heads,
        scale=model.head_dim**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
    )
    return _linear(graph, mixed, f"{name}.output")


def _normed_qkv(graph: _Graph, layer: int, qkv: str) -> list[str]:
    """q, k and v apart, the first two normed head by head, or over their whole width."""
    model, name = graph.model, f"layers.{layer}.attention"
    parts = [f"{name}.{which}" for which in "qkv"]
    if layer == 0:
        graph.constant("qkv_sizes", [model.attention_size, model.kv_size, model.kv_size])
        if model.qk_norm == "head":
            graph.constant("heads_apart", [0, 0, -1, model.head_dim])
            graph.constant("heads_together", [0, 0, -1])
    graph.nodes.append(helper.make_node("Split", [qkv, "qkv_sizes"], parts, name=f"{name}.split", axis=-1))
    for index, part in enumerate(parts[:2]):
        _, (scale,) = graph.weight(f"{part}.norm")
        rows = graph.standard("Reshape", [part, "heads_apart"], f"{part}.heads") if model.qk_norm == "head" else part
        normed = f"{part}.normed"
        graph.standard("SimplifiedLayerNormalization", [rows, scale], normed, epsilon=model.rms_norm_eps, axis=-1, stash_type=1)
        if model.qk_norm == "head":
            normed = graph.standard("Reshape", [normed, "heads_together"], f"{part}.together")
        parts[index] = normed
    return parts


def _mlp(graph: _Graph, layer: int, x: str) -> str:
    """Experts plus shared experts, or the dense MLP, [B, S, H] to the same."""
    if not graph.model.num_experts:
        return _swiglu(graph, x, f"layers.{layer}.mlp")
    routed = _experts(graph, layer, x)
    if not graph.model.num_shared_experts:
        return routed
    shared = _swiglu(graph, x, f"layers.{layer}.shared")
    return graph.standard("Add", [routed, shared], f"layers.{layer}.mlp.sum")


def _swiglu(graph: _Graph, x: str, name: str) -> str:
    """down(silu(gate(x)) · up(x)); gate and up are one matrix."""
    gate, up = f"{name}.gate", f"{name}.up"
    both = _linear(graph, x, f"{name}.gate_up")
    graph.nodes.append(helper.make_node("Split", [both], [gate, up], name=f"{name}.split", axis=-1, num_outputs=2))
    sigmoid = graph.standard("Sigmoid", [gate], f"{name}.sigmoid")
    silu = graph.standard("Mul", [gate, sigmoid], f"{name}.silu")
    return _linear(graph, graph.standard("Mul", [silu, up], f"{name}.gated"), f"{name}.down")


def _experts(graph: _Graph, layer: int, x: str) -> str:
    """Route every token to its experts. The router is float32 whatever the graph computes in."""
    model, settings, name = graph.model, graph.settings, f"layers.{layer}.experts"
    _, (router,) = graph.weight(f"layers.{layer}.router")
    if layer == 0:
        graph.constant("rows_of_hidden", [-1, model.hidden_size])
    rows = graph.standard("Reshape", [x, "rows_of_hidden"], f"{name}.rows")
    wide = graph.standard("Cast", [rows], f"{name}.wide", to=TensorProto.FLOAT)
    logits = graph.standard("Gemm", [wide, router], f"{name}.logits", transB=1)
    weight, gate_up = graph.weight(f"{name}.gate_up")
    _, down = graph.weight(f"{name}.down")
    attributes: dict[str, Any] = {
        "k": model.experts_per_token,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": int(model.norm_topk_prob),
    }
    scores = graph.standard("Cast", [logits], f"{name}.scores", to=graph.element)
    if not isinstance(weight.kind, IntGroup):
        return graph.microsoft("MoE", [x, scores, gate_up[0], "", down[0]], f"{name}.sum", **attributes)
    inputs = [x, scores, *gate_up[:2], "", *down[:2]]
    if len(gate_up) > 2:
        inputs[11:] = ["", "", "", "", gate_up[2], down[2]]
    if not model.norm_topk_prob:
        # QMoE renormalises over the chosen experts whatever its attribute says; weights handed to it, it leaves alone.
        probabilities = graph.standard("Softmax", [logits], f"{name}.probabilities", axis=-1)
        inputs += [""] * (14 - len(inputs))
        inputs.append(graph.standard("Cast", [probabilities], f"{name}.routing_weights", to=graph.element))
    return graph.microsoft(
        "QMoE",
        inputs,
        f"{name}.sum",
        **attributes,
        expert_weight_bits=weight.kind.bits,
        block_size=weight.kind.group_size,
        weights_prepacked=0,  # the default means a layout of its own on CUDA
        accuracy_level=settings.accuracy_level,
    )
