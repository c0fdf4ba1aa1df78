"""Every choice that a person has, said once: keyword arguments of `xent_quant.quantize`, `calibrate` and `validate`, and the
command's options.

A field's docstring is its line in `--help`; the command only names the groups. Imports nothing heavy, so that `--help` answers
at once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from inspect import Parameter, signature
from math import inf
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from xent_quant.errors import ConfigError

REPEATABLE = {"formats": "format", "tensor_types": "tensor-type", "suites": "suite", "suite_files": "suite-file"}
"""Fields that are plural in Python, while each of the command's options names one."""

LETTERS = {"output": "-o"}
"""Fields that the command knows by a letter too."""


def option_name(field: str) -> str:
    """What the command calls a field: tensor_types is tensor-type."""
    return REPEATABLE.get(field, field.replace("_", "-"))


def choices(hint: Any) -> tuple[object, ...]:
    """What a type with a Literal in it allows; nothing for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    inner = [choice for part in get_args(hint) for choice in choices(part)]
    return (*inner, None) if inner and NoneType in get_args(hint) else tuple(inner)


def chosen(hint: Any, value: object) -> Any:
    """The choice that a value means, whatever its case; a name, where `hint` allows any. Raises ValueError listing choices."""
    for choice in choices(hint):
        if str(choice).casefold() == str(value).casefold():
            return choice
    if str in get_args(hint) and str(value)[:1].isalpha():
        return value
    raise ValueError(f"{value}: choose {', '.join(str(choice) for choice in choices(hint) if choice is not None)}.")


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """Knows which of its fields were given. Raises ConfigError, naming the option, for a value that is not among its field's
    choices."""

    def __new__(cls, **given: Any) -> Self:
        made = super().__new__(cls)
        made.__dict__["_given"] = tuple(given)
        return made

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were given, be it with the value that they have by default."""
        return {field: getattr(self, field) for field in self.__dict__["_given"]}

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            value, several = getattr(self, field), get_origin(hint) is tuple
            if several and (isinstance(value, str) or not value):  # from Python one name will do
                value = (value,) if value else ()
            if choices(hint):
                try:
                    value = tuple(chosen(hint, one) for one in value) if several else chosen(hint, value)
                except ValueError as error:
                    raise ConfigError(f"--{option_name(field)} {str(error).rstrip('.')}") from None
            object.__setattr__(self, field, value)


def _quantity(option: str, text: int | str, base: int, what: str) -> int:
    """Digits, or a number with K, M, G or T in powers of `base`; KB to TB are powers of 1000. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,18})|(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT])(i?B)?", str(text).strip(), re.IGNORECASE)
    number = 0
    if match:
        base = 1000 if (match[4] or "").upper() == "B" else base
        number = int(match[1]) if match[1] else int(float(match[2]) * base ** " KMGT".index(match[3].upper()))
    if number < 1:
        raise ConfigError(f"--{option}: {str(text)[:40]!r} is not {what}")
    return number


def _bandwidth(option: str, text: str) -> float:
    """Bytes a second: a number with GB/s or TB/s, or of GB/s. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(?:([GT])(?:B(?:/s)?)?)?", str(text).strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ConfigError(f"--{option}: {str(text)[:40]!r} is not a bandwidth; write for example 360GB/s")
    return float(match[1]) * (1e12 if (match[2] or "G").upper() == "T" else 1e9)


AUTO = "auto"
"""What asks this machine, of --fit and --ram."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions(_Choices):
    """What to make."""

    bits: Literal[2, 3, 4, 5, 6, 8, 16] | str = 4
    """Bits per weight, roughly; picks the mix, for a mixture of experts XENT4 and the like. Or the name of one, as --type."""
    formats: tuple[Literal["gguf", "onnx", "bnb"], ...] = ("gguf",)
    """File format; repeatable."""
    bnb_type: Literal["nf4", "fp4"] = "nf4"
    """bitsandbytes' type for 4 bits (--format bnb)."""
    effort: Literal["fast", "normal", "high"] = "normal"
    """How long to search for scales and codes."""
    drop_experts: int | str | None = None
    """Leave out so many experts of each layer, such as 16 or 25%: those that matter least to the calibration text."""

    def experts_dropped(self, experts: int) -> int:
        """How many of a layer's `experts` are left out; a share is rounded down. Raises ConfigError."""
        match = re.fullmatch(r"(\d{1,9})|(\d{1,2}(?:\.\d{1,9})?)\s*%", str(self.drop_experts).strip())
        if not match or not float(match[1] or match[2]):
            raise ConfigError(
                f"--drop-experts: {str(self.drop_experts)[:40]!r} is neither a number of experts nor a share of them; "
                "write for example 16 or 25%"
            )
        return int(match[1]) if match[1] else int(experts * Fraction(match[2]) / 100)

    @property
    def n_bits(self) -> int:
        """`bits` as a number; the default where they name a type."""
        return 4 if isinstance(self.bits, str) else self.bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.formats:
            raise ConfigError("--format: none given; there are gguf, onnx, bnb")
        if self.drop_experts is not None:
            self.experts_dropped(0)
        object.__setattr__(self, "formats", tuple(dict.fromkeys(self.formats)))


