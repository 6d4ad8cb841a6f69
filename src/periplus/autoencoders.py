"""Encoders and decoders, for any image size and one or three channels.

    encoder   x (B, C, H, W) in [0, 1] -> (mean, log_scale), (B, d) each: location and log of the diagonal scale of the channel q(z|x)
    decoder   z (B, d)                 -> (B, C, H, W): logits for a Bernoulli likelihood, the mean image for a Gaussian one

The architectures:

    mlp          depth x [Linear -> LeakyReLU] of `hidden` units on either side (one layer of 512: the usual 784-512-d-512-784)
    conv         two strided convolutions, 32 and 64 channels, and a fully connected layer; mirrored by the decoder
    echo-paper   that of Brekelmans et al. 2019 for 28 x 28 images: five convolutions, six transposed ones, locations tanh(a / 16), Glorot weights
    linear       both halves affine, one scale for all images: with a Gaussian likelihood its optimum is known in closed form (principal components)

One head is shared by all encoders of a channel. A Gaussian channel takes location and log-scale as they come. An echo channel clamps its scale at r,
and a clamp has no gradient: so the head keeps ln s = ln r - softplus(-a) below ln r smoothly. Its locations, m = 4 tanh(a / 4) (1 - s^8), are
bounded, as the recursion needs, and fade where s nears 1: a dimension that carries nothing, s near 0.99, would otherwise send the decoder codes up
to a hundred times larger than m. (A power of 8 leaves the dimensions that do carry something, s below 0.7, as they are. Fading with 1 - s instead was
measured to kill dimensions that come to be needed: LOG.md.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from periplus.errors import UsageError
from periplus.networks import SLOPE, ImageShape, check_conv_shape, check_image_shape, hidden_layers, initialise, initialise_convolutions

Codes = tuple[Tensor, Tensor]
CONV_CHANNELS = (32, 64)
LOCATION_BOUND = 4.0


class AutoencoderNetworks(NamedTuple):
    """An encoder (B, C, H, W) -> (mean, log_scale), each (B, d), and a decoder (B, d) -> (B, C, H, W)."""

    encoder: nn.Module
    decoder: nn.Module


# ---- heads ----------------------------------------------------------------------------------------------------------------------------------


class GaussianHead(nn.Module):
    """The last layer of an encoder: features (B, h) -> (mean, log_scale), (B, d) each, both affine."""

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 2 * latent_dim)
        nn.init.xavier_normal_(self.head.weight, gain=0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Codes:
        mean, log_scale = self.head(features).chunk(2, -1)
        return mean, log_scale


class EchoHead(nn.Module):
    """The last layer of an encoder for echo noise: log_scale < ln clip, |mean| <= bound (1 - s^fade), both smooth. Starts at a scale of about a half.

    fade: 0 leaves the locations as they are, |mean| <= bound.
    """

    def __init__(
        self, features: int, latent_dim: int, clip: float, bound: float = LOCATION_BOUND, stretch: float | None = None, fade: int = 8
    ) -> None:
        super().__init__()
        self.head = nn.Linear(features, 2 * latent_dim)
        self.log_clip, self.bound, self.stretch, self.fade = math.log(clip), bound, stretch or bound, fade
        nn.init.xavier_normal_(self.head.weight, gain=0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Codes:
        location, gate = self.head(features).chunk(2, -1)
        log_scale = self.log_clip - softplus(-gate)
        mean = self.bound * torch.tanh(location / self.stretch)
        return mean * -torch.expm1(self.fade * log_scale) if self.fade else mean, log_scale


class ConstantScaleHead(nn.Module):
    """Affine locations, one learned scale for each dimension, the same for every image."""

    def __init__(self, features: int, latent_dim: int, clip: float | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(features, latent_dim)
        self.gate = nn.Parameter(torch.zeros(latent_dim))
        self.log_clip = None if clip is None else math.log(clip)
        nn.init.xavier_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Codes:
        mean = self.head(features)
        log_scale = self.gate if self.log_clip is None else self.log_clip - softplus(-self.gate)
        return mean, log_scale.expand_as(mean)


def head_for(features: int, latent_dim: int, clip: float | None) -> nn.Module:
    """The head of a Gaussian channel (clip None) or of an echo channel."""
    return GaussianHead(features, latent_dim) if clip is None else EchoHead(features, latent_dim, clip)


# ---- fully connected ------------------------------------------------------------------------------------------------------------------------


class MLPEncoder(nn.Module):
    """Images (B, C, H, W) -> depth x [Linear -> LeakyReLU] -> head."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, hidden: int = 512, depth: int = 1, clip: float | None = None) -> None:
        super().__init__()
        check_image_shape(image_shape)
        self.body = nn.Sequential(*hidden_layers((math.prod(image_shape), *(hidden,) * depth)))
        initialise(self)
        self.code = head_for(hidden, latent_dim, clip)

    def forward(self, x: Tensor) -> Codes:
        codes: Codes = self.code(self.body(x.flatten(1)))
        return codes


