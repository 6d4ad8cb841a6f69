"""Measures against closed forms, oracles and simulations with known laws; the verdict on generators that are known to have collapsed or to copy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from periplus import ImageData, evaluation, load_data, metrics
from periplus.errors import UsageError


def rows(n: int, f: int, seed: int = 0) -> Tensor:
    return torch.rand(n, f, generator=torch.Generator().manual_seed(seed))


# ---- neighbours -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("tile", [1, 7, 2048])
def test_neighbours_are_those_of_brute_force(k: int, tile: int):
    queries, reference = rows(23, 17), rows(40, 17, seed=1)
    found = metrics.nearest_neighbours(queries, reference, k, tile)
    exact = cdist(queries.double().numpy(), reference.double().numpy())
    assert found.row.shape == found.distance.shape == (23, k)
    np.testing.assert_array_equal(found.row.numpy(), exact.argsort(1)[:, :k])
    np.testing.assert_allclose(found.distance.numpy(), np.sort(exact, 1)[:, :k], rtol=1e-5)


def test_a_copy_is_at_distance_exactly_zero():
    """|q|^2 + |r|^2 - 2 q.r leaves rounding where a difference leaves nothing."""
    reference = rows(200, 784)
    found = metrics.nearest_neighbours(reference[50:90], reference, k=2)
    assert (found.distance[:, 0] == 0).all() and found.row[:, 0].tolist() == list(range(50, 90))
    exact = cdist(reference[50:90].double().numpy(), reference.double().numpy())
    np.testing.assert_allclose(found.distance[:, 1].numpy(), np.sort(exact, 1)[:, 1], rtol=1e-5)


def test_a_near_copy_is_as_far_away_as_it_is():
    queries, reference = rows(20, 784), torch.cat([rows(100, 784, seed=1), rows(20, 784)])
    reference[100:, 0] += 1e-3
    found = metrics.nearest_neighbours(queries, reference)
    assert found.row[:, 0].tolist() == list(range(100, 120))
    torch.testing.assert_close(found.distance, torch.full((20, 1), 1e-3), rtol=1e-3, atol=0)


def test_images_of_the_set_find_themselves(digits: ImageData):
    reference = evaluation.pixels(digits.images)
    found = metrics.nearest_neighbours(reference[:300], reference, tile=128)
    assert not found.distance.any() and reference[found.row[:, 0]].equal(reference[:300])


def test_neighbours_far_from_the_origin_are_those_of_brute_force():
    """Features need not be centred."""
    reference = rows(200, 784) + 30
    exact = cdist(reference[50:90].double().numpy(), reference.double().numpy())
    np.testing.assert_array_equal(metrics.nearest_neighbours(reference[50:90], reference, k=2).row.numpy(), exact.argsort(1)[:, :2])


def test_a_copy_is_found_among_near_copies():
    queries = (rows(10, 1024) * 255).round() / 255
    reference = queries.repeat(50, 1)
    pixel = torch.randint(1024, (490,), generator=torch.Generator().manual_seed(0))
    reference[torch.arange(10, 500), pixel] += 1 / 255  # one grey level in one pixel, in all but the first ten
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert not metrics.nearest_neighbours(queries, reference[order]).distance.any()


@pytest.mark.parametrize("k", [0, -1, 6])
def test_more_neighbours_than_there_are_rows_are_refused(k: int):
    with pytest.raises(UsageError, match=f"k is {k}.*5 reference rows"):
        metrics.nearest_neighbours(rows(2, 3), rows(5, 3), k)


def test_labels_are_voted_for_and_ties_go_to_the_nearest():
    reference, labels = torch.tensor([[0.0], [1.0], [2.1], [3.3], [10.0]]), torch.tensor([7, 5, 5, 7, 2])

    def vote(query: float, k: int) -> int:
        return metrics.neighbour_labels(torch.tensor([[query]]), reference, labels, k).item()

    assert vote(0.0, 1) == 7
    assert vote(0.0, 2) == 7  # one vote each: the nearest
    assert vote(0.0, 3) == 5  # two against the nearest one
    assert vote(0.0, 4) == 7  # two each: the class of the nearest
    assert vote(2.0, 4) == 5
    assert vote(10.0, 3) == 2  # three different classes
    assert vote(10.0, 5) == 7  # 2, 7, 5, 5, 7: two each, and a 7 is nearer than a 5
    assert vote(-5.0, 5) == 7


def test_a_known_image_is_given_its_own_label(digits: ImageData):
    reference = evaluation.pixels(digits.images)
    assert metrics.neighbour_labels(reference[:200], reference, digits.labels, k=1).equal(digits.labels[:200])


# ---- proportions ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 10), (1, 297), (50, 10_000), (0, 10_000), (9999, 10_000)])
def test_wilson_intervals_are_those_of_scipy(successes: int, trials: int):
    share = metrics.wilson_interval(successes, trials)
    exact = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert share.value == successes / trials
    assert share.low == pytest.approx(exact.low, abs=1e-7) and share.high == pytest.approx(exact.high, abs=1e-7)


def test_an_interval_holds_its_own_value_and_stays_in_the_unit_interval():
    """By exact comparison: an error bar of length -1e-16 stops a plot."""
    for trials in range(1, 400):
        for successes in {0, 1, trials // 2, trials - 1, trials}:
            share = metrics.wilson_interval(successes, trials)
            assert 0 <= share.low <= share.value <= share.high <= 1 and share.low < share.high
        assert metrics.wilson_interval(0, trials).low == 0 and metrics.wilson_interval(trials, trials).high == 1


@pytest.mark.parametrize(("p", "trials"), [(0.1, 300), (0.5, 50), (0.005, 10_000)])
def test_wilson_intervals_cover_the_truth_as_often_as_they_say(p: float, trials: int):
    """Coverage is exactly computable: the binomial weight of the counts whose interval holds p. And simulated, in standard errors of that."""
    covers = np.array([(share := metrics.wilson_interval(k, trials)).low <= p <= share.high for k in range(min(trials, 400) + 1)])
    exact = scipy.stats.binom.pmf(np.arange(len(covers)), trials, p)[covers].sum()
    assert abs(exact - 0.95) < 0.015  # the counts are whole numbers: no interval covers with exactly 95 %
    draws = np.random.default_rng(0).binomial(trials, p, 4000)
    assert abs(covers[draws].mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)


def test_class_shares_count_every_class():
    labels = torch.tensor([0] * 5 + [2] * 3 + [3] * 2)
    shares = metrics.class_shares(labels, 6)
    assert [s.value for s in shares] == [0.5, 0, 0.3, 0.2, 0, 0]
    assert sum(s.value for s in shares) == pytest.approx(1)
    assert shares[2] == metrics.wilson_interval(3, 10) and shares[1].low == 0 and shares[1].high > 0


def test_class_shares_of_nothing_are_refused():
    with pytest.raises(UsageError, match="no labels"):
        metrics.class_shares(torch.zeros(0, dtype=torch.int64), 10)


# ---- spread ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 20, 101])
@pytest.mark.parametrize("tile", [3, 2048])
def test_mean_pairwise_distance_is_that_of_scipy(n: int, tile: int):
    x = rows(n, 30)
    assert metrics.mean_pairwise_distance(x, tile) == pytest.approx(pdist(x.double().numpy()).mean(), rel=1e-5)


def test_mean_pairwise_distance_of_known_figures():
    assert metrics.mean_pairwise_distance(torch.eye(4)) == pytest.approx(math.sqrt(2))
    assert metrics.mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == 5
    assert metrics.mean_pairwise_distance(torch.full((300, 784), 0.7)) < 0.02  # a product form that cancels would leave more
    x = rows(60, 12)
    assert metrics.mean_pairwise_distance(3 * x + 1) == pytest.approx(3 * metrics.mean_pairwise_distance(x), rel=1e-4)


def test_a_single_row_has_no_pairwise_distance():
    with pytest.raises(UsageError, match="two rows"):
        metrics.mean_pairwise_distance(rows(1, 4))


# ---- the Frechet distance -------------------------------------------------------------------------------------------------------------------------


def normal(n: int, f: int, seed: int = 0) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(f: int, seed: int) -> Tensor:
    factor = normal(2 * f, f, seed)
    return factor.T @ factor / (2 * f)


def exact(mean: Tensor, matrix: Tensor) -> metrics.Moments:
    return metrics.Moments(mean, matrix, 1000)


def test_frechet_distance_of_commuting_gaussians_is_a_sum_over_axes():
    scale, other = torch.linspace(0.1, 2, 7).double(), torch.linspace(3, 0, 7).double()
    turn = torch.linalg.qr(normal(7, 7))[0]
    shift = torch.arange(7.0).double()
    value = metrics.frechet_between(exact(shift, turn * scale.square() @ turn.T), exact(0 * shift, turn * other.square() @ turn.T))
    assert value == pytest.approx(float(shift.square().sum() + (scale - other).square().sum()), rel=1e-8)


@pytest.mark.parametrize("f", [2, 5, 20])
def test_frechet_distance_of_gaussians_that_do_not_commute(f: int):
    """In two dimensions Tr (A B)^(1/2) = sqrt(Tr AB + 2 sqrt(det AB)); beyond, a general matrix square root and POT's Bures distance."""
    ot = pytest.importorskip("ot")
    here, there = (exact(normal(1, f, seed)[0], covariance(f, seed)) for seed in (1, 2))
    value = metrics.frechet_between(here, there)
    product = here.covariance @ there.covariance
    shift, traces = float((here.mean - there.mean).square().sum()), float(here.covariance.trace() + there.covariance.trace())
    if f == 2:
        assert value == pytest.approx(shift + traces - 2 * math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product))), rel=1e-8)
    assert value == pytest.approx(shift + traces - 2 * scipy.linalg.sqrtm(product.numpy()).trace().real, rel=1e-8)
    arrays = [x.numpy() for x in (here.mean, there.mean, here.covariance, there.covariance)]
    assert value == pytest.approx(float(ot.gaussian.bures_wasserstein_distance(*arrays)) ** 2, rel=1e-8)


