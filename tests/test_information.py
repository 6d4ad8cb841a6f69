"""Rates against brute force in float64, closed forms and the orderings that theory promises, in standard errors; certificates against known lies."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from periplus import information
from periplus.errors import UsageError
from periplus.information import (
    Bound,
    active_units,
    batch_rate,
    echo_certificate,
    fitted_upper_bound,
    gaussian_certificate,
    importance_log_likelihood,
    infonce,
    ksg_information,
    marginal_rate,
    pairwise_log_density,
    rate_split,
)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encodings(n: int, d: int, scale: float, spread: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Locations of the given spread, scales within a factor of two of `scale`."""
    g = source(seed)
    mean = spread * torch.randn(n, d, generator=g, dtype=torch.float64)
    return mean.to(dtype), (math.log(scale) + 0.25 * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype)


def gaussian_data(n: int, d: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """m = x ~ N(0, I), constant s: for many examples I = d/2 ln(1 + 1/s^2)."""
    return torch.randn(n, d, generator=source(seed), dtype=torch.float64), torch.full((n, d), math.log(scale), dtype=torch.float64)


def brute_log_density(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    z, mean, log_scale = z.double(), mean.double(), log_scale.double()
    components = torch.distributions.Normal(mean, log_scale.exp())
    return torch.stack([components.log_prob(row).sum(-1) for row in z])


def brute_rate(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    pair = brute_log_density(z, mean, log_scale)
    return pair.diagonal() - pair.logsumexp(1) + math.log(len(mean))


def codes(mean: Tensor, log_scale: Tensor, seed: int) -> Tensor:
    """The codes that `marginal_rate` draws from this seed."""
    return mean.double() + log_scale.double().exp() * torch.randn(mean.shape, generator=source(seed), dtype=torch.float64)


def agree(value: float, truth: float, error: float, factor: float = 4.0) -> bool:
    return abs(value - truth) <= factor * error


def test_a_printed_rate_is_one_line():
    """Who prints a rate wants the figure with its error, not a number for every image."""
    found = marginal_rate(*encodings(40, 3, 0.3, 1.0, torch.float32), generator=source(1))
    assert repr(found) == f"MarginalRate(value={found.value!r}, standard_error={found.standard_error!r}, samples={found.samples})"


# ---- the exact mixture ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("scale", "spread"), [(1.0, 1.0), (0.3, 1.0), (0.05, 1.0), (1e-4, 1.0), (1.0, 30.0), (0.1, 30.0), (1e-2, 30.0), (1e-4, 30.0)]
)
def test_the_rate_is_that_of_brute_force(scale: float, spread: float, dtype: torch.dtype):
    """Small scales far from the origin are where the product form cancels; neighbours one scale apart are where that would show."""
    mean, log_scale = encodings(700, 5, scale, spread, dtype)
    mean[1::2] = mean[::2] + scale * torch.randn(350, 5, generator=source(5), dtype=torch.float64).to(dtype)
    log_scale[3::4] = log_scale[2::4]
    found = marginal_rate(mean, log_scale, generator=source(1), tile=128)
    truth = brute_rate(codes(mean, log_scale, 1), mean, log_scale)
    torch.testing.assert_close(found.per_example, truth, rtol=0, atol=3e-6)
    assert found.value == pytest.approx(truth.mean().item(), abs=1e-6) and found.samples == 1
    assert found.standard_error == pytest.approx(truth.std().item() / math.sqrt(700), rel=1e-5)
    assert found.value <= math.log(700)


def test_without_refinement_small_scales_would_be_wrong(monkeypatch: pytest.MonkeyPatch):
    """The case above is a hard one: the product alone fails it."""
    mean, log_scale = encodings(400, 5, 1e-5, 30.0, torch.float64)
    mean[1::2] = mean[::2] + 1e-5
    truth = brute_rate(codes(mean, log_scale, 1), mean, log_scale)
    assert (marginal_rate(mean, log_scale, generator=source(1), tile=100).per_example - truth).abs().max() < 1e-6
    monkeypatch.setattr(information, "ROUNDING_TOLERANCE", math.inf)
    assert (marginal_rate(mean, log_scale, generator=source(1), tile=100).per_example - truth).abs().max() > 1e-4


@pytest.mark.parametrize("tile", [7, 37, 256, 299, 300, 5000])
def test_the_rate_does_not_depend_on_the_tile(tile: int):
    mean, log_scale = encodings(300, 3, 0.2)
    whole = brute_rate(codes(mean, log_scale, 2), mean, log_scale)
    torch.testing.assert_close(marginal_rate(mean, log_scale, generator=source(2), tile=tile).per_example, whole, rtol=0, atol=1e-6)


def test_tiles_that_cannot_matter_are_skipped_and_others_are_not(monkeypatch: pytest.MonkeyPatch):
    mean, log_scale = encodings(1000, 2, 0.3)
    mean += 50 * (torch.arange(1000) % 5)[:, None]  # five far clusters, interleaved
    tiles: list[int] = []
    near = information._Components._near
    monkeypatch.setattr(information._Components, "_near", lambda *a: tiles.append(len(found := near(*a))) or found)
    found = marginal_rate(mean, log_scale, generator=source(1), tile=100)
    assert len(tiles) == 10 and sum(tiles) <= 50
    torch.testing.assert_close(found.per_example, brute_rate(codes(mean, log_scale, 1), mean, log_scale), rtol=0, atol=1e-6)


def test_codes_far_from_their_own_component_overflow_and_are_redone():
    """z ~ q(z|x) gives ratios above e^709 with probability e^-709; codes from elsewhere give them at once."""
    mean, log_scale = encodings(60, 3, 0.01, 1.0, torch.float64)
    z = mean.roll(1, 0)
    components = information._Components(mean, log_scale, 16)
    pair = brute_log_density(z, mean, log_scale)
    truth = pair.logsumexp(1) - pair.diagonal()
    assert truth.max() > 800
    torch.testing.assert_close(components.log_sum_of_ratios(z), truth, rtol=1e-12, atol=1e-9)


def test_gaussian_data_has_the_closed_rate():
    """I = d/2 ln(1 + 1/s^2) in the limit of many examples; finite N falls short by little here."""
    mean, log_scale = gaussian_data(4000, 2, 0.7)
    found = marginal_rate(mean, log_scale, samples=4, generator=source(1))
    assert agree(found.value, math.log1p(1 / 0.49), found.standard_error)
    assert found.standard_error < 0.02


def test_more_samples_reduce_the_noise_of_codes():
    mean, log_scale = gaussian_data(500, 2, 0.5)
    several = marginal_rate(mean, log_scale, samples=16, generator=source(1))
    each = [marginal_rate(mean, log_scale, generator=source(100 + s)) for s in range(16)]
    assert several.samples == 16
    assert several.standard_error < each[0].standard_error  # the spread of the examples is left
    spread = np.std([one.value for one in each]) / 4
    assert agree(several.value, float(np.mean([one.value for one in each])), math.sqrt(2) * spread)


def test_the_generator_decides_the_codes():
    mean, log_scale = encodings(50, 2, 0.3)
    a, b, c = (marginal_rate(mean, log_scale, generator=source(s)).value for s in (1, 1, 2))
    assert a == b != c


def test_separate_encodings_carry_ln_n_and_equal_ones_nothing():
    mean, log_scale = encodings(64, 3, 1e-3, 10.0)
    assert marginal_rate(mean, log_scale).value == math.log(64)
    assert marginal_rate(torch.ones(64, 3), torch.zeros(64, 3)).value == pytest.approx(0, abs=1e-12)
    assert marginal_rate(mean[::2].repeat(2, 1), log_scale[::2].repeat(2, 1)).value == pytest.approx(math.log(32), abs=1e-12)
    assert marginal_rate(mean[:1], log_scale[:1]).value == 0
    assert math.isinf(marginal_rate(mean[:1], log_scale[:1]).standard_error)


# ---- densities and minibatches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pairwise_densities_are_those_of_torch(offset: float):
    mean, log_scale = encodings(7, 4, 0.1, 1.0, torch.float64)
    z = mean[:5] + 0.1
    torch.testing.assert_close(
        pairwise_log_density(z + offset, mean + offset, log_scale), brute_log_density(z, mean, log_scale), rtol=1e-7, atol=1e-6
    )
    assert pairwise_log_density(z.float(), mean.float(), log_scale.float()).dtype == torch.float32
    assert pairwise_log_density(z.bfloat16(), mean.bfloat16(), log_scale.bfloat16()).dtype == torch.float32
    stacked = pairwise_log_density(torch.stack([z, z + 1]), mean, log_scale)
    assert stacked.shape == (2, 5, 7)
    torch.testing.assert_close(stacked[1], brute_log_density(z + 1, mean, log_scale))


def test_float32_encodings_keep_their_digits():
    """Terms of z^2/s^2 = 1e8 cancel to numbers of order 10: float32 products would leave an error of several nats."""
    mean, log_scale = encodings(50, 16, 1e-3, 10.0)
    z = codes(mean, log_scale, 1).float()
    found = pairwise_log_density(z, mean, log_scale).diagonal()
    torch.testing.assert_close(found.double(), brute_log_density(z, mean, log_scale).diagonal(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("estimator", information.ESTIMATORS)
def test_batch_rates_are_their_formulas(estimator):
    mean, log_scale = encodings(9, 3, 0.5, dtype=torch.float64)
    z = codes(mean, log_scale, 1)
    density = brute_log_density(z, mean, log_scale).exp()
    own, others = density.diagonal(), density.sum(1) - density.diagonal()
    marginal = {"mixture": (own + others) / 9, "leave-one-out": others / 8, "stratified": own / 100 + 99 / 100 * others / 8}[estimator]
    found = batch_rate(z, mean, log_scale, estimator, population=100)
    torch.testing.assert_close(found, (own / marginal).log())
    assert batch_rate(z.float(), mean.float(), log_scale.float(), estimator, 100).dtype == torch.float32
    stack = [torch.stack([t, t.flip(0) * 0.5]) for t in (z, mean, log_scale)]
    stacked = batch_rate(*stack, estimator, 100)
    assert stacked.shape == (2, 9)
    torch.testing.assert_close(stacked[0], found)
    torch.testing.assert_close(stacked[1], batch_rate(*(t[1] for t in stack), estimator, 100))


@pytest.mark.parametrize("estimator", information.ESTIMATORS)
def test_gradients_of_batch_rates(estimator):
    mean, log_scale = (t.requires_grad_() for t in encodings(5, 2, 0.6, dtype=torch.float64))
    noise = torch.randn(5, 2, generator=source(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, s: batch_rate(m + s.exp() * noise, m, s, estimator, 50), (mean, log_scale))
    z = (mean + 0.1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: pairwise_log_density(*a), (z, mean, log_scale))
    single = [t.detach().float().requires_grad_() for t in (mean, log_scale)]
    batch_rate(single[0] + single[1].exp() * noise.float(), *single, estimator, 50).sum().backward()
    batch_rate(mean + log_scale.exp() * noise, mean, log_scale, estimator, 50).sum().backward()
    torch.testing.assert_close(single[0].grad, mean.grad.float(), rtol=1e-4, atol=1e-4)


def test_gradients_stay_finite_where_components_do_not_meet():
    for estimator in information.ESTIMATORS:
        mean, log_scale = (t.requires_grad_() for t in encodings(8, 4, 1e-4, 30.0))
        z = mean + log_scale.exp() * torch.randn(8, 4, generator=source(1))
        value = batch_rate(z, mean, log_scale, estimator, 1000)
        value.sum().backward()
        assert value.isfinite().all() and mean.grad.isfinite().all() and log_scale.grad.isfinite().all()


def batch_averages(mean: Tensor, log_scale: Tensor, size: int, batches: int) -> dict[str, tuple[float, float]]:
    """Mean and standard error of each estimator over batches of distinct examples."""
    g, n = source(11), len(mean)
    rows = torch.stack([torch.randperm(n, generator=g)[:size] for _ in range(batches)])
    m, s = mean[rows], log_scale[rows]
    z = m + s.exp() * torch.randn(m.shape, generator=g, dtype=m.dtype)
    found = {}
    for estimator in information.ESTIMATORS:
        value = batch_rate(z, m, s, estimator, n).mean(1)
        found[estimator] = (value.mean().item(), value.std().item() / math.sqrt(batches))
    return found


def test_estimators_are_biased_the_way_they_say():
    """mixture < the N examples' rate < stratified < leave-one-out, each gap many standard errors wide."""
    mean, log_scale = gaussian_data(400, 3, 0.3)
    exact = marginal_rate(mean, log_scale, samples=64, generator=source(1))
    noise = 0.01  # of the codes alone: the examples are the same ones
    found = batch_averages(mean, log_scale, 16, 3000)
    for low, high in (
        (found["mixture"], (exact.value, noise)),
        ((exact.value, noise), found["stratified"]),
        (found["stratified"], found["leave-one-out"]),
    ):
        assert high[0] - low[0] > 4 * math.hypot(low[1], high[1])
    assert found["mixture"][0] <= math.log(16) and found["stratified"][0] <= math.log(400) < found["leave-one-out"][0]


def test_the_stratified_marginal_is_unbiased():
    """E qhat(z) = q(z) for the law of the N examples: over all batches of two, exactly."""
    mean, log_scale = encodings(6, 2, 0.5, dtype=torch.float64)
    z = codes(mean, log_scale, 1)
    density = brute_log_density(z, mean, log_scale).exp()
    for i in range(6):
        estimates = []
        for j in set(range(6)) - {i}:
            pair = torch.tensor([i, j])
            rate = batch_rate(z[pair], mean[pair], log_scale[pair], "stratified", 6)[0]
            estimates.append(density[i, i] * (-rate).exp())
        torch.testing.assert_close(torch.stack(estimates).mean(), density[i].mean())


def test_a_batch_as_large_as_the_data_is_exact():
    """Mixture and stratified of all N examples are the exact empirical rate."""
    mean, log_scale = gaussian_data(300, 2, 0.4)
    z = codes(mean, log_scale, 3)
    exact = marginal_rate(mean, log_scale, generator=source(3)).per_example
    torch.testing.assert_close(batch_rate(z, mean, log_scale, "mixture"), exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(batch_rate(z, mean, log_scale, "stratified", 300), exact, rtol=0, atol=1e-9)


def test_ceilings_hold_to_the_last_digit():
    mean, log_scale = encodings(8, 6, 1e-3, 10.0)
    z = codes(mean, log_scale, 1).float()
    assert batch_rate(z, mean, log_scale, "mixture").max() <= math.log(8) + 1e-6
    assert batch_rate(z, mean, log_scale, "stratified", 1000).max() <= math.log(1000) + 1e-6


def test_leave_one_out_of_a_small_batch_is_far_too_high():
    """B = 8 for a truth of 3.0: tens of nats."""
    scale = 1 / math.sqrt(math.exp(2 * 3.0 / 4) - 1)  # four dimensions, 3 nats together
    mean, log_scale = gaussian_data(20000, 4, scale)
    found = batch_averages(mean, log_scale, 8, 400)
    assert found["leave-one-out"][0] > 4.5 and found["mixture"][0] < math.log(8) < 3.0


# ---- the split, critics, neighbours -------------------------------------------------------------------------------------------------------------


def prior_rate(mean: Tensor, log_scale: Tensor) -> Tensor:
    return (0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale).sum(1)


def test_prior_rate_splits_into_information_and_mismatch():
    """q(z) = N(1, 1 + s^2) for m = x + 1: KL[q||p] is closed."""
    mean, log_scale = gaussian_data(3000, 1, 0.8)
    mean = mean + 1
    split = rate_split(prior_rate(mean, log_scale), marginal_rate(mean, log_scale, samples=4, generator=source(1)))
    variance = 1 + 0.64
    assert agree(split.mismatch.value, 0.5 * (1 + variance - 1 - math.log(variance)), split.mismatch.standard_error)
    assert split.prior.value == pytest.approx(split.marginal.value + split.mismatch.value)
    paired = (prior_rate(mean, log_scale) - marginal_rate(mean, log_scale, samples=4, generator=source(1)).per_example).std() / math.sqrt(3000)
    assert split.mismatch.standard_error == pytest.approx(paired.item(), rel=1e-6)
    with pytest.raises(UsageError, match="same examples"):
        rate_split(torch.zeros(2999), marginal_rate(mean, log_scale, generator=source(1)))


def test_infonce_with_the_true_density_is_the_mixture_bound():
    mean, log_scale = encodings(60, 3, 0.4, dtype=torch.float64)
    z = codes(mean, log_scale, 1)
    scores = pairwise_log_density(z, mean, log_scale).T  # rows x, columns z
    mixture = batch_rate(z, mean, log_scale, "mixture").mean().item()
    assert infonce(scores).value == pytest.approx(mixture, abs=1e-9)
    assert infonce(scores + torch.randn(60, generator=source(2))).value == pytest.approx(mixture, abs=1e-9)  # any function of z
    assert infonce(scores.T).value != pytest.approx(mixture, abs=1e-2)


def test_infonce_is_at_most_ln_b_and_any_critic_is_below_the_truth():
    assert infonce(1e6 * torch.eye(16)).value == math.log(16) and infonce(1e6 * torch.eye(16)).standard_error == 0
    assert infonce(torch.zeros(16, 16)).value == pytest.approx(0, abs=1e-9)
    assert infonce(torch.randn(64, 64, generator=source(1))).value < 0.1


def test_the_standard_error_of_infonce_is_its_spread():
    """Shared negatives and all: over 400 independent held-out sets."""
    values, errors = [], []
    for seed in range(400):
        mean, log_scale = gaussian_data(40, 1, 0.5, seed)
        estimate = infonce(pairwise_log_density(codes(mean, log_scale, seed + 10_000), mean, log_scale).T)
        values.append(estimate.value)
        errors.append(estimate.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)
    assert np.mean(values) < 0.5 * math.log(5) + 4 * np.std(values) / 20


def test_the_jackknife_is_that_of_leaving_pairs_out():
    scores = torch.randn(7, 7, generator=source(1), dtype=torch.float64)
    kept = [[i for i in range(7) if i != k] for k in range(7)]
    left_out = [infonce(scores[rows][:, rows]).value for rows in kept]
    assert infonce(scores).standard_error == pytest.approx(math.sqrt(6 * np.var(left_out)), rel=1e-9)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 0.9])
def test_neighbours_find_the_information_of_correlated_normals(correlation: float):
    x, noise = torch.randn(2, 3000, generator=source(1), dtype=torch.float64)
    found = ksg_information(x, correlation * x + math.sqrt(1 - correlation**2) * noise)
    assert agree(found.value, -0.5 * math.log(1 - correlation**2), found.standard_error)
    assert found.standard_error < 0.03
    with pytest.raises(UsageError, match="k = 0"):
        ksg_information(x, noise, k=0)


def test_neighbours_are_counted_as_the_paper_counts_them():
    """Strictly nearer than the k-th neighbour of the joint space, which itself is therefore not counted on the side that decided."""
    from scipy.special import digamma

    x, z = torch.randn(2, 60, 1, generator=source(1), dtype=torch.float64).numpy()
    dx, dz = np.abs(x - x.T), np.abs(z - z.T)
    terms = []
    for i in range(60):
        radius = np.sort(np.maximum(dx[i], dz[i]))[3]
        terms.append(digamma(3) + digamma(60) - digamma((dx[i] < radius).sum()) - digamma((dz[i] < radius).sum()))  # the point itself makes n + 1
    assert ksg_information(torch.from_numpy(x), torch.from_numpy(z)).value == pytest.approx(np.mean(terms), abs=1e-12)


def test_active_units_are_counted_by_the_variance_of_the_locations():
    mean = torch.randn(5000, 4, generator=source(1)) * torch.tensor([1.0, 0.2, 0.05, 0.0]) + 100
    assert active_units(mean) == 2 and active_units(mean, 0.5) == 1 and active_units(mean[:1]) == 0


# ---- importance sampling ----------------------------------------------------------------------------------------------------------------------


class LinearGaussian:
    """x = W z + b + sigma * noise, z ~ N(0, I): log p(x) = log N(x; b, W W' + sigma^2 I), and the posterior is a normal one."""

    def __init__(self, n: int = 40):
        g = source(4)
        self.sigma = 0.5
        self.w = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.5]], dtype=torch.float64)  # orthogonal columns: a diagonal posterior
        self.b = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
        z = torch.randn(n, 2, generator=g, dtype=torch.float64)
        self.x = z @ self.w.T + self.b + self.sigma * torch.randn(n, 3, generator=g, dtype=torch.float64)
        covariance = self.w @ self.w.T + self.sigma**2 * torch.eye(3, dtype=torch.float64)
        self.truth = torch.distributions.MultivariateNormal(self.b, covariance).log_prob(self.x)
        precision = 1 + self.w.square().sum(0) / self.sigma**2
        self.mean = (self.x - self.b) @ self.w / self.sigma**2 / precision
        self.log_scale = (-0.5 * precision.log()).expand_as(self.mean)
        self.calls: list[int] = []

    def log_likelihood(self, z: Tensor) -> Tensor:
        self.calls.append(z.shape[0])
        return torch.distributions.Normal(z @ self.w.T + self.b, self.sigma).log_prob(self.x).sum(-1)


def test_the_posterior_as_proposal_is_exact_with_one_sample():
    """Sign and constants at once. (pythae's get_nll returns the wrong sign.)"""
    model = LinearGaussian()
    found = importance_log_likelihood(model.log_likelihood, model.mean, model.log_scale, samples=1)
    torch.testing.assert_close(found.per_example, model.truth)
    assert found.value == pytest.approx(model.truth.mean().item()) and found.value < 0
    assert found.standard_error == pytest.approx(model.truth.std().item() / math.sqrt(40))
    many = importance_log_likelihood(model.log_likelihood, model.mean, model.log_scale, samples=7, chunk=3)
    torch.testing.assert_close(many.effective_sample_size, torch.full((40,), 7.0, dtype=torch.float64))


def test_another_proposal_reaches_the_truth_within_its_error_and_rises_with_samples():
    """More weight means a larger one of the weights counts more, not less. (PyTorch-VAE weights by softmax of +loss, the wrong way round.)"""
    model = LinearGaussian()
    mean, log_scale = model.mean + 0.2, model.log_scale + 0.3
    g = source(5)
    found = {k: importance_log_likelihood(model.log_likelihood, mean, log_scale, samples=k, generator=g, chunk=1000) for k in (1, 10, 20_000)}
    assert found[1].value < found[10].value - 0.05 < model.truth.mean().item() - 0.05
    error = (1 / found[20_000].effective_sample_size - 1 / 20_000).sqrt()  # of each log-mean, by the delta method
    assert ((found[20_000].per_example - model.truth) / error).abs().max() < 4.5
    assert agree(found[20_000].value, model.truth.mean().item(), (error.square().sum().sqrt() / 40).item())
    assert (found[20_000].effective_sample_size > 1000).all() and (found[20_000].effective_sample_size < 20_000).all()


@pytest.mark.parametrize(("samples", "chunk", "calls"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 50, [2]), (1, 1, [1])])
def test_exactly_so_many_samples_are_used(samples: int, chunk: int, calls: list[int]):
    """pythae drops the remainder of the division and divides by another count."""
    model = LinearGaussian(5)
    found = importance_log_likelihood(model.log_likelihood, model.mean, model.log_scale, samples=samples, chunk=chunk)
    assert model.calls == calls and found.samples == samples
    torch.testing.assert_close(found.per_example, model.truth)  # equal weights: a wrong count would shift the value


