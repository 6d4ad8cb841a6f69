"""Many runs as one program: the cells of a sweep that differ in little but their seed, trained side by side. Here: the door, and autoencoders.

A small network leaves a machine idle: a step of an 8 x 8 autoencoder is a hundred tiny operations, and starting one costs more than doing it. C such
networks of one shape are one batched product for each layer (`periplus.stacking`), one `autograd.grad` of the sum of the C losses (cells share no
parameter, so each receives its own gradient and no other), and one fused Adam over the stacked parameters. (`torch.func.vmap` over `functional_call`
does the same from outside; measured on the digits it took 1.3 times as long at 512 hidden units and 1.8 times at 128: LOG.md.) Autoencoders may
differ in beta and seed; adversarial pairs are in `periplus.training.ensembles`.

**The same cells.** A cell's weights, batches, noise and echo chain are those that `periplus train` draws for its seed, so it is the separately
trained run up to rounding: sums are taken in another order. Its folder is an ordinary run, whose checkpoints `periplus train --resume` goes on from.
To the bit a cell is only repeatable with the same cells beside it, and so is a stop and a resume of the whole stack.

**Time.** `timing.jsonl` of a cell holds its share: the time of the stack divided by the cells in it (env.json says how many).

A cell whose loss or gradient stops being finite is frozen where it is, like a separate run: it writes nothing more, the others go on, and
NonFiniteError names it when they are done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from periplus.autoencoders import AutoencoderNetworks, start_at_mean
from periplus.channels import EchoChannel
from periplus.checkpoints import Checkpoint
from periplus.config import AdversarialConfig, AutoencoderConfig, Config, DataRecord
from periplus.data import ImageData, load_data
from periplus.errors import NonFiniteError, UsageError
from periplus.files import write_atomically
from periplus.locks import hold
from periplus.machine import deterministic, keep_freed_memory
from periplus.runs import Run, build_networks, channel_of, describe_data, read_environment
from periplus.seeds import stream
from periplus.stacking import as_views
from periplus.training import Plan, check_vacant, cuda_index, ensembles, is_finished, plan, prepare, resolve
from periplus.training.autoencoder import (
    Bank,
    Channel,
    State,
    bank_images,
    distortion_of,
    log,
    mean_image,
    new_state,
    rate_of,
    save_samples,
    set_learning_rate,
)
from periplus.training.cells import norms_of_cells, run_stack, share_clocks, stack_moments, tell_of_all
from periplus.training.journal import OnProgress, Progress, save_checkpoint
from periplus.training.steps import Batches, hold_out, new_optimizer, seed_step, some_images, steps_in_all, to_float

#: What cells of one stack may differ in.
VARIED: dict[type[Config], tuple[str, ...]] = {AutoencoderConfig: ("beta", "seed"), AdversarialConfig: ensembles.VARIED}
ARCHITECTURES: dict[type[Config], tuple[str, ...]] = {AutoencoderConfig: ("mlp", "linear"), AdversarialConfig: ("mlp",)}

Cell = tuple[AutoencoderConfig, Path]
"""A configuration and the run folder to make of it."""
AnyCell = tuple[Config, Path]


class FrozenCells(NonFiniteError):
    """Some cells of a stack stopped being finite; the others are finished. `lines` says of each folder what went wrong."""

    def __init__(self, lines: dict[Path, str], cells: int) -> None:
        names = ", ".join(folder.name for folder in lines)
        super().__init__(f"{len(lines)} of {cells} cells stopped: {names}; the first: {next(iter(lines.values()))}")
        self.lines = lines


def why_not(configs: Sequence[Config]) -> str | None:
    """What keeps these configurations from being one stack, in words; None where nothing does."""
    first, kind = configs[0], type(configs[0])
    if first.architecture not in ARCHITECTURES[kind]:
        return f"architecture '{first.architecture}' of '{first.model}' cannot be stacked: {_listed(ARCHITECTURES[kind])} can"
    if first.precision == "bfloat16":
        return "stacked cells compute in float32"
    if any(config.path_weight for config in configs):
        return "cells with a path weight cannot be stacked: each searches paths of its own"
    for config in configs[1:]:
        if type(config) is not kind:
            return f"'{config.model}' and '{first.model}' are of different kinds"
        for field in dataclasses.fields(config):
            if field.name not in VARIED[kind] and getattr(config, field.name) != getattr(first, field.name):
                return f"cells differ in {field.name}: those of a stack may differ in {_listed(VARIED[kind])} only"
    return ensembles.why_not(first) if isinstance(first, AdversarialConfig) else None


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ---- autoencoders side by side ---------------------------------------------------------------------------------------------------------------


@dataclass
class Stack:
    """The networks of all cells and their optimiser. `states[c]` is cell c's own state, whose tensors are views into the stacked ones.

    So a cell is logged, drawn and saved by the functions of a separate run, which see nothing unusual.
    """

    networks: nn.ModuleDict
    optimizer: torch.optim.Adam
    states: list[State]
    sums: Tensor
    """(C, 4): `State.sums` of every cell."""
    chain: Tensor | None
    """echo: (C, d), the last code of the batch before of every cell."""

    def tell_states(self, step: int, summed: int) -> None:
        """Let the cells' own states say where they are: what is a number or replaced every step, and so no view."""
        for c, state in enumerate(self.states):
            state.step, state.summed = step, summed
            state.chain = None if self.chain is None else self.chain[c]


