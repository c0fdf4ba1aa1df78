#!/usr/bin/env python3
"""Prints what the layers of a real run cost: seconds, seconds of CPU and peak of memory of each, then stops the run.

    scripts/bench_layers.py MODEL OUTPUT [--layers N] [--resume] [-- OPTION ...]

Runs `xent-quant MODEL --output OUTPUT OPTION ...` as a person does, in a process of its own, until so many layers are in its
journal (all of them and the head where N is none), then interrupts it and removes OUTPUT. --resume: first a run that nobody
stops, then one that is killed (SIGKILL) after N layers, and the same command again, whose seconds over the first's are
printed, and whether the bytes are the same. A first line is of what comes before the first layer. "peak" is of VmRSS, looked
at five times a second, of the step alone; the last line's is VmHWM, the whole process's. Seconds of CPU hardly change where
other jobs run beside it. Linux only.
"""

import argparse
import hashlib
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


def watch(command: list[str], output: Path, layers: int | None, stop: int) -> list[dict[str, Any]]:
    """What each step of one run took, and the whole; after so many layers of the model the run is sent the signal `stop`."""
    found: list[dict[str, Any]] = []
    output.mkdir(parents=True, exist_ok=True)
    began = since = time.monotonic()
    spent = peak = whole = 0.0
    seen = steps_done(output)
    with open(f"{output}.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                peak, whole = max(peak, memory(process.pid, "VmRSS")), max(whole, memory(process.pid, "VmHWM"))
                done = steps_done(output)
                if done > seen:
                    cpu, clock = cpu_seconds(process.pid), time.monotonic()
                    what = f"layer {done - 1}" if done > 1 else "before"
                    found.append({"step": what, "clock s": clock - since, "CPU s": cpu - spent, "peak GiB": peak})
                    print(f"{what:9} clock {clock - since:8.1f} s, CPU {cpu - spent:8.1f} s, peak {peak:.3f} GiB", flush=True)
                    seen, since, spent, peak = done, clock, cpu, 0.0
                if layers and done > layers:
                    process.send_signal(stop)
                    break
            code = process.wait()
        finally:
            process.kill()
    found.append({"step": "whole", "clock s": time.monotonic() - began, "peak GiB": whole})
    print(f"whole     clock {time.monotonic() - began:8.1f} s, peak {whole:.3f} GiB, exit {code}", flush=True)
    if code != 0 and not (layers and code in (INTERRUPTED, -stop)):
        sys.exit(Path(log.name).read_text())
    return found


def published(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a result, by where it lies."""
    digests = {}
    for file in filter(Path.is_file, sorted(folder.rglob("*"))):
        with file.open("rb") as stream:
            digests[str(file.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def main() -> None:
    words = [*sys.argv[1:], "--"]
    ours, theirs = words[: words.index("--")], words[words.index("--") + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="after which the run is stopped")
    parser.add_argument("--resume", action="store_true", help="kill it there, and go on; beside a run that nobody kills")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(ours)
    output, layers = options.output, options.layers
    if output.exists():
        parser.error(f"{output}: exists")
    if options.resume and not layers:
        parser.error("--resume: after how many --layers?")
    command = [sys.executable, "-m", "xent_quant.cli.main", options.model, "--output", str(output), *theirs]
    print(" ".join(command), flush=True)
    found = {"run": watch(command, output, None if options.resume else layers, signal.SIGINT)}
    if options.resume:
        alone = published(output)
        shutil.rmtree(output)
        found["killed"] = watch(command, output, layers, signal.SIGKILL)
        found["resumed"] = watch(command, output, None, signal.SIGINT)
        share = found["resumed"][-1]["clock s"] / found["run"][-1]["clock s"]
        content = "same" if published(output) == alone else "OTHER"
        print(f"resumed behind layer {layers - 1}: {share:.3f} of the time, {content} bytes")
    shutil.rmtree(output)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
