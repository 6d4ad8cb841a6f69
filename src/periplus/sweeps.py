"""Sweeps: a grid of configurations times seeds, trained, measured, and put side by side.

    OUT/settings.json    what was asked for; a resumed sweep must ask for the same
    OUT/cells/NAME/      a run for each point and seed, NAME such as beta=0.1,seed=2; the command beside it makes the same run
    OUT/measures/        what was measured of each, with the checkpoint that it was measured on
    OUT/sweep.json       settings, cells with all their measures, and for each point the mean over seeds with a 95 % interval
    OUT/sweep.csv        one row for each cell
    OUT/curve.svg        autoencoders: distortion against rate, a point for each beta

Who trains the cells is an engine's business (periplus.engines). A cell that fails leaves the others alone; the sweep then ends with its error.

The interval is Student's: mean +- t(0.975, n - 1) s / sqrt(n) over the n seeds. It tells how a figure varies from seed to seed (weights, batches,
noise and, for data without a test split, the held-out images); the standard errors of single cells tell how it varies with the test images.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from periplus import plots
from periplus.config import AutoencoderConfig, Config, nearest
from periplus.console import StageDisplay, note
from periplus.data import ImageData, load_data
from periplus.engines import Cell, Engine, Processes, Stacked
from periplus.errors import PeriplusError, UsageError
from periplus.evaluation import JUDGED_IMAGES, evaluate_autoencoder, evaluate_collapse, splits_of, write_evaluation
from periplus.files import read_json, write_atomically
from periplus.locks import hold
from periplus.machine import cores, environment, resolve_device
from periplus.runs import Run, describe_data, load_run
from periplus.training import plan
from periplus.training.stacked import why_not

ENGINES = ("auto", "processes", "stacked")
#: Trainable parameters of a cell up to which `auto` stacks on a CPU: beyond, products of single cells fill the cores by themselves.
SMALL = 250_000
#: Raised when a measure changes its meaning: cells measured by older versions are then measured again.
MEASURE_VERSION = 1
SETTINGS, CELLS, MEASURES = "settings.json", "cells", "measures"

Measures = dict[str, Any]
"""A cell's measures by name: plain numbers, booleans or None."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep is asked to do.

    base: the configuration that fields not in `values` are taken from, and `preset` the word for it. values: the values of each field that is given;
    those with several are varied. workers: cells side by side, or threads of the stacked program.
    """

    base: Config
    data: str
    out: Path
    values: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: int = 3
    preset: str = "default"
    engine: str = "auto"
    workers: int | None = None
    images: int = JUDGED_IMAGES
    image_size: int | None = None
    data_root: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        known = [f.name for f in dataclasses.fields(self.base) if f.name not in ("model", "seed")]
        for name, values in self.values.items():
            if name not in known:
                raise UsageError(f"'{name}' cannot be swept{nearest(name, known)}: a '{self.base.model}' has {', '.join(known)} (and --seeds)")
            if not values:
                raise UsageError(f"--{name.replace('_', '-')} has no value")
            if repeated := [v for k, v in enumerate(values) if v in values[:k]]:
                raise UsageError(f"--{name.replace('_', '-')} names {spelled(repeated[0])} twice")
        for name in ("seeds", "workers", "images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}: at least 1 is needed")
        if self.engine not in ENGINES:
            raise UsageError(f"--engine is '{self.engine}'{nearest(self.engine, ENGINES)}: use one of {', '.join(ENGINES)}")

    @property
    def varied(self) -> list[str]:
        """The fields with several values, in the configuration's order."""
        return [f.name for f in dataclasses.fields(self.base) if len(self.values.get(f.name, ())) > 1]

    def points(self) -> list[dict[str, Any]]:
        """The grid: the values of all fields given, for each point."""
        names = [f.name for f in dataclasses.fields(self.base) if f.name in self.values]
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*(self.values[name] for name in names))]

    def cells(self, threads: int) -> list[Cell]:
        """Every point with every seed; all points of a seed first, so that a stopped sweep has some of each. Raises UsageError for bad values."""
        return [self._cell(point, seed, threads) for seed in range(self.seeds) for point in self.points()]

    def _cell(self, point: Mapping[str, Any], seed: int, threads: int) -> Cell:
        config = dataclasses.replace(self.base, **point, seed=seed)
        name = ",".join(f"{key}={spelled(value)}" for key, value in {**{k: point[k] for k in self.varied}, "seed": seed}.items())
        path = f"{CELLS}/{name}"
        words = ["train", config.model, "--data", self.data, *(("--preset", self.preset) if self.preset != "default" else ())]
        words += [word for key, value in point.items() if value != self._default(key) for word in option_words(key, value)]
        words += ["--seed", str(seed), *(("--image-size", str(self.image_size)) if self.image_size else ())]
        words += [*(("--data-root", str(self.data_root)) if self.data_root else ()), "--threads", str(threads), "--out", str(self.out / path)]
        return Cell(name, path, tuple(words), config)

    def _default(self, name: str) -> Any:
        """What a field is where the command line does not name it."""
        value = getattr(self.base, name)
        return self.base.defaults.get(name) if value is None else value

    def record(self) -> dict[str, Any]:
        """What decides the cells: settings.json and part of sweep.json."""
        return {
            "model": self.base.model,
            "data": self.data,
            "image_size": self.image_size,
            "preset": self.preset,
            "values": {name: list(values) for name, values in self.values.items()},
            "seeds": self.seeds,
            "images": self.images,
        }


