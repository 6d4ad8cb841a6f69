"""What a polyline costs, to a stated accuracy: the figure that is reported, never the solver's own coarse energy.

    length reading   U = sum_i |d_i| int_0^1 c(Z_i + u d_i) du
    energy reading   U = N sum_i |d_i|^2 int_0^1 c(Z_i + u d_i) du          (every segment takes 1/N of the time)

Each integral by Simpson's rule with its points doubled until the whole changes by less than a part of itself; the sum of the changes of all
segments, without regard to sign, is the reported error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from periplus.paths.costs import PairCost
from periplus.paths.energy import refine

#: Relative quadrature error that is aimed at, and doublings after which it is reported as it is.
ACCURACY, DOUBLINGS = 9e-5, 8
PLACES = 48


def measure(points: Tensor, cost: PairCost, pairs: Tensor, power: int, accuracy: float = ACCURACY, places: int = PLACES) -> tuple[Tensor, Tensor]:
    """U (R,) of polylines (R, N+1, d) in units of the pair's scale, and its relative quadrature error (R,). `power`: 2 length, 1 energy reading.

    At `places` points along a polyline at least: of fewer, kinks make the change between two rules a poor estimate of the error.
    """
    lengths = points.diff(dim=1).norm(dim=2)
    factor = lengths if power == 2 else (points.shape[1] - 1) * lengths.square()
    value = torch.full((len(points),), torch.nan, dtype=torch.float64, device=points.device)
    error = torch.full_like(value, torch.inf)
    rows = torch.arange(len(points), device=points.device)
    c = cost(refine(points, 2), pairs)
    coarse = simpson(c, 2)
    parts = 2
    for _ in range(DOUBLINGS):
        c = interleave(c, cost(between(points[rows], parts), pairs[rows]))
        parts *= 2
        fine = simpson(c, parts)
        value[rows] = (factor[rows] * fine).sum(1)
        change = (factor[rows] * (fine - coarse).abs()).sum(1)
        error[rows] = torch.where(value[rows] > 0, change / value[rows], 0.0)
        error[rows] = torch.where(value[rows].isfinite(), error[rows], torch.inf)
        going = value[rows].isfinite() & ((error[rows] > accuracy) | (parts * (points.shape[1] - 1) < places))
        rows, c, coarse = rows[going], c[going], fine[going]
        if not len(rows):
            break
    return value, error


def measure_curve(points: Tensor, speed: Tensor, cost: PairCost, pairs: Tensor, power: int) -> Tensor:
    """U (R,) of smooth curves at equal steps of time, points (R, K+1, d) and speeds (R, K+1), K even, by Simpson's rule; its error is not told."""
    c, steps = cost(points, pairs), points.shape[1] - 1
    return simpson(c * (speed if power == 2 else speed.square()), steps)[:, 0]


def between(points: Tensor, parts: int) -> Tensor:
    """The middles of the `parts` equal parts of every segment: (R, N parts, d)."""
    fine = refine(points, parts)
    return (fine[:, :-1] + fine[:, 1:]) / 2


def interleave(old: Tensor, new: Tensor) -> Tensor:
    """Values at the points (R, K+1) and at the middles (R, K) in order along the path: (R, 2K+1)."""
    mixed = torch.stack([old[:, :-1], new], 2).flatten(1)
    return torch.cat([mixed, old[:, -1:]], 1)


def simpson(values: Tensor, parts: int) -> Tensor:
    """The mean over each segment, (R, N), of values at `parts` (even) equal steps: (R, N parts + 1)."""
    panels = (values[:, :-2:2] + 4 * values[:, 1:-1:2] + values[:, 2::2]) / 6
    mean: Tensor = panels.unflatten(1, (-1, parts // 2)).mean(2)
    return mean
