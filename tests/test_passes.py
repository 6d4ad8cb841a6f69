"""Written-out passes against plain differentiation: values, gradients, statistics, whole steps; in float64 to rounding, in bfloat16 to its 8 bits."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from periplus import objectives
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.networks import AdversarialNetworks, Centre, ConvCritic, ConvGenerator, MLPCritic, MLPGenerator
from periplus.objectives import Penalty
from periplus.passes import CriticPasses, GeneratorPasses, matrix_chain, plain_blocks
from periplus.piecewise import piecewise_linear
from periplus.runs import build_networks
from periplus.training import adversarial
from periplus.training.adversarial import State, judge, judge_second_order, make_fakes, new_state, train_step
from periplus.training.path_term import EVERY, PathTerm
from periplus.training.steps import Batches, step_if_healthy

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


Case = tuple[nn.Module, tuple[int, ...]]
PENALISED: list[Penalty] = ["none", "interpolated", "zero-centred"]
BATCH = 8


@pytest.fixture(params=CRITICS)
def case(request: pytest.FixtureRequest) -> Case:
    """A critic in float64 with weights of any sign, and the shape of its images."""
    torch.manual_seed(1)
    make, shape = CRITICS[request.param]
    critic = make().double()
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.4)
    return critic, shape


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True))


def places(module: nn.Module) -> dict[Tensor, Tensor]:
    """Where gradients may be written: full of what is no gradient."""
    return {p: torch.full_like(p, torch.nan).detach() for p in module.parameters()}


def critic_passes(critic: nn.Module, penalty: Penalty, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> tuple[CriticPasses, list[Tensor]]:
    chain, found = matrix_chain(piecewise_linear(critic)), places(critic)
    assert chain is not None and len(chain.slopes) == len(chain.layers) - 1
    return CriticPasses(chain, batch, penalty, found, dtype), list(found.values())


# ---- the critic -----------------------------------------------------------------------------------------------------------------------------


def uneven_loss(of_scores: Tensor, of_squares: Tensor) -> Tensor:
    """Every score and every slope with a weight of its own, and a curved function of both."""
    seen = (random(len(of_scores), seed=3) * of_scores.sin()).sum()
    if not len(of_squares):
        return seen
    return seen + (random(len(of_squares), seed=4) * of_squares.sqrt()).sum() + of_scores.sum() * of_squares.sum()


@pytest.mark.parametrize("penalty", PENALISED)
def test_any_loss_of_scores_and_slopes_has_the_gradient_of_differentiating_twice(case: Case, penalty: Penalty) -> None:
    """Not only the sums that are used; and again with other images and other weights, in the same memory."""
    critic, shape = case
    passes, found = critic_passes(critic, penalty)
    for turn in range(2):
        real, fake, mix = random(BATCH, *shape, seed=turn), random(BATCH, *shape, seed=turn + 10), random(BATCH, 1, seed=2)
        scores, squares = passes.judge(real, fake, mix if penalty == "interpolated" else None)
        both = torch.cat([real, fake])
        where = torch.lerp(fake, real, mix[:, :, None, None]) if penalty == "interpolated" else both.clone()
        _, slope = objectives.score_and_gradient(critic, where.requires_grad_(), create_graph=True)
        expected_scores = critic(both).view(-1)
        expected_squares = objectives.squared_norm(slope) if penalty != "none" else slope.new_empty(0)
        torch.testing.assert_close(scores, expected_scores)
        torch.testing.assert_close(squares, expected_squares)

        leaves = [scores.requires_grad_(), squares.requires_grad_()][: 1 if penalty == "none" else 2]
        passes.gradients(*torch.autograd.grad(uneven_loss(scores, squares), leaves))
        for ours, twice in zip(found, gradients(uneven_loss(expected_scores, expected_squares), critic), strict=True):
            torch.testing.assert_close(ours, twice, rtol=1e-9, atol=1e-11)
            assert float(ours.abs().max()) > 1e-6
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.mul_(-0.7)


def test_images_and_fakes_are_left_as_they_are(case: Case) -> None:
    critic, shape = case
    passes, _ = critic_passes(critic, "zero-centred")
    real, fake = random(BATCH, *shape), random(BATCH, *shape, seed=1)
    before = real.clone(), fake.clone()
    scores, squares = passes.judge(real, fake)
    passes.gradients(torch.ones_like(scores), torch.ones_like(squares))
    passes.pull_back(torch.ones_like(passes.score(fake, real)[BATCH:]))
    assert torch.equal(real, before[0]) and torch.equal(fake, before[1])


@pytest.mark.parametrize("paired", [False, True])
def test_the_gradient_by_the_fakes(case: Case, paired: bool) -> None:
    """After the critic has moved: scores by its new weights, of fakes alone or beside real images."""
    critic, shape = case
    passes, found = critic_passes(critic, "interpolated")
    real, fake = random(BATCH, *shape), random(BATCH, *shape, seed=1).requires_grad_()
    scores, squares = passes.judge(real, fake.detach(), random(BATCH, 1, seed=2))
    passes.gradients(torch.ones_like(scores), torch.ones_like(squares))
    with torch.no_grad():
        for parameter, gradient in zip(critic.parameters(), found, strict=True):
            parameter -= 0.05 * gradient
    kept = [gradient.clone() for gradient in found]
    score = passes.score(fake.detach(), real if paired else None)
    expected = critic(torch.cat([real, fake]) if paired else fake).view(-1)
    torch.testing.assert_close(score, expected)
    weights = random(BATCH, seed=5)
    (theirs,) = torch.autograd.grad((weights * expected[-BATCH:]).sum(), fake)
    torch.testing.assert_close(passes.pull_back(weights).view_as(fake), theirs, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))  # none by the weights


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


@pytest.mark.parametrize("penalty", PENALISED)
def test_bfloat16_goes_in_and_float32_comes_out(penalty: Penalty) -> None:
    """Eight bits: scores, slopes and gradients agree with float32's to a few percent of their norm, and not to rounding. Weights may move between."""
    torch.manual_seed(0)
    critic, real, fake, mix = MLPCritic((1, 28, 28)), torch.rand(32, 1, 28, 28), torch.rand(32, 1, 28, 28), torch.rand(32, 1)
    both = [critic_passes(critic, penalty, dtype, 32) for dtype in (torch.float32, torch.bfloat16)]
    seen: list[list[Tensor]] = [[], []]
    for _ in range(2):
        for (passes, found), noted in zip(both, seen, strict=True):
            scores, squares = passes.judge(real, fake, mix if penalty == "interpolated" else None)
            passes.gradients(scores.cos(), torch.ones_like(squares) if len(squares) else None)
            noted += [scores, *([squares] if len(squares) else []), *(gradient.clone() for gradient in found)]
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.mul_(0.8)
        for (passes, _), noted in zip(both, seen, strict=True):
            noted += [passes.score(fake), passes.pull_back(passes.score(fake).cos()).float().clone()]
    for exact, low in zip(*seen, strict=True):
        assert low.dtype == torch.float32 and 0 < float((low - exact).norm() / exact.norm()) < 0.1


