"""What an endpoint is: tests of a minimum that hold on kinks as well as off them.

Scale. One number decides throughout: how much lower f could be, as a part of f. DECREASE is it; float32 resolves a few parts in 10^7 of f, so no
test in float32 can ask for much less. It bounds slopes as well: a slope g along a direction of curvature L promises a decrease of g^2 / (2 L), so

    relative slope = |gradient| / sqrt(2 L f)          L the largest curvature: the cosine between residual and what the decoder can do about it

is at most about sqrt(DECREASE) = 10^-3 wherever the test is passed, and less where the curvature is less. Tests, in this order:

    escaped     |z| beyond the domain's escape radius: the argmin may lie at infinity. Never converged
    stationary  the Newton step promises less than DECREASE: 1/2 g'B^-1 g, B the Hessian with its eigenvalues made positive (smooth), or the same
                of the best convex combination of gradients met within the neighbourhood, carried to z by the Hessian (kink: Clarke's condition,
                as in the gradient sampling of Burke, Lewis and Overton 2005). For a ball in the chart, where the boundary is no constraint. A
                relative slope below ROUNDING units in the last place is none either: in flat directions its promise is rounding
    slopes      no sampled neighbour at the neighbourhood's distance is lower by more than DECREASE: along random directions, random ones along the
                kink, downhill along the used gradients, both ways along the weakest curvature. Clarke's condition alone also holds on ridges
    curvature   smallest over largest eigenvalue of the exact Hessian on the tangent space: of the kink (the directions along which the pieces that
                meet there do not differ), of the boundary (with the multiplier's curvature added). Below -FLAT: a saddle; within +-FLAT: flat;
                above: isolated

The Hessian is that of the piece that z lies in. For a network whose kinks are flat faces (piecewise linear, then a smooth output) all pieces that
meet at a kink share its curvature along the kink, so this is exact; for curved kinks the kink's own bend is left out.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from periplus.inversion.bundle import Finish, positive_curvature
from periplus.inversion.objective import Objective

#: A decrease of f by up to this part of it is none.
DECREASE = 1e-6
#: A relative slope up to so many units in the last place is none.
ROUNDING = 100
#: Root-mean-square distance per coordinate within which gradients are gathered and slopes are taken; the prior's standard deviation is 1.
NEIGHBOURHOOD = 1e-3
#: An eigenvalue within this part of the largest is flat.
FLAT = 1e-5
#: Directions of which slopes are taken.
RANDOM, TANGENT, DOWNHILL = 24, 24, 8
DIRECTIONS = RANDOM + TANGENT + DOWNHILL + 2
#: Pieces whose gradients differ by less than this part of the scale are one piece.
SAME_PIECE = 1e-3


class Kind(enum.IntEnum):
    """What an endpoint was found to be. The first four are stationary minima (`converged`); see `periplus.inversion.certificates` for the tests."""

    SMOOTH = 0
    KINK = 1
    BOUNDARY = 2
    FLAT = 3
    SADDLE = 4
    UNFINISHED = 5
    ESCAPED = 6

    @property
    def is_minimum(self) -> bool:
        return self <= Kind.FLAT


@dataclass
class Certificates:
    """Per row: kind (n,) of `Kind`, gradient norm, relative slope, smallest eigenvalue, eigenvalue ratio, codimension of the kink, lowest sampled
    slope."""

    kind: Tensor
    gradient_norm: Tensor
    relative_slope: Tensor
    min_eigenvalue: Tensor
    eigenvalue_ratio: Tensor
    kink_codimension: Tensor
    sampled_slope: Tensor

    def put(self, rows: Tensor, other: Certificates) -> None:
        for name in self.__dataclass_fields__:
            getattr(self, name)[rows] = getattr(other, name)


def empty_certificates(n: int, device: torch.device) -> Certificates:
    """Certificates of rows that nothing is known about."""
    nan = torch.full((n,), torch.nan, dtype=torch.float64, device=device)
    kind = torch.full((n,), int(Kind.UNFINISHED), dtype=torch.int64, device=device)
    return Certificates(kind, nan.clone(), nan.clone(), nan.clone(), nan.clone(), torch.zeros_like(kind), nan.clone())


def neighbourhood(latent_dim: int) -> float:
    """The distance NEIGHBOURHOOD sqrt(d) up to which a code's surroundings count as the code."""
    return NEIGHBOURHOOD * math.sqrt(latent_dim)


def tolerance(objective: Objective, f: Tensor) -> Tensor:
    """The decrease (n,) of f that counts as none: a part of it, and what rounding leaves of an error of zero."""
    return DECREASE * f + objective.floor()


def rounding_slope(scale: Tensor, like: Tensor) -> Tensor:
    """The slope (n,) up to which a gradient is rounding."""
    return ROUNDING * torch.finfo(like.dtype).eps * scale


def newton_decrease(gradient: Tensor, hessian: Tensor) -> Tensor:
    """1/2 g'B^-1 g (n,): what a Newton step promises, B the Hessian with its eigenvalues made positive."""
    _, inverse = positive_curvature(hessian)
    promise: Tensor = 0.5 * (gradient * (inverse @ gradient[:, :, None])[:, :, 0]).sum(1)
    return promise


def slope_scale(hessian: Tensor, f: Tensor, floor: float) -> Tensor:
    """sqrt(2 L f) (n,): the largest gradient that residuals of this size allow; rounding bounds f from below."""
    largest: Tensor = torch.linalg.matrix_norm(hessian.double(), 2)
    scale: Tensor = (2 * largest * f.clamp(min=floor)).sqrt().clamp(min=1e-300)
    return scale


