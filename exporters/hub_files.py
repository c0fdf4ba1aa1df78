"""The files of a Hub folder that say how to tokenise and generate, as exports that are folders carry them."""

import json
from typing import Any

from xent_quant.checkpoint import special_tokens
from xent_quant.checkpoint.chat_template import chat_template
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer, settings, tokenizer_json

COPIED = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
ROLES = ("bos", "eos", "pad")


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's defaults, and the repetition penalty that the family's authors generate with, if they have one."""
    folder, usual = checkpoint.path, checkpoint.architecture.family.repetition_penalty
    special = special_tokens.read(folder, load_tokenizer(folder), checkpoint.architecture.vocab_size)
    tokens: dict[str, Any] = {f"{role}_token_id": special.ids[role] for role in ROLES if role in special.ids}
    if len(special.ends) > 1:
        tokens["eos_token_id"] = list(special.ends)
    penalty = {} if usual is None else {"repetition_penalty": usual}
    return {**tokens, **penalty, **settings(folder, "generation_config.json")}


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name to content: tokenizer.json in today's form, and settings with which AutoTokenizer takes it as it is.

    Raises CheckpointError where it is missing or damaged.
    """
    folder = checkpoint.path
    tokenizer, config = load_tokenizer(folder), settings(folder, "tokenizer_config.json")
    if config.pop("auto_map", None) or "tokenizer_class" not in config:  # remote code that is not carried along
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = special_tokens.read(folder, tokenizer, checkpoint.architecture.vocab_size)
    for role in ROLES:
        token = tokenizer.id_to_token(special.ids[role]) if role in special.ids else None
        if token is not None and config.get(f"{role}_token") is None:
            config[f"{role}_token"] = token
    copied = [name for name in COPIED if (folder / name).is_file()]
    templates = chat_template(folder)
    if isinstance(templates, list):  # several: the folder of further ones is not carried along
        config["chat_template"] = templates
        copied = [name for name in copied if not name.startswith("chat_template")]
    return {
        "tokenizer.json": tokenizer_json(folder).encode(),
        "tokenizer_config.json": json_bytes(config),
        **{name: (folder / name).read_bytes() for name in copied},
    }
