"""Minimal-cost paths: closed forms, invariances, a fast-marching oracle, and bounds that are none if any path undercuts them."""

import math

import pytest
import skfmm
import torch
from torch import Tensor, nn

from periplus import NonFiniteError, UsageError, paths
from periplus.paths import bounds, certified_lipschitz, minimal_path, minimal_path_for_cost
from periplus.paths.costs import ImageCost, ScalarCost
from periplus.paths.energy import energy_and_gradient, mean_weights, precondition, refine, residual
from periplus.paths.measuring import measure
from periplus.paths.searching import SAME_ENERGY, SAME_PLACE, cheapest, distinct, first_rows, levels
from periplus.paths.solver import minimise
from periplus.paths.starts import GRAPH_DIMENSIONS, resample, spherical, straight

ONE = torch.zeros(1, dtype=torch.long)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dimensions: int, pixels: int = 12, activation: type[nn.Module] = nn.Tanh, width: int = 24, seed: int = 0) -> nn.Sequential:
    """A decoder with weights large enough for its images to bend."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Linear(dimensions, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, pixels), nn.Sigmoid()
        )
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1.8 / math.sqrt(layer.in_features))
    return layers.double().requires_grad_(False).eval()


def decoder(layers: nn.Module):
    return lambda z: layers(z)[..., None, None, :]


def problem(dimensions: int = 4, pairs: int = 6, activation: type[nn.Module] = nn.Tanh, seed: int = 0):
    """A decoder, codes and their exact images."""
    decode = decoder(network(dimensions, activation=activation, seed=seed))
    z_a, z_b = random(pairs, dimensions, seed=seed + 1), random(pairs, dimensions, seed=seed + 2)
    return decode, z_a, z_b, decode(z_a), decode(z_b)


def half_plane(z: Tensor) -> Tensor:
    return 1 / z[..., 1]


def hyperbolic(z_a: Tensor, z_b: Tensor) -> Tensor:
    return torch.acosh(1 + (z_a - z_b).square().sum(1) / (2 * z_a[:, 1] * z_b[:, 1]))


HALF_PLANE_ENDS = (
    torch.tensor([[-1.0, 1.0], [-2.0, 0.5], [0.0, 0.3], [0.0, 1.0]], dtype=torch.float64),
    torch.tensor([[1.0, 1.0], [2.0, 1.0], [0.5, 2.0], [0.0, 3.0]], dtype=torch.float64),
)


# ---- closed forms -----------------------------------------------------------------------------------------------------------------------------


def test_a_constant_cost_without_a_gradient_has_the_straight_line():
    z_a, z_b = random(5, 3), random(5, 3, seed=1)
    path = minimal_path_for_cost(lambda z: torch.full(z.shape[:-1], 2.5, dtype=z.dtype), z_a, z_b)
    length = (z_a - z_b).norm(dim=1)
    torch.testing.assert_close(path.cost, 2.5 * length)
    torch.testing.assert_close(path.points, straight(z_a, z_b, 64), atol=1e-8, rtol=0)
    assert path.converged.all() and path.score.isnan().all() and (path.lower_bound == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_half_plane_has_hyperbolic_distances(dtype):
    z_a, z_b = (z.to(dtype) for z in HALF_PLANE_ENDS)
    path = minimal_path_for_cost(half_plane, z_a, z_b, segments=64)
    assert path.points.dtype == dtype
    torch.testing.assert_close(path.cost, hyperbolic(*HALF_PLANE_ENDS), rtol=1e-3, atol=0)
    assert (path.cost >= hyperbolic(*HALF_PLANE_ENDS) * (1 - 2e-4)).all(), "a measured cost below the minimum"
    assert path.converged.all()


def test_the_energy_reading_of_a_squared_cost_is_the_squared_distance():
    path = minimal_path_for_cost(lambda z: half_plane(z) ** 2, *HALF_PLANE_ENDS, norm="energy")
    torch.testing.assert_close(path.cost, hyperbolic(*HALF_PLANE_ENDS) ** 2, rtol=2e-3, atol=0)


def linear_problem(aligned: bool):
    """A linear decoder with exact ends whose difference is, or is not, a right singular vector."""
    matrix = torch.linalg.svd(random(7, 3, seed=3), full_matrices=False)
    weight = matrix.U @ torch.diag(torch.tensor([3.0, 1.0, 0.3], dtype=torch.float64)) @ matrix.Vh
    z_a = random(1, 3, seed=5)
    z_b = z_a + (2 * matrix.Vh[:1] if aligned else random(1, 3, seed=6))
    decode = lambda z: (z @ weight.T)[..., None, None, :]  # noqa: E731
    return decode, z_a, z_b, decode(z_a), decode(z_b)


@pytest.mark.parametrize("norm", ["length", "energy"])
def test_a_linear_decoder_goes_straight_along_a_singular_vector_and_nowhere_else(norm):
    aligned, askew = (minimal_path(*linear_problem(which), norm=norm) for which in (True, False))
    along = torch.nn.functional.normalize(aligned.points[:, -1] - aligned.points[:, 0], dim=1)
    away = aligned.points - aligned.points[:, :1]
    assert (away - (away @ along[..., None]) * along).abs().max() < 1e-6
    # c = Dist^2 (2 (t - 1/2)^2 + 1/2): its mean is 2/3 Dist^2; that of its root, squared, is what an energy-reading path can reach by its speed
    root = torch.trapezoid((2 * torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64) ** 2 + 0.5).sqrt(), dx=1e-5) ** 2
    expected = 4 / 3 if norm == "length" else float(2 * root)
    assert float(aligned.score) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(askew.straight_cost / askew.floor, torch.full((1,), 4 / 3, dtype=torch.float64), rtol=1e-4, atol=0)
    assert askew.cost < 0.999 * askew.straight_cost


def test_the_cost_is_that_of_the_sheet():
    decode, z_a, z_b, x_a, x_b = problem()
    x_a, x_b = x_a + 0.1, x_b - 0.05  # inverted codes are not exact
    places = random(6, 5, 4, seed=9)
    cost = ImageCost(decode, x_a, x_b)
    shown = decode(places)
    direct = ((shown - x_a[:, None]) ** 2).flatten(2).sum(2) + ((shown - x_b[:, None]) ** 2).flatten(2).sum(2)
    torch.testing.assert_close(cost(places, torch.arange(6)) * cost.scale[:, None], direct)
    torch.testing.assert_close(cost.scale, (x_a - x_b).square().flatten(1).sum(1))


# ---- the discrete problem ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("segments", "quadrature"), [(2, 1), (7, 1), (5, 2), (4, 3)])
def test_the_gradient_is_that_of_the_energy(power, segments, quadrature):
    z_a, z_b = random(3, 2), random(3, 2, seed=1)
    cost = ScalarCost(lambda z: 1 + z[..., 1] ** 2 + 0.5 * torch.sin(3 * z[..., 0]), z_a, z_b)
    points = (straight(z_a, z_b, segments) + 0.2 * random(3, segments + 1, 2, seed=2)).requires_grad_()
    pairs = torch.arange(3)
    w = (cost.cost(refine(points, quadrature)) / cost.scale[:, None]) ** power
    energy = segments * (mean_weights(w, quadrature) * points.diff(dim=1).square().sum(2)).sum(1)
    (slope,) = torch.autograd.grad(energy.sum(), points)
    value, gradient, wbar = energy_and_gradient(points.detach(), cost(points.detach()[:, [0, -1]], pairs), cost, pairs, power, quadrature)
    torch.testing.assert_close(value, energy.detach())
    torch.testing.assert_close(gradient, slope[:, 1:-1])
    torch.testing.assert_close(wbar, mean_weights(w, quadrature).detach())


def test_two_cumulative_sums_invert_the_weighted_laplacian():
    wbar, q = random(2, 9).exp(), random(2, 8, 3, seed=1)
    for row in range(2):
        laplacian = 2 * 9 * (torch.diag(wbar[row, :-1] + wbar[row, 1:]) - torch.diag(wbar[row, 1:-1], 1) - torch.diag(wbar[row, 1:-1], -1))
        torch.testing.assert_close(precondition(q, wbar)[row], torch.linalg.solve(laplacian, q[row]))


def test_the_residual_is_free_of_units():
    wbar, q = random(1, 9).exp(), random(1, 8, 3, seed=1)
    one = residual(q, precondition(q, wbar), torch.ones(1, dtype=torch.float64))
    scaled = residual(1e6 * q, precondition(1e6 * q, 1e6 * wbar), torch.full((1,), 1e6, dtype=torch.float64))
    torch.testing.assert_close(one, scaled)


def test_iterations_do_not_grow_with_the_number_of_segments():
    decode, z_a, z_b, x_a, x_b = problem(dimensions=6, pairs=16)
    cost, pairs = ImageCost(decode, x_a, x_b), torch.arange(16)
    counts = [float(minimise(straight(z_a, z_b, n), cost, pairs, 2, 1e-5).iterations.double().mean()) for n in (16, 64, 256)]
    assert max(counts) <= 1.2 * min(counts), counts
    assert max(counts) < 80


def test_smooth_decoders_converge_at_second_order():
    decode, z_a, z_b, x_a, x_b = problem(dimensions=3, pairs=4)
    costs = [minimal_path(decode, z_a, z_b, x_a, x_b, segments=n, tolerance=1e-6, everywhere=False).cost for n in (16, 32, 64)]
    ratio = (costs[0] - costs[1]) / (costs[1] - costs[2])
    assert ((ratio > 3) & (ratio < 5)).all(), ratio


def test_the_last_polyline_has_the_segments_that_were_asked_for():
    assert levels(64) == [8, 16, 32, 64]
    assert levels(50)[-1] == 50 and levels(3) == [3] and levels(9) == [8, 9]
    path = minimal_path(*problem(pairs=2), segments=11)
    assert path.points.shape == (2, 12, 4)


def test_like_polylines_are_one_minimum_and_the_cheapest_stands_for_them():
    """Against the definition, one pair and one row at a time, on rows in any order."""
    pairs = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1])
    value = 1 + 0.5 * SAME_ENERGY * random(9, seed=3).double()
    points = random(1, 5, 2, seed=4).double() + 0.4 * SAME_PLACE * random(9, 5, 2, seed=5).double()
    points[[2, 4]] += 5.0  # elsewhere
    value[7] = 3.0  # in the same place, but dearer
    expected: list[int] = []
    for pair in (0, 1):
        kept: list[int] = []
        for row in sorted((pairs == pair).nonzero()[:, 0].tolist(), key=lambda row: float(value[row])):
            length = float((points[row, -1] - points[row, 0]).norm())
            alike = [
                abs(float(value[row] - value[k])) <= SAME_ENERGY * float(value[row])
                and float((points[row] - points[k]).norm(dim=1).max()) <= SAME_PLACE * length
                for k in kept
            ]
            kept += [] if any(alike) else [row]
        expected += kept
    found = distinct(value, pairs, points)
    assert found.tolist() == expected and 4 <= len(expected) < 9
    assert (
        first_rows(found, pairs, 1).tolist()
        == cheapest(value, pairs).tolist()
        == [found[0].item(), found[(pairs[found] == 1).nonzero()[0, 0]].item()]
    )


@pytest.mark.parametrize("segments", [1, 2, 8])
def test_few_segments_work(segments):
    path = minimal_path(*problem(pairs=2), segments=segments)
    assert path.points.shape[1] == segments + 1
    assert (path.cost <= path.straight_cost * (1 + 1e-4)).all()


# ---- invariances ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["length", "energy"])
def test_the_ends_can_be_exchanged(norm):
    decode, z_a, z_b, x_a, x_b = problem(dimensions=9)
    there, back = minimal_path(decode, z_a, z_b, x_a, x_b, norm=norm), minimal_path(decode, z_b, z_a, x_b, x_a, norm=norm)
    torch.testing.assert_close(there.cost, back.cost, rtol=1e-3, atol=0)
    torch.testing.assert_close(there.lower_bound, back.lower_bound)
    torch.testing.assert_close(there.straight_cost, back.straight_cost, rtol=2e-4, atol=0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_units_of_the_cost_change_nothing(factor):
    z_a, z_b = HALF_PLANE_ENDS
    one, other = (minimal_path_for_cost(lambda z, f=f: f * half_plane(z), z_a, z_b) for f in (1.0, factor))
    torch.testing.assert_close(other.cost, factor * one.cost, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.points, one.points)
    assert torch.equal(other.iterations, one.iterations)


def test_the_units_of_the_images_change_nothing():
    decode, z_a, z_b, x_a, x_b = problem(pairs=3)
    one = minimal_path(decode, z_a, z_b, x_a, x_b)
    other = minimal_path(lambda z: 1000 * decode(z), z_a, z_b, 1000 * x_a, 1000 * x_b)
    torch.testing.assert_close(other.cost, 1e6 * one.cost)
    torch.testing.assert_close(other.score, one.score)


def test_pairs_do_not_know_of_each_other(monkeypatch):
    decode, z_a, z_b, x_a, x_b = problem(pairs=7)
    whole = minimal_path(decode, z_a, z_b, x_a, x_b, segments=16)
    monkeypatch.setattr(paths, "CHUNK", 3)
    seen = []
    parts = minimal_path(decode, z_a, z_b, x_a, x_b, segments=16, on_progress=lambda done, of: seen.append((done, of)))
    alone = minimal_path(decode, z_a[4:5], z_b[4:5], x_a[4:5], x_b[4:5], segments=16)
    torch.testing.assert_close(parts.cost, whole.cost)
    torch.testing.assert_close(alone.cost, whole.cost[4:5])
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_the_same_seed_gives_the_same_paths():
    one, other = (minimal_path(*problem(pairs=3), segments=16, seed=3) for _ in range(2))
    assert torch.equal(one.points, other.points) and torch.equal(one.cost, other.cost)


# ---- what bounds it ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh, nn.LeakyReLU])
@pytest.mark.parametrize("norm", ["length", "energy"])
def test_no_path_undercuts_the_bounds(activation, norm):
    layers = network(4, activation=activation)
    decode = decoder(layers)
    z_a, z_b = random(12, 4, seed=1), random(12, 4, seed=2)
    x_a, x_b = decode(z_a) + 0.05 * random(12, 1, 1, 12, seed=3), decode(z_b)
    lipschitz = certified_lipschitz(layers, decode, 4)
    path = minimal_path(decode, z_a, z_b, x_a, x_b, norm=norm, lipschitz=lipschitz)
    assert (path.floor < path.lower_bound).all(), "the Lipschitz constant gained nothing"
    assert (path.lower_bound <= path.cost).all() and (path.cost <= path.straight_cost * (1 + 1e-4)).all()
    assert (path.score >= 1).all() and (path.gap >= 0).all()
    torch.testing.assert_close(path.gap, path.cost / path.lower_bound - 1)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("lipschitz", [0.6, 1.5, 30.0])
def test_the_lipschitz_bound_is_the_integral_along_two_cones(power, lipschitz):
    squared, distance, start, end = (torch.tensor([v], dtype=torch.float64) for v in (4.0, 3.0, 1.1, 0.9))
    s = torch.linspace(0, 3.0, 400_001, dtype=torch.float64)
    r = torch.maximum(start - lipschitz * s, end - lipschitz * (3.0 - s)).clamp(min=0)
    c = 2 * r**2 + squared / 2
    direct = torch.trapezoid(c, s) if power == 2 else torch.trapezoid(c.sqrt(), s) ** 2
    torch.testing.assert_close(bounds.lipschitz_floor(squared, distance, start, end, lipschitz, power), direct[None], rtol=1e-8, atol=0)
    assert bounds.lipschitz_floor(squared, distance, start, end, 1e12, power) == pytest.approx(float(bounds.floor(squared, distance, power)))


@pytest.mark.parametrize("norm", ["length", "energy"])
def test_a_decoder_with_one_image_has_the_bound_for_its_cost(norm):
    """Its Lipschitz constant is 0, the limit of what goes to 0: every path costs what it is long, c l or c l^2, and nothing undercuts that."""
    layers = network(4).requires_grad_(False)
    layers[-2].weight.zero_()
    decode, z_a, z_b = decoder(layers), random(3, 4, seed=1), random(3, 4, seed=2)
    x_a, x_b = random(3, 1, 1, 12, seed=3), random(3, 1, 1, 12, seed=4)
    constant = certified_lipschitz(layers, decode, 4)
    assert constant == 0
    path = minimal_path(decode, z_a, z_b, x_a, x_b, norm=norm, lipschitz=constant, everywhere=False)
    torch.testing.assert_close(path.lower_bound, path.cost, rtol=1e-6, atol=0)
    power = 2 if norm == "length" else 1
    equal = torch.tensor([0.7], dtype=torch.float64)
    small, none = (bounds.lipschitz_floor(equal + 3, equal * 2, equal, equal, constant, power) for constant in (1e-5, 0.0))
    torch.testing.assert_close(small, none, rtol=1e-4, atol=0)


def test_the_lipschitz_constant_holds_and_is_below_the_product_of_norms():
    layers = nn.Sequential(*network(5, activation=nn.LeakyReLU, seed=4), nn.Identity())
    layers.insert(1, nn.BatchNorm1d(24, dtype=torch.float64))
    layers[1].running_var.uniform_(0.5, 2)
    layers[1].weight.data.uniform_(0.5, 2)
    layers.eval()
    decode = decoder(layers)
    bound = certified_lipschitz(layers, decode, 5)
    slopes = torch.func.vmap(torch.func.jacrev(lambda z: decode(z[None]).flatten()))(2 * random(200, 5))
    norms = [
        torch.linalg.matrix_norm(m.detach(), 2) for m in bounds.linear_parts([layer for layer in layers if not isinstance(layer, nn.Identity)])[0]
    ]
    assert torch.linalg.matrix_norm(slopes, 2).max() <= bound < 0.9 * math.prod(map(float, norms)) / 4


def test_the_lipschitz_constant_of_a_linear_map_is_its_norm():
    layers = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)).double()
    expected = float(torch.linalg.matrix_norm(layers[1].weight @ layers[0].weight, 2))
    assert bounds.lipschitz_bound(list(layers)) == pytest.approx(expected, rel=1e-9)


def test_a_network_that_does_more_than_its_layers_has_no_constant():
    layers = network(3)
    assert certified_lipschitz(layers, lambda z: 2 * layers(z), 3) is None
    assert certified_lipschitz(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), lambda z: z, 3) is None
    assert certified_lipschitz(nn.Sequential(*list(layers)[:-1]), layers, 3) == pytest.approx(certified_lipschitz(layers, layers, 3))


@pytest.mark.parametrize("power", [1, 2])
def test_the_reported_cost_is_the_integral_along_the_polyline(power):
    decode, z_a, z_b, x_a, x_b = problem(activation=nn.LeakyReLU, pairs=4)
    cost, pairs = ImageCost(decode, x_a, x_b), torch.arange(4)
    points = straight(z_a, z_b, 9) + 0.3 * random(4, 10, 4, seed=8)
    value, error = measure(points, cost, pairs, power)
    fine = refine(points, 4000)
    c = cost(fine, pairs)
    steps = fine.diff(dim=1).norm(dim=2)
    mean = (c[:, 1:] + c[:, :-1]) / 2
    direct = (mean * steps).sum(1) if power == 2 else (mean * steps**2).sum(1) * 9 * 4000
    assert (error < 1e-4).all()
    assert ((value / direct - 1).abs() <= 1e-4).all()


def test_converged_means_the_fixed_tolerance_and_nothing_else():
    arguments = problem(dimensions=GRAPH_DIMENSIONS + 1, pairs=5)
    hasty = minimal_path(*arguments, tolerance=0.3, everywhere=False)
    patient = minimal_path(*arguments, everywhere=False)
    assert paths.CONVERGED == 1e-3
    assert torch.equal(hasty.converged, hasty.residual <= 1e-3) and not hasty.converged.all()
    assert patient.converged.all() and (patient.residual <= 1e-3).all()
    assert set(hasty.status) <= {"converged", "not converged"} and "not converged" in hasty.status


# ---- the global search ------------------------------------------------------------------------------------------------------------------------


def wells(z: Tensor) -> Tensor:
    """A hill between the ends, off the line by a little: the line's own valley goes the longer way round."""
    hill = torch.tensor([0.0, -0.15], dtype=z.dtype)
    return 1 + 12 * torch.exp(-((z - hill) ** 2).sum(-1) / 0.5) + 6 * torch.exp(-((z - torch.tensor([0.0, 1.3], dtype=z.dtype)) ** 2).sum(-1) / 0.3)


