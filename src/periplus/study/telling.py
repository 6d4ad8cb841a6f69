"""Sentences and tables that several chapters share. Everything here is computed from results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from periplus.evaluation import SMALLEST_SHARE, SMALLEST_SPREAD
from periplus.report import Settings, Table

#: Settings that a reader of a chapter wants, in this order, with what they are called in print.
TOLD = {
    "architecture": "architecture",
    "hidden": "hidden units",
    "depth": "hidden layers",
    "likelihood": "likelihood",
    "sigma": "standard deviation of a pixel",
    "clip": "clip of the echo scale",
    "estimator": "estimate of q(z)",
    "epochs": "epochs",
    "batch_size": "batch size",
    "latent_dim": "dimension of the code",
    "learning_rate": "learning rate (Adam)",
    "schedule": "its schedule",
    "beta1": "Adam, first decay",
    "beta2": "Adam, second decay",
    "critic_steps": "critic steps per generator step",
    "penalty_weight": "penalty weight",
    "generator_loss": "generator loss",
    "critic_dropout": "dropout in the critic",
    "ema": "decay of the averaged generator",
    "held_out": "held-out images",
    "precision": "precision",
    "device": "device",
}
ONLY_FOR = {"penalty_weight": ("wgan-gp", "rpgan"), "generator_loss": ("gan",), "critic_dropout": ("gan",)}


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 seed, 3 seeds."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def where_told(study: Mapping[str, Any], key: str, words: str, otherwise: str = "") -> str:
    """Words that cite another chapter where the study has it; else what stands there instead."""
    return words if key in study.get("chapters", {}) else otherwise


def called(source: str) -> str:
    """A data set in prose: a named set by its name, a file or folder given by a path by its own name."""
    return PurePath(source.replace("\\", "/")).name or source


def number(value: float | None, digits: int = 3) -> str:
    """A number for print, to so many significant digits."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def joined(values: Sequence[float | None], digits: int = 3) -> str:
    """Numbers in a row, one per seed."""
    return ", ".join(number(v, digits) for v in values)


def settings_of(config: dict[str, Any]) -> Settings:
    """The settings of a model, as a block."""
    kept = [k for k in TOLD if k in config and config["model"] in ONLY_FOR.get(k, (config["model"],))]
    return Settings(tuple((TOLD[k], f"{config[k]:g}" if isinstance(config[k], float) else str(config[k])) for k in kept))


def run_table(results: dict[str, Any], label: str) -> Table:
    """One row per seed: what was measured of each run."""
    runs = results["runs"]
    header = ["seed", "steps", "time / s", "spread", "nearest / held-out", "gap, training", "gap, held out"]
    rows = [
        [
            str(r["seed"]),
            f"{r['step']}",
            f"{r['seconds']:.0f}",
            f"{r['spread']:.3f}",
            interval(r["neighbour_ratio"], r["neighbour_ratio_interval"]),
            number(r["last_metrics"].get("critic_gap_train")),
            number(r["last_metrics"].get("critic_gap_held_out")),
        ]
        for r in runs
    ]
    if runs[0]["shares"]:
        header.insert(4, "smallest class / %")
        for row, r in zip(rows, runs, strict=True):
            share = min(r["shares"], key=lambda s: s["value"])
            row.insert(4, f"{100 * share['value']:.1f} ({100 * share['low']:.1f} to {100 * share['high']:.1f})")
    return Table(
        tuple(header),
        tuple(tuple(row) for row in rows),
        f"Runs of {results['model']}. Spread: mean pairwise distance of samples over that of the data. Nearest / held-out: median distance to the "
        "nearest training image, samples over held-out images, with its 95 % bootstrap interval. Gap: the critic's mean score of real "
        "images less that of samples. Smallest class: by the nearest training image; the interval is that of this class's share "
        "alone. Time: as it was run here, no benchmark.",
        runs[0]["command"],
        label=label,
    )


def interval(value: float | None, bounds: Sequence[float] | None) -> str:
    """A value with its interval."""
    return "-" if value is None or bounds is None else f"{value:.2f} ({bounds[0]:.2f} to {bounds[1]:.2f})"


def collapse_sentence(runs: Sequence[dict[str, Any]]) -> str:
    """How many runs collapsed, by the stated rule, and how close the others came."""
    collapsed = [r["seed"] for r in runs if r["collapsed"]]
    rule = f"a class below {100 * SMALLEST_SHARE:g} % of the samples, or samples less than {SMALLEST_SPREAD:g} times as far apart as the data"
    count = (
        f"{len(collapsed)} of {len(runs)} runs collapsed"
        if collapsed
        else f"None of {len(runs)} runs collapsed"
        if len(runs) > 1
        else "The run did not collapse"
    )
    which = f" (seed{'s' * (len(collapsed) != 1)} {', '.join(map(str, collapsed))})" if collapsed else ""
    spread = f"the spread is {joined([r['spread'] for r in runs])} of the data's"
    if runs[0]["smallest_share"] is None:
        return f"{count}{which}, by the rule: {rule}; {spread}."
    return (
        f"{count}{which}, by the rule: {rule}. The smallest class has {joined([100 * r['smallest_share'] for r in runs])} % of the samples, {spread}."
    )
