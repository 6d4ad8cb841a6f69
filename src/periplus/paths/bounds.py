"""What no path can undercut: the floor, and with a certified Lipschitz constant of the decoder a bound above it.

With r(z) = ||G(z) - M||, c = 2 r^2 + Dist^2 / 2, so U >= Dist^2 l / 2, l the distance of the ends. If ||G(z) - G(z')|| <= L |z - z'|, then s after
the start r is at least r_A - L s, and s before the end at least r_B - L s. A path has at least length l, and the integral of 2 r^2 along it is
least when it has just that:

    U* >= Dist^2 l / 2 + 2 (r_A^3 + r_B^3 - 2 rho^3) / (3 L),          rho = max(0, (r_A + r_B - L l) / 2)

In the energy reading U = int c ||Z'||^2 dt is at least (int sqrt(c) ||Z'||)^2, by Cauchy and Schwarz over a unit of time, and sqrt(c) obeys the same
reasoning: a floor of Dist^2 l^2 / 2, and the integral of sqrt(2 r^2 + Dist^2 / 2) along the two cones above it.

`certified_lipschitz` finds an L that holds everywhere, by algebra on the weights alone: a maximum over samples is none. For the map
A_n D_{n-1} ... D_1 A_1, each D_k diagonal with entries in [lo, hi] (the slopes of an activation), D_k = m I + r S with m = (lo + hi) / 2,
r = (hi - lo) / 2 and |S| <= 1. Expanding every D_k leaves products of consecutive A's, whose norms are computed, with cuts where an S stands:

    N_k = |A_k ... A_1| m^{k-1} + sum_i |A_k ... A_i| m^{k-i} r N_{i-1}

never above the product of the norms (lo >= 0), and about a third of it for a trained generator of five layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Smallest and largest slope of an activation.
SLOPES: dict[type[nn.Module], Callable[[Any], tuple[float, float]]] = {
    nn.LeakyReLU: lambda layer: (min(layer.negative_slope, 1.0), max(layer.negative_slope, 1.0)),  # a slope below 0 is refused
    nn.ReLU: lambda layer: (0.0, 1.0),
    nn.Tanh: lambda layer: (0.0, 1.0),
    nn.Softplus: lambda layer: (0.0, 1.0),
    nn.Sigmoid: lambda layer: (0.0, 0.25),
}
#: What leaves a code as it is when a network is evaluated.
SILENT = (nn.Dropout, nn.Identity, nn.Flatten)
PROBES = 16


def floor(image_distance: Tensor, code_distance: Tensor, power: int) -> Tensor:
    """Dist^2 l / 2 (length reading, power 2) or Dist^2 l^2 / 2 (energy reading), (P,), from Dist^2 and l, (P,) each."""
    return image_distance / 2 * code_distance ** (1 if power == 2 else 2)


def lipschitz_floor(image_distance: Tensor, code_distance: Tensor, start: Tensor, end: Tensor, lipschitz: float, power: int) -> Tensor:
    """The bound above the floor, (P,), from Dist^2, l, and r = ||G - M|| at both ends, (P,) each, and a Lipschitz constant of G.

    A constant of 0 is that of a decoder with one image: r is the same everywhere.
    """
    if not lipschitz:
        return floor(image_distance + 4 * torch.minimum(start, end).square(), code_distance, power)
    meet = ((start + end - lipschitz * code_distance) / 2).clamp(min=0)
    if power == 2:
        return floor(image_distance, code_distance, 2) + 2 * (start**3 + end**3 - 2 * meet**3) / (3 * lipschitz)
    half = image_distance / 2
    flat = (code_distance - (start + end - 2 * meet) / lipschitz).clamp(min=0) * half.sqrt()
    cones = (root_integral(start, half) + root_integral(end, half) - 2 * root_integral(meet, half)) / lipschitz
    return (flat + cones).square()


def root_integral(r: Tensor, half: Tensor) -> Tensor:
    """The integral of sqrt(half + 2 x^2) over x from 0 to r."""
    return r * (half + 2 * r.square()).sqrt() / 2 + half / math.sqrt(8) * torch.asinh(r * (2 / half).sqrt())


# ---- a Lipschitz constant by algebra ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def certified_lipschitz(network: nn.Module, decode: Callable[[Tensor], Tensor], latent_dim: int) -> float | None:
    """A Lipschitz constant, in Euclidean norms over codes and pixels, of a decoder made of linear layers, batch norm and activations.

    Args:
        network: the module, in evaluation mode, whose leaves in order are its layers. decode: what it computes, (n, d) -> (n, ...), perhaps with a
            sigmoid at the end.

    Returns None for networks with other layers, or whose leaves in order do not compute what `decode` does (tried on random codes).
    """
    leaves = [layer for layer in network.modules() if not list(layer.children()) and not isinstance(layer, SILENT)]
    if not leaves or not all(type(layer) in (nn.Linear, nn.BatchNorm1d, *SLOPES) for layer in leaves):
        return None
    if any(isinstance(layer, nn.LeakyReLU) and layer.negative_slope < 0 for layer in leaves):
        return None
    if not isinstance(leaves[0], nn.Linear) or leaves[0].in_features != latent_dim:
        return None
    weight = leaves[0].weight
    probe = torch.randn(PROBES, latent_dim, generator=torch.Generator().manual_seed(0)).to(weight)
    shown = decode(probe).flatten(1)
    for chain in (leaves, [*leaves, nn.Sigmoid()]):
        found = probe
        for layer in chain:
            found = layer(found)
        if found.shape == shown.shape and torch.allclose(found, shown, rtol=1e-4, atol=1e-5):
            return lipschitz_bound(chain)
    return None


@torch.no_grad()
def lipschitz_bound(layers: Sequence[nn.Module]) -> float:
    """The bound of the module's docstring for layers applied in order: Linear, BatchNorm1d (evaluation mode) and the activations of SLOPES."""
    matrices, slopes = linear_parts(layers)
    last = slopes[len(matrices) - 1][1] if len(slopes) == len(matrices) else 1.0
    bounds: list[float] = []
    norms: dict[tuple[int, int], float] = {}
    for i in range(len(matrices)):
        product = matrices[i]
        norms[i, i] = spectral_norm(product)
        for k in range(i + 1, len(matrices)):
            product = matrices[k] @ product
            norms[i, k] = spectral_norm(product)
    for k in range(len(matrices)):
        uncut = [math.prod((lo + hi) / 2 for lo, hi in slopes[i:k]) * norms[i, k] for i in range(k + 1)]
        bounds.append(uncut[0] + sum(uncut[i] * (slopes[i - 1][1] - slopes[i - 1][0]) / 2 * bounds[i - 1] for i in range(1, k + 1)))
    return last * bounds[-1]


