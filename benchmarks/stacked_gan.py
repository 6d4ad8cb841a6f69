"""S seeds of wgan-gp as one stacked program against one seed by itself, in one run. Run it on a quiet machine.

    PERIPLUS_DATA=/folder/with/mnist python benchmarks/stacked_gan.py [--device cuda]

mlp pairs of the default widths. Digits (batch 64, latent 16) and a short stretch of MNIST (batch 128, latent 32), S = 1, 2, 4, 8, 16. A turn is a
separate run (`train`) and then a stack of each size (`train_stacked`), so many steps of each, and there are --rounds turns; a first one of few steps
is not counted. What is timed are steps: the time from the first to the last line of timing.jsonl, so laying out folders is not in it, but the lines
and the flags are. `seconds_per_step` is a step of the whole program, `speedup` S separate steps over one step of the stack, the median over turns and
their range. Writes benchmarks/results/stacked_gan.json (or --out).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch._dynamo  # torch.optim imports it at the first optimiser: seconds that belong to neither side

import periplus
from periplus.machine import commit, environment
from periplus.training.stacked import train_stacked

RESULTS = Path(__file__).parent / "results"
SIZES = (1, 2, 4, 8, 16)


def seconds_per_step(folder: Path) -> float:
    """Of a run between its first line of times and its last, without what came before."""
    first, *_, last = periplus.load_run(folder).timing
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def turn(data: periplus.ImageData, sizes: list[int], steps: int, **values) -> tuple[float, dict[int, float]]:
    """Seconds of one step: of a separate run, and of the stack of each size."""
    config = {"max_steps": steps, "log_every": max(1, steps // 4), "sample_every": steps, "checkpoint_every": steps, "held_out": 0, **values}
    with tempfile.TemporaryDirectory() as folder:
        periplus.train(periplus.AdversarialConfig(**config), data, Path(folder) / "alone")
        alone, stacks = seconds_per_step(Path(folder) / "alone"), {}
        for size in sizes:
            cells = [(periplus.AdversarialConfig(seed=seed, **config), Path(folder) / f"{size}-{seed}") for seed in range(size)]
            train_stacked(cells, data)
            stacks[size] = size * seconds_per_step(cells[0][1])  # a cell's times are its share
    return alone, stacks


def compare(data: periplus.ImageData, sizes: list[int], steps: int, rounds: int, **values) -> dict[str, object]:
    turn(data, sizes[:1], 8, **values)
    turns = [turn(data, sizes, steps, **values) for _ in range(rounds)]
    stacks = []
    for size in sizes:
        speedups = [size * alone / stack[size] for alone, stack in turns]
        stacks.append(
            {
                "cells": size,
                "seconds_per_step": [round(stack[size], 5) for _, stack in turns],
                "speedup": round(statistics.median(speedups), 2),
                "range": [round(min(speedups), 2), round(max(speedups), 2)],
            }
        )
    return {"data": data.name, "settings": values, "steps": steps, "separate_seconds_per_step": [round(a, 5) for a, _ in turns], "stacks": stacks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--model", default="wgan-gp")
    parser.add_argument("--digits-steps", type=int, default=100)
    parser.add_argument("--mnist-steps", type=int, default=40, help="0: leave MNIST out")
    parser.add_argument("--out", type=Path, default=RESULTS / "stacked_gan.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    common = {"model": arguments.model, "device": arguments.device}
    jobs = [("digits", arguments.digits_steps, {"batch_size": 64, "latent_dim": 16}), ("mnist", arguments.mnist_steps, {})]
    rows = []
    for name, steps, values in jobs:
        if steps:
            rows.append(compare(periplus.load_data(name), arguments.sizes, steps, arguments.rounds, **common, epochs=1000, **values))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "threads": arguments.threads,
        "rows": rows,
        "commit": commit(),
        "environment": environment(arguments.device),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
