#!/usr/bin/env python3
"""Prints what the bounds of xent_quant.validation.gates rest on: weight errors of each type on the bundled miniature, and how
far llama.cpp is from the exact path.

    scripts/validation_bounds.py [--imatrix FILE] [TYPE …]
"""

import argparse
import tempfile
from pathlib import Path

import xent_quant
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.progress import Silent
from xent_quant.validation.gates import CROSS_KL, CROSS_NLL, WEIGHTS, bits_of
from xent_quant.validation.suites import choose
from xent_quant.validation.validate import open_export, validate
from xent_quant.validation.weights import compare_all

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--weights-only", action="store_true", help="leave the runtime out")
    parser.add_argument("types", nargs="*", default=TYPES)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(miniature())
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.types:
            done = xent_quant.quantize(None, type=kind, imatrix=arguments.imatrix, output=folder, force=True)
            tensors = compare_all(checkpoint, open_export(done.exports[0], checkpoint.architecture).source, Silent())
            for type_name in sorted({tensor.type for tensor in tensors} - {"F32"}):
                own = [tensor for tensor in tensors if tensor.type == type_name]
                whole, block = WEIGHTS[bits_of(type_name)]
                print(
                    f"{kind:8} {type_name:8} tensor error up to {max(t.error for t in own):.4f} (bound {whole}), "
                    f"worst block {max(t.worst for t in own):.3f} (bound {block})"
                )
            if not arguments.weights_only:
                found = validate(done.exports[0], checkpoint, choose(), cache=Path(folder) / "references", max_tokens=2048)
                check = found.cross_check
                assert check is not None
                print(
                    f"{kind:8} llama.cpp against exact: KL {check.kl:.5f} (bound {CROSS_KL}), "
                    f"log-likelihood {check.nll_difference:+.5f} (bound {CROSS_NLL})"
                )


if __name__ == "__main__":
    main()
