"""The losses and the penalty against closed forms, against other ways of differentiating, and against the defects of others."""

import functools
import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from periplus import gradient_penalty, objectives
from periplus.errors import UsageError

LN2 = math.log(2)
SHAPES = [(5, 1, 8, 8), (4, 3, 7, 13), (2, 1, 1, 1)]


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype), torch.rand(shape, generator=generator, dtype=dtype)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder:
    """Score = sum of the pixels; keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x.flatten(1).sum(1)


# ---- the penalty: closed forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("column", [False, True], ids=["(B,)", "(B,1)"])
@pytest.mark.parametrize("target", [1.0, 0.0])
def test_a_linear_critic_is_penalised_by_its_own_norm(dtype: torch.dtype, shape: tuple[int, ...], column: bool, target: float):
    real, fake = pair(shape, dtype)
    w = torch.randn(real[0].numel(), dtype=dtype, generator=seeded())
    w = w * (1.7 / w.norm())
    penalty = gradient_penalty(lambda x: x.flatten(1) @ (w[:, None] if column else w) + 3, real, fake, target=target)
    assert penalty.shape == shape[:1] and penalty.dtype == dtype
    expected = torch.full(shape[:1], (1.7 - target) ** 2, dtype=dtype)
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=1e-6)


def test_a_critic_of_unit_slope_costs_nothing():
    real, fake = pair((6, 3, 8, 8))
    penalty = gradient_penalty(lambda x: x.flatten(1).sum(1) / math.sqrt(3 * 64), real, fake)
    assert penalty.max() < 1e-12


def test_a_quadratic_critic_is_penalised_by_its_gradient_at_the_mixture():
    """D(x) = x'Ax / 2 has gradient (A + A')x / 2: another norm for every example, at x_hat and nowhere else."""
    real, fake = pair((7, 3, 3, 5), torch.float64)
    a = torch.randn(45, 45, dtype=torch.float64, generator=seeded())
    seen = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        flat = x.flatten(1)
        return ((flat @ a) * flat).sum(1) / 2

    penalty = gradient_penalty(critic, real, fake, generator=seeded(3))
    x_hat = objectives.interpolate(real, fake, seeded(3)).flatten(1)
    torch.testing.assert_close(seen[0].flatten(1), x_hat)
    torch.testing.assert_close(penalty, ((x_hat @ (a + a.T) / 2).norm(dim=1) - 1).square())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-10)])
def test_nested_functional_gradients_say_the_same(dtype: torch.dtype, tolerance: float):
    """The penalty, and its gradient in every parameter, through torch.func instead of double backward."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.LeakyReLU(0.2), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 1)).to(dtype)
    real, fake = pair((6, 3, 4, 4), dtype)
    penalty = gradient_penalty(critic, real, fake, generator=seeded(5))
    gradients = torch.autograd.grad(penalty.mean(), list(critic.parameters()), materialize_grads=True)

    def score(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(critic, parameters, (x[None],))[0, 0]

    def penalties(parameters: dict[str, Tensor]) -> Tensor:
        slopes = torch.func.vmap(torch.func.grad(score, argnums=1), in_dims=(None, 0))(parameters, x_hat)
        return (slopes.flatten(1).norm(dim=1) - 1).square()

    x_hat = objectives.interpolate(real, fake, seeded(5))
    parameters = {k: v.detach() for k, v in critic.named_parameters()}
    torch.testing.assert_close(penalty.detach(), penalties(parameters), rtol=tolerance, atol=tolerance)
    expected = torch.func.grad(lambda p: penalties(p).mean())(parameters)
    for found, name in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(found, expected[name], rtol=tolerance, atol=tolerance)


def test_parameter_gradients_agree_with_finite_differences():
    real, fake = pair((3, 1, 3, 2), torch.float64)
    shapes = [(6, 4), (4,), (4,)]
    values = [torch.randn(s, dtype=torch.float64, generator=seeded(k)).requires_grad_() for k, s in enumerate(shapes)]

    def penalty(w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        return gradient_penalty(lambda x: torch.tanh(x.flatten(1) @ w + b) @ v, real, fake, generator=seeded(9))

    assert torch.autograd.gradcheck(penalty, values)
    assert torch.autograd.gradgradcheck(penalty, values)


def test_the_penalty_is_safe_where_the_gradient_is_zero():
    """A square root has no slope at zero: without care the first step from a flat critic is all NaN."""
    real, fake = pair((4, 1, 8, 8))
    w = torch.zeros(64, requires_grad=True)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w, real, fake)
    torch.testing.assert_close(penalty, torch.ones(4), rtol=0, atol=3e-6)
    (gradient,) = torch.autograd.grad(penalty.sum(), w)
    assert gradient.isfinite().all()


def test_a_critic_that_ignores_its_image_is_penalised_by_one():
    real, fake = pair((4, 1, 8, 8))
    bias = torch.zeros((), requires_grad=True)
    for critic in (lambda x: bias.expand(len(x)), lambda x: torch.zeros(len(x)), lambda x: 0 * x.flatten(1).sum(1)):
        penalty = gradient_penalty(critic, real, fake)
        torch.testing.assert_close(penalty.detach(), torch.ones(4), rtol=0, atol=3e-6)
    loss = bias.square() + gradient_penalty(lambda x: bias.expand(len(x)), real, fake).mean()
    assert torch.autograd.grad(loss, bias)[0].isfinite()


# ---- the penalty: defects that others ship ---------------------------------------------------------------------------------------------------


def test_the_norm_is_of_one_example_over_all_its_channels_and_pixels():
    """torchgan takes one norm over the batch, Zeleni9 one per pixel of NCHW images."""
    real, fake = pair((6, 3, 4, 5), torch.float64)
    scale = torch.arange(1.0, 7.0, dtype=torch.float64)  # example i has a critic of slope i
    w = torch.randn(60, dtype=torch.float64, generator=seeded())
    w = w / w.norm()
    penalty = gradient_penalty(lambda x: scale[: len(x)] * (x.flatten(1) @ w), real, fake)
    torch.testing.assert_close(penalty, (scale - 1).square(), rtol=1e-9, atol=1e-9)


def test_the_penalty_of_an_example_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(144, 1)).double()
    real, _ = pair((8, 1, 8, 8), torch.float64)
    together = gradient_penalty(critic, real, real)  # x_hat = x whatever the mixing weight
    apart = torch.cat([gradient_penalty(critic, x, x) for x in real.split(1)])
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels_is_served(channels: int):
    real, fake = pair((2, channels, 5, 4))
    expected = torch.full((2,), (math.sqrt(20 * channels) - 1) ** 2)
    torch.testing.assert_close(gradient_penalty(lambda x: x.flatten(1).sum(1), real, fake), expected)


