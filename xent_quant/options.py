"""Every choice that a person has, said once: keyword arguments of `xent_quant.quantize`, `calibrate` and `validate`, and the
command's options.

A field's docstring is its line in `--help`; the command only names the groups. Imports nothing heavy, so that `--help` answers
at once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from xent_quant.errors import ConfigError

REPEATABLE = {"formats": "format", "tensor_types": "tensor-type", "suites": "suite", "suite_files": "suite-file"}
"""Fields that are plural in Python, while each of the command's options names one."""


def option_name(field: str) -> str:
    """What the command calls a field: tensor_types is tensor-type."""
    return REPEATABLE.get(field, field.replace("_", "-"))


def _choices(hint: Any) -> tuple[object, ...]:
    """What a type with a Literal in it allows; nothing for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    inner = [choice for part in get_args(hint) for choice in _choices(part)]
    return (*inner, None) if inner and NoneType in get_args(hint) else tuple(inner)


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """Raises ConfigError, naming the option, for a value that is not among its field's choices."""

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            allowed, value = _choices(hint), getattr(self, field)
            for one in value if isinstance(value, list | tuple) else (value,):
                if allowed and one not in allowed:
                    there = ", ".join(str(choice) for choice in allowed if choice is not None)
                    raise ConfigError(f"--{option_name(field)} {one}: choose {there}")


