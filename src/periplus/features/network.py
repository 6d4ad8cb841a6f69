"""The feature network and its recipe: a small convolutional classifier, the same for all data, pinned and seeded.

Three stages of 3 x 3 convolutions with rectifiers (one of 16 channels, two of 32, two of 64), 2 x 2 pooling between the stages, the mean over what is
left of the image: 64 features, and a linear layer on them for the classes. It is trained with batch normalisation, which is then folded into the
convolutions: what is stored is a chain of affine maps and rectifiers without any state.

Data without labels get a pretext task instead of classes: which of four turns was the image given (Gidaris, Singh & Komodakis 2018; flips, where
images are not square).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from periplus.data import ImageData
from periplus.networks import place
from periplus.seeds import stream

#: Channels of each convolution, stage by stage.
STAGES = ((16,), (32, 32), (64, 64))
FEATURES = STAGES[-1][-1]
#: Raised whenever the recipe changes: networks of another recipe are not comparable.
RECIPE = 1
BATCH, EPOCHS, MOST_EPOCHS, PASSES = 128, 10, 40, 60_000
LEARNING_RATE, WARM_UP = 3e-3, 0.1
#: An image is shifted by up to a fourteenth of its sides: two pixels of 28, one of 8.
SHIFT = 14
PRETEXT = ("as it is", "turned or flipped once", "twice", "three times")

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class FeatureNetwork(nn.Module):
    """Images (N, C, H, W) in [0, 1] to features (N, 64); `head` maps these to logits of the classes."""

    def __init__(self, channels: int, classes: int, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = channels
        for number, stage in enumerate(STAGES):
            if number:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for wider in stage:
                layers.append(nn.Conv2d(width, wider, 3, padding=1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(wider)] if batch_norm else []
                layers.append(nn.ReLU())
                width = wider
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images - 0.5).mean((2, 3))  # type: ignore[no-any-return]


def random_network(channels: int, seed: int = 0) -> FeatureNetwork:
    """A network nobody has trained: weights N(0, 2 / inputs) (He et al. 2015), which keep the scale from layer to layer; biases N(0, 1) / 10."""
    network = FeatureNetwork(channels, 1)
    generator = torch.Generator().manual_seed(stream(seed, "random features"))
    for layer in network.body:
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels * 9
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * math.sqrt(2 / inputs)
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) / 10  # type: ignore[union-attr]
    return network.eval().requires_grad_(False)


def folded(trained: FeatureNetwork, channels: int, classes: int) -> FeatureNetwork:
    """The same function of images without batch normalisation: y = (Wx - m) g / sqrt(v + eps) + b as one affine map."""
    plain = FeatureNetwork(channels, classes)
    norms = [layer for layer in trained.body if isinstance(layer, nn.BatchNorm2d)]
    sources = [layer for layer in trained.body if isinstance(layer, nn.Conv2d)]
    targets = [layer for layer in plain.body if isinstance(layer, nn.Conv2d)]
    for norm, source, target in zip(norms, sources, targets, strict=True):
        assert norm.running_mean is not None and norm.running_var is not None and target.bias is not None
        gain = norm.weight.data / (norm.running_var + norm.eps).sqrt()
        target.weight.data = (source.weight.data * gain[:, None, None, None]).contiguous()
        target.bias.data = norm.bias.data - norm.running_mean * gain
    plain.head.load_state_dict(trained.head.state_dict())
    return plain.eval().requires_grad_(False)


# ---- the recipe -----------------------------------------------------------------------------------------------------------------------------


def train_network(data: ImageData, seed: int = 0, on_step: OnStep | None = None) -> FeatureNetwork:
    """A network trained to tell the classes of data apart, or its turns where it has no labels. A function of (data, seed) on one machine.

    Adam, batches of 128, a learning rate that rises to 3e-3 in a tenth of the steps and falls to zero along a cosine, random shifts.
    """
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