def test_frechet_distance_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    here, there = normal(300, 12) @ covariance(12, 3), normal(200, 12, 1) + 0.2
    moments = [part for rows in (here, there) for part in (rows.mean(0), torch.cov(rows.T))]
    assert metrics.frechet_distance(here, there).value == pytest.approx(float(fid._compute_fid(*moments)), rel=1e-4)


def test_frechet_distance_is_symmetric_invariant_and_zero_for_equal_samples():
    here, there = normal(200, 10) @ covariance(10, 3), normal(150, 10, 1) + 0.3
    found, back = metrics.frechet_distance(here, there), metrics.frechet_distance(there, here)
    assert back.value == pytest.approx(found.value, rel=1e-10) and back.standard_error == pytest.approx(found.standard_error, rel=1e-8)
    turn = torch.linalg.qr(normal(10, 10))[0]
    turned = metrics.frechet_distance(here @ turn + 5, there @ turn + 5)
    assert turned.value == pytest.approx(found.value, rel=1e-9) and turned.standard_error == pytest.approx(found.standard_error, rel=1e-7)
    assert metrics.frechet_distance(3 * here, 3 * there).value == pytest.approx(9 * found.value, rel=1e-10)
    same = metrics.frechet_distance(here, here)
    assert same.value < 1e-12 and same.standard_error < 1e-12


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 500), (2, 3), (500, 20)])
def test_frechet_distance_with_fewer_rows_than_features(n: int, m: int):
    """Tr (S S')^(1/2) is the nuclear norm of the product of the centred data themselves: no covariance, no root. One constant feature."""
    here, there = normal(n, 64), 2 * normal(m, 64, 1) + 0.1
    here[:, 5] = there[:, 5] = 1.0
    factors = [(rows - rows.mean(0)) / math.sqrt(len(rows) - 1) for rows in (here, there)]
    nuclear = float(torch.linalg.svdvals(factors[0] @ factors[1].T).sum())
    truth = float((here.mean(0) - there.mean(0)).square().sum()) + sum(float(x.square().sum()) for x in factors) - 2 * nuclear
    found = metrics.frechet_distance(here, there)
    assert found.value == pytest.approx(truth, rel=1e-7) and math.isfinite(found.standard_error)


