"""Break data files on purpose, by the ten thousand, and see that each is loaded or refused in a sentence.

    python benchmarks/fuzz_data.py --count 10000 --out benchmarks/results/fuzz_data.json

A mutant is a pure function of its seed: a small good file of some format (IDX and NPZ, packed or not, folders of images)
with bits flipped, its end cut off, pieces of itself or of another format spliced in, garbage inserted, or a number of its
header replaced by an extreme one; for packed formats also inside the packing, so that checksums are right and the harm
comes through. Each is loaded in a worker with little memory to spare (RLIMIT_AS) and little time. What counts as a
failure: any exception but DataError, a message of more than one line or without the file's name, a timeout, a death of
the worker. Failures are printed with their seed; `--seed N` runs one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import platform
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from periplus.data import load_data
from periplus.errors import DataError

FORMATS = ("idx", "idx.gz", "npz", "npz-compressed", "png", "jpg", "pgm", "gif", "bmp", "webp")
SECONDS = 5.0  # for one file; they take milliseconds
HEADROOM = 768 * 2**20  # bytes of address space beyond what the worker has before its first mutant
EXTREMES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: `loaded` and `refused` are good, `error`, `message`, `timeout`, `memory`, `death` are not."""

    seed: int
    format: str
    result: str
    detail: str
    seconds: float
    peak_bytes: int  # growth of resident memory while it was loaded


# --- good files ------------------------------------------------------------------------------------------------------------


@cache
def originals(form: str) -> tuple[bytes, ...]:
    """The bytes of a good file (of an IDX: images and labels; of a folder: three images), the same at every call."""
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    labels = (np.arange(16) % 3).astype(np.uint8)
    if form.startswith("idx"):
        files = (idx(images), idx(labels))
        return tuple(gzip.compress(file, mtime=0) for file in files) if form.endswith("gz") else files
    if form.startswith("npz"):
        stream = io.BytesIO()
        if form.endswith("compressed"):
            np.savez_compressed(stream, images=images / 255, labels=labels)
        else:
            np.savez(stream, images=images, labels=labels)
        return (stream.getvalue(),)
    return tuple(picture(image, form) for image in images[:3])


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def picture(image: np.ndarray, form: str) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    pixels = np.stack([image, image.T, 255 - image], -1) if form in ("bmp", "webp") else image
    Image.fromarray(pixels).save(stream, {"pgm": "PPM", "jpg": "JPEG"}.get(form, form.upper()))
    return stream.getvalue()


# --- mutations -------------------------------------------------------------------------------------------------------------


def place(rng: random.Random, body: bytes) -> int:
    """An offset, most often near the beginning or the end: there are the headers and the zip directory."""
    near = min(len(body), 96)
    return rng.choice((rng.randrange(near), len(body) - 1 - rng.randrange(near), rng.randrange(len(body))))


def flip(rng: random.Random, body: bytes) -> bytes:
    out = bytearray(body)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        out[place(rng, body)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, body: bytes) -> bytes:
    at = place(rng, body)
    return body[:at] if rng.random() < 0.8 else body[at:]


def splice(rng: random.Random, body: bytes) -> bytes:
    other = rng.choice(originals(rng.choice(FORMATS))) if rng.random() < 0.5 else body
    return body[: place(rng, body)] + other[place(rng, other) :]


def insert(rng: random.Random, body: bytes) -> bytes:
    at = place(rng, body)
    garbage = rng.choice((rng.randbytes(rng.choice((1, 4, 64, 3000))), bytes(rng.choice((1, 8, 5000))), b"9" * rng.choice((1, 3, 400))))
    return body[:at] + garbage + body[at:]


def extreme(rng: random.Random, body: bytes) -> bytes:
    out, value, width = bytearray(body), rng.choice(EXTREMES), rng.choice((1, 2, 4, 4, 8))
    at = place(rng, body)
    out[at : at + width] = (value & (2 ** (8 * width) - 1)).to_bytes(width, rng.choice(("big", "little")))
    return bytes(out)


def digits(rng: random.Random, body: bytes) -> bytes:
    """Replace a decimal number in the text of a header (.npy, PGM) by another."""
    spots = [at for at, byte in enumerate(body[:400]) if 48 <= byte <= 57]
    if not spots:
        return extreme(rng, body)
    at = rng.choice(spots)
    return body[:at] + rng.choice((b"0", b"-1", b"65536", b"4096", b"99999999999999999999", b"1e9", b"None", b"O")) + body[at + 1 :]


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (flip, cut, splice, insert, extreme, digits)


def mutate(rng: random.Random, body: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        body = rng.choice(MUTATIONS)(rng, body) if body else body
    return body


def mutate_inside(rng: random.Random, body: bytes, form: str) -> bytes:
    """Break what is packed and pack it again, so that lengths and checksums of the packing are right."""
    if form == "idx.gz":
        return gzip.compress(mutate(rng, gzip.decompress(body)), mtime=0)
    out = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if form.endswith("compressed") else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(body)) as good, zipfile.ZipFile(out, "w", compression) as bad:
        unlucky = rng.choice(good.namelist())
        for name in good.namelist():
            bad.writestr(name, mutate(rng, good.read(name)) if name == unlucky else good.read(name))
    return out.getvalue()