def spelled(value: Any) -> str:
    """A value as in a cell's name and on the command line: 1 for 1.0, and no digit lost."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def option_words(name: str, value: Any) -> tuple[str, ...]:
    """A field's value as words of a command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return (f"--{option}" if value else f"--no-{option}",)
    return (f"--{option}", spelled(value))


# ---- the sweep ------------------------------------------------------------------------------------------------------------------------------


def make_sweep(sweep: Sweep, command: str, say: Callable[[str], None] = note) -> dict[str, Any]:
    """Train what is not trained, measure what is not measured, and write sweep.json, sweep.csv and curve.svg. Returns what sweep.json holds.

    Raises UsageError (a folder in use, other settings than it was begun with, bad values), DataError, and the error of the first cell that failed,
    after everything else was done and written.
    """
    check_folder(sweep.out, sweep.resume)
    check_settings(sweep)
    sweep.cells(1)  # a bad value is an error before the data are read
    data = load_data(sweep.data, root=sweep.data_root, image_size=sweep.image_size)
    name, threads = choose_engine(sweep, data)
    cells = sweep.cells(threads)
    for cell in cells[: len(sweep.points())]:  # and what does not fit the data, before anything is written
        plan(cell.config, data)
    sweep.out.mkdir(parents=True, exist_ok=True)
    with hold(sweep.out, "sweep"):
        check_settings(sweep)
        write_atomically(sweep.out / SETTINGS, json.dumps(sweep.record() | {"engine": name, "threads": threads}, indent=1) + "\n")
        engine: Engine = Stacked(data, sweep.data, say) if name == "stacked" else Processes(sweep.workers or cores())
        before = torch.get_num_threads()
        torch.set_num_threads(threads if name == "stacked" else before)
        try:
            with StageDisplay([cell.name for cell in cells], say) as display:
                failed = engine(cells, sweep.out, display)
        finally:
            torch.set_num_threads(before)
        results = {
            "command": command,
            "settings": sweep.record(),
            "engine": {"name": name, "threads": threads},
            "data": vars(describe_data(data, sweep.data)),
            "environment": environment("cpu"),
            **gather(sweep, cells, failed, data, say),
        }
        write_results(sweep, results)
    if failed:
        raise next(iter(failed.values()))
    return results


def check_folder(folder: Path, resume: bool) -> None:
    """Raise UsageError where something would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    if not folder.exists() or not any(entry.name != ".lock" for entry in folder.iterdir()):
        return
    if not (folder / SETTINGS).exists():
        raise UsageError(f"{folder} is not empty and not a sweep: choose another --out")
    if not resume:
        raise UsageError(f"{folder} holds a sweep already: add --resume (in Python resume=True) to go on with it, or choose another --out")


def stored_settings(folder: Path) -> dict[str, Any] | None:
    """What the sweep in a folder was begun with, or None where there is none."""
    path = folder / SETTINGS
    return read_json(path, "choose another --out") if path.exists() else None


def check_settings(sweep: Sweep) -> None:
    """Raise UsageError where the folder's sweep was begun with other settings."""
    was = stored_settings(sweep.out)
    if was is None:
        return
    asked = {} if sweep.engine == "auto" else {"engine": sweep.engine}
    for name, value in (json.loads(json.dumps(sweep.record())) | asked).items():
        if was.get(name) != value:
            raise UsageError(f"{sweep.out} was begun with {name} = {json.dumps(was.get(name))}, not {json.dumps(value)}: choose another --out")


