"""Judging a run. For now: has the generator collapsed?

A generator counts as collapsed when a class of the data gets less than 0.5 % of 10,000 samples, or when its samples are on average less than half
as far apart as the data. Classes are told by nearest neighbours in pixel space, whose own error rate on held-out images is reported beside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from periplus import metrics
from periplus.data import ImageData
from periplus.runs import Run

SAMPLES = 10_000
SMALLEST_SHARE = 0.005
SMALLEST_SPREAD = 0.5
REFERENCE_IMAGES = 10_000
PAIRWISE_ROWS = 2000


def pixels(images: Tensor, device: str = "cpu") -> Tensor:
    """uint8 or [0, 1] images (N, C, H, W) as float rows (N, C*H*W) in [0, 1]."""
    rows = images.to(device).flatten(1)
    return rows.float() / 255 if rows.dtype == torch.uint8 else rows


def collapse(images: Tensor, data: ImageData, device: str = "cpu") -> dict[str, Any]:
    """Class shares and spread of samples (N, C, H, W) in [0, 1] against those of the data, and the verdict.

    Returns a JSON-ready record: `shares` (value, low, high per class; None for data without labels), `smallest_share`, `spread` (mean pairwise
    distance of the samples over that of the data), `classifier_error` (of the nearest-neighbour classifier on data held out from it, with its
    interval) and `collapsed`.
    """
    rows = pixels(images, device)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    reference = pixels(data.images[order[:REFERENCE_IMAGES]], device)
    spread = metrics.mean_pairwise_distance(rows[:PAIRWISE_ROWS]) / metrics.mean_pairwise_distance(reference[:PAIRWISE_ROWS])
    record: dict[str, Any] = {"samples": len(images), "spread": spread, "shares": None, "smallest_share": None, "classifier_error": None}
    if data.labels is not None:
        labels = data.labels[order[: len(reference)]].to(device)
        shares = metrics.class_shares(metrics.neighbour_labels(rows, reference, labels), len(data.classes))
        record |= {
            "shares": [share._asdict() for share in shares],
            "smallest_share": min(shares[label].value for label in labels.unique().tolist()),  # of the classes that the data has
            "classifier_error": classifier_error(reference, labels)._asdict(),
        }
    missing = record["smallest_share"] is not None and record["smallest_share"] < SMALLEST_SHARE
    return record | {"collapsed": missing or not spread >= SMALLEST_SPREAD}  # not a number counts as collapsed


def classifier_error(reference: Tensor, labels: Tensor) -> metrics.Share:
    """Error of the nearest-neighbour classifier on a fifth of its own reference, held out."""
    cut = max(1, len(reference) // 5)
    told = metrics.neighbour_labels(reference[:cut], reference[cut:], labels[cut:])
    return metrics.wilson_interval(int((told != labels[:cut]).sum()), cut)


def evaluate_collapse(run: Run, data: ImageData, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """`collapse` of a run's own samples, with what they were drawn from."""
    return {"step": run.step, "sampling_seed": seed, **collapse(run.sample(samples, seed), data, run.device)}
