"""The gradient of a critic's score with respect to the image, in first order: for critics that are piecewise linear.

A critic of affine maps A_1, A_2, ... A_n with leaky rectifiers between them is, around almost every image x, one affine function of x. Its slope is

    grad_x D = A_1' M_1 A_2' M_2 ... A_n'

A' the linear part transposed (of a convolution: the transposed convolution), M_k the slopes of the rectifiers, 1 or 0.2 for each unit. The slopes
are constant around x, so nothing is differentiated through them: the penalty is an ordinary function of the weights with an ordinary, first-order
gradient, equal to what differentiating twice gives wherever that is defined (Gulrajani et al. 2017 differentiate twice), and biases have none.

Two things come free with it. The first affine map needs no second pass for an image between a real and a fake one: A_1(e x + (1 - e) y) =
e A_1 x + (1 - e) A_1 y. And R1 and R2 read the slopes off the pass that scored the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from periplus.networks import Centre, Critic
from periplus.stacking import StackedLinear

Inputs = list[Tensor]
"""What the rectifiers received, first to last: where the slopes are read off. Without gradient."""


@dataclass(frozen=True)
class PiecewiseLinear:
    """A critic as a chain of affine maps and leaky rectifiers; `lead` stages come before the first rectifier, all affine."""

    stages: tuple[nn.Module, ...]
    lead: int

    def first(self, images: Tensor) -> Tensor:
        """What the first rectifier receives, (B, ...), for images (B, C, H, W): an affine function of the images."""
        for stage in self.stages[: self.lead]:
            images = stage(images)
        return images

    def scores(self, h: Tensor) -> tuple[Tensor, Inputs]:
        """Scores (B,), and what every rectifier received on the way, from what the first one receives."""
        received = []
        for stage in self.stages[self.lead :]:
            if isinstance(stage, nn.LeakyReLU):
                received.append(h.detach())
            h = stage(h)
        return h.squeeze(1), received

    @torch.no_grad()
    def received(self, h: Tensor) -> Inputs:
        """What every rectifier receives, alone: what follows the last of them is not computed."""
        received: Inputs = []
        rectifiers = sum(isinstance(stage, nn.LeakyReLU) for stage in self.stages)
        for stage in self.stages[self.lead :]:
            if isinstance(stage, nn.LeakyReLU):
                received.append(h)
                if len(received) == rectifiers:
                    break
            h = stage(h)
        return received

    def gradient(self, received: Sequence[Tensor], image_shape: Sequence[int]) -> Tensor:
        """grad_x D (B, C, H, W) where the rectifiers receive this; differentiable with respect to the weights."""
        batch, shapes = len(received[0]), self._shapes(received, image_shape)
        left = list(received)
        g = received[0].new_ones((batch, 1))
        for stage, shape in zip(reversed(self.stages), reversed(shapes), strict=True):
            if isinstance(stage, nn.LeakyReLU):
                g = times_slope(g, left.pop(), stage.negative_slope)
            elif isinstance(stage, nn.Linear):
                g = g @ stage.weight
            elif isinstance(stage, StackedLinear):
                g = stage.pull_back(g)
            elif isinstance(stage, nn.Conv2d):
                g = pull_back(g, stage, shape)
            elif isinstance(stage, nn.Flatten):
                g = g.view(batch, *shape)
            elif isinstance(stage, Centre):
                g = 2 * g
        return g

    def _shapes(self, received: Sequence[Tensor], image_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape (...) of one example before each stage."""
        shape, found, left = tuple(image_shape), [], list(received)
        for stage in self.stages:
            found.append(shape)
            if isinstance(stage, nn.LeakyReLU):
                shape = tuple(left.pop(0).shape[1:])
            elif isinstance(stage, nn.Conv2d):
                shape = (stage.out_channels, *(_side(stage, k, side) for k, side in enumerate(shape[1:])))
            elif isinstance(stage, nn.Flatten):
                shape = (torch.Size(shape).numel(),)
            elif isinstance(stage, nn.Linear | StackedLinear):
                shape = (stage.out_features,)
        return found


def _side(layer: nn.Conv2d, k: int, side: int) -> int:
    padding, dilation = int(layer.padding[k]), layer.dilation[k]
    return (side + 2 * padding - dilation * (layer.kernel_size[k] - 1) - 1) // layer.stride[k] + 1


def pull_back(g: Tensor, layer: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """The transpose of a convolution, for inputs of `shape` (C, H, W)."""
    padding = [int(p) for p in layer.padding]
    reached = [(g.shape[2 + k] - 1) * layer.stride[k] - 2 * padding[k] + layer.dilation[k] * (layer.kernel_size[k] - 1) + 1 for k in (0, 1)]
    rest = [side - end for side, end in zip(shape[1:], reached, strict=True)]
    return conv_transpose2d(g, layer.weight, None, layer.stride, padding, rest, layer.groups, layer.dilation)


def times_slope(g: Tensor, h: Tensor, negative_slope: float) -> Tensor:
    """g times the derivative of a leaky rectifier at h, in one pass over memory; differentiable in g. At 0 the leaky slope, as autograd has it."""
    product: Tensor = torch.ops.aten.leaky_relu_backward(g, h, negative_slope, False)
    return product


def piecewise_linear(critic: nn.Module) -> PiecewiseLinear | None:
    """A critic's chain, or None where it is not one that this module knows: then its gradient must be differentiated twice.

    Known are the critics of `periplus.networks`, many of them side by side (`periplus.stacking`), and an `nn.Sequential` of Linear, Conv2d (zero
    padding), LeakyReLU, ReLU and Flatten with one score at the end, without hooks and without active dropout.
    """
    if not isinstance(critic, Critic | nn.Sequential) or type(critic).forward not in (Critic.forward, nn.Sequential.forward):
        return None
    stages = tuple(rectifier(stage) for stage in (critic.stages if isinstance(critic, Critic) else critic))
    if not all(known(stage) for stage in stages) or any(m._forward_hooks or m._forward_pre_hooks for m in critic.modules()):
        return None
    rectifiers = [k for k, stage in enumerate(stages) if isinstance(stage, nn.LeakyReLU)]
    if not rectifiers or not isinstance(stages[-1], nn.Linear | StackedLinear) or stages[-1].out_features != 1:
        return None
    return PiecewiseLinear(stages, rectifiers[0])


def rectifier(stage: nn.Module) -> nn.Module:
    """A ReLU as a leaky one of slope 0; none of them in place, where they would overwrite what is kept; dropout that does nothing as nothing."""
    if type(stage) is nn.ReLU:
        return nn.LeakyReLU(0.0)
    if type(stage) is nn.LeakyReLU and stage.inplace:
        return nn.LeakyReLU(stage.negative_slope)
    return nn.Identity() if isinstance(stage, nn.Dropout) and (stage.p == 0 or not stage.training) else stage


def known(stage: nn.Module) -> bool:
    """Whether `PiecewiseLinear` has the transpose of a stage."""
    if type(stage) is nn.Conv2d:
        return stage.padding_mode == "zeros" and not isinstance(stage.padding, str)
    if type(stage) is nn.Flatten:
        return stage.start_dim == 1 and stage.end_dim == -1
    return type(stage) in (nn.Linear, StackedLinear, nn.LeakyReLU, Centre, nn.Identity)
