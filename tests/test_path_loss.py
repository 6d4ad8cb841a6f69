"""The path term as a loss: it is U~, its derivative is that of the least cost, and each way of cheating is met by its guard."""

import pytest
import torch
from torch import Tensor, nn

from periplus.errors import UsageError
from periplus.paths import minimal_path
from periplus.paths.costs import ImageCost
from periplus.paths.loss import end_errors, path_scores, relative_costs, speed_excess, straight_scores
from periplus.paths.solver import minimise
from periplus.paths.starts import straight

N = 8


class Bent(nn.Module):
    """A smooth decoder from two dimensions to 1 x 2 x 2 images."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Parameter(torch.randn(2, 6, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return ((z @ self.first).sin() @ self.second).sigmoid().unflatten(-1, (1, 2, 2))


class Free(nn.Module):
    """A decoder that can do anything: an image of its own for each node of one path, of whatever code."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(images.clone())


def a_pair() -> tuple[Tensor, Tensor]:
    return torch.tensor([[[[0.9, 0.1], [0.2, 0.8]]]], dtype=torch.float64), torch.tensor([[[[0.1, 0.7], [0.9, 0.3]]]], dtype=torch.float64)


def fade(x_a: Tensor, x_b: Tensor, segments: int) -> Tensor:
    t = torch.linspace(0, 1, segments + 1, dtype=x_a.dtype)[:, None, None, None]
    return ((1 - t) * x_a + t * x_b)[None]


def descend(images: Tensor, loss, steps: int = 400, rate: float = 0.02) -> Tensor:
    """What a decoder that can do anything makes of a path when only this loss counts."""
    decoder = Free(images)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=rate)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(decoder.images), decoder.images)
        decoder.images.grad = gradient
        optimizer.step()
    return decoder.images.detach()


# ---- the score ------------------------------------------------------------------------------------------------------------------------------


def test_the_score_of_a_path_is_that_of_the_solver():
    decoder, (x_a, x_b) = Bent(), a_pair()
    z_a, z_b = torch.tensor([[-1.0, 0.4]], dtype=torch.float64), torch.tensor([[0.8, 1.1]], dtype=torch.float64)
    path = minimal_path(decoder, z_a, z_b, x_a, x_b, segments=256)
    found = path_scores(decoder(path.points), path.points, x_a, x_b).detach()
    assert float(found) == pytest.approx(float(path.score), rel=2e-4)
    line = straight(z_a, z_b, 256)
    assert float(straight_scores(decoder(line), x_a, x_b).detach()) == pytest.approx(float(path.straight_cost / path.floor), rel=2e-3)


def test_a_cross_fade_scores_four_thirds_and_the_middle_alone_one():
    x_a, x_b = a_pair()
    middle = ((x_a + x_b) / 2).expand(N + 1, -1, -1, -1)[None]
    points = straight(torch.zeros(1, 3), torch.ones(1, 3), N)
    assert float(straight_scores(fade(x_a, x_b, 400), x_a, x_b)) == pytest.approx(4 / 3, rel=1e-5)
    assert float(straight_scores(middle, x_a, x_b)) == pytest.approx(1.0)
    assert float(path_scores(middle, points, x_a, x_b)) == pytest.approx(1.0)
    assert float(end_errors(middle, x_a, x_b)) == pytest.approx(0.5)
    assert float(relative_costs(middle, x_a, x_b).min()) == pytest.approx(0.5)


def test_the_envelope_theorem():
    """With the least-cost path held, the derivative is that of the least cost, which no one differentiated the search for."""
    decoder, (x_a, x_b) = Bent(), a_pair()
    z_a, z_b = torch.tensor([[-1.0, 0.4]], dtype=torch.float64), torch.tensor([[0.8, 1.1]], dtype=torch.float64)

    def solved() -> Tensor:
        cost = ImageCost(decoder, x_a, x_b)
        return minimise(straight(z_a, z_b, N), cost, torch.zeros(1, dtype=torch.long), 2, 1e-9).points

    def least() -> float:
        points = solved()
        return float(path_scores(decoder(points), points, x_a, x_b).detach())

    points = solved()
    (slope,) = torch.autograd.grad(path_scores(decoder(points), points, x_a, x_b).sum(), decoder.second)
    direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            decoder.second += sign * step * direction
        values.append(least())
        with torch.no_grad():
            decoder.second -= sign * step * direction
    assert float((slope * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)
    line = straight(z_a, z_b, N)  # anywhere else it is not: the test would see it
    (other,) = torch.autograd.grad(path_scores(decoder(line), line, x_a, x_b).sum(), decoder.second)
    assert abs(float((other * direction).sum()) / float((slope * direction).sum()) - 1) > 0.05


# ---- ways of cheating, and their guards -----------------------------------------------------------------------------------------------------


def test_one_image_for_every_code_is_met_by_the_errors_of_the_ends():
    from periplus.training.path_term import RECONSTRUCTION

    (x_a, x_b), points = a_pair(), straight(torch.zeros(1, 3), torch.ones(1, 3), N)
    start = fade(x_a, x_b, N)

    def price(images: Tensor) -> Tensor:
        return path_scores(images, points, x_a, x_b).sum()

    cheat = descend(start, price)
    assert float(price(cheat)) < 1.01 and float(end_errors(cheat, x_a, x_b)) > 0.45
    honest = descend(start, lambda images: price(images) + RECONSTRUCTION * end_errors(images, x_a, x_b).sum())
    assert float(end_errors(honest, x_a, x_b)) < 0.1
    middle = ((x_a + x_b) / 2).expand(N + 1, -1, -1, -1)[None]
    exact = fade(x_a, x_b, N)
    assert price(middle) < price(exact)
    assert price(middle) + RECONSTRUCTION * end_errors(middle, x_a, x_b) > price(exact) + RECONSTRUCTION * end_errors(exact, x_a, x_b)


def rush(images: Tensor, x_a: Tensor, x_b: Tensor) -> float:
    """The largest step of a path's images, over Dist: 1/N for an even cross-fade, 1/2 for a jump to the middle."""
    return float(images.flatten(2).diff(dim=1).norm(dim=2).max() / (x_a - x_b).norm())


def test_rushing_to_the_middle_is_met_by_a_limit_of_speed():
    (x_a, x_b), points = a_pair(), straight(torch.zeros(1, 3), torch.ones(1, 3), N)
    start = fade(x_a, x_b, N)

    def exact(images: Tensor) -> Tensor:
        return path_scores(images, points, x_a, x_b).sum() + 50 * end_errors(images, x_a, x_b).sum()

    cheat = descend(start, exact)
    assert float(end_errors(cheat, x_a, x_b)) < 0.01 and rush(cheat, x_a, x_b) > 0.4  # exact at the ends, and the blend at once
    honest = descend(start, lambda images: exact(images) + speed_excess(images, x_a, x_b).sum())
    assert float(end_errors(honest, x_a, x_b)) < 0.01 and rush(honest, x_a, x_b) < 0.3
    assert float(speed_excess(start, x_a, x_b)) == 0.0


@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0])
def test_what_haste_the_limit_leaves(limit: float):
    """From A to M at the limit, M, from M to B at the limit: nothing to pay, and U~ = 1 + 1 / (3 limit): 4/3 for an even fade, 1 for a jump."""
    x_a, x_b = a_pair()
    t = torch.linspace(0, 1, 4001, dtype=x_a.dtype)
    share = ((limit * t).clamp(max=0.5) + (limit * (t - 1) + 0.5).clamp(min=0))[:, None, None, None]
    images = ((1 - share) * x_a + share * x_b)[None]
    assert float(speed_excess(images, x_a, x_b, limit)) == pytest.approx(0.0, abs=1e-9)
    assert float(speed_excess(images, x_a, x_b, limit / 1.5)) > 0.1
    assert float(straight_scores(images, x_a, x_b)) == pytest.approx(1 + 1 / (3 * limit), rel=1e-5)


