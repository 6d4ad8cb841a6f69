"""Named sets: where their bytes come from, and how we know that they are those bytes.

A set is a few files, each with its length and its SHA-256 as published; the digest, not the server, is what is trusted, so
any mirror will do and a plain-http one is no worse than another. A file is looked for in `root`, then in the folder
that `$PERIPLUS_DATA` names (which we only read), then in the cache (`$XDG_CACHE_HOME/periplus` or `~/.cache/periplus`),
always as `<folder>/<set>/<file>`; what is missing is downloaded, into `root` if one was given and into the cache if not.

A download writes to a hidden `.part` file beside its goal, never more bytes than the set declares, and is renamed only
when its digest is right: a reader sees a whole file or none. When the connection breaks, the next try (on this mirror, on
the next one, or next week) asks for the bytes that are missing (HTTP Range). One process downloads a set at a time; others
wait for its lock and then find the file.

The standard library does all of it: pooch checks digests but cannot resume a partial download, which is why it is not used.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np

from periplus.data.formats import Bytes, show
from periplus.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: no lock, so each process writes a part file of its own and nothing is resumed
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 30.0  # seconds without one byte before a mirror counts as dead
ATTEMPTS = 5  # tries on one mirror, as long as each of them brings bytes

Progress = Callable[[str, int, int], None]
"""Called with (file name, bytes so far, bytes in all) as a download goes on."""


@dataclass(frozen=True)
class SourceFile:
    """One file with its published length and SHA-256, and the splits that need it."""

    name: str
    size: int
    sha256: str
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Files from which a set's one file can be made, where no mirror has that file itself."""

    base: str
    files: tuple[SourceFile, ...]
    reader: Literal["amat", "mat"]
    makes: str  # SHA-256 of the result: the same arrays as the published file, packed by us


