#!/usr/bin/env python3
"""Prints what every type loses on text that calibration never saw: ours against stock ggml, same layout, same bytes.

    scripts/bench_quality.py --corpus CORPUS [--types Q4_K_M Q2_K] [--methods stock gptq] [--tokens 200000]
                             [--model DIR] [--stock-programs FOLDER]

Both sides calibrate --model (default: the bundled miniature) on CORPUS/calib/*.jsonl (or, without --corpus, on the bundled
text) and are judged on CORPUS/valid/*.jsonl (or the bundled suites). "stock" is ggml_quantize_chunk with the plain per-expert
importance matrix of that text, as llama-quantize has it: none for the embedding and the head. --stock-programs adds what the
real llama-imatrix and llama-quantize (scripts/stock_llama builds them) make of the same text, read by llama.cpp's tokenizer in
windows of the same length; their files are not padded, and stay in FOLDER. Dequantised weights run in our own exact forward: the
figures hold for the weights, apart from any runtime's rounding of activations. KL divergence is KL(bf16 checkpoint ‖ quantised)
in nats per token over the second half of each window; ± is the standard error over windows; the last column is the ratio to the
first of --methods in the same windows. Holds the model in float32, and its logits in the judged windows a few at a time.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import stock_llama
import torch
from _walk import imatrix, quantised

import xent_quant
from calibration.imatrix import Imatrix
from calibration.text import Source, load, sources
from exporters.gguf.plan import plan
from xent_quant import recipes
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.llama_names import llama_name
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.formats.base import F32, U8, QuantFormat
from xent_quant.methods import METHODS
from xent_quant.model.streaming import StreamingModel
from xent_quant.tensors import InputStatistics
from xent_quant.validation import measures, suites
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.validation.llama_cpp import quantize_chunk

TYPES = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K"]


class Stock:
    """ggml's own quantisers, on two threads, with the importance matrix that llama-quantize would give them."""

    name = "stock"
    needs_hessian = False

    def __init__(self, plain: Imatrix, model: Architecture) -> None:
        self._plain, self._specs = plain, model.tensors()

    def quantize(
        self, weights: F32, kind: QuantFormat, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        """See `Method.quantize`."""
        if kind.block_size == 1:
            return kind.quantize(weights, name=name)
        spec, importance = self._specs[name], None
        entry = self._plain.entries.get(llama_name(spec)) if spec.measured and spec.layer is not None else None
        if entry is not None:
            expert = spec.expert or 0
            importance = np.pad(entry.sums[expert] / max(entry.counts[expert], 1), (0, weights.shape[1] - entry.sums.shape[1]))
        with ThreadPoolExecutor(2) as pool:
            row_bytes = kind.row_bytes(weights.shape[1])
            parts = pool.map(lambda part: quantize_chunk(kind.ggml_type, row_bytes, part, importance), np.array_split(weights, 2))
            return np.concatenate(list(parts))


class StockPrograms:
    """Files that llama-quantize makes with the importance matrix that llama-imatrix measures on a text, all in `folder`."""

    name = "stock programs"

    def __init__(self, checkpoint: Checkpoint, text: str, seqlen: int, folder: Path) -> None:
        self._model, self._folder = checkpoint.architecture, folder
        (self._float,) = xent_quant.quantize(checkpoint.path, type="BF16", output=folder, name="model", force=True).exports
        self._imatrix, source = folder / "imatrix.gguf", folder / "text.txt"
        source.write_text(text, "utf-8")
        self._run("imatrix", "-m", self._float, "-f", source, "-o", self._imatrix, "-c", seqlen, "--no-ppl", "--no-escape")

    def _run(self, name: str, *arguments: object) -> None:
        done = subprocess.run([stock_llama.program(name), *map(str, arguments)], capture_output=True, check=False)
        if done.returncode:
            sys.exit(f"llama-{name} failed:\n{done.stderr.decode('utf-8', 'replace')[-2000:]}")

    def quantised(self, kind: str) -> GGUFSource:
        """The weights of the file of a type, dequantised as they are read."""
        target = self._folder / f"{kind}.gguf"
        self._run("quantize", "--imatrix", self._imatrix, self._float, target, kind)
        return GGUFSource(GGUFFile(target), self._model)


def log_probabilities(model: StreamingModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """[windows, scored, vocab] float32, a few windows at a time."""
    positions, _ = measures.scored(windows.shape[1])
    hidden = model.hidden_states(windows)[:, positions]
    for part in torch.split(hidden, 16):
        yield model.logits(part).log_softmax(-1)


def judge(reference: StreamingModel, model: StreamingModel, windows: torch.Tensor) -> dict[str, np.ndarray]:
    """nll, kl and agreement, [n_windows, scored] each."""
    _, positions = measures.scored(windows.shape[1])
    found: dict[str, list[torch.Tensor]] = {"nll": [], "kl": [], "agree": []}
    for p, q, targets in zip(
        log_probabilities(reference, windows),
        log_probabilities(model, windows),
        torch.split(windows[:, positions], 16),
        strict=True,
    ):
        found["nll"].append(-q.gather(-1, targets[..., None])[..., 0].double())
        found["kl"].append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
        found["agree"].append((p.argmax(-1) == q.argmax(-1)).double())
    return {key: torch.cat(parts).numpy() for key, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder with calib/*.jsonl and valid/*.jsonl; default: the bundled texts")
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the bundled miniature")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--methods", nargs="+", default=["stock", "imatrix", "gptq"], choices=["stock", *METHODS])
    parser.add_argument("--rows", nargs="+", default=["plain"], choices=["plain", "gated"], help="gated: weighed by gate squared")
    parser.add_argument("--apart", action="store_true", help="also methods that follow the quantised model, not following it")
    parser.add_argument("--effort", default="normal", choices=["fast", "normal", "high"])
    parser.add_argument("--tokens", type=int, default=200_000, help="calibration tokens")
    parser.add_argument("--judge-tokens", type=int, default=8192, help="tokens of each suite")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--float", nargs="+", default=[], help="roles kept in float, e.g. embedding head")
    parser.add_argument("--stock-programs", type=Path, metavar="FOLDER", help="also llama-imatrix and llama-quantize themselves")
    options = parser.parse_args()
    if options.stock_programs and options.float:
        parser.error("--float: llama-quantize's files are taken as they are; leave out --stock-programs")
    if options.stock_programs:
        try:
            stock_llama.home()
        except stock_llama.Missing as error:
            parser.error(f"--stock-programs: {error}")

    if options.corpus and (lacking := [part for part in ("calib", "valid") if not [*(options.corpus / part).glob("*.jsonl")]]):
        parser.error(f"--corpus {options.corpus}: no .jsonl in {' and '.join(lacking)}")
    checkpoint = Checkpoint.open(resolve(options.model))
    tokenizer, bos = load_tokenizer(checkpoint.path), checkpoint.architecture.bos_token_id
    if options.corpus:
        texts = [Source(path.stem, path) for path in sorted((options.corpus / "calib").glob("*.jsonl"))]
        unseen = [
            load([Source(path.stem, path)], tokenizer, tokens=options.judge_tokens, length=options.seqlen, bos=bos).windows
            for path in sorted((options.corpus / "valid").glob("*.jsonl"))
        ]
    else:
        texts = sources([], "zh=1", chinese=True)
        ids = [tokenizer.encode(suite.text, add_special_tokens=False).ids for suite in suites.choose()]
        unseen = [measures.windows(part[: options.judge_tokens], options.seqlen) for part in ids]
    text = load(texts, tokenizer, tokens=options.tokens, length=options.seqlen, bos=bos)
    windows, judged = torch.from_numpy(text.windows), torch.from_numpy(np.concatenate(unseen))
    model = StreamingModel(checkpoint)
    started = time.perf_counter()
    plain, coverage = imatrix(checkpoint, windows)
    least = coverage.least
    print(
        f"calibrated on {windows.numel()} tokens in {time.perf_counter() - started:.0f} s, no expert on fewer than {least}; "
        f"judged on {judged.numel()} tokens, {judged.numel() // 2 - len(judged)} scored"
    )

    sides: dict[str, tuple[str, bool, bool]] = {}  # method, gated, follow
    for method in options.methods:
        if method == "stock":
            sides[method] = ("rtn", False, False)
            continue
        for gated, weighting in ((way == "gated", way) for way in options.rows):
            side = method if weighting == "plain" else f"{method}, {weighting}"
            follow = METHODS[method](options.effort).needs_hessian
            if follow and options.apart:
                sides[f"{side}, apart"] = (method, gated, False)
            sides[side] = (method, gated, follow)
    programs: StockPrograms | None = None
    if options.stock_programs:
        programs = StockPrograms(checkpoint, tokenizer.decode(windows.flatten().tolist()), options.seqlen, options.stock_programs)
        sides[programs.name] = ("", False, False)
    base = judge(model, model, judged)
    print(f"bf16: perplexity {measures.perplexity(base['nll']):.4f}\n")
    titles = ("perplexity ratio", "mean KL divergence", "top-1 agreement", f"KL / {next(iter(sides))}")
    print(f"{'type':8} {'side':18} {'bits/w':>6} {'s':>5} {titles[0]:>20} {titles[1]:>22} {titles[2]:>17} {titles[3]:>15}")
    for name in options.types:
        planned = plan(checkpoint.architecture, recipes.recipe(type=name, imatrix=True))
        first: np.ndarray | None = None
        for side, (chosen, gated, follow) in sides.items():
            started = time.perf_counter()
            bits = planned.bits_per_weight
            if programs and side == programs.name:
                weights = programs.quantised(name)
                bits = 8 * sum(tensor.nbytes for tensor in weights.file.tensors.values()) / checkpoint.n_weights
            elif side == "stock":
                weights = quantised(checkpoint, planned.slots(), Stock(plain, checkpoint.architecture))
            else:
                method = METHODS[chosen](options.effort)
                weights = quantised(checkpoint, planned.slots(), method, windows=windows, gated=gated, follow=follow)
            for tensor in planned.tensors:
                if tensor.role.value in options.float:
                    weights.arrays |= {spec.name: checkpoint.read(spec.name) for spec in tensor.sources}
            seconds = time.perf_counter() - started
            result = judge(model, StreamingModel(weights), judged)
            ratio = measures.perplexity_ratio(result["nll"], base["nll"])
            kl, agree = measures.window_mean(result["kl"]), measures.window_mean(result["agree"])
            first = result["kl"] if first is None else first
            against = result["kl"].mean() / first.mean()
            # Standard error of a ratio of means over the same windows (delta method).
            rest = (result["kl"] - against * first).mean(1)
            error = rest.std(ddof=1) / np.sqrt(len(rest)) / first.mean()
            print(
                f"{name:8} {side:18} {bits:6.2f} {seconds:5.0f} {ratio.value:10.5f} ± {ratio.error:.5f} "
                f"{kl.value:11.6f} ± {kl.error:.6f} {agree.value:8.4f} ± {agree.error:.4f} {against:7.3f} ± {error:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