def test_rushing_to_the_middle_is_met_by_a_critic_on_the_path():
    """Real images are the circle through both ends; their middle is none of them. A critic that knows it keeps the path on the circle."""
    x_a, x_b = torch.tensor([[[[-1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    points = straight(torch.zeros(1, 3), torch.ones(1, 3), N)
    angle = torch.linspace(torch.pi, 0, N + 1)
    arc = torch.stack([angle.cos(), angle.sin()], 1).view(1, N + 1, 1, 1, 2)

    def critic(images: Tensor) -> Tensor:
        return -(images.flatten(1).norm(dim=1) - 1).abs()

    def exact(images: Tensor) -> Tensor:
        return path_scores(images, points, x_a, x_b).sum() + 50 * end_errors(images, x_a, x_b).sum()

    cheat = descend(arc, exact)
    honest = descend(arc, lambda images: exact(images) - 4 * critic(images[:, 1:-1].flatten(0, 1)).mean())
    assert float(critic(cheat[0, 2:-2]).mean()) < -0.8
    assert float(critic(honest[0, 2:-2]).mean()) > -0.1


def test_a_steeper_decoder_gains_nothing():
    decoder, (x_a, x_b) = Bent(), a_pair()
    points = straight(torch.tensor([[-1.0, 0.4]]), torch.tensor([[0.8, 1.1]]), N)
    for k in (2.0, 10.0):
        images, near = decoder(points).detach(), points / k
        assert torch.equal(images, decoder(k * near)) or torch.allclose(images, decoder(k * near))
        assert float(path_scores(images, near, x_a, x_b)) == pytest.approx(float(path_scores(images, points, x_a, x_b)), rel=1e-12)
        cost = [float((relative_costs(images, x_a, x_b)[:, 1:] * z.diff(dim=1).norm(dim=2)).sum()) for z in (near, points)]
        assert cost[0] == pytest.approx(cost[1] / k)  # U itself falls with k: the guard is the division by l


def test_the_judge_of_paths_cannot_be_won_by_a_steeper_decoder():
    """The whole search between codes that are k times nearer in G(k z): U falls by k, U~ does not."""
    decoder, (x_a, x_b) = Bent(), a_pair()
    z_a, z_b = torch.tensor([[-1.0, 0.4]], dtype=torch.float64), torch.tensor([[0.8, 1.1]], dtype=torch.float64)
    as_it_is = minimal_path(decoder, z_a, z_b, x_a, x_b, segments=32)
    for k in (2.0, 10.0):
        steeper = minimal_path(lambda z, k=k: decoder(k * z), z_a / k, z_b / k, x_a, x_b, segments=32)
        assert float(steeper.cost) == pytest.approx(float(as_it_is.cost) / k, rel=1e-4)
        assert float(steeper.score) == pytest.approx(float(as_it_is.score), rel=1e-4)


def test_a_pair_of_equal_images_is_refused():
    """What is refused is a score without a unit: as the images of the ends come nearer, the same images between them count for ever more."""
    x, other = a_pair()
    between = fade(x, other, N)
    for near in (1e-1, 1e-2):
        assert float(straight_scores(between, x, x + near * (other - x))) > 0.3 / near**2
    with pytest.raises(UsageError, match="pair 0 has the same image"):
        straight_scores(fade(x, x, N), x, x)


def test_standing_still_has_a_derivative():
    x_a, x_b = a_pair()
    images = x_a.expand(N + 1, -1, -1, -1)[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(speed_excess(images, x_a, x_b, limit=0.0).sum(), images)
    assert bool(gradient.isfinite().all())
