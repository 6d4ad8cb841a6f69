"""Who lies nearest to whom: exact neighbours in tiles of memory, votes among them, and the spread of a set.

Rows are examples, columns features (pixels in [0, 1] will do for small images); distances are Euclidean.
"""

from __future__ import annotations

import math
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


@torch.no_grad()
def mean_pairwise_distance(rows: Tensor, tile: int = 2048) -> float:
    """Mean Euclidean distance over all pairs of different rows of (N, F), N >= 2; float64 accumulation."""
    if len(rows) < 2:
        raise UsageError("a mean pairwise distance needs at least two rows")
    total = math.fsum(float(torch.cdist(block, rows).sum(dtype=torch.float64)) for block in rows.split(tile))
    return total / (len(rows) * (len(rows) - 1))
