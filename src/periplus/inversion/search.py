"""`invert`: codes of images from many starts, as one batch of rows, each endpoint with what it is.

    1  starts        the best of a few prior samples each (`periplus.inversion.starts`), or given
    2  descent       batched BFGS, which crosses and follows kinks (`descent`), started anew from exact Hessians
    3  finish        bundle-Newton with exact Hessians, to rounding (`bundle`)
    4  certificate   slopes, curvature, kinks (`certificates`); an endpoint that fails goes back to 2, from the lowest point seen beside it
    5  clusters      which starts found the same minimum (`clusters`)

Whoever wants to watch gets a `Snapshot` of all starts every few evaluations; what it raises ends the search.

Rows that are done leave the batch. Images are taken in chunks that keep memory bounded. An image's starts do not depend on what is beside it,
its result only through rounding, which in float32 may lead a start from a ridge into another minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from periplus.errors import NonFiniteError, UsageError
from periplus.inversion import bundle, certificates, descent
from periplus.inversion.bundle import Finish, Goal
from periplus.inversion.certificates import Certificates, Kind
from periplus.inversion.clusters import clusters, code_distance_tolerance, image_distance_tolerance
from periplus.inversion.descent import Rows
from periplus.inversion.domains import DomainName, make_domain
from periplus.inversion.objective import BYTE_BUDGET, Decode, Objective, check_decoder, takes
from periplus.inversion.solution import Inversion, join
from periplus.inversion.starts import SCREENING, Pool, check_initial, prior_codes
from periplus.seeds import stream

Keep = Literal["all", "best"]
#: Images done, images in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Snapshot:
    """Where all starts of some images are while they are searched.

    stage: "descent", "finish" or "certificate", which has just been done. first: the index of images[0] among those given to `invert`.
    z: (B, S, d) codes. value: (B, S) what is minimised, float64: squared errors summed over pixels, with the domain's prior term.
    kind: (B, S) of `Kind`, UNFINISHED where nothing is known yet. evaluations: gradients of one row that the chunk has taken.
    """

    stage: str
    first: int
    z: Tensor
    value: Tensor
    kind: Tensor
    evaluations: int


#: Called with every snapshot; an exception that it raises ends the search and reaches the caller of `invert`.
OnSnapshot = Callable[[Snapshot], None]


@dataclass(frozen=True)
class Effort:
    """How long rows are searched, in evaluations (a gradient of one row) at most; rows that rest leave earlier.

    screening: prior samples that each start is chosen from. first: BFGS from the start. second: BFGS from an exact Hessian. keep="best" leaves one
    start in `drop_first` before it and one in `drop_second` of all after it. Then so many rounds of: exact Hessian, `again` evaluations of BFGS,
    exact Hessian, `finish` of bundle-Newton, certificate.
    """

    screening: int = SCREENING
    first: int = 150
    second: int = 150
    rounds: int = 6
    again: int = 150
    finish: int = 80
    drop_first: int = 2
    drop_second: int = 8


def invert(
    decode: Decode,
    images: Tensor,
    latent_dim: int,
    starts: int = 16,
    domain: DomainName = "free",
    *,
    radius: float | None = None,
    prior_weight: float | None = None,
    initial: Tensor | None = None,
    keep: Keep = "all",
    effort: Effort | None = None,
    seed: int = 0,
    first_index: int = 0,
    byte_budget: int = BYTE_BUDGET,
    progress: Progress | None = None,
    on_snapshot: OnSnapshot | None = None,
) -> Inversion:
    """Codes z* = argmin ||G(z) - x||^2 of images, from many starts, with a certificate for each endpoint.

    Args:
        decode: G, codes (n, d) to images (n, C, H, W), each row on its own (no batch norm or dropout in training mode), differentiable twice in z by
            autograd. Decoders that `torch.func` can transform are faster; custom autograd functions work if their backward is differentiable.
        images: (B, C, H, W), floating point of any range that decode answers in; uint8 is scaled to [0, 1]. Their device is that of the search.
            float64 images are searched in float64 if decode takes float64 codes, all else in float32.
        latent_dim: d. starts: S per image.
        domain: "free" (R^d; codes that run off are marked `Kind.ESCAPED`), "ball" (|z| <= radius) or "prior" (adds prior_weight |z|^2 to what
            is minimised; `.error` stays the squared error).
        radius: of the ball; the 0.999 quantile of |z| under N(0, 1) by default. prior_weight: needed for "prior".
        initial: (B, S, d) starts of one's own, an encoder's guess for instance, instead of screened draws from N(0, 1).
        keep: "all" searches every start to its end; "best" drops the starts that lag behind early (they stay in the result, not `kept`).
        effort: evaluations and rounds. seed: of the starts; first_index: index of images[0] in its data set, so that its parts have starts
            of their own.
        byte_budget: what one chunk may hold. progress: called with (images done, images).
        on_snapshot: called with a `Snapshot` of a chunk's starts every few evaluations; the result does not depend on it.

    Raises:
        UsageError: shapes, options or a decoder that do not fit. NonFiniteError: images, or a decoder, with values that are not finite.
    """
    targets = as_targets(images, decode, latent_dim)
    if starts < 1:
        raise UsageError(f"starts is {starts}: at least one is needed")
    if keep not in ("all", "best"):
        raise UsageError(f"keep is '{keep}': use 'all' or 'best'")
    place = make_domain(domain, latent_dim, radius, prior_weight)
    objective = Objective(decode, targets.flatten(1), latent_dim, place, byte_budget)
    effort = effort or Effort()
    if initial is not None:
        check_initial(initial, len(targets), starts, latent_dim)
    begin = draw_starts(objective, starts, effort, seed, first_index) if initial is None else initial.to(targets)
    at_once = max(1, objective.rows_at_once // starts)
    parts = []
    for first in range(0, len(targets), at_once):
        some = slice(first, first + at_once)
        parts.append(_invert_chunk(objective.among(some), begin[some], keep, effort, seed, _Watch(on_snapshot, first)))
        if progress:
            progress(min(first + at_once, len(targets)), len(targets))
    return join(parts)


def draw_starts(objective: Objective, starts: int, effort: Effort, seed: int, first_index: int = 0) -> Tensor:
    """Codes (B, S, d) to start from: draws from N(0, 1) put into the domain, screened for each image."""
    codes = prior_codes(objective.latent_dim, seed).to(objective.targets)
    pool = Pool(objective.domain.codes(objective.domain.chart(codes)), objective.images, seed, objective.rows_at_once)
    return pool.starts(objective.targets, range(first_index, first_index + len(objective.targets)), starts, effort.screening)


def as_targets(images: Tensor, decode: Decode, latent_dim: int) -> Tensor:
    """Images (B, C, H, W) in the type of the search; the decoder is checked against them. Raises UsageError and NonFiniteError."""
    if images.dim() != 4 or images.numel() == 0:
        raise UsageError(f"images have shape {tuple(images.shape)}: (B, C, H, W) is needed")
    if images.dtype == torch.uint8:
        images = images.to(torch.float32) / 255
    elif not images.is_floating_point():
        raise UsageError(f"images are {images.dtype}: floating point or uint8 is needed")
    if not bool(images.isfinite().all()):
        raise NonFiniteError("images hold values that are not finite")
    wide = images.dtype == torch.float64 and takes(decode, latent_dim, images[:0])
    targets = images.detach().to(torch.float64 if wide else torch.float32)
    check_decoder(decode, latent_dim, tuple(targets.shape[1:]), targets[:0])
    return targets


class _Watch:
    """The latest codes, values and kinds of a chunk's rows, shown to `on_snapshot`; does nothing without one."""

    def __init__(self, on_snapshot: OnSnapshot | None, first: int) -> None:
        self.on_snapshot, self.first = on_snapshot, first

    def begin(self, objective: Objective, shape: tuple[int, int], rows: Rows) -> None:
        """Rows of a chunk of `shape` (B, S) are where they start."""
        self.objective, self.shape = objective, shape
        self.y, self.f = rows.y.clone(), rows.f.clone()
        self.kind = torch.full((len(rows.y),), int(Kind.UNFINISHED), device=rows.y.device)
        self("descent", torch.arange(len(rows.y), device=rows.y.device), rows.y, rows.f)

    def __call__(self, stage: str, live: Tensor, y: Tensor, f: Tensor, kind: Tensor | None = None) -> None:
        """Some rows have moved to y (n, d), with values f (n,), and perhaps a verdict."""
        if self.on_snapshot is None:
            return
        self.y[live], self.f[live] = y, f
        if kind is not None:
            self.kind[live] = kind
        z = self.objective.domain.codes(self.y).view(*self.shape, -1)
        value, kinds = (of_row.clone().view(self.shape) for of_row in (self.f, self.kind))
        self.on_snapshot(Snapshot(stage, self.first, z.clone(), value, kinds, self.objective.evaluations))


