"""Are samples of bfloat16 as good as those of float32? Both precisions, several seeds, scores of 10,000 samples of each run beside each other.

    python benchmarks/precision.py --models gan wgan-gp rpgan --seeds 0 1 2 --epochs 10 --out runs/precision

A run that is there already is gone on with, or only scored. Runs are made by as many processes as there are cores, one thread each, float32 and
bfloat16 in turn. After each run the record is written to benchmarks/results/precision.json: every score, and for each model the difference of the
means, bfloat16 minus float32, with Welch's 95 % interval over seeds, and its share of float32's mean. Runs of one seed share weights and batches at
the start and differ like strangers after some hundred steps, so they are not paired. Seconds of training are of a shared machine: no benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "bfloat16")
SCORES = ("frechet", "kernel", "precision", "recall", "density", "coverage", "classes")
Job = tuple[str, int, str, argparse.Namespace]


def one(job: Job) -> dict:
    """A run trained and scored."""
    import torch

    import periplus
    from periplus.evaluation import evaluate_collapse
    from periplus.machine import commit, environment
    from periplus.scoring import reference, score

    model, seed, precision, options = job
    torch.set_num_threads(1)
    data = periplus.load_data(options.data)
    config = periplus.AdversarialConfig(model, seed=seed, epochs=options.epochs, precision=precision)
    run = periplus.train(config, data, options.out / f"{model}-{precision}-{seed}", resume=True)
    scores = score(run, reference(data))["scores"]
    return {
        "model": model,
        "precision": precision,
        "seed": seed,
        "epochs": options.epochs,
        "collapsed": evaluate_collapse(run, data)["collapsed"],
        "scores": {name: {k: scores[name][k] for k in ("value", "floor") if k in scores[name]} for name in SCORES},
        "training_seconds": run.timing[-1]["seconds"],
        "commit": commit(),
        "environment": environment(run.config.device),
    }


def differences(records: list[dict]) -> dict:
    """bfloat16 minus float32 for each model and score: difference of means, Welch's interval, both as shares of float32's mean too."""
    from periplus.metrics import welch_interval

    found: dict = {}
    for model, name in itertools.product(sorted({r["model"] for r in records}), SCORES):
        plain, low = ([r["scores"][name]["value"] for r in records if (r["model"], r["precision"]) == (model, kind)] for kind in PRECISIONS)
        if not plain or not low:
            continue
        mean, interval = statistics.fmean(plain), welch_interval(low, plain)
        row = {"float32": mean, "bfloat16": statistics.fmean(low), "difference": statistics.fmean(low) - mean, "runs": [len(plain), len(low)]}
        if math.isfinite(interval[0]):
            row |= {"interval": list(interval), "share": row["difference"] / mean, "share_interval": [end / mean for end in interval]}
        found.setdefault(model, {})[name] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--models", nargs="+", default=["gan", "wgan-gp", "rpgan"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    jobs: list[Job] = [(m, s, p, options) for s, m, p in itertools.product(options.seeds, options.models, PRECISIONS)]
    records: list[dict] = []
    started = time.time()
    with multiprocessing.get_context("spawn").Pool(min(options.workers, len(jobs)), maxtasksperchild=1) as pool:
        for record in pool.imap_unordered(one, jobs):
            records = sorted([*records, record], key=lambda r: (r["model"], r["precision"], r["seed"]))
            summary = {"command": " ".join(["python", *sys.argv]), "differences": differences(records), "runs": records}
            (RESULTS / "precision.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            told = ", ".join(f"{name} {record['scores'][name]['value']:.3g}" for name in SCORES)
            print(f"{time.time() - started:.0f}s {record['model']} {record['precision']} seed {record['seed']}: {told}", flush=True)


if __name__ == "__main__":
    main()
