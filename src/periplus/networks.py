"""Networks: the sheet's fully connected generator and its critic, for any image size and one or three channels.

    generator   z (B, d)        -> 128 -> 256 -> 512 -> 1024 -> C*H*W, sigmoid -> image (B, C, H, W) in [0, 1]
    critic      x (B, C, H, W)  -> 512 -> 256 -> score (B,)

Every hidden layer is Linear -> [BatchNorm] -> LeakyReLU(0.2) -> [Dropout]. Two details decide whether such a pair trains at all:

* *Initialisation.* torch.nn.Linear draws weights of standard deviation 1/sqrt(3 fan_in): each layer then shrinks its signal by about 0.4, five
  layers leave a hundredth, and a generator starts as the constant image it never leaves (measured: LOG.md). Kaiming's gain for the leaky slope
  keeps the variance. Biases start at zero.
* *Scale.* Images live in [0, 1] everywhere; the critic centres them to [-1, 1] itself.

One's own modules work as well (`networks=` of `periplus.train`): anything with these shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from periplus.errors import UsageError

SLOPE = 0.2
GENERATOR_WIDTHS = (128, 256, 512, 1024)
CRITIC_WIDTHS = (512, 256)
#: The last layer of the mlp has width * C*H*W weights: beyond this many pixels it alone would take more than half a gigabyte.
MLP_MAX_PIXELS = 128 * 128 * 3

ImageShape = tuple[int, int, int]


class AdversarialNetworks(NamedTuple):
    """A generator (B, d) -> (B, C, H, W) in [0, 1] and a critic (B, C, H, W) -> (B,) or (B, 1)."""

    generator: nn.Module
    critic: nn.Module


class MLPGenerator(nn.Module):
    """Fully connected generator: codes (B, d) -> images (B, C, H, W) in [0, 1]."""

    def __init__(self, latent_dim: int, image_shape: ImageShape, widths: Sequence[int] = GENERATOR_WIDTHS, batch_norm: bool = False) -> None:
        super().__init__()
        check_image_shape(image_shape)
        self.image_shape = tuple(image_shape)
        self.body = nn.Sequential(*hidden_layers((latent_dim, *widths), batch_norm=batch_norm))
        self.head = nn.Linear(widths[-1], math.prod(image_shape))
        initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.head(self.body(z))
        return pixels.sigmoid().view(-1, *self.image_shape)


class MLPCritic(nn.Module):
    """Fully connected critic or discriminator: images (B, C, H, W) in [0, 1] -> scores (B,), logits for a GAN. Never batch-normalised."""

    def __init__(self, image_shape: ImageShape, widths: Sequence[int] = CRITIC_WIDTHS, dropout: float = 0.0) -> None:
        super().__init__()
        check_image_shape(image_shape)
        self.body = nn.Sequential(*hidden_layers((math.prod(image_shape), *widths), dropout=dropout))
        self.head = nn.Linear(widths[-1], 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.head(self.body(2 * x.flatten(1) - 1))
        return score.squeeze(1)


def hidden_layers(widths: Sequence[int], batch_norm: bool = False, dropout: float = 0.0) -> list[nn.Module]:
    """Linear -> [BatchNorm] -> LeakyReLU -> [Dropout] between each two of the widths."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers.append(nn.Linear(fan_in, fan_out, bias=not batch_norm))  # batch norm has its own shift
        if batch_norm:
            layers.append(nn.BatchNorm1d(fan_out))
        layers.append(nn.LeakyReLU(SLOPE))
        if dropout:
            layers.append(nn.Dropout(dropout))
    return layers


def initialise(module: nn.Module) -> None:
    """Kaiming weights for hidden layers (gain of the leaky slope), unit gain for the head, zero biases (He et al. 2015, eq. 14)."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            slope = 1.0 if name == "head" else SLOPE  # a slope of 1 is the linear unit: gain 1
            nn.init.kaiming_normal_(layer.weight, a=slope, nonlinearity="leaky_relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def check_image_shape(image_shape: Sequence[int]) -> None:
    """Raise UsageError for a (C, H, W) that the mlp cannot serve."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UsageError(f"image shape must be (C, H, W) with positive sizes, not {tuple(image_shape)}")
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise UsageError(f"images have {channels} channels: 1 (grey) or 3 (colour) are served; pass networks= for others")
    if channels * height * width > MLP_MAX_PIXELS:
        raise UsageError(
            f"{channels}x{height}x{width} images are too large for architecture 'mlp' (at most {MLP_MAX_PIXELS} values): "
            "use --image-size for smaller ones or pass networks="
        )


def parameter_count(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer normalises over the batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules())


@torch.no_grad()
def recalibrate_batch_norm(generator: nn.Module, codes: Tensor, batch_size: int = 250) -> None:
    """Set the running statistics of every batch-norm layer to the averages over `codes` (n, d), in place.

    Averaged weights (EMA) need the statistics of their own activations; those that the training generator gathered belong to other weights. The
    result depends on the weights and the codes only, so it can be redone at any time with the same outcome. Does nothing without batch norm.
    """
    layers = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not layers:
        return
    modes, momenta = [(module, module.training) for module in generator.modules()], [layer.momentum for layer in layers]
    generator.eval()  # dropout and the like stay off: only batch norm is to see batches
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative mean over the batches below
        layer.train()
    for batch in codes.tensor_split(math.ceil(len(codes) / batch_size)):  # even parts: no small last one with the weight of a full one
        generator(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    for module, mode in modes:
        module.training = mode
