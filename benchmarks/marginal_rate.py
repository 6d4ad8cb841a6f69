"""The exact marginal rate of N Gaussian encodings: ours in full against the obvious ways, in one process. Run it on a quiet machine.

    OMP_NUM_THREADS=2 python benchmarks/marginal_rate.py --threads 2

Baselines, both in float32 and both right: *broadcast*, (rows, N, d) differences squared and summed, then a log-sum-exp, 64 rows at a time; and
*tiled product*, one matrix product per tile of 1024 rows by 4096 columns with a streamed log-sum-exp. They are timed on a slice of the rows (--slice,
all N columns) and their times multiplied by N over its length: the work is the same for each row. Ours is timed in full, median of three.

Two cases. *realistic*: locations N(0, 1), scales log-uniform in 0.05 to 1, five eighths of the dimensions inactive. *hard*: scales about 0.001, every
component about one scale away from another, spread over +-30: there products cancel in float32. Accuracy is against float64 differences on 2,000
rows with the same codes. Writes benchmarks/results/marginal_rate.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from periplus.information import marginal_rate
from periplus.machine import commit, environment

RESULTS = Path(__file__).parent / "results"


def realistic(n: int, d: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(n, d, generator=g)
    log_scale = math.log(0.05) * torch.rand(n, d, generator=g)
    idle = 5 * d // 8  # with fewer, nearly every example has its component to itself and the rate is ln N
    mean[:, -idle:] *= 0.01
    log_scale[:, -idle:] = 0
    return mean, log_scale


def hard(n: int, d: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    mean = 60 * torch.rand(n, d, generator=g) - 30
    mean[1::2] = mean[: n - n % 2 : 2] + 1e-3 * torch.randn(n // 2, d, generator=g) / math.sqrt(d)
    return mean, math.log(1e-3) + 0.1 * torch.randn(n, d, generator=g)


CASES = {"realistic": realistic, "hard": hard}


def broadcast(z: Tensor, mean: Tensor, log_scale: Tensor, rows: int = 64) -> Tensor:
    """log of the mixture's density without the constants, (B,): the definition."""
    scale = log_scale.exp()
    constant = log_scale.sum(1)
    return torch.cat([(-0.5 * ((few[:, None] - mean) / scale).square().sum(2) - constant).logsumexp(1) for few in z.split(rows)])


def tiled_product(z: Tensor, mean: Tensor, log_scale: Tensor, rows: int = 1024, columns: int = 4096) -> Tensor:
    """The same by one product per tile and a streamed log-sum-exp."""
    precision = torch.exp(-2 * log_scale)
    weights = torch.cat([-0.5 * precision, mean * precision], 1)
    constant = -0.5 * (mean.square() * precision).sum(1) - log_scale.sum(1)
    found = []
    for few in z.split(rows):
        features = torch.cat([few.square(), few], 1)
        total = torch.full((len(few),), -math.inf)
        for w, c in zip(weights.split(columns), constant.split(columns), strict=True):
            total = torch.logaddexp(total, torch.addmm(c, features, w.T).logsumexp(1))
        found.append(total)
    return torch.cat(found)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def accuracy(mean: Tensor, log_scale: Tensor, per_example: Tensor, rows: int) -> dict[str, float]:
    """Differences of ours from float64 differences on rows spread over the set, with the codes of the same seed."""
    wide, wide_scale = mean.double(), log_scale.double()
    z = wide + wide_scale.exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = torch.arange(0, len(mean), max(1, len(mean) // rows))[:rows]
    own = -0.5 * ((z - wide) / wide_scale.exp()).square().sum(1) - wide_scale.sum(1)
    truth = own[chosen] - broadcast(z[chosen], wide, wide_scale, rows=8) + math.log(len(mean))
    error = per_example[chosen] - truth
    return {"rows": len(chosen), "largest_of_a_row": float(error.abs().max()), "of_the_mean": float(error.mean().abs())}


def measure(case: str, n: int, d: int, part: int, rows: int) -> dict[str, object]:
    mean, log_scale = CASES[case](n, d)
    z = (mean + log_scale.exp() * torch.randn(n, d, generator=torch.Generator().manual_seed(2)))[:part]
    marginal_rate(mean[:2048], log_scale[:2048])
    seconds: dict[str, list[float]] = {"broadcast": [], "tiled product": [], "ours": []}
    for _ in range(3):  # in turn, so that drift of a shared machine meets all of them
        seconds["broadcast"].append(timed(lambda: broadcast(z, mean, log_scale)) * n / part)
        seconds["tiled product"].append(timed(lambda: tiled_product(z, mean, log_scale)) * n / part)
        start = time.perf_counter()
        rate = marginal_rate(mean, log_scale, generator=torch.Generator().manual_seed(1))
        seconds["ours"].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "case": case,
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "extrapolated": ["broadcast", "tiled product"],
        "ratio_to_broadcast": round(median["broadcast"] / median["ours"], 1),
        "ratio_to_tiled_product": round(median["tiled product"] / median["ours"], 1),
        "rate": {"value": rate.value, "standard_error": rate.standard_error, "ln_n": math.log(n)},
        "error_against_float64": accuracy(mean, log_scale, rate.per_example, rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60_000)
    parser.add_argument("--d", type=int, default=16)
    parser.add_argument("--slice", type=int, default=1024, help="rows on which the baselines are timed")
    parser.add_argument("--rows", type=int, default=2000, help="rows on which accuracy is measured")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "n": arguments.n,
        "d": arguments.d,
        "threads": arguments.threads,
        "baseline_rows": arguments.slice,
        "cases": [],
        "commit": commit(),
        "environment": environment("cpu"),
    }
    for name in arguments.cases:
        before = os.getloadavg()[0]
        case = measure(name, arguments.n, arguments.d, arguments.slice, arguments.rows)
        case["load_before_and_after"] = [round(before, 2), round(os.getloadavg()[0], 2)]
        result["cases"].append(case)
        print(json.dumps(case), flush=True)
        (RESULTS / "marginal_rate.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
