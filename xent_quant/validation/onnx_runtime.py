"""An exported ONNX folder in stock ONNX Runtime, and in onnxruntime-genai."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import UnsupportedError, ValidationError

MINIMUM = (1, 31)
"""Before it, QMoE knows no accuracy_level and is many times slower."""

F32 = NDArray[np.float32]
Cache = Mapping[str, NDArray[np.generic]]
"""past_key_values.N.key and .value to [batch, kv heads, tokens, head_dim]."""


def require_runtime() -> str:
    """ONNX Runtime's version. Raises UnsupportedError where it is missing or too old."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError("onnxruntime is not installed: pip install 'xent-quant[onnx]'") from error
    version: str = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise UnsupportedError(f"onnxruntime {version} is too old for these models: pip install 'onnxruntime>={wanted}'")
    return version


def _failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own exceptions have no base of theirs."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError)  # ValueError: inputs that the model does not have


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class OnnxModel:
    """A loaded folder, on the CPU unless told otherwise. Raises ValidationError where ONNX Runtime refuses the model."""

    name = "ONNX Runtime"

    def __init__(self, folder: Path, *, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.version = require_runtime()
        import onnxruntime

        self._failures = _failures()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised too; ONNX Runtime's own log of them has a model's names as they are
        if threads:
            options.intra_op_num_threads = threads
        path = folder / "model.onnx"
        if not path.is_file():
            raise ValidationError(f"{path}: no such file")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
            vocab_size = self.session.get_outputs()[0].shape[-1:]  # names in it may be no UTF-8
            self._past = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values")]
        except self._failures as error:
            raise ValidationError(f"{path}: ONNX Runtime refuses it: {_first_line(error)}") from error
        if not self._past or not (vocab_size and isinstance(vocab_size[0], int)):
            raise ValidationError(f"{path}: has not the inputs and outputs of our exports; export it again")
        self._path, self.vocab_size = path, vocab_size[0]
        self._dtype = np.dtype(np.float16 if self._past[0].type == "tensor(float16)" else np.float32)
        self._tokenizer = load_tokenizer(folder)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens, by the folder's own tokenizer."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None, cache: Cache | None = None) -> tuple[F32, Cache]:
        """One call: new tokens [batch, new] after a cache (None: of no tokens) to logits [batch, new, vocab] and the cache
        that holds them too. `mask` [batch, all tokens] is 1 for tokens, 0 for padding on the right; None: no padding."""
        if cache is None:
            cache = {value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), self._dtype) for value in self._past}
        if mask is None:
            mask = np.ones((len(ids), ids.shape[1] + cache[self._past[0].name].shape[2]), np.int64)
        try:
            logits, *present = self.session.run(None, {"input_ids": ids, "attention_mask": mask, **cache})
        except self._failures as error:
            raise ValidationError(f"{self._path}: ONNX Runtime cannot run it: {_first_line(error)}") from error
        return logits, dict(zip((value.name for value in self._past), present, strict=True))

    def logits(self, ids: list[int], first: int = 0) -> F32:
        """[len(ids) − first, vocab] float32 of one fresh context; the graph computes those before `first` too."""
        logits: F32 = self.run(np.array([ids], np.int64))[0][0]
        return logits[first:]


def generate(folder: Path, ids: list[int], count: int, provider: str | None = None) -> list[int]:
    """`count` further tokens, each the likeliest, from onnxruntime-genai on the folder's own provider, or "cuda". Raises
    UnsupportedError where it is missing."""
    require_runtime()
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise UnsupportedError("onnxruntime-genai is not installed: pip install 'xent-quant[onnx]'") from error
    config = onnxruntime_genai.Config(str(folder))
    if provider is not None:
        config.clear_providers()
        config.append_provider(provider)
    model = onnxruntime_genai.Model(config)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count, do_sample=False, repetition_penalty=1.0)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]]