def choose_engine(sweep: Sweep, data: ImageData) -> tuple[str, int]:
    """The engine's name and the threads of one operation: those that the sweep was begun with, else as asked for, else what suits the cells.

    Raises UsageError where cells are to be stacked that cannot be.
    """
    if (was := stored_settings(sweep.out)) is not None:
        return str(was.get("engine")), int(was.get("threads", 1))
    configs = [cell.config for cell in sweep.cells(1)]
    reason = why_not(configs)
    if sweep.engine == "stacked" and reason:
        raise UsageError(f"--engine stacked: {reason}; use --engine processes")
    name = sweep.engine
    if name == "auto":
        name = "stacked" if reason is None and len(configs) > 1 and suits_stacking(configs[0], data) else "processes"
    return name, min(sweep.workers or cores(), torch.get_num_threads()) if name == "stacked" else 1


def suits_stacking(config: Config, data: ImageData) -> bool:
    """Whether one program is the faster way: on a GPU always, on a CPU for small networks."""
    return resolve_device(config.device) != "cpu" or sum(plan(config, data).parameters.values()) <= SMALL


# ---- measuring ------------------------------------------------------------------------------------------------------------------------------


def measure_cell(run: Run, data: ImageData, sweep: Sweep) -> Measures:
    """What a finished cell is judged by.

    Autoencoders, on test images (held-out ones where the data have no test split), nats per example with standard errors over images: distortion,
    rate (the run's own notion of it) between its bounds, bound = distortion + rate, marginal and prior rate of Gaussian channels, active units.
    Adversarial models: the last line of metrics and whether it has collapsed.
    """
    if not isinstance(run.config, AutoencoderConfig):
        told = evaluate_collapse(run, data)
        last = {key: value for key, value in (run.metrics[-1] if run.metrics else {}).items() if key not in ("step", "epoch")}
        return {**last, **{key: told[key] for key in ("collapsed", "smallest_share", "spread")}}
    train, test = splits_of(run, data, sweep.data_root)
    record = evaluate_autoencoder(run, train, test, images=sweep.images, likelihood_images=0)
    words = (*(("--images", str(sweep.images)) if sweep.images != JUDGED_IMAGES else ()), "--likelihood-images", "0")
    write_evaluation(run, record, " ".join(("periplus evaluate", str(run.path), *words)))
    judged = record["splits"]["test"]
    low, high = judged["rate"]["interval"]
    rate = judged["rate"]["formula"]
    found = {"distortion": judged["distortion"], "rate": rate, "bound": judged["bound"]}
    found |= {name: judged[name] for name in ("marginal_rate", "prior_rate") if judged.get(name) is not None}
    measures: Measures = {}
    for name, told in found.items():
        measures |= {name: told["value"], f"{name}_se": told["standard_error"]}
    return measures | {"rate_low": low, "rate_high": high, "active_units": judged["active_units"], "examples": judged["examples"]}


def measured(cell: Cell, sweep: Sweep, data: ImageData) -> Measures:
    """The cell's measures, or those kept from an earlier time with the same checkpoint and data."""
    run = load_run(sweep.out / cell.path)
    digest = hashlib.sha256((run.checkpoint.path / "manifest.json").read_bytes()).hexdigest()
    key = {"version": MEASURE_VERSION, "checkpoint": digest, "data": run.data.sha256, "images": sweep.images}
    path = sweep.out / MEASURES / f"{cell.name}.json"
    if path.exists():
        kept = read_json(path, "delete it, and the cell is measured again")
        if kept.get("inputs") == key and isinstance(kept.get("measures"), dict):
            return dict(kept["measures"])
    found = finite(measure_cell(run, data, sweep))
    write_atomically(path, json.dumps({"inputs": key, "measures": found}, indent=1) + "\n")
    return found


