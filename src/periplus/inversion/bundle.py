"""The second-order finish, on kinks and off them: a bundle-Newton method for many rows at once.

Around a point y a piecewise smooth f is modelled by the pieces met so far, each a quadratic with the one curvature B, an exact Hessian made positive:

    m(s) = f(y) + max_i ( g_i.s - a_i ) + 1/2 s'Bs           g_i: gradient of piece i carried to y; a_i >= 0: how far it lies below f at y

Its minimiser is s = -B^-1 p, p = sum_i w_i g_i, where the weights w (w_i >= 0, sum 1) minimise 1/2 |p|^2_{B^-1} + sum_i w_i a_i: a small quadratic
programme, solved by active sets in float64. A trial at y + s either lowers f (y moves) or shows a piece that the model lacked (the bundle grows):
Luksan and Vlcek 1998; with one piece it is Newton's method. At the end p is a convex combination of gradients taken close to y: where it vanishes,
y is stationary in Clarke's sense, and the directions in which the used pieces differ are those across the kink (Lemarechal, Oustry and Sagastizabal
2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from periplus.errors import NonFiniteError
from periplus.inversion.descent import Evaluate
from periplus.inversion.rows import dot, times

SUFFICIENT = 0.05
CURVATURE_FLOOR = 1e-4
#: Trials within the neighbourhood go this part of it, halved at most HALVINGS times while they teach nothing, each displaced by JITTER of the step.
NEAR_STEP, HALVINGS, JITTER = 0.5, 4, 0.05
#: Pieces from farther away than this many radii are forgotten when the radius shrinks.
MEMORY = 4.0


@dataclass
class Bundle:
    """Pieces of n rows in K slots: gradients (n, K, d) carried to the centre, gaps (n, K) >= 0, weights (n, K), distances (n, K); float64."""

    gradient: Tensor
    gap: Tensor
    weight: Tensor
    used: Tensor
    distance: Tensor

    def take(self, rows: Tensor) -> Bundle:
        return Bundle(self.gradient[rows], self.gap[rows], self.weight[rows], self.used[rows], self.distance[rows])

    def put(self, rows: Tensor, other: Bundle) -> None:
        for name in ("gradient", "gap", "weight", "used", "distance"):
            getattr(self, name)[rows] = getattr(other, name)


def new_bundle(g: Tensor) -> Bundle:
    """A bundle of the one piece with gradient g (n, d)."""
    n, d = g.shape
    slots = d + 2
    zeros = torch.zeros(n, slots, dtype=torch.float64, device=g.device)
    gradient = torch.zeros(n, slots, d, dtype=torch.float64, device=g.device)
    gradient[:, 0] = g.double()
    weight, used = zeros.clone(), torch.zeros(n, slots, dtype=torch.bool, device=g.device)
    weight[:, 0], used[:, 0] = 1, True
    return Bundle(gradient, zeros.clone(), weight, used, zeros.clone())


def add_piece(bundle: Bundle, g: Tensor, gap: Tensor, distance: Tensor, rows: Tensor) -> None:
    """Put a piece into a free slot of these rows; where none is free, in place of the one of least weight."""
    slot = torch.where(bundle.used[rows], bundle.weight[rows], -1).argmin(1)
    bundle.gradient[rows, slot] = g
    bundle.gap[rows, slot] = gap
    bundle.distance[rows, slot] = distance
    bundle.weight[rows, slot] = 0
    bundle.weight[rows] = bundle.weight[rows] / bundle.weight[rows].sum(1, keepdim=True).clamp(min=1e-300)
    bundle.weight[rows, slot] = 1 - bundle.weight[rows].sum(1)
    bundle.used[rows, slot] = True


def solve_weights(bundle: Bundle, metric: Tensor) -> Tensor:
    """Minimise 1/2 |sum w g|^2_metric + sum w gap over the simplex, from feasible weights; slots that end without weight become free.

    metric: (n, d, d), the inverse of the curvature. Returns p (n, d). Active sets: the solution of the equality problem where it is feasible, else
    the first slot that would turn negative leaves, until nothing does.
    """
    n, slots, d = bundle.gradient.shape
    gram = bundle.gradient @ metric @ bundle.gradient.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-300)
    gram = gram / scale[:, None, None]
    gap = bundle.gap / scale[:, None]
    weight, used = bundle.weight.clone(), bundle.used.clone()
    open_ = torch.arange(n, device=gram.device)
    for _ in range(2 * slots):
        target = _equality(gram[open_], gap[open_], used[open_])
        step = target - weight[open_]
        negative = used[open_] & (target <= 0)
        room = torch.where(negative, weight[open_] / (-step).clamp(min=1e-300), torch.full_like(step, 1.0)).clamp(0, 1)
        room = torch.where(negative & (step >= 0), torch.zeros_like(room), room)
        t, leaving = room.min(1)
        blocked = negative.any(1)
        t = torch.where(blocked, t, torch.ones_like(t))
        weight[open_] = (weight[open_] + t[:, None] * step).clamp(min=0)
        out = open_[blocked]
        used[out, leaving[blocked]] = False
        weight[out, leaving[blocked]] = 0
        open_ = out
        if not len(open_):
            break
    weight = weight / weight.sum(1, keepdim=True)
    bundle.weight, bundle.used = weight, used
    p: Tensor = (weight[:, :, None] * bundle.gradient).sum(1)
    return p


def _equality(gram: Tensor, gap: Tensor, used: Tensor) -> Tensor:
    """Weights of sum 1 on the used slots that minimise 1/2 w'Gw + gap.w, of any sign."""
    n, slots = gap.shape
    mask = used.double()
    system = torch.zeros(n, slots + 1, slots + 1, dtype=gram.dtype, device=gram.device)
    system[:, :slots, :slots] = gram * mask[:, :, None] * mask[:, None] + torch.diag_embed(1 - mask + 1e-12 * mask)
    system[:, :slots, slots] = mask
    system[:, slots, :slots] = mask
    right = torch.cat([-gap * mask, torch.ones(n, 1, dtype=gram.dtype, device=gram.device)], 1)
    solved: Tensor = torch.linalg.solve(system, right)
    return solved[:, :slots]


