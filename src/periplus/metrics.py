"""Measures on matrices of features: pure functions, no files, no networks.

For now what a first look at a generator needs: which classes its samples fall into, how far apart they are, and which training image each is
nearest to. Rows are examples, columns features (pixels in [0, 1] will do for small images).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from periplus.errors import UsageError


class Neighbours(NamedTuple):
    """distance (Q, k): Euclidean, ascending; row (Q, k): the reference's rows that they are."""

    distance: Tensor
    row: Tensor


@torch.no_grad()
def nearest_neighbours(queries: Tensor, reference: Tensor, k: int = 1, tile: int = 2048) -> Neighbours:
    """The k nearest rows of `reference` (N, F) to each row of `queries` (Q, F), exact, in tiles of memory (tile, N).

    Ranked by |r|^2 - 2 q.r, one matrix product per tile; the distances of those found are then taken from the differences themselves, because
    the product form cancels badly exactly where it matters, at a near copy.
    """
    if not 1 <= k <= len(reference):
        raise UsageError(f"k is {k}: between 1 and the {len(reference)} reference rows is needed")
    wide = reference.double()  # in float32 the ranking itself would confuse near copies
    squares = wide.square().sum(1)
    index = torch.cat([torch.addmm(squares, q.double(), wide.T, alpha=-2).topk(k, largest=False).indices for q in queries.split(tile)])
    distance = torch.stack([(queries - reference[column]).norm(dim=1) for column in index.T], 1)
    distance, order = distance.sort(1)
    return Neighbours(distance, index.gather(1, order))


def neighbour_labels(queries: Tensor, reference: Tensor, labels: Tensor, k: int = 3) -> Tensor:
    """Class of each query (Q,) by a vote among its k nearest reference rows; ties go to the nearest of the tied."""
    votes = labels[nearest_neighbours(queries, reference, k).row]
    agreeing = (votes[:, :, None] == votes[:, None, :]).sum(2)  # how many neighbours share each neighbour's class
    return votes.gather(1, agreeing.argmax(1, keepdim=True))[:, 0]


class Share(NamedTuple):
    """A proportion with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


def class_shares(labels: Tensor, classes: int) -> list[Share]:
    """Share of each class among labels (N,), each with its 95 % Wilson score interval (Wilson 1927)."""
    count = len(labels)
    if count == 0:
        raise UsageError("class shares of no labels at all are not defined")
    return [wilson_interval(int(n), count) for n in torch.bincount(labels, minlength=classes).tolist()]


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> Share:
    """Wilson score interval of a proportion; never empty, never outside [0, 1], right at 0 and at `trials`."""
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Share(p, max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < trials else 1.0)  # 0 and 1: no rounding


@torch.no_grad()
def mean_pairwise_distance(rows: Tensor, tile: int = 2048) -> float:
    """Mean Euclidean distance over all pairs of different rows of (N, F), N >= 2; float64 accumulation."""
    if len(rows) < 2:
        raise UsageError("a mean pairwise distance needs at least two rows")
    total = math.fsum(float(torch.cdist(block, rows).sum(dtype=torch.float64)) for block in rows.split(tile))
    return total / (len(rows) * (len(rows) - 1))


def welch_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of mean(a) - mean(b) for two samples of unequal variance (Welch 1947); infinite where one has a single value or neither varies."""
    from scipy import stats

    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:  # nothing to estimate a variance from
        return (-math.inf, math.inf)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of a few values; infinite for one value, or where they do not vary."""
    from scipy import stats

    if len(values) < 2 or len(set(values)) == 1:
        return (-math.inf, math.inf)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    return float(interval.low), float(interval.high)
