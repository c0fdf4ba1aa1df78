"""What a GGUF says about its tokenizer, and writing it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf

from xent_quant.checkpoint.chat_template import ChatTemplate

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class TokenizerSpec:
    """Tokens by id with type and score, and for the models that merge by rank the merges (pairs, joined by a space).

    `model` is llama.cpp's: `gpt2` merges by rank within the words of `pre`, `llama` merges the best-scored pair, `t5` looks
    for the likeliest cut. `special`: key of a role in tokenizer.ggml.<role>_token_id to id.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    add_space_prefix: bool = False
    add_bos: bool = False
    add_eos: bool = False
    special: dict[str, int] = field(default_factory=dict)
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b""
    chat_template: ChatTemplate | None = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bound on the bytes that these keys take in the file."""
        templates = [self.chat_template] if isinstance(self.chat_template, str) else self.chat_template or []
        texts = (*self.tokens, *self.merges, *(str(template) for template in templates))
        return sum(len(text.encode()) + 16 for text in texts) + 8 * len(self.tokens) + len(self.charsmap) + 4096


def write(writer: gguf.GGUFWriter, spec: TokenizerSpec, _: Any = None) -> None:
    """Add every tokenizer key to the file."""
    writer.add_tokenizer_model(spec.model)
    writer.add_tokenizer_pre(spec.pre)
    writer.add_token_list([token.encode("utf-8") for token in spec.tokens])
    writer.add_token_types(list(spec.types))
    if spec.scores:
        writer.add_token_scores(list(spec.scores))
    if spec.model == "gpt2":
        writer.add_token_merges(list(spec.merges))
    if spec.model == "t5":
        writer.add_remove_extra_whitespaces(spec.remove_extra_whitespaces)
        if spec.charsmap:
            writer.add_precompiled_charsmap(spec.charsmap)
    writer.add_add_space_prefix(spec.add_space_prefix)
    writer.add_add_bos_token(spec.add_bos)
    writer.add_add_eos_token(spec.add_eos)
    for role, token in spec.special.items():
        add: Callable[[int], None] = getattr(writer, f"add_{role}_token_id")
        add(token)
    if spec.chat_template is not None:
        writer.add_chat_template(spec.chat_template)
