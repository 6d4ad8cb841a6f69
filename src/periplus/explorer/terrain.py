"""What a run affords to somebody who explores it: everything as plain values, JSON-ready, images as base64 of their bytes (C, H, W).

Directions. Codes of N(0, 1) look the same from all sides, so principal components of codes say nothing, and those of images are no directions in
latent space. The decoder tells: with J(z) its Jacobian, a step v changes the image by |J(z) v|, and

    M = E_z[ J(z)' J(z) ]          z from the law that the decoder was trained on, (d, d)

is the metric that it pulls back to latent space, averaged (Arvanitidis, Hansen and Hauberg 2018, "Latent space oddity", call J'J the pull-back
metric). In coordinates w in which codes are white, z = mu + C^1/2 w, its eigenvectors of C^1/2 M C^1/2 are orthogonal directions in order of how much
the image changes per standard deviation of codes; the root of an eigenvalue says by how much (root of summed squares over pixels).

Rates. An autoencoder charges rate(x) = sum_j rate_j(x) nats over the dimensions of its code (`periplus.channels`). The k dearest dimensions of m(x),
with the mean of all codes in the others, reconstruct x at the rate of those k: one run shows a whole ladder of rates.
"""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from periplus.data import ImageData
from periplus.errors import DataError, UsageError
from periplus.inversion import Inversion, Kind, Snapshot, invert
from periplus.inversion.starts import Pool
from periplus.locating import Search, Targets, has_encoder, has_prior, image_record, images_of, inversion_record, pick, pool_of, radius_of, starts_of
from periplus.passages import along
from periplus.paths import Path as Passage
from periplus.paths import certified_lipschitz, minimal_path
from periplus.runs import Run
from periplus.training.autoencoder import distortion_of

#: Directions shown, codes over which the metric is averaged.
DIRECTIONS, PROBES = 8, 32
#: Codes differentiated at once.
ROWS = 512
#: A rough path downhill from the line first, then the one that `periplus path` would find: segments, residual, whether to search globally.
PASSAGES = ((16, 3e-2, False), (64, 1e-3, True))
#: The part of the side that a drawn figure fills where the data are not known: MNIST's.
FIGURE = 20 / 28
#: Points of a cost curve.
CURVE = 129
#: Reconstructions that one autoencoder shows at growing rates.
LADDER = 8

Decode = Callable[[Tensor], Tensor]
Report = Callable[[dict[str, Any]], None]


def packed(images: Tensor) -> list[str]:
    """Images (N, C, H, W) in [0, 1], or uint8, each as base64 of its bytes (the nearest of 256 levels)."""
    levels = images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return [base64.b64encode(image.cpu().contiguous().numpy().tobytes()).decode() for image in levels]


