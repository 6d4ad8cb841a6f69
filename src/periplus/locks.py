"""One process at a time in a run folder, and a second one is told who is there.

The lock is `flock` on `folder/.lock`. The kernel ties it to the open file and drops it when the last descriptor closes, that
is, also on `kill -9` and on a crash; a file that merely exists would outlive its owner and lock out everybody. The file
itself stays for ever: were it unlinked on release, a process that had just opened it would lock a file that no longer has a
name, and a third could create and lock a new one. It carries one line of JSON that says who holds it, and is emptied on
release. The line is information; the lock is the truth.

*Forks.* An flock belongs to the open file, which a forked child shares: a data loader's worker that outlives its killed
parent would keep the run locked, and one that unwinds the parent's stack would release it. So children close their copy
right after the fork, and only the process that took the lock releases it. (Programs started by exec never see it:
descriptors are O_CLOEXEC.)

Where there is no `fcntl` (Windows), the file is created with O_EXCL and unlinked on release; one left by a dead process of
this host is removed. That is weaker: two processes that find the same dead holder in the same instant could both get in.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from periplus.errors import UsageError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

_ATTEMPTS, _PAUSE = 10, 0.02  # a holder needs an instant between taking or leaving the lock and writing or clearing its name
_held: set[int] = set()  # descriptors of the locks that this very process holds


@contextmanager
def hold(folder: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of an existing `folder` for the length of the `with` block; never wait for another holder.

    `purpose` is a word or two for whoever is refused ("training"). Raises UsageError if another process, or another `hold`
    in this one, has the folder (naming its pid, host, since when, and the folder), and if the folder cannot be locked at
    all.
    """
    path = folder / ".lock"
    owner, descriptor = os.getpid(), _take(path)
    _held.add(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _signature(purpose))
        yield
    finally:
        if os.getpid() == owner:  # a forked child that unwinds this frame has nothing to release
            _held.discard(descriptor)
            _release(path, descriptor)


def _take(path: Path) -> int:
    for _ in range(_ATTEMPTS):
        try:
            return _try_flock(path) if fcntl is not None else _try_create(path)
        except (BlockingIOError, FileExistsError):
            holder = _read_holder(path)
        except OSError as error:
            raise UsageError(f"{path}: the folder cannot be locked ({error.strerror})") from error
        if holder:
            break
        time.sleep(_PAUSE)
    who = "pid {pid} on {host} since {started} ({purpose})".format_map(holder) if holder else "a process yet to say who it is"
    raise UsageError(f"{path.parent}: held by {who}; wait for it to finish or stop it")


def _try_flock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _try_create(path: Path) -> int:
    holder = _read_holder(path)
    if holder and holder["host"] == socket.gethostname() and not _alive(int(holder["pid"])):
        path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)


def _signature(purpose: str) -> bytes:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started, "purpose": purpose}
    return json.dumps(holder).encode("ascii") + b"\n"


def _read_holder(path: Path) -> dict[str, Any]:
    """Who holds the lock, or nothing while the line is absent or half written."""
    with suppress(OSError, ValueError):
        holder = json.loads(path.read_bytes())
        if isinstance(holder, dict) and holder.keys() >= {"pid", "host", "started", "purpose"}:
            return holder
    return {}


def _release(path: Path, descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud, in case C code forked a copy that close would not reach
    os.close(descriptor)
    if fcntl is None:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill(pid, 0) would send Ctrl-C there
        import ctypes

        process = ctypes.windll.kernel32.OpenProcess(0x00100000, False, pid)  # SYNCHRONIZE
        running = bool(process) and ctypes.windll.kernel32.WaitForSingleObject(process, 0) == 0x102  # WAIT_TIMEOUT
        ctypes.windll.kernel32.CloseHandle(process)
        return running
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, hence alive
        return True
    return True


def _forget_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
