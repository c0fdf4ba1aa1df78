"""llama.cpp's names for a checkpoint's tensors, as GGUF files and importance matrices spell them.

Source: llama.cpp's src/llama-arch.cpp, architectures bailingmoe, granitemoe and xverse.
"""

import re

from xent_quant.checkpoint import architecture as names

OUTSIDE = {names.EMBEDDING: "token_embd", names.FINAL_NORM: "output_norm", names.HEAD: "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
    **{f"mlp.{kind}_proj": f"ffn_{kind}" for kind in names.PROJECTIONS},
    **{f"mlp.shared_experts.{kind}_proj": f"ffn_{kind}_shexp" for kind in names.PROJECTIONS},
    **{f"mlp.experts.{kind}_proj": f"ffn_{kind}_exps" for kind in names.PROJECTIONS},
}


def llama_name(name: str) -> tuple[str, int]:
    """Checkpoint tensor to (llama.cpp's tensor, index of the matrix in it): experts share a 3-D tensor, others have 0.

    A tied head is the embedding's tensor here; a GGUF file holds a second copy of it as output.weight. Raises KeyError
    for a name that is not XVERSE's.
    """
    if name in OUTSIDE:
        return f"{OUTSIDE[name]}.weight", 0
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if not match:
        raise KeyError(name)
    layer, part = match.groups()
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", part)
    if expert:
        return f"blk.{layer}.{INSIDE['mlp.experts.' + expert[2]]}.weight", int(expert[1])
    return f"blk.{layer}.{INSIDE[part]}.weight", 0
