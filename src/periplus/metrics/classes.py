"""Classes: which share of the samples falls into each, and how far these shares are from those of the data.

With p the shares of the samples and q those of the data, over C classes:

    KL[p || q] = sum p ln(p / q)       nats; infinite where samples fall into a class that the data lack
    chi^2      = sum (p - q)^2 / q     Pearson's statistic, divided by the number of samples
    TV         = sum |p - q| / 2       total variation, in [0, 1]

Counts of n samples are never quite those of the data: even samples of the data themselves have an expected KL of about (C - 1) / (2 n) nats, and a
chi^2 of (C - 1) / n. This noise floor belongs beside the value: for the 1000 modes of stacked MNIST and 26,000 samples it is 0.019 nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from periplus.errors import UsageError
from periplus.metrics.intervals import Share, wilson_interval


def class_shares(labels: Tensor, classes: int) -> list[Share]:
    """Share of each class among labels (N,), each with its 95 % Wilson score interval (Wilson 1927)."""
    count = len(labels)
    if count == 0:
        raise UsageError("class shares of no labels at all are not defined")
    return [wilson_interval(int(n), count) for n in torch.bincount(labels, minlength=classes).tolist()]


class ClassDistance(NamedTuple):
    """Distances of class shares from those of the data, and what samples of the data themselves would show.

    kl (nats), chi_squared (per sample), total_variation: see the module. kl_floor: the KL that as many samples of the data have in expectation,
    to first order in 1/n. p_value: of Pearson's chi^2 test that the samples have the shares of the data.
    """

    kl: float
    chi_squared: float
    total_variation: float
    kl_floor: float
    p_value: float


def class_distance(counts: Tensor, reference: Tensor) -> ClassDistance:
    """How far samples, of which `counts` (C,) fall into each class, are from the class shares of the data.

    Args:
        counts: whole numbers of samples per class (`torch.bincount(labels, minlength=C)`).
        reference: (C,) shares of the data, or counts of so many images that their own noise does not matter; they are divided by their sum.

    Raises UsageError for different lengths, negative or non-finite numbers, and where all are zero.
    """
    observed, expected = (_weights(name, values) for name, values in (("counts", counts), ("reference", reference)))
    if len(observed) != len(expected):
        raise UsageError(f"counts has {len(observed)} classes, reference {len(expected)}")
    total = float(observed.sum())
    p, q = observed / total, expected / expected.sum()
    known = q > 0
    impossible = bool(p[~known].any())
    kl = math.inf if impossible else max(0.0, float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum()))
    chi_squared = math.inf if impossible else float(((p - q).square()[known] / q[known]).sum())
    freedom = int(known.sum()) - 1
    return ClassDistance(kl, chi_squared, float((p - q).abs().sum() / 2), freedom / (2 * total), _chi_squared_tail(total * chi_squared, freedom))


def _weights(name: str, values: Tensor) -> Tensor:
    wide = torch.as_tensor(values).double()
    if wide.ndim != 1 or not wide.isfinite().all() or (wide < 0).any() or not wide.any():
        raise UsageError(f"{name} must be a vector of finite numbers, none negative and not all zero")
    return wide


def _chi_squared_tail(statistic: float, freedom: int) -> float:
    """P(chi^2 with so many degrees of freedom >= statistic)."""
    if freedom == 0 or math.isinf(statistic):
        return 0.0 if math.isinf(statistic) else 1.0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)))
