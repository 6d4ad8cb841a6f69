"""The adversarial loop: GAN and WGAN-GP.

One generator step is: `critic_steps` steps of the critic on fresh batches, one step of the generator, one update of its running average (EMA).
Three habits make a run repeatable to the bit, and cheap to interrupt:

* Everything random in step n, batch indices, codes, penalty weights, dropout, is drawn after seeding from (seed, n). There is no random state to
  save; stopping and resuming cannot change it.
* A step never updates anything with a non-finite loss or gradient. The check is a flag on the device that the fused optimisers obey
  (`found_inf`), sticky, so the device need not wait for the host; the host looks at it when it reads the metrics.
* The state, complete, is what `State.tensors` lists.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from periplus import checkpoints, objectives
from periplus.checkpoints import Checkpoint
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.errors import Interrupted, NonFiniteError, RunError, UsageError
from periplus.networks import AdversarialNetworks, ImageShape, has_batch_norm, recalibrate_batch_norm
from periplus.pictures import image_grid
from periplus.runs import CHECKPOINTS, METRICS, SAMPLES, TIMING, append_line, codes, load_module, read_lines, stream, sync_file
from periplus.training.interruption import StopRequest

#: What a step measures; metrics.jsonl holds the means since the line before.
MEASURES = ("critic_loss", "generator_loss", "penalty", "real_score", "fake_score", "critic_gradient_norm", "generator_gradient_norm")
GRID_IMAGES = 64
WATCHED = 256
CALIBRATION_CODES = 2000


@dataclass(frozen=True)
class Progress:
    """What the loop tells while it runs: generator steps done and in all, images per second, seconds left, the last line of metrics."""

    step: int
    steps: int
    images_per_second: float
    seconds_left: float
    metrics: dict[str, float]


OnProgress = Callable[[Progress], None]


@dataclass
class State:
    """Everything that changes while training."""

    generator: nn.Module
    critic: nn.Module
    ema: nn.Module
    generator_optimizer: torch.optim.Adam
    critic_optimizer: torch.optim.Adam
    sums: Tensor
    """Sums of MEASURES since the last line of metrics, float64."""
    summed: int = 0
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a checkpoint."""
        named = {f"{part}.{k}": v for part in ("generator", "critic", "ema") for k, v in getattr(self, part).state_dict().items()}
        for part in ("generator_optimizer", "critic_optimizer"):
            for i, moments in getattr(self, part).state_dict()["state"].items():
                named |= {f"{part}.{i}.{k}": v for k, v in moments.items()}
        return named | {"sums": self.sums}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state, bit for bit. Raises RunError where it does not fit."""
        for part in ("generator", "critic", "ema"):
            load_module(getattr(self, part), checkpoint, f"{part}.")
        for part in ("generator_optimizer", "critic_optimizer"):
            _restore_optimizer(getattr(self, part), checkpoint, f"{part}.")
        try:
            self.sums.copy_(checkpoint.tensors["sums"])
            self.summed = int(checkpoint.values["summed"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{checkpoint.path} lacks the state of the metrics ({error}): it is not of this version") from None
        self.step = checkpoint.step


def _restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, prefix: str) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            states.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def new_state(config: AdversarialConfig, networks: AdversarialNetworks, device: str) -> State:
    """Networks on the device, their average and their optimisers, at step 0."""
    generator, critic = (network.to(device).train() for network in networks)
    ema = copy.deepcopy(generator).requires_grad_(False)
    sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=device)
    return State(generator, critic, ema, new_optimizer(generator, config), new_optimizer(critic, config), sums)


def new_optimizer(network: nn.Module, config: AdversarialConfig) -> torch.optim.Adam:
    """Adam over one network's parameters, all in one fused kernel."""
    return torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(config.beta1 or 0.0, config.beta2 or 0.0), fused=True)