def stack_states(states: list[State], config: AutoencoderConfig) -> Stack:
    """Cells' states (all at one step) as one, of which they become views."""
    networks = nn.ModuleDict({part: as_views([s.networks[part] for s in states]) for part in states[0].networks})
    optimizer = new_optimizer(networks, config)
    moments = stack_moments(networks, [s.networks for s in states], [s.optimizer for s in states])
    optimizer.state.update(zip(networks.parameters(), moments, strict=True))
    sums = torch.stack([state.sums for state in states])
    for c, state in enumerate(states):
        state.sums = sums[c]
    chains = [state.chain for state in states if state.chain is not None]
    return Stack(networks, optimizer, states, sums, torch.stack(chains) if chains else None)


# ---- randomness -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seeds:
    """What the distinct seeds of a stack decide: batches, noise, held-out images. Cells of one seed share them, whatever their beta."""

    configs: list[AutoencoderConfig]
    """One configuration for each seed."""
    batches: list[Batches]
    watched: list[Tensor | None]
    """Held-out images to log; None where none are held out."""
    shown: list[Tensor]
    """Images for the grids of samples."""
    banks: list[Tensor]
    starts: list[Tensor]
    """Mean images (C, H, W)."""
    of_cell: list[int]
    index: Tensor
    """`of_cell` on the device: which seed is each cell's."""

    @property
    def population(self) -> int:
        """Training images of every cell."""
        return len(self.batches[0].images)

    def images(self, step: int) -> Tensor:
        """The batches of all cells, (C B, ...)."""
        drawn = torch.stack([batches(step) for batches in self.batches])
        return drawn.index_select(0, self.index).flatten(0, 1)

    def noise(self, channel: Channel, shape: Sequence[int], step: int) -> Tensor:
        """The noise of this step of all cells, (C, ...), for codes of one cell's shape (B, d)."""
        drawn = []
        for config in self.configs:
            seed_step(config, step)
            drawn.append(channel.noise(shape, device=config.device))
        return torch.stack(drawn).index_select(0, self.index)


def gather_seeds(configs: Sequence[AutoencoderConfig], data: ImageData) -> Seeds:
    """Everything that the seeds of these cells decide."""
    own = {config.seed: config for config in configs}
    device, splits = configs[0].device, [hold_out(config, data) for config in own.values()]
    of_cell = [list(own).index(config.seed) for config in configs]
    made = Seeds(list(own.values()), [], [], [], [], [], of_cell, torch.tensor(of_cell, device=device))
    for config, (training, held_out) in zip(own.values(), splits, strict=True):
        images = to_float(some_images(config, training if held_out is None else held_out))
        made.batches.append(Batches(training.images.to(device), config.batch_size, config.seed))
        made.watched.append(None if held_out is None else images)
        made.shown.append(images)
        made.banks.append(bank_images(config, training))
        made.starts.append(mean_image(training))
    return made


# ---- one step -------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Loss:
    """What a step of all cells needs beside their networks: betas (C,), the channel, the seeds; `laps` of the echo rings of step 0."""

    config: AutoencoderConfig
    betas: Tensor
    channel: Channel
    seeds: Seeds
    laps: list[int] = dataclasses.field(default_factory=list)

    def send(self, stack: Stack, mean: Tensor, log_scale: Tensor, step: int) -> Tensor:
        """Codes (C, B, d) of encodings (C, B, d): each cell's as a separate run draws them."""
        if isinstance(self.channel, EchoChannel) and stack.chain is None:
            return self._begin_chains(self.channel, stack, mean, log_scale, step)
        noise = self.seeds.noise(self.channel, mean.shape[1:], step)
        if isinstance(self.channel, EchoChannel):
            z, stack.chain = self.channel.advance(mean, log_scale, stack.chain, noise=noise)
            return z
        return self.channel.transmit(mean, log_scale, noise)

    def _begin_chains(self, channel: EchoChannel, stack: Stack, mean: Tensor, log_scale: Tensor, step: int) -> Tensor:
        """The first step, where each cell's ring may be lengthened by draws of its own."""
        self.laps = [channel.laps(cell) for cell in log_scale]
        sent = []
        for c, k in enumerate(self.seeds.of_cell):
            seed_step(self.seeds.configs[k], step)
            sent.append(channel.advance(mean[c], log_scale[c], None))
        stack.chain = torch.stack([chain for _, chain in sent])
        return torch.stack([z for z, _ in sent])

    def replay(self, cell: int, step: int, shape: Sequence[int]) -> None:
        """Bring the generators to where a separate run's are after this step: what is drawn next belongs to its log and its grids."""
        config = self.seeds.configs[self.seeds.of_cell[cell]]
        seed_step(config, step)
        self.channel.noise(shape, device=config.device)
        if step == 0 and self.laps and self.laps[cell] > 1 and isinstance(self.channel, EchoChannel):
            self.channel.noise(shape, laps=self.laps[cell] - 1, device=config.device)


