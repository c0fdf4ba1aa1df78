"""The hidden folder beside the output in which a run keeps everything until it is published."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from xent_quant.errors import ExportError
from xent_quant.storage.files import read_bytes, remove, replace_bytes, reporting, sync, sync_tree
from xent_quant.storage.locks import lock
from xent_quant.storage.publication import (
    FOLDER_LOCK,
    FOLDER_LOCK_SECONDS,
    PUBLISHED,
    SHARED,
    Publication,
    finish,
    has_journal,
    is_private_folder,
    log,
    recover_locked,
)


@dataclass(frozen=True)
class Target:
    """The name that a file, or a folder, is to have in the output folder."""

    path: Path
    folder: bool = False


@dataclass(frozen=True)
class Move:
    """A file or folder in the work folder, and the name it gets."""

    staged: Path
    target: Path


@dataclass(frozen=True)
class Shared:
    """A file that several exports contribute to, of one run or of many. At publication `content` makes it from what is there
    (None: nothing) and from the names that the folder will hold."""

    target: Path
    content: Callable[[bytes | None, Collection[str]], bytes]


@dataclass(frozen=True)
class Workspace:
    """`path` is this run's work folder in `output`; `fresh`: there is nothing in it from a run before."""

    output: Path
    targets: Sequence[Target]
    path: Path
    fresh: bool
    force: bool

    @classmethod
    @contextmanager
    def open(cls, output: Path, targets: Sequence[Target], *, force: bool, choose: str = "--output") -> Iterator[Self]:
        """Yield the work folder for `targets`, names in `output`, which no other run gets meanwhile: the same one for the same
        names, so that a run can resume one that failed. It is kept unless published, or empty. `choose`: see `reporting`.

        Raises ExportError where a target exists and `force` is False, is a folder in place of a file or the other way round,
        or is being written by another process; where the work folder is not this user's own; and for what the system refuses
        within the block.
        """
        names = sorted(target.path.name for target in targets)
        if not names or len(set(names)) < len(names) or {target.path.parent for target in targets} != {output}:
            raise ValueError(f"{names}: not distinct names in {output}")
        path = output / f".xent-quant-{hashlib.sha256(os.fsencode(chr(0).join(names))).hexdigest()[:12]}"
        with reporting(output, choose), ExitStack() as locks:
            if output.exists() and not output.is_dir():
                raise ExportError(f"{output}: is a file; choose a folder as --output")
            output.mkdir(parents=True, exist_ok=True)
            with lock(output / FOLDER_LOCK, str(output), FOLDER_LOCK_SECONDS):
                for name in names:
                    locks.enter_context(lock(output / f".{name}.lock", str(output / name)))
                recover_locked(output)
                if is_private_folder(path):  # empty where a run was killed just before it removed it
                    with suppress(OSError):
                        path.rmdir()
                for target in targets:
                    _check_target(target, force)
                fresh = _enter(path)
            try:
                yield cls(output, tuple(targets), path, fresh, force)
            finally:
                with suppress(OSError):
                    path.rmdir()

    @property
    def published(self) -> bool:
        """Whether everything has its name; what it replaced may not be removed yet."""
        return not self.path.exists() or (self.path / PUBLISHED).exists()

    def clear(self) -> None:
        """Remove what runs before have left in the work folder. Raises OSError."""
        if has_journal(self.path):
            raise ExportError(f"{self.path}: holds old results of a failed publication; run again without --restart")
        for entry in self.path.iterdir():
            remove(entry)

    def nbytes(self) -> int:
        """What the work folder takes on the disk; holes of files count nothing where the file system knows them."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                status = os.lstat(os.path.join(folder, name))
                total += min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))
        return total


def publish(workspace: Workspace, moves: Sequence[Move], shared: Sequence[Shared] = ()) -> None:
    """Give what is staged in the work folder its names, all or none, and remove that folder. Whoever opens the first one never
    sees it beside others of another run. A file that is `shared` more than once gets all contributions, one after the other.

    Raises ExportError for what the system refuses, and then everything is as before: old results under their names, new ones
    in the work folder, for another attempt. So it is after KeyboardInterrupt. A killed run's publication is completed, or
    undone, by the next that opens or publishes in the same output folder, see `recover`.
    """
    work, output = workspace.path, workspace.output
    kinds = {target.path: target for target in workspace.targets}
    names = [*(move.target for move in moves), *{file.target for file in shared}]
    if not moves or len(set(names)) < len(names) or {name.parent for name in names} != {output}:
        raise ValueError(f"{[str(name) for name in names]}: not distinct names in {output}")
    if has_journal(work):
        raise ExportError(f"{work}: an earlier publication is half done; run again, which completes it")
    with reporting(output):
        for move in moves:
            if move.target not in kinds or work not in move.staged.parents:
                raise ValueError(f"{move}: not of {work}")
            sync_tree(move.staged)
            if move.staged.is_dir() != kinds[move.target].folder:
                raise ValueError(f"{move}: a folder in place of a file, or a file in place of a folder")
        sync(work)
        with lock(output / FOLDER_LOCK, str(output), FOLDER_LOCK_SECONDS):
            recover_locked(output)
            for move in moves:
                _check_target(kinds[move.target], workspace.force)
            _publish_locked(workspace, moves, shared)


def _publish_locked(workspace: Workspace, moves: Sequence[Move], shared: Sequence[Shared]) -> None:
    work = workspace.path
    pairs = [(move.staged, move.target) for move in moves]
    contributions: dict[Path, list[Shared]] = {}
    for file in shared:
        contributions.setdefault(file.target, []).append(file)
    pairs += [(work / SHARED / str(index), target) for index, target in enumerate(contributions)]
    publication = Publication.plan(work, pairs, main_first=len(moves) > 1)
    try:
        (work / SHARED).mkdir(exist_ok=True)
        names = {path.name for path in workspace.output.iterdir()} | {move.target.name for move in moves}
        for index, (target, files) in enumerate(contributions.items()):
            content = read_bytes(target)
            for file in files:
                content = file.content(content, names)
            replace_bytes(work / SHARED / str(index), content or b"")
        publication.write()
        publication.roll_forward()
    except BaseException as error:
        if not (work / PUBLISHED).exists():
            _roll_back(publication, error)
        raise
    try:
        finish(work)
    except OSError as error:  # it is published; the next run here tries again
        log.warning("%s: what it replaced cannot be removed: %s", work, error)


def _roll_back(publication: Publication, cause: BaseException) -> None:
    """Raises ExportError in place of the OSError that was the cause."""
    try:
        publication.roll_back()
    except OSError as error:
        raise ExportError(
            f"{error.filename2 or error.filename or publication.work}: {error.strerror or error}, after {cause}; the "
            f"publication is half done: put that right, and the next run to {publication.work.parent} completes it"
        ) from cause
    if isinstance(cause, OSError):
        kept = "the old result is untouched" if any(step.replaces for step in publication.steps) else "nothing was published"
        raise ExportError(
            f"{cause.filename2 or cause.filename or publication.work}: {cause.strerror or cause}; {kept}, the new one is kept "
            f"in {publication.work}: put that right and run again"
        ) from cause


def _check_target(target: Target, force: bool) -> None:
    path = target.path
    if not os.path.lexists(path):
        return
    if path.is_dir() and not target.folder:
        raise ExportError(f"{path}: is a folder, where a file is to be written; move it away, or choose another --output")
    if target.folder and not path.is_dir():
        raise ExportError(f"{path}: is a file, where a folder is to be written; move it away, or choose another --output")
    if not force:
        raise ExportError(f"{path}: exists already; add --force to replace it, or choose another --output")


def _enter(path: Path) -> bool:
    """Make the work folder, for this user only, or find it as a run before left it; whether it is empty. Raises ExportError
    for a link, a file, or another user's folder."""
    # Windows would keep others from reading what is made in there even when it has left.
    mode = 0o700 if hasattr(os, "geteuid") else 0o777
    with suppress(FileExistsError):
        path.mkdir(mode)
        return True
    if not is_private_folder(path):
        raise ExportError(f"{path}: is not a folder of this user's own; remove it, or choose another --output")
    return not any(path.iterdir())
