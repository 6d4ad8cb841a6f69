"""What paths cost as a loss of the decoder: the score U~ of polylines that are held fixed, and what keeps it from being won by cheating.

For a pair of images with middle M, Dist^2 = ||x_A - x_B||^2, and a polyline Z_0..Z_N of length l between their codes,

    c(z) = 2 ||G(z) - M||^2 + Dist^2 / 2           U~ = U / (Dist^2 l / 2) >= 1          4/3: a cross-fade, constant speed, exact ends

and with E = N sum wbar_i |d_i|^2, w = c^2 (`periplus.paths.energy`), U~ = 2 sqrt(E) / (Dist^2 l). The envelope theorem: at Z* = argmin_Z E(Z, theta)
the derivative of min_Z E with respect to theta is that of E with Z* held, for what Z* itself would change is of second order. So nobody
differentiates the minimisation: find Z* (`periplus.paths.solver`, warm-started), then differentiate `path_scores` at it. The ends are codes that
depend on theta as well; they are held too, and their share of the derivative is left out.

A decoder can make U~ small without a single good path. What holds against each way:

    one image for every code          U~ = 1 for the pair whose M it is       `end_errors`: M is off by Dist^2 / 4 at either end
    exact ends, then all at once M    U~ -> 1, exact at the ends              `path_scores` cannot see it; a critic on path points, or `speed_excess`
    a steeper G                       l -> 0, and U with it                   U~ divides by l: G(k z) has the same scores; codes keep to the prior
    pairs of equal images             Dist -> 0                               real pairs, and Dist^2 > 0 is asked for

Least-cost paths: Z* as above. The straight-line surrogate takes `straight_scores`, U~ of the line, by the trapezoid rule: l cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from periplus.errors import UsageError

#: Share of Dist / N that a segment may move the image by: 1 is a cross-fade at constant speed. A jump to the middle at N = 8 is 4.
SPEED_LIMIT = 2.0


def squared_distances(x_a: Tensor, x_b: Tensor) -> Tensor:
    """Dist^2 (P,), summed over pixels. Raises UsageError where the images of a pair are the same: its score would have no unit."""
    squared = (x_a - x_b).flatten(1).square().sum(1)
    if not bool((squared > 0).all()):
        raise UsageError(f"pair {int(squared.argmin())} has the same image at both ends: its score has no unit")
    return squared


def relative_costs(images: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
    """c / Dist^2 (P, N+1), at least 1/2, of the decoded nodes (P, N+1, C, H, W) of paths between images (P, C, H, W)."""
    squared = squared_distances(x_a, x_b)
    middle = ((x_a + x_b) / 2).flatten(1)
    return 2 * (images.flatten(2) - middle[:, None]).square().sum(2) / squared[:, None] + 0.5


def path_scores(images: Tensor, points: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
    """U~ (P,) = 2 sqrt(E) / (Dist^2 l) of polylines: differentiable in the decoded images, the nodes held.

    Args:
        images: (P, N+1, C, H, W) what the decoder makes of the nodes. points: (P, N+1, d) the nodes. x_a, x_b: (P, C, H, W).

    l is the distance of the ends: it takes the unit of the codes out, so that a decoder G(k z) whose codes are k times nearer gains nothing.
    """
    with torch.no_grad():
        squares = points.diff(dim=1).square().sum(2)
        distance = (points[:, -1] - points[:, 0]).norm(dim=1)
    w = relative_costs(images, x_a, x_b).square()
    energy = squares.shape[1] * ((w[:, :-1] + w[:, 1:]) / 2 * squares).sum(1)
    scores: Tensor = 2 * energy.sqrt() / distance.clamp(min=1e-12)
    return scores


def straight_scores(images: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
    """U~ (P,) of straight lines whose decoded nodes at equal steps are given: 2 E_t c(line(t)) / Dist^2 by the trapezoid rule."""
    c = relative_costs(images, x_a, x_b)
    return (c[:, :-1] + c[:, 1:]).mean(1)


def end_errors(images: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
    """(||G(z_A) - x_A||^2 + ||G(z_B) - x_B||^2) / Dist^2 (P,): 0 for exact ends, 1/2 for a decoder that knows only the middle M."""
    squared = squared_distances(x_a, x_b)
    off = (images[:, 0] - x_a).flatten(1).square().sum(1) + (images[:, -1] - x_b).flatten(1).square().sum(1)
    return off / squared


def speed_excess(images: Tensor, x_a: Tensor, x_b: Tensor, limit: float = SPEED_LIMIT) -> Tensor:
    """mean_i max(0, v_i - limit)^2 (P,), v_i = N ||G(Z_{i+1}) - G(Z_i)|| / Dist: what a decoder that jumps on its way has too much of.

    A Lipschitz limit where it is needed, along the path, for decoders that no critic watches. It sees the nodes and nothing between them, and it
    does not forbid all haste: exact ends and M from 1 / (2 limit) of the line on have U~ = 1 + 1 / (3 limit), 7/6 at the limit of 2.
    """
    step = images.flatten(2).diff(dim=1).square().sum(2)
    # the root is safe at zero: standing still has no direction to be differentiated in
    speed = step.shape[1] * (step + 1e-12).sqrt() / squared_distances(x_a, x_b).sqrt()[:, None]
    return (speed - limit).clamp(min=0).square().mean(1)
