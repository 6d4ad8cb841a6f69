"""The recipe of the feature network: pinned and seeded, the same for all data.

Data without labels get a pretext task instead of classes: which of four turns was the image given (Gidaris, Singh & Komodakis 2018; flips, where
images are not square).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from periplus.data import ImageData
from periplus.features.network import FeatureNetwork, folded
from periplus.networks import place
from periplus.seeds import stream

#: Raised whenever the recipe changes: networks of another recipe are not comparable.
RECIPE = 1
BATCH, EPOCHS, MOST_EPOCHS, PASSES = 128, 10, 40, 60_000
LEARNING_RATE, WARM_UP = 3e-3, 0.1
#: An image is shifted by up to a fourteenth of its sides: two pixels of 28, one of 8.
SHIFT = 14
PRETEXT = ("as it is", "turned or flipped once", "twice", "three times")

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


def train_network(data: ImageData, seed: int = 0, on_step: OnStep | None = None) -> FeatureNetwork:
    """A network trained to tell the classes of data apart, or its turns where it has no labels. A function of (data, seed) on one machine: one thread
    is used, whatever their number is, because sums of several threads round differently.

    Adam, batches of 128, a learning rate that rises to 3e-3 in a tenth of the steps and falls to zero along a cosine, random shifts.
    """
    with one_thread():
        return _train(data, seed, on_step)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(data: ImageData, seed: int, on_step: OnStep | None) -> FeatureNetwork:
    classes = len(data.classes) if data.labels is not None else len(PRETEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "feature network"))
        network = FeatureNetwork(data.shape[0], classes, batch_norm=True).train()
    place(network, "cpu")
    generator = torch.Generator().manual_seed(stream(seed, "feature batches"))
    steps = steps_for(len(data))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rise_and_fall(step, steps))
    for step, rows in enumerate(batches(len(data), steps, generator), 1):
        images, labels = examples(data, rows, generator)
        loss = F.cross_entropy(network.head(network(images.contiguous(memory_format=torch.channels_last))), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, steps)
    return folded(network.eval(), data.shape[0], classes)


def steps_for(images: int) -> int:
    """Steps of the recipe: ten passes; up to forty over small data."""
    passes = max(EPOCHS, min(MOST_EPOCHS, PASSES // images))
    return max(1, passes * images // BATCH)


def rise_and_fall(step: int, steps: int) -> float:
    """The learning rate's factor at a step: linear up, half a cosine down."""
    warm = max(1.0, WARM_UP * steps)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def batches(images: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one batch after the other: permutations of all images, end to end."""
    order = torch.randperm(images, generator=generator)
    for _ in range(steps):
        while len(order) < min(BATCH, images):
            order = torch.cat([order, torch.randperm(images, generator=generator)])
        yield order[:BATCH]
        order = order[BATCH:]


def examples(data: ImageData, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch, shifted at random, with its labels; without labels each image is turned at random, and that is its label."""
    images = data.images[rows].float() / 255
    if data.labels is not None:
        return shifted(images, generator), data.labels[rows]
    turns = torch.randint(len(PRETEXT), (len(rows),), generator=generator)
    return shifted(turned(images, turns), generator), turns


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by a few pixels, its border repeated."""
    _, height, width = images.shape[1:]
    down, right = max(1, height // SHIFT), max(1, width // SHIFT)
    padded = F.pad(images, (right, right, down, down), mode="replicate")
    top = torch.randint(2 * down + 1, (len(images), 1), generator=generator) + torch.arange(height)
    left = torch.randint(2 * right + 1, (len(images), 1), generator=generator) + torch.arange(width)
    picked = padded[torch.arange(len(images))[:, None, None], :, top[:, :, None], left[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Images (B, C, H, W) turned by quarters, `turns` of them each; flipped (not, left-right, top-bottom, both) where they are not square."""
    square = images.shape[2] == images.shape[3]
    flips: tuple[tuple[int, ...], ...] = ((), (3,), (2,), (2, 3))
    result = images.clone()
    for turn in range(1, len(PRETEXT)):
        chosen = turns == turn
        result[chosen] = torch.rot90(images[chosen], turn, (2, 3)) if square else images[chosen].flip(flips[turn])
    return result
