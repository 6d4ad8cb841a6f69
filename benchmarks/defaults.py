"""Do the defaults collapse? Trains each model with several seeds and judges 10,000 samples of each run.

    python benchmarks/defaults.py --data mnist --models gan wgan-gp --seeds 0 1 2 --out runs/defaults
    python benchmarks/defaults.py --data mnist --models gan wgan-gp --seeds 0 --preset sheet --out runs/sheet
    python benchmarks/defaults.py --data mnist --models rpgan --seeds 0 1 2 --out runs/rpgan --name rpgan_mnist
    python benchmarks/defaults.py --data mnist --models wgan-gp-conv gan-conv --seeds 0 --epochs 10 --out runs/conv --name conv_mnist

A model's name may end with -conv for the convolutional architecture.

Runs are made by as many processes as there are cores, one thread each; a run that is there already is gone on with, or only judged. Results are
written after every run to benchmarks/results/NAME.json, grids to benchmarks/results/NAME/. Seconds are of this machine while it did two runs at
once: no benchmark.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def one(job: tuple[str, int, argparse.Namespace]) -> dict:
    import torch

    import periplus
    from periplus.evaluation import evaluate_collapse
    from periplus.machine import commit, environment

    model, seed, arguments = job
    torch.set_num_threads(1)
    data = periplus.load_data(arguments.data)
    make = periplus.AdversarialConfig.sheet if arguments.preset == "sheet" else periplus.AdversarialConfig
    name, model = model, model.removesuffix("-conv")
    changes = {"epochs": arguments.epochs} if arguments.epochs else {}
    config = make(model, seed=seed, architecture="mlp" if name == model else "conv", **changes)
    out = Path(arguments.out) / f"{name}-{seed}"
    run = periplus.train(config, data, out, resume=True)
    record = evaluate_collapse(run, data)
    grid = sorted((out / "samples").glob("*.png"), key=lambda p: p.stat().st_mtime)[-1]
    (RESULTS / arguments.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(grid, RESULTS / arguments.name / f"{name}-{seed}.png")
    return {
        "model": name,
        "seed": seed,
        "epochs": run.config.epochs,
        "training_seconds": run.timing[-1]["seconds"],
        "final_metrics": run.metrics[-1],
        "evaluation": record,
        "commit": commit(),
        "environment": environment(run.config.device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--models", nargs="+", default=["gan", "wgan-gp"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--preset", choices=["default", "sheet"], default="default")
    parser.add_argument("--out", default="runs/defaults")
    parser.add_argument("--name", default=None, help="of the results; by default from the other arguments")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.name = arguments.name or f"{arguments.preset}_{arguments.data}"
    jobs = [(model, seed, arguments) for seed in arguments.seeds for model in arguments.models]
    records: list[dict] = []
    started = time.time()
    with multiprocessing.get_context("spawn").Pool(min(arguments.workers, len(jobs)), maxtasksperchild=1) as pool:
        for record in pool.imap_unordered(one, jobs):
            records.append(record)
            records.sort(key=lambda r: (r["model"], r["seed"]))
            summary = {"command": " ".join(["python", *sys.argv]), "runs": records}
            (RESULTS / f"{arguments.name}.json").write_text(json.dumps(summary, indent=1) + "\n")
            shares = [round(100 * s["value"], 1) for s in record["evaluation"]["shares"] or []]
            print(
                f"{time.time() - started:.0f}s {record['model']} seed {record['seed']}: collapsed={record['evaluation']['collapsed']}, "
                f"spread {record['evaluation']['spread']:.2f}, shares % {shares}",
                flush=True,
            )
    return int(any(r["evaluation"]["collapsed"] for r in records))


if __name__ == "__main__":
    sys.exit(main())
