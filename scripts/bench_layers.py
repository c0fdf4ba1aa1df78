#!/usr/bin/env python3
"""Prints what the layers of a real run cost: seconds, seconds of CPU and peak of memory of each, then stops the run.

    scripts/bench_layers.py MODEL OUTPUT [--layers N] [-- OPTION ...]

Runs `xent-quant MODEL --output OUTPUT OPTION ...` as a person does, in a process of its own, until so many layers are in its
journal (all of them and the head where N is none), then interrupts it and removes OUTPUT. A first line is of what comes before
the first layer. "peak" is of VmRSS, looked at five times a second, of the step alone; the last line's is VmHWM, the whole
process's. Seconds of CPU hardly change where other jobs run beside it. Linux only.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from xent_quant.journal import FILE
from xent_quant.storage import unsealed

TICK = os.sysconf("SC_CLK_TCK")
INTERRUPTED = 130


def steps_done(folder: Path) -> int:
    """Steps in the journal of the run that works in a folder; 0 before there is one."""
    for file in folder.glob(f".*/{FILE}"):
        with suppress(FileNotFoundError):  # it is complete by now
            facts = unsealed(file.read_bytes())
            return json.loads(facts)["done"] if facts else 0
    return 0


def memory(process: int, key: str) -> float:
    """GiB of a line of /proc/PID/status; 0 of a process that has ended."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    return 0.0


def cpu_seconds(process: int) -> float:
    """Of all threads, the system's included."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / TICK


def main() -> None:
    words = [*sys.argv[1:], "--"]
    ours, theirs = words[: words.index("--")], words[words.index("--") + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="after which the run is stopped")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(ours)
    found: list[dict[str, Any]] = []
    options.output.mkdir(parents=True)
    command = [sys.executable, "-m", "xent_quant.cli.main", options.model, "--output", str(options.output), *theirs]
    print(" ".join(command), flush=True)
    began = since = time.monotonic()
    spent = peak = whole = 0.0
    done = 0
    with open(f"{options.output}.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                peak, whole = max(peak, memory(process.pid, "VmRSS")), max(whole, memory(process.pid, "VmHWM"))
                now = steps_done(options.output)
                if now > done:
                    cpu, clock = cpu_seconds(process.pid), time.monotonic()
                    what = f"layer {now - 1}" if now > 1 else "before"
                    found.append({"step": what, "clock s": clock - since, "CPU s": cpu - spent, "peak GiB": peak})
                    print(f"{what:9} clock {clock - since:8.1f} s, CPU {cpu - spent:8.1f} s, peak {peak:.3f} GiB", flush=True)
                    done, since, spent, peak = now, clock, cpu, 0.0
                if options.layers and done > options.layers:
                    process.send_signal(signal.SIGINT)
                    break
            code = process.wait()
        finally:
            process.kill()
    found.append({"step": "whole", "clock s": time.monotonic() - began, "peak GiB": whole})
    print(f"whole     clock {time.monotonic() - began:8.1f} s, peak {whole:.3f} GiB, exit {code}", flush=True)
    shutil.rmtree(options.output)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")
    stopped = bool(options.layers) and code == INTERRUPTED
    sys.exit(0 if stopped or code == 0 else Path(log.name).read_text())


if __name__ == "__main__":
    main()
