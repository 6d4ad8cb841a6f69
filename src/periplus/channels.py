"""Noise between encoder and decoder: how a code is drawn, and what it carries, in one object.

An encoder gives every example x a location m(x) and a diagonal scale s(x) > 0 in R^d; a channel draws the code z and knows its rate in nats.

    Gaussian   z = m(x) + s(x) * eps,  eps ~ N(0, I)         rate(x) = KL[N(m, s^2) || N(0, I)] = sum_j (m_j^2 + s_j^2 - 1)/2 - ln s_j
    echo       z = m(x) + s(x) * z1,   z1 ~ q*(z|x1), x1 a fresh example        rate(x) = - sum_j ln s_j(x)
               (Brekelmans, Moyer, Galstyan, Ver Steeg: Exact rate-distortion in autoencoders via echo noise, NeurIPS 2019)

**What the echo rate is.** The noise z1 is distributed as the marginal q*(z) itself, so h(z|x) = ln|det S(x)| + h(z), and when h(z) is finite

    I(x; z) = E_x KL[q*(z|x) || q*(z)] = - E_x ln|det S(x)|

in expectation, not for each x. In general it is only an upper bound, I(x; z) <= - E ln|det S|, with a gap when q* is singular; and for the empirical
law of N examples I(x; z) <= ln N, whatever the formula says.

**How it is drawn.** Written out, the noise is an infinite sum over other examples, z = m(x) + s(x) (m(x1) + s(x1) (m(x2) + ...)) (see `unroll`).

    ring     the batch in random order, each row the noise of the next, closed: z_0 = z_B. One affine scan z_k = m_k + s_k z_{k-1}, O(B d).
             A row meets itself after a full turn, weighted by A = prod_k s_k: harmless while max_j |A_j| <= 2^-23 (the *guard*), and else the
             ring is lengthened by further shuffles of the same batch until the guard holds. Rows are then used again: see EchoChannel on the bias.
    chain    the same scan started from the last z of the batch before (`advance`): fresh rows only, so the law is q* itself after a burn-in.
    series   every row sums K terms over its own permutation of the other rows, O(B K d): the reference to hold the others against.

The gradient flows through the noise. With g the gradient of the loss in z, the scan runs backward around the same ring,

    lambda_k = g_k + s_{k+1} lambda_{k+1},   dm_k = lambda_k,   ds_k = lambda_k z_{k-1}

and no running product is ever divided by a factor of it: products underflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from periplus.errors import UsageError

#: A weight below which the rest of a recursion cannot be seen in float32.
NEGLIGIBLE = 2.0**-23
#: The lowest clip allowed: the rate cannot fall below -d ln clip, and at d = 32 that is to stay below half a nat.
LOWEST_CLIP = 0.985
#: A ring is not lengthened beyond so many rows. Only a clip above 1 - 1.2e-4 can ask for more; the weight A left is then at most clip^ROWS.
MOST_ROWS = 2**17
SAMPLERS = ("auto", "ring", "series", "chain")


# ---- Gaussian noise ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianChannel:
    """z = m + s * eps with eps ~ N(0, I): the noise of a variational autoencoder (Kingma, Welling 2014). All tensors (..., B, d)."""

    def noise(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """eps of the given shape, drawn where the generator lives and moved to `device`."""
        source = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device or source)

    def transmit(self, mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
        """m + exp(log_scale) * noise, in float32 or better, differentiable in all three; any leading dimensions."""
        mean, log_scale = _wide(mean, log_scale)
        return torch.addcmul(mean, log_scale.exp(), noise.to(mean))

    def sample(self, mean: Tensor, log_scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One code per row, (..., B, d). Uses torch's default generator if None. Raises UsageError if the shapes differ or are not floats."""
        _check(mean, log_scale)
        dtype = torch.promote_types(torch.promote_types(mean.dtype, log_scale.dtype), torch.float32)
        return self.transmit(mean, log_scale, self.noise(mean.shape, generator, device=mean.device, dtype=dtype))

    def rate(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        """KL[N(m, s^2) || N(0, I)] of every row in nats, (..., B): an upper bound, in the mean over x, on I(x; z)."""
        _check(mean, log_scale)
        mean, log_scale = _wide(mean, log_scale)
        # expm1: s^2 - 1 - 2 ln s loses all digits near s = 1, where an unused dimension lives
        return (0.5 * (mean.square() + torch.expm1(2 * log_scale)) - log_scale).sum(-1)


# ---- echo noise -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EchoChannel:
    """Echo noise z = m(x) + s(x) * z1 (Brekelmans et al. 2019), sampler and rate under one clip of s.

    Rows of one batch are **not independent** of each other: each is the noise of others. Averages over a batch are unbiased as far as the sampler is,
    their standard errors must come from independent batches.

    What a small batch costs. While the guard holds, a row's history is made of distinct rows: the law of a code is exact, up to a weight of 2^-23.
    A lengthened ring is not exact, because it meets the same rows again: every z of the batch then carries (batch mean of m) / (1 - s), and for
    constant s the variance comes out too high by a share of up to (1 + s) / ((1 - s) B). Measured for m = x ~ U(-1, 1): +0.7 at s = 0.985, B = 100
    (7 at B = 16), and +0.4 at s = 0.5 + 0.3 x, B = 4, nothing visible at B = 16. The chain (`advance`) has no such bias once the rows it has
    visited outnumber what s remembers; a truncated series errs the other way. Figures: benchmarks/results/echo_samplers.json.

    Attributes:
        clip: s is clamped, hard, to at most this, in `sample` and in `rate` alike; in [0.985, 1). The rate cannot fall below -d ln clip (0.32 nat
            at d = 32 for 0.99). A clamped entry has no gradient: this is a guard, let the encoder's head keep log_scale smoothly below ln clip.
        sampler: "ring", "series", "chain" (see the module), or "auto": in `sample` a ring, lengthened where the guard asks for it; in `advance` a
            closed ring where the guard holds and the chain where it trips.
        terms: K of the series, the row's own m among them; None for as many as the clip needs to leave 2^-23 (2045 at 0.99). At most B.
    """

    clip: float = 0.99
    sampler: str = "auto"
    terms: int | None = None

    def __post_init__(self) -> None:
        if not LOWEST_CLIP <= self.clip < 1:
            raise UsageError(f"clip {self.clip} of an echo channel must be at least {LOWEST_CLIP} (the rate's floor is -d ln clip) and below 1")
        if self.sampler not in SAMPLERS:
            raise UsageError(f"echo sampler '{self.sampler}' is unknown: use one of {', '.join(SAMPLERS)}")
        if self.terms is not None and self.terms < 1:
            raise UsageError(f"an echo series needs at least one term, not {self.terms}")

    # -- what sampler and rate share

    def log_scale(self, log_scale: Tensor) -> Tensor:
        """ln min(s, clip), the one place where the clip acts."""
        return log_scale.clamp(max=math.log(self.clip))

    def rate(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        """- sum_j ln min(s_j, clip) of every row in nats, (..., B).

        Its mean over x is I(x; z) when h(z) is finite, and always an upper bound on it (see the module); single rows mean nothing.
        """
        _check(mean, log_scale)
        _, log_scale = _wide(mean, log_scale)
        return -self.log_scale(log_scale).sum(-1)

    def holds(self, log_scale: Tensor) -> Tensor:
        """The guard, for the whole vector: max_j prod_k min(s_kj, clip) <= 2^-23 over the B rows of (..., B, d); bool (...,)."""
        return self._slowest(log_scale) <= math.log(NEGLIGIBLE)

    def _slowest(self, log_scale: Tensor) -> Tensor:
        """ln max_j A_j of one lap, (...,)."""
        _, wide = _wide(log_scale, log_scale.detach())
        return self.log_scale(wide).sum(-2).amax(-1)

    def laps(self, log_scale: Tensor) -> int:
        """How many shuffles of the batch a ring needs for the guard to hold, in the slowest dimension (of the slowest model)."""
        slowest = float(self._slowest(log_scale).max())
        if not slowest < 0:  # not a number: let it through to the code, where the loop that trains looks for it
            return 1
        return max(1, min(math.ceil(math.log(NEGLIGIBLE) / slowest), -(-MOST_ROWS // log_scale.shape[-2])))

    # -- noise, drawn outside

    def noise(
        self, shape: Sequence[int], generator: torch.Generator | None = None, *, laps: int = 1, device: torch.device | str | None = None
    ) -> Tensor:
        """The random part of a sample, for codes of shape (..., B, d): which rows are the noise of which.

        Ring and chain: the order in which rows are visited, int64 (..., laps * B), every B entries a fresh permutation. Series: the rows that each
        row sums over, itself first, int64 (..., B, K).

        Raises:
            UsageError: B < 2.
        """
        *lead, batch, _ = shape
        if batch < 2:
            raise UsageError(f"echo noise is made of the other rows of a batch: a batch of {batch} has none, use at least 2")
        source = device if generator is None else generator.device
        draw = self._others if self.sampler == "series" else _orders
        drawn = [draw(batch, laps, generator, source) for _ in range(math.prod(lead))]
        noise = drawn[0] if len(drawn) == 1 else torch.stack(drawn)
        return noise.reshape(*lead, *drawn[0].shape).to(device or source)

    def _others(self, batch: int, laps: int, generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
        """(B, K): each row, then its own permutation of the *other* rows. Drawing with replacement, or oneself again, is biased."""
        needed = math.ceil(math.log(NEGLIGIBLE * (1 - self.clip)) / math.log(self.clip))
        terms = min(self.terms or needed, batch)
        own = torch.arange(batch, device=device)[:, None]
        others = torch.rand(batch, batch - 1, generator=generator, device=device).argsort(1)[:, : terms - 1]
        return torch.cat([own, others + (others >= own)], 1)

    def transmit(self, mean: Tensor, log_scale: Tensor, noise: Tensor) -> Tensor:
        """The codes (..., B, d) that this noise makes: a pure, differentiable function, in float32 or better.

        A ring is closed over the whole of `noise`, whatever the guard says: ask `laps` or `holds`, or use `sample` and `advance`, which do.
        """
        mean, log_scale = _wide(mean, log_scale)
        if self.sampler == "series":
            return _series(mean, self.log_scale(log_scale), noise.to(mean.device))
        return ring_scan(mean, self.log_scale(log_scale).exp(), noise)

    def step(self, mean: Tensor, log_scale: Tensor, past: Tensor) -> Tensor:
        """m + s z1: one turn of the recursion, with codes z1 (..., B, d) of other examples drawn elsewhere; float32 or better."""
        mean, log_scale = _wide(mean, log_scale)
        return mean + self.log_scale(log_scale).exp() * past

    # -- samples

    def sample(self, mean: Tensor, log_scale: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One code per row, (..., B, d), float32 or better; a pure function of its arguments and the generator (torch's default one if None).

        Ring (also for "chain", which has no state here to start from): one lap while the guard holds, else as many as it asks for, of which the last
        is returned, in O(laps B d) time and memory. More than one lap uses rows again, a bias of up to (1 + s) / ((1 - s) B) of the variance in
        the slow dimensions, which the chain of `advance` does not have.

        Raises:
            UsageError: the shapes differ, the tensors are not floating point, or B < 2.
        """
        _check(mean, log_scale)
        noise = self.noise(mean.shape, generator, device=mean.device)
        return self.transmit(mean, log_scale, self._lengthened(noise, mean, log_scale, generator))

    def advance(
        self, mean: Tensor, log_scale: Tensor, state: Tensor | None, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One batch of a chain of batches: (codes (..., B, d), the state for the next batch).

        "auto": where the guard holds the ring is closed (its full gradient, nothing carried); where it trips the scan starts from `state`, and the
        first rows miss the part of their gradient that lies in the batch before. Decided for each model, not for each dimension (that would break
        the order that the dimensions share), and on the device: nothing waits for the answer. "chain" always starts from `state`; "ring" and
        "series" ignore it.

        Args:
            mean, log_scale: (..., B, d), as for `sample`.
            state: (..., d), the last code of the batch before, or None at the beginning: then a ring starts the chain, lengthened if need be.
            generator: source of the noise; torch's default one if None.
            noise: as `noise(mean.shape)` gives it, where it was drawn outside.

        Returns:
            z, and the last code visited, detached, float32 or better: keep it in the checkpoint.

        Raises:
            UsageError: as `sample`, and if the state has another shape.
        """
        _check(mean, log_scale)
        if noise is None:
            noise = self.noise(mean.shape, generator, device=mean.device)
        if self.sampler == "series":
            z = self.transmit(mean, log_scale, noise)
            return z, z.detach()[..., -1, :].clone()
        if state is None or self.sampler == "ring":
            noise = self._lengthened(noise, mean, log_scale, generator)
            z = self.transmit(mean, log_scale, noise)
        else:
            z = self._continue(mean, log_scale, state, noise)
        last = noise[..., -1:, None].to(z.device).expand(*z.shape[:-2], 1, z.shape[-1])
        return z, z.detach().gather(-2, last).squeeze(-2)

    def _continue(self, mean: Tensor, log_scale: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        expected = mean.shape[:-2] + mean.shape[-1:]
        if state.shape != expected:
            raise UsageError(f"the state of an echo chain has shape {tuple(state.shape)}: {tuple(expected)} is needed for codes {tuple(mean.shape)}")
        mean, log_scale = _wide(mean, log_scale)
        closed = self.holds(log_scale) if self.sampler == "auto" else None
        return ring_scan(mean, self.log_scale(log_scale).exp(), noise, state.detach(), closed)

    def _lengthened(self, noise: Tensor, mean: Tensor, log_scale: Tensor, generator: torch.Generator | None) -> Tensor:
        """The ring's order with as many further shuffles before it as the guard asks for."""
        if self.sampler == "series":
            return noise
        missing = self.laps(log_scale) - noise.shape[-1] // mean.shape[-2]
        if missing < 1:
            return noise
        return torch.cat([self.noise(mean.shape, generator, laps=missing, device=noise.device), noise], -1)


def _orders(batch: int, laps: int, generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    """`laps` independent permutations of the rows, end to end."""
    return torch.cat([torch.randperm(batch, generator=generator, device=device) for _ in range(laps)])


def _series(mean: Tensor, log_scale: Tensor, rows: Tensor) -> Tensor:
    """sum_k (prod_{i<k} s(x_i)) m(x_k) over each row's own list (..., B, K) of rows."""
    batch, d = mean.shape[-2:]
    rows = rows.reshape(-1, batch, rows.shape[-1])
    index = rows + batch * torch.arange(len(rows), device=rows.device)[:, None, None]
    logs, terms = log_scale.reshape(-1, d)[index[..., :-1]], mean.reshape(-1, d)[index]
    # In logarithms: the derivative of a product of scales divides by them, that of a sum of logarithms does not.
    weights = torch.cat([torch.ones_like(terms[..., :1, :]), logs.cumsum(-2).exp()], -2)
    return (weights * terms).sum(-2).reshape(mean.shape)


def _wide(mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 if either is: neither scans nor rates survive in half precision."""
    dtype = torch.promote_types(torch.promote_types(mean.dtype, log_scale.dtype), torch.float32)
    return mean.to(dtype), log_scale.to(dtype)


def _check(mean: Tensor, log_scale: Tensor) -> None:
    if mean.shape != log_scale.shape or mean.dim() < 2:
        raise UsageError(f"mean {tuple(mean.shape)} and log_scale {tuple(log_scale.shape)} must have one shape (B, d), rows are examples")
    if not (mean.is_floating_point() and log_scale.is_floating_point()):
        raise UsageError(f"mean and log_scale must be floating point, not {mean.dtype} and {log_scale.dtype}")


# ---- the affine scan around a ring --------------------------------------------------------------------------------------------------------------


def ring_scan(mean: Tensor, scale: Tensor, order: Tensor | None = None, start: Tensor | None = None, closed: Tensor | None = None) -> Tensor:
    """z_k = m_k + s_k z_{k-1} over rows visited in the given order; the codes of the last B rows visited, each at its row's own place.

    Differentiable once in mean, scale and start (its own backward, see the module). O(V d) time and memory for V rows visited, of which only s and
    z_{k-1} are kept. Many models are one scan: their columns lie side by side, whatever order each visits its rows in.

    Args:
        mean, scale: (..., B, d), float32 or float64, of one type.
        order: int64 (..., V), every B entries a permutation of the rows; None for the rows as they stand.
        start: z_0, (..., d). None closes the ring, z_0 = z_V, for which every prod_k s_k must differ from 1.
        closed: bool (...,), with a start: the models that close their ring all the same.

    Returns:
        (..., B, d).
    """
    *lead, batch, d = mean.shape
    models = math.prod(lead)
    if order is None:
        order = torch.arange(batch, device=mean.device).expand(*lead, batch)
    if order.shape[-1] < batch or order.shape[-1] % batch:
        raise UsageError(f"a ring over a batch of {batch} visits a multiple of it, not {order.shape[-1]} rows")
    order = order.to(mean.device)
    if models != 1:  # rows of all models in one list; their columns side by side in the scan
        order = (order.reshape(models, -1) + batch * torch.arange(models, device=mean.device)[:, None]).T
        mean, scale = mean.reshape(-1, d), scale.reshape(-1, d)
    first = None if start is None else start.to(mean).reshape(models * d)
    loops = None if closed is None else closed.reshape(models, 1).expand(models, d).reshape(-1)
    z: Tensor = _RingScan.apply(mean.reshape(-1, d), scale.reshape(-1, d), order.reshape(-1), first, loops, models * d)  # type: ignore[no-untyped-call]
    return z.view(*lead, batch, d)


# An array is a torch tensor or, on the CPU, a numpy array on the same memory: the scan is a few dozen small operations, and numpy starts one in a
# third of the time that torch takes. What is written here means the same in both. Forward scans tried, B = 1024, d = 32, one thread, in
# microseconds: this one 220; the same in torch 470; doubling (log2 B passes over everything) 860; a bidiagonal BLAS solve (stbsv, CPU only) 340;
# a plain loop over rows 1500 in numpy, 10000 in torch.
Array = Any


class _RingScan(torch.autograd.Function):
    """The scan of rows (C B, d) in the order `index` (V C,), C models beside each other: `width` = C d; `start` and `closed` (C d,)."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, scale: Tensor, index: Tensor, start: Tensor | None, closed: Tensor | None, width: int) -> Tensor:
        xp = np if mean.device.type == "cpu" else torch
        m, s, i, first, loops = (_array(xp, t) for t in (mean, scale, index, start, closed))
        s = s[i].reshape(-1, width)
        z = _scan(xp, m[i].reshape(-1, width), s, first, loops)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(_tensor(s), _tensor(_shifted(xp, z, first, loops)), index, closed)
            ctx.open = start is not None
        out = torch.empty_like(mean)
        _array(xp, out)[i[-len(m) :]] = z.reshape(-1, m.shape[1])[-len(m) :]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        xp = np if gradient.device.type == "cpu" else torch
        g, s, before, index, closed = (_array(xp, t) for t in (gradient, *ctx.saved_tensors))
        # lambda_k = g_k + s_{k+1} lambda_{k+1} is the same scan over the rows in reverse; only the last lap was returned.
        rows, visits = len(g), len(s)
        reverse = xp.flip(index.reshape(visits, -1), (0,)).reshape(-1)
        additive, after = xp.zeros_like(s), xp.empty_like(s)
        additive.reshape(-1, g.shape[1])[:rows] = g[reverse[:rows]]
        after[1:], after[0] = xp.flip(s[1:], (0,)), s[0]
        adjoint = _scan(xp, additive, after, xp.zeros_like(s[0]) if ctx.open else None, closed)
        d_start = None
        if ctx.needs_input_grad[3]:
            d_start = adjoint[-1] * s[0]
            d_start = _tensor(d_start if closed is None else xp.where(closed, xp.zeros_like(d_start), d_start))
        d_mean = _gathered(xp, adjoint.reshape(-1, g.shape[1]), reverse, rows)
        d_scale = _gathered(xp, (adjoint * xp.flip(before, (0,))).reshape(-1, g.shape[1]), reverse, rows)
        return _tensor(d_mean), _tensor(d_scale), None, d_start, None, None


def _array(xp: Any, tensor: Tensor | None) -> Array:
    return tensor if tensor is None or xp is torch else tensor.detach().numpy()


def _tensor(array: Array) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array)


def _gathered(xp: Any, visits: Array, index: Array, rows: int) -> Array:
    """Sum over laps of what was visited, each row back at its place (one lap at a time: the same bits on every run of every device)."""
    total, lap = xp.empty_like(visits[:rows]), xp.empty_like(visits[:rows])
    total[index[:rows]] = visits[:rows]
    for k in range(rows, len(index), rows):
        lap[index[k : k + rows]] = visits[k : k + rows]
        total += lap
    return total


def _first(xp: Any, last: Array, start: Array | None, closed: Array | None) -> Array:
    """z_0: the start, or where the ring is closed the last z."""
    if start is None:
        return last
    return start if closed is None else xp.where(closed, last, start)


def _shifted(xp: Any, z: Array, start: Array | None, closed: Array | None) -> Array:
    """z_{k-1} for every k."""
    before = xp.empty_like(z)
    before[1:], before[0] = z[:-1], _first(xp, z[-1], start, closed)
    return before


def _scan(xp: Any, m: Array, s: Array, start: Array | None, closed: Array | None) -> Array:
    """z_k = m_k + s_k z_{k-1} along the first dimension of (V, width), from `start`, or around the ring where it is closed.

    Blocks of L consecutive rows are scanned from zero side by side, one small operation per position in a block. The blocks' ends are themselves such
    a scan, V / L long, solved likewise, and there the ring is closed. Then z = y + (running product in the block) * (z where the block begins).
    """
    rows, width = m.shape
    if rows <= _DIRECT:
        y, product = _from_zero(xp, m, s)
        loop = y[-1] if start is not None and closed is None else y[-1] / (1 - product[-1])
        return y + product * _first(xp, loop, start, closed)
    length = max(4, min(16, math.isqrt(rows)))
    y, product = _from_zero(xp, _blocks(xp, m, length, 0), _blocks(xp, s, length, 1))
    ends = _scan(xp, y[-1], product[-1], start, closed)
    product *= _shifted(xp, ends, start, closed)
    product += y
    return product.swapaxes(0, 1).reshape(-1, width)[:rows]


#: Up to so many rows the scan is a plain loop.
_DIRECT = 12


def _blocks(xp: Any, array: Array, length: int, fill: float) -> Array:
    """(V, width) as (length, blocks, width), contiguous: one position of all blocks is one run of memory.

    Rows that are missing at the end are filled: m = 0 and s = 1 change nothing.
    """
    (rows, width), count = array.shape, -(-len(array) // length)
    if rows < count * length:
        array = xp.concatenate([array, xp.full_like(array[: count * length - rows], fill)])
    out = xp.empty_like(array).reshape(length, count, width)
    out[...] = array.reshape(count, length, width).swapaxes(0, 1)
    return out


def _from_zero(xp: Any, m: Array, s: Array) -> tuple[Array, Array]:
    """The scan along the first dimension from z_0 = 0, row by row, and the running product of s."""
    y, product = xp.empty_like(m), xp.empty_like(s)
    y[0], product[0] = m[0], s[0]
    last, factor = y[0], product[0]
    for m_k, s_k, y_k, p_k in zip(m[1:], s[1:], y[1:], product[1:], strict=True):
        last = xp.multiply(s_k, last, out=y_k)
        last += m_k
        factor = xp.multiply(s_k, factor, out=p_k)  # a loop, because cumprod works on one column at a time, four times as slow
    return y, product


# ---- for teaching and for tests -------------------------------------------------------------------------------------------------------------------


def unroll(levels: int = 2, form: str = "text") -> str:
    """The recursion z = m(x) + s(x) * z1 with the noise written out `levels` times.

    >>> unroll(1)
    'z = m(x) + s(x) * ( m(x1) + s(x1) * z2 )'

    form: "text", or "typst" for the mathematics of a report. Raises UsageError for any other, and for levels below 0.
    """
    if levels < 0 or form not in ("text", "typst"):
        raise UsageError(f"unroll(levels={levels}, form='{form}'): levels must be at least 0, form 'text' or 'typst'")
    mark, times, left, right = ("", "*", "( ", " )") if form == "text" else ("_", "dot.o", "(", ")")
    out = f"z{mark}{levels + 1}"
    for k in range(levels, -1, -1):
        x = "x" if k == 0 else f"x{mark}{k}"
        step = f"m({x}) + s({x}) {times} {out}"
        out = step if k == 0 else f"{left}{step}{right}"
    return f"z = {out}"


def echo_moments(mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """E z and E z^2 of echo noise, each (..., d), for the law that gives every row of mean, scale (..., B, d) the same weight.

        E z = E m / (1 - E s),   E z^2 = (E m^2 + 2 E[m s] E z) / (1 - E s^2)

    from z = m + s z1 with z1 independent of (m, s) and distributed as z. `scale` is s itself, already clipped, with E s^2 < 1.
    """
    first = mean.mean(-2) / (1 - scale.mean(-2))
    second = (mean.square().mean(-2) + 2 * (mean * scale).mean(-2) * first) / (1 - scale.square().mean(-2))
    return first, second
