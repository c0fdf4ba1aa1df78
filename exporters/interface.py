"""What exporters share. The pipeline walks the checkpoint once and hands every tensor to every exporter's Sink."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xent_quant.formats.base import F32
from xent_quant.tensors import InputStatistics


@dataclass(frozen=True)
class Exported:
    """Files written, the one to open first; `notes` for the person."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


class Sink(Protocol):
    """An export under way; bytes go to temporary names."""

    def put(self, name: str, start: int, weights: F32, statistics: InputStatistics | None) -> None:
        """Rows `start`… of the checkpoint tensor `name`: [rows, columns] float32, a vector as [1, n].

        Tensors come in the order of `Architecture.tensors()`, each once and whole: in one piece, or, where it is larger
        than `Checkpoint.SLICE` weights, in consecutive slices of rows. `weights` belongs to the caller and is not changed.
        """

    def finish(self) -> Exported:
        """All tensors were put: write what is left. The files appear under their names when the context ends."""


class Exporter(Protocol):
    """An export, planned from headers: everything that can be refused has been refused when it exists."""

    def open(self) -> AbstractContextManager[Sink]:
        """Check the target and start writing. Leaving the context without `finish` removes everything written."""