def test_cached_moments_give_the_same_distance():
    here, there = normal(100, 6).float(), normal(90, 6, 1).float()
    assert metrics.frechet_between(metrics.moments(here), metrics.moments(there)) == pytest.approx(metrics.frechet_distance(here, there).value)
    assert metrics.frechet_distance(here.numpy(), there.numpy()) == metrics.frechet_distance(here, there)
    assert metrics.moments(here).covariance.numpy() == pytest.approx(np.cov(here.double().numpy().T))


def gaussian_pair(seed: int, n: int, f: int, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """Two samples whose Frechet distance is (1 - scale)^2 sum s^2 + f shift^2."""
    s = torch.linspace(1, 0.2, f).double()
    return normal(n, f, 2 * seed) * s, normal(n, f, 2 * seed + 1) * s * scale + shift


TRIALS = 120


@pytest.fixture(scope="module")
def frechet_trials() -> tuple[list[metrics.FrechetDistance], list[metrics.Extrapolation], float]:
    s = torch.linspace(1, 0.2, 8).double()
    truth = float((0.3 * s).square().sum() + 8 * 0.1**2)
    pairs = [gaussian_pair(trial, 300, 8, 1.3, 0.1) for trial in range(TRIALS)]
    return [metrics.frechet_distance(*pair) for pair in pairs], [metrics.frechet_distance_infinite(*pair) for pair in pairs], truth


def binomial_error(p: float, trials: int) -> float:
    return math.sqrt(p * (1 - p) / trials)


def test_frechet_intervals_cover_the_value_at_these_numbers_of_rows(frechet_trials):
    found, _, _ = frechet_trials
    values = torch.tensor([f.value for f in found])
    mean = float(values.mean())
    covered = sum(f.low <= mean <= f.high for f in found) / TRIALS
    assert abs(covered - 0.95) < 3 * binomial_error(0.95, TRIALS)
    told = sum(f.standard_error for f in found) / TRIALS
    assert told == pytest.approx(float(values.std()), rel=3 / math.sqrt(2 * TRIALS))  # three standard errors of a standard deviation


def test_extrapolated_frechet_distance_has_no_bias_and_its_intervals_cover_the_truth(frechet_trials):
    found, extrapolated, truth = frechet_trials
    error = math.sqrt(float(torch.tensor([e.value for e in extrapolated]).var()) / TRIALS)
    bias = sum(f.value for f in found) / TRIALS - truth
    assert bias > 5 * error  # what it is for
    assert abs(sum(e.value for e in extrapolated) / TRIALS - truth) < 3 * error
    covered = sum(e.low <= truth <= e.high for e in extrapolated) / TRIALS
    assert abs(covered - 0.95) < 3 * binomial_error(0.95, TRIALS)
    assert [p.fake for p in extrapolated[0].points] == [300, 150, 100, 75] and extrapolated[0].points[0].value == pytest.approx(found[0].value)


def test_frechet_standard_errors_know_of_shifts():
    """Where the means decide, FD is |d|^2 and its deviation 2 |d| sqrt(s^2/N + s^2/M) to first order."""
    found = [metrics.frechet_distance(normal(200, 2, 2 * trial), normal(100, 2, 2 * trial + 1) + 3) for trial in range(100)]
    truth = 2 * math.sqrt(18) * math.sqrt(1 / 200 + 1 / 100)
    values = torch.tensor([f.value for f in found])
    assert sum(f.standard_error for f in found) / 100 == pytest.approx(truth, rel=0.05)
    assert float(values.std()) == pytest.approx(truth, rel=3 / math.sqrt(200))


def test_between_equal_laws_the_frechet_interval_is_too_wide_and_never_too_narrow():
    pairs = [gaussian_pair(trial, 300, 8, 1.0, 0.0) for trial in range(TRIALS)]
    found = [metrics.frechet_distance(*pair) for pair in pairs]
    deviation = float(torch.tensor([f.value for f in found]).std())
    told = sum(f.standard_error for f in found) / TRIALS
    assert 0.85 * deviation < told < 1.2 * math.sqrt(2) * deviation
    extrapolated = [metrics.frechet_distance_infinite(*pair) for pair in pairs]
    covered = sum(e.low <= 0 <= e.high for e in extrapolated) / TRIALS
    assert covered > 0.95 - 3 * binomial_error(0.95, TRIALS)
    values = torch.tensor([e.value for e in extrapolated])
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(TRIALS)
    assert sum(f.value for f in found) / TRIALS > 10 * abs(float(values.mean()))  # the noise floor that is taken off


def test_the_bootstrap_would_carry_the_bias_twice():
    """Why there is none: rows drawn again are farther apart than the rows are."""
    here, there = gaussian_pair(0, 300, 8, 1.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    draws = [metrics.frechet_distance(*(rows[torch.randint(300, (300,), generator=generator)] for rows in (here, there))).value for _ in range(40)]
    assert min(draws) > metrics.frechet_distance(here, there).value


def test_an_extrapolation_needs_full_rank_and_two_sizes():
    with pytest.raises(UsageError, match="4 blocks has 12 rows for features of rank 20"):
        metrics.frechet_distance_infinite(normal(50, 20), normal(60, 20))
    with pytest.raises(UsageError, match="shares"):
        metrics.frechet_distance_infinite(normal(50, 2), normal(60, 2), shares=(3,))


# ---- the kernel distance --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [7, 256])
def test_kernel_distance_is_the_unbiased_statistic_of_torchmetrics(tile: int):
    kid = pytest.importorskip("torchmetrics.image.kid")
    here, there = normal(60, 9), normal(60, 9, 1) + 0.5
    found = metrics.kernel_distance(here, there, tile=tile)
    assert found.value == pytest.approx(float(kid.poly_mmd(here, there)), rel=1e-10)
    assert found.standard_error == pytest.approx(metrics.kernel_distance(here, there, tile=60).standard_error, rel=1e-10)


def test_kernel_distance_is_what_the_mean_over_subsets_tends_to():
    kid = pytest.importorskip("torchmetrics.image.kid")
    here, there = normal(300, 9), normal(400, 9, 1) + 0.3
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([kid.poly_mmd(*(rows[torch.randperm(len(rows), generator=generator)[:100]] for rows in (here, there))) for _ in range(300)])
    assert abs(metrics.kernel_distance(here, there).value - float(values.mean())) < 3 * float(values.std()) / math.sqrt(300)


def test_kernel_distance_of_a_linear_kernel_is_the_squared_distance_of_means():
    """Degree 1: |mu - mu'|^2 / F, each squared mean freed of its own noise, Tr S / n."""
    here, there = normal(50, 4), normal(70, 4, 1) + 1
    noise = sum(float(torch.cov(rows.T).trace()) / len(rows) for rows in (here, there))
    truth = (float((here.mean(0) - there.mean(0)).square().sum()) - noise) / 4
    assert metrics.kernel_distance(here, there, degree=1).value == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.5])
