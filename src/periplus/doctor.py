"""The environment, examined: what `periplus doctor` prints."""

from __future__ import annotations

import shutil
import sys
from typing import NamedTuple

import torch

from periplus import machine
from periplus.data import list_sources
from periplus.data.sources import cache_folder

SMALLEST_DISK = 2 * 2**30


class Finding(NamedTuple):
    """One line of the examination: whether it is as it should be, what was looked at, what was found."""

    ok: bool
    what: str
    found: str


def examine() -> list[Finding]:
    """Everything that decides whether and how fast Periplus runs here."""
    return [*software(), *hardware(), *data_sets()]


def software() -> list[Finding]:
    """Python and the packages in use."""
    found = machine.versions()
    python = Finding(sys.version_info >= (3, 11), "python", f"{found.pop('python')} (3.11 or later is needed)")
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    rows = [Finding(version is not None, name, version or "absent: pip install periplus") for name, version in found.items() if name != "torch"]
    return [python, Finding((major, minor) >= (2, 11), "torch", f"{torch.__version__} (2.11 or later is needed)"), *rows]


def hardware() -> list[Finding]:
    """Processor, threads, GPU, what `auto` means here, disk."""
    device = machine.resolve_device("auto")
    native = "--precision bfloat16 is native" if machine.has_native_bfloat16(device) else "bfloat16 is not native"
    free = shutil.disk_usage(".").free
    return [
        Finding(True, "processor", f"{machine.processor()}, {torch.get_num_threads()} threads"),
        Finding(True, "device auto", torch.cuda.get_device_name(0) if device == "cuda" else "cpu (torch sees no GPU)"),
        Finding(True, "precision auto", f"{machine.resolve_precision('auto', device)} ({native} on {device})"),
        Finding(free > SMALLEST_DISK, "free disk here", f"{free / 2**30:.1f} GiB"),
    ]


def data_sets() -> list[Finding]:
    """Where each named data set is."""
    rows = []
    for info in list_sources():
        where = "embedded" if info.embedded else str(info.found) if info.found else f"not here: downloaded to {cache_folder()} when first used"
        rows.append(Finding(True, f"data {info.source.name}", where))
    return rows
