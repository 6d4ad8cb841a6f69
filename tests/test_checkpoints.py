"""Checkpoints under everything that can happen to them: odd tensors, kill -9 at any system call, flipped bits, missing files."""

import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import periplus.checkpoints
from periplus.checkpoints import (
    discard_leftovers,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
    verify_checkpoint,
)
from periplus.errors import RunError, UsageError

SOURCE = Path(periplus.checkpoints.__file__).parents[1]
FILES = ["state.safetensors", "state.json", "manifest.json"]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
]


def small(step: int = 0) -> dict[str, Tensor]:
    return {"weight": torch.arange(12.0).reshape(3, 4) + step, "count": torch.tensor(step)}


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return tensor.dtype, tensor.shape, dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def folder_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def no_warning(line: str) -> None:
    raise AssertionError(line)


# ---- round trips ---------------------------------------------------------------------------------------------------------------


@st.composite
def random_tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype, any bit pattern (NaN payloads, negative zeros), 0 to 3 dimensions, dense or strided or expanded."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte % 2 for byte in raw)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    view: Callable[[Tensor], Tensor] = draw(
        st.sampled_from([lambda t: t, lambda t: t.transpose(0, -1), lambda t: t[..., ::2], lambda t: t.expand(2, *t.shape)])
    )
    return view(tensor) if tensor.dim() else tensor


names = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(
    tensors=st.dictionaries(names, random_tensors(), max_size=4),
    values=st.dictionaries(st.text(), json_values, max_size=3),
    step=st.integers(0, 10**12),
)
def test_every_tensor_and_value_returns_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], values: dict[str, Any], step: int
) -> None:
    folder = tmp_path_factory.mktemp("round")
    loaded = load_checkpoint(save_checkpoint(folder, step, tensors, values))
    assert {name: bits(t) for name, t in loaded.tensors.items()} == {name: bits(t) for name, t in tensors.items()}
    assert json.dumps(loaded.values, sort_keys=True) == json.dumps(values, sort_keys=True)  # -0.0 and 0.0, 1 and True told apart
    assert (loaded.step, loaded.path.name) == (step, f"step-{step}")
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_0_dim_and_empty(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"scalar": torch.zeros((), dtype=dtype), "none": torch.empty(0, 3, dtype=dtype), "ones": torch.ones(5, dtype=dtype)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {})).tensors
    assert {name: bits(t) for name, t in loaded.items()} == {name: bits(t) for name, t in tensors.items()}


def test_shared_strided_lazy_and_parameter_tensors(tmp_path: Path) -> None:
    base = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"all": base, "same": base, "row": base[1], "turned": base.t(), "parameter": torch.nn.Parameter(base.clone())}
    tensors["images"] = base.view(1, 4, 2, 2).to(memory_format=torch.channels_last)
    tensors["conjugate"] = (torch.ones(2) * 1j).conj()
    tensors["negated"] = tensors["conjugate"].imag
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, tensors, {})).tensors
    assert {name: bits(t) for name, t in loaded.items()} == {name: bits(t) for name, t in tensors.items()}
    loaded["all"].zero_()  # loaded tensors are writable and independent of one another
    assert torch.equal(loaded["same"], base)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_cuda_give_the_bytes_of_those_on_the_cpu(tmp_path: Path) -> None:
    there = {name: tensor.cuda() for name, tensor in small().items()}
    here, moved = save_checkpoint(tmp_path / "a", 0, small(), {}), save_checkpoint(tmp_path / "b", 0, there, {})
    assert folder_bytes(here) == folder_bytes(moved)


def test_bytes_are_a_function_of_tensors_and_values_alone(tmp_path: Path) -> None:
    values: dict[str, Any] = {"b": 1, "a": {"y": [0.1], "x": None}}
    first = save_checkpoint(tmp_path / "one", 3, small(), values)
    again = save_checkpoint(tmp_path / "two", 3, dict(reversed(small().items())), {"a": {"x": None, "y": [0.1]}, "b": 1})
    assert sorted(folder_bytes(first)) == sorted(FILES)
    assert folder_bytes(first) == folder_bytes(again)
    assert json.loads((first / "state.json").read_bytes()) == {"step": 3, "values": values}


