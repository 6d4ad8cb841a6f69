"""The noun of the data room: a set of small images in memory, and the one door to it, `load_data`.

Images are kept as bytes, uint8 (N, C, H, W), because that is what they were and a quarter of the memory; x/255 is taken
where a batch is used. The sets of this library fit in memory by far (MNIST: 47 MB), so there are no workers, no lazy
files and no transforms here: a batch is an index. A set knows its `content_hash`, which runs record, so that a
figure can be traced to the very bytes that it came from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from periplus.data import composites, formats, sources
from periplus.data.formats import Loaded, show
from periplus.errors import DataError, UsageError

_SIZE_LIMIT = 4096


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images uint8 (N, C, H, W) with their labels int64 (N,) or None, the names of the classes, and where they are from.

    A label is an index into `classes`. Both tensors lie on one device. Raises DataError when the parts do not fit.
    """

    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    name: str
    split: str
    source: str | None = None
    """What `load_data` would find these very images by again: a named set, or an absolute path."""
    remark: str | None = None
    """What was odd in reading them, such as grey images that became RGB because of others."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(f"{self.name}: images must be a torch.uint8 tensor (N, C, H, W), not {_describe(images)}")
        if images.numel() == 0:
            raise DataError(f"{self.name}: there are no images: their shape is {tuple(images.shape)}")
        if labels is None:
            return
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"{self.name}: labels must be a torch.int64 tensor ({len(images)},) or None, not {_describe(labels)}")
        if labels.device != images.device:
            raise DataError(f"{self.name}: labels are on {labels.device}, but images on {images.device}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(f"{self.name}: labels go from {low} to {high}, but there are {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageData:
        """The same set with its tensors on `device`."""
        return replace(self, images=self.images.to(device), labels=None if self.labels is None else self.labels.to(device))

    def subset(self, indices: Sequence[int] | Tensor) -> ImageData:
        """The images at `indices` (integers in [-N, N), or a boolean mask (N,)), in that order; DataError when out of range."""
        where = torch.as_tensor(indices, device=self.images.device)
        if where.dtype == torch.bool and where.shape == (len(self),):
            where = where.nonzero()[:, 0]
        if where.ndim != 1 or where.numel() == 0 or where.dtype.is_floating_point or where.dtype == torch.bool:
            wanted = f"a non-empty list of integers or a mask of {len(self)}"
            raise DataError(f"{self.name}: a subset needs {wanted}, not {_describe(where)}")
        where = where.long()
        if int(where.min()) < -len(self) or int(where.max()) >= len(self):
            found = f"{int(where.min())} to {int(where.max())}"
            raise DataError(f"{self.name}: a subset index lies outside the {len(self)} images ({found})")
        return replace(self, images=self.images[where], labels=None if self.labels is None else self.labels[where])

    def split_rows(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Rows of (rest, held_out): `count` images drawn by `seed` without replacement, in the order they were drawn, and the others, ascending."""
        if not 0 < count < len(self):
            raise DataError(f"{self.name}: cannot hold out {count} of {len(self)} images; both parts need at least one")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return order[count:].sort().values, order[:count]

    def split_off(self, count: int, seed: int) -> tuple[ImageData, ImageData]:
        """(rest, held_out): `count` images drawn by `seed` without replacement are held out.

        The rest keep the order of the set. What is held out lies in the order that it was drawn in: sets are often sorted by class, and the first n
        held-out images, which pictures, inversions and pairs begin with, must be a sample of all of them.
        """
        rest, held_out = self.split_rows(count, seed)
        return self.subset(rest), replace(self.subset(held_out), split=f"{self.split}/held-out")

    def content_hash(self) -> str:
        """SHA-256 over the shape, the bytes of the images and the labels (not the names): 64 hexadecimal digits."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().reshape(-1).numpy().data)
        digest.update(b"unlabelled" if self.labels is None else self.labels.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def load_data(
    source: str | os.PathLike[str],
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> ImageData:
    """Load a named set or the images at a path.

    `source` is `digits` (embedded; train, test, all), `mnist`, `fashion-mnist` (train, test), `binarized-mnist` (train,
    valid, test; without labels), `stacked-mnist` (train, test; made from MNIST, a thousand classes), or the path of an NPZ,
    an IDX file or a folder of images (`formats` has the rules; write `./mnist` for a path that has the name of a set).
    A path is one split: all its images, whatever `split` says, and its `.split` is `all`. Named sets are looked for in
    `root`, `$PERIPLUS_DATA` and the cache, checked against their published SHA-256, and downloaded when missing.
    `image_size` = side or (height, width) resizes (bilinear, antialiased).

    Raises DataError (absent, empty, malformed, truncated, unknown) and UsageError (image_size).
    """
    size = _checked_size(image_size)
    if isinstance(source, str) and source in sources.SOURCES:
        loaded, name = _load_named(source, split, root), source
        if size is not None:
            loaded = loaded._replace(images=formats.resize(loaded.images, size))
    else:
        path = _existing(source)
        loaded, name, split = formats.read_images(path, size), path.resolve().name, "all"
    labels = None if loaded.labels is None else torch.from_numpy(loaded.labels)
    found_by = name if split != "all" or source == "digits" else str(Path(source).expanduser().resolve())
    return ImageData(torch.from_numpy(loaded.images), labels, loaded.classes, name, split, found_by, loaded.remark)


def _checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    size = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= _SIZE_LIMIT for side in size):
        raise UsageError(f"image_size: {image_size!r} is not a side or (height, width) from 1 to {_SIZE_LIMIT} pixels")
    return size[0], size[1]


def _existing(source: str | os.PathLike[str]) -> Path:
    """The path that `source` names; a bare word that is no path was meant as a name, and is answered with the names."""
    if not os.fspath(source):
        raise DataError(f"no data source given; give a path that exists or one of {', '.join(sources.SOURCES)}")
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL byte, an unknown ~user
        raise DataError(f"{show(str(source))[:200]}: is not a usable path ({error})") from error
    if isinstance(source, str) and len(path.parts) == 1 and not path.suffix:
        sources.source(source)
    raise DataError(f"{show(path)}: no such file or folder; give a path that exists or one of {', '.join(sources.SOURCES)}")


def _load_named(name: str, split: str, root: str | os.PathLike[str] | None) -> Loaded:
    known = sources.source(name)
    sources.check_split(known, split)
    if name == "digits":
        return _load_digits(split)
    paths = sources.files_of_split(name, split, root, sources.terminal_progress())
    if name == "binarized-mnist":
        bits = np.unpackbits(formats.read_npz_array(paths[0], split), axis=1)
        # the packed file unpacks with its images side by side: gathering one would cross the whole set
        return Loaded(np.ascontiguousarray(bits * np.uint8(255)).reshape(-1, *known.shape), None, ())
    images = formats.read_idx_images(paths[0])
    loaded = Loaded(images, formats.read_idx_labels(paths[1], len(images)), sources.origin(known).classes)
    return loaded if known.made_from is None else composites.stack_digits(loaded, dict(known.splits)[split], name, split)


def _load_digits(split: str) -> Loaded:
    """The 1797 digits of scikit-learn, whose pixels count 0 to 16 inked dots, as round(255 x / 16)."""
    from sklearn.datasets import load_digits  # a second of import, paid only here

    bunch = load_digits()
    part = {"train": slice(0, 1500), "test": slice(1500, None), "all": slice(None)}[split]
    images = np.rint(bunch.images[part, None] * 255 / 16).astype(np.uint8)
    return Loaded(images, bunch.target[part].astype(np.int64), tuple("0123456789"))
