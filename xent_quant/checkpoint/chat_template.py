"""A checkpoint's chat template, wherever it lies: tokenizer_config.json, chat_template.jinja, chat_template.json, and the
folders of further ones. In the order of llama.cpp's own converter."""

from pathlib import Path
from typing import Any

from xent_quant.checkpoint.headers import DAMAGED
from xent_quant.checkpoint.tokenizer import settings
from xent_quant.errors import CheckpointError

LARGEST = 1 << 24
"""Bytes of a template."""
FOLDERS = ("additional_chat_templates", "chat_templates")

ChatTemplate = str | list[dict[str, str]]


def chat_template(folder: Path) -> ChatTemplate | None:
    """One template, or several as {name, template}, or None. Raises CheckpointError where a file cannot be one."""
    found = settings(folder, "tokenizer_config.json").get("chat_template")
    if found is not None:
        return _checked(folder / "tokenizer_config.json", found)
    path = folder / "chat_template.jinja"
    main = _text(path) if path.is_file() else None
    others = [
        {"name": file.stem, "template": _text(file)} for name in FOLDERS for file in sorted((folder / name).glob("*.jinja"))
    ]
    if others:
        return [*([{"name": "default", "template": main}] if main is not None else []), *others]
    if main is not None:
        return main
    found = settings(folder, "chat_template.json").get("chat_template")
    return None if found is None else _checked(folder / "chat_template.json", found)


def _text(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"{path}: too large for a chat template; {DAMAGED}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error}); {DAMAGED}") from error


def _checked(path: Path, found: Any) -> ChatTemplate:
    if isinstance(found, dict):
        found = [{"name": name, "template": template} for name, template in found.items()]
    if isinstance(found, str):
        templates = [found]
    elif isinstance(found, list) and all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in found):
        templates = [item.get("template") for item in found]
    else:
        raise CheckpointError(f"{path}: chat_template is neither a text nor a list of name and template; {DAMAGED}")
    try:
        if all(isinstance(template, str) and template.encode() is not None for template in templates):
            result: ChatTemplate = found
            return result
    except UnicodeEncodeError:
        pass
    raise CheckpointError(f"{path}: a chat_template is not a text; {DAMAGED}")
