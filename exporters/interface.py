"""What exporters share: the statistics they may ask for, and what they hand back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Importance = Callable[[str, int], NDArray[np.float32] | None]
"""importance(tensor's name in the file, expert) -> mean x² of each input column [columns] float32, or None."""


@dataclass(frozen=True)
class Exported:
    """Files written, the one to open first; `notes` for the person."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]
