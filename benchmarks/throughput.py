"""Images per second of a training step, by batch size. Run it on a quiet machine.

    python benchmarks/throughput.py --model wgan-gp --data mnist --batch-sizes 64 128 512

Each figure is the median over laps of 25 steps after a warm-up, in one process with the machine's threads (--threads). The same process measures
the machine's float32 matrix product, 2048 x 2048 x 2048, to hold it against. Batch sizes are taken in turn, three rounds, so that drift of a shared
machine shows as spread rather than as a difference. Writes benchmarks/results/throughput_MODEL_DATA.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import periplus
from periplus.machine import commit, environment

RESULTS = Path(__file__).parent / "results"
LAP = 25


def matrix_rate(size: int = 2048, repeats: int = 10) -> float:
    """GFLOP/s of the best of so many float32 products."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(_timed(lambda: a @ b) for _ in range(repeats))
    return 2 * size**3 / best / 1e9


def _timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def images_per_second(model: str, data: periplus.ImageData, batch_size: int, laps: int) -> list[float]:
    config = periplus.AdversarialConfig(
        model, batch_size=batch_size, max_steps=LAP * (laps + 1), log_every=LAP, checkpoint_every=10**9, sample_every=10**9
    )
    with tempfile.TemporaryDirectory() as folder:
        run = periplus.train(config, data, Path(folder) / "run")
        return [line["images_per_second"] for line in run.timing[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wgan-gp")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--laps", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = periplus.load_data(arguments.data)
    rates: dict[int, list[float]] = {size: [] for size in arguments.batch_sizes}
    products = []
    for _ in range(3):
        products.append(matrix_rate())
        for size in arguments.batch_sizes:
            rates[size] += images_per_second(arguments.model, data, size, arguments.laps)
    rows = [
        {"batch_size": size, "median": round(statistics.median(values)), "lowest": round(min(values)), "highest": round(max(values))}
        for size, values in rates.items()
    ]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "model": arguments.model,
        "threads": arguments.threads,
        "images_per_second": rows,
        "float32_matrix_gflops": [round(p, 1) for p in products],
        "commit": commit(),
        "environment": environment("cpu"),
    }
    (RESULTS / f"throughput_{arguments.model}_{arguments.data}.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"batch {row['batch_size']:>4}: {row['median']:>6} images/s ({row['lowest']} to {row['highest']})")
    print(f"float32 product: {', '.join(f'{p:.0f}' for p in products)} GFLOP/s")


if __name__ == "__main__":
    main()
