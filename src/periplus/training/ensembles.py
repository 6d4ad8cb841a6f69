"""Many adversarial pairs as one program: mlp generators and critics that differ in seed and step sizes, trained side by side.

The products are those of `periplus.stacking`, the step is that of `periplus.training.adversarial`: critic steps on fresh batches and fresh fakes,
scores of both in one pass, first-order penalties from the slopes of the rectifiers, a generator step with the last fakes, the running average.
What is a mean over a batch there is a mean over the rows of each cell here.

**The same pairs.** Everything random in step n of a cell is drawn as its separate run draws it: after seeding from (seed, n), in the order in which
that run comes to it: codes, then for a GAN with dropout the masks of the critic's pass, for a WGAN-GP the weights of the interpolations, and so on
for every critic step; then the masks of the generator's pass. Cells of one seed share the draws. So the masks are drawn outside of the networks and
multiplied on.

Adam has its step size and its decays, and the average its decay, in common for neighbouring cells, so cells are sorted by them, and each group of
equals is updated by one fused call on its own slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from periplus import objectives
from periplus.checkpoints import Checkpoint
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.networks import AdversarialNetworks, Critic
from periplus.piecewise import piecewise_linear
from periplus.runs import build_networks
from periplus.seeds import stream
from periplus.stacking import StackedLinear, as_views
from periplus.training.adversarial import (
    CRITIC_LOSSES,
    PENALTIES,
    CriticWatch,
    State,
    arrange,
    average_weight,
    draw_codes,
    generator_loss,
    keep_snapshot,
    log,
    new_state,
    penalty_factor,
    save,
    save_samples,
)
from periplus.training.cells import Moments, norms_of_cells, run_stack, share_clocks, stack_moments, tell_of_all
from periplus.training.journal import OnProgress, Progress
from periplus.training.steps import SWEEP_EVERY, Batches, hold_out, is_snapshot, seed_step, some_images, steps_in_all, sweep_subnormals

#: What cells of one ensemble may differ in.
VARIED = ("seed", "learning_rate", "beta1", "beta2", "penalty_weight", "ema")

Cell = tuple[AdversarialConfig, Path]
"""A configuration and the run folder to make of it."""


def why_not(config: AdversarialConfig) -> str | None:
    """What keeps cells like this one from being an ensemble, beside their architecture; None where nothing does."""
    if config.critic_dropout and PENALTIES[config.model] != "none":
        return "a penalised critic with dropout cannot be stacked: its gradient is differentiated twice"
    return None


# ---- optimisers side by side ----------------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Neighbouring cells with the same step sizes and decays, and the configuration of the first."""

    cells: slice
    config: AdversarialConfig


def pace(config: AdversarialConfig) -> tuple[float, float, float, float]:
    """What the cells of one group have in common: Adam's step size and decays, and the average's decay."""
    return config.learning_rate, config.beta1 or 0.0, config.beta2 or 0.0, config.ema


def groups_of(configs: Sequence[AdversarialConfig]) -> list[Group]:
    """Runs of equal pace among cells that are sorted by it."""
    starts = [c for c in range(len(configs)) if c == 0 or pace(configs[c]) != pace(configs[c - 1])]
    return [Group(slice(a, b), configs[a]) for a, b in zip(starts, [*starts[1:], len(configs)], strict=True)]