def make_mutant(seed: int, folder: Path) -> tuple[str, Path]:
    """(format, path to load) of the mutant of `seed`, written under `folder`."""
    rng = random.Random(seed)
    form = FORMATS[seed % len(FORMATS)]
    bodies = list(originals(form))
    which = rng.randrange(len(bodies))
    inside = form in ("idx.gz", "npz", "npz-compressed") and rng.random() < 0.5
    bodies[which] = mutate_inside(rng, bodies[which], form) if inside else mutate(rng, bodies[which])
    return form, write(folder / f"mutant-{seed}", form, bodies)


def write(root: Path, form: str, bodies: list[bytes]) -> Path:
    """Write a format's files into the new folder `root`, and return the path to load."""
    root.mkdir()
    if form.startswith("idx"):
        names = ["m-images-idx3-ubyte", "m-labels-idx1-ubyte"]
    else:
        names = ["m.npz"] if form.startswith("npz") else [f"{number}.{form}" for number in range(3)]
    for name, body in zip(names, bodies, strict=True):
        (root / name).write_bytes(body)
    return root / names[0] if form.startswith(("idx", "npz")) else root


# --- one mutant, in this process ----------------------------------------------------------------------------------------------


class TookTooLong(BaseException):
    """Raised by the timer; not an Exception, so that no handler of the library can take it for a broken file."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (0 where there is no /proc)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def forget_peak() -> None:
    with contextlib.suppress(OSError):  # without it, VmHWM is the peak since the start: an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def try_mutant(seed: int, folder: Path) -> Outcome:
    """Make, load and remove the mutant of `seed`; one in four is also resized."""
    form, path = make_mutant(seed, folder)
    forget_peak()
    before, began = resident("VmRSS"), time.perf_counter()
    result, detail = judge(path, image_size=6 if seed % 4 == 0 else None)
    seconds = time.perf_counter() - began
    peak = max(0, resident("VmHWM") - before)
    shutil.rmtree(folder / f"mutant-{seed}")
    return Outcome(seed, form, result, detail, seconds, peak)


def judge(path: Path, image_size: int | None) -> tuple[str, str]:
    try:
        with time_limit(SECONDS), warnings.catch_warnings(action="ignore"):
            data = load_data(path, image_size=image_size)
            return "loaded", str(tuple(data.images.shape))
    except DataError as error:
        message = str(error)
        good = message.isprintable() and message.startswith(str(path if path.is_dir() else path.parent)) and len(message) < 1000
        return ("refused" if good else "message"), message.replace(str(path.parent), "")
    except MemoryError:
        return "memory", f"more than {HEADROOM:,} bytes"
    except TookTooLong:
        return "timeout", f"more than {SECONDS} s"
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"


# --- many, in workers --------------------------------------------------------------------------------------------------------


def work(first: int, stop: int, step: int) -> None:
    """Try the seeds first, first + step, ... below stop, and print one JSON line for each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for form in FORMATS:  # the good files load; and what is imported on the way is not the mutants' memory
            load_data(write(Path(scratch) / f"good-{form}", form, list(originals(form))), image_size=6)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, size + HEADROOM))
        for seed in range(first, stop, step):
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # for a hang in C, where no Python signal arrives
            print(json.dumps(asdict(try_mutant(seed, Path(scratch)))), flush=True)
        faulthandler.cancel_dump_traceback_later()


def supervise(first: int, stop: int, step: int) -> Iterator[Outcome]:
    """The outcomes of `work` in a process of its own, which is started again after the seed that killed it."""
    while first < stop:
        command = [sys.executable, __file__, "--work", str(first), str(stop), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                yield Outcome(**json.loads(line))
                first += step
            complaint = process.stderr.read().strip().splitlines()[-1:]
        if first < stop:
            yield Outcome(first, FORMATS[first % len(FORMATS)], "death", f"exit {process.returncode} {complaint}", 0.0, 0)
            first += step


def run(count: int, workers: int) -> tuple[list[Outcome], float]:
    from concurrent.futures import ThreadPoolExecutor

    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda number: list(supervise(number, count, workers)), range(workers)))
    return sorted((outcome for part in parts for outcome in part), key=lambda outcome: outcome.seed), time.perf_counter() - began


def summary(outcomes: list[Outcome], seconds: float) -> dict[str, object]:
    import PIL

    counts = {form: dict(sorted(Counter(o.result for o in outcomes if o.format == form).items())) for form in FORMATS}
    failures = [asdict(outcome) for outcome in outcomes if outcome.result not in ("loaded", "refused")]
    greediest, slowest = max(outcomes, key=lambda o: o.peak_bytes), max(outcomes, key=lambda o: o.seconds)
    return {
        "command": "python " + " ".join(sys.argv),
        "files": len(outcomes),
        "failures": failures,
        "outcomes": dict(sorted(Counter(outcome.result for outcome in outcomes).items())),
        "by_format": counts,
        "peak_growth_mib": {"largest": round(greediest.peak_bytes / 2**20, 1), "seed": greediest.seed, "format": greediest.format},
        "address_space_headroom_mib": HEADROOM // 2**20,
        "slowest_file_seconds": {"largest": round(slowest.seconds, 3), "seed": slowest.seed, "format": slowest.format},
        "timeout_seconds": SECONDS,
        "wall_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__, "torch": torch.__version__},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutants, of seeds 0 to count - 1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--seed", type=int, help="try one mutant here, and say what became of it")
    parser.add_argument("--work", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return 0
    if options.seed is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            print(try_mutant(options.seed, Path(scratch)))
        return 0
    outcomes, seconds = run(options.count, options.workers)
    report = summary(outcomes, seconds)
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
