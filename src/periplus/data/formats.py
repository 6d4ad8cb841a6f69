"""Bytes that cannot be trusted, turned into images that can.

A data file is whatever somebody put at that path: cut short by a full disk, renamed, saved by another program, or made to
do harm. Three rules keep this room simple.

1. *Sizes are believed last.* A header may declare any number. Before one byte is allocated for it, the number is held
   against what the file could hold: the file's own length for plain bytes, 1032 times that for deflate (the most that
   format can expand), and `IMAGE_BYTES_LIMIT` for everything. Memory then grows with the bytes read, not with those promised.
2. *Nothing is executed.* Arrays of objects are pickles, and pickles are programs: they are refused by name. A `.npy` header
   is a Python literal and is read by `numpy.lib.format` under a length limit; Pillow may try six decoders and no others.
3. *Every failure is a sentence.* One line, the file first, then what is wrong, then what to do (`DataError`, exit code 3).

What comes out is always uint8 (N, C, H, W) with C = 1 (grey) or 3 (RGB). Formats: IDX, plain or gzip (LeCun, Cortes and
Burges, 1998: a big-endian header `00 00 type ndim`, then ndim sizes of four bytes, then the values), NPZ, and a folder of
image files.
"""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import re
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from periplus.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_BYTES_LIMIT = 8 * 2**30
"""Bytes of one decoded array of images that any reader accepts, unless its `limit` says otherwise."""
PIXELS_LIMIT = 2**25
"""Pixels of one image file, as its header declares them: 33 million, more than most cameras and far more than we train on."""
CLASSES_LIMIT = 2**16
"""Labels are class numbers below this; a larger one is an identifier or garbage, and would make a tuple of that many names."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".webp")
# Left-out images would be silent holes in the data, so known suffixes that we cannot read are errors, not strangers.
_UNREADABLE_SUFFIXES = (".tif", ".tiff", ".avif", ".heic", ".jp2", ".svg", ".tga", ".ico", ".psd", ".exr")
_PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")
_DEFLATE_RATIO = 1032  # the limit of the deflate format: 258 bytes from 2 bits
_CHUNK = 2**20
_NPY_HEADER_LIMIT = 10_000  # numpy's own limit for headers that it will evaluate
_IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class Loaded(NamedTuple):
    """What a file held: images uint8 (N, C, H, W), labels int64 (N,) or None, the names of the classes, and what was odd, if anything."""

    images: Bytes
    labels: Labels | None
    classes: tuple[str, ...]
    remark: str | None = None


def read_images(path: Path, image_size: tuple[int, int] | None = None, limit: int | None = None) -> Loaded:
    """Read the images at `path`: a folder, an NPZ or an IDX file, told apart by their first bytes and not by their names.

    `image_size` = (H, W) resizes (see `resize`); `limit` bounds the bytes decoded (default `IMAGE_BYTES_LIMIT`).
    Raises DataError naming the file.
    """
    if path.is_dir():
        return read_folder(path, image_size, limit)
    kind = _sniff(path)
    loaded = read_npz(path, limit) if kind == "npz" else read_idx_pair(path, limit)
    return loaded if image_size is None else loaded._replace(images=resize(loaded.images, image_size))


def resize(images: Bytes, size: tuple[int, int]) -> Bytes:
    """Images uint8 (N, C, H, W) to (N, C, *size): bilinear with antialiasing; the aspect ratio is not kept."""
    if images.shape[2:] == size:
        return images
    out = np.empty((*images.shape[:2], *size), np.uint8)
    rows = max(1, 2**24 // math.prod(images.shape[1:]))
    for start in range(0, len(images), rows):
        block = torch.from_numpy(np.ascontiguousarray(images[start : start + rows]))
        shrunk = torch.nn.functional.interpolate(block, size=size, mode="bilinear", antialias=True, align_corners=False)
        out[start : start + rows] = shrunk.numpy()
    return out


# --- sentences ---------------------------------------------------------------------------------------------------------


def show(path: Path | str) -> str:
    """A path as an error may print it: as it is, or quoted where it would break the line."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _bad(path: Path | str, sentence: str) -> DataError:
    return DataError(f"{show(path)}: {sentence}")


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return ascii(text)[1:-1][:160] if not text.isprintable() else text[:160]


