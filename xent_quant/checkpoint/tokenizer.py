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

    path = folder / "tokenizer.json"
    value = read_json(path)
    for key in ("pre_tokenizer", "decoder"):
        _migrate(value.get(key))
    try:
        return Tokenizer.from_str(json.dumps(value))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer ({error}); download it again") from error


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