def _invert_chunk(objective: Objective, begin: Tensor, keep: Keep, effort: Effort, seed: int, watch: _Watch) -> Inversion:
    """All starts (B, S, d) of some images."""
    images, starts, d = begin.shape
    image = torch.arange(images, device=begin.device).repeat_interleave(starts)
    rows = descent.start_rows(objective.value_and_gradient, objective.domain.chart(begin.reshape(-1, d)), image)
    everyone = torch.arange(len(image), device=image.device)
    watch.begin(objective, (images, starts), rows)
    _descend(objective, rows, image, effort.first, everyone, watch, fresh=True)
    kept = _lowest(rows.f.view(images, starts), effort.drop_first if keep == "best" else 1)
    live = kept.flatten().nonzero()[:, 0]
    some = rows.take(live)
    _newton_metric(objective, some, image[live])
    _descend(objective, some, image[live], effort.second, live, watch)
    rows.put(live, some)
    kept = kept & _lowest(rows.f.view(images, starts), effort.drop_second if keep == "best" else 1)
    found = _rounds(objective, rows, image, kept.flatten().nonzero()[:, 0], effort, seed, watch)
    return _gather(objective, rows.y, found, kept)


def _lowest(f: Tensor, drop: int) -> Tensor:
    """Which starts (B, S) are among the lowest S / drop of their image (rounded up)."""
    return f.argsort(dim=1, stable=True).argsort(dim=1) < -(-f.shape[1] // drop)


def _descend(objective: Objective, rows: Rows, image: Tensor, evaluations: int, whose: Tensor, watch: _Watch, fresh: bool = False) -> None:
    """Rows, which are the rows `whose` of the chunk, lowered in place."""

    def moved(live: Tensor, y: Tensor, f: Tensor) -> None:
        watch("descent", whose[live], y, f)

    descent.descend(objective.value_and_gradient, rows, image, evaluations, objective.floor(), objective.domain.chart_reach, fresh, moved)
    rows.y = objective.domain.fold(rows.y)  # the inverse Hessian is of the other hemisphere then; it is set anew after each descent


def _newton_metric(objective: Objective, rows: Rows, image: Tensor) -> None:
    """Start BFGS anew from exact Hessians, their eigenvalues made positive."""
    _, inverse = bundle.positive_curvature(objective.hessian(rows.y, image, in_chart=True))
    rows.inverse = inverse.to(rows.y)
    rows.f, rows.g = objective.value_and_gradient(rows.y, image)


def _rounds(objective: Objective, rows: Rows, image: Tensor, live: Tensor, effort: Effort, seed: int, watch: _Watch) -> Certificates:
    """Rounds of descent, finish and certificate for the live rows, in place, until each is certified as a minimum or the rounds are spent."""
    found = certificates.empty_certificates(len(rows.y), rows.y.device)
    directions = _directions(seed, rows.y)
    for number in range(effort.rounds):
        some, which = rows.take(live), image[live]
        _newton_metric(objective, some, which)
        _descend(objective, some, which, effort.again, live, watch)
        end = _finish(objective, some.y, which, effort.finish)
        watch("finish", live, end.y, end.f)
        hessian = objective.hessian(objective.domain.codes(end.y), which)
        verdict, lowest, value = certificates.certify(objective, end, which, hessian, directions)
        found.put(live, verdict)
        watch("certificate", live, end.y, end.f, verdict.kind)
        again = (verdict.kind == Kind.UNFINISHED) | (verdict.kind == Kind.SADDLE)
        moves = again & (value < end.f) & (number < effort.rounds - 1)
        rows.y[live] = objective.domain.fold(torch.where(moves[:, None], lowest, end.y))
        live = live[again]
        if not len(live):
            break
    return found


def _finish(objective: Objective, y: Tensor, image: Tensor, evaluations: int) -> Finish:
    f, g = objective.value_and_gradient(y, image)
    hessian = objective.hessian(y, image, in_chart=True)
    nearness = certificates.neighbourhood(objective.latent_dim)
    slope = certificates.rounding_slope(certificates.slope_scale(hessian, f, objective.floor()), y)
    goal = Goal(0.5 * certificates.tolerance(objective, f), 0.5 * slope, nearness)
    return bundle.finish(objective.value_and_gradient, y, f, g, image, hessian, evaluations, goal, bundle.NEAR_STEP * nearness)


def _directions(seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(stream(seed, "directions"))
    count = certificates.RANDOM + certificates.TANGENT
    return torch.randn(count, like.shape[1], generator=generator, dtype=torch.float64).to(like.device)


def _gather(objective: Objective, y: Tensor, found: Certificates, kept: Tensor) -> Inversion:
    """Rows put back to (B, S), clustered, the best chosen."""
    images, starts = kept.shape
    image = torch.arange(images, device=y.device).repeat_interleave(starts)
    z = objective.domain.codes(y)
    error = objective.squared_error(z, image).view(images, starts)
    value = error + objective.domain.weight * z.double().square().sum(1).view(images, starts)
    shaped = {field.name: getattr(found, field.name).view(images, starts) for field in fields(Certificates)}
    best = torch.where(shaped["kind"] == Kind.ESCAPED, torch.inf, value).argmin(1)
    rows = torch.arange(images, device=y.device)
    all_z = z.view(images, starts, -1)
    with torch.no_grad():
        pictures = torch.cat([objective.images(few) for few in z.split(objective.rows_at_once)]).view(images, starts, -1)
    return Inversion(
        z=all_z[rows, best],
        error=error[rows, best],
        all_z=all_z,
        all_error=error,
        **shaped,
        converged=shaped["kind"] <= Kind.FLAT,
        cluster=clusters(all_z, value, code_distance_tolerance(all_z.shape[2])),
        image_cluster=clusters(pictures, value, image_distance_tolerance(pictures.shape[2])),
        best=best,
        kept=kept,
        domain=objective.domain,
    )
