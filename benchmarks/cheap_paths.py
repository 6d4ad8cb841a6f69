"""How much cheaper can training make least-cost paths, and what does it cost? Plain runs, the straight-line surrogate and the least-cost objective.

    python benchmarks/cheap_paths.py                  train and judge, cell by cell; what is there already is kept
    python benchmarks/cheap_paths.py --score          then the sample scores, with their noise floors
    python benchmarks/cheap_paths.py --figure FILE    the trade-off of what is there

Each cell is a wgan-gp (mlp) on MNIST: plain, or with --path-objective least or straight at one of the weights. Seeds are outermost, so that what
is there can always be read. A cell is judged by `periplus.path_judge`: pairs of *test* images, codes and paths found anew. Seconds of training are
those of the processor (one thread), for the machine is shared; checkpoints and sample grids included.
Writes benchmarks/results/cheap_paths.json after every cell. Numbers of pairs, seeds and epochs are in it.
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
from periplus import metrics
from periplus.config import AdversarialConfig
from periplus.files import write_atomically
from periplus.locating import images_of
from periplus.machine import environment
from periplus.path_judge import judge_paths

RESULT = Path(__file__).parent / "results" / "cheap_paths.json"
#: What a cell is compared with the plain run of its seed by.
MEASURES = ("excess", "reduction", "frechet", "frechet_ratio", "squared_error_ratio", "precision_on_path", "processor_seconds_ratio")
KEPT = ("excess", "straight_excess", "gap", "end_error", "squared_error", "jump", "converged", "realism", "settings", "step")


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell of the grid: seed outermost, the plain run first, then weight by weight both objectives."""
    found = []
    for seed in range(options.seeds):
        found.append({"seed": seed, "objective": "plain", "weight": 0.0})
        found += [{"seed": seed, "objective": objective, "weight": w} for w in options.weights for objective in ("least", "straight")]
    return found


def folder(cell: dict[str, Any], options: argparse.Namespace) -> Path:
    """Where the run of a cell is."""
    name = f"{cell['objective']}-{cell['weight']:g}-{cell['seed']}" if cell["weight"] else f"plain-{cell['seed']}"
    return options.folder / name