@pytest.mark.parametrize(
    ("tensors", "values", "named"),
    [
        ({"z": torch.ones(1, dtype=torch.complex128)}, {}, "'z'.*complex128"),
        ({"s": torch.eye(2).to_sparse()}, {}, "'s'"),
        ({"m": torch.ones(1, device="meta")}, {}, "'m'"),
        ({"__metadata__": torch.ones(1)}, {}, "'__metadata__'"),
        ({"\ud800": torch.ones(1)}, {}, "ud800"),
        ({}, {"loss": float("nan")}, "not JSON"),
        ({}, {"path": Path()}, "not JSON"),
        ({}, {"beta": (1, 2)}, "'beta'"),
        ({}, {"table": {1: 2}}, "'table'"),
    ],
)
def test_what_would_not_come_back_is_refused_and_nothing_written(tmp_path: Path, tensors: Any, values: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named) as raised:
        save_checkpoint(tmp_path / "new", 1, tensors, values)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="-1"):
        save_checkpoint(tmp_path, -1, {}, {})


# ---- writing -------------------------------------------------------------------------------------------------------------------


def test_saving_the_same_again_touches_nothing_and_something_else_replaces(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, small(), {"v": 1})
    inode = path.stat().st_ino
    assert save_checkpoint(tmp_path, 1, small(), {"v": 1}).stat().st_ino == inode
    assert save_checkpoint(tmp_path, 1, small(), {"v": 2}).stat().st_ino != inode
    assert load_checkpoint(path).values == {"v": 2}
    flip(path / "state.safetensors", 900)
    save_checkpoint(tmp_path, 1, small(), {"v": 2})
    verify_checkpoint(path)
    assert os.listdir(tmp_path) == ["step-1"]


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of fsync and rename: a power cut cannot be had in a test, so what protects from it is read off the calls."""
    events: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino))
        assert os.fstat(descriptor).st_size > 0  # nothing is left in a buffer of Python's
        fsync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        events.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    path = save_checkpoint(tmp_path, 1, small(), {})
    files = {("fsync", (path / name).stat().st_ino) for name in FILES}
    own, parent = path.stat().st_ino, tmp_path.stat().st_ino
    assert set(events[:3]) == files
    assert events[3:] == [("fsync", own), ("rename", own), ("fsync", parent)]


def test_a_full_disk_leaves_the_old_checkpoint_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, small(), {"v": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 1, small(), {"v": 2})
    assert os.listdir(tmp_path) == ["step-1"]
    assert load_checkpoint(tmp_path / "step-1").values == {"v": 1}


# ---- kill -9 -------------------------------------------------------------------------------------------------------------------

NURSERY = """
import os, random, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from periplus.checkpoints import discard_leftovers, list_checkpoints, prune, save_checkpoint
torch.set_num_threads(1)

def tensors(step, version, size):
    return {"big": torch.full((size,), step * 10 + version, dtype=torch.int64), "step": torch.tensor(step)}

def save(folder, log, step, version, size):
    save_checkpoint(folder, step, tensors(step, version, size), {"version": version})
    os.write(log, f"{step}\\n".encode())

def for_ever(folder, log, start):  # 5 MB each: saved, replaced, pruned
    for step in range(start, 10**9):
        save(folder, log, step, 0, 625_000)
        save(folder, log, step, 1, 625_000)
        prune(folder, 2, lambda step: step % 3 == 0)

def until_call(folder, log, count):  # dies at its count-th call on a path inside the folder
    left = [count]
    def hook(event, args):
        writing = event in ("os.rename", "os.mkdir", "shutil.rmtree") or event == "open" and args[1] != "rb"
        if event in ("os.remove", "os.rmdir") or writing and str(folder) in str(args[0]):  # rmtree gives relative names
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)
    discard_leftovers(folder)
    for step, version in ((0, 0), (1, 0), (1, 1), (2, 0)):
        save(folder, log, step, version, 4)
    prune(folder, 1, lambda step: step < 2)

