"""The search: many beginnings on coarse polylines, the best of them refined, what kinks keep from converging integrated more finely.

    pairs -> beginnings (periplus.paths.starts)
          -> minimise all with 8 segments, roughly           distinct local minima are counted here
          -> the best few of each pair with 16               the cheapest goes on
          -> 32, 64, ... segments, each from the one before, the last one to a residual of CONVERGED

Near a kink of a rectifier the gradient jumps, and a node that sits on one has no small gradient. A jump weighs as much as the stretch of path that
its point stands for, so segments are integrated with two points each; where that does not converge with 4, then with 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from periplus.paths.costs import PairCost
from periplus.paths.solver import Solved, minimise
from periplus.paths.starts import GRAPH_DIMENSIONS, Starts, graph_starts, local_starts, resample, straight

#: A path has converged when its residual (periplus.paths.energy) is at most this.
CONVERGED = 1e-3
#: Residuals that are enough on coarse polylines: on the coarsest, then up to the last but one, and on that.
ROUGH, LOOSE, NEARLY = 3e-2, 1e-2, 3e-3
COARSEST = 8
#: Beginnings of each pair that are refined beyond the coarsest polyline.
SURVIVORS = 2
#: Points of quadrature to a segment: for residuals of LOOSE and above, for smaller ones, and where the last polyline has not converged.
COARSE_QUADRATURE, QUADRATURE, MORE_QUADRATURE = 1, 2, (4, 8)
#: Two coarse paths are one local minimum when their energies differ by less than this part and their nodes by less than this part of |z_A - z_B|.
SAME_ENERGY, SAME_PLACE = 1e-2, 0.1


@dataclass(frozen=True)
class Found:
    """For each pair: points (P, N+1, d), residual (P,), iterations (P,) of the last polyline, distinct local minima (P,), the name of the beginning
    and the quadrature (P,)."""

    points: Tensor
    residual: Tensor
    iterations: Tensor
    minima: Tensor
    names: list[str]
    quadrature: Tensor


def levels(segments: int) -> list[int]:
    """8, 16, 32, ... and `segments` last: each at most double the one before."""
    found = [segments]
    while found[0] > COARSEST:
        found.insert(0, max(COARSEST, -(-found[0] // 2)))
    return found


def search(
    z_a: Tensor,
    z_b: Tensor,
    cost: PairCost,
    owner: Tensor,
    segments: int,
    power: int,
    ellipse: Tensor,
    everywhere: bool,
    seed: int,
    tolerance: float = CONVERGED,
    places: int = 0,
) -> Found:
    """The cheapest path found for each pair.

    Args:
        z_a, z_b: (R, d) ends; `owner` (R,) the pair each belongs to, 0..P-1, all present: a pair may have several choices of ends.
        ellipse: (R,) half the largest sum of distances from the ends in which to look. everywhere: search globally, or from the straight line only.
        places: points of quadrature along the whole of every polyline, at least: what is forbidden must not come into sight on the last one only.
    """
    grid = levels(segments)
    starts = beginnings(z_a, z_b, cost, owner, grid[0], ellipse, everywhere, seed)
    enough = tolerance if len(grid) == 1 else max(ROUGH, tolerance)
    coarse = minimise(starts.points, cost, starts.pairs, power, enough, quadrature_for(enough, grid[0], places))
    different = distinct(coarse.energy, starts.pairs, coarse.points)
    minima = torch.bincount(starts.pairs[different])
    kept = first_rows(different, starts.pairs, SURVIVORS)
    pairs, names, solved = starts.pairs[kept], [starts.names[k] for k in kept.tolist()], _rows(coarse, kept)
    for k, level in enumerate(grid[1:], 1):
        enough = max(tolerance, CONVERGED if k == len(grid) - 1 else NEARLY if k == len(grid) - 2 else LOOSE)
        solved = minimise(resample(solved.points, level), cost, pairs, power, enough, quadrature_for(enough, level, places))
        if k == 1:
            best = cheapest(solved.energy, pairs)
            pairs, names, solved = pairs[best], [names[k] for k in best.tolist()], _rows(solved, best)
    best = cheapest(solved.energy, pairs)
    used = quadrature_for(enough, segments, places)
    return converge(_rows(solved, best), cost, power, tolerance, used, minima, [names[k] for k in best.tolist()])


def quadrature_for(residual: float, segments: int, places: int) -> int:
    """Points to a segment that a minimisation to this residual needs, and `places` points along the whole polyline at least."""
    return max(COARSE_QUADRATURE if residual >= LOOSE else QUADRATURE, -(-places // segments))


def converge(solved: Solved, cost: PairCost, power: int, tolerance: float, quadrature: int, minima: Tensor, names: list[str]) -> Found:
    """Go on with more quadrature where the last polyline has not converged."""
    points, left, iterations = solved.points.clone(), solved.residual.clone(), solved.iterations.clone()
    used = torch.full((len(points),), quadrature, device=points.device)
    for quadrature in (q for q in MORE_QUADRATURE if q > quadrature):
        rows = (~(left <= tolerance)).nonzero()[:, 0]
        if not len(rows):
            break
        again = minimise(points[rows], cost, rows, power, tolerance, quadrature)
        points[rows], left[rows], used[rows] = again.points, again.residual, quadrature
        iterations[rows] += again.iterations
    return Found(points, left, iterations, minima, names, used)


def beginnings(z_a: Tensor, z_b: Tensor, cost: PairCost, owner: Tensor, segments: int, ellipse: Tensor, everywhere: bool, seed: int) -> Starts:
    """Polylines to begin from; pairs with several choices of ends begin from the lines between all, and elsewhere only from the best."""
    lines = Starts(straight(z_a, z_b, segments), owner, ["line"] * len(z_a))
    if not everywhere:
        return lines
    best = cheapest(_line_cost(lines.points, cost, owner), owner)
    a, b, pairs, reach = z_a[best], z_b[best], owner[best], ellipse[best]
    found = [local_starts(a, b, cost, pairs, segments, reach, seed)]
    if z_a.shape[1] <= GRAPH_DIMENSIONS:
        found.append(graph_starts(a, b, cost, pairs, segments, reach, seed))
    if len(z_a) > len(best):
        found.append(lines)
    return Starts(torch.cat([s.points for s in found]), torch.cat([s.pairs for s in found]), [name for s in found for name in s.names])


def _line_cost(points: Tensor, cost: PairCost, pairs: Tensor) -> Tensor:
    price: Tensor = cost(points, pairs).mean(1) * (points[:, -1] - points[:, 0]).norm(dim=1)
    return price


def ranked(value: Tensor, pairs: Tensor) -> Tensor:
    """The rows (R,) pair by pair, each pair's from its lowest value up."""
    order = value.nan_to_num(torch.inf).argsort(stable=True)
    return order[pairs[order].argsort(stable=True)]


