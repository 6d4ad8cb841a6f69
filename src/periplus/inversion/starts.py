"""Where searches begin: draws from the prior, each the best of a few of its own.

Start s of image i looks at `screening` codes and keeps the one whose image is nearest. The candidates come from one pool, decoded once; which of them
a start sees is a pure function of (seed, index of the image, s), so an image's starts do not depend on the images beside it, and starts stay
independent draws of one law: the frequencies of what they find estimate the sizes of basins under that law.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from periplus.errors import UsageError
from periplus.inversion.objective import Objective

POOL = 8192
BLOCK = 1024


def seed_of(seed: int, *names: str | int) -> int:
    """A seed for these names: a pure function, different for different ones (the same rule as `runs.stream`, which lives a floor higher)."""
    key = "/".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


class Pool:
    """Prior samples (POOL, d) and their flattened images, drawn on the CPU from the seed."""

    def __init__(self, objective: Objective, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed_of(seed, "pool"))
        like = objective.targets
        blocks = [torch.randn(BLOCK, objective.latent_dim, generator=generator) for _ in range(POOL // BLOCK)]
        codes = torch.cat(blocks).to(like)
        self.codes = objective.domain.codes(objective.domain.chart(codes))
        with torch.no_grad():
            self.images = torch.cat([objective.images(block) for block in self.codes.split(min(BLOCK, objective.rows_at_once))])
        self.squares = self.images.square().sum(1)
        self.seed = seed

    def starts(self, targets: Tensor, first: int, count: int, screening: int) -> Tensor:
        """Codes (B, count, d) to start from, for images with indices first, first + 1, ..."""
        score = self.squares - 2 * targets @ self.images.T  # squared distance, less what all candidates share
        chosen = [self._of_image(score[row], first + row, count, screening) for row in range(len(targets))]
        return self.codes[torch.stack(chosen)]

    def _of_image(self, score: Tensor, index: int, count: int, screening: int) -> Tensor:
        best = []
        for start in range(count):
            generator = torch.Generator().manual_seed(seed_of(self.seed, "start", index, start))
            candidates = torch.randint(POOL, (screening,), generator=generator).to(score.device)
            best.append(candidates[score[candidates].argmin()])
        return torch.stack(best)


def check_initial(initial: Tensor, images: int, starts: int, latent_dim: int) -> None:
    """Raise UsageError for starts of one's own that do not fit."""
    if tuple(initial.shape) != (images, starts, latent_dim):
        raise UsageError(f"initial has shape {tuple(initial.shape)}: (images, starts, d) = {(images, starts, latent_dim)} is needed")
    if not bool(initial.isfinite().all()) or math.prod(initial.shape) == 0:
        raise UsageError("initial holds values that are not finite, or none")
