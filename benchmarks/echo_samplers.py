"""The echo samplers held against each other: accuracy, time and memory. Run it on a quiet machine (about a minute and a half).

    python benchmarks/echo_samplers.py [--threads 1] [--out FILE]

Accuracy: E z and E z^2 of laws with closed forms, x ~ U(-1, 1), over independent batches (rows of one batch depend on each other; of a chain, the
batch after 1100 rows), as relative bias and in standard errors. Time: one forward and backward pass at d = 32, median over repeats taken in turn,
ring and chain against the series of K = 100 terms in the same process. Memory: the most that torch (torch.profiler's allocations and releases) and
numpy (tracemalloc; the scan uses it on the CPU) had allocated over what the inputs take. Writes benchmarks/results/echo_samplers.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from periplus.channels import EchoChannel, echo_moments
from periplus.machine import commit, environment

RESULTS = Path(__file__).parent / "results"
TERMS = 100
SAMPLERS = ("ring", "chain", "series")
LAWS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "m = x, s = 0.5 + 0.3x": lambda x: (x, 0.5 + 0.3 * x),
    "m = 1 + x, s = 0.6 - 0.3x": lambda x: (1 + x, 0.6 - 0.3 * x),
    "m = x, s = 0.985 (guard trips below B = 1055)": lambda x: (x, torch.full_like(x, 0.985)),
}


def accuracy(sampler: str, law: str, batch: int, batches: int, seed: int = 0) -> dict[str, Any]:
    """Moments over independent batches (of a chain, the batch after 1100 rows) against the closed form."""
    encode = LAWS[law]
    fine = torch.linspace(-1, 1, 200001, dtype=torch.float64)[:, None]
    truths = [v.item() for v in echo_moments(*encode(fine))]
    g = torch.Generator().manual_seed(seed)
    channel = EchoChannel(clip=0.99, sampler=sampler, terms=min(batch, TERMS) if sampler == "series" else None)

    def inputs() -> tuple[Tensor, Tensor]:
        m, s = encode(2 * torch.rand(batches, batch, 1, generator=g) - 1)
        return m, s.log()

    z, state = channel.advance(*inputs(), None, g)
    if sampler == "chain":
        for _ in range(math.ceil(1100 / batch)):  # until nothing of the ring that began it is left, at the slowest law
            z, state = channel.advance(*inputs(), state, g)
    out: dict[str, Any] = {"sampler": sampler, "law": law, "batch": batch, "independent_batches": batches}
    for name, values, truth in zip(("mean", "second_moment"), (z, z.square()), truths, strict=True):
        per_batch = values.double().flatten(1).mean(1)
        error = (per_batch.std() / math.sqrt(batches)).item()
        found = per_batch.mean().item()
        out[name] = {"found": found, "truth": truth, "standard_error": error, "errors_off": (found - truth) / error}
    out["relative_bias_of_second_moment"] = out["second_moment"]["found"] / truths[1] - 1
    return out


def pass_of(sampler: str, batch: int, d: int = 32) -> Callable[[], None]:
    """One forward and backward pass; scales in (0.05, 0.9), where the guard holds; the chain is made to start from its state."""
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(batch, d, generator=g).requires_grad_()
    log_scale = (0.05 + 0.85 * torch.rand(batch, d, generator=g)).log().requires_grad_()
    channel, state = EchoChannel(sampler=sampler, terms=TERMS), torch.zeros(d)

    def run() -> None:
        z = channel.advance(mean, log_scale, state, g)[0] if sampler == "chain" else channel.sample(mean, log_scale, g)
        z.sum().backward()
        mean.grad = log_scale.grad = None

    return run


def seconds(runs: dict[str, Callable[[], None]], repeats: dict[str, int]) -> dict[str, list[float]]:
    """Times of every pass, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(5):
        for name, run in runs.items():
            for _ in range(repeats[name]):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return times


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that one pass held at one moment: torch's own allocations, and numpy's (each at its own peak: an upper bound of the sum)."""
    run()
    tracemalloc.start()
    run()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + numpy_peak


def compare_samplers(batches: Sequence[int] = (100, 1024, 4096), d: int = 32) -> list[dict[str, Any]]:
    """Time and memory of ring, chain and series (K = 100), forward and backward, with the ratios to the series of the same size."""
    rows = []
    for batch in batches:
        runs = {name: pass_of(name, batch, d) for name in SAMPLERS}
        times = seconds(runs, {"ring": 8, "chain": 8, "series": 1 if batch > 1000 else 4})
        memory = {name: peak_bytes(run) for name, run in runs.items()}
        for name in SAMPLERS:
            median = statistics.median(times[name])
            rows.append(
                {
                    "sampler": name,
                    "batch": batch,
                    "d": d,
                    "milliseconds": 1e3 * median,
                    "lowest": 1e3 * min(times[name]),
                    "highest": 1e3 * max(times[name]),
                    "peak_megabytes": memory[name] / 1e6,
                    "times_faster_than_series": statistics.median(times["series"]) / median,
                    "times_less_memory_than_series": memory["series"] / memory[name],
                }
            )
    return rows


def compare_accuracy() -> list[dict[str, Any]]:
    """Every law and sampler at several batch sizes, as many batches as a few seconds allow; small batches show what the ring costs."""
    rows = []
    for law in LAWS:
        for batch, batches in ((4, 3000), (16, 2000), (100, 1000), (1024, 60)):
            for sampler in SAMPLERS:
                rows.append(accuracy(sampler, law, batch, batches // 8 if sampler == "series" and batch > 50 else batches))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "echo_samplers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "threads": arguments.threads,
        "terms": TERMS,
        "cost": compare_samplers(),
        "accuracy": compare_accuracy(),
        "commit": commit(),
        "environment": environment("cpu"),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["cost"]:
        print("B {batch:>4} {sampler:>6}: {milliseconds:9.2f} ms ({lowest:.2f} to {highest:.2f}) {peak_megabytes:9.2f} MB, ".format(**row), end="")
        print("{times_faster_than_series:.0f}x faster, {times_less_memory_than_series:.0f}x less memory than the series".format(**row))
    for row in result["accuracy"]:
        second = row["second_moment"]
        print(f"{row['law'][:26]:>26} B {row['batch']:>4} {row['sampler']:>6}: E z^2 = {second['found']:.4f} ({second['truth']:.4f}), ", end="")
        print(f"{row['relative_bias_of_second_moment']:+.2%} +- {second['standard_error'] / second['truth']:.2%}")


if __name__ == "__main__":
    main()
