"""A sweep as one stacked program against the same cells one after the other, in one run. Run it on a quiet machine.

    PERIPLUS_DATA=/folder/with/mnist python benchmarks/stacked_sweep.py

9 betas x 3 seeds of `vae` (mlp). Digits (batch 64, latent 16): whole trainings, folders and all, `train_stacked` against `train` cell after cell in
this process. MNIST (batch 128): a short number of steps. Separate cells are timed for `--sample` of the 27 and multiplied up; they and the stack take
turns in `--rounds` rounds. Both have --threads threads. Beside wall-clock stands the processor time, which other jobs on the machine do not stretch.
Writes benchmarks/results/stacked_sweep.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # torch.optim imports it at the first optimiser: seconds that belong to neither side

import periplus
from periplus.machine import commit, environment
from periplus.training.stacked import train_stacked

RESULTS = Path(__file__).parent / "results"
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SEEDS = 3


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor seconds."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def compare(data: periplus.ImageData, rounds: int, sample: int, **values) -> dict[str, object]:
    configs = [periplus.AutoencoderConfig(beta=beta, seed=seed, **values) for beta in BETAS for seed in range(SEEDS)]
    stacked, separate = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cells = [(config, Path(folder) / f"stacked-{k}") for k, config in enumerate(configs)]
            stacked.append(timed(lambda cells=cells: train_stacked(cells, data)))
            chosen = configs[:: max(1, len(configs) // sample)][:sample]
            seconds = [timed(lambda k=k, c=c, folder=folder: periplus.train(c, data, Path(folder) / f"alone-{k}")) for k, c in enumerate(chosen)]
            separate.append(tuple(sum(s) / len(chosen) * len(configs) for s in zip(*seconds, strict=True)))
    ratios = [[alone[k] / together[k] for alone, together in zip(separate, stacked, strict=True)] for k in (0, 1)]
    return {
        "settings": values,
        "cells": len(configs),
        "stacked_seconds": [round(s[0], 2) for s in stacked],
        "separate_seconds": [round(s[0], 2) for s in separate],
        "stacked_processor_seconds": [round(s[1], 2) for s in stacked],
        "separate_processor_seconds": [round(s[1], 2) for s in separate],
        "ratio": round(statistics.median(ratios[0]), 2),
        "ratio_processor": round(statistics.median(ratios[1]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sample", type=int, default=27, help="separate cells that are trained; the rest is multiplied up")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512], help="for the digits")
    parser.add_argument("--mnist-steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    digits = periplus.load_data("digits")
    periplus.train(periplus.AutoencoderConfig(max_steps=2), digits, Path(tempfile.mkdtemp()) / "warm")
    rows = []
    for hidden in arguments.hidden:
        rows.append({"data": "digits", **compare(digits, arguments.rounds, arguments.sample, batch_size=64, latent_dim=16, hidden=hidden)})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.mnist_steps:
        values = {"batch_size": 128, "latent_dim": 16, "hidden": 512, "max_steps": arguments.mnist_steps}
        rows.append({"data": "mnist", **compare(periplus.load_data("mnist"), arguments.rounds, min(3, arguments.sample), **values)})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "threads": arguments.threads,
        "rows": rows,
        "commit": commit(),
        "environment": environment("cpu"),
    }
    (RESULTS / "stacked_sweep.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
