"""Where the rows of a residual stream lie while the model runs over a text: in memory, or in a file that grows with the text."""

from typing import Protocol

import torch
from torch import Tensor

from xent_quant.storage import Rows


class States(Protocol):
    """[n_tokens, columns] of one dtype on one device, a few rows at a time."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop, a copy or not: not to be changed."""

    def write(self, start: int, rows: Tensor) -> None:
        """Rows from `start` on become `rows`."""

    def take(self, tokens: Tensor) -> Tensor:
        """The rows of `tokens` [n] int64, ascending."""

    def put(self, tokens: Tensor, rows: Tensor) -> None:
        """The rows of `tokens` become `rows`."""


class InMemory:
    """Holds all of it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def read(self, start: int, stop: int) -> Tensor:
        return self.rows[start:stop]

    def write(self, start: int, rows: Tensor) -> None:
        self.rows[start : start + len(rows)] = rows

    def take(self, tokens: Tensor) -> Tensor:
        return self.rows[tokens]

    def put(self, tokens: Tensor, rows: Tensor) -> None:
        self.rows[tokens] = rows


class OnDisk:
    """Holds nothing; the file is float32, which every dtype that the model runs in goes into and comes back from unchanged
    (float64 apart, which is for tests in memory). Rows are those of the file from `first` on."""

    def __init__(self, rows: Rows, dtype: torch.dtype, device: torch.device, first: int = 0) -> None:
        self.file = rows
        self._dtype, self._device, self._first = dtype, device, first

    def on(self, device: torch.device) -> "OnDisk":
        """The same rows, read to another device and written from it."""
        return OnDisk(self.file, self._dtype, device, self._first)

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self.file.read(self._first + start, self._first + stop)).to(self._device, self._dtype)

    def write(self, start: int, rows: Tensor) -> None:
        self.file.write(self._first + start, rows.float().cpu().numpy())

    def take(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.file.take(self._first + tokens.cpu().numpy())).to(self._device, self._dtype)

    def put(self, tokens: Tensor, rows: Tensor) -> None:
        self.file.put(self._first + tokens.cpu().numpy(), rows.float().cpu().numpy())
