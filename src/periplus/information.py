"""Information: how many nats about x a code z carries, and what bounds each figure that says so.

Notation: an encoder gives each of N examples a location m_i and a diagonal scale s_i > 0, both of d dimensions; S_i = diag s_i^2. For a Gaussian
channel q(z|x_i) = N(m_i, S_i), and the marginal is a mixture of as many components as there are examples:

    q(z) = 1/N sum_j N(z; m_j, S_j)
    I(x;z) = 1/N sum_i E_{z ~ q(z|x_i)} [ log q(z|x_i) - log q(z) ]          the rate of rate-distortion theory
    E_x KL[q(z|x) || p(z)] = I(x;z) + KL[q(z) || p(z)]                       the VAE's rate: an upper bound on it

The mixture is why the marginal rate is hard: one density costs N components, the average N^2, every time the encoder moves, and no closed form
exists. `marginal_rate` evaluates it all the same, exactly for the law that puts 1/N on each example (never above ln N, the entropy of that law);
`batch_rate` estimates it from a minibatch, with a bias that its docstring states.

No figure stands alone: `gaussian_certificate` and `echo_certificate` put bounds from below and above, with standard errors, around the formula that
is reported, and say in plain sentences where they contradict each other.

All rates are in **nats per example**. Nothing here owns a network, an optimiser or a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from periplus.errors import UsageError

Estimator = Literal["mixture", "leave-one-out", "stratified"]
ESTIMATORS = ("mixture", "leave-one-out", "stratified")

LN_2PI = math.log(2 * math.pi)
#: A log-scale outside +- this has a variance that float64 cannot hold.
WIDEST_LOG_SCALE = 300.0


# ---- densities -------------------------------------------------------------------------------------------------------------------------------


def pairwise_log_density(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log N(z_i; m_j, S_j) for all pairs, in nats; differentiable in all three arguments.

    One matrix product of [z^2, z] with [-1/(2 s^2), m/s^2], plus a constant per component. Its terms are as large as z^2/s^2 and cancel, so it runs
    in float64 whatever the inputs are: for codes of size a and scales s the absolute error is about 1e-15 d (a/s)^2, where float32 would leave
    1e-6 d (a/s)^2. Codes are centred on the mean location first, which costs nothing and cures a common offset.

    Args:
        z: codes (..., B, d).
        mean, log_scale: components (..., M, d); log_scale = ln s. Leading dimensions broadcast against those of z.

    Returns:
        (..., B, M), in the inputs' type but at least float32.

    Raises:
        UsageError: shapes or types do not fit.
    """
    _check_encodings(mean, log_scale)
    _check_codes(z, mean)
    return _pairwise_float64(z, mean, log_scale).to(_at_least_float32(z, mean, log_scale))


