"""One holder at a time, by name, through forks and kill -9."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import periplus.locks
from periplus.errors import UsageError
from periplus.locks import hold

SOURCE = Path(periplus.locks.__file__).parents[1]

CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from periplus.errors import UsageError
from periplus.locks import hold
try:
    with hold(Path(sys.argv[2]), "testing"):
        print("not refused", flush=True)
except UsageError as error:
    print(error, flush=True)
sys.stdin.readline()
with hold(Path(sys.argv[2]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_and_kill_9_releases(tmp_path: Path) -> None:
    with hold(tmp_path, "evaluation"):
        command = [sys.executable, "-c", CHILD, str(SOURCE), str(tmp_path)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin and child.stdout
        refused = child.stdout.readline()
    for part in (f"pid {os.getpid()} ", socket.gethostname(), "(evaluation)", str(tmp_path)):
        assert part in refused
    since = re.search(r"since (\S+)", refused)
    assert since and abs((datetime.now().astimezone() - datetime.fromisoformat(since[1])).total_seconds()) < 60
    try:
        print(file=child.stdin, flush=True)
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"pid {child.pid} .*\(training\)"), hold(tmp_path, "mine"):
            pass
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == child.pid  # a stale line is not a lock
    with hold(tmp_path, "mine"):
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()


def test_a_second_hold_in_this_process_is_refused_and_release_empties_the_file(tmp_path: Path) -> None:
    with hold(tmp_path, "one"):
        line = (tmp_path / ".lock").read_text()
        assert line.endswith("\n") and line.count("\n") == 1
        assert json.loads(line).keys() == {"pid", "host", "started", "purpose"}
        with pytest.raises(UsageError, match=f"pid {os.getpid()} "), hold(tmp_path, "two"):
            pass
        with pytest.raises(UsageError), hold(tmp_path, "three"):  # the refused one has not broken the lock
            pass
    assert (tmp_path / ".lock").read_bytes() == b""
    with pytest.raises(ZeroDivisionError), hold(tmp_path, "failing"):
        raise ZeroDivisionError
    with hold(tmp_path, "again"):
        pass


def test_a_folder_that_cannot_be_locked_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent"), hold(tmp_path / "absent", "any"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file"), hold(tmp_path / "file", "any"):
        pass


def test_a_holder_that_has_not_signed_yet_still_refuses(tmp_path: Path) -> None:
    with hold(tmp_path, "one"):
        os.truncate(tmp_path / ".lock", 0)
        with pytest.raises(UsageError, match="yet to say"), hold(tmp_path, "two"):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_neither_keeps_nor_releases_the_lock(tmp_path: Path) -> None:
    go, stay = os.pipe(), os.pipe()
    parent = os.getpid()
    try:
        with hold(tmp_path, "parent"):
            child = os.fork()
            if child == 0:
                raise SystemExit  # unwinds the parent's `with`
            assert os.waitpid(child, 0)[1] == 0  # it left without an error
            assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == parent
            with pytest.raises(UsageError), hold(tmp_path, "second"):
                pass
            (descriptor,) = periplus.locks._held
            lingering = os.fork()
            if lingering == 0:
                os.close(stay[1])  # so that it ends with its parent at the latest
                try:
                    os.fstat(descriptor)
                    os.write(go[1], b"open")
                except OSError:
                    os.write(go[1], b"closed")
                os.read(stay[0], 1)
                os._exit(0)
            assert os.read(go[0], 6) == b"closed"
        with hold(tmp_path, "while the child lives"):
            pass
        os.write(stay[1], b"x")
        os.waitpid(lingering, 0)
    except SystemExit:
        os._exit(0)
    finally:
        if os.getpid() != parent:
            os._exit(1)
        for descriptor in (*go, *stay):
            os.close(descriptor)


def test_the_fallback_without_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periplus.locks, "fcntl", None)
    with hold(tmp_path, "one"), pytest.raises(UsageError, match=f"pid {os.getpid()} "), hold(tmp_path, "two"):
        pass
    assert not (tmp_path / ".lock").exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = {"pid": dead.pid, "host": socket.gethostname(), "started": "2026-01-01", "purpose": "training"}
    (tmp_path / ".lock").write_text(json.dumps(stale | {"host": "elsewhere"}))
    with pytest.raises(UsageError, match="elsewhere"), hold(tmp_path, "three"):  # whether it lives cannot be told from here
        pass
    (tmp_path / ".lock").write_text(json.dumps(stale))
    with hold(tmp_path, "four"):
        pass
    assert not (tmp_path / ".lock").exists()
