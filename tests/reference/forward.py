"""XVERSE's forward pass in float64, one token and one expert at a time, written from the description of the model.

Slow on purpose; shares nothing with the project's own forward.
"""

import math
from typing import Any

import numpy as np


def forward(
    weights: dict[str, np.ndarray],
    config: dict[str, Any],
    ids: list[int],
    seen: dict[str, list[np.ndarray]] | None = None,
    gates: dict[str, list[float]] | None = None,
) -> np.ndarray:
    """Logits [len(ids), vocab] float64. `seen` collects the input rows of every weight, `gates` the gate of each row of the
    experts' weights."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = hidden // heads
    eps, theta = config["rms_norm_eps"], config["rope_theta"]

    def get(name: str) -> np.ndarray:
        return weights[name].astype(np.float64)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def rotate(vector: np.ndarray, position: int) -> np.ndarray:
        out = vector.copy()
        for i in range(size // 2):
            angle = position * theta ** (-2 * i / size)
            first, second = vector[i], vector[i + size // 2]
            out[i] = first * math.cos(angle) - second * math.sin(angle)
            out[i + size // 2] = second * math.cos(angle) + first * math.sin(angle)
        return out

    def see(name: str, row: np.ndarray) -> None:
        if seen is not None:
            seen.setdefault(name, []).append(row)

    def mlp(x: np.ndarray, prefix: str) -> np.ndarray:
        gate = get(prefix + "gate_proj.weight") @ x
        inner = gate / (1 + np.exp(-gate)) * (get(prefix + "up_proj.weight") @ x)
        see(prefix + "gate_proj.weight", x)
        see(prefix + "up_proj.weight", x)
        see(prefix + "down_proj.weight", inner)
        return get(prefix + "down_proj.weight") @ inner

    x = get("model.embed_tokens.weight")[ids]
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        normed = norm(x, get(base + "input_layernorm.weight"))
        q, k, v = (normed @ get(f"{base}self_attn.{n}_proj.weight").T for n in "qkv")
        mixed = np.zeros((len(ids), heads * size))
        for head in range(heads):
            source = head // (heads // kv_heads)
            keys = [rotate(k[t, source * size : (source + 1) * size], t) for t in range(len(ids))]
            for t in range(len(ids)):
                query = rotate(q[t, head * size : (head + 1) * size], t)
                scores = np.array([query @ keys[s] / math.sqrt(size) for s in range(t + 1)])
                scores = np.exp(scores - scores.max())
                scores /= scores.sum()
                mixed[t, head * size : (head + 1) * size] = scores @ v[: t + 1, source * size : (source + 1) * size]
        for t in range(len(ids)):
            for n in "qkv":
                see(f"{base}self_attn.{n}_proj.weight", normed[t])
            see(f"{base}self_attn.o_proj.weight", mixed[t])
        x = x + mixed @ get(base + "self_attn.o_proj.weight").T
        normed = norm(x, get(base + "post_attention_layernorm.weight"))
        for t in range(len(ids)):
            if not config.get("num_experts"):
                x[t] += mlp(normed[t], base + "mlp.")
                continue
            scores = get(base + "mlp.router.weight") @ normed[t]
            probabilities = np.exp(scores - scores.max())
            probabilities /= probabilities.sum()
            chosen = np.argsort(-probabilities, kind="stable")[: config["moe_top_k"]]
            total = probabilities[chosen].sum() if config.get("norm_topk_prob", True) else 1.0
            for e in chosen:
                for name in ("gate", "up", "down"):
                    if gates is not None:
                        gates.setdefault(f"{base}mlp.experts.{e}.{name}_proj.weight", []).append(probabilities[e] / total)
                x[t] += probabilities[e] / total * mlp(normed[t], f"{base}mlp.experts.{e}.")
            if config["num_shared_experts"]:
                x[t] += mlp(normed[t], base + "mlp.shared_experts.")
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    final = norm(x, get("model.norm.weight"))
    for row in final:
        see(head, row)
    return final @ get(head).T
