"""Where a search for the cheapest path begins: lines, bows, detours over cheap places, and for few dimensions a graph.

Any path better than the straight line, in the length reading, lies in the ellipsoid |z - z_A| + |z - z_B| <= 2 U_line / Dist^2, because nowhere a
place costs less than Dist^2 / 2. Detours are looked for inside it.

Random numbers are drawn on the CPU, by seed: the same on every device, and the same for every pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from periplus.paths.costs import PairCost

#: Places that are tried for a detour, those that a detour is made over, the steps downhill from them.
PLACES, DETOURS, DOWNHILL = 96, 2, 24
#: Dimensions up to which a graph is laid, its nodes, and neighbours of each.
GRAPH_DIMENSIONS, GRAPH_NODES, GRAPH_NEIGHBOURS = 8, 3000, 16
#: Half the sum of distances to the ends, in distances of the ends, beyond which no detour is looked for.
WIDEST = 1.0


@dataclass(frozen=True)
class Starts:
    """Polylines (R, N+1, d) to begin from, the pair (R,) of each, and the name of its kind."""

    points: Tensor
    pairs: Tensor
    names: list[str]


def straight(z_a: Tensor, z_b: Tensor, segments: int) -> Tensor:
    """Straight lines (R, N+1, d), float64."""
    a, b = z_a.double()[:, None], z_b.double()[:, None]
    t = times(segments, a)
    return a * (1 - t) + b * t


def spherical(z_a: Tensor, z_b: Tensor, segments: int) -> Tensor:
    """Spherical interpolation (R, N+1, d): the direction along the great circle, the norm linearly. Straight where the ends are parallel."""
    return spherical_with_speed(z_a, z_b, segments)[0]


def spherical_with_speed(z_a: Tensor, z_b: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Spherical interpolation (R, N+1, d), and its speed |Z'| (R, N+1) there: with norm rho and angle theta, sqrt(rho'^2 + rho^2 theta^2)."""
    a, b = z_a.double()[:, None], z_b.double()[:, None]
    norms = [part.norm(dim=2, keepdim=True) for part in (a, b)]
    units = [part / norm.clamp(min=1e-300) for part, norm in zip((a, b), norms, strict=True)]
    angle = (units[0] * units[1]).sum(2, keepdim=True).clamp(-1, 1).acos()
    t = times(segments, a)
    usable = (angle.sin() > 1e-6) & (norms[0] > 0) & (norms[1] > 0)
    sine = torch.where(usable, angle.sin(), 1.0)
    direction = ((1 - t) * angle).sin() / sine * units[0] + (t * angle).sin() / sine * units[1]
    norm = norms[0] * (1 - t) + norms[1] * t
    curve = torch.where(usable, direction * norm, a * (1 - t) + b * t)
    speed = torch.where(usable, ((norms[1] - norms[0]).square() + (norm * angle).square()).sqrt(), (b - a).norm(dim=2, keepdim=True))
    return torch.cat([a, curve[:, 1:-1], b], 1), speed[:, :, 0]


def times(segments: int, like: Tensor) -> Tensor:
    """0, 1/N, ..., 1 as (N+1, 1)."""
    return torch.linspace(0, 1, segments + 1, dtype=torch.float64, device=like.device)[:, None]


def resample(points: Tensor, segments: int) -> Tensor:
    """The polylines (R, M+1, d) at N+1 equal times."""
    old = points.shape[1] - 1
    if old == segments:
        return points
    place = torch.linspace(0, old, segments + 1, dtype=torch.float64, device=points.device)
    left = place.floor().clamp(max=old - 1).long()
    part = (place - left)[:, None]
    moved = points[:, left] * (1 - part) + points[:, left + 1] * part
    return torch.cat([points[:, :1], moved[:, 1:-1], points[:, -1:]], 1)


def over(z_a: Tensor, place: Tensor, z_b: Tensor, segments: int) -> Tensor:
    """A bow from end to end over a place (R, d) at half time: the parabola through the three."""
    line, t = straight(z_a, z_b, segments), times(segments, z_a)
    return line + 4 * t * (1 - t) * (place.double() - (z_a.double() + z_b.double()) / 2)[:, None]


def local_starts(z_a: Tensor, z_b: Tensor, cost: PairCost, pairs: Tensor, segments: int, ellipse: Tensor, seed: int) -> Starts:
    """The line, the spherical arc, bows over the cheapest of many places near the middle, and over where going downhill from these ends.

    `ellipse` (R,): half the largest sum of distances to the ends. The lowest places invert the middle image (x_A + x_B) / 2.
    """
    places = middle_places(z_a, z_b, ellipse, PLACES, seed)
    values = cost(places, pairs)
    detour = values.topk(DETOURS, 1, largest=False).indices
    chosen = torch.gather(places, 1, detour[:, :, None].expand(-1, -1, places.shape[2]))
    low = downhill(chosen, cost, pairs, z_a, z_b, ellipse)
    found = [("line", straight(z_a, z_b, segments)), ("arc", spherical(z_a, z_b, segments))]
    for k in range(DETOURS):
        found += [("bow", over(z_a, chosen[:, k], z_b, segments)), ("middle image", over(z_a, low[:, k], z_b, segments))]
    points = torch.stack([part for _, part in found], 1)
    return Starts(points.flatten(0, 1), pairs.repeat_interleave(len(found)), [name for name, _ in found] * len(z_a))


