"""Engines: where training runs are executed. An engine takes cells, brings each to its end, and says which failed.

A cell is the words of a command that makes its run; whoever executes it, and where, makes the same run. Two engines are here:

    Processes   each cell is the very command that is printed beside it, in a child process of its own, so many at a time, one thread each
    Stacked     all cells as one program in this process (periplus.training.stacked): small networks that differ in their seed and little else

A third one, for many machines, needs nothing but `__call__`: see `Engine`. This is the one room that knows where runs are executed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from periplus import errors
from periplus.config import Config, read_config
from periplus.console import StageDisplay, duration
from periplus.data import ImageData
from periplus.errors import PeriplusError, UsageError
from periplus.runs import CONFIG, TIMING, read_lines
from periplus.training import Progress

POLL = 1.0  # seconds
CELLS = "cells"  # of a sweep's folder (periplus.sweeps)


class Job(Protocol):
    """A training run that is to be executed: its name, its folder below that of the whole, the words after `periplus` that make it."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def words(self) -> tuple[str, ...]: ...
    @property
    def command(self) -> str: ...


@dataclass(frozen=True)
class Cell:
    """A cell of a sweep: a job, with the configuration that its words spell."""

    name: str
    path: str
    words: tuple[str, ...]
    config: Config

    @property
    def command(self) -> str:
        """As a person would type it."""
        return shlex.join(("periplus", *self.words))


class Engine(Protocol):
    """Brings every cell to its end below a folder, going on with what is there; tells the display; returns what went wrong, by name.

    One cell that fails leaves the others alone. Raises KeyboardInterrupt (Interrupted) after a signal, when every cell has left a checkpoint.
    """

    def __call__(self, cells: Sequence[Cell], out: Path, display: StageDisplay) -> dict[str, PeriplusError]: ...


# ---- a process for each ---------------------------------------------------------------------------------------------------------------------


J = TypeVar("J", bound=Job)
Start = Callable[[J, Path], "subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Processes:
    """`workers` child processes at a time, one thread each."""

    workers: int

    def __call__(self, cells: Sequence[Cell], out: Path, display: StageDisplay) -> dict[str, PeriplusError]:
        return run_processes(cells, out, self.workers, display)


def run_processes(
    jobs: Sequence[J], out: Path, workers: int, display: StageDisplay, start: Start[J] | None = None, keep_going: bool = True
) -> dict[str, PeriplusError]:
    """Run every job, `workers` at a time, and return the errors of those that failed, by name.

    start: begins one. keep_going: whether the others go on when one fails; if not, its error is raised after they were stopped.
    """
    begin: Start[J] = start or start_process
    waiting, running = list(jobs), dict[str, tuple[J, subprocess.Popen[bytes]]]()
    failed: dict[str, PeriplusError] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[job.name] = (job, begin(job, out))
            time.sleep(POLL)
            for name, (job, process) in list(running.items()):
                display.update(name, *progress(out / job.path))
                if process.poll() is not None:
                    del running[name]
                    try:
                        finish(job, process, out)
                    except PeriplusError as error:
                        if not keep_going:
                            raise
                        failed[name] = error
                    _ended(display, name, failed)
    finally:
        stop([process for _, process in running.values()])
    return failed


def start_process(job: Job, out: Path) -> subprocess.Popen[bytes]:
    """The job's command in a child process of a session of its own, resuming whatever is there. What it says goes to logs/."""
    log = log_of(job, out)
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "periplus.study.child", *job.words, "--resume"]
    with open(log, "wb") as file:
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,  # a Ctrl-C is for the parent, which then asks its children once, and only once
        )


def log_of(job: Job, out: Path) -> Path:
    """Where a job's lines go."""
    return out / "logs" / f"{job.name}.log"


