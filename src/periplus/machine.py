"""The machine: which device and precision a run gets, and what `env.json` and `periplus doctor` say of it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from periplus.errors import UsageError

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_device(name: str) -> str:
    """'auto' to 'cuda' where there is a GPU, else 'cpu'; other names are checked. Raises UsageError for what this machine lacks."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device is '{name}': use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device is '{name}': only cpu and cuda are supported")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices here: use --device cpu")
    return name


def resolve_precision(name: Precision, device: str) -> Precision:
    """'auto' to the precision that a run gets; never by a timing.

    It is float32 on every machine so far: samples of adversarial mlps in bfloat16 were measured to be as good (docs/results.md), but stacked cells
    compute in float32, and a cell of a sweep should be the same run whichever engine trains it.
    """
    return "float32" if name == "auto" else name


def has_native_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 run on units made for them: NVIDIA Ampere or later; x86 with AMX or AVX512-BF16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


# cuBLAS reads this once, when it is first used: later would be too late for `deterministic`.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Within: the same bits from the same inputs. On CUDA that excludes some kernels; elsewhere nothing changes."""
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


KEPT_BYTES = 1 << 30
BLOCK_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Have the C library keep up to a gigabyte of freed memory for the next request, for the rest of this process; glibc only, else nothing.

    A training step frees and asks again for the same few megabytes. By default glibc gives the larger blocks back to the system each time, and the
    system clears every page of them anew: measured at 350 page faults and a tenth of a step of the fully connected VAE.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, KEPT_BYTES)  # M_TRIM_THRESHOLD
        mallopt(-3, BLOCK_BYTES)  # M_MMAP_THRESHOLD: blocks below it come from what is kept


PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "safetensors", "pillow", "matplotlib", "jinja2", "typst", "tyro", "rich")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages in use; None for an absent one."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("periplus", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with its build tag
    return found


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with '-dirty' for local changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode == 0:
            return subprocess.run(run, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str) -> dict[str, Any]:
    """What decides the bits and the speed of a run on this machine. No host names, no paths."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "versions": versions(),
        "commit": commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
    }


def processor() -> str:
    """The processor's own name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
