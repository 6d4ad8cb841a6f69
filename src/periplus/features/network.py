"""The feature network: three stages of 3 x 3 convolutions with rectifiers (one of 16 channels, two of 32, two of 64), 2 x 2 pooling between the
stages, the mean over what is left of the image: 64 features, and a linear layer on them for the classes.

It is trained with batch normalisation, which is then folded into the convolutions: what is stored is a chain of affine maps and rectifiers without
any state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from periplus.seeds import stream

#: Channels of each convolution, stage by stage.
STAGES = ((16,), (32, 32), (64, 64))
FEATURES = STAGES[-1][-1]


class FeatureNetwork(nn.Module):
    """Images (N, C, H, W) in [0, 1] to features (N, 64); `head` maps these to logits of the classes."""

    def __init__(self, channels: int, classes: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.channels = channels
        with torch.random.fork_rng(devices=[]):  # new layers draw weights: not from the user's random numbers
            self.body, self.head = build(channels, batch_norm), nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images - 0.5).mean((2, 3))  # type: ignore[no-any-return]


def build(channels: int, batch_norm: bool) -> nn.Sequential:
    """The convolutions, stage by stage."""
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
    return nn.Sequential(*layers)


def random_network(channels: int, seed: int = 0) -> FeatureNetwork:
    """A network nobody has trained: weights N(0, 2 / inputs) (He et al. 2015), which keep the scale from layer to layer; biases N(0, 1) / 10."""
    network = FeatureNetwork(channels, 1)
    generator = torch.Generator().manual_seed(stream(seed, "random features"))
    for layer in network.body:
        if isinstance(layer, nn.Conv2d):
            inputs = layer.in_channels * 9
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * math.sqrt(2 / inputs)
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) / 10  # type: ignore[union-attr]
    nn.init.zeros_(network.head.weight)  # unused, but part of the hash
    nn.init.zeros_(network.head.bias)
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
