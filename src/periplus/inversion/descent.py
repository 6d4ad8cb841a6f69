"""Dense BFGS on many rows at once, each with its own line search.

Generators with (leaky) ReLU have minima on kinks, where no gradient vanishes, so a method that waits for small gradients or trusts one Hessian does
not arrive. BFGS does: with the bisection line search for the weak Wolfe conditions it converges on nonsmooth functions as a rule, to Clarke
stationary points, with curvature growing without bound across the kinks (Lewis and Overton 2013, "Nonsmooth optimization via quasi-Newton methods").

Rows march together through evaluations, not through iterations: each evaluation serves every live row at whatever stage of its line search it is.
Rows that are done leave the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from periplus.inversion.rows import dot, times

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
#: Called with the rows (n,) that are still searched, their points (n, d) and values (n,).
Moved = Callable[[Tensor, Tensor, Tensor], None]
#: Evaluations between two looks at which rows are done.
LOOK = 5
ARMIJO, WOLFE = 1e-4, 0.5
#: A row rests when its last PATIENCE evaluations lowered f by less than this part of it.
PATIENCE, RELATIVE_PROGRESS = 50, 1e-4
MAX_BISECTIONS = 30


@dataclass
class Rows:
    """Points (n, d), their values (n,) in float64, gradients (n, d), and BFGS inverse Hessians (n, d, d)."""

    y: Tensor
    f: Tensor
    g: Tensor
    inverse: Tensor

    def take(self, rows: Tensor) -> Rows:
        return Rows(self.y[rows], self.f[rows], self.g[rows], self.inverse[rows])

    def put(self, rows: Tensor, other: Rows) -> None:
        for name in ("y", "f", "g", "inverse"):
            getattr(self, name)[rows] = getattr(other, name)


def start_rows(evaluate: Evaluate, y: Tensor, image: Tensor) -> Rows:
    """Rows at their starts, with the first direction a gradient step of length 1 at most."""
    f, g = evaluate(y, image)
    norm = g.norm(dim=1).clamp(min=torch.finfo(g.dtype).tiny)
    eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    return Rows(y.clone(), f, g, eye / norm[:, None, None])


def descend(
    evaluate: Evaluate,
    rows: Rows,
    image: Tensor,
    evaluations: int,
    floor: float,
    reach: float,
    fresh: bool = True,
    moved: Moved | None = None,
) -> None:
    """Lower f of all rows in place by at most so many evaluations each.

    Args:
        evaluate: (y, image) -> (f, gradient). rows: where they are. image: (n,) the target of each.
        floor: rows at or below this value are done. reach: rows beyond this norm have escaped and are done.
        fresh: the inverse Hessians are only a first guess, to be scaled by the first step.
        moved: told every few evaluations where the live rows are.
    """
    live = (rows.f > floor).nonzero()[:, 0]
    if not len(live):
        return
    search = _Search(rows.take(live), image[live], fresh)
    for k in range(evaluations):
        search.step(evaluate)
        if k % LOOK != LOOK - 1 and k != evaluations - 1:
            continue
        if moved is not None:
            moved(live, search.rows.y, search.rows.f)
        done = search.done(floor, reach) if k < evaluations - 1 else torch.ones(len(live), dtype=torch.bool, device=live.device)
        if done.sum() >= 0.1 * len(live) or k == evaluations - 1:
            rows.put(live[done], search.rows.take(done.nonzero()[:, 0]))
            keep = (~done).nonzero()[:, 0]
            if not len(keep):
                return
            live = live[keep]
            search.keep(keep)


class _Search:
    """The live rows and the state of their line searches."""

    def __init__(self, rows: Rows, image: Tensor, fresh: bool) -> None:
        n, like = len(rows.y), rows.y
        self.rows, self.image = rows, image
        self.fresh = torch.full((n,), fresh, device=like.device)
        self.direction = -times(rows.inverse, rows.g)
        self.t = torch.ones(n, dtype=like.dtype, device=like.device)
        self.low = torch.zeros_like(self.t)
        self.high = torch.full_like(self.t, math.inf)
        self.tries = torch.zeros(n, dtype=torch.long, device=like.device)
        self.clock = torch.zeros(n, dtype=torch.long, device=like.device)
        self.mark = rows.f.clone()
        self.resting = torch.zeros(n, dtype=torch.bool, device=like.device)

    def keep(self, which: Tensor) -> None:
        self.rows = self.rows.take(which)
        for name in ("image", "fresh", "direction", "t", "low", "high", "tries", "clock", "mark", "resting"):
            setattr(self, name, getattr(self, name)[which])

    def done(self, floor: float, reach: float) -> Tensor:
        escaped: Tensor = self.rows.y.norm(dim=1) > reach
        return self.resting | (self.rows.f <= floor) | escaped

    def step(self, evaluate: Evaluate) -> None:
        """One evaluation of every row: accept the trial point, or narrow the bracket of the step length."""
        rows = self.rows
        slope = dot(rows.g, self.direction)
        trial = rows.y + self.t[:, None] * self.direction
        f, g = evaluate(trial, self.image)
        low_enough = f <= rows.f + ARMIJO * (self.t * slope).double()
        flat_enough = dot(g, self.direction) >= WOLFE * slope
        accepted = low_enough & flat_enough & g.isfinite().all(1)
        self.tries += 1
        self.high = torch.where(low_enough, self.high, self.t)
        self.low = torch.where(low_enough & ~flat_enough, self.t, self.low)
        exhausted = ~accepted & (self.tries > MAX_BISECTIONS)
        settle = accepted | (exhausted & (f < rows.f))
        self._accept(accepted.nonzero()[:, 0], trial, g)
        rows.y = torch.where(settle[:, None], trial, rows.y)
        rows.f = torch.where(settle, f, rows.f)
        rows.g = torch.where(settle[:, None], g, rows.g)
        self._next_trial(accepted, exhausted)

    def _accept(self, which: Tensor, trial: Tensor, g: Tensor) -> None:
        """BFGS update of the inverse Hessians of these rows."""
        s, change = trial[which] - self.rows.y[which], g[which] - self.rows.g[which]
        inverse = self.rows.inverse[which]
        product = dot(s, change)
        fresh = self.fresh[which]
        scale = (product / change.square().sum(1).clamp(min=1e-30))[:, None, None] * torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
        inverse = torch.where(fresh[:, None, None], scale, inverse)
        hc = times(inverse, change)
        rho = 1 / product
        cross = rho[:, None] * hc
        factor = rho * (1 + rho * dot(change, hc))
        half = 0.5 * factor[:, None] * s - cross
        updated = inverse + s[:, :, None] * half[:, None] + half[:, :, None] * s[:, None]
        good = (product > 0) & updated.isfinite().all(2).all(1)
        self.rows.inverse[which] = torch.where(good[:, None, None], updated, inverse)
        self.fresh[which] = fresh & ~good

    def _next_trial(self, accepted: Tensor, exhausted: Tensor) -> None:
        rows = self.rows
        which = accepted.nonzero()[:, 0]
        direction = -times(rows.inverse[which], rows.g[which])
        uphill = dot(direction, rows.g[which]) >= 0  # rounding has spoilt the matrix
        self.resting[which[uphill]] = True
        self.direction[which] = direction
        self.t = torch.where(accepted, torch.ones_like(self.t), torch.where(self.high.isfinite(), 0.5 * (self.low + self.high), 2 * self.t))
        self.low = torch.where(accepted, torch.zeros_like(self.low), self.low)
        self.high = torch.where(accepted, torch.full_like(self.high, math.inf), self.high)
        self.tries = torch.where(accepted, torch.zeros_like(self.tries), self.tries)
        self.resting |= exhausted
        self.clock += 1
        due = self.clock >= PATIENCE
        self.resting |= due & (self.mark - rows.f <= RELATIVE_PROGRESS * rows.f.abs())
        self.mark = torch.where(due, rows.f, self.mark)
        self.clock = torch.where(due, torch.zeros_like(self.clock), self.clock)
