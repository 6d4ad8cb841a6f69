"""Networks side by side: C networks of one shape as one module, whose layers are batched products.

A layer of C small networks is C matrices beside each other,

    y_c = x_c W_c' + b_c,  c = 1..C          W (C, out, in), x (C B, in): the rows of all cells in one list, those of the first cell first

The modules are the ordinary ones: everything in them acts on single rows, except their affine layers and batch normalisation, and these are exchanged
for stacked ones (`stack_modules`). Whatever is stacked keeps its name and its place, so `as_views` can make the parameters and buffers of each single
network views into the stacked ones: cell c reads and writes its own slice, and sees nothing unusual.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, softplus

from periplus.autoencoders import ConstantScaleHead
from periplus.errors import UsageError


class Affine(torch.autograd.Function):
    """x (C, B, in), weight (C, out, in), bias (C, out) or None -> (C, B, out). Its own backward gives the gradient of the weight in the weight's own
    order of memory; that of `baddbmm` is transposed, and Adam then spends as long on copying it as on using it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        d_weight = torch.bmm(gradient.mT, x) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, gradient.sum(1) if ctx.needs_input_grad[2] else None


class StackedLinear(nn.Module):
    """The affine layers of C cells: rows (C B, in) to (C B, out)."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else _stacked([layer.bias for layer in layers])
        self.out_features = layers[0].out_features

    def forward(self, rows: Tensor) -> Tensor:
        cells, out, width = self.weight.shape
        y: Tensor = Affine.apply(rows.reshape(cells, -1, width), self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y.view(-1, out)

    def pull_back(self, rows: Tensor) -> Tensor:
        """The transposes of the linear parts: rows (C B, out) to (C B, in)."""
        cells, out, width = self.weight.shape
        return torch.bmm(rows.view(cells, -1, out), self.weight).view(-1, width)


class StackedBatchNorm1d(nn.Module):
    """Batch normalisation of C cells, each over its own rows: (C B, features) to the same shape.

    To the kernel the features of all cells are so many features of one batch: every figure has the bits of the single layers.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layers: Sequence[nn.BatchNorm1d]) -> None:
        super().__init__()
        if not (layers[0].affine and layers[0].track_running_stats and layers[0].momentum is not None):
            raise UsageError("batch normalisation is stacked with weights and with running statistics of a fixed momentum only")
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = _stacked([layer.bias for layer in layers])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, torch.stack([layer.get_buffer(name) for layer in layers]))
        self.eps, self.momentum = layers[0].eps, layers[0].momentum
        self.training = layers[0].training

    def forward(self, rows: Tensor) -> Tensor:
        cells, features = self.weight.shape
        x = rows.view(cells, -1, features).transpose(0, 1).reshape(-1, cells * features)
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics, affine = (self.running_mean.view(-1), self.running_var.view(-1)), (self.weight.view(-1), self.bias.view(-1))
        y = batch_norm(x, *statistics, *affine, self.training, self.momentum, self.eps)
        return y.view(-1, cells, features).transpose(0, 1).reshape(-1, features)


class StackedScaleHead(nn.Module):
    """`ConstantScaleHead` of C cells."""

    def __init__(self, heads: Sequence[ConstantScaleHead]) -> None:
        super().__init__()
        self.head = StackedLinear([head.head for head in heads])
        self.gate = _stacked([head.gate for head in heads])
        self.log_clip = heads[0].log_clip

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.head(rows)
        log_scale = self.gate if self.log_clip is None else self.log_clip - softplus(-self.gate)
        return mean, log_scale.repeat_interleave(len(mean) // len(log_scale), 0)


STACKED: dict[type[nn.Module], Any] = {
    nn.Linear: StackedLinear,
    nn.BatchNorm1d: StackedBatchNorm1d,
    ConstantScaleHead: StackedScaleHead,
}


def _stacked(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([p.detach() for p in parameters]))


def stack_modules(modules: Sequence[nn.Module]) -> nn.Module:
    """One module of the rows of all cells, from C of one shape; parameters and buffers (C, ...) under the same names, in the same order.

    Raises UsageError for layers with parameters or buffers of their own that are not in STACKED.
    """
    first = modules[0]
    if type(first) in STACKED:
        made: nn.Module = STACKED[type(first)](modules)
        return made
    if first._parameters or first._buffers:
        raise UsageError(f"a {type(first).__name__} cannot be stacked: it has parameters of its own")
    made = copy.copy(first)
    made._modules = {name: stack_modules([m.get_submodule(name) for m in modules]) for name in first._modules}
    return made


def as_views(modules: Sequence[nn.Module]) -> nn.Module:
    """Cells' modules as one (`stack_modules`), of which their parameters and buffers become views."""
    stacked = stack_modules(modules)
    for name, tensor in [*stacked.named_parameters(), *stacked.named_buffers()]:
        for c, module in enumerate(modules):
            owner, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(owner), leaf).data = tensor.data[c]
    return stacked
