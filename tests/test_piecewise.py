"""The first-order gradient of piecewise linear critics against differentiating twice, and against nested torch.func.grad."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from periplus import objectives
from periplus.networks import Centre, ConvCritic, Critic, MLPCritic
from periplus.piecewise import PiecewiseLinear, piecewise_linear, times_slope
from periplus.training.adversarial import judge

Make = Callable[[], nn.Module]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def odd() -> nn.Module:
    """Strides and paddings with a rest, groups, dilation, plain rectifiers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=1, groups=2),
        nn.LeakyReLU(0.3),
        nn.Conv2d(4, 4, 2, dilation=2, bias=False),
        nn.Flatten(),
        nn.LeakyReLU(0.1),
        nn.Linear(8, 7),
        nn.LeakyReLU(0.2),
        nn.Linear(7, 1),
    )


CRITICS: dict[str, tuple[Make, tuple[int, int, int]]] = {
    "mlp": (lambda: MLPCritic((1, 8, 8), widths=(12, 9)), (1, 8, 8)),
    "mlp, colour, one layer": (lambda: MLPCritic((3, 5, 4), widths=(12,)), (3, 5, 4)),
    "conv": (lambda: ConvCritic((1, 8, 12), channels=(4, 6), hidden=5), (1, 8, 12)),
    "conv, colour": (lambda: ConvCritic((3, 8, 8), channels=(4, 6), hidden=5), (3, 8, 8)),
    "odd sizes": (odd, (3, 11, 8)),
    "in place": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(16, 9), nn.LeakyReLU(0.2, inplace=True), nn.Linear(9, 7), nn.ReLU(inplace=True), nn.Linear(7, 1)
        ),
        (1, 4, 4),
    ),
}


@pytest.fixture(params=CRITICS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, PiecewiseLinear, Tensor, Tensor]:
    torch.manual_seed(1)
    make, shape = CRITICS[request.param]
    critic = make().double()
    for parameter in critic.parameters():  # biases too
        nn.init.normal_(parameter, std=0.4)
    chain = piecewise_linear(critic)
    assert chain is not None
    return critic, chain, random(7, *shape), random(7, *shape, seed=1)


def weight_gradients(critic: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(critic.parameters()), materialize_grads=True))


def test_the_gradient_is_that_of_autograd(case: tuple[nn.Module, PiecewiseLinear, Tensor, Tensor]) -> None:
    critic, chain, real, _ = case
    x = real.clone().requires_grad_()
    score = critic(x).view(-1)
    (expected,) = torch.autograd.grad(score.sum(), x)
    scores, received = chain.scores(chain.first(real))
    torch.testing.assert_close(scores, score)
    torch.testing.assert_close(chain.gradient(received, real.shape[1:]), expected)
    torch.testing.assert_close(chain.gradient(chain.received(chain.first(real)), real.shape[1:]), expected)
    nested = torch.func.vmap(torch.func.grad(lambda one: critic(one[None]).squeeze()))(real)
    torch.testing.assert_close(chain.gradient(received, real.shape[1:]), nested)


@pytest.mark.parametrize("penalty", ["interpolated", "zero-centred"])
def test_penalties_and_their_gradients_are_those_of_differentiating_twice(
    case: tuple[nn.Module, PiecewiseLinear, Tensor, Tensor], penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, penalty, and the gradient of the penalty with respect to every weight and bias; the same random numbers are drawn."""
    critic, _, real, fake = case
    torch.manual_seed(5)
    first = judge(critic, real, fake, penalty)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    monkeypatch.setattr("periplus.training.adversarial.piecewise_linear", lambda critic: None)
    torch.manual_seed(5)
    twice = judge(critic, real, fake, penalty)  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first, twice, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-6, atol=1e-7)
    for a, b in zip(weight_gradients(critic, first[2]), weight_gradients(critic, twice[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert any(float(g.abs().max()) > 1e-3 for g in weight_gradients(critic, judge(critic, real, fake, penalty)[2]))  # type: ignore[arg-type]


def test_no_graph_of_a_graph_is_made(case: tuple[nn.Module, PiecewiseLinear, Tensor, Tensor]) -> None:
    """Nothing comes into the images, and biases have no gradient from a penalty."""
    critic, _, real, fake = case
    real.requires_grad_()
    penalty = judge(critic, real.detach(), fake, "interpolated")[2]
    assert not fake.requires_grad
    for (name, _), gradient in zip(critic.named_parameters(), weight_gradients(critic, penalty), strict=True):
        assert ("bias" in name) <= (not bool(gradient.any()))


def test_a_linear_stretch_has_the_closed_forms() -> None:
    """Where all rectifiers are open the critic is w: (|w| - 1)^2, and R1 + R2 = 2 |w|^2."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    for parameter in critic.parameters():
        nn.init.uniform_(parameter, 0.1, 0.5)
    real, fake = random(5, 1, 4, 4), random(5, 1, 4, 4, seed=2)
    w = (critic[3].weight @ critic[1].weight).norm()
    torch.testing.assert_close(judge(critic, real, fake, "interpolated")[2], (w - 1) ** 2)
    torch.testing.assert_close(judge(critic, real, fake, "zero-centred")[2].double(), 2 * w**2)
    torch.testing.assert_close(objectives.zero_centred_penalty(critic, real), (w**2).expand(5))


def test_the_slope_at_zero_is_autograds() -> None:
    h = torch.tensor([-1.0, 0.0, -0.0, 2.0], requires_grad=True)
    for slope in (0.2, 0.0):
        (expected,) = torch.autograd.grad(nn.functional.leaky_relu(h, slope).sum(), h)
        assert torch.equal(times_slope(torch.ones(4), h.detach(), slope), expected)


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.flatten(1).sum(1, keepdim=True).square()  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 1))
    critic[1].register_forward_hook(lambda module, inputs, output: output**2)
    return critic


class Squared(MLPCritic):
    @property
    def stages(self) -> list[nn.Module]:
        return [*super().stages, nn.Softplus()]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 1)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 1)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 1)),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1)),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2)),
        lambda: Own(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 1)),
        lambda: Squared((1, 4, 4), widths=(3,)),
        lambda: MLPCritic((1, 4, 4), widths=(6,), dropout=0.5),
        hooked,
    ],
)
def test_other_critics_are_left_to_double_backward(make: Make) -> None:
    assert piecewise_linear(make()) is None


def test_idle_dropout_does_not_count() -> None:
    critic = MLPCritic((1, 4, 4), widths=(6,), dropout=0.5).eval()
    chain = piecewise_linear(critic)
    assert chain is not None
    torch.testing.assert_close(chain.scores(chain.first(torch.ones(2, 1, 4, 4)))[0], critic(torch.ones(2, 1, 4, 4)))
    assert isinstance(critic, Critic) and isinstance(critic.stages[0], Centre)
