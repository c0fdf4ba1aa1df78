#!/usr/bin/env python3
"""Prints what calibration costs: seconds, tokens/s and peak memory, each measurement in a process of its own.

    scripts/bench_calibrate.py [--model DIR] [--tokens 32k] [--method imatrix gptq] [--measure pass layer command]
                               [--calib FILE] [--layers N] [--experts N] [--bits 4]

pass: the calibration pass alone, statistics made and dropped, weights handed back as they were; tokens/s counts every token
once, whatever the number of layers. layer: the same for the first layer, whose weights are quantised as well (--type, one
type for all of them); seconds apart for the forward pass with its statistics, the correction of weights for drifted inputs,
the factorisation of Hessians, the weighted search, and GPTQ's rounding (error feedback and descent; the search of blocks
within it included). command: `xent-quant MODEL --bits … --format gguf` as a person runs it. "whole", "CPU" and "peak"
(ru_maxrss) are of the child process, imports included; seconds of CPU hardly change where other jobs run beside it. The first
run compiles kernels: run twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def session(options: argparse.Namespace) -> Any:
    from calibration.session import Session
    from xent_quant.checkpoint.hub import resolve
    from xent_quant.checkpoint.reader import Checkpoint
    from xent_quant.options import CalibrationOptions

    text = CalibrationOptions(calib=options.calib, tokens=options.tokens, seqlen=options.seqlen)
    return Session(Checkpoint.open(resolve(options.model)), text)


def wanted(names: list[str], layers: int | None) -> list[str]:
    """Names of the embedding and the first layers, or all."""
    if layers is None:
        return names
    first = ("model.embed_tokens.", *(f"model.layers.{layer}." for layer in range(layers)))
    return [name for name in names if name.startswith(first)]


def run_pass(options: argparse.Namespace, method: str) -> dict[str, float]:
    """The pass over all layers, or the first --layers."""
    from functools import partial

    import numpy as np
    import torch
    from calibration.running import RunningCalibration

    opened = session(options)
    windows = torch.from_numpy(opened.text.windows)
    running = RunningCalibration(opened.model, windows, hessian=method == "gptq", follow=method == "gptq")
    started = time.perf_counter()
    for name in wanted(list(opened.checkpoint.infos), options.layers):
        running.get(name)
        for start, weights in opened.checkpoint.slices(name):
            running.quantized(name, start, partial(np.asarray, weights))
    seconds = time.perf_counter() - started
    return {"tokens": windows.numel(), "seconds": seconds, "tokens/s": windows.numel() / seconds}


def run_layer(options: argparse.Namespace, method: str) -> dict[str, float]:
    """One layer's statistics and quantisation, by parts."""
    from functools import partial

    import numpy as np
    import torch
    from calibration.running import RunningCalibration

    from xent_quant import formats
    from xent_quant.methods import METHODS, gptq
    from xent_quant.methods.search import Search

    spent = {"statistics": 0.0, "correction": 0.0, "factorisation": 0.0, "search": 0.0, "quantisation": 0.0}

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                spent[part] += time.perf_counter() - started

        return timing

    opened = session(options)
    windows = torch.from_numpy(opened.text.windows)
    running = RunningCalibration(opened.model, windows, hessian=method == "gptq", follow=method == "gptq")
    kind, way = formats.get(options.type), METHODS[method]("normal")
    gptq.Curvature.of = timed("factorisation", gptq.Curvature.of)  # type: ignore[method-assign]
    Search.quantize = timed("search", Search.quantize)  # type: ignore[method-assign]
    get, target = timed("statistics", running.get), timed("correction", running.target)
    quantize = timed("quantisation", way.quantize)
    names = wanted(list(opened.checkpoint.infos), 1)
    if options.experts:
        names = names[: names.index(f"model.layers.0.mlp.experts.{options.experts}.gate_proj.weight")]
    for name in names:
        known = get(name)
        for start, weights in opened.checkpoint.slices(name):
            if known is not None:
                rows, columns = weights.shape
                padded = np.pad(target(name, start, weights), ((0, 0), (0, -columns % kind.block_size)))
                packed = quantize(padded, kind, known.padded(padded.shape[1]), name=name)
                weights = kind.dequantize(packed)[:rows, :columns]
            running.quantized(name, start, partial(np.asarray, weights))
    spent["rounding"] = spent.pop("quantisation") - spent["factorisation"] - spent["search"]
    return {"tokens": windows.numel(), **spent}


MEASURES = {"pass": run_pass, "layer": run_layer}


def child(command: list[str]) -> tuple[str, dict[str, float]]:
    """Standard output, and seconds, seconds of CPU and peak RSS in GiB of the whole process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(os.waitstatus_to_exitcode(status))
        output.seek(0)
        facts = {"whole s": time.perf_counter() - started, "CPU s": usage.ru_utime + usage.ru_stime}
        return output.read(), {**facts, "peak GiB": usage.ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: the bundled miniature")
    parser.add_argument("--tokens", default="32k")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--calib", action="append", default=[], help="text, as of the command; default: the bundled text")
    parser.add_argument("--method", nargs="+", default=["imatrix", "gptq"], choices=["imatrix", "gptq"])
    parser.add_argument("--measure", nargs="+", default=["pass", "layer", "command"], choices=["pass", "layer", "command"])
    parser.add_argument("--layers", type=int, help="the pass over the first layers only")
    parser.add_argument("--experts", type=int, help="the layer's attention and first experts only")
    parser.add_argument("--type", default="Q4_K", help="of the layer's weights")
    parser.add_argument("--bits", default="4", help="of the command")
    parser.add_argument("--child", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(MEASURES[options.child](options, options.method[0])))
        return
    # Nothing heavy is imported here: a child's ru_maxrss begins with its parent's size.
    for measure in options.measure:
        for method in options.method:
            if measure == "command":
                with tempfile.TemporaryDirectory() as room:
                    command = [sys.executable, "-m", "xent_quant.cli.main", *([options.model] if options.model else [])]
                    command += ["--bits", options.bits, "--format", "gguf", "--method", method, "--tokens", options.tokens]
                    command += ["--seqlen", str(options.seqlen), *(f"--calib={text}" for text in options.calib)]
                    _, facts = child([*command, "--output", room])
            else:
                output, whole = child([sys.executable, *sys.argv, "--child", measure, "--method", method])
                facts = json.loads(output) | whole
            shown = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
            print(f"{measure:8} {method:8} {shown}", flush=True)


if __name__ == "__main__":
    main()
