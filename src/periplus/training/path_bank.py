"""A bank of pairs of real images whose least-cost paths are kept warm while the decoder moves under them.

The path term of a loss (`periplus.paths.loss`) needs, for pairs of *training* images, their codes and the cheapest path between these. Finding both
from nothing costs seconds; but from one step to the next the decoder hardly moves, so yesterday's codes and paths are nearly right. At every fourth
step some pairs are visited in turn:

    1. their codes:    a generator's: any of some fresh prior codes that decode nearer to the image than the code of the bank takes its place,
                       then a few Adam steps down ||G(z) - x||^2, kept within the ball that holds the prior; an autoencoder's: the encoder's means
    2. their paths:    straight line + the bank's offsets, a few steps of the path solver (for the straight-line surrogate: no offsets)
    3. the decoder:    is differentiated with both held (`Visit`)

What a visit leaves, codes, Adam's moments and offsets, is state: it is in the checkpoint. Which images, which pairs, which draws are functions of
(seed, step). Batch-normalised decoders are used as they will be used, with running statistics, each code on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from periplus.checkpoints import Checkpoint
from periplus.config import Config
from periplus.data import ImageData
from periplus.errors import RunError, UsageError
from periplus.paths.costs import ImageCost
from periplus.paths.loss import end_errors, path_scores, speed_excess, straight_scores
from periplus.paths.solver import minimise
from periplus.paths.starts import straight
from periplus.seeds import stream
from periplus.training.steps import evaluation_mode, to_float

#: Pairs in the bank, pairs of one visit, segments of a path, and steps from visit to visit.
PAIRS, VISITED, SEGMENTS, EVERY = 128, 12, 8, 4
#: Steps of the path solver in a visit, and the residual at which it is content; Adam steps on the codes, their size, fresh codes that are tried.
PATH_STEPS, CONTENT = 2, 1e-2
CODE_STEPS, CODE_RATE, FRESH = 4, 0.1, 64
#: What the errors of the ends count beside U~: with more than 2/3, exact ends and a cross-fade beat one image M for every code.
RECONSTRUCTION = 2.0
#: What the squared excess of speed counts where no critic watches.
SPEED = 1.0
#: The mean since the line before of what is measured at a visit.
PATH_MEASURES = ("path_score", "path_end_error", "path_realism")

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Visit:
    """Some pairs with the paths that are now theirs. images (P, N+1, C, H, W) carry the decoder's graph; nothing else does."""

    points: Tensor
    images: Tensor
    x_a: Tensor
    x_b: Tensor
    objective: str

    @property
    def scores(self) -> Tensor:
        """U~ (P,) of the path, or of the line."""
        if self.objective == "straight":
            return straight_scores(self.images, self.x_a, self.x_b)
        return path_scores(self.images, self.points, self.x_a, self.x_b)

    @property
    def end_errors(self) -> Tensor:
        """Squared errors of both ends over Dist^2, (P,)."""
        return end_errors(self.images, self.x_a, self.x_b)

    @property
    def speed_excess(self) -> Tensor:
        """What jumps on the way cost, (P,)."""
        return speed_excess(self.images, self.x_a, self.x_b)

    def inner(self) -> Tensor:
        """The images between the ends, (P (N-1), C, H, W)."""
        return self.images[:, 1:-1].flatten(0, 1)