# ---- the generator --------------------------------------------------------------------------------------------------------------------------


def generator_passes(generator: MLPGenerator, dtype: torch.dtype, batch: int) -> tuple[GeneratorPasses, list[Tensor]]:
    blocks, found = plain_blocks(generator), places(generator)
    assert blocks is not None
    return GeneratorPasses(blocks, generator, batch, found, dtype), list(found.values())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_painting_is_the_generator(batch_norm: bool) -> None:
    """Images, gradients of every weight, and running statistics, twice in a row."""
    torch.manual_seed(2)
    plain = MLPGenerator(5, (3, 4, 4), widths=(8, 11, 9), batch_norm=batch_norm).double().train()
    ours = copy.deepcopy(plain)
    passes, found = generator_passes(ours, torch.float64, 12)
    for k in range(2):
        codes, weights = random(12, 5, seed=k) - 0.5, random(12, 3, 4, 4, seed=9)
        expected, images = plain(codes), passes.paint(codes)
        torch.testing.assert_close(images, expected)
        assert not images.requires_grad
        passes.gradients(weights)
        for a, b in zip(found, gradients((weights * expected).sum(), plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for network in (plain, ours):
                for parameter in network.parameters():
                    parameter.mul_(-0.9)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)


def test_painting_in_bfloat16_rounds_as_autocast_does() -> None:
    """Off float32's images and gradients by no more than the module itself under autocast; statistics stay in float32."""
    torch.manual_seed(2)
    plain = MLPGenerator(32, (1, 28, 28), batch_norm=True).train()
    ours, theirs, codes = copy.deepcopy(plain), copy.deepcopy(plain), torch.randn(64, 32)
    expected = plain(codes)
    exact = [expected.detach(), *gradients(expected.square().sum(), plain)]
    passes, found = generator_passes(ours, torch.bfloat16, 64)
    images = passes.paint(codes)
    passes.gradients(2 * images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        others = theirs(codes).float()
    off = []
    for rounded in ([images, *found], [others.detach(), *gradients(others.square().sum(), theirs)]):
        assert all(a.dtype == torch.float32 for a in rounded)
        off.append([float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True)])
    assert all(0 < a < 1.3 * b for a, b in zip(*off, strict=True)) and max(off[0]) < 0.2
    for name, tensor in plain.state_dict().items():
        assert ours.state_dict()[name].dtype == tensor.dtype
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0.1, atol=0.01)