class MLPDecoder(nn.Module):
    """Codes (B, d) -> depth x [Linear -> LeakyReLU] -> Linear, [sigmoid] -> (B, C, H, W)."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, hidden: int = 512, depth: int = 1, sigmoid: bool = False) -> None:
        super().__init__()
        check_image_shape(image_shape)
        self.image_shape, self.sigmoid = tuple(image_shape), sigmoid
        self.body = nn.Sequential(*hidden_layers((latent_dim, *(hidden,) * depth)))
        self.head = nn.Linear(hidden, math.prod(image_shape))
        initialise(self)
        nn.init.xavier_normal_(self.head.weight)  # logits near 0 at the start, where the cross-entropy is gentle

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.head(self.body(z)).view(-1, *self.image_shape)
        return pixels.sigmoid() if self.sigmoid else pixels


class LinearEncoder(nn.Module):
    """Images (B, C, H, W) -> affine locations and one scale per dimension."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, clip: float | None = None) -> None:
        super().__init__()
        check_image_shape(image_shape)
        self.code = ConstantScaleHead(math.prod(image_shape), latent_dim, clip)

    def forward(self, x: Tensor) -> Codes:
        codes: Codes = self.code(x.flatten(1))
        return codes


class LinearDecoder(nn.Module):
    """Codes (B, d) -> affine -> (B, C, H, W), unbounded."""

    def __init__(self, image_shape: ImageShape, latent_dim: int) -> None:
        super().__init__()
        check_image_shape(image_shape)
        self.image_shape = tuple(image_shape)
        self.head = nn.Linear(latent_dim, math.prod(image_shape))
        initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.head(z)
        return pixels.view(-1, *self.image_shape)


# ---- convolutional --------------------------------------------------------------------------------------------------------------------------


class ConvEncoder(nn.Module):
    """Images (B, C, H, W) -> two 4 x 4 convolutions of stride 2 -> Linear -> head."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, hidden: int = 512, clip: float | None = None) -> None:
        super().__init__()
        sides = check_conv_shape(image_shape)
        first, second = CONV_CHANNELS
        self.body = nn.Sequential(
            nn.Conv2d(image_shape[0], first, 4, 2, 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(first, second, 4, 2, 1),
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
            nn.Linear(second * math.prod(sides), hidden),
            nn.LeakyReLU(SLOPE),
        )
        initialise_convolutions(self)
        self.code = head_for(hidden, latent_dim, clip)

    def forward(self, x: Tensor) -> Codes:
        codes: Codes = self.code(self.body(x))
        return codes


class ConvDecoder(nn.Module):
    """Codes (B, d) -> Linear -> Linear -> two transposed 4 x 4 convolutions of stride 2, [sigmoid] -> (B, C, H, W)."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, hidden: int = 512, sigmoid: bool = False) -> None:
        super().__init__()
        sides = check_conv_shape(image_shape)
        first, second = CONV_CHANNELS
        self.sigmoid = sigmoid
        self.body = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.LeakyReLU(SLOPE),
            nn.Linear(hidden, second * math.prod(sides)),
            nn.LeakyReLU(SLOPE),
            nn.Unflatten(1, (second, *sides)),
            nn.ConvTranspose2d(second, first, 4, 2, 1),
            nn.LeakyReLU(SLOPE),
        )
        self.head = nn.ConvTranspose2d(first, image_shape[0], 4, 2, 1)
        initialise_convolutions(self)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.head(self.body(z))
        return pixels.sigmoid() if self.sigmoid else pixels


