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
from dataclasses import dataclass
from typing import Literal

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
    per_example: Tensor
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
    does not matter beside 1), and a tile is one matrix product into a buffer, one exponential in place and one sum. Constants and shifts are two more
    columns of the product, and so is the factor that makes them bits. Components are ordered by repeated halving, and pairs of tiles too far apart to matter are skipped.

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
            doubtful = ((bound > 600) | ~(total * bound * bound.clamp(max=600).exp() <= ROUNDING_TOLERANCE)).nonzero()[:, 0]
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