class StackedAdam:
    """Adam over the parameters (C, ...) of a stacked module: what `periplus.training.steps.adam_step` does, one fused call for each group."""

    def __init__(self, module: nn.Module, moments: Sequence[Moments], groups: Sequence[Group]) -> None:
        self.parameters = list(module.parameters())
        self.moments, self.groups = moments, groups
        self.slices = [
            ([p.detach()[group.cells] for p in self.parameters], *([m[name][group.cells] for m in moments] for name in ("exp_avg", "exp_avg_sq")))
            for group in groups
        ]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step of all cells. A sick cell's numbers stay in its own slice."""
        steps = [m["step"] for m in self.moments]
        torch._foreach_add_(steps, 1)
        for (cells, config), (parameters, means, squares) in zip(self.groups, self.slices, strict=True):
            rate, beta1, beta2, _ = pace(config)
            torch._fused_adam_(
                parameters,
                [g[cells] for g in gradients],
                means,
                squares,
                [],
                steps,
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
        if steps[0].device.type == "cpu" and int(steps[0]) % SWEEP_EVERY == 0:
            sweep_subnormals([m[name] for m in self.moments for name in ("exp_avg", "exp_avg_sq")])


@dataclass
class Ensemble:
    """The networks of all cells and their optimisers. `states[c]` is cell c's own state, whose tensors are views into the stacked ones.

    So a cell is logged, drawn and saved by the functions of a separate run, which see nothing unusual.
    """

    generator: nn.Module
    critic: Critic
    ema: nn.Module
    generator_optimizer: StackedAdam
    critic_optimizer: StackedAdam
    groups: list[Group]
    states: list[State]
    sums: Tensor
    """(C, 7): `State.sums` of every cell."""


def stack_states(states: list[State], configs: Sequence[AdversarialConfig]) -> Ensemble:
    """Cells' states (all at one step) as one, of which they become views."""
    groups, optimizers = groups_of(configs), {}
    networks = {part: as_views([getattr(s, part) for s in states]) for part in ("generator", "critic", "ema")}
    for part in ("generator", "critic"):
        moments = stack_moments(networks[part], [getattr(s, part) for s in states], [getattr(s, f"{part}_optimizer") for s in states])
        optimizers[part] = StackedAdam(networks[part], moments, groups)
    sums = torch.stack([state.sums for state in states])
    for c, state in enumerate(states):
        state.sums = sums[c]
    critic = networks["critic"]
    assert isinstance(critic, Critic)
    ema = networks["ema"].requires_grad_(False)
    return Ensemble(networks["generator"], critic, ema, optimizers["generator"], optimizers["critic"], groups, states, sums)


# ---- randomness -----------------------------------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """What a critic's step is given: images (B, ...), codes (B, d), dropout's masks (2 B, units), interpolation weights (B, 1).

    Of one cell, or with C in front of all. After the last of them comes one for the generator's step, with nothing in it but masks (B, units).
    """

    real: Tensor
    codes: Tensor
    masks: tuple[Tensor, ...]
    weights: Tensor


def draw(config: AdversarialConfig, batches: Batches, units: Sequence[int], step: int) -> Iterator[Draws]:
    """What the separate run of this seed draws in a step, in its order. `units`: the widths of the critic's layers with dropout."""
    seed_step(config, step)
    rows, none = config.batch_size, torch.empty(0, device=config.device)
    for k in range(config.critic_steps):
        real = batches(step * config.critic_steps + k)
        codes, masks = draw_codes(config, real), draw_masks(config, 2 * rows, units)
        yield Draws(real, codes, masks, torch.rand(rows, 1, device=config.device) if PENALTIES[config.model] == "interpolated" else none)
    yield Draws(none, none, draw_masks(config, rows, units), none)


def draw_masks(config: AdversarialConfig, rows: int, units: Sequence[int]) -> tuple[Tensor, ...]:
    """What dropout multiplies so many rows by in each of the critic's layers: dropped ones, which draw as dropped activations do."""
    return tuple(dropout(torch.ones(rows, width, device=config.device), config.critic_dropout or 0.0) for width in units)


@dataclass(frozen=True)
class Seeds:
    """What the distinct seeds of an ensemble decide: batches, codes and masks. Cells of one seed share them, whatever else they differ in."""

    configs: list[AdversarialConfig]
    """One configuration for each seed."""
    batches: list[Batches]
    watched: list[tuple[Tensor, Tensor | None]]
    """Images that the critic is watched on: training and held-out ones."""
    of_cell: list[int]
    index: Tensor
    """`of_cell` on the device: which seed is each cell's."""

    @property
    def population(self) -> int:
        """Training images of every cell."""
        return len(self.batches[0].images)

    def draws(self, units: Sequence[int], step: int) -> list[Draws]:
        """Everything random in a step of all cells: one for each critic step, and one for the generator's."""
        own = [list(draw(config, batches, units, step)) for config, batches in zip(self.configs, self.batches, strict=True)]
        return [self._gather(parts) for parts in zip(*own, strict=True)]

    def _gather(self, parts: Sequence[Draws]) -> Draws:
        masks = tuple(self._of_cells(masks) for masks in zip(*(part.masks for part in parts), strict=True))
        real, codes, weights = (self._of_cells([getattr(part, name) for part in parts]) for name in ("real", "codes", "weights"))
        return Draws(real, codes, masks, weights)

    def _of_cells(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor of each seed to (C, ...)."""
        drawn = torch.stack(list(parts))
        return drawn if len(parts) == len(self.of_cell) else drawn.index_select(0, self.index)


def gather_seeds(configs: Sequence[AdversarialConfig], data: ImageData) -> Seeds:
    """Everything that the seeds of these cells decide."""
    own = {config.seed: config for config in configs}
    of_cell = [list(own).index(config.seed) for config in configs]
    made = Seeds(list(own.values()), [], [], of_cell, torch.tensor(of_cell, device=configs[0].device))
    for config in own.values():
        training, held_out = hold_out(config, data)
        made.batches.append(Batches(training.images.to(config.device), config.batch_size, config.seed))
        made.watched.append((some_images(config, training), None if held_out is None else some_images(config, held_out)))
    return made


# ---- one step -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a step of all cells needs beside their networks: what they have in common, the penalties' factors (C,), the seeds."""

    config: AdversarialConfig
    factors: Tensor
    seeds: Seeds
    units: list[int]
    """Widths of the critic's layers with dropout."""


def ensemble_step(ensemble: Ensemble, task: Task, step: int, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """One step of all cells: critics, generators, averages. Returns (measures (C, 7), healthy (C,)): a cell's flag, once false, stays false."""
    *rounds, last = task.seeds.draws(task.units, step)
    for k, draws in enumerate(rounds):
        with torch.set_grad_enabled(k == len(rounds) - 1):  # the generators learn from the last ones alone
            fake = ensemble.generator(draws.codes.flatten(0, 1)).unflatten(0, draws.real.shape[:2])
        critic_measures, healthy = critic_step(ensemble, task, draws, fake.detach(), healthy)
    generator_measures, healthy = generator_step(ensemble, task, draws.real, fake, last.masks, healthy)
    update_averages(ensemble, step)
    return arrange(critic_measures, generator_measures).T, healthy


def critic_step(ensemble: Ensemble, task: Task, draws: Draws, fake: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """One step of all critics on real images and fakes (C, B, ...). Returns (measures (5, C), healthy)."""
    real_score, fake_score, penalty = judge(ensemble.critic, task.config, draws, fake)
    losses = CRITIC_LOSSES[task.config.model](real_score, fake_score, dim=1) + task.factors * penalty
    norms, healthy = descend(ensemble.critic_optimizer, losses, healthy)
    return torch.stack([losses, penalty, real_score.mean(1), fake_score.mean(1), norms]).detach(), healthy


def generator_step(ensemble: Ensemble, task: Task, real: Tensor, fake: Tensor, masks: Sequence[Tensor], healthy: Tensor) -> tuple[Tensor, Tensor]:
    """One step of all generators, which have made these fakes (C, B, ...). Returns (measures (2, C), healthy)."""
    ensemble.critic.requires_grad_(False)  # else the products for its gradients are computed, and thrown away
    real_score = scores(ensemble.critic, real, masks) if task.config.model == "rpgan" else None
    losses = generator_loss(task.config, scores(ensemble.critic, fake, masks), real_score, dim=1)
    norms, healthy = descend(ensemble.generator_optimizer, losses, healthy)
    ensemble.critic.requires_grad_(True)
    return torch.stack([losses, norms]).detach(), healthy


def scores(critic: Critic, images: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Scores (C, B) of images (C, B, ...); dropout multiplies by the masks given."""
    rows, left = images.flatten(0, 1), list(masks)
    for stage in critic.stages:
        rows = rows * left.pop(0).flatten(0, 1) if isinstance(stage, nn.Dropout) else stage(rows)
    return rows.view(images.shape[:2])


def judge(critic: Critic, config: AdversarialConfig, draws: Draws, fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (C, B) of real images and of fakes (C, B, ...), and each cell's penalty (C,), unweighted, as in `periplus.training.adversarial`."""
    both, penalty = torch.cat([draws.real, fake], 1), PENALTIES[config.model]
    if penalty == "none":
        real_score, fake_score = scores(critic, both, draws.masks).chunk(2, 1)
        return real_score, fake_score, both.new_zeros(len(both))
    chain = piecewise_linear(critic)
    assert chain is not None  # every mlp without dropout is one
    h = chain.first(both.flatten(0, 1))
    score, received = chain.scores(h)
    real_score, fake_score = score.view(both.shape[:2]).chunk(2, 1)
    if penalty == "interpolated":
        of_real, of_fake = h.detach().view(*both.shape[:2], -1).chunk(2, 1)
        between = torch.lerp(of_fake, of_real, draws.weights).flatten(0, 1)
        found = objectives.norm_penalty(chain.gradient(chain.received(between), fake.shape[2:]))
    else:
        found = 2 * objectives.squared_norm(chain.gradient(received, fake.shape[2:]))
    return real_score, fake_score, found.view(len(both), -1).mean(1)


def descend(optimizer: StackedAdam, losses: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """One step of Adam on the sum of the cells' losses (C,). Returns (norms of the gradients (C,), healthy (C,))."""
    gradients = torch.autograd.grad(losses.sum(), optimizer.parameters, materialize_grads=True)
    norms = norms_of_cells(gradients)
    optimizer.step(gradients)
    return norms, healthy & losses.isfinite() & norms.isfinite()


@torch.no_grad()
def update_averages(ensemble: Ensemble, step: int) -> None:
    """`update_average` of `periplus.training.adversarial` for every cell, with its own decay."""
    means, currents = list(ensemble.ema.parameters()), list(ensemble.generator.parameters())
    buffers = list(zip(ensemble.ema.buffers(), ensemble.generator.buffers(), strict=True))
    for cells, config in ensemble.groups:
        weight = average_weight(config.ema, step)
        if weight:
            torch._foreach_lerp_([mean[cells] for mean in means], [current[cells] for current in currents], weight)
            for mean, current in buffers:
                mean[cells] = current[cells]


# ---- the loop -------------------------------------------------------------------------------------------------------------------------------


def train_ensemble(cells: Sequence[Cell], starts: Sequence[Checkpoint | None], data: ImageData, on_progress: OnProgress | None) -> dict[Path, str]:
    """Train prepared cells that are all at one step, to the end. Returns what went wrong, by folder.

    Raises Interrupted after a signal, with a checkpoint of every healthy cell left.
    """
    order = sorted(range(len(cells)), key=lambda c: pace(cells[c][0]))
    cells, starts = [cells[c] for c in order], [starts[c] for c in order]
    configs = [config for config, _ in cells]
    first, seeds = configs[0], gather_seeds(configs, data)
    ensemble = stack_states([begin(config, start, data) for config, start in zip(configs, starts, strict=True)], configs)
    factors = torch.tensor([penalty_factor(config) for config in configs], dtype=torch.float32, device=first.device)
    task = Task(first, factors, seeds, dropped_units(ensemble.critic))
    steps, begun = steps_in_all(first, seeds.population), ensemble.states[0].step
    journal = Journal(ensemble, seeds, cells, steps, begun, on_progress)
    healthy = torch.ones(len(cells), dtype=torch.bool, device=first.device)

    def advance(step: int) -> Tensor:
        nonlocal healthy
        measures, healthy = ensemble_step(ensemble, task, step, healthy)
        ensemble.sums += measures
        journal.summed += 1
        return healthy

    run_stack(cells, journal.frozen, begun, steps, advance, journal.write)
    return journal.frozen


def begin(config: AdversarialConfig, start: Checkpoint | None, data: ImageData) -> State:
    """A cell's state as a separate run begins it, or goes on with it."""
    torch.manual_seed(stream(config.seed, "networks"))
    state = new_state(config, AdversarialNetworks(*build_networks(config, data.shape)), config.device)
    if start is not None:
        state.restore(start)
    return state


def dropped_units(critic: Critic) -> list[int]:
    """The widths of the layers of a stacked critic that end in dropout."""
    units, width = [], 0
    for stage in critic.stages:
        width = stage.out_features if isinstance(stage, StackedLinear) else width
        units += [width] if isinstance(stage, nn.Dropout) else []
    return units


class Journal:
    """What the cells of an ensemble leave behind, by the functions of a separate run. Frozen cells leave nothing more."""

    def __init__(self, ensemble: Ensemble, seeds: Seeds, cells: Sequence[Cell], steps: int, begun: int, on_progress: OnProgress | None) -> None:
        self.ensemble, self.cells, self.steps, self.on_progress = ensemble, cells, steps, on_progress
        self.frozen: dict[Path, str] = {}
        self.summed = ensemble.states[0].summed
        self.watches = [CriticWatch(config, *seeds.watched[k]) for (config, _), k in zip(cells, seeds.of_cell, strict=True)]
        self.clocks = share_clocks(cells, seeds.population, begun)

    def write(self, step: int, logs: bool, draws: bool, saves: bool) -> None:
        """What is due after so many steps, of every healthy cell."""
        told: list[Progress] = []
        for (config, folder), state, watch, clock in zip(self.cells, self.ensemble.states, self.watches, self.clocks, strict=True):
            if folder in self.frozen:
                continue
            state.step, state.summed = step, self.summed
            if logs:
                log(state, watch, clock, folder, self.steps, told.append)
            if config.snapshots and is_snapshot(step, config.log_every):
                keep_snapshot(state, config, folder)
            if draws:
                save_samples(state, config, folder)
            if saves:
                save(state, config, folder, self.steps)
        self.summed = 0 if logs else self.summed
        tell_of_all(told, len(self.cells), self.on_progress)
