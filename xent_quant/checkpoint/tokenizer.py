"""A checkpoint's tokenizer through Hugging Face's tokenizers: the ids that every runtime has to reproduce."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent_quant.checkpoint.headers import read_json
from xent_quant.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(folder: Path) -> "Tokenizer":
    """tokenizer.json of a checkpoint folder, fields of older versions migrated. Raises CheckpointError."""
    from tokenizers import Tokenizer

    text = tokenizer_json(folder)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error}); download it again") from error


def tokenizer_json(folder: Path) -> str:
    """The text of a checkpoint folder's tokenizer.json, fields of older versions migrated. Raises CheckpointError."""
    value = read_json(folder / "tokenizer.json")
    for key in ("pre_tokenizer", "decoder"):
        _migrate(value.get(key))
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _migrate(part: Any) -> None:
    """`add_prefix_space` of a Metaspace, which tokenizers before 0.19 wrote, to its `prepend_scheme`; in place.

    tokenizers still reads true, as "always", and refuses false.
    """
    if not isinstance(part, dict):
        return
    if part.get("type") == "Metaspace" and "prepend_scheme" not in part:
        part["prepend_scheme"] = "always" if part.pop("add_prefix_space", True) else "never"
    for nested in (*part.get("pretokenizers", ()), *part.get("decoders", ())):
        _migrate(nested)
