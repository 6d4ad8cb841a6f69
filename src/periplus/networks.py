"""Networks: the sheet's two generators, fully connected and convolutional, and their critics, for any image size and one or three channels.

    mlp   generator   z (B, d)        -> 128 -> 256 -> 512 -> 1024 -> C*H*W, sigmoid -> image (B, C, H, W) in [0, 1]
          critic      x (B, C, H, W)  -> 512 -> 256 -> score (B,)
    conv  generator   z (B, d)        -> 64 x H/4 x W/4 -> 32 x H/2 x W/2 -> 16 x H x W -> C x H x W, sigmoid
          critic      x (B, C, H, W)  -> 32 x H/2 x W/2 -> 64 x H/4 x W/4 -> 256 -> score (B,)

Every hidden layer is an affine map (Linear, or a 4 x 4 convolution of stride 2, transposed in the generator) -> [BatchNorm] -> LeakyReLU(0.2) ->
[Dropout]; the last map of the conv generator is a 3 x 3 convolution. Critics are never batch-normalised. They are chains of `stages`, from which
`periplus.piecewise` takes the gradient of a score with respect to the image. Two details decide whether such a pair trains at all:

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
#: Channels of the conv generator at a quarter, a half and the whole of the sides; of the conv critic at a half and a quarter, and its last layer.
GENERATOR_CHANNELS = (64, 32, 16)
CRITIC_CHANNELS, CRITIC_HIDDEN = (32, 64), 256
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


class Centre(nn.Module):
    """Images in [0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x.new_full((), -1), x, alpha=2)  # in one pass over memory


