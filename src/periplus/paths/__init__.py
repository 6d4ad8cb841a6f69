"""Minimal-cost paths between two images in the latent space of any differentiable decoder.

    U(Z) = int_0^1 c(Z(t)) ||Z'(t)|| dt,     c(z) = ||G(z) - x_A||^2 + ||G(z) - x_B||^2,     Z(0) = z_A, Z(1) = z_B

The norm can be read as it stands (`norm="length"`: a line integral, whatever the speed) or squared (`norm="energy"`). Both are minimisations of one
energy (periplus.paths.energy), solved for many pairs at once by L-BFGS in the metric of the path (periplus.paths.solver), from coarse to fine and
from many beginnings (periplus.paths.searching), measured by quadrature to a stated accuracy (periplus.paths.measuring), with what no path can
undercut beside it (periplus.paths.bounds).

    path = minimal_path(run.decode, z_a, z_b, x_a, x_b)
    path.cost, path.lower_bound       # U of the returned polyline, and what every path costs at least
    path.score                        # U~ = U / (Dist^2 l / 2): 1 would be free of any detour through other images, 4/3 is a cross-fade
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from periplus.errors import NonFiniteError, UsageError
from periplus.paths.bounds import certified_lipschitz, floor, lipschitz_floor
from periplus.paths.costs import Cost, Decoder, ImageCost, PairCost, ScalarCost
from periplus.paths.measuring import measure, measure_curve
from periplus.paths.searching import CONVERGED, Found, search
from periplus.paths.starts import WIDEST, spherical, spherical_with_speed, straight

__all__ = ["CONVERGED", "Path", "certified_lipschitz", "minimal_path", "minimal_path_for_cost"]

Norm = Literal["length", "energy"]
OnProgress = Callable[[int, int], None]
POWERS: dict[str, int] = {"length": 2, "energy": 1}
#: Pairs that are searched at once.
CHUNK = 128
#: Relative quadrature error that is enough for the straight line; steps along the spherical arc.
COMPARED, ARC_STEPS = 1e-3, 32
#: Points of quadrature to a segment of a second search, for pairs whose first one ended where no path may go.
CAREFUL = 16


@dataclass(frozen=True)
class Path:
    """The cheapest paths that were found between P pairs of codes, and what bounds them. Costs are in the units of U.

    Attributes:
        points: (P, N+1, d), the nodes. norm: how U's norm is read.
        cost: (P,) U integrated along the polyline through the nodes. quadrature_error: (P,) relative, of `cost`.
        straight_cost, spherical_cost: (P,) U of the straight line and of spherical interpolation with the same ends, to 1e-3.
        lower_bound: (P,) what every path between these ends costs at least. floor: (P,) that bound without a Lipschitz constant, Dist^2 l / 2
            (length) or Dist^2 l^2 / 2 (energy); 0 for a general cost.
        score: (P,) cost / floor, at least 1; nan for a general cost.
        converged: (P,) whether the residual is at most CONVERGED: a stationary path of the discrete problem, not a proof of a global minimum.
        residual: (P,) the gradient's norm over the path's own, in the path's metric. iterations: (P,) on the last polyline.
        minima: (P,) distinct local minima that the search met on its coarsest polyline. start: which beginning the path came from.
        ends: (P, 2) which of the alternative ends were used. quadrature: (P,) points to a segment in the last minimisation.
        distance: (P,) l = ||z_A - z_B||. image_distance: (P,) Dist^2, nan for a general cost.
    """

    points: Tensor
    norm: str
    cost: Tensor
    quadrature_error: Tensor
    straight_cost: Tensor
    spherical_cost: Tensor
    lower_bound: Tensor
    floor: Tensor
    score: Tensor
    converged: Tensor
    residual: Tensor
    iterations: Tensor
    minima: Tensor
    start: list[str]
    ends: Tensor
    quadrature: Tensor
    distance: Tensor
    image_distance: Tensor

    def __len__(self) -> int:
        return len(self.points)

    @property
    def gap(self) -> Tensor:
        """(P,) cost / lower_bound - 1: the path is at most this much dearer than the best there is. inf without a bound."""
        return torch.where(self.lower_bound > 0, (self.cost / self.lower_bound - 1).clamp(min=0), torch.inf)

    @property
    def status(self) -> list[str]:
        """'converged', 'coincident ends', or 'not converged' for each pair."""
        same = self.distance == 0
        return [
            "coincident ends" if s else "converged" if c else "not converged" for s, c in zip(same.tolist(), self.converged.tolist(), strict=True)
        ]

    @property
    def straight_points(self) -> Tensor:
        """(P, N+1, d) nodes of the straight lines."""
        return straight(self.points[:, 0], self.points[:, -1], self.points.shape[1] - 1).to(self.points.dtype)

    @property
    def spherical_points(self) -> Tensor:
        """(P, N+1, d) nodes of spherical interpolation."""
        return spherical(self.points[:, 0], self.points[:, -1], self.points.shape[1] - 1).to(self.points.dtype)

    def record(self) -> list[dict[str, Any]]:
        """One JSON-ready record for each pair, without the points."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("points", "norm")}
        columns |= {"gap": self.gap, "status": self.status}
        listed = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in columns.items()}
        rows = [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)]
        return [{name: None if isinstance(v, float) and not abs(v) < float("inf") else v for name, v in row.items()} for row in rows]


