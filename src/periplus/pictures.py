"""Pictures: images as PNG, every pixel enlarged by a whole number, never interpolated; the bytes are a function of the pixels.

Images are (N, C, H, W), C = 1 or 3, uint8 or floats in [0, 1]: arrays, or torch tensors on the CPU. Every function writes its file whole or not at
all and returns its path.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from periplus.errors import UsageError
from periplus.files import write_atomically

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

PathLike = str | os.PathLike[str]
Pixels = NDArray[np.uint8]


def save_images(images: ArrayLike, path: PathLike, columns: int | None = None) -> Path:
    """Write images by the file's suffix: .png, one grid; .npz, uint8 array `images` (N, C, H, W). Raises UsageError for any other."""
    suffix = Path(path).suffix
    if suffix == ".png":
        return image_grid(images, path, columns)
    if suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=to_uint8(np.asarray(images)))
        return write_atomically(path, buffer.getvalue())
    raise UsageError(f"--out is {path}: the name must end in .png (a grid) or .npz (the array 'images')")


def to_uint8(images: NDArray[np.generic]) -> Pixels:
    """Floats in [0, 1] as the nearest of 256 levels; uint8 as it is."""
    return images.astype(np.uint8) if images.dtype == np.uint8 else np.rint(images * 255).astype(np.uint8)