@dataclass(frozen=True)
class Source:
    """A named set: its splits with their counts, the shape (C, H, W) of an image, its files and their mirrors.

    `made_from` names the set whose files it is made from on the fly; it has none of its own then.
    """

    name: str
    splits: tuple[tuple[str, int], ...]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    licence: str
    citation: str
    files: tuple[SourceFile, ...] = ()
    mirrors: tuple[str, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    made_from: str | None = None


@dataclass(frozen=True)
class FileStatus:
    """What `verify` found at `path`; `actual` is the digest of what is there, None where nothing is."""

    path: Path
    status: Literal["ok", "missing", "damaged"]
    expected: str
    actual: str | None


@dataclass(frozen=True)
class SourceInfo:
    """A line of `list_sources`: the set, and the folder where all of its files lie (None where some are missing)."""

    source: Source
    found: Path | None
    embedded: bool


def _idx_files(*rows: tuple[str, int, str]) -> tuple[SourceFile, ...]:
    """The four files of MNIST and of its kin from (name, bytes, SHA-256); `t10k` is the test split."""
    splits = {"train": ("train",), "t10k": ("test",)}
    return tuple(SourceFile(f"{name}-ubyte.gz", size, sha, splits[name.partition("-")[0]]) for name, size, sha in rows)


DIGITS = Source(
    name="digits",
    splits=(("train", 1500), ("test", 297), ("all", 1797)),
    shape=(1, 8, 8),
    classes=tuple("0123456789"),
    licence="CC BY 4.0 (UCI); comes with scikit-learn",
    citation="E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998",
)
MNIST = Source(
    name="mnist",
    splits=(("train", 60000), ("test", 10000)),
    shape=(1, 28, 28),
    classes=tuple("0123456789"),
    licence="CC BY-SA 3.0, as reported by the Keras documentation; the files carry no licence text",
    citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition, Proc. IEEE 86(11), 1998",
    files=_idx_files(
        ("train-images-idx3", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images-idx3", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels-idx1", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
)
FASHION_MNIST = Source(
    name="fashion-mnist",
    splits=(("train", 60000), ("test", 10000)),
    shape=(1, 28, 28),
    classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    licence="MIT, Copyright 2017 Zalando SE",
    citation="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
    "Algorithms, arXiv:1708.07747, 2017",
    files=_idx_files(
        ("train-images-idx3", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        ("train-labels-idx1", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        ("t10k-images-idx3", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        ("t10k-labels-idx1", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
)


def _binarized(*rows: tuple[str, int, str]) -> tuple[SourceFile, ...]:
    """The three files of a recipe from (split, bytes, SHA-256)."""
    return tuple(SourceFile(f"binarized_mnist_{split}.amat", size, sha, (split,)) for split, size, sha in rows)


# No public mirror has the packed file. The first recipe is 4 MB (the arrays as MATLAB files, despite their names), the
# second 110 MB (the original text); both give the same bits, and so a file of this digest.
_BINARIZED_MADE = "b105257a4bb09dcfa471b5e9e5f10b67adb17b2ea409525ae3ca5edfe02edfd6"
BINARIZED_MNIST = Source(
    name="binarized-mnist",
    splits=(("train", 50000), ("valid", 10000), ("test", 10000)),
    shape=(1, 28, 28),
    classes=(),
    licence="none stated by its authors; it derives from MNIST",
    citation="R. Salakhutdinov, I. Murray, On the Quantitative Analysis of Deep Belief Networks, ICML 2008; "
    "H. Larochelle, I. Murray, The Neural Autoregressive Distribution Estimator, AISTATS 2011",
    files=(
        SourceFile(
            "binarized_mnist.npz",
            2295919,
            "50de2c8299a5a297789293ab2c30f6fc3cb8c359a15e5e88d5501aa18ebb8fa5",
            ("train", "valid", "test"),
        ),
    ),
    recipes=(
        Recipe(
            "https://raw.githubusercontent.com/mingzhang-yin/ARM-gradient/9b5f74da4e4009c5556e8d7a87c88c8e291c253d/",
            _binarized(
                ("train", 2852060, "79a0312c7389d855cfc97e3812de3998417c5829d8a51543b56a90a91252ae7e"),
                ("valid", 571883, "7436afc856959075c7787025bb8a4ba2b520b9230ee39667c66aa7dd2819dd68"),
                ("test", 490132, "5bc30222e1e7896cbccd1e1db6b28540cc1230f4d2d5473841a5f6cc54be8d38"),
            ),
            "mat",
            _BINARIZED_MADE,
        ),
        Recipe(
            "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
            _binarized(
                ("train", 78400000, "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
                ("valid", 15680000, "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
                ("test", 15680000, "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
            ),
            "amat",
            _BINARIZED_MADE,
        ),
    ),
)
STACKED_MNIST = Source(
    name="stacked-mnist",
    splits=(("train", 60000), ("test", 26000)),  # `composites` says why so many
    shape=(3, 28, 28),
    classes=tuple(f"{number:03d}" for number in range(1000)),
    licence="as MNIST, from which it is made",
    citation="L. Metz, B. Poole, D. Pfau, J. Sohl-Dickstein, Unrolled Generative Adversarial Networks, ICLR 2017; "
    "Z. Lin, A. Khetan, G. Fanti, S. Oh, PacGAN: The power of two samples in generative adversarial networks, NeurIPS 2018",
    made_from="mnist",
)
SOURCES: dict[str, Source] = {source.name: source for source in (DIGITS, MNIST, FASHION_MNIST, BINARIZED_MNIST, STACKED_MNIST)}


def source(name: str) -> Source:
    """The named set; a DataError lists the known names, and suggests the nearest, when there is none."""
    if name in SOURCES:
        return SOURCES[name]
    near = get_close_matches(name.lower().replace("_", "-"), SOURCES, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    known = f"known are {', '.join(SOURCES)}, or the path of an .npz, an IDX file or a folder"
    raise DataError(f"unknown data '{show(name)}'; {hint}{known}")


def origin(known: Source) -> Source:
    """The set whose files a set is read from: itself, or the one that it is made from."""
    return known if known.made_from is None else SOURCES[known.made_from]


def check_split(known: Source, split: str) -> None:
    """Raise a DataError that lists the splits of the set when it has no `split`."""
    names = [name for name, _ in known.splits]
    if split not in names:
        raise DataError(f"{known.name}: unknown split '{show(split)}'; it has {', '.join(names)}")


# --- where files are -----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/periplus`, else `~/.cache/periplus`; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "periplus"


def search_folders(root: str | os.PathLike[str] | None = None) -> list[Path]:
    """The data folders in the order in which they are searched: `root`, `$PERIPLUS_DATA`, the cache."""
    given = [Path(root).expanduser()] if root is not None else []
    named = os.environ.get("PERIPLUS_DATA")
    return [*given, *([Path(named).expanduser()] if named else []), cache_folder()]


def _find(known: Source, file: SourceFile, root: str | os.PathLike[str] | None) -> Path | None:
    paths = (folder / known.name / file.name for folder in search_folders(root))
    return next((path for path in paths if path.is_file()), None)


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits; a DataError names a file that cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{show(path)}: cannot be read ({error.strerror}); check its permissions") from error


def _accepted(known: Source, file: SourceFile) -> tuple[str, ...]:
    return (file.sha256, *(recipe.makes for recipe in known.recipes))


def verify(name: str, root: str | os.PathLike[str] | None = None) -> list[FileStatus]:
    """Check every file of a named set, or of that which it is made from, against its published SHA-256; an embedded set has no files and gives []."""
    known = origin(source(name))
    return [_status(known, file, root) for file in known.files]


def _status(known: Source, file: SourceFile, root: str | os.PathLike[str] | None) -> FileStatus:
    path = _find(known, file, root)
    if path is None:
        return FileStatus(_goal(root) / known.name / file.name, "missing", file.sha256, None)
    actual = digest(path)
    return FileStatus(path, "ok" if actual in _accepted(known, file) else "damaged", file.sha256, actual)


def list_sources(root: str | os.PathLike[str] | None = None) -> list[SourceInfo]:
    """Every named set, with the folder where its files lie; nothing is read or downloaded."""
    infos = []
    for known in SOURCES.values():
        read = origin(known)
        paths = [_find(read, file, root) for file in read.files]
        found = paths[0].parent if paths and paths[0] and all(paths) else None
        infos.append(SourceInfo(known, found, embedded=not read.files))
    return infos


def files_of_split(name: str, split: str, root: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> list[Path]:
    """The verified files that a split needs, downloading those that are in none of the folders.

    Raises DataError for an unknown name or split, a damaged file, or a file that no mirror gives.
    """
    known = source(name)
    check_split(known, split)
    known, paths = origin(known), []
    for file in known.files:
        if split in file.splits:
            status = _status(known, file, root)
            if status.status == "damaged":
                raise DataError(
                    f"{show(status.path)}: does not have the published SHA-256 of {known.name} ({status.actual} instead of "
                    f"{status.expected}); delete it and load again to download it, or copy a good one there"
                )
            paths.append(status.path if status.status == "ok" else _fetch_file(known, file, _goal(root), None, progress))
    return paths


# --- downloading -----------------------------------------------------------------------------------------------------------


class _Broken(Exception):
    """The network failed; what the part file holds may be continued."""


class _Refused(Exception):
    """The server answered with other bytes than the published ones."""


def fetch(
    name: str,
    root: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    mirrors: Sequence[str] | None = None,
) -> list[Path]:
    """Download what is missing or damaged of a named set into `root` (default: the cache), and return its files.

    `mirrors` are base URLs tried in order instead of the set's own. Files that are there and whole are left alone, and
    broken downloads are continued. Raises DataError when no mirror gives a file, telling where to put it by hand.
    A set that is made from another fetches the files of that one.
    """
    known = origin(source(name))
    return [_fetch_file(known, file, _goal(root), mirrors, progress) for file in known.files]


def _goal(root: str | os.PathLike[str] | None) -> Path:
    return cache_folder() if root is None else Path(root).expanduser()


def _fetch_file(known: Source, file: SourceFile, root: Path, mirrors: Sequence[str] | None, progress: Progress | None) -> Path:
    folder = root / known.name
    goal = folder / file.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as suffix:
            if goal.is_file() and digest(goal) in _accepted(known, file):
                return goal
            failures = _try_all(known, file, goal, suffix, mirrors, progress)
    except OSError as error:  # of the disk: those of the network are _Broken
        reason = error.strerror or error
        raise DataError(f"{show(goal)}: cannot be written ({reason}); give another root, or set PERIPLUS_DATA") from error
    if failures:
        raise DataError(_offline(known, file, goal, failures))
    return goal


def _offline(known: Source, file: SourceFile, goal: Path, failures: list[str]) -> str:
    return (
        f"{known.name}: cannot download {file.name} ({'; '.join(failures)}); offline? put the file ({file.size:,} bytes, SHA-256 "
        f"{file.sha256}) at {show(goal)}, or set PERIPLUS_DATA to a folder that has {known.name}/{file.name}"
    )


def _try_all(known: Source, file: SourceFile, goal: Path, suffix: str, mirrors: Sequence[str] | None, progress: Progress | None) -> list[str]:
    """[] when a mirror or a recipe gave the file, now at `goal`; else what went wrong with each of them."""
    failures = []
    part = goal.with_name(f".{file.name}{suffix}")
    for mirror in known.mirrors if mirrors is None else mirrors:
        url = mirror.rstrip("/") + "/" + file.name
        try:
            _from_mirror(url, part, file, progress)
            os.replace(part, goal)
            return []
        except (_Broken, _Refused) as error:
            failures.append(f"{url}: {error}")
    for recipe in known.recipes if mirrors is None else ():
        try:
            _make(recipe, goal, suffix, progress)
            return []
        except (_Broken, _Refused) as error:
            failures.append(f"{recipe.base}: {error}")
    return failures or ["no mirror was given"]


def _from_mirror(url: str, part: Path, file: SourceFile, progress: Progress | None) -> None:
    """Complete `part` with bytes of the right digest, trying again as long as each try brings something."""
    for _ in range(ATTEMPTS):
        before = _length(part)
        try:
            _download(url, part, file, progress)
            if digest(part) == file.sha256:
                return
            part.unlink()
            raise _Refused("its bytes do not have the published SHA-256")
        except _Refused:
            part.unlink(missing_ok=True)
            if before == 0:
                raise
            # The first bytes came from elsewhere (another mirror, last week): they may be at fault, so start over.
        except _Broken:
            if _length(part) <= before:
                raise
    raise _Broken(f"the connection broke {ATTEMPTS} times")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(url: str, part: Path, file: SourceFile, progress: Progress | None) -> None:
    """Append to `part` the bytes that it lacks of `file.size`, by HTTP Range, or all of them where that is ignored."""
    have = _length(part)
    if have == file.size:
        return
    response = _open(url, have)
    with response, part.open("ab" if response.status == 206 else "wb") as out:
        have = _begin(response, have, file.size)
        while block := _receive(response):
            have += len(block)
            if have > file.size:
                raise _Refused(f"sends more than the {file.size:,} bytes of the file")
            out.write(block)
            if progress is not None:
                progress(file.name, have, file.size)
        out.flush()
        os.fsync(out.fileno())
    if have < file.size:
        raise _Broken(f"the connection closed after {have:,} of {file.size:,} bytes")


def _open(url: str, have: int) -> http.client.HTTPResponse:
    if not url.startswith(("http://", "https://")):
        raise _Refused("is not an http or https address")
    headers = {"User-Agent": "periplus", "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part file is not a beginning of this file
            raise _Refused("HTTP 416") from error
        raise _Broken(f"HTTP {error.code}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(_network_reason(error)) from error


def _begin(response: http.client.HTTPResponse, have: int, size: int) -> int:
    """The offset at which this answer begins (`have`, or 0 where Range was ignored); a wrong total is refused at once."""
    if response.status == 206:
        start, _, total = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
        if not start.startswith(f"{have}-"):
            raise _Refused("answers with another range than asked for")
    else:
        have, total = 0, response.headers.get("Content-Length") or "*"
    if total.isdigit() and int(total) != size:
        raise _Refused(f"has {int(total):,} bytes instead of {size:,}")
    return have


def _receive(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(2**16)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(_network_reason(error)) from error


def _network_reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return f"no answer in {TIMEOUT:g} s"
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return ascii(" ".join(str(text).split()))[1:-1][:120]


@contextmanager
def _lock(folder: Path) -> Iterator[str]:
    """Hold the folder's lock and yield the part files' suffix; where locks fail, a suffix nobody shares.

    The lock is of the operating system, so it ends with the process however that ends; its empty file stays.
    """
    alone = f".{os.getpid()}-{threading.get_ident()}.part"
    if fcntl is None:
        yield alone
        return
    with (folder / ".lock").open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            suffix = ".part"
        except OSError:  # some network file systems have no locks
            suffix = alone
        yield suffix


# --- recipes -----------------------------------------------------------------------------------------------------------------


def _make(recipe: Recipe, goal: Path, suffix: str, progress: Progress | None) -> None:
    """Download a recipe's files, each checked, and pack their 0/1 pixels into the NPZ at `goal`: 8 pixels a byte."""
    arrays: dict[str, Bytes] = {}
    parts = []
    for file in recipe.files:
        part = goal.with_name(f".{recipe.reader}-{file.name}{suffix}")
        _from_mirror(recipe.base + file.name, part, file, progress)
        arrays[file.splits[0]] = np.packbits(_read_amat(part) if recipe.reader == "amat" else _read_mat(part), axis=1)
        parts.append(part)
    packed = goal.with_name(f".{goal.name}{suffix}")
    _write_npz(packed, arrays)
    if digest(packed) != recipe.makes:
        packed.unlink()
        raise _Refused(f"what is made from it is not {goal.name}")
    os.replace(packed, goal)
    for part in parts:
        part.unlink()


def _read_amat(path: Path) -> Bytes:
    """(n, 784) of 0/1 from the original text: 784 digits a line, each followed by one space or the newline."""
    return np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 2 * 784)[:, ::2] - ord("0")


def _read_mat(path: Path) -> Bytes:
    from scipy.io import loadmat  # a parser that we would not give unknown bytes; these have the right digest

    return np.asarray(loadmat(path)["X"], np.uint8)


def _write_npz(path: Path, arrays: dict[str, Bytes]) -> None:
    """An NPZ whose bytes depend on the arrays alone: not compressed (zlib versions differ), no times, one platform."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            body = io.BytesIO()
            rows = np.ascontiguousarray(array)  # MATLAB arrays come column by column, and the file would say so
            np.lib.format.write_array(body, rows, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            archive.writestr(info, body.getvalue())


# --- progress on a terminal ----------------------------------------------------------------------------------------------------


def terminal_progress() -> Progress | None:
    """A line on stderr that is rewritten as a download goes on, with the time left; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    began: dict[str, tuple[float, int]] = {}  # by file: when it began and at which byte, for a resumed file is not all new

    def show_line(name: str, done: int, total: int) -> None:
        now = time.monotonic()
        start, first = began.setdefault(name, (now, done))
        left = (total - done) * (now - start) / max(1, done - first)
        end = "\n" if done == total else ""
        print(f"\r{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {left:.0f} s left  ", end=end, file=sys.stderr, flush=True)

    return show_line