def test_other_generators_are_left_to_others() -> None:
    for generator in (ConvGenerator(3, (1, 8, 8)), MLPGenerator(3, (1, 8, 8), batch_norm=True).eval(), nn.Sequential(nn.Linear(3, 5))):
        assert plain_blocks(generator) is None
    hooked = MLPGenerator(3, (1, 8, 8)).train()
    hooked.body[0].register_forward_hook(lambda module, inputs, output: 0 * output)
    assert plain_blocks(hooked) is None
    partly = MLPGenerator(3, (1, 8, 8), batch_norm=True).train()
    partly.body[1].eval()  # frozen statistics
    assert plain_blocks(partly) is None


# ---- steps ----------------------------------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gan": ("gan", {"critic_dropout": 0.0}),
    "gan, saturating": ("gan", {"critic_dropout": 0.0, "generator_loss": "saturating"}),
    "gan with dropout": ("gan", {}),  # the generator alone is written out
    "wgan-gp": ("wgan-gp", {}),
    "wgan-gp, three steps of the critic, no batch norm": ("wgan-gp", {"critic_steps": 3, "generator_batch_norm": False}),
    "rpgan": ("rpgan", {}),
}


def state_of(config: AdversarialConfig, data: ImageData, written: bool) -> State:
    """In float64."""
    torch.manual_seed(0)
    networks = AdversarialNetworks(*(network.double() for network in build_networks(config, data.shape)))
    state = new_state(config, networks, "cpu")
    if not written:
        state.written_critic = state.written_generator = None
    return state


@pytest.fixture
def doubles() -> Any:
    """Random numbers in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_is_that_of_automatic_differentiation(name: str, digits: ImageData, doubles: None) -> None:
    """Six steps leave the same weights, moments, averages, running statistics and sums of metrics."""
    model, changes = SETTINGS[name]
    config = AdversarialConfig(model, batch_size=32, latent_dim=8, device="cpu", precision="float32", **changes).resolve(len(digits))
    batches, ends = Batches(digits.images, 32, 0), []
    for written in (True, False):
        state, healthy = state_of(config, digits, written), torch.tensor(True)
        if written:
            assert state.written_generator is not None and (state.written_critic is None) == ("dropout" in name)
        for _ in range(6):
            healthy = train_step(state, config, lambda k: batches(k).double(), healthy)  # type: ignore[arg-type]
        assert healthy
        ends.append(state.tensors())
    for key, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][key], rtol=1e-9, atol=1e-12, msg=key)


def test_steps_with_paths_and_steps_without_take_turns(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a visit costs is differentiated automatically, and added to the gradient that is written out."""
    config = AdversarialConfig("rpgan", batch_size=32, latent_dim=8, device="cpu", precision="float32", path_weight=1.0).resolve(len(digits))
    batches, ends, graphs, paid = Batches(digits.images, 32, 0), [], [], []
    original = make_fakes

    def watched(*arguments: Any, **options: Any) -> Tensor:
        fake = original(*arguments, **options)
        graphs.append(fake.requires_grad)
        return fake

    monkeypatch.setattr(adversarial, "make_fakes", watched)
    for written in (True, False):
        torch.manual_seed(0)
        state = new_state(config, AdversarialNetworks(*build_networks(config, digits.shape)), "cpu")
        state.paths = PathTerm(config, digits)
        state.paths.nearest = 0.0
        if not written:
            state.written_critic = state.written_generator = None
        healthy = torch.tensor(True)
        for _ in range(EVERY + 2):
            healthy = train_step(state, config, batches, healthy)
        assert healthy
        ends.append(torch.cat([p.detach().flatten() for network in (state.generator, state.critic) for p in network.parameters()]))
        paid.append(state.paths.measures()["path_score"])
    assert graphs == [False] * (EVERY + 2) + [True] * (EVERY + 2)
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 1e-3 and paid[0] == pytest.approx(paid[1], rel=1e-2)


class Unused(MLPCritic):
    """With a parameter that no score depends on: in no chain."""

    def __init__(self) -> None:
        super().__init__((1, 8, 8), widths=(6, 6))
        self.further = nn.Parameter(torch.zeros(3))


def frozen_bias() -> nn.Module:
    critic = MLPCritic((1, 8, 8), widths=(6, 6))
    critic.body[0].bias.requires_grad_(False)
    return critic


def shared_layer() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 1))


def shared_and_unused() -> nn.Module:
    """As many parameters as its chain has uses of them."""
    critic = MLPCritic((1, 8, 8), widths=(6, 6, 6))
    critic.body[4] = critic.body[2]
    critic.further = nn.Linear(2, 2)
    return critic


