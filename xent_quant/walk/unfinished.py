"""What becomes of the work of a run that ends early: kept where the same command can go on with it, else removed."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from xent_quant.errors import ExportError, Interrupted, XentQuantError, is_interrupt
from xent_quant.journal import Journal
from xent_quant.storage import Workspace

LEAST_STEPS = 2
"""Finished steps that are worth going on behind: the embedding and a layer. To know which experts stay is worth it too."""


@contextmanager
def kept(work: Workspace, journal: Journal) -> Iterator[None]:
    """Remove the work of the block where it raises an error that the same command would raise again, or where hardly anything was
    done. Else it stays, and what is raised says so."""
    try:
        yield
    except BaseException as error:
        hopeless = isinstance(error, XentQuantError) and not isinstance(error, ExportError)
        if hopeless or (journal.done < LEAST_STEPS and journal.experts is None):
            with suppress(OSError, ExportError):  # what was raised matters more
                work.clear()
            if is_interrupt(error):
                raise Interrupted("nothing unfinished was left behind") from None
            raise
        if work.published:
            if is_interrupt(error):
                raise Interrupted("the result was complete by then") from None
            raise
        remark = "the same command goes on where this one stopped"
        if is_interrupt(error):
            raise Interrupted(remark) from None
        if isinstance(error, OSError):
            named = error.filename2 or error.filename or work.path
            raise ExportError(f"{named}: {error.strerror or error}; put that right, and {remark}") from error
        raise