# ---- batches --------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Batches:
    """Batches as a pure function of (seed, index): each epoch is a permutation of the images, cut into whole batches. uint8, on the device."""

    images: Tensor
    batch_size: int
    seed: int
    _epoch: int = -1
    _order: Tensor | None = None

    @property
    def per_epoch(self) -> int:
        return len(self.images) // self.batch_size

    def __call__(self, index: int) -> Tensor:
        """Batch number `index` of the run as floats in [0, 1]: (B, C, H, W)."""
        epoch, k = divmod(index, self.per_epoch)
        if epoch != self._epoch or self._order is None:
            generator = torch.Generator().manual_seed(stream(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator).to(self.images.device)
        rows = self._order[k * self.batch_size : (k + 1) * self.batch_size]
        return to_float(self.images.index_select(0, rows))


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


# ---- one step -------------------------------------------------------------------------------------------------------------------------------


def critic_step(state: State, config: AdversarialConfig, real: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """One optimiser step of the critic on real images (B, C, H, W). Returns (measures (5,), healthy): see `apply_gradients`."""
    generator, critic = state.generator, state.critic
    with autocast(config):
        with torch.no_grad():
            fake = generator(draw_codes(config, real)).to(real.dtype)
        real_score, fake_score = score_together(critic, real, fake)
        if config.model == "wgan-gp":
            penalty = objectives.gradient_penalty(critic, real, fake).mean()
            loss = objectives.wgan_critic_loss(real_score, fake_score) + config.penalty_weight * penalty
        else:
            penalty = torch.zeros((), device=real.device)
            loss = objectives.gan_discriminator_loss(real_score, fake_score)
    norm, healthy = apply_gradients(state.critic_optimizer, critic, loss, healthy)
    return torch.stack([loss, penalty, real_score.mean(), fake_score.mean(), norm]).detach(), healthy


def score_together(critic: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of real and fake images, (B,) each in float32, in one pass: the matrix products of a small batch are too thin to be fast.

    Critics that mix examples get two passes, as everybody trains them: a batch of real images, then a batch of fakes.
    """
    if has_batch_norm(critic):
        return scores(critic, real), scores(critic, fake)
    real_score, fake_score = scores(critic, torch.cat([real, fake])).chunk(2)
    return real_score, fake_score


def scores(critic: nn.Module, images: Tensor) -> Tensor:
    """The critic's scores (B,) in float32."""
    return objectives.check_scores(critic(images), len(images)).float()


def generator_step(state: State, config: AdversarialConfig, real: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """One optimiser step of the generator, with as many fresh codes as there are `real` images. Returns (measures (2,), healthy)."""
    with autocast(config):
        fake = state.generator(draw_codes(config, real)).to(real.dtype)
        score = scores(state.critic, fake)
        loss = objectives.wgan_generator_loss(score) if config.model == "wgan-gp" else objectives.gan_generator_loss(score, config.generator_loss)
    norm, healthy = apply_gradients(state.generator_optimizer, state.generator, loss, healthy)
    return torch.stack([loss, norm]).detach(), healthy


def apply_gradients(optimizer: torch.optim.Adam, module: nn.Module, loss: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the loss with respect to one network only, and step unless anything is, or ever was, non-finite.

    Returns the gradient's norm and the flag `healthy` (a boolean on the device), which once false stays false. The fused optimiser itself skips
    the step when `found_inf` is set, so nobody waits for the flag to reach the host.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    norm = torch.nn.utils.get_total_norm(gradients)
    healthy = healthy & loss.isfinite() & norm.isfinite()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.found_inf = (~healthy).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
    return norm, healthy


def draw_codes(config: AdversarialConfig, like: Tensor) -> Tensor:
    """Codes z ~ N(0, 1) (B, d) for a batch like this one."""
    return torch.randn(len(like), config.latent_dim, device=like.device)


def autocast(config: AdversarialConfig) -> contextlib.AbstractContextManager[object]:
    """bfloat16 autocast, where the (resolved) configuration says so."""
    if config.precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16)


@torch.no_grad()
def update_average(ema: nn.Module, generator: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) generator; a shorter memory at the start, so that the initial weights are forgotten in time.

    Buffers (running statistics) are copied as they are; see `recalibrate_batch_norm`.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), weight)
    for mean, current in zip(ema.buffers(), generator.buffers(), strict=True):
        mean.copy_(current)


# ---- the loop -------------------------------------------------------------------------------------------------------------------------------


def train_adversarial(
    config: AdversarialConfig,
    data: ImageData,
    folder: Path,
    networks: AdversarialNetworks,
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
    state = new_state(config, networks, config.device)
    if resume is not None:
        state.restore(resume)
    watch = CriticWatch(config, some_images(config, train_data), None if held_out is None else some_images(config, held_out))
    clock = Clock(folder, config, len(train_data), state.step)
    healthy = torch.ones((), dtype=torch.bool, device=config.device)

    with StopRequest() as stop:
        for step in range(state.step, steps):
            seed_step(config, step)
            for k in range(config.critic_steps):
                real = batches(step * config.critic_steps + k)
                critic_measures, healthy = critic_step(state, config, real, healthy)
            generator_measures, healthy = generator_step(state, config, real, healthy)
            if on_host(config) or due(step + 1, config.log_every, steps):
                check_finite(healthy, step, folder)
            update_average(state.ema, state.generator, config.ema, step)
            state.step, state.summed = step + 1, state.summed + 1
            state.sums += arrange(critic_measures, generator_measures)

            if due(state.step, config.log_every, steps):
                log(state, watch, clock, folder, steps, on_progress)
            if due(state.step, config.sample_every, steps):
                check_finite(healthy, step, folder)
                save_samples(state, config, folder)
            if due(state.step, config.checkpoint_every, steps) or stop.requested:
                check_finite(healthy, step, folder)
                save(state, config, folder, steps)
            if stop.requested and state.step < steps:
                raise Interrupted(f"stopped by {stop.requested} at step {state.step} of {steps}; resume with --resume --out {folder}")


def hold_out(config: AdversarialConfig, data: ImageData) -> tuple[ImageData, ImageData | None]:
    """The images to train on, and those kept out of training (drawn by seed), if any."""
    if not config.held_out:
        return data, None
    return data.split_off(config.held_out, stream(config.seed, "held-out"))


def seed_step(config: AdversarialConfig, step: int) -> None:
    """Make everything random in this step a function of (seed, step)."""
    seed = stream(config.seed, "step", step)
    if on_host(config):
        torch.default_generator.manual_seed(seed)  # a two-hundredth of the time of torch.manual_seed, which asks every kind of device
    else:
        torch.manual_seed(seed)


def steps_in_all(config: AdversarialConfig, images: int) -> int:
    """Generator steps of a run on so many training images. Raises UsageError when not even one batch can be filled."""
    if images < 1:
        raise UsageError(f"--held-out is {config.held_out}: it leaves no image for training")
    if images < config.batch_size:
        raise UsageError(f"--batch-size is {config.batch_size}, but only {images} images are left for training: use a smaller one")
    steps = max(1, config.epochs * (images // config.batch_size) // config.critic_steps)
    return min(steps, config.max_steps or steps)


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps is due after `step` of them; always at the end."""
    return step % every == 0 or step == steps


def on_host(config: AdversarialConfig) -> bool:
    """True where reading a value costs nothing, because the device is the host."""
    return torch.device(config.device).type == "cpu"


def arrange(critic: Tensor, generator: Tensor) -> Tensor:
    """The measures of one step in the order of MEASURES, float64."""
    loss, penalty, real, fake, norm = critic.double()
    generator_loss, generator_norm = generator.double()
    return torch.stack([loss, generator_loss, penalty, real, fake, norm, generator_norm])


def check_finite(healthy: Tensor, step: int, folder: Path) -> None:
    """Raise NonFiniteError once the flag is down: waits for the device."""
    if not bool(healthy):
        good = checkpoints.list_checkpoints(folder / CHECKPOINTS)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        raise NonFiniteError(
            f"a loss or gradient became non-finite by step {step + 1} in {folder}; nothing was updated with it, {kept}: lower --learning-rate"
        )


def save(state: State, config: AdversarialConfig, folder: Path, steps: int) -> None:
    """Write a complete checkpoint, after everything that leads to it has reached the disk, and drop old ones."""
    calibrate(state, config)
    for name in (METRICS, TIMING):
        sync_file(folder / name)
    checkpoints.save_checkpoint(folder / CHECKPOINTS, state.step, state.tensors(), {"summed": state.summed})
    prune(folder, config, steps)


def prune(folder: Path, config: AdversarialConfig, steps: int) -> None:
    """Keep the last scheduled checkpoints, and the newest; those that an interruption left go."""
    checkpoints.prune(folder / CHECKPOINTS, config.keep_last, lambda step: due(step, config.checkpoint_every, steps))


def save_samples(state: State, config: AdversarialConfig, folder: Path) -> None:
    """Write the grid of the run's fixed codes, from the averaged generator."""
    calibrate(state, config)
    with evaluation_mode(state.ema), torch.no_grad():
        images = state.ema(codes(config.seed, "grid", GRID_IMAGES, config.latent_dim, config.device))
    image_grid(images.float().cpu(), folder / SAMPLES / f"step-{state.step}.png", columns=8, scale=max(1, 56 // max(images.shape[2:])))


def calibrate(state: State, config: AdversarialConfig) -> None:
    """Give the averaged generator the batch-norm statistics of its own activations. A function of its weights: it feeds nothing back."""
    recalibrate_batch_norm(state.ema, codes(config.seed, "calibration", CALIBRATION_CODES, config.latent_dim, config.device))


def log(state: State, watch: CriticWatch, clock: Clock, folder: Path, steps: int, on_progress: OnProgress | None) -> None:
    """Append the means since the last line to metrics.jsonl, the time to timing.jsonl, and tell whoever listens."""
    means = (state.sums / state.summed).tolist()
    metrics = dict(zip(MEASURES, means, strict=True)) | watch(state)
    append_line(folder / METRICS, {"step": state.step, "epoch": clock.epoch(state.step), **metrics})
    rate = clock.lap(state.step)
    state.sums.zero_()
    state.summed = 0
    if on_progress is not None:
        on_progress(Progress(state.step, steps, rate, (steps - state.step) * clock.images_per_step / rate, metrics))


@dataclass
class CriticWatch:
    """The critic on data it trains on and on data it never sees: E D(x) - E D(G(z)) for both. A gap between the two is overfitting.

    Up to 256 images each, drawn by seed (data may be sorted by class), the critic in evaluation mode, fakes from fixed codes of the generator as it
    is.
    """

    config: AdversarialConfig
    train_images: Tensor
    held_out: Tensor | None

    @torch.no_grad()
    def __call__(self, state: State) -> dict[str, float]:
        if self.held_out is None:
            return {}
        parts = [to_float(images) for images in (self.train_images, self.held_out)]
        with evaluation_mode(state.generator, state.critic):
            parts.append(state.generator(codes(self.config.seed, "watch", WATCHED, self.config.latent_dim, self.config.device)))
            train, held_out, fake = (state.critic(x).mean() for x in parts)
        gaps = torch.stack([train - fake, held_out - fake]).tolist()
        return dict(zip(("critic_gap_train", "critic_gap_held_out"), gaps, strict=True))


def some_images(config: AdversarialConfig, data: ImageData) -> Tensor:
    """Up to WATCHED images of a set, drawn by seed, on the device."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream(config.seed, "watch", len(data))))
    return data.images[order[:WATCHED]].to(config.device)


@contextlib.contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Within: the modules in evaluation mode; afterwards as they were."""
    modes = [m.training for m in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


class Clock:
    """Seconds of training over all sessions of a run, into timing.jsonl. The only place that knows what time it is."""

    def __init__(self, folder: Path, config: AdversarialConfig, images: int, step: int) -> None:
        lines = read_lines(folder / TIMING)
        self.path = folder / TIMING
        self.images_per_step = config.batch_size * config.critic_steps
        self.seconds = float(lines[-1]["seconds"]) if lines else 0.0
        self.step, self.last = step, time.perf_counter()
        self.images = images

    def lap(self, step: int) -> float:
        """Write a line; returns images per second since the line before (real images seen by the critic)."""
        now = time.perf_counter()
        elapsed, done = now - self.last, step - self.step
        self.seconds, self.last, self.step = self.seconds + elapsed, now, step
        rate = done * self.images_per_step / max(elapsed, 1e-9)
        append_line(self.path, {"step": step, "seconds": round(self.seconds, 3), "images_per_second": round(rate, 1)})
        return max(rate, 1e-9)

    def epoch(self, step: int) -> float:
        """Passes over the training images after so many steps."""
        return round(step * self.images_per_step / self.images, 4)


def check_networks(networks: AdversarialNetworks, config: AdversarialConfig, image_shape: ImageShape) -> None:
    """Try one's own networks on two codes. Raises UsageError that says which of them does what."""
    shape = (2, *image_shape)
    device = next((p.device for p in networks.generator.parameters()), torch.device("cpu"))
    z = codes(config.seed, "check", 2, config.latent_dim, device)
    with evaluation_mode(*networks), torch.no_grad():
        images = _try("the generator", networks.generator, z, "codes")
        if images.shape != shape:
            raise UsageError(f"the generator returned shape {tuple(images.shape)} for 2 codes: {shape} is needed")
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise UsageError("the generator returned values outside [0, 1]: end it with a sigmoid")
        objectives.check_scores(_try("the critic", networks.critic, images, "images"), 2)
    if config.model == "wgan-gp" and has_batch_norm(networks.critic):
        raise UsageError(objectives.MIXING.format(why=" (batch normalisation)"))
    for name, module in networks._asdict().items():
        if not any(p.requires_grad for p in module.parameters()):
            raise UsageError(f"the {name} has no trainable parameters: there is nothing to train")


def _try(name: str, module: nn.Module, batch: Tensor, what: str) -> Tensor:
    try:
        result = module(batch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UsageError(f"{name} does not take {what} of shape {tuple(batch.shape)}: {' '.join(str(error).split())}") from None
    if not isinstance(result, Tensor):
        raise UsageError(f"{name} returned a {type(result).__name__}: one tensor is needed")
    return result
