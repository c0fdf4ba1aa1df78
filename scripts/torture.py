#!/usr/bin/env python3
"""Kills, starves and crowds exports, and sees that nothing unfinished looks finished and that resuming changes no byte.

    scripts/torture.py [--kills 200] [--seed 0] [--only WORDS] [--folder DIR]

Each run is the real command in a process forked from one that has its imports done, on a random checkpoint of three layers;
each layer is committed. After every blow each visible file must be that of the earlier result or of a whole new one, and no
earlier result may be lost; at the end the output must equal an uninterrupted run's, with nothing hidden beside it.

    kills        SIGKILL at random moments, behind a random commit, or before a random change to the file system; up to four in a
                 row before the command may finish
    signals      SIGTERM, SIGHUP, SIGINT and what is said about them; SIGSTOP and SIGCONT
    full disk    file systems of many sizes (as root)
    crowds       two and four runs at once: one target, different types into one folder, --force
    links        planted where files will be
    changes      of checkpoint, options and version between a kill and the next run

Prints a table; exit 1 where anything was violated.
"""

import argparse
import faulthandler
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # survives a fork
os.environ["NUMBA_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from numba.np.ufunc import parallel

import xent_quant
from tests.conftest import TINY, random_weights, write_checkpoint
from xent_quant.cli.main import main as command
from xent_quant.journal import Journal
from xent_quant.storage.publication import OLD
from xent_quant.walk import collecting, job, loop

CONFIG = {**TINY, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 32, "max_position_embeddings": 64}
CHANGES = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync", "ftruncate")
"""Calls by which the file system is changed, but for writing bytes."""
MOST_IN_A_ROW = 4
SECONDS = 120
"""After which a run is taken to hang."""
HANGS = -1000
INTERRUPTED = 130
GOES_ON = "the same command goes on where this one stopped"
NOTHING = "nothing unfinished was left behind"
COMPLETE = "the result was complete by then"

Tree = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """A command by its options; `old` are those of a good earlier result in the same folder."""

    name: str
    options: tuple[str, ...]
    old: tuple[str, ...] | None = None


def cases(text: Path) -> list[Case]:
    measured = ("--calib", str(text), "--tokens", "240", "--seqlen", "40", "--effort", "fast")
    fewer = ("--calib", str(text), "--tokens", "120", "--seqlen", "40", "--effort", "fast")
    plain = ("--method", "rtn")
    return [
        Case("gguf gptq", ("--type", "Q4_0", *measured)),
        Case("gguf split", ("--type", "Q4_0", "--split-size", "60K", *measured)),
        Case("gguf rtn", ("--type", "Q4_K_M", *plain)),
        Case("onnx", ("--format", "onnx", *measured)),
        Case("bnb", ("--format", "bnb", "--split-size", "100K")),
        Case("calibrate", ("calibrate", *measured[:-2])),
        Case("three formats", ("--format", "gguf", "--format", "onnx", "--format", "bnb", *measured)),
        Case("two types", ("--type", "Q4_K_M", "--type", "Q8_0", *measured)),
        Case("gguf forced", ("--type", "Q4_0", "--force", *measured), ("--type", "Q4_0", *fewer)),
        Case("split forced", ("--type", "Q8_0", "--split-size", "90K", "--force", *plain),
             ("--type", "Q8_0", "--split-size", "90K", *fewer)),
        Case("onnx forced", ("--format", "onnx", "--force", *plain), ("--format", "onnx", *fewer)),
        Case("bnb forced", ("--format", "bnb", "--force"), ("--format", "bnb", "--bnb-type", "fp4")),
        Case("calibrate forced", ("calibrate", "--force", *measured[:-2]), ("calibrate", *fewer[:-2])),
        Case("two types forced", ("--type", "Q4_0", "--type", "Q8_0", "--force", *plain), ("--type", "Q4_0", *fewer)),
    ]  # fmt: skip


@dataclass
class Row:
    """Of the table: how many runs were started and blows dealt, and what was found wrong."""

    name: str
    runs: int = 0
    blows: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)


@dataclass
class Reference:
    """An uninterrupted run: what was there before it and after, how long it took, its commits and its CHANGES."""

    old: Tree
    new: Tree
    seconds: float
    saves: int
    changes: int