class PaperEncoder(nn.Module):
    """Images (B, C, H, W) -> convolutions 32-32-64-64 (5 x 5, strides 1, 2, 1, 2) -> 256 (all that is left) -> head (Brekelmans et al. 2019)."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, clip: float | None = None) -> None:
        super().__init__()
        sides = check_conv_shape(image_shape)
        layers: list[nn.Module] = []
        widths = (image_shape[0], 32, 32, 64, 64)
        for fan_in, fan_out, stride in zip(widths[:-1], widths[1:], (1, 2, 1, 2), strict=True):
            layers += [nn.Conv2d(fan_in, fan_out, 5, stride, 2), nn.LeakyReLU(SLOPE)]
        self.body = nn.Sequential(*layers, nn.Conv2d(64, 256, sides), nn.LeakyReLU(SLOPE), nn.Flatten())
        glorot(self)
        self.code = GaussianHead(256, latent_dim) if clip is None else EchoHead(256, latent_dim, clip, 1.0, 16.0, fade=0)

    def forward(self, x: Tensor) -> Codes:
        codes: Codes = self.code(self.body(x))
        return codes


class PaperDecoder(nn.Module):
    """Codes (B, d) -> transposed convolutions 64-64-64-32-32-32 (7, 5, 5, 5, 5, 4; strides 1, 1, 2, 1, 2, 1) -> convolution -> (B, C, H, W)."""

    def __init__(self, image_shape: ImageShape, latent_dim: int, sigmoid: bool = False) -> None:
        super().__init__()
        sides = check_conv_shape(image_shape)
        self.sigmoid, self.image_shape = sigmoid, tuple(image_shape)
        plan = ((64, 64, 5, 1), (64, 64, 5, 2), (64, 32, 5, 1), (32, 32, 5, 2), (32, 32, 4, 1))
        layers: list[nn.Module] = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, 64, sides), nn.LeakyReLU(SLOPE)]
        for fan_in, fan_out, kernel, stride in plan:
            padding = (kernel - 1) // 2
            layers += [nn.ConvTranspose2d(fan_in, fan_out, kernel, stride, padding, output_padding=stride - 1), nn.LeakyReLU(SLOPE)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(32, image_shape[0], 5, 1, 2)
        glorot(self)

    def forward(self, z: Tensor) -> Tensor:
        _, height, width = self.image_shape
        pixels: Tensor = self.head(self.body(z)[..., :height, :width])  # the even kernel leaves a row and a column too many
        return pixels.sigmoid() if self.sigmoid else pixels


def glorot(module: nn.Module) -> None:
    """Glorot's uniform weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# ---- by name --------------------------------------------------------------------------------------------------------------------------------


def build_autoencoder(
    architecture: str,
    image_shape: ImageShape,
    latent_dim: int,
    *,
    hidden: int = 512,
    depth: int = 1,
    clip: float | None = None,
    sigmoid: bool = False,
) -> AutoencoderNetworks:
    """Encoder and decoder of an architecture by name, with weights drawn from torch's default generator.

    clip: of an echo channel, None for a Gaussian one. sigmoid: whether the decoder ends with one (a Gaussian likelihood; never for linear).
    """
    if architecture == "mlp":
        return AutoencoderNetworks(
            MLPEncoder(image_shape, latent_dim, hidden, depth, clip), MLPDecoder(image_shape, latent_dim, hidden, depth, sigmoid)
        )
    if architecture == "conv":
        return AutoencoderNetworks(ConvEncoder(image_shape, latent_dim, hidden, clip), ConvDecoder(image_shape, latent_dim, hidden, sigmoid))
    if architecture == "echo-paper":
        return AutoencoderNetworks(PaperEncoder(image_shape, latent_dim, clip), PaperDecoder(image_shape, latent_dim, sigmoid))
    if architecture == "linear":
        return AutoencoderNetworks(LinearEncoder(image_shape, latent_dim, clip), LinearDecoder(image_shape, latent_dim))
    raise UsageError(f"architecture '{architecture}' is unknown: use mlp, conv, echo-paper or linear, or pass networks=(encoder, decoder)")


@torch.no_grad()
def start_at_mean(decoder: nn.Module, mean_image: Tensor, *, logits: bool) -> None:
    """Set the bias of the decoder's last layer, `head`, so that training starts at the best constant image instead of at grey, in place.

    mean_image: (C, H, W) in [0, 1]. logits: the decoder's output goes through a sigmoid, its own or the likelihood's. A fully connected head has a
    bias for each pixel, a convolution one for each channel. Does nothing to a decoder without such a head (one's own).
    """
    head = getattr(decoder, "head", None)
    bias = getattr(head, "bias", None)
    if bias is None:
        return
    start = mean_image.mean((1, 2)) if isinstance(head, nn.Conv2d | nn.ConvTranspose2d) else mean_image.flatten()
    if bias.shape == start.shape:
        bias.copy_(torch.logit(start.clamp(0.002, 0.998)) if logits else start)
