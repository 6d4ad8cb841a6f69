"""The adversarial loop as tutorials write it: what ours is timed against (`periplus.benchmarking`).

It trains the same objective, with the same networks, step sizes, weights of penalties and precision, and it does what is usual:

* a dataset of PIL images, each made a tensor when it is asked for (`PictureData`, `from_loader`), or, one habit less, all images as one float tensor
  and a batch as an index (`in_memory`);
* the critic sees real images and fakes in two passes, and its penalty is differentiated twice;
* the generator's step makes its fakes anew, and its backward pass fills the critic's gradients as well;
* `zero_grad`, `backward`, `step` with Adam as it comes; both losses are read after each step.

Left out, although usual: printing, resizing pictures, a last batch of another size. Running averages, gradient norms and a check for what is not
finite, which ours does at each step, tutorials do not have.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from periplus import objectives
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.training.adversarial import CRITIC_LOSSES
from periplus.training.steps import autocast

# ---- batches --------------------------------------------------------------------------------------------------------------------------------


class PictureData(Dataset[tuple[Tensor, int]]):
    """Images as PIL pictures, transformed one by one: (image (C, H, W) in [0, 1], label)."""

    def __init__(self, data: ImageData) -> None:
        pixels = data.images.cpu()
        self.pixels = (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).contiguous().numpy()
        self.labels = [0] * len(data) if data.labels is None else data.labels.tolist()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return picture_to_float(Image.fromarray(self.pixels[index])), self.labels[index]


def picture_to_float(picture: Image.Image) -> Tensor:
    """A grey or colour picture as floats in [0, 1], (C, H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous().float().div(255)


def from_loader(data: ImageData, batch_size: int, workers: int) -> Generator[Tensor, None, None]:
    """Whole batches (B, C, H, W) from pictures, shuffled in each epoch, without end; on the host."""
    loader = DataLoader(PictureData(data), batch_size, shuffle=True, num_workers=workers, drop_last=True)
    for images, _ in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield images


def in_memory(data: ImageData, batch_size: int, device: str) -> Generator[Tensor, None, None]:
    """Whole batches (B, C, H, W) by index from one float tensor, shuffled in each epoch, without end; on the device."""
    images = data.images.to(device).float().div(255).contiguous()
    while True:
        order = torch.randperm(len(images), device=device)
        for k in range(len(images) // batch_size):
            yield images[order[k * batch_size : (k + 1) * batch_size]]


# ---- the loop -------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Textbook:
    """Two networks on their device, in training mode, and what trains them. `config` is resolved."""

    config: AdversarialConfig
    generator: nn.Module
    critic: nn.Module
    batches: Iterator[Tensor]
    losses: list[tuple[float, float]] = field(default_factory=list)
    """The critic's and the generator's at each step."""

    def __post_init__(self) -> None:
        betas = (self.config.beta1 or 0.0, self.config.beta2 or 0.0)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=self.config.learning_rate, betas=betas)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=self.config.learning_rate, betas=betas)

    def step(self) -> None:
        """Some steps of the critic, and one of the generator."""
        for _ in range(self.config.critic_steps):
            real = next(self.batches).to(self.config.device)
            with autocast(self.config):
                fake = self.generator(self.codes(real)).detach()
                of_critic = critic_loss(self.critic, real, fake, self.config)
            self.critic_optimizer.zero_grad()
            of_critic.backward()
            self.critic_optimizer.step()
        with autocast(self.config):
            of_generator = generator_loss(self.critic, real, self.generator(self.codes(real)), self.config)
        self.generator_optimizer.zero_grad()
        of_generator.backward()
        self.generator_optimizer.step()
        self.losses.append((of_critic.item(), of_generator.item()))

    def codes(self, real: Tensor) -> Tensor:
        """Codes z ~ N(0, 1) (B, d) for a batch like this one."""
        return torch.randn(len(real), self.config.latent_dim, device=real.device)


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, config: AdversarialConfig) -> Tensor:
    """The critic's whole loss on real images and fakes (B, C, H, W): a scalar."""
    weight = config.penalty_weight or 0.0
    if config.model == "rpgan":  # its penalty is taken where the scores are
        real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
    real_score, fake_score = critic(real).float(), critic(fake).float()
    loss = CRITIC_LOSSES[config.model](real_score, fake_score)
    if config.model == "wgan-gp":
        loss = loss + weight * gradient_penalty(critic, real, fake)
    if config.model == "rpgan":
        loss = loss + weight / 2 * (squared_slope(real_score, real) + squared_slope(fake_score, fake))
    return loss


def generator_loss(critic: nn.Module, real: Tensor, fake: Tensor, config: AdversarialConfig) -> Tensor:
    """The generator's loss on fakes (B, C, H, W) with their graph: a scalar."""
    if config.model == "rpgan":
        return objectives.relativistic_generator_loss(critic(real).float(), critic(fake).float())
    if config.model == "wgan-gp":
        return objectives.wgan_generator_loss(critic(fake).float())
    return objectives.gan_generator_loss(critic(fake).float(), config.generator_loss)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Mean of (|grad D| - 1)^2 over images between real ones and fakes, differentiated twice: a scalar."""
    weights = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (weights * real + (1 - weights) * fake).requires_grad_()
    slopes = gradient(critic(between), between)
    norms: Tensor = slopes.flatten(1).norm(2, dim=1)
    return (norms - 1).square().mean()


def squared_slope(scores: Tensor, images: Tensor) -> Tensor:
    """Mean of |grad D|^2 over the images that got these scores, differentiated twice: a scalar."""
    return gradient(scores, images).square().flatten(1).sum(1).mean()


def gradient(scores: Tensor, images: Tensor) -> Tensor:
    """grad_x D for each image, with its graph."""
    return torch.autograd.grad(scores, images, grad_outputs=torch.ones_like(scores), create_graph=True)[0]