def test_chunks_do_not_change_the_value():
    model = LinearGaussian(5)
    a, b = (
        importance_log_likelihood(model.log_likelihood, model.mean + 0.3, model.log_scale, samples=64, chunk=chunk, generator=source(1))
        for chunk in (64, 16)
    )
    torch.testing.assert_close(a.per_example, b.per_example)


def test_a_vanishing_likelihood_does_not_stop_the_sum():
    model = LinearGaussian(5)
    found = importance_log_likelihood(lambda z: model.log_likelihood(z) - 1e5, model.mean, model.log_scale, samples=4)
    torch.testing.assert_close(found.per_example, model.truth - 1e5)


# ---- certificates -------------------------------------------------------------------------------------------------------------------------------


def check_json(certificate: information.RateCertificate) -> dict:
    record = certificate.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    low, high = certificate.interval
    assert 0 <= low <= high <= certificate.ln_n
    return record


def test_a_gaussian_certificate_holds_the_truth():
    mean, log_scale = gaussian_data(2000, 2, 0.5)
    truth = math.log(5)
    certificate = gaussian_certificate(mean, log_scale, prior_rate=prior_rate(mean, log_scale), generator=source(1))
    assert certificate.formula_name == "E KL[q(z|x)||p(z)]" and not certificate.statements
    names = {bound.name: bound for bound in certificate.bounds}
    assert set(names) == {"mixture of a batch", "leave-one-out of a batch", "exact mixture", "fitted Gaussian"}
    for bound in certificate.bounds:
        sign = 1 if bound.kind == "lower" else -1
        assert sign * (bound.value - truth) < 4 * bound.standard_error
    assert agree(names["fitted Gaussian"].value, truth, names["fitted Gaussian"].standard_error)  # q(z) is a Gaussian here
    top = min([certificate.formula.value, *(b.value for b in certificate.bounds if b.kind == "upper")])
    bottom = max(bound.value for bound in certificate.bounds if bound.kind == "lower")
    assert certificate.interval == (min(bottom, top), top)
    check_json(certificate)
    marginal = gaussian_certificate(mean, log_scale, generator=source(1))
    assert marginal.formula_name == "E KL[q(z|x)||q(z)]" and marginal.interval[1] <= marginal.formula.value
    assert marginal.distinct == 2000 and marginal.ln_n == math.log(2000)
    check_json(marginal)