def unpacked(text: str, shape: tuple[int, int, int]) -> Tensor:
    """The image uint8 (C, H, W) of a base64 text. Raises UsageError where it is none of this shape."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        raise UsageError("an image is not base64: send the bytes of its pixels, channel by channel, row by row") from None
    if len(content) != math.prod(shape):
        raise UsageError(f"an image has {len(content)} bytes: {math.prod(shape)} are needed, {' x '.join(map(str, shape))}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


def listed(codes: Tensor) -> list[Any]:
    """Numbers with seven digits: more than float32 has are not worth sending."""
    return [float(f"{value:.7g}") for value in codes.tolist()] if codes.dim() == 1 else [listed(row) for row in codes]


class Terrain:
    """A run, with what is computed from it once, when it is first asked for; its methods may be called from several threads.

    Args:
        run: any run with a decoder. split, data_root: of the images to choose from, as for `periplus invert`. seed: of starts and samples.
    """

    def __init__(self, run: Run, split: str = "test", data_root: Path | None = None, seed: int = 0) -> None:
        self.run, self.split, self.data_root = run, split, data_root
        self.search = Search(seed=seed)
        self._kept: dict[str, Any] = {}
        self._locks = {name: threading.Lock() for name in ("data", "fit", "axes", "pool", "lipschitz")}

    @property
    def latent_dim(self) -> int:
        return self.run.config.latent_dim

    @property
    def name(self) -> str:
        """What the run is called: its folder's name."""
        return self.run.path.resolve().name

    # ---- computed once ---------------------------------------------------------------------------------------------------------------------

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes, the first time; whoever else asks meanwhile waits for it."""
        with self._locks[name]:
            if name not in self._kept:
                self._kept[name] = make()
            return self._kept[name]

    def _load(self) -> ImageData | str:
        try:
            return images_of(self.run, self.split, self.data_root)
        except (DataError, UsageError) as error:
            return str(error)

    @property
    def data(self) -> ImageData | None:
        """The images to choose from; None where they are not found (drawing and uploading still work)."""
        found = self._once("data", self._load)
        return None if isinstance(found, str) else found

    @property
    def fit(self) -> float:
        """The part of the side that a figure of the data fills (median of its longer side): what a drawing is scaled to."""
        data = self.data
        return float(self._once("fit", lambda: figure_size(data.images[:200]) if data is not None else FIGURE))

    @property
    def axes(self) -> Axes:
        """Principal directions of the decoder."""
        found: Axes = self._once("axes", lambda: principal_axes(self.run, min(DIRECTIONS, self.latent_dim), self.search.seed))
        return found

    @property
    def pool(self) -> Pool:
        """Codes that starts are chosen from, with their images."""
        found: Pool = self._once("pool", lambda: pool_of(self.run, self.search))
        return found

    @property
    def lipschitz(self) -> float | None:
        """A constant for lower bounds, where one is certified."""
        found: float | None = self._once("lipschitz", lambda: certified_lipschitz(self.run.decoder, self.run.decode, self.latent_dim))
        return found

    def warm(self) -> None:
        """Compute all of it."""
        _ = (self.fit, self.axes, self.pool, self.lipschitz)

    # ---- what is asked for -----------------------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """Name, model, shape, the classes to choose from and what is offered: at once, whatever else is still being computed."""
        data = self.data
        return {
            "name": self.name,
            "model": self.run.config.model,
            "architecture": self.run.config.architecture,
            "data": self.run.data.source if "/" not in self.run.data.source else Path(self.run.data.source).name,  # no paths of this machine
            "step": self.run.step,
            "latent_dim": self.latent_dim,
            "shape": list(self.run.image_shape),
            "beta": getattr(self.run.config, "beta", None),
            "autoencoder": has_encoder(self.run),
            "prior": has_prior(self.run),
            "starts": self.search.starts + has_encoder(self.run),
            "fit": self.fit,
            "images": 0 if data is None else len(data),
            "split": self.split,
            "classes": [] if data is None or data.labels is None else list(data.classes),
            "no_images": data is None,
        }

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[str]:
        """Images of codes (N, d)."""
        return packed(self.run.decode(codes.to(self.run.device)))

    def samples(self, count: int, seed: int) -> dict[str, Any]:
        """Codes from the law that the decoder was trained on, and their images."""
        codes = self.run.sample_codes(count, seed)
        return {"seed": seed, "codes": listed(codes), "images": self.decode(codes)}

    def gallery(self, first: int, count: int, label: int | None = None) -> dict[str, Any]:
        """Images of the split from position `first` on (of one class), with their positions and labels."""
        data = self.data
        if data is None:
            return {"total": 0, "index": [], "labels": [], "images": []}
        rows = list(range(len(data)))
        if label is not None and data.labels is not None:
            rows = (data.labels == label).nonzero()[:, 0].tolist()
        chosen = rows[first : first + count]
        targets = pick(data, chosen)
        return {"total": len(rows), "index": chosen, "labels": list(targets.labels), "images": packed(targets.images) if chosen else []}

    def target(self, index: int) -> Targets:
        """An image of the split. Raises UsageError where there is none."""
        if self.data is None:
            raise UsageError("there are no images to choose from: draw or upload one")
        return pick(self.data, [index])

    def own(self, image: Tensor, name: str) -> Targets:
        """An image (C, H, W) that came from outside."""
        return Targets(image[None], (name,), (0,), (None,))

    def race(self, targets: Targets, decode: Decode, report: Callable[[Callable[[], dict[str, Any]]], None]) -> dict[str, Any]:
        """The codes of one image from many starts; returns endpoints and certificates.

        decode: the run's own, perhaps with something that stops it. report: given, every few evaluations, a function that makes a `frame`.
        """
        begin = starts_of(self.run, targets, self.search, self.pool)
        found = invert(
            decode,
            targets.images.to(begin.device),
            begin.shape[2],
            begin.shape[1],
            self.search.domain,
            radius=radius_of(self.run, self.search, self.pool),
            initial=begin,
            seed=self.search.seed,
            on_snapshot=lambda shot: report(lambda: self.frame(shot)),
        )
        return self.ending(targets, found)

    @torch.no_grad()
    def frame(self, shot: Snapshot) -> dict[str, Any]:
        """Where the starts of one image are: errors, kinds and images of all, and their codes."""
        return {
            "stage": shot.stage,
            "evaluations": shot.evaluations,
            "errors": listed(shot.value[0]),
            "kinds": [kind_name(kind) for kind in shot.kind[0].tolist()],
            "codes": listed(shot.z[0]),
            "images": packed(self.run.decode(shot.z[0])),
        }

    @torch.no_grad()
    def ending(self, targets: Targets, found: Inversion) -> dict[str, Any]:
        """What a race came to: as a frame, with distinct minima, lowest first, and the answers as sentences."""
        record = inversion_record(self.run, targets, found, self.search)
        told = image_record(found, 0, targets.images[0].numel(), has_encoder(self.run), found.to_dict()["images"][0])
        minima = found.minima(0)
        return {
            "stage": "done",
            "errors": listed(found.all_error[0]),
            "kinds": [kind_name(kind) for kind in found.kind[0].tolist()],
            "codes": listed(found.all_z[0]),
            "images": packed(self.run.decode(found.all_z[0])),
            "best": int(found.best[0]),
            "clusters": found.cluster[0].tolist(),
            "minima": [
                {**shown, "code": listed(minimum.z), "picture": picture}
                for shown, minimum, picture in zip(told["minima"], minima, packed_codes(self.run, minima), strict=True)
            ],
            "verdict": told["verdict"],
            "statements": record["statements"],
            "radius": record["domain"].get("radius"),
        }

    def passage(self, ends: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor], decode: Decode, report: Report) -> dict[str, Any]:
        """The least-cost path found between two codes (d,), for the cost of two images uint8 (C, H, W): roughly first, then converged."""
        z_a, z_b = (z[None].to(self.run.device) for z in ends)
        x_a, x_b = (x[None].to(self.run.device).float() / 255 for x in images)
        told: dict[str, Any] = {}
        for number, (segments, tolerance, everywhere) in enumerate(PASSAGES):
            options: dict[str, Any] = {"everywhere": everywhere, "tolerance": tolerance, "lipschitz": self.lipschitz, "seed": self.search.seed}
            path = minimal_path(decode, z_a, z_b, x_a, x_b, segments, **options)
            told = {"stage": "rough" if number < len(PASSAGES) - 1 else "done", **self.priced(path, x_a, x_b)}
            report(told)
        return told

    @torch.no_grad()
    def priced(self, path: Passage, x_a: Tensor, x_b: Tensor) -> dict[str, Any]:
        """A path and its straight line: codes at equal steps of length, the price there, c / Dist^2, and what bounds the whole."""
        record = path.record()[0]
        curves = {}
        for name, points in (("line", path.straight_points), ("path", path.points)):
            codes, length = along(points, CURVE)
            shown = self.run.decode(codes).flatten(2).double()
            cost = sum((shown - x.double().flatten(1)[:, None]).square().sum(2) for x in (x_a, x_b))
            curves[name] = {"codes": listed(codes[0]), "length": listed(length[0]), "price": listed((cost / path.image_distance[:, None])[0])}
        names = ("cost", "straight_cost", "lower_bound", "floor", "score", "gap", "converged", "status", "distance", "image_distance", "minima")
        return {**curves, **{name: record[name] for name in names}, "straight_score": record["straight_cost"] / record["floor"]}

    @torch.no_grad()
    def ladder(self, image: Tensor) -> dict[str, Any]:
        """An image uint8 (C, H, W) reconstructed by an autoencoder: at its whole rate, and with only its dearest dimensions. Nats per image.

        `rate` is what the channel charges: an upper bound on the information. `distortion` is the loss's own, summed over pixels.
        Raises UsageError for a run without an encoder.
        """
        mean, log_scale = self.run.encode(image[None])
        channel, d = self.run.channel, self.latent_dim
        each = torch.cat([channel.rate(mean[:, j : j + 1], log_scale[:, j : j + 1]) for j in range(d)])  # (d,)
        order = each.argsort(descending=True, stable=True)
        kept = sorted({0, *(min(d, round(d ** (k / (LADDER - 1)))) for k in range(LADDER))})
        neutral = torch.zeros_like(mean) if has_prior(self.run) else self.pool.codes.mean(0, keepdim=True).to(mean)
        codes = []
        for count in kept:
            code = neutral.clone()
            code[:, order[:count]] = mean[:, order[:count]]
            codes.append(code)
        code = torch.cat(codes)
        sent = image[None].to(self.run.device).float().div(255).expand(len(kept), -1, -1, -1)
        cost = distortion_of(self.run.config, self.run.decoder(code).float(), sent)  # type: ignore[arg-type]
        pictures = packed(self.run.decode(code))
        return {
            "name": self.name,
            "model": self.run.config.model,
            "beta": getattr(self.run.config, "beta", None),
            "rate": float(each.sum()),
            "distortion": float(cost[-1]),
            "steps": [
                {"kept": k, "rate": float(each[order[:k]].sum()), "distortion": float(cost[n]), "image": pictures[n]} for n, k in enumerate(kept)
            ],
            "code": listed(mean[0]),
        }


def kind_name(number: int) -> str:
    """What an endpoint is called in records."""
    return Kind(number).name.lower()


def packed_codes(run: Run, minima: Sequence[Any]) -> list[str]:
    """The images of minima."""
    return packed(run.decode(torch.stack([minimum.z for minimum in minima]))) if minima else []


# ---- directions ---------------------------------------------------------------------------------------------------------------------------


class Axes:
    """Principal directions of a decoder over its law of codes.

    directions (k, d): steps of one standard deviation of codes. duals (k, d): a code's coordinates are duals @ (z - origin). origin (d,): the mean
    code. change (k,): root of the mean squared change of the image per standard deviation, summed over pixels. share (k,): of all such change.
    """

    def __init__(self, directions: Tensor, duals: Tensor, origin: Tensor, change: Tensor, share: Tensor) -> None:
        self.directions, self.duals, self.origin, self.change, self.share = directions, duals, origin, change, share

    def record(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {name: listed(getattr(self, name)) for name in ("directions", "duals", "origin", "change", "share")}


@torch.no_grad()
def principal_axes(run: Run, count: int, seed: int = 0) -> Axes:
    """The first `count` principal directions of a run's decoder (see the module's docstring)."""
    d = run.config.latent_dim
    probes = run.sample_codes(PROBES, seed)
    metric = mean_metric(run.decode, probes)
    origin, root, inverse = whitening(run, d, seed)
    values, vectors = torch.linalg.eigh(root @ metric @ root)
    values, vectors = values.flip(0).clamp(min=0)[:count], vectors.flip(1)[:, :count]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # a sign of its own, the same on every machine
    share = values / (root @ metric @ root).trace().clamp(min=1e-30)
    return Axes((root @ vectors).T, (inverse @ vectors).T, origin, values.sqrt(), share)


def mean_metric(decode: Decode, codes: Tensor) -> Tensor:
    """E[J'J] (d, d), float64, over codes (n, d): J the Jacobian of all pixels with respect to the code.

    J v is the derivative of u -> J'u along v, and that map is linear: two reverse passes make a forward one, exactly, for any decoder.
    """
    n, d = codes.shape
    rows, steps = codes.repeat_interleave(d, 0), torch.eye(d).to(codes).repeat(n, 1)
    columns = []
    for some, along_ in zip(rows.split(ROWS), steps.split(ROWS), strict=True):
        with torch.enable_grad():
            z = some.detach().requires_grad_(True)
            shown = decode(z).flatten(1)
            dual = torch.zeros_like(shown, requires_grad=True)
            (pulled,) = torch.autograd.grad(shown, z, dual, create_graph=True)
            columns.append(torch.autograd.grad(pulled, dual, along_)[0])
    jacobian = torch.cat(columns).double().view(n, d, -1)
    mean: Tensor = torch.einsum("nip,njp->ij", jacobian, jacobian) / n
    return mean.cpu()


def whitening(run: Run, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,) of a run's codes, the root (d, d) of their covariance and its inverse: exactly 0 and 1 for N(0, 1)."""
    if has_prior(run):
        eye = torch.eye(d, dtype=torch.float64)
        return torch.zeros(d, dtype=torch.float64), eye, eye
    codes = run.sample_codes(4096, seed).double().cpu()
    values, vectors = torch.linalg.eigh(codes.T.cov())
    values = values.clamp(min=1e-6 * float(values.max().clamp(min=1e-12)))
    return codes.mean(0), vectors @ torch.diag(values.sqrt()) @ vectors.T, vectors @ torch.diag(values.rsqrt()) @ vectors.T


def figure_size(images: Tensor) -> float:
    """The median, over images uint8 (N, C, H, W), of the longer side of what is brighter than a quarter, as a part of the longer side; 1 for none."""
    bright = images.amax(1) > 64
    rows, columns = (bright.any(k).double() for k in (2, 1))
    extent = [((line.cumsum(1) > 0) & (line.flip(1).cumsum(1).flip(1) > 0)).sum(1) for line in (rows, columns)]
    side = torch.stack(extent).amax(0).double() / max(images.shape[2:])
    seen = side[side > 0]
    return float(seen.median()) if len(seen) else 1.0
