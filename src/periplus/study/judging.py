"""What the adversarial chapters measure of every run, draw of every model, and how they compare two models."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from periplus import metrics, pictures, plots
from periplus.data import ImageData
from periplus.evaluation import evaluate_collapse, pixels
from periplus.runs import Run
from periplus.seeds import stream
from periplus.study.settings import Cell
from periplus.study.workshop import Workshop
from periplus.training.steps import hold_out

NEIGHBOUR_SAMPLES = 1000
TITLES = {"gan": "GAN", "wgan-gp": "WGAN-GP", "rpgan": "RpGAN"}
GRID_IMAGES = 60
GRID_COLUMNS = 12
STRIP_IMAGES = 12

#: What two models are compared in: key of a run's record, what it is, which direction is better ("" for none).
COMPARED = (
    ("share_distance", "distance of class shares", "lower"),
    ("spread", "spread", "nearer 1"),
    ("neighbour_ratio", "nearest / held-out", "nearer 1"),
)


def measure_model(workshop: Workshop, model: str) -> dict[str, Any]:
    """A record per seed of one model, and its resolved configuration (without the seed)."""
    records = [measure_run(cell, run, workshop.data) for cell, run in workshop.of(model)]
    config = {k: v for k, v in dataclasses.asdict(workshop.of(model)[0][1].config).items() if k != "seed" and v is not None}
    return {"model": model, "config": config, "runs": records}


def measure_run(cell: Cell, run: Run, data: ImageData) -> dict[str, Any]:
    """Everything said of one run: classes and spread of its samples, nearest training images, the critic's gaps, time."""
    record = evaluate_collapse(run, data)
    return {
        "name": cell.name,
        "command": cell.command,
        "seconds": run.timing[-1]["seconds"],
        "images_per_second": sum(line["images_per_second"] for line in run.timing) / len(run.timing),
        "last_metrics": run.metrics[-1],
        **record,
        "seed": cell.seed,  # after the record, whose own seed is that of the samples
        "share_distance": share_distance(record, data),
        **neighbour_record(run, data),
    }


def share_distance(record: dict[str, Any], data: ImageData) -> float | None:
    """Total variation between the class shares of the samples and those of the data, in [0, 1]; None without shares."""
    if data.labels is None or record["shares"] is None:
        return None
    shares = torch.tensor([s["value"] for s in record["shares"]], dtype=torch.float64)
    return float((shares - data_shares(data)).abs().sum() / 2)


def data_shares(data: ImageData) -> Tensor:
    """Class shares of the data, float64."""
    assert data.labels is not None
    return torch.bincount(data.labels, minlength=len(data.classes)).double() / len(data)


def neighbour_record(run: Run, data: ImageData) -> dict[str, Any]:
    """Median distance of samples, and of held-out images, to their nearest training image, and the ratio of the two with its bootstrap interval."""
    train, held_out = hold_out(run.config, data)
    reference = pixels(train.images)
    samples = nearest_distances(run.sample(NEIGHBOUR_SAMPLES, seed=1).flatten(1), reference)
    record: dict[str, Any] = {"neighbour_samples": len(samples), "neighbour_distance": float(samples.median())}
    fresh = None if held_out is None else nearest_distances(pixels(held_out.images), reference)
    if fresh is None or not fresh.median() > 0:  # nothing held out, or data so full of duplicates that the ratio means nothing
        return record | {"neighbour_distance_held_out": None, "neighbour_ratio": None, "neighbour_ratio_interval": None}
    ratio = metrics.median_ratio(samples, fresh, stream(run.config.seed, "bootstrap"))
    return record | {
        "neighbour_distance_held_out": float(fresh.median()),
        "neighbour_ratio": ratio.value,
        "neighbour_ratio_interval": [ratio.low, ratio.high],
    }


def nearest_distances(rows: Tensor, reference: Tensor) -> Tensor:
    """Distance of each row to its nearest reference row, (N,)."""
    return metrics.nearest_neighbours(rows, reference).distance[:, 0]


# ---- comparing ------------------------------------------------------------------------------------------------------------------------------


