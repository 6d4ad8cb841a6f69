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
    to first order in 1/n. p_value: of Pearson's chi^2 test that the samples have the shares of the data. Both take the number of the reference's
    images into account where it was told.
    """

    kl: float
    chi_squared: float
    total_variation: float
    kl_floor: float
    p_value: float


def class_distance(counts: Tensor, reference: Tensor, images: float = math.inf) -> ClassDistance:
    """How far samples, of which `counts` (C,) fall into each class, are from the class shares of the data.

    Args:
        counts: whole numbers of samples per class (`torch.bincount(labels, minlength=C)`).
        reference: (C,) shares of the data, or counts; they are divided by their sum.
        images: from how many images, none of them among the samples, the reference was counted; infinitely many by default: its own noise is none.

    Raises UsageError for different lengths, negative or non-finite numbers, where all are zero, and unless images is above zero.
    """
    observed, expected = (_weights(name, values) for name, values in (("counts", counts), ("reference", reference)))
    if len(observed) != len(expected):
        raise UsageError(f"counts has {len(observed)} classes, reference {len(expected)}")
    if not images > 0:
        raise UsageError(f"images is {images}: more than zero are needed")
    total = float(observed.sum())
    effective = total / (1 + total / images)  # p - q varies as 1/n + 1/images
    p, q = observed / total, expected / expected.sum()
    known = q > 0
    impossible = bool(p[~known].any())
    kl = math.inf if impossible else max(0.0, float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum()))
    chi_squared = math.inf if impossible else float(((p - q).square()[known] / q[known]).sum())
    freedom = int(known.sum()) - 1
    p_value = _chi_squared_tail(effective * chi_squared, freedom)
    return ClassDistance(kl, chi_squared, float((p - q).abs().sum() / 2), freedom / (2 * effective), p_value)


class Modes(NamedTuple):
    """How many modes samples fall into, and how evenly.

    found, of: modes with a sample in them, and all there are. kl: nats, of the samples' shares of the modes from those of the reference. kl_floor,
    missed_floor: what as many samples of the reference's law have in expectation, to first order, and how many modes these would miss.
    samples: how many were classified.
    """

    found: int
    of: int
    kl: float
    kl_floor: float
    missed_floor: float
    samples: int


def modes(digits: Tensor, classes: int = 10, reference: Tensor | None = None) -> Modes:
    """Modes of stacked images from the classes of their channels (N, K), whole numbers below `classes`: stacked MNIST has 10^3.

    Args:
        digits: what a classifier of single channels says of each channel.
        reference: (classes^K,) shares of the data, or counts; uniform by default, as is usual, though the digits of MNIST are not: its own stacks are
            0.004 nats from uniform before any noise. The first channel is the leading digit of a mode's number.

    The usual protocol is 26,000 samples; figures for other numbers of samples do not compare, nor do those of other classifiers: one that errs finds
    modes that are not there. Beside the value belongs what real images give under the same classifier. Raises UsageError for what is no such matrix.
    """
    told = torch.as_tensor(digits)
    if told.ndim != 2 or told.numel() == 0 or told.is_floating_point() or told.is_complex() or told.dtype == torch.bool:
        raise UsageError(f"digits is {told.dtype} {tuple(told.shape)}: whole numbers (samples, channels), at least one, are needed")
    if int(told.min()) < 0 or int(told.max()) >= classes:
        raise UsageError(f"digits go from {int(told.min())} to {int(told.max())}: classes is {classes}")
    number = torch.zeros(len(told), dtype=torch.int64, device=told.device)
    for channel in told.long().T:
        number = number * classes + channel
    count = classes ** told.shape[1]
    counts = torch.bincount(number, minlength=count)
    shares = torch.ones(count, dtype=torch.float64, device=told.device) if reference is None else _weights("reference", reference)
    distance = class_distance(counts, shares)
    missed = float((1 - shares / shares.sum()).pow(len(told)).sum())
    return Modes(int((counts > 0).sum()), count, distance.kl, distance.kl_floor, missed, len(told))


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
