"""A checkpoint without some of its experts reads as one that was written without them; what exports say of them is checked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.folders import with_experts, write
from tests.checkpoint.test_fused import fused
from xent_quant.checkpoint.dropping import GGUF_KEYS, KeptExperts, compared_with, compared_with_gguf, keep
from xent_quant.checkpoint.fingerprint import fingerprint
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ValidationError

NUMBERS = [[1, 2], [0, 2]]
KEPT = KeptExperts(tuple(map(tuple, NUMBERS)), 3, "a novel")


@pytest.mark.parametrize("stored", ["one by one", "out, in", "in, out"])
def test_a_view_reads_as_what_is_written_without_them(tmp_path: Path, stored: str) -> None:
    weights, meant = (None, None) if stored == "one by one" else fused(stored == "in, out")
    whole = Checkpoint.open(write(tmp_path / "whole", weights))
    view = keep(whole, KEPT)
    written = Checkpoint.open(with_experts(write(tmp_path / "meant", meant), tmp_path / "written", NUMBERS))
    assert view.architecture == written.architecture
    assert view.architecture.num_experts == 2
    assert {name: info.shape for name, info in view.infos.items()} == {name: info.shape for name, info in written.infos.items()}
    assert view.n_weights == written.n_weights < whole.n_weights
    for name, info in view.infos.items():
        assert np.array_equal(view.read(name), written.read(name)), name
        assert np.array_equal(view.read(name, 1, 2), written.read(name, 1, 2)), name
        parts = [part() for _, part in view.pieces(name, 2 * info.shape[-1])]
        assert np.array_equal(np.concatenate(parts).ravel(), written.read(name).ravel()), name
    assert fingerprint(view) == fingerprint(whole)  # it is the same files


def test_what_an_export_says_is_the_view(tmp_path: Path) -> None:
    whole = Checkpoint.open(write(tmp_path))
    assert compared_with(whole, None, "file") is whole
    assert compared_with_gguf(whole, {"general.name": "x"}, "file") is whole
    (told,) = KEPT.to_config().values()
    assert compared_with(whole, told, "file").kept == KEPT
    flat = dict(zip(GGUF_KEYS.values(), ([1, 2, 0, 2], 3, "a novel"), strict=True))
    assert compared_with_gguf(whole, flat, "file").kept == KEPT


WRONG: list[Any] = [
    5,
    [],
    {},
    {"kept": NUMBERS},
    {"kept": NUMBERS, "of": 4},
    {"kept": NUMBERS[:1], "of": 3},
    {"kept": [[1, 2], [0]], "of": 3},
    {"kept": [[], []], "of": 3},
    {"kept": [[1, 2], [2, 0]], "of": 3},
    {"kept": [[1, 2], [2, 2]], "of": 3},
    {"kept": [[1, 2], [0, 3]], "of": 3},
    {"kept": [[1, 2], [-1, 2]], "of": 3},
    {"kept": [[1, 2], [0, True]], "of": 3},
    {"kept": [[1, 2], [0, "2"]], "of": 3},
    {"kept": [[1, 2], None], "of": 3},
]


def test_experts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    whole = Checkpoint.open(write(tmp_path))
    for told in WRONG:
        with pytest.raises(ValidationError, match=r"config\.json: .*no experts of the reference"):
            compared_with(whole, told, "config.json: xent_quant_experts")
    for flat in ([1, 2, 0], [], "1", [1, 2, 0, 9], [0.0, 1.0, 0.0, 2.0]):
        metadata = dict(zip(GGUF_KEYS.values(), (flat, 3, ""), strict=True))
        with pytest.raises(ValidationError, match=r"a\.gguf: xent_quant\.experts\.kept: names no experts"):
            compared_with_gguf(whole, metadata, "a.gguf")