_GPU = r"(torch-cpu|mps|(cuda|xpu)(:\d{1,2})?)"
DEVICES = rf"auto|cpu|{_GPU}(,{_GPU})*"
"""Names of --device; torch-cpu is the devices' code on the CPU, for tests."""


@dataclass(frozen=True, kw_only=True)
class TextOptions(_Choices):
    """Text whose activations are measured."""

    calib: tuple[str, ...] = ()
    """Text or conversations to calibrate on: .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, .epub, packed (.gz, .zst) or not, a folder, a Hub data set, or a preset: entertainment (default), fiction, conversation, webcc, each with -en or -zh too, and with hub: before it from the Hub; repeatable."""  # noqa: E501  (--help keeps line ends)
    calib_mix: str | None = None
    """Weights of presets, and of bundled text beside yours, such as zh=3,webcc=0. Default: 1; en=3 if it knows little Chinese."""
    text_field: str = "text"
    """Field or column that holds the text; without it, the only one of messages and conversations."""
    tokens: int | str = "128k"
    """Tokens to calibrate on, such as 500k; for importance alone up to four times as many, where experts are too rare."""
    seqlen: int = 512
    """Tokens of a calibration window."""
    seed: int = 0
    """Decides which of the documents are taken."""

    @property
    def n_tokens(self) -> int:
        """`tokens` as a number: 128k is 128,000."""
        return _quantity("tokens", self.tokens, 1000, "a number of tokens; write for example 500k")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_tokens and self.seqlen < 2:
            raise ConfigError(f"--seqlen {self.seqlen}: must be at least 2")


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(TextOptions):
    """Text that a model's sensitivity is measured on."""

    tokens: int | str = "16k"
    """Tokens to measure on, such as 64k."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(TextOptions):
    """Text to calibrate on, and where."""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] | str = "auto"
    """Where the model runs for calibration and codes are chosen. cuda is all cards like the first, cuda:1 the second alone, cuda:0,cuda:2 are two. auto: CUDA or XPU if any."""  # noqa: E501
    vram: int | str | None = None
    """Memory of each device to stay within, such as 8G; refused at once where that cannot be. Default: most of what is free."""
    memory: int | str | None = None
    """RAM to stay within, such as 6G; refused at once where that cannot be. Default: what is needed, see --dry-run."""

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes: 6G is 6 · 1024³."""
        return None if self.memory is None else _quantity("memory", self.memory, 1024, "a size; write for example 6G")

    @property
    def vram_bytes(self) -> int | None:
        """`vram` in bytes: 8G is 8 · 1024³."""
        return None if self.vram is None else _quantity("vram", self.vram, 1024, "a size; write for example 8G")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.memory_bytes
        if not re.fullmatch(DEVICES, self.device):
            raise ConfigError(f"--device {self.device[:40]}: choose auto, cpu, cuda, cuda:1, cuda:0,cuda:1, xpu or mps")
        if self.vram_bytes is not None and self.device == "cpu":
            raise ConfigError(f"--vram {self.vram}: has no effect with --device cpu; drop it, or use --memory")


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
    size: int | str | None = None
    """Instead of --bits: the best file of at most this size, such as 12GiB, planned tensor by tensor (of a folder: its files)."""
    max_kl: float | None = None
    """Instead of --bits: the smallest file whose expected KL divergence is at most so many nats per token, such as 0.01."""
    fit: int | str | None = None
    """Instead of --bits: the best file that runs on a GPU with so much memory, such as 16GiB, KV cache and buffers included. auto: this machine's."""  # noqa: E501  (--help keeps line ends)
    ram: int | str | None = None
    """RAM beside it, such as 32GiB, where the experts of some layers stay if need be (--n-cpu-moe of llama.cpp); without --fit, RAM for all of it. auto: this machine's. GGUF only."""  # noqa: E501
    speed: float | None = None
    """Tokens per second that the memories' bandwidth must allow (--fit, --ram of GGUF). Default: with --ram, what makes half the loss worth twice the time; without, any."""  # noqa: E501
    vram_bandwidth: str | None = None
    """Of the GPU's memory (GGUF). Default: the card's own with --fit auto where it is known; 360GB/s, an RTX 3060's."""
    ram_bandwidth: str | None = None
    """Of RAM. Default: measured with auto; 51.2GB/s, two channels of DDR4-3200."""
    context: int | None = None
    """Tokens of context that must fit beside it (--fit, --ram). Default: 8192, or the model's where that is less."""
    kv: Literal["f16", "q8_0"] = "f16"
    """Type of the KV cache (--fit, --ram of GGUF)."""
    sensitivity: Path | None = None
    """What a plan stands on: a file that `xent-quant sensitivity` wrote. Default: this model's own where it was measured here, else what was measured on the bundled miniature."""  # noqa: E501  (--help keeps line ends)
    pad: Literal["auto", "never"] = "auto"
    """Zero-pad the expert width where that saves bytes; the function stays the same."""

    @property
    def size_bytes(self) -> int | None:
        """`size` in bytes: 12GiB is 12 · 1024³."""
        return None if self.size is None else _quantity("size", self.size, 1024, "a size; write for example 12GiB")

    @property
    def fit_bytes(self) -> int | None:
        """`fit` in bytes; None where this machine is to be asked."""
        return None if self.fit in (None, AUTO) else _quantity("fit", self.fit, 1024, "a size; write for example 16GiB, or auto")

    @property
    def ram_bytes(self) -> int | None:
        """`ram` in bytes; None where this machine is to be asked."""
        return None if self.ram in (None, AUTO) else _quantity("ram", self.ram, 1024, "a size; write for example 32GiB, or auto")

    @property
    def bandwidths(self) -> dict[str, float]:
        """Those that are given, in bytes a second."""
        given = {field: getattr(self, field) for field in ("vram_bandwidth", "ram_bandwidth")}
        return {field: _bandwidth(option_name(field), value) for field, value in given.items() if value is not None}

    @property
    def planned(self) -> str:
        """What a plan is called in files' names, by what bounds it; nothing where types follow a recipe."""
        if self.max_kl is not None:
            return f"KL{self.max_kl:g}"
        bounds = {"": self.size, "fit": self.fit, "ram": self.ram, "speed": self.speed}
        return "-".join(f"{name}{''.join(str(value).split())}" for name, value in bounds.items() if value is not None)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.size_bytes, self.fit_bytes, self.ram_bytes, self.bandwidths
        if self.speed is not None and not 0 < self.speed < inf:
            raise ConfigError(f"--speed {self.speed:g}: must be above 0, such as 10 tokens per second")
        if self.context is not None and self.context < 1:
            raise ConfigError(f"--context {self.context}: must be at least 1")
        if self.max_kl is not None and not 0 < self.max_kl < inf:
            raise ConfigError(f"--max-kl {self.max_kl:g}: must be above 0, such as 0.01")


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
    """Folder for the results; or the one GGUF file to write, such as out/model.gguf."""
    name: str | None = None
    """Name of the model in file names. Default: the model's own."""
    split_size: int | str | None = None
    """Split into shards of at most this size, e.g. 4G."""
    allow_tokenizer_mismatch: bool = False
    """Export a tokenizer that llama.cpp cannot reproduce exactly; say where."""
    threads: int | None = None
    """CPU threads. Default: all."""
    ray: str | None = None
    """Machines that help, as a Ray cluster: its address, such as 10.0.0.1:6379, or auto, the one that this machine belongs to."""
    force: bool = False
    """Replace existing output."""
    restart: bool = False
    """Begin anew instead of going on with what an interrupted run left."""

    @property
    def file(self) -> Path | None:
        """`output` where it names a file rather than a folder."""
        path = Path(self.output)
        return path if path.suffix.lower() in FILES and not path.is_dir() else None

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.file.parent if self.file else Path(self.output)

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
    """Everything that `xent_quant.quantize` takes; paths may be strings, and tuples lists. Fields begin with the last base's.

    Raises ConfigError for an option that would have no effect, by NEEDS.
    """

    @property
    def mixes(self) -> tuple[str, ...]:
        """Types and mixes that are asked for by name, as they were typed."""
        return self.type or ((self.bits,) if isinstance(self.bits, str) else ())

    @property
    def quantised(self) -> tuple[str, ...]:
        """Formats of which a method chooses codes: floats are only rounded, and bitsandbytes' codes follow from the weights alone
        unless --method gptq is asked for."""
        named = (*self.mixes, *(rule.rpartition("=")[2] for rule in self.tensor_types))
        gguf = not self.mixes or any(name.upper() not in FLOATS for name in named)
        onnx = self.n_bits < 16 or self.active_bits in (4, 8)
        chosen = {"gguf": gguf, "onnx": onnx, "bnb": self.n_bits < 16 and self.method == "gptq"}
        return tuple(kind for kind in self.formats if chosen[kind])

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {field.name: field.default for field in fields(self)}
        if self.ray is not None and self.device == "auto":
            object.__setattr__(self, "device", "cpu")
        for field, value in self.given.items():
            unsaid = value is None or value == "auto" == defaults[field] or (value is False and not defaults[field])
            if unsaid or (isinstance(value, list | tuple) and not value):
                continue
            for need in NEEDS.get(field, ()):
                if why := need(self):
                    raise ConfigError(f"{_typed(field, value)}: has no effect {why}")
        if self.file:
            kinds = f"--format {', '.join(self.formats)}" if self.formats != ("gguf",) else ""
            several = kinds or ("several --type" if len(self.mixes) > 1 else "--split-size" if self.split_size else "")
            if several or self.file.suffix.lower() != ".gguf":
                raise ConfigError(
                    f"--output {self.output}: names one file, and {several or 'GGUF'} writes others; "
                    f"name the folder that they go to, --output {self.folder}"
                )


