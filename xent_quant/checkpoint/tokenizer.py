"""A checkpoint's tokenizer through Hugging Face's tokenizers: the ids that every runtime has to reproduce.

tokenizer.json alone does not say everything: tokenizer_config.json (`added_tokens_decoder`), added_tokens.json and
special_tokens_map.json add tokens, or make tokens special, and transformers follows them. All of it is brought together here,
once, so that whoever reads the tokenizer sees one.
"""

import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent_quant.checkpoint import sentencepiece_model
from xent_quant.checkpoint.headers import DAMAGED, read_json
from xent_quant.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKEN = 65_536  # characters; the longest that tokenizers have are some hundred spaces
MAX_ID = 1 << 24
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
EVERY_BYTE = "".join(map(chr, (*range(1, 0x801), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x100001, 0x30000))))
"""Characters with every byte of UTF-8. Where one is no token and there is none for what is unknown, tokenizers raises."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_path(folder: Path) -> Path:
    """The file that a checkpoint folder's tokenizer comes from: tokenizer.json, else tokenizer.model."""
    path = folder / "tokenizer.json"
    return folder / "tokenizer.model" if not path.is_file() and (folder / "tokenizer.model").is_file() else path


def load_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a checkpoint folder, whole. Raises CheckpointError."""
    return from_value(tokenizer_path(folder), tokenizer_value(folder))


def from_value(path: Path, value: dict[str, Any]) -> "Tokenizer":
    """The tokenizer of what `tokenizer_value` returned for a file. Raises CheckpointError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(value, ensure_ascii=False))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics are not even that
        raise CheckpointError(f"{path}: not a tokenizer ({_one_line(error)}); {DAMAGED}") from error
    for token in value.get("added_tokens") or ():
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(
                f"{path}: added token {token['content']!r} has id {token['id']} in the file, "
                f"{tokenizer.token_to_id(token['content'])} once it is loaded; {DAMAGED}"
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        tokenizer.encode(EVERY_BYTE, add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{path}: there is text that it cannot tokenise ({_one_line(error)}); {DAMAGED}") from error
    return tokenizer


def _one_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:300]


def tokenizer_json(folder: Path) -> str:
    """The text of a checkpoint folder's tokenizer.json, whole and in today's form. Raises CheckpointError."""
    return json.dumps(tokenizer_value(folder), indent=2, ensure_ascii=False) + "\n"


def settings(folder: Path, name: str) -> dict[str, Any]:
    """An optional JSON file of a checkpoint folder; nothing where it is missing. Raises CheckpointError."""
    return read_json(folder / name) if os.path.lexists(folder / name) else {}


def content(token: Any) -> str | None:
    """The text of a token as special_tokens_map.json and tokenizer_config.json write it: a string or an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def tokenizer_value(folder: Path) -> dict[str, Any]:
    """tokenizer.json (else tokenizer.model) with fields of older versions migrated and the tokens of the other files added.

    Raises CheckpointError where it cannot be a tokenizer: what is checked here would make the library behind panic, or
    give a file that no runtime loads.
    """
    path = tokenizer_path(folder)
    value = read_json(path) if path.suffix == ".json" else sentencepiece_model.tokenizer_value(path)
    try:
        for key in ("pre_tokenizer", "decoder", "normalizer"):
            _migrate(value.get(key))
        vocab = vocabulary(value)
        _check(path, vocab, value)
        charsmap(value.get("normalizer"))
        value["added_tokens"] = _added_tokens(folder, value, vocab)
        _check_added(path, vocab, value["added_tokens"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a tokenizer ({type(error).__name__}: {_one_line(error)}); {DAMAGED}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply to be a tokenizer; {DAMAGED}") from error
    return value


def vocabulary(value: dict[str, Any]) -> dict[str, int]:
    """Token to id of a tokenizer.json's model, added tokens apart."""
    vocab = value["model"]["vocab"]
    return {entry[0]: index for index, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)


def charsmap(normalizer: Any) -> bytes:
    """The precompiled characters' map of a tokenizer.json's normalizer: the size of its double array, the array, and texts that
    end in a zero. Empty where there is none. Raises ValueError for what is no such map."""
    if not isinstance(normalizer, dict):
        return b""
    if normalizer.get("type") != "Precompiled":
        return next((found for part in normalizer.get("normalizers") or () if (found := charsmap(part))), b"")
    data = base64.b64decode(normalizer.get("precompiled_charsmap") or "", validate=True)
    size = int.from_bytes(data[:4], "little")
    if data and (size % 4 or not 0 < size < len(data) - 4 or data[-1]):
        raise ValueError("its precompiled_charsmap is damaged")
    return data


def _migrate(part: Any) -> None:
    """`add_prefix_space` of a Metaspace, which tokenizers before 0.19 wrote, to its `prepend_scheme`; in place.

    tokenizers still reads true, as "always", and refuses false.
    """
    if not isinstance(part, dict):
        return
    if part.get("type") == "Metaspace" and "prepend_scheme" not in part:
        part["prepend_scheme"] = "always" if part.pop("add_prefix_space", True) else "never"
    for key in ("pretokenizers", "decoders", "normalizers"):
        for nested in part.get(key, ()):
            _migrate(nested)


def _check(path: Path, vocab: dict[str, int], value: dict[str, Any]) -> None:
    by_id: dict[int, str] = {}
    listed = value["model"]["vocab"]
    if isinstance(listed, list) and len(vocab) != len(listed):
        raise CheckpointError(f"{path}: a token is listed twice in its vocabulary; {DAMAGED}")
    for token, index in vocab.items():
        _check_token(path, token, index)
        if by_id.setdefault(index, token) != token:
            raise CheckpointError(f"{path}: tokens {by_id[index]!r} and {token!r} share id {index}; {DAMAGED}")
    merges = value["model"].get("merges")
    if value["model"].get("type", "BPE") == "BPE" and not isinstance(merges, list):
        raise CheckpointError(f"{path}: not a tokenizer (no merges); {DAMAGED}")
    known, prefix = vocab.keys(), value["model"].get("continuing_subword_prefix") or ""
    for number, merge in enumerate(merges or ()):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if len(pair) != 2 or not (pair[0] in known and pair[1] in known and pair[0] + pair[1].removeprefix(prefix) in known):
            raise CheckpointError(
                f"{path}: merge {number}, {str(merge)[:80]!r}, is not of two tokens that make a third; {DAMAGED}"
            )


def _check_added(path: Path, vocab: dict[str, int], added: list[dict[str, Any]]) -> None:
    by_id = {index: token for token, index in vocab.items()}
    ids: dict[str, int] = dict(vocab)
    for token in added:
        text, index = token["content"], token["id"]
        _check_token(path, text, index)
        if by_id.setdefault(index, text) != text:
            raise CheckpointError(f"{path}: added token {text!r} has id {index}, which {by_id[index]!r} has too; {DAMAGED}")
        if ids.setdefault(text, index) != index:
            raise CheckpointError(f"{path}: added token {text!r} has id {index}, and elsewhere {ids[text]}; {DAMAGED}")


def _check_token(path: Path, token: Any, index: Any) -> None:
    if not isinstance(token, str) or isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < MAX_ID:
        raise CheckpointError(f"{path}: token {str(token)[:80]!r} has id {str(index)[:80]}, not one that a model has; {DAMAGED}")
    if len(token) > MAX_TOKEN:
        raise CheckpointError(f"{path}: token {index} is {len(token)} characters long; {DAMAGED}")
    try:
        token.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: token {index}, {token[:80]!r}, is not valid Unicode; {DAMAGED}") from None


def _added_tokens(folder: Path, value: dict[str, Any], vocab: dict[str, int]) -> list[dict[str, Any]]:
    """Every added token: tokenizer.json's, then those that only the other files name and whose id is known."""
    added = [dict.fromkeys(FLAGS, False) | token for token in value.get("added_tokens") or ()]
    ids = vocab | {token["content"]: token["id"] for token in added}
    config, roles = settings(folder, "tokenizer_config.json"), settings(folder, "special_tokens_map.json")
    named = [content(source.get(f"{role}_token")) for source in (config, roles) for role in ROLES]
    more = [*_list(config, "additional_special_tokens"), *_list(config, "extra_special_tokens")]
    special = {text for text in (*named, *map(content, (*more, *_list(roles, "additional_special_tokens")))) if text}
    others: dict[str, dict[str, Any]] = {}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        text = content(token)
        if text:
            flags = token if isinstance(token, dict) else {}
            others[text] = {"id": int(index), "content": text} | {flag: bool(flags.get(flag)) for flag in FLAGS}
    for text, index in settings(folder, "added_tokens.json").items():
        others.setdefault(text, {"id": index, "content": text} | dict.fromkeys(FLAGS, False) | {"special": text in special})
    for text in sorted(special & ids.keys(), key=ids.__getitem__):
        others.setdefault(text, {"id": ids[text], "content": text} | dict.fromkeys(FLAGS, False) | {"special": True})
    present = {token["content"] for token in added}
    for token in added:
        token["special"] = bool(token["special"]) or token["content"] in special
    added += [token for token in others.values() if token["content"] not in present]
    return sorted(added, key=lambda token: int(token["id"]))


def _list(source: dict[str, Any], key: str) -> list[Any]:
    found = source.get(key)
    return list(found) if isinstance(found, list) else []
