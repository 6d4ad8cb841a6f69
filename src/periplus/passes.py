"""Passes through fully connected networks whose backward passes are written out: same values, same gradients, less work.

Automatic differentiation visits each operation on its own. Where networks are small, much of a training step goes to visits, and to arrays that are
written to be read once. Three passes of an adversarial step are written out here, each as one function:

    paint              codes to images, the generator: differentiable in its weights
    MatrixChain.score  images to scores, for the generator's step: differentiable in the images
    MatrixChain.judge  real images and fakes to scores and squared slopes |grad_x D|^2, for the critic's step: differentiable in its weights

The last one is worth a formula. A critic of matrices with leaky rectifiers between them (`periplus.piecewise` tells why its slopes need no second
derivative) scores an image a_1 = x: layer k makes h_k = W_k a_k + b_k, and a_{k+1} is h_k rectified. The slope comes back the other way: g_k enters
layer k from above, and W_k' g_k leaves it below. Gradients use each matrix once more: that of the scores, d_k, comes down as g_k does; that of the
squared slopes, p_k, goes up as a_k does. So a layer's gradient is the sum of two sums of outer products, and they are one matrix product:

    dL/dW_k = sum over scored images d_k a_k' + sum over slopes g_k p_k' = [d_k, g_k] [a_k, p_k]'

But for the last hidden layer: there g = m * w, the slopes m of its rectifiers times the weights w of the head, and with K = sum over slopes m p'

    dL/dW += diag(w) K,  dL/dw += rows of W * K added up

serves both, so p needs not go up to the head.

Under autocast a pass works in autocast's type from end to end: it casts on entry, once, and returns scores, slopes, images and gradients in float32.
Statistics of batch normalisation stay in float32, and so do the sums within every product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from periplus.networks import Centre, MLPGenerator
from periplus.piecewise import PiecewiseLinear

rectifier_backward = torch.ops.aten.leaky_relu_backward
"""Of a gradient, what the rectifier received or returned, its slope, and whether it is the latter."""


def working_type(like: Tensor) -> torch.dtype:
    """The type of a pass over tensors like this one: autocast's, where it is on."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and like.dtype == torch.float32 else like.dtype


def cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Any]:
    """Tensors in another type; None stays None."""
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