def stacked_step(stack: Stack, loss: Loss, step: int, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """One Adam step of all cells. Returns (measures (C, 4), healthy (C,)): the flag of a cell, once false, stays false."""
    config, cells = loss.config, len(stack.states)
    images = loss.seeds.images(step)
    mean, log_scale = (part.view(cells, -1, part.shape[-1]) for part in stack.networks["encoder"](images))
    z = loss.send(stack, mean, log_scale, step)
    output = stack.networks["decoder"](z.flatten(0, 1))
    distortion = distortion_of(config, output, images).view(cells, -1).mean(1)
    rate = rate_of(config, loss.channel, z, mean, log_scale, loss.seeds.population).mean(1)
    total = distortion + loss.betas * rate
    parameters = list(stack.networks.parameters())
    gradients = torch.autograd.grad(total.sum(), parameters, materialize_grads=True)
    norm = norms_of_cells(gradients)
    healthy = healthy & total.isfinite() & norm.isfinite()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    stack.optimizer.step()  # a sick cell's numbers stay in its own slice, and it writes nothing more
    return torch.stack([total, distortion, rate, norm], 1).detach(), healthy


# ---- the loop -------------------------------------------------------------------------------------------------------------------------------


def train_group(cells: Sequence[Cell], starts: Sequence[Checkpoint | None], data: ImageData, on_progress: OnProgress | None) -> dict[Path, str]:
    """Train prepared cells that are all at one step, to the end. Returns what went wrong, by folder.

    Raises Interrupted after a signal, with a checkpoint of every healthy cell left.
    """
    configs = [config for config, _ in cells]
    first, seeds = configs[0], gather_seeds(configs, data)
    stack = stack_states([_state(config, seeds, c, start, data) for c, (config, start) in enumerate(zip(configs, starts, strict=True))], first)
    betas = torch.tensor([config.beta for config in configs], dtype=torch.float32, device=first.device)
    loss = Loss(first, betas, channel_of(first), seeds)
    steps, begun = steps_in_all(first, seeds.population), stack.states[0].step
    journal = Journal(stack, loss, list(cells), steps, begun, on_progress)
    healthy = torch.ones(len(cells), dtype=torch.bool, device=first.device)

    def advance(step: int) -> Tensor:
        nonlocal healthy
        _schedule(stack, first, step, steps)
        measures, healthy = stacked_step(stack, loss, step, healthy)
        stack.sums += measures.double()
        journal.summed += 1
        return healthy

    run_stack(cells, journal.frozen, begun, steps, advance, journal.write)
    return journal.frozen


def _state(config: AutoencoderConfig, seeds: Seeds, cell: int, start: Checkpoint | None, data: ImageData) -> State:
    """A cell's state as a separate run begins it, or goes on with it."""
    torch.manual_seed(stream(config.seed, "networks"))
    networks = AutoencoderNetworks(*build_networks(config, data.shape))
    mean = seeds.starts[seeds.of_cell[cell]]
    start_at_mean(networks.decoder, mean, logits=config.architecture != "linear" or config.likelihood == "bernoulli")
    state = new_state(config, networks, config.device)
    if start is not None:
        state.restore(start)
    return state


def _schedule(stack: Stack, config: AutoencoderConfig, step: int, steps: int) -> None:
    """The step size of this step."""
    set_learning_rate(State(stack.networks, stack.optimizer, stack.sums, step=step), config, steps)


class Journal:
    """What the cells of a stack leave behind: lines, grids and checkpoints, by the functions of a separate run. Frozen cells leave nothing more."""

    def __init__(self, stack: Stack, loss: Loss, cells: list[Cell], steps: int, begun: int, on_progress: OnProgress | None) -> None:
        self.stack, self.loss, self.cells, self.steps = stack, loss, cells, steps
        self.on_progress = on_progress
        self.frozen: dict[Path, str] = {}
        self.summed = stack.states[0].summed
        self.banks = [Bank(config, loss.seeds.banks[k]) for (config, _), k in zip(cells, loss.seeds.of_cell, strict=True)]
        self.clocks = share_clocks(cells, loss.seeds.population, begun)

    def write(self, step: int, logs: bool, draws: bool, saves: bool) -> None:
        """What is due after so many steps, of every healthy cell."""
        self.stack.tell_states(step, self.summed)
        told: list[Progress] = []
        for c, (config, folder) in enumerate(self.cells):
            if folder in self.frozen:
                continue
            state, k = self.stack.states[c], self.loss.seeds.of_cell[c]
            if logs or draws:
                self.loss.replay(c, step - 1, (config.batch_size, config.latent_dim))
            if logs:
                log(state, config, self.loss.channel, self.loss.seeds.watched[k], self.clocks[c], folder, self.steps, told.append)
            if draws:
                save_samples(state, config, self.loss.channel, self.loss.seeds.shown[k], self.banks[c], folder)
            if saves:
                save_checkpoint(folder, config, state.step, self.steps, state.tensors() | self.banks[c](state), {"summed": state.summed})
        self.summed = 0 if logs else self.summed
        tell_of_all(told, len(self.cells), self.on_progress)


# ---- the door -------------------------------------------------------------------------------------------------------------------------------


def train_stacked(
    cells: Sequence[AnyCell],
    data: ImageData | str | os.PathLike[str],
    *,
    source: str | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[Run]:
    """Train cells that differ only in what VARIED names together, each into an ordinary run folder, and open them.

    Args:
        cells: (configuration, run folder) of each, all autoencoders or all adversarial models. data, source, warn: as for `periplus.train`.
        resume: go on from the newest checkpoints. Cells that are finished are left out of the stack; those at different steps (a kill in the middle
            of saving) are trained as one stack after the other.
        on_progress: called at every line of metrics: images per second of all cells, time left of the stack.

    Raises:
        UsageError: as `periplus.train`, and for cells that cannot be one stack. Interrupted: a signal came, every cell has a checkpoint.
        FrozenCells: a NonFiniteError: some cells were frozen; raised after the others were finished and saved.
    """
    if not cells:
        return []
    if not isinstance(data, ImageData):
        data, source = load_data(data), source or str(data)
    if reason := why_not([config for config, _ in cells]):
        raise UsageError(f"these cells cannot be trained as one program: {reason}")
    record, decided = describe_data(data, source), plan(cells[0][0], data)
    known = [(resolve(config, data), Path(folder)) for config, folder in cells]
    frozen: dict[Path, str] = {}
    with contextlib.ExitStack() as locks:
        left = list(_enter(known, decided, record, resume, locks))
        starts = [prepare(folder, config, record, resume, False, warn) for config, folder in left]
        device = decided.config.device
        keep_freed_memory()
        with torch.random.fork_rng(devices=cuda_index(device)), deterministic(device):
            for step in sorted({_step(start) for start in starts} - {decided.steps}, reverse=True):
                group = [(*cell, start) for cell, start in zip(left, starts, strict=True) if _step(start) == step]
                _say_stacked([folder for _, folder, _ in group])
                frozen |= _train_kind(group, data, on_progress)
    if frozen:
        raise FrozenCells(frozen, len(known))
    return [Run(folder, config.device) for config, folder in known]


def _train_kind(group: Sequence[tuple[Config, Path, Checkpoint | None]], data: ImageData, on_progress: OnProgress | None) -> dict[Path, str]:
    """Train prepared cells with the stack for their kind."""
    starts = [start for _, _, start in group]
    adversarial = [(config, folder) for config, folder, _ in group if isinstance(config, AdversarialConfig)]
    if adversarial:
        return ensembles.train_ensemble(adversarial, starts, data, on_progress)
    return train_group([(config, folder) for config, folder, _ in group if isinstance(config, AutoencoderConfig)], starts, data, on_progress)


def _step(start: Checkpoint | None) -> int:
    return 0 if start is None else start.step


def _enter(cells: Iterable[AnyCell], decided: Plan, record: DataRecord, resume: bool, locks: contextlib.ExitStack) -> Iterator[AnyCell]:
    """The cells with something left to do, their folders made and locked for as long as `locks` is open."""
    for config, folder in cells:
        check_vacant(folder, resume)
        if resume and is_finished(folder, dataclasses.replace(decided, config=config), record):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        locks.enter_context(hold(folder, f"training {config.model} (stacked)"))
        yield config, folder


def _say_stacked(folders: Sequence[Path]) -> None:
    """Let env.json say that this session's time is a share."""
    for folder in folders:
        path, sessions = folder / "env.json", read_environment(folder)
        record = json.loads(path.read_text(encoding="utf-8"))
        sessions[-1]["stacked_cells"] = len(folders)
        write_atomically(path, json.dumps({**record, "sessions": sessions}, indent=2) + "\n")
