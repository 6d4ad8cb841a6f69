"""The adversarial loop: GAN, WGAN-GP and the relativistic GAN with R1 + R2.

One generator step is: `critic_steps` steps of the critic, each on a fresh batch and on fresh fakes, one step of the generator with the last of these
fakes, one update of its running average (EMA). The generator makes a batch once, for both: the critic learns nothing of how it was made.

Three habits make a run repeatable to the bit, and cheap to interrupt:

* Everything random in step n, batch indices, codes, penalty weights, dropout, is drawn after seeding from (seed, n). There is no random state to
  save; stopping and resuming cannot change it.
* A step never updates anything with a non-finite loss or gradient. The check is a flag on the device that the fused optimisers obey
  (`found_inf`), sticky, so the device need not wait for the host; the host looks at it when it reads the metrics.
* The state, complete, is what `State.tensors` lists.

With `path_weight` the generator is also asked to make least-cost paths between its images cheap (`periplus.training.path_term`): at every fourth
step its loss has two more terms, for some fresh pairs,

    path_weight * EVERY * mean of U~  +  its adversarial loss on images along the paths

and the critic sees some of these images among the fakes, so that it knows what it judges. Without the weight no line of this runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from periplus import objectives
from periplus.checkpoints import Checkpoint
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.errors import Interrupted, RunError, UsageError
from periplus.networks import AdversarialNetworks, ImageShape, has_batch_norm, place, recalibrate_batch_norm
from periplus.objectives import Penalty
from periplus.pictures import image_grid
from periplus.piecewise import PiecewiseLinear, piecewise_linear
from periplus.runs import SAMPLES, codes, load_module
from periplus.training.interruption import StopRequest
from periplus.training.journal import Clock, OnProgress, check_finite, save_checkpoint, save_snapshot, write_line
from periplus.training.path_term import EVERY, PathTerm, Visit
from periplus.training.steps import (
    WATCHED,
    Batches,
    apply_gradients,
    attempt,
    autocast,
    due,
    evaluation_mode,
    hold_out,
    is_snapshot,
    new_optimizer,
    on_host,
    optimizer_tensors,
    restore_optimizer,
    seed_step,
    some_images,
    steps_in_all,
    to_float,
)
from periplus.training.written import WrittenCritic, WrittenGenerator, write_critic, write_generator

#: What a step measures; metrics.jsonl holds the means since the line before.
MEASURES = ("critic_loss", "generator_loss", "penalty", "real_score", "fake_score", "critic_gradient_norm", "generator_gradient_norm")
GRID_IMAGES = 64
CALIBRATION_CODES = 2000


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
    paths: PathTerm | None = None
    """With a path weight: what is paid for passages."""
    written_critic: WrittenCritic | None = None
    written_generator: WrittenGenerator | None = None
    """Passes and gradients that are written out; None where they are left to automatic differentiation."""
    summed: int = 0
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a checkpoint."""
        named = {f"{part}.{k}": v for part in ("generator", "critic", "ema") for k, v in getattr(self, part).state_dict().items()}
        for part in ("generator_optimizer", "critic_optimizer"):
            named |= optimizer_tensors(getattr(self, part), f"{part}.")
        return named | {"sums": self.sums} | ({} if self.paths is None else self.paths.tensors())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state, bit for bit. Raises RunError where it does not fit."""
        for part in ("generator", "critic", "ema"):
            load_module(getattr(self, part), checkpoint, f"{part}.")
        for part in ("generator_optimizer", "critic_optimizer"):
            restore_optimizer(getattr(self, part), checkpoint, f"{part}.")
        try:
            self.sums.copy_(checkpoint.tensors["sums"])
            self.summed = int(checkpoint.values["summed"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{checkpoint.path} lacks the state of the metrics ({error}): it is not of this version") from None
        if self.paths is not None:
            self.paths.restore(checkpoint)
        self.step = checkpoint.step


def new_state(config: AdversarialConfig, networks: AdversarialNetworks, device: str) -> State:
    """Networks on the device, their average and their optimisers, at step 0."""
    generator, critic = (place(network, device).train() for network in networks)
    ema = copy.deepcopy(generator).requires_grad_(False)
    sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=device)
    state = State(generator, critic, ema, new_optimizer(generator, config), new_optimizer(critic, config), sums)
    state.written_critic = write_critic(critic, state.critic_optimizer, config, PENALTIES[config.model])
    state.written_generator = write_generator(generator, state.generator_optimizer, config)
    return state


# ---- scores and penalties -------------------------------------------------------------------------------------------------------------------

Judge = Callable[[nn.Module, Tensor, Tensor, Penalty], tuple[Tensor, Tensor, Tensor]]
"""Critic, real images and fakes (B, C, H, W) to scores of both, (B,) each, and the unweighted penalty."""
PENALTIES: dict[str, Penalty] = {"gan": "none", "wgan-gp": "interpolated", "rpgan": "zero-centred"}
CRITIC_LOSSES: dict[str, Callable[..., Tensor]] = {
    "gan": objectives.gan_discriminator_loss,
    "wgan-gp": objectives.wgan_critic_loss,
    "rpgan": objectives.relativistic_critic_loss,
}


def scores(critic: nn.Module, images: Tensor) -> Tensor:
    """The critic's scores (B,) in float32."""
    return objectives.check_scores(critic(images), len(images)).float()