def finite(measures: Mapping[str, Any]) -> Measures:
    """With None for what is not a number: JSON has no word for it."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measures.items()}


def gather(sweep: Sweep, cells: Sequence[Cell], failed: Mapping[str, PeriplusError], data: ImageData, say: Callable[[str], None]) -> dict[str, Any]:
    """The records of all cells and of all points."""
    records = []
    for number, cell in enumerate(cells, 1):
        values = {name: getattr(cell.config, name) for name in sweep.varied}
        record: dict[str, Any] = {"name": cell.name, "seed": cell.config.seed, "values": values, "path": cell.path, "command": cell.command}
        if cell.name in failed:
            records.append(record | {"error": str(failed[cell.name])})
            continue
        run = load_run(sweep.out / cell.path)
        seconds = run.timing[-1]["seconds"] if run.timing else None
        records.append(record | {"step": run.step, "seconds": seconds, "measures": measured(cell, sweep, data)})
        if number % 10 == 0 or number == len(cells):
            say(f"measured {number} of {len(cells)}")
    return {"cells": records, "points": [summarise(point, records) for point in distinct(record["values"] for record in records)]}


def distinct(points: Any) -> list[dict[str, Any]]:
    """Points in the order of their first appearance, each once."""
    found: list[dict[str, Any]] = []
    for point in points:
        if point not in found:
            found.append(point)
    return found


def summarise(point: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A point of the grid: every measure's mean over its seeds with the 95 % interval."""
    own = [record for record in records if record["values"] == point]
    good = [record["measures"] for record in own if "measures" in record]
    names = dict.fromkeys(name for measures in good for name in measures if not name.endswith("_se"))
    told = {name: interval([measures.get(name) for measures in good]) for name in names}
    return {"values": dict(point), "seeds": len(good), "failed": len(own) - len(good), "measures": told}


def interval(values: Sequence[Any]) -> dict[str, float | None]:
    """Mean and Student's 95 % interval for the mean; None where a value is missing, and for the ends of fewer than two."""
    if not values or any(value is None for value in values):
        return {"mean": None, "low": None, "high": None}
    numbers = [float(value) for value in values]
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return {"mean": mean, "low": None, "high": None}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / math.sqrt(len(numbers))
    return {"mean": mean, "low": mean - half, "high": mean + half}


# ---- what is written ------------------------------------------------------------------------------------------------------------------------


def write_results(sweep: Sweep, results: Mapping[str, Any]) -> list[Path]:
    """sweep.json, sweep.csv and, for autoencoders, curve.svg."""
    files = [write_atomically(sweep.out / "sweep.json", json.dumps(results, indent=1) + "\n")]
    files.append(write_atomically(sweep.out / "sweep.csv", as_csv(results["cells"])))
    curves = rate_distortion_curves(results)
    if curves:
        files.append(plots.rate_distortion(curves, sweep.out / "curve.svg"))
    return files


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """One row for each cell: its name, the values that are varied, seed, step, seconds, and every measure."""
    rows = [
        {"name": r["name"], **r["values"], "seed": r["seed"], "step": r.get("step"), "seconds": r.get("seconds"), **r.get("measures", {})}
        | ({"error": r["error"]} if "error" in r else {})
        for r in records
    ]
    header = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rate_distortion_curves(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A curve for each setting of what is varied beside beta, as `plots.rate_distortion` takes them."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for point in results["points"]:
        told = point["measures"]
        if any(told.get(name, {}).get("mean") is None for name in ("rate", "distortion")):
            continue
        others = ", ".join(f"{name}={spelled(value)}" for name, value in point["values"].items() if name != "beta")
        own = [r["measures"] for r in results["cells"] if r["values"] == point["values"] and "measures" in r]
        curves.setdefault(others or results["settings"]["model"], []).append(
            {
                "name": spelled(point["values"]["beta"]) if "beta" in point["values"] else "",
                "rate": told["rate"],
                "distortion": told["distortion"],
                "seeds": [(measures["rate"], measures["distortion"]) for measures in own],
            }
        )
    return [{"label": label, "points": points} for label, points in curves.items()]


def table_rows(results: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table on stdout: a row for each point."""
    fields = list(results["points"][0]["values"]) if results["points"] else []
    wanted = ("distortion", "rate", "marginal_rate", "bound", "active_units", "collapsed", "smallest_share", "spread")
    shown = [name for name in wanted if any(name in point["measures"] for point in results["points"])]
    rows = []
    for point in results["points"]:
        seeds = f"{point['seeds']}" + (f" ({point['failed']} failed)" if point["failed"] else "")
        rows.append((*(spelled(point["values"][name]) for name in fields), seeds, *(printed(point["measures"].get(name)) for name in shown)))
    return (*fields, "seeds", *(name.replace("_", " ") for name in shown)), rows


def printed(told: Mapping[str, float | None] | None) -> str:
    """A mean with half its interval."""
    if told is None or told["mean"] is None:
        return "-"
    half = "" if told["high"] is None else f" ± {told['high'] - told['mean']:.2g}"
    return f"{told['mean']:.4g}{half}"
