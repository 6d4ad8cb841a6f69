"""What the chapters on rate and distortion measure, draw and say of sweeps: numbers per cell, means over seeds, curves, and which lies below which.

A sweep's record in results.json holds, for every cell, flat numbers of both splits in nats per example; everything told is computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from periplus import metrics, plots
from periplus.report import Table
from periplus.study.telling import number, power_of_ten
from periplus.study.workshop import Swept, Workshop

#: Sweeps in print.
NAMES = {"vae": "β-VAE, rate against the prior", "marginal": "VAE, rate against q(z)", "echo": "echo noise"}
Record = dict[str, Any]


# ---- measuring ------------------------------------------------------------------------------------------------------------------------------


def sweep_record(swept: Swept) -> Record:
    """One sweep as numbers: its configuration, and each cell's figures on training and test images."""
    first = swept.run(swept.cells[0])
    config = {k: v for k, v in vars(first.config).items() if k not in ("seed", "beta") and v is not None}
    cells = [
        {"beta": cell["values"]["beta"], "seed": cell["seed"], "seconds": cell["seconds"]}
        | {split: split_record(judged) for split, judged in swept.evaluation(cell)["splits"].items()}
        for cell in swept.cells
    ]
    seeds = len({cell["seed"] for cell in cells})
    # what `answer` replaces by what they are now stands first
    return {"command": "", "environment": {}, "config": config, "epochs": config["epochs"], "seeds": seeds, "cells": cells}


def split_record(judged: Record) -> Record:
    """The figures of one split of one cell, with standard errors over images where they have any."""
    rate = judged["rate"]
    found: Record = {"distortion": judged["distortion"], "rate": rate["formula"], "bound": judged["bound"]}
    found |= {name: judged[name] for name in ("marginal_rate", "prior_rate", "kl_to_prior", "rate_against_training")}
    found |= {"infonce": next((bound for bound in rate["bounds"] if bound["name"] == "InfoNCE"), None)}
    flat: Record = {}
    for name, told in found.items():
        flat |= {name: None, f"{name}_se": None} if told is None else {name: told["value"], f"{name}_se": told["standard_error"]}
    if flat["rate_against_training"] is not None:  # q(z) of the training images: what a code costs a receiver who knows these
        flat |= {"rate": flat["rate_against_training"], "rate_se": flat["rate_against_training_se"]}
    kept = {name: judged[name] for name in ("examples", "constant_distortion", "entropy_floor", "active_units")}
    interval = {"rate_low": rate["interval"][0], "rate_high": rate["interval"][1]}
    return flat | kept | interval | {"ln_n": rate["ln_n"], "statements": rate["statements"]}


def nearest_cell(swept: Swept, wanted: Callable[[Record], float]) -> Record:
    """The cell of seed 0 for which `wanted`, a function of its training figures and its beta, is least."""
    own = [cell for cell in swept.cells if cell["seed"] == 0]
    return min(own, key=lambda cell: wanted(split_record(swept.evaluation(cell)["splits"]["train"]) | {"beta": cell["values"]["beta"]}))


# ---- over seeds -----------------------------------------------------------------------------------------------------------------------------


def betas(record: Record) -> list[float]:
    """The betas of a sweep, rising."""
    return sorted({cell["beta"] for cell in record["cells"]})


def values(record: Record, beta: float, name: str, split: str = "test") -> list[float]:
    """One figure at one beta, by seed."""
    own = sorted((cell for cell in record["cells"] if cell["beta"] == beta), key=lambda cell: cell["seed"])
    return [cell[split][name] for cell in own if cell[split][name] is not None]


