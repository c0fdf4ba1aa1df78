"""Staged files and folders get their final names: all of them or none, wherever the process is killed.

A work folder, `<output>/.xent-quant-<hex>`, holds what is staged, and during a publication one of two journals:

    publication.json   in progress: whoever finds it completes the publication, or undoes it if something staged was lost
    published.json     complete: whoever finds it removes the work folder, with the old results in `old/`

Every step is read off the disk, so each can be repeated, and killed, any number of times: what is staged leaves the work
folder in the one system call that gives it its name, and the old result is in `old/` before. All of it happens under the lock
of the output folder; a journal found under that lock is therefore a dead run's.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Self

from xent_quant.errors import ExportError
from xent_quant.storage.files import read_bytes, remove, replace_bytes, reporting, sync
from xent_quant.storage.locks import lock, remove_if_dead

log = logging.getLogger(__name__)

JOURNAL, PUBLISHED = "publication.json", "published.json"
OLD, SHARED = "old", "shared"  # folders within the work folder: old results; files that several runs contribute to
WORK_FOLDER = re.compile(r"\.xent-quant-[0-9a-f]{12}")
FOLDER_LOCK = ".xent-quant.lock"
FOLDER_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Step:
    """One file or folder that gets its name; the paths are those of the staged one, of the name, and of the old one if the
    name is taken (`replaces`). `vacate`: the name is given up before others are replaced, even if for files it needn't be."""

    staged: Path
    target: Path
    old: Path
    replaces: bool
    vacate: bool

    def is_done(self) -> bool:
        """Whether the new one has its name: it left the work folder, and what has the name is not the old one."""
        if os.path.lexists(self.staged) or not os.path.lexists(self.target):
            return False
        return not self.replaces or (os.path.lexists(self.old) and not self._old_keeps_name())

    def is_disturbed(self) -> bool:
        """Whether what has the name is neither the old one nor the new one: someone else's."""
        if not os.path.lexists(self.staged) or not os.path.lexists(self.target):
            return False
        return not self.replaces or (os.path.lexists(self.old) and not self._old_keeps_name())

    def set_aside(self) -> None:
        """Put the old one into `old/`; a file keeps its name until the new one takes it, unless `vacate`. Raises OSError."""
        if not self.replaces or not os.path.lexists(self.staged) or os.path.lexists(self.old):
            return
        try:
            regular = stat.S_ISREG(os.lstat(self.target).st_mode)
        except FileNotFoundError:
            return
        if regular and not self.vacate and hasattr(os, "link"):
            try:
                os.link(self.target, self.old)
                return
            except OSError as error:
                log.debug("%s: no second name (%s), so it is renamed", self.target, error)
        os.rename(self.target, self.old)

    def give_name(self) -> None:
        """Raises OSError."""
        if os.path.lexists(self.staged):
            os.replace(self.staged, self.target)

    def take_name_back(self) -> None:
        """Raises OSError."""
        if self.is_done():
            os.replace(self.target, self.staged)

    def restore_old(self) -> None:
        """Raises OSError."""
        if not os.path.lexists(self.old):
            return
        if self._old_keeps_name():
            os.unlink(self.old)  # renaming one of two names of a file to the other does nothing
        else:
            os.replace(self.old, self.target)

    def _old_keeps_name(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self.old), os.lstat(self.target))
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Publication:
    """The steps by which what is staged in `work` gets its names. The first one's is given last, and taken back first."""

    work: Path
    steps: Sequence[Step]

    @classmethod
    def plan(cls, work: Path, moves: Sequence[tuple[Path, Path]], *, main_first: bool) -> Self:
        """`moves` are pairs of (staged, target). `main_first`: the first target is the main one of a set, so its name is given
        up before the others are replaced."""
        return cls(
            work,
            [
                Step(staged, target, work / OLD / str(index), os.path.lexists(target), main_first and index == 0)
                for index, (staged, target) in enumerate(moves)
            ],
        )

    @classmethod
    def read(cls, journal: Path) -> Self:
        """Raises ExportError for a journal that this module did not write."""
        work, steps = journal.parent, []
        try:
            for index, entry in enumerate(json.loads(read_bytes(journal) or b"")["moves"]):
                staged, target = PurePath(entry["staged"]), PurePath(entry["target"])
                inside = not staged.is_absolute() and staged.parts and ".." not in staged.parts
                odd = any(b"\0" in os.fsencode(path) for path in (staged, target))
                if odd or not inside or list(target.parts) != [target.name] or target.name == "..":
                    raise ValueError(entry)
                old = work / OLD / str(index)
                steps.append(Step(work / staged, work.parent / target, old, bool(entry["replaces"]), bool(entry["vacate"])))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ExportError(
                f"{journal}: is no journal of a publication; look into its folder for lost results, then remove it"
            ) from error
        return cls(work, steps)

    def write(self) -> None:
        """From here on a dead run's publication is completed. Raises OSError."""
        (self.work / OLD).mkdir(exist_ok=True)
        moves = [
            {
                "staged": step.staged.relative_to(self.work).as_posix(),
                "target": step.target.name,
                "replaces": step.replaces,
                "vacate": step.vacate,
            }
            for step in self.steps
        ]
        replace_bytes(self.work / JOURNAL, json.dumps({"moves": moves}, indent=1).encode())

    def is_whole(self) -> bool:
        """Whether each new one is staged or has its name."""
        return all(os.path.lexists(step.staged) or step.is_done() for step in self.steps)

    def check_undisturbed(self) -> None:
        """Raise ExportError where someone else's file has one of the names."""
        for step in self.steps:
            if step.is_disturbed():
                raise ExportError(
                    f"{step.target}: appeared after a run was killed while it published that file; move it away and run again"
                )

    def roll_forward(self) -> None:
        """Give every name, whatever was done before. Raises OSError."""
        for step in self.steps:
            step.set_aside()
        sync(self.work / OLD)
        sync(self.work.parent)
        for step in reversed(self.steps):
            step.give_name()
        for folder in {step.staged.parent for step in self.steps}:
            sync(folder)
        sync(self.work.parent)
        os.replace(self.work / JOURNAL, self.work / PUBLISHED)

    def roll_back(self) -> None:
        """Put every old result and everything staged back to where it was, and remove the journal. Raises OSError."""
        if os.path.lexists(self.work / JOURNAL):  # else nothing was done
            for step in self.steps:
                step.take_name_back()
            for step in reversed(self.steps):
                step.restore_old()
        for folder in {self.work, *(step.staged.parent for step in self.steps)}:
            if folder.exists():
                sync(folder)
        sync(self.work.parent)
        (self.work / JOURNAL).unlink(missing_ok=True)
        sync(self.work)
        remove(self.work / SHARED)  # made anew from what is there by then
        with suppress(FileNotFoundError):
            os.rmdir(self.work / OLD)


