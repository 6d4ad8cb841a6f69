"""Long work for visitors who may leave: a bounded queue, progress that can be asked for, cancelling, and an end to every job's time.

A job runs in a thread. It is stopped where it computes: the decoder that it is given calls `Job.check`, which raises `Stopped` once the job was
cancelled, its time is over, or nobody has asked for it for a while. So a search of any kind stops within one evaluation, and knows nothing of it.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from periplus.errors import PeriplusError, UsageError

#: Jobs at once, jobs that may wait, finished ones that are remembered.
WORKERS, WAITING, REMEMBERED = 3, 6, 32
#: Seconds that a job may run, that it goes on without being asked for, and between two pictures of its progress.
LONGEST, ABANDONED, BEAT = 300.0, 30.0, 0.1

Decode = Callable[[Tensor], Tensor]


class Stopped(Exception):
    """A job was stopped; says why."""


class QueueFull(UsageError):
    """As many jobs wait as may."""


class Job:
    """One piece of work: `state` is queued, running, done, failed or stopped; `frame` is the latest progress; `version` counts changes."""

    def __init__(self, work: Callable[[Job], dict[str, Any]]) -> None:
        self.id = secrets.token_urlsafe(12)
        self.work, self.state, self.version = work, "queued", 0
        self.frame: dict[str, Any] | None = None
        self.result: dict[str, Any] | None = None
        self.message: str | None = None
        self.asked = self.shown = self.begun = time.monotonic()
        self._cancelled = False

    def check(self) -> None:
        """Raise Stopped where this job is to end."""
        now = time.monotonic()
        if self._cancelled:
            raise Stopped("stopped")
        if now - self.begun > LONGEST:
            raise Stopped(f"stopped after {LONGEST:.0f} seconds")
        if now - self.asked > ABANDONED:
            raise Stopped("stopped: nobody was watching")

    def report(self, frame: dict[str, Any]) -> None:
        """Show progress."""
        self.check()
        self.frame, self.shown = frame, time.monotonic()
        self.version += 1

    def due(self) -> bool:
        """Whether a picture of progress is worth making: the first one, and then one every BEAT seconds."""
        self.check()
        return self.frame is None or time.monotonic() - self.shown > BEAT

    def watched(self, decode: Decode) -> Decode:
        """A decoder that stops with the job."""

        def checked(z: Tensor) -> Tensor:
            self.check()
            return decode(z)

        return checked

    def cancel(self) -> None:
        """Stop at the next evaluation; a job that waits never starts."""
        self._cancelled = True
        if self.state == "queued":
            self._end("stopped", "stopped")

    def run(self) -> None:
        """Do the work."""
        if self.state != "queued":
            return
        self.state, self.begun = "running", time.monotonic()
        self.version += 1
        try:
            self.check()
            self.result = self.work(self)
            self._end("done", None)
        except Stopped as stopped:
            self._end("stopped", str(stopped))
        except PeriplusError as error:
            self._end("failed", str(error))
        except Exception as error:  # a thread must live on, and the visitor must be told
            self._end("failed", f"unexpected {type(error).__name__}: {error}")

    def _end(self, state: str, message: str | None) -> None:
        self.message, self.state = message, state
        self.version += 1

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "stopped")

    def record(self) -> dict[str, Any]:
        """What is told about it."""
        self.asked = time.monotonic()
        version = self.version  # before the rest: what changes meanwhile is told next time
        return {"job": self.id, "state": self.state, "version": version, "frame": self.frame, "result": self.result, "message": self.message}


class Desk:
    """Takes jobs, WORKERS at a time; refuses more than WAITING others."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Job] = queue.Queue(WAITING)
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        for _ in range(WORKERS):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._queue.get().run()

    def submit(self, work: Callable[[Job], dict[str, Any]]) -> Job:
        """Queue some work. Raises QueueFull."""
        job = Job(work)
        with self._lock:
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                raise QueueFull(f"{WORKERS} jobs are at work and {WAITING} wait: try again in a few seconds") from None
            self._jobs[job.id] = job
            for old in [key for key, kept in self._jobs.items() if kept.ended][: max(0, len(self._jobs) - REMEMBERED)]:
                del self._jobs[old]
        return job

    def find(self, name: str) -> Job | None:
        """A job by its id."""
        with self._lock:
            return self._jobs.get(name)

    def close(self) -> None:
        """Stop all of them."""
        with self._lock:
            for job in self._jobs.values():
                job.cancel()
