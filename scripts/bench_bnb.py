#!/usr/bin/env python3
"""Exports a checkpoint through bitsandbytes and measures it in transformers: perplexity on text, size, memory.

    scripts/bench_bnb.py --corpus DIR [--model DIR] [--kinds nf4 nf4-gptq int8 fp4] [--tokens 16384] [--json FILE]
    scripts/bench_bnb.py --model DIR            # without text: size, time and peak memory of the exports only
    scripts/bench_bnb.py --divergence 4096      # and KL divergence from the checkpoint, on so many tokens of each bundled suite

DIR holds one .jsonl file a suite, each line an object with the field `text`. Texts of a suite are joined, cut into
windows of 512 tokens, and the second half of each window is scored, as llama-perplexity does. The standard error of a
ratio is that of the mean difference of log-probabilities over windows. Divergence is what `xent-quant validate --runtime torch`
says, in nats per token, the mean of the six suites; ± is its standard error.
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from xent_quant.checkpoint.hub import resolve

WINDOW = 512
KINDS = {
    "bf16": ["--bits", "16"],
    "int8": ["--bits", "8"],
    "nf4": ["--bits", "4"],
    "fp4": ["--bits", "4", "--bnb-type", "fp4"],
}
KINDS |= {f"{kind}-gptq": [*options, "--method", "gptq"] for kind, options in KINDS.items() if kind != "bf16"}


def export(model: Path, kind: str, output: Path) -> None:
    """Run the real command, and print its time and peak memory."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "xent_quant.cli.main", str(model), "--format", "bnb", *KINDS[kind], "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    seconds, peak = time.perf_counter() - started, usage.ru_maxrss / 2**20
    size = sum(file.stat().st_size for file in (output / "bnb").glob("*.safetensors"))
    print(f"{kind}: {size / 1e9:.3f} GB in {seconds:.1f} s, peak RSS {peak:.2f} GiB", flush=True)


def divergence(model: Path, exported: Path, tokens: int, runtime: str = "torch") -> tuple[float, float]:
    """Mean KL divergence over the bundled suites, of so many tokens each, and its standard error, by the real command."""
    command = [sys.executable, "-m", "xent_quant.cli.main", "validate", str(exported), "--reference", str(model)]
    command += ["--runtime", runtime, "--max-tokens", str(tokens), "--json", "-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode not in (0, 3):  # 3: out of tolerance, or undecided
        raise SystemExit(done.returncode)
    found = [suite["kl"]["value"] for suite in json.loads(done.stdout)["suites"]]
    return sum(kl["value"] for kl in found) / len(found), math.hypot(*(kl["error"] for kl in found)) / len(found)


def windows(file: Path, tokenizer: object, limit: int) -> np.ndarray:
    """Token ids [n, WINDOW] of a suite's text, at most `limit` tokens."""
    text = "\n".join(json.loads(line)["text"] for line in file.open(encoding="utf-8"))
    ids = tokenizer(text[: 8 * limit], return_token_type_ids=False)["input_ids"][:limit]  # type: ignore[operator]
    return np.array(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)


def log_probabilities(folder: Path, suites: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean log-probability of the scored tokens of every window [n] float64, in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto").eval()
    result = {}
    for suite, ids in suites.items():
        means = []
        for batch in torch.from_numpy(ids).split(8):
            with torch.inference_mode():
                logits = model(batch.to(model.device)).logits[:, WINDOW // 2 : -1].float()
            targets = batch[:, WINDOW // 2 + 1 :].to(logits.device)
            scores = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
            means.append(scores.double().mean(-1).cpu())
        result[suite] = torch.cat(means).numpy()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: the bundled miniature")
    parser.add_argument("--corpus", type=Path, help="folder of .jsonl files, one a suite")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["int8", "nf4", "fp4"])
    parser.add_argument("--tokens", type=int, default=16384, help="at most, of each suite")
    parser.add_argument("--divergence", type=int, metavar="TOKENS", help="also measure it, on so many tokens of each suite")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line at every multiplication
    model = resolve(options.model)
    if options.corpus and not list(options.corpus.glob("*.jsonl")):
        parser.error(f"--corpus {options.corpus}: no .jsonl in it")
    kinds = ["bf16", *(kind for kind in options.kinds if kind != "bf16")] if options.corpus else options.kinds
    measured: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in kinds:  # all before a model is loaded, which would count as theirs
            export(model, kind, Path(temporary) / kind)
        for kind in kinds if options.divergence else ():
            value, error = divergence(model, Path(temporary) / kind / "bnb", options.divergence)
            print(f"{kind}: KL divergence {value:.6f} ± {error:.6f}", flush=True)
        suites: dict[str, np.ndarray] = {}
        for kind in kinds if options.corpus else ():
            from transformers import AutoTokenizer

            folder = Path(temporary) / kind / "bnb"
            tokenizer = AutoTokenizer.from_pretrained(folder)
            suites = suites or {
                file.stem: windows(file, tokenizer, options.tokens) for file in sorted(options.corpus.glob("*.jsonl"))
            }
            measured[kind] = log_probabilities(folder, suites)
    if not options.corpus:
        return
    print(f"\n{'suite':<18}{'tokens':>8}{'bf16':>10}", *(f"{kind:>10}{'ratio ± s.e.':>18}" for kind in kinds[1:]))
    figures: dict[str, dict[str, float]] = {}
    for suite in [*suites, "all"]:
        names = list(suites) if suite == "all" else [suite]
        base = np.concatenate([measured["bf16"][name] for name in names])
        figures[suite] = {"tokens": base.size * (WINDOW // 2 - 1), "bf16": math.exp(-base.mean())}
        line = f"{suite:<18}{figures[suite]['tokens']:>8}{figures[suite]['bf16']:>10.4f}"
        for kind in kinds[1:]:
            other = np.concatenate([measured[kind][name] for name in names])
            ratio = math.exp((base - other).mean())
            error = ratio * float((base - other).std(ddof=1)) / math.sqrt(base.size)
            figures[suite] |= {kind: math.exp(-other.mean()), f"{kind}_ratio": ratio, f"{kind}_ratio_error": error}
            line += f" {figures[suite][kind]:>10.4f}{ratio:>10.4f} ± {error:.4f}"
        print(line)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), "utf-8")


if __name__ == "__main__":
    main()
