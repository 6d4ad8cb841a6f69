"""The passage between real images: least-cost paths between 1000 pairs of inverted MNIST test images, with what bounds each.

    python benchmarks/paths_inverted.py --folder runs/inverted

Ends: the first 2000 test images, image k with image 1000 + k, each inverted from 4 starts within the ball that holds 99.9 % of the prior (in R^d
codes run off to twice its radius, where the generator was never trained, and a tenth of the paths do not converge; LOG.md). Paths: `minimal_path`
with its defaults, 64 segments, global search, and the Lipschitz constant of the generator by algebra.
Pairs are written as they come, 50 at a time, to --folder/paths.jsonl, and a second call goes on there. Seconds are those of the paths alone.
Writes benchmarks/results/paths_inverted.json: the summary, then every pair.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import periplus
from periplus.files import write_atomically
from periplus.inversion import Effort, invert_dataset
from periplus.machine import environment
from periplus.paths import CONVERGED, certified_lipschitz, minimal_path

RESULTS = Path(__file__).parent / "results"
STEP = 50


def summary(values: list[float]) -> dict[str, float]:
    """Mean with its standard error, median, 5 % and 95 %."""
    found = torch.tensor(values, dtype=torch.float64)
    low, middle, high = found.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {"mean": float(found.mean()), "standard_error": float(found.std() / math.sqrt(len(found))), "median": middle, "q05": low, "q95": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quick/runs/wgan-gp-0"))
    parser.add_argument("--folder", type=Path, default=Path("runs/inverted"))
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run, pairs = periplus.load_run(options.run), options.pairs
    images = periplus.load_data("mnist", split="test").images[: 2 * pairs]
    effort = Effort(first=120, second=100, rounds=1, again=60, finish=40, drop_second=4)
    start = time.perf_counter()

    def told(done: int, total: int) -> None:
        print(f"inverted {done} of {total}, {time.perf_counter() - start:.0f} s", flush=True)

    chosen: dict[str, Any] = {"starts": 4, "domain": "ball", "keep": "best", "effort": effort, "seed": 0}
    found = invert_dataset(run.decode, images, run.config.latent_dim, options.folder / "ball", **chosen, progress=told)
    lipschitz = certified_lipschitz(run.generator, run.decode, run.config.latent_dim)
    lines = options.folder / "paths.jsonl"
    records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    for first in range(len(records), pairs, STEP):
        rows = torch.arange(first, min(first + STEP, pairs))
        start = time.perf_counter()
        path = minimal_path(run.decode, found.z[rows], found.z[rows + pairs], images[rows], images[rows + pairs], lipschitz=lipschitz)
        seconds = (time.perf_counter() - start) / len(rows)
        with open(lines, "a", encoding="utf-8") as file:
            for row, record in zip(rows.tolist(), path.record(), strict=True):
                ends = {"images": [row, row + pairs], "reconstruction_errors": [float(found.error[row]), float(found.error[row + pairs])]}
                records.append(ends | record | {"seconds": seconds})
                file.write(json.dumps(records[-1]) + "\n")
        print(f"{len(records)} pairs, {seconds:.2f} s a pair, {sum(r['converged'] for r in records)} converged", flush=True)
    result = {
        "command": f"python benchmarks/paths_inverted.py --run {options.run} --pairs {pairs} --threads {options.threads}",
        "pairs": pairs,
        "segments": 64,
        "converged": sum(r["converged"] for r in records),
        "converged_means": f"preconditioned relative residual <= {CONVERGED}",
        "lipschitz": lipschitz,
        "seconds_per_pair": summary([r["seconds"] for r in records]),
        "score": {
            "line": summary([r["straight_cost"] / r["floor"] for r in records]),
            "sphere": summary([r["spherical_cost"] / r["floor"] for r in records]),
            "path": summary([r["score"] for r in records]),
        },
        "saving": summary([1 - r["cost"] / r["straight_cost"] for r in records]),
        "gap_floor": summary([r["cost"] / r["floor"] - 1 for r in records]),
        "gap_best_bound": summary([r["gap"] for r in records]),
        "better_bound": sum(r["lower_bound"] > r["floor"] for r in records),
        "several_minima": sum(r["minima"] > 1 for r in records),
        "environment": environment("cpu"),
        "each": [{k: (round(v, 6) if isinstance(v, float) else v) for k, v in r.items()} for r in records],
    }
    print(json.dumps({k: v for k, v in result.items() if k not in ("each", "environment")}, indent=1))
    text = json.dumps({k: v for k, v in result.items() if k != "each"}, indent=1)[:-2]
    rows_text = ",\n".join("  " + json.dumps(r) for r in result["each"])  # type: ignore[attr-defined]
    write_atomically(RESULTS / "paths_inverted.json", f'{text},\n "each": [\n{rows_text}\n ]\n}}\n')


if __name__ == "__main__":
    main()