@contextmanager
def _blaming(path: Path, kind: str) -> Iterator[None]:
    """Whatever the standard library raises on a broken file, as one sentence about that file."""
    try:
        yield
    except DataError:
        raise
    except EOFError as error:
        raise _bad(path, f"is truncated: the {kind} data stop before their end; copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise _bad(path, f"is a damaged {kind} file ({_reason(error)}); copy or download it again") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # zipfile went where a false directory sent it, before the beginning of the file
            raise _bad(path, f"is a damaged {kind} file (a false offset); copy or download it again") from error
        raise _bad(path, f"cannot be read ({_reason(error)}); check the path and its permissions") from error
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError, NotImplementedError, struct.error ...: zipfile's list has no other end
        raise _bad(path, f"is not a usable {kind} file ({_reason(error)}); make it again") from error


_SIGNATURES = (
    (b"PK", "npz"),
    (b"\x1f\x8b", "idx"),
    (b"\x93NUMPY", "a single .npy array: save it with numpy.savez(path, images=array)"),
    (b"\x89PNG", "one image: give the folder that holds it"),
    (b"\xff\xd8\xff", "one image: give the folder that holds it"),
    (b"GIF8", "one image: give the folder that holds it"),
    (b"BM", "one image: give the folder that holds it"),
    (b"\x89HDF", "an HDF5 file: save its images with numpy.savez(path, images=array)"),
    (b"MATLAB", "a MATLAB file: save its images with numpy.savez(path, images=array)"),
    (b"\x80", "a pickle, which is a program and is never opened: save its images with numpy.savez(path, images=array)"),
    (b"<", "a web page or XML, perhaps a failed download: download it again"),
)


def _sniff(path: Path) -> str:
    """`npz` or `idx`, by the first bytes; anything else is told by what it is."""
    with _blaming(path, "data"):
        if not stat.S_ISREG(path.stat().st_mode):
            raise _bad(path, "is neither a file nor a folder; give an .npz, an IDX file or a folder of images")
        with path.open("rb") as stream:
            head = stream.read(8)
    if not head:
        raise _bad(path, "is empty (0 bytes); copy or download it again")
    for signature, meaning in _SIGNATURES:
        if head.startswith(signature):
            if meaning in ("npz", "idx"):
                return meaning
            raise _bad(path, f"is {meaning}")
    if path.suffix == ".npz":
        raise _bad(path, "is named .npz but does not begin like one; it is damaged or mislabelled: save it again")
    if head[:2] == b"\0\0" or "idx" in path.name:
        return "idx"
    raise _bad(path, "is of no known format; give an .npz, an IDX file (gzip or not) or a folder of images")


def _check_limit(path: Path, declared: int, limit: int | None) -> None:
    bound = IMAGE_BYTES_LIMIT if limit is None else limit
    if declared > bound:
        raise _bad(path, f"declares {declared:,} bytes of images, over the limit of {bound:,}; give fewer or smaller images")


def _read_exactly(path: Path, stream: IO[bytes], wanted: int, kind: str) -> bytearray:
    """Exactly `wanted` bytes to the end of `stream`; memory grows with what arrives, so a false promise costs nothing."""
    body = bytearray()
    while len(body) <= wanted:
        block = stream.read(min(_CHUNK, wanted + 1 - len(body)))
        if not block:
            break
        body += block
    if len(body) < wanted:
        found = f"its {kind} header declares {wanted:,} bytes and {len(body):,} follow"
        raise _bad(path, f"is truncated: {found}; copy or download it again")
    if len(body) > wanted:
        raise _bad(path, f"goes on after the {wanted:,} bytes that its {kind} header declares; copy or download it again")
    return body


# --- IDX -----------------------------------------------------------------------------------------------------------------


def read_idx(path: Path, limit: int | None = None) -> Bytes:
    """The uint8 array of an IDX file (gzip or not, told by its first two bytes), of the shape in its header.

    Raises DataError when the file is empty, truncated, too long, of another type, or declares more than it can hold.
    """
    with _blaming(path, "IDX"), path.open("rb") as raw:
        held = os.fstat(raw.fileno()).st_size
        if held == 0:
            raise _bad(path, "is empty (0 bytes); copy or download it again")
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
        shape = _idx_shape(path, stream)
        wanted = math.prod(shape)
        if wanted > held * (_DEFLATE_RATIO if packed else 1):
            promise = f"its IDX header declares {wanted:,} bytes, more than a file of {held:,} can hold"
            raise _bad(path, f"is truncated or false: {promise}; copy or download it again")
        _check_limit(path, wanted, limit)
        body = _read_exactly(path, stream, wanted, "IDX")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_shape(path: Path, stream: IO[bytes]) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) == 4 and (magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES):
        raise _bad(path, f"has the wrong magic number {magic.hex()} for IDX (images have 00000803); it is damaged or mislabelled")
    if len(magic) == 4 and magic[2] != 0x08:
        raise _bad(path, f"holds {_IDX_TYPES[magic[2]]} values; IDX images and labels must be uint8 (type 08)")
    ndim = magic[3] if len(magic) == 4 else 1
    if ndim not in (1, 2, 3, 4):
        raise _bad(path, f"has the wrong magic number {magic.hex()} for IDX: {ndim} dimensions, where images have 3 (00000803)")
    sizes = stream.read(4 * ndim)
    if len(magic) < 4 or len(sizes) < 4 * ndim:
        raise _bad(path, "is truncated: it stops inside its IDX header; copy or download it again")
    return tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