def test_the_global_search_is_never_worse_and_here_better():
    z_a, z_b = torch.tensor([[-2.0, 0.0]], dtype=torch.float64), torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    down = minimal_path_for_cost(wells, z_a, z_b, everywhere=False)
    everywhere = minimal_path_for_cost(wells, z_a, z_b)
    assert everywhere.cost < 0.98 * down.cost
    assert everywhere.minima >= 2
    assert everywhere.points[0, 32, 1] < 0 < down.points[0, 32, 1]


def test_a_path_does_not_go_where_there_is_no_cost():
    z_a, z_b = torch.tensor([[-1.0, 0.1]], dtype=torch.float64), torch.tensor([[1.0, 0.1]], dtype=torch.float64)
    path = minimal_path_for_cost(lambda z: torch.where(z[..., 1] > 0, 1 + z[..., 1], -5.0), z_a, z_b)
    assert (path.points[..., 1] > 0).all() and path.cost <= path.straight_cost


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("activation", [nn.Tanh, nn.LeakyReLU])
def test_two_dimensions_agree_with_fast_marching(seed, activation):
    decode, z_a, z_b, x_a, x_b = problem(dimensions=2, pairs=2, activation=activation, seed=10 * seed)
    path = minimal_path(decode, z_a, z_b, x_a, x_b)
    for k in range(2):
        oracle = fast_marching(ImageCost(decode, x_a, x_b), k, z_a[k], z_b[k])
        assert float(path.cost[k]) == pytest.approx(oracle, rel=2e-3)


