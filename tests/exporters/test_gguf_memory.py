"""What a file takes in memory, against what stock llama.cpp projects for it (`llama-fit-params --fit-print`, from the wheel)."""

import ctypes
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from exporters.base_model import BaseModel
from exporters.gguf import metadata
from exporters.gguf.plan import KV_ITEM, GGUFPlan, cache_tokens, compute_bytes, plan
from exporters.interface import kv_cache_bytes
from tests.exporters.test_gguf_plan import architecture
from xent_quant import formats
from xent_quant.recipes import recipe
from xent_quant.validation import llama_cpp

A57B = {"hidden_size": 3072, "num_hidden_layers": 32, "vocab_size": 128256}
GGML_TYPE = {"f16": 1, "q8_0": 8}
CASES: list[tuple[dict[str, Any], str, int, str]] = [
    ({}, "Q4_K_M", 8192, "f16"),
    ({}, "Q2_K", 512, "f16"),
    ({}, "Q6_K", 32768, "f16"),
    ({}, "Q4_K_M", 4100, "f16"),
    (A57B, "Q4_K_M", 8192, "f16"),
    (A57B, "IQ3_S", 8192, "q8_0"),
    ({"num_key_value_heads": 8}, "Q4_K_M", 8192, "f16"),
    ({"vocab_size": 2000}, "Q4_0", 8192, "f16"),
    ({"vocab_size": 2000, "moe_top_k": 2}, "Q3_K_M", 4096, "f16"),
    ({"vocab_size": 2000, "intermediate_size": 512}, "Q5_K_M", 8192, "f16"),
    ({"num_hidden_layers": 4, "num_experts": 128}, "Q8_0", 2048, "f16"),
]


def write_holes(planned: GGUFPlan, path: Path) -> None:
    """The plan's file without a vocabulary, its weights a hole that takes no room."""
    writer = gguf.GGUFWriter(path, planned.arch)
    metadata.write(writer, planned, "holes", BaseModel("holes", None, None, None, None, ()))
    writer.add_tokenizer_model("none")
    size = 0
    for tensor in planned.tensors:
        kind = formats.get(tensor.type)
        shape = (*tensor.shape[:-1], kind.row_bytes(tensor.columns))
        ggml_type = gguf.GGMLQuantizationType(kind.ggml_type)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=ggml_type)
        size += -(-tensor.nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    end = stream.tell()
    writer.close()
    os.truncate(path, end + size)


def projected(path: Path, context: int, kv: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, int, int]:
    """MiB of weights, KV cache and compute buffer, as llama.cpp says; nothing is allocated."""
    library = llama_cpp.library()
    model, settings = library.llama_model_default_params(), library.llama_context_default_params()
    model.n_gpu_layers, model.use_extra_bufts = 0, False
    settings.n_ctx, settings.n_seq_max, settings.type_k, settings.type_v = context, 1, GGML_TYPE[kv], GGML_TYPE[kv]
    say = library._Z16common_fit_printPKcP18llama_model_paramsP20llama_context_params
    say.restype, say.argtypes = None, [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    capfd.readouterr()
    say(os.fsencode(path), ctypes.byref(model), ctypes.byref(settings))
    ctypes.CDLL(None).fflush(None)
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("Host"))
    weights, cache, compute = map(int, line.split()[1:])
    return weights, cache, compute


def test_memory_is_what_stock_llama_cpp_projects(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    for changes, kind, context, kv in CASES:
        model = architecture(**changes)
        planned = plan(model, recipe(type=kind))
        file = tmp_path / "holes.gguf"
        write_holes(planned, file)
        weights, cache, compute = projected(file, context, kv, capfd)
        file.unlink()
        tokens = cache_tokens(context)
        ours = kv_cache_bytes(model, tokens, KV_ITEM[kv]), compute_bytes(model, planned.expert_width, tokens)
        case = f"{changes} {kind} {context} {kv}: {weights} {cache} {compute} {planned.nbytes / 2**20:.0f} {ours}"
        assert abs(ours[0] / 2**20 - cache) <= 1, case
        assert abs(ours[1] / 2**20 - compute) <= 0.1 * compute, case
        assert (planned.nbytes + sum(ours)) / 2**20 == pytest.approx(weights + cache + compute, rel=1e-3), case
        print(case)


def test_a_cache_of_8_bits_needs_heads_of_whole_blocks(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    library = llama_cpp.library()
    file = tmp_path / "holes.gguf"
    tiny = architecture(num_hidden_layers=1, vocab_size=64, num_experts=4, moe_top_k=2, intermediate_size=32)
    write_holes(plan(tiny, recipe(type="Q4_0")), file)
    model = library.llama_model_default_params()
    model.n_gpu_layers = 0
    loaded = library.llama_model_load_from_file(os.fsencode(file), model)
    assert loaded
    settings = library.llama_context_default_params()
    settings.n_ctx, settings.type_k, settings.type_v = 512, GGML_TYPE["q8_0"], GGML_TYPE["q8_0"]
    assert tiny.head_dim == 80
    assert not library.llama_init_from_model(loaded, settings)
    library.llama_model_free(loaded)
    assert "does not divide n_embd_head_k=80" in llama_cpp._errors[-1]
