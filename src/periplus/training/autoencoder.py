"""The autoencoder loop: VAE against a prior, VAE against its own marginal, echo noise.

One step on a batch x: encode, (m, s) = encoder(x); send, z ~ q(z|x), through the channel; decode; then one Adam step of both networks on

    loss = mean of distortion(x, decoder(z)) + beta * mean of rate        nats per example, distortions summed over pixels

where the rate is

    prior      KL[N(m, s^2) || N(0, 1)], in closed form                    an upper bound on I(x; z)
    marginal   an estimate of KL[q(z|x) || q(z)] from the batch            its bias: periplus.information.batch_rate
    echo       - sum_j ln s_j, in closed form                              an upper bound on I(x; z), equal to it where h(z) is finite

beta is the only weight, and it is a field of the configuration. The habits are those of the adversarial loop: everything random in step n is a
function of (seed, n), nothing is updated with a non-finite loss or gradient, and the complete state is what `State.tensors` lists. That state
includes the chain of an echo channel, the last code of the batch before, from which the recursion goes on where a batch is too short to close it.

With `path_weight` the decoder is also asked to make least-cost paths between the encoder's means of the batch's images cheap, at every fourth step:

    path_weight * EVERY * mean of (U~ + RECONSTRUCTION * end errors + SPEED * speed excess)            nats per unit of U~

(`periplus.training.path_term`). A limit of speed stands where an adversarial model has its critic, and codes and
paths are held fixed: the term moves the decoder only. Without the weight no line of this runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from periplus import information, objectives
from periplus.autoencoders import AutoencoderNetworks, start_at_mean
from periplus.channels import EchoChannel, GaussianChannel
from periplus.checkpoints import Checkpoint
from periplus.config import AutoencoderConfig
from periplus.data import ImageData
from periplus.errors import Interrupted, RunError, UsageError
from periplus.networks import ImageShape, has_batch_norm
from periplus.pictures import image_grid
from periplus.runs import SAMPLES, channel_of, codes, load_module, marginal_codes
from periplus.seeds import stream
from periplus.training.interruption import StopRequest
from periplus.training.journal import Clock, OnProgress, check_finite, save_checkpoint, write_line
from periplus.training.path_term import EVERY, RECONSTRUCTION, SPEED, PathTerm
from periplus.training.steps import (
    Batches,
    apply_gradients,
    autocast,
    due,
    evaluation_mode,
    hold_out,
    new_optimizer,
    on_host,
    optimizer_tensors,
    restore_optimizer,
    seed_step,
    some_images,
    steps_in_all,
    to_float,
)

#: What a step measures, nats per example but the last; metrics.jsonl holds the means since the line before.
MEASURES = ("loss", "distortion", "rate", "gradient_norm")
GRID_COLUMNS = 8
BANK_IMAGES = 4096

Channel = GaussianChannel | EchoChannel


@dataclass
class State:
    """Everything that changes while training."""

    networks: nn.ModuleDict
    optimizer: torch.optim.Adam
    sums: Tensor
    """Sums of MEASURES since the last line of metrics, float64."""
    chain: Tensor | None = None
    """echo: the last code (d,) of the batch before."""
    paths: PathTerm | None = None
    """With a path weight: what is paid for passages."""
    summed: int = 0
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a checkpoint."""
        chain = {} if self.chain is None else {"chain": self.chain}
        return {**self.networks.state_dict(), **optimizer_tensors(self.optimizer, "optimizer."), "sums": self.sums, **chain} | (
            {} if self.paths is None else self.paths.tensors()
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state, bit for bit. Raises RunError where it does not fit."""
        for part in self.networks:
            load_module(self.networks[part], checkpoint, f"{part}.")
        restore_optimizer(self.optimizer, checkpoint, "optimizer.")
        try:
            self.sums.copy_(checkpoint.tensors["sums"])
            self.summed = int(checkpoint.values["summed"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{checkpoint.path} lacks the state of the metrics ({error}): it is not of this version") from None
        chain = checkpoint.tensors.get("chain")
        self.chain = None if chain is None else chain.to(self.sums.device)
        if self.paths is not None:
            self.paths.restore(checkpoint)
        self.step = checkpoint.step


def new_state(config: AutoencoderConfig, networks: AutoencoderNetworks, device: str) -> State:
    """Networks on the device and their optimiser, at step 0."""
    both = nn.ModuleDict(networks._asdict()).to(device).train()
    return State(both, new_optimizer(both, config), torch.zeros(len(MEASURES), dtype=torch.float64, device=device))


# ---- one step -------------------------------------------------------------------------------------------------------------------------------


def autoencoder_step(
    state: State, config: AutoencoderConfig, channel: Channel, images: Tensor, population: int, healthy: Tensor
) -> tuple[Tensor, Tensor]:
    """One optimiser step on images (B, C, H, W). Returns (measures (4,), healthy): see `apply_gradients`. `population`: training images."""
    with autocast(config):
        mean, log_scale = (part.float() for part in state.networks["encoder"](images))
    if isinstance(channel, EchoChannel):
        z, state.chain = channel.advance(mean, log_scale, state.chain)
    else:
        z = channel.sample(mean, log_scale)
    with autocast(config):
        output = state.networks["decoder"](z)
    distortion = distortion_of(config, output.float(), images).mean()
    rate = rate_of(config, channel, z, mean, log_scale, population).mean()
    loss = distortion + config.beta * rate
    total = loss + path_loss(state, config, images) if state.paths is not None and state.paths.due(state.step) else loss
    norm, healthy = apply_gradients(state.optimizer, total, healthy)
    return torch.stack([loss, distortion, rate, norm]).detach(), healthy


def path_loss(state: State, config: AutoencoderConfig, images: Tensor) -> Tensor:
    """What the decoder pays for the paths of a visit, nats: their U~, the errors of their ends, and the excess of their speed."""
    assert state.paths is not None
    encoder, decoder = state.networks["encoder"], state.networks["decoder"]
    with evaluation_mode(encoder, decoder):
        visit = state.paths.visit_decoder(lambda x: encoder(x)[0], lambda z: decode(state, config, z), images)
    if visit is None:
        return images.new_zeros(())
    excess = visit.speed_excess.mean()
    state.paths.add(visit, excess)
    return config.path_weight * EVERY * (visit.scores.mean() + RECONSTRUCTION * visit.end_errors.mean() + SPEED * excess)


def distortion_of(config: AutoencoderConfig, output: Tensor, images: Tensor) -> Tensor:
    """Distortion (B,) in nats of a decoder's output, summed over pixels."""
    if config.likelihood == "bernoulli":
        return objectives.bernoulli_distortion(output, images)
    return objectives.gaussian_distortion(output, images, config.sigma or math.sqrt(0.5))


def rate_of(config: AutoencoderConfig, channel: Channel, z: Tensor, mean: Tensor, log_scale: Tensor, population: int) -> Tensor:
    """The rate (B,) in nats that the loss prices; an estimate from the batch where it is taken against the marginal."""
    if config.rate == "marginal":
        return information.batch_rate(z, mean, log_scale, config.estimator or "stratified", population)
    return channel.rate(mean, log_scale)


def set_learning_rate(state: State, config: AutoencoderConfig, steps: int) -> None:
    """The step size of this step, by the configuration's schedule."""
    if config.schedule == "cosine":
        for group in state.optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * state.step / steps))