for line in sys.stdin:
    job, folder, log, number = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        {"for_ever": for_ever, "until_call": until_call}[job](Path(folder), descriptor, int(number))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """One interpreter that has imported torch, and forks a real process for each job, so that a kill costs milliseconds."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", NURSERY, str(SOURCE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def start(self, job: str, folder: Path, log: Path, number: int) -> int:
        print(job, folder, log, number, sep="\t", file=self.stdin, flush=True)
        return int(self.stdout.readline())

    def wait(self) -> int:
        return int(self.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    nursery = Nursery()
    yield nursery
    nursery.stdin.close()
    nursery.process.wait(timeout=10)


def completed(log: Path) -> int:
    """The last step whose save returned, or -1."""
    return max((int(line) for line in log.read_text().split()), default=-1) if log.exists() else -1


def check_survivors(folder: Path, done: int) -> None:
    """What must hold after a kill: first for a reader that tidies nothing, then for the next owner."""
    for path in list_checkpoints(folder):
        verify_checkpoint(path)
    for old in folder.glob(".old-*"):  # what may be put back is complete as well
        verify_checkpoint(shutil.copytree(old, folder.parent / "aside" / old.name.removeprefix(".old-"), dirs_exist_ok=True))
    discard_leftovers(folder)
    if folder.exists():
        assert [path.name for path in folder.iterdir() if not path.name.startswith("step-")] == []
    latest = latest_checkpoint(folder, no_warning)
    assert (latest.step if latest else -1) >= done
    if latest:
        assert latest.tensors["step"] == latest.step
        assert set(latest.tensors["big"].tolist()) == {latest.step * 10 + latest.values["version"]}


def half_saved(folder: Path) -> bool:
    return folder.exists() and any(name.startswith(".") for name in os.listdir(folder))


def test_kill_9_at_random_moments(tmp_path: Path, nursery: Nursery) -> None:
    """Anywhere in the loop; and every other time once a save has been completed and the next is seen under way."""
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    chance, inside = random.Random(5), 0
    for kill in range(14):
        before, patience = completed(log), time.monotonic() + 10
        child = nursery.start("for_ever", folder, log, before + 1)
        time.sleep(chance.uniform(0.0, 0.1))
        while kill % 2 and (completed(log) == before or not half_saved(folder)) and time.monotonic() < patience:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.002))
        os.kill(child, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
        inside += half_saved(folder)
        check_survivors(folder, completed(log))
    assert completed(log) > 2
    assert inside > 0  # kills did land inside a save


def test_kill_9_at_every_file_system_call(tmp_path: Path, nursery: Nursery) -> None:
    """A child saves, replaces and prunes, and kills itself at its n-th call, for every n until it lives to the end."""
    kills = 0
    while True:
        folder, log = tmp_path / f"{kills}" / "checkpoints", tmp_path / f"{kills}.log"
        nursery.start("until_call", folder, log, kills)
        status = nursery.wait()
        check_survivors(folder, completed(log))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills > 25
    assert [path.name for path in list_checkpoints(folder)] == ["step-1", "step-2"]


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, small(), {"v": 1})
    kept = folder_bytes(path)
    path.rename(tmp_path / ".old-step-4")
    for debris in (".step-4.123", ".gone-9.step-3"):
        (tmp_path / debris).mkdir()
        (tmp_path / debris / "state.json").write_bytes(b"half")
    for other in (".lock", ".old-notes", ".step-4"):
        (tmp_path / other).touch()
    assert list_checkpoints(tmp_path) == []
    discard_leftovers(tmp_path)
    assert folder_bytes(path) == kept
    assert sorted(os.listdir(tmp_path)) == [".lock", ".old-notes", ".step-4", "step-4"]  # only names of our own are touched
    shutil.copytree(path, tmp_path / ".old-step-4")
    discard_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", ".old-notes", ".step-4", "step-4"]


# ---- damage --------------------------------------------------------------------------------------------------------------------


def test_every_byte_of_the_manifest_is_guarded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, small(), {"v": 1})
    manifest = path / "manifest.json"
    for bit in range(0, 8 * manifest.stat().st_size, 7):  # every byte, and every bit position in turn
        flip(manifest, bit)
        with pytest.raises(RunError, match=f"{manifest}: manifest damaged"):
            verify_checkpoint(path)
        flip(manifest, bit)
    verify_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_found_and_the_older_checkpoint_is_used(tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    tensors = {"weight": torch.randn(300, 40), "moment": torch.randn(300, 40, dtype=torch.float64)}
    save_checkpoint(tmp_path, 9, tensors, {})
    newest = save_checkpoint(tmp_path, 10, tensors, {"text": string.ascii_letters})
    for _ in range(20):
        bit = chance.randrange(8 * (newest / name).stat().st_size)
        flip(newest / name, bit)
        with pytest.raises(RunError, match=name):
            load_checkpoint(newest)
        lines: list[str] = []
        found = latest_checkpoint(tmp_path, lines.append)
        assert found and found.step == 9
        assert len(lines) == 1 and f"step-10/{name}" in lines[0] and "step-9 instead" in lines[0] and "\n" not in lines[0]
        flip(newest / name, bit)
    found = latest_checkpoint(tmp_path, no_warning)
    assert found and found.step == 10


def truncate(path: Path, name: str) -> None:
    os.truncate(path / name, (path / name).stat().st_size - 1)


def swap(path: Path, name: str) -> None:
    """The same file of another checkpoint, intact in itself and of the same size."""
    shutil.copy(path.with_name("step-2") / name, path / name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, "wrong size|manifest damaged"),
        (lambda path, name: (path / name).unlink(), "missing"),
        (lambda path, name: os.truncate(path / name, 0), "wrong size|manifest damaged"),
        (lambda path, name: (path / name).write_bytes((path / name).read_bytes() + b"\n"), "wrong size|manifest damaged"),
        (swap, "SHA-256"),
        (lambda path, name: ((path / name).unlink(), (path / name).mkdir()), "wrong size|manifest damaged"),
    ],
    ids=["truncated", "deleted", "emptied", "lengthened", "swapped", "made a folder"],
)
def test_damaged_files_are_named(tmp_path: Path, harm: Callable[[Path, str], object], said: str, name: str) -> None:
    path = save_checkpoint(tmp_path, 1, small(1), {"v": 1})
    save_checkpoint(tmp_path, 2, small(2), {"v": 2})
    harm(path, name)
    with pytest.raises(RunError, match=said) as raised:
        load_checkpoint(path)
    assert "step-1/" in str(raised.value)
    assert name in str(raised.value) or harm is swap  # another's manifest: the first file that it does not fit is named
    with pytest.raises(RunError):
        verify_checkpoint(path)
    found = latest_checkpoint(tmp_path, no_warning)
    assert found and found.step == 2


def test_extra_files_wrong_names_and_absent_folders(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, small(), {})
    (path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"notes\.txt: extra"):
        load_checkpoint(path)
    (path / "notes.txt").unlink()
    path.rename(tmp_path / "step-7")
    with pytest.raises(RunError, match="step-7: holds step 1"):
        verify_checkpoint(tmp_path / "step-7")
    with pytest.raises(RunError, match="step-1: no checkpoint here"):
        load_checkpoint(path)
    with pytest.raises(RunError, match="named step-N"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("files", [[], {"state.json": 3}, {"state.json": {}}, None, {"state.json": {"size": "x", "sha256": ""}}])
def test_a_manifest_of_another_shape_is_damage_not_a_crash(tmp_path: Path, files: Any) -> None:
    path = save_checkpoint(tmp_path, 1, small(), {})
    (path / "manifest.json").write_text(json.dumps({"files": files, "digest": ""}))
    with pytest.raises(RunError, match="manifest damaged"):
        load_checkpoint(path)


# ---- choosing and tidying ------------------------------------------------------------------------------------------------------


def test_latest_of_none_of_one_and_of_only_damaged(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent", no_warning) is None
    assert latest_checkpoint(tmp_path, no_warning) is None
    for step in (9, 100):
        save_checkpoint(tmp_path, step, small(step), {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-100"]  # by number, not by letter
    for path in list_checkpoints(tmp_path):
        flip(path / "manifest.json", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert latest_checkpoint(tmp_path, warnings.warn) is None
    assert len(caught) == 2
    assert len(list_checkpoints(tmp_path)) == 2  # left in place


def test_only_complete_names_are_listed(tmp_path: Path) -> None:
    for name in ("step-", "step-1a", "step--1", "step-01", "step-²", ".step-3", "steps-3", "step-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-5").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-4"]


@pytest.mark.parametrize(
    ("steps", "keep_last", "left"),
    [
        ([10, 20, 30, 40], 2, [30, 40]),
        ([10, 20, 30, 33], 2, [20, 30, 33]),  # an interruption at 33: the newest is kept besides
        ([10, 20, 30, 33, 40], 2, [30, 40]),  # and goes as soon as 40 exists
        ([13, 17], 2, [17]),
        ([10, 20, 25], 0, [25]),
        ([10], 3, [10]),
        ([], 1, []),
    ],
)
def test_prune(tmp_path: Path, steps: list[int], keep_last: int, left: list[int]) -> None:
    for step in steps:
        save_checkpoint(tmp_path, step, {}, {})
    prune(tmp_path, keep_last, lambda step: step % 10 == 0)
    assert [load_checkpoint(path).step for path in list_checkpoints(tmp_path)] == left
    assert sorted(os.listdir(tmp_path)) == sorted(f"step-{step}" for step in left)


def test_prune_refuses_a_negative_count_and_never_revives_an_old_copy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep_last"):
        prune(tmp_path, -1, bool)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {}, {})
    shutil.copytree(tmp_path / "step-1", tmp_path / ".old-step-1")  # left by a kill just after a replacement
    prune(tmp_path, 1, bool)
    discard_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["step-2"]


def test_a_checkpoint_is_frozen(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {}, {}))
    with pytest.raises(FrozenInstanceError):
        loaded.step = 2  # type: ignore[misc]
