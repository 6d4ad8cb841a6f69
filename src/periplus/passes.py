"""Passes through fully connected networks that are written out: same values, same gradients as automatic differentiation, less work.

Automatic differentiation visits each operation on its own, and asks for fresh memory at each of them. Where networks are small, a good part of a
training step goes into that. Here the passes of an adversarial step are written out, in memory that they keep, and gradients are written where the
optimiser reads them:

    CriticPasses.judge, .gradients     real images and fakes to scores and squared slopes |grad_x D|^2; weights' gradients of any loss of these
                .score, .pull_back     fakes to scores, for the generator's step; the fakes' gradient of any loss of these
    GeneratorPasses.paint, .gradients  codes to images; weights' gradients of any loss of these

The gradients of a critic are worth a formula. A critic of matrices with leaky rectifiers between them (`periplus.piecewise` tells why its slopes need
no second derivative) scores an image a_1 = x: layer k makes h_k = W_k a_k + b_k, and a_{k+1} is h_k rectified. The slope comes back the other way:
g_k enters layer k from above, and W_k' g_k leaves it below. Gradients use each matrix once more: that of the scores, d_k, comes down as g_k does;
that of the squared slopes, p_k, goes up as a_k does. So a layer's gradient is the sum of two sums of outer products, and they are one matrix product:

    dL/dW_k = sum over scored images d_k a_k' + sum over slopes g_k p_k' = [d_k, g_k] [a_k, p_k]'

But for the last hidden layer: there g = m * w, the slopes m of its rectifiers times the weights w of the head, and with K = sum over slopes m p'

    dL/dW += diag(w) K,  dL/dw += rows of W * K added up

serves both, so p needs not go up to the head.

A pass works in one type from end to end. Where it is not that of the weights (bfloat16), these are cast once on entry; scores, slopes, images and
gradients are float32 all the same, and so are statistics of batch normalisation and the sums within every product.

What a pass returns lies in memory that the next call of the same pass overwrites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from periplus.networks import Centre, MLPGenerator
from periplus.objectives import Penalty
from periplus.piecewise import PiecewiseLinear

Gradients = Mapping[Tensor, Tensor]
"""Where the gradient of each parameter goes."""

rectify = torch.ops.aten.leaky_relu.out
rectifier_backward = torch.ops.aten.leaky_relu_backward.grad_input
"""Of a gradient, what the rectifier received or returned, its slope, and whether it is the latter."""


Map = tuple[Tensor, Tensor | None]
"""Weight (m, n) and bias (m,) of an affine map, without gradient."""


class Maps:
    """Layers as affine maps, in the type that a pass works in."""

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        self.casts: list[tuple[Tensor, Tensor]] = []
        self.as_cast: list[Map] = [
            (self.in_type(layer.weight, dtype), None if layer.bias is None else self.in_type(layer.bias, dtype)) for layer in layers
        ]

    def in_type(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter itself, or a copy to be kept up to date."""
        if parameter.dtype == dtype:
            return parameter.detach()
        self.casts.append((parameter.detach(), parameter.detach().to(dtype)))
        return self.casts[-1][1]

    def __call__(self) -> list[Map]:
        """With the weights as they are now."""
        for parameter, copy in self.casts:
            copy.copy_(parameter)
        return self.as_cast


def affine(inputs: Tensor, by: Map, out: Tensor) -> Tensor:
    """inputs (B, n) through an affine map into `out` (B, m)."""
    weight, bias = by
    return torch.mm(inputs, weight.t(), out=out) if bias is None else torch.addmm(bias, inputs, weight.t(), out=out)


def places(layers: Sequence[nn.Linear], gradients: Gradients) -> list[Map]:
    """Where the gradients of layers go, as maps."""
    return [(gradients[layer.weight], None if layer.bias is None else gradients[layer.bias]) for layer in layers]


def put_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b into `out`, whatever its type."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(torch.mm(a, b))


