"""What training pays for passages: at every fourth step the cheapest paths of a few fresh pairs are found, held, and priced.

    1. pairs    a generator's: codes from the prior, and what it makes of them; an autoencoder's: images of the batch, and the encoder's means
    2. paths    a few steps of the path solver from the straight line (for the straight-line surrogate: none)
    3. loss     U~ of these paths (`periplus.paths.loss`), differentiated with codes and paths held (`Visit`)

A generator is asked about its own images because their codes are known: for real images these must be searched, at a cost, and a bank of real pairs
that is kept warm is learned by heart (LOG.md has the figures). The ends of a generated pair are exact and their images are held: the term moves what
lies between them. So it gains nothing by making images more alike, but where they are alike already U~ has no unit: pairs nearer than NEAREST times
what real images have between them are left out. Autoencoders take real pairs, and pay for the errors of their ends.

Nothing is kept from visit to visit but sums for the metrics; all randomness is that of the step. Batch-normalised decoders are used as they will be
used, with running statistics, each code on its own.
"""

from __future__ import annotations

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

#: Pairs of one visit, segments of a path, and steps from visit to visit.
PAIRS, SEGMENTS, EVERY = 12, 8, 4
#: Steps of the path solver in a visit, and the residual at which it is content.
PATH_STEPS, CONTENT = 4, 1e-2
#: Dist^2 of a generated pair, over the mean of real pairs, that it has at least.
NEAREST = 0.25
#: Real pairs that this mean is taken over, at most.
REAL_PAIRS = 1000
#: What the errors of the ends count beside U~: with more than 2/3, exact ends and a cross-fade beat one image M for every code.
RECONSTRUCTION = 2.0
#: What the squared excess of speed counts where no critic watches.
SPEED = 1.0
#: The mean since the line before of what is measured at a visit.
PATH_MEASURES = ("path_score", "path_end_error", "path_realism")

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Visit:
    """Some pairs with their paths. images (P, N+1, C, H, W) carry the decoder's graph, of a generator's without the ends; nothing else does."""

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


class PathTerm:
    """Makes the visits of a training and sums what they measure; see above. `nearest`: the least Dist^2 of a generated pair."""

    def __init__(self, config: Config, data: ImageData) -> None:
        self.config = config
        self.nearest = NEAREST * typical_squared_distance(data, stream(config.seed, "path-pairs"))
        self.sums = torch.zeros(len(PATH_MEASURES) + 1, dtype=torch.float64, device=config.device)

    # ---- state

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a checkpoint."""
        return {"paths.sums": self.sums}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state, bit for bit. Raises RunError where it does not fit."""
        found = checkpoint.tensors.get("paths.sums")
        if found is None or found.shape != self.sums.shape:
            raise RunError(f"{checkpoint.path} lacks 'paths.sums', the state of the path term: it is not of this run")
        self.sums.copy_(found)

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

    def visit_generator(self, generator: nn.Module) -> Visit | None:
        """Pairs of a generator as it is, from the default generator of random numbers; None where no two of its images are far enough apart."""
        with evaluation_mode(generator):
            ends = torch.randn(PAIRS, 2, self.config.latent_dim, device=self.sums.device)
            with torch.no_grad():
                x = generator(ends.flatten(0, 1)).float().unflatten(0, (PAIRS, 2))
            far = (x[:, 0] - x[:, 1]).flatten(1).square().sum(1) >= self.nearest
            if not bool(far.any()):
                return None
            ends, x = ends[far], x[far]
            points = self.paths(generator, ends, x[:, 0], x[:, 1])
            inner = generator(points[:, 1:-1].flatten(0, 1)).float().unflatten(0, (len(points), -1))
        return Visit(points, torch.cat([x[:, :1], inner, x[:, 1:]], 1), x[:, 0], x[:, 1], self.config.path_objective)

    def visit_decoder(self, encode: Decode, decode: Decode, images: Tensor) -> Visit | None:
        """Pairs of a batch (B, C, H, W): `encode` gives means (B, d), `decode` (..., d) images in [0, 1]. None where all are the same image."""
        half = min(PAIRS, len(images) // 2)
        x = torch.stack([images[:half], images[half : 2 * half]], 1)
        x = x[(x[:, 0] != x[:, 1]).flatten(1).any(1)]  # a pair of equal images would have any score
        if not len(x):
            return None
        with torch.no_grad():
            ends = encode(x.flatten(0, 1)).float().unflatten(0, (-1, 2))
        points = self.paths(decode, ends, x[:, 0], x[:, 1])
        shown = decode(points.flatten(0, 1)).unflatten(0, points.shape[:2]).float()
        return Visit(points, shown, x[:, 0], x[:, 1], self.config.path_objective)

    def paths(self, decode: Decode, ends: Tensor, x_a: Tensor, x_b: Tensor) -> Tensor:
        """Polylines (P, N+1, d) between codes (P, 2, d): the straight lines, or what a few steps of the solver make of them."""
        line = straight(ends[:, 0], ends[:, 1], SEGMENTS).to(ends)
        if self.config.path_objective == "straight":
            return line
        cost, numbers = ImageCost(decode, x_a, x_b), torch.arange(len(line), device=line.device)
        return minimise(line, cost, numbers, 2, CONTENT, max_iterations=PATH_STEPS).points.to(line)


def typical_squared_distance(data: ImageData, seed: int) -> float:
    """The mean of ||x_A - x_B||^2, sums over pixels in [0, 1], of up to REAL_PAIRS pairs. Raises UsageError where all images are the same."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[: 2 * REAL_PAIRS]
    half = len(order) // 2
    a, b = (to_float(data.images[order[part]]) for part in (slice(half), slice(half, 2 * half)))
    mean = float((a - b).flatten(1).square().sum(1).double().mean()) if half else 0.0
    if not mean:
        raise UsageError(f"--path-weight needs pairs of different images: those of {data.name} are all the same")
    return mean
