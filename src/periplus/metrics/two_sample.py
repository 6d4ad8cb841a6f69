"""Can a classifier tell fakes from reals? The two-sample test of Lopez-Paz and Oquab (2017).

Half of the rows fit a classifier, the other half try it. If the laws are equal its accuracy on those is 1/2 on average, whatever it learned, and the
number of right answers spreads no more than a binomial one (Hoeffding 1956; as much where it says either name equally often, less where it prefers
one, since as many of each are tried): a valid p value. Accuracy above 1/2 is evidence of a difference; accuracy near it only that *this* classifier
found none.

The classifier has a closed form, so that it needs no training and gives the same answer twice: ridge regression of +1 and -1 on the standardised
features and on random Fourier features of a Gaussian kernel (Rahimi and Recht 2007), which see shapes as well as shifts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from periplus.errors import UsageError
from periplus.metrics.intervals import wilson_interval
from periplus.metrics.rows import same_features

BANDWIDTH_ROWS = 500


class TwoSampleTest(NamedTuple):
    """accuracy on held-out rows, half of them fakes, with its 95 % Wilson interval; p_value, one-sided, of accuracy 1/2; trials: held-out rows.

    The interval covers the choice of the rows that are tried, not that of the rows which the classifier was fitted to.
    """

    accuracy: float
    low: float
    high: float
    p_value: float
    trials: int


@torch.no_grad()
def classifier_two_sample_test(real: Tensor, fake: Tensor, waves: int = 256, ridge: float = 1e-2, seed: int = 0) -> TwoSampleTest:
    """Accuracy with which held-out rows of (N, F) and (M, F) are told apart; as many of each are used, and half of them to fit.

    Args:
        waves: random Fourier features. ridge: weight of the squared norm of the coefficients, per fitted row. seed: of the halves and the waves.

    The halves must be independent: rows that occur twice make the p value too small. Raises UsageError as the other measures do, and for fewer
    than four rows in either set.
    """
    real, fake = same_features(real=real, fake=fake)
    count = min(len(real), len(fake))
    if count < 4:
        raise UsageError(f"the smaller set has {count} rows: at least 4 are needed, half of them to fit a classifier")
    generator = torch.Generator().manual_seed(seed)
    kept = [rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)] for rows in (real, fake)]
    half = count // 2
    fitted, tried = torch.cat([rows[:half] for rows in kept]), torch.cat([rows[half:] for rows in kept])
    scale = fitted.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    centre = fitted.mean(0)
    fitted, tried = (fitted - centre) / scale, (tried - centre) / scale
    directions, phases = _waves(fitted, waves, generator)
    sign = torch.ones(len(fitted), dtype=fitted.dtype, device=fitted.device)
    sign[half:] = -1
    design = _design(fitted, directions, phases)
    gram = design.T @ design
    gram.diagonal().add_(ridge * len(design))
    answer = _design(tried, directions, phases) @ torch.linalg.solve(gram, design.T @ sign)
    right = int((answer[: count - half] > 0).sum() + (answer[count - half :] <= 0).sum())
    share = wilson_interval(right, len(tried))
    return TwoSampleTest(share.value, share.low, share.high, _binomial_tail(right, len(tried)), len(tried))


def _waves(rows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Directions (F, count) and phases of cosines whose kernel is Gaussian, as wide as the median distance between some rows."""
    some = rows[torch.randperm(len(rows), generator=generator)[:BANDWIDTH_ROWS].to(rows.device)]
    width = float(torch.pdist(some).median())
    directions = torch.randn(rows.shape[1], count, generator=generator, dtype=rows.dtype).to(rows.device) / (width or 1.0)
    return directions, torch.rand(count, generator=generator, dtype=rows.dtype).to(rows.device) * (2 * math.pi)


def _design(rows: Tensor, directions: Tensor, phases: Tensor) -> Tensor:
    """Columns, each of variance about one in all: features over sqrt(F), waves over sqrt of their number."""
    cosines = (rows @ directions + phases).cos() * math.sqrt(2 / directions.shape[1])
    return torch.cat([torch.ones_like(rows[:, :1]), rows / math.sqrt(rows.shape[1]), cosines], 1)


def _binomial_tail(successes: int, trials: int) -> float:
    """P(Binomial(trials, 1/2) >= successes), exact."""
    from scipy.special import bdtrc

    return float(bdtrc(successes - 1, trials, 0.5)) if successes > 0 else 1.0
