"""L-BFGS on many polylines at once, in the metric of the path (Nocedal & Wright 2006, algorithm 7.4, with H^{-1} as the initial matrix).

Every row has its own memory, its own line search and its own end: what has converged, or cannot be improved, leaves the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from periplus.paths.costs import PairCost
from periplus.paths.energy import energy_and_gradient, precondition, residual

MEMORY = 20
#: What H^{-1} is multiplied by before there is a pair: with 1 the first step had nearly always to be shortened, to about this.
FIRST_SCALE = 0.5
#: Sufficient decrease (Armijo) and the number of shortenings before a direction is given up.
DECREASE, SHORTENINGS = 1e-4, 14
PATIENCE, PROGRESS = 25, 1e-5
#: A pair (s, y) enters the memory when y's is at least this part of s'Hs: with less the curvature is noise, or negative.
CURVATURE = 1e-3
#: Relative rounding of an energy made of float32 costs: a difference below it is none.
ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-14}


@dataclass(frozen=True)
class Solved:
    """points (R, N+1, d), energy (R,), residual (R,), iterations (R,), all in the order of the rows that went in."""

    points: Tensor
    energy: Tensor
    residual: Tensor
    iterations: Tensor


class _Memory:
    """The last differences of points and gradients of each row: s, y (MEMORY, R, N-1, d), 1 / y's (MEMORY, R); zero where there is none."""

    def __init__(self) -> None:
        self.s: list[Tensor] = []
        self.y: list[Tensor] = []
        self.rho: list[Tensor] = []

    def add(self, s: Tensor, y: Tensor, rho: Tensor) -> None:
        for kept, new in ((self.s, s), (self.y, y), (self.rho, rho)):
            kept.append(new)
            del kept[:-MEMORY]

    def forget(self, rows: Tensor) -> None:
        """Rows (R,) whose directions have failed start anew."""
        self.rho = [torch.where(rows, 0.0, rho) for rho in self.rho]

    def keep(self, rows: Tensor) -> None:
        self.s, self.y, self.rho = ([part[rows] for part in kept] for kept in (self.s, self.y, self.rho))

    def scale(self, wbar: Tensor, like: Tensor) -> Tensor:
        """(R,) what H^{-1} is multiplied by: y's / y'H^{-1}y of the last pair, for the curvature that H leaves out."""
        found = torch.full_like(like[:, 0, 0], FIRST_SCALE)
        if self.s:
            usable = self.rho[-1] > 0
            found = torch.where(usable, 1 / (self.rho[-1] * _dot(self.y[-1], precondition(self.y[-1], wbar))), found)
        return found

    def direction(self, gradient: Tensor, wbar: Tensor) -> Tensor:
        """- (approximate inverse Hessian) gradient, (R, N-1, d): the two loops."""
        q, alphas = gradient, []
        for s, y, rho in zip(reversed(self.s), reversed(self.y), reversed(self.rho), strict=True):
            alpha = rho * _dot(s, q)
            q = q - alpha[:, None, None] * y
            alphas.append(alpha)
        r = self.scale(wbar, gradient)[:, None, None] * precondition(q, wbar)
        for s, y, rho, alpha in zip(self.s, self.y, self.rho, reversed(alphas), strict=True):
            r = r + (alpha - rho * _dot(y, r))[:, None, None] * s
        return -r


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("rnd,rnd->r", a, b)


