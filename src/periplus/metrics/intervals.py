"""Intervals of proportions and of means, at 95 % unless told otherwise.

A proportion of independent trials gets Wilson's score interval, a mean of a few values Student's, a difference of two means Welch's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: Standard errors on either side of the middle of a normal interval of 95 %.
Z95 = 1.959964
#: Values whose spread is no more than this part of the largest of them differ by rounding alone.
ROUNDING = 1e-14


class Share(NamedTuple):
    """A proportion with its 95 % Wilson interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, z: float = Z95) -> Share:
    """Wilson score interval of a proportion; never empty, never outside [0, 1], right at 0 and at `trials`."""
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Share(p, max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < trials else 1.0)  # 0 and 1: no rounding


def welch_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of mean(a) - mean(b) for two samples of unequal variance (Welch 1947); infinite where one has a single value or neither varies.

    Values that differ by rounding alone do not vary.
    """
    from scipy.special import stdtrit

    if min(len(a), len(b)) < 2:
        return (-math.inf, math.inf)
    parts = [variance(values) / len(values) for values in (a, b)]
    error = math.sqrt(sum(parts))
    if not error:  # nothing to estimate a variance from
        return (-math.inf, math.inf)
    shares = [part / sum(parts) for part in parts]
    freedom = 1 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, (a, b), strict=True))
    middle, half = statistics.fmean(a) - statistics.fmean(b), float(stdtrit(freedom, (1 + confidence) / 2)) * error
    return middle - half, middle + half


def student(count: int, confidence: float = 0.95) -> float:
    """Half of Student's interval of the mean of so many values, two or more, in standard errors: 4.30 for three, 1.96 for very many."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, (1 + confidence) / 2))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of a few values; infinite for one value, or where they do not vary (but for rounding)."""
    error = math.sqrt(variance(values) / len(values)) if len(values) > 1 else 0.0
    if not error:
        return (-math.inf, math.inf)
    middle, half = statistics.fmean(values), student(len(values), confidence) * error
    return middle - half, middle + half


def variance(values: Sequence[float]) -> float:
    """Variance of two values or more, with n - 1; exactly 0 where they differ by rounding alone, whose variance would be noise."""
    numbers = [float(value) for value in values]
    if max(numbers) - min(numbers) <= ROUNDING * max(map(abs, numbers)):
        return 0.0
    return statistics.variance(numbers)