def positive_curvature(hessian: Tensor, floor: float = CURVATURE_FLOOR) -> tuple[Tensor, Tensor]:
    """B (n, d, d), the Hessian with its eigenvalues made positive and bounded below, and its inverse; float64."""
    if not bool(hessian.isfinite().all()):
        raise NonFiniteError("decode has a Hessian with values that are not finite near a code that was searched: restrict the domain to a ball")
    values, vectors = torch.linalg.eigh(hessian.double())
    magnitude = values.abs()
    magnitude = magnitude.clamp(min=1e-30).maximum(floor * magnitude.amax(1, keepdim=True))
    scaled = vectors * magnitude[:, None]
    return scaled @ vectors.transpose(1, 2), (vectors / magnitude[:, None]) @ vectors.transpose(1, 2)


@dataclass
class Finish:
    """What the finish left of n rows: points, values, gradients, bundles, p (n, d), and the decrease that the model promises within the radius.

    promise is that of the steps still allowed, whole that of the model without a limit. radius: the longest step; up to the neighbourhood a row is
    *near*, and gaps count as zero. done: rows that rest.
    """

    y: Tensor
    f: Tensor
    g: Tensor
    bundle: Bundle
    p: Tensor
    promise: Tensor
    whole: Tensor
    radius: Tensor
    done: Tensor


@dataclass(frozen=True)
class Goal:
    """When a row rests: the model promises at most `promise` (n,), or |p| is at most `slope` (n,), of gradients taken within `nearness`."""

    promise: Tensor
    slope: Tensor
    nearness: float

    def take(self, rows: Tensor) -> Goal:
        return Goal(self.promise[rows], self.slope[rows], self.nearness)


def finish(
    evaluate: Evaluate, y: Tensor, f: Tensor, g: Tensor, image: Tensor, hessian: Tensor, evaluations: int, goal: Goal, radius: float
) -> Finish:
    """Bundle-Newton from points y (n, d), at most so many evaluations per row, until each row's goal is met.

    radius: the longest step at first; it doubles where a step succeeds, and shrinks where trials are not foretold or the model has nothing left to
    say; far pieces are then forgotten. Within the neighbourhood the model becomes Goldstein's subdifferential: the smallest convex combination of
    gradients taken there (in the curvature's metric), whatever rounding does to f.
    """
    curvature, metric = positive_curvature(hessian)
    n, unknown = len(y), torch.full_like(f, torch.inf)
    rest = torch.zeros_like(f).bool()
    state = Finish(y.clone(), f.clone(), g.clone(), new_bundle(g), g.double(), unknown, unknown.clone(), torch.full_like(f, radius), rest)
    live = torch.arange(n, device=y.device)
    jitter = torch.randn(evaluations, y.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.device)
    for k in range(evaluations):
        step = _solve(state, live, metric[live], goal.take(live))
        going = ~state.done[live]
        live, step = live[going], step[going]
        if not len(live):
            return state
        near = state.radius[live] <= goal.nearness
        shake = JITTER * state.radius[live] / y.shape[1] ** 0.5 * near
        _try(evaluate, state, live, image[live], curvature[live], step + shake[:, None] * jitter[k], goal)
    _solve(state, live, metric[live], goal.take(live))
    return state


def _solve(state: Finish, live: Tensor, metric: Tensor, goal: Goal) -> Tensor:
    """Weights of the live rows and the step (n, d) that their models suggest; which rows rest, which come nearer."""
    step = torch.zeros_like(state.p[live])
    open_ = torch.arange(len(live), device=live.device)
    for _ in range(2):
        rows = live[open_]
        step[open_] = _weigh(state, rows, metric[open_], goal.nearness)
        bundle = state.bundle.take(rows)
        distance = (bundle.distance * (bundle.weight > 0)).amax(1)
        nothing_left = (state.whole[rows] <= goal.promise[open_]) | (state.p[rows].norm(dim=1) <= goal.slope[open_])
        state.done[rows] = nothing_left & (distance <= goal.nearness)
        closer = nothing_left & ~state.done[rows] & (state.radius[rows] > goal.nearness)
        _come_near(state, rows[closer], goal.nearness)
        open_ = open_[closer]
        if not len(open_):
            break
    return step


