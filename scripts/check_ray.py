#!/usr/bin/env python3
"""Has Ray clusters on this machine help an export, kills workers and the command itself, and compares bytes; prints a table.

    scripts/check_ray.py [--model DIR] [--tokens 4k] [--type Q4_K_M] [--workers 3]
    scripts/check_ray.py --scaling 1 2 [--tokens 16k]

Every cluster is `ray start --head` with so many CPUs, each of which is a worker of one thread. The command runs without a cluster
on one thread; with one; with one of which a worker is killed (SIGKILL) in each layer, in the middle of its job; and is killed
itself behind a layer and repeated. All must write the same bytes, without text too. --scaling: instead of that, seconds of walks
with so many workers, which have their kernels loaded by then; on a quiet machine. Exit 1 where bytes differ.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench_layers import steps_done

JOB = b"ray::_call"
"""What a worker's process is called while it does a job."""
PROGRAM = Path(sys.executable).with_name("ray")
QUIET = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
PATIENCE = 120


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a cluster of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, open(Path(folder) / "log", "w+") as log:
        command = [PROGRAM, "start", "--head", f"--num-cpus={workers}", f"--port={port}", "--block"]
        command += ["--include-dashboard=false", f"--temp-dir={folder}/r", "--node-ip-address=127.0.0.1"]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=QUIET, start_new_session=True)
        until = time.monotonic() + PATIENCE
        while "Ray runtime started" not in Path(log.name).read_text():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(Path(log.name).read_text())
            time.sleep(0.2)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


class Command:
    """`xent-quant MODEL …` into folders of its own."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options, self._number = folder, options, 0

    def start(self, output: Path, *more: str) -> subprocess.Popen[bytes]:
        """Begin; `whole` waits for it."""
        model = [self._options.model, "--allow-tokenizer-mismatch"] if self._options.model else []  # random ones' words are none
        command = [sys.executable, "-m", "xent_quant.cli.main", *model, "--output", str(output), "--threads", "1", "--json"]
        with open(f"{output}.json", "w") as told, open(f"{output}.log", "w") as log:
            return subprocess.Popen([*command, *more], stdout=told, stderr=log, env=QUIET)

    def output(self) -> Path:
        """One that is not there yet."""
        self._number += 1
        return self._folder / str(self._number)

    def whole(self, process: subprocess.Popen[bytes], output: Path) -> tuple[dict[str, bytes], float]:
        """Its files, and seconds of the walk."""
        code, told = process.wait(), Path(f"{output}.json").read_text()
        if code or not told:
            raise SystemExit(f"exit {code}: {told}{Path(f'{output}.log').read_text()}")
        files = {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
        shutil.rmtree(output)
        return files, json.loads(told)["walk_seconds"]

    def run(self, *more: str) -> tuple[dict[str, bytes], float]:
        """From beginning to end."""
        output = self.output()
        return self.whole(self.start(output, *more), output)


def busy() -> list[int]:
    """Processes of workers that do a job."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                words = (each / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(JOB):
                found.append(int(each.name))
    return found


def kill_workers(process: subprocess.Popen[bytes], output: Path, chance: random.Random) -> int:
    """Kill one in each layer, a while after its job began; how many."""
    killed, layer = 0, -1
    while process.poll() is None:
        done, workers = steps_done(output), busy()
        if done != layer and workers:
            time.sleep(chance.uniform(0.0, 0.5))
            victims = [worker for worker in busy() if worker in workers]
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
                killed, layer = killed + 1, done
        time.sleep(0.05)
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: the bundled miniature")
    parser.add_argument("--tokens", default="4k")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--scaling", type=int, nargs="*", default=[])
    options = parser.parse_args()
    if not PROGRAM.is_file():
        parser.error(f"{PROGRAM}: not there; scripts/setup ray installs it")
    wrong, chance = False, random.Random(0)

    def show(name: str, same: bool, what: str) -> None:
        nonlocal wrong
        wrong |= not same
        print(f"{name:34} {'same bytes' if same else 'OTHER BYTES':12} {what}", flush=True)

    with tempfile.TemporaryDirectory() as room:
        command = Command(Path(room), options)
        gptq, tokens = ["--type", options.type], ["--tokens", options.tokens]
        plain = ["--type", options.type, "--method", "rtn"]
        alone, seconds = command.run(*gptq, *tokens)
        print(f"{'one process, one thread':34} {'':12} {seconds:.1f} s", flush=True)
        for workers in options.scaling:
            with cluster(workers) as address:
                command.run(*gptq, "--tokens", "1k", "--ray", address)
                files, seconds = command.run(*gptq, *tokens, "--ray", address)
                show(f"{workers} workers", files == alone, f"{seconds:.1f} s")
        if options.scaling:
            sys.exit(wrong)
        rounded, _ = command.run(*plain)
        with cluster(options.workers) as address:
            ray = ["--ray", address]
            files, seconds = command.run(*gptq, *tokens, *ray)
            show(f"{options.workers} workers", files == alone, f"{seconds:.1f} s")
            files, _ = command.run(*plain, *ray)
            show("without text", files == rounded, "")
            output = command.output()
            process = command.start(output, *gptq, *tokens, *ray)
            killed = kill_workers(process, output, chance)
            files, _ = command.whole(process, output)
            show("workers killed", files == alone and killed > 0, f"{killed} of them")
            output = command.output()
            process = command.start(output, *gptq, *tokens, *ray)
            while steps_done(output) < 2 and process.poll() is None:
                time.sleep(0.05)
            process.kill()
            process.wait()
            done = steps_done(output)
            files, _ = command.whole(command.start(output, *gptq, *tokens, *ray), output)
            show("the command killed and repeated", files == alone and done > 1, f"behind layer {done - 1}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
