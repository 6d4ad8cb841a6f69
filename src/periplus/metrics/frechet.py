"""The Frechet distance of two clouds of features, each taken as a Gaussian (Dowson and Landau 1982; Heusel et al. 2017 for images).

    FD = |mu - mu'|^2 + Tr(S + S' - 2 (S S')^(1/2))           squared, in the square of the features' unit

with means mu, mu' and covariances S, S' (divisor n - 1). The trace of (S S')^(1/2) is the sum of the singular values of S^(1/2) S'^(1/2), each root
symmetric and through eigenvalues: symmetric in its arguments, never complex, and right for covariances without full rank. A general matrix square
root needs a jitter for those, and returns complex numbers all the same.

**Which interval?** FD is a smooth function of two samples, so to first order FD(sample) - FD(laws) is a mean of independent terms, one per row:

    phi(y) = 2 (mu' - mu).(y - mu') + (y - mu')^T (1 - T) (y - mu') - Tr[(1 - T) S'],      T = S^(1/2) (S^(1/2) S' S^(1/2))^(-1/2) S^(1/2)

(T transports N(mu', S') to N(mu, S)), likewise for real rows. Var phi / M + Var phi_real / N is its variance: one product of matrices. The bootstrap
costs a hundred times that and is wrong: FD is biased upwards by about c/N + c'/M, and rows drawn again carry that bias twice, so that percentile
intervals lie above the value that they are meant to hold (a test shows it). `standard_error` is of FD *at these numbers of rows*: the interval holds
what the mean over new samples of the same sizes would be. Where the two laws are equal the first-order term vanishes and phi, taken at the samples,
gives up to sqrt(2) times the standard deviation: the interval is then too wide, not too narrow.

**The limit of infinitely many rows** (Chong and Forsyth 2020): FD at several numbers of rows, a line in 1/n, its value at 1/n = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from periplus.errors import UsageError
from periplus.metrics.intervals import Z95
from periplus.metrics.rows import feature_rows, same_features


@dataclass(frozen=True)
class Moments:
    """What FD needs of a cloud: mean (F,), covariance (F, F) with divisor count - 1, number of rows; float64."""

    mean: Tensor
    covariance: Tensor
    count: int


class FrechetDistance(NamedTuple):
    """FD of two samples of features.

    value: the squared distance, biased upwards by finite samples. standard_error, low, high: of the value at these numbers of rows (95 %); they do
    not hold the value at infinitely many (see `frechet_distance_infinite`). real, fake: rows.
    """

    value: float
    standard_error: float
    low: float
    high: float
    real: int
    fake: int


class Point(NamedTuple):
    """FD, averaged over disjoint blocks of the rows; real, fake: rows of a block (their mean, where blocks differ by one)."""

    real: float
    fake: float
    value: float


class Extrapolation(NamedTuple):
    """FD at infinitely many rows, from a line through FD at several numbers of rows.

    value: the intercept; it may be negative, being unbiased to first order where the truth is 0. standard_error, low, high: of the intercept as an
    estimate of FD of the two laws. slope: of FD against full rows / rows. fit_error: standard deviation of the points around the line. points: these.
    """

    value: float
    standard_error: float
    low: float
    high: float
    slope: float
    fit_error: float
    points: tuple[Point, ...]


def moments(rows: Tensor) -> Moments:
    """Mean and covariance (divisor N - 1) of features (N, F), N >= 2."""
    return _moments(feature_rows("rows", rows))


def _moments(rows: Tensor) -> Moments:
    mean = rows.mean(0)
    centred = rows - mean
    return Moments(mean, centred.T @ centred / (len(rows) - 1), len(rows))


def frechet_between(real: Moments, fake: Moments) -> float:
    """FD of two clouds of which only the moments are kept. Raises UsageError for different widths."""
    if real.mean.shape != fake.mean.shape:
        raise UsageError(f"the moments are of different widths: real has {len(real.mean)} features, fake has {len(fake.mean)}")
    roots = root(real.covariance.double()) @ root(fake.covariance.double())
    return _assemble(real, fake, torch.linalg.svdvals(roots))


def _assemble(real: Moments, fake: Moments, singular: Tensor) -> float:
    """FD from the singular values of S^(1/2) S'^(1/2); rounding below zero is zero."""
    shift = (real.mean.double() - fake.mean.double()).square().sum()
    spread = real.covariance.double().trace() + fake.covariance.double().trace() - 2 * singular.sum()
    return max(0.0, float(shift + spread))


def root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix; eigenvalues within rounding of zero are zero."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values.where(values > rounding(values), 0.0)
    symmetric: Tensor = vectors * kept.sqrt() @ vectors.T
    return symmetric