def test_kernel_standard_errors_are_right_at_equality_and_away_from_it(shift: float):
    found = [metrics.kernel_distance(normal(150, 6, 2 * trial), normal(100, 6, 2 * trial + 1) + shift) for trial in range(200)]
    values = torch.tensor([f.value for f in found])
    told = math.sqrt(sum(f.standard_error**2 for f in found) / 200)
    assert 0.85 < told / float(values.std()) < 1.22  # 5 % is the standard error of the deviation; plain plug-in would give 1.41 at equality
    if shift == 0:
        assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(200)
    mean = float(values.mean())
    assert sum(f.low <= mean <= f.high for f in found) / 200 > 0.95 - 3 * binomial_error(0.95, 200)


def test_kernel_distance_of_equal_laws_is_within_three_standard_errors_of_zero():
    for trial in range(20):
        found = metrics.kernel_distance(normal(300, 16, 2 * trial + 100), normal(300, 16, 2 * trial + 101))
        assert abs(found.value) < 3 * found.standard_error


# ---- precision, recall, density, coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("tile", [13, 256])
def test_precision_recall_density_coverage_are_those_of_prdc(k: int, tile: int, capsys: pytest.CaptureFixture[str]):
    prdc = pytest.importorskip("prdc")
    here, there = normal(150, 5), 0.8 * normal(110, 5, 1) + 0.4
    found = metrics.precision_recall_density_coverage(here, there, k, tile)
    for key, value in prdc.compute_prdc(here.numpy(), there.numpy(), nearest_k=k).items():
        assert getattr(found, key) == pytest.approx(float(value), rel=1e-12), key
        low, high = getattr(found, f"{key}_interval")
        assert low <= getattr(found, key) <= high


