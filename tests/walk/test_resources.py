"""What a walk is planned to hold on the CPU, and what is given up first where that is too much."""

import numba
import pytest

from tests.walk.test_device import real_sizes
from xent_quant.errors import ConfigError
from xent_quant.model.sizes import KEPT_ROWS, Room
from xent_quant.walk import resources


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba, "get_num_threads", lambda: 4)


def test_streams_side_by_side_are_given_up_before_experts() -> None:
    """Of a model whose stages outside experts are the larger ones."""
    model = real_sizes(num_shared_experts=8)
    most = resources.room(model, 2, 512, None)
    assert most == Room(KEPT_ROWS, 4, 2)
    chosen = resources.room(model, 2, 512, resources.memory(model, 2, 512, most) - 1)
    assert chosen == Room(KEPT_ROWS, 4, 1)
    assert resources.memory(model, 2, 512, chosen) < resources.memory(model, 2, 512, most)
    least = resources.memory(model, 2, 512, Room(0, 1, 1))
    assert resources.memory(model, 2, 512, resources.room(model, 2, 512, least)) == least
    with pytest.raises(ConfigError, match="are needed"):
        resources.room(model, 2, 512, least - 1)


def test_longer_windows_take_more_outside_experts() -> None:
    model = real_sizes(num_shared_experts=8)
    short, long = (resources.memory(model, 1, length, Room(0, 1, 1)) for length in (512, 4096))
    rows = 4 * (4096 - 512) * (4 * model.hidden_size + 3 * model.shared_size)
    assert long - short >= rows
    assert resources.memory(model, 1, 256, Room(0, 1, 1)) == short
