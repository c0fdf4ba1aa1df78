"""How much of a text, or of weights alone, is in memory at a time, and on disk; torch need not be there to ask."""

from dataclasses import dataclass

from xent_quant.checkpoint.architecture import Architecture

PART_TOKENS = 512
"""Tokens that go through a weight together on a CPU (one window at least through attention); bounds what is held besides the
states. Few enough that what is made of their rows stays in caches, and below `memory.MATRIX`: its memory is used again."""
DEVICE_PART_TOKENS = 2048
"""The same on a device, which many small operations keep waiting."""
ADDED_ROWS = 2048
"""That are added to sums of products at a time, which are read and written each time; what is added waits until then."""
PIECE = 1 << 20
"""Weights that a thread reads, quantises and writes at a time where no text is run: most of the way they are in its cache."""
SLICES = 2
"""Of the head that are worked on at a time on a CPU: beside what one thread does alone for one, others are busy with the next."""
KEPT_ROWS = 16384
"""Rows of an expert's inner activations that are kept between the looks at them, at most; above, they are computed again."""
HELD_OUT_ROWS = 1024
"""Rows in front of a weight that are kept to judge by, at most."""


@dataclass(frozen=True)
class Room:
    """What fits into memory: inner rows of an expert that are kept, experts that are worked on side by side, and streams that are
    measured side by side outside experts (None: one for each thread)."""

    kept_rows: int = KEPT_ROWS
    experts: int | None = None
    streams: int | None = None


STATE_FILES = ("a", "b", "sum")
"""Of a stream: the states before and behind a layer in turns, and what is about to be added to them; all as wide as the model."""
ATTENDED = "attended"
"""One more, where what attention makes has another width: that."""
INNER = "inner"
"""And one for what is between the weights of the MLP that every token uses: a CPU computes that more slowly than it reads it."""


def state_files(model: Architecture, inner: bool = True) -> dict[str, int]:
    """The files of a stream and their columns, float32; with or without INNER."""
    found = dict.fromkeys(STATE_FILES, model.hidden_size)
    if model.attention_size != model.hidden_size:
        found[ATTENDED] = model.attention_size
    if inner and (mlp := model.layer(0).mlp):
        found[INNER] = mlp.down.shape[1]
    return found


SALIENCY_TOKENS = 32768
"""Of the calibration text at most so many, in evenly spaced windows, say which experts are dropped."""
