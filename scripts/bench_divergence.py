#!/usr/bin/env python3
"""Prints what an export loses by each method, in the runtime that runs it: two commands as a person types them.

    scripts/bench_divergence.py [--model DIR] [--tokens 4096] [--methods rtn gptq] -- --format onnx --accuracy-level 0 …

By method `xent-quant MODEL OPTION … --method METHOD`, then `xent-quant validate`: KL divergence from the checkpoint in nats per
token, the mean of the six bundled suites of so many tokens each, at most; ± is its standard error; and its ratio to the first
method's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_bnb import divergence

from xent_quant.checkpoint.hub import resolve


def main() -> None:
    words = [*sys.argv[1:], "--"]
    ours, theirs = words[: words.index("--")], words[words.index("--") + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: the bundled miniature")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    options = parser.parse_args(ours)
    model, first = resolve(options.model), None
    for method in options.methods:
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, "-m", "xent_quant.cli.main", str(model), *theirs, "--method", method]
            done = subprocess.run([*command, "--output", output, "--json"], stdout=subprocess.PIPE, check=True)
            file = Path(json.loads(done.stdout)["files"][0])
            value, error = divergence(model, file if file.suffix == ".gguf" else file.parent, options.tokens, runtime="auto")
        first = first or value
        print(f"{method:8} {value:.6f} ± {error:.6f}, {value / first:.3f}", flush=True)


if __name__ == "__main__":
    main()
