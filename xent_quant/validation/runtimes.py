"""Which runtime judges a file, and how it is opened. Each is imported only where it is used."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xent_quant.checkpoint.headers import read_json
from xent_quant.errors import CheckpointError, ValidationError

if TYPE_CHECKING:
    from xent_quant.validation.scoring import Runtime

Kind = Literal["gguf", "onnx", "bitsandbytes", "checkpoint"]
RuntimeName = Literal["auto", "llama.cpp", "onnxruntime", "transformers", "torch"]
NATIVE: dict[Kind, RuntimeName] = {
    "gguf": "llama.cpp",
    "onnx": "onnxruntime",
    "bitsandbytes": "transformers",
    "checkpoint": "torch",
}
"""Kind of export to the runtime that people use; `torch` is the exact path, which every kind has."""

READER: dict[Kind, tuple[str, ...]] = {"onnx": ("onnx",)}
PACKAGES: dict[Kind, tuple[str, ...]] = {
    "gguf": ("xllamacpp",),
    "onnx": ("onnxruntime",),
    "bitsandbytes": ("transformers", "bitsandbytes", "accelerate"),
}
"""What reading a kind of export takes besides this project's own dependencies, and what running it takes."""
EXTRAS: dict[Kind, str] = {"gguf": "llama", "onnx": "onnx", "bitsandbytes": "bnb"}
"""The extra of this project that installs both."""


def kind_of(path: Path) -> Kind:
    """What an exported path is, from its name and files. Raises ValidationError."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise ValidationError(f"{path}: not a .gguf file; give one, or an exported folder")
    if not path.is_dir():
        raise ValidationError(f"{path}: no such file or folder")
    if (path / "model.onnx").is_file():
        if not (path / "model.onnx.data").is_file():
            raise ValidationError(f"{path / 'model.onnx.data'}: missing, model.onnx keeps its weights there; export it again")
        return "onnx"
    config = path / "config.json"
    if not config.is_file():
        raise ValidationError(f"{path}: neither model.onnx nor config.json in it; give the folder of one export")
    try:
        quantised = read_json(config).get("quantization_config")
    except CheckpointError as error:
        raise ValidationError(str(error)) from error
    ours = isinstance(quantised, dict) and quantised.get("quant_method") in (None, "bitsandbytes")
    return "bitsandbytes" if ours else "checkpoint"


def choose(kind: Kind, wanted: RuntimeName) -> RuntimeName:
    """The runtime for a kind of export. Raises ValidationError for one that cannot run it."""
    if wanted == "auto":
        return NATIVE[kind]
    if wanted not in (NATIVE[kind], "torch") and (kind, wanted) != ("checkpoint", "transformers"):
        raise ValidationError(f"--runtime {wanted}: does not run {kind} exports; use {NATIVE[kind]} or torch")
    return wanted


def require(kind: Kind, runtime: RuntimeName) -> None:
    """Raise ValidationError or UnsupportedError, naming the pip line, where a package is missing or of a version that will not
    do. To be called before the work that would be lost."""
    for package in READER.get(kind, ()):
        if importlib.util.find_spec(package) is None:
            raise ValidationError(f"{package} is not installed: pip install 'xent-quant[{EXTRAS[kind]}]'")
    if runtime == "torch":
        return
    for package in PACKAGES.get(kind, ()):
        if importlib.util.find_spec(package) is None:
            line = f"pip install 'xent-quant[{EXTRAS[kind]}]'"
            raise ValidationError(f"{package}, which {runtime} needs, is not installed: {line}; or use --runtime torch")
    if runtime == "llama.cpp":
        from xent_quant.validation.llama_cpp import library

        library()
    elif runtime == "onnxruntime":
        from xent_quant.validation.onnx_runtime import require_runtime

        require_runtime()


@contextmanager
def opened(runtime: RuntimeName, path: Path, context: int, threads: int) -> "Iterator[Runtime]":
    """The loaded model; see `require` for what must be installed. Raises ValidationError where the runtime refuses the file."""
    if runtime == "llama.cpp":
        from xent_quant.validation.llama_cpp import LlamaCpp

        with LlamaCpp(path, context, threads, exact=False) as model:
            yield model
    elif runtime == "onnxruntime":
        from xent_quant.validation.onnx_runtime import OnnxModel

        yield OnnxModel(path, threads=threads)
    elif runtime == "transformers":
        from xent_quant.validation.transformers_runtime import TransformersModel

        yield TransformersModel(path, quantised=kind_of(path) == "bitsandbytes")
    else:
        raise AssertionError(f"{runtime} is not a runtime to be opened")
