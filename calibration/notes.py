"""What a person should know about the text that was read: said once, however many files and rows it holds of."""

from collections.abc import Iterator
from pathlib import Path


class Notes:
    """Notes by what they say: how often, of how many files, and the first of them."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._files: dict[str, set[Path]] = {}
        self._first: dict[str, tuple[Path, str]] = {}

    def add(self, what: str, path: Path, count: int = 1, first: str = "") -> None:
        """`what` of `path`; in it `{n}` becomes the sum of the counts and `{s}` the s of a plural. `first` tells more of the
        first."""
        if count:
            self._counts[what] = self._counts.get(what, 0) + count
            self._files.setdefault(what, set()).add(path)
            self._first.setdefault(what, (path, first))

    def lines(self) -> Iterator[str]:
        """One line for every note, in the order of first mention."""
        for what, count in self._counts.items():
            path, first = self._first[what]
            others = len(self._files[what]) - 1
            more = f" and {others:,} more file{'s' if others > 1 else ''}" if others else ""
            said = what.replace("{n}", f"{count:,}").replace("{s}", "s" if count > 1 else "")
            yield f"{path}{more}: {said}{f' ({first})' if first else ''}"