def _quantity(option: str, text: int | str, base: int, what: str) -> int:
    """Digits, or digits with K, M, G or T in powers of `base`. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    number = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if number < 1:
        raise ConfigError(f"--{option}: {text!r} is not {what}")
    return number


@dataclass(frozen=True, kw_only=True)
class TargetOptions(_Choices):
    """What to make."""

    bits: Literal[2, 3, 4, 5, 6, 8, 16] = 4
    """Bits per weight, roughly; picks the mix."""
    formats: tuple[Literal["gguf", "onnx", "bnb"], ...] = ("gguf",)
    """File format; repeatable."""
    bnb_type: Literal["nf4", "fp4"] = "nf4"
    """bitsandbytes' type for 4 bits (--format bnb)."""
    effort: Literal["fast", "normal", "high"] = "normal"
    """How long to search for scales and codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.formats:
            raise ConfigError("--format: none given; there are gguf, onnx, bnb")


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(_Choices):
    """Text whose activations are measured."""

    calib: tuple[str, ...] = ()
    """Text or conversations to calibrate on: .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .epub, packed (.gz, .zst) or not, a folder, a Hub data set, or a preset: entertainment (default), fiction, conversation, webcc, each with -en or -zh too; repeatable."""  # noqa: E501  (--help keeps line ends)
    calib_mix: str | None = None
    """Weights within presets, such as zh=3,webcc=0. Default: 3 for the model's own language."""
    text_field: str = "text"
    """Field or column that holds the text; without it, the only one of messages and conversations."""
    tokens: int | str = "128k"
    """Tokens to calibrate on, such as 500k; up to four times as many where the text has them and experts are too rare."""
    seqlen: int = 512
    """Tokens of a calibration window."""
    seed: int = 0
    """Decides which of the documents are taken."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs for calibration. auto: CUDA if any."""
    memory: int | str | None = None
    """RAM to stay within, such as 6G; refused at once where that cannot be. Default: what is needed, see --dry-run."""

    @property
    def n_tokens(self) -> int:
        """`tokens` as a number: 128k is 128,000."""
        return _quantity("tokens", self.tokens, 1000, "a number of tokens; write for example 500k")

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes: 6G is 6 · 1024³."""
        return None if self.memory is None else _quantity("memory", self.memory, 1024, "a size; write for example 6G")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.memory_bytes
        if self.n_tokens and self.seqlen < 2:
            raise ConfigError(f"--seqlen {self.seqlen}: must be at least 2")


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions(CalibrationOptions):
    """How codes are chosen, and by what."""

    imatrix: Path | None = None
    """Importance matrix (llama-imatrix's GGUF format) to use instead of text."""
    method: Literal["auto", "rtn", "imatrix", "gptq"] = "auto"
    """rtn: no statistics; imatrix: importance of columns; gptq: error feedback. auto: gptq; with --imatrix, imatrix."""


@dataclass(frozen=True, kw_only=True)
class TensorOptions(_Choices):
    """Which type each tensor gets."""

    type: tuple[str, ...] = ()
    """A type or mix by its llama.cpp name (Q4_K_M), instead of --bits; repeatable: all from one pass."""
    tensor_types: tuple[str, ...] = ()
    """REGEX=TYPE on GGUF tensor names; repeatable, first match wins."""
    pad: Literal["auto", "never"] = "auto"
    """Zero-pad the expert width where that saves bytes; the function stays the same."""

    def __post_init__(self) -> None:
        given: Any = self.type
        if isinstance(given, str) or given is None:  # from Python one name will do
            object.__setattr__(self, "type", (given,) if given else ())
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(_Choices):
    """What only ONNX has."""

    onnx_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """What the graph computes in. bf16: GPUs only."""
    block_size: Literal[32, 64, 128] = 64
    """Weights that share a scale."""
    accuracy_level: Literal[0, 4] = 4
    """4: CPU kernels may round activations to INT8, faster. 0: exact."""
    symmetric: bool = True
    """Without or with a zero point for every block."""
    active_bits: Literal[4, 8, 16] | None = None
    """Bits of attention, shared experts, embedding and head. Default: 8, or 16 with --bits 16."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions(_Choices):
    """Where and how to write."""

    output: Path = Path("out")
    """Folder for the results."""
    name: str | None = None
    """Name of the model in file names. Default: the model's own."""
    split_size: int | str | None = None
    """Split into shards of at most this size, e.g. 4G."""
    allow_tokenizer_mismatch: bool = False
    """Export a tokenizer that llama.cpp cannot reproduce exactly; say where."""
    threads: int | None = None
    """CPU threads. Default: all."""
    force: bool = False
    """Replace existing output."""
    restart: bool = False
    """Begin anew instead of going on with what an interrupted run left."""

    @property
    def split_bytes(self) -> int | None:
        """`split_size` in bytes: 4G is 4 · 1024³."""
        return (
            _quantity("split-size", self.split_size, 1024, "a size; write for example 4G or 500M")
            if self.split_size is not None
            else None
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.split_bytes


@dataclass(frozen=True, kw_only=True)
class Options(OutputOptions, OnnxOptions, TensorOptions, StatisticsOptions, TargetOptions):
    """Everything that `xent_quant.quantize` takes; paths may be strings, and tuples lists. Fields begin with the last base's."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(_Choices):
    """What is scored."""

    suites: tuple[str, ...] = ()
    """A bundled suite, XfictionZH for example; repeatable. Default: all six."""
    suite_files: tuple[str, ...] = ()
    """NAME=PATH of a UTF-8 text of your own; repeatable."""
    max_tokens: int | None = 20480
    """Tokens of each suite, at most; the bundled ones have two to four times as many."""
    context: int = 512
    """Length of the windows, of which the second half is scored."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(_Choices):
    """How it is judged."""

    tolerance: str | None = None
    """8bit, 6bit, 5bit, 4bit, 3bit, 2bit, or ppl=1.03,kld=0.03,top1=0.92. Default: by the file's bits."""
    runtime: Literal["auto", "llama.cpp", "onnxruntime", "transformers", "torch"] = "auto"
    """What runs the export. torch: the exact path, weights dequantised and streamed, for what does not fit."""
    threads: int | None = None
    """CPU threads. Default: all."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(JudgeOptions, SuiteOptions):
    """Everything that `xent_quant.validate` takes."""


Function = TypeVar("Function", bound=Callable[..., Any])


def takes(kind: type[_Choices]) -> Callable[[Function], Function]:
    """Marks a function whose **options are the fields of `kind`: `help()` shows them with their defaults."""

    def mark(function: Function) -> Function:
        own = signature(function)
        named = [parameter for parameter in own.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
        shown = own.replace(parameters=[*named, *signature(kind).parameters.values()])
        setattr(function, "__signature__", shown)  # noqa: B010  (mypy knows no such attribute)
        return function

    return mark
