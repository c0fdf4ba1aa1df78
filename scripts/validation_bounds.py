#!/usr/bin/env python3
"""Prints what the bounds of xent_quant.validation.gates rest on: errors of each type's weights after rounding with an
importance and after GPTQ that follows a model quantised in this type, how many blocks would be called damaged if their scale
were doubled, and how far llama.cpp is from the exact path.

    scripts/validation_bounds.py [MIX …]
    scripts/validation_bounds.py --weights-only
    scripts/validation_bounds.py --weights-only --model DIR --tensors 'layers.0.*(self_attn|experts.7.)'

Without --model it is the bundled miniature. Calibrates on two of the validation suites: errors of weights are wanted here, not
quality. Of a large model, tensors may be chosen by a regular expression; the pass runs only as far as the last of them.
"""

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from _walk import slot, walk

import xent_quant
from exporters.interface import Slot
from xent_quant import formats
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32, U8, QuantFormat
from xent_quant.methods.gptq import GPTQ
from xent_quant.methods.interface import Method
from xent_quant.methods.search import Search
from xent_quant.tensors import Role
from xent_quant.validation.gates import CROSS_KL, CROSS_NLL, WEIGHTS, bits_of
from xent_quant.validation.reference import tokenize
from xent_quant.validation.suites import choose
from xent_quant.validation.validate import validate
from xent_quant.validation.weights import BLOCK, block_errors, compare

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
SCALE_AT = {"Q6_K": 208, "Q3_K": 108, "Q2_K": 80, "TQ2_0": 64}
"""Byte of a block at which its float16 scale is; 0 in the other types."""
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "IQ4_XS", "Q3_K", "Q2_K", "TQ2_0", "IQ1_S", "Q1_0")


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


def doubled(packed: U8, format: QuantFormat) -> U8:
    """The same with every block's scale doubled."""
    changed = packed.reshape(-1, format.block_bytes).copy()
    at = SCALE_AT.get(format.name, 0)
    changed[:, at : at + 2] = (changed[:, at : at + 2].copy().view("<f2") * np.float16(2)).view(np.uint8)
    return changed.reshape(packed.shape)


def missed(wanted: F32, changed: F32, format: QuantFormat, bound: float) -> tuple[int, int]:
    """(blocks of the format in which no block of weights is beyond the bound, blocks), each judged alone."""
    errors = block_errors(changed, wanted)[2]
    together = max(1, format.block_size // BLOCK)
    errors = np.pad(errors, ((0, 0), (0, -errors.shape[1] % together))).reshape(len(errors), -1, together).max(axis=2)
    return int((errors <= bound).sum()), errors.size


def quantised(
    checkpoint: Checkpoint, slots: dict[str, list[Slot]], method: Method, windows: torch.Tensor
) -> list[tuple[str, U8]]:
    """Names and bytes of the linear layers among `slots`."""
    found: list[tuple[str, U8]] = []

    def receive(slot: Slot, packed: U8) -> None:
        if slot.tensor.measured:
            found.append((slot.tensor.name, packed))

    walk(checkpoint, slots, method, receive, windows=windows)
    return found


def weight_errors(checkpoint: Checkpoint, tensors: str) -> None:
    texts = tokenize(checkpoint, choose(["XfictionEN", "XwebccZH"]), 512, 4096)
    windows = torch.from_numpy(np.concatenate([text.windows for text in texts]))
    largest: dict[tuple[str, str], tuple[float, float]] = {}
    unseen: dict[tuple[str, str], tuple[int, int]] = {}
    specs = checkpoint.architecture.tensors()
    chosen = [spec for spec in specs.values() if spec.measured and spec.role is not Role.HEAD and re.search(tensors, spec.name)]
    for kind in TYPES:
        format, bound = formats.get(kind), WEIGHTS[bits_of(kind)][1]
        slots = {spec.name: [slot(spec, format)] for spec in (checkpoint.architecture.embedding, *chosen)}
        for method in (Search(), GPTQ()):
            key = kind, type(method).__name__
            for name, packed in quantised(checkpoint, slots, method, windows):
                columns = specs[name].shape[1]
                error = compare(name, checkpoint, Values(checkpoint, format.dequantize(packed)[:, :columns], kind))
                before = largest.get(key, (0.0, 0.0))
                largest[key] = (max(before[0], error.error), max(before[1], error.worst))
                wrong = format.dequantize(doubled(packed, format))[:, :columns]
                more = missed(checkpoint.read(name), wrong, format, bound)
                unseen[key] = tuple(np.add(unseen.get(key, (0, 0)), more))
    for (kind, method_name), (whole, block) in sorted(largest.items()):
        bounds, (count, blocks) = WEIGHTS[bits_of(kind)], unseen[kind, method_name]
        print(
            f"{kind:8} {method_name:8} tensor error up to {whole:.4f} (bound {bounds[0]}), block {block:.3f} "
            f"(bound {bounds[1]}); doubled scales missed: {count:,} of {blocks:,}"
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
    parser.add_argument("--model", help="checkpoint; default: the bundled miniature")
    parser.add_argument("--tensors", default="", metavar="REGEX", help="of which weights are compared; default: all")
    parser.add_argument("mixes", nargs="*", default=MIXES)
    arguments = parser.parse_args()
    if arguments.model and not arguments.weights_only:
        parser.error("--model goes with --weights-only")
    if arguments.weights_only and arguments.mixes is not MIXES:
        parser.error("mixes are for the runtime, which --weights-only leaves out")
    checkpoint = Checkpoint.open(resolve(arguments.model))
    weight_errors(checkpoint, arguments.tensors)
    if not arguments.weights_only:
        runtime_errors(checkpoint, arguments.mixes)


if __name__ == "__main__":
    main()