def fast_marching(cost: ImageCost, pair: int, z_a: Tensor, z_b: Tensor, size: int = 501) -> float:
    """The eikonal equation |grad T| = c on a grid around the ends, T at z_b; T = 0 on a small circle around z_a, whose radius is made up for."""
    centre, half = (z_a + z_b) / 2, 1.1 * float((z_b - z_a).norm())
    axis = torch.linspace(-half, half, size, dtype=torch.float64)
    spacing = float(axis[1] - axis[0])
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1) + centre
    c = (cost(grid.reshape(1, -1, 2), ONE + pair)[0] * cost.scale[pair]).view(size, size)
    away, radius = (grid - z_a).norm(dim=-1), 5 * spacing
    time = skfmm.travel_time((away - radius).numpy(), 1 / c.numpy(), dx=spacing)
    place = ((z_b - centre + half) / spacing).tolist()
    i, j = int(place[0]), int(place[1])
    u, v = place[0] - i, place[1] - j
    found = (1 - u) * (1 - v) * time[i, j] + u * (1 - v) * time[i + 1, j] + (1 - u) * v * time[i, j + 1] + u * v * time[i + 1, j + 1]
    return float(found + radius * cost(z_a.view(1, 1, 2), ONE + pair)[0, 0] * cost.scale[pair])


