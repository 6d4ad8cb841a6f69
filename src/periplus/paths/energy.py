"""The energy of a polyline, its gradient, and the metric in which that gradient is a good step.

A path Z(t) with the weight w = c^2 (length reading) or w = c (energy reading) has E = int w ||Z'||^2 dt. For nodes Z_0..Z_N, d_i = Z_{i+1} - Z_i and
wbar_i = (w_i + w_{i+1}) / 2,

    E = N sum_i wbar_i |d_i|^2

    gradient at node i = 1..N-1:   g_i = 2N (wbar_{i-1} d_{i-1} - wbar_i d_i) + s_i,     s_i = N/2 grad w_i (|d_{i-1}|^2 + |d_i|^2)

and with q points to a segment wbar_i is the mean of w along it by the trapezoid rule, whose gradient falls to its two nodes in the ratio of their
distances. q = 1 is the formula above; a larger q is for decoders with kinks (`periplus.paths.searching`).

By the inequality of Cauchy and Schwarz (int c ||Z'||)^2 <= int c^2 ||Z'||^2, with equality where c ||Z'|| is constant: both readings are the
minimisation of one energy, and only that energy is ever discretised (the discrete length has minimisers whose nodes have run together).

Holding w fixed, the Hessian is H = 2N tridiag(-wbar_{i-1}, wbar_{i-1} + wbar_i, -wbar_i): a weighted Laplacian, a resistor chain with conductances
wbar_i. Its inverse costs two cumulative sums (`precondition`), and in the norm of H the number of steps does not grow with N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from periplus.paths.costs import PairCost


def refine(points: Tensor, quadrature: int) -> Tensor:
    """The same polylines (R, N+1, d) with `quadrature` equal parts to each segment: (R, N q + 1, d)."""
    if quadrature == 1:
        return points
    along = torch.arange(quadrature, dtype=points.dtype, device=points.device)[:, None] / quadrature
    inside = points[:, :-1, None] + along * points.diff(dim=1)[:, :, None]
    return torch.cat([inside.flatten(1, 2), points[:, -1:]], 1)


def mean_weights(w: Tensor, quadrature: int = 1) -> Tensor:
    """wbar (R, N) of weights at the nodes and between them (R, N q + 1)."""
    pairs = (w[:, :-1] + w[:, 1:]) / 2
    return pairs if quadrature == 1 else pairs.unflatten(1, (-1, quadrature)).mean(2)


def energy_and_gradient(
    points: Tensor, ends: Tensor, cost: PairCost, pairs: Tensor, power: int, quadrature: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """E (R,), its gradient (R, N-1, d) with respect to the inner nodes, and wbar (R, N). `ends` (R, 2): the costs of the first and the last node."""
    segments, q = points.shape[1] - 1, quadrature
    c, slope = cost.with_gradient(refine(points, q)[:, 1:-1], pairs)
    w = torch.cat([ends[:, :1], c, ends[:, 1:]], 1) ** power
    steps, wbar = points.diff(dim=1), mean_weights(w, q)
    squares = steps.square().sum(2)
    flow = wbar[:, :, None] * steps
    pull = torch.nn.functional.pad((power * c ** (power - 1))[:, :, None] * slope, (0, 0, 1, 1))  # grad w at every point; the ends do not move
    nodes, between = pull[:, ::q], pull[:, :-1].unflatten(1, (segments, q))[:, :, 1:]
    part = torch.arange(1, q, dtype=points.dtype, device=points.device)[:, None] / q
    share = (segments / q) * squares[:, :, None]
    before, after = share * ((1 - part) * between).sum(2), share * (part * between).sum(2)
    source = (share[:, :-1] + share[:, 1:]) / 2 * nodes[:, 1:-1] + before[:, 1:] + after[:, :-1]
    gradient = 2 * segments * (flow[:, :-1] - flow[:, 1:]) + source
    return segments * (wbar * squares).sum(1), gradient, wbar


def precondition(q: Tensor, wbar: Tensor) -> Tensor:
    """H^{-1} q for inner nodes q (R, N-1, d) and conductances wbar (R, N): two cumulative sums.

    The current through edge i is (p - Q_i), Q_i the sum of the sources up to node i; p makes the potential end where it began, at zero.
    """
    sources = torch.nn.functional.pad(q.cumsum(1), (0, 0, 1, 0))
    resistance = 1 / wbar[:, :, None]
    p = (sources * resistance).sum(1, keepdim=True) / resistance.sum(1, keepdim=True)
    return ((p - sources) * resistance).cumsum(1)[:, :-1] / (2 * wbar.shape[1])


def residual(gradient: Tensor, step: Tensor, value: Tensor) -> Tensor:
    """sqrt(g' H^{-1} g / 2E) (R,): the gradient's norm in the metric of H, over the path's own (Z' H Z = 2E); `step` is H^{-1} g.

    Free of units, of the scale of the cost and of the number of nodes.
    """
    return ((gradient * step).sum((1, 2)).clamp(min=0) / (2 * value)).sqrt()
