"""Where codes may lie: the domain of the search, and the coordinates in which it is unconstrained.

    free    z in R^d         f(z) = ||G(z) - x||^2                  the infimum may lie at infinity: sigmoid and tanh never reach their bounds
    prior   z in R^d         f(z) = ||G(z) - x||^2 + weight |z|^2   weight = sigma^2: the posterior's mode under x ~ N(G(z), sigma^2), z ~ N(0, 1)
    ball    |z| <= radius    f(z) = ||G(z) - x||^2                  a compact set: the minimum exists

The ball is searched through a chart y in R^d. Wrap a sphere of radius R around it, one dimension up, and describe the sphere by stereographic
projection; the ball is its shadow:

    z = y / (1 + |y|^2 / (4 R^2))         |y| < 2R inside, |y| = 2R on the boundary, |y| > 2R inside again (the other hemisphere)

f as a function of y is as smooth as f, has no constraint, and its minima are those of f in the ball: an inner minimum stays one (twice), and a
boundary point is stationary in y exactly where the part of the gradient along the boundary vanishes; it is a minimum in y only where f falls
outwards (the multiplier's sign of Karush, Kuhn and Tucker), since the radial curvature there is that multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from periplus.errors import UsageError

DomainName = Literal["free", "ball", "prior"]
DOMAINS = ("free", "ball", "prior")
#: The ball's default radius is this quantile of |z| under N(0, 1).
BALL_QUANTILE = 0.999
#: A code has escaped when its norm exceeds this many default radii: prior samples never come near, and sigmoids are saturated there.
ESCAPE_FACTOR = 10.0
#: A code is on the boundary within this part of the radius.
BOUNDARY_TOLERANCE = 1e-5


def prior_radius(latent_dim: int) -> float:
    """The 0.999 quantile of |z| for z ~ N(0, 1) in d dimensions (the chi law): 7.9 for d = 32."""
    from scipy.special import gammaincinv

    return math.sqrt(2 * float(gammaincinv(latent_dim / 2, BALL_QUANTILE)))


@dataclass(frozen=True)
class Domain:
    """Where a search looked. `radius` is finite for a ball, `weight` positive for a prior, `escape_radius` where a code counts as run off."""

    name: DomainName
    radius: float
    weight: float
    escape_radius: float

    def codes(self, y: Tensor) -> Tensor:
        """Codes z (..., d) of points of the chart (..., d)."""
        if not math.isfinite(self.radius):
            return y
        z: Tensor = y / (1 + y.square().sum(-1, keepdim=True) / (4 * self.radius**2))
        return z

    def chart(self, z: Tensor) -> Tensor:
        """A point of the chart (..., d) for codes (..., d) of the domain; codes outside a ball are put just inside it first."""
        if not math.isfinite(self.radius):
            return z
        norm = z.norm(dim=-1, keepdim=True)
        inside = z * (0.999 * self.radius / norm.clamp(min=1e-30)).clamp(max=1)
        share = inside.square().sum(-1, keepdim=True) / self.radius**2
        y: Tensor = 2 * inside / (1 + (1 - share).sqrt())
        return y

    @property
    def chart_reach(self) -> float:
        """The norm in the chart beyond which a row has run off."""
        return math.inf if math.isfinite(self.radius) else self.escape_radius

    def fold(self, y: Tensor) -> Tensor:
        """The same points of the domain from the inner hemisphere of the chart."""
        if not math.isfinite(self.radius):
            return y
        share = y.square().sum(-1, keepdim=True) / (4 * self.radius**2)
        return torch.where(share > 1, y / share, y)

    def code_gradient(self, gradient: Tensor, y: Tensor) -> Tensor:
        """Gradients with respect to the code (n, k, d) from k gradients in the chart at y (n, d).

        On the boundary they lack their radial part, which the chart does not show.
        """
        if not math.isfinite(self.radius):
            return gradient
        y = y.to(gradient)[:, None]
        share = y.square().sum(-1, keepdim=True) / (4 * self.radius**2)
        normal = y / y.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        radial = (gradient * normal).sum(-1, keepdim=True) * normal
        stretch = torch.where(self.on_boundary(self.codes(y))[..., None], 0, (1 + share) / (1 - share))
        found: Tensor = (1 + share) * (gradient - radial + stretch.nan_to_num(0, 0, 0) * radial)
        return found

    def on_boundary(self, z: Tensor) -> Tensor:
        """Which codes (..., d) lie on the boundary, (...,) bool."""
        norm: Tensor = z.norm(dim=-1)
        return norm >= self.radius * (1 - BOUNDARY_TOLERANCE)

    def to_dict(self) -> dict[str, Any]:
        finite = {"radius": self.radius} if math.isfinite(self.radius) else {}
        return {"name": self.name, **finite, "weight": self.weight, "escape_radius": self.escape_radius}


def make_domain(name: str, latent_dim: int, radius: float | None, weight: float | None) -> Domain:
    """The domain that these options declare. Raises UsageError for unknown names and for options that belong to another domain."""
    if name not in DOMAINS:
        raise UsageError(f"domain '{name}' is unknown: use {', '.join(repr(known) for known in DOMAINS)}")
    if radius is not None and (name != "ball" or not 0 < radius < math.inf):
        raise UsageError(f"radius {radius} with domain '{name}': a positive radius belongs to domain 'ball'")
    if weight is not None and (name != "prior" or not 0 < weight < math.inf):
        raise UsageError(f"prior_weight {weight} with domain '{name}': a positive weight belongs to domain 'prior'")
    if name == "prior" and weight is None:
        raise UsageError("domain 'prior' needs prior_weight=, the factor of |z|^2 in the objective (sigma^2 for Gaussian noise of variance sigma^2)")
    usual = prior_radius(latent_dim)
    reach = (usual if radius is None else radius) if name == "ball" else math.inf
    return Domain(name, reach, weight or 0.0, ESCAPE_FACTOR * usual)  # type: ignore[arg-type]