def read_idx_images(path: Path, limit: int | None = None) -> Bytes:
    """Images uint8 (N, C, H, W) of an IDX file of three dimensions, or of four with channels (see `to_nchw`)."""
    values = read_idx(path, limit)
    if values.ndim == 1:
        raise _bad(path, "holds labels (one dimension), where images were expected; give the file of images (idx3)")
    return to_nchw(path, values)


def read_idx_labels(path: Path, count: int | None = None, limit: int | None = None) -> Labels:
    """Labels int64 (N,) of an IDX file of one dimension; `count` is the number of images they must match."""
    values = read_idx(path, limit)
    if values.ndim != 1:
        raise _bad(path, f"holds images ({values.ndim} dimensions), where labels were expected; give the file of labels (idx1)")
    return _labels(path, values, len(values) if count is None else count)


def read_idx_pair(path: Path, limit: int | None = None) -> Loaded:
    """An IDX file of images and, where a sibling has its name with `images-idx3` for `labels-idx1`, the labels."""
    images = read_idx_images(path, limit)
    sibling = path.with_name(re.sub(r"images([-.])idx3", r"labels\1idx1", path.name))
    if sibling == path or not sibling.is_file():
        return Loaded(images, None, ())
    labels = read_idx_labels(sibling, len(images), limit)
    return Loaded(images, labels, _numbered(labels))


# --- what images and labels must be ----------------------------------------------------------------------------------------


