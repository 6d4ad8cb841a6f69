"""The adversarial step of mlps written out against the same step by automatic differentiation, in turn, in one process. Run it on a quiet machine.

    PERIPLUS_DATA=/folder/with/mnist python benchmarks/written_step.py [--precision bfloat16]

MNIST, the defaults of a model; short turns in an order drawn anew in each of --rounds rounds. `gain` is the time by automatic differentiation over
the written one: the median of the rounds' ratios, and the 95 % interval of that median by order statistics. Writes
benchmarks/results/written_step.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch
from scipy.stats import binom

import periplus
from periplus.benchmarking import FROM_STEP, Step, check_healthy, same_networks, seconds_for
from periplus.machine import commit, environment, keep_freed_memory
from periplus.training import plan
from periplus.training.adversarial import new_state, train_step
from periplus.training.steps import Batches, hold_out

RESULTS = Path(__file__).parent / "results"
SECONDS = 0.35


def step_of(config: periplus.AdversarialConfig, data: periplus.ImageData, written: bool) -> Step:
    """A run's step, from its first weights."""
    state, batches = new_state(config, same_networks(config, data), "cpu"), Batches(data.images, config.batch_size, config.seed)
    state.step = FROM_STEP
    if not written:
        state.written_critic = state.written_generator = None
    healthy = torch.tensor(True)

    def step() -> None:
        nonlocal healthy
        healthy = train_step(state, config, batches, healthy)
        check_healthy(healthy, config)

    return step


def compare(config: periplus.AdversarialConfig, data: periplus.ImageData, rounds: int) -> dict:
    """Both ways at one batch size."""
    train_data, order = hold_out(config, data)[0], random.Random(0)
    steps = {name: step_of(config, train_data, name == "written") for name in ("written", "automatic")}
    for step in steps.values():
        seconds_for(step, 60, "cpu")  # a heap settles late
    count = max(2, round(SECONDS / seconds_for(steps["written"], 5, "cpu") * 5))
    seconds: list[dict[str, float]] = []
    for _ in range(rounds):
        seconds.append({})
        for name in order.sample(list(steps), 2):
            seconds_for(steps[name], 2, "cpu")
            seconds[-1][name] = seconds_for(steps[name], count, "cpu") / count
    ratios = sorted(turn["automatic"] / turn["written"] for turn in seconds)
    low = max(0, int(binom.ppf(0.025, rounds, 0.5)) - 1)
    told = {name: round(1e3 * statistics.median(turn[name] for turn in seconds), 2) for name in steps}
    gain = {"median": round(statistics.median(ratios), 3), "interval": [round(ratios[k], 3) for k in (low, rounds - 1 - low)]}
    return {"model": config.model, "batch_size": config.batch_size, "rounds": rounds, "steps_per_turn": count, "milliseconds": told, "gain": gain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--models", nargs="+", default=["wgan-gp", "rpgan"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--out", type=Path, default=RESULTS / "written_step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    data, rows = periplus.load_data("mnist"), []
    for model in arguments.models:
        for size in arguments.batch_sizes:
            config = periplus.AdversarialConfig(model, batch_size=size, device="cpu", precision=arguments.precision)
            rows.append(compare(plan(config, data).config, data, arguments.rounds))
            print(json.dumps(rows[-1]), flush=True)
    result = {"command": " ".join(["python", *sys.argv]), "threads": arguments.threads, "precision": arguments.precision, "rows": rows}
    arguments.out.write_text(json.dumps(result | {"commit": commit(), "environment": environment("cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
