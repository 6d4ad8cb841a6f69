"""What a person at a terminal sees: progress with time left, tables. Plain lines where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
            self._bar = _bars()
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
    from rich.markup import escape
    from rich.table import Table

    grid = Table(*map(escape, header), title=title and escape(title), title_justify="left", header_style="bold")
    for row in rows:
        grid.add_row(*("-" if cell is None else escape(str(cell)) for cell in row))
    Console().print(grid)


class StageDisplay:
    """Progress of several runs at once: a bar each on a terminal, a line per finished run and per half minute elsewhere."""

    INTERVAL = 30.0

    def __init__(self, names: Sequence[str], say: Callable[[str], None] = note) -> None:
        self.names = list(names)
        self.say = say
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._state: dict[str, tuple[int, int, str]] = {}
        self._finished = 0
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and self.say is note:
            self._bar = _bars()
            self._bar.start()
            self._tasks = {name: self._bar.add_task(name, total=1, note="waiting") for name in self.names}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, name: str, step: int, steps: int, told: str) -> None:
        """Where a run is."""
        self._state[name] = (step, steps, told)
        if self._bar is not None:
            self._bar.update(self._tasks[name], completed=step, total=steps, note=told)
        elif time.monotonic() - self._last > self.INTERVAL:
            self._last = time.monotonic()
            busy = "; ".join(f"{k} {s}/{n} {t}" for k, (s, n, t) in self._state.items())
            self.say(f"trained {self._finished} of {len(self.names)}; {busy}")

    def done(self, name: str) -> None:
        """A run has ended."""
        self._finished += 1
        self._state.pop(name, None)
        if self._bar is not None:
            self._bar.update(self._tasks[name], completed=1, total=1, note="done")
        else:
            self.say(f"trained {name} ({self._finished} of {len(self.names)})")


class ChapterDisplay:
    """Which chapter is measured, how far it is, how long it takes: a bar each on a terminal; elsewhere a line at its beginning, then two a minute."""

    INTERVAL = 30.0

    def __init__(self, titles: Mapping[str, str], say: Callable[[str], None] = note) -> None:
        self.titles = dict(titles)
        self.say = say
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._key = ""
        self._begun = self._last = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and self.say is note:
            self._bar = _bars()
            self._bar.start()
            self._tasks = {key: self._bar.add_task(f"{key} {title}", total=1, note="waiting") for key, title in self.titles.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, key: str) -> None:
        """A chapter begins."""
        self._key, self._begun, self._last = key, time.monotonic(), time.monotonic()
        if self._bar is not None:
            self._bar.update(self._tasks[key], note="measuring")
        else:
            self.say(f"chapter {key}: {self.titles[key]} ({[*self.titles].index(key) + 1} of {len(self.titles)})")

    def __call__(self, done: int, parts: int) -> None:
        """So many parts of the chapter are done; those that are left take about as long as those before, each."""
        now = time.monotonic()
        left = f"about {duration((now - self._begun) * (parts - done) / done)} left" if done else "measuring"
        if self._bar is not None:
            self._bar.update(self._tasks[self._key], completed=done, total=parts, note=left)
        elif done and now - self._last > self.INTERVAL:
            self._last = now
            self.say(f"chapter {self._key}: {done} of {parts} parts, {left}")

    def end(self) -> None:
        """The chapter is done."""
        if self._bar is not None:
            self._bar.update(self._tasks[self._key], completed=1, total=1, note=f"done in {duration(time.monotonic() - self._begun)}")


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    return Bar(*columns, console=Console(stderr=True))