def test_vectors_are_served_too():
    real, fake = pair((3, 16))
    torch.testing.assert_close(gradient_penalty(lambda x: x.sum(1), real, fake), torch.full((3,), 9.0))


def test_each_example_has_one_mixing_weight_of_its_own():
    """Between ones and zeros the mixture is its own weight: one number over an image, another one for the next image."""
    critic, real = Recorder(), torch.ones(32, 3, 4, 4)
    gradient_penalty(critic, real, torch.zeros_like(real), generator=seeded())
    (x_hat,) = critic.seen
    weights = x_hat[:, 0, 0, 0]
    assert (x_hat == weights[:, None, None, None]).all()
    assert len(weights.unique()) == 32


def test_the_mixture_lies_between_real_and_fake():
    critic = Recorder()
    real, fake = pair((64, 3, 4, 4))
    gradient_penalty(critic, real, fake, generator=seeded(2))
    gradient_penalty(lambda x: critic(x), real, torch.zeros_like(real), generator=seeded(2))
    low, high = torch.minimum(real, fake), torch.maximum(real, fake)
    assert ((critic.seen[0] >= low - 1e-6) & (critic.seen[0] <= high + 1e-6)).all()
    weight = (critic.seen[1] / real).mean((1, 2, 3), keepdim=True)  # the same draws: e on the real image, 1 - e on the fake
    torch.testing.assert_close(critic.seen[0], weight * real + (1 - weight) * fake)


