"""gan, wgan-gp and rpgan at equal epochs and at equal seconds: quality on the way, from the snapshots of runs made with defaults.

    python benchmarks/defaults.py --models gan wgan-gp rpgan --seeds 0 1 2 --out runs/judged --name judged_defaults --workers 1
    python benchmarks/judged.py --runs runs/judged --rounds 5 --out runs/judged-compared

Seconds are steps times the time of a step, measured here in turn for all models (one thread, median over rounds): the trainings shared their
machine with other work. Writes benchmarks/results/judged_curves.json and benchmarks/results/judged_curves/compare-quality.svg.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

import periplus
from periplus.comparing import compare, group_runs
from periplus.evaluation import data_of
from periplus.machine import environment
from periplus.runs import Run, build_networks, load_run
from periplus.scoring import reference
from periplus.study.comparison import comparison_conclusion, draw_comparison
from periplus.training.adversarial import new_state, train_step
from periplus.training.steps import Batches

RESULTS = Path(__file__).parent / "results"
STEPS = 40


def step_seconds(run: Run, data: periplus.ImageData) -> float:
    """Seconds of a step of a run's configuration, over STEPS of them."""
    config = run.config
    state = new_state(config, build_networks(config, data.shape), config.device)
    batches = Batches(data.images, config.batch_size, config.seed)
    healthy = torch.ones((), dtype=torch.bool)
    for _ in range(3):
        healthy = train_step(state, config, batches, healthy)
    began = time.perf_counter()
    for _ in range(STEPS):
        healthy = train_step(state, config, batches, healthy)
    return (time.perf_counter() - began) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/judged"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/judged-compared"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    finished = [run for run in map(load_run, sorted(options.runs.iterdir())) if run.metrics and run.kept and run.metrics[-1]["epoch"] > 19.9]
    order = {"gan": 0, "wgan-gp": 1, "rpgan": 2}
    runs = sorted(finished, key=lambda run: (order[run.config.model], run.config.seed))
    data = data_of(runs[0])
    groups = group_runs(runs)
    times: dict[str, list[float]] = {label: [] for label in groups}
    for _ in range(options.rounds):
        for label, members in groups.items():
            times[label].append(step_seconds(members[0], data))
    pace = {label: statistics.median(of) for label, of in times.items()}
    result = compare(runs, reference(data, note=lambda line: print(line, file=sys.stderr)), pace=pace, note=lambda line: print(line, file=sys.stderr))
    result |= {"command": " ".join(["python", *sys.argv]), "environment": environment("cpu"), "seconds_of_a_step": times}
    figures = draw_comparison(result, groups, data, options.out, "compare")
    (RESULTS / "judged_curves").mkdir(exist_ok=True)
    shutil.copy(options.out / figures["quality"], RESULTS / "judged_curves" / "compare-quality.svg")
    (RESULTS / "judged_curves.json").write_text(json.dumps(result, indent=1) + "\n")
    print(comparison_conclusion(result))


if __name__ == "__main__":
    main()