def cheapest(value: Tensor, pairs: Tensor) -> Tensor:
    """The row (P,) of the lowest value of each pair."""
    return first_rows(ranked(value, pairs), pairs, 1)


def first_rows(rows: Tensor, pairs: Tensor, count: int) -> Tensor:
    """Of rows that stand pair by pair, the first `count` of each pair."""
    owner = pairs[rows]
    starts = torch.bincount(owner).cumsum(0) - torch.bincount(owner)
    return rows[torch.arange(len(rows), device=rows.device) - starts[owner] < count]


def distinct(value: Tensor, pairs: Tensor, points: Tensor) -> Tensor:
    """The rows of different local minima, pair by pair from the lowest value up, as far as coarse polylines (R, N+1, d) can tell.

    A row is dropped when it is like one that was kept before it: nearly the same energy, and its nodes nearly in the same places.
    """
    order = ranked(value, pairs)
    owner = pairs[order]
    each = torch.bincount(owner)
    place = torch.arange(len(order), device=order.device) - (each.cumsum(0) - each)[owner]
    table = torch.full((len(each), int(each.max())), -1, device=order.device)
    table[owner, place] = order
    kept = table >= 0
    lengths = SAME_PLACE * (points[:, -1] - points[:, 0]).norm(dim=1)
    for column in range(1, table.shape[1]):
        one, others = table[:, column], table[:, :column]
        alike = (value[one][:, None] - value[others]).abs() <= SAME_ENERGY * value[one].abs()[:, None]
        alike &= (points[one][:, None] - points[others]).norm(dim=3).amax(2) <= lengths[one][:, None]
        kept[:, column] &= ~(alike & kept[:, :column]).any(1)
    return table[kept]


def _rows(solved: Solved, rows: Tensor) -> Solved:
    return Solved(solved.points[rows], solved.energy[rows], solved.residual[rows], solved.iterations[rows])