def _weigh(state: Finish, rows: Tensor, metric: Tensor, nearness: float) -> Tensor:
    near = (state.radius[rows] <= nearness)[:, None]
    bundle = state.bundle.take(rows)
    own_gap = bundle.gap
    bundle.gap = torch.where(near, 0, own_gap)
    p = solve_weights(bundle, metric)
    newton = -times(metric, p)
    t = (state.radius[rows] / newton.norm(dim=1).clamp(min=1e-300)).clamp(max=1)
    state.p[rows], state.whole[rows] = p, -0.5 * dot(newton, p) + (bundle.weight * bundle.gap).sum(1)
    state.promise[rows] = t * state.whole[rows]
    bundle.gap = own_gap
    state.bundle.put(rows, bundle)
    step: Tensor = t[:, None] * newton
    return step


def _come_near(state: Finish, rows: Tensor, nearness: float) -> None:
    """Shrink the radius to the neighbourhood's and forget what lies beyond it."""
    state.radius[rows] = NEAR_STEP * nearness
    _forget(state, rows, torch.full_like(state.f[rows], nearness))


def _forget(state: Finish, rows: Tensor, reach: Tensor) -> None:
    """Drop pieces from farther than reach (n,); the centre's own piece takes their weight."""
    bundle = state.bundle.take(rows)
    bundle.used &= bundle.distance <= reach[:, None]
    bundle.weight = torch.where(bundle.used, bundle.weight, 0)
    state.bundle.put(rows, bundle)
    add_piece(state.bundle, state.g[rows].double(), torch.zeros_like(reach), torch.zeros_like(reach), rows)


def _try(evaluate: Evaluate, state: Finish, live: Tensor, image: Tensor, curvature: Tensor, step: Tensor, goal: Goal) -> None:
    """One trial of every live row: a step of the centre, or a new piece."""
    f, promise = state.f[live], state.promise[live]
    trial = state.y[live] + step.to(state.y)
    moved = (trial - state.y[live]).double()  # what was really stepped, after rounding
    ft, gt = evaluate(trial, image)
    bent = times(curvature, moved)
    gap = (f - (ft - dot(gt.double(), moved) + 0.5 * dot(bent, moved))).abs()
    rounding = 1.5 * torch.finfo(gt.dtype).eps * f
    better = ft < f - (SUFFICIENT * promise).maximum(rounding)
    go, stay = better.nonzero()[:, 0], (~better).nonzero()[:, 0]
    _null_steps(state, live[stay], (gt.double() - bent)[stay], gap[stay], moved[stay], promise[stay], goal.nearness)
    _serious_steps(state, live[go], trial[go], ft[go], gt[go], moved[go], bent[go])


def _null_steps(state: Finish, rows: Tensor, g: Tensor, gap: Tensor, moved: Tensor, promise: Tensor, nearness: float) -> None:
    """The trial did not help: its piece joins the bundle, and where that piece would not have foretold it, the steps get shorter."""
    distance, longest = moved.norm(dim=1), NEAR_STEP * nearness
    near, radius = state.radius[rows] <= nearness, state.radius[rows]
    foretold = dot(g, moved) - torch.where(near, 0, gap) >= -0.5 * promise
    add_piece(state.bundle, g, gap, distance, rows)
    halved = torch.where(0.5 * radius < longest * 0.5**HALVINGS, longest, 0.5 * radius)
    shrunk = torch.where(near, halved, (0.25 * distance).maximum(torch.full_like(radius, longest)))
    state.radius[rows] = torch.where(foretold, torch.where(near, longest, radius), shrunk)
    blamed = (~foretold & ~near).nonzero()[:, 0]
    _forget(state, rows[blamed], (MEMORY * shrunk[blamed]).clamp(min=nearness))


def _serious_steps(state: Finish, rows: Tensor, trial: Tensor, f: Tensor, g: Tensor, moved: Tensor, bent: Tensor) -> None:
    """The centre moves: pieces are carried along, and the piece at the new centre joins them."""
    old, length = state.bundle.take(rows), moved.norm(dim=1)
    piece = state.f[rows][:, None] - old.gap + (old.gradient @ moved[:, :, None])[:, :, 0] + 0.5 * dot(bent, moved)[:, None]
    old.gap = torch.where(old.used, (f[:, None] - piece).abs(), torch.zeros_like(piece))
    old.gradient = old.gradient + bent[:, None]
    old.distance = old.distance + length[:, None]
    state.bundle.put(rows, old)
    state.radius[rows] = torch.maximum(state.radius[rows], 2 * length)
    state.y[rows], state.f[rows], state.g[rows] = trial, f, g
    add_piece(state.bundle, g.double(), torch.zeros_like(f), torch.zeros_like(f), rows)
