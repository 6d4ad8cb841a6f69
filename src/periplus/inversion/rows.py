"""Products of many small vectors and matrices, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(n,) inner products of vectors (n, d)."""
    return (a * b).sum(1)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(n, d) matrices (n, d, d) times vectors (n, d)."""
    return torch.bmm(matrix, vector[:, :, None])[:, :, 0]