def generator_loss(config: AdversarialConfig, fake_score: Tensor, real_score: Tensor | None, dim: int | None = None) -> Tensor:
    """The generator's loss from scores of its fakes, and for rpgan of real images beside them."""
    if real_score is not None:
        return objectives.relativistic_generator_loss(real_score, fake_score, dim)
    if config.model == "wgan-gp":
        return objectives.wgan_generator_loss(fake_score, dim)
    return objectives.gan_generator_loss(fake_score, config.generator_loss, dim)


def penalty_factor(config: AdversarialConfig) -> float:
    """What the penalty of `judge` is multiplied by: lambda, or gamma / 2."""
    return (config.penalty_weight or 0.0) * (0.5 if config.model == "rpgan" else 1.0)


def judge(critic: nn.Module, real: Tensor, fake: Tensor, penalty: Penalty) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of real images and of fakes, (B,) each in float32, and the unweighted penalty, a scalar; all in one pass where the critic allows it.

    One pass, because the matrix products of a small batch are too thin to be fast. A piecewise linear critic has a first-order penalty
    (`periplus.piecewise`); others are differentiated twice. Critics that mix examples get two passes, as everybody trains them: a batch of real
    images, then a batch of fakes.
    """
    chain = piecewise_linear(critic) if penalty != "none" else None
    if chain is not None:
        return judge_first_order(chain, real, fake, penalty)
    return judge_second_order(critic, real, fake, penalty)


def judge_first_order(chain: PiecewiseLinear, real: Tensor, fake: Tensor, penalty: Penalty) -> tuple[Tensor, Tensor, Tensor]:
    """`judge` for a chain of affine maps and rectifiers: no graph of a graph, and the first map is applied to each image once."""
    h = chain.first(torch.cat([real, fake]))
    score, received = chain.scores(h)
    real_score, fake_score = objectives.check_scores(score, 2 * len(real)).float().chunk(2)
    if penalty == "interpolated":
        of_real, of_fake = h.detach().chunk(2)
        between = objectives.interpolate(of_real, of_fake)
        gradient = chain.gradient(chain.received(between), real.shape[1:])
        return real_score, fake_score, objectives.norm_penalty(gradient).mean()
    gradient = chain.gradient(received, real.shape[1:])
    return real_score, fake_score, 2 * objectives.squared_norm(gradient).mean()


def judge_second_order(critic: nn.Module, real: Tensor, fake: Tensor, penalty: Penalty) -> tuple[Tensor, Tensor, Tensor]:
    """`judge` for any critic: the penalty by differentiating twice, R1 and R2 those of the very scores."""
    if penalty == "zero-centred":
        both = torch.cat([real, fake]).requires_grad_()
        score, gradient = objectives.score_and_gradient(critic, both, create_graph=True)
        real_score, fake_score = score.float().chunk(2)
        return real_score, fake_score, 2 * objectives.squared_norm(gradient).mean()
    if has_batch_norm(critic):
        real_score, fake_score = scores(critic, real), scores(critic, fake)
    else:
        real_score, fake_score = scores(critic, torch.cat([real, fake])).chunk(2)
    if penalty == "interpolated":
        return real_score, fake_score, objectives.gradient_penalty(critic, real, fake).mean()
    return real_score, fake_score, torch.zeros((), device=real.device)


# ---- one step -------------------------------------------------------------------------------------------------------------------------------


def train_step(state: State, config: AdversarialConfig, batches: Batches, healthy: Tensor) -> Tensor:
    """One generator step with all that belongs to it, on a state that counts on. Returns the flag `healthy`: see `apply_gradients`.

    Once the flag is down, no weight moves any more; the average, the sums and the count go on, and nothing of them should be kept.
    """
    seed_step(config, state.step)
    visit = None if state.paths is None or not state.paths.due(state.step) else state.paths.visit_generator(state.generator)
    for k in range(config.critic_steps):
        real = batches(state.step * config.critic_steps + k)
        with torch.set_grad_enabled(k == config.critic_steps - 1):  # the generator learns from the last ones alone
            fake = make_fakes(state, config, real)
        shown = fake if visit is None else with_path_points(fake, visit)
        critic_measures, healthy = critic_step(state, config, real, shown, healthy)
    generator_measures, healthy = generator_step(state, config, real, fake, healthy, visit)
    update_average(state.ema, state.generator, config.ema, state.step)
    state.sums += arrange(critic_measures, generator_measures)
    state.step, state.summed = state.step + 1, state.summed + 1
    return healthy


def critic_step(state: State, config: AdversarialConfig, real: Tensor, fake: Tensor, healthy: Tensor, judged: Judge = judge) -> tuple[Tensor, Tensor]:
    """One optimiser step of the critic on real images and fakes (B, C, H, W). Returns (measures (5,), healthy): see `apply_gradients`.

    The fakes may carry the generator's graph: nothing here goes into it. judged: how a critic is judged that is not written out.
    """
    if state.written_critic is not None and state.written_critic.fits(real, fake):
        return written_critic_step(state.written_critic, config, real, fake.detach(), healthy)
    with autocast(config):
        real_score, fake_score, penalty = judged(state.critic, real, fake.detach(), PENALTIES[config.model])
        loss = CRITIC_LOSSES[config.model](real_score, fake_score) + penalty_factor(config) * penalty
    norm, healthy = apply_gradients(state.critic_optimizer, loss, healthy)
    return critic_measures(loss, penalty, real_score, fake_score, norm), healthy


def written_critic_step(written: WrittenCritic, config: AdversarialConfig, real: Tensor, fake: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """`critic_step` by written passes: the loss is differentiated by scores and squared slopes, and these by the weights."""
    passes, interpolated = written.passes, written.passes.penalty == "interpolated"
    score, square = passes.judge(real, fake, objectives.interpolation_weights(real).flatten(1) if interpolated else None)
    score.requires_grad_(), square.requires_grad_()
    real_score, fake_score = score.float().chunk(2)
    penalty = penalty_of_squares(square, passes.penalty)
    loss = CRITIC_LOSSES[config.model](real_score, fake_score) + penalty_factor(config) * penalty
    passes.gradients(*torch.autograd.grad(loss, [score, square] if passes.sloped else [score]))
    norm, healthy = written.gradients.apply(loss, healthy)
    return critic_measures(loss, penalty, real_score, fake_score, norm), healthy


def penalty_of_squares(square: Tensor, penalty: Penalty) -> Tensor:
    """The unweighted penalty from squared slopes: (B,) between real images and fakes, or (2 B,) at both."""
    if penalty == "none":
        return square.new_zeros(())
    return objectives.penalty_of_square(square).mean() if penalty == "interpolated" else 2 * square.mean()


def critic_measures(loss: Tensor, penalty: Tensor, real_score: Tensor, fake_score: Tensor, norm: Tensor) -> Tensor:
    """What is measured at a step of the critic, (5,)."""
    return torch.stack([loss, penalty, real_score.mean(), fake_score.mean(), norm]).detach()


def generator_step(
    state: State, config: AdversarialConfig, real: Tensor, fake: Tensor, healthy: Tensor, visit: Visit | None = None
) -> tuple[Tensor, Tensor]:
    """One optimiser step of the generator that has made these fakes (B, C, H, W), and the images of a visit. Returns (measures (2,), healthy).

    Raises ValueError for fakes that the generator cannot learn from: without its graph, and not the last that it painted.
    """
    written = state.written_generator
    if written is not None and written.fake is fake:
        loss, gradient = loss_for_fakes(state, config, real, fake)
        written.passes.gradients(gradient)
        total = loss if visit is None else loss + written.gradients.add(path_loss(state, config, visit, real))
        norm, healthy = written.gradients.apply(total, healthy)
        return torch.stack([loss, norm]), healthy
    if not fake.requires_grad:
        raise ValueError("these fakes carry no graph, and are not the last that `make_fakes` made: the generator cannot learn from them")
    with autocast(config):
        loss = generator_loss(config, scores(state.critic, fake), scores_beside(state, config, real))
        total = loss if visit is None else loss + path_loss(state, config, visit, real)
    norm, healthy = apply_gradients(state.generator_optimizer, total, healthy)
    return torch.stack([loss, norm]).detach(), healthy


def loss_for_fakes(state: State, config: AdversarialConfig, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's loss on fakes (B, C, H, W), and its gradient by them, (B, ...)."""
    paired, written = config.model == "rpgan", state.written_critic
    if written is not None and written.fits(real, fake):
        score = written.passes.score(fake, real if paired else None).requires_grad_()
        of_images = score.float()
        real_score, fake_score = of_images.detach().chunk(2)[0] if paired else None, of_images[-len(fake) :]
        loss = generator_loss(config, fake_score, real_score)
        (found,) = torch.autograd.grad(loss, score)
        return loss.detach(), written.passes.pull_back(found[-len(fake) :])
    with autocast(config):
        leaf = fake.detach().requires_grad_()
        shown = leaf.view_as(leaf)  # torch's counter of operations, of which `bench` makes use, does not bear a leaf that is given to a module
        loss = generator_loss(config, scores(state.critic, shown), scores_beside(state, config, real))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@torch.no_grad()
