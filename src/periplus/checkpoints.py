"""Checkpoints that are whole or absent, and that know when they have been damaged.

A checkpoint is a folder `step-N/` of three files: `state.safetensors` (the tensors), `state.json` (the step and small
values) and `manifest.json` (size and SHA-256 of the other two, and a digest of itself). Nothing is pickled, so loading runs
no code; nothing holds a time, a host or a path, so the bytes are a pure function of (step, tensors, values), and equal
training gives equal files.

*Why a folder is written beside and renamed.* A process can be killed between any two system calls, and a file can be half
written. POSIX promises one thing that helps: `rename` is atomic, a name means the old thing or the new thing and never a
mixture. So the three files are written in a sibling whose name begins with a dot, which no reader looks at, and one rename
gives them their good name.

*Why everything is fsynced.* A rename may reach the disk before the bytes it names: after a power cut the good name would
then hold zeros. So each file is fsynced, then the folder that lists them (a file's name is data of its directory, not of the
file), then comes the rename, and then the parent is fsynced, since the rename itself is data of the parent. (Pillai et al.,
"All file systems are not created equal", OSDI 2014, found widely used programs that leave out one of these.)

*Why three dot names.* A non-empty folder cannot be renamed over another, so replacing takes two renames, and a kill between
them must be told apart from a kill while deleting:

    .step-N.PID   being written: worth nothing until renamed
    .old-step-N   complete, moved aside while its successor takes the name: put back if the successor never came
    .gone-...     being deleted: worth nothing

A folder is renamed to `.gone-...` before its first file is unlinked, hence `step-N` and `.old-step-N` are always complete.

*Why the manifest digests itself.* Hashes catch a flipped bit in the files that they cover, but who covers the manifest? It
is written in one canonical form, including the SHA-256 of its own table, and compared byte for byte with what that table
should look like: a flip in the table, in the digest, or in mere white space is found too. This guards against accidents, not
against forgery.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, Union

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from periplus.errors import RunError, UsageError

Json: TypeAlias = Union[None, bool, int, float, str, Sequence["Json"], Mapping[str, "Json"]]  # noqa: UP007 (a forward reference)

TENSORS, VALUES, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_ASIDE = re.compile(r"\.old-(step-[0-9]+)")
_DEBRIS = re.compile(r"\.(step-[0-9]+\.[0-9]+|gone-[0-9]+\.step-[0-9]+)")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: where it lay, its step, its tensors (on the CPU, none sharing memory) and its values."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


# ---- writing -------------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Json]) -> Path:
    """Write `folder/step-N/` atomically and durably; return its path. Do nothing if it is there already, intact and identical.

    Tensors may be on any device, strided in any way, 0-dim or empty, and may share memory: each is stored as an independent
    dense array and comes back bit for bit. One process at a time may write in `folder` (`periplus.locks.hold`).

    Raises UsageError for a negative step, for a tensor that safetensors cannot hold, and for values that JSON would change
    or lose (NaN, tuples, keys that are not strings); nothing has been written then. OSError (a full disk) leaves any older
    step-N in place.
    """
    contents = _serialise(step, tensors, values)
    target = folder / f"step-{step}"
    if _holds(target, contents):
        return target
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)
    staged = folder / f".step-{step}.{os.getpid()}"
    try:
        _write_folder(staged, contents)
        _put_in_place(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return target


def _serialise(step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Json]) -> dict[str, bytes]:
    if step < 0:
        raise UsageError(f"step: {step} is negative; checkpoints are numbered from 0")
    contents = {TENSORS: _pack_tensors(tensors), VALUES: _pack_values(step, values)}
    return contents | {MANIFEST: _manifest({name: _record(data) for name, data in contents.items()})}


def _pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    if "__metadata__" in tensors:
        raise UsageError("tensor '__metadata__': safetensors keeps that name for itself")
    dense = {}
    for name in sorted(tensors):
        try:
            dense[name] = _dense(tensors[name])
            safetensors.torch.save({name: dense[name].new_empty(0)})  # a trial of name and dtype, so that the error names them
        except (SafetensorError, KeyError, ValueError, NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"tensor {name!r} ({tensors[name].dtype}): safetensors cannot hold it: {reason}") from error
    return safetensors.torch.save(dense)


def _dense(tensor: Tensor) -> Tensor:
    """An independent dense copy: safetensors refuses shared and strided memory, and would store a lazy conjugate unconjugated."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _pack_values(step: int, values: Mapping[str, Json]) -> bytes:
    state = {"step": step, "values": dict(values)}
    try:
        data = _canonical(state)
    except (TypeError, ValueError) as error:
        raise UsageError(f"checkpoint values are not JSON: {error}") from error
    back = json.loads(data)["values"]
    for key in values:
        if back.get(key) != values[key]:  # a tuple would come back a list, the key 1 the key "1"
            raise UsageError(f"checkpoint value {key!r} would come back from JSON as {back.get(key)!r}, not {values[key]!r}")
    return data


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def _record(data: bytes) -> dict[str, int | str]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest(files: Mapping[str, Mapping[str, int | str]]) -> bytes:
    return _canonical({"files": files, "digest": hashlib.sha256(_canonical(files)).hexdigest()})


