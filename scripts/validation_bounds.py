#!/usr/bin/env python3
"""Prints what the bounds of xent_quant.validation.gates rest on, on the bundled miniature: errors of each type's weights after
rounding with an importance and after GPTQ, and how far llama.cpp is from the exact path.

    scripts/validation_bounds.py [--weights-only] [TYPE …]

Calibrates on two of the validation suites: errors of weights are wanted here, not quality.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import xent_quant
from calibration.running import RunningCalibration
from xent_quant import formats
from xent_quant.checkpoint import architecture as names
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32
from xent_quant.methods.gptq import GPTQ
from xent_quant.methods.search import Search
from xent_quant.model.streaming import StreamingModel
from xent_quant.validation.gates import CROSS_KL, CROSS_NLL, WEIGHTS, bits_of
from xent_quant.validation.reference import tokenize
from xent_quant.validation.suites import choose
from xent_quant.validation.validate import validate
from xent_quant.validation.weights import compare

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K")


class Values:
    """One tensor as a source of weights."""

    def __init__(self, checkpoint: Checkpoint, values: F32, kind: str) -> None:
        self.architecture, self.values, self.kind = checkpoint.architecture, values, kind

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        return self.values[start:stop]

    def type(self, name: str) -> str:
        return self.kind

    def padding(self, name: str) -> float:
        return 0.0


def weight_errors(checkpoint: Checkpoint) -> None:
    texts = tokenize(checkpoint, choose(["XfictionEN", "XwebccZH"]), 512, 4096)
    windows = torch.from_numpy(np.concatenate([text.windows for text in texts]))
    statistics = RunningCalibration(StreamingModel(checkpoint), windows, hessian=True)
    largest: dict[tuple[str, str], tuple[float, float]] = {}
    for name, info in checkpoint.infos.items():
        found = statistics.get(name)
        if found is None or name in (names.EMBEDDING, names.HEAD) or name.endswith("router.weight"):
            continue
        weights = checkpoint.read(name)
        for kind in TYPES:
            format = formats.get(kind)
            missing = -info.shape[1] % format.block_size
            padded = np.pad(weights, ((0, 0), (0, missing)))
            for method in (Search(), GPTQ()):
                packed = method.quantize(padded, format, found.padded(padded.shape[1]), name=name)
                values = format.dequantize(packed)[:, : info.shape[1]]
                error = compare(name, checkpoint, Values(checkpoint, values, kind))
                key = (kind, type(method).__name__)
                before = largest.get(key, (0.0, 0.0))
                largest[key] = (max(before[0], error.error), max(before[1], error.worst))
    for (kind, method_name), (whole, block) in sorted(largest.items()):
        bounds = WEIGHTS[bits_of(kind)]
        print(
            f"{kind:8} {method_name:8} tensor error up to {whole:.4f} (bound {bounds[0]}), block {block:.3f} (bound {bounds[1]})"
        )


def runtime_errors(checkpoint: Checkpoint, mixes: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for mix in mixes:
            done = xent_quant.quantize(None, type=mix, output=folder, force=True)
            found = validate(done.exports[0], checkpoint, choose(), cache=Path(folder) / "references", max_tokens=1024)
            check = found.cross_check
            assert check is not None
            print(
                f"{mix:8} llama.cpp against exact: KL {check.kl:.5f} (bound {CROSS_KL}), "
                f"log-likelihood {check.nll_difference:+.5f} (bound {CROSS_NLL})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-only", action="store_true", help="leave the runtime out")
    parser.add_argument("mixes", nargs="*", default=MIXES)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(miniature())
    weight_errors(checkpoint)
    if not arguments.weights_only:
        runtime_errors(checkpoint, arguments.mixes)


if __name__ == "__main__":
    main()