def test_a_prior_rate_above_ln_n_is_of_the_population():
    mean, log_scale = gaussian_data(50, 4, 1e-3)
    certificate = gaussian_certificate(mean, log_scale, prior_rate=prior_rate(mean, log_scale), generator=source(1))
    assert certificate.interval[1] == math.log(50) and len(certificate.statements) == 1
    assert "speaks of the population, not of the channel fed with these 50 examples" in certificate.statements[0]


def test_contradicting_bounds_are_said_to_contradict():
    mean, log_scale = gaussian_data(300, 2, 1.0)
    false = Bound(3.0, 0.01, "lower", "a leaking critic")
    certificate = gaussian_certificate(mean, log_scale, extra=[false], generator=source(1))
    assert any("'a leaking critic' = 3 is more than three standard errors above" in sentence for sentence in certificate.statements)
    check_json(certificate)
    assert not gaussian_certificate(mean, log_scale, extra=[Bound(3.0, 5.0, "lower", "a noisy critic")], generator=source(1)).statements


def test_the_fitted_bound_is_the_rate_of_the_population_for_gaussians():
    train, test = gaussian_data(20_000, 3, 0.5), gaussian_data(5000, 3, 0.5, seed=1)
    bound = fitted_upper_bound(*train, *test)
    assert bound.kind == "upper" and agree(bound.value, 1.5 * math.log(5), bound.standard_error)
    wide = fitted_upper_bound(*gaussian_data(20_000, 3, 1.5), *gaussian_data(5000, 3, 1.5, seed=1))
    assert agree(wide.value, 1.5 * math.log1p(1 / 2.25), wide.standard_error)  # the noise's own variance is part of r's
    two_clusters = (train[0] + 10 * (torch.arange(20_000) % 2)[:, None], train[1]), (test[0] + 10 * (torch.arange(5000) % 2)[:, None], test[1])
    loose = fitted_upper_bound(*two_clusters[0], *two_clusters[1])
    assert loose.value > 1.5 * math.log(5) + math.log(2) + 4 * loose.standard_error


