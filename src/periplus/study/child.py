"""The command line for a child of a study: the same, but it ends with its parent, however that ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>


def end_with_parent() -> None:
    """Ask for SIGTERM when the parent dies, where the system can do that (Linux); a killed study then leaves no runs behind its back."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    parent = os.getppid()
    end_with_parent()
    from periplus.cli import main

    if os.getppid() == parent:  # it may have died while we imported
        main()
