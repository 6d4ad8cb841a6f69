"""The kernel distance of two clouds of features: the squared maximum mean discrepancy, unbiased (Gretton et al. 2012; KID of Binkowski et al. 2018).

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),     k(a, b) = (a.b / F + 1)^3

over pairs of different rows: its expectation is 0 where the laws are equal, whatever the numbers of rows, so it may be negative.

KID as usually computed is the mean over 100 random subsets of 1000 rows; its printed deviation is that between subsets, which overlap and are drawn
from the same rows, so it is the error of nothing. Averaged over all subsets that mean *is* the statistic of all pairs of rows. That is computed
here, in tiles, and its variance is known (Serfling 1980, ch. 5): with g the influence of a row (what its row of the kernel matrices says on average)
and K the variance that is left in the entries of a kernel matrix once means of rows and columns are taken out,

    Var = 4 Var g(x) / N + 4 Var g(y) / M + second,      second = 2 Kxx / N^2 + 2 Kyy / M^2 + 4 Kxy / (N M)

The first two terms vanish where the laws are equal. Their plug-in estimate exceeds them by twice `second` (the noise of each g), which is taken off;
what is left is never below `second`. So the standard error is right far from equality and at it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from periplus.errors import UsageError
from periplus.metrics.intervals import Z95
from periplus.metrics.rows import same_features


class KernelDistance(NamedTuple):
    """value: unbiased MMD^2, may be negative. standard_error, low, high: of it as an estimate for the two laws (95 %, normal). real, fake: rows."""

    value: float
    standard_error: float
    low: float
    high: float
    real: int
    fake: int


class _Means(NamedTuple):
    """Of a kernel matrix: the mean of each row and of each column, of all entries, and the variance left once means are taken out."""

    rows: Tensor
    columns: Tensor
    mean: float
    variance: float


@torch.no_grad()
def kernel_distance(real: Tensor, fake: Tensor, degree: int = 3, scale: float | None = None, offset: float = 1.0, tile: int = 256) -> KernelDistance:
    """Kernel distance (KID) of features (N, F) and (M, F): unbiased MMD^2 with the kernel (scale a.b + offset)^degree, over all pairs of rows.

    scale: 1/F by default. Memory: (tile, N) entries; time: (N + M)^2 F multiplications, seconds for 10,000 rows of 64 features on a core.
    Agrees in expectation with the mean over random subsets that other libraries report, without its noise.
    Raises UsageError for different widths, fewer than two rows, rows that are not finite, a degree below 1.
    """
    real, fake = same_features(real=real, fake=fake)
    if degree < 1:
        raise UsageError(f"degree is {degree}: at least 1 is needed")
    kernel = (degree, 1 / real.shape[1] if scale is None else scale, offset)
    n, m = len(real), len(fake)
    within_real, within_fake, across = _within(real, kernel, tile), _within(fake, kernel, tile), _across(real, fake, kernel, tile)
    value = within_real.mean + within_fake.mean - 2 * across.mean
    plugged_in = 4 * float((within_real.rows - across.rows).var()) / n + 4 * float((within_fake.rows - across.columns).var()) / m
    second = 2 * within_real.variance / n**2 + 2 * within_fake.variance / m**2 + 4 * across.variance / (n * m)
    error = math.sqrt(max(plugged_in - second, second, 0.0))
    return KernelDistance(value, error, value - Z95 * error, value + Z95 * error, n, m)


def _entries(a: Tensor, b: Tensor, kernel: tuple[int, float, float]) -> Tensor:
    degree, scale, offset = kernel
    return torch.addmm(a.new_tensor(offset), a, b.T, alpha=scale).pow_(degree)


def _across(a: Tensor, b: Tensor, kernel: tuple[int, float, float], tile: int) -> _Means:
    rows, columns, squares = [], torch.zeros(len(b), dtype=a.dtype, device=a.device), 0.0
    for block in a.split(tile):
        k = _entries(block, b, kernel)
        rows.append(k.mean(1))
        columns += k.sum(0)
        squares += _sum_of_squares(k)
    by_row, by_column = torch.cat(rows), columns / len(a)
    mean = float(by_row.mean())
    left = squares / (len(a) * len(b)) - float(by_row.square().mean()) - float(by_column.square().mean()) + mean**2
    return _Means(by_row, by_column, mean, max(0.0, left))


def _within(a: Tensor, kernel: tuple[int, float, float], tile: int) -> _Means:
    """Over pairs of different rows; each block above the diagonal stands for the one below as well."""
    n, sums, squares = len(a), torch.zeros(len(a), dtype=a.dtype, device=a.device), 0.0
    for start in range(0, n, tile):
        k = _entries(a[start : start + tile], a[start:], kernel)
        size = len(k)
        k.diagonal().zero_()
        sums[start : start + size] += k.sum(1)
        sums[start + size :] += k[:, size:].sum(0)
        squares += 2 * _sum_of_squares(k) - _sum_of_squares(k[:, :size])
    by_row = sums / (n - 1)
    mean = float(by_row.mean())
    left = squares / (n * (n - 1)) - 2 * float(by_row.square().mean()) + mean**2
    return _Means(by_row, by_row, mean, max(0.0, left))


def _sum_of_squares(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2
