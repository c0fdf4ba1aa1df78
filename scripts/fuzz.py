#!/usr/bin/env python3
"""Gives the real commands damaged files of every kind that they read, and sees that each is read or refused in one line.

    scripts/fuzz.py [--inputs 2000] [--kind NAME]... [--seed 0] [--folder DIR]
    scripts/fuzz.py --replay FILE

An input is one file, damaged at random but by what its format means (scripts/_mutations.py), among good ones
(scripts/_fuzz_kinds.py lists the kinds); a command is run on it in a process that has its imports done. It fails where

    it is not refused in one line on stderr that names the file (a traceback, an "internal error", a warning of Python's)
    it takes more than 10 seconds of CPU, a minute of the clock (machines are busy), or 1 GiB of memory more than there was
    the process dies

Inputs depend on kind, seed and number alone. Failures are kept in DIR/failures: the input, and beside it the command and what it
said, with the traceback; --replay runs that command on it again. A run that is stopped goes on where it was. Prints a table;
exit 1 where anything failed.
"""

import argparse
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # survives a fork
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

# What the commands import when they need it, so that no input pays for it.
import bitsandbytes  # noqa: F401
import jinja2.sandbox  # noqa: F401
import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch
import transformers  # noqa: F401

from scripts._fuzz_kinds import KINDS, Case, Command
from scripts._mutations import NODE, damaged
from xent_quant.cli import main as command_line

IN_MEMORY = "/dev/shm"
"""Where the files lie, if there is such a folder: nothing waits for a disk."""
SECONDS, CLOCK_SECONDS = 10.0, 60.0
BYTES = 1 << 30
BUILD_SECONDS = 300.0
"""For the good files of a kind, made before the first input."""
BEGINS, INTERNAL = "xent-quant: error: ", "xent-quant: error: internal error"
TENSORS = (
    "model.layers.",
    "model.embed_tokens.",
    "model.norm.",
    "lm_head.",
    "blk.",
    "token_embd.",
    "output",
    "layer 0,",
    "layer 1,",
)
"""How tensors are called, which an error may name instead of a file."""
SAVE_EVERY = 50


@dataclass
class Row:
    """Of the table: what became of a kind's inputs; `slowest` in seconds of CPU, `peak` in bytes over what was there before."""

    inputs: int = 0
    refused: int = 0
    fine: int = 0
    failures: int = 0
    slowest: float = 0.0
    peak: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def count(self, told: dict[str, Any]) -> None:
        self.inputs += 1
        self.slowest, self.peak = max(self.slowest, told["seconds"]), max(self.peak, told["peak"])
        setattr(self, told["outcome"], getattr(self, told["outcome"]) + 1)
        if told["outcome"] == "failures":
            self.places[told["place"]] = self.places.get(told["place"], 0) + 1


def slug(kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def place_input(case: Case, data: bytes) -> None:
    """Put an input in its place; what `reset` or an earlier input left there is gone."""
    target = case.target
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if not data.startswith(NODE):
        target.write_bytes(data)
        return
    what = data.removeprefix(NODE).decode()
    if what == "fifo":
        os.mkfifo(target)
    elif what == "folder":
        target.mkdir()
    elif what.startswith("link"):
        target.symlink_to("/dev/zero" if "zero" in what else target.name)


def memory(key: str) -> int:
    """VmRSS, VmHWM or VmSize of this process, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Parsed:
    """Stands for the command's parser: what was parsed once is known, since parsing takes longer than most refusals."""

    def __init__(self) -> None:
        self._app, self._known = command_line.app, dict[tuple[str, ...], Callable[[], object]]()

    def __call__(self, arguments: Command, **options: Any) -> object:
        key = tuple(arguments)
        if key not in self._known:
            function, bound, _ = self._app.parse_args(arguments, **options)
            self._known[key] = partial(function, *bound.args, **bound.kwargs)
        return self._known[key]()


def folder_of_a_worker() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=IN_MEMORY if Path(IN_MEMORY).is_dir() else None)


