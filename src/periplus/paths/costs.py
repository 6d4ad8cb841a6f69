"""What a place in latent space costs: c(z) > 0, at many places of many pairs at once, with its gradient.

For a pair of images (x_A, x_B) and a decoder G, with the mean image M = (x_A + x_B) / 2 and Dist^2 = ||x_A - x_B||^2,

    c(z) = ||G(z) - x_A||^2 + ||G(z) - x_B||^2 = 2 ||G(z) - M||^2 + Dist^2 / 2

so that one comparison of images suffices, and nowhere is a place cheaper than Dist^2 / 2: that is where the floor under every path comes from.
Costs are divided by a scale of their own pair: what a search accepts must not depend on the units of the cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from periplus.errors import UsageError

Decoder = Callable[[Tensor], Tensor]
Cost = Callable[[Tensor], Tensor]

#: Codes in one call of a decoder or of a cost: large enough for the matrix products, small enough for memory.
BLOCK = 4096


class PairCost(ABC):
    """A cost for each of P pairs. Codes are (R, K, d), `pairs` (R,) says whose cost a row is asked for; values are (R, K), float64, in units of
    `scale` (P,), infinite where the cost is not a positive number."""

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        self.scale, self.dtype = scale, dtype

    @abstractmethod
    def raw(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Costs (n,) of codes (n, d) of these pairs (n,), in the user's units."""

    def __call__(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Costs (R, K) without gradients."""
        with torch.no_grad():
            found = [self._block(part, rows)[0] for part, rows in self._blocks(z, pairs)]
        return torch.cat(found).view(z.shape[:-1])

    def with_gradient(self, z: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Costs (R, K) and their gradients (R, K, d), float64."""
        found = [self._block(part, rows, gradient=True) for part, rows in self._blocks(z, pairs)]
        values, gradients = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values.view(z.shape[:-1]), gradients.view(z.shape)

    def _blocks(self, z: Tensor, pairs: Tensor) -> list[tuple[Tensor, Tensor]]:
        flat = z.reshape(-1, z.shape[-1]).to(self.dtype)
        rows = pairs.repeat_interleave(z.shape[-2])
        return list(zip(flat.split(BLOCK), rows.split(BLOCK), strict=True))

    def _block(self, z: Tensor, pairs: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.set_grad_enabled(gradient):  # whatever the caller's mode
            z = (z.clone() if z.is_inference() else z.detach()).requires_grad_(gradient)
            cost = self.raw(z, pairs)
            slope = torch.zeros_like(z)
            if gradient and cost.requires_grad:  # a constant cost carries no gradient
                (slope,) = torch.autograd.grad(cost.sum(), z, materialize_grads=True)
        scale, cost = self.scale[pairs], cost.detach().double()
        allowed = torch.where((cost > 0) & cost.isfinite(), cost, torch.inf)  # no path may go elsewhere
        return allowed / scale, slope.double() / scale[:, None]


class ImageCost(PairCost):
    """c(z) = ||G(z) - x_A||^2 + ||G(z) - x_B||^2, summed over pixels, in units of Dist^2.

    Args:
        decode: (..., d) -> (..., C, H, W). x_a, x_b: (P, C, H, W), the same floating dtype.

    Raises UsageError where the two images of a pair are the same: such a pair has no unit of cost.
    """

    def __init__(self, decode: Decoder, x_a: Tensor, x_b: Tensor) -> None:
        self.decode, self.middle = decode, ((x_a + x_b) / 2).flatten(1)
        self.image_shape = x_a.shape[1:]
        squared = (x_a - x_b).double().flatten(1).square().sum(1)
        if not bool((squared > 0).all()):
            raise UsageError(f"pair {int(squared.argmin())} has the same image at both ends: its cost has no scale")
        super().__init__(squared, x_a.dtype)

    def raw(self, z: Tensor, pairs: Tensor) -> Tensor:
        """As above."""
        images = self.decode(z)
        if images.shape != (len(z), *self.image_shape):
            raise UsageError(f"decode returned {tuple(images.shape)} for codes {tuple(z.shape)}: {(len(z), *self.image_shape)} is needed")
        away = (images.flatten(1) - self.middle[pairs]).square().sum(1)
        return 2 * away + (self.scale[pairs] / 2).to(away.dtype)


class ScalarCost(PairCost):
    """Any cost c: (..., d) -> (...), the same for all pairs, in units of its mean along each pair's straight line."""

    def __init__(self, cost: Cost, z_a: Tensor, z_b: Tensor) -> None:
        self.cost = cost
        super().__init__(torch.ones(len(z_a), dtype=torch.float64, device=z_a.device), z_a.dtype)
        t = torch.linspace(0, 1, 17, dtype=z_a.dtype, device=z_a.device)[:, None]
        along = self(z_a[:, None] * (1 - t) + z_b[:, None] * t, torch.arange(len(z_a), device=z_a.device))
        if not bool((along[:, [0, -1]] > 0).all() and along[:, [0, -1]].isfinite().all()):
            raise UsageError("the cost of an end is not a positive number: c(z) > 0 is needed")
        usable = torch.where(along.isfinite() & (along > 0), along, torch.nan)
        self.scale = usable.nanmean(1)

    def raw(self, z: Tensor, pairs: Tensor) -> Tensor:
        """As above."""
        cost = self.cost(z)
        if cost.shape != z.shape[:-1]:
            raise UsageError(f"cost returned {tuple(cost.shape)} for codes {tuple(z.shape)}: one number for each, {tuple(z.shape[:-1])}, is needed")
        return cost
