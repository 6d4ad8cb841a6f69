"""What may be compared: finite matrices of as many columns, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from periplus.errors import UsageError


def feature_rows(name: str, rows: Tensor, fewest: int = 2) -> Tensor:
    """A matrix of features (N, F) as float64, away from any graph; NumPy arrays are taken as well.

    Raises UsageError, naming the matrix, where it is no matrix, has fewer than `fewest` rows, or holds a number that is not finite.
    """
    wide = torch.as_tensor(rows).detach().double()
    if wide.ndim != 2 or wide.shape[1] == 0:
        raise UsageError(f"{name} has shape {tuple(wide.shape)}: a matrix (rows, features) is needed; flatten images first")
    if len(wide) < fewest:
        raise UsageError(f"{name} has {len(wide)} rows: at least {fewest} are needed")
    broken = ~wide.isfinite().all(1)
    if broken.any():
        raise UsageError(f"{name} has {int(broken.sum())} rows that are not finite, the first of them row {int(broken.nonzero()[0])}")
    return wide


def same_features(**matrices: Tensor) -> tuple[Tensor, ...]:
    """Several matrices as `feature_rows` gives them. Raises UsageError as well where their numbers of columns differ."""
    wide = {name: feature_rows(name, rows) for name, rows in matrices.items()}
    if len({rows.shape[1] for rows in wide.values()}) > 1:
        raise UsageError("the rows are of different widths: " + ", ".join(f"{name} has {rows.shape[1]} features" for name, rows in wide.items()))
    return tuple(wide.values())
