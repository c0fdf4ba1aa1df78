"""Options that more than one command has."""

import re
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from xent_quant.errors import ConfigError

CALIBRATION = Group("Calibration", sort_key=2)

Verbose = Annotated[int, Parameter(name=["-v", "--verbose"], count=True, help="Log what is done; -vv: tracebacks too.")]
Json = Annotated[bool, Parameter(negative="", help="Print the result to stdout as JSON.")]

EXIT_OUT_OF_TOLERANCE = 3

Calib = Annotated[
    list[str],
    Parameter(
        group=CALIBRATION,
        negative="",
        consume_multiple=False,
        show_default=False,
        help="Text to calibrate on: .txt, .md, .jsonl, .parquet, a folder, a Hub data set, or a preset: entertainment (default), "
        "fiction, conversation, webcc, each with -en or -zh too; repeatable.",
    ),
]
CalibMix = Annotated[
    str | None,
    Parameter(group=CALIBRATION, help="Weights within presets, such as zh=3,webcc=0. Default: 3 for the model's own language."),
]
TextField = Annotated[str, Parameter(group=CALIBRATION, help="Field or column of .jsonl and .parquet that holds the text.")]
Tokens = Annotated[
    str,
    Parameter(
        group=CALIBRATION,
        help="Tokens to calibrate on, such as 500k; up to four times as many where the text has them and experts are too rare.",
    ),
]
SeqLen = Annotated[int, Parameter(group=CALIBRATION, help="Tokens of a calibration window.")]
Seed = Annotated[int, Parameter(group=CALIBRATION, help="Decides which of the documents are taken.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], Parameter(group=CALIBRATION, help="Where the model runs for calibration. auto: CUDA if any.")
]


def parse_tokens(text: str) -> int:
    """ "500k", "2M" or plain digits to a number, in powers of 1000 ("128k" is 128,000). Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip())
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"--tokens: {text!r} is not a number of tokens; write for example 500k")
    return int(float(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2].lower()])