FILES = (".gguf", ".onnx", ".safetensors")
"""Endings of --output that a person means a file by."""

FLOATS = ("F32", "F16", "BF16")
"""Types of which nothing is chosen."""


def _typed(field: str, value: object) -> str:
    """An option as it is typed; --asymmetric is what sets symmetric to False."""
    if isinstance(value, bool):
        return f"--{'' if value else 'a'}{option_name(field)}"
    return f"--{option_name(field)} {value[0] if isinstance(value, list | tuple) else value}"


Need = Callable[[Options], str]
"""What must be so for an option to have an effect: why it has none, and what to type; nothing where it has."""


def _only(*formats: str, instead: str = "drop it") -> Need:
    """An option of these formats."""

    def need(options: Options) -> str:
        if set(formats) & set(options.formats):
            return ""
        return f"with --format {', '.join(options.formats)}; {instead}, or use --format {' or '.join(formats)}"

    return need


def _quantised(options: Options) -> str:
    """An option of methods."""
    if options.quantised:
        return ""
    if options.formats == ("bnb",) and options.n_bits < 16:
        return (
            "with --format bnb, whose codes follow from the weights alone; drop it, use --method gptq, or --format gguf or onnx"
        )
    return "where weights are only rounded to floats; drop it, or choose fewer bits"