def coin(s: float, n: int = 2) -> tuple[Tensor, Tensor]:
    x = (torch.arange(n) % 2)[:, None].double()
    return x * (1 - s), torch.full((n, 1), math.log(s), dtype=torch.float64)


def echo(mean: Tensor, log_scale: Tensor, rows: int, terms: int = 400, seed: int = 0) -> Tensor:
    """Codes by the recursion itself, fresh examples at every level, shared by all dimensions."""
    g, z = source(seed), torch.zeros(rows, mean.shape[1], dtype=mean.dtype)
    for _ in range(terms):
        pick = torch.randint(len(mean), (rows,), generator=g)
        z = mean[pick] + log_scale[pick].exp() * z
    return z


@pytest.mark.parametrize(("s", "formula"), [(1 / 3, math.log(3)), (0.2, 1.609)])
@pytest.mark.parametrize("n", [2, 1000])
def test_a_coin_carries_one_bit_whatever_the_formula_says(s: float, formula: float, n: int):
    certificate = echo_certificate(*coin(s, n), clip=0.99)
    assert certificate.formula.value == pytest.approx(formula, abs=1e-3)
    assert certificate.distinct == 2 and certificate.interval == (0.0, math.log(2))
    assert len(certificate.statements) == 1 and "not of the channel fed with these 2 examples" in certificate.statements[0]
    assert "I(x;z) <= -E ln|det S|" in certificate.theorem and "min(formula, ln N)" in certificate.theorem
    check_json(certificate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_identical_dimensions_are_flagged(dtype: torch.dtype):
    """0.211 nats by the formula, 0.105 in truth; below ln N, so only the rank tells."""
    x = torch.rand(2000, 1, generator=source(1), dtype=dtype) * 2 - 1
    mean, log_scale = x.repeat(1, 2), torch.full((2000, 2), math.log(0.9), dtype=dtype)
    z = echo(mean, log_scale, 500)
    for certificate in (echo_certificate(mean, log_scale, z, clip=0.99), echo_certificate(mean, log_scale, clip=0.99)):
        assert certificate.formula.value == pytest.approx(0.211, abs=1e-3)
        assert len(certificate.statements) == 1 and "singular" in certificate.statements[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_affine_copies_are_flagged_and_correlated_or_constant_dimensions_are_not(dtype: torch.dtype):
    x = torch.rand(3000, 3, generator=source(1), dtype=dtype) * 2 - 1
    half = torch.full((3000, 3), math.log(0.8), dtype=dtype)
    affine = torch.stack([x[:, 0], x[:, 1], 3 * x[:, 0] - 2 * x[:, 1] + 5], 1)
    for codes_of in (echo(affine, half, 500), None):
        assert "1 dimension of the " in echo_certificate(affine, half, codes_of, clip=0.99).statements[0]
    correlated = torch.stack([x[:, 0], x[:, 0] + 0.01 * x[:, 1], x[:, 2]], 1)
    constant = torch.cat([x[:, :1], torch.full((3000, 2), 0.7, dtype=dtype)], 1)
    still = torch.cat([half[:, :1], torch.full((3000, 2), 5.0, dtype=dtype)], 1)  # at the clip
    other_scale = x[:, :1].repeat(1, 3)
    scales = half + torch.tensor([0.0, 0.1, -0.1], dtype=dtype)  # equal locations, unequal memories: no affine copy
    for mean, log_scale in ((x, half), (correlated, half), (constant, still), (other_scale, scales)):
        z = echo(mean, log_scale.clamp(max=math.log(0.99)), 500)
        assert echo_certificate(mean, log_scale, z, clip=0.99).statements == ()
        assert echo_certificate(mean, log_scale, clip=0.99).statements == ()


def test_copies_by_a_scale_that_varies_are_found_in_the_encodings():
    """z_2 = 2 z_1 + 3 needs m_2 = 2 m_1 + 3 (1 - s): no affine function of m_1 where s varies."""
    x = torch.rand(500, 1, generator=source(1), dtype=torch.float64) * 2 - 1
    s = 0.5 + 0.3 * x.square()
    tied = s.log().repeat(1, 2)
    assert (
        "1 dimension of the encodings is an affine function"
        in echo_certificate(torch.cat([x, 2 * x + 3 * (1 - s)], 1), tied, clip=0.99).statements[0]
    )
    assert echo_certificate(torch.cat([x, 2 * x + 3], 1), tied, clip=0.99).statements == ()


def test_a_collapsed_echo_encoder_carries_nothing_but_the_floor():
    mean, log_scale = torch.zeros(100, 4), torch.full((100, 4), 3.0)
    certificate = echo_certificate(mean, log_scale, mean, clip=0.99)
    assert certificate.interval == (0.0, 0.0) and len(certificate.statements) == 1 and "above ln 1 = 0" in certificate.statements[0]


def test_the_clip_enters_the_echo_formula():
    mean, log_scale = torch.randn(100, 4, generator=source(1)), torch.full((100, 4), 3.0)
    certificate = echo_certificate(mean, log_scale, clip=0.985)
    assert certificate.formula.value == pytest.approx(-4 * math.log(0.985)) and "floor" in certificate.bounds[0].note


def test_an_echo_certificate_of_a_continuous_law_holds_its_truth():
    """x ~ U(-1, 1), m = x, s = 0.5 + 0.3 x: I = 0.76104."""
    x = torch.rand(20_000, 1, generator=source(1), dtype=torch.float64) * 2 - 1
    lower = Bound(0.70, 0.02, "lower", "InfoNCE")
    certificate = echo_certificate(x, (0.5 + 0.3 * x).log(), echo(x, (0.5 + 0.3 * x).log(), 500), clip=0.99, lower=[lower])
    assert agree(certificate.formula.value, 0.76104, certificate.formula.standard_error)
    assert certificate.statements == () and certificate.interval == (0.70, certificate.formula.value)
    false = echo_certificate(x, (0.5 + 0.3 * x).log(), clip=0.99, lower=[Bound(0.9, 0.01, "lower", "InfoNCE")])
    assert "'InfoNCE' = 0.9 is more than three standard errors above" in false.statements[0]


def test_fewer_distinct_examples_can_be_declared():
    mean, log_scale = encodings(100, 2, 0.01)
    assert echo_certificate(mean, log_scale, clip=0.99, distinct=10).ln_n == math.log(10)
    assert gaussian_certificate(mean, log_scale, distinct=10, generator=source(1)).interval[1] == math.log(10)
    assert gaussian_certificate(mean, log_scale, distinct=1000, generator=source(1)).distinct == 100


def test_a_single_example_makes_a_certificate_without_infinities():
    record = check_json(gaussian_certificate(torch.zeros(1, 2), torch.zeros(1, 2)))
    assert record["formula"]["standard_error"] is None and record["interval"] == [0.0, 0.0]
    check_json(echo_certificate(torch.zeros(1, 2), torch.zeros(1, 2), clip=0.99))


# ---- what is refused ----------------------------------------------------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: marginal_rate(zeros(5, 2), zeros(5, 3)), r"mean \(5, 2\) and log_scale \(5, 3\)"),
        (lambda: marginal_rate(zeros(5, 2).long(), zeros(5, 2)), "floating point, not torch.int64"),
        (lambda: marginal_rate(zeros(2, 5, 2), zeros(2, 5, 2)), r"\(N, d\).*\(2, 5, 2\)"),
        (lambda: marginal_rate(zeros(0, 2), zeros(0, 2)), "no side of length 0"),
        (lambda: marginal_rate(zeros(5, 2) + math.nan, zeros(5, 2)), "must be finite"),
        (lambda: marginal_rate(zeros(5, 2), zeros(5, 2) - math.inf), r"within \+-300"),
        (lambda: marginal_rate(zeros(5, 2), zeros(5, 2), samples=0), "samples is 0"),
        (lambda: pairwise_log_density(zeros(5, 3), zeros(5, 2), zeros(5, 2)), r"the d = 2"),
        (lambda: pairwise_log_density(zeros(5, 2).long(), zeros(5, 2), zeros(5, 2)), "codes must be floating point"),
        (lambda: batch_rate(zeros(4, 2), zeros(5, 2), zeros(5, 2), "mixture"), "row i of z is a sample of row i"),
        (lambda: batch_rate(zeros(5, 2), zeros(5, 2), zeros(5, 2), "median"), "'median' is unknown: use 'mixture'"),
        (lambda: batch_rate(zeros(1, 2), zeros(1, 2), zeros(1, 2), "leave-one-out"), "at least two examples, not 1"),
        (lambda: batch_rate(zeros(5, 2), zeros(5, 2), zeros(5, 2), "stratified"), "needs population=N"),
        (lambda: batch_rate(zeros(5, 2), zeros(5, 2), zeros(5, 2), "stratified", 4), "at least the batch's 5 examples, not 4"),
        (lambda: infonce(zeros(5, 4)), r"square .* \(5, 4\)"),
        (lambda: infonce(zeros(5, 5) + math.nan), "not numbers"),
        (lambda: ksg_information(zeros(5), zeros(4)), "5 and 4 samples"),
        (lambda: active_units(zeros(5)), r"\(N, d\)"),
        (lambda: importance_log_likelihood(lambda z: z, zeros(5, 2), zeros(5, 2), samples=3), r"returned shape \(3, 5, 2\).*\(3, 5\) is needed"),
        (lambda: importance_log_likelihood(lambda z: z, zeros(5, 2), zeros(5, 2), samples=3, chunk=0), "chunk is 0"),
        (lambda: echo_certificate(zeros(5, 2), zeros(5, 2), clip=1.0), "clip is 1.0"),
        (lambda: echo_certificate(zeros(5, 2), zeros(5, 2), zeros(5, 3), clip=0.99), "the d = 2"),
        (lambda: gaussian_certificate(zeros(5, 2), zeros(5, 2), prior_rate=zeros(4)), r"must be \(5,\)"),
        (lambda: gaussian_certificate(zeros(5, 2), zeros(5, 2), distinct=0), "distinct is 0"),
        (lambda: fitted_upper_bound(zeros(5, 2), zeros(5, 2), zeros(5, 3), zeros(5, 3)), "the d = 2"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(call, message: str):
    with pytest.raises(UsageError, match=message):
        call()
