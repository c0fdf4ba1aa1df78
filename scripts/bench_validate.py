#!/usr/bin/env python3
"""Validates an export with the real command from a cold cache, and prints peak memory, time and tokens a second.

    scripts/bench_validate.py --model DIR [--export FILE.gguf] [--type Q4_K_M] [--runtimes torch llama.cpp] [--max-tokens 1536]

Without --export it makes one first, rounded to nearest with little effort: figures here are of memory and speed. The peak is
the kernel's ru_maxrss of the command. It counts pages of files that are mapped, and llama.cpp maps the GGUF: "anonymous" and
"file" are the largest of each that was seen four times a second (Linux only), the first what must fit, the second what the
kernel may drop and read again. Tokens count once, though the model runs over them as checkpoint, as dequantised export, and in
the runtime.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from xent_quant.checkpoint.hub import miniature

SUITES = 6


def run(command: list[str]) -> tuple[int, float, float, dict[str, float], str]:
    """Exit status, seconds, peak RSS, the largest of each kind of resident memory (GiB), and what it printed."""
    largest = {"RssAnon": 0.0, "RssFile": 0.0}
    process = subprocess.Popen([sys.executable, "-m", "xent_quant.cli.main", *command], stdout=subprocess.PIPE, text=True)
    finished = threading.Event()

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while status.exists() and not finished.wait(0.25):
            for line in status.read_text().splitlines():
                key, _, value = line.partition(":")
                if key in largest:
                    largest[key] = max(largest[key], int(value.split()[0]) / 2**20)

    watcher = threading.Thread(target=watch)
    started = time.perf_counter()
    watcher.start()
    assert process.stdout
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    finished.set()
    watcher.join()
    return os.waitstatus_to_exitcode(status), time.perf_counter() - started, usage.ru_maxrss / 2**20, largest, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint; default: the bundled miniature")
    parser.add_argument("--export", type=Path, help="a .gguf file or folder made from it")
    parser.add_argument("--type", default="Q4_K_M", help="of the export that is made without --export")
    parser.add_argument("--runtimes", nargs="+", default=["torch", "llama.cpp"])
    parser.add_argument("--max-tokens", type=int, help=f"of each of the {SUITES} suites; default: the command's")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, help="default: all")
    options = parser.parse_args()
    model = str(options.model or miniature())
    threads = ["--threads", str(options.threads)] if options.threads else []
    with tempfile.TemporaryDirectory(dir=options.export.parent if options.export else None) as temporary:
        export = options.export
        if export is None:
            making = ["--type", options.type, "--method", "rtn", "--effort", "fast", "--output", f"{temporary}/out", "--json"]
            status, seconds, peak, _, printed = run([model, *making, *threads])
            if status:
                raise SystemExit(status)
            export = Path(json.loads(printed)["files"][0])
            print(f"{export.name}: made in {seconds:.1f} s, peak RSS {peak:.2f} GiB", flush=True)
        for runtime in options.runtimes:
            cold = Path(temporary) / runtime
            choice = ["--reference", model, "--runtime", runtime, "--context", str(options.context), "--report", str(cold)]
            choice += ["--max-tokens", str(options.max_tokens)] if options.max_tokens else []
            status, seconds, peak, largest, printed = run(["validate", str(export), *choice, *threads, "--json", "-"])
            if status not in (0, 3):
                raise SystemExit(status)
            found = json.loads(printed)
            tokens = sum(suite["windows"] for suite in found["suites"]) * options.context
            print(
                f"{runtime:12} exit {status} ({found['verdict']}), {tokens} tokens in {seconds:.1f} s "
                f"({tokens / seconds:.0f} tokens/s), peak RSS {peak:.2f} GiB "
                f"(anonymous {largest['RssAnon']:.2f}, file {largest['RssFile']:.2f}), "
                f"{len(found['suspicions'])} of {len(found['tensors'])} tensors called damaged",
                flush=True,
            )


if __name__ == "__main__":
    main()
