"""How far a long job is: bars on a terminal, a line a minute in a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from xent_quant.cli.terminal import say
from xent_quant.plain import plain
from xent_quant.units import human_count, human_seconds

LINE_SECONDS = 60.0
"""Between two lines in a log file."""


class Pace:
    """How fast a job goes and how long the rest takes, judged by what this process did itself."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self._before, self._begun = total, done, done, time.monotonic()

    @property
    def speed(self) -> float | None:
        """Units per second; None where nothing can be said yet."""
        seconds = time.monotonic() - self._begun
        return (self.done - self._before) / seconds if self.done > self._before and seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds."""
        return (self.total - self.done) / self.speed if self.speed else None


class _Speed(ProgressColumn):
    """Units per second, and the time that the rest takes."""

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        if pace.speed is None or pace.left is None:
            return Text("")
        speed = f"{human_count(pace.speed)} {task.fields['unit']}/s"
        return Text(f"{speed}, {human_seconds(pace.left)} left", style="progress.data.speed")


class _Bars:
    """A Progress (see xent_quant.progress) drawn by rich."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._label = ""

    def start(self, label: str, total: int, unit: str = "weights", done: int = 0) -> None:
        self.finish()
        self._label, self._pace = plain(label), Pace(total, done)
        self._task = self._bars.add_task(self._label, total=total, completed=done, unit=unit, pace=self._pace)

    def advance(self, amount: int) -> None:
        if self._task is not None:
            self._pace.done += amount
            self._bars.advance(self._task, amount)

    def phase(self, text: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, description=f"{self._label}: {plain(text)}")

    def note(self, text: str) -> None:
        self._bars.console.print(text, style="dim")

    def finish(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = None


class _Lines:
    """A Progress for a log file."""

    def __init__(self) -> None:
        self._pace: Pace | None = None
        self._label = self._phase = self._unit = ""
        self._last = time.monotonic()

    def start(self, label: str, total: int, unit: str = "weights", done: int = 0) -> None:
        self._label, self._unit, self._phase, self._pace = label, unit, "", Pace(total, done)

    def advance(self, amount: int) -> None:
        if self._pace is None:
            return
        self._pace.done += amount
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS and self._pace.speed is not None and self._pace.left is not None:
            self._last = now
            where = f", {self._phase}" if self._phase else ""
            self.note(
                f"{self._label}{where}: {self._pace.done / max(1, self._pace.total):.0%}, "
                f"{human_count(self._pace.speed)} {self._unit}/s, {human_seconds(self._pace.left)} left"
            )

    def phase(self, text: str) -> None:
        self._phase = text

    def note(self, text: str) -> None:
        say(text)

    def finish(self) -> None:
        self._pace = None


@contextmanager
def progress(console: Console) -> "Iterator[_Bars | _Lines]":
    """Bars on a terminal, lines elsewhere."""
    if not (console.is_interactive and console.file.isatty()):  # FORCE_COLOR makes a log interactive to rich
        yield _Lines()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Speed())
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(bars)
