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
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MODELS = {"gan": "the GAN", "wgan-gp": "the WGAN-GP", "rpgan": "the RpGAN"}
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


def number(value: float | None, digits: int = 3, zeros: bool = False) -> str:
    """A number for print, to so many significant digits: 0.123, 16,786, 9.5 × 10⁻⁴; `zeros` keeps those at its end, for lists."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return scientific(value)
    if size >= 10**digits - 0.5:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if zeros and value else f"{value:.{digits}g}"


def scientific(value: float) -> str:
    """A number with a power of ten, two significant digits: 9.5 × 10⁻⁴."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × {power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """10 with a raised exponent: 10⁴, 10⁻⁴."""
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def joined(values: Sequence[float | None], digits: int = 3) -> str:
    """Numbers in a row, one per seed."""
    return ", ".join(number(v, digits, zeros=True) for v in values)


def settings_of(config: dict[str, Any]) -> Settings:
    """The settings of a model, as a block."""
    kept = [k for k in TOLD if k in config and config["model"] in ONLY_FOR.get(k, (config["model"],))]
    return Settings(tuple((TOLD[k], f"{config[k]:g}" if isinstance(config[k], float) else str(config[k])) for k in kept))


def run_table(results: dict[str, Any], label: str) -> Table:
    """One row per seed: what was measured of each run."""
    runs = results["runs"]
    header = ["seed", "steps", "time / s", "spread", "nearest / held-out", "gap, training", "gap, held-out"]
    rows = [
        [
            str(r["seed"]),
            f"{r['step']}",
            f"{r['seconds']:.0f}",
            f"{r['spread']:.3f}",
            interval(r["neighbour_ratio"], r["neighbour_ratio_interval"]),
            *(fixed(r["last_metrics"].get(f"critic_gap_{part}"), 3) for part in ("train", "held_out")),
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
        f"The runs of {MODELS.get(results['model'], results['model'])}. Spread: mean distance of two samples, divided by that of two real images. "
        + ("Smallest class: its share of the samples with the 95 % interval of this share. " if runs[0]["shares"] else "")
        + "Nearest / held-out: median distance of samples to the nearest training image, divided by that of held-out images, with its 95 % bootstrap "
        "interval. Gap: mean score of real images (training or held-out) less that of samples. Time: as it was in this run, no benchmark.",
        runs[0]["command"],
        label=label,
    )


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits after the point, for columns."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(value: float | None, bounds: Sequence[float] | None) -> str:
    """A value with its interval."""
    return "-" if value is None or bounds is None else f"{value:.2f} ({bounds[0]:.2f} to {bounds[1]:.2f})"


def collapse_count(runs: Sequence[dict[str, Any]]) -> str:
    """How many runs collapsed, and which."""
    collapsed = [r["seed"] for r in runs if r["collapsed"]]
    if len(runs) == 1:
        return "The run collapsed" if collapsed else "The run did not collapse"
    if not collapsed:
        return f"None of {len(runs)} runs collapsed"
    return f"{len(collapsed)} of {len(runs)} runs collapsed (seed{'s' * (len(collapsed) != 1)} {', '.join(map(str, collapsed))})"


def collapse_sentence(runs: Sequence[dict[str, Any]]) -> str:
    """How many runs collapsed, by the stated rule, and how close the others came."""
    rule = f"a class below {100 * SMALLEST_SHARE:g} % of the samples, or samples less than {SMALLEST_SPREAD:g} times as far apart as the data"
    told = f"{collapse_count(runs)}; collapsed means {rule}."
    spread = f"the spread is {joined([r['spread'] for r in runs])} of that of the data"
    if runs[0]["smallest_share"] is None:
        return f"{told} {spread[0].upper()}{spread[1:]}."
    return f"{told} The smallest class has {joined([100 * r['smallest_share'] for r in runs])} % of the samples, {spread}."