def minimal_path(
    decode: Decoder,
    z_a: Tensor,
    z_b: Tensor,
    x_a: Tensor,
    x_b: Tensor,
    segments: int = 64,
    norm: Norm = "length",
    *,
    everywhere: bool = True,
    tolerance: float = CONVERGED,
    lipschitz: float | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Path:
    """The cheapest path found between the codes of each pair of images.

    Args:
        decode: codes (..., d) to images (..., C, H, W), differentiable; each code on its own.
        z_a, z_b: (P, d) codes of the ends, or (P, A, d) alternatives for each (other inversions of the same image): the cheapest choice is used.
        x_a, x_b: (P, C, H, W) the images; uint8 is scaled to [0, 1].
        segments: N, straight pieces of the returned path.
        norm: "length", U = int c ||Z'|| dt, or "energy", U = int c ||Z'||^2 dt.
        everywhere: search globally (lines, arcs, detours over cheap places; up to 8 dimensions a graph as well), or only downhill from the line.
        tolerance: the residual to stop at. A larger one than CONVERGED is faster, and the path is then not called converged.
        lipschitz: a constant L that holds for decode everywhere, ||G(z) - G(z')|| <= L |z - z'|, for a better lower bound (`certified_lipschitz`).
        seed: of the places that are tried. on_progress: called with (pairs done, pairs).

    Raises:
        UsageError: shapes that do not fit, the same image at both ends of a pair, an unknown norm.
        NonFiniteError: a code, an image or the cost of an end that is not finite.

    Squared errors are sums over pixels. What is guaranteed is `cost` (to `quadrature_error`), `lower_bound`, and
    a stationary path where `converged`; that no cheaper path exists is not, and `gap` says by how much it could be.
    """
    power = check(z_a, z_b, segments, norm, tolerance)
    x_a, x_b = (as_images(x, len(z_a), name) for x, name in ((x_a, "x_a"), (x_b, "x_b")))
    dtype = torch.promote_types(z_a.dtype, z_b.dtype)
    a, b, owner = all_ends(z_a.to(dtype), z_b.to(dtype))
    if x_a.shape != x_b.shape:
        raise UsageError(f"x_a and x_b have shapes {tuple(x_a.shape)} and {tuple(x_b.shape)}: the same is needed")
    if lipschitz is not None and not lipschitz >= 0:
        raise UsageError(f"lipschitz is {lipschitz}: zero or a positive number is needed")
    cost = ImageCost(decode, x_a.to(dtype), x_b.to(dtype))
    check_ends(cost, a, b, owner)
    squared = cost.scale
    found, value, error = in_chunks(a, b, owner, cost, segments, power, everywhere, seed, tolerance, on_progress)
    codes = found.points[:, [0, -1]]
    away = ((cost(codes, torch.arange(len(codes), device=codes.device)) - 0.5).clamp(min=0) / 2 * squared[:, None]).sqrt()  # r = ||G - M||
    distance = (codes[:, 1] - codes[:, 0]).norm(dim=1)
    least = floor(squared, distance, power)
    bound = least if lipschitz is None else lipschitz_floor(squared, distance, away[:, 0], away[:, 1], lipschitz, power)
    return finish(found, value, error, cost, power, norm, least, bound, squared, z_a, z_b)


def minimal_path_for_cost(
    cost: Cost,
    z_a: Tensor,
    z_b: Tensor,
    segments: int = 64,
    norm: Norm = "length",
    *,
    everywhere: bool = True,
    tolerance: float = CONVERGED,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Path:
    """The same for any scalar cost c: codes (..., d) -> (...), c > 0, differentiable or constant. `score` is nan, `lower_bound` 0.

    A path never goes where c is not a positive number, as far as points can tell: places narrower than a quarter of a segment may be stepped over.
    Where no way round was found the cost is infinite. Raises UsageError as `minimal_path` does, and where an end has no positive cost.
    """
    power = check(z_a, z_b, segments, norm, tolerance)
    dtype = torch.promote_types(z_a.dtype, z_b.dtype)
    a, b, owner = all_ends(z_a.to(dtype), z_b.to(dtype))
    first = torch.tensor([int((owner == k).nonzero()[0]) for k in range(len(z_a))], device=a.device)
    priced = ScalarCost(cost, a[first], b[first])
    check_ends(priced, a, b, owner)
    found, value, error = in_chunks(a, b, owner, priced, segments, power, everywhere, seed, tolerance, on_progress)
    nothing = torch.zeros_like(priced.scale)
    return finish(found, value, error, priced, power, norm, nothing, nothing, nothing * torch.nan, z_a, z_b)


# ---- checking what came in --------------------------------------------------------------------------------------------------------------------


def check(z_a: Tensor, z_b: Tensor, segments: int, norm: str, tolerance: float) -> int:
    """The power of c in the energy. Raises for what cannot be served."""
    if norm not in POWERS:
        raise UsageError(f"norm is {norm!r}: use 'length' or 'energy'")
    if segments < 1:
        raise UsageError(f"segments is {segments}: at least 1 is needed")
    if not tolerance > 0:
        raise UsageError(f"tolerance is {tolerance}: a positive number is needed")
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        if z.dim() not in (2, 3) or not z.is_floating_point():
            raise UsageError(f"{name} has shape {tuple(z.shape)} and type {z.dtype}: floating codes (P, d), or alternatives (P, A, d), are needed")
        if not bool(z.isfinite().all()):
            raise NonFiniteError(f"{name} holds a code that is not finite")
    if not len(z_a) or len(z_a) != len(z_b) or z_a.shape[-1] != z_b.shape[-1]:
        raise UsageError(f"z_a and z_b have shapes {tuple(z_a.shape)} and {tuple(z_b.shape)}: as many pairs of as many dimensions are needed")
    return POWERS[norm]


def as_images(images: Tensor, pairs: int, name: str) -> Tensor:
    """Images (P, C, H, W) as floats; uint8 to [0, 1]."""
    if images.dim() != 4 or len(images) != pairs:
        raise UsageError(f"{name} has shape {tuple(images.shape)}: {pairs} images (P, C, H, W) are needed")
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    if not scaled.is_floating_point():
        raise UsageError(f"{name} has type {images.dtype}: uint8 or floating images are needed")
    if not bool(scaled.isfinite().all()):
        raise NonFiniteError(f"{name} holds an image that is not finite")
    return scaled


def check_ends(cost: PairCost, z_a: Tensor, z_b: Tensor, owner: Tensor) -> None:
    """Raise NonFiniteError where an end's cost is not a positive number: a search would leave it out, and end elsewhere."""
    usable = cost(torch.stack([z_a, z_b], 1).double(), owner)
    bad = ~((usable > 0) & usable.isfinite()).all(1)
    if bool(bad.any()):
        raise NonFiniteError(f"the cost of an end of pair {int(owner[bad][0])} is not a positive finite number: its code, or what decode makes of it")


def all_ends(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every choice of ends: codes (R, d) twice, and the pair (R,) of each."""
    a, b = (z.detach() if z.dim() == 3 else z.detach()[:, None] for z in (z_a, z_b))
    pairs, n, m = len(a), a.shape[1], b.shape[1]
    left = a[:, :, None].expand(-1, -1, m, -1).reshape(pairs * n * m, -1)
    right = b[:, None].expand(-1, n, -1, -1).reshape(pairs * n * m, -1)
    owner = torch.arange(pairs, device=a.device).repeat_interleave(n * m)
    return left, right, owner


# ---- searching and reporting ------------------------------------------------------------------------------------------------------------------


class _Chosen(PairCost):
    """The cost of some of the pairs, numbered from 0."""

    def __init__(self, cost: PairCost, numbers: Tensor) -> None:
        self.inner, self.numbers = cost, numbers
        super().__init__(cost.scale[numbers], cost.dtype)

    def raw(self, z: Tensor, pairs: Tensor) -> Tensor:
        return self.inner.raw(z, self.numbers[pairs])


def in_chunks(
    z_a: Tensor,
    z_b: Tensor,
    owner: Tensor,
    cost: PairCost,
    segments: int,
    power: int,
    everywhere: bool,
    seed: int,
    tolerance: float,
    on_progress: OnProgress | None,
) -> tuple[Found, Tensor, Tensor]:
    """Search and measure chunk by chunk: memory does not grow with the number of pairs. Returns what was found, U in the scale, its error."""
    pairs, parts, measured = int(owner.max()) + 1, [], []
    for first in range(0, pairs, CHUNK):
        rows = (owner >= first) & (owner < first + CHUNK)
        some, mine = _Chosen(cost, torch.arange(first, min(first + CHUNK, pairs), device=z_a.device)), owner[rows] - first
        a, b = z_a[rows].double(), z_b[rows].double()
        ellipse = reach(a, b, some, mine) if everywhere else (b - a).norm(dim=1)  # downhill from the line nothing is looked for
        found = search(a, b, some, mine, segments, power, ellipse, everywhere, seed, tolerance)
        numbers = torch.arange(len(found.points), device=a.device)
        value, error = measure(found.points, some, numbers, power)
        failed = ~value.isfinite()  # it goes where it may not
        if bool(failed.any()):
            found = again(found, failed, a, b, some, mine, segments, power, ellipse, seed, tolerance)
            value[failed], error[failed] = measure(found.points[failed], some, numbers[failed], power)
        parts.append(found)
        measured.append(torch.stack([value, error]))
        if on_progress is not None:
            on_progress(min(first + CHUNK, pairs), pairs)
    joined = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Found)}
    names = [name for part in joined.pop("names") for name in part]
    value, error = torch.cat(measured, 1)
    return Found(names=names, **{name: torch.cat(part) for name, part in joined.items()}), value, error


def again(
    found: Found,
    failed: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    cost: PairCost,
    owner: Tensor,
    segments: int,
    power: int,
    ellipse: Tensor,
    seed: int,
    tolerance: float,
) -> Found:
    """The failed pairs (P,) of a chunk searched once more: everywhere, wider, and with CAREFUL points to a segment."""
    numbers = failed.nonzero()[:, 0]
    rows = failed[owner]
    some = _Chosen(cost, numbers)
    wide = (z_b - z_a).norm(dim=1)[rows].maximum(ellipse[rows].nan_to_num(0, 0, 0))
    mine = torch.searchsorted(numbers, owner[rows])
    other = search(z_a[rows], z_b[rows], some, mine, segments, power, wide, True, seed, tolerance, CAREFUL * segments)
    joined = {f.name: getattr(found, f.name).clone() for f in fields(Found) if f.name != "names"}
    for name, value in joined.items():
        value[numbers] = getattr(other, name)
    names = list(found.names)
    for number, new in zip(numbers.tolist(), other.names, strict=True):
        names[number] = new
    return Found(names=names, **joined)


def reach(z_a: Tensor, z_b: Tensor, cost: PairCost, pairs: Tensor) -> Tensor:
    """(R,) half the largest sum of distances to the ends at which the search looks for detours.

    For images in the length reading nothing better lies beyond U_line / Dist^2 (periplus.paths.starts), which is U_line in units of the cost's scale;
    other costs have no such limit, and WIDEST distances of the ends stand for it.
    """
    distance = (z_b - z_a).norm(dim=1)
    line = distance * cost(straight(z_a, z_b, 16), pairs).mean(1)  # a rough figure will do: it bounds a search, not a result
    return torch.minimum(torch.maximum(line.nan_to_num(torch.inf), distance / 2), WIDEST * distance)


def finish(
    found: Found,
    value: Tensor,
    error: Tensor,
    cost: PairCost,
    power: int,
    norm: str,
    least: Tensor,
    bound: Tensor,
    squared: Tensor,
    z_a: Tensor,
    z_b: Tensor,
) -> Path:
    """What was found and measured, with what it is compared with and what bounds it beside it."""
    points, pairs = found.points, torch.arange(len(found.points), device=found.points.device)
    a, b = points[:, 0], points[:, -1]
    line = measure(straight(a, b, 4), cost, pairs, power, COMPARED, places=16)[0]
    arc = measure_curve(*spherical_with_speed(a, b, ARC_STEPS), cost, pairs, power)
    distance = (b - a).norm(dim=1)
    same = distance == 0
    value = torch.where(same, 0.0, value)
    left = torch.where(same, 0.0, found.residual)
    return Path(
        points=points.to(torch.promote_types(z_a.dtype, z_b.dtype)),
        norm=norm,
        cost=value * cost.scale,
        quadrature_error=error,
        straight_cost=line * cost.scale,
        spherical_cost=arc * cost.scale,
        lower_bound=bound,
        floor=least,
        score=torch.where(least > 0, (value * cost.scale / least).clamp(min=1), torch.nan),  # rounding may end a hair below
        converged=(left <= CONVERGED) & value.isfinite(),
        residual=left,
        iterations=found.iterations,
        minima=found.minima,
        start=found.names,
        ends=torch.stack([which(z_a, a), which(z_b, b)], 1),
        quadrature=found.quadrature,
        distance=distance,
        image_distance=squared,
    )


def which(z: Tensor, used: Tensor) -> Tensor:
    """(P,) which of the alternatives (P, A, d), or the only code (P, d), a path's end (P, d) is."""
    choices = z if z.dim() == 3 else z[:, None]
    return (choices.double() - used[:, None]).square().sum(2).argmin(1)