def _holds(target: Path, contents: Mapping[str, bytes]) -> bool:
    try:
        return _read_folder(target) == contents
    except RunError:
        return False


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    _erase(folder)
    folder.mkdir()
    for name, data in contents.items():
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(folder)


def _put_in_place(staged: Path, target: Path) -> None:
    """Give `staged` the good name. From the first instant to the last, `target` or `.old-...` is a complete checkpoint."""
    old = target.with_name(f".old-{target.name}")
    if os.path.lexists(target):
        _remove(old)
        os.rename(target, old)
    os.rename(staged, target)
    _sync_folder(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no kill and no power cut leaves half of it under a name that anyone trusts."""
    if not os.path.lexists(path):
        return
    gone = path.with_name(f".gone-{os.getpid()}.{path.name.removeprefix('.old-')}")
    _erase(gone)
    os.rename(path, gone)
    _sync_folder(path.parent)
    _erase(gone)


def _erase(path: Path) -> None:
    if path.is_symlink() or path.is_file():  # a checkpoint moved elsewhere and linked: only the link is ours
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, and the file system journals renames by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading -------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify the checkpoint at `path` and load it, from the very bytes that were verified.

    Raises RunError naming the file and what is wrong: absent, missing, extra, of the wrong size or hash, a damaged manifest,
    or a folder whose name says another step than its contents.
    """
    contents = _verified(path)
    state = _state(path, contents)
    try:
        tensors = safetensors.torch.load(contents[TENSORS])
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path / TENSORS}: agrees with its manifest but cannot be parsed: {error}") from error
    return Checkpoint(path, state["step"], tensors, state["values"])


def verify_checkpoint(path: Path) -> None:
    """Check every bit of the checkpoint at `path` against its manifest; raises RunError as `load_checkpoint` does."""
    _state(path, _verified(path))


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders named `step-N` in `folder`, by ascending N; unverified. Empty if there is no such folder."""
    return sorted((path for path in _entries(folder) if _STEP.fullmatch(path.name) and path.is_dir()), key=_step)


def latest_checkpoint(folder: Path, warn: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint in `folder` that verifies, or None.

    Damaged ones are left in place; `warn` (such as `warnings.warn`) is called with one line for each, which names what is
    wrong and the checkpoint used instead.
    """
    damage = []
    found = None
    for path in reversed(list_checkpoints(folder)):
        try:
            found = load_checkpoint(path)
            break
        except RunError as error:
            if not path.exists():  # its owner replaced or pruned it while we looked: that is not damage
                return latest_checkpoint(folder, warn)
            damage.append(str(error))
    instead = f"using {found.path} instead" if found else "no older checkpoint verifies either, so there is none to use"
    for line in damage:
        warn(f"{line}; {instead}")
    return found