def test_coverage_and_density_of_equal_laws():
    """Coverage: that not all k nearest of a real's 2 N - 1 neighbours are reals, (1 - prod (N - i) / (2 N - i)); density 1."""
    n, k = 100, 5
    truth = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    found = [metrics.precision_recall_density_coverage(normal(n, 3, 2 * trial), normal(n, 3, 2 * trial + 1), k) for trial in range(100)]
    for values, expected in (([f.coverage for f in found], truth), ([f.density for f in found], 1.0)):
        array = np.array(values)
        assert abs(array.mean() - expected) < 3 * array.std(ddof=1) / math.sqrt(100)


def test_precision_and_recall_of_sets_that_are_far_apart_and_of_a_part():
    here = normal(200, 4)
    assert metrics.precision_recall_density_coverage(here, here + 100)[:4] == (0, 0, 0, 0)
    half = metrics.precision_recall_density_coverage(here, here[here[:, 0] > 0.5])
    assert half.precision == 1 and half.recall < 0.7 and half.coverage < 0.7  # fidelity without diversity


# ---- classes --------------------------------------------------------------------------------------------------------------------------------------


def test_class_distances_are_those_of_scipy():
    counts, shares = torch.tensor([30, 50, 20, 0]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    found = metrics.class_distance(counts, shares)
    assert found.kl == pytest.approx(scipy.stats.entropy(counts.numpy(), shares.numpy()))
    chi = scipy.stats.chisquare(counts.numpy(), 100 * shares.double().numpy())
    assert found.chi_squared == pytest.approx(chi.statistic / 100) and found.p_value == pytest.approx(chi.pvalue, rel=1e-6)
    assert found.total_variation == pytest.approx(0.3)
    assert metrics.class_distance(counts, counts) == (0, 0, 0, pytest.approx(2 / 200), 1)
    assert metrics.class_distance(torch.tensor([1, 1]), torch.tensor([1, 0])).kl == math.inf
    here, there = torch.tensor([230, 250, 320]), torch.tensor([410, 395, 395])  # of counts against counts: the test of homogeneity
    table = scipy.stats.chi2_contingency(torch.stack([here, there]).numpy())
    known, counted = metrics.class_distance(here, there), metrics.class_distance(here, there, 1200)
    assert counted.p_value == pytest.approx(table.pvalue, rel=0.25) and known.p_value < table.pvalue / 10
    assert counted[:3] == known[:3] and counted.kl_floor == pytest.approx(known.kl_floor * (1 + 800 / 1200))


def test_the_noise_floor_of_the_kl_is_what_samples_of_the_data_show():
    generator = torch.Generator().manual_seed(0)
    found = [
        metrics.class_distance(torch.bincount(torch.randint(50, (5000,), generator=generator), minlength=50), torch.ones(50)) for _ in range(200)
    ]
    values = np.array([f.kl for f in found])
    assert abs(values.mean() - found[0].kl_floor) < 3 * values.std(ddof=1) / math.sqrt(200)
    assert abs(np.mean([f.p_value < 0.05 for f in found]) - 0.05) < 3 * binomial_error(0.05, 200)


def test_modes_of_stacked_images_are_counted():
    digits = torch.tensor([[0, 0, 7], [0, 0, 7], [9, 9, 9], [1, 2, 3]])
    found = metrics.modes(digits)
    assert (found.found, found.of, found.samples) == (3, 1000, 4)
    assert found.kl == pytest.approx(math.log(1000) - 1.5 * math.log(2))  # ln 1000 - H[1/2, 1/4, 1/4]
    counts = torch.zeros(1000).index_fill_(0, torch.tensor([7, 999]), 2.0)
    assert metrics.modes(digits[:3], reference=counts).kl == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))
    assert metrics.modes(torch.tensor([[0, 1], [1, 1]]), classes=2)[:2] == (2, 4)