def mean(numbers: Sequence[float]) -> float:
    """The mean; not a number of nothing."""
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def spread(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds; of one seed, or where seeds agree to the digit, the mean three times."""
    low, high = metrics.mean_interval(numbers)
    middle = mean(numbers)
    return (middle, low, high) if math.isfinite(low) else (middle, middle, middle)


def half(numbers: Sequence[float], places: int | None = None) -> str:
    """Mean ± half the 95 % interval over seeds, for print, with so many decimal places or those that suit its size; the mean alone for one seed."""
    middle, low, high = spread(numbers)
    if math.isnan(middle):
        return "-"
    size = max(abs(middle), (high - low) / 2)
    if places is None:
        places = 3 if size < 0.0995 else 2 if size < 9.995 else 1 if size < 999.95 else 0
    middle = round(middle, places) + 0.0  # 0, not -0
    return f"{middle:,.{places}f}" + (f" ± {(high - low) / 2:,.{places}f}" if high > low else "")


def told_beta(beta: float) -> str:
    """A beta for print: 0.001, 20, 10⁴."""
    exponent = math.log10(beta) if beta > 0 else 0.0
    return f"{beta:g}" if abs(exponent) < 4 else number(beta) if exponent % 1 else power_of_ten(round(exponent))


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def curve_points(record: Record, split: str = "test", highest: float = math.inf) -> list[Record]:
    """The points of a rate-distortion curve as `plots.rate_distortion` takes them, up to a mean rate."""
    points = []
    for beta in betas(record):
        rates, distortions = values(record, beta, "rate", split), values(record, beta, "distortion", split)
        if mean(rates) <= highest:
            told = [dict(zip(("mean", "low", "high"), spread(numbers), strict=True)) for numbers in (rates, distortions)]
            pairs = list(zip(rates, distortions, strict=True))
            points.append({"name": told_beta(beta), "rate": told[0], "distortion": told[1], "seeds": pairs})
    return points


def draw_curves(records: dict[str, Record], workshop: Workshop, name: str, highest: float = math.inf) -> dict[str, str]:
    """Rate-distortion curves of sweeps on test images, and the command that draws them again."""
    path = Path("figures") / f"{name}.svg"
    curves = [{"label": NAMES[key], "points": curve_points(record, highest=highest)} for key, record in records.items()]
    plots.rate_distortion([c for c in curves if c["points"]], workshop.folder / path, "rate / nats per image", "distortion / nats per image")
    return {"path": str(path), "command": workshop.again(name.split("-")[0])}


def against_beta(record: Record, name: str, label: str, split: str = "test") -> Record:
    """One figure against beta as a curve of `plots.lines`, with intervals over seeds."""
    found = [spread(values(record, beta, name, split)) for beta in betas(record)]
    middle, low, high = zip(*found, strict=True)
    return {"label": label, "x": betas(record), "y": middle, "low": low, "high": high}


def draw_lines(panels: list[Record], workshop: Workshop, name: str, **options: Any) -> dict[str, str]:
    """Panels of curves as a figure, and the command that draws it again."""
    path = Path("figures") / f"{name}.svg"
    plots.lines(panels, workshop.folder / path, **options)
    return {"path": str(path), "command": workshop.again(name.split("-")[0])}


# ---- which lies below which -----------------------------------------------------------------------------------------------------------------


def compare_sweeps(a: Record, b: Record, comparisons: int, split: str = "test") -> list[Record]:
    """Two sweeps at every common beta by D + beta R, which both were trained to make small; Welch's interval over seeds of a - b, and a verdict.

    The line D + beta R = const of slope -beta supports a rate-distortion curve where it touches it, so the comparison needs no interpolation. The
    interval is at 95 % for `comparisons` of them together (Bonferroni); the verdict is "lower", "higher" or "cannot tell", of `a`.
    """
    rows = []
    for beta in [beta for beta in betas(a) if beta in betas(b)]:
        costs = [[d + beta * r for d, r in zip(values(s, beta, "distortion", split), values(s, beta, "rate", split), strict=True)] for s in (a, b)]
        low, high = metrics.welch_interval(costs[0], costs[1], 1 - 0.05 / comparisons)
        verdict = "lower" if high < 0 else "higher" if low > 0 else "cannot tell"
        ends = [bound if math.isfinite(bound) else None for bound in (low, high)]
        rows.append({"beta": beta, "a": mean(costs[0]), "b": mean(costs[1]), "low": ends[0], "high": ends[1], "verdict": verdict})
    return rows


def verdict_sentence(rows: Sequence[Record], a: str, b: str, undecided: bool = True) -> str:
    """Which of two sweeps costs less at which beta, in words; with `undecided`, also where that cannot be told."""
    parts = []
    for verdict, words in (
        ("lower", f"{a} costs less than {b}"),
        ("higher", f"{b} costs less than {a}"),
        ("cannot tell", f"{a} and {b} *cannot be told* apart"),
    ):
        found = [told_beta(row["beta"]) for row in rows if row["verdict"] == verdict]
        if found and (undecided or verdict != "cannot tell"):
            parts.append(f"{words} at " + ("every β" if len(found) == len(rows) else f"β = {', '.join(found)}"))
    return "; ".join(parts)


def difference(value: float | None, infinite: str) -> str:
    """An end of an interval for print."""
    return infinite if value is None else number(value)


def comparison_table(records: dict[str, Record], pairs: dict[tuple[str, str], Sequence[Record]], names: dict[str, str], command: str) -> Table:
    """D + beta R of every sweep, beta by beta, and the intervals of their differences; decided ones are set bold.

    records: the sweeps by key. pairs: (first, second) -> rows of `compare_sweeps`. names: what a key is called in the header.
    """
    rows = []
    for index, beta in enumerate(betas(next(iter(records.values())))):
        row = [told_beta(beta)]
        for record in records.values():
            parts = zip(values(record, beta, "distortion"), values(record, beta, "rate"), strict=True)
            row.append(half([d + beta * r for d, r in parts]))
        for found in pairs.values():
            told = found[index]
            interval = f"{difference(told['low'], '-∞')} to {difference(told['high'], '∞')}"
            row.append(interval if told["verdict"] == "cannot tell" else f"*{interval}*")
        rows.append(tuple(row))
    header = ("β", *(names[key] for key in records), *(f"{names[a]} − {names[b]}" for a, b in pairs))
    caption = (
        "Which model costs less: D + βR on test images, in nats, which each was trained to make small; mean over seeds ± half of the 95 % interval. "
        "q(z): the VAE with the rate against q(z). Then Welch's intervals of the differences, 95 % for all comparisons at one β together, bold where "
        "they exclude zero; below zero the first of the two costs less."
    )
    align = ("left", *("decimal" for _ in records), *("right" for _ in pairs))
    return Table(header, tuple(rows), caption, command, align=align, label="three-table")
