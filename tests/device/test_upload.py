"""Weights are read ahead, in their order, and no further."""

import threading

import numpy as np
import pytest
import torch

from tests.device.card import DEVICE, card
from xent_quant.device import upload
from xent_quant.device.upload import ahead
from xent_quant.errors import CheckpointError

GROUPS = [["a", "b"], [], ["c"], ["d"]]


def test_groups_come_in_order_while_the_next_is_read() -> None:
    begun, reads = threading.Event(), []

    def read(name: str) -> np.ndarray:
        reads.append(name)
        if name == "c":
            begun.set()
        return np.full((2, 3), ord(name), np.float32)

    with card():
        coming = ahead(read, DEVICE, GROUPS)
        assert list(next(coming)) == ["a", "b"]
        assert next(coming) == {}
        assert begun.wait(10)  # before it was asked for
        assert "d" not in reads
        for name in ("c", "d"):
            ((found, (array, there)),) = next(coming).items()
            assert found == name
            assert there.device == DEVICE
            assert np.array_equal(there.cpu().numpy(), array)
            assert (array == ord(name)).all()
        assert list(coming) == []


def test_what_reading_raises_comes_where_it_was_read_for() -> None:
    def read(name: str) -> np.ndarray:
        if name == "c":
            raise CheckpointError("c: damaged")
        return np.zeros((1, 1), np.float32)

    coming = ahead(read, torch.device("cpu"), GROUPS)
    assert [list(next(coming)), list(next(coming))] == [["a", "b"], []]
    with pytest.raises(CheckpointError, match="c: damaged"):
        next(coming)


def test_all_copies_to_a_device_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of one stream is not used again for another."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", made.append)
    upload._copier.cache_clear()
    for number in (0, 0, 1, 0):
        assert list(ahead(lambda name: np.zeros(1, np.float32), torch.device("cuda", number), [])) == []
    assert made == [torch.device("cuda", 0), torch.device("cuda", 1)]
    upload._copier.cache_clear()