def test_modes_that_fair_samples_miss_and_the_kl_they_show_are_foretold():
    generator = torch.Generator().manual_seed(0)
    found = [metrics.modes(torch.randint(10, (3000, 3), generator=generator)) for _ in range(60)]
    for values, expected in (([f.of - f.found for f in found], found[0].missed_floor), ([f.kl for f in found], None)):
        array = np.array(values)
        error = array.std(ddof=1) / math.sqrt(60)
        if expected is not None:
            assert abs(array.mean() - expected) < 3 * error
        else:  # first order in 1000 / 3000 is not all there is
            assert array.mean() == pytest.approx(found[0].kl_floor, rel=0.12)
    at_protocol = metrics.modes(torch.randint(10, (26_000, 3), generator=generator))
    assert at_protocol.found == 1000 and at_protocol.kl == pytest.approx(0.0192, rel=0.15)


@pytest.mark.parametrize("digits", [torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), torch.tensor([[0, 10, 1]]), torch.tensor([[-1, 0, 1]])])
def test_what_is_no_matrix_of_digits_has_no_modes(digits: Tensor):
    with pytest.raises(UsageError, match="digits"):
        metrics.modes(digits)


# ---- two samples, three samples -------------------------------------------------------------------------------------------------------------------


def test_equal_laws_are_told_apart_as_often_as_chance_allows():
    found = [metrics.classifier_two_sample_test(normal(80, 4, 2 * trial), normal(90, 4, 2 * trial + 1)) for trial in range(200)]
    right = sum(f.accuracy * f.trials for f in found)
    trials = sum(f.trials for f in found)
    assert abs(right / trials - 0.5) < 3 * math.sqrt(0.25 / trials)
    assert sum(f.low <= 0.5 <= f.high for f in found) / 200 > 0.95 - 3 * binomial_error(0.95, 200)
    assert sum(f.p_value < 0.05 for f in found) / 200 < 0.05 + 3 * binomial_error(0.05, 200)


def test_shifts_and_shapes_are_told_apart():
    here = normal(1000, 3)
    shifted, wider = (metrics.classifier_two_sample_test(here, there) for there in (normal(1000, 3, 1) + 0.7, 1.8 * normal(1000, 3, 1)))
    assert shifted.p_value < 1e-6 and wider.p_value < 1e-6  # the second has no shift that a linear classifier could see
    assert shifted.accuracy < scipy.stats.norm.cdf(0.7 * math.sqrt(3) / 2) + 3 * binomial_error(0.7, 1000)  # no better than the best
    assert metrics.classifier_two_sample_test(here, here + 100).accuracy == 1
    exact_tail = scipy.stats.binomtest(round(shifted.accuracy * shifted.trials), shifted.trials, 0.5, "greater").pvalue
    assert shifted.p_value == pytest.approx(exact_tail, rel=1e-9)


def digit_rows(digits: ImageData, seed: int) -> Tensor:
    """Pixels of the digits in a random order."""
    return digits.images[torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))].flatten(1) / 255


def test_replayed_training_images_are_flagged_and_real_images_are_not(digits: ImageData):
    for seed in range(20):
        rows = digit_rows(digits, seed)
        train, held_out, fresh = rows[:900], rows[900:1200], rows[1200:]
        replayed = train[:300] + 0.01 * normal(300, 64, seed)
        copied, honest = metrics.data_copying_test(train, held_out, replayed), metrics.data_copying_test(train, held_out, fresh)
        assert copied.copying and copied.z < -10 and copied.judged > 0.9
        assert not honest.copying and abs(honest.z) < 4
        ratio = metrics.neighbour_ratio(train, held_out, replayed)
        assert ratio.high < 0.2 and ratio.low <= ratio.value <= ratio.high
        ratio = metrics.neighbour_ratio(train, held_out, fresh)
        assert 0.8 < ratio.low <= 1 + 0.05 and ratio.high >= 0.95


def test_z_is_standard_normal_for_new_samples():
    found = torch.tensor(
        [
            metrics.data_copying_test(normal(200, 2, 3 * trial), normal(150, 2, 3 * trial + 1), normal(150, 2, 3 * trial + 2), cells=cells).z
            for trial in range(100)
            for cells in (1, 3)
        ]
    ).view(100, 2)
    assert (found.mean(0).abs() < 3 / 10).all() and (found.std(0) - 1).abs().max() < 3 / math.sqrt(200)


def test_copying_of_a_part_is_found_behind_bad_samples():
    """Half of the fakes replay one of two clusters, the others lie far off in the second: globally no nearer than new samples."""
    centre = torch.tensor([20.0, 0.0]).double()
    train = torch.cat([normal(300, 2), normal(300, 2, 1) + centre])
    held_out = torch.cat([normal(200, 2, 2), normal(200, 2, 3) + centre])
    fake = torch.cat([train[:200] + 1e-3, 3 * normal(200, 2, 4) + centre])
    one, two = (metrics.data_copying_test(train, held_out, fake, cells=cells) for cells in (1, 2))
    assert two.z < one.z < 4 and two.cells == 2