# ---- the loop -------------------------------------------------------------------------------------------------------------------------------


def train_autoencoder(
    config: AutoencoderConfig,
    data: ImageData,
    folder: Path,
    networks: AutoencoderNetworks,
    resume: Checkpoint | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Train in a prepared run folder, from step 0 or from a checkpoint, to the end.

    `config` is resolved, `networks` are initialised. Raises Interrupted after a signal (with a checkpoint left), NonFiniteError at a non-finite
    loss or gradient (nothing updated with it, the last good checkpoint kept). `periplus.training.train` is the front door.
    """
    train_data, held_out = hold_out(config, data)
    batches = Batches(train_data.images.to(config.device), config.batch_size, config.seed)
    steps = steps_in_all(config, len(train_data))
    channel = channel_of(config)
    if config.architecture != "custom":  # one's own decoder starts where its owner put it
        start_at_mean(networks.decoder, mean_image(train_data), logits=config.architecture != "linear" or config.likelihood == "bernoulli")
    state = new_state(config, networks, config.device)
    if config.path_weight:
        state.paths = PathTerm(config, train_data)
    if resume is not None:
        state.restore(resume)
    if held_out is not None and len(held_out) < 2:
        held_out = None  # one image alone has neither echo noise nor a marginal: it is not watched
    watched = to_float(some_images(config, train_data if held_out is None else held_out))
    bank = Bank(config, bank_images(config, train_data))
    clock = Clock(folder, config, len(train_data), state.step)
    healthy = torch.ones((), dtype=torch.bool, device=config.device)

    with StopRequest() as stop:
        for step in range(state.step, steps):
            seed_step(config, step)
            set_learning_rate(state, config, steps)
            measures, healthy = autoencoder_step(state, config, channel, batches(step), len(train_data), healthy)
            if on_host(config) or due(step + 1, config.log_every, steps):
                check_finite(healthy, step, folder)
            state.step, state.summed = step + 1, state.summed + 1
            state.sums += measures.double()

            if due(state.step, config.log_every, steps):
                log(state, config, channel, None if held_out is None else watched, clock, folder, steps, on_progress)
            if due(state.step, config.sample_every, steps):
                check_finite(healthy, step, folder)
                with evaluation_mode(state.networks["encoder"], state.networks["decoder"]):
                    save_samples(state, config, channel, watched, bank, folder)
            stopping = stop.requested  # read once: a signal may come between two looks
            if due(state.step, config.checkpoint_every, steps) or stopping:
                check_finite(healthy, step, folder)
                save_checkpoint(folder, config, state.step, steps, state.tensors() | bank(state), {"summed": state.summed})
            if stopping and state.step < steps:
                raise Interrupted(f"stopped by {stopping} at step {state.step} of {steps}; resume with --resume --out {folder}")


def mean_image(data: ImageData) -> Tensor:
    """The mean of the images, (C, H, W) in [0, 1]."""
    return (data.images.sum(0, dtype=torch.float64) / (255 * len(data))).float()


def log(
    state: State,
    config: AutoencoderConfig,
    channel: Channel,
    held_out: Tensor | None,
    clock: Clock,
    folder: Path,
    steps: int,
    on_progress: OnProgress | None,
) -> None:
    """Append the means since the last line, and what held-out images cost now, to metrics.jsonl."""
    metrics = dict(zip(MEASURES, (state.sums / state.summed).tolist(), strict=True))
    if held_out is not None:
        with evaluation_mode(state.networks["encoder"], state.networks["decoder"]):
            metrics |= watch(state, config, channel, held_out)
    if state.paths is not None:
        metrics |= state.paths.measures()
    write_line(folder, clock, state.step, steps, metrics, on_progress)
    state.sums.zero_()
    state.summed = 0


@torch.no_grad()
def watch(state: State, config: AutoencoderConfig, channel: Channel, held_out: Tensor) -> dict[str, float]:
    """Distortion and rate of up to 256 images that are never trained on, one code each. A rate against the marginal: of these images' own q(z)."""
    mean, log_scale = (part.float() for part in state.networks["encoder"](held_out))
    z = channel.sample(mean, log_scale)
    distortion = distortion_of(config, state.networks["decoder"](z).float(), held_out).mean()
    rate = rate_of(config, channel, z, mean, log_scale, len(held_out)).mean()
    return {"distortion_held_out": float(distortion), "rate_held_out": float(rate)}


@dataclass
class Bank:
    """Encodings of up to 4096 training images: what q(z) is drawn from when the run is sampled. A function of the weights."""

    config: AutoencoderConfig
    images: Tensor

    @torch.no_grad()
    def __call__(self, state: State) -> dict[str, Tensor]:
        """As named tensors, for a checkpoint; nothing for a run that is held to the prior N(0, 1)."""
        if self.config.rate == "prior":
            return {}
        with evaluation_mode(state.networks["encoder"]):
            parts = [state.networks["encoder"](to_float(block)) for block in self.images.split(1000)]
        return {f"marginal.{name}": torch.cat([part[k].float() for part in parts]) for k, name in enumerate(("mean", "log_scale"))}


def bank_images(config: AutoencoderConfig, data: ImageData) -> Tensor:
    """The training images of the bank, drawn by seed, uint8 on the device."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream(config.seed, "bank")))
    return data.images[order[:BANK_IMAGES]].to(config.device)


@torch.no_grad()
def save_samples(state: State, config: AutoencoderConfig, channel: Channel, images: Tensor, bank: Bank, folder: Path) -> None:
    """Write a grid: held-out images above their reconstructions, then samples."""
    shown = images[: 2 * GRID_COLUMNS]
    rebuilt = decode(state, config, channel.sample(*state.networks["encoder"](images)))[: len(shown)]
    count = 4 * GRID_COLUMNS
    if config.rate == "prior":
        z = codes(config.seed, "grid", count, config.latent_dim, config.device)
    else:
        encodings = bank(state)
        z = marginal_codes(channel, encodings["marginal.mean"].cpu(), encodings["marginal.log_scale"].cpu(), count, stream(config.seed, "grid"))
    rows = [part for k in range(0, len(shown), GRID_COLUMNS) for part in (shown[k : k + GRID_COLUMNS], rebuilt[k : k + GRID_COLUMNS])]
    grid = torch.cat([*rows, decode(state, config, z.to(config.device))]).float().cpu().clamp(0, 1)
    image_grid(grid, folder / SAMPLES / f"step-{state.step}.png", columns=GRID_COLUMNS, scale=max(1, 56 // max(images.shape[2:])))


def decode(state: State, config: AutoencoderConfig, z: Tensor) -> Tensor:
    """Codes (B, d) to images (B, C, H, W)."""
    output: Tensor = state.networks["decoder"](z).float()
    return output.sigmoid() if config.likelihood == "bernoulli" else output


# ---- one's own networks ---------------------------------------------------------------------------------------------------------------------


def check_networks(networks: AutoencoderNetworks, config: AutoencoderConfig, image_shape: ImageShape) -> None:
    """Try one's own networks on two images. Raises UsageError that says which of them does what."""
    device = next((p.device for p in networks.encoder.parameters()), torch.device("cpu"))
    images = torch.rand((2, *image_shape), generator=torch.Generator().manual_seed(0)).to(device)
    shape = (2, config.latent_dim)
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            encoding = networks.encoder(images)
            if not isinstance(encoding, tuple) or len(encoding) != 2 or any(getattr(part, "shape", None) != shape for part in encoding):
                raise UsageError(f"the encoder must return (mean, log_scale), each of shape {shape} for 2 images")
            output = networks.decoder(encoding[0])
            if getattr(output, "shape", None) != images.shape:
                raise UsageError(f"the decoder returned {_shape(output)} for 2 codes: shape {tuple(images.shape)} is needed")
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UsageError(f"the networks do not take images of shape {tuple(images.shape)}: {' '.join(str(error).split())}") from None
    finally:
        for module, mode in modes:
            module.training = mode
    for name, network in networks._asdict().items():
        if has_batch_norm(network):
            raise UsageError(f"the {name} normalises over the batch: a code would then depend on other images and its rate would not be defined")
        if not any(p.requires_grad for p in network.parameters()):
            raise UsageError(f"the {name} has no trainable parameters: there is nothing to train")


def _shape(output: object) -> str:
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
