"""Where searches begin: draws from the decoder's law of codes, each the best of a few of its own.

Start s of image i looks at `screening` codes and keeps the one whose image is nearest. The candidates come from one pool, decoded once; which of them
a start sees is a pure function of (seed, index of the image, s), so an image's starts do not depend on the images beside it, and starts stay
independent draws of one law: the frequencies of what they find estimate the sizes of basins under that law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from periplus.errors import NonFiniteError, UsageError
from periplus.seeds import stream

#: Candidates that each start is the best of.
SCREENING = 32
POOL = 8192
BLOCK = 1024


class Pool:
    """Codes (n, d) that starts are chosen from, and their flattened images; `decode` turns codes into images, `at_once` of them at a time."""

    def __init__(self, codes: Tensor, decode: Callable[[Tensor], Tensor], seed: int, at_once: int = BLOCK) -> None:
        self.codes, self.seed = codes, seed
        with torch.no_grad():
            self.images = torch.cat([decode(block).flatten(1) for block in codes.split(min(BLOCK, at_once))])
        self.squares = self.images.square().sum(1)
        if not bool(self.squares.isfinite().all()):
            raise NonFiniteError(
                "decode returned values that are not finite for codes that starts are drawn from: restrict the domain, or give initial="
            )

    def starts(self, targets: Tensor, index: Sequence[int], count: int, screening: int = SCREENING) -> Tensor:
        """Codes (B, count, d) to start from, for flattened images (B, C*H*W) with these indices in their data set."""
        chosen = []
        for few, numbers in zip(targets.split(BLOCK), torch.tensor(index).split(BLOCK), strict=True):
            score = self.squares - 2 * few @ self.images.T  # squared distance, less what all candidates share
            chosen += [self._of_image(one, number, count, screening) for one, number in zip(score, numbers.tolist(), strict=True)]
        return self.codes[torch.stack(chosen)]

    def _of_image(self, score: Tensor, index: int, count: int, screening: int) -> Tensor:
        best = []
        for start in range(count):
            generator = torch.Generator().manual_seed(stream(self.seed, "start", index, start))
            candidates = torch.randint(len(self.codes), (screening,), generator=generator).to(score.device)
            best.append(candidates[score[candidates].argmin()])
        return torch.stack(best)


def prior_codes(latent_dim: int, seed: int) -> Tensor:
    """POOL draws (POOL, d) from N(0, 1), on the CPU, in blocks: the same bits on every device."""
    generator = torch.Generator().manual_seed(stream(seed, "pool"))
    return torch.cat([torch.randn(BLOCK, latent_dim, generator=generator) for _ in range(POOL // BLOCK)])


def check_initial(initial: Tensor, images: int, starts: int, latent_dim: int) -> None:
    """Raise UsageError for starts of one's own that do not fit."""
    if tuple(initial.shape) != (images, starts, latent_dim):
        raise UsageError(f"initial has shape {tuple(initial.shape)}: (images, starts, d) = {(images, starts, latent_dim)} is needed")
    if not bool(initial.isfinite().all()) or math.prod(initial.shape) == 0:
        raise UsageError("initial holds values that are not finite, or none")
