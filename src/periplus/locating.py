"""Locating images in a run's latent space: which images, from which starts, and what the certificates say together.

    targets   = choose(images_of(run), n=10)            or read_files(run, ["a.png"])
    inversion = locate(run, targets, Search(starts=16))
    record    = inversion_record(run, targets, inversion, search)      JSON-ready, with the answers as sentences

The search itself is `periplus.inversion`; here it is given what a run knows. Starts are drawn from the law that the decoder was trained on,
each the best of a few, as a function of (seed, index of the image in its split): an image is searched from the same starts whichever images are
beside it. An autoencoder adds its encoder's guess m(x) as one more start. A ball has the
radius that contains 0.999 of that law.

The sheet asks: do several starts give the same z*? Is argmin a local minimum? The answers are computed, image by image, from the endpoints that are
certified minima: two of them in different places settle the first question with no, whatever the rest did; all of them in one place, with no endpoint
uncertified or dropped, settle it with yes for these starts; anything else leaves it open.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from periplus.config import AutoencoderConfig, nearest
from periplus.data import ImageData, formats, load_data
from periplus.data.sources import SOURCES
from periplus.errors import DataError, UsageError
from periplus.evaluation import image_size_of, splits_of
from periplus.inversion import Inversion, Kind, invert_dataset
from periplus.inversion.domains import BALL_QUANTILE
from periplus.inversion.search import Keep
from periplus.inversion.starts import POOL, Pool
from periplus.runs import Run
from periplus.seeds import stream

#: Starts that are searched together, and kept together where a long search is to be resumed: whole images, at least one.
CHUNK = {"cpu": 128, "cuda": 4096}

DomainName = Literal["ball", "free", "prior"]
#: Images done, images in all.
OnProgress = Callable[[int, int], None]
Verdict = Literal["same", "different", "undecided", "one start"]


# ---- which images -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Images to locate: uint8 (B, C, H, W), a name for each, its position in its split (or among the files), and its class where it is known."""

    images: Tensor
    names: tuple[str, ...]
    index: tuple[int, ...]
    labels: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.images)

    def at(self, rows: Sequence[int]) -> Targets:
        """Some of them, in this order."""
        names, index, labels = (tuple(values[row] for row in rows) for values in (self.names, self.index, self.labels))
        return Targets(self.images[list(rows)], names, index, labels)  # type: ignore[arg-type]

    def record(self, row: int) -> dict[str, Any]:
        """What an image is called, JSON-ready."""
        return {"name": self.names[row], "index": self.index[row], "label": self.labels[row]}


def images_of(run: Run, split: str = "test", data_root: str | os.PathLike[str] | None = None) -> ImageData:
    """A split of what a run was trained on, in the run's image size.

    A split of a named set is taken as it is published. Where the data have no such split, 'train' are the images that the run was trained on and
    'test' those that it held out. Raises UsageError for other splits and for data that have changed since, DataError where they are not found.
    """
    size = image_size_of(run.data)
    known = SOURCES.get(run.data.source)
    if known is not None and split in dict(known.splits):
        return load_data(run.data.source, split, root=data_root, image_size=size)
    if split not in ("train", "test"):
        raise UsageError(f"--split is '{split}': {run.data.source} has {', '.join(dict(known.splits)) if known else 'train and test (held out)'}")
    data = load_data(run.data.source, run.data.split, root=data_root, image_size=size)
    if data.content_hash() != run.data.sha256:
        raise UsageError(f"{run.path} was trained on other data than '{run.data.source}' gives now: give the images as --files")
    train, held_out = splits_of(run, data, Path(data_root) if data_root else None)
    if split == "test" and held_out is train:
        raise UsageError(f"{run.path} held out no images: use --split train, or --files")
    return train if split == "train" else held_out


