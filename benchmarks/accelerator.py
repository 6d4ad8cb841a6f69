"""Everything about training speed that wants a GPU, in one call of a few minutes; on a machine without one, the same on the CPU, but for graphs.

    python benchmarks/accelerator.py --out benchmarks/results/accelerator.json

Imports the library, not the command line: where it is run nothing may be installed. MNIST is found through PERIPLUS_DATA. Written after every part:

    bench       `periplus bench train` at batch 128, float32 and bfloat16: seconds per 100 epochs, ratios to the loops that tutorials write
    stack       seconds of a step of 16 stacked seeds over one of a single run (`benchmarks/stacked_gan.py`)
    repeat      two runs of one seed: the same bits?
    captured    CUDA only. The step captured as a graph and replayed, against the eager step of the same weights, batches and seeds: the largest
                difference of a weight after so many steps; whether the last fakes are the same, and how fakes of two seeds within the graph
                correlate (0: every replay draws its own codes); the ratio of their times

A captured step is not in the library: nobody has measured it yet. This script is where that is to be done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from stacked_gan import turn

import periplus
from periplus.benchmarking import bench_train, same_networks, seconds_for
from periplus.checkpoints import latest_checkpoint
from periplus.machine import commit, environment
from periplus.training import plan
from periplus.training.adversarial import State, critic_step, generator_step, make_fakes, new_state, update_average
from periplus.training.steps import Batches, hold_out, seed_step


def stack(data: periplus.ImageData, device: str, steps: int) -> dict:
    """One step of 16 seeds together over one step of one."""
    turn(data, [16], 8, device=device, model="wgan-gp", epochs=1000)
    turns = [turn(data, [16], steps, device=device, model="wgan-gp", epochs=1000) for _ in range(3)]
    return {"cells": 16, "steps": steps, "over_one": sorted(round(stacks[16] / alone, 3) for alone, stacks in turns)}


def repeat(data: periplus.ImageData, device: str) -> dict:
    """Whether two runs of one seed have the same bits."""
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b"):
            config = periplus.AdversarialConfig(device=device, max_steps=40, sample_every=40, checkpoint_every=40)
            periplus.train(config, data, Path(folder) / name)
            found = latest_checkpoint(Path(folder) / name / "checkpoints", warn=print)
            assert found is not None
            ends.append(found.tensors)
    return {"same_bits": all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])}


# ---- a captured step ------------------------------------------------------------------------------------------------------------------------


class Plain:
    """Critic's and generator's step on a batch that lies in one place, without what the host decides at each step."""

    def __init__(self, config: periplus.AdversarialConfig, data: periplus.ImageData) -> None:
        self.config = config
        self.batches = Batches(data.images.to(config.device), config.batch_size, config.seed)
        self.state: State = new_state(config, same_networks(config, data), config.device)
        self.healthy = torch.ones((), dtype=torch.bool, device=config.device)
        self.real = self.batches(0).clone()
        self.fake = torch.empty_like(self.real)

    def body(self) -> None:
        fake = make_fakes(self.state, self.config, self.real)
        self.fake.copy_(fake.detach())
        _, healthy = critic_step(self.state, self.config, self.real, fake, self.healthy)
        _, healthy = generator_step(self.state, self.config, self.real, fake, healthy)
        self.healthy.copy_(healthy)

    def run(self) -> None:
        self.body()

    def __call__(self) -> None:
        seed_step(self.config, self.state.step)
        self.real.copy_(self.batches(self.state.step))
        self.run()
        update_average(self.state.ema, self.state.generator, self.config.ema, self.state.step)
        self.state.step += 1

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for network in (self.state.generator, self.state.critic) for p in network.parameters()])


class Captured(Plain):
    """The same, its body a graph that is captured after `warm_up` steps and replayed from then on."""

    graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records, and does not run
            self.body()

    def run(self) -> None:
        if self.graph is None:
            self.body()
        else:
            self.graph.replay()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the images' departures from their means."""
    return float(torch.corrcoef(torch.stack([(x - x.mean(0)).flatten() for x in (a, b)]))[0, 1])


def captured(config: periplus.AdversarialConfig, data: periplus.ImageData, steps: int, warm_up: int = 11) -> dict:
    """Captured against eager: agreement, randomness, time."""
    eager, graphed = Plain(config, data), Captured(config, data)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(warm_up):  # moments exist, libraries are initialised
            eager()
            graphed()
    torch.cuda.synchronize()
    graphed.capture()
    for _ in range(steps):
        eager()
        graphed()
    torch.cuda.synchronize()
    difference = float((eager.weights() - graphed.weights()).abs().max())
    same_fakes = bool(torch.equal(eager.fake, graphed.fake))
    fakes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        graphed.run()
        fakes.append(graphed.fake.clone())
    ratios = []
    for _ in range(5):
        pair = [seconds_for(step, steps, config.device) for step in (eager, graphed)]
        ratios.append(pair[0] / pair[1])
    return {
        "steps": steps,
        "largest_difference_of_a_weight": difference,
        "same_fakes_as_eager": same_fakes,
        "correlation_of_fakes_of_two_seeds": correlation(*fakes),
        "times_as_fast_as_eager": sorted(round(r, 3) for r in ratios),
        "seconds_per_100_epochs": round(100 * len(data) / config.batch_size * pair[1] / steps, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accelerator.json")
    options = parser.parse_args()
    data = periplus.load_data(options.data)
    base = plan(periplus.AdversarialConfig(device=options.device), data).config
    record: dict = {"command": " ".join(["python", *sys.argv]), "commit": commit(), "environment": environment(base.device), "missing": []}
    started = time.time()

    def keep(name: str, found: object) -> None:
        record[name] = found
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{time.time() - started:.0f}s {name}: {json.dumps(found)[:600]}", flush=True)

    keep("repeat", repeat(data, base.device))
    for precision in ("float32", "bfloat16"):
        keep(f"bench_{precision}", bench_train(dataclasses.replace(base, precision=precision), data, (128,), rounds=options.rounds, seconds=0.5))
    keep("stack", stack(data, base.device, options.steps))
    if torch.device(base.device).type == "cuda":
        for precision in ("float32", "bfloat16"):
            config = dataclasses.replace(base, precision=precision)
            keep(f"captured_{precision}", captured(config, hold_out(config, data)[0], options.steps))
    else:
        keep("missing", ["captured: no GPU here", "seconds per 100 epochs on a GPU"])


if __name__ == "__main__":
    main()
