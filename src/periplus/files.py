"""Files written whole or not at all: beside the target under a name that begins with a dot, fsynced, renamed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from periplus.errors import RunError

_LEFTOVER = re.compile(r"\..+\.[0-9]+")


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Replace a file by this content (text as UTF-8), making its folder if need be. A kill at any moment leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        error.filename = str(path)  # the name that the user knows
        raise
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return path


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file that we wrote. Raises RunError that names the file and the remedy where it is absent or something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): {remedy}") from None
    if not isinstance(record, dict):
        raise RunError(f"{path} is not what was written there: {remedy}")
    return record


def is_leftover(name: str) -> bool:
    """Whether a file of this name is what a killed `write_atomically` left."""
    return _LEFTOVER.fullmatch(name) is not None


def discard_leftovers(folder: Path) -> None:
    """Remove what killed writes left in a folder that nobody else writes to just now."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(entry.name) and entry.is_file():
            entry.unlink()