def test_alternative_ends_are_compared():
    decode, _, _, x_a, x_b = problem(pairs=3)
    z_a, z_b = random(3, 2, 4, seed=5), random(3, 3, 4, seed=6)
    path = minimal_path(decode, z_a, z_b, x_a, x_b, segments=16)
    each = [[minimal_path(decode, z_a[:, i], z_b[:, j], x_a, x_b, segments=16).cost for j in range(3)] for i in range(2)]
    best = torch.stack([torch.stack(row) for row in each]).flatten(0, 1)
    torch.testing.assert_close(path.cost, best.min(0).values, rtol=2e-3, atol=0)
    rows = torch.arange(3)
    torch.testing.assert_close(path.points[:, 0], z_a[rows, path.ends[:, 0]])
    torch.testing.assert_close(path.points[:, -1], z_b[rows, path.ends[:, 1]])


def test_spherical_interpolation_keeps_the_norm_and_resampling_the_ends():
    z_a, z_b = (torch.nn.functional.normalize(random(4, 5, seed=s), dim=1) for s in (0, 1))
    arc = spherical(z_a, z_b, 10)
    torch.testing.assert_close(arc.norm(dim=2), torch.ones(4, 11, dtype=torch.float64))
    torch.testing.assert_close(spherical(z_a, 2 * z_a, 10), straight(z_a, 2 * z_a, 10))
    assert torch.equal(resample(arc, 7)[:, [0, -1]], arc[:, [0, -1]])


