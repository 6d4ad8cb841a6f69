"""Which endpoints of one image are the same minimum: single linkage within a tolerance.

Two codes are linked where their distance is at most `tolerance`; a cluster is what links join. Clusters are numbered by their lowest error, 0 first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Codes whose root-mean-square difference over coordinates is at most this are the same minimum; the prior's standard deviation is 1.
CODE_TOLERANCE = 1e-2
#: Images whose root-mean-square difference over pixels is at most this are the same image.
IMAGE_TOLERANCE = 1e-2


def code_distance_tolerance(latent_dim: int) -> float:
    """The distance |z - z'| up to which codes count as the same: the tolerance per coordinate, over so many of them."""
    return CODE_TOLERANCE * math.sqrt(latent_dim)


def image_distance_tolerance(pixels: int) -> float:
    """The distance ||G(z) - G(z')|| up to which images count as the same."""
    return IMAGE_TOLERANCE * math.sqrt(pixels)


def linked(distance: Tensor, tolerance: float) -> Tensor:
    """Component number (B, S) of each of S points from pairwise distances (B, S, S): the smallest index that links reach."""
    images, count, _ = distance.shape
    near = distance <= tolerance
    label = torch.arange(count, device=distance.device).expand(images, count)
    for _ in range(count):
        spread = torch.where(near, label[:, None, :], count).amin(2).minimum(label)
        if torch.equal(spread, label):
            break
        label = spread
    return label


def clusters(points: Tensor, error: Tensor, tolerance: float) -> Tensor:
    """Cluster numbers (B, S) of points (B, S, n): 0 holds the image's lowest error (B, S), and so on upwards."""
    exact = points.double()
    label = linked(torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist"), tolerance)
    lowest = torch.full_like(error, torch.inf).scatter_reduce(1, label, error, "amin")
    rank = lowest.argsort(dim=1, stable=True).argsort(dim=1)
    return rank.gather(1, label)
