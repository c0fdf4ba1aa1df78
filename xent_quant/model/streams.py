"""The streams in which a text runs through the model: in files that grow with the text, so that memory does not."""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from xent_quant.formats.base import F32
from xent_quant.model.sizes import KEPT_ROWS, state_files
from xent_quant.model.stages import Pass, Stream, WeightSource
from xent_quant.model.states import OnDisk
from xent_quant.storage import Rows


class Streams:
    """The streams of a walk: `windows` [n, length] of token ids and the states of `count` streams in files of `folder`.

    Holds what `Pass` and, for each stream that is measured, `Measuring` hold; the files take 4 bytes for each token, stream and
    column of `state_files`.
    """

    def __init__(
        self,
        source: WeightSource,
        windows: Tensor,
        folder: Path,
        dtype: torch.dtype,
        count: int,
        kept_rows: int = KEPT_ROWS,
        *,
        fresh: bool,
        inner: bool = True,
        products: torch.dtype | None = None,
    ) -> None:
        """`fresh`: nothing was committed yet, so whatever a killed run left in the files is made anew. `inner`: rows inside the
        MLP are looked at before they are gone on with, and so worth keeping. `products`: see `Pass`."""
        self.folder, self._files = folder, ExitStack()
        columns = state_files(source.architecture, inner=inner and windows.device.type == "cpu")
        streams = []
        for number in range(count):
            files = {file: self._open(f"{number}.{file}", windows, width, fresh) for file, width in columns.items()}
            streams.append(Stream.of({file: OnDisk(rows, dtype, windows.device) for file, rows in files.items()}))
        self._first = streams[0].x
        self.run = Pass(source, windows, streams, dtype, kept_rows, products)

    def _open(self, name: str, windows: Tensor, columns: int, fresh: bool) -> Rows:
        path = self.folder / name
        if fresh:
            path.unlink(missing_ok=True)
        return self._files.enter_context((Rows.create if fresh else Rows.open)(path, windows.numel(), columns))

    @property
    def swapped(self) -> bool:
        """Which of its two files holds a stream's states, the same in all of them."""
        return self.run.streams[0].x is not self._first

    @swapped.setter
    def swapped(self, wanted: bool) -> None:
        if wanted != self.swapped:
            for stream in self.run.streams:
                stream.x, stream.spare = stream.spare, stream.x

    def embed(self, stream: int, start: int, rows: F32 | Tensor) -> None:
        """See `Pass.embed`."""
        self.run.embed(stream, start, torch.as_tensor(rows))

    def sync(self) -> None:
        """The states are safe from a loss of power when this returns."""
        for stream in self.run.streams:
            if isinstance(stream.x, OnDisk):
                stream.x.file.sync()

    def close(self) -> None:
        self._files.close()
