"""Whether a checkpoint is still the same."""

import hashlib

from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError

BLOCKS, BLOCK_BYTES = 64, 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that changes with the weights: config and tokenizer whole; of each weight file its name, size, inode, time of
    change and 64 blocks of 4 KiB. Reading 51 GB whole would take longer than many a job. Raises OSError."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        path = checkpoint.path / name
        digest.update(path.read_bytes() if path.is_file() else b"-")
    for file in sorted({location.file for location in checkpoint.locations.values()}):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_ino} {facts.st_mtime_ns}".encode())
        with file.open("rb") as stream:
            for part in range(BLOCKS):
                stream.seek(facts.st_size * part // BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def check_same(checkpoint: Checkpoint, before: str) -> None:
    """Raise CheckpointError where the fingerprint is not `before` any more; OSError where a file is gone."""
    if fingerprint(checkpoint) != before:
        raise CheckpointError(f"{checkpoint.path}: changed while it was read; nothing was written, run it again")
