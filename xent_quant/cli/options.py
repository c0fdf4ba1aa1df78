"""Options that every command has."""

from typing import Annotated

from cyclopts import Parameter

Verbose = Annotated[int, Parameter(name=["-v", "--verbose"], count=True, help="Log what is done; -vv: tracebacks too.")]
Json = Annotated[bool, Parameter(negative="", help="Print the result to stdout as JSON.")]

EXIT_OUT_OF_TOLERANCE = 3