def choose(data: ImageData, n: int | None = 10, classes: Sequence[str] = ()) -> Targets:
    """The first n images of a split, or the first n of each class (by name or number); None takes all. Raises UsageError."""
    if n is not None and n < 1:
        raise UsageError(f"--n is {n}: at least one image is needed")
    rows = [row for number in class_numbers(data, classes) for row in of_class(data, number)[:n]] if classes else list(range(len(data)))[:n]
    return pick(data, rows)


def pick(data: ImageData, rows: Sequence[int]) -> Targets:
    """The images at these positions of a split. Raises UsageError for a position outside it."""
    for row in rows:
        if not 0 <= row < len(data):
            raise UsageError(f"image {row} does not exist: {data.name} ({data.split}) has images 0 to {len(data) - 1}")
    labels = (None,) * len(rows) if data.labels is None else tuple(data.classes[data.labels[row]] for row in rows)
    return Targets(data.images[list(rows)], tuple(f"{data.split} {row}" for row in rows), tuple(rows), labels)


def class_numbers(data: ImageData, classes: Sequence[str]) -> list[int]:
    """Classes by name or number. Raises UsageError for data without labels and for unknown classes."""
    if data.labels is None:
        raise UsageError(f"--classes is {' '.join(classes)}, but {data.name} has no labels: choose images by --n, or give --files")
    numbers = []
    for word in classes:
        if word in data.classes:
            numbers.append(data.classes.index(word))
        elif word.isdecimal() and int(word) < len(data.classes):
            numbers.append(int(word))
        else:
            raise UsageError(f"--classes has '{word}'{nearest(word, data.classes)}: {data.name} has {', '.join(data.classes)}")
    return numbers


def of_class(data: ImageData, number: int) -> list[int]:
    """Where the images of a class are. Raises UsageError where there are none."""
    assert data.labels is not None
    rows: list[int] = (data.labels == number).nonzero()[:, 0].tolist()
    if not rows:
        raise UsageError(f"--classes has '{data.classes[number]}', of which {data.name} ({data.split}) has no image")
    return rows


def read_files(run: Run, files: Sequence[str | os.PathLike[str]]) -> Targets:
    """Image files in a run's image size and channels (colour becomes luminance where the run is grey). Raises DataError that names the file."""
    channels, height, width = run.image_shape
    images = []
    for file in map(Path, files):
        if not file.is_file():
            raise DataError(f"{formats.show(file)}: no such file; give image files such as a.png")
        pixels = torch.tensor(formats.resize(formats.decode_image(file)[None], (height, width)))
        if channels == 1 and pixels.shape[1] == 3:
            pixels = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).round().to(torch.uint8)
        images.append(pixels.expand(-1, channels, -1, -1))
    return Targets(torch.cat(images), tuple(Path(file).name for file in files), tuple(range(len(files))), (None,) * len(files))


# ---- searching ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """How codes are searched: fields as in `periplus.inversion.invert`. starts: draws per image; an encoder's guess comes on top."""

    starts: int = 16
    domain: DomainName = "ball"
    radius: float | None = None
    prior_weight: float | None = None
    keep: Keep = "all"
    seed: int = 0