def test_mixing_weights_are_uniform_and_independent():
    critic, real, generator = Recorder(), torch.ones(128, 1, 1, 1), seeded(4)
    for _ in range(40):
        gradient_penalty(critic, real, torch.zeros_like(real), generator=generator)
    e = torch.cat(critic.seen).flatten().double()
    n = len(e)
    assert n == 5120 and e.min() >= 0 and e.max() <= 1
    assert scipy.stats.kstest(e.numpy(), "uniform").pvalue > 1e-3
    assert abs(e.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(e.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    lagged = ((e[1:] - 0.5) * (e[:-1] - 0.5)).mean() * 12
    assert abs(lagged) < 4 / math.sqrt(n)


def test_a_generator_of_numbers_makes_the_penalty_repeatable():
    real, fake = pair((4, 1, 4, 4))
    quadratic = lambda x: x.flatten(1).square().sum(1)  # noqa: E731
    first, second = (gradient_penalty(quadratic, real, fake, generator=seeded(1)) for _ in range(2))
    assert first.equal(second) and not first.equal(gradient_penalty(quadratic, real, fake, generator=seeded(2)))


def test_no_gradient_reaches_the_images_or_the_generator():
    torch.manual_seed(0)
    generator = nn.Linear(4, 64)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
    real = torch.rand(5, 1, 8, 8, requires_grad=True)
    fake = generator(torch.randn(5, 4)).reshape(5, 1, 8, 8)
    fake.retain_grad()
    gradient_penalty(critic, real, fake).sum().backward()
    assert real.grad is None and fake.grad is None and all(p.grad is None for p in generator.parameters())
    assert critic[1].weight.grad is not None and critic[1].weight.grad.norm() > 0


def test_the_images_are_left_as_they_were():
    real, fake = pair((3, 1, 4, 4))
    before = real.clone(), fake.clone()
    gradient_penalty(Recorder(), real, fake)
    assert real.equal(before[0]) and fake.equal(before[1]) and not real.requires_grad and not fake.requires_grad


# ---- the penalty: where it is called ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_a_measure_where_gradients_are_off(mode: type):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
    real, fake = pair((5, 1, 8, 8))
    expected = gradient_penalty(critic, real, fake, generator=seeded())
    with mode():
        found = gradient_penalty(critic, real, fake, generator=seeded())
        made_inside = gradient_penalty(critic, real + 0, fake + 0, generator=seeded())
    assert expected.requires_grad and not found.requires_grad
    assert found.equal(expected.detach()) and made_inside.equal(expected.detach())


def test_bfloat16_autocast_keeps_it_finite_and_close():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    real, fake = pair((16, 1, 8, 8))
    exact = gradient_penalty(critic, real, fake, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradient_penalty(critic, real, fake, generator=seeded())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)
    gradients = torch.autograd.grad(rounded.mean(), list(critic.parameters()), materialize_grads=True)
    assert all(g.isfinite().all() for g in gradients)


def test_a_batch_of_one():
    real, fake = pair((1, 1, 4, 4))
    torch.testing.assert_close(gradient_penalty(lambda x: x.flatten(1).sum(1), real, fake), torch.tensor([9.0]))


@pytest.mark.parametrize(
    ("real", "fake", "scores", "said"),
    [
        ((4, 1, 8, 8), (3, 1, 8, 8), None, r"\(4, 1, 8, 8\).*\(3, 1, 8, 8\)"),
        ((4, 1, 8, 8), (4, 3, 8, 8), None, r"\(4, 1, 8, 8\).*\(4, 3, 8, 8\)"),
        ((4,), (4,), None, r"\(4,\)"),
        ((4, 1, 8, 8), (4, 1, 8, 8), (4, 2), r"\(4, 2\).*batch of 4"),
        ((4, 1, 8, 8), (4, 1, 8, 8), (), r"shape \(\).*batch of 4"),
        ((4, 1, 8, 8), (4, 1, 8, 8), (1, 4), r"\(1, 4\)"),
        ((4, 1, 8, 8), (4, 1, 8, 8), (4, 1, 1, 1), r"\(4, 1, 1, 1\)"),
    ],
)
def test_wrong_shapes_are_named(real: tuple, fake: tuple, scores: tuple | None, said: str):
    with pytest.raises(UsageError, match=said):
        gradient_penalty(lambda x: x.sum().expand((len(x),) if scores is None else scores), torch.rand(real), torch.rand(fake))


@pytest.mark.parametrize("types", [(torch.uint8, torch.uint8), (torch.uint8, torch.float32), (torch.float32, torch.float64), (torch.int64,) * 2])
def test_wrong_types_are_named(types: tuple[torch.dtype, torch.dtype]):
    real, fake = (torch.ones(4, 1, 8, 8).to(t) for t in types)
    with pytest.raises(UsageError, match=f"{types[0]}.*{types[1]}"):
        gradient_penalty(Recorder(), real, fake)


# ---- critics that mix the examples of a batch ----------------------------------------------------------------------------------------------------


def conv(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 36, 1))


class MinibatchDeviation(nn.Module):
    """StyleGAN2's layer: the standard deviation over groups of examples that lie N/G apart, as one more score."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group, self.head = group, nn.Linear(192, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(self.group, -1, *x.shape[1:])
        deviation = (y - y.mean(0)).square().mean(0).add(1e-8).sqrt().mean((1, 2, 3))
        return self.head(x.flatten(1))[:, 0] + deviation.repeat(self.group)


def own_batch_norm(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return ((flat - flat.mean(0)) / (flat.var(0) + 1e-5).sqrt())[:, :9].square().sum(1)


def functional(x: Tensor, weight: Tensor) -> Tensor:
    return F.batch_norm(F.conv2d(x, weight), None, None, training=True).square().mean((1, 2, 3))


def mixing_critics() -> dict[str, objectives.Critic]:
    torch.manual_seed(0)
    normalised, linear = conv(nn.BatchNorm2d(4)), nn.Linear(192, 1)
    return {
        "nn.Sequential": normalised,
        "lambda": lambda x: normalised(x),
        "functools.partial": functools.partial(functional, weight=torch.randn(4, 3, 3, 3)),
        "nested": nn.Sequential(nn.Sequential(normalised), nn.Identity()),
        "BatchNorm1d": nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)),
        "without running statistics, even in eval mode": conv(nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        "momentum None": conv(nn.BatchNorm2d(4, momentum=None, affine=False)),
        "one layer of two": nn.Sequential(nn.BatchNorm2d(3).eval(), conv(nn.BatchNorm2d(4))),
        "F.batch_norm of pixels": lambda x: linear(F.batch_norm(x.flatten(1), None, None, training=True)),
        "after a shortcut": lambda x: linear(x.flatten(1)) + 0.3 * normalised(x),
        "own batch norm": own_batch_norm,
        "centring": lambda x: linear((x - x.mean(0)).flatten(1)),
        "relative to the batch": lambda x: linear(x.flatten(1)) - linear(x.flatten(1)).mean(),
        "relativistic over softmax": lambda x: linear(x.flatten(1))[:, 0].softmax(0),
        "the next example": lambda x: linear(x.flatten(1)) + 0.5 * linear(x.flatten(1)).roll(1, 0),
        "the next but one": lambda x: linear(x.flatten(1)) + 0.5 * linear(x.flatten(1)).roll(2, 0),
        "in pairs": lambda x: linear(x.flatten(1).reshape(-1, 2, 192).mean(1).repeat_interleave(2, 0)),
        "minibatch deviation": MinibatchDeviation(8),
        "minibatch deviation of groups of 4": MinibatchDeviation(4),
        "minibatch deviation of groups of 2": MinibatchDeviation(2),
    }


@pytest.mark.parametrize("name", mixing_critics())
def test_a_critic_that_mixes_examples_is_refused(name: str):
    critic = mixing_critics()[name]
    real, fake = pair((8, 3, 8, 8))
    for _ in range(2):  # and refused again: no lucky second try
        with pytest.raises(UsageError, match="mixes the examples of a batch.*normalisation"):
            gradient_penalty(critic, real, fake)
    with torch.no_grad(), pytest.raises(UsageError, match="mixes"):
        gradient_penalty(critic, real, fake)


def separable_critics() -> dict[str, objectives.Critic]:
    torch.manual_seed(0)
    critics: dict[str, objectives.Critic] = {
        "plain": conv(),
        "batch norm in eval mode": conv(nn.BatchNorm2d(4)).eval(),
        "batch norm in eval mode, wrapped": functools.partial(conv(nn.BatchNorm2d(4)).eval().forward),
        "F.batch_norm with fixed statistics": lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=False).square().sum((1, 2, 3)),
        "layer norm": conv(nn.LayerNorm([4, 6, 6])),
        "layer norm of vectors": nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)),
        "group norm": conv(nn.GroupNorm(2, 4)),
        "group norm of one group": conv(nn.GroupNorm(1, 4, affine=False)),
        "spectral norm": nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(192, 1))),
        "dropout": conv(nn.Dropout(0.5)),
        "dropout of channels": conv(nn.Dropout2d(0.5)),
        "attention over pixels": lambda x: (x.flatten(2).transpose(1, 2) @ x.flatten(2)).softmax(-1).square().sum((1, 2)),
    }
    for affine in (False, True):
        for track in (False, True):
            for training in (False, True):
                layer = nn.InstanceNorm2d(4, affine=affine, track_running_stats=track)
                critics[f"instance norm, {affine=}, {track=}, {training=}"] = conv(layer).train(training)
    return critics


@pytest.mark.parametrize("name", separable_critics())
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_a_critic_that_keeps_examples_apart_is_accepted(name: str, batch: int):
    critic = separable_critics()[name]
    real, fake = pair((batch, 3, 8, 8))
    for _ in range(2):
        penalty = gradient_penalty(critic, real, fake)
        assert penalty.shape == (batch,) and penalty.isfinite().all()


def test_separable_critics_pass_under_bfloat16_too():
    real, fake = pair((9, 3, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for critic in separable_critics().values():
            assert gradient_penalty(critic, real, fake).isfinite().all()


def test_a_critic_accepted_in_eval_mode_is_refused_in_training_mode():
    critic, (real, fake) = conv(nn.BatchNorm2d(4)).eval(), pair((4, 3, 8, 8))
    gradient_penalty(critic, real, fake)
    with pytest.raises(UsageError, match="batch normalisation in training mode"):
        gradient_penalty(critic.train(), real, fake)


# ---- the losses ----------------------------------------------------------------------------------------------------------------------------------


def slope(loss: object, score: float) -> float:
    s = torch.tensor([score], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(s), s)  # type: ignore[operator]
    return gradient.item()


non_saturating = functools.partial(objectives.gan_generator_loss, form="non-saturating")
saturating = functools.partial(objectives.gan_generator_loss, form="saturating")


def test_losses_of_an_undecided_discriminator():
    zero = torch.zeros(6)
    assert objectives.gan_discriminator_loss(zero, zero).item() == pytest.approx(2 * LN2)
    assert non_saturating(zero).item() == pytest.approx(LN2)
    assert saturating(zero).item() == pytest.approx(-LN2)
    assert objectives.gan_generator_loss(zero).item() == pytest.approx(LN2)


@pytest.mark.parametrize("score", [-30.0, -3.0, 0.0, 0.7, 30.0])
def test_slopes_of_the_two_generator_losses(score: float):
    sigmoid = 1 / (1 + math.exp(-score))
    assert slope(non_saturating, score) == pytest.approx(-(1 - sigmoid), abs=1e-12)
    assert slope(saturating, score) == pytest.approx(-sigmoid, abs=1e-12)


def test_the_two_generator_losses_differ_where_it_matters():
    """A fake rejected with confidence: one loss still pulls with slope -1, the other has gone flat. The sheet equates them."""
    assert slope(non_saturating, -40) == pytest.approx(-1, abs=1e-12) and abs(slope(saturating, -40)) < 1e-12
    assert abs(slope(non_saturating, 40)) < 1e-12 and slope(saturating, 40) == pytest.approx(-1, abs=1e-12)


def test_gan_losses_are_binary_cross_entropies():
    real, fake = torch.randn(2, 9, dtype=torch.float64, generator=seeded()) * 3
    bce = F.binary_cross_entropy_with_logits
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    torch.testing.assert_close(objectives.gan_discriminator_loss(real, fake), bce(real, one) + bce(fake, zero))
    torch.testing.assert_close(non_saturating(fake), bce(fake, one))
    torch.testing.assert_close(saturating(fake), -bce(fake, zero))
    torch.testing.assert_close(saturating(fake), torch.log1p(-fake.sigmoid()).mean())


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_extreme_scores_overflow_nothing(score: float):
    s = torch.tensor([score], requires_grad=True)
    for loss, value in (
        (non_saturating(s), max(-score, 0)),
        (saturating(s), -max(score, 0)),
        (objectives.gan_discriminator_loss(s, -s), 2 * max(-score, 0)),
    ):
        assert loss.item() == pytest.approx(value)
        assert torch.autograd.grad(loss, s)[0].isfinite().all()


@pytest.mark.parametrize("form", ["saturated", "", "Non-saturating"])
def test_an_unknown_form_is_named(form: str):
    with pytest.raises(UsageError, match=f"'{form}'.*non-saturating.*saturating"):
        objectives.gan_generator_loss(torch.zeros(1), form)


def test_wgan_losses():
    real, fake = torch.tensor([3.0, 5.0], requires_grad=True), torch.tensor([1.0, -2.0], requires_grad=True)
    critic, generator = objectives.wgan_critic_loss(real, fake), objectives.wgan_generator_loss(fake)
    assert critic.item() == -4.5 and generator.item() == 0.5
    pulls = torch.autograd.grad(critic, (real, fake))
    assert pulls[0].tolist() == [-0.5, -0.5] and pulls[1].tolist() == [0.5, 0.5]  # descent raises real scores and lowers fake ones
    assert torch.autograd.grad(generator, fake)[0].tolist() == [-0.5, -0.5]


def test_losses_take_scores_of_either_shape():
    real, fake = torch.randn(2, 5, generator=seeded())
    for loss in (objectives.gan_discriminator_loss, objectives.wgan_critic_loss):
        torch.testing.assert_close(loss(real, fake), loss(real[:, None], fake[:, None]))


# ---- distortions of autoencoders ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bernoulli_distortion_is_the_cross_entropy_summed_over_pixels(shape: tuple[int, ...]):
    logits = 8 * torch.randn(shape, generator=seeded(), dtype=torch.float64)
    images = pair(shape, torch.float64)[0]
    images.flatten()[:2] = torch.tensor([0.0, 1.0], dtype=torch.float64)[: images.numel()]
    found = objectives.bernoulli_distortion(logits, images)
    assert found.shape == shape[:1]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1))


def test_the_bernoulli_distortion_of_extreme_logits_is_finite_and_its_gradient_is_probability_minus_pixel():
    logits = torch.tensor([[-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4]]).requires_grad_()
    for images in (torch.zeros(1, 7), torch.ones(1, 7), torch.full((1, 7), 0.25)):
        value = objectives.bernoulli_distortion(logits, images)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        expected = (logits.detach().double().clamp(min=0) + torch.log1p(torch.exp(-logits.detach().double().abs())) - logits.detach() * images).sum()
        assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)
        torch.testing.assert_close(gradient, logits.detach().sigmoid() - images, atol=1e-7, rtol=1e-6)


def test_the_bernoulli_distortion_is_least_at_the_grey_level_where_it_is_its_entropy():
    grey = torch.rand(4, 1, 3, 3, generator=seeded(), dtype=torch.float64)
    logits = grey.logit().requires_grad_()
    least = objectives.bernoulli_distortion(logits, grey)
    torch.testing.assert_close(least.detach(), -(grey * grey.log() + (1 - grey) * (1 - grey).log()).sum((1, 2, 3)))
    (gradient,) = torch.autograd.grad(least.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert bool((objectives.bernoulli_distortion(logits.detach() + 0.1, grey) > least).all())


@pytest.mark.parametrize("sigma", [0.1, math.sqrt(0.5), 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gaussian_distortion_and_its_constant_are_the_negative_log_density(shape: tuple[int, ...], sigma: float):
    images, mean = pair(shape, torch.float64)
    found = objectives.gaussian_distortion(mean, images, sigma)
    assert found.shape == shape[:1]
    density = torch.distributions.Normal(mean, sigma).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(found + objectives.gaussian_constant(images[0].numel(), sigma), -density)
    if sigma == math.sqrt(0.5):
        torch.testing.assert_close(found, (images - mean).square().flatten(1).sum(1))  # then it is the squared error
