"""Encoders and decoders: shapes and refusals, how alive they start, what the echo head promises its channel, and the echo paper's own layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from periplus import EchoChannel
from periplus.autoencoders import (
    AutoencoderNetworks,
    ConstantScaleHead,
    EchoHead,
    GaussianHead,
    PaperDecoder,
    PaperEncoder,
    build_autoencoder,
    start_at_mean,
)
from periplus.errors import UsageError
from periplus.networks import ImageShape, parameter_count

torch.set_num_threads(1)
ARCHITECTURES = ("mlp", "conv", "echo-paper", "linear")
CONVOLUTIONAL = ("conv", "echo-paper")
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 12, 8)]
CLIP = 0.99


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(architecture: str = "mlp", shape: ImageShape = (1, 8, 8), latent_dim: int = 6, seed: int = 0, **options: object) -> AutoencoderNetworks:
    torch.manual_seed(seed)
    return build_autoencoder(architecture, shape, latent_dim, **options)  # type: ignore[arg-type]


def images(n: int, shape: ImageShape, seed: int = 0) -> Tensor:
    return torch.rand((n, *shape), generator=seeded(seed))


def codes(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=seeded(seed))


def without_biases(module: nn.Module) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if not name.endswith("bias")]


# ---- shapes and refusals ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_an_encoder_locates_and_a_decoder_makes_images(architecture: str, shape: ImageShape, clip: float | None, sigmoid: bool) -> None:
    encoder, decoder = build(architecture, shape, clip=clip, sigmoid=sigmoid, hidden=32)
    mean, log_scale = encoder(images(5, shape))
    assert mean.shape == log_scale.shape == (5, 6) and mean.dtype == log_scale.dtype == torch.float32
    output = decoder(codes(5, 6) * 30)
    assert output.shape == (5, *shape) and output.dtype == torch.float32
    output = output.detach()
    bounded = float(output.min()) >= 0 and float(output.max()) <= 1
    assert bounded == (sigmoid and architecture != "linear")  # a linear decoder has no sigmoid: its closed forms need none
    assert encoder(images(1, shape))[0].shape == (1, 6) and decoder(codes(1, 6)).shape == (1, *shape)


@pytest.mark.parametrize("architecture", ["mlp", "linear"])
def test_images_of_odd_sizes_pass_where_nothing_is_halved(architecture: str) -> None:
    encoder, decoder = build(architecture, (3, 7, 13), hidden=16)
    assert encoder(images(2, (3, 7, 13)))[0].shape == (2, 6) and decoder(codes(2, 6)).shape == (2, 3, 7, 13)


@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
@pytest.mark.parametrize(("shape", "nearest"), [((1, 7, 7), 8), ((1, 30, 30), 32), ((3, 28, 13), 28), ((1, 2, 2), 4), ((1, 6, 8), 8)])
def test_sizes_that_cannot_be_halved_twice_are_refused_with_one_that_can(architecture: str, shape: ImageShape, nearest: int) -> None:
    with pytest.raises(UsageError, match=rf"{shape[1]}x{shape[2]} cannot be halved twice.*--image-size {nearest} or --architecture mlp"):
        build(architecture, shape)
    build(architecture, (shape[0], nearest, nearest))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 0, 8), (1, 8)])
def test_what_is_no_image_is_refused(architecture: str, shape: ImageShape) -> None:
    with pytest.raises(UsageError):
        build(architecture, shape)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UsageError, match=r"architecture 'resnet' is unknown: use mlp, conv, echo-paper or linear, or pass networks=\(encoder, deco"):
        build("resnet")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("clip", [None, CLIP])
def test_each_image_is_encoded_and_each_code_decoded_on_its_own(architecture: str, clip: float | None) -> None:
    encoder, decoder = build(architecture, clip=clip, hidden=32)
    x, z = images(4, (1, 8, 8)), codes(4, 6)
    for whole, part in ((encoder(x)[0], encoder(x[2:3])[0]), (encoder(x)[1], encoder(x[2:3])[1]), (decoder(z), decoder(z[2:3]))):
        torch.testing.assert_close(whole[2:3], part, rtol=1e-4, atol=1e-5)


def test_the_usual_mlp_has_the_usual_widths() -> None:
    def widths(module: nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]

    encoder, decoder = build("mlp", (1, 28, 28), 16)
    assert widths(encoder) == [(784, 512), (512, 32)] and widths(decoder) == [(16, 512), (512, 784)]
    encoder, decoder = build("mlp", (1, 28, 28), 16, hidden=100, depth=3)
    assert widths(encoder) == [(784, 100), (100, 100), (100, 100), (100, 32)]
    assert widths(decoder) == [(16, 100), (100, 100), (100, 100), (100, 784)]
    assert [m.negative_slope for half in (encoder, decoder) for m in half.modules() if isinstance(m, nn.LeakyReLU)] == [0.2] * 6


def test_linear_is_linear() -> None:
    encoder, decoder = build("linear", (1, 8, 8))
    x, z = images(2, (1, 8, 8)).double(), codes(2, 6).double()
    encoder.double(), decoder.double()
    middle, mean = encoder(x.mean(0, keepdim=True))[0], encoder(x)[0].mean(0, keepdim=True)
    torch.testing.assert_close(middle, mean)
    torch.testing.assert_close(decoder(z.mean(0, keepdim=True)), decoder(z).mean(0, keepdim=True))
    assert torch.equal(encoder(x)[1][0], encoder(x)[1][1])  # one scale for all images


# ---- at the start -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@pytest.mark.parametrize("depth", [1, 3])
def test_activations_neither_vanish_nor_explode(architecture: str, depth: int) -> None:
    """Kaiming weights keep the second moment of what passes through from layer to layer, in both halves; logits begin within a few units of 0."""
    encoder, decoder = build(architecture, (1, 28, 28), 32, depth=depth)
    seen: list[float] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: seen.append(float(output.square().mean())))
        for half in (encoder, decoder)
        for module in half.modules()
        if isinstance(module, nn.LeakyReLU)
    ]
    noise = torch.randn(200, 1, 28, 28, generator=seeded(2))  # unit second moment at every pixel
    encoder(noise)
    logits = decoder(codes(200, 32))
    for handle in handles:
        handle.remove()
    assert len(seen) == (2 * depth if architecture == "mlp" else 6)
    assert all(0.4 < moment < 2.5 for moment in seen), seen
    assert 0.3 < float(logits.std()) < 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encodings_of_images_differ_at_the_start(architecture: str) -> None:
    for clip in (None, CLIP):
        mean, log_scale = build(architecture, (1, 28, 28), 32, clip=clip).encoder(images(100, (1, 28, 28)))
        assert 1e-5 < float(mean.std(0).mean()) < 2
        assert float((log_scale.exp() - (1 if clip is None else 0.5)).abs().mean()) < 0.45  # Gaussian: like the prior; echo: half of the noise passes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_come_from_the_seed_alone_and_biases_are_zero(architecture: str) -> None:
    one, again, other = (build(architecture, seed=seed, hidden=16, clip=CLIP) for seed in (0, 0, 1))
    for a, b, c in zip(one, again, other, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        drawn = [(p, q) for p, q in zip(without_biases(a), without_biases(c), strict=True) if p.dim() > 1]
        assert drawn and not any(torch.equal(p, q) for p, q in drawn)
        assert not any(bool(p.any()) for name, p in a.named_parameters() if name.endswith("bias"))


MEAN = torch.rand(1, 8, 8, generator=seeded(3)) * 1.2 - 0.1


@pytest.mark.parametrize("architecture", ["mlp", "linear"])
def test_a_decoder_starts_at_the_mean_image(architecture: str) -> None:
    """With a bias for each pixel: the best constant image, its probabilities kept off 0 and 1."""
    mean = MEAN.clamp(0, 1)
    for logits in (True, False):
        decoder = build(architecture, hidden=16).decoder
        start_at_mean(decoder, mean, logits=logits)
        output = decoder.head(torch.zeros(1, decoder.head.in_features)).view(1, 8, 8)
        torch.testing.assert_close(output.sigmoid() if logits else output, mean.clamp(0.002, 0.998) if logits else mean)
    assert bool(decoder.head.bias.requires_grad) and bool(output.isfinite().all())


@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
def test_a_convolutional_decoder_starts_at_the_mean_of_each_channel(architecture: str) -> None:
    decoder = build(architecture, (3, 8, 8)).decoder
    start_at_mean(decoder, torch.tensor([0.0, 0.25, 0.9])[:, None, None].expand(3, 8, 8), logits=True)
    torch.testing.assert_close(decoder.head.bias.sigmoid(), torch.tensor([0.002, 0.25, 0.9]))


def test_a_decoder_without_such_a_head_is_left_alone() -> None:
    for decoder in (nn.Sequential(nn.Linear(6, 64)), nn.Linear(6, 64, bias=False)):
        before = [p.clone() for p in decoder.parameters()]
        start_at_mean(decoder, MEAN, logits=True)
        assert all(torch.equal(p, q) for p, q in zip(before, decoder.parameters(), strict=True))
    head = nn.Sequential()
    head.head = nn.Linear(6, 10)
    before = head.head.bias.clone()
    start_at_mean(head, MEAN, logits=True)
    assert torch.equal(head.head.bias, before)


# ---- heads ------------------------------------------------------------------------------------------------------------------------------------


def gated(head: nn.Module, gate: float, location: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, log_scale, gate's gradient of log_scale) of a head whose outputs are set by its bias."""
    linear = head.head
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.cat([torch.full((3,), location), torch.full((3,), gate)]))
    mean, log_scale = head(torch.zeros(2, 4))
    (gradient,) = torch.autograd.grad(log_scale.sum(), linear.bias)
    return mean.detach(), log_scale.detach(), gradient[3:]