def finish(work: Path) -> None:
    """Remove a work folder whose publication is complete; its journal last, so that this can be taken up. Raises OSError."""
    sync(work)
    for entry in work.iterdir():
        if entry.name != PUBLISHED:
            remove(entry)
    os.unlink(work / PUBLISHED)
    os.rmdir(work)
    sync(work.parent)


def has_journal(work: Path) -> bool:
    """Whether a publication was begun and neither finished nor undone."""
    return any(os.path.lexists(work / journal) for journal in (JOURNAL, PUBLISHED))


def is_private_folder(path: Path) -> bool:
    """Whether `path` is a folder (not a link to one) that belongs to this user."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:  # removed meanwhile, by the run it belonged to
        return False
    return stat.S_ISDIR(status.st_mode) and (not hasattr(os, "geteuid") or status.st_uid == os.geteuid())


def recover(output: Path) -> None:
    """Complete the publications that killed runs left half done in the folder `output`, or undo those of which something
    staged was lost; remove what killed runs left besides, but for work folders that can be resumed.

    Raises ExportError where that is impossible, or another process publishes for more than a minute.
    """
    if not output.is_dir():
        return
    with reporting(output), lock(output / FOLDER_LOCK, str(output), FOLDER_LOCK_SECONDS):
        recover_locked(output)


def recover_locked(output: Path) -> None:
    """`recover` for whoever holds the lock of the folder. Raises ExportError or OSError."""
    for path in sorted(output.iterdir()):
        if WORK_FOLDER.fullmatch(path.name) and is_private_folder(path):
            _recover_work_folder(path)
        elif path.name.startswith(".") and path.name.endswith(".lock"):
            remove_if_dead(path)


def _recover_work_folder(work: Path) -> None:
    if (work / PUBLISHED).exists():
        finish(work)
    elif (work / JOURNAL).exists():
        publication = Publication.read(work / JOURNAL)
        publication.check_undisturbed()
        if not publication.is_whole():
            log.warning("%s: something that a killed run was publishing is lost, so it is undone", work.parent)
            publication.roll_back()
            return
        try:
            publication.roll_forward()
        except OSError as error:
            log.warning("%s: a killed run's publication cannot be completed (%s), so it is undone", work.parent, error)
            publication.roll_back()
        else:
            finish(work)