def minimise(points: Tensor, cost: PairCost, pairs: Tensor, power: int, tolerance: float, quadrature: int = 1, max_iterations: int = 300) -> Solved:
    """Minimise the energy of each polyline, its ends held, until the residual is at most `tolerance`.

    Args:
        points: (R, N+1, d) where to begin. pairs: (R,) whose cost each row has.
        power: 2 (length reading) or 1 (energy reading): w = c^power. quadrature: points to a segment (`periplus.paths.energy`).

    A row leaves as it is when PATIENCE steps have brought neither its residual down by a tenth nor its energy by PROGRESS: it sits on kinks, or at
    the rounding of its cost.
    """
    points = points.double().clone()
    count, segments = len(points), points.shape[1] - 1
    zeros = torch.zeros(count, dtype=torch.float64, device=points.device)
    final = Solved(points, zeros, zeros.clone(), torch.zeros(count, dtype=torch.long, device=points.device))
    ends = cost(points[:, [0, -1]], pairs)
    if segments < 2:
        return Solved(points, segments * ends.pow(power).mean(1) * points.diff(dim=1).square().sum((1, 2)), final.residual, final.iterations)
    rows = torch.arange(count, device=points.device)
    z, memory = points, _Memory()
    problem = _Problem(cost, power, quadrature, ROUNDING.get(cost.dtype, 1e-7))
    value, gradient, wbar = problem(z, ends, pairs)
    best, since = torch.full((2, count), torch.inf, dtype=torch.float64, device=points.device), torch.zeros_like(value)
    fresh = torch.ones(count, dtype=torch.bool, device=points.device)
    stuck = torch.zeros_like(fresh)
    for iteration in range(max_iterations + 1):
        step = precondition(gradient, wbar)
        left = residual(gradient, step, value)
        better = (left < 0.9 * best[0]) | (value < (1 - PROGRESS) * best[1])
        best, since = torch.where(better, torch.stack([left, value]), best), torch.where(better, 0.0, since + 1)
        done = (left <= tolerance) | stuck | (since >= PATIENCE) | ~value.isfinite() | (iteration == max_iterations)
        if bool(done.any()):
            gone = rows[done]
            final.points[gone], final.energy[gone], final.residual[gone] = z[done], value[done], left[done]
            final.iterations[gone] = iteration
            keep = ~done
            if not bool(keep.any()):
                break
            rows, z, ends, pairs, value, gradient, wbar, fresh, step, since = (
                part[keep] for part in (rows, z, ends, pairs, value, gradient, wbar, fresh, step, since)
            )
            best = best[:, keep]
            memory.keep(keep)
        direction = memory.direction(gradient, wbar)
        slope = _dot(gradient, direction)
        uphill = slope >= 0
        if bool(uphill.any()):
            memory.forget(uphill)
            direction = torch.where(uphill[:, None, None], -step, direction)
            slope, fresh = _dot(gradient, direction), fresh | uphill
        moved, new_value, new_gradient, new_wbar, failed = _search(problem, z, ends, pairs, (value, gradient, wbar), direction, slope)
        s, y = moved[:, 1:-1] - z[:, 1:-1], new_gradient - gradient
        curvature = _dot(s, y)
        metric = 2 * segments * (wbar * moved.sub(z).diff(dim=1).square().sum(2)).sum(1)
        rho = torch.where((curvature > CURVATURE * metric) & ~failed, 1 / curvature, 0.0)
        memory.add(s, y, rho)
        memory.forget(failed)
        stuck = failed & fresh  # not even the plain preconditioned gradient goes down
        fresh = failed
        z, value, gradient, wbar = moved, new_value, new_gradient, new_wbar
    return final


@dataclass(frozen=True)
class _Problem:
    """Energy, gradient and wbar of polylines (R, N+1, d) with ends' costs (R, 2) for pairs (R,)."""

    cost: PairCost
    power: int
    quadrature: int
    rounding: float

    def __call__(self, points: Tensor, ends: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return energy_and_gradient(points, ends, self.cost, pairs, self.power, self.quadrature)


def _search(
    problem: _Problem, z: Tensor, ends: Tensor, pairs: Tensor, here: tuple[Tensor, Tensor, Tensor], direction: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backtracking from a step of one, row by row: (points, E, gradient, wbar, failed). Rows that fail stay where they are."""
    value = here[0]
    found = [z.clone(), *(part.clone() for part in here)]
    rows = torch.arange(len(z), device=z.device)
    failed = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    t = torch.ones_like(value)
    for _ in range(SHORTENINGS):
        trial = z[rows].clone()
        trial[:, 1:-1] += t[:, None, None] * direction[rows]
        there = problem(trial, ends[rows], pairs[rows])
        e, before, fall = there[0], value[rows], slope[rows]
        good = e.isfinite() & there[1].isfinite().all(2).all(1) & (e <= before + DECREASE * t * fall + problem.rounding * before)
        for kept, new in zip(found, (trial, *there), strict=True):
            kept[rows[good]] = new[good]
        bad = ~good
        rows, t = rows[bad], t[bad]
        if not len(rows):
            break
        # the minimum of the parabola through E(0), E'(0) and E(t), within a tenth and a half of t
        parabola = -fall[bad] * t.square() / (2 * (e[bad] - before[bad] - t * fall[bad]))
        t = torch.maximum(torch.minimum(torch.where(parabola.isfinite(), parabola, 0.0), t / 2), t / 10)
    failed[rows] = True
    points, energies, gradients, conductances = found
    return points, energies, gradients, conductances, failed
