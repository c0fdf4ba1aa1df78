#!/usr/bin/env python3
"""Prints what calibration costs: seconds, tokens/s and peak memory, each measurement in a process of its own.

    scripts/bench_calibrate.py [--model DIR] [--tokens 32k] [--method imatrix gptq] [--measure pass layer command]
                               [--calib FILE] [--layers N] [--experts N] [--mix Q4_K_M] [--beside TREE]
                               [--also onnx]
    scripts/bench_calibrate.py --measure stock --model DIR [--imatrix FILE] [--twin DIR] [--threads N]
    scripts/bench_calibrate.py --measure stock-text --model DIR --calib FILE --tokens 32k [--twin DIR] [--threads N]

pass: the calibration pass alone, statistics made and dropped, no weight quantised; tokens/s counts every token once, whatever
the number of layers. layer: the first layer alone, its weights quantised (--type, one type for all of them); seconds apart for
the statistics (which run the rows through norms, gates and activations again), the correction of weights for drifted inputs,
the factorisation and inversion of Hessians, the weighted search, GPTQ's rounding (error feedback and descent; the search of
blocks within it included), and all else ("forward": weights read, multiplied, and handed on). command: `xent-quant MODEL
--type … --format gguf` as a person runs it; after that, with --beside, the same of another checkout of this project (`git
worktree add --detach TREE COMMIT`), and with --also the same with a second format, their figures over the first's. stock:
`xent-quant DIR --type Q4_K_M` without text, by `--method rtn` and with a FILE of statistics (`xent-quant calibrate` makes
one), and llama-quantize on as many threads, then its seconds over ours. stock-text: `calibrate` beside llama-imatrix on one
plain FILE of text; then, unless --method leaves gptq out, `xent-quant DIR --type …` with that text (--mix; XENT4 is what
--bits 4 takes) beside llama-imatrix and llama-quantize to Q4_K_M. These are given a BF16 GGUF, which stock's converter does
not make of XVERSE's mixtures. What it takes is measured with --twin, a checkpoint of the same shapes that it reads
(`make_checkpoint.py --config scripts/shapes/a42b-as-ling.json --layers N`; --model may be the same one), and added to the side
of llama-quantize, else left out. Nothing is padded on stock's side: rows that 256 does not divide get Q5_0 and Q8_0, which it
makes faster. "whole", "CPU" and "peak" (ru_maxrss) are of the child process, imports included; seconds of CPU hardly change
where other jobs run beside it. The first run compiles kernels: run twice.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stock_llama import TOLD_PRE_TOKENIZER, Missing, converter, home


def session(options: argparse.Namespace) -> Any:
    from calibration.session import Session
    from xent_quant.checkpoint.hub import resolve
    from xent_quant.checkpoint.reader import Checkpoint
    from xent_quant.options import CalibrationOptions

    text = CalibrationOptions(calib=options.calib, tokens=options.tokens, seqlen=options.seqlen)
    return Session(Checkpoint.open(resolve(options.model)), text)


def run_pass(options: argparse.Namespace, method: str) -> dict[str, float]:
    """The pass over all layers, or the first --layers; the head is left out."""
    import torch
    from _walk import first_layers, walk

    from xent_quant.methods import METHODS

    opened = session(options)
    windows = torch.from_numpy(opened.text.windows)
    layers = options.layers or opened.checkpoint.architecture.num_layers
    started = time.perf_counter()
    walk(
        first_layers(opened.checkpoint, layers), {}, METHODS[method]("normal"), lambda *_: None, windows=windows, measure_all=True
    )
    seconds = time.perf_counter() - started
    return {"tokens": windows.numel(), "seconds": seconds, "tokens/s": windows.numel() / seconds}


class Clock:
    """Seconds of all threads `spent` in functions, by part; those of wrapped functions that they call are counted there alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._mine, self._adding = threading.local(), threading.Lock()

    def wrap(self, part: str, owner: Any, name: str) -> None:
        """Replace a function of a class or module by one that is timed."""
        work = getattr(owner, name)
        self.spent.setdefault(part, 0.0)

        def timed(*arguments: Any, **named: Any) -> Any:
            inner = self._mine.__dict__.setdefault("inner", [0.0])
            inner.append(0.0)
            started = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                seconds = time.perf_counter() - started
                with self._adding:
                    self.spent[part] += seconds - inner.pop()
                inner[-1] += seconds

        setattr(owner, name, timed)


