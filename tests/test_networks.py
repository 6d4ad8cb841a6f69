"""Shapes, ranges, the sheet's widths, and the two things that decide whether a generator starts alive: its variance and its statistics."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from periplus.errors import UsageError
from periplus.networks import (
    ConvCritic,
    ConvGenerator,
    MLPCritic,
    MLPGenerator,
    build_adversarial,
    has_batch_norm,
    parameter_count,
    place,
    recalibrate_batch_norm,
)

SHAPES = [(c, h, w) for c in (1, 3) for h, w in ((8, 8), (28, 28), (32, 32), (7, 13))]


def codes(n: int, d: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def linears(module: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def generator(shape: tuple[int, int, int] = (1, 28, 28), latent_dim: int = 32, seed: int = 0, **options: bool) -> MLPGenerator:
    torch.manual_seed(seed)
    return MLPGenerator(latent_dim, shape, **options)


# ---- shapes ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_generator_makes_images_and_a_critic_scores_them(shape: tuple[int, int, int], batch_norm: bool):
    g, critic = generator(shape, batch_norm=batch_norm), MLPCritic(shape)
    images = g(codes(5))
    assert images.shape == (5, *shape) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert critic(images).shape == (5,)
    assert g.eval()(codes(1)).shape == (1, *shape) and critic(images[:1]).shape == (1,)


# ---- convolutional --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(c, h, w) for c in (1, 3) for h, w in ((8, 8), (28, 28), (12, 20))])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_conv_pair_makes_images_and_scores_them(shape: tuple[int, int, int], batch_norm: bool):
    torch.manual_seed(0)
    g, critic = build_adversarial("conv", shape, 16, batch_norm=batch_norm, dropout=0.25)
    images = g(codes(5, 16))
    assert images.shape == (5, *shape) and images.min() >= 0 and images.max() <= 1
    assert critic(images).shape == (5,) and not has_batch_norm(critic)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in g.modules()) == 3 * batch_norm
    assert [m.p for m in critic.modules() if isinstance(m, nn.Dropout)] == [0.25] * 3


def test_the_sides_double_twice_as_the_sheet_has_it():
    """Fully connected, then two transposed convolutions -> batch norm -> leaky rectifier, 7 -> 14 -> 28."""
    g, sides = ConvGenerator(32, (1, 28, 28), batch_norm=True), []
    kinds = [type(m) for m in g.body if not isinstance(m, nn.Linear)]
    tail = [nn.ConvTranspose2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert kinds[-6:] == tail * 2
    for m in g.body:
        if isinstance(m, nn.ConvTranspose2d):
            m.register_forward_hook(lambda module, inputs, output: sides.extend([inputs[0].shape[2], output.shape[2]]))
    g(codes(2))
    assert sides == [7, 14, 14, 28]


def test_an_untrained_conv_pair_keeps_its_signal():
    torch.manual_seed(0)
    g, critic = ConvGenerator(32, (1, 28, 28)), ConvCritic((1, 28, 28))
    images = g(codes(256))
    assert images.std(0).mean() > 0.1
    # noise images: the pixels' second moment is carried through to a score of order one
    score = critic(torch.rand(512, 1, 28, 28, generator=torch.Generator().manual_seed(1)).round())
    assert 0.2 < float(score.detach().square().mean().sqrt()) < 5


@pytest.mark.parametrize("shape", [(1, 30, 28), (1, 28, 6), (3, 7, 7)])
def test_sizes_that_cannot_be_halved_twice_are_named(shape: tuple[int, int, int]):
    with pytest.raises(UsageError, match=f"{shape[1]}x{shape[2]} cannot be halved twice.*--image-size"):
        build_adversarial("conv", shape, 8)
    with pytest.raises(UsageError, match="architecture 'resnet' is unknown: use mlp or conv"):
        build_adversarial("resnet", (1, 8, 8), 8)


def test_the_place_in_memory_changes_no_image():
    torch.manual_seed(0)
    g = ConvGenerator(8, (1, 8, 8), batch_norm=True).eval()
    before = g(codes(4, 8))
    placed = place(copy.deepcopy(g), "cpu")
    assert any(p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in placed.parameters())
    torch.testing.assert_close(placed(codes(4, 8)), before)


# ---- fully connected ------------------------------------------------------------------------------------------------------------------------


def test_images_stay_in_range_for_codes_from_far_out():
    images = generator()(codes(8) * 1e4)
    assert images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_widths_are_those_of_the_sheet(shape: tuple[int, int, int]):
    pixels = math.prod(shape)
    assert linears(generator(shape, 20)) == [(20, 128), (128, 256), (256, 512), (512, 1024), (1024, pixels)]
    assert linears(MLPCritic(shape)) == [(pixels, 512), (512, 256), (256, 1)]


def test_every_hidden_layer_is_leaky_with_slope_a_fifth():
    for module, hidden in ((generator(), 4), (MLPCritic((1, 8, 8)), 2)):
        slopes = [m.negative_slope for m in module.modules() if isinstance(m, nn.LeakyReLU)]
        assert slopes == [0.2] * hidden


def test_dropout_and_batch_norm_are_where_they_were_asked_for():
    assert [m.p for m in MLPCritic((1, 8, 8), dropout=0.3).modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3]
    assert not any(isinstance(m, nn.Dropout) for m in MLPCritic((1, 8, 8)).modules())
    assert has_batch_norm(generator(batch_norm=True)) and not has_batch_norm(generator()) and not has_batch_norm(MLPCritic((1, 8, 8)))
    assert sum(isinstance(m, nn.BatchNorm1d) for m in generator(batch_norm=True).modules()) == 4


def test_the_pixels_are_laid_out_channel_by_row_by_column():
    g = generator((3, 7, 13))
    assert g(codes(2)).flatten(1).equal(g.head(g.body(codes(2))).sigmoid())


def test_the_critic_centres_its_images_itself():
    """Zero biases: mid-grey is the origin, and twice as far from it is twice the score."""
    critic, x = MLPCritic((1, 4, 4)), torch.rand(3, 1, 4, 4)
    assert not critic(torch.full((2, 1, 4, 4), 0.5)).any()
    torch.testing.assert_close(critic(0.5 + (x - 0.5) / 2), critic(x) / 2)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 8, 8), "2 channels"),
        ((4, 8, 8), "4 channels"),
        ((3, 129, 128), r"3x129x128.*too large.*49152"),
        ((1, 1000, 1000), r"1x1000x1000.*--image-size"),
        ((1, 0, 8), r"\(1, 0, 8\)"),
        ((1, 8, -1), r"\(1, 8, -1\)"),
        ((0, 8, 8), r"\(0, 8, 8\)"),
        ((8, 8), r"\(C, H, W\).*\(8, 8\)"),
        ((1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
    ],
)
def test_shapes_that_the_mlp_cannot_serve_are_named(shape: tuple[int, ...], said: str):
    for build in (lambda: MLPGenerator(8, shape), lambda: MLPCritic(shape)):
        with pytest.raises(UsageError, match=said):
            build()


# ---- the start: a default that collapses is a bug ----------------------------------------------------------------------------------------------


def spread_before_sigmoid(g: MLPGenerator) -> float:
    """Standard deviation over codes of a pixel before its sigmoid, averaged over pixels."""
    with torch.no_grad():
        return g.head(g.body(codes(256, g.body[0].in_features))).std(0).mean().item()


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("latent_dim", [2, 32, 100])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_untrained_generator_varies_with_its_code(shape: tuple[int, int, int], latent_dim: int, batch_norm: bool):
    spread = sum(spread_before_sigmoid(generator(shape, latent_dim, seed, batch_norm=batch_norm)) for seed in range(3)) / 3
    assert 0.5 < spread < 2


def test_torchs_own_initialisation_would_start_as_a_constant_image():
    """The defect that this house was built around: five layers that each shrink their signal."""
    g = generator()
    for layer in g.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    assert spread_before_sigmoid(g) < 0.1


def test_each_hidden_layer_keeps_the_second_moment():
    """He et al. 2015, eq. 14: E h^2 = 1 after every leaky unit, within sampling error of the narrowest layer."""
    h, moments = codes(512, 64), []
    for layer in generator(latent_dim=64).body:
        h = layer(h)
        if isinstance(layer, nn.LeakyReLU):
            moments.append(h.square().mean().item())
    assert len(moments) == 4 and all(0.8 < m < 1.25 for m in moments)


def test_scores_of_an_untrained_critic_are_of_order_one():
    torch.manual_seed(0)
    images = torch.rand(256, 1, 28, 28)
    deviations = [MLPCritic((1, 28, 28))(images).square().mean().sqrt().item() for _ in range(4)]
    assert 0.2 < sum(deviations) / 4 < 2


def test_biases_start_at_zero_and_seeds_decide_the_weights():
    for module in (generator(), MLPCritic((1, 8, 8))):
        assert all(not m.bias.any() for m in module.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    assert generator(seed=1).head.weight.equal(generator(seed=1).head.weight)
    assert not generator(seed=1).head.weight.equal(generator(seed=2).head.weight)


# ---- batch normalisation -------------------------------------------------------------------------------------------------------------------------


def test_batch_norm_has_torchs_epsilon_and_momentum():
    """PyTorch-GAN writes BatchNorm1d(n, 0.8), which sets the epsilon."""
    for layer in generator(batch_norm=True).modules():
        if isinstance(layer, nn.BatchNorm1d):
            assert layer.eps == 1e-5 and layer.momentum == 0.1 and layer.affine and layer.track_running_stats


def normalised_generator(seed: int = 0) -> MLPGenerator:
    """With weights and statistics of its own, as after some training."""
    g = generator((1, 8, 8), 8, seed, batch_norm=True)
    with torch.no_grad():
        for p in g.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for k in range(5):
        g(3 * codes(16, 8, seed=100 + k))
    return g


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.named_buffers() if "running" in k}


def test_recalibrated_statistics_are_those_of_all_the_codes_at_once():
    g = normalised_generator()
    z = codes(2000, 8)
    recalibrate_batch_norm(g, z)
    h = g.body[0](z)  # the first layer sees the same inputs however they are cut: its mean is exact
    torch.testing.assert_close(g.body[1].running_mean, h.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g.body[1].running_var, h.var(0), rtol=0.02, atol=1e-4)
    whole = normalised_generator()
    recalibrate_batch_norm(whole, z, batch_size=2000)
    for name, value in statistics(g).items():
        torch.testing.assert_close(value, statistics(whole)[name], rtol=0.05, atol=0.02)
    with torch.no_grad():
        batch_statistics, running = g.train()(z), g.eval()(z)
    assert (batch_statistics - running).abs().mean() < 0.01


def test_recalibration_forgets_what_was_gathered_before_and_is_idempotent():
    g, z = normalised_generator(), codes(500, 8)
    other = copy.deepcopy(g)
    other(100 + 10 * codes(50, 8, seed=7))
    before = statistics(g)
    recalibrate_batch_norm(g, z)
    recalibrate_batch_norm(other, z)
    once = statistics(g)
    recalibrate_batch_norm(g, z)
    assert not before["body.1.running_mean"].allclose(once["body.1.running_mean"], atol=1e-3)
    for name, value in statistics(g).items():
        assert value.equal(once[name]) and value.equal(statistics(other)[name])


@pytest.mark.parametrize("training", [True, False])
def test_recalibration_leaves_everything_else_as_it_was(training: bool):
    g = normalised_generator().train(training)
    g.body[1].momentum, g.body[4].momentum = 0.3, None
    parameters = [p.clone() for p in g.parameters()]
    state = torch.get_rng_state()
    recalibrate_batch_norm(g, codes(300, 8))
    assert g.training is training and all(m.training is training for m in g.modules())
    assert g.body[1].momentum == 0.3 and g.body[4].momentum is None
    assert all(p.equal(q) and p.grad is None for p, q in zip(g.parameters(), parameters, strict=True))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("count", [2, 249, 251, 499, 501])
def test_a_last_batch_of_one_code_does_no_harm(count: int):
    """251 codes in batches of 250 would leave a batch of one, which batch norm refuses, or which would weigh as much as all the others."""
    g, z = normalised_generator(), codes(count, 8)
    recalibrate_batch_norm(g, z)
    torch.testing.assert_close(g.body[1].running_mean, g.body[0](z).mean(0), rtol=0.02, atol=0.02)


def test_recalibration_without_batch_norm_does_nothing():
    calls = []
    g = generator((1, 8, 8), 8)
    g.register_forward_hook(lambda *_: calls.append(1))
    recalibrate_batch_norm(g, codes(10, 8))
    untracked = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, track_running_stats=False))
    recalibrate_batch_norm(untracked, codes(10, 8))
    assert not calls


def test_recalibration_leaves_dropout_off_and_each_layer_in_its_own_mode():
    """In one's own generator: dropout would make the result random, and a layer that is frozen on purpose would thaw."""
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 4)).train()
    g[1].eval()
    z, state = codes(500, 8), torch.get_rng_state()
    recalibrate_batch_norm(g, z)
    torch.testing.assert_close(g[2].running_mean, g[0](z).mean(0), rtol=1e-4, atol=1e-4)
    assert g.training and not g[1].training and torch.get_rng_state().equal(state)


# ---- counting ------------------------------------------------------------------------------------------------------------------------------------


def test_parameters_are_counted():
    assert parameter_count(nn.Linear(7, 3)) == 24
    assert parameter_count(MLPCritic((1, 8, 8))) == 64 * 512 + 512 + 512 * 256 + 256 + 256 + 1
    assert parameter_count(generator((1, 28, 28), 32)) == sum((i + 1) * o for i, o in linears(generator((1, 28, 28), 32)))
    plain, normalised = generator(), generator(batch_norm=True)  # a shift instead of the bias, and a scale
    assert parameter_count(normalised) == parameter_count(plain) + 128 + 256 + 512 + 1024
    assert parameter_count(nn.Linear(7, 3).requires_grad_(False)) == 0