def certify(objective: Objective, end: Finish, image: Tensor, hessian: Tensor, directions: Tensor) -> tuple[Certificates, Tensor, Tensor]:
    """Certificates of endpoints (n rows), with the lowest point seen beside each, (n, d) in the chart, and its value (n,).

    hessian: with respect to the code, at the endpoints. directions: (RANDOM + TANGENT, d) random ones, the same for every row.
    """
    domain, bundle = objective.domain, end.bundle
    z = domain.codes(end.y)
    boundary = domain.on_boundary(z)
    gradient = domain.code_gradient(end.g[:, None].double(), end.y)[:, 0]
    pieces = domain.code_gradient(bundle.gradient, end.y)
    hessian, normal = boundary_curvature(objective, z, image, hessian.double(), boundary)
    scale = slope_scale(hessian, end.f, objective.floor())
    allowed = tolerance(objective, end.f)

    no_slope = rounding_slope(scale, end.y)
    smooth = (newton_decrease(gradient, hessian) <= allowed) | (gradient.norm(dim=1) <= no_slope)
    mean = (bundle.weight[:, :, None] * pieces).sum(1)
    slope = torch.where(smooth, gradient.norm(dim=1), mean.norm(dim=1))
    differences = (pieces - mean[:, None]) * ((bundle.weight > 0) & ~smooth[:, None])[:, :, None]
    across, codimension = kink_directions(differences, scale)
    values, vectors = tangent_spectrum(hessian, normal + across)
    lowest, best, at = sampled_slopes(objective, end, image, across, vectors, directions)
    smallest, ratio = extreme_eigenvalues(values)

    near = (bundle.distance * (bundle.weight > 0)).amax(1) <= neighbourhood(z.shape[1])
    clarke = near & ((end.whole <= allowed) | (slope <= no_slope))
    stationary = (smooth | clarke) & (best >= end.f - allowed)
    kind = torch.where(boundary, int(Kind.BOUNDARY), torch.where(smooth, int(Kind.SMOOTH), int(Kind.KINK)))
    kind = torch.where(ratio < -FLAT, int(Kind.SADDLE), torch.where(ratio <= FLAT, int(Kind.FLAT), kind))
    kind = torch.where(stationary, kind, int(Kind.UNFINISHED))
    kind = torch.where(z.norm(dim=1) > domain.escape_radius, int(Kind.ESCAPED), kind)
    return Certificates(kind, slope, slope / scale, smallest, ratio, codimension, lowest), at, best


def boundary_curvature(objective: Objective, z: Tensor, image: Tensor, hessian: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor]:
    """The Lagrangian's Hessian (H + (multiplier / radius) I on the boundary of a ball, H elsewhere) and the projector onto the normal, (n, d, d)."""
    normal = torch.zeros_like(hessian)
    if not bool(boundary.any()):
        return hessian, normal
    rows = boundary.nonzero()[:, 0]
    unit = (z[rows] / z[rows].norm(dim=1, keepdim=True)).double()
    multiplier = -(objective.code_gradient(z[rows], image[rows]).double() * unit).sum(1)
    eye = torch.eye(z.shape[1], dtype=hessian.dtype, device=z.device)
    hessian = hessian.clone()
    hessian[rows] += (multiplier / objective.domain.radius)[:, None, None] * eye
    normal[rows] = unit[:, :, None] * unit[:, None]
    return hessian, normal


def kink_directions(differences: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Projector (n, d, d) onto the directions across the kink, which the used gradients' differences (n, K, d) span, and their number (n,)."""
    _, size, directions = torch.linalg.svd(differences, full_matrices=False)
    counts = size > SAME_PIECE * scale[:, None]
    kept = directions * counts[:, :, None]
    return kept.transpose(1, 2) @ kept, counts.sum(1)


def tangent_spectrum(hessian: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, d), ascending, and vectors of the Hessian along a kink; directions across it come last, with the value infinity."""
    eye = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    along = eye - across
    top = 4 * torch.linalg.matrix_norm(hessian, 2)[:, None, None].clamp(min=1e-300)
    values, vectors = torch.linalg.eigh(along @ hessian @ along + top * across)
    return torch.where(values > 0.5 * top[:, 0], torch.inf, values), vectors


def extreme_eigenvalues(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest of (n, d), and its ratio to the largest in size; both infinite where no direction is left (a vertex)."""
    largest = torch.where(values.isfinite(), values.abs(), 0).amax(1)
    smallest = values[:, 0]
    ratio = torch.where(largest > 0, smallest / largest.clamp(min=1e-300), torch.zeros_like(smallest))
    return smallest, torch.where(smallest.isfinite(), ratio, torch.inf)


def sampled_slopes(
    objective: Objective, end: Finish, image: Tensor, across: Tensor, vectors: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest slope (f(y + e u) - f(y)) / e over sampled unit directions u at distance e, with the lowest value and where it was."""
    n, d = end.y.shape
    random = directions.double().expand(n, -1, -1)
    tangent = random[:, RANDOM:] - random[:, RANDOM:] @ across
    weakest = vectors[:, :, :1].transpose(1, 2)
    heaviest = end.bundle.weight.topk(min(DOWNHILL, end.bundle.weight.shape[1]), dim=1).indices
    downhill = -torch.gather(end.bundle.gradient, 1, heaviest[:, :, None].expand(-1, -1, d))
    u = torch.cat([random[:, :RANDOM], tangent, downhill, weakest, -weakest], 1)
    u = u / u.norm(dim=2, keepdim=True).clamp(min=1e-12)
    distance = neighbourhood(d)
    points = end.y[:, None] + (distance * u).to(end.y)
    f = objective.value(points.reshape(-1, d), image.repeat_interleave(u.shape[1])).view(n, -1)
    best, which = f.min(1)
    return (best - end.f) / distance, best, points[torch.arange(n, device=u.device), which]