def rounding(values: Tensor) -> Tensor:
    """What rounding leaves of a zero among the eigenvalues of a matrix."""
    return values.abs().max() * len(values) * torch.finfo(values.dtype).eps


@torch.no_grad()
def frechet_distance(real: Tensor, fake: Tensor) -> FrechetDistance:
    """Frechet distance (squared) of features (N, F) and (M, F), with its standard error at these numbers of rows.

    It means little without the extractor's name, N and M, and the noise floor: the value for real rows against other real rows.
    Raises UsageError for different widths, fewer than two rows, rows that are not finite.
    """
    real, fake = same_features(real=real, fake=fake)
    here, there = _moments(real), _moments(fake)
    root_here, root_there = root(here.covariance), root(there.covariance)
    left, singular, right = torch.linalg.svd(root_here @ root_there)
    value = _assemble(here, there, singular)
    inverse = torch.where(singular > rounding(singular), 1 / singular, 0.0)
    to_real = root_here @ (left * inverse) @ left.T @ root_here
    to_fake = root_there @ (right.T * inverse) @ right @ root_there
    variance = _influence(real, here, there, to_fake).var() / len(real) + _influence(fake, there, here, to_real).var() / len(fake)
    return FrechetDistance(value, *_interval(value, float(variance.sqrt()), floor=0.0), len(real), len(fake))


def _influence(rows: Tensor, own: Moments, other: Moments, transport: Tensor) -> Tensor:
    """First-order effect (N,) of each row on FD, but for a constant; `transport` takes the rows' own Gaussian to the other."""
    centred = rows - own.mean
    return 2 * centred @ (own.mean - other.mean) + centred.square().sum(1) - (centred @ transport * centred).sum(1)


def _interval(value: float, standard_error: float, floor: float = -math.inf) -> tuple[float, float, float]:
    return standard_error, max(floor, value - Z95 * standard_error), value + Z95 * standard_error


@torch.no_grad()
def frechet_distance_infinite(real: Tensor, fake: Tensor, shares: Sequence[int] = (1, 2, 3, 4), seed: int = 0) -> Extrapolation:
    """FD of the two laws: FD of samples extrapolated to infinitely many rows, real and fake alike (after Chong and Forsyth 2020).

    For every j in `shares` both sets are cut, by seed, into j disjoint blocks, and FD is averaged over the j pairs of blocks, so that every point
    uses every row: only the bias, which grows as j, tells the points apart. Random subsets would add their own noise to each of them. The first-order
    error of all points, and of the intercept, is then the same mean of influences: the standard error of `frechet_distance` is the intercept's.

    Raises UsageError as `frechet_distance` does; for fewer than two different shares; and where a block has no more rows than the features span
    dimensions, since the bias of covariances without full rank does not fall as 1/n.
    """
    real, fake = same_features(real=real, fake=fake)
    if len(set(shares)) < 2 or min(shares) < 1:
        raise UsageError(f"shares is {tuple(shares)}: two different whole numbers or more, none below 1, are needed")
    smallest = min(len(real), len(fake)) // max(shares)
    whole = frechet_distance(real, fake)
    rank = max(int(torch.linalg.matrix_rank(_moments(rows).covariance, hermitian=True)) for rows in (real, fake))
    if smallest <= rank + 1:
        raise UsageError(
            f"the smallest of {max(shares)} blocks has {smallest} rows for features of rank {rank}: more rows or fewer shares are needed"
        )
    generator = torch.Generator().manual_seed(seed)
    mixed = [rows[torch.randperm(len(rows), generator=generator).to(rows.device)] for rows in (real, fake)]
    points = tuple(_point(mixed[0], mixed[1], share) for share in shares)
    value, slope, fit_error = _line([float(share) for share in shares], [point.value for point in points])
    return Extrapolation(value, *_interval(value, whole.standard_error), slope, fit_error, points)


def _point(real: Tensor, fake: Tensor, share: int) -> Point:
    pairs = zip(real.tensor_split(share), fake.tensor_split(share), strict=True)
    values = [frechet_between(_moments(here), _moments(there)) for here, there in pairs]
    return Point(len(real) / share, len(fake) / share, math.fsum(values) / share)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares: intercept, slope, standard deviation of the residuals (0 for two points)."""
    centre_x, centre_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    slope = math.fsum((a - centre_x) * (b - centre_y) for a, b in zip(x, y, strict=True)) / math.fsum((a - centre_x) ** 2 for a in x)
    intercept = centre_y - slope * centre_x
    squares = math.fsum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return intercept, slope, math.sqrt(squares / (len(x) - 2)) if len(x) > 2 else 0.0
