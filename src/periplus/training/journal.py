"""What a loop tells while it runs, and what it leaves behind: progress, lines of metrics and of times, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from periplus import checkpoints
from periplus.config import Config
from periplus.errors import NonFiniteError
from periplus.runs import CHECKPOINTS, METRICS, SNAPSHOTS, TIMING, append_line, read_lines, sync_file
from periplus.training.steps import due


@dataclass(frozen=True)
class Progress:
    """What the loop tells while it runs: steps done and in all, images per second, seconds left, the last line of metrics."""

    step: int
    steps: int
    images_per_second: float
    seconds_left: float
    metrics: dict[str, float]


OnProgress = Callable[[Progress], None]


def check_finite(healthy: Tensor, step: int, folder: Path) -> None:
    """Raise NonFiniteError once the flag is down: waits for the device."""
    if not bool(healthy):
        good = checkpoints.list_checkpoints(folder / CHECKPOINTS)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        raise NonFiniteError(
            f"a loss or gradient became non-finite by step {step + 1} in {folder}; nothing was updated with it, {kept}: lower --learning-rate"
        )


def prune(folder: Path, config: Config, steps: int) -> None:
    """Keep the last scheduled checkpoints, and the newest; those that an interruption left go."""
    checkpoints.prune(folder / CHECKPOINTS, config.keep_last, lambda step: due(step, config.checkpoint_every, steps))


def save_checkpoint(folder: Path, config: Config, step: int, steps: int, tensors: dict[str, Tensor], values: dict[str, int]) -> None:
    """Write a complete checkpoint, after everything that leads to it has reached the disk, and drop old ones."""
    for name in (METRICS, TIMING):
        sync_file(folder / name)
    checkpoints.save_checkpoint(folder / CHECKPOINTS, step, tensors, values)
    prune(folder, config, steps)


def save_snapshot(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Keep some weights as they are after so many steps, in the form of a checkpoint; these are never pruned."""
    checkpoints.save_checkpoint(folder / SNAPSHOTS, step, tensors, {})


def write_line(folder: Path, clock: Clock, step: int, steps: int, metrics: dict[str, float], on_progress: OnProgress | None) -> None:
    """Append a line to metrics.jsonl and the time to timing.jsonl, and tell whoever listens."""
    append_line(folder / METRICS, {"step": step, "epoch": clock.epoch(step), **metrics})
    rate = clock.lap(step)
    if on_progress is not None:
        on_progress(Progress(step, steps, rate, (steps - step) * clock.images_per_step / rate, metrics))


class Clock:
    """Seconds of training over all sessions of a run, into timing.jsonl. The only place that knows what time it is."""

    def __init__(self, folder: Path, config: Config, images: int, step: int) -> None:
        lines = read_lines(folder / TIMING)
        self.path = folder / TIMING
        self.images_per_step = config.batch_size * config.batches_per_step
        self.seconds = float(lines[-1]["seconds"]) if lines else 0.0
        self.step, self.last = step, time.perf_counter()
        self.images = images

    def lap(self, step: int) -> float:
        """Write a line; returns images per second since the line before (real images that were trained on)."""
        now = time.perf_counter()
        elapsed, done = now - self.last, step - self.step
        self.seconds, self.last, self.step = self.seconds + elapsed, now, step
        rate = done * self.images_per_step / max(elapsed, 1e-9)
        append_line(self.path, {"step": step, "seconds": round(self.seconds, 3), "images_per_second": round(rate, 1)})
        return max(rate, 1e-9)

    def epoch(self, step: int) -> float:
        """Passes over the training images after so many steps."""
        return round(step * self.images_per_step / self.images, 4)
