#!/usr/bin/env python3
"""What this machine makes of the project, in one go: the benchmarks beside this file, one after the other, and their figures as
JSON.

    scripts/bench [--parts products types layer stock] [--model DIR] [--layers 2] [--tokens 32k] [--folder DIR] [--json FILE]

products    matrix products and Hessian sums, torch's way and ours (`bench_products.py`)
types       every quant type: weights/s and error beside ggml's own functions (`bench_quantize.py`)
layer       the first layer by GPTQ, by clock, CPU and memory (`bench_layers.py`); then `calibrate` over the whole model
stock       whole commands without text, by rounding and with that imatrix, beside llama-quantize (`bench_calibrate.py --measure
            stock`); needs `scripts/stock_llama`, and is left out with a word where that was not run

The last two take --model, else a random checkpoint of A4.2B's shapes with so many --layers, which is made first (4.6 GB for two)
and removed. Each part is a process of its own; a quiet machine is what they want. Exit 1 where one failed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARTS = ("products", "types", "layer", "stock")


def script(name: str, *arguments: str, json_to: Path, also: tuple[str, ...] = ()) -> Any:
    """The figures of a benchmark, None where it failed; what it prints is seen. `also` comes behind its own options."""
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments, "--json", str(json_to), *also]
    done = subprocess.run(command, check=False)
    return json.loads(json_to.read_text("utf-8")) if not done.returncode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--layers", type=int, default=2, help="of the random one")
    parser.add_argument("--tokens", default="32k", help="of text")
    parser.add_argument("--threads", default=str(os.cpu_count()), help="of whole commands")
    parser.add_argument("--folder", type=Path, help="where it is made; default: the system's for temporary files")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(f"load before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as room:
        folder = Path(room)
        if not options.model and {"layer", "stock"} & {*options.parts}:
            options.model = str(folder / "model")
            make = [sys.executable, str(HERE / "make_checkpoint.py"), "--preset", "A4.2B", "--layers", str(options.layers)]
            subprocess.run([*make, "--output", options.model], check=True)
        for part in options.parts:
            print(f"\n{part}", flush=True)
            begun = time.perf_counter()
            found[part] = PART[part](options, folder)
            print(f"({time.perf_counter() - begun:.0f} s)", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")
    failed = [part for part in options.parts if found[part] is None]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def products(options: argparse.Namespace, folder: Path) -> Any:
    return script("bench_products", json_to=folder / "products.json")


def types(options: argparse.Namespace, folder: Path) -> Any:
    return script("bench_quantize", json_to=folder / "types.json")


def layer(options: argparse.Namespace, folder: Path) -> Any:
    text = ("--tokens", options.tokens, "--threads", options.threads, "--allow-tokenizer-mismatch")
    also = ("--", "--type", "Q4_K_M", "--format", "gguf", "--method", "gptq", *text)
    by_gptq = script(
        "bench_layers", options.model, str(folder / "out"), "--layers", "1", json_to=folder / "layer.json", also=also
    )
    begun = time.perf_counter()
    command = [sys.executable, "-m", "xent_quant.cli.main", "calibrate", options.model, "--output", str(imatrix(folder))]
    done = subprocess.run([*command, *text[:4]], check=False)
    seconds = time.perf_counter() - begun
    print(f"calibrate: {seconds:.1f} s, its start among them", flush=True)
    return None if by_gptq is None or done.returncode else {"gptq": by_gptq, "calibrate s": seconds}


def stock(options: argparse.Namespace, folder: Path) -> Any:
    from stock_llama import Missing, program

    try:
        program("quantize")
    except Missing as error:
        print(f"left out: {error}")
        return {"left out": str(error)}
    known = ("--imatrix", str(imatrix(folder))) if imatrix(folder).exists() else ()
    return script(
        "bench_calibrate", "--measure", "stock", "--model", options.model, *known, "--threads", options.threads,
        json_to=folder / "stock.json",
    )  # fmt: skip


def imatrix(folder: Path) -> Path:
    """What `layer` leaves for `stock`."""
    return folder / "imatrix.gguf"


PART = {"products": products, "types": types, "layer": layer, "stock": stock}

if __name__ == "__main__":
    main()
