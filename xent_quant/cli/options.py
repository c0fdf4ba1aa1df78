"""How the library's options (`xent_quant.options`) look on the command line: their names, groups and defaults."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

import cyclopts
from cyclopts import Group, Parameter

from xent_quant.options import LETTERS, choices, chosen, option_name

EXIT_OUT_OF_TOLERANCE = 3

Verbose = Annotated[int, Parameter(name=["-v", "--verbose"], count=True, help="Log what is done; -vv: tracebacks too.")]
Threads = Annotated[int | None, Parameter(help="CPU threads. Default: all.")]
Json = Annotated[bool, Parameter(help="Print the result to stdout as JSON.")]


def shown_default(value: Any) -> str | None:
    """A default as `--help` shows it; None where the text says it or the option is a flag."""
    if value is None or value is False or value == ():
        return None
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def converted(hint: Any, tokens: Sequence[cyclopts.Token]) -> Any:
    """What was typed, as the value that it means. Raises ValueError, which cyclopts makes a usage error of. Stricter than
    cyclopts with numbers (4.5 is not 4), and less with choices (GGUF is gguf)."""
    if get_origin(hint) is tuple:
        return tuple(converted(get_args(hint)[0], (token,)) for token in tokens)
    (token,) = tokens
    if choices(hint):
        return chosen(hint, token.value)
    kinds = {hint, *get_args(hint)}
    if str in kinds:
        return token.value
    if int in kinds and not re.fullmatch(r"-?\d{1,18}", token.value):
        raise ValueError(f"{token.value}: give a whole number.")
    return cyclopts.convert(hint, (token.value,))


EVERY = Parameter(
    name_transform=option_name,
    converter=converted,
    short_alias=lambda field, _: LETTERS.get(field.name),
    negative_bool=(),
    negative_iterable=(),
    negative_none=(),
    consume_multiple=False,
    show_default=shown_default,
)
"""What holds for every option of every command."""


def group(title: str, order: int, **more: Any) -> Parameter:
    """For a parameter that is a dataclass of options: its fields are options of their own, under `title`."""
    return Parameter(name="*", group=Group(title, sort_key=order), **more)
