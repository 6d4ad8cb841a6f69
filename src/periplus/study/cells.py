"""Executing the jobs of a study: each run, and each sweep, is the very command printed beside it, in a process of its own (periplus.engines)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from periplus.console import StageDisplay
from periplus.engines import Job, finish, log_of, progress, run_processes, start_process
from periplus.study.settings import Settings

__all__ = ["finish", "log_of", "progress", "start", "train_cells"]


def train_cells(cells: Sequence[Job], settings: Settings, say: Callable[[str], None]) -> None:
    """Train every cell that is not finished, `workers` at a time. Raises the error of the first cell that fails, after stopping the others."""
    with StageDisplay([cell.name for cell in cells], say) as display:
        run_processes(cells, settings.out, settings.workers or 1, display, start, keep_going=False)


def start(cell: Job, out: Path) -> subprocess.Popen[bytes]:
    """A cell's command in a child process."""
    return start_process(cell, out)