def put_sum(rows: Tensor, out: Tensor | None) -> None:
    """The sum over rows (B, n) into `out` (n,), where there is one."""
    if out is not None:
        torch.sum(rows, 0, dtype=out.dtype, out=out)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or better."""
    return torch.promote_types(dtype, torch.float32)


# ---- the critic -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixChain:
    """A critic of n Linear layers on scale * x + shift, with n - 1 leaky rectifiers of these slopes between them."""

    layers: tuple[nn.Linear, ...]
    slopes: tuple[float, ...]
    scale: float
    shift: float


def matrix_chain(chain: PiecewiseLinear | None) -> MatrixChain | None:
    """A chain as one of matrices; None where it has other layers, or two without a rectifier between them, or rows that are not images."""
    if chain is None:
        return None
    stages = [stage for stage in chain.stages if not isinstance(stage, nn.Identity)]
    flattened = next((k for k, stage in enumerate(stages[:2]) if isinstance(stage, nn.Flatten)), None)
    if flattened is None:
        return None
    del stages[flattened]
    centred = isinstance(stages[0], Centre)
    layers = tuple(stage for stage in stages[centred::2] if isinstance(stage, nn.Linear))
    slopes = tuple(stage.negative_slope for stage in stages[centred + 1 :: 2] if isinstance(stage, nn.LeakyReLU))
    if len(layers) + len(slopes) + centred < len(stages):
        return None
    return MatrixChain(layers, slopes, *((2.0, -1.0) if centred else (1.0, 0.0)))


class CriticPasses:
    """The passes of a chain of matrices over `batch` real images and as many fakes. Rows of its arrays: real images, fakes, slopes.

    Slopes are those between real images and fakes (penalty "interpolated"), at the images themselves ("zero-centred"), or none.
    """

    def __init__(self, chain: MatrixChain, batch: int, penalty: Penalty, gradients: Gradients, dtype: torch.dtype) -> None:
        self.chain, self.batch, self.penalty, self.dtype = chain, batch, penalty, dtype
        self.maps, self.found = Maps(chain.layers, dtype), places(chain.layers, gradients)
        scored = self.scored = 2 * batch
        sloped = self.sloped = {"none": 0, "interpolated": batch, "zero-centred": scored}[penalty]

        def rows(count: int, width: int) -> Tensor:
            return torch.empty(count, width, dtype=dtype, device=chain.layers[0].weight.device)

        inputs, hidden = [layer.in_features for layer in chain.layers], [layer.out_features for layer in chain.layers[:-1]]
        self.above = [rows(scored + sloped, n) for n in inputs[:-1]]  # [a_k; p_k]
        self.below = [rows(scored + sloped, n) for n in hidden]  # [d_k; g_k]
        self.features = rows(scored, inputs[-1])
        self.heights = [rows(scored, n) for n in hidden]  # what rectifiers receive where scores, and where slopes, are asked for
        self.places = [rows(sloped, n) for n in hidden] if penalty == "interpolated" else self.heights
        self.products = [rows(max(scored, sloped), n) for n in inputs]  # what leaves a matrix and meets a rectifier next
        self.slope = rows(sloped, inputs[0])
        self.units, self.both = rows(sloped, hidden[-1]), rows(hidden[-1], inputs[-2])  # m and K

    @torch.no_grad()
    def judge(self, real: Tensor, fake: Tensor, mix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores (2 B,) of real images and of fakes (B, ...), and |grad_x D|^2: (B,) between them, (2 B,) at them, or none, (0,).

        mix: weights (B, 1) of the real images in those between a real one and a fake.
        """
        maps, slopes, parts = self.maps(), self.chain.slopes, self.products
        scores = self.climb(maps, slice(self.scored), real, fake)
        if mix is not None:
            batch = self.batch
            torch.lerp(self.heights[0][batch:], self.heights[0][:batch], mix.to(self.dtype), out=self.places[0])
            for k in range(1, len(slopes)):
                rectify(self.places[k - 1], slopes[k - 1], out=parts[k][:batch])
                affine(parts[k][:batch], maps[k], out=self.places[k])
        if not self.sloped:
            return scores, scores.new_empty(0)
        g = (self.chain.scale * maps[-1][0]).expand(self.sloped, -1)
        for k in reversed(range(len(slopes))):
            down = rectifier_backward(g, self.places[k], slopes[k], False, grad_input=self.below[k][self.scored :])
            g = torch.mm(down, maps[k][0], out=parts[k][: self.sloped] if k else self.slope)
        return scores, torch.linalg.vector_norm(g, dim=1, dtype=wide(self.dtype)).square()

    @torch.no_grad()
    def gradients(self, d_scores: Tensor, d_squares: Tensor | None = None) -> None:
        """Of a loss with these derivatives by the scores and squares of `judge`, called just before: the gradient of every weight."""
        weights, slopes, parts, scored = [weight for weight, _ in self.maps.as_cast], self.chain.slopes, self.products, self.scored
        top, head, (*found, (d_head, d_bias)) = len(slopes) - 1, weights[-1], self.found
        put_product(d_scores[None].to(self.dtype), self.features, out=d_head)
        put_sum(d_scores[:, None], d_bias)
        if d_squares is not None:
            torch.mul(self.slope, 2 * d_squares[:, None], out=self.above[0][scored:])
            for k in range(top):
                up = torch.mm(self.above[k][scored:], weights[k].t(), out=parts[k + 1][: self.sloped])
                rectifier_backward(up, self.places[k], slopes[k], False, grad_input=self.above[k + 1][scored:])
            scale = head.new_full((), self.chain.scale).expand_as(self.places[top])
            rectifier_backward(scale, self.places[top], slopes[top], False, grad_input=self.units)
            torch.mm(self.units.t(), self.above[top][scored:], out=self.both)
            d_head += (weights[top] * self.both).sum(1)
        d = torch.mul(d_scores[:, None], head, out=parts[-1][:scored])
        for k in reversed(range(top + 1)):
            down = rectifier_backward(d, self.heights[k], slopes[k], False, grad_input=self.below[k][:scored])
            rows = slice(scored) if k == top else slice(None)
            put_product(self.below[k][rows].t(), self.above[k][rows], out=found[k][0])
            if k == top and d_squares is not None:
                found[k][0].addcmul_(self.both, head.t())
            put_sum(down, found[k][1])
            if k:
                d = torch.mm(down, weights[k], out=parts[k][:scored])

    @torch.no_grad()
    def score(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """Scores (B,) of fakes alone, or (2 B,) of real images and fakes, by the weights as they are now."""
        return self.climb(self.maps(), slice(0 if real is not None else self.batch, self.scored), real, fake)

    @torch.no_grad()
    def pull_back(self, d_scores: Tensor) -> Tensor:
        """Of a loss with these derivatives (B,) by the scores that `score` gave the fakes just before: its gradient by the fakes, (B, n)."""
        maps, fakes = self.maps.as_cast, slice(self.batch, self.scored)
        d = torch.mul((self.chain.scale * d_scores)[:, None], maps[-1][0], out=self.products[-1][fakes])
        for k in reversed(range(len(self.heights))):
            down = rectifier_backward(d, self.heights[k][fakes], self.chain.slopes[k], False, grad_input=self.below[k][fakes])
            d = torch.mm(down, maps[k][0], out=self.products[k][fakes])
        return d

    def climb(self, maps: list[Map], rows: slice, *images: Tensor | None) -> Tensor:
        """Scores of the images in these rows, in float32 or better; real ones and fakes (B, ...) are laid there first, those that are given."""
        lifted = self.above[0]
        for half, batch in zip((lifted[: self.batch], lifted[self.batch : self.scored]), images, strict=True):
            if batch is not None:
                torch.add(batch.new_full((), self.chain.shift), batch.flatten(1), alpha=self.chain.scale, out=half)
        for k, slope in enumerate(self.chain.slopes):
            height = affine(self.above[k][rows], maps[k], out=self.heights[k][rows])
            rectify(height, slope, out=(self.above[k + 1] if k + 1 < len(self.above) else self.features)[rows])
        # a layer with one output is a sum of products, of which a matrix product would prepare more than it does
        head, bias = maps[-1]
        scores = torch.mul(self.features[rows], head, out=self.products[-1][rows]).sum(1, dtype=wide(self.dtype))
        return scores if bias is None else scores.add_(bias)


# ---- the generator --------------------------------------------------------------------------------------------------------------------------

Block = tuple[nn.Linear, nn.BatchNorm1d | None, float]
"""An affine layer, its normalisation, and the slope of the rectifier behind them."""


def plain_blocks(generator: nn.Module) -> list[Block] | None:
    """The hidden layers of an mlp generator in training mode; None for others, and where anything hooks into them."""
    if type(generator) is not MLPGenerator:
        return None
    parts = [generator, generator.body, *generator.body, generator.head]
    if not all(part.training for part in parts) or any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    blocks: list[Block] = []
    for stage in generator.body:
        if isinstance(stage, nn.Linear):
            blocks.append((stage, None, 1.0))
        elif isinstance(stage, nn.BatchNorm1d):
            blocks[-1] = (blocks[-1][0], stage, 1.0)
        elif isinstance(stage, nn.LeakyReLU):
            blocks[-1] = (*blocks[-1][:2], stage.negative_slope)
    return blocks


class GeneratorPasses:
    """The passes of an mlp generator over `batch` codes: affine -> [batch norm] -> rectifier, again and again, then affine -> sigmoid.

    Rectifiers work in place: what they return has the sign of what they received.
    """

    def __init__(self, blocks: list[Block], generator: MLPGenerator, batch: int, gradients: Gradients, dtype: torch.dtype) -> None:
        self.blocks, self.batch, self.image_shape = blocks, batch, generator.image_shape
        layers = [*(layer for layer, _, _ in blocks), generator.head]
        self.maps, self.found = Maps(layers, dtype), places(layers, gradients)
        self.found_norms = [[] if norm is None else [gradients[norm.weight], gradients[norm.bias]] for _, norm, _ in blocks]

        def rows(width: int) -> Tensor:
            return torch.empty(batch, width, dtype=dtype, device=generator.head.weight.device)

        widths = [layer.out_features for layer in layers]
        self.inputs = [rows(layer.in_features) for layer in layers]
        self.heights = [None if norm is None else rows(n) for (_, norm, _), n in zip(blocks, widths, strict=False)]
        self.products, self.pixels = [rows(n) for n in widths], rows(widths[-1])
        self.moments = [None if norm is None else (torch.empty_like(norm.weight), torch.empty_like(norm.weight)) for _, norm, _ in blocks]

    @torch.no_grad()
    def paint(self, codes: Tensor) -> Tensor:
        """Images (B, C, H, W) of codes (B, d), as `generator(codes)` in training mode; running statistics move on."""
        maps, h = self.maps(), self.inputs[0].copy_(codes)
        for k, (_, norm, slope) in enumerate(self.blocks):
            height, moments, following = self.heights[k], self.moments[k], self.inputs[k + 1]
            h = affine(h, maps[k], out=following if height is None else height)
            if norm is not None and moments is not None:
                h = batch_normalised(norm, h, (following, *moments))
            torch.ops.aten.leaky_relu_(h, slope)
        pixels = affine(h, maps[-1], out=self.pixels).sigmoid_()
        return pixels.to(wide(pixels.dtype)).view(-1, *self.image_shape)

    @torch.no_grad()
    def gradients(self, d_images: Tensor) -> None:
        """Of a loss with this derivative (B, ...) by the images of `paint`, called just before: the gradient of every weight."""
        maps = self.maps.as_cast
        d = torch.ops.aten.sigmoid_backward.grad_input(d_images.flatten(1).to(self.pixels.dtype), self.pixels, grad_input=self.products[-1])
        for k in reversed(range(len(self.inputs))):
            put_product(d.t(), self.inputs[k], out=self.found[k][0])
            put_sum(d, self.found[k][1])
            if not k:
                break
            (_, norm, slope), height, moments = self.blocks[k - 1], self.heights[k - 1], self.moments[k - 1]
            d = torch.mm(d, maps[k][0], out=self.products[k - 1])
            d = rectifier_backward(d, self.inputs[k], slope, True, grad_input=d)
            if norm is not None and height is not None and moments is not None:
                d, *of_norm = batch_normalised_backward(norm, d, height, *moments)
                for place, gradient in zip(self.found_norms[k - 1], of_norm, strict=True):
                    place.copy_(gradient)


def batch_normalised(norm: nn.BatchNorm1d, h: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A layer's output for rows (B, d), into `out`, with their means and inverse deviations; its running statistics have moved on."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    running = (norm.running_mean, norm.running_var)
    torch.native_batch_norm(h, norm.weight, norm.bias, *running, True, norm.momentum or 0.0, norm.eps, out=out)
    return out[0]


def batch_normalised_backward(norm: nn.BatchNorm1d, d: Tensor, h: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, gain and offset."""
    running = (norm.running_mean, norm.running_var)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        d, h, norm.weight, *running, mean, deviation, True, norm.eps, [True, True, True]
    )
    return found