class Critic(nn.Module):
    """Images (B, C, H, W) in [0, 1] -> scores (B,), logits for a GAN: a body of layers, then one affine head."""

    body: nn.Sequential
    head: nn.Linear

    @property
    def stages(self) -> list[nn.Module]:
        """The layers in their order, from images to scores (B, 1)."""
        return [Centre(), *self.body, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x.squeeze(1)


class MLPCritic(Critic):
    """Fully connected critic or discriminator."""

    def __init__(self, image_shape: ImageShape, widths: Sequence[int] = CRITIC_WIDTHS, dropout: float = 0.0) -> None:
        super().__init__()
        check_image_shape(image_shape)
        self.body = nn.Sequential(*hidden_layers((math.prod(image_shape), *widths), dropout=dropout))
        self.head = nn.Linear(widths[-1], 1)
        initialise(self)

    @property
    def stages(self) -> list[nn.Module]:
        """The layers in their order, from images to scores (B, 1)."""
        return [Centre(), nn.Flatten(), *self.body, self.head]


# ---- convolutional --------------------------------------------------------------------------------------------------------------------------


class ConvGenerator(nn.Module):
    """Fully connected, then two transposed 4 x 4 convolutions that double the sides: codes (B, d) -> images (B, C, H, W) in [0, 1]."""

    def __init__(self, latent_dim: int, image_shape: ImageShape, channels: Sequence[int] = GENERATOR_CHANNELS, batch_norm: bool = False) -> None:
        super().__init__()
        sides = check_conv_shape(image_shape)
        first, second, third = channels
        self.body = nn.Sequential(
            *normalised(nn.Linear(latent_dim, first * math.prod(sides), bias=not batch_norm), batch_norm),
            FeatureMap(first, sides),
            *normalised(nn.ConvTranspose2d(first, second, 4, 2, 1, bias=not batch_norm), batch_norm),
            *normalised(nn.ConvTranspose2d(second, third, 4, 2, 1, bias=not batch_norm), batch_norm),
        )
        self.head = nn.Conv2d(third, image_shape[0], 3, padding=1)
        initialise_convolutions(self)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.head(self.body(z))
        return pixels.sigmoid()


class ConvCritic(Critic):
    """Two 4 x 4 convolutions that halve the sides, then fully connected."""

    def __init__(self, image_shape: ImageShape, channels: Sequence[int] = CRITIC_CHANNELS, hidden: int = CRITIC_HIDDEN, dropout: float = 0.0) -> None:
        super().__init__()
        sides = check_conv_shape(image_shape)
        first, second = channels
        self.body = nn.Sequential(
            *dropped(nn.Conv2d(image_shape[0], first, 4, 2, 1), dropout),
            *dropped(nn.Conv2d(first, second, 4, 2, 1), dropout),
            nn.Flatten(),
            *dropped(nn.Linear(second * math.prod(sides), hidden), dropout),
        )
        self.head = nn.Linear(hidden, 1)
        initialise_convolutions(self)


class FeatureMap(nn.Module):
    """Features (B, C*H*W) -> (B, C, H, W), channels last in memory: the order in which convolutions are fast, on CPUs too."""

    def __init__(self, channels: int, sides: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (*sides, channels)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = features.unflatten(1, self.shape).permute(0, 3, 1, 2)
        return found


def normalised(layer: nn.Linear | nn.ConvTranspose2d, batch_norm: bool) -> list[nn.Module]:
    """A layer -> [BatchNorm] -> LeakyReLU."""
    if not batch_norm:
        return [layer, nn.LeakyReLU(SLOPE)]
    norm = nn.BatchNorm1d(layer.out_features) if isinstance(layer, nn.Linear) else nn.BatchNorm2d(layer.out_channels)
    return [layer, norm, nn.LeakyReLU(SLOPE)]


def dropped(layer: nn.Module, dropout: float) -> list[nn.Module]:
    """A layer -> LeakyReLU -> [Dropout]."""
    return [layer, nn.LeakyReLU(SLOPE), *([nn.Dropout(dropout)] if dropout else [])]


# ---- by name --------------------------------------------------------------------------------------------------------------------------------


def build_adversarial(
    architecture: str, image_shape: ImageShape, latent_dim: int, *, batch_norm: bool = False, dropout: float = 0.0
) -> AdversarialNetworks:
    """Generator and critic of an architecture by name, with weights drawn from torch's default generator.

    batch_norm: in the generator. dropout: in the critic's hidden layers. Raises UsageError for an unknown name or an image that it cannot serve.
    """
    if architecture == "mlp":
        return AdversarialNetworks(MLPGenerator(latent_dim, image_shape, batch_norm=batch_norm), MLPCritic(image_shape, dropout=dropout))
    if architecture == "conv":
        return AdversarialNetworks(ConvGenerator(latent_dim, image_shape, batch_norm=batch_norm), ConvCritic(image_shape, dropout=dropout))
    raise UsageError(f"architecture '{architecture}' is unknown: use mlp or conv, or pass networks=(generator, critic)")


# ---- parts ----------------------------------------------------------------------------------------------------------------------------------


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


def initialise_convolutions(module: nn.Module) -> None:
    """Kaiming weights (gain of the leaky slope), unit gain for the head, zero biases.

    A transposed convolution of stride s reaches each output pixel with a share 1/s^2 of its kernel, so its fan-in is that much smaller.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):
                fan_in = layer.weight.shape[0] * math.prod(layer.kernel_size) // math.prod(layer.stride)
            gain = 1.0 if name == "head" else nn.init.calculate_gain("leaky_relu", SLOPE)
            nn.init.normal_(layer.weight, std=gain / math.sqrt(fan_in))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def check_channels(image_shape: Sequence[int]) -> None:
    """Raise UsageError for what is no (C, H, W) of one or three channels."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UsageError(f"image shape must be (C, H, W) with positive sizes, not {tuple(image_shape)}")
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise UsageError(f"images have {channels} channels: 1 (grey) or 3 (colour) are served; pass networks= for others")


def check_image_shape(image_shape: Sequence[int]) -> None:
    """Raise UsageError for a (C, H, W) that the mlp cannot serve."""
    check_channels(image_shape)
    channels, height, width = image_shape
    if channels * height * width > MLP_MAX_PIXELS:
        raise UsageError(
            f"{channels}x{height}x{width} images are too large for architecture 'mlp' (at most {MLP_MAX_PIXELS} values): "
            "use --image-size for smaller ones or pass networks="
        )


def check_conv_shape(image_shape: ImageShape) -> tuple[int, int]:
    """The sides of the smallest feature map, a quarter of the image's. Raises UsageError for sizes that cannot be halved twice."""
    check_channels(image_shape)
    _, height, width = image_shape
    if height % 4 or width % 4:
        nearest = 4 * max(1, round(max(height, width) / 4))
        raise UsageError(
            f"images of {height}x{width} cannot be halved twice, as convolutional networks do: use --image-size {nearest} or --architecture mlp"
        )
    return height // 4, width // 4


def parameter_count(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def place(module: nn.Module, device: str) -> nn.Module:
    """A module on a device, the weights of its convolutions channels last in memory: a step of the conv pair then takes two thirds of the time."""
    for layer in module.to(device).modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


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