def to_nchw(path: Path, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W), contiguous; C is the axis of size 1 or 3.

    Where both axes could be channels (images one or three pixels wide), the array is read as (N, C, H, W), our own
    layout, with a UserWarning that says so.
    """
    _check_shape(path, array.shape)
    if array.ndim == 3:
        return np.ascontiguousarray(array[:, None])
    if array.shape[1] in (1, 3):
        if array.shape[3] in (1, 3):
            warnings.warn(f"{show(path)}: shape {array.shape} is ambiguous and is read as (N, C, H, W)", stacklevel=2)
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(np.moveaxis(array, 3, 1))


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) not in (3, 4):
        raise _bad(path, f"has images of shape {shape}; they must be (N, H, W), (N, H, W, C) or (N, C, H, W)")
    if 0 in shape:
        raise _bad(path, f"has no images: its shape is {shape}")
    if len(shape) == 4 and shape[1] not in (1, 3) and shape[3] not in (1, 3):
        raise _bad(path, f"has images of shape {shape} with no axis of 1 or 3 channels; give (N, H, W, C) or (N, C, H, W)")


def _to_uint8(path: Path, array: npt.NDArray[Any]) -> Bytes:
    """uint8 as it is; floats in [0, 1] as round(255 x), a block at a time so that memory stays near one copy."""
    if array.dtype == np.uint8:
        return array
    out = np.empty(array.shape, np.uint8)
    rows = max(1, _CHUNK // math.prod(array.shape[1:]))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        if not np.isfinite(block).all():
            raise _bad(path, "has images with NaN or infinite values; replace them before saving")
        low, high = float(block.min()), float(block.max())
        if low < 0 or high > 1:
            found = f"from {low:.4g} to {high:.4g}"
            raise _bad(path, f"has float images outside [0, 1] ({found}); rescale them, or save uint8 0..255")
        out[start : start + rows] = np.rint(block.astype(np.float32) * 255)
    return out


def _labels(path: Path, values: npt.NDArray[Any], count: int) -> Labels:
    if values.dtype.kind not in "iu":
        raise _bad(path, f"has labels of type {values.dtype}; they must be integers (class numbers from 0)")
    if values.shape != (count,):
        raise _bad(path, f"has labels of shape {values.shape} for {count:,} images; there must be one label per image")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= CLASSES_LIMIT:
        raise _bad(path, f"has the label {low if low < 0 else high}; labels are class numbers from 0 to {CLASSES_LIMIT - 1}")
    return values.astype(np.int64)


def _numbered(labels: Labels) -> tuple[str, ...]:
    return tuple(str(number) for number in range(int(labels.max()) + 1))


# --- NPZ -----------------------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """A .npy header, checked against the size of its zip member."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int  # bytes before the values


def read_npz(path: Path, limit: int | None = None) -> Loaded:
    """Images and labels of an NPZ: array `images`, else its only array; `labels` of equal length where there is one.

    Images are uint8, or floats in [0, 1] (stored as round(255 x)); layouts as `to_nchw`. Raises DataError.
    """
    with _blaming(path, "NPZ"), zipfile.ZipFile(path) as archive:
        members = _members(path, archive, limit)
        name = _images_member(path, members)
        header = _npy_header(path, archive, members[name])
        if header.dtype != np.uint8 and (header.dtype.kind != "f" or header.dtype.itemsize > 8):
            raise _bad(path, f"has images of type {header.dtype}; they must be uint8 (0..255) or float in [0, 1]")
        _check_shape(path, header.shape)
        images = to_nchw(path, _to_uint8(path, _npy_values(path, archive, members[name], header)))
        if "labels" not in members or name == "labels":
            return Loaded(images, None, ())
        header = _npy_header(path, archive, members["labels"])
        labels = _labels(path, _npy_values(path, archive, members["labels"], header), len(images))
    return Loaded(images, labels, _numbered(labels))


def read_npz_array(path: Path, name: str, limit: int | None = None) -> npt.NDArray[Any]:
    """One array of an NPZ by name, under the same checks as images have; raises DataError."""
    with _blaming(path, "NPZ"), zipfile.ZipFile(path) as archive:
        members = _members(path, archive, limit)
        if name not in members:
            raise _bad(path, f"has no array '{name}'; it has {', '.join(map(repr, members)) or 'none'}")
        return _npy_values(path, archive, members[name], _npy_header(path, archive, members[name]))


def _members(path: Path, archive: zipfile.ZipFile, limit: int | None) -> dict[str, zipfile.ZipInfo]:
    """The arrays of the zip directory by name; sizes that cannot be true, or that are too large, end here, unread."""
    held = path.stat().st_size
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        name = show(info.filename)
        if info.flag_bits & 0x1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _bad(path, f"has an array encrypted or compressed in an unusual way ({name}); use numpy.savez_compressed")
        if info.compress_size > held or info.file_size > _DEFLATE_RATIO * info.compress_size + 64:
            promise = f"{name} declares {info.file_size:,} bytes from {info.compress_size:,} in a file of {held:,}"
            raise _bad(path, f"is false or a zip bomb: {promise}; save it again")
        if info.filename[:-4] in members:
            raise _bad(path, f"has two arrays named {name}; save it again")
        members[info.filename[:-4]] = info
    _check_limit(path, sum(info.file_size for info in members.values()), limit)
    return members


