"""What every stack of cells shares: the loop, their optimisers side by side, their share of the time, who is frozen, whom to tell."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from periplus.config import Config
from periplus.errors import Interrupted, NonFiniteError
from periplus.runs import append_line
from periplus.training.interruption import StopRequest
from periplus.training.journal import Clock, OnProgress, Progress, check_finite
from periplus.training.steps import due, on_host

C = TypeVar("C", bound=Config)
Moments = dict[str, Tensor]
"""What Adam keeps of one parameter: step, exp_avg, exp_avg_sq."""


def stack_moments(stacked: nn.Module, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Adam]) -> list[Moments]:
    """The moments (C, ...) of a stacked module's parameters, of which those of the cells' own optimisers become views.

    All cells have taken as many steps.
    """
    made = []
    own = [list(module.parameters()) for module in modules]
    for k, parameter in enumerate(stacked.parameters()):
        known = [optimizer.state[mine[k]] for optimizer, mine in zip(optimizers, own, strict=True)]
        moments = {"step": torch.tensor(float(known[0].get("step", 0)), dtype=torch.float32, device=parameter.device)}
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.stack([state.get(name, torch.zeros_like(mine[k])) for state, mine in zip(known, own, strict=True)])
        for c, (optimizer, mine) in enumerate(zip(optimizers, own, strict=True)):
            optimizer.state[mine[k]] = {name: value if name == "step" else value[c] for name, value in moments.items()}
        made.append(moments)
    return made


def norms_of_cells(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norms (C,) of all gradients (C, ...) of each cell together."""
    norms: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]), dim=0)
    return norms


class ShareClock(Clock):
    """A cell's clock: its share of the time of `cells` cells that are trained together."""

    cells = 1

    def lap(self, step: int) -> float:
        now = time.perf_counter()
        elapsed, done = (now - self.last) / self.cells, step - self.step
        self.seconds, self.last, self.step = self.seconds + elapsed, now, step
        rate = max(done * self.images_per_step / max(elapsed, 1e-9), 1e-9)
        append_line(self.path, {"step": step, "seconds": round(self.seconds, 3), "images_per_second": round(rate, 1), "cells": self.cells})
        return rate


def share_clocks(cells: Sequence[tuple[C, Path]], images: int, begun: int) -> list[ShareClock]:
    """A clock for every cell of a stack that begins at a step."""
    clocks = [ShareClock(folder, config, images, begun) for config, folder in cells]
    for clock in clocks:
        clock.cells = len(cells)
    return clocks


def freeze(frozen: dict[Path, str], cells: Sequence[tuple[C, Path]], healthy: Tensor, step: int) -> None:
    """Add the cells whose flag has gone down to `frozen`, with what went wrong: waits for the device."""
    if bool(healthy.all()):
        return
    for (_, folder), flag in zip(cells, healthy.cpu(), strict=True):
        if folder not in frozen:
            try:
                check_finite(flag, step, folder)
            except NonFiniteError as error:
                frozen[folder] = str(error)


def run_stack(
    cells: Sequence[tuple[C, Path]],
    frozen: dict[Path, str],
    begun: int,
    steps: int,
    advance: Callable[[int], Tensor],
    write: Callable[[int, bool, bool, bool], None],
) -> None:
    """The steps of a stack from `begun` to the last, freezing cells whose flag goes down, until all is done or all are frozen.

    Args:
        advance: takes step n of all cells, returns their flags (C,). write: leaves behind what is due after n steps: lines, grids, checkpoints.

    Raises Interrupted after a signal, with a checkpoint of every healthy cell left.
    """
    first = cells[0][0]
    with StopRequest() as stop:
        for step in range(begun, steps):
            healthy = advance(step)
            logs, draws, saves = (due(step + 1, every, steps) for every in (first.log_every, first.sample_every, first.checkpoint_every))
            stopping = stop.requested is not None  # read once: a signal may come between two looks
            if on_host(first) or logs or draws or saves or stopping:
                freeze(frozen, cells, healthy, step)
            if logs or draws or saves or stopping:
                write(step + 1, logs, draws, saves or stopping)
            if stopping and step + 1 < steps:
                raise Interrupted(f"stopped by {stop.requested} at step {step + 1} of {steps} of {len(cells)} cells; go on with --resume")
            if len(frozen) == len(cells):
                break


def tell_of_all(told: Sequence[Progress], cells: int, on_progress: OnProgress | None) -> None:
    """Let the first cell's progress stand for the stack's: the time left is that of all cells."""
    if told and on_progress is not None:
        on_progress(dataclasses.replace(told[0], seconds_left=told[0].seconds_left * cells))