def image_grid(
    images: ArrayLike,
    path: PathLike,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    scale: int | None = None,
) -> Path:
    """Images (N, C, H, W), C = 1 or 3, uint8 or float in [0, 1], row by row as a PNG.

    Every pixel becomes `scale` x `scale` equal ones; by default the longer side of an image is then about 112 pixels, so that 8x8
    and 28x28 images are seen alike. `labels` name the rows.
    """
    pixels = _pixels(images, "image_grid")
    columns = columns or min(len(pixels), 10)
    scale = scale or _scale(pixels)
    gap = _gap(pixels, scale)
    height, width = pixels.shape[1] * scale, pixels.shape[2] * scale
    rows = math.ceil(len(pixels) / columns)
    if labels is not None and len(labels) != rows:
        raise UsageError(f"image_grid: {len(labels)} labels for {rows} rows")
    margin = _margin(labels, height)
    canvas = _canvas(rows * (height + gap) - gap, margin + columns * (width + gap) - gap)
    for index, image in enumerate(pixels):
        _paste(canvas, image, (index // columns) * (height + gap), margin + (index % columns) * (width + gap), scale)
    for index, label in enumerate(labels or ()):
        _write(canvas, label, margin - _letters(height), index * (height + gap) + height // 2, "rm", _letters(height))
    return _save_png(canvas, path)


def neighbour_strip(
    samples: ArrayLike,
    neighbours: ArrayLike,
    distances: ArrayLike,
    path: PathLike,
    labels: tuple[str, str, str] = ("sample", "nearest", "distance"),
    columns: int = 10,
    scale: int | None = None,
) -> Path:
    """Each sample above the training image nearest to it, and their distance below: has the model copied?

    Samples and neighbours (N, C, H, W) as in `image_grid`; distances (N,). More than `columns` pairs continue in a further strip.
    """
    above, below, gaps = _pixels(samples, "neighbour_strip"), _pixels(neighbours, "neighbour_strip"), np.asarray(distances, float)
    if above.shape != below.shape or gaps.shape != above.shape[:1]:
        shapes = f"samples {np.shape(samples)}, neighbours {np.shape(neighbours)}, distances {gaps.shape}"
        raise UsageError(f"neighbour_strip: {shapes} do not go together")
    columns = min(columns, len(above))
    scale = scale or _scale(above)
    gap = _gap(above, scale)
    height, width = above.shape[1] * scale, above.shape[2] * scale
    letters = _letters(height)
    margin = _margin(labels, height)
    strip = 2 * height + gap + 2 * letters  # two images, and the distance with air around it
    rows = math.ceil(len(above) / columns)
    canvas = _canvas(rows * (strip + gap) - gap, margin + columns * (width + gap) - gap)
    for index, (sample, neighbour, distance) in enumerate(zip(above, below, gaps, strict=True)):
        top, left = (index // columns) * (strip + gap), margin + (index % columns) * (width + gap)
        _paste(canvas, sample, top, left, scale)
        _paste(canvas, neighbour, top + height + gap, left, scale)
        _write(canvas, f"{distance:.2f}", left + width // 2, top + strip - letters, "mm", letters)
    for row in range(rows):
        middles = (height // 2, height + gap + height // 2, strip - letters)
        for label, middle in zip(labels, middles, strict=True):
            _write(canvas, label, margin - letters, row * (strip + gap) + middle, "rm", letters)
    return _save_png(canvas, path)


def captioned_rows(
    rows: Sequence[ArrayLike],
    captions: Sequence[Sequence[str]],
    path: PathLike,
    labels: Sequence[str] | None = None,
    header: Sequence[str] = (),
    scale: int | None = None,
    command: str | None = None,
) -> Path:
    """Rows of any lengths, each image (N_r, C, H, W) with a caption of one or more lines below it.

    `labels` name the rows; `header` names the columns, as many as it has words. `command`, what made it, goes into the file as text.
    """
    pixels = [_pixels(row, "captioned_rows") for row in rows]
    if len({row.shape[1:] for row in pixels}) != 1 or [len(row) for row in pixels] != [len(row) for row in captions]:
        raise UsageError(f"captioned_rows: images {[np.shape(row) for row in rows]} and captions {[len(row) for row in captions]} do not go together")
    if labels is not None and len(labels) != len(rows):
        raise UsageError(f"captioned_rows: {len(labels)} labels for {len(rows)} rows")
    scale = scale or _scale(pixels[0])
    height, width, gap = pixels[0].shape[1] * scale, pixels[0].shape[2] * scale, _gap(pixels[0], scale)
    letters = _fitting([line for row in captions for caption in row for line in caption.splitlines()], width, _letters(height))
    lines = max((len(caption.splitlines()) for row in captions for caption in row), default=0)
    strip = height + gap + round(1.25 * letters * lines)
    top = round(1.6 * _letters(height)) if header else 0
    margin = _margin(labels, height)
    across = max(max(map(len, pixels)), len(header))
    canvas = _canvas(top + len(rows) * (strip + gap) - gap, margin + across * (width + gap) - gap)
    for column, word in enumerate(header):
        _write(canvas, word, margin + column * (width + gap) + width // 2, top // 2, "mm", _fitting(header, width, _letters(height)))
    for number, (row, below) in enumerate(zip(pixels, captions, strict=True)):
        y = top + number * (strip + gap)
        for column, (image, caption) in enumerate(zip(row, below, strict=True)):
            x = margin + column * (width + gap)
            _paste(canvas, image, y, x, scale)
            for line, words in enumerate(caption.splitlines()):
                _write(canvas, words, x + width // 2, y + height + gap // 2 + round(1.25 * letters * (line + 0.5)), "mm", letters)
        if labels is not None:
            _write(canvas, labels[number], margin - _letters(height), y + height // 2, "rm", _letters(height))
    return _save_png(canvas, path, command)


def morph_strip(
    start: ArrayLike,
    curves: Sequence[ArrayLike],
    end: ArrayLike,
    path: PathLike,
    labels: Sequence[str],
    scale: int | None = None,
    command: str | None = None,
) -> Path:
    """Ways from one image to another, a row for each: the image `start` (C, H, W), the images (N, C, H, W) along the curve, the image `end`.

    The two images themselves stand apart from what was decoded. `labels` name the rows; `command`, what made it, goes into the file as text.
    """
    ends = _pixels(np.stack([np.asarray(start), np.asarray(end)]), "morph_strip")
    rows = [_pixels(curve, "morph_strip") for curve in curves]
    if not rows or {row.shape for row in rows} != {(len(rows[0]), *ends.shape[1:])} or len(labels) != len(rows):
        shapes = f"ends {np.shape(start)} and {np.shape(end)}, curves {[np.shape(curve) for curve in curves]}, {len(labels)} labels"
        raise UsageError(f"morph_strip: {shapes} do not go together")
    scale = scale or _scale(ends)
    gap, height, width = _gap(ends, scale), ends.shape[1] * scale, ends.shape[2] * scale
    apart, margin, steps = 3 * gap, _margin(labels, height), len(rows[0])
    first = margin + width + apart
    last = first + steps * (width + gap) - gap + apart
    canvas = _canvas(len(rows) * (height + gap) - gap, last + width)
    for number, row in enumerate(rows):
        y = number * (height + gap)
        _paste(canvas, ends[0], y, margin, scale)
        _paste(canvas, ends[1], y, last, scale)
        for column, image in enumerate(row):
            _paste(canvas, image, y, first + column * (width + gap), scale)
        _write(canvas, labels[number], margin - _letters(height), y + height // 2, "rm", _letters(height))
    return _save_png(canvas, path, command)


def animation(frames: ArrayLike, path: PathLike, milliseconds: int = 80, scale: int | None = None, command: str | None = None) -> Path:
    """Images (N, C, H, W) one after the other as a GIF that starts over for ever, each shown so long (equal neighbours as one frame of twice that).

    `command`, what made it, goes into the file as its comment.
    """
    from PIL import Image

    pixels = _pixels(frames, "animation")
    if milliseconds < 10:
        raise UsageError(f"animation: milliseconds is {milliseconds}: at least 10 are needed")
    scale = scale or 2 * _scale(pixels)
    grey = bool((pixels == pixels[..., :1]).all())
    shown = [image.repeat(scale, axis=0).repeat(scale, axis=1) for image in pixels]
    pictures = [Image.fromarray(np.ascontiguousarray(image[..., 0]) if grey else image) for image in shown]
    told = {"comment": command.encode()} if command else {}
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=False, **told)
    return write_atomically(path, buffer.getvalue())


def _fitting(words: Sequence[str], width: int, size: int) -> int:
    """The size of letters, at most `size`, at which every word fits into a width; 9 at least."""
    widest = max((_font(size).getlength(word) for word in words), default=0)
    return max(9, min(size, int(size * width / widest))) if widest else size


def _pixels(images: ArrayLike, where: str) -> Pixels:
    """Images as (N, H, W, 3) uint8."""
    array = np.asarray(images)
    if array.ndim != 4 or not array.size or array.shape[1] not in (1, 3):
        raise UsageError(f"{where}: images must have shape (N, C, H, W) with C = 1 or 3, not {array.shape}")
    if array.dtype != np.uint8 and (array.dtype.kind != "f" or not ((array >= 0) & (array <= 1)).all()):
        raise UsageError(f"{where}: images must be uint8 or finite floats in [0, 1]")
    return np.repeat(to_uint8(array), 3 // array.shape[1], axis=1).transpose(0, 2, 3, 1)


def _scale(pixels: Pixels) -> int:
    return max(1, round(112 / int(max(pixels.shape[1:3]))))


def _gap(pixels: Pixels, scale: int) -> int:
    return max(1, round(int(max(pixels.shape[1:3])) * scale / 16))


def _letters(height: int) -> int:
    """The size of letters beside images of this height: about that of a caption when ten images fill a column."""
    return max(9, round(height * 0.23))


def _margin(labels: Sequence[str] | None, height: int) -> int:
    if not labels:
        return 0
    font = _font(_letters(height))
    return math.ceil(max(font.getlength(label) for label in labels)) + 2 * _letters(height)


def _canvas(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), 255, np.uint8)


def _paste(canvas: Pixels, image: Pixels, top: int, left: int, scale: int) -> None:
    big = image.repeat(scale, axis=0).repeat(scale, axis=1)
    canvas[top : top + big.shape[0], left : left + big.shape[1]] = big


def _write(canvas: Pixels, text: str, x: int, y: int, anchor: str, size: int) -> None:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(canvas)
    ImageDraw.Draw(picture).text((x, y), text, fill=(0, 0, 0), font=_font(size), anchor=anchor)
    canvas[:] = np.asarray(picture)


@cache
def _font(size: int) -> FreeTypeFont:
    """The letters of the other figures; they come with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    letters = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
    # the basic layout engine is in every build of Pillow: the same bytes with and without libraqm
    return ImageFont.truetype(letters, size, layout_engine=ImageFont.Layout.BASIC)


def _save_png(canvas: Pixels, path: PathLike, command: str | None = None) -> Path:
    """Write a PNG, as grey when it is: a third of the bytes."""
    from PIL import Image, PngImagePlugin

    grey = (canvas == canvas[..., :1]).all()
    told = PngImagePlugin.PngInfo()
    if command:
        told.add_text("Command", command)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(canvas[..., 0]) if grey else canvas).save(buffer, "PNG", optimize=False, pnginfo=told)
    return write_atomically(path, buffer.getvalue())