Hook = Callable[[], object]


def no_hook() -> None: ...


@dataclass
class Process:
    pid: int
    log: Path
    code: int | None = None

    def ended(self) -> bool:
        """Whether it has; does not wait."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self) -> int:
        deadline = time.monotonic() + SECONDS
        while not self.ended():
            if time.monotonic() > deadline:
                state = Path(f"/proc/{self.pid}/status").read_text().splitlines()[2:3] if Path("/proc").is_dir() else []
                self.send(signal.SIGUSR1)  # has it print where it is
                time.sleep(2)
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = HANGS
                print(f"  hangs {state}: {self.said}", flush=True)
                return HANGS
            time.sleep(0.001)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace").strip()

    @property
    def failed(self) -> bool:
        """Whether it ended with exit code 1 and one line that says why, behind notes if any."""
        errors = [line for line in self.said.splitlines() if line.startswith("xent-quant: error: ")]
        return self.code == 1 and len(errors) == 1 and self.said.endswith(errors[0]) and "internal error" not in errors[0]


def of_a_walk(journal: Journal) -> bool:
    """Not of the run before it that tells how much text is needed."""
    return journal.path.parent.name.startswith(".xent-quant-")


def kill_behind_commit(number: int, delay: float) -> Hook:
    """Die `delay` seconds behind that Journal.save, counted from 0."""

    def hook() -> None:
        saves, save = [0], Journal.save
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # here: without text a thread saves

        def saved(journal: Journal) -> None:
            save(journal)
            saves[0] += of_a_walk(journal)
            if of_a_walk(journal) and saves[0] == number + 1:
                if delay:
                    signal.setitimer(signal.ITIMER_REAL, delay)  # ends the process where it is, as SIGKILL does
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

        Journal.save = saved  # type: ignore[method-assign]

    return hook


def kill_before_change(number: int) -> Hook:
    """Die before that one of all CHANGES."""

    def hook() -> None:
        count = [0]

        def before() -> None:
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1

        watch_changes(before)

    return hook


def watch_changes(before: Callable[[], None]) -> None:
    for name in CHANGES:
        real = getattr(os, name)

        def call(*arguments: Any, real: Any = real, **more: Any) -> Any:
            before()
            return real(*arguments, **more)

        setattr(os, name, call)


def counting(file: Path) -> Hook:
    """Keep the number of commits and of CHANGES in a file."""

    def hook() -> None:
        counts, save = [0, 0], Journal.save

        def keep() -> None:
            file.write_text(json.dumps(counts))

        def saved(journal: Journal) -> None:
            save(journal)
            counts[0] += of_a_walk(journal)
            keep()

        def before() -> None:
            counts[1] += 1
            keep()

        Journal.save = saved  # type: ignore[method-assign]
        watch_changes(before)

    return hook


def waiting(folder: Path) -> Hook:
    """Hold what is locked, from the first commit on, until the file `go` appears."""

    def hook() -> None:
        save = Journal.save

        def saved(journal: Journal) -> None:
            save(journal)
            while of_a_walk(journal) and not (folder / "go").exists():
                time.sleep(0.005)

        Journal.save = saved  # type: ignore[method-assign]

    return hook


def blind() -> None:
    """Nobody looks whether there is room."""
    job.check_free_space = collecting.check_free_space = lambda *_: None  # type: ignore[assignment]


def other_version() -> None:
    job.software = collecting.software = lambda: {"xent-quant": "another"}  # type: ignore[assignment]


def visible(folder: Path) -> Tree:
    """Path to content of every file, hidden ones at the top left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()] if folder.is_dir() else []
    names = {path.relative_to(folder): path for path in files}
    return {str(name): path.read_bytes() for name, path in names.items() if not name.parts[0].startswith(".")}


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) if folder.is_dir() else []


def work_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".xent-quant-*") if path.is_dir()]