def finish(job: Job, process: subprocess.Popen[bytes], out: Path) -> None:
    """Raise what the job raised, with the same exit code."""
    if process.returncode == 0:
        return
    complaint = log_of(job, out).read_text(encoding="utf-8", errors="replace")
    kinds: dict[int, type[PeriplusError]] = {2: UsageError, 3: errors.DataError, 4: errors.RunError, 5: errors.NonFiniteError}
    last = complaint.strip().splitlines()[-1] if complaint.strip() else f"exit code {process.returncode}"
    if process.returncode in (130, -2, -15):
        raise KeyboardInterrupt(f"{job.name} was stopped; go on with --resume")
    raise kinds.get(process.returncode, PeriplusError)(f"{job.name}: {last.removeprefix('periplus: ')} (made by: {job.command})")


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask the children to leave a checkpoint and go; wait for them."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()
        process.wait()  # a machine that is busy takes a while to bury them


def progress(folder: Path) -> tuple[int, int, str]:
    """(steps done, steps in all, a note) of a run that another process is working on."""
    with contextlib.suppress(PeriplusError, OSError, ValueError, KeyError):
        if (folder / CELLS).is_dir():
            return sweep_progress(folder)
        config, data = read_config(folder / CONFIG)
        lines = read_lines(folder / TIMING)
        if lines:
            per_epoch = (data.images - (config.held_out or 0)) // config.batch_size
            steps = max(1, config.epochs * per_epoch // config.batches_per_step)
            steps = min(steps, config.max_steps or steps)
            rate = lines[-1]["images_per_second"]
            left = (steps - lines[-1]["step"]) * config.batch_size * config.batches_per_step / max(rate, 1e-9)
            return lines[-1]["step"], steps, f"{rate:,.0f} images/s, {duration(left)} left"
    return 0, 1, ""


def sweep_progress(folder: Path) -> tuple[int, int, str]:
    """The same of a sweep, whose cells are begun one after another or all at once: steps of all of them together."""
    asked = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    told = [(progress(cell), lines[-1]) for cell in sorted((folder / CELLS).iterdir()) if (lines := read_lines(cell / TIMING))]
    if not told:
        return 0, 1, ""
    count = math.prod(len(values) for values in asked["values"].values()) * asked["seeds"]
    done, steps = sum(step for (step, _, _), _ in told), count * max(total for (_, total, _), _ in told)
    if done >= steps:
        return steps, steps, f"evaluating {count} runs"
    seconds = [line["seconds"] for _, line in told]
    spent = max(seconds) if asked["engine"] == "stacked" else sum(seconds)
    return done, steps, f"{count} runs, {duration(spent * (steps - done) / max(done, 1))} left"


# ---- one program for all --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stacked:
    """All cells in one program, on the data given; `warn` is told what is odd but not wrong."""

    data: ImageData
    source: str
    warn: Callable[[str], None]

    def __call__(self, cells: Sequence[Cell], out: Path, display: StageDisplay) -> dict[str, PeriplusError]:
        from periplus.training.stacked import FrozenCells, train_stacked

        def tell(progress: Progress) -> None:
            rate = progress.images_per_second * len(cells)
            for cell in cells:
                display.update(cell.name, progress.step, progress.steps, f"{rate:,.0f} images/s together, {duration(progress.seconds_left)} left")

        pairs = [(cell.config, out / cell.path) for cell in cells]
        failed: dict[str, PeriplusError] = {}
        try:
            train_stacked(pairs, self.data, source=self.source, resume=True, on_progress=tell, warn=self.warn)
        except FrozenCells as error:
            lines = {folder.name: line for folder, line in error.lines.items()}
            failed = {cell.name: errors.NonFiniteError(f"{cell.name}: {lines[cell.name]}") for cell in cells if cell.name in lines}
        for cell in cells:
            _ended(display, cell.name, failed)
        return failed


def _ended(display: StageDisplay, name: str, failed: Mapping[str, PeriplusError]) -> None:
    if name in failed:
        display.update(name, 0, 1, "failed")
    else:
        display.done(name)