class PathBank:
    """Pairs of training images with their codes and paths; see above. `codes`, `first`, `second` (P, 2, d), `taken` (P,), `offsets` (P, N-1, d)."""

    def __init__(self, config: Config, data: ImageData) -> None:
        self.config = config
        self.x_a, self.x_b = (images.to(config.device) for images in draw_pairs(data, stream(config.seed, "path-pairs")))
        count, d = len(self.x_a), config.latent_dim
        generator = torch.Generator().manual_seed(stream(config.seed, "path-codes"))
        self.codes = torch.randn(count, 2, d, generator=generator).to(config.device)
        self.first, self.second = torch.zeros_like(self.codes), torch.zeros_like(self.codes)
        self.taken = torch.zeros(count, device=config.device)
        self.offsets = torch.zeros(count, SEGMENTS - 1, d, device=config.device)
        self.sums = torch.zeros(len(PATH_MEASURES) + 1, dtype=torch.float64, device=config.device)

    # ---- state

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a checkpoint."""
        return {f"paths.{name}": getattr(self, name) for name in ("codes", "first", "second", "taken", "offsets", "sums")}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state, bit for bit. Raises RunError where it does not fit."""
        for name, tensor in self.tensors().items():
            found = checkpoint.tensors.get(name)
            if found is None or found.shape != tensor.shape:
                raise RunError(f"{checkpoint.path} lacks '{name}', the state of the path term: it is not of this run")
            tensor.copy_(found)

    def measures(self) -> dict[str, float]:
        """Means since they were last asked for."""
        *sums, count = self.sums.tolist()
        self.sums.zero_()
        return dict(zip(PATH_MEASURES, (value / count for value in sums), strict=True)) if count else {}

    def add(self, visit: Visit, realism: Tensor) -> None:
        """Remember what a visit measured."""
        found = [visit.scores.mean(), visit.end_errors.mean(), realism, torch.ones_like(realism)]
        self.sums += torch.stack([value.detach().double() for value in found])

    # ---- visits

    def due(self, step: int) -> bool:
        """Whether pairs are visited at this step."""
        return step % EVERY == 0

    def visit_generator(self, generator: nn.Module, step: int) -> Visit:
        """Refine codes and paths of the pairs of this step for a generator as it is. Randomness: the default generator, seeded by step."""
        rows = self.rows(step)
        with evaluation_mode(generator):
            self.refine_codes(generator, rows)
            return self.visit(generator, rows, self.codes[rows])

    def visit_decoder(self, encode: Decode, decode: Decode, step: int) -> Visit:
        """The same for a decoder whose codes an encoder tells: `encode` (B, C, H, W) -> means (B, d), `decode` (..., d) -> images in [0, 1]."""
        rows = self.rows(step)
        with torch.no_grad():
            self.codes[rows] = torch.stack([encode(to_float(x[rows])).float() for x in (self.x_a, self.x_b)], 1)
        return self.visit(decode, rows, self.codes[rows])

    def rows(self, step: int) -> Tensor:
        """The pairs of this step: all in turn."""
        first = step // EVERY * VISITED
        return torch.arange(first, first + min(VISITED, len(self.x_a)), device=self.codes.device) % len(self.x_a)

    def visit(self, decode: Decode, rows: Tensor, ends: Tensor) -> Visit:
        """Steps of the solver from the paths of the bank between codes (R, 2, d), and the images on what comes out."""
        x_a, x_b = to_float(self.x_a[rows]), to_float(self.x_b[rows])
        points = straight(ends[:, 0], ends[:, 1], SEGMENTS).to(ends)
        if self.config.path_objective == "least":
            points = self.warm(decode, points, rows, x_a, x_b)
        images = decode(points.flatten(0, 1)).unflatten(0, points.shape[:2]).float()
        return Visit(points, images, x_a, x_b, self.config.path_objective)

    def warm(self, decode: Decode, line: Tensor, rows: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
        """The least-cost paths (R, N+1, d) that a few steps find from the bank's own, or from the line where that is cheaper by now."""
        cost, numbers = ImageCost(decode, x_a, x_b), torch.arange(len(rows), device=rows.device)
        kept = line.clone()
        kept[:, 1:-1] += self.offsets[rows]
        cheaper = discrete_energy(kept, cost, numbers) < discrete_energy(line, cost, numbers)
        begin = torch.where(cheaper[:, None, None], kept, line)
        points = minimise(begin, cost, numbers, 2, CONTENT, max_iterations=PATH_STEPS).points.to(line)
        self.offsets[rows] = points[:, 1:-1] - line[:, 1:-1]
        return points

    def refine_codes(self, generator: nn.Module, rows: Tensor) -> None:
        """A few steps of inversion for both ends of some pairs."""
        target = torch.stack([to_float(x[rows]) for x in (self.x_a, self.x_b)], 1)
        z, first, second, taken = self.codes[rows], self.first[rows], self.second[rows], self.taken[rows][:, None, None]
        z, fresh = adopt(generator, z, target)
        first, second = first.masked_fill(fresh, 0.0), second.masked_fill(fresh, 0.0)
        for _ in range(CODE_STEPS):
            slope = inversion_slope(generator, z, target)
            taken = taken + 1
            first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope.square()
            z = z - CODE_RATE * (first / (1 - 0.9**taken)) / ((second / (1 - 0.99**taken)).sqrt() + 1e-8)
            z = into_ball(z)
        self.codes[rows], self.first[rows], self.second[rows], self.taken[rows] = z, first, second, taken[:, 0, 0]


def draw_pairs(data: ImageData, seed: int) -> tuple[Tensor, Tensor]:
    """Up to PAIRS pairs of different training images, uint8 (P, C, H, W) twice. Raises UsageError where all images are the same."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    half = len(data) // 2
    a, b = data.images[order[:half][: 4 * PAIRS]], data.images[order[half : 2 * half][: 4 * PAIRS]]
    different = (a != b).flatten(1).any(1)  # pairs of equal images would have Dist = 0, and any score
    if not bool(different.any()):
        raise UsageError(f"--path-weight needs pairs of different images: those of {data.name} are all the same")
    return a[different][:PAIRS].contiguous(), b[different][:PAIRS].contiguous()


def radius(d: int) -> float:
    """The radius of the ball that holds all but one in a thousand codes of N(0, 1) in d dimensions (Wilson and Hilferty 1931)."""
    return math.sqrt(d * (1 - 2 / (9 * d) + 3.09 * math.sqrt(2 / (9 * d))) ** 3)


def into_ball(z: Tensor) -> Tensor:
    """Codes that have left the prior's ball are put back on its surface: a steeper generator is no way out, for the prior stays."""
    limit = radius(z.shape[-1])
    held: Tensor = z * (limit / z.norm(dim=-1, keepdim=True).clamp(min=limit))
    return held


@torch.no_grad()
def adopt(generator: nn.Module, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (R, 2, d), replaced where one of FRESH prior codes decodes nearer to the target (R, 2, C, H, W); and where, (R, 2, 1)."""
    flat, wanted = z.flatten(0, 1), target.flatten(0, 1).flatten(1)
    tried = torch.randn(FRESH, z.shape[-1], device=z.device)
    decoded = generator(torch.cat([flat, tried])).float().flatten(1)
    own = (decoded[: len(flat)] - wanted).square().sum(1)
    nearest, which = torch.cdist(wanted, decoded[len(flat) :]).square().min(1)
    better = (nearest < own)[:, None]
    return torch.where(better, tried[which], flat).view_as(z), better.view(*z.shape[:2], 1)


def inversion_slope(generator: nn.Module, z: Tensor, target: Tensor) -> Tensor:
    """The gradient of ||G(z) - x||^2 with respect to codes (R, 2, d)."""
    with torch.enable_grad():
        free = z.detach().flatten(0, 1).requires_grad_()
        error = (generator(free).float().flatten(1) - target.flatten(0, 1).flatten(1)).square().sum()
        (slope,) = torch.autograd.grad(error, free)
    return slope.view_as(z)


def discrete_energy(points: Tensor, cost: ImageCost, numbers: Tensor) -> Tensor:
    """E (R,) of polylines, float64."""
    w = cost(points, numbers).square()
    squares = points.double().diff(dim=1).square().sum(2)
    return squares.shape[1] * ((w[:, :-1] + w[:, 1:]) / 2 * squares).sum(1)
