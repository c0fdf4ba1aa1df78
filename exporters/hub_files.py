"""The files of a Hub folder that say how to tokenise and generate, as exports that are folders carry them."""

import json
from typing import Any

from xent_quant.checkpoint.headers import read_json
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer, tokenizer_json

REPETITION_PENALTY = 1.1
COPIED = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}


def json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's defaults, and the repetition penalty that the model's authors generate with."""
    path, model = checkpoint.path / "generation_config.json", checkpoint.architecture
    tokens = {key: getattr(model, key) for key in ROLES.values() if getattr(model, key) is not None}
    given = read_json(path) if path.is_file() else {}
    return {**tokens, "repetition_penalty": REPETITION_PENALTY, **given}


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name to content: tokenizer.json in today's form, and settings with which AutoTokenizer takes it as it is.

    Raises CheckpointError where tokenizer.json is missing or damaged.
    """
    folder, model = checkpoint.path, checkpoint.architecture
    tokenizer, path = load_tokenizer(folder), folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if settings.pop("auto_map", None) or "tokenizer_class" not in settings:  # remote code that is not carried along
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for role, key in ROLES.items():
        index = getattr(model, key)
        token = None if index is None else tokenizer.id_to_token(index)
        if token is not None:
            settings.setdefault(role, token)
    return {
        "tokenizer.json": tokenizer_json(folder).encode(),
        "tokenizer_config.json": json_bytes(settings),
        **{name: (folder / name).read_bytes() for name in COPIED if (folder / name).is_file()},
    }