def looks_wrong(output: Path, old: Tree, new: Tree) -> list[str]:
    """Files that are neither the old ones nor the new, folders of which a part is missing, old results that are lost."""
    found, wrong = visible(output), []
    wrong += [
        f"{name}: neither the old file nor the new" for name, data in found.items() if data not in (old.get(name), new.get(name))
    ]
    for folder in {name.split("/")[0] for name in found if "/" in name}:
        parts = [{name: data for name, data in tree.items() if name.startswith(f"{folder}/")} for tree in (found, old, new)]
        if parts[0] not in parts[1:]:
            wrong.append(f"{folder}: neither the old folder nor the new")
    kept = {path: path.read_bytes() for work in work_folders(output) for path in work.rglob("*") if path.is_file()}
    # Where the new one was published, and is put aside for the same once more, the old one is gone by right.
    aside = {data for path, data in kept.items() if OLD in path.parts}
    wrong += [
        f"{name}: the old one is lost"
        for name, data in old.items()
        if name not in found and data not in kept.values() and new.get(name) not in aside
    ]
    return wrong


class Torture:
    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.model = write_checkpoint(root / "Model", CONFIG, random_weights(CONFIG))
        text = root / "text.txt"
        text.write_text("\n\n".join(f"the night is long, number {i}, and the rain sings in the thin wind" for i in range(40)))
        self.cases = {case.name: case for case in cases(text)}
        self.rows: list[Row] = []
        self._references: dict[str, Reference] = {}
        self._number = 0

    # --- runs -------------------------------------------------------------------------------------------------------------

    def arguments(self, options: tuple[str, ...], output: Path, model: Path | None = None) -> list[str]:
        where = str(model or self.model)
        if options[0] == "calibrate":
            return ["calibrate", where, "--output", str(output / "imatrix.gguf"), *options[1:]]
        return [where, "--output", str(output), "--threads", "1", *options]

    def start(self, arguments: list[str], hook: Hook = no_hook, gate: int | None = None) -> Process:
        """A run in a process of its own; it begins when the pipe `gate` is closed."""
        self.row.runs += 1
        self._number += 1
        log = self.root / f"{self._number}.log"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
            pid = os.fork()
        if pid:
            return Process(pid, log)
        code = 99
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            faulthandler.register(signal.SIGUSR1)
            # All children share this one with their parent, and one of them may be killed while it holds it.
            parallel._backend_init_process_lock = threading.RLock()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP):  # which the command has set in this process's parent
                signal.signal(number, signal.SIG_DFL)
            if gate is not None:
                os.read(gate, 1)
            hook()
            command(arguments)
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, options: tuple[str, ...], output: Path, hook: Hook = no_hook) -> Process:
        process = self.start(self.arguments(options, output), hook)
        process.wait()
        return process

    @contextmanager
    def folder(self) -> Iterator[Path]:
        self._number += 1
        path = self.root / f"out-{self._number}"
        yield path
        shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def table_row(self, name: str) -> Iterator[Row]:
        self.row = Row(name)
        self.rows.append(self.row)
        started = time.monotonic()
        yield self.row
        self.row.seconds = time.monotonic() - started
        print_row(self.row)

    def violation(self, what: str) -> None:
        self.row.violations.append(what)
        print(f"  VIOLATION {self.row.name}: {what}", flush=True)

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self.violation(what)

    def reference(self, case: Case) -> Reference:
        if case.name not in self._references:
            with self.folder() as output:
                if case.old:
                    self.expect(not self.run(case.old, output).code, "the earlier result failed")
                old, counts = visible(output), self.root / "counts"
                started = time.monotonic()
                process = self.run(case.options, output, counting(counts))
                seconds = time.monotonic() - started
                self.expect(process.code == 0 and not hidden(output), f"an uninterrupted run: {process.said} {hidden(output)}")
                saves, changes = json.loads(counts.read_text())
                self._references[case.name] = Reference(old, visible(output), seconds, saves, changes)
        return self._references[case.name]

    def prepared(self, case: Case, output: Path) -> Reference:
        """With the earlier result in `output`."""
        reference = self.reference(case)
        for name, data in reference.old.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        return reference

    def finish(self, case: Case, output: Path, what: str) -> None:
        """The same command, undisturbed."""
        reference, process = self.reference(case), self.run(case.options, output)
        published = process.code == 1 and "exists already" in process.said  # by the run that was killed, or its recovery
        self.expect(process.code == 0 or published, f"{what}; then: {process.code} {process.said}")
        found = visible(output)
        differing = sorted(name for name in found.keys() | reference.new.keys() if found.get(name) != reference.new.get(name))
        self.expect(not differing, f"{what}; then {differing} differ from an uninterrupted run's")
        self.expect(not hidden(output), f"{what}; then {hidden(output)} are left")

    def check(self, case: Case, output: Path, what: str) -> None:
        reference = self.reference(case)
        for wrong in looks_wrong(output, reference.old, reference.new):
            self.violation(f"{what}: {wrong}")

    # --- blows ------------------------------------------------------------------------------------------------------------

    def kills(self, name: str, count: int) -> None:
        case = self.cases[name]
        with self.table_row(f"kills: {name}") as row:
            while row.blows < count:
                with self.folder() as output:
                    reference, history = self.prepared(case, output), ""
                    for _ in range(min(self.random.randint(1, MOST_IN_A_ROW), count - row.blows)):
                        what, process = self.killed(case, output, reference)
                        history = f"{history}, {what}" if history else what
                        self.check(case, output, history)
                        if process.code is not None and process.code >= 0:
                            self.expect(
                                process.code == 0 or "exists already" in process.said, f"{history}: {process.code} {process.said}"
                            )
                            break
                        row.blows += 1
                    self.finish(case, output, history)

    def killed(self, case: Case, output: Path, reference: Reference) -> tuple[str, Process]:
        """What was done, and the process that was killed, if it was not faster."""
        kind = self.random.choice(("moment", "commit", "change", "end"))
        arguments = self.arguments(case.options, output)
        if kind == "moment":
            delay = self.random.uniform(0, reference.seconds)
            process = self.start(arguments)
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline and not process.ended():
                time.sleep(0.0005)
            process.send(signal.SIGKILL)
            what = f"killed after {delay:.3f} s"
        elif kind == "commit":
            number, delay = self.random.randrange(reference.saves), self.random.choice((0.0, self.random.uniform(0.001, 0.1)))
            process = self.start(arguments, kill_behind_commit(number, delay))
            what = f"killed {delay:.3f} s behind commit {number}"
        else:  # the publication has most of the last changes
            first = 0 if kind == "change" else max(0, reference.changes - 60)
            number = self.random.randrange(first, reference.changes)
            process = self.start(arguments, kill_before_change(number))
            what = f"killed before change {number} of {reference.changes}"
        process.wait()
        return what, process

    def signals(self, name: str, count: int) -> None:
        case = self.cases[name]
        with self.table_row(f"signals: {name}") as row:
            for index in range(count):
                number = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGSTOP)[index % 4]
                with self.folder() as output:
                    reference = self.prepared(case, output)
                    process = self.start(self.arguments(case.options, output))
                    delay = self.random.uniform(0.05, 1) * reference.seconds
                    time.sleep(delay)
                    what = f"{number.name} after {delay:.3f} s"
                    process.send(number)
                    row.blows += 1
                    if number is signal.SIGSTOP:
                        time.sleep(0.05)
                        self.check(case, output, what)
                        process.send(signal.SIGCONT)
                        self.expect(process.wait() == 0, f"{what}: {process.code} {process.said}")
                    else:
                        process.wait()
                        self.check(case, output, what)
                        self._said_the_truth(process, output, reference, what)
                    if process.code or case.old:
                        self.finish(case, output, what)
                    else:
                        self.expect(visible(output) == reference.new and not hidden(output), f"{what}: not whole")

    def _said_the_truth(self, process: Process, output: Path, reference: Reference, what: str) -> None:
        if process.code == 0 or (process.code in (-signal.SIGTERM, -signal.SIGHUP) and not hidden(output)):  # too late, or early
            return
        self.expect(process.code == INTERRUPTED, f"{what}: {process.code} {process.said}")
        message = process.said.rpartition("xent-quant: interrupted")[2].removeprefix("; ").removesuffix(".")
        works, whole = work_folders(output), visible(output) == reference.new
        # Nothing is said of files before the run begins to write, and when it shows what it has written.
        true = {GOES_ON: bool(works), NOTHING: not hidden(output) and not whole, COMPLETE: whole, "": not hidden(output)}
        self.expect(true.get(message, False), f"{what}: said {process.said!r} with {hidden(output)}, whole: {whole}")

    def full_disks(self, count: int) -> None:
        with self.table_row("full disk") as row:
            if os.geteuid() != 0 or not shutil.which("mount"):
                print("  full disk: skipped, only root can mount a small one")
                return
            names = ("gguf gptq", "onnx", "bnb", "calibrate", "two types", "gguf forced", "onnx forced")
            needed: dict[str, int] = {}
            for index in range(count):
                case = self.cases[names[index % len(names)]]
                with self.folder() as output, mounted(output, 64 << 20):
                    if case.name not in needed:
                        self.prepared(case, output)
                        with Peak(output) as peak:
                            self.run(case.options, output)
                        needed[case.name] = peak.bytes
                        shutil.rmtree(output / "onnx", ignore_errors=True)
                        for path in output.iterdir():
                            path.unlink() if path.is_file() else shutil.rmtree(path)
                    reference = self.prepared(case, output)
                    least = sum(-(-len(data) // 4096) * 4096 for data in reference.old.values()) + 8192
                    size = int(self.random.uniform(least, 1.15 * needed[case.name]))
                    looks = index // len(names) % 2 == 0
                    what = f"{case.name} with {size} bytes{'' if looks else ', nobody looking'}"
                    remount(output, size)
                    process = self.run(case.options, output, no_hook if looks else blind)
                    self.check(case, output, what)
                    if process.code == 0:
                        self.expect(visible(output) == reference.new and not hidden(output), f"{what}: not whole")
                        continue
                    row.blows += 1
                    self.expect(process.failed, f"{what}: {process.code} {process.said}")
                    remount(output, 64 << 20)
                    self.finish(case, output, f"{what} ({process.said})")

    def crowds(self, size: int, count: int) -> None:
        with self.table_row(f"{size} at once") as row:
            for index in range(count):
                kind = ("same", "types", "force")[index % 3]
                row.blows += size
                if kind == "types":
                    self._different_types(size)
                else:
                    name = self.random.choice(
                        ("gguf gptq", "onnx", "calibrate", "two types")
                        if kind == "same"
                        else ("gguf forced", "onnx forced", "bnb forced", "two types forced")
                    )
                    self._same_target(self.cases[name], size)

    def _crowd(self, commands: list[list[str]], hook: Hook) -> list[Process]:
        gate, opened = os.pipe()
        processes = []
        for arguments in commands:

            def begin() -> None:
                os.close(opened)
                os.read(gate, 1)
                hook()

            processes.append(self.start(arguments, begin))
        os.close(gate)
        os.close(opened)
        return processes

    def _same_target(self, case: Case, size: int) -> None:
        with self.folder() as output, self.folder() as signs:
            reference = self.prepared(case, output)
            signs.mkdir()
            processes = self._crowd([self.arguments(case.options, output)] * size, waiting(signs))
            deadline = time.monotonic() + SECONDS / 2
            while sum(process.ended() for process in processes) < size - 1 and time.monotonic() < deadline:
                time.sleep(0.002)
            (signs / "go").touch()
            codes = sorted(process.wait() for process in processes)
            self.expect(codes == [0, *[1] * (size - 1)], f"{case.name}: {codes} {[process.said for process in processes]}")
            winner = next((process.pid for process in processes if process.code == 0), 0)
            for process in processes:
                named = f"process {winner} on {platform.node()} has been writing it"
                self.expect(not process.code or named in process.said, f"{case.name}: the loser said {process.said}")
            self.expect(visible(output) == reference.new, f"{case.name}: not what a run alone writes")
            self.expect(not hidden(output), f"{case.name}: {hidden(output)} left")

    def _different_types(self, size: int) -> None:
        types = self.random.sample(("Q4_0", "Q8_0", "Q4_K_M", "Q5_0", "Q3_K_S"), size)
        measured = self.cases["gguf gptq"].options[2:] if self.random.random() < 0.5 else ("--method", "rtn")
        with self.folder() as output, self.folder() as alone:
            commands = [self.arguments(("--type", kind, *measured), output) for kind in types]
            processes = self._crowd(commands, no_hook)
            codes = [process.wait() for process in processes]
            self.expect(not any(codes), f"{types}: {codes} {[process.said for process in processes]}")
            for kind in types:
                self.run(("--type", kind, *measured), alone)
            self.expect(visible(output) == visible(alone), f"{types}: not what they write one after the other")
            self.expect(not hidden(output), f"{types}: {hidden(output)} left")
            readme = (output / "README.md").read_text()
            told = re.findall(r"<!-- xent-quant: (.+?) -->", readme)
            self.expect(sorted(told) == sorted(f"Model-{kind}" for kind in types), f"{types}: README.md tells of {told}")
            self.expect(all((output / f"Model-{kind}.Modelfile").is_file() for kind in types), f"{types}: a Modelfile is missing")

    def links(self) -> None:
        case = self.cases["gguf gptq"]
        reference_names = [".Model-Q4_0.gguf.lock", ".xent-quant.lock", "README.md"]
        with self.table_row("planted links") as row:
            with self.folder() as output:
                self.start(self.arguments(case.options, output), kill_behind_commit(2, 0)).wait()
                (work,) = work_folders(output)
            for name in [*reference_names, work.name]:
                for absent in (False, True):
                    with self.folder() as output, self.folder() as elsewhere:
                        output.mkdir()
                        elsewhere.mkdir()
                        target = elsewhere / ("absent" if absent else "folder" if name == work.name else "file")
                        (elsewhere / "folder").mkdir()
                        (elsewhere / "file").write_text("precious, made by xent-quant")
                        before = visible(elsewhere)
                        (output / name).symlink_to(target)
                        row.blows += 1
                        process = self.run(case.options, output)
                        what = f"{name} as a link{' to nowhere' if absent else ''}"
                        self.expect(process.failed, f"{what}: {process.said}")
                        self.expect(name in process.said, f"{what} is not named: {process.said}")
                        self.expect(
                            visible(elsewhere) == before and not any((elsewhere / "folder").iterdir()), f"{what}: followed"
                        )
                        self.expect(not visible(output) and hidden(output) in ([], [name]), f"{what}: {hidden(output)} left")
                        (output / name).unlink()
                        self.finish(case, output, what)
            self._link_in_the_work_folder(case)
            self._linked_results(self.cases["gguf forced"])

    def _link_in_the_work_folder(self, case: Case) -> None:
        """Temporary names of files that are replaced whole: nothing may be written through them."""
        for name in (".journal.json.part", ".Model-Q4_0.Modelfile.part"):
            with self.folder() as output, self.folder() as elsewhere:
                elsewhere.mkdir()
                (elsewhere / "file").write_text("precious")
                self.start(self.arguments(case.options, output), kill_behind_commit(2, 0)).wait()
                (work,) = work_folders(output)
                (work / name).symlink_to(elsewhere / "file")
                self.row.blows += 1
                self.finish(case, output, f"{name} as a link")
                self.expect((elsewhere / "file").read_text() == "precious", f"{name} as a link: followed")

    def _linked_results(self, case: Case) -> None:
        """A result that is a link is replaced, not what it points to."""
        with self.folder() as output, self.folder() as elsewhere:
            elsewhere.mkdir()
            output.mkdir()
            (elsewhere / "file").write_text("precious")
            (output / "Model-Q4_0.gguf").symlink_to(elsewhere / "file")
            self.row.blows += 1
            process = self.run(case.options, output)
            self.expect(process.code == 0, f"a result that is a link: {process.said}")
            self.expect((elsewhere / "file").read_text() == "precious", "a result that is a link: followed")
            self.expect(not (output / "Model-Q4_0.gguf").is_symlink(), "a result that is a link: still one")

    def changes(self) -> None:
        other = ("--tokens", "160")
        with self.table_row("changes") as row:
            for name in ("gguf gptq", "onnx", "calibrate"):
                case = self.cases[name]
                for kind in ("checkpoint", "tokens", "version", "split", "card"):
                    options, model = case.options, self.root / "Changed" / "Model"
                    hook: Hook = no_hook
                    shutil.rmtree(model.parent, ignore_errors=True)
                    shutil.copytree(self.model, model)
                    if kind == "tokens":
                        options = tuple("160" if option == "240" else option for option in options)
                    elif kind == "version":
                        hook = other_version
                    elif kind == "split":
                        options = (*options, "--split-size", "70K")
                    if (kind in ("split", "card")) and name != "gguf gptq":
                        continue
                    first = (*case.options, "--split-size", "60K") if kind == "split" else case.options
                    with self.folder() as output:
                        self.start(self.arguments(first, output, model), kill_behind_commit(3, 0)).wait()
                        (work,) = work_folders(output)
                        if kind == "checkpoint":
                            change_a_weight(model)
                        elif kind == "card":
                            (model / "README.md").write_text("---\nlicense: mit\n---\n")
                        row.blows += 1
                        what = f"{name}, {kind} changed"
                        arguments = self.arguments(options, output, model)
                        process = self.start(arguments, hook)
                        process.wait()
                        refused = process.failed and "--restart" in process.said
                        self.expect(refused and "(" in process.said, f"{what}: {process.code} {process.said}")
                        self.expect(work.is_dir() and not visible(output), f"{what}: the unfinished run is lost")
                        process = self.start([*arguments, "--restart"], hook)
                        self.expect(process.wait() == 0, f"{what}, --restart: {process.code} {process.said}")
                        with self.folder() as fresh:
                            self.start(self.arguments(options, fresh, model), hook).wait()
                            self.expect(visible(output) == visible(fresh), f"{what}, --restart: not what a fresh run writes")
                        self.expect(not hidden(output), f"{what}, --restart: {hidden(output)} left")
            self._changed_back(self.cases["gguf gptq"], other)

    def _changed_back(self, case: Case, other: tuple[str, str]) -> None:
        """A refused command harms nothing: the first one goes on."""
        with self.folder() as output:
            self.start(self.arguments(case.options, output), kill_behind_commit(3, 0)).wait()
            self.run((*case.options[:-6], "--effort", "fast", "--seqlen", "40", *other), output)
            self.row.blows += 1
            self.finish(case, output, "a killed run behind a refused one")


class Peak:
    """The most that a file system was filled meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes, self._over = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, shutil.disk_usage(self.folder).used)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def change_a_weight(model: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def print_row(row: Row) -> None:
    print(f"{row.name:<28}{row.runs:>6}{row.blows:>7}{len(row.violations):>12}{row.seconds:>9.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows of the table whose name holds this")
    parser.add_argument("--folder", type=Path, help="where to work; default: memory, where there is /dev/shm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loop.LEAST_SECONDS = 0.0
    memory = Path("/dev/shm")
    where = options.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(dir=where, prefix="xent-quant-torture-") as temporary:
        torture = Torture(Path(temporary), options.seed)
        for number, case in enumerate(torture.cases.values()):  # compiles and imports, so that no forked run has to
            if not case.old:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(SystemExit):
                    command(torture.arguments(case.options, Path(temporary) / f"warm-{number}"))
        print(f"\n{'':<28}{'runs':>6}{'blows':>7}{'violations':>12}{'seconds':>9}")
        each, more = divmod(options.kills, len(torture.cases))
        plan: list[tuple[str, Callable[[], None]]] = [
            *(
                (f"kills: {name}", lambda name=name, count=each + (number < more): torture.kills(name, count))
                for number, name in enumerate(torture.cases)
            ),
            *(
                (f"signals: {name}", lambda name=name: torture.signals(name, 8))
                for name in ("gguf gptq", "onnx", "bnb", "calibrate", "two types", "gguf forced")
            ),
            ("full disk", lambda: torture.full_disks(20)),
            ("2 at once", lambda: torture.crowds(2, 20)),
            ("4 at once", lambda: torture.crowds(4, 10)),
            ("planted links", torture.links),
            ("changes", torture.changes),
        ]
        for label, part in plan:
            if options.only in label:
                part()
    runs, blows = sum(row.runs for row in torture.rows), sum(row.blows for row in torture.rows)
    violations = sum(len(row.violations) for row in torture.rows)
    print(f"xent-quant {xent_quant.__version__}, seed {options.seed}: {runs} runs, {blows} blows, {violations} violations")
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