def _statistics(options: Options) -> str:
    """An option of methods that take statistics."""
    return "with --method rtn, which takes no statistics; drop one of them" if options.method == "rtn" else ""


def _text(options: Options) -> str:
    """An option of calibration text."""
    return "beside --imatrix, which is used instead of text; drop one of them" if options.imatrix is not None else ""


def _unless_dropping(need: Need) -> Need:
    """An option of calibration text, which is run for --drop-experts whatever the method."""
    return lambda options: "" if options.drop_experts is not None else need(options)


def _unless_dropping_by_cpu(need: Need) -> Need:
    """An option of devices, which find no experts to drop where nothing else is measured."""
    return lambda options: "" if options.drop_experts is not None and options.device == "cpu" else need(options)


def _no_hessian(options: Options) -> str:
    if options.method != "gptq":
        return ""
    return "with --method gptq, which a file of importance does not serve; drop it, or use --method imatrix"


def _bits(options: Options) -> str:
    named = isinstance(options.bits, str)
    if named and (why := _only("gguf", instead="give bits as a number")(options)):
        return why
    return "beside --type; drop one of them" if options.type and (named or options.formats == ("gguf",)) else ""


def _planned(field: str) -> Need:
    """An option that chooses types, where a plan does; a number of bits says which of bitsandbytes' kinds."""

    def need(options: Options) -> str:
        bounds = {"size": options.size, "fit": options.fit, "ram": options.ram, "max-kl": options.max_kl}
        by = next((name for name, value in bounds.items() if value is not None), field)
        elsewhere = field == "bits" and options.bits in (4, 8) and "bnb" in options.formats
        no_effect = field != by and not elsewhere and (field, by) != ("ram", "fit")
        return f"beside --{by}, which chooses the types; drop one of them" if no_effect else ""

    return need


