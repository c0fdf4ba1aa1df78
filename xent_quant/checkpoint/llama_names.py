"""llama.cpp's names for a model's tensors, as GGUF files and importance matrices spell them.

Source: llama.cpp's src/llama-arch.cpp; all families' architectures there call the same thing the same.
"""

from xent_quant.tensors import Role, TensorSpec

OUTSIDE = {Role.EMBEDDING: "token_embd", Role.NORM: "output_norm", Role.HEAD: "output"}
INSIDE = {
    Role.ATTENTION_Q: "attn_q",
    Role.ATTENTION_K: "attn_k",
    Role.ATTENTION_V: "attn_v",
    Role.ATTENTION_OUTPUT: "attn_output",
    Role.ROUTER: "ffn_gate_inp",
    Role.GATE: "ffn_gate",
    Role.UP: "ffn_up",
    Role.DOWN: "ffn_down",
}
NORMS = {"attention": "attn_norm", "mlp": "ffn_norm", "q": "attn_q_norm", "k": "attn_k_norm"}
HEAD = "output.weight"


def llama_name(tensor: TensorSpec) -> str:
    """llama.cpp's tensor that holds this one: experts share a 3-D tensor, in which each is the matrix of its number.

    A tied head is the embedding's tensor here; a GGUF file holds a second copy of it as HEAD.
    """
    if tensor.layer is None:
        return f"{OUTSIDE[tensor.role]}.weight"
    if tensor.normed:
        part = NORMS[tensor.normed]
    else:
        part = INSIDE[tensor.role] + ("_exps" if tensor.expert is not None else "_shexp" if tensor.shared else "")
    return f"blk.{tensor.layer}.{part}.weight"
