"""Progress is an argument, not logging: the library reports to a Progress, only the command line draws one."""

from typing import Protocol


class Progress(Protocol):
    """Receives the advance of a long job, in units that `start` names."""

    def start(self, label: str, total: int, unit: str = "weights", done: int = 0) -> None:
        """A job of `total` units begins, `done` of which an earlier run did; a second call replaces the first job."""

    def advance(self, amount: int) -> None:
        """`amount` further units are done."""

    def phase(self, text: str) -> None:
        """What is being done now, within the job."""

    def note(self, text: str) -> None:
        """Something that a person should know now, not at the end."""

    def finish(self) -> None:
        """The job is over."""


class Silent:
    """A Progress that shows nothing; the default of every library call."""

    def start(self, label: str, total: int, unit: str = "weights", done: int = 0) -> None: ...

    def advance(self, amount: int) -> None: ...

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...