# ---- the critic -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixChain:
    """A critic of n Linear layers on scale * x + shift, with n - 1 leaky rectifiers of these slopes between them."""

    layers: tuple[nn.Linear, ...]
    slopes: tuple[float, ...]
    scale: float
    shift: float

    @property
    def parameters(self) -> list[Tensor | None]:
        """Weight and bias of each layer in turn."""
        return [p for layer in self.layers for p in (layer.weight, layer.bias)]

    def score(self, images: Tensor) -> Tensor:
        """Scores (B,) of images (B, ...), differentiable in the images alone."""
        fixed = (None if p is None else p.detach() for p in self.parameters)
        scores: Tensor = Score.apply(self, working_type(images), images, *fixed)  # type: ignore[no-untyped-call]
        return scores

    def judge(self, real: Tensor, fake: Tensor, mix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores (2 B,) of real images and of fakes (B, ...), and |grad_x D|^2: functions of the weights alone, to be differentiated once.

        mix: weights (B, 1) of the real images in those between a real and a fake one, where slopes are asked for: (B,). Without it: where the scores
        are, (2 B,).
        """
        scores, squares = Judgement.apply(self, working_type(real), real, fake, mix, *self.parameters)  # type: ignore[no-untyped-call]
        return scores, squares

    def lift(self, images: Tensor, out: Tensor) -> Tensor:
        """scale * x + shift as rows into `out`, in one pass over memory."""
        return torch.add(images.new_full((), self.shift), images.flatten(1), alpha=self.scale, out=out)


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


def head_scores(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer with one output, (B, d) to (B,) in float32 or better: a sum of products, of which a matrix product would prepare more than it does."""
    wide = torch.promote_types(features.dtype, torch.float32)
    scores = (features * weight).sum(1, dtype=wide)
    return scores if bias is None else scores.add_(bias)


class Score(torch.autograd.Function):
    """`MatrixChain.score`."""

    @staticmethod
    def forward(ctx: Any, chain: MatrixChain, dtype: torch.dtype, images: Tensor, *given: Tensor | None) -> Tensor:
        parameters = cast(given, dtype)
        weights, biases = parameters[::2], parameters[1::2]
        a = chain.lift(images, out=weights[0].new_empty(len(images), weights[0].shape[1]))
        heights = []
        for k, slope in enumerate(chain.slopes):
            heights.append(linear(a, weights[k], biases[k]))
            a = leaky_relu(heights[k], slope)
        ctx.save_for_backward(*weights)
        ctx.chain, ctx.heights, ctx.images = chain, heights, (images.shape, images.dtype)
        return head_scores(a, weights[-1], biases[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, ...]:
        weights, (shape, dtype) = ctx.saved_tensors, ctx.images
        d = (ctx.chain.scale * d_scores)[:, None].to(weights[-1].dtype) * weights[-1]
        for k in reversed(range(len(ctx.heights))):
            d = torch.mm(rectifier_backward(d, ctx.heights[k], ctx.chain.slopes[k], False), weights[k])
        return None, None, d.to(dtype).view(shape), *[None] * (2 * len(weights))


class Judgement(torch.autograd.Function):
    """`MatrixChain.judge`, with the backward pass of the head of this file."""

    @staticmethod
    def forward(
        ctx: Any, chain: MatrixChain, dtype: torch.dtype, real: Tensor, fake: Tensor, mix: Tensor | None, *given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        parameters, batch = cast(given, dtype), len(real)
        weights, biases = parameters[::2], parameters[1::2]
        scored, sloped = 2 * batch, 2 * batch if mix is None else batch
        above = [w.new_empty(scored + sloped, w.shape[1]) for w in weights[:-1]]  # [a_k; p_k]: forward fills a, backward p
        above.append(weights[-1].new_empty(scored, weights[-1].shape[1]))
        below = [w.new_empty(scored + sloped, w.shape[0]) for w in weights[:-1]]  # [d_k; g_k]: forward fills g, backward d
        chain.lift(real, out=above[0][:batch])
        chain.lift(fake, out=above[0][batch:scored])

        heights, places = [], []  # what the rectifiers receive where scores, and where slopes, are asked for
        for k, slope in enumerate(chain.slopes):
            heights.append(linear(above[k][:scored], weights[k], biases[k]))
            torch.ops.aten.leaky_relu.out(heights[k], slope, out=above[k + 1][:scored])
            if mix is None:
                places.append(heights[k])
            elif k == 0:
                places.append(torch.lerp(heights[0][batch:], heights[0][:batch], mix.to(dtype)))
            else:
                places.append(linear(leaky_relu(places[-1], chain.slopes[k - 1]), weights[k], biases[k]))
        g = (chain.scale * weights[-1]).expand(sloped, -1)
        for k in reversed(range(len(places))):
            rectifier_backward.grad_input(g, places[k], chain.slopes[k], False, grad_input=below[k][scored:])
            g = torch.mm(below[k][scored:], weights[k])

        ctx.save_for_backward(*weights)
        ctx.chain, ctx.above, ctx.below, ctx.heights, ctx.places, ctx.gradient = chain, above, below, heights, places, g
        ctx.given = [None if p is None else p.dtype for p in given]
        squares = torch.linalg.vector_norm(g, dim=1, dtype=torch.promote_types(dtype, torch.float32)).square()
        return head_scores(above[-1], weights[-1], biases[-1]), squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_scores: Tensor, d_squares: Tensor) -> tuple[Tensor | None, ...]:
        weights, slopes, above, below = ctx.saved_tensors, ctx.chain.slopes, ctx.above, ctx.below
        scored, top, dtype = len(d_scores), len(slopes) - 1, weights[0].dtype
        torch.mul(ctx.gradient, 2 * d_squares[:, None], out=above[0][scored:])
        for k in range(top):
            p = torch.mm(above[k][scored:], weights[k].t())
            rectifier_backward.grad_input(p, ctx.places[k], slopes[k], False, grad_input=above[k + 1][scored:])

        head = weights[-1]
        m = rectifier_backward(head.new_full((), ctx.chain.scale).expand_as(ctx.places[top]), ctx.places[top], slopes[top], False)
        both = torch.mm(m.t(), above[top][scored:])
        d_head = torch.mm(d_scores[None].to(dtype), above[-1]) + (weights[top] * both).sum(1)
        found: list[Tensor] = [d_head, d_scores.sum(0, keepdim=True)]
        d = d_scores[:, None].to(dtype) * head
        for k in reversed(range(top + 1)):
            rectifier_backward.grad_input(d, ctx.heights[k], slopes[k], False, grad_input=below[k][:scored])
            rows = slice(scored) if k == top else slice(None)
            d_weight = torch.mm(below[k][rows].t(), above[k][rows])
            found = [d_weight.addcmul_(both, head.t()) if k == top else d_weight, below[k][:scored].sum(0), *found]
            d = torch.mm(below[k][:scored], weights[k]) if k else d
        return None, None, None, None, None, *(None if kind is None else p.to(kind) for p, kind in zip(found, ctx.given, strict=True))


# ---- the generator --------------------------------------------------------------------------------------------------------------------------

Block = tuple[nn.Linear, nn.BatchNorm1d | None, float]
"""An affine layer, its normalisation, and the slope of the rectifier behind them."""


def paint(generator: nn.Module, codes: Tensor) -> Tensor:
    """Images (B, C, H, W) of codes (B, d): `generator(codes)`, written out for an mlp of ours in training mode; codes get no gradient there."""
    blocks = plain_blocks(generator)
    if blocks is None or not isinstance(generator, MLPGenerator):
        images: Tensor = generator(codes)
        return images
    parameters = [p for layer, norm, _ in blocks for p in (layer.weight, layer.bias, *((None, None) if norm is None else (norm.weight, norm.bias)))]
    pixels: Tensor = Paint.apply(blocks, working_type(codes), codes, *parameters, generator.head.weight, generator.head.bias)  # type: ignore[no-untyped-call]
    return pixels.view(-1, *generator.image_shape)


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


class Paint(torch.autograd.Function):
    """Codes (B, d) to pixels (B, n): affine -> [batch norm] -> rectifier, again and again, then affine -> sigmoid.

    Rectifiers work in place: what they return has the sign of what they received.
    """

    @staticmethod
    def forward(ctx: Any, blocks: list[Block], dtype: torch.dtype, codes: Tensor, *given: Tensor | None) -> Tensor:
        h, inputs, heights, moments = codes.to(dtype), [], [], []
        weights, biases = cast((*given[:-2:4], given[-2]), dtype), cast((*given[1:-2:4], given[-1]), dtype)
        for k, (_, norm, slope) in enumerate(blocks):
            inputs.append(h)
            h = linear(h, weights[k], biases[k])
            heights.append(h)
            if norm is not None:
                h, mean, deviation = batch_normalised(norm, h)
                moments.append((mean, deviation))
            torch.ops.aten.leaky_relu_(h, slope)
        inputs.append(h)
        pixels = linear(h, weights[-1], biases[-1]).sigmoid_()
        ctx.save_for_backward(*weights)
        ctx.blocks, ctx.inputs, ctx.heights, ctx.moments, ctx.pixels = blocks, inputs, heights, moments, pixels
        ctx.given = [None if p is None else p.dtype for p in given]
        return pixels.to(codes.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_pixels: Tensor) -> tuple[Tensor | None, ...]:
        weights, moments = ctx.saved_tensors, list(ctx.moments)
        d = torch.ops.aten.sigmoid_backward(d_pixels.to(ctx.pixels.dtype), ctx.pixels)
        found: list[Tensor | None] = [torch.mm(d.t(), ctx.inputs[-1]), d.sum(0)]
        for k in reversed(range(len(ctx.blocks))):
            _, norm, slope = ctx.blocks[k]
            d = rectifier_backward(torch.mm(d, weights[k + 1]), ctx.inputs[k + 1], slope, True)
            of_norm: list[Tensor | None] = [None, None]
            if norm is not None:
                d, *of_norm = batch_normalised_backward(norm, d, ctx.heights[k], *moments.pop())
            found = [torch.mm(d.t(), ctx.inputs[k]), None if ctx.given[4 * k + 1] is None else d.sum(0), *of_norm, *found]
        return None, None, None, *(None if p is None else p.to(kind) for p, kind in zip(found, ctx.given, strict=True))


def batch_normalised(norm: nn.BatchNorm1d, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output for rows (B, d), their means and inverse deviations; its running statistics have moved on."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return torch.native_batch_norm(h, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum or 0.0, norm.eps)


def batch_normalised_backward(norm: nn.BatchNorm1d, d: Tensor, h: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, gain and offset."""
    running = (norm.running_mean, norm.running_var)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        d, h, norm.weight, *running, mean, deviation, True, norm.eps, [True, True, True]
    )
    return found
