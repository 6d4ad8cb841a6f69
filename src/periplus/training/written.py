"""Passes of a run's networks that are written out (`periplus.passes`), where they can be, with the rows that their gradients lie in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from periplus.config import AdversarialConfig
from periplus.networks import MLPGenerator
from periplus.objectives import Penalty
from periplus.passes import CriticPasses, GeneratorPasses, matrix_chain, plain_blocks
from periplus.piecewise import piecewise_linear
from periplus.training.steps import GradientRows, on_host


@dataclass
class WrittenCritic:
    """A critic's passes, and where they leave its gradients."""

    passes: CriticPasses
    gradients: GradientRows

    def fits(self, real: Tensor, fake: Tensor) -> bool:
        """Whether the passes are for so many real images and fakes."""
        return len(real) == len(fake) == self.passes.batch


@dataclass
class WrittenGenerator:
    """A generator's passes, and where they leave its gradients. `fake`: what it painted last, all that it can learn from."""

    passes: GeneratorPasses
    gradients: GradientRows
    fake: Tensor | None = None


def write_critic(critic: nn.Module, optimizer: torch.optim.Adam, config: AdversarialConfig, penalty: Penalty) -> WrittenCritic | None:
    """Passes of a critic with this penalty; None where it is no chain of matrices, or its gradients must find their places otherwise."""
    chain = matrix_chain(piecewise_linear(critic))
    if chain is None or not can_be_written(critic, optimizer, config, (p for layer in chain.layers for p in layer.parameters())):
        return None
    gradients = GradientRows(optimizer)
    return WrittenCritic(CriticPasses(chain, config.batch_size, penalty, gradients.of, working_type(config, gradients)), gradients)


def write_generator(generator: nn.Module, optimizer: torch.optim.Adam, config: AdversarialConfig) -> WrittenGenerator | None:
    """Passes of a generator; None where it is no mlp of ours, or its gradients must find their places otherwise."""
    blocks = plain_blocks(generator)
    if blocks is None or not isinstance(generator, MLPGenerator) or not can_be_written(generator, optimizer, config, generator.parameters()):
        return None
    gradients = GradientRows(optimizer)
    return WrittenGenerator(GeneratorPasses(blocks, generator, config.batch_size, gradients.of, working_type(config, gradients)), gradients)


def can_be_written(network: nn.Module, optimizer: torch.optim.Adam, config: AdversarialConfig, known: Iterable[nn.Parameter]) -> bool:
    """Whether these are all that the network's optimiser moves, each once, all of one type, and no hook waits for gradients to pass by.

    On the host alone: on a GPU it has not been measured.
    """
    parameters, found = optimizer.param_groups[0]["params"], list(known)
    alike = len({p.dtype for p in parameters}) == 1 and all(p.requires_grad for p in parameters)
    hooked = any(p._backward_hooks for p in parameters) or any(m._backward_hooks or m._backward_pre_hooks for m in network.modules())
    return on_host(config) and alike and not hooked and len(found) == len(parameters) and set(found) == set(parameters)


def working_type(config: AdversarialConfig, gradients: GradientRows) -> torch.dtype:
    """The type that passes work in."""
    return torch.bfloat16 if config.precision == "bfloat16" else gradients.row.dtype
