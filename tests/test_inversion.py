"""Inversion against closed forms: pseudo-inverses, planted minima, kinks, valleys, saddles, the ball's boundary, runs to infinity."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from periplus.errors import NonFiniteError, RunError, UsageError
from periplus.inversion import Effort, Kind, Snapshot, bundle, domains, invert, invert_dataset
from periplus.inversion.clusters import clusters
from periplus.inversion.objective import hessian_of_rows
from periplus.inversion.starts import Pool, prior_codes

DTYPES = [torch.float32, torch.float64]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_images(flat: Tensor) -> Tensor:
    """(..., n) -> (..., 1, 1, n)."""
    return flat[..., None, None, :]


def linear(matrix: Tensor, shift: Tensor):
    return lambda z: as_images(z @ matrix.to(z).T + shift.to(z))


def of_one(decode, target: Tensor, latent_dim: int, **options):
    return invert(decode, as_images(target)[None], latent_dim, **options)


# ---- smooth truths -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_decoder_is_inverted_by_its_pseudo_inverse(dtype: torch.dtype):
    matrix, shift, x = normal(20, 4), normal(20, seed=1), normal(5, 20, seed=2)
    found = invert(linear(matrix, shift), as_images(x).to(dtype), 4, starts=3)
    truth = (x - shift) @ torch.linalg.pinv(matrix).T
    residual = (x - shift - truth @ matrix.T).square().sum(1)
    assert found.z.dtype == dtype and found.error.dtype == torch.float64
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.z.double(), truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.error, residual, rtol=1e-5, atol=0)
    assert (found.kind == Kind.SMOOTH).all() and found.converged.all() and (found.cluster == 0).all() and (found.image_cluster == 0).all()
    smallest = 2 * torch.linalg.eigvalsh(matrix.T @ matrix)[0]
    torch.testing.assert_close(found.min_eigenvalue, smallest.expand(5, 3), rtol=1e-4, atol=0)


def test_the_prior_weight_is_ridge_regression():
    matrix, shift, x = normal(20, 4), normal(20, seed=1), normal(2, 20, seed=2)
    found = invert(linear(matrix, shift), as_images(x), 4, starts=2, domain="prior", prior_weight=3.0)
    truth = torch.linalg.solve(matrix.T @ matrix + 3 * torch.eye(4, dtype=torch.float64), matrix.T @ (x - shift).T).T
    torch.testing.assert_close(found.z, truth, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.error, (x - shift - truth @ matrix.T).square().sum(1))  # without the prior's term
    assert found.domain.weight == 3.0


def four_wells(z: Tensor) -> Tensor:
    """(z1^2 - 1, z2^2 - 4 + z1/10, z1/20): four minima of ||G||^2 near (+-1, +-2)."""
    a, b = z[..., 0], z[..., 1]
    return as_images(torch.stack([a.square() - 1, b.square() - 4 + 0.1 * a, 0.05 * a], -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_known_minima_are_all_found_and_certified(dtype: torch.dtype):
    found = of_one(four_wells, torch.zeros(3, dtype=dtype), 2, starts=40)
    minima = found.minima(0)
    assert len(minima) == 4 and all(m.kind is Kind.SMOOTH for m in minima)
    signs = {(math.copysign(1, m.z[0]), math.copysign(1, m.z[1])) for m in minima}
    assert len(signs) == 4
    assert [m.error for m in minima] == sorted(m.error for m in minima)
    assert sum(m.starts for m in minima) == int(found.converged.sum()) and sum(m.frequency for m in minima) == pytest.approx(1.0)


def test_a_saddle_is_not_called_a_minimum():
    """f = (z1^2/20 - 1)^2 + z2^2 at z1 = 0: no gradient, and curvature -0.2, too weak to be seen in the values nearby."""
    decode = lambda z: as_images(torch.stack([z[..., 0].square() / 20 - 1, z[..., 1]], -1))  # noqa: E731
    x, start = torch.zeros(2, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64)
    stuck = of_one(decode, x, 2, starts=1, initial=start, effort=Effort(rounds=1))
    assert stuck.kind.item() == Kind.SADDLE and not stuck.converged.any() and stuck.min_eigenvalue.item() == pytest.approx(-0.2)
    freed = of_one(decode, x, 2, starts=1, initial=start)
    assert freed.converged.all() and freed.error.item() < 1e-9, "the certificate shows the way down"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_valley_is_flat(dtype: torch.dtype):
    """G knows only z1 + z2."""
    decode = lambda z: as_images(torch.stack([z.sum(-1), 2 * z.sum(-1)], -1))  # noqa: E731
    found = of_one(decode, torch.tensor([1.0, 0.0], dtype=dtype), 2, starts=4)
    assert (found.kind == Kind.FLAT).all() and found.converged.all()
    assert found.eigenvalue_ratio.abs().max() < 1e-5
    torch.testing.assert_close(found.error, torch.tensor([0.8], dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.image_cluster.max() == 0 < found.cluster.max(), "many codes, one image"


# ---- kinks -------------------------------------------------------------------------------------------------------------------------------------


def roof(z: Tensor) -> Tensor:
    """(|z1| - 1, z2 ...) with target (-3, ...): f = (|z1| + 2)^2 + (z2 - 1)^2 has its minimum on the kink z1 = 0, with slopes +-4 across it."""
    return as_images(torch.stack([z[..., 0].abs() - 1, z[..., 1]], -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_minimum_on_a_kink_is_found_and_called_one(dtype: torch.dtype):
    found = of_one(roof, torch.tensor([-3.0, 1.0], dtype=dtype), 2, starts=6)
    assert (found.kind == Kind.KINK).all() and (found.kink_codimension == 1).all()
    torch.testing.assert_close(found.all_z.double(), torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 6, 2), rtol=0, atol=5e-3)
    torch.testing.assert_close(found.min_eigenvalue, torch.full((1, 6), 2.0, dtype=torch.float64), rtol=1e-4, atol=0)  # of z2 alone


def test_a_ridge_is_not_a_minimum():
    """f = (3 - |z1|)^2 + z2^2: at z1 = 0 Clarke's condition holds, and f falls to both sides."""
    start = torch.tensor([[[0.0, 0.5]]], dtype=torch.float64)
    x = torch.tensor([2.0, 0.0], dtype=torch.float64)
    found = of_one(roof, x, 2, starts=1, initial=start)
    assert found.error.item() < 1e-9 and abs(found.z[0, 0].abs().item() - 3) < 1e-4 and found.kind.item() == Kind.SMOOTH