def scores_beside(state: State, config: AdversarialConfig, real: Tensor) -> Tensor | None:
    """Scores of the real images that rpgan's fakes are compared with, (B,); other generators are shown none."""
    return scores(state.critic, real) if config.model == "rpgan" else None


def path_loss(state: State, config: AdversarialConfig, visit: Visit, real: Tensor) -> Tensor:
    """What the generator pays for the paths of a visit: their U~, and realism, its own loss on images along them. Their ends are exact.

    The weight counts EVERY times, for the steps without a visit. Realism does not: on a path an image is a fake among others.
    """
    images = visit.inner()
    with autocast(config):
        beside = scores_beside(state, config, real)
        paired = None if beside is None else beside[torch.arange(len(images), device=beside.device) % len(beside)]
        realism = generator_loss(config, scores(state.critic, images), paired)
    if state.paths is not None:
        state.paths.add(visit, realism)
    return config.path_weight * EVERY * visit.scores.mean() + realism


def with_path_points(fake: Tensor, visit: Visit) -> Tensor:
    """The fakes (B, C, H, W) of which the last quarter at most are images along paths: a critic that never saw a blend cannot tell its price."""
    points = visit.inner().detach().to(fake.dtype)
    count = min(len(points), len(fake) // 4)
    chosen = points[torch.randperm(len(points), device=points.device)[:count]]
    return torch.cat([fake[: len(fake) - count].detach(), chosen])


def make_fakes(state: State, config: AdversarialConfig, like: Tensor) -> Tensor:
    """Fakes (B, C, H, W) of fresh codes for a batch like this one, for `generator_step`.

    Written passes make them without a graph, in memory that the next ones overwrite; others have the generator's graph.
    """
    drawn, written = draw_codes(config, like), state.written_generator
    if written is not None and len(like) == written.passes.batch:
        written.fake = written.passes.paint(drawn)
        return written.fake
    with autocast(config):
        fake: Tensor = state.generator(drawn)
    return fake.to(like.dtype)


def draw_codes(config: AdversarialConfig, like: Tensor) -> Tensor:
    """Codes z ~ N(0, 1) (B, d) for a batch like this one."""
    return torch.randn(len(like), config.latent_dim, device=like.device)


def arrange(critic: Tensor, generator: Tensor) -> Tensor:
    """The measures of one step in the order of MEASURES, float64."""
    loss, penalty, real, fake, norm = critic.double()
    generator_loss, generator_norm = generator.double()
    return torch.stack([loss, generator_loss, penalty, real, fake, norm, generator_norm])


@torch.no_grad()
def update_average(ema: nn.Module, generator: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) generator; a shorter memory at the start, so that the initial weights are forgotten in time.

    Buffers (running statistics) are copied as they are; see `recalibrate_batch_norm`.
    """
    weight = average_weight(decay, step)
    if weight:
        torch._foreach_lerp_(list(ema.parameters()), list(generator.parameters()), weight)
        for mean, current in zip(ema.buffers(), generator.buffers(), strict=True):
            mean.copy_(current)


#: Steps that would weigh less than this are taken in so many at once: an average over so many does not see the difference, and a pass over the
#: weights at each of them takes up to a fifteenth of a step.
LIGHT, AT_ONCE = 1 / 64, 8


def average_weight(decay: float, step: int) -> float:
    """The weight of the generator in its average after a step; 0 where the average waits. What is left of the past is the same either way."""
    first = step - step % AT_ONCE
    kept = [min(decay, (1 + s) / (10 + s)) for s in range(first, first + AT_ONCE)]
    if 1 - kept[0] >= LIGHT:
        return 1 - kept[step - first]
    return 0.0 if step < first + AT_ONCE - 1 else 1 - math.prod(kept)


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
    if config.path_weight:
        state.paths = PathTerm(config, train_data)
    if resume is not None:
        state.restore(resume)
    watch = CriticWatch(config, some_images(config, train_data), None if held_out is None else some_images(config, held_out))
    clock = Clock(folder, config, len(train_data), state.step)
    healthy = torch.ones((), dtype=torch.bool, device=config.device)

    with StopRequest() as stop:
        for step in range(state.step, steps):
            healthy = train_step(state, config, batches, healthy)
            if on_host(config) or due(state.step, config.log_every, steps):
                check_finite(healthy, step, folder)

            if due(state.step, config.log_every, steps):
                log(state, watch, clock, folder, steps, on_progress)
            if config.snapshots and is_snapshot(state.step, config.log_every):
                keep_snapshot(state, config, folder)
            if due(state.step, config.sample_every, steps):
                check_finite(healthy, step, folder)
                save_samples(state, config, folder)
            stopping = stop.requested  # read once: a signal may come between two looks
            if due(state.step, config.checkpoint_every, steps) or stopping:
                check_finite(healthy, step, folder)
                save(state, config, folder, steps)
            if stopping and state.step < steps:
                raise Interrupted(f"stopped by {stopping} at step {state.step} of {steps}; resume with --resume --out {folder}")


def save(state: State, config: AdversarialConfig, folder: Path, steps: int) -> None:
    """Write a complete checkpoint, after everything that leads to it has reached the disk, and drop old ones."""
    calibrate(state, config)
    save_checkpoint(folder, config, state.step, steps, state.tensors(), {"summed": state.summed})


def keep_snapshot(state: State, config: AdversarialConfig, folder: Path) -> None:
    """Keep the averaged generator as it is now."""
    calibrate(state, config)
    save_snapshot(folder, state.step, {f"ema.{k}": v for k, v in state.ema.state_dict().items()})


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
    if state.paths is not None:
        metrics |= state.paths.measures()
    write_line(folder, clock, state.step, steps, metrics, on_progress)
    state.sums.zero_()
    state.summed = 0


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


def check_networks(networks: AdversarialNetworks, config: AdversarialConfig, image_shape: ImageShape) -> None:
    """Try one's own networks on two codes. Raises UsageError that says which of them does what."""
    shape = (2, *image_shape)
    device = next((p.device for p in networks.generator.parameters()), torch.device("cpu"))
    z = codes(config.seed, "check", 2, config.latent_dim, device)
    with evaluation_mode(*networks), torch.no_grad():
        images = attempt("the generator", networks.generator, z, "codes")
        if images.shape != shape:
            raise UsageError(f"the generator returned shape {tuple(images.shape)} for 2 codes: {shape} is needed")
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise UsageError("the generator returned values outside [0, 1]: end it with a sigmoid")
        objectives.check_scores(attempt("the critic", networks.critic, images, "images"), 2)
    if PENALTIES[config.model] != "none" and has_batch_norm(networks.critic):
        raise UsageError(objectives.MIXING.format(why=" (batch normalisation)"))
    for name, module in networks._asdict().items():
        if not any(p.requires_grad for p in module.parameters()):
            raise UsageError(f"the {name} has no trainable parameters: there is nothing to train")
