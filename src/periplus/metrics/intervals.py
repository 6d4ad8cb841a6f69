"""Intervals of proportions and of means, at 95 % unless told otherwise.

A proportion of independent trials gets Wilson's score interval, a mean of a few values Student's, a difference of two means Welch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: Standard errors on either side of the middle of a normal interval of 95 %.
Z95 = 1.959964


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
