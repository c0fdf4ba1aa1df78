"""Stock llama.cpp without a compiler: the C API of llama.h, which the xllamacpp wheel's library exports.

Struct layouts are those of the wheel's version; another version is refused. `exact` switches flash attention off and
keeps the KV cache in float32, so that differences of 1e-5 can be seen; with llama.cpp's defaults they drown in 1e-2.
"""

import ctypes as C
import importlib.metadata
import importlib.util
import os
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import ValidationError

VERSION = "2026.10.11549"
F32 = NDArray[np.float32]


class _ContextParams(C.Structure):
    _fields_ = [
        *[
            (n, C.c_uint32)
            for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")
        ],
        *[(n, C.c_int32) for n in ("n_threads", "n_threads_batch")],
        *[(n, C.c_int32) for n in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")],
        *[(n, C.c_float) for n in ("rope_freq_base", "rope_freq_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")],
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        ("cb_eval", C.c_void_p),
        ("cb_eval_user_data", C.c_void_p),
        ("type_k", C.c_int32),
        ("type_v", C.c_int32),
        ("rest", C.c_char * 512),  # more than the struct holds: it is passed by value, the excess is never read
    ]


class _ModelParams(C.Structure):
    _fields_ = [
        ("devices", C.c_void_p),
        ("tensor_buft_overrides", C.c_void_p),
        *[(n, C.c_int32) for n in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")],
        *[(n, C.c_void_p) for n in ("tensor_split", "progress_callback", "progress_callback_user_data", "kv_overrides")],
        *[(n, C.c_bool) for n in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")],
        ("rest", C.c_char * 512),
    ]


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.POINTER(C.c_float)),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


_Log = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_errors: list[str] = []


def _keep(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _errors.append(text.decode("utf-8", "replace").strip())


_keep_errors = _Log(_keep)  # llama.cpp keeps the pointer: it must outlive every call


@cache
def library() -> Any:
    """The wheel's shared library with its functions declared. Raises ValidationError where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ValidationError("llama.cpp is not installed; pip install 'xent-quant[llama]'")
    version = importlib.metadata.version("xllamacpp")
    if version != VERSION:
        raise ValidationError(f"xllamacpp {version} is installed, its structs may differ; pip install xllamacpp=={VERSION}")
    handle = C.CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so"))
    pointer, i32 = C.c_void_p, C.c_int32
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_log_set", None, [_Log, pointer]),
        ("llama_model_default_params", _ModelParams, []),
        ("llama_context_default_params", _ContextParams, []),
        ("llama_model_load_from_file", pointer, [C.c_char_p, _ModelParams]),
        ("llama_init_from_model", pointer, [pointer, _ContextParams]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", i32, [pointer]),
        *[(f"llama_vocab_{role}", i32, [pointer]) for role in ("bos", "eos", "eot", "pad")],
        ("llama_vocab_is_eog", C.c_bool, [pointer, i32]),
        ("llama_vocab_get_add_eos", C.c_bool, [pointer]),
        ("llama_model_chat_template", C.c_char_p, [pointer, C.c_char_p]),
        ("llama_vocab_get_add_bos", C.c_bool, [pointer]),
        ("llama_tokenize", i32, [pointer, C.c_char_p, i32, pointer, i32, C.c_bool, C.c_bool]),
        ("llama_detokenize", i32, [pointer, pointer, i32, C.c_char_p, i32, C.c_bool, C.c_bool]),
        ("llama_batch_init", _Batch, [i32, i32, i32]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", i32, [pointer, _Batch]),
        ("llama_get_logits", C.POINTER(C.c_float), [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, C.c_bool]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("ggml_quantize_chunk", C.c_size_t, [C.c_int, pointer, pointer, C.c_int64, C.c_int64, C.c_int64, pointer]),
    ):
        function = getattr(handle, name)
        function.restype, function.argtypes = result, arguments
    handle.llama_log_set(_keep_errors, None)
    handle.llama_backend_init()
    return handle


def quantize_chunk(ggml_type: int, row_bytes: int, weights: F32, importance: F32 | None) -> NDArray[np.uint8]:
    """Stock ggml's own quantiser on one thread: [rows, columns] float32 to [rows, row_bytes] uint8."""
    weights = np.ascontiguousarray(weights, np.float32)
    packed = np.empty((weights.shape[0], row_bytes), np.uint8)
    pointer = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data
    written = library().ggml_quantize_chunk(ggml_type, weights.ctypes.data, packed.ctypes.data, 0, *weights.shape, pointer)
    if written != packed.nbytes:
        raise ValidationError(f"ggml wrote {written} bytes of type {ggml_type}, {packed.nbytes} were expected")
    return packed


class Vocabulary:
    """The tokenizer of a GGUF file alone; a context manager. Raises ValidationError with llama.cpp's words where it refuses."""

    def __init__(self, path: Path) -> None:
        self._library = library()
        self._model = self._load(path, vocab_only=True)
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._library.llama_vocab_n_tokens(self._vocab))

    def _load(self, path: Path, vocab_only: bool) -> Any:
        _errors.clear()
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = False
        parameters.vocab_only = vocab_only
        model = self._library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            raise ValidationError(f"{path}: llama.cpp refuses it: {_errors[0] if _errors else 'no reason given'}")
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._library.llama_model_free(self._model)

    def special(self, role: str) -> int:
        """The id of bos, eos, eot or pad; −1 where there is none."""
        return int(getattr(self._library, f"llama_vocab_{role}")(self._vocab))

    def ends(self, token: int) -> bool:
        """Whether generation stops after a token."""
        return bool(self._library.llama_vocab_is_eog(self._vocab, token))

    def chat_template(self, name: str | None = None) -> str | None:
        found = self._library.llama_model_chat_template(self._model, None if name is None else name.encode())
        return None if found is None else bytes(found).decode()

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        raw = text.encode("utf-8")
        room = len(raw) + 16
        buffer = (C.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocab, raw, len(raw), buffer, room, add_special, parse_special)
        if count < 0:
            raise ValidationError(f"llama.cpp could not tokenise a text of {len(raw)} bytes")
        return list(buffer[:count])

    def detokenize(self, ids: list[int]) -> str:
        room = 64 * len(ids) + 64
        buffer = C.create_string_buffer(room)
        count = self._library.llama_detokenize(self._vocab, (C.c_int32 * len(ids))(*ids), len(ids), buffer, room, False, False)
        return buffer.raw[: max(count, 0)].decode("utf-8", "replace")


class LlamaCpp(Vocabulary):
    """A loaded GGUF model; a context manager. Raises ValidationError with llama.cpp's own words where it refuses.

    The file is mapped: its pages count as resident memory once they were read (llama.cpp reads all of them at first, where they
    fit), and the kernel may drop them. Beside them are held a context's KV cache and logits; no second copy of the weights,
    which llama.cpp would else make in an order that its kernels like, and which gains nothing on windows of 512 tokens.
    """

    name = "llama.cpp"
    version = f"xllamacpp {VERSION}"

    def __init__(self, path: Path, context: int = 512, threads: int = 1, exact: bool = True) -> None:
        self._library = library()
        self._model = self._load(path, vocab_only=False)
        settings = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_ubatch = min(512, context)
        settings.n_seq_max = 1
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.flash_attn_type = settings.type_k = settings.type_v = 0
        self._context = self._library.llama_init_from_model(self._model, settings)
        if not self._context:
            self._library.llama_model_free(self._model)
            raise ValidationError(f"{path}: llama.cpp cannot run it: {_errors[-1] if _errors else 'no reason given'}")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = int(self._library.llama_vocab_n_tokens(self._vocab))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._library.llama_free(self._context)
        super().__exit__(kind, error, trace)

    def _decode(self, ids: list[int], start: int, first: int = 0) -> F32:
        """Logits [len(ids) − first, vocab] of tokens at positions start + first…; those before `start` come from the KV cache."""
        batch = self._library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, index >= first
        status = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if status:
            raise ValidationError(f"llama.cpp could not decode {len(ids)} tokens at position {start} (status {status})")
        shape = (len(ids) - first, self.vocab_size)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape).copy()

    def logits(self, ids: list[int], first: int = 0) -> F32:
        """[len(ids) − first, vocab] float32 of a fresh context, from position `first` on; at most the context's length of ids."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        return self._decode(ids, 0, first)

    def generate(self, ids: list[int], count: int) -> list[int]:
        """`count` tokens chosen greedily after `ids`."""
        row = self.logits(ids)[-1]
        result: list[int] = []
        for position in range(len(ids), len(ids) + count):
            result.append(int(row.argmax()))
            row = self._decode(result[-1:], position)[-1]
        return result

    def perplexity(self, ids: list[int], window: int = 512) -> tuple[float, int]:
        """llama-perplexity's figure and the tokens scored: windows apart, BOS first if the model adds one, second half scored."""
        total, count, half = 0.0, 0, window // 2
        bos = self._library.llama_vocab_bos(self._vocab) if self._library.llama_vocab_get_add_bos(self._vocab) else None
        for start in range(0, len(ids) - window + 1, window):
            chunk = list(ids[start : start + window])
            targets = np.array(chunk[half + 1 :])
            if bos is not None:
                chunk[0] = bos
            rows = self.logits(chunk, half)[:-1].astype(np.float64)
            top = rows.max(axis=1)
            normaliser = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
            total += float((normaliser - rows[np.arange(len(targets)), targets]).sum())
            count += len(targets)
        if not count:
            raise ValidationError(f"{len(ids)} tokens are fewer than one window of {window}")
        return float(np.exp(total / count)), count