def test_a_vertex_has_no_direction_left():
    """sum of (|z_j| + t_j z_j + 2)^2: a kink of codimension d. (Without the tilts two opposite pieces show the minimum, and span one direction.)"""
    tilt = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    decode = lambda z: as_images(z.abs() + tilt * z)  # noqa: E731
    found = of_one(decode, torch.full((3,), -2.0, dtype=torch.float64), 3, starts=4)
    assert (found.kind == Kind.KINK).all() and (found.kink_codimension == 3).all() and found.min_eigenvalue.isinf().all()
    assert found.z.abs().max() < 5e-3
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_piecewise_linear_network_is_searched_to_its_minima():
    """A small leaky generator with a sigmoid: endpoints are no higher than what a fine search around them finds."""
    torch.manual_seed(0)
    first, second = normal(24, 3, seed=1), 0.5 * normal(30, 24, seed=2)
    decode = lambda z: as_images((torch.nn.functional.leaky_relu(z @ first.to(z).T, 0.2) @ second.to(z).T).sigmoid())  # noqa: E731
    x = torch.rand(3, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = invert(decode, as_images(x), 3, starts=8, domain="ball", radius=6.0)
    assert found.converged.double().mean() > 0.8 and (found.kind == Kind.KINK).any()
    around = found.z[:, None] + 0.005 * normal(3, 2000, 3, seed=4)
    around = around * (6.0 / around.norm(dim=2, keepdim=True)).clamp(max=1)
    values = (decode(around).flatten(2) - x[:, None]).square().sum(2)
    assert (values.amin(1) >= found.error * (1 - 1e-5)).all()


# ---- domains -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_minimum_on_the_boundary_of_the_ball(dtype: torch.dtype):
    """The identity, target (3, 4), radius 2: the projection (1.2, 1.6), error 9, multiplier 2 (5 - 2) = 6, curvature 2 + 6/2 along the boundary."""
    found = of_one(lambda z: as_images(z), torch.tensor([3.0, 4.0], dtype=dtype), 2, starts=5, domain="ball", radius=2.0)
    assert (found.kind == Kind.BOUNDARY).all() and found.converged.all()
    torch.testing.assert_close(found.z.double(), torch.tensor([[1.2, 1.6]], dtype=torch.float64), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.error, torch.tensor([9.0], dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.min_eigenvalue, torch.full((1, 5), 5.0, dtype=torch.float64), rtol=1e-2, atol=0)
    assert found.gradient_norm.max() < 2e-2


def test_an_inner_minimum_of_the_ball_is_smooth():
    found = of_one(lambda z: as_images(z), torch.tensor([0.3, -0.4], dtype=torch.float64), 2, starts=5, domain="ball", radius=2.0)
    assert (found.kind == Kind.SMOOTH).all()
    torch.testing.assert_close(found.z, torch.tensor([[0.3, -0.4]], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.min_eigenvalue, torch.full((1, 5), 2.0, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_to_infinity_is_flagged(dtype: torch.dtype):
    """A sigmoid never reaches 1: the infimum of (1 - sigmoid(z1))^2 + z2^2 + 1 is at infinity in R^d and on the boundary of a ball."""
    decode = lambda z: as_images(torch.stack([(z[..., 0]).sigmoid(), z[..., 1], 0 * z[..., 0]], -1))  # noqa: E731
    x = torch.tensor([1.0, 0.0, 0.0], dtype=dtype)
    free = of_one(decode, x, 2, starts=6)
    assert not free.converged[free.all_z.norm(dim=2) > free.domain.escape_radius].any()
    assert ((free.kind == Kind.ESCAPED) | (free.all_error < 1e-6)).all()
    away = of_one(decode, x, 2, starts=1, initial=torch.tensor([[[1e4, 0.0]]], dtype=dtype))
    assert away.kind.item() == Kind.ESCAPED and not away.converged.any(), "no gradient is left there, and yet it is no minimum"
    ball = of_one(decode, x, 2, starts=6, domain="ball", radius=3.0)
    assert (ball.kind == Kind.BOUNDARY).all() and ball.z[0, 0].item() == pytest.approx(3.0, abs=1e-3)


def test_the_chart_covers_the_ball_and_folds():
    domain = domains.make_domain("ball", 3, 2.0, None)
    z = 1.9 * torch.nn.functional.normalize(normal(50, 3), dim=1) * torch.linspace(0.01, 1, 50, dtype=torch.float64)[:, None]
    y = domain.chart(z)
    torch.testing.assert_close(domain.codes(y), z)
    other = y * (4 * 4 / y.square().sum(1, keepdim=True))  # the other hemisphere
    torch.testing.assert_close(domain.codes(other), z)
    torch.testing.assert_close(domain.fold(other), y)
    jacobian = torch.stack([torch.autograd.functional.jacobian(domain.codes, row) for row in y])
    covector = normal(50, 3, seed=5)
    carried = (jacobian.transpose(1, 2) @ covector[:, :, None])[:, None, :, 0]
    torch.testing.assert_close(domain.code_gradient(carried, y)[:, 0], covector)


def test_the_default_radius_is_the_quantile_of_the_chi_law():
    norms = normal(200_000, 8).norm(dim=1)
    share = (norms <= domains.prior_radius(8)).double().mean().item()
    assert abs(share - 0.999) < 4 * math.sqrt(0.999 * 0.001 / 200_000)


# ---- the parts ---------------------------------------------------------------------------------------------------------------------------------


def test_hessians_are_exact_with_and_without_torch_func():
    """sum of cosines of products has a Hessian in closed form; a custom function that torch.func refuses takes the other road."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z * z

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return 2 * z * g

    z, mix = normal(7, 4), normal(4, 4, seed=1)
    for square in (torch.square, Square.apply):
        found = hessian_of_rows(lambda w, square=square: square(square(w) @ mix.T).sum(), z)
        inner = z.square() @ mix.T
        truth = 8 * torch.einsum("bi,ki,kj,bj->bij", z, mix, mix, z) + 4 * torch.diag_embed(inner @ mix)
        torch.testing.assert_close(found, truth)


def test_the_weights_of_a_bundle_are_the_smallest_convex_combination():
    """Against a long projected-gradient solution of the same quadratic programme."""
    g, gap = normal(3, 6, 4), normal(3, 6, seed=1).abs()
    pieces = bundle.new_bundle(g[:, 0])
    pieces.gap[:, 0] = gap[:, 0]
    metric = torch.eye(4, dtype=torch.float64).expand(3, -1, -1)
    dual = lambda w: 0.5 * (w[..., None] * g).sum(-2).square().sum(-1) + (w * gap).sum(-1)  # noqa: E731
    w = torch.full((3, 6), 1 / 6, dtype=torch.float64)
    for k in range(20_000):
        gradient = (g @ (w[..., None] * g).sum(-2)[..., None])[..., 0] + gap
        corner = torch.nn.functional.one_hot(gradient.argmin(1), 6).double()
        w = w + 2 / (k + 2) * (corner - w)
    for _ in range(30):
        p = bundle.solve_weights(pieces, metric)
        score = (g @ p[..., None])[..., 0] + gap
        level = p.square().sum(1) + (pieces.weight * pieces.gap).sum(1)
        rows = (score.amin(1) < level - 1e-9).nonzero()[:, 0]  # where a piece would lower the combination
        worst = score.argmin(1)[rows]
        bundle.add_piece(pieces, g[rows, worst], gap[rows, worst], torch.zeros(len(rows), dtype=torch.float64), rows)
    assert not len(rows)
    reached = 0.5 * p.square().sum(1) + (pieces.weight * pieces.gap).sum(1)
    torch.testing.assert_close(reached, dual(w), rtol=1e-3, atol=1e-3)
    assert (pieces.weight >= 0).all() and torch.allclose(pieces.weight.sum(1), torch.ones(3, dtype=torch.float64))


def test_clusters_are_links_and_ranked_by_error():
    points = torch.tensor([[[0.0], [0.9], [1.8], [10.0], [10.5]]])
    error = torch.tensor([[5.0, 4.0, 3.0, 1.0, 2.0]], dtype=torch.float64)
    assert clusters(points, error, 1.0).tolist() == [[1, 1, 1, 0, 0]], "a chain is one cluster; the lowest error is cluster 0"


def test_starts_belong_to_the_image_not_to_the_batch():
    matrix, x = normal(9, 3, dtype=torch.float32), normal(6, 9, seed=2, dtype=torch.float32)
    pool = Pool(prior_codes(3, 4), linear(matrix, torch.zeros(9)), seed=4)
    every = pool.starts(x, range(6), 5, 8)
    assert torch.equal(pool.starts(x[2:4], [2, 3], 5, 8), every[2:4]) and torch.equal(pool.starts(x, range(6), 3, 8), every[:, :3])
    assert len(every.reshape(-1, 3).unique(dim=0)) > 20


def test_a_result_depends_neither_on_the_chunk_nor_on_its_neighbours():
    x = as_images(torch.cat([normal(4, 2, seed=6), torch.zeros(4, 1, dtype=torch.float64)], 1))
    whole = invert(four_wells, x, 2, starts=6)
    small = invert(four_wells, x, 2, starts=6, byte_budget=1)
    part = invert(four_wells, x[2:], 2, starts=6, first_index=2)
    torch.testing.assert_close(small.all_z, whole.all_z, rtol=0, atol=1e-6)
    torch.testing.assert_close(part.all_z, whole.all_z[2:], rtol=0, atol=1e-6)
    assert torch.equal(small.kind, whole.kind) and torch.equal(part.cluster, whole.cluster[2:])


def test_dropping_keeps_the_best_and_says_what_it_dropped():
    x = torch.zeros(3, dtype=torch.float64)
    every, best = (of_one(four_wells, x, 2, starts=8, keep=keep) for keep in ("all", "best"))
    assert every.kept.all() and best.kept.sum() == 1 and not best.converged[~best.kept].any()
    torch.testing.assert_close(best.error, every.error, rtol=1e-6, atol=1e-9)


def test_an_initial_code_is_where_the_search_begins():
    start = torch.tensor([[[-1.1, 1.9], [1.1, -1.9]]], dtype=torch.float64)
    found = of_one(four_wells, torch.zeros(3, dtype=torch.float64), 2, starts=2, initial=start)
    torch.testing.assert_close(found.all_z.sign(), start.sign())


def test_uint8_images_are_scaled():
    image = torch.full((1, 1, 1, 3), 255, dtype=torch.uint8)
    found = invert(lambda z: as_images(z), image, 3, starts=1)
    torch.testing.assert_close(found.z, torch.ones(1, 3), rtol=0, atol=1e-4)


def test_the_report_is_plain_json():
    record = of_one(four_wells, torch.zeros(3, dtype=torch.float64), 2, starts=5).to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    image = record["images"][0]
    assert record["domain"]["name"] == "free" and record["kinds"]["smooth"] == 5 and image["distinct"] == len(image["minima"])


# ---- refusals ----------------------------------------------------------------------------------------------------------------------------------


X = torch.zeros(2, 1, 1, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": torch.zeros(2, 3)}, "(B, C, H, W)"),
        ({"images": torch.zeros(0, 1, 1, 3)}, "(B, C, H, W)"),
        ({"images": torch.zeros(2, 1, 1, 3, dtype=torch.int64)}, "int64"),
        ({"images": torch.zeros(2, 1, 2, 3)}, "decode turned codes"),
        ({"decode": lambda z: z}, "decode turned codes"),
        ({"decode": lambda z: as_images(z.detach())}, "no gradient"),
        ({"decode": lambda z: as_images(z - z.mean(0))}, "beside it"),
        ({"decode": lambda z: as_images(z @ torch.eye(4))}, "does not take codes"),
        ({"domain": "box"}, "box"),
        ({"domain": "prior"}, "prior_weight"),
        ({"domain": "free", "radius": 1.0}, "ball"),
        ({"domain": "ball", "radius": -1.0}, "positive"),
        ({"prior_weight": 1.0}, "prior"),
        ({"starts": 0}, "starts"),
        ({"keep": "some"}, "some"),
        ({"initial": torch.zeros(2, 5, 3)}, "initial"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, words: str):
    arguments = {"decode": lambda z: as_images(z), "images": X, "latent_dim": 3, "starts": 2, **options}
    with pytest.raises(UsageError) as caught:
        invert(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="decode"):
        invert(lambda z: as_images(z.log()), X, 3, starts=1)
    with pytest.raises(NonFiniteError, match="images"):
        invert(as_images, X * math.nan, 3, starts=1)


# ---- whole data sets ---------------------------------------------------------------------------------------------------------------------------


def test_a_killed_job_goes_on_to_the_same_result(tmp_path):
    x = as_images(torch.cat([normal(5, 2, seed=8), torch.zeros(5, 1, dtype=torch.float64)], 1))
    options = {"starts": 3, "part": 2, "keep": "all"}
    whole = invert_dataset(four_wells, x, 2, tmp_path / "whole", **options)

    torch.testing.assert_close(whole.all_z, invert(four_wells, x, 2, starts=3).all_z, rtol=0, atol=1e-6)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 4:
            raise Killed

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        invert_dataset(four_wells, x, 2, folder, progress=kill, **options)
    assert len(list(folder.glob("part-*"))) == 2
    (folder / ".part-000004.safetensors.1").write_bytes(b"half")
    before = {path: path.read_bytes() for path in folder.glob("part-*")}
    seen: list[tuple[int, int]] = []
    resumed = invert_dataset(four_wells, x, 2, folder, progress=lambda *c: seen.append(c), **options)
    assert seen[-1] == (5, 5) and all(path.read_bytes() == content for path, content in before.items())
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    assert not list(folder.glob(".*"))

    for other in ({**options, "seed": 1}, {**options, "starts": 4}):
        with pytest.raises(RunError, match="another job"):
            invert_dataset(four_wells, x, 2, folder, **other)
    with pytest.raises(RunError, match="images_sha256"):
        invert_dataset(four_wells, x + 1e-6, 2, folder, **options)
    (folder / "part-000000.safetensors").write_bytes(b"rot")
    with pytest.raises(RunError, match="part-000000"):
        invert_dataset(four_wells, x, 2, folder, **options)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        invert_dataset(four_wells, as_images(torch.zeros(1, 3)), 2, tmp_path)


# ---- watching a search --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["all", "best"])
def test_a_search_can_be_watched_and_what_it_shows_is_true(keep):
    """Every snapshot's values are those of its codes, no start ever rises (up to rounding), the last one is what is returned."""
    decode, images = small_problem()
    seen: list[Snapshot] = []
    watched = invert(decode, images, 3, starts=4, domain="ball", seed=1, keep=keep, on_snapshot=seen.append)
    plain = invert(decode, images, 3, starts=4, domain="ball", seed=1, keep=keep)
    assert torch.equal(watched.all_z, plain.all_z) and torch.equal(watched.kind, plain.kind), "watching changes nothing"
    assert {"descent", "finish", "certificate"} == {shot.stage for shot in seen} and len(seen) > 5
    for shot in seen:
        true = (decode(shot.z.reshape(-1, 3)).flatten(1) - images.flatten(1).repeat_interleave(4, 0)).double().square().sum(1).view(2, 4)
        assert torch.allclose(shot.value, true, rtol=1e-3, atol=1e-6)
    for before, after in zip(seen, seen[1:], strict=False):
        assert bool((after.value <= before.value * (1 + 1e-3) + 1e-6).all()) and after.evaluations >= before.evaluations
    assert torch.equal(seen[-1].kind, watched.kind) and bool((seen[0].kind == Kind.UNFINISHED).all())


def test_a_watcher_can_end_a_search():
    class EnoughError(Exception):
        pass

    def stop(shot: Snapshot) -> None:
        raise EnoughError(shot.stage)

    decode, images = small_problem()
    with pytest.raises(EnoughError, match="descent"):
        invert(decode, images, 3, starts=4, on_snapshot=stop)


def small_problem() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A smooth decoder of three dimensions and two images that it cannot make."""
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(3, 12, generator=generator), torch.randn(12, 16, generator=generator) / 3
    return lambda z: (torch.tanh(z @ first) @ second).sigmoid().view(-1, 1, 4, 4), torch.rand(2, 1, 4, 4, generator=generator)