def locate(run: Run, targets: Targets, search: Search | None = None, folder: Path | None = None, on_progress: OnProgress | None = None) -> Inversion:
    """Codes of images in a run's latent space, from many starts each, part by part; the result lies on the CPU.

    Args:
        run: whatever was trained; its decoder is searched. targets: the images. search: how.
        folder: where finished parts are kept (`invert_dataset`); a search that was stopped goes on there, to the result of one that was not.
        on_progress: called with (images done, images) after each part.

    Raises:
        UsageError: options that cannot be served. RunError: a folder with the parts of another job, or a part that cannot be read.
    """
    search = search or Search()
    if not 1 <= search.starts <= POOL:
        raise UsageError(f"--starts is {search.starts}: from 1 to {POOL} can be served")
    pool = pool_of(run, search)
    begin = starts_of(run, targets, search, pool)
    return invert_dataset(
        run.decode,
        targets.images.to(begin.device),
        begin.shape[2],
        folder,
        begin.shape[1],
        search.domain,
        radius=radius_of(run, search, pool),
        prior_weight=search.prior_weight,
        initial=begin,
        keep=search.keep,
        seed=search.seed,
        part=max(1, CHUNK.get(begin.device.type, CHUNK["cpu"]) // search.starts),
        progress=on_progress,
        job={"weights": digest_of(run.decoder.state_dict()), "starts": search.starts},  # as asked, without the guess
    )


def pool_of(run: Run, search: Search) -> Pool:
    """What the starts of a search are chosen from: draws from the law that a run's decoder was trained on."""
    return Pool(run.sample_codes(POOL, stream(search.seed, "starts")), run.decode, search.seed)


def starts_of(run: Run, targets: Targets, search: Search, pool: Pool) -> Tensor:
    """Codes (B, S, d): the starts of each image, last of them the encoder's guess where there is an encoder."""
    rows = targets.images.to(pool.codes.device).flatten(1).float() / 255
    begin = pool.starts(rows, targets.index, search.starts)
    if not has_encoder(run):
        return begin
    guess, _ = run.encode(targets.images)
    return torch.cat([begin, guess.to(begin)[:, None]], 1)


def radius_of(run: Run, search: Search, pool: Pool) -> float | None:
    """Of the ball, where none was asked for: `invert`'s own for N(0, 1), else what contains as much of the codes of this run."""
    if search.domain != "ball" or search.radius is not None or has_prior(run):
        return search.radius
    return float(pool.codes.double().norm(dim=1).quantile(BALL_QUANTILE))


def has_encoder(run: Run) -> bool:
    """Whether a run has an encoder, whose guess is one more start."""
    return isinstance(run.config, AutoencoderConfig)


def has_prior(run: Run) -> bool:
    """Whether a run's decoder was trained on N(0, 1)."""
    return getattr(run.config, "rate", "prior") == "prior"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- what was found -----------------------------------------------------------------------------------------------------------------------


def inversion_record(run: Run, targets: Targets, inversion: Inversion, search: Search) -> dict[str, Any]:
    """What an inversion found, JSON-ready, without codes.

    Returns `run`, `model`, `step`, `data`, `search` (as asked), `encoder_start`, `latent_dim`, `pixels`; of `Inversion.to_dict` domain, starts (the
    encoder's guess included), mean_error, converged, kinds, thresholds; `dropped` starts; `images`, a record for each (`image_record`); and
    `statements`, sentences made from all that.
    """
    told = inversion.to_dict()
    per_image = told.pop("images")
    record = {
        "run": str(run.path),
        "model": run.config.model,
        "step": run.step,
        "data": run.data.source,
        "search": asdict(search),
        "encoder_start": has_encoder(run),
        "latent_dim": run.config.latent_dim,
        "pixels": targets.images[0].numel(),
        **told,
        "dropped": int((~inversion.kept).sum()),
        "images": [
            targets.record(row) | image_record(inversion, row, targets.images[0].numel(), has_encoder(run), per_image[row])
            for row in range(len(targets))
        ],
    }
    return record | {"statements": inversion_statements(record)}


def image_record(inversion: Inversion, row: int, pixels: int, encoder: bool, told: dict[str, Any]) -> dict[str, Any]:
    """One image's record.

    `error` (squared, summed over pixels) and `kind` of the best endpoint, `rms` per pixel in [0, 1] units, `norm` |z*|, `on_boundary` of the ball,
    `start` that found it ('encoder' or its number), `best_share` of all starts that ended at the same code, `certified_share` of those searched to
    the end, `kinds` of these, `distinct` certified minima by code and `distinct_images` by image, `certified_error` of the lowest of them (None
    without one), `verdict` (see `verdict_of`), `minima`: error, kind, starts, frequency, norm and number of the image that each shows, lowest first.
    """
    best = int(inversion.best[row])
    kept, converged, cluster = inversion.kept[row], inversion.converged[row], inversion.cluster[row]
    settled = kept & converged
    minima = [
        {**m.to_dict(), "norm": float(m.z.norm()), "image": int(inversion.image_cluster[row][same_code(inversion, row, m.z)])}
        for m in inversion.minima(row)
    ]
    return {
        "error": told["error"],
        "rms": math.sqrt(told["error"] / pixels),
        "kind": told["kind"],
        "norm": float(inversion.z[row].norm()),
        "start": "encoder" if encoder and best == inversion.kind.shape[1] - 1 else best,
        "on_boundary": bool(inversion.domain.on_boundary(inversion.z[row])),
        "best_share": float(((cluster == cluster[best]) & kept).double().mean()),
        "certified_share": float(converged[kept].double().mean()),
        "kinds": {Kind(k).name.lower(): count for k, count in sorted(Counter(inversion.kind[row][kept].tolist()).items())},
        "distinct": told["distinct"],
        "distinct_images": len(inversion.image_cluster[row][settled].unique()),
        "certified_error": minima[0]["error"] if minima else None,
        "verdict": verdict_of(kept, converged, cluster),
        "minima": minima,
    }


def same_code(inversion: Inversion, row: int, z: Tensor) -> int:
    """The start of an image that ended at exactly this code."""
    return int((inversion.all_z[row] == z).all(1).nonzero()[0])


def verdict_of(kept: Tensor, converged: Tensor, cluster: Tensor) -> Verdict:
    """Do the starts (S,) of an image end in the same z*? `different` as soon as two certified minima differ; `same` only if nothing is left open."""
    if len(kept) < 2:
        return "one start"
    found = cluster[kept & converged].unique()
    if len(found) > 1:
        return "different"
    return "same" if bool((kept & converged).all()) else "undecided"


# ---- the answers, as sentences --------------------------------------------------------------------------------------------------------------


def inversion_statements(record: Mapping[str, Any]) -> list[str]:
    """What a record says, in sentences: accuracy, the same z*, local minima, the domain, and the encoder's guess where there was one."""
    said = [say_error(record), say_same(record), say_minima(record), say_domain(record)]
    return [*said, say_encoder(record)] if record["encoder_start"] else said


def say_error(record: Mapping[str, Any]) -> str:
    """How near the best codes come."""
    errors = [image["error"] for image in record["images"]]
    mean = sum(errors) / len(errors)
    what = f"mean squared error {mean:.4g}, from {min(errors):.3g} to {max(errors):.3g}," if len(errors) > 1 else f"squared error {mean:.4g}"
    rms = math.sqrt(mean / record["pixels"])
    return f"{count(len(errors), 'image')}: {what} summed over {record['pixels']} pixels; root mean square per pixel {rms:.3f}."


def say_same(record: Mapping[str, Any]) -> str:
    """Do different starts give the same z*?"""
    images = record["images"]
    verdicts = Counter(image["verdict"] for image in images)
    if verdicts["one start"]:
        return "The same z*? It cannot be told: one start per image was searched; use --starts 2 or more."
    different, same, undecided = verdicts["different"], verdicts["same"], verdicts["undecided"]
    lead = "No" if different else "Yes, as far as these starts tell" if not undecided else "Not settled" if same else "It cannot be told"
    parts = []
    if different:
        several = [image for image in images if image["verdict"] == "different"]
        how = f"{spread(several, 'distinct')} by code, {spread(several, 'distinct_images')} by image"
        parts.append(f"for {of(different, images)} the {record['starts']} starts end in different certified minima ({how})")
    if same:
        parts.append(f"for {of(same, images)} all {record['starts']} end in one certified minimum")
    if undecided:
        why = "not all starts were searched to the end" if record["dropped"] else "too few endpoints are certified"
        parts.append(f"for {of(undecided, images)} it is open: {why}")
    share, whose = median(image["best_share"] for image in images), " (median)" if len(images) > 1 else ""
    reached = "" if record["dropped"] else f" The best code was reached by {percent(share)} of an image's starts{whose}."
    valleys = sum(image["distinct"] > 1 and any(minimum["kind"] == "flat" for minimum in image["minima"]) for image in images)
    flat = f" For {of(valleys, images)} some of these minima are flat: different codes may be points of one valley." if valleys else ""
    return f"The same z*? {lead}: {'; '.join(parts)}.{reached}{flat}"


def say_minima(record: Mapping[str, Any]) -> str:
    """Is z* a local minimum, and of which kind?"""
    images = record["images"]
    best = Counter(image["kind"] for image in images)
    certified = {kind: n for kind, n in best.items() if is_minimum(kind)}
    others = {kind: n for kind, n in best.items() if not is_minimum(kind)}
    told = f"z* is certified as a local minimum for {of(sum(certified.values()), images)}" + (f" ({listed(certified)})" if certified else "")
    if others:
        told += f", and not for the other{'s' if sum(others.values()) > 1 else ''} ({listed(others)})"
        above = sum(image["certified_error"] is not None and not is_minimum(image["kind"]) for image in images)
        told += f"; {above} of these {'has' if above == 1 else 'have'} a certified minimum of larger error" if above else ""
    kinds = {kind: n for kind, n in record["kinds"].items() if n}
    total, minima = sum(kinds.values()), sum(n for kind, n in kinds.items() if is_minimum(kind))
    dropped = f" {count(record['dropped'], 'start')} were dropped early and are not counted." if record["dropped"] else ""
    ends = f"Of all {count(total, 'endpoint')} {minima} ({percent(minima / total)}) are certified: {listed(kinds)}.{dropped}"
    return f"A local minimum? {told}. {ends} A certificate is local: it does not say that no lower minimum exists."


def is_minimum(kind: str) -> bool:
    """Whether a kind, by its name in records, is a certified minimum."""
    return Kind[kind.upper()].is_minimum


def say_domain(record: Mapping[str, Any]) -> str:
    """Where was searched, and did that decide?"""
    domain, images = record["domain"], record["images"]
    if domain["name"] == "ball":
        edge = sum(image["on_boundary"] for image in images)
        where = "no z* lies on its boundary" if not edge else f"for {of(edge, images)} z* lies on its boundary, where codes outside it may fit better"
        return f"Searched in the ball |z| <= {domain['radius']:.4g}, where a minimum exists; {where}."
    if domain["name"] == "prior":
        return f"Searched everywhere with {domain['weight']:g} |z|^2 added to the error: z* is the best compromise, not the best reconstruction."
    escaped = record["kinds"]["escaped"]
    ran = (
        f"{count(escaped, 'start')} ran off beyond |z| = {domain['escape_radius']:.3g}, and argmin may lie at infinity"
        if escaped
        else "no start ran off"
    )
    return f"Searched everywhere, where no minimum need exist: {ran}."


def say_encoder(record: Mapping[str, Any]) -> str:
    """Did the encoder know?"""
    images = record["images"]
    won = sum(image["start"] == "encoder" for image in images)
    return f"One of the {record['starts']} starts was the encoder's guess: it led to the lowest error for {of(won, images)}."


def count(n: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def of(n: int, things: Sequence[Any], noun: str = "image") -> str:
    """3 of 10 images."""
    return f"{n} of {count(len(things), noun)}"


def percent(part: float, digits: int = 0) -> str:
    """43 % for 0.43."""
    return f"{100 * part:.{digits}f} %"


def listed(counts: Mapping[str, int]) -> str:
    """5 smooth, 3 kink."""
    return ", ".join(f"{n} {kind}" for kind, n in counts.items())


def spread(records: Sequence[Mapping[str, Any]], key: str) -> str:
    """2 to 9, or 3 where all are alike."""
    low, high = min(r[key] for r in records), max(r[key] for r in records)
    return f"{low}" if low == high else f"{low} to {high}"
