"""Written-out passes against plain differentiation: values, gradients, statistics; in float64 to rounding, under autocast to its 8 bits."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from periplus import objectives
from periplus.networks import Centre, ConvCritic, ConvGenerator, MLPCritic, MLPGenerator
from periplus.passes import MatrixChain, matrix_chain, paint, plain_blocks
from periplus.piecewise import piecewise_linear
from periplus.training.adversarial import Penalty, judge, judge_second_order, scores_for_images

CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "ours": (lambda: MLPCritic((1, 6, 5), widths=(13, 9)), (1, 6, 5)),
    "one layer, colour": (lambda: MLPCritic((3, 4, 4), widths=(7,)), (3, 4, 4)),
    "four layers": (lambda: MLPCritic((1, 4, 4), widths=(9, 8, 7, 6)), (1, 4, 4)),
    "own, without biases, not centred": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(16, 9, bias=False), nn.ReLU(), nn.Identity(), nn.Linear(9, 8), nn.LeakyReLU(0.3), nn.Linear(8, 1, bias=False)
        ),
        (1, 4, 4),
    ),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=CRITICS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, MatrixChain, Tensor, Tensor]:
    torch.manual_seed(1)
    make, shape = CRITICS[request.param]
    critic = make().double()
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.4)
    chain = matrix_chain(piecewise_linear(critic))
    assert chain is not None and len(chain.slopes) == len(chain.layers) - 1
    return critic, chain, random(8, *shape), random(8, *shape, seed=1)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True))


# ---- the critic -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["interpolated", "zero-centred"])
def test_any_loss_of_scores_and_slopes_has_the_gradient_of_differentiating_twice(
    case: tuple[nn.Module, MatrixChain, Tensor, Tensor], penalty: Penalty
) -> None:
    """Not only the sums that are used: every score and every slope with a weight of its own, and a curved function of both."""
    critic, chain, real, fake = case
    mix = random(8, 1, seed=2) if penalty == "interpolated" else None
    where = torch.cat([real, fake]) if mix is None else torch.lerp(fake, real, mix[:, :, None, None])
    scores, squares = chain.judge(real, fake, mix)
    plain, gradient = objectives.score_and_gradient(critic, where.requires_grad_(), create_graph=True)
    expected_scores = critic(torch.cat([real, fake])).view(-1)
    expected_squares = objectives.squared_norm(gradient)
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(squares, expected_squares)

    def loss(of_scores: Tensor, of_squares: Tensor) -> Tensor:
        return (
            (random(16, seed=3) * of_scores.sin()).sum()
            + (random(len(of_squares), seed=4) * of_squares.sqrt()).sum()
            + of_scores.sum() * of_squares.sum()
        )

    ours, twice = gradients(loss(scores, squares), critic), gradients(loss(expected_scores, expected_squares), critic)
    for a, b in zip(ours, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert all(float(g.abs().max()) > 1e-6 for g in ours)


def test_the_gradient_can_be_asked_for_again(case: tuple[nn.Module, MatrixChain, Tensor, Tensor]) -> None:
    """The pass backward writes into arrays of the pass forward: only where nothing is read again."""
    critic, chain, real, fake = case
    scores, squares = chain.judge(real, fake)
    losses = [scores.square().sum() + squares.sum(), squares.square().sum() - scores.sum(), scores.square().sum() + squares.sum()]
    first, second, third = (torch.autograd.grad(loss, list(critic.parameters()), retain_graph=True, materialize_grads=True) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not real.requires_grad and not fake.requires_grad


def test_scores_for_images_have_the_images_gradient_alone(case: tuple[nn.Module, MatrixChain, Tensor, Tensor]) -> None:
    critic, _, real, _ = case
    images = real.requires_grad_()
    found, expected = scores_for_images(critic, images), critic(images).view(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    weights = random(8, seed=5)
    (ours,), (theirs,) = (torch.autograd.grad((weights * score).sum(), images) for score in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert all(not g.any() for g in gradients(scores_for_images(critic, images).sum(), critic))


def test_the_step_takes_the_written_out_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("judge", "score"):
        original = getattr(MatrixChain, name)
        monkeypatch.setattr(MatrixChain, name, lambda self, *a, name=name, original=original: taken.append(name) or original(self, *a))
    critic, images = MLPCritic((1, 8, 8)), torch.rand(4, 1, 8, 8)
    judge(critic, images, images.flip(0), "interpolated")
    scores_for_images(critic, images)
    assert taken == ["judge", "score"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvCritic((1, 8, 8)),
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)),  # its first layer sees rows of the image
        lambda: nn.Sequential(Centre(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)),  # and so does this one's, which never flattens
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)),
        lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 1)),
    ],
)
def test_other_chains_are_left_to_others(make: Callable[[], nn.Module]) -> None:
    critic = make()
    assert piecewise_linear(critic) is not None and matrix_chain(piecewise_linear(critic)) is None
    assert matrix_chain(None) is None


def test_hooks_and_dropout_are_not_passed_over() -> None:
    critic = MLPCritic((1, 4, 4), widths=(5,), dropout=0.5)
    assert piecewise_linear(critic) is None
    assert piecewise_linear(critic.eval()) is not None
    critic.body[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert piecewise_linear(critic) is None


def test_autocast_works_in_its_type_and_returns_float32() -> None:
    """Eight bits: scores, penalty and gradients agree with float32's to a few percent of their norm, and not to rounding."""
    torch.manual_seed(0)
    critic, real, fake = MLPCritic((1, 28, 28)), torch.rand(32, 1, 28, 28), torch.rand(32, 1, 28, 28)
    mix = torch.rand(32, 1)
    chain = matrix_chain(piecewise_linear(critic))
    assert chain is not None
    scores, squares = chain.judge(real, fake, mix)
    plain = gradients(scores.sin().sum() + squares.sum(), critic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_scores, low_squares = chain.judge(real, fake, mix)
    low = gradients(low_scores.sin().sum() + low_squares.sum(), critic)
    for a, b in zip([low_scores, low_squares, *low], [scores, squares, *plain], strict=True):
        assert a.dtype == torch.float32 and 0 < float(((a - b).norm() / b.norm()).detach()) < 0.05


# ---- the generator --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [False, True])
def test_painting_is_the_generator(batch_norm: bool) -> None:
    """Images, gradients of every weight, and running statistics, twice in a row."""
    torch.manual_seed(2)
    plain = MLPGenerator(5, (3, 4, 4), widths=(8, 11, 9), batch_norm=batch_norm).double().train()
    ours = copy.deepcopy(plain)
    for k in range(2):
        codes, weights = random(12, 5, seed=k) - 0.5, random(12, 3, 4, 4, seed=9)
        expected, found = plain(codes), paint(ours, codes)
        assert found.grad_fn is not None and "Paint" in found.grad_fn.next_functions[0][0].name()  # type: ignore[union-attr]
        torch.testing.assert_close(found, expected)
        for a, b in zip(gradients((weights * found).sum(), ours), gradients((weights * expected).sum(), plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)


def test_painting_under_autocast_rounds_as_autocast_does() -> None:
    """Off float32's images and gradients by no more than the module itself under autocast; statistics stay in float32."""
    torch.manual_seed(2)
    plain = MLPGenerator(32, (1, 28, 28), batch_norm=True).train()
    ours, theirs, codes = copy.deepcopy(plain), copy.deepcopy(plain), torch.randn(64, 32)
    expected = plain(codes)
    exact = [expected.detach(), *gradients(expected.square().sum(), plain)]
    off = []
    for way, generator in ((paint, ours), (lambda module, z: module(z).float(), theirs)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = way(generator, codes)
        rounded = [found.detach(), *gradients(found.square().sum(), generator)]
        assert all(a.dtype == torch.float32 for a in rounded)
        off.append([float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True)])
    assert all(0 < a < 1.3 * b for a, b in zip(*off, strict=True)) and max(off[0]) < 0.2
    for name, tensor in plain.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0.1, atol=0.01)


def test_other_generators_paint_as_they_do() -> None:
    codes = torch.randn(4, 3)
    for generator in (ConvGenerator(3, (1, 8, 8)), MLPGenerator(3, (1, 8, 8), batch_norm=True).eval(), nn.Sequential(nn.Linear(3, 5))):
        assert plain_blocks(generator) is None
        assert torch.equal(paint(generator.eval(), codes), generator(codes))
    hooked = MLPGenerator(3, (1, 8, 8)).train()
    hooked.body[0].register_forward_hook(lambda module, inputs, output: 0 * output)
    assert torch.equal(paint(hooked, codes), hooked(codes))
    partly = MLPGenerator(3, (1, 8, 8), batch_norm=True).train()
    partly.body[1].eval()  # frozen statistics
    assert torch.equal(paint(partly, codes), partly(codes))


def test_judging_in_second_order_is_another_way(case: tuple[nn.Module, MatrixChain, Tensor, Tensor]) -> None:
    critic, _, real, fake = case
    torch.manual_seed(3)
    ours = judge(critic, real, fake, "interpolated")
    torch.manual_seed(3)
    for a, b in zip(ours, judge_second_order(critic, real, fake, "interpolated"), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