def _images_member(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    if "images" in members:
        return "images"
    names = [name for name in members if name != "labels"]
    if not names:
        what = "labels but no images" if members else "no arrays"
        raise _bad(path, f"holds {what}; save it with numpy.savez(path, images=array)")
    if len(names) > 1:
        listing = ", ".join(show(name) for name in names[:12])
        raise _bad(path, f"has no array named 'images' and several others ({listing}); save the one you mean as 'images'")
    return names[0]


def _npy_header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
    """The header of one member; only the first 10,000 bytes are read for it, whatever length it declares."""
    name = show(info.filename)
    with archive.open(info) as stream:
        head = io.BytesIO(stream.read(_NPY_HEADER_LIMIT))
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns of headers from Python 2; they are fine here
            version = np.lib.format.read_magic(head)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran, dtype = read(head, max_header_size=_NPY_HEADER_LIMIT)
    except Exception as error:  # the header is evaluated as a literal, and hostile ones raise anything, RecursionError included
        raise _bad(path, f"has a damaged array header in {name}; save it again") from error
    if dtype.hasobject:
        raise _bad(path, f"holds pickled objects in {name}, which are programs and are never opened; save plain numbers")
    if any(size < 0 for size in shape) or head.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
        promise = f"{name} declares shape {shape} of {dtype}, but has {info.file_size:,} bytes"
        raise _bad(path, f"is truncated or false: {promise}; save it again")
    return _Header(shape, fortran, dtype, head.tell())


def _npy_values(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: _Header) -> npt.NDArray[Any]:
    if header.dtype.kind not in "iufb":
        raise _bad(path, f"has values of type {header.dtype} in {show(info.filename)}; they must be plain numbers")
    with archive.open(info) as stream:
        body = _read_exactly(path, stream, info.file_size, "NPZ")
    values = np.frombuffer(body, header.dtype, offset=header.offset)
    return values.reshape(header.shape, order="F" if header.fortran else "C")


# --- a folder of images -----------------------------------------------------------------------------------------------------


def read_folder(path: Path, image_size: tuple[int, int] | None = None, limit: int | None = None) -> Loaded:
    """The images of a folder in the order of their names; sub-folders, in the order of theirs, are the classes.

    Classes take turns (the first image of each, then the second of each), so that the first n of a set are never of one class alone.
    Read are png, jpg, jpeg, bmp, gif (its first frame), pgm, ppm and webp; hidden files and strangers are passed over.
    One colour image makes all of them RGB. Transparency is composited on black, the background of every set here. Grey of
    16 bits is scaled to 8 (x / 257), not clipped. EXIF rotations are not applied. Unequal sizes are a DataError naming the
    first file that differs, unless `image_size` = (H, W) is given; so are a file that will not decode, a folder without
    images, and a class without images.
    """
    with _blaming(path, "folder"):
        files, labels, classes = _listing(path)
    pixels: list[Bytes] = []
    held, bound = 0, IMAGE_BYTES_LIMIT if limit is None else limit
    with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd metadata; what matters is raised
        for file in files:
            image = decode_image(file)
            if image_size is not None:
                image = resize(image[None], image_size)[0]
            if pixels and image.shape[1:] != pixels[0].shape[1:]:
                other = f"{show(files[0].name)} is {_size_of(pixels[0])}"
                raise _bad(file, f"is {_size_of(image)}, but {other}; give an image size (--image-size) to resize all")
            pixels.append(image)
            held += image.nbytes
            if held > bound:
                raise _bad(path, f"holds more than the limit of {bound:,} bytes of images; give fewer or smaller images")
    channels = max(image.shape[0] for image in pixels)
    images = np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in pixels])
    colour = [show(file.relative_to(path)) for file, image in zip(files, pixels, strict=True) if image.shape[0] == channels]
    remark = f"RGB because of {colour[0]}: {len(files) - len(colour):,} of {len(files):,} files are grey" if len(colour) < len(files) else None
    if not classes:
        return Loaded(images, None, (), remark)
    turns = _in_turn(np.array(labels, np.int64))
    return Loaded(images[turns], np.array(labels, np.int64)[turns], classes, remark)