def _entries(folder: Path) -> Iterable[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _step(path: Path) -> int:
    named = _STEP.fullmatch(path.name) or _STEP.fullmatch(path.resolve().name)  # the second for "." and links
    if named is None:
        raise RunError(f"{path}: not a checkpoint, whose folder is named step-N")
    return int(named[1])


def _read_folder(path: Path) -> dict[str, bytes]:
    """Every entry of the folder, by name; what is not a file counts as empty, so that its presence at least is seen."""
    if not path.is_dir():
        raise RunError(f"{path}: no checkpoint here")
    file = path
    try:
        contents = {}
        for file in path.iterdir():
            contents[file.name] = file.read_bytes() if file.is_file() else b""
        return contents
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror})") from error


def _verified(path: Path) -> dict[str, bytes]:
    _step(path)
    contents = _read_folder(path)
    files = _parse_manifest(path, contents)
    for name in sorted({TENSORS, VALUES, *files} - contents.keys()):
        raise RunError(f"{path / name}: missing from the checkpoint")
    for name in sorted(contents.keys() - files.keys() - {MANIFEST}):
        raise RunError(f"{path / name}: extra, the manifest does not list it")
    for name, expected in files.items():
        found = _record(contents[name])
        if found["size"] != expected["size"]:
            raise RunError(f"{path / name}: wrong size, {found['size']} bytes where the manifest says {expected['size']}")
        if found != expected:
            raise RunError(f"{path / name}: damaged, its SHA-256 is not the manifest's")
    return contents


def _parse_manifest(path: Path, contents: Mapping[str, bytes]) -> dict[str, dict[str, int | str]]:
    if MANIFEST not in contents:
        raise RunError(f"{path / MANIFEST}: missing from the checkpoint")
    raw = contents[MANIFEST]
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        table = json.loads(raw)["files"].items()
        files: dict[str, dict[str, int | str]] = {n: {"size": int(r["size"]), "sha256": str(r["sha256"])} for n, r in table}
        if raw == _manifest(files):
            return files
    raise RunError(f"{path / MANIFEST}: manifest damaged, it does not match its own digest")


def _state(path: Path, contents: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(contents[VALUES])
        step, _ = int(state["step"]), dict(state["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / VALUES}: agrees with its manifest but is not the state of a checkpoint") from error
    if step != _step(path):
        raise RunError(f"{path}: holds step {step}, not the step that its name says")
    return state


# ---- tidying -------------------------------------------------------------------------------------------------------------------


def discard_leftovers(folder: Path) -> None:
    """Clear what killed saves and removals left in `folder`; a checkpoint moved aside by a replacement cut short is put back.

    For the one process that writes in `folder`, before it starts. Only the dot names of this module are touched.
    """
    for path in _entries(folder):
        if _DEBRIS.fullmatch(path.name):
            _erase(path)
        elif aside := _ASIDE.fullmatch(path.name):
            _settle(path, folder / aside[1])


def _settle(old: Path, target: Path) -> None:
    if os.path.lexists(target):
        _remove(old)
    else:
        os.rename(old, target)
        _sync_folder(target.parent)


def cut(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for path in list_checkpoints(folder):
        if _step(path) > step:
            _remove(path)


def prune(folder: Path, keep_last: int, scheduled: Callable[[int], bool]) -> None:
    """Remove all but the newest checkpoint and the newest `keep_last` of those whose step is scheduled.

    An interruption leaves a checkpoint off schedule; it goes as soon as a later one exists, so that an interrupted run ends
    with the same folders as an uninterrupted one. Call it only after a successful save: nothing is verified here. Raises
    UsageError for a negative `keep_last`.
    """
    if keep_last < 0:
        raise UsageError(f"keep_last: {keep_last} is negative; it counts checkpoints")
    paths = list_checkpoints(folder)
    regular = [path for path in paths if scheduled(_step(path))]
    kept = {*paths[-1:], *(regular[-keep_last:] if keep_last else [])}
    for path in paths:
        if path not in kept:
            _remove(path.with_name(f".old-{path.name}"))  # first, or else it would be put back once its successor is gone
            _remove(path)
