"""What a person at a terminal sees: progress with time left, tables. Plain lines where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from periplus.training import Progress

PLAIN_INTERVAL = 10.0  # seconds between plain lines, so that a log stays a log


def note(message: str) -> None:
    """One line for the person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One line of warning, on stderr."""
    note(f"warning: {message}")


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TrainingDisplay:
    """Progress of one training run: a bar on a terminal, a line every ten seconds elsewhere. Use as a context, call with each Progress."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        told = f"{progress.images_per_second:,.0f} images/s, {duration(progress.seconds_left)} left"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self.title, total=progress.steps, note="")
            self._bar.update(self._task, completed=progress.step, note=told)
        elif progress.step == progress.steps or time.monotonic() - self._last > PLAIN_INTERVAL:
            self._last = time.monotonic()
            note(f"{self.title}: step {progress.step}/{progress.steps}, {told}")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(*header, title=title, title_justify="left", header_style="bold")
    for row in rows:
        grid.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console().print(grid)