def middle_places(z_a: Tensor, z_b: Tensor, ellipse: Tensor, count: int, seed: int) -> Tensor:
    """Places (R, count, d) in the plane halfway between the ends, inside the ellipsoid; more of them near the line."""
    a, b = z_a.double(), z_b.double()
    random = torch.randn(count, a.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(a.device)
    axis = torch.nn.functional.normalize(b - a, dim=1)
    across = random[None] - (random @ axis.T).T[:, :, None] * axis[:, None]
    across = torch.nn.functional.normalize(across, dim=2)
    reach = (ellipse.square() - (b - a).square().sum(1) / 4).clamp(min=0).sqrt()
    part = (torch.arange(count, dtype=torch.float64, device=a.device) + 0.5) / count
    return (a + b)[:, None] / 2 + across * (reach[:, None] * part)[:, :, None]


def downhill(places: Tensor, cost: PairCost, pairs: Tensor, z_a: Tensor, z_b: Tensor, ellipse: Tensor) -> Tensor:
    """Places (R, K, d) after DOWNHILL normalised gradient steps on the cost of a place, none of them out of the ellipsoid; the best of each."""
    a, b = z_a.double()[:, None], z_b.double()[:, None]
    z, momentum = places.clone(), torch.zeros_like(places)
    best, lowest = places.clone(), torch.full(places.shape[:2], torch.inf, dtype=torch.float64, device=places.device)
    reach = (a - b).norm(dim=2) / 2
    for k in range(DOWNHILL + 1):
        value, slope = cost.with_gradient(z, pairs)
        inside = (z - a).norm(dim=2) + (z - b).norm(dim=2) <= 2 * ellipse[:, None]
        better = (value < lowest) & inside & value.isfinite()
        lowest, best = torch.where(better, value, lowest), torch.where(better[:, :, None], z, best)
        momentum = 0.8 * momentum + torch.nn.functional.normalize(slope.nan_to_num(), dim=2)
        z = z - 0.05 * reach[:, :, None] * (1 - k / (DOWNHILL + 1)) * momentum
    return best


def graph_starts(z_a: Tensor, z_b: Tensor, cost: PairCost, pairs: Tensor, segments: int, ellipse: Tensor, seed: int) -> Starts:
    """The shortest path, pair by pair, over a graph of nearest neighbours among places all over the ellipsoid; for at most GRAPH_DIMENSIONS."""
    dimensions = z_a.shape[1]
    ball = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed % 2**31).draw(GRAPH_NODES, dtype=torch.float64)
    ball = in_ball(ball).to(z_a.device)
    found = []
    for k in range(len(z_a)):
        a, b = z_a[k].double(), z_b[k].double()
        half, long = (b - a).norm() / 2, ellipse[k]
        wide = (long.square() - half.square()).clamp(min=0).sqrt()
        axis = torch.nn.functional.normalize(b - a, dim=0)
        along = ball @ axis
        nodes = (a + b) / 2 + wide * (ball - along[:, None] * axis) + long * along[:, None] * axis
        nodes = torch.cat([a[None], b[None], straight(a[None], b[None], 64)[0, 1:-1], nodes])
        found.append(shortest(nodes, cost(nodes[None], pairs[k : k + 1])[0], segments))
    return Starts(torch.stack(found), pairs, ["graph"] * len(z_a))


def in_ball(uniform: Tensor) -> Tensor:
    """Points uniform in the unit cube (n, d) to points uniform in the unit ball: for d = 1 a stretch, else by normal scores and radii."""
    n, d = uniform.shape
    if d == 1:
        return 2 * uniform - 1
    direction = torch.nn.functional.normalize(torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)), dim=1)
    radius = ((torch.arange(n, dtype=torch.float64) * (math.sqrt(5) - 1) / 2) % 1).pow(1 / d)  # equidistributed
    return direction * radius[:, None]


def shortest(nodes: Tensor, cost: Tensor, segments: int) -> Tensor:
    """The cheapest walk from node 0 to node 1 (trapezoid rule along edges) as a polyline (N+1, d) whose segments cost the same."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import dijkstra
    from scipy.spatial import cKDTree

    place, price = nodes.cpu().numpy(), cost.cpu().numpy()
    usable = np.flatnonzero(np.isfinite(price))
    place, price = place[usable], price[usable]
    if len(place) <= GRAPH_NEIGHBOURS:
        return straight(nodes[:1], nodes[1:2], segments)[0]
    distance, neighbour = cKDTree(place).query(place, GRAPH_NEIGHBOURS + 1)
    rows = np.repeat(np.arange(len(place)), GRAPH_NEIGHBOURS)
    columns, length = neighbour[:, 1:].ravel(), distance[:, 1:].ravel()
    edges = csr_matrix((length * (price[rows] + price[columns]) / 2, (rows, columns)), (len(place), len(place)))
    _, before = dijkstra(edges, directed=False, indices=0, return_predecessors=True)
    walk = [1]
    while before[walk[-1]] >= 0:
        walk.append(int(before[walk[-1]]))
    if walk[-1] != 0:  # not connected
        walk = [1, 0]
    walk.reverse()
    corners = place[walk]
    spent = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1) * (price[walk][1:] + price[walk][:-1]) / 2)])
    when = np.linspace(0, spent[-1], segments + 1)
    line = np.stack([np.interp(when, spent, corners[:, j]) for j in range(place.shape[1])], 1)
    return torch.from_numpy(line).to(nodes.device)
