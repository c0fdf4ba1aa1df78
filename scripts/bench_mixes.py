#!/usr/bin/env python3
"""Measures mixes of quant types: KL divergence from the unquantised model in stock llama.cpp, against the bytes that the mix
takes in the released models' shapes.

    scripts/bench_mixes.py [--model DIR ...] [--mixes Q4_K_M XENT4 ...] [--trial 'NAME: BASE REGEX=TYPE ...'] [--windows 3]

Every model (default: the bundled miniature) is calibrated on the bundled calibration text, quantised once per mix in one
walk over its weights, and run by llama.cpp on the bundled validation suites: windows of 512 tokens, second half scored,
float32 KV cache, KL(unquantised ‖ quantised) per token in nats. "per thousand" is ten to the third of the mean; ± is its
standard error over windows. GiB are of tensor data, from headers alone. A trial is a mix by name with overrides as of
--tensor-type. Lines are sorted by size.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import torch
from make_checkpoint import PRESETS
from transformers import PreTrainedTokenizerFast

from calibration.documents import documents
from calibration.session import Windows
from exporters.gguf.export import GGUFExporter
from exporters.gguf.plan import plan
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.methods.search import Search
from xent_quant.recipes import Recipe, recipe
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.validation.measures import kl_divergence, log_softmax, scored, windows
from xent_quant.walk.job import run

DATA = miniature().parent
CONTEXT = 512
MIXES = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "Q2_K"]


def token_windows(folder: Path, tokenizer: PreTrainedTokenizerFast, per_suite: int | None) -> np.ndarray:
    """[n, CONTEXT] token ids, the same number from each text."""
    parts = []
    for path in sorted(folder.glob("*.txt")):
        ids = tokenizer("\n\n".join(documents(path)), add_special_tokens=False)["input_ids"]
        parts.append(windows(ids, CONTEXT)[:per_suite])
    return np.concatenate(parts)


def chosen_recipe(text: str) -> Recipe:
    """A mix by name, or a trial."""
    name, separator, rest = text.partition(":")
    if not separator:
        return recipe(type=name, imatrix=True)
    base, *overrides = rest.split()
    return replace(recipe(type=base, tensor_types=overrides, imatrix=True), name=name)


def divergences(file: Path, texts: np.ndarray, reference: list[np.ndarray] | None) -> tuple[list[np.ndarray], np.ndarray]:
    """Log-probabilities of every window's scored positions, and the mean KL divergence of each window."""
    positions, _ = scored(CONTEXT)
    with LlamaCpp(file, CONTEXT) as llama:
        found = [log_softmax(llama.logits(list(map(int, window)))[positions]) for window in texts]
    kl = [0.0 if reference is None else kl_divergence(p, q).mean() for p, q in zip(reference or found, found, strict=True)]
    return found, np.array(kl)


def measure(folder: Path, recipes: list[Recipe], per_suite: int) -> dict[str, tuple[float, float]]:
    """Mean KL divergence and its standard error, by mix."""
    checkpoint = Checkpoint.open(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    calibration = torch.from_numpy(token_windows(DATA / "calibration", tokenizer, None))
    texts = token_windows(DATA / "suites", tokenizer, per_suite)
    with tempfile.TemporaryDirectory() as room:
        exporters = [
            GGUFExporter(checkpoint, plan(checkpoint.architecture, one), Path(room), "model", Search())
            for one in [recipe(type="F32"), *recipes]
        ]
        run(checkpoint, exporters, Path(room), text=Windows(calibration))
        files = [exporter.files[0] for exporter in exporters]
        reference, _ = divergences(files[0], texts, None)
        result = {}
        for one, file in zip(recipes, files[1:], strict=True):
            _, kl = divergences(file, texts, reference)
            result[one.name] = float(kl.mean()), float(kl.std(ddof=1) / len(kl) ** 0.5)
            print(f"{folder.name}: {one.name} {1e3 * kl.mean():.3f}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="checkpoint folder; repeatable")
    parser.add_argument("--mixes", nargs="*", default=MIXES)
    parser.add_argument("--trial", action="append", default=[], help="'NAME: BASE REGEX=TYPE …'; repeatable")
    parser.add_argument("--windows", type=int, default=3, help="per suite")
    options = parser.parse_args()
    torch.set_num_threads(2)
    numba.set_num_threads(2)
    recipes = [chosen_recipe(text) for text in [*options.mixes, *options.trial]]
    shapes = {name: Architecture.from_config(config) for name, config in PRESETS.items()}
    plans = {one.name: {name: plan(shape, one) for name, shape in shapes.items()} for one in recipes}
    models = options.model or [miniature()]
    measured = {folder.resolve().name: measure(folder.resolve(), recipes, options.windows) for folder in models}

    sizes = "".join(f" | {name} GiB | bits" for name in shapes)
    divergence = "".join(f" | KL·10³ {name}" for name in measured)
    print(f"| mix{sizes}{divergence} |\n|{'---|' * (1 + 2 * len(shapes) + len(measured))}")
    for one in sorted(recipes, key=lambda one: -next(iter(plans[one.name].values())).nbytes):
        cells = [one.name]
        for planned in plans[one.name].values():
            cells += [f"{planned.nbytes / 2**30:.2f}", f"{planned.bits_per_weight:.2f}"]
        cells += [f"{1e3 * mean:.2f} ± {1e3 * error:.2f}" for mean, error in (by[one.name] for by in measured.values())]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