def compare_models(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Two models, measure by measure: means over seeds, Welch's interval of the difference a - b at 95 % for all measures together, and a verdict.

    Seeds are the sample. The interval is corrected for the number of measures (Bonferroni). The verdict is about `a`: "better", "worse" or
    "cannot tell", in the direction that COMPARED states; for "nearer 1" the distance |value - 1| is compared.
    """
    rows = []
    usable = [c for c in COMPARED if all(r[c[0]] is not None for r in (*a["runs"], *b["runs"]))]
    for key, title, direction in usable:
        values = [[r[key] for r in model["runs"]] for model in (a, b)]
        scores = [[abs(v - 1) for v in group] if direction == "nearer 1" else group for group in values]
        low, high = metrics.welch_interval(scores[0], scores[1], 1 - 0.05 / len(usable))
        verdict = "better" if high < 0 else "worse" if low > 0 else "cannot tell"
        interval = [bound if math.isfinite(bound) else None for bound in (low, high)]  # JSON has no infinity
        rows.append({"key": key, "title": title, "direction": direction, "a": values[0], "b": values[1], "interval": interval, "verdict": verdict})
    return rows


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return math.fsum(values) / len(values)


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw_model(results: dict[str, Any], workshop: Workshop, key: str, panels: dict[str, str]) -> dict[str, dict[str, str]]:
    """The figures that every adversarial model gets: samples, curves, class shares, nearest training images."""
    model = results["model"]
    cells = workshop.of(model)
    figures = {f"samples-{cell.seed}": draw_samples(cell, run, workshop, key) for cell, run in cells}
    again = workshop.again(key)
    path = Path("figures") / f"{key}-curves.svg"
    plots.training_curves([curves(run, TITLES[model], panels) for _, run in cells], workshop.folder / path, panels, x_label="epochs")
    figures["curves"] = {"path": str(path), "command": again}
    if workshop.data.labels is not None:
        path = Path("figures") / f"{key}-classes.svg"
        shares = {
            r["name"]: {k: [s[v] for s in r["shares"]] for k, v in (("share", "value"), ("low", "low"), ("high", "high"))} for r in results["runs"]
        }
        plots.class_bars(shares, workshop.folder / path, workshop.data.classes, data_shares(workshop.data).numpy())
        figures["classes"] = {"path": str(path), "command": again}
    figures["neighbours"] = {"path": str(draw_neighbours(cells[0][1], workshop, key)), "command": again}
    return figures


def draw_samples(cell: Cell, run: Run, workshop: Workshop, key: str) -> dict[str, str]:
    """A grid, and the command that draws the same one."""
    path = Path("figures") / f"{key}-samples-{cell.seed}.png"
    target = workshop.folder / path
    pictures.image_grid(run.sample(GRID_IMAGES), target, GRID_COLUMNS)
    run_folder = workshop.folder / cell.path
    words = ("periplus", "sample", str(run_folder), "--n", str(GRID_IMAGES), "--columns", str(GRID_COLUMNS), "--out", str(target))
    return {"path": str(path), "command": shlex.join(words)}


def draw_side_by_side(workshop: Workshop, models: Sequence[str], key: str) -> dict[str, str]:
    """Two rows of real images, then two rows of the first seed's samples of each model; none of them selected."""
    path = Path("figures") / f"{key}-side-by-side.png"
    count = 2 * GRID_COLUMNS
    rows = [workshop.data.images[:count].float() / 255, *(workshop.of(model)[0][1].sample(count) for model in models)]
    labels = [text for name in ("real", *(TITLES[model] for model in models)) for text in (name, "")]
    pictures.image_grid(torch.cat(rows), workshop.folder / path, GRID_COLUMNS, labels)
    return {"path": str(path), "command": workshop.again(key)}


def draw_neighbours(run: Run, workshop: Workshop, key: str) -> Path:
    """Samples above their nearest training images."""
    path = Path("figures") / f"{key}-neighbours.png"
    train, _ = hold_out(run.config, workshop.data)
    samples = run.sample(STRIP_IMAGES)
    found = metrics.nearest_neighbours(samples.flatten(1), pixels(train.images))
    pictures.neighbour_strip(samples, train.images[found.row[:, 0]], found.distance[:, 0], workshop.folder / path, columns=STRIP_IMAGES)
    return path


def curves(run: Run, label: str, panels: dict[str, str]) -> dict[str, Any]:
    """A run's metrics as `plots.training_curves` takes them, against epochs."""
    lines = run.metrics
    return {"label": label, "steps": [r["epoch"] for r in lines], "series": {k: [r[k] for r in lines] for k in panels if k in lines[0]}}