# ---- what comes in and what is told -----------------------------------------------------------------------------------------------------------


def test_float32_and_uint8_are_served():
    layers = network(3).float()
    decode = decoder(layers)
    z_a, z_b = random(2, 3, seed=1).float(), random(2, 3, seed=2).float()
    x_a, x_b = ((255 * decode(z)).round().to(torch.uint8) for z in (z_a, z_b))
    path = minimal_path(decode, z_a, z_b, x_a, x_b, segments=16)
    same = minimal_path(decode, z_a, z_b, x_a / 255, x_b / 255, segments=16)
    assert torch.equal(path.cost, same.cost)


def test_coincident_codes_cost_nothing():
    decode, z_a, _, x_a, x_b = problem(pairs=2)
    path = minimal_path(decode, z_a, z_a, x_a, x_b, segments=16)
    assert (path.cost == 0).all() and path.converged.all() and path.status == ["coincident ends"] * 2


def test_the_record_is_json_and_agrees():
    import json

    path = minimal_path(*problem(pairs=2), segments=16)
    records = json.loads(json.dumps(path.record()))
    assert [r["cost"] for r in records] == path.cost.tolist() and {r["status"] for r in records} == set(path.status)
    general = minimal_path_for_cost(half_plane, *HALF_PLANE_ENDS, segments=8).record()
    assert general[0]["score"] is None and general[0]["gap"] is None


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"norm": "speed"}, UsageError, "norm"),
        ({"segments": 0}, UsageError, "segments"),
        ({"tolerance": 0.0}, UsageError, "tolerance"),
        ({"lipschitz": -1.0}, UsageError, "lipschitz"),
        ({"z_a": torch.zeros(2, 5)}, UsageError, "z_a"),
        ({"z_a": torch.zeros(3, 4)}, UsageError, "as many"),
        ({"z_b": torch.full((2, 4), torch.nan)}, NonFiniteError, "z_b"),
        ({"x_a": torch.zeros(2, 12)}, UsageError, "x_a"),
        ({"x_a": torch.zeros(2, 1, 1, 12, dtype=torch.int32)}, UsageError, "x_a"),
        ({"x_b": torch.full((2, 1, 1, 12), torch.inf)}, NonFiniteError, "x_b"),
        ({"x_a": torch.zeros(2, 1, 1, 11), "x_b": torch.ones(2, 1, 1, 11)}, UsageError, "decode returned"),
        ({"x_a": torch.zeros(2, 1, 1, 12), "x_b": torch.zeros(2, 1, 1, 12)}, UsageError, "same image"),
    ],
)
def test_bad_input_is_named(change, error, word):
    decode, z_a, z_b, x_a, x_b = problem(pairs=2)
    arguments = {"z_a": z_a, "z_b": z_b, "x_a": x_a, "x_b": x_b} | change
    with pytest.raises(error, match=word):
        minimal_path(decode, **arguments)