def test_rank_z_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    above, below = torch.randint(8, (40,), generator=generator).double(), torch.randint(6, (30,), generator=generator).double()
    exact_p = scipy.stats.mannwhitneyu(above, below, method="asymptotic", use_continuity=False).pvalue
    z = metrics.memorisation.rank_z(above, below)
    assert z > 0 and math.erfc(z / math.sqrt(2)) == pytest.approx(exact_p, rel=1e-9)
    assert metrics.memorisation.rank_z(torch.ones(5), torch.ones(4)) == 0


def test_median_ratio_covers_a_known_ratio() -> None:
    """Medians of lognormals, ratio 1.5. The percentile bootstrap of a median covers 93 to 96 % at this size: within four standard errors."""
    generator, trials = torch.Generator().manual_seed(3), 100
    covered = 0
    for trial in range(trials):
        above, below = (scale * torch.randn(150, generator=generator).mul(0.5).exp() for scale in (1.5, 1.0))
        ratio = metrics.median_ratio(above, below, trial, draws=300)
        assert ratio.low < ratio.value == above.median() / below.median() < ratio.high
        covered += ratio.low <= 1.5 <= ratio.high
    assert abs(covered / trials - 0.945) < 4 * math.sqrt(0.945 * 0.055 / trials)


def test_median_ratio_is_a_function_of_its_arguments() -> None:
    above, below = torch.rand(2, 100, generator=torch.Generator().manual_seed(4)) + 0.5
    first = metrics.median_ratio(above, below, 5)
    assert metrics.median_ratio(above, below, 5) == first != metrics.median_ratio(above, below, 6)
    assert metrics.median_ratio(2 * above, below, 5) == pytest.approx([2 * x for x in first])
    assert metrics.median_ratio(above[:1], below[:1], 5) == pytest.approx([float(above[0] / below[0])] * 3)


# ---- worse images have worse scores ---------------------------------------------------------------------------------------------------------------


def noise(images: Tensor, labels: Tensor, strength: int) -> Tensor:
    return images + 0.08 * strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(7))


def blur(images: Tensor, labels: Tensor, strength: int) -> Tensor:
    side = torch.tensor([0.15, 0.7, 0.15])
    for _ in range(strength):
        images = torch.nn.functional.conv2d(torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), (side[:, None] * side)[None, None])
    return images


def occlude(images: Tensor, labels: Tensor, strength: int) -> Tensor:
    images = images.clone()
    images[..., 2 : 2 + strength, 2 : 2 + strength] = 0
    return images


def remove_classes(images: Tensor, labels: Tensor, strength: int) -> Tensor:
    return images[labels >= 2 * strength]


#: What every corruption must make worse. Not in the list: what is blind to it by its definition. Recall rises with noise, because balls around
#: scattered fakes reach far; precision and density rise with slight blur, because a blurred digit lies nearer to all others, and
#: need not fall when classes are missing, because they ask whether fakes are good.
FALLING = {
    noise: ("precision", "density", "coverage"),
    blur: ("coverage", "recall"),
    occlude: ("precision", "density", "coverage", "recall"),
    remove_classes: ("coverage", "recall"),
}


