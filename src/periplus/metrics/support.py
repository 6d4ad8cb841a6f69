"""Do the samples lie where the data lie, and everywhere they lie? Four shares from balls around the rows, each out to its k-th nearest neighbour.

    precision   share of fakes inside the ball of some real row              (Kynkaanniemi et al. 2019)
    recall      share of reals inside the ball of some fake row
    density     mean number of reals' balls that a fake lies in, over k      (Naeem et al. 2020); 1 in expectation for equal laws, may exceed it
    coverage    share of reals whose ball has a fake in it

A ball is open: a fake exactly on its edge is outside. k is part of the figure: 3 is usual for precision and recall, 5 for density and coverage.
Precision and recall trust every ball, so a single outlier of a real can make all fakes precise; density and coverage do not. For equal laws and
N = M, coverage is 1 - 2^-k at best in the mean, not 1: 0.969 for k = 5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from periplus.errors import UsageError
from periplus.metrics.intervals import Z95, wilson_interval
from periplus.metrics.neighbours import nearest_neighbours
from periplus.metrics.rows import same_features


class Support(NamedTuple):
    """precision, recall, density, coverage, with the k they are for, and a 95 % interval of each.

    Intervals of precision, recall and coverage are Wilson's, of density the normal one. They take the balls as given: an interval of precision or
    density covers the choice of the fakes and not that of the reals which drew the balls; those of recall and coverage cover the choice of the
    reals that are looked up, and neither that of the fakes nor that of their neighbours. Another pair of samples varies more than they say.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int
    precision_interval: tuple[float, float]
    recall_interval: tuple[float, float]
    density_interval: tuple[float, float]
    coverage_interval: tuple[float, float]


@torch.no_grad()
def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int = 5, tile: int = 256) -> Support:
    """Precision, recall, density and coverage of features (N, F) and (M, F), in tiles of memory (tile, N + M).

    Raises UsageError for different widths, fewer than two rows, rows that are not finite, and unless 1 <= k < N and k < M.
    """
    real, fake = same_features(real=real, fake=fake)
    fewest = min(len(real), len(fake))
    if not 1 <= k < fewest:
        raise UsageError(f"k is {k}: at least 1 and less than the {fewest} rows of the smaller set is needed")
    centre = real.mean(0)  # distances do not change, and squares of small rows cancel less
    real, fake = real - centre, fake - centre
    radius_real, radius_fake = (nearest_neighbours(rows, rows, k + 1, tile).distance[:, k].square() for rows in (real, fake))
    squares = real.square().sum(1)
    balls, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    nearest = torch.full_like(squares, math.inf)
    for block, radius in zip(fake.split(tile), radius_fake.split(tile), strict=True):
        distance = torch.addmm(squares, block, real.T, alpha=-2).add_(block.square().sum(1, keepdim=True)).clamp_min_(0)  # squared, (tile, N)
        balls.append((distance < radius_real).sum(1))
        recalled |= (distance < radius[:, None]).any(0)
        nearest = torch.minimum(nearest, distance.min(0).values)
    return _assemble(torch.cat(balls), recalled, nearest < radius_real, k)


def _assemble(balls: Tensor, recalled: Tensor, covered: Tensor, k: int) -> Support:
    """From the number of reals' balls around each fake (M,), which reals lie in a fake's ball (N,), which have a fake in theirs (N,)."""
    precision, recall, coverage = (wilson_interval(int(hits.sum()), len(hits)) for hits in (balls > 0, recalled, covered))
    density = balls.double() / k
    value, half = float(density.mean()), Z95 * float(density.std()) / math.sqrt(len(density))
    return Support(
        precision.value,
        recall.value,
        value,
        coverage.value,
        k,
        (precision.low, precision.high),
        (recall.low, recall.high),
        (max(0.0, value - half), value + half),
        (coverage.low, coverage.high),
    )