class Worker:
    """A process's side: good files of one kind, and one input after the other."""

    def __init__(self, kind: str, root: Path) -> None:
        self._kind = kind
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(root / name, os.O_RDWR | os.O_CREAT), number)  # what C libraries print, too
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), "utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), "utf-8", "backslashreplace")
        command_line.app = Parsed()  # type: ignore[assignment]
        self.case = KINDS[kind].build(root)
        codes = [
            self._run(seed, command) for seed in dict.fromkeys(self.case.seeds) for command in self.case.commands
        ]  # compiles kernels, too
        bad = [told for told in codes if told["outcome"] == "failures"]
        if bad or not (kind == "adapter_config.json" or any(told["outcome"] == "fine" for told in codes)):
            raise RuntimeError(f"{kind}: good files are not read: {bad or codes}")
        limit = memory("VmSize") + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def input(self, seed: int, number: int) -> tuple[bytes, Command]:
        random = Random(f"{self._kind} {seed} {number}")
        return damaged(random, self.case.seeds, KINDS[self._kind].mutate), random.choice(self.case.commands)

    def one(self, seed: int, number: int, data: bytes, command: Command, failures: Path) -> dict[str, Any]:
        """Run an input; what became of it, and where it failed."""
        told = self._run(data, command)
        if told["outcome"] == "failures":
            again = self._run(data, [*command, "-vv"])["said"] if told["place"].startswith("internal error") else ""
            if frames := re.findall(r'File "([^"]+)", line (\d+), in', again):
                own = [
                    f"{Path(file).name}:{line}"
                    for file, line in frames
                    if "site-packages" not in file and "/lib/python" not in file
                ]
                told["place"] = f"{told['place']} at {own[-1] if own else frames[-1]}"
            keep(failures, self._kind, seed, number, data, command, f"{told['said']}\n{again}")
        return told

    def _run(self, data: bytes, command: Command) -> dict[str, Any]:
        case = self.case
        shutil.rmtree(case.out, ignore_errors=True)
        case.reset()
        place_input(case, data)
        sys.stdout.flush()
        sys.stderr.flush()
        for number in (1, 2):
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        before, started = memory("VmRSS"), time.process_time()
        code: Any = 0
        warnings.resetwarnings()
        try:
            case.run(command)
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:  # main lets none through
            code = f"{type(error).__name__} escaped: {error}"[:300]
            traceback.print_exc()
        seconds = time.process_time() - started
        peak = max(0, memory("VmHWM") - before)
        sys.stdout.flush()
        sys.stderr.flush()
        said = os.pread(2, 1 << 20, 0).decode("utf-8", "replace")
        outcome, place = self._judged(code, said, seconds, peak)
        return {"outcome": outcome, "place": place, "seconds": seconds, "peak": peak, "said": said}

    def _judged(self, code: Any, said: str, seconds: float, peak: int) -> tuple[str, str]:
        lines = [line for line in said.splitlines() if line.startswith(BEGINS)]
        if seconds > SECONDS or peak > BYTES:
            return "failures", f"{seconds:.0f} s, {peak >> 20} MiB"
        if not isinstance(code, int) or code not in (0, 1, 3):
            return "failures", str(code) if not isinstance(code, int) else f"exit {code}"
        if lines and lines[0].startswith(INTERNAL):
            return "failures", f"internal error {lines[0].removeprefix(INTERNAL)[:60].strip()}"
        if "Traceback (most" in said or re.search(r"\w+Warning: ", said):
            return "failures", "a traceback or a warning"
        if code != 1:
            return "fine", ""
        if len(lines) != 1 or not said.endswith(f"{lines[0]}\n") or len(lines[0]) > 2000:
            return "failures", "not one line"
        known = (self.case.target.name, str(self.case.target.parent), *self.case.names, *TENSORS)
        return ("refused", "") if any(name in lines[0] for name in known) else ("failures", f"names no file: {lines[0][19:90]}")


def keep(failures: Path, kind: str, seed: int, number: int, data: bytes, command: Command, said: str) -> None:
    failures.mkdir(parents=True, exist_ok=True)
    file = failures / f"{slug(kind)}.{seed}.{number}"
    file.write_bytes(data)
    file.with_name(f"{file.name}.txt").write_text(f"{' '.join(command)}\n\n{said}", errors="backslashreplace")


def work(kind: str, seed: int, first: int, stop: int, failures: Path, pipe: int) -> None:
    """In a process of its own: inputs first…stop, each announced and then told of in a line of JSON."""
    with folder_of_a_worker() as folder, os.fdopen(pipe, "w") as told:
        worker = Worker(kind, Path(folder))
        for number in range(first, stop):
            data, command = worker.input(seed, number)
            print(json.dumps({"begun": number}), file=told, flush=True)
            print(json.dumps(worker.one(seed, number, data, command, failures)), file=told, flush=True)


