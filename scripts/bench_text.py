#!/usr/bin/env python3
"""Prints what calibration text is worth: KL divergence by how much of which text, on text of other origin.

    scripts/bench_text.py --results FILE.jsonl --corpus CORPUS [--text NAME=[CALIB,CALIB…][@TOKENS]]… [--tokens 8k 128k]
                          [--types Q4_K_M Q2_K] [--methods rtn imatrix gptq] [--seeds 0 1 2] [--picks all] [--calib-mix MIX]
                          [--model DIR]

Every --text is a name and what --calib would take, nothing for the bundled text; it is drawn as `xent-quant` draws it, with the
mix of the model's language or --calib-mix, but never more than its own TOKENS or each of --tokens, and nothing beside it.
--model (default: the bundled miniature) is judged on CORPUS/valid/*.jsonl, 6 windows of 512 tokens of each. Each run is a line
of FILE, and the same command goes on with those that FILE lacks; then their table is printed. KL is KL(checkpoint ‖ quantised)
in thousandths of a nat per token, over the second half of each window, a mean over seeds; ± is its standard error over windows.
The ratio is to the table's first line at the same type, ± over windows and seeds. Rows per column: tokens that an expert sees
on average, by the columns of its widest weight, the number to compare models of other shapes by. --picks random and rare draw
four times the text and take of every four windows one: any, or the one that adds most to the sum over experts of the root of
their tokens, which so feeds rare ones. All types of a text are made in one run of it. Holds the model in
float32, once for each type, and its logits a few windows at a time.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path

import numpy as np
import torch
from _walk import quantised_together
from bench_quality import judge

from calibration.chat import ChatTemplate
from calibration.text import Source, is_chinese, load, sources
from exporters.gguf.plan import plan
from xent_quant import recipes
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.methods import METHODS
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.options import CalibrationOptions
from xent_quant.tensors import Role

POOL = 4
"""Windows that one is picked of."""

JUDGED = 6
"""Windows of each file that is judged on."""


@dataclass(frozen=True)
class Run:
    """What one line of the results is of."""

    text: str
    tokens: int
    type: str
    method: str
    seed: int
    pick: str = "all"
    on: str = ""
    """Model, corpus, length of windows, and what `text` stands for."""


def of(line: dict) -> Run:
    """What a line of the results is of."""
    return Run(**{key: line[key] for key in Run.__dataclass_fields__ if key in line})


class Reference:
    """A StreamingModel as far as `judge` asks, run once: hidden states [windows, length, hidden] float32 are kept."""

    def __init__(self, model: StreamingModel, windows: torch.Tensor) -> None:
        self._hidden, self.logits = model.hidden_states(windows), model.logits

    def hidden_states(self, windows: torch.Tensor) -> torch.Tensor:
        """Of the windows that it was made with."""
        return self._hidden


class Bench:
    """A model with the windows that it is judged on."""

    def __init__(self, model: str | None, corpus: Path, length: int, texts: dict[str, list[str]], mix: str | None) -> None:
        self.checkpoint = Checkpoint.open(resolve(model))
        self._length, self._texts, self._mix = length, texts, mix
        self._tokenizer, self._bos = load_tokenizer(self.checkpoint.path), self.checkpoint.architecture.bos_token_id
        self._chinese, self._chat = is_chinese(self._tokenizer), ChatTemplate(self.checkpoint.path)
        files = sorted((corpus / "valid").glob("*.jsonl"))
        self.judged_on = [path.stem for path in files]
        unseen = [self._load([Source(path.stem, path)], JUDGED * length, 0) for path in files]
        self._judged = torch.from_numpy(np.concatenate(unseen))
        self._reference = Reference(StreamingModel(self.checkpoint), self._judged)

    def _load(self, found: list[Source], tokens: int, seed: int) -> np.ndarray:
        return load(found, self._tokenizer, tokens=tokens, length=self._length, seed=seed, bos=self._bos, chat=self._chat).windows

    def _picked(self, windows: torch.Tensor, run: Run) -> torch.Tensor:
        """One of every POOL windows [n, length], so that the mix of sources stays."""
        if run.pick == "random":
            chosen = np.random.default_rng(run.seed).integers(POOL, size=len(windows) // POOL)
        else:
            chosen = rarest(self._routed(windows).reshape(len(windows) // POOL, POOL, -1))
        return windows[np.arange(len(chosen)) * POOL + chosen]

    def _routed(self, windows: torch.Tensor) -> np.ndarray:
        """[windows, layers · experts] tokens of each window at each expert."""
        model, found = self.checkpoint.architecture, []

        def observe(stage: Stage) -> None:
            first = stage.weights[0] if stage.weights else None
            if first and first.expert == 0 and first.role is Role.GATE:
                each = stage.run.streams[0].chosen.reshape(len(windows), -1)
                found.append(torch.nn.functional.one_hot(each.long(), model.num_experts).sum(1))

        StreamingModel(self.checkpoint).run(windows, observe)
        return torch.cat(found, 1).numpy()

    def run(self, runs: Sequence[Run]) -> list[dict[str, object]]:
        """The lines of results, of runs that differ in their type alone."""
        run = runs[0]
        started = time.perf_counter()
        windows = None
        if run.method != "rtn":
            found = sources(self._texts[run.text], self._mix, self._chinese, run.seed)
            windows = torch.from_numpy(self._load(found, run.tokens * (1 if run.pick == "all" else POOL), run.seed))
            if run.pick != "all":
                windows = self._picked(windows[: len(windows) // POOL * POOL], run)
        planned = [plan(self.checkpoint.architecture, recipes.recipe(type=run.type, imatrix=True)).slots() for run in runs]
        weights = quantised_together(self.checkpoint, planned, METHODS[run.method]("normal"), windows=windows)
        seconds = round((time.perf_counter() - started) / len(runs), 1)
        used = 0 if windows is None else windows.numel()
        lines = []
        for run, each in zip(runs, weights, strict=True):
            kl = judge(self._reference, StreamingModel(each), self._judged)["kl"].mean(1)
            lines.append({**asdict(run), "used": used, "seconds": seconds, "kl": [float(f"{value:.5e}") for value in kl]})
        return lines


def rarest(tokens: np.ndarray) -> np.ndarray:
    """Which of the windows of each group to take: of tokens [groups, windows, experts], greedily, in two rounds."""
    chosen = np.zeros(len(tokens), dtype=np.int64)
    total = np.zeros(tokens.shape[2])
    for again in (False, True):
        for group, each in enumerate(tokens):
            total -= each[chosen[group]] * again
            chosen[group] = np.sqrt(total + each).sum(1).argmax()
            total += each[chosen[group]]
    return chosen


def table(lines: list[dict], runs: list[Run], columns: float) -> None:
    """Markdown. `columns`: tokens that give an expert one row for every column."""
    found = {of(line): line for line in lines}
    types = list(dict.fromkeys(run.type for run in runs))
    print(f"| text | method | tokens | rows per column | {' | '.join(f'{kind}: KL·10³ | ratio' for kind in types)} |")
    print(f"|---|---|---|---|{'---|---|' * len(types)}")
    first: dict[str, np.ndarray] = {}
    for text, method, tokens, pick in dict.fromkeys((run.text, run.method, run.tokens, run.pick) for run in runs):
        cells = []
        used = 0.0
        for kind in types:
            wanted = (text, tokens, kind, method, pick)
            those = [run for run in runs if (run.text, run.tokens, run.type, run.method, run.pick) == wanted]
            kl = np.array([found[run]["kl"] for run in those])  # [seeds, windows]
            used = float(np.mean([found[run]["used"] for run in those]))
            base = first.setdefault(kind, kl)
            mean, error = kl.mean() * 1e3, kl.mean(0).std(ddof=1) / kl.shape[1] ** 0.5 * 1e3
            ratio = kl.mean() / base.mean()
            # Standard error of a ratio of means over the same windows (delta method), and of the mean over seeds.
            over_windows = (kl.mean(0) - ratio * base.mean(0)).std(ddof=1) / kl.shape[1] ** 0.5 / base.mean()
            by_seed = kl.mean(1) / (base.mean(1) if len(base) == len(kl) else base.mean())
            over_seeds = by_seed.std(ddof=1) / len(kl) ** 0.5 if len(kl) > 1 else 0.0
            cells += [
                f"{mean:.3f} ± {error:.3f}",
                "1" if kl is base else f"{ratio:.3f} ± {np.hypot(over_windows, over_seeds):.3f}",
            ]
        amount = f"{used:,.0f} | {used / columns:.1f}" if used else " | "
        print(f"| {text}{'' if pick == 'all' else f', {pick} windows'} | `{method}` | {amount} | {' | '.join(cells)} |")


def by_file(lines: list[dict], runs: list[Run], names: list[str]) -> None:
    """Markdown: KL·10³ on each judged file."""
    found = {of(line): np.array(line["kl"]).reshape(len(names), JUDGED).mean(1) * 1e3 for line in lines if of(line) in runs}
    print(f"\n| text | tokens | type | {' | '.join(names)} |\n|{'---|' * (3 + len(names))}")
    for run in runs:
        print(f"| {run.text} | {run.tokens:,} | {run.type} | {' | '.join(f'{mean:.2f}' for mean in found[run])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="lines of JSON; kept and gone on with")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with valid/*.jsonl to judge on")
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the bundled miniature")
    parser.add_argument("--text", action="append", help="NAME=CALIB,CALIB…; default: bundled=")
    parser.add_argument("--tokens", nargs="+", default=["128k"])
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--methods", nargs="+", default=["imatrix", "gptq"], choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--picks", nargs="+", default=["all"], choices=["all", "random", "rare"])
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--calib-mix")
    options = parser.parse_args()
    named = dict(item.partition("=")[::2] for item in options.text or ["bundled="])
    texts, amounts = {}, {}
    for name, calib in named.items():
        calib, _, tokens = calib.partition("@")
        texts[name] = [part for part in calib.split(",") if part]
        amounts[name] = [CalibrationOptions(tokens=each).n_tokens for each in ([tokens] if tokens else options.tokens)]
    on = f"{options.model} {options.corpus} {options.seqlen}{f' {options.calib_mix}' if options.calib_mix else ''}"
    runs = []
    for method in options.methods:
        if method == "rtn":  # takes no text
            runs += [Run("none", 0, kind, method, 0, on=on) for kind in options.types]
            continue
        for text in texts:
            chosen = product(amounts[text], options.types, [method], options.seeds, options.picks)
            runs += [Run(text, *rest, f"{on} {','.join(texts[text])}") for rest in chosen]

    if not list((options.corpus / "valid").glob("*.jsonl")):
        parser.error(f"--corpus {options.corpus}: no .jsonl in valid")
    bench = Bench(options.model, options.corpus, options.seqlen, texts, options.calib_mix)
    lines = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {of(line) for line in lines}
    todo = sorted(
        (run for run in runs if run not in done), key=lambda run: (run.seed, run.tokens, run.text, run.method, run.pick)
    )
    for _, together in groupby(todo, key=lambda run: replace(run, type="")):
        for line in bench.run(list(together)):
            lines.append(line)
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{of(line)}: {np.mean(line['kl']) * 1e3:.3f}, {line['seconds']} s", file=sys.stderr, flush=True)
    model = bench.checkpoint.architecture
    tokens = model.num_experts / model.experts_per_token if model.num_experts else 1.0  # of which an expert sees one
    table(lines, runs, tokens * max(model.hidden_size, model.intermediate_size))
    by_file(lines, runs, bench.judged_on)


if __name__ == "__main__":
    main()
