"""Inversion of a trained generator: planted codes, test images against Adam, and a whole test set.

    PERIPLUS_DATA=/folder/with/mnist python benchmarks/inversion.py planted --run runs/quick/runs/wgan-gp-0
    ... python benchmarks/inversion.py images  --run runs/quick/runs/wgan-gp-0
    ... python benchmarks/inversion.py dataset --run runs/quick/runs/wgan-gp-0 --folder /tmp/codes [--count 300]

planted   images of `--count` prior codes are inverted with 16 starts (keep="best"): the share whose best error is below 1e-6, Wilson interval.
images    the first `--count` test images, 16 starts, 20 images at a time, in turn in this process: keep="best" with little effort (QUICK), Adam with
          1000 steps (learning rates 0.03 and 0.1, the better one counts; the same starts, one batch, the same domain), and all starts to the end.
          Ratios of seconds turn by turn, best errors, kinds of endpoints, distinct minima. Certified endpoints of 20 images are then searched
          further in float64, by another method than the one that certified them: how far does f still fall?
dataset   `--count` test images x 4 starts, keep="best", written to `--folder` as it goes; start it again after a kill and it goes on. The rate.

Each writes benchmarks/results/inversion_PART.json.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import periplus
from periplus.files import write_atomically
from periplus.inversion import Effort, Inversion, Kind, descent, invert
from periplus.inversion.dataset import invert_dataset
from periplus.inversion.domains import make_domain
from periplus.inversion.objective import Objective
from periplus.inversion.solution import join
from periplus.inversion.starts import Pool
from periplus.machine import environment

RESULTS = Path(__file__).parent / "results"
SOLVED = 1e-6
ADAM_STEPS, ADAM_RATES = 1000, (0.03, 0.1)
STARTS = 16
#: Images of one turn of the comparison with Adam; images whose certified endpoints are searched further in float64.
TURN, CHECKED = 20, 20
#: For speed: the starts that lag behind are dropped, and what is left is not polished until it is certified.
QUICK = Effort(first=120, second=120, rounds=1, again=100, finish=20)


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    share, spread = hits / of, z * math.sqrt(hits / of * (1 - hits / of) / of + z * z / (4 * of * of))
    return tuple((share + z * z / (2 * of) + sign * spread) / (1 + z * z / of) for sign in (-1, 1))


def planted(run: periplus.Run, options: argparse.Namespace) -> dict[str, Any]:
    codes = run.sample_codes(options.count, seed=options.seed + 1)
    with torch.no_grad():
        images = run.decode(codes)
    start = time.perf_counter()
    found = invert(run.decode, images, run.config.latent_dim, starts=STARTS, keep="best", seed=options.seed)
    seconds = time.perf_counter() - start
    hits = int((found.error < SOLVED).sum())
    recovered = int(((found.z - codes).norm(dim=1) < 1e-2).sum())
    return {
        "targets": options.count,
        "starts": STARTS,
        "solved": hits,
        "share": hits / options.count,
        "wilson_95": wilson(hits, options.count),
        "code_recovered": recovered,
        "error_quantiles": quantiles(found.error),
        "seconds": round(seconds, 1),
    }


def adam(objective: Objective, z: Tensor, image: Tensor, rate: float) -> Tensor:
    """Errors (n,) after plain Adam, all rows in one batch, no work but the gradients."""
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for step in range(1, ADAM_STEPS + 1):
        _, g = objective.value_and_gradient(z, image)
        mean.mul_(0.9).add_(g, alpha=0.1)
        square.mul_(0.999).addcmul_(g, g, value=0.001)
        z = z - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return objective.value(z, image)


def images(run: periplus.Run, options: argparse.Namespace) -> dict[str, Any]:
    data = periplus.load_data("mnist", split="test").images[: options.count]
    targets, d = data.float() / 255, run.config.latent_dim
    rounds: list[dict[str, float]] = []
    found: dict[str, list[Any]] = {"quick": [], "all": [], **{f"adam {rate}": [] for rate in ADAM_RATES}}
    for first in range(0, len(targets), TURN):
        some = targets[first : first + TURN]
        objective = Objective(run.decode, some.flatten(1), d, make_domain("free", d, None, None))
        begin = Pool(objective, options.seed).starts(objective.targets, first, STARTS, Effort().screening)
        image = torch.arange(len(some)).repeat_interleave(STARTS)
        chosen: dict[str, Any] = {"starts": STARTS, "initial": begin, "seed": options.seed}
        solvers: dict[str, Any] = {
            "quick": lambda some=some, chosen=chosen: invert(run.decode, some, d, keep="best", effort=QUICK, **chosen),
            **{
                f"adam {rate}": lambda rate=rate, o=objective, b=begin, i=image: adam(o, b.reshape(-1, d), i, rate).view(-1, STARTS)
                for rate in ADAM_RATES
            },
            "all": lambda some=some, chosen=chosen: invert(run.decode, some, d, **chosen),
        }
        seconds = {}
        for name, solve in solvers.items():
            start = time.perf_counter()
            found[name].append(solve())
            seconds[name] = time.perf_counter() - start
        rounds.append(seconds)
        print(first, {k: round(v, 1) for k, v in seconds.items()}, flush=True)
    quick, full = join(found["quick"]), join(found["all"])
    adams = {name: torch.cat(found[name]) for name in found if name.startswith("adam")}
    better = min(adams, key=lambda name: float(adams[name].amin(1).mean()))
    difference = quick.error - adams[better].amin(1)
    return {
        "images": len(targets),
        "starts": STARTS,
        "domain": "free",
        "adam": {name: errors(value.amin(1), value) for name, value in adams.items()},
        "better_adam": better,
        "quick": {"effort": vars(QUICK), "keep": "best", **errors(quick.error, quick.all_error)},
        "quick_minus_adam": {"mean": float(difference.mean()), "standard_error": float(difference.std() / math.sqrt(len(difference)))},
        "quick_time_over_adam": spread([turn["quick"] / turn[better] for turn in rounds]),
        "all_time_over_adam": spread([turn["all"] / turn[better] for turn in rounds]),
        "seconds": rounds,
        "all": {**errors(full.error, full.all_error), **certificates(full)},
        "all_from_image_20": certificates(join(found["all"][1:])) if len(found["all"]) > 1 else None,
        "float64_check": fall_in_float64(run, targets, full),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": sorted(values)[len(values) // 2], "lowest": min(values), "highest": max(values), "rounds": len(values)}


def fall_in_float64(run: periplus.Run, targets: Tensor, found: Inversion) -> dict[str, Any]:
    """Certified endpoints of some images, searched on by BFGS in float64 with steps from 1e-3 on: by what part of itself f still falls."""
    module = copy.deepcopy(run.generator).double()
    d = run.config.latent_dim
    images = torch.arange(0, len(targets), max(1, len(targets) // CHECKED))[:CHECKED]
    objective = Objective(module, targets[images].double().flatten(1), d, make_domain("free", d, None, None))
    kept = found.converged[images]
    image = torch.arange(len(images)).repeat_interleave(kept.sum(1))
    z = found.all_z[images][kept].double()
    rows = descent.start_rows(objective.value_and_gradient, z, image)
    before = rows.f.clone()
    rows.inverse *= 1e-3
    descent.descend(objective.value_and_gradient, rows, image, 400, objective.floor(), math.inf, fresh=False)
    fall, moved = (before - rows.f) / before, (rows.y - z).norm(dim=1)
    return {"images": len(images), "endpoints": len(z), "evaluations": 400, "relative_fall": quantiles(fall), "moved": quantiles(moved)}


def errors(best: Tensor, every: Tensor) -> dict[str, float]:
    return {"mean_best_error": float(best.mean()), "mean_error": float(every.mean()), "median_best_error": float(best.median())}


def certificates(found: Inversion) -> dict[str, Any]:
    total = found.kind.numel()
    kinds = {kind.name.lower(): found.count(kind) for kind in Kind}
    certified = int(found.converged.sum())
    distinct = collections.Counter(len(found.minima(k)) for k in range(len(found)))
    return {
        "endpoints": total,
        "kinds": kinds,
        "certified_share": certified / total,
        "certified_wilson_95": wilson(certified, total),
        "flat_share": kinds["flat"] / total,
        "best_is_certified": float(found.converged[torch.arange(len(found)), found.best].double().mean()),
        "distinct_minima_per_image": dict(sorted(distinct.items())),
        "distinct_images_per_image": dict(sorted(collections.Counter((found.image_cluster.amax(1) + 1).tolist()).items())),
        "relative_slope_quantiles": quantiles(found.relative_slope[found.converged]),
        "eigenvalue_ratio_quantiles": quantiles(found.eigenvalue_ratio[found.converged]),
        "kink_codimension_quantiles": quantiles(found.kink_codimension[found.converged]),
        "thresholds": found.to_dict()["thresholds"],
    }


def quantiles(values: Tensor) -> dict[str, float]:
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    if not values.numel():
        return {}
    found = values.double().flatten().quantile(torch.tensor(levels).double())
    return {str(level): float(value) for level, value in zip(levels, found, strict=True)}


def dataset(run: periplus.Run, options: argparse.Namespace) -> dict[str, Any]:
    data = periplus.load_data("mnist", split="test").images[: options.count]
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        print(f"{done} of {total}, {time.perf_counter() - start:.0f} s", flush=True)

    effort = Effort(first=120, second=100, rounds=1, again=60, finish=40, drop_second=4)
    chosen = {"starts": 4, "keep": "best", "effort": effort, "seed": options.seed}
    found = invert_dataset(run.decode, data, run.config.latent_dim, options.folder, **chosen, progress=progress)
    seconds = time.perf_counter() - start
    return {
        "images": len(data),
        "starts": 4,
        "seconds_of_this_call": round(seconds, 1),
        "images_per_second": round(len(data) / seconds, 2),
        "minutes_for_10000": round(10_000 / len(data) * seconds / 60, 1),
        "mean_best_error": float(found.error.mean()),
        "kinds_of_kept": {kind.name.lower(): found.count(kind) for kind in Kind},
        "best_is_certified": float(found.converged[torch.arange(len(found)), found.best].double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("planted", "images", "dataset"))
    parser.add_argument("--run", type=Path, default=Path("runs/quick/runs/wgan-gp-0"))
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    options.count = options.count or {"planted": 200, "images": 100, "dataset": 10_000}[options.part]
    torch.set_num_threads(options.threads)
    work = {"planted": planted, "images": images, "dataset": dataset}[options.part]
    result = work(periplus.load_run(options.run), options)
    record = {"command": " ".join(["python", *sys.argv]), "seed": options.seed, **result, "environment": environment("cpu")}
    print(json.dumps({key: value for key, value in record.items() if key != "environment"}, indent=2))
    write_atomically(RESULTS / f"inversion_{options.part}.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