def run_layer(options: argparse.Namespace, method: str) -> dict[str, float]:
    """One layer's statistics and quantisation, by parts."""
    import torch
    from _walk import first_layers, slot, walk

    from calibration.correction import Correction, Regression
    from calibration.measuring import Measuring
    from xent_quant import formats, linalg
    from xent_quant.methods import METHODS
    from xent_quant.methods.gptq import GPTQ
    from xent_quant.methods.search import Search
    from xent_quant.walk.loop import Walk

    clock = Clock()
    clock.wrap("forward", Walk, "run")
    clock.wrap("statistics", Measuring, "measure")
    clock.wrap("correction", Correction, "moved")
    clock.wrap("correction", Regression, "moved")
    clock.wrap("correction", Regression, "of")
    clock.wrap("factorisation", linalg, "root")
    clock.wrap("search", Search, "quantize")
    clock.wrap("rounding", GPTQ, "quantize")
    opened = session(options)
    checkpoint, kind = first_layers(opened.checkpoint, 1), formats.get(options.type)
    tensors = [spec for spec in checkpoint.architecture.tensors().values() if spec.layer == 0 and spec.measured]
    if options.experts:
        tensors = [spec for spec in tensors if not spec.shared and (spec.expert or 0) < options.experts]
    slots = {spec.name: [slot(spec, kind)] for spec in tensors}
    windows = torch.from_numpy(opened.text.windows)
    walk(checkpoint, slots, METHODS[method]("normal"), lambda *_: None, windows=windows)
    return {"tokens": windows.numel(), **clock.spent}


MEASURES = {"pass": run_pass, "layer": run_layer}