def _for_a_gpu(options: Options) -> str:
    """A plan for RAM alone."""
    others = ", ".join(name for name in options.formats if name != "gguf")
    no_budget = options.fit is None and others
    return f"with --format {others}, planned for a GPU's memory; add --fit, or use --format gguf" if no_budget else ""


def _plan(options: Options) -> str:
    """What plans stand on."""
    return "" if options.planned else "without --size, --max-kl, --fit or --ram; add one of them"


def _machine(options: Options) -> str:
    """An option of plans for a machine."""
    return "" if options.fit is not None or options.ram is not None else "without --fit or --ram"


def _fit(options: Options) -> str:
    return "" if options.fit is not None else "without --fit"


def _ram(options: Options) -> str:
    return "" if options.ram is not None else "without --ram"


def _one_machine(options: Options) -> str:
    """What is of one machine alone."""
    return "" if options.ray is None else "beside --ray, since Ray's object store and workers take what it gives them; drop one"


def _cpu(options: Options) -> str:
    return "" if options.device == "cpu" else f"with --device {options.device}, where no worker computes; drop one of them"


def _effort(options: Options) -> str:
    if options.effort == "fast":  # so it is without a search too
        return ""
    rtn = "with --method rtn, which does not search; drop one of them" if options.method == "rtn" else ""
    return _quantised(options) or rtn


def _method(options: Options) -> str:
    return "" if options.method == "rtn" else _quantised(options)  # which bitsandbytes and floats do anyway


def _four_bits(options: Options) -> str:
    return "" if options.n_bits == 4 else f"with --bits {options.n_bits}; drop one of them"


def _blocks(options: Options) -> str:
    if "onnx" in options.quantised:
        return ""
    return "with --bits 16, where no weights share a scale; drop it, or give --active-bits 8"


NEEDS: dict[str, tuple[Need, ...]] = {
    "bits": (_planned("bits"), _bits),
    "fit": (_planned("fit"),),
    "max_kl": (_planned("max-kl"),),
    "ram": (_for_a_gpu, _only("gguf"), _planned("ram")),
    "context": (_machine,),
    **dict.fromkeys(("kv", "speed"), (_machine, _only("gguf"))),
    "vram_bandwidth": (_fit, _only("gguf")),
    "ram_bandwidth": (_ram,),
    "sensitivity": (_plan,),
    "bnb_type": (_only("bnb"), _four_bits),
    "effort": (_effort,),
    "drop_experts": (_text,),
    **dict.fromkeys(
        ("calib", "calib_mix", "text_field", "tokens", "seqlen", "seed"),
        tuple(map(_unless_dropping, (_quantised, _statistics, _text))),
    ),
    **dict.fromkeys(("device", "vram"), tuple(map(_unless_dropping_by_cpu, (_quantised, _statistics, _text)))),
    "imatrix": (_quantised, _statistics, _no_hessian),
    "method": (_method,),
    "type": (_only("gguf", instead="give --bits instead"), _planned("type")),
    "tensor_types": (_only("gguf"), _planned("tensor-type")),
    "pad": (_only("gguf", "bnb"),),
    "memory": (_one_machine,),
    "ray": (_cpu,),
    "onnx_dtype": (_only("onnx"),),
    **dict.fromkeys(("block_size", "accuracy_level", "symmetric"), (_only("onnx"), _blocks)),
    "active_bits": (_only("onnx"), _planned("active-bits")),
    "split_size": (_only("gguf", "bnb"),),
    "allow_tokenizer_mismatch": (_only("gguf"),),
}
"""By field, what an option needs to have an effect, the first that is missing being told; the others always have one."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(_Choices):
    """What is scored."""

    suites: tuple[str, ...] = ()
    """A bundled suite, XfictionZH for example; repeatable. Default: all six."""
    suite_files: tuple[str, ...] = ()
    """NAME=PATH of a UTF-8 text of your own; repeatable."""
    max_tokens: int | None = 20480
    """Tokens of each suite, at most; the bundled ones have two to three times as many."""
    context: int = 512
    """Length of the windows, of which the second half is scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens}: must be at least 1")


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