@pytest.mark.parametrize("gate", [-200.0, -5.0, 0.0, 5.0, 20.0, 60.0, 85.0])
@pytest.mark.parametrize("clip", [0.985, 0.99])
def test_an_echo_heads_scale_stays_below_the_clip_and_keeps_its_gradient(gate: float, clip: float) -> None:
    """ln s = ln r - softplus(-a): the channel's hard clamp never bites, so no dimension's gradient dies on it (float32 ends near a = 100)."""
    _, log_scale, gradient = gated(EchoHead(4, 3, clip), gate)
    assert bool((log_scale <= math.log(clip)).all()) and bool(log_scale.isfinite().all())
    assert float(log_scale[0, 0]) == pytest.approx(
        math.log(clip) - math.log1p(math.exp(-gate)) if gate > -100 else gate + math.log(clip), abs=1e-6, rel=1e-6
    )
    assert bool((gradient > 0).all())
    torch.testing.assert_close(gradient, torch.full((3,), 2 * torch.sigmoid(torch.tensor(-gate)).item()), rtol=1e-4, atol=0)
    leaf = log_scale.clone().requires_grad_()  # and through the channel's rate
    (slope,) = torch.autograd.grad(EchoChannel(clip=clip).rate(torch.zeros_like(leaf), leaf).sum(), leaf)
    assert torch.equal(slope, -torch.ones_like(leaf))