@pytest.mark.parametrize("corrupt", FALLING)
def test_scores_fall_as_images_get_worse(corrupt, digits: ImageData):
    """At four strengths; features are rectified random projections of the pixels."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, labels = digits.images[order].float() / 255, digits.labels[order]
    weights = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) / 8

    def features(x: Tensor) -> Tensor:
        return 4 * (x.flatten(1) @ weights).relu()

    real = features(images[:750])
    fakes = [features(corrupt(images[750:], labels[750:], strength)) for strength in range(5)]
    for measure in (metrics.frechet_distance, metrics.kernel_distance):
        values = [measure(real, fake).value for fake in fakes]
        assert values == sorted(set(values)), (measure.__name__, values)
    support = [metrics.precision_recall_density_coverage(real, fake) for fake in fakes]
    for key in FALLING[corrupt]:
        values = [getattr(s, key) for s in support]
        assert values == sorted(values, reverse=True) and values[-1] < values[0] - 0.05, (key, values)
    accuracy = [metrics.classifier_two_sample_test(real, fake).accuracy for fake in fakes]
    assert accuracy == sorted(accuracy), accuracy


# ---- what is refused ------------------------------------------------------------------------------------------------------------------------------

PAIRED = (
    metrics.frechet_distance,
    metrics.frechet_distance_infinite,
    metrics.kernel_distance,
    metrics.precision_recall_density_coverage,
    metrics.classifier_two_sample_test,
    lambda real, fake: metrics.data_copying_test(real, real, fake),
    lambda real, fake: metrics.neighbour_ratio(real, real, fake),
)


@pytest.mark.parametrize("measure", PAIRED)
def test_broken_features_are_refused_by_name(measure):
    good = normal(40, 3)
    for bad, message in (
        (normal(40, 4), "different widths.* 3 features.*4 features"),
        (good[:1], "fake has 1 rows: at least 2"),
        (good[0], r"fake has shape \(3,\): a matrix"),
        (good.clone().index_fill_(0, torch.tensor([4, 7]), math.nan), "fake has 2 rows that are not finite, the first of them row 4"),
        (good.clone().index_fill_(0, torch.tensor([2]), math.inf), "fake has 1 rows that are not finite"),
    ):
        with pytest.raises(UsageError, match=message):
            measure(good, bad)


def test_values_that_cannot_be_served_are_refused():
    rows40, rows30 = normal(40, 3), normal(30, 3, 1)
    for k in (0, 30, 35):
        with pytest.raises(UsageError, match=f"k is {k}: .*the 30 rows"):
            metrics.precision_recall_density_coverage(rows40, rows30, k)
    with pytest.raises(UsageError, match="degree is 0"):
        metrics.kernel_distance(rows40, rows30, degree=0)
    with pytest.raises(UsageError, match="4 are needed"):
        metrics.classifier_two_sample_test(rows40, rows30[:3])
    with pytest.raises(UsageError, match="cells is 41"):
        metrics.data_copying_test(rows40, rows30, rows30, cells=41)
    with pytest.raises(UsageError, match="none of 5 cells"):
        metrics.data_copying_test(rows40, rows30, rows30)
    with pytest.raises(UsageError, match="training rows, or more"):
        metrics.neighbour_ratio(rows40, rows40, rows30)
    for counts, reference in ((torch.zeros(3), torch.ones(3)), (torch.tensor([1, -1, 2]), torch.ones(3)), (torch.ones(3), torch.ones(4))):
        with pytest.raises(UsageError):
            metrics.class_distance(counts, reference)
    with pytest.raises(UsageError, match="images is 0"):
        metrics.class_distance(torch.ones(3), torch.ones(3), 0)
    with pytest.raises(UsageError, match="real has 2 features, fake has 3"):
        metrics.frechet_between(metrics.moments(normal(9, 2)), metrics.moments(rows40))


# ---- the verdict ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out() -> ImageData:
    return load_data("digits", "test")


def test_real_images_have_not_collapsed(digits: ImageData, held_out: ImageData):
    record = evaluation.collapse(held_out.images, digits)
    assert record["collapsed"] is False and record["samples"] == 297
    assert 0.9 < record["spread"] < 1.1 and record["smallest_share"] > 0.05
    assert sum(share["value"] for share in record["shares"]) == pytest.approx(1)
    error = record["classifier_error"]
    assert error["low"] <= error["value"] <= error["high"] < 0.1


def test_real_images_say_the_same_as_bytes_and_as_floats(digits: ImageData, held_out: ImageData):
    assert evaluation.collapse(held_out.images, digits) == evaluation.collapse(held_out.images.float() / 255, digits)


def test_a_constant_generator_has_collapsed(digits: ImageData):
    record = evaluation.collapse(digits.images[:1].expand(500, -1, -1, -1), digits)
    assert record["collapsed"] is True and record["spread"] < 0.01 and record["smallest_share"] == 0


def test_a_generator_of_one_class_has_collapsed_though_it_is_as_wide_as_the_data(digits: ImageData):
    ones = digits.images[digits.labels == 1]
    record = evaluation.collapse(ones, digits)
    assert record["spread"] > evaluation.SMALLEST_SPREAD and record["collapsed"] is True
    assert record["shares"][1]["value"] > 0.95 and record["smallest_share"] == 0


def test_a_generator_that_leaves_one_class_out_has_collapsed(digits: ImageData, held_out: ImageData):
    record = evaluation.collapse(held_out.images[held_out.labels != 0], digits)
    assert record["collapsed"] is True and record["shares"][0]["value"] < 0.005


def test_a_thousand_classes_are_not_told_by_nearest_images(digits: ImageData, held_out: ImageData):
    """Each would have a thousandth of the samples, and so a share below any threshold that fits ten."""
    thousand = replace(digits, classes=tuple(f"{n:03d}" for n in range(1000)))
    record = evaluation.collapse(held_out.images, thousand)
    assert record["collapsed"] is False and record["shares"] is None


def test_without_labels_the_spread_decides(digits: ImageData, held_out: ImageData):
    unlabelled = replace(digits, labels=None)
    record = evaluation.collapse(held_out.images, unlabelled)
    assert record["collapsed"] is False and record["shares"] is None and record["smallest_share"] is None and record["classifier_error"] is None
    assert evaluation.collapse(held_out.images // 3, unlabelled)["collapsed"] is True
    assert evaluation.collapse(torch.full((40, 1, 8, 8), math.nan), unlabelled)["collapsed"] is True


def test_classes_that_the_data_lacks_are_not_missed(digits: ImageData, held_out: ImageData):
    """`classes` names ten; a subset of two of them is a set of two classes."""
    data = digits.subset((digits.labels == 3) | (digits.labels == 7))
    images = held_out.images[(held_out.labels == 3) | (held_out.labels == 7)]
    assert evaluation.collapse(images, data)["collapsed"] is False
    assert evaluation.collapse(digits.images[digits.labels == 3], data)["collapsed"] is True
