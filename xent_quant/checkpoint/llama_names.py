"""llama.cpp's names for a model's tensors, as GGUF files and importance matrices spell them.

Source: llama.cpp's src/llama-arch.cpp, architectures bailingmoe, granitemoe and xverse.
"""

from xent_quant.checkpoint import architecture as names
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
HEAD = "output.weight"


def llama_name(tensor: TensorSpec) -> str:
    """llama.cpp's tensor that holds this one: experts share a 3-D tensor, in which each is the matrix of its number.

    A tied head is the embedding's tensor here; a GGUF file holds a second copy of it as HEAD.
    """
    if tensor.layer is None:
        return f"{OUTSIDE[tensor.role]}.weight"
    if tensor.role is Role.NORM:
        part = "attn_norm" if tensor.name == names.input_norm(tensor.layer) else "ffn_norm"
    else:
        part = INSIDE[tensor.role] + ("_exps" if tensor.expert is not None else "_shexp" if tensor.shared else "")
    return f"blk.{tensor.layer}.{part}.weight"
