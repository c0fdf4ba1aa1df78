#!/usr/bin/env python3
"""Hashes of what every kind of export writes, to see that a rebuild changed no byte.

    scripts/output_hashes.py --output before.json [--only gptq]
    scripts/output_hashes.py --output after.json --against before.json

Three models (the bundled miniature; random ones: tied with grouped queries, and dense), every method, GGUF types, ONNX and
bitsandbytes. Weight files are hashed, not cards. Bits of matrix products belong to the machine: compare on one machine.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xent_quant

TOKENS = 6000
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K", "XENT2", "XENT3")
WEIGHTS = (".gguf", ".safetensors", ".data", ".onnx")
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2, "num_experts": 12, "moe_top_k": 3, "num_shared_experts": 1},
    "dense": {"num_experts": None},
}


def models(folder: Path) -> Iterator[tuple[str, Path | None]]:
    """Name and checkpoint; None is the bundled miniature."""
    yield "mini", None
    base = json.loads((Path(xent_quant.__file__).parent / "data" / "xent-mini" / "config.json").read_text())
    for name, changes in CONFIGS.items():
        config, target = folder / f"{name}.json", folder / name
        config.write_text(json.dumps({**base, "intermediate_size": 224, **changes}))
        maker = [sys.executable, str(Path(__file__).with_name("make_checkpoint.py")), "--config", str(config)]
        subprocess.run([*maker, "--output", str(target)], check=True, stdout=subprocess.DEVNULL)
        yield name, target


def cases(name: str, statistics: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of every export of a model."""
    text = {"tokens": TOKENS}
    methods: tuple[tuple[str, dict[str, Any]], ...] = (("rtn", {}), ("imatrix", text), ("gptq", text))
    for kind in TYPES if name == "mini" else ("Q8_0", "Q4_K_M", "Q2_K"):
        for method, more in methods:
            yield f"{kind} {method}", {"type": kind, "method": method, **more}
        yield f"{kind} imatrix file", {"type": kind, "imatrix": statistics}
    yield "Q4_K_M split", {"type": "Q4_K_M", "method": "rtn", "split_size": "2M"}
    for bits in (4, 8):
        for method, more in methods:
            yield f"onnx {bits} {method}", {"bits": bits, "method": method, "formats": ["onnx"], **more}
    yield "onnx 4 asymmetric gptq", {"bits": 4, "formats": ["onnx"], "symmetric": False, "onnx_dtype": "fp32", **text}
    yield "gguf onnx gptq", {"bits": 4, "formats": ["gguf", "onnx"], **text}
    for bits in (4, 8, 16):
        yield f"bnb {bits}", {"bits": bits, "formats": ["bnb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="an earlier output; exit 1 where a hash differs")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    before: dict[str, str] = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, str] = {}
    differ = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in models(folder):
            statistics = folder / f"{name}.imatrix.gguf"
            xent_quant.calibrate(model, output=statistics, tokens=TOKENS)
            made = [(f"{name} calibrate", [statistics])]
            for number, (case, settings) in enumerate(cases(name, statistics)):
                if options.only not in f"{name} {case}":
                    continue
                output = folder / f"{name}-{number}"
                done = xent_quant.quantize(model, output=output, name=name, **settings)
                made.append((f"{name} {case}", [file for file in done.files if file.suffix in WEIGHTS]))
                for key, files in made:
                    for file in files:
                        label = f"{key}: {file.name}"
                        found[label] = hashlib.sha256(file.read_bytes()).hexdigest()
                        wrong = label in before and before[label] != found[label]
                        differ += wrong
                        if wrong or not options.against:
                            print(f"{'DIFFERS ' if wrong else ''}{label} {found[label][:16]}", flush=True)
                made.clear()
            options.output.write_text(json.dumps(found, indent=1))
    missing = [label for label in before if options.only in label and label not in found]
    print(f"{len(found)} hashes, {differ} differ, {len(missing)} missing {missing[:3]}")
    sys.exit(bool(differ or missing))


if __name__ == "__main__":
    main()
