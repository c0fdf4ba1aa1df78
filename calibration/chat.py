"""Conversations to text: through the model's own chat template, as transformers renders it, or as plain lines."""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from calibration.characters import one_line
from xent_quant.checkpoint.tokenizer import settings
from xent_quant.errors import CalibrationError

Message = dict[str, Any]
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names to the roles of chat templates."""

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LARGEST_TEMPLATE = 1 << 24


TODAY = datetime(2026, 11, 1)
"""For templates that print the day: the same text makes the same tokens on all of them."""


class Refused(Exception):
    """A conversation that the template does not take, with its reason."""


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages: objects with role (OpenAI) or from and value (ShareGPT)."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, dict) and ("role" in item or {"from", "value"} <= item.keys()) for item in value)
    )


def messages(value: list[Message]) -> tuple[list[Message], int]:
    """Messages with `role` and `content` a string, keys without a value left out; and how many parts were no text.

    Text parts of one message are joined by a line end, as vLLM does for templates that take strings.
    """
    made, dropped = [], 0
    for item in value:
        item = {key: part for key, part in item.items() if part is not None}
        if "role" not in item:
            speaker = str(item.pop("from", ""))
            item = {"role": SPEAKERS.get(speaker.lower(), speaker.lower()), "content": item.pop("value", ""), **item}
        content = item.get("content", "")
        if isinstance(content, list):
            texts = [part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict)]
            strings = [text for text in texts if isinstance(text, str)]
            dropped += len(content) - len(strings)
            content = "\n".join(strings)
        elif not isinstance(content, str):
            dropped += 1
            content = ""
        made.append({**item, "role": str(item["role"]) if "role" in item else "", "content": content})
    return made, dropped


def plain(conversation: list[Message]) -> str:
    """A line "Role: text" for every message; for models without a chat template."""
    return "\n".join(f"{item['role'].capitalize()}: {item['content']}" for item in conversation if item["content"])


class ChatTemplate:
    """The chat template in a model's folder: chat_template.jinja, else `chat_template` of tokenizer_config.json. Read when it is
    first asked for, so that it stands in nobody's way who has no conversations."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= {key: value for key, value in settings(self._folder, name).items() if value is not None}
        return config

    @cached_property
    def _source(self) -> str | None:
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            try:
                if file.stat().st_size > LARGEST_TEMPLATE:
                    raise CalibrationError(f"{file}: too large for a chat template; download it again")
                return file.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CalibrationError(f"{file}: cannot be read ({one_line(error)}); download it again") from error
        value = self._config.get("chat_template")
        if isinstance(value, list):
            named = {str(item.get("name")): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
        return value if isinstance(value, str) else None

    @property
    def there(self) -> bool:
        """Whether the model has one. Raises CalibrationError and CheckpointError for files that cannot be read."""
        return self._source is not None

    @cached_property
    def _tokens(self) -> dict[str, str]:
        tokens = {}
        for name in SPECIAL_TOKENS:
            token = self._config.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[f"{name}_token"] = token
        return tokens

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """`{% generation %}` marks what an assistant says; here it is text as any other."""

            tags = {"generation"}  # noqa: RUF012  (jinja2's own attribute)

            def parse(self, parser: Parser) -> list[nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.filters["tojson"] = tojson  # jinja2's escapes HTML
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = TODAY.strftime
        try:
            return environment.from_string(self._source or "")
        except (TemplateError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
            raise CalibrationError(
                f"{self._folder}: its chat template cannot be read ({one_line(error)}); correct it, or remove it for plain lines"
            ) from error

    def render(self, conversation: list[Message], longest: int) -> str:
        """The conversation as the model was trained on it, at most about `longest` characters. Raises Refused for what the
        template does not take, CalibrationError for a template that cannot be read."""
        template = self._template
        parts, size = [], 0
        try:
            for part in template.generate(
                messages=conversation, tools=None, documents=None, add_generation_prompt=False, **self._tokens
            ):
                parts.append(part)
                size += len(part)
                if size >= longest:
                    break
        except Exception as error:  # a template is a program: anything may come out of it
            raise Refused(one_line(error)) from error
        return "".join(parts)