@pytest.mark.parametrize("location", [-1e6, -3.0, 0.0, 0.2, 1e6])
@pytest.mark.parametrize("gate", [-8.0, 0.0, 12.0])
def test_echo_codes_are_bounded_however_much_noise_passes(location: float, gate: float) -> None:
    """|m| <= 4 (1 - s^8) <= 32 (1 - s): the sum |m| / (1 - s) of the recursion stays below 32, where m bounded alone allows 400 at the clip."""
    mean, log_scale, _ = gated(EchoHead(4, 3, CLIP), gate, location)
    s = log_scale.exp()
    torch.testing.assert_close(mean, 4 * math.tanh(location / 4) * (1 - s**8), rtol=1e-4, atol=1e-6)
    z = EchoChannel(clip=CLIP).sample(mean, log_scale, seeded())
    torch.testing.assert_close(z, mean / (1 - s), rtol=1e-3, atol=1e-5)  # all rows alike: the recursion is a geometric series
    assert float(z.abs().max()) < 32


def test_a_gaussian_head_is_affine_and_a_constant_scale_constant() -> None:
    torch.manual_seed(0)
    head, features = GaussianHead(4, 3), torch.randn(5, 4)
    torch.testing.assert_close(torch.cat(head(features), 1), features @ head.head.weight.T + head.head.bias)
    for clip, scale in ((None, 1.0), (CLIP, CLIP / 2)):
        constant = ConstantScaleHead(4, 3, clip)
        mean, log_scale = constant(features)
        torch.testing.assert_close(mean, features @ constant.head.weight.T)
        torch.testing.assert_close(log_scale.exp(), torch.full((5, 3), scale))
        with torch.no_grad():
            constant.gate.fill_(50.0)
        assert bool((constant(features)[1] <= (50.0 if clip is None else math.log(clip))).all())


