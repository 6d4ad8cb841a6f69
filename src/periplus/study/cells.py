"""Executing cells: each training run of a study is the very command that is printed beside it, in a process of its own.

This is the one place that knows where runs are executed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from periplus import errors
from periplus.config import read_config
from periplus.console import StageDisplay, duration
from periplus.errors import PeriplusError, UsageError
from periplus.runs import CONFIG, TIMING, read_lines
from periplus.study.settings import Cell, Settings

POLL = 1.0  # seconds


def train_cells(cells: list[Cell], settings: Settings, say: Callable[[str], None]) -> None:
    """Train every cell that is not finished, `workers` at a time. Raises the error of the first cell that fails, after stopping the others."""
    waiting, running = list(cells), dict[str, tuple[Cell, subprocess.Popen[bytes]]]()
    with StageDisplay([cell.name for cell in cells], say) as display:
        try:
            while waiting or running:
                while waiting and len(running) < (settings.workers or 1):
                    cell = waiting.pop(0)
                    running[cell.name] = (cell, start(cell, settings.out))
                time.sleep(POLL)
                for name, (cell, process) in list(running.items()):
                    display.update(name, *progress(settings.out / cell.path))
                    if process.poll() is not None:
                        del running[name]
                        finish(cell, process, settings.out)
                        display.done(name)
        finally:
            stop([process for _, process in running.values()])


def start(cell: Cell, out: Path) -> subprocess.Popen[bytes]:
    """The cell's command in a child process of a session of its own, resuming whatever is there. What it says goes to logs/."""
    log = log_of(cell, out)
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "periplus.study.child", *cell.words, "--resume"]
    with open(log, "wb") as file:
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,  # a Ctrl-C is for the study, which then asks its children once, and only once
        )


def log_of(cell: Cell, out: Path) -> Path:
    """Where a cell's lines go."""
    return out / "logs" / f"{cell.name}.log"


def finish(cell: Cell, process: subprocess.Popen[bytes], out: Path) -> None:
    """Raise what the cell raised, with the same exit code."""
    if process.returncode == 0:
        return
    complaint = log_of(cell, out).read_text(encoding="utf-8", errors="replace")
    kinds: dict[int, type[PeriplusError]] = {2: UsageError, 3: errors.DataError, 4: errors.RunError, 5: errors.NonFiniteError}
    last = complaint.strip().splitlines()[-1] if complaint.strip() else f"exit code {process.returncode}"
    if process.returncode in (130, -2, -15):
        raise KeyboardInterrupt(f"{cell.name} was stopped; go on with --resume")
    raise kinds.get(process.returncode, PeriplusError)(f"{cell.name}: {last.removeprefix('periplus: ')} (made by: {cell.command})")


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask the children to leave a checkpoint and go; wait for them."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()


def progress(folder: Path) -> tuple[int, int, str]:
    """(steps done, steps in all, a note) of a run that another process is working on."""
    with contextlib.suppress(PeriplusError, OSError):
        config, data = read_config(folder / CONFIG)
        lines = read_lines(folder / TIMING)
        if lines:
            per_epoch = (data.images - (config.held_out or 0)) // config.batch_size
            steps = max(1, config.epochs * per_epoch // config.batches_per_step)
            rate = lines[-1]["images_per_second"]
            left = (steps - lines[-1]["step"]) * config.batch_size * config.batches_per_step / max(rate, 1e-9)
            return lines[-1]["step"], steps, f"{rate:,.0f} images/s, {duration(left)} left"
    return 0, 1, ""
