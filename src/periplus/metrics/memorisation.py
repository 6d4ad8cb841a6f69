"""Are fakes nearer to the training images than new images are? Then they are copies, however good they look.

**The test** (Meehan, Chaudhuri and Dasgupta 2020). With d(x) the distance to the nearest training row, Mann and Whitney's U counts the pairs (fake,
held-out real) in which the fake lies farther away. A generator that has learned the law of the data wins half of them; one that replays training
images loses nearly all. With tie-corrected variance,

    z = (U - n m / 2) / sqrt(n m (n + m + 1) / 12)          standard normal for equal laws; far below 0: copying; far above: samples off the data

Copying of a part of the data can hide behind bad samples elsewhere, so z is taken within cells of the training set (k-means), and combined with the
held-out rows' share of each cell as weight and the weights' norm as divisor, so that it stays standard normal.

**The ratio** of the median distances says how near, in one figure: about 1 for new images.

Both need held-out images that the generator never saw, from the same source as the training images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from periplus.errors import UsageError
from periplus.metrics.neighbours import nearest_neighbours
from periplus.metrics.rows import same_features

#: Fewest rows of either kind that a cell needs to be judged: below it U is far from normal.
FEWEST_PER_CELL = 20
LLOYD_STEPS = 20
PERCENTILES = (0.025, 0.975)


class CopyingTest(NamedTuple):
    """z: standard normal where fakes are as far from the training rows as held-out rows are, below 0 where nearer. p_value: one-sided, of nearness.

    copying: p_value below `level`. cells: how many were judged. judged: the share of the held-out rows that lie in them.
    """

    z: float
    p_value: float
    copying: bool
    cells: int
    judged: float
    level: float


class Ratio(NamedTuple):
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float


@torch.no_grad()
def data_copying_test(train: Tensor, held_out: Tensor, fake: Tensor, cells: int = 5, level: float = 1e-3, seed: int = 0) -> CopyingTest:
    """Three-sample test whether fakes (M, F) lie nearer to the training rows (N, F) than held-out rows (H, F) do.

    Args:
        cells: of k-means on the training rows; those with fewer than 20 held-out rows or 20 fakes are not judged. 1: no cells.
        level: of p below which `copying` is True; small, for it is a grave thing to say.
        seed: of the first centres.

    Raises UsageError for different widths, fewer than two rows, rows that are not finite, and where no cell can be judged.
    """
    train, held_out, fake = same_features(train=train, held_out=held_out, fake=fake)
    if not 1 <= cells <= len(train):
        raise UsageError(f"cells is {cells}: between 1 and the {len(train)} training rows is needed")
    centres = _centres(train, cells, torch.Generator().manual_seed(seed))
    (near_real, cell_real), (near_fake, cell_fake) = (
        (nearest_neighbours(rows, train).distance[:, 0], nearest_neighbours(rows, centres).row[:, 0]) for rows in (held_out, fake)
    )
    judged = []
    for cell in range(cells):
        real, samples = near_real[cell_real == cell], near_fake[cell_fake == cell]
        if min(len(real), len(samples)) >= FEWEST_PER_CELL:
            judged.append((len(real) / len(held_out), rank_z(samples, real)))
    if not judged:
        raise UsageError(f"none of {cells} cells has {FEWEST_PER_CELL} held-out rows and {FEWEST_PER_CELL} fakes: give more rows or fewer cells")
    z = math.fsum(weight * value for weight, value in judged) / math.sqrt(math.fsum(weight**2 for weight, _ in judged))
    p_value = 0.5 * math.erfc(-z / math.sqrt(2))
    return CopyingTest(z, p_value, p_value < level, len(judged), math.fsum(weight for weight, _ in judged), level)


def _centres(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centres (count, F) of k-means, by Lloyd's steps from rows drawn without replacement; a cell that empties keeps its centre."""
    centres = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)].clone()
    if count == 1:
        return rows.mean(0, keepdim=True)
    for _ in range(LLOYD_STEPS):
        cell = nearest_neighbours(rows, centres).row[:, 0]
        members = torch.bincount(cell, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, cell, rows)
        centres = torch.where(members[:, None] > 0, sums / members.clamp_min(1)[:, None], centres)
    return centres


def rank_z(above: Tensor, below: Tensor) -> float:
    """Mann and Whitney's U of pairs with above > below (ties count half), standardised with tie-corrected variance; 0 where all values are equal."""
    n, m = len(above), len(below)
    ordered = below.sort().values
    wins = (torch.searchsorted(ordered, above) + torch.searchsorted(ordered, above, right=True)).double().sum() / 2
    ties = torch.cat([above, below]).unique(return_counts=True)[1].double()
    variance = n * m / 12 * (n + m + 1 - float((ties**3 - ties).sum()) / ((n + m) * (n + m - 1)))
    return float(wins - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0


@torch.no_grad()
def neighbour_ratio(train: Tensor, held_out: Tensor, fake: Tensor, seed: int = 0, draws: int = 1000) -> Ratio:
    """Median distance of fakes (M, F) to their nearest training row over that of held-out rows (H, F), with its 95 % bootstrap interval.

    Raises UsageError as `data_copying_test` does, and where the held-out rows are so full of duplicates of training rows that their median is zero.
    """
    train, held_out, fake = same_features(train=train, held_out=held_out, fake=fake)
    above, below = (nearest_neighbours(rows, train).distance[:, 0] for rows in (fake, held_out))
    if not below.median() > 0:
        raise UsageError("half of the held_out rows are training rows, or more: the ratio of distances has no meaning")
    return median_ratio(above, below, seed, draws)


def median_ratio(above: Tensor, below: Tensor, seed: int, draws: int = 1000) -> Ratio:
    """median(above) / median(below) of two independent samples (A,), (B,), with its 95 % percentile bootstrap interval, drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    medians = [values[torch.randint(len(values), (draws, len(values)), generator=generator)].median(1).values for values in (above, below)]
    low, high = (medians[0] / medians[1]).quantile(above.new_tensor(PERCENTILES)).tolist()
    return Ratio(float(above.median() / below.median()), low, high)
