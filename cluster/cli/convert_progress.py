"""Shows a conversion on a terminal: a bar with bytes and the time left. Elsewhere, a line for every tenth."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from cluster.cli.load_progress import BAR_WIDTH
from cluster.cli.screen import console, format_duration, format_share, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from cluster.conversion.converter import ConversionProgress

PLAIN_STEP: Final = 10
"""Percent of progress between two plain lines."""


class ConversionBar:
    """Progress of the conversion of ``what``. A context manager, so that an error does not leave a live bar."""

    def __init__(self, stream: TextIO, what: str) -> None:
        self._console = console(stream)
        self._what = printable(what)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._printed = -1
        self._started: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: ConversionProgress) -> None:
        """Draw the progress, or print it if it has reached the next step. The time left counts from the first call."""
        self._started = self._started or time.monotonic()
        if self._console.is_terminal:
            self._draw(progress)
        else:
            self._print(progress)

    def _draw(self, progress: ConversionProgress) -> None:
        if self._bar is None or self._task is None:
            self._bar = _new_bar(self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=progress.total, completed=progress.resumed)
        self._bar.update(self._task, completed=progress.done)

    def _print(self, progress: ConversionProgress) -> None:
        percent = 100 * progress.done // progress.total if progress.total else 100
        if percent // PLAIN_STEP == self._printed:
            return
        self._printed = percent // PLAIN_STEP
        line = f"{self._what}: {percent}%, {format_share(progress.done, progress.total)}"
        new = progress.done - progress.resumed
        if new and progress.done < progress.total:
            left = (time.monotonic() - (self._started or 0)) * (progress.total - progress.done) / new
            line += f", {format_duration(left)} left"
        elif not new and progress.resumed:
            line += ", from an interrupted conversion"
        self._console.print(line, soft_wrap=True)


def _new_bar(terminal: Console) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(BAR_WIDTH), DownloadColumn(binary_units=True), TimeRemainingColumn())
    return Progress(*columns, console=terminal)