def test_a_cost_of_the_wrong_shape_or_sign_is_named():
    with pytest.raises(UsageError, match="one number for each"):
        minimal_path_for_cost(lambda z: z, *HALF_PLANE_ENDS)
    with pytest.raises(UsageError, match="c\\(z\\) > 0"):
        minimal_path_for_cost(lambda z: -half_plane(z), *HALF_PLANE_ENDS)


# ---- where no path may go, and other edges ------------------------------------------------------------------------------------------------------

LEFT, RIGHT = torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]])


def wall(value: float, width: float = 0.1):
    """1, but `value` in a wall below a door: the way round its corner (0, 1/2) has length 2.26."""

    def cost(z: Tensor) -> Tensor:
        inside = (z[..., 0].abs() < width) & (z[..., 1] < 0.5)
        return torch.where(inside, torch.full_like(z[..., 0], value), 1 + 0 * z[..., 0])

    return cost


@pytest.mark.parametrize("value", [-5.0, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("width", [0.1, 0.02])
def test_a_path_goes_round_what_is_forbidden(value, width):
    path = minimal_path_for_cost(wall(value, width), LEFT, RIGHT)
    assert path.straight_cost.isinf() and 2.2 < path.cost < 2.4
    along = refine(path.points.double(), 4)[0]
    assert not ((along[:, 0].abs() < width) & (along[:, 1] < 0.5)).any()


def test_where_there_is_no_way_round_the_cost_says_so():
    def cost(z: Tensor) -> Tensor:
        return torch.where(z.abs().amax(-1) < 0.9, torch.inf, torch.ones_like(z[..., 0]))  # only narrow bands at |y| > 0.9 are left

    def island(z: Tensor) -> Tensor:
        distance = torch.minimum((z - LEFT[0]).norm(dim=-1), (z - RIGHT[0]).norm(dim=-1))
        return torch.where(distance < 0.2, torch.ones_like(distance), torch.inf)

    path = minimal_path_for_cost(island, LEFT, RIGHT)
    assert path.cost.isinf() and path.quadrature_error.isinf() and path.status == ["not converged"]
    assert path.record()[0]["cost"] is None
    assert minimal_path_for_cost(cost, LEFT, RIGHT).cost.item() > 2


def test_only_the_failed_pairs_of_a_chunk_are_searched_again():
    both = minimal_path_for_cost(
        wall(math.inf), torch.cat([LEFT, LEFT + torch.tensor([0.0, 2.0])]), torch.cat([RIGHT, RIGHT + torch.tensor([0.0, 2.0])])
    )
    assert both.quadrature.tolist()[0] == paths.CAREFUL and both.quadrature.tolist()[1] < paths.CAREFUL
    torch.testing.assert_close(both.cost[1:], torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(both.points[:, 0], torch.cat([LEFT, LEFT + torch.tensor([0.0, 2.0])]))


def test_an_end_without_a_cost_is_named():
    def decode(z: Tensor) -> Tensor:
        return torch.where(z[..., :1] < -0.9, torch.nan, z).reshape(*z.shape[:-1], 1, 1, 2)

    with pytest.raises(NonFiniteError, match="an end of pair 0"):
        minimal_path(decode, LEFT, RIGHT, torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2))


def test_the_callers_mode_does_not_matter():
    def bowl(z: Tensor) -> Tensor:
        return 1 + 5 * (z - torch.tensor([0.0, 0.3])).square().sum(-1)

    expected = minimal_path_for_cost(bowl, LEFT, RIGHT).cost
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(minimal_path_for_cost(bowl, LEFT.clone(), RIGHT.clone()).cost, expected)
    torch.testing.assert_close(minimal_path_for_cost(bowl, LEFT.clone().requires_grad_(), RIGHT).cost, expected)


@pytest.mark.parametrize("norm", ["length", "energy"])
def test_the_curves_compared_with_cost_what_they_cost(norm):
    """U of the line and of the arc by a midpoint rule of 20,000 steps."""
    decode, z_a, z_b, x_a, x_b = problem(dimensions=5, pairs=3)
    z_b = z_b + 2 * random(1, 5, seed=9)
    path = minimal_path(decode, z_a, z_b, x_a, x_b, segments=8, norm=norm, everywhere=False)
    for curve, told in ((straight, path.straight_cost), (spherical, path.spherical_cost)):
        points = curve(z_a, z_b, 20_000)
        middle, steps = (points[:, 1:] + points[:, :-1]) / 2, points.diff(dim=1).norm(dim=2)
        images = decode(middle.to(z_a.dtype)).flatten(2).double()
        cost = sum((images - x.flatten(1)[:, None]).square().sum(2) for x in (x_a, x_b))
        expected = (cost * steps).sum(1) if norm == "length" else (cost * steps.square()).sum(1) * 20_000
        torch.testing.assert_close(told, expected.double(), rtol=1.5e-3, atol=0)


def test_the_bound_is_that_of_the_ends_that_were_used():
    """lower_bound of `minimal_path` against the formula, with r = |G(z) - M| at both ends computed here."""
    decode, z_a, z_b, x_a, x_b = problem(dimensions=4, pairs=5)
    constant = 300.0
    path = minimal_path(decode, z_a, z_b, x_a, x_b, lipschitz=constant, everywhere=False)
    middle, distance = (x_a + x_b) / 2, (z_a - z_b).double().norm(dim=1)
    r = [(decode(z) - middle).flatten(1).double().norm(dim=1) for z in (z_a, z_b)]
    squared = (x_a - x_b).double().flatten(1).square().sum(1)
    rho = ((r[0] + r[1] - constant * distance) / 2).clamp(min=0)
    extra = 2 * (r[0] ** 3 + r[1] ** 3 - 2 * rho**3) / (3 * constant)
    torch.testing.assert_close(path.lower_bound - path.floor, extra, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(path.floor, squared * distance / 2, rtol=1e-5, atol=0)


def test_the_residual_is_the_gradient_in_the_metric_of_the_path():
    """sqrt(g' H^-1 g / 2E) with H as a dense matrix."""
    wbar, points = torch.rand(1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5, random(1, 7, 3, seed=4).double()
    steps = points.diff(dim=1)
    value = 6 * (wbar * steps.square().sum(2)).sum(1)
    gradient = 12 * (wbar[:, :-1, None] * steps[:, :-1] - wbar[:, 1:, None] * steps[:, 1:])
    h = 12 * (torch.diag(wbar[0, :-1] + wbar[0, 1:]) - torch.diag(wbar[0, 1:-1], 1) - torch.diag(wbar[0, 1:-1], -1))
    expected = ((gradient[0] * torch.linalg.solve(h, gradient[0])).sum() / (2 * value)).sqrt()
    torch.testing.assert_close(residual(gradient, precondition(gradient, wbar), value), expected)


def test_resampling_keeps_to_the_polyline():
    points = random(2, 9, 3, seed=6).double()
    fine = resample(points, 16)
    torch.testing.assert_close(fine[:, ::2], points)
    torch.testing.assert_close(fine[:, 1::2], (points[:, 1:] + points[:, :-1]) / 2)
    assert torch.equal(resample(points, 5)[:, [0, -1]], points[:, [0, -1]])


def test_no_step_raises_the_energy():
    """On a rugged cost full steps overshoot: a line search that takes every finite step goes up somewhere."""
    cost = ScalarCost(lambda z: 1 + 0.95 * (9 * z).sin().prod(-1), random(8, 2, seed=1), random(8, 2, seed=2))
    begin, pairs = straight(random(8, 2, seed=1), random(8, 2, seed=2), 16), torch.arange(8)
    before = None
    for steps in range(12):
        energy = minimise(begin, cost, pairs, 2, 1e-12, max_iterations=steps).energy
        assert before is None or (energy <= before * (1 + 1e-6)).all(), steps
        before = energy


def test_kinks_that_need_more_points_get_them():
    decode, z_a, z_b, x_a, x_b = problem(dimensions=8, pairs=24, activation=nn.LeakyReLU)
    path = minimal_path(decode, z_a, z_b, x_a, x_b, segments=16)
    assert (path.converged & (path.quadrature > 2)).any()
