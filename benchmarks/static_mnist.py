"""Static binarised MNIST: rate, distortion and bound of `vae` and `echo` at five betas, three seeds, 40 epochs, on the test images.

    python benchmarks/static_mnist.py --out runs/static

trains what is not trained (`periplus train`, two runs at a time, one thread each), evaluates what is not evaluated, and writes
results/static_mnist.json and results/static_mnist/curve.svg and .csv as results come. `--no-train` only evaluates what is there.

The rate is what the code is charged: the prior's for `vae`, the formula for `echo`; both are upper bounds on the information, and both stand beside
their certificates in the file. Which model lies lower is told by D + beta R at the same beta, which both were trained to make small: the line of that
slope supports a rate-distortion curve where it touches it, so nothing is interpolated (a chord lies above a convex curve: at equal rates, linear
interpolation between the vae's points favoured echo by half a nat).
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from periplus import metrics, plots
from periplus.evaluation import evaluate, write_evaluation
from periplus.files import write_atomically
from periplus.machine import environment
from periplus.runs import Run, load_run, read_environment
from periplus.sweeps import interval

RESULTS = Path(__file__).parent / "results"
MODELS, BETAS, SEEDS = ("vae", "echo"), ("0.25", "0.5", "1", "2", "4"), (0, 1, 2)
OPTIONS = ("--data", "binarized-mnist", "--latent-dim", "32", "--batch-size", "256", "--epochs", "40")
EVERY = ("--log-every", "195", "--sample-every", "3900", "--checkpoint-every", "3900", "--threads", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/static"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-train", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(model, beta, seed) for seed in SEEDS for beta in BETAS for model in MODELS]
    if not options.no_train:
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda cell: train(options.out, *cell), cells))
    records = [record for cell in cells if (record := measure(options.out, *cell)) is not None]
    write(records, options.out)


def command(out: Path, model: str, beta: str, seed: int) -> list[str]:
    return ["train", model, *OPTIONS, "--beta", beta, "--seed", str(seed), *EVERY, "--out", str(out / f"{model}-{beta}-{seed}")]


def train(out: Path, model: str, beta: str, seed: int) -> None:
    subprocess.run([sys.executable, "-m", "periplus", *command(out, model, beta, seed), "--resume"], check=True)


def measure(out: Path, model: str, beta: str, seed: int) -> dict[str, Any] | None:
    """The evaluation of a finished run, made now where it is not there."""
    folder = out / f"{model}-{beta}-{seed}"
    if not (folder / "config.toml").exists():
        return None
    run = load_run(folder)
    if not run.metrics or run.metrics[-1]["epoch"] < 39.5:
        return None
    kept = folder / "evaluation.json"
    record = json.loads(kept.read_text()) if kept.exists() else {}
    if record.get("step") != run.step or not record.get("static_mnist"):
        print(f"evaluating {folder}", flush=True)
        options = {"likelihood_images": 1000 if beta == "1" else 0, "samples": 1000}
        record = write_evaluation(run, evaluate(run, **options) | {"static_mnist": True}, shlex.join(["periplus", "evaluate", str(folder)]))
    return told(run, record, model, beta, seed, shlex.join(["periplus", *command(out, model, beta, seed)]))


def told(run: Run, record: dict[str, Any], model: str, beta: str, seed: int, made_by: str) -> dict[str, Any]:
    test, train = record["splits"]["test"], record["splits"]["train"]
    return {
        "model": model,
        "beta": float(beta),
        "seed": seed,
        "command": made_by,
        "trained_at": read_environment(run.path)[0].get("commit"),
        "measured_at": record["measured_at"],
        "seconds": run.timing[-1]["seconds"],
        "distortion": test["distortion"],
        "rate": test["rate"]["formula"],
        "bound": test["bound"],
        "active_units": test["active_units"],
        "certificate": test["rate"],
        "marginal_rate": test["marginal_rate"],
        "kl_to_prior": test["kl_to_prior"],
        "train": {name: train[name] for name in ("distortion", "bound")},
        "log_likelihood": record["log_likelihood"],
    }


def points(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and beta: means over seeds with Student's 95 % intervals."""
    found = []
    for model in MODELS:
        for beta in BETAS:
            own = [r for r in records if r["model"] == model and r["beta"] == float(beta)]
            if own:
                means = {name: interval([r[name]["value"] for r in own]) for name in ("rate", "distortion", "bound")}
                found.append({"model": model, "beta": float(beta), "seeds": len(own), **means})
    return found


def dominance(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """D + beta R of echo less that of vae at each beta: Welch's interval over seeds, 95 % for all betas together, and a verdict."""
    rows = []
    for beta in map(float, BETAS):
        costs = {
            model: [r["distortion"]["value"] + beta * r["rate"]["value"] for r in records if (r["model"], r["beta"]) == (model, beta)]
            for model in MODELS
        }
        if min(map(len, costs.values())) < 2:
            continue
        low, high = metrics.welch_interval(costs["echo"], costs["vae"], 1 - 0.05 / len(BETAS))
        verdict = "echo lower" if high < 0 else "vae lower" if low > 0 else "cannot tell"
        means = {model: statistics.fmean(values) for model, values in costs.items()}
        rows.append({"beta": beta, **means, "interval": [low, high], "verdict": verdict})
    return rows


def write(records: Sequence[dict[str, Any]], out: Path) -> None:
    again = f"python benchmarks/static_mnist.py --out {out}"
    result = {
        "command": again,
        "environment": environment("cpu"),
        "what": "static binarised MNIST, 10,000 test images; nats per example; mlp 784-512-32-512-784, batch 256, Adam 1e-3, 40 epochs",
        "points": points(records),
        "dominance": dominance(records),
        "cells": list(records),
    }
    folder = RESULTS / "static_mnist"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS / "static_mnist.json", json.dumps(result, indent=1) + "\n")
    with open(folder / "cells.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "beta", "seed", "rate", "distortion", "bound", "active_units"])
        writer.writerows(
            [r["model"], r["beta"], r["seed"], *(r[k]["value"] for k in ("rate", "distortion", "bound")), r["active_units"]] for r in records
        )
    curves = []
    for model in MODELS:
        own = [p for p in result["points"] if p["model"] == model]
        if own:
            seeds = {
                p["beta"]: [(r["rate"]["value"], r["distortion"]["value"]) for r in records if (r["model"], r["beta"]) == (model, p["beta"])]
                for p in own
            }
            drawn = [{"name": f"{p['beta']:g}", "rate": p["rate"], "distortion": p["distortion"], "seeds": seeds[p["beta"]]} for p in own]
            curves.append({"label": model, "points": drawn})
    plots.rate_distortion(curves, folder / "curve.svg")
    for point in result["points"]:
        print(point["model"], point["beta"], point["seeds"], *(f"{point[k]['mean']:.2f}" for k in ("rate", "distortion", "bound")))
    for row in result["dominance"]:
        print(row)


if __name__ == "__main__":
    main()