def _in_turn(labels: Labels) -> npt.NDArray[np.int64]:
    """Rows of labels, given in the order of classes: the first row of each class, then the second of each, and so on."""
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # which of its class a row is
    return np.lexsort((labels, place))


def _size_of(image: Bytes) -> str:
    return f"{image.shape[1]} x {image.shape[2]} (height x width)"


def _listing(path: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """(files, label of each, classes) of a folder, whose images lie all in it or all in its sub-folders."""
    files, folders, strangers = _contents(path)
    with_images = [folder for folder in folders if _contents(folder)[0]]
    if files and with_images:
        raise _bad(path, f"has images both in it and in its sub-folder {show(with_images[0].name)}; keep them in one place")
    if files:
        return files, [], ()
    if not with_images:
        arrays = [show(name) for name in strangers if "idx" in name or name.endswith(".npz")]
        todo = f"put {', '.join(IMAGE_SUFFIXES)} files in it, or in one sub-folder per class"
        raise _bad(path, f"is a folder without images; {f'give the file itself: {arrays[0]}' if arrays else todo}")
    labels: list[int] = []
    for number, folder in enumerate(folders):
        inside, deeper, _ = _contents(folder)
        if deeper or not inside:
            what = f"has folders inside it ({show(deeper[0].name)})" if deeper else "is a class without images"
            raise _bad(folder, f"{what}; a class is one sub-folder of image files: give one split, or remove it")
        files += inside
        labels += [number] * len(inside)
    return files, labels, tuple(show(folder.name) for folder in folders)


def _contents(path: Path) -> tuple[list[Path], list[Path], list[str]]:
    """(image files, sub-folders, names of other files) of one folder, each sorted by name, without hidden ones."""
    entries = sorted((entry for entry in os.scandir(path) if not entry.name.startswith(".")), key=lambda entry: entry.name)
    files = [Path(entry.path) for entry in entries if entry.is_file()]
    for file in files:
        if file.suffix.lower() in _UNREADABLE_SUFFIXES:
            raise _bad(file, f"is of a kind that is not read; convert it to one of {', '.join(IMAGE_SUFFIXES)}")
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    return images, [Path(entry.path) for entry in entries if entry.is_dir()], others


def decode_image(path: Path) -> Bytes:
    """One image file as uint8 (C, H, W); its header's size is judged before a pixel is decoded."""
    from PIL import Image

    try:
        if path.stat().st_size == 0:
            raise _bad(path, "is empty (0 bytes); remove it or copy it again")
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            width, height = image.size
            if width * height > PIXELS_LIMIT:
                raise _bad(path, f"declares {width} x {height} pixels, over the limit of {PIXELS_LIMIT:,}; make it smaller")
            pixels = image_pixels(path, image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files; all of it means the same
        unknown = type(error).__name__ == "UnidentifiedImageError"  # whose own words are the path again
        reason = f"it is none of {', '.join(_PILLOW_FORMATS)}, or cut short" if unknown else _reason(error)
        raise _bad(path, f"is not a readable image ({reason}); remove it or make it again") from error
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def image_pixels(path: Path | str, image: Image.Image) -> Bytes:
    """uint8 (H, W, 1) for grey or (H, W, 3); a palette is judged by the colours that it shows."""
    if image.mode == "F":
        raise _bad(path, "has floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion to 8 bits would clip at 255
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return ((wide + 128) // 257).astype(np.uint8)[..., None]
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        values = np.asarray(image.convert("LA" if grey else "RGBA"), np.uint32)
        pixels = ((values[..., :-1] * values[..., -1:] + 127) // 255).astype(np.uint8)
    else:
        pixels = np.asarray(image.convert("L" if grey else "RGB"), np.uint8)
        pixels = pixels[..., None] if grey else pixels
    if image.mode in ("P", "PA") and (pixels == pixels[..., :1]).all():
        return pixels[..., :1]
    return pixels