def events(kind: str, seed: int, first: int, stop: int, failures: Path) -> Iterator[dict[str, Any]]:
    """What the worker tells, until it is done, dies or takes too long: then the last event says so."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(read)
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            work(kind, seed, first, stop, failures, write)
            code = 0
        except BaseException:
            with suppress(OSError):
                (failures.parent / f"{slug(kind)}.worker.txt").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    os.close(write)
    held, begun, patience = b"", False, BUILD_SECONDS
    try:
        while True:
            if not select.select([read], [], [], patience)[0]:
                yield {"ended": f"more than {CLOCK_SECONDS:.0f} s of the clock", "begun": begun}
                return
            piece = os.read(read, 1 << 16)
            if not piece:
                break
            held += piece
            *whole, held = held.split(b"\n")
            for line in whole:
                told = json.loads(line)
                begun = "begun" in told
                patience = CLOCK_SECONDS
                if not begun:
                    yield told
        _, status = os.waitpid(pid, 0)
        pid = 0
        if status:
            yield {"ended": f"the process died ({os.waitstatus_to_exitcode(status)})", "begun": begun}
    finally:
        os.close(read)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def fuzz(kind: str, seed: int, inputs: int, folder: Path, save: Any, row: Row) -> None:
    """All inputs of a kind from `row.inputs` on, in as many processes as it takes."""
    failures = folder / "failures"
    while row.inputs < inputs:
        for told in events(kind, seed, row.inputs, inputs, failures):
            if "ended" in told:
                if not told["begun"]:
                    said = (
                        (folder / f"{slug(kind)}.worker.txt").read_text()
                        if (folder / f"{slug(kind)}.worker.txt").exists()
                        else ""
                    )
                    raise SystemExit(f"{kind}: its good files cannot be made: {told['ended']}\n{said}")
                keep(failures, kind, seed, row.inputs, b"", ["see --number"], f"{told['ended']}: {kind} {seed} {row.inputs}")
                told = {"outcome": "failures", "place": told["ended"], "seconds": 0.0, "peak": 0}
            row.count(told)
            if not row.inputs % SAVE_EVERY:
                save()
    save()


def shares(kinds: Sequence[str], inputs: int) -> dict[str, int]:
    total = sum(KINDS[kind].share for kind in kinds)
    return {kind: max(1, round(inputs * KINDS[kind].share / total)) for kind in kinds}


def table(rows: dict[str, Row]) -> Iterator[str]:
    yield f"{'kind':34} {'inputs':>7} {'refused':>8} {'read':>7} {'failures':>8} {'slowest':>8} {'peak':>9}"
    total = Row()
    for row in rows.values():
        total.inputs, total.refused, total.fine = total.inputs + row.inputs, total.refused + row.refused, total.fine + row.fine
        total.failures += row.failures
        total.slowest, total.peak = max(total.slowest, row.slowest), max(total.peak, row.peak)
    for kind, row in [*rows.items(), (f"all {len(rows)} kinds", total)]:
        counts = f"{row.inputs:7,} {row.refused:8,} {row.fine:7,} {row.failures:8,}"
        yield f"{kind:34} {counts} {row.slowest:6.2f} s {row.peak >> 20:5,} MiB"


def replay(file: Path) -> None:
    """Run the command of a failure on its input again, with -vv."""
    name, seed, number = file.name.rsplit(".", 2)
    kind = next(kind for kind in KINDS if slug(kind) == name)
    with folder_of_a_worker() as folder:
        case = KINDS[kind].build(Path(folder))
        random = Random(f"{kind} {seed} {number}")
        data, command = damaged(random, case.seeds, KINDS[kind].mutate), random.choice(case.commands)
        shutil.rmtree(case.out, ignore_errors=True)
        case.reset()
        place_input(case, file.read_bytes() or data)
        print(" ".join(command), file=sys.stderr)
        case.run([*command, "-vv"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--kind", action="append", choices=KINDS, metavar="NAME", help=f"repeatable; {'; '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("out") / "fuzz", help="for failures, and how far it came")
    parser.add_argument("--replay", type=Path, help="an input of FOLDER/failures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.replay:
        replay(arguments.replay)
        return
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    kinds = arguments.kind or list(KINDS)
    state = folder / f"rows-{arguments.seed}-{arguments.inputs}.json"
    known = json.loads(state.read_text()) if state.exists() else {}
    rows = {kind: Row(**known.get(kind, {})) for kind in kinds}

    def save() -> None:
        state.with_suffix(".part").write_text(json.dumps({**known, **{kind: asdict(row) for kind, row in rows.items()}}))
        state.with_suffix(".part").replace(state)

    for kind, inputs in shares(kinds, arguments.inputs).items():
        started = time.perf_counter()
        fuzz(kind, arguments.seed, inputs, folder, save, rows[kind])
        print(f"{time.strftime('%H:%M:%S')} {kind}: {rows[kind].inputs:,} inputs in {time.perf_counter() - started:.0f} s, "
              f"{rows[kind].failures} failures", file=sys.stderr, flush=True)  # fmt: skip
    print("\n".join(table(rows)))
    places = Counter({f"{kind}: {place}": count for kind, row in rows.items() for place, count in row.places.items()})
    for place, count in places.most_common():
        print(f"{count:6} {place}")
    sys.exit(1 if places else 0)


if __name__ == "__main__":
    main()