def linear_parts(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[tuple[float, float]]]:
    """The matrices between activations (consecutive linear layers multiplied, float64), and the slopes of the activation after each."""
    matrices: list[Tensor] = []
    slopes: list[tuple[float, float]] = []
    for layer in layers:
        if type(layer) in SLOPES:
            lo, hi = SLOPES[type(layer)](layer)
            if len(slopes) == len(matrices):  # two activations in a row
                slopes[-1] = (slopes[-1][0] * lo, slopes[-1][1] * hi)
            else:
                slopes.append((lo, hi))
            continue
        if len(matrices) == len(slopes):
            matrices.append(matrix(layer))
        else:
            matrices[-1] = matrix(layer) @ matrices[-1] if isinstance(layer, nn.Linear) else matrix(layer).diagonal()[:, None] * matrices[-1]
    return matrices, slopes


def matrix(layer: nn.Module) -> Tensor:
    """The matrix of an affine layer, float64."""
    if isinstance(layer, nn.Linear):
        return layer.weight.double()
    assert isinstance(layer, nn.BatchNorm1d) and layer.running_var is not None
    scale = (layer.running_var.double() + layer.eps).rsqrt()
    return torch.diag(scale if layer.weight is None else scale * layer.weight.double())


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value, rounded up by the arithmetic's own error."""
    return float(torch.linalg.matrix_norm(matrix, 2)) * (1 + 1e-12)