@pytest.mark.parametrize("where", ["weight", "module"])
def test_a_hook_on_a_gradient_is_called(where: str, digits: ImageData) -> None:
    """Own networks may watch or change the gradients of their weights: written passes would go by them in silence."""
    config = AdversarialConfig("wgan-gp", batch_size=32, latent_dim=8, device="cpu", precision="float32").resolve(len(digits))
    networks, called = AdversarialNetworks(MLPGenerator(8, (1, 8, 8)), MLPCritic((1, 8, 8))), []
    for network in networks:
        if where == "weight":
            next(network.parameters()).register_hook(lambda gradient: called.append(gradient.shape))
        else:
            network.head.register_full_backward_hook(lambda module, into, out: called.append(module.weight.shape))
    state = new_state(config, networks, "cpu")
    assert state.written_critic is None and state.written_generator is None
    assert train_step(state, config, Batches(digits.images, 32, 0), torch.tensor(True))
    watched = [next(network.parameters()) if where == "weight" else network.head.weight for network in networks]
    assert set(called) == {weight.shape for weight in watched}


@pytest.mark.parametrize("make", [Unused, frozen_bias, shared_layer, shared_and_unused, lambda: MLPCritic((1, 8, 8), widths=(6, 6), dropout=0.1)])
def test_what_does_not_fit_is_left_to_automatic_differentiation(make: Callable[[], nn.Module], digits: ImageData) -> None:
    """Gradients that would be written to nowhere, where none is wanted, or twice to the same place. Such a critic trains."""
    config = AdversarialConfig("wgan-gp", batch_size=32, latent_dim=8, device="cpu", precision="float32").resolve(len(digits))
    state = new_state(config, AdversarialNetworks(MLPGenerator(8, (1, 8, 8)), make()), "cpu")
    assert state.written_critic is None and state.written_generator is not None
    before = [p.detach().clone() for p in state.critic.parameters()]
    assert train_step(state, config, Batches(digits.images, 32, 0), torch.tensor(True))
    moved = [not torch.equal(a, p) for a, p in zip(before, state.critic.parameters(), strict=True)]
    assert any(moved) and all(p.requires_grad or not now for p, now in zip(state.critic.parameters(), moved, strict=True))


def test_batches_of_another_size_are_left_to_automatic_differentiation(digits: ImageData) -> None:
    config = AdversarialConfig("wgan-gp", batch_size=32, latent_dim=8, device="cpu", precision="float32").resolve(len(digits))
    state = new_state(config, AdversarialNetworks(MLPGenerator(8, (1, 8, 8)), MLPCritic((1, 8, 8))), "cpu")
    assert train_step(state, config, lambda k: Batches(digits.images, 20, 0)(k), torch.tensor(True))  # type: ignore[arg-type]
    assert state.written_generator is not None and state.written_generator.fake is None


def test_a_generator_does_not_learn_from_what_it_did_not_paint_last(digits: ImageData) -> None:
    """Its written gradient belongs to the fakes of its last call: others have none, and say so."""
    config = AdversarialConfig("wgan-gp", batch_size=32, latent_dim=8, device="cpu", precision="float32").resolve(len(digits))
    state = new_state(config, AdversarialNetworks(MLPGenerator(8, (1, 8, 8)), MLPCritic((1, 8, 8))), "cpu")
    real = Batches(digits.images, 32, 0)(0)
    fake = make_fakes(state, config, real)
    with pytest.raises(ValueError, match="carry no graph"):
        adversarial.generator_step(state, config, real, fake.clone(), torch.tensor(True))
    _, healthy = adversarial.generator_step(state, config, real, fake, torch.tensor(True))
    assert healthy


@pytest.mark.parametrize(("loss", "norm"), [(torch.inf, 1.0), (1.0, torch.nan), (-torch.inf, torch.inf), (torch.nan, 1.0)])
def test_neither_the_loss_nor_the_gradient_may_be_non_finite(loss: float, norm: float) -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    before = layer.weight.detach().clone()
    for k, value in enumerate((1.0, loss)):  # the moments are made at the first step
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        healthy = step_if_healthy(optimizer, torch.tensor(value), torch.tensor(norm if k else 1.0), torch.tensor(True))[1]
        moved, before = not torch.equal(before, layer.weight), layer.weight.detach().clone()
        assert bool(healthy) == moved == (k == 0)


def test_judging_in_second_order_is_another_way(case: Case) -> None:
    critic, shape = case
    real, fake = random(8, *shape), random(8, *shape, seed=1)
    torch.manual_seed(3)
    ours = judge(critic, real, fake, "interpolated")
    torch.manual_seed(3)
    for a, b in zip(ours, judge_second_order(critic, real, fake, "interpolated"), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
