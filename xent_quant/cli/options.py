"""How the library's options (`xent_quant.options`) look on the command line: their names, groups and defaults."""

from typing import Annotated, Any

from cyclopts import Group, Parameter

from xent_quant.options import option_name

EXIT_OUT_OF_TOLERANCE = 3

Verbose = Annotated[int, Parameter(name=["-v", "--verbose"], count=True, help="Log what is done; -vv: tracebacks too.")]
Json = Annotated[bool, Parameter(help="Print the result to stdout as JSON.")]


def shown_default(value: Any) -> str | None:
    """A default as `--help` shows it; None where the text says it or the option is a flag."""
    if value is None or value is False or value == ():
        return None
    return ", ".join(value) if isinstance(value, tuple) else str(value)


EVERY = Parameter(
    name_transform=option_name,
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
