#!/usr/bin/env python3
"""Whether trading experts for bits pays: files without some experts beside those with all of them.

    scripts/bench_drop.py [--model DIR] [--drop 25%] [--types XENT4 XENT3 XENT2] [--dropped-types XENT6 XENT5 XENT4]
                          [--tokens 16k] [--judge-tokens 2048] [--threads 1]

Files are made by `xent_quant.quantize` (GPTQ, the bundled calibration text) and judged in our own exact forward on the first
--judge-tokens of every bundled suite: KL(checkpoint ‖ file) in nats per token, ± the standard error over windows, and perplexity
over the checkpoint's. The first rows are what dropping alone loses, without quantising: the experts of least saliency, those
that the fewest tokens chose, and three draws at random (their mean). Tokens per second are of stock llama.cpp writing 128 tokens
behind a prompt, the best of five turns in which the files take their place one after the other.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import torch
from bench_quality import judge

import xent_quant
from calibration.session import Session
from xent_quant.checkpoint.dropping import KeptExperts, compared_with_gguf, keep
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.model.sizes import SALIENCY_TOKENS
from xent_quant.model.stages import Stage, WeightSource
from xent_quant.model.streaming import StreamingModel
from xent_quant.options import CalibrationOptions, Options
from xent_quant.tensors import Role
from xent_quant.validation import measures, suites
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.walk.saliency import most_salient, saliency

LENGTH = 256
PROMPT, WRITTEN, TURNS = "The old lamp in the window", 128, 5


def counted(checkpoint: Checkpoint, windows: torch.Tensor) -> np.ndarray:
    """Tokens that chose each expert, [layers, experts]."""
    found: list[list[int]] = []

    def observe(stage: Stage) -> None:
        if stage.expert == 0 and stage.weights[0].role is Role.GATE:
            found.append(stage.run.expert_tokens(0))

    StreamingModel(checkpoint).run(windows, observe)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the bundled miniature")
    parser.add_argument("--drop", default="25%")
    parser.add_argument("--types", nargs="+", default=["XENT4", "XENT3", "XENT2"], help="of files with all experts")
    parser.add_argument("--dropped-types", nargs="+", default=["XENT6", "XENT5", "XENT4"])
    parser.add_argument("--tokens", default="16k", help="of calibration text")
    parser.add_argument("--judge-tokens", type=int, default=2048, help="of each suite")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(resolve(options.model))
    model, tokenizer = checkpoint.architecture, load_tokenizer(checkpoint.path)
    ids = [tokenizer.encode(suite.text, add_special_tokens=False).ids for suite in suites.choose()]
    judged = torch.from_numpy(np.concatenate([measures.windows(part[: options.judge_tokens], LENGTH) for part in ids]))
    reference = StreamingModel(checkpoint)
    own = judge(reference, reference, judged)["nll"]

    def row(experts: str, kind: str, sources: list[WeightSource], nbytes: int | None, speed: float | None) -> str:
        found = [judge(reference, StreamingModel(source), judged) for source in sources]
        kl = np.mean([each["kl"] for each in found], axis=0).mean(1)
        ratio = np.exp(np.mean([each["nll"].mean() for each in found]) - own.mean())
        error = kl.std(ddof=1) / len(judged) ** 0.5
        size, rate = f"{nbytes:,}" if nbytes else "", f"{speed:.1f}" if speed else ""
        return f"| {experts} | {kind} | {size} | {1e3 * kl.mean():.2f} ± {1e3 * error:.2f} | {ratio:.4f} | {rate} |"

    print("| experts | type | bytes | KL·10³ | perplexity ratio | tokens/s |\n|" + "---|" * 6, flush=True)
    left = model.num_experts - Options(drop_experts=options.drop).experts_dropped(model.num_experts)
    sample = Session(checkpoint, CalibrationOptions(tokens=options.tokens), spare=False).sample(SALIENCY_TOKENS)
    random = np.random.default_rng(0)
    for said, scores in (
        ("least salient", [saliency(checkpoint, sample)]),
        ("least chosen", [counted(checkpoint, sample)]),
        ("random", [random.random((model.num_layers, model.num_experts)) for _ in range(3)]),
    ):
        kept = [KeptExperts(tuple(map(tuple, most_salient(each, left))), model.num_experts) for each in scores]
        views: list[WeightSource] = [keep(checkpoint, each) for each in kept]
        print(row(f"{left}, {said} dropped", "as stored", views, None, None), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        files: list[tuple[int, str, Path]] = []
        for drop, count, types in ((None, model.num_experts, options.types), (options.drop, left, options.dropped_types)):
            made = xent_quant.quantize(
                checkpoint.path, type=types, drop_experts=drop, output=folder, tokens=options.tokens, threads=options.threads
            )
            files += [(count, kind, file) for kind, file in zip(types, made.exports, strict=True)]
        best = dict.fromkeys((file for _, _, file in files), 0.0)
        for _ in range(TURNS):
            for file in best:
                with LlamaCpp(file, context=256, threads=options.threads, exact=False) as llama:
                    prompt = llama.tokenize(PROMPT)
                    llama.generate(prompt, 1)
                    started = time.perf_counter()
                    written = llama.generate(prompt, WRITTEN)
                    best[file] = max(best[file], len(written) / (time.perf_counter() - started))
        for count, kind, file in files:
            stored = GGUFFile(file)
            view = compared_with_gguf(checkpoint, stored.metadata, str(file))
            print(row(str(count), kind, [GGUFSource(stored, view.architecture)], file.stat().st_size, best[file]), flush=True)


if __name__ == "__main__":
    main()
