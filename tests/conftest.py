"""Small random XVERSE checkpoints with a small tokenizer, in the layout of a released one; and how many threads work on them."""

import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from xent_quant.checkpoint.architecture import Architecture
from xent_quant.cli.main import main

os.environ["CUDA_VISIBLE_DEVICES"] = ""
"""`--device auto` is the CPU's kernels here, on whatever machine: scripts/check_gpu is for GPUs."""

SPECIALS = ["<sep>", "<pad>", "<|startoftext|>", "<|endoftext|>"]
TINY: dict[str, Any] = {
    "architectures": ["XverseForCausalLM"],
    "model_type": "xverse",
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 6,
    "moe_top_k": 2,
    "num_shared_experts": 2,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "vocab_size": 320,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}


def small_tokenizer() -> Tokenizer:
    """Byte-fallback BPE of XVERSE's kind with a few characters and merges, fewer tokens than vocab_size."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz,.你好夜色", "th", "the", "▁the", "in", "ing"]
    vocab = {token: index for index, token in enumerate([*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("in", "g")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace("▁", prepend_scheme="always"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace("▁"), decoders.ByteFallback()])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    weights = {}
    for name, spec in Architecture.from_config(config).tensors().items():
        shape = spec.shape
        scale = 1.5 * shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        weights[name] = (random.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32)
    return weights


def write_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """checkpoint(**config overrides) writes a random float32 checkpoint and returns its folder."""

    def make(**overrides: Any) -> Path:
        config = {**TINY, **overrides}
        return write_checkpoint(tmp_path / "model", config, random_weights(config))

    return make


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """command(arguments) is exit status and output of the command, in this process: that costs no start, and imports can be
    blocked."""
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in signals}
    root, threads = logging.getLogger(), (numba.get_num_threads(), torch.get_num_threads())
    loggers, root.handlers = root.handlers, []  # so that the command's own is the one, as in a process of its own

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status = 0
        try:
            main(list(map(str, arguments)))
        except SystemExit as end:
            status = int(end.code or 0)
        return subprocess.CompletedProcess([], status, *capfd.readouterr())

    yield call
    root.handlers = loggers
    logging.captureWarnings(False)
    numba.set_num_threads(threads[0])
    torch.set_num_threads(threads[1])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads would wait for each other most of the time."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])
