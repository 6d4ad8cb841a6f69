"""Minimal-cost paths, paired against stochman 0.3.0's own geodesic optimiser: same cost, pairs and cores. Run it on a quiet machine.

    periplus train wgan-gp --data mnist --latent-dim 64 --epochs 10 --out runs/wgan-d64
    python benchmarks/paths_stochman.py --run runs/wgan-d64 --stochman-python /path/to/venv/bin/python

64 pairs of codes drawn from the prior, exact ends. stochman: a manifold whose metric is c(z)^2 times the identity, so that its curve energy is the
energy of the path, and `connecting_geodesic` with its defaults (cubic spline of 5 nodes, 20 points, at most 150 Adam steps), all pairs as one batch.
Ours: `minimal_path` with few segments and a loose residual (FAST), and with its defaults (64 segments, global search, to a residual of 1e-3); its
time holds all that it returns: U of path, straight line and spherical arc by quadrature, and bounds. Each in a process of its own, in turn, both
with the same threads; the first round warms up and is left out. U of all results is measured by one quadrature, ours.

stochman lives in an environment of its own (its requirements are old); a `.pth` file there that names our site-packages gives both the same torch:

    python -m venv /tmp/stochman && /tmp/stochman/bin/pip install --no-deps stochman==0.3.0
    python -c "import site; print(site.getsitepackages()[0])" > /tmp/stochman/lib/python3.11/site-packages/ours.pth

Writes benchmarks/results/paths_stochman.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import periplus
from periplus import load_run, minimal_path
from periplus.machine import environment
from periplus.paths.costs import ImageCost
from periplus.paths.measuring import measure
from periplus.runs import codes

RESULTS = Path(__file__).parent / "results"
FAST: dict[str, Any] = {"segments": 12, "everywhere": False, "tolerance": 9e-2}
FINE = 256


def problem(run_path: str, pairs: int) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """The decoder, codes of both ends and their images."""
    run = load_run(run_path)
    z = codes(0, "paths", 2 * pairs, run.config.latent_dim)
    x = run.decode(z).detach()
    return run.decode, z[:pairs], z[pairs:], x[:pairs], x[pairs:]


def measured(points: Tensor, arguments: tuple[Any, Tensor, Tensor, Tensor, Tensor]) -> list[float]:
    """U~ of polylines (P, N+1, d)."""
    decode, z_a, z_b, x_a, x_b = arguments
    value, _ = measure(points.double(), ImageCost(decode, x_a, x_b), torch.arange(len(points)), 2)
    return (2 * value / (z_a - z_b).double().norm(dim=1)).tolist()


def solve_ours(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[float, Tensor, dict[str, Any]]:
    start = time.perf_counter()
    path = minimal_path(*arguments, **options)
    seconds = time.perf_counter() - start
    return seconds, path.points, {"converged": int(path.converged.sum())}


def solve_stochman(arguments: tuple[Any, ...]) -> tuple[float, Tensor, dict[str, Any]]:
    from stochman.manifold import Manifold

    decode, z_a, z_b, x_a, x_b = arguments
    middle, squared = ((x_a + x_b) / 2).flatten(1), (x_a - x_b).flatten(1).square().sum(1)

    class Passage(Manifold):
        def metric(self, points: Tensor) -> Tensor:
            pair = torch.arange(len(middle)).repeat_interleave(len(points) // len(middle))
            c = 2 * (decode(points).flatten(1) - middle[pair]).square().sum(1) + squared[pair] / 2
            return (c / squared[pair]).square()[:, None].expand_as(points)

    start = time.perf_counter()
    curve, success = Passage().connecting_geodesic(z_a, z_b)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        points = curve(torch.linspace(0, 1, FINE + 1)).detach()
    return seconds, points, {"success": bool(success)}


def worker(kind: str, run: str, pairs: int, threads: int, rounds: int) -> None:
    """One solver, a solution for each line on stdin."""
    torch.set_num_threads(threads)
    arguments = problem(run, pairs)
    for _ in range(rounds):
        sys.stdin.readline()
        options = FAST if kind == "ours, fast" else {}
        seconds, points, more = solve_stochman(arguments) if kind == "stochman" else solve_ours(arguments, options)
        record = {"seconds": seconds, "pairs_per_second": pairs / seconds, "scores": measured(points, arguments), **more}
        print("record " + json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/wgan-d64")
    parser.add_argument("--stochman-python", default=sys.executable)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--worker")
    parser.add_argument("--out", type=Path, default=RESULTS / "paths_stochman.json")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.run, options.pairs, options.threads, options.rounds)
        return
    shared = ["--run", options.run, "--pairs", str(options.pairs), "--threads", str(options.threads), "--rounds", str(options.rounds)]
    kinds = ("ours, fast", "stochman", "ours, default")
    workers = {
        kind: subprocess.Popen(
            [options.stochman_python if kind == "stochman" else sys.executable, __file__, "--worker", kind, *shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(periplus.__file__).parent.parent)},
        )
        for kind in kinds
    }
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for kind, process in workers.items():
            assert process.stdin and process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            line = next(line for line in process.stdout if line.startswith("record "))
            rounds[kind].append(json.loads(line.removeprefix("record ")))
            print(f"round {number} {kind}: {rounds[kind][-1]['pairs_per_second']:.2f} pairs/s, U~ {statistics.mean(rounds[kind][-1]['scores']):.4f}")
    timed = {kind: records[1:] or records for kind, records in rounds.items()}
    ratios = {
        kind: [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(timed[kind], timed["stochman"], strict=True)]
        for kind in ("ours, fast", "ours, default")
    }
    arguments = problem(options.run, options.pairs)
    line = minimal_path(*arguments, segments=1, everywhere=False).score.tolist()
    difference = [a - b for a, b in zip(rounds["ours, fast"][0]["scores"], rounds["stochman"][0]["scores"], strict=True)]
    run = load_run(options.run)
    record = {
        "command": "python benchmarks/paths_stochman.py --run RUN --stochman-python PYTHON",
        "what": "64 pairs of prior codes of a trained wgan-gp on MNIST; U~ = 2 U / (Dist^2 l); ratio = seconds of stochman / ours, round by round",
        "model": {"latent_dim": run.config.latent_dim, "epochs": run.config.epochs, "seed": run.config.seed, "data": run.data.source},
        "threads": options.threads,
        "fast": FAST,
        "straight_line": statistics.mean(line),
        "solvers": {
            kind: {
                "pairs_per_second": [r["pairs_per_second"] for r in records],
                "mean_score": statistics.mean(records[0]["scores"]),
                **{k: v for k, v in records[0].items() if k in ("converged", "success")},
            }
            for kind, records in timed.items()
        },
        "ratio": {k: {"median": statistics.median(v), "lowest": min(v), "highest": max(v)} for k, v in ratios.items()},
        "fast_minus_stochman": {"mean": statistics.mean(difference), "pairs_lower": sum(d < 0 for d in difference), "pairs": len(difference)},
        "environment": environment("cpu"),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: record[k] for k in ("straight_line", "solvers", "ratio", "fast_minus_stochman")}, indent=1))
    for process in workers.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()


if __name__ == "__main__":
    main()
