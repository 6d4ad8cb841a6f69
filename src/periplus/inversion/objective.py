"""The objective of inversion for a batch of rows, its gradient and its exact Hessian, for any decoder.

    f(z) = ||G(z) - x||^2 [+ weight |z|^2]          one row is one start of one image

Rows are independent of each other, so one backward pass gives the gradients of all. The Hessian (d, d) of every row takes d directional derivatives
of the gradient: forward-over-reverse with `torch.func` (the primal pass is shared), or, for decoders that torch.func cannot transform, reverse twice.
For the sheet's mlp on MNIST a row costs 3 MFLOP to decode, 6 with its gradient, about 200 with its Hessian.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from periplus.errors import NonFiniteError, UsageError
from periplus.inversion.domains import Domain

Decode = Callable[[Tensor], Tensor]
#: Bytes that one pass may hold, unless told otherwise.
BYTE_BUDGET = 256 << 20


class Objective:
    """f over rows of codes, each against one of the targets.

    Args:
        decode: codes (n, d) -> images (n, C, H, W), row by row.
        targets: flattened images (B, C*H*W) in the type and on the device of the search.
        latent_dim: d. domain: where codes lie; its chart is what the search moves in.
        byte_budget: what a pass over rows may hold.
    """

    def __init__(self, decode: Decode, targets: Tensor, latent_dim: int, domain: Domain, byte_budget: int = BYTE_BUDGET) -> None:
        self.decode, self.targets, self.latent_dim, self.domain = decode, targets, latent_dim, domain
        self.byte_budget = byte_budget
        self.row_bytes = bytes_per_row(decode, targets, latent_dim)
        self.evaluations = 0

    @property
    def rows_at_once(self) -> int:
        """Rows that a gradient pass may take within the byte budget."""
        return max(16, self.byte_budget // self.row_bytes)

    @property
    def rows_of_hessian(self) -> int:
        """Rows whose Hessians may be taken at once: each carries d tangents through the decoder."""
        return max(1, self.byte_budget // (3 * self.latent_dim * self.row_bytes))

    def among(self, some: slice) -> Objective:
        """The objective of some of the images."""
        other = copy.copy(self)
        other.targets = self.targets[some]
        return other

    def floor(self) -> float:
        """The squared error that rounding alone leaves: eight units in the last place per value."""
        return self.targets.shape[1] * (8 * torch.finfo(self.targets.dtype).eps) ** 2

    def images(self, z: Tensor) -> Tensor:
        """Flattened images (n, C*H*W) of codes (n, d)."""
        return self.decode(z).flatten(1)

    def terms(self, z: Tensor, target: Tensor) -> Tensor:
        """f (n,) in float64 of codes (n, d) against target images (n, C*H*W)."""
        error = (self.images(z) - target).square().sum(1, dtype=torch.float64)
        return error + self.domain.weight * z.square().sum(1, dtype=torch.float64) if self.domain.weight else error

    def value(self, y: Tensor, image: Tensor) -> Tensor:
        """f (n,) at points of the chart (n, d), row k against target image[k]."""
        with torch.no_grad():
            parts = [self.terms(self.domain.codes(few), self.targets[which]) for few, which in self._blocks(y, image)]
        return torch.cat(parts)

    def value_and_gradient(self, y: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """f (n,) and its gradient in the chart (n, d)."""
        values, gradients = [], []
        for few, which in self._blocks(y, image):
            with torch.enable_grad():
                leaf = few.detach().requires_grad_(True)
                f = self.terms(self.domain.codes(leaf), self.targets[which])
                (gradient,) = torch.autograd.grad(f.sum(), leaf)
            values.append(f.detach())
            gradients.append(gradient)
        self.evaluations += len(y)
        return torch.cat(values), torch.cat(gradients)

    def code_gradient(self, z: Tensor, image: Tensor) -> Tensor:
        """Gradient with respect to the code itself, (n, d)."""
        return torch.cat([_gradient(functools.partial(self._total, target=self.targets[which]), few) for few, which in self._blocks(z, image)])

    def _total(self, z: Tensor, target: Tensor) -> Tensor:
        return self.terms(z, target).sum()

    def squared_error(self, z: Tensor, image: Tensor) -> Tensor:
        """||G(z) - x||^2 (n,) in float64, without any prior term."""
        with torch.no_grad():
            parts = [(self.images(few) - self.targets[which]).square().sum(1, dtype=torch.float64) for few, which in self._blocks(z, image)]
        return torch.cat(parts)

    def hessian(self, z: Tensor, image: Tensor, in_chart: bool = False) -> Tensor:
        """Exact Hessian (n, d, d) of the piece that each point lies in; with respect to the code, or to the chart's coordinates."""
        place = self.domain.codes if in_chart else _same
        rows, found = self.rows_of_hessian, []
        for few, which in zip(z.split(rows), image.split(rows), strict=True):
            target = self.targets[which]

            def total(w: Tensor, target: Tensor = target) -> Tensor:
                return self.terms(place(w), target).sum()

            found.append(hessian_of_rows(total, few))
        return torch.cat(found)

    def _blocks(self, z: Tensor, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = self.rows_at_once
        return list(zip(z.split(rows), image.split(rows), strict=True)) if len(z) else [(z, image)]


def _same(z: Tensor) -> Tensor:
    return z


def _gradient(total: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(total(leaf), leaf)
    return gradient


def hessian_of_rows(total: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Hessians (n, d, d) of a sum over independent rows z (n, d): symmetric to rounding, exact otherwise."""
    z = z.detach()
    basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)[:, None].expand(-1, *z.shape)
    try:
        columns = torch.func.vmap(lambda v: torch.func.jvp(torch.func.grad(total), (z,), (v,))[1])(basis)
        columns = columns.transpose(0, 1)
    except (RuntimeError, NotImplementedError):  # a decoder beyond torch.func: differentiate twice in reverse, one direction after the other
        with torch.enable_grad():
            leaf = z.requires_grad_(True)
            (gradient,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
            columns = torch.stack([torch.autograd.grad(gradient[:, j].sum(), leaf, retain_graph=True)[0] for j in range(z.shape[1])], 1)
    symmetric: Tensor = 0.5 * (columns + columns.transpose(1, 2))
    return symmetric.detach()


def bytes_per_row(decode: Decode, targets: Tensor, latent_dim: int) -> int:
    """What a gradient pass keeps for one row: the tensors that autograd saves, measured on two batch sizes so that weights do not count."""
    kept = [_saved_bytes(decode, targets, latent_dim, rows) for rows in (2, 4)]
    search = (3 * latent_dim + 8) * latent_dim * 8  # the state of a row: matrices (d, d) and a bundle of d gradients
    return max(1, (kept[1] - kept[0]) // 2) + search + 4 * targets.shape[1] * targets.element_size()


def _saved_bytes(decode: Decode, targets: Tensor, latent_dim: int, rows: int) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    z = torch.zeros(rows, latent_dim, dtype=targets.dtype, device=targets.device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _same):
        decode(z)
    return total


def check_decoder(decode: Decode, latent_dim: int, image_shape: tuple[int, ...], like: Tensor) -> None:
    """Raise UsageError or NonFiniteError where a decoder cannot be searched: shapes, finiteness, differentiability, rows that mix."""
    z = torch.linspace(-1, 1, 3 * latent_dim, dtype=like.dtype, device=like.device).reshape(3, latent_dim)
    x = _call(decode, z.requires_grad_(True))
    if not isinstance(x, Tensor) or tuple(x.shape) != (3, *image_shape):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"decode turned codes (3, {latent_dim}) into {shape}: images are {image_shape}, so {(3, *image_shape)} is needed")
    if not x.isfinite().all():
        raise NonFiniteError("decode returned values that are not finite for codes within [-1, 1]")
    if not x.requires_grad:
        raise UsageError("decode's images carry no gradient with respect to the codes: it must be differentiable (no torch.no_grad, no detach)")
    with torch.no_grad():
        alone = decode(z[:1].detach())
    scale = 1 + x.detach().abs().max()
    if not torch.allclose(alone[0], x[0].detach(), rtol=0, atol=float(1e3 * torch.finfo(x.dtype).eps * scale)):
        raise UsageError("decode gives a code another image when other codes are beside it (batch norm or dropout in training mode?): use .eval()")


def _call(decode: Decode, z: Tensor) -> Any:
    try:
        return decode(z)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"decode does not take codes of shape {tuple(z.shape)} and type {z.dtype}: {reason}") from None


def takes(decode: Decode, latent_dim: int, like: Tensor) -> bool:
    """Whether a decoder takes codes of this type, and answers in it."""
    try:
        with torch.no_grad():
            image = decode(torch.zeros(2, latent_dim, dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, TypeError):
        return False
    return isinstance(image, Tensor) and image.dtype == like.dtype and math.prod(image.shape) > 0
