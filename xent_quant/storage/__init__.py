"""All that this program asks of the operating system: files, locks, and results that appear whole or not at all.

    files        bytes at offsets, rows of a matrix on disk, small files replaced whole, free space
    locks        one process at a time
    publication  the journal by which staged files get their names: all of them or none, whenever the process is killed
    workspace    the folder that a run works in until it publishes

Nothing here asks which system it runs on: what one of them lacks is tested for (`hasattr`) and has a replacement.
"""

from xent_quant.storage.files import (
    PositionalFile,
    Rows,
    can_be_written,
    check_free_space,
    free_bytes,
    read_bytes,
    replace_bytes,
    sealed,
    sync,
    unsealed,
)
from xent_quant.storage.locks import lock
from xent_quant.storage.publication import recover
from xent_quant.storage.workspace import Move, Shared, Target, Workspace, publish

__all__ = [
    "Move",
    "PositionalFile",
    "Rows",
    "Shared",
    "Target",
    "Workspace",
    "can_be_written",
    "check_free_space",
    "free_bytes",
    "lock",
    "publish",
    "read_bytes",
    "recover",
    "replace_bytes",
    "sealed",
    "sync",
    "unsealed",
]