class Stock:
    """Commands of ours and of stock's for one model, in a folder of their own, and what they take."""

    def __init__(self, options: argparse.Namespace, room: str) -> None:
        self.options, self.room, self.float = options, Path(room), Path(room, "model-BF16.gguf")
        self.bin = home() / "bin"
        self.converter: dict[str, float] = {}
        if options.twin:
            files = [options.twin, "--outtype", "bf16", "--outfile", str(self.float)]
            command = converter(home(), TOLD_PRE_TOKENIZER.format("default"))  # of a random one it knows no digest
            self.converter = child([*command, *files], stderr=subprocess.DEVNULL)[1]
            if Path(options.twin).resolve() != Path(options.model).resolve():
                self.float.unlink()
        if not self.float.exists():
            self.ours("--type", "BF16", "--method", "rtn", folder=self.room)
        print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)

    def ours(self, *words: str, folder: Path | None = None) -> dict[str, float]:
        target = folder or self.room / "ours"
        command = [sys.executable, "-m", "xent_quant.cli.main", self.options.model, "--format", "gguf", "--name", "model"]
        command += ["--threads", self.options.threads, "--allow-tokenizer-mismatch", "--output", str(target), *words]
        facts = child(command)[1]
        if not folder:
            shutil.rmtree(target)
        return facts

    def quantize(self, *words: str) -> dict[str, float]:
        files = [str(self.float), str(self.room / "stock.gguf")]
        command = [str(self.bin / "llama-quantize"), *words, *files, "Q4_K_M", self.options.threads]
        facts = child(command, stderr=subprocess.DEVNULL)[1]
        os.remove(files[1])
        return facts

    def without_text(self) -> Iterator[dict[str, Any]]:
        known = ["--imatrix", self.options.imatrix] if self.options.imatrix else []
        converter = {"converter": self.converter} if self.converter else {}
        for name, ours, theirs in [("rtn", ["--method", "rtn"], []), *([("imatrix", known, known)] if known else [])]:
            steps = {"llama-quantize": self.quantize(*theirs), **converter}
            yield from show(name, self.ours("--type", "Q4_K_M", *ours), steps)

    def with_text(self) -> Iterator[dict[str, Any]]:
        options, found = self.options, [str(self.room / f"{side}-imatrix.gguf") for side in ("ours", "stock")]
        (text,), tokens = options.calib, int(options.tokens.removesuffix("k")) * (1000 if options.tokens.endswith("k") else 1)
        read = ("--calib", text, "--tokens", options.tokens, "--seqlen", str(options.seqlen), "--threads", options.threads)
        command = [sys.executable, "-m", "xent_quant.cli.main", "calibrate", options.model, "--output", found[0], *read]
        calibrate = child(command)[1]
        command = [str(self.bin / "llama-imatrix"), "-m", str(self.float), "-f", text, "-o", found[1], "--no-ppl"]
        command += ["-c", str(options.seqlen), "--chunks", str(tokens // options.seqlen), "-t", options.threads]
        imatrix = {"llama-imatrix": child(command, stderr=subprocess.DEVNULL)[1]}
        yield from show("calibrate", calibrate, imatrix)
        if "gptq" not in options.method:
            return
        steps = imatrix | {"llama-quantize": self.quantize("--imatrix", found[1])}
        steps |= {"converter": self.converter} if self.converter else {}
        for mix in options.mix:
            yield from show(f"gptq {mix}", self.ours("--type", mix, *read[:6]), steps)


def show(name: str, ours: dict[str, float], others: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Prints and yields ours, each step of the other side's, and the ratio of their sum to ours."""
    both = ("whole s", "CPU s")
    ratios = {key: sum(step[key] for step in others.values()) / ours[key] for key in both}
    for side, values in (("ours", ours), *others.items(), ("ratio", ratios)):
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(f"{name:12} {side:14} {shown}", flush=True)
        yield {"command": name, "of": side, **values}


def command(options: argparse.Namespace, method: str, mix: str, *also: str, tree: Path | None = None) -> dict[str, float]:
    """What the command of this project, or of another `tree` of it, takes; `also`: formats beside GGUF."""
    with tempfile.TemporaryDirectory(dir=options.folder) as room:
        words = [sys.executable, "-m", "xent_quant.cli.main", *([options.model] if options.model else [])]
        words += ["--type", mix, "--format", "gguf", "--method", method, "--tokens", options.tokens]
        words += ["--seqlen", str(options.seqlen), *(f"--calib={text}" for text in options.calib)]
        words += ["--allow-tokenizer-mismatch", *(f"--format={name}" for name in also)]  # of random checkpoints
        return child([*words, "--output", room], tree=tree)[1]


def child(command: list[str], stderr: int | None = None, tree: Path | None = None) -> tuple[str, dict[str, float]]:
    """Standard output, and seconds, seconds of CPU and peak RSS in GiB of the whole process; `tree`: its modules come first."""
    environment = os.environ | ({"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"} if tree else {})
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=stderr, env=environment)
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
    measures = ["pass", "layer", "command"]
    parser.add_argument("--measure", nargs="+", default=measures, choices=[*measures, "stock", "stock-text"])
    parser.add_argument("--layers", type=int, help="the pass over the first layers only")
    parser.add_argument("--experts", type=int, help="the layer's attention and first experts only")
    parser.add_argument("--type", default="Q4_K", help="of the layer's weights")
    parser.add_argument("--mix", nargs="+", default=["Q4_K_M"], help="--type of the command with text")
    parser.add_argument("--beside", type=Path, metavar="TREE", help="another checkout, whose command runs after this one's")
    parser.add_argument("--also", metavar="FORMAT", help="of the command: with this format beside GGUF, after GGUF alone")
    parser.add_argument("--imatrix", help="of stock: a file of statistics")
    parser.add_argument("--twin", help="of stock: a checkpoint of the model's shapes that llama.cpp's converter reads")
    parser.add_argument("--folder", type=Path, help="where files are made; default: the system's for temporary files")
    parser.add_argument("--threads", default="2", help="of stock")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(MEASURES[options.child](options, options.method[0])))
        return
    beside_stock = {"stock", "stock-text"} & {*options.measure}
    if beside_stock and not options.model:
        parser.error(f"--measure {min(beside_stock)}: of which --model?")
    if "stock-text" in beside_stock and len(options.calib) != 1:
        parser.error("--measure stock-text: with one file of plain text, --calib FILE")
    found: list[dict[str, Any]] = []
    # Nothing heavy is imported here: a child's ru_maxrss begins with its parent's size.
    for measure in options.measure:
        if measure.startswith("stock"):
            with tempfile.TemporaryDirectory(dir=options.folder) as room:
                try:
                    stock = Stock(options, room)
                except Missing as error:
                    sys.exit(f"bench_calibrate: {error}")
                found += stock.without_text() if measure == "stock" else stock.with_text()
            continue
        for method, mix in itertools.product(options.method, options.mix if measure == "command" else [""]):
            if measure == "command":
                facts = command(options, method, mix)
                if options.beside:
                    tree = options.beside.resolve(strict=True)
                    found += show(f"{method} {mix}", facts, {tree.name: command(options, method, mix, tree=tree)})
                if options.also:
                    both = command(options, method, mix, options.also)
                    found += show(f"{method} {mix}", facts, {f"gguf+{options.also}": both})
                if options.beside or options.also:
                    continue
            else:
                output, whole = child([sys.executable, *sys.argv, "--child", measure, "--method", method])
                facts = json.loads(output) | whole
            shown = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
            print(f"{measure:8} {method:8} {mix:8} {shown}", flush=True)
            found.append({"measure": measure, "method": method, **({"mix": mix} if mix else {}), **facts})
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