def _pairwise_float64(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    centre = mean.detach().double().mean(-2, keepdim=True)
    z, mean, log_scale = z.double() - centre, mean.double() - centre, log_scale.double()
    precision = torch.exp(-2 * log_scale)
    scaled = mean * precision
    rows = torch.cat([z.square(), z], -1)
    columns = torch.cat([-0.5 * precision, scaled], -1)
    constant = -0.5 * (mean * scaled).sum(-1) - log_scale.sum(-1) - 0.5 * mean.shape[-1] * LN_2PI
    return rows @ columns.transpose(-1, -2) + constant[..., None, :]


def _own_log_density(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log N(z_i; m_i, S_i) (..., B), from the differences themselves, float64."""
    z, mean, log_scale = z.double(), mean.double(), log_scale.double()
    standard = (z - mean) * torch.exp(-log_scale)
    return -0.5 * standard.square().sum(-1) - log_scale.sum(-1) - 0.5 * mean.shape[-1] * LN_2PI


# ---- from a minibatch ------------------------------------------------------------------------------------------------------------------------


def batch_rate(z: Tensor, mean: Tensor, log_scale: Tensor, estimator: Estimator, population: int | None = None) -> Tensor:
    """Estimates of KL[q(z|x_i) || q(z)] from a minibatch that knows only its own B components; differentiable in all arguments.

    Each is log q(z_i|x_i) - log qhat_i(z_i), with one of three stand-ins for the marginal. Their biases, in expectation over batches and codes:

    * "mixture": qhat = 1/B sum_j q(z|x_j), own component included. The batch's average is then an unbiased estimate of the information under the
      law that puts 1/B on each of its examples; information is concave in the law of x, and the laws of batches average to the law they are drawn
      from, so it is a **lower bound** on I(x;z), of the population as of the N examples. No value exceeds ln B.
    * "leave-one-out": qhat = 1/(B-1) sum_{j != i} q(z|x_j). Unbiased for q(z) where the others are independent of x_i, so that -log qhat is too
      large by Jensen's inequality: an **upper bound**, without ceiling, and far above where components hardly overlap.
    * "stratified": qhat = 1/N q(z|x_i) + (N-1)/(N(B-1)) sum_{j != i} q(z|x_j), N = population (Chen et al. 2018, appendix C). Unbiased for the q(z)
      of the N examples when a batch holds *distinct* ones, drawn uniformly: by Jensen an **upper bound** on the rate of the N examples. No value
      exceeds ln N. The default choice of a training loss: its bias is the smaller and its ceiling is the true one.

    Args:
        z: (..., B, d), row i a sample of q(z|x_i).
        mean, log_scale: (..., B, d); leading dimensions are independent batches (the cells of a stacked program).
        estimator: "mixture", "leave-one-out" or "stratified".
        population: N, the number of examples that batches are drawn from; "stratified" needs it, the others ignore it.

    Returns:
        (..., B) in nats, in the inputs' type but at least float32. Time and memory O(B^2) beside the product of B^2 d.

    Raises:
        UsageError: an unknown estimator, shapes or types that do not fit, fewer than two rows where others are needed, or no population >= B.
    """
    _check_encodings(mean, log_scale)
    if z.shape != mean.shape:
        raise UsageError(f"codes {tuple(z.shape)} and encodings {tuple(mean.shape)} must have the same shape: row i of z is a sample of row i")
    batch = mean.shape[-2]
    own, other = _log_weights(estimator, batch, population)
    # Relative to the own component, which is then exactly 0: no maximum is needed, the ceilings hold to the last digit, and float32 is enough after.
    ratio = _pairwise_float64(z, mean, log_scale) - _own_log_density(z, mean, log_scale)[..., None]
    ratio = ratio.to(_at_least_float32(z, mean, log_scale))
    diagonal = torch.eye(batch, dtype=torch.bool, device=z.device)
    return -torch.logsumexp(torch.where(diagonal, own, ratio + other), -1)


def _log_weights(estimator: str, batch: int, population: int | None) -> tuple[float, float]:
    """ln of the weights of the own component and of each other one."""
    if estimator not in ESTIMATORS:
        raise UsageError(f"estimator '{estimator}' is unknown: use {', '.join(repr(name) for name in ESTIMATORS)}")
    if estimator == "mixture":
        return -math.log(batch), -math.log(batch)
    if batch < 2:
        raise UsageError(f"estimator '{estimator}' needs a batch of at least two examples, not {batch}")
    if estimator == "leave-one-out":
        return -math.inf, -math.log(batch - 1)
    if population is None or population < batch:
        raise UsageError(f"estimator 'stratified' needs population=N, at least the batch's {batch} examples, not {population}")
    return -math.log(population), math.log(population - 1) - math.log(population) - math.log(batch - 1)


# ---- from all N components -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MarginalRate:
    """I(x;z) of a Gaussian channel fed with N equally likely examples, in nats.

    value: the mean over examples. standard_error: of it, over examples (it holds both the noise of z and the spread of the examples, so it serves for
    the population as well). per_example: (N,) float64, each the mean of `samples` codes.
    """

    value: float
    standard_error: float
    per_example: Tensor = field(repr=False)
    samples: int


#: Rows and columns of a tile: 8 MB of float64, small beside a shared cache, large beside the cost of a call.
TILE = 1024
#: What rounding, and what skipped tiles, may each change in a row's sum of density ratios, which is at least 1.
ROUNDING_TOLERANCE = 1e-6
SKIPPED_TOLERANCE = 1e-9


@torch.no_grad()
def marginal_rate(mean: Tensor, log_scale: Tensor, *, samples: int = 1, generator: torch.Generator | None = None, tile: int = TILE) -> MarginalRate:
    """I(x;z) of the channel z ~ N(m_i, diag s_i^2) against the exact mixture q(z) = 1/N sum_j N(z; m_j, S_j), in nats.

    Exact for the law that puts 1/N on each example (up to the Monte Carlo noise of z, whose size is reported), hence at most ln N; a lower bound in
    expectation on the rate of the population that the examples came from. Identical encodings share one component's worth of information: N
    repeated examples are fewer distinct ones.

    How it is fast: everything is relative to the row's own component, whose density ratio is exactly 1. So no pass for a maximum is needed
    (E exp(l_ij - l_ii) = 1 for z ~ q(z|x_i), so by Markov's inequality a ratio that overflows float64 has probability below e^-709; what underflows
    does not matter beside 1), and a tile is one matrix product into a buffer, one exponential in place and one sum. Constants, shifts and the factor
    that makes them bits are columns of the product. Components are ordered by repeated halving, and tiles too far apart to matter are skipped.

    How it is accurate: float64 throughout (on CPUs float32 needs more care than it saves time). The product still cancels, by about
    4e-15 d (a/s)^2 for codes of size a: where that bound times a row's sum over a tile could change the result by 1e-6, the row's differences with
    that tile are taken directly.

    Args:
        mean, log_scale: encodings (N, d) of all N examples, finite; log_scale = ln s.
        samples: codes drawn per example.
        generator: source of the codes (drawn in float64 on its device); torch's default one if None.
        tile: rows and columns evaluated at once; the result does not depend on it beyond rounding.

    Returns:
        MarginalRate. Memory O(N d + tile^2); time O(samples N^2 d).

    Raises:
        UsageError: shapes or types do not fit, values are not finite, or samples or tile are below 1.
    """
    _check_encodings(mean, log_scale, matrix=True)
    _check_finite(mean, log_scale)
    if samples < 1 or tile < 1:
        raise UsageError(f"samples is {samples} and tile is {tile}: both must be at least 1")
    mean, log_scale = mean.double(), log_scale.double()
    order = _spatial_order(mean, log_scale, tile)
    components = _Components(mean[order], log_scale[order], tile)
    log_sums = torch.zeros(len(mean), dtype=torch.float64, device=mean.device)
    for _ in range(samples):
        noise = _normal(mean.shape, generator, mean.device)
        log_sums[order] += components.log_sum_of_ratios((mean + log_scale.exp() * noise)[order])
    per_example = math.log(len(mean)) - log_sums / samples
    return MarginalRate(*_mean_and_error(per_example), per_example, samples)


class _Components:
    """N Gaussian components cut into tiles, prepared for products with codes."""

    def __init__(self, mean: Tensor, log_scale: Tensor, tile: int):
        self.mean, self.log_scale, self.tile = mean, log_scale, tile
        self.precision = torch.exp(-2 * log_scale)
        self.centre = mean.mean(0)
        centred = mean - self.centre
        scaled = centred * self.precision
        # The factor -1/2 and the (2 pi)^(d/2) that all densities share are left to the rows and out, respectively.
        constant = -0.5 * (centred * scaled).sum(1) - log_scale.sum(1)
        self.columns = torch.cat([-0.5 * self.precision, scaled, torch.ones_like(constant)[:, None], constant[:, None]], 1)
        tiles = self.columns.split(tile)
        self.largest = torch.stack([block.abs().amax(0) for block in tiles], 1)  # (2d + 2, tiles)
        self.low = torch.stack([block.amin(0) for block in mean.split(tile)])  # (tiles, d), as those below
        self.high = torch.stack([block.amax(0) for block in mean.split(tile)])
        self.widest = torch.stack([block.amax(0) for block in log_scale.split(tile)]).exp()
        # The largest of the tile's peak densities, as its log
        self.peak = torch.stack([(-block.sum(1)).amax() for block in log_scale.split(tile)])

    def log_sum_of_ratios(self, z: Tensor) -> Tensor:
        """ln sum_j N(z_i; m_j, S_j) / N(z_i; m_i, S_i) for codes z (N, d), row i a sample of component i; (N,), at least 0."""
        own = -0.5 * ((z - self.mean) * (-self.log_scale).exp()).square().sum(1) - self.log_scale.sum(1)
        starts = range(0, len(z), self.tile)
        buffer = z.new_empty(min(self.tile, len(z)) ** 2)
        return torch.cat([self._rows(z[start : start + self.tile], own[start : start + self.tile], start, buffer) for start in starts])

    def _rows(self, z: Tensor, own: Tensor, start: int, buffer: Tensor) -> Tensor:
        """The same for the rows of one tile, the first of which is row `start`."""
        centred = z - self.centre
        # In bits: exp2 takes the same time everywhere, while the exp of some CPU libraries is a hundred times slower where it underflows.
        rows = torch.cat([centred.square(), centred, -own[:, None], torch.ones_like(own)[:, None]], 1) / math.log(2)
        # |computed - exact| <= (terms + a few) * 2^-53 * sum of the terms' magnitudes, here a bound for each row and tile of columns
        error = (rows.shape[1] + 6) * 2.0**-53 * (rows.abs() @ self.largest)
        others = torch.zeros_like(own)
        for number in self._near(z, own):
            first = number * self.tile
            columns = self.columns[first : first + self.tile]
            ratios = torch.mm(rows, columns.T, out=buffer[: len(rows) * len(columns)].view(len(rows), len(columns))).exp2_()
            if first == start:
                ratios.fill_diagonal_(0.0)  # the own ratio is exactly 1, and is added below
            total = ratios.sum(1)
            bound = error[:, number]
            doubtful = ((bound > 600) | ~(total * bound * bound.clamp(max=600).exp() <= ROUNDING_TOLERANCE * (1 + total))).nonzero()[:, 0]
            if len(doubtful):
                total[doubtful] = self._direct(z, own, doubtful, start, first).exp()
            others += total
        overflown = (~others.isfinite()).nonzero()[:, 0]
        result = torch.log1p(others)
        if len(overflown):
            parts = [self._direct(z, own, overflown, start, first) for first in range(0, len(self.mean), self.tile)]
            result[overflown] = torch.logaddexp(torch.stack(parts).logsumexp(0), torch.zeros_like(parts[0]))
        return result

    def _near(self, z: Tensor, own: Tensor) -> list[int]:
        """Numbers of the tiles whose densities at any of these codes could matter beside the rows' own ones."""
        gap = torch.maximum(self.low - z.amax(0), z.amin(0) - self.high).clamp(min=0)
        highest_ratio = self.peak - 0.5 * (gap / self.widest).square().sum(1) - own.amin()
        return (highest_ratio > math.log(SKIPPED_TOLERANCE / len(self.mean))).nonzero()[:, 0].tolist()

    def _direct(self, z: Tensor, own: Tensor, rows: Tensor, start: int, first: int) -> Tensor:
        """ln of the sum of ratios, the own one left out, for some rows and one tile of columns, from the differences themselves."""
        mean, log_scale = self.mean[first : first + self.tile], self.log_scale[first : first + self.tile]
        index = torch.arange(first, first + len(mean), device=z.device)
        found = []
        for few in rows.split(max(1, 2**20 // mean.numel())):  # 8 MB of differences at a time
            log_ratio = -0.5 * ((z[few, None] - mean) * (-log_scale).exp()).square().sum(2) - log_scale.sum(1) - own[few, None]
            found.append(log_ratio.masked_fill(index == few[:, None] + start, -math.inf).logsumexp(1))
        return torch.cat(found)


def _spatial_order(mean: Tensor, log_scale: Tensor, tile: int) -> Tensor:
    """A permutation (N,) after which each tile's locations lie in a small box: repeated halving along the dimension that is widest in units of s."""
    position = mean * torch.exp(-log_scale.mean(0))
    done, open_ = [], [torch.arange(len(mean), device=mean.device)]
    while open_:
        rows = open_.pop()
        tiles = -(-len(rows) // tile)
        if tiles <= 1:
            done.append(rows)
            continue
        here = position[rows]
        rows = rows[here[:, (here.amax(0) - here.amin(0)).argmax()].argsort()]
        middle = tiles // 2 * tile  # whole tiles on the first side, so that only the last of all can be smaller
        open_ += [rows[middle:], rows[:middle]]
    return torch.cat(done)


def _normal(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source, dtype=torch.float64).to(device)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (N,) values and its standard error; the error of a single value is infinite."""
    count = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(count) if count > 1 else math.inf


# ---- codes ---------------------------------------------------------------------------------------------------------------------------------


def active_units(mean: Tensor, threshold: float = 0.01) -> int:
    """How many dimensions of the locations (N, d) vary over the data by more than `threshold`: Var_x m_j > threshold (Burda et al. 2016)."""
    if mean.dim() != 2 or len(mean) < 1 or not mean.is_floating_point():
        raise UsageError(f"active units are counted on floating-point locations (N, d), not {mean.dtype} of shape {tuple(mean.shape)}")
    return int((mean.double().var(0, correction=0) > threshold).sum())


# ---- estimates -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A figure in nats and its standard error (infinite where a single value leaves none)."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class RateSplit:
    """prior = marginal + mismatch: E KL[q(z|x)||p(z)] = E KL[q(z|x)||q(z)] + KL[q(z)||p(z)], in nats."""

    prior: Estimate
    marginal: Estimate
    mismatch: Estimate


def rate_split(prior_rate_per_example: Tensor, marginal: MarginalRate) -> RateSplit:
    """The VAE's rate as what z knows about x plus how far q(z) is from the prior (Hoffman and Johnson 2016), in nats.

    prior_rate_per_example: KL[q(z|x_i)||p(z)] (N,) of the same examples in the same order. The mismatch KL[q(z)||p(z)] is the mean of the
    differences, so its standard error is a paired one: the spread of the examples, common to both rates, drops out. It is at least 0 in truth; the
    estimate may fall below by Monte Carlo noise. Raises UsageError if the two are not of the same N examples.
    """
    prior = prior_rate_per_example.detach().double()
    if prior.shape != marginal.per_example.shape:
        raise UsageError(f"prior rates {tuple(prior.shape)} and marginal rates {tuple(marginal.per_example.shape)} must be of the same examples")
    difference = prior.to(marginal.per_example.device) - marginal.per_example
    return RateSplit(Estimate(*_mean_and_error(prior)), Estimate(marginal.value, marginal.standard_error), Estimate(*_mean_and_error(difference)))


@torch.no_grad()
def infonce(scores: Tensor) -> Estimate:
    """InfoNCE, a lower bound on I(x;z) from a critic's scores of held-out pairs (van den Oord et al. 2018; Poole et al. 2019); nats, at most ln B.

        ln B + mean_i [ f(x_i, z_i) - ln sum_j exp f(x_j, z_i) ]

    scores[j, i] = f(x_j, z_i): rows are x, columns z, true pairs on the diagonal. Each code is asked which x it came from, so any function of z alone
    drops out and f = log q(z|x) is a perfect critic: then this is the own-component mixture bound. A lower bound in expectation for any critic that
    did not see these pairs, and never above ln B.

    The B terms share their negatives and are not independent. The standard error is the jackknife's over pairs: a pair is left out as a positive
    and as a negative at once.

    Raises UsageError unless scores is a square floating-point matrix, B >= 2, without NaN.
    """
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2 or not scores.is_floating_point():
        raise UsageError(f"InfoNCE needs a square floating-point matrix of scores, two pairs or more, not {scores.dtype} {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise UsageError("InfoNCE was given scores that are not numbers")
    wide, count = scores.double(), len(scores)
    total = wide.logsumexp(0)
    terms = wide.diagonal() - total
    value = min(float(terms.mean()) + math.log(count), math.log(count))
    share = (wide - total).exp().clamp(max=1 - 2.0**-52)  # of each x in the sum for each z
    without = terms - torch.log1p(-share)  # [k, i]: the term of pair i where x_k is no longer a negative
    left_out = (without.sum(1) - without.diagonal()) / (count - 1) + math.log(count - 1)
    return Estimate(value, math.sqrt((count - 1) * float(left_out.var(correction=0))))


def ksg_information(x: Tensor, z: Tensor, k: int = 3) -> Estimate:
    """I(x;z) from samples alone, by the k nearest neighbours of Kraskov, Stoegbauer and Grassberger (2004, algorithm 1); nats.

    For checks in low dimension (x and z of at most three or four together) and continuous laws: it falls behind where I is large against ln N, and
    means nothing where values repeat. The standard error takes the points' terms for independent, which they are nearly.

    Args:
        x, z: paired samples (N, dx) and (N, dz), or (N,); the maximum norm is used, so bring dimensions to comparable scales.
        k: neighbours; more give less variance and more bias.

    Raises:
        UsageError: not the same N, or k is not between 1 and N - 1.
    """
    from scipy.spatial import cKDTree
    from scipy.special import digamma

    sides = [side.detach().double().cpu().reshape(len(side), -1).numpy() for side in (x, z)]
    count = len(sides[0])
    if len(sides[1]) != count or not 1 <= k < count:
        raise UsageError(f"KSG needs paired samples and 1 <= k < N, not {count} and {len(sides[1])} samples with k = {k}")
    joint = np.concatenate(sides, 1)
    radius = cKDTree(joint).query(joint, k + 1, p=np.inf)[0][:, -1]
    inside = np.nextafter(radius, 0)  # strictly nearer than the k-th neighbour; the point itself is counted, which makes n + 1
    counts = [cKDTree(side).query_ball_point(side, inside, p=np.inf, return_length=True) for side in sides]
    terms = digamma(k) + digamma(count) - digamma(counts[0]) - digamma(counts[1])
    return Estimate(*_mean_and_error(torch.from_numpy(terms)))


@dataclass(frozen=True)
class LogLikelihood:
    """log p(x) in nats: value, its mean over examples; standard_error of that; per_example (B,) float64; samples used for each example;
    effective_sample_size (B,) = (sum w)^2 / sum w^2, between 1 and samples: near 1, a single sample decided, and the value is far too low."""

    value: float
    standard_error: float
    per_example: Tensor = field(repr=False)
    samples: int
    effective_sample_size: Tensor = field(repr=False)


@torch.no_grad()
def importance_log_likelihood(
    log_likelihood: Callable[[Tensor], Tensor],
    mean: Tensor,
    log_scale: Tensor,
    *,
    samples: int = 1000,
    generator: torch.Generator | None = None,
    chunk: int = 50,
) -> LogLikelihood:
    """log p(x) = log E_{z ~ q(z|x)} [ p(x|z) p(z) / q(z|x) ] by importance sampling, p(z) = N(0, I); nats (Burda et al. 2016, eq. 8).

    Each example's value is the log of a mean of `samples` weights: a lower bound on log p(x) in expectation, rising with samples; exact with a
    single one if q(z|x) is the posterior. It is the log-likelihood itself: the negative of an NLL.

    Args:
        log_likelihood: z (S, B, d) -> log p(x_b | z_sb) (S, B), in nats, summed over pixels; S is at most `chunk`.
        mean, log_scale: encodings (B, d) of the examples, ln s.
        samples: weights per example; exactly so many are used, also where chunk does not divide them.
        generator: source of the codes; torch's default one if None.
        chunk: codes per example and call; memory is what log_likelihood needs for chunk * B codes.

    Raises:
        UsageError: shapes or types do not fit, samples or chunk below 1, or log_likelihood does not return (S, B).
    """
    _check_encodings(mean, log_scale, matrix=True)
    _check_finite(mean, log_scale)
    if samples < 1 or chunk < 1:
        raise UsageError(f"samples is {samples} and chunk is {chunk}: both must be at least 1")
    log_sum = torch.full((len(mean),), -math.inf, dtype=torch.float64, device=mean.device)
    log_sum_squares = log_sum.clone()
    for start in range(0, samples, chunk):
        shape = torch.Size((min(chunk, samples - start), *mean.shape))
        noise = _normal(shape, generator, mean.device)
        z = mean + log_scale.exp() * noise.to(mean.dtype)
        found = log_likelihood(z)
        if found.shape != shape[:2]:
            raise UsageError(f"log_likelihood returned shape {tuple(found.shape)} for codes {tuple(shape)}: {tuple(shape[:2])} is needed")
        # log p(z) - log q(z|x): the constants of the two normal densities are the same
        log_weight = found.double() + 0.5 * (noise.square() - z.double().square()).sum(2) + log_scale.double().sum(1)
        log_sum = torch.logaddexp(log_sum, log_weight.logsumexp(0))
        log_sum_squares = torch.logaddexp(log_sum_squares, (2 * log_weight).logsumexp(0))
    per_example = log_sum - math.log(samples)
    return LogLikelihood(*_mean_and_error(per_example), per_example, samples, (2 * log_sum - log_sum_squares).exp())


# ---- bounds and certificates ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A bound on I(x;z) in nats, in expectation, with the standard error of its estimate; the note says of which law and on what grounds."""

    value: float
    standard_error: float
    kind: Literal["lower", "upper"]
    name: str
    note: str = ""

    def record(self) -> dict[str, Any]:
        return {key: _plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class RateCertificate:
    """What a reported rate carries: the formula it came from, what bounds the channel's information, and where these contradict; all in nats.

    formula_name, formula: what was evaluated, with its standard error over examples. bounds: from below and above. distinct, ln_n: the number of
    distinct examples and its logarithm, which the information of a channel fed with them cannot exceed. interval: from the best lower bound (at least
    0) to the best upper one, min(formula, ln N, upper bounds), for the channel fed with these examples; standard errors are not in it. theorem: what
    makes the formula a bound. statements: plain sentences, one for each reason not to take the formula for the information; empty if there is none.
    """

    formula_name: str
    formula: Estimate
    bounds: tuple[Bound, ...]
    distinct: int
    ln_n: float
    interval: tuple[float, float]
    theorem: str
    statements: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """As JSON-ready values; null stands for what is not finite."""
        return {
            "formula": {"name": self.formula_name, "value": _plain(self.formula.value), "standard_error": _plain(self.formula.standard_error)},
            "bounds": [bound.record() for bound in self.bounds],
            "distinct": self.distinct,
            "ln_n": self.ln_n,
            "interval": [_plain(end) for end in self.interval],
            "theorem": self.theorem,
            "statements": list(self.statements),
        }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


PRIOR_RATE = "E KL[q(z|x)||p(z)]"
MARGINAL_RATE = "E KL[q(z|x)||q(z)]"
ECHO_RATE = "-E ln|det S|"
PRIOR_THEOREM = "I(x;z) = E KL[q(z|x)||p(z)] - KL[q(z)||p(z)] <= E KL[q(z|x)||p(z)], and I(x;z) <= ln N for N distinct examples."
MARGINAL_THEOREM = (
    "E KL[q(z|x)||q(z)] = I(x;z) <= ln N for the N examples themselves; in expectation it is a lower bound for the population they came from."
)
ECHO_THEOREM = (
    "I(x;z) <= -E ln|det S|, with equality if the differential entropy h(z) is finite, and I(x;z) <= ln N for N distinct examples: "
    "min(formula, ln N) is an upper bound, the formula by itself is not a measurement."
)


@torch.no_grad()
def gaussian_certificate(
    mean: Tensor,
    log_scale: Tensor,
    *,
    prior_rate: Tensor | None = None,
    marginal: MarginalRate | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
    distinct: int | None = None,
    batch: int = 512,
    extra: Sequence[Bound] = (),
    generator: torch.Generator | None = None,
) -> RateCertificate:
    """The certificate of a Gaussian channel's rate, from the encodings of the N examples that it is fed with.

    The formula is E KL[q(z|x)||p(z)] where its values per example are given, else E KL[q(z|x)||q(z)]. Below: the own-component mixture of random
    batches, and the exact mixture of all N components (exact for these examples, a lower bound for the population). Above: leave-one-out of the same
    batches, a fitted density, the prior's rate, ln N.

    Args:
        mean, log_scale: encodings (N, d), ln s.
        prior_rate: KL[q(z|x_i)||p(z)] (N,), as the channel reports it.
        marginal: `marginal_rate` of these encodings; evaluated here if None (that takes N^2 d).
        held_out: encodings (mean, log_scale) of other examples, to judge the fitted density on; if None, each half of these against the other.
        distinct: how many of the examples are distinct; the number of distinct encodings if None or fewer.
        batch: examples per batch; at most N/10, so that batches tell their own standard error.
        extra: further bounds, such as a critic's InfoNCE.

    Raises:
        UsageError: shapes or types do not fit, or values are not finite.
    """
    _check_encodings(mean, log_scale, matrix=True)
    _check_finite(mean, log_scale)
    count = _count_distinct(mean, log_scale, distinct)
    marginal = marginal or marginal_rate(mean, log_scale, generator=generator)
    exact = Bound(
        marginal.value,
        marginal.standard_error,
        "lower",
        "exact mixture",
        f"all {len(mean)} components: exact for them, a lower bound for the population",
    )
    bounds = [*_batch_bounds(mean, log_scale, batch, generator), exact]
    if held_out is not None:
        bounds.append(fitted_upper_bound(mean, log_scale, *held_out))
    elif len(mean) >= 4:
        bounds.append(_cross_fitted(mean, log_scale))
    bounds += extra
    if prior_rate is None:
        return _certificate(MARGINAL_RATE, Estimate(marginal.value, marginal.standard_error), bounds, count, MARGINAL_THEOREM, [])
    if prior_rate.shape != mean.shape[:1]:
        raise UsageError(f"prior_rate {tuple(prior_rate.shape)} must be ({len(mean)},): one value per example")
    return _certificate(PRIOR_RATE, Estimate(*_mean_and_error(prior_rate.double())), bounds, count, PRIOR_THEOREM, [])


@torch.no_grad()
def echo_certificate(
    mean: Tensor,
    log_scale: Tensor,
    z: Tensor | None = None,
    *,
    clip: float,
    distinct: int | None = None,
    lower: Sequence[Bound] = (),
) -> RateCertificate:
    """The certificate of an echo channel's rate -E ln|det S|, s = min(exp(log_scale), clip), from the encodings of the N examples it is fed with.

    The formula is the channel's information only if h(z) is finite. It is not where q*(z) is singular, and three ways to be so are looked for: more
    nats than N distinct examples have; linearly dependent dimensions of z (its noise is the same past examples in every dimension, so dimensions
    that are affine copies stay so); the same found in the encodings, for dimensions that share their s. Other singular laws are possible: without
    a finite h(z) the formula is a bound, whatever the certificate finds. Constant dimensions are left alone: what they cost is the clip's floor,
    which the bound's note gives.

    No fitted density is put above: q*(z|x) is the density of z rescaled, so E log q*(z|x)/r(z) with a fitted r in both places returns the formula,
    whatever the fit.

    Args:
        mean, log_scale: encodings (N, d), ln s before the clip.
        z: codes (B, d), B > d, from the channel's sampler: their correlation matrix is tested for its rank.
        clip: the channel's ceiling on s, in (0, 1).
        distinct: how many of the examples are distinct; the number of distinct encodings if None or fewer.
        lower: bounds from below, such as a critic's InfoNCE on held-out pairs; without one only 0 bounds from below.

    Raises:
        UsageError: shapes or types do not fit, values are not finite, or clip is not in (0, 1).
    """
    _check_encodings(mean, log_scale, matrix=True)
    _check_finite(mean, log_scale)
    if not 0 < clip < 1:
        raise UsageError(f"clip is {clip}: the echo channel's ceiling on s must lie between 0 and 1")
    clipped = log_scale.double().clamp(max=math.log(clip))
    formula = Estimate(*_mean_and_error(-clipped.sum(1)))
    floor = -mean.shape[1] * math.log(clip)
    bounds = [
        Bound(
            formula.value, formula.standard_error, "upper", ECHO_RATE, f"the theorem; {floor:.4f} nats of it are the floor that clip {clip:g} sets"
        ),
        *lower,
    ]
    doubts = []
    if z is not None:
        _check_codes(z, mean)
        if len(z) > z.shape[-1] and (lost := _lost_dimensions(z)):
            doubts.append(_singular(lost, "the codes"))
    if not doubts and (lost := _copied_dimensions(mean.double(), clipped)):
        doubts.append(_singular(lost, "the encodings"))
    return _certificate(ECHO_RATE, formula, bounds, _count_distinct(mean, log_scale, distinct), ECHO_THEOREM, doubts)


def _singular(lost: int, what: str) -> str:
    """The objection to a rate of codes some of whose dimensions say nothing that the others do not say."""
    which = f"1 dimension of {what} is an affine function" if lost == 1 else f"{lost} dimensions of {what} are affine functions"
    return f"{which} of the others: q*(z) is singular, h(z) is not finite, and the formula counts the same information more than once."


@torch.no_grad()
def fitted_upper_bound(mean: Tensor, log_scale: Tensor, held_out_mean: Tensor, held_out_log_scale: Tensor) -> Bound:
    """E KL[q(z|x)||r(z)] = I(x;z) + KL[q(z)||r(z)] over held-out examples, r a full-covariance Gaussian fitted to training codes; nats.

    r has the exact moments of the training mixture, E m and Cov m + E S, and the divergence of two Gaussians is closed, so no code is drawn. An upper
    bound for the population, since r has not seen the held-out examples. Encodings are (N, d) and (M, d), ln s. Raises UsageError as the others do.
    """
    for m, s in ((mean, log_scale), (held_out_mean, held_out_log_scale)):
        _check_encodings(m, s, matrix=True)
        _check_finite(m, s)
    _check_codes(held_out_mean, mean)
    values = _divergence_from_fit(mean.double(), log_scale.double(), held_out_mean.double(), held_out_log_scale.double())
    return Bound(*_mean_and_error(values), "upper", "fitted Gaussian", "E KL[q(z|x)||r(z)] on held-out examples, r fitted to training codes")


def _cross_fitted(mean: Tensor, log_scale: Tensor) -> Bound:
    mean, log_scale = mean.double(), log_scale.double()
    halves = [(mean[::2], log_scale[::2]), (mean[1::2], log_scale[1::2])]
    values = torch.cat([_divergence_from_fit(*halves[1 - side], *halves[side]) for side in (0, 1)])
    return Bound(*_mean_and_error(values), "upper", "fitted Gaussian", "E KL[q(z|x)||r(z)], r fitted to the other half of the examples")


def _divergence_from_fit(mean: Tensor, log_scale: Tensor, held_out_mean: Tensor, held_out_log_scale: Tensor) -> Tensor:
    """KL[N(m_i, S_i) || r] (M,), r the Gaussian with the moments of the first encodings' mixture."""
    centre, variance = mean.mean(0), torch.exp(2 * held_out_log_scale)
    centred = mean - centre
    covariance = centred.T @ centred / len(mean) + torch.diag(torch.exp(2 * log_scale).mean(0))
    factor = torch.linalg.cholesky(covariance)
    distance = torch.linalg.solve_triangular(factor, (held_out_mean - centre).T, upper=False).square().sum(0)
    trace = variance @ torch.cholesky_inverse(factor).diagonal()
    values: Tensor = 0.5 * (distance + trace - mean.shape[1]) + factor.diagonal().log().sum() - held_out_log_scale.sum(1)
    return values


def _batch_bounds(mean: Tensor, log_scale: Tensor, batch: int, generator: torch.Generator | None) -> list[Bound]:
    """Own-component mixture and leave-one-out over random batches of the examples; a batch's mean counts as one value where there are ten."""
    count = len(mean)
    if count < 2:
        return []
    size = max(2, min(batch, count // 10)) if count >= 20 else count
    whole = count // size
    source = mean.device if generator is None else generator.device
    rows = torch.randperm(count, generator=generator, device=source)[: whole * size].view(whole, size).to(mean.device)
    z = (mean + log_scale.exp() * _normal(mean.shape, generator, mean.device))[rows]
    bounds = []
    for estimator, kind in (("mixture", "lower"), ("leave-one-out", "upper")):
        values = torch.stack([batch_rate(z[i], mean[row], log_scale[row], estimator).double() for i, row in enumerate(rows)])  # type: ignore[arg-type]
        found = _mean_and_error(values.mean(1) if whole >= 10 else values.flatten())
        note = f"{whole} batches of {size}" + (f"; never above ln {size} = {math.log(size):.3f}" if kind == "lower" else "; no ceiling")
        bounds.append(Bound(*found, kind, f"{estimator} of a batch", note))  # type: ignore[arg-type]
    return bounds


def _certificate(name: str, formula: Estimate, bounds: Sequence[Bound], distinct: int, theorem: str, doubts: list[str]) -> RateCertificate:
    ln_n = math.log(distinct)
    ceiling = Bound(ln_n, 0.0, "upper", f"ln {distinct}", "the entropy of so many equally likely examples")
    above = [bound for bound in bounds if bound.kind == "upper"]
    below = [bound for bound in bounds if bound.kind == "lower"]
    if formula.value > ln_n + 1e-9:
        doubts = [
            f"The formula {name} = {formula.value:.4g} nats is above ln {distinct} = {ln_n:.4g}: "
            f"the formula speaks of the population, not of the channel fed with these {distinct} examples.",
            *doubts,
        ]
    as_bound = Bound(formula.value, formula.standard_error, "upper", name)
    for low in below:
        for high in [*above, ceiling, *([] if any(bound.name == name for bound in above) else [as_bound])]:
            error = math.hypot(low.standard_error, high.standard_error)
            if low.value - high.value > 3 * error + 1e-9:
                doubts.append(
                    f"The lower bound '{low.name}' = {low.value:.4g} is more than three standard errors above the upper bound '{high.name}' = "
                    f"{high.value:.4g}: one of them does not hold for this channel."
                )
    top = min(bound.value for bound in (*above, ceiling, as_bound))
    bottom = max([0.0, *(bound.value for bound in below)])
    return RateCertificate(name, formula, tuple(bounds), distinct, ln_n, (min(bottom, top), top), theorem, tuple(doubts))


def _count_distinct(mean: Tensor, log_scale: Tensor, distinct: int | None) -> int:
    """Distinct encodings, or distinct examples if the caller knows of fewer (encodings of equal examples may differ in the last digit)."""
    if distinct is not None and distinct < 1:
        raise UsageError(f"distinct is {distinct}: at least one example is needed")
    found = len(np.unique(torch.cat([mean, log_scale], 1).detach().cpu().double().numpy(), axis=0))
    return found if distinct is None else min(found, distinct)


#: A dimension whose part that the others do not explain has less variance than this, in units of its own, is their affine function: far below
#: any genuine correlation (a residual of 3e-5 standard deviations), above what float32 leaves of an exact copy in a long recursion.
RANK_TOLERANCE = 1e-9


def _lost_dimensions(rows: Tensor) -> int:
    """How many of the columns of (N, d) that vary at all are affine functions of the others: the rank that their correlation matrix lacks."""
    wide = rows.double()
    centred = wide - wide.mean(0)
    deviation = centred.square().mean(0).sqrt()
    # A spread that is all rounding, of the type that the rows came in, is no spread.
    varies = deviation > 8 * torch.finfo(rows.dtype).eps * wide.abs().amax(0)
    standard = centred[:, varies] / deviation[varies]
    if standard.shape[1] < 2:
        return 0
    return int((torch.linalg.eigvalsh(standard.T @ standard / len(rows)) < RANK_TOLERANCE).sum())


def _copied_dimensions(mean: Tensor, log_scale: Tensor) -> int:
    """Affine dependences that the echo recursion preserves: among dimensions of equal s, in the fixed points m/(1-s) (v.m = c(1-s) makes v.z = c)."""
    _, group = np.unique(log_scale.cpu().numpy(), axis=1, return_inverse=True)
    fixed = mean / (1 - log_scale.exp())
    blocks = [fixed[:, torch.from_numpy(group.reshape(-1) == number)] for number in range(group.max() + 1)]
    return sum(_lost_dimensions(block) for block in blocks if len(block) > block.shape[1])


# ---- what every function asks of its arguments ----------------------------------------------------------------------------------------------


def _check_encodings(mean: Tensor, log_scale: Tensor, matrix: bool = False) -> None:
    if mean.shape != log_scale.shape:
        raise UsageError(f"mean {tuple(mean.shape)} and log_scale {tuple(log_scale.shape)} must have the same shape")
    if not mean.is_floating_point() or not log_scale.is_floating_point():
        raise UsageError(f"encodings must be floating point, not {mean.dtype} and {log_scale.dtype}")
    if mean.dim() < 2 or (matrix and mean.dim() != 2) or mean.numel() == 0:
        expected = "(N, d)" if matrix else "(..., B, d)"
        raise UsageError(f"encodings must be of shape {expected} with no side of length 0, not {tuple(mean.shape)}")


def _check_codes(z: Tensor, mean: Tensor) -> None:
    if z.dim() < 2 or z.shape[-1] != mean.shape[-1]:
        raise UsageError(f"codes {tuple(z.shape)} must be (..., B, d) with the d = {mean.shape[-1]} of the encodings {tuple(mean.shape)}")
    if not z.is_floating_point():
        raise UsageError(f"codes must be floating point, not {z.dtype}")


def _check_finite(mean: Tensor, log_scale: Tensor) -> None:
    if not bool(mean.isfinite().all()) or not bool((log_scale.abs() <= WIDEST_LOG_SCALE).all()):
        raise UsageError(f"encodings must be finite, and log_scale = ln s within +-{WIDEST_LOG_SCALE:.0f}")


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    kind = torch.float32
    for tensor in tensors:
        kind = torch.promote_types(kind, tensor.dtype)
    return kind
