"""Whether a checkpoint is still the same, and whether two are of one model."""

import hashlib
import json

from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import CheckpointError

BLOCKS, BLOCK_BYTES = 64, 4096
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files besides weights that exports say something of; and templates."""
ROWS = 64
"""Weights of which a row tells models apart."""


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that changes with the model: what lies beside the weights whole; of each weight file its name, size, inode, time of
    change and 64 blocks of 4 KiB. Reading 51 GB whole would take longer than many a job. Raises OSError."""
    digest = hashlib.sha256()
    for path in (*(checkpoint.path / name for name in BESIDE), *sorted(checkpoint.path.glob("**/*.jinja"))):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    for file in sorted({location.file for location in checkpoint.locations.values()}):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_ino} {facts.st_mtime_ns}".encode())
        with file.open("rb") as stream:
            for part in range(BLOCKS):
                stream.seek(facts.st_size * part // BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def model_hash(checkpoint: Checkpoint) -> str:
    """A hash that copies of a model share, wherever and in however many files they lie, and other models of its shape do not:
    what config.json says of the function, and a row of ROWS weights. Raises as `Checkpoint.read`."""
    model = checkpoint.architecture
    config = {key: value for key, value in model.to_config().items() if not key.endswith("_token_id")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    weights = [spec for spec in model.each_tensor() if spec.measured]
    for spec in weights[:: -(-len(weights) // ROWS)]:
        middle = spec.shape[0] // 2
        digest.update(checkpoint.read(spec.name, middle, middle + 1).astype("<f4").tobytes())
    return digest.hexdigest()


def check_same(checkpoint: Checkpoint, before: str) -> None:
    """Raise CheckpointError where the fingerprint is not `before` any more; OSError where a file is gone."""
    if fingerprint(checkpoint) != before:
        raise CheckpointError(f"{checkpoint.path}: changed while it was read; nothing was written, run it again")