# ---- the echo paper's networks ------------------------------------------------------------------------------------------------------------------


def test_the_papers_encoder_has_the_papers_layers() -> None:
    """32-32-64-64-256, k 5, strides 1, 2, 1, 2, then 7 x 7; locations tanh(a / 16); Glorot weights."""
    encoder = build("echo-paper", (1, 28, 28), 32, clip=CLIP).encoder
    assert isinstance(encoder, PaperEncoder)
    layers = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert layers == [(1, 32, 5, 1), (32, 32, 5, 2), (32, 64, 5, 1), (64, 64, 5, 2), (64, 256, 7, 1)]
    assert encoder.body(images(2, (1, 28, 28))).shape == (2, 256)
    _, log_scale, _ = gated(small := EchoHead(4, 3, CLIP, bound=1.0, stretch=16.0, fade=0), 0.0, location=8.0)
    torch.testing.assert_close(small(torch.zeros(2, 4))[0], torch.full((2, 3), math.tanh(8 / 16)))
    head = encoder.code
    assert isinstance(head, EchoHead) and (head.bound, head.stretch, head.fade) == (1.0, 16.0, 0)
    assert isinstance(build("echo-paper", (1, 28, 28), 32).encoder.code, GaussianHead)


def test_the_papers_decoder_has_the_papers_layers() -> None:
    """Transposed convolutions 64-64-64-32-32-32, k 7, 5, 5, 5, 5, 4, strides 1, 1, 2, 1, 2, 1."""
    decoder = build("echo-paper", (1, 28, 28), 32).decoder
    assert isinstance(decoder, PaperDecoder)
    layers = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert layers == [(32, 64, 7, 1), (64, 64, 5, 1), (64, 64, 5, 2), (64, 32, 5, 1), (32, 32, 5, 2), (32, 32, 4, 1)]
    assert decoder(codes(2, 32)).shape == (2, 1, 28, 28)


def test_the_papers_weights_are_glorots() -> None:
    for half in build("echo-paper", (1, 28, 28), 32, clip=CLIP):
        for name, layer in half.named_modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                receptive = math.prod(layer.kernel_size)
                bound = math.sqrt(6 / (layer.weight.shape[0] * receptive + layer.weight.shape[1] * receptive))
                assert float(layer.weight.abs().max()) <= bound, name
                assert float(layer.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_parameters_are_counted() -> None:
    encoder, decoder = build("mlp", (1, 28, 28), 16)
    assert parameter_count(encoder) == 784 * 512 + 512 + 512 * 32 + 32 and parameter_count(decoder) == 16 * 512 + 512 + 512 * 784 + 784