def train_cell(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train a cell unless its run is there; its seconds."""
    out = folder(cell, options)
    kept = out / "seconds.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    path = {} if not cell["weight"] else {"path_weight": cell["weight"], "path_objective": cell["objective"]}
    config = AdversarialConfig(model="wgan-gp", epochs=options.epochs, seed=cell["seed"], snapshots=False, **path)
    clock, processor = time.perf_counter(), time.process_time()
    periplus.train(config, periplus.load_data("mnist"), out, resume=out.exists())
    found = {"processor_seconds": time.process_time() - processor, "wall_seconds": time.perf_counter() - clock}
    write_atomically(kept, json.dumps(found) + "\n")
    return found


def judge_cell(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What the judge says of a cell, and the score of each pair: pairs are the same in all cells, so differences are paired."""
    out = folder(cell, options)
    kept = out / f"judged-{options.pairs}.json"
    if not kept.exists():
        run = periplus.load_run(out)
        record = judge_paths(run, images_of(run), options.pairs)
        found = {name: record[name] for name in KEPT} | {"scores": [pair["score"] for pair in record["pairs"]]}
        write_atomically(kept, json.dumps(found) + "\n")
    judged: dict[str, Any] = json.loads(kept.read_text())
    return judged


def score_cell(cell: dict[str, Any], options: argparse.Namespace, reference: Any) -> None:
    """Score the samples of a trained cell, once: Frechet distance, precision, recall, density and coverage, with what real images get."""
    kept = folder(cell, options) / "scores.json"
    if kept.exists():
        return
    real = reference.features[reference.blocks[0]]
    found = reference.extractor(periplus.load_run(folder(cell, options)).sample(reference.samples))
    distance, support = metrics.frechet_distance(real, found), metrics.precision_recall_density_coverage(real, found)
    told: dict[str, Any] = {"frechet": {"value": distance.value, "low": distance.low, "high": distance.high}}
    told |= {name: {"value": getattr(support, name)} for name in ("precision", "recall", "density", "coverage")}
    for name, record in told.items():
        floors = reference.floors[name]
        record["floor"] = sum(floors) / len(floors)
    write_atomically(kept, json.dumps(told | {"reference": reference.record()}) + "\n")


def gather(options: argparse.Namespace) -> dict[str, Any]:
    """The result file from all cells that are there."""
    rows = []
    for cell in cells(options):
        out = folder(cell, options)
        if (out / "seconds.json").exists() and (out / f"judged-{options.pairs}.json").exists():
            row = cell | train_cell(cell, options) | {"judged": judge_cell(cell, options)}
            if (out / "scores.json").exists():
                row["samples"] = json.loads((out / "scores.json").read_text())
            rows.append(row)
    weights = " ".join(f"{w:g}" for w in options.weights)
    plains = {row["seed"]: row for row in rows if row["objective"] == "plain"}
    comparisons = [compare(row, plains[row["seed"]]) for row in rows if row["seed"] in plains]
    return {
        "command": f"python benchmarks/cheap_paths.py --epochs {options.epochs} --seeds {options.seeds} --pairs {options.pairs} --weights {weights}",
        "epochs": options.epochs,
        "pairs": options.pairs,
        "asked": len(cells(options)),
        "there": len(rows),
        "summary": summarise(comparisons),
        "against_surrogate": against_surrogate(comparisons),
        "comparisons": comparisons,
        "environment": environment("cpu"),
        "cells": rows,
    }


def compare(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """A cell against the plain run of its seed: reduction of the excess with its interval over pairs, and the ratios of everything else."""
    own, base = (torch.tensor(r["judged"]["scores"], dtype=torch.float64) - 1 for r in (row, plain))
    saved = base - own
    error = float(saved.std()) / math.sqrt(len(saved))
    mean = float(base.mean())
    told = {name: row[name] for name in ("seed", "objective", "weight")} | {
        "excess": float(own.mean()),
        "reduction": float(saved.mean()) / mean,
        "reduction_interval": [(float(saved.mean()) + side * 1.96 * error) / mean for side in (-1, 1)],
        "squared_error_ratio": row["judged"]["squared_error"]["mean"] / plain["judged"]["squared_error"]["mean"],
        "precision_on_path": row["judged"]["realism"]["path"]["precision"],
        "precision_on_path_plain": plain["judged"]["realism"]["path"]["precision"],
        "processor_seconds_ratio": row["processor_seconds"] / plain["processor_seconds"],
    }
    if "samples" in row and "samples" in plain:
        found, floor = row["samples"]["frechet"], row["samples"]["frechet"].get("floor")
        told |= {"frechet": found["value"], "frechet_floor": floor, "frechet_ratio": found["value"] / plain["samples"]["frechet"]["value"]}
    return told


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and Student's 95 % interval over seeds; the interval of one seed is None."""
    low, high = metrics.mean_interval(values)
    return {"mean": sum(values) / len(values), "interval": [low, high] if math.isfinite(low) else None, "seeds": len(values)}


def summarise(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every objective and weight over its seeds."""
    kinds = dict.fromkeys((row["objective"], row["weight"]) for row in comparisons)
    found = []
    for objective, weight in kinds:
        own = [row for row in comparisons if (row["objective"], row["weight"]) == (objective, weight)]
        named = {name: [row[name] for row in own if name in row] for name in MEASURES}
        found.append({"objective": objective, "weight": weight} | {name: over_seeds(values) for name, values in named.items() if values})
    return found


def against_surrogate(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The least-cost objective less the surrogate of the same weight and seed: positive reductions mean that its excess is smaller."""
    by_cell = {(row["objective"], row["weight"], row["seed"]): row for row in comparisons}
    weights = sorted({row["weight"] for row in comparisons if row["objective"] == "least"})
    found = []
    for weight in weights:
        pairs = [(by_cell["least", weight, row["seed"]], row) for row in comparisons if (row["objective"], row["weight"]) == ("straight", weight)
                 and ("least", weight, row["seed"]) in by_cell]  # fmt: skip
        named = {name: [a[name] - b[name] for a, b in pairs if name in a and name in b] for name in MEASURES}
        found.append({"weight": weight} | {name: over_seeds(values) for name, values in named.items() if values})
    return found


def figure(result: dict[str, Any], path: Path) -> None:
    """The trade-off: reduction of the excess against the Frechet distance and the reconstruction error, over those of the plain run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 3, figsize=(11, 3.6), constrained_layout=True)
    panels = (
        ("frechet_ratio", "Fréchet distance / plain"),
        ("squared_error_ratio", "squared error of inversion / plain"),
        ("precision_on_path", "precision of images on the path"),
    )
    looks = {
        "least": ("least-cost objective", "#0072B2", "o"),
        "straight": ("straight-line surrogate", "#D55E00", "s"),
        "plain": ("plain", "#444444", "D"),
    }
    for axis, (key, label) in zip(axes, panels, strict=True):
        for objective, (name, colour, mark) in looks.items():
            each = [row for row in result["comparisons"] if row["objective"] == objective and key in row]
            means = [row for row in result["summary"] if row["objective"] == objective and key in row]
            axis.plot([row["reduction"] for row in each], [row[key] for row in each], mark, color=colour, markersize=3, alpha=0.45, linestyle="none")
            means.sort(key=lambda row: row["weight"])
            x, y = ([row[m]["mean"] for row in means] for m in ("reduction", key))
            axis.plot(x, y, marker=mark, color=colour, markersize=7, markerfacecolor="white", linewidth=1, label=name)
            for row in means:
                if row["weight"]:
                    at = (row["reduction"]["mean"], row[key]["mean"])
                    side = {"xytext": (-7, 5), "ha": "right"} if objective == "least" else {"xytext": (7, -9), "ha": "left"}
                    axis.annotate(f"λ = {row['weight']:g}", at, textcoords="offset points", fontsize=7, color=colour, **side)
        axis.axvline(0.3, color="grey", lw=0.8, ls=":")
        axis.set_xlabel("reduction of the excess of Ũ")
        axis.set_ylabel(label)
        axis.margins(x=0.1, y=0.12)
    axes[0].legend(fontsize=7, loc="lower right")
    cells_there = f"{result['there']} of {result['asked']} trainings"
    drawn.suptitle(
        f"MNIST, {result['epochs']} epochs, {result['pairs']} held-out pairs, {cells_there}; small: one seed; large: means; dotted: the aim",
        fontsize=9,
    )
    drawn.supxlabel(f"{result['command']} --figure {path.name}", fontsize=6)
    drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/cheap-paths"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--weights", type=float, nargs="+", default=[5.0, 2.0, 0.5])
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.figure:
        figure(json.loads(RESULT.read_text()), options.figure)
        return
    if options.score:
        from periplus.scoring import reference as real

        reference = real(periplus.load_data("mnist"), note=print)
        for cell in cells(options):
            if (folder(cell, options) / "seconds.json").exists():
                score_cell(cell, options, reference)
                write_atomically(RESULT, json.dumps(gather(options), indent=1) + "\n")
        return
    for cell in cells(options):
        seconds, judged = train_cell(cell, options), judge_cell(cell, options)
        said = f"excess {judged['excess']['mean']:.3f}, ends {judged['end_error']['mean']:.3f}, {seconds['processor_seconds']:.0f} s"
        print(f"{folder(cell, options).name}: {said}", flush=True)
        write_atomically(RESULT, json.dumps(gather(options), indent=1) + "\n")


if __name__ == "__main__":
    main()
