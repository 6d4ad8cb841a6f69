"""How much cheaper can training make least-cost paths, and what does it cost? Plain runs, the straight-line surrogate and the least-cost objective.

    python benchmarks/cheap_paths.py                  train and judge, cell by cell; what is there already is kept
    python benchmarks/cheap_paths.py --score          then the sample scores, with their noise floors
    python benchmarks/cheap_paths.py --overhead       steps with the term, without it and with the surrogate, timed in turn
    python benchmarks/cheap_paths.py --again          what is concluded from the cells of the file, without any run
    python benchmarks/cheap_paths.py --table          the tables of docs/results.md
    python benchmarks/cheap_paths.py --figure FILE    the trade-off of what is there

Each cell is a wgan-gp (mlp) on MNIST: plain, or with --path-objective least or straight at one of the weights. Seeds are outermost, so that what
is there can always be read. A cell is judged by `periplus.path_judge`: pairs of *test* images, codes and paths found anew. Seconds of training are
those of the processor (one thread), for the machine is shared; checkpoints and sample grids included. --overhead leaves these out, and takes turns.
Writes benchmarks/results/cheap_paths.json after every cell. Numbers of pairs, seeds and epochs are in it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
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
MEASURES = (
    *("excess", "reduction", "line_excess", "end_error", "squared_error_ratio", "precision_on_path", "precision_on_line"),
    *("frechet", "frechet_ratio", "coverage", "recall", "processor_seconds_ratio"),
)
#: What was asked for: a reduction of the excess, and what samples and reconstruction may lose for it.
AIM, LOSS = 0.3, 0.05
#: Steps of a block, blocks of each contender.
BLOCK, ROUNDS = 24, 5
OBJECTIVES = {"plain": "plain", "least": "least cost", "straight": "straight line"}
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
    return {
        "command": f"python benchmarks/cheap_paths.py --epochs {options.epochs} --seeds {options.seeds} --pairs {options.pairs} --weights {weights}",
        "epochs": options.epochs,
        "pairs": options.pairs,
        "asked": len(cells(options)),
        "there": len(rows),
        **conclusions(rows),
        "environment": environment("cpu"),
        **kept_overhead(),
        "cells": rows,
    }


def conclusions(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What follows from cells: each against the plain run of its seed, means over seeds, the two objectives against each other, and the aim."""
    plains = {row["seed"]: row for row in rows if row["objective"] == "plain"}
    comparisons = [compare(row, plains[row["seed"]]) for row in rows if row["seed"] in plains]
    summary = summarise(comparisons)
    return {
        "summary": summary,
        "against_surrogate": [between(comparisons, weight, weight) for weight in shared_weights(summary)],
        "at_like_samples": [between(comparisons, *weights) for weights in alike(summary)],
        "aim": {"reduction": AIM, "loss": LOSS, "reached_by": [[row["objective"], row["weight"]] for row in summary if reaches(row)]},
        "comparisons": comparisons,
    }


def kept_overhead() -> dict[str, Any]:
    """What --overhead has found before."""
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return {name: value for name, value in found.items() if name.startswith("overhead")}


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
        "line_excess": row["judged"]["straight_excess"]["mean"],
        "end_error": row["judged"]["end_error"]["mean"],
        "squared_error_ratio": row["judged"]["squared_error"]["mean"] / plain["judged"]["squared_error"]["mean"],
        "precision_on_path": row["judged"]["realism"]["path"]["precision"],
        "precision_on_line": row["judged"]["realism"]["line"]["precision"],
        "precision_on_path_plain": plain["judged"]["realism"]["path"]["precision"],
        "processor_seconds_ratio": row["processor_seconds"] / plain["processor_seconds"],
    }
    if "samples" in row and "samples" in plain:
        found, floor = row["samples"]["frechet"], row["samples"]["frechet"].get("floor")
        told |= {"frechet": found["value"], "frechet_floor": floor, "frechet_ratio": found["value"] / plain["samples"]["frechet"]["value"]}
        told |= {name: row["samples"][name]["value"] for name in ("coverage", "recall")}
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


def shared_weights(summary: list[dict[str, Any]]) -> list[float]:
    """Weights that both objectives have."""
    least, straight = ({row["weight"] for row in summary if row["objective"] == objective} for objective in ("least", "straight"))
    return sorted(least & straight)


def alike(summary: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Each weight of the least-cost objective with that of the surrogate whose samples are most alike in Frechet distance, where scored."""
    by = {objective: [row for row in summary if row["objective"] == objective and "frechet" in row] for objective in ("least", "straight")}

    def distance(row: dict[str, Any], other: dict[str, Any]) -> float:
        return abs(row["frechet"]["mean"] - other["frechet"]["mean"])

    found = [(row["weight"], min(by["straight"], key=lambda other: distance(row, other))["weight"]) for row in by["least"] if by["straight"]]
    return sorted(found)


def between(comparisons: list[dict[str, Any]], weight: float, surrogate_weight: float) -> dict[str, Any]:
    """The least-cost objective less the surrogate, seed by seed: a positive reduction means that its excess is smaller."""
    by_cell = {(row["objective"], row["weight"], row["seed"]): row for row in comparisons}
    seeds = sorted({row["seed"] for row in comparisons})
    both = [(by_cell.get(("least", weight, seed)), by_cell.get(("straight", surrogate_weight, seed))) for seed in seeds]
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    named = {name: [a[name] - b[name] for a, b in pairs if name in a and name in b] for name in MEASURES}
    told = {"weight": weight, "surrogate_weight": surrogate_weight}
    return told | {name: over_seeds(values) for name, values in named.items() if values}


def reaches(row: dict[str, Any]) -> bool:
    """Whether the means of an objective and weight are what was asked for."""
    paid = [row[name]["mean"] for name in ("frechet_ratio", "squared_error_ratio") if name in row]
    return bool(len(paid) == 2 and row["reduction"]["mean"] >= AIM and max(paid) <= 1 + LOSS)


# ---- the overhead ---------------------------------------------------------------------------------------------------------------------------


def overhead(threads: int) -> dict[str, Any]:
    """Blocks of steps of a wgan-gp mlp on MNIST, plain, least and straight in an order drawn anew each round; ratios within a round.

    Every pair of a visit is priced (no floor of Dist^2), which is the most a visit can cost. Checkpoints, metrics and grids are left out.
    """
    from periplus.networks import AdversarialNetworks
    from periplus.runs import build_networks
    from periplus.training import adversarial
    from periplus.training.path_term import PathTerm
    from periplus.training.steps import Batches

    torch.set_num_threads(threads)
    data, states = periplus.load_data("mnist"), {}
    for name in OBJECTIVES:
        path = {} if name == "plain" else {"path_weight": 2.0, "path_objective": name}
        config = AdversarialConfig(model="wgan-gp", device="cpu", **path).resolve(len(data))
        state = adversarial.new_state(config, AdversarialNetworks(*build_networks(config, data.shape)), "cpu")
        if name != "plain":
            state.paths = PathTerm(config, data)
            state.paths.nearest = 0.0
        states[name] = (state, config, Batches(data.images, config.batch_size, 0))
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in states}
    healthy, order = torch.ones((), dtype=torch.bool), random.Random(0)
    for turn in range(ROUNDS + 1):  # the first is not counted
        for name in order.sample(list(states), len(states)):
            state, config, batches = states[name]
            clock, processor = time.perf_counter(), time.process_time()
            for _ in range(BLOCK):
                healthy = adversarial.train_step(state, config, batches, healthy)
            if turn:
                seconds[name].append({"wall": time.perf_counter() - clock, "processor": time.process_time() - processor})
    return {"threads": threads, "steps": BLOCK, "rounds": ROUNDS, "seconds": seconds, "ratios": ratios(seconds), "environment": environment("cpu")}


def ratios(seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Times of each contender over those of the plain one, within rounds: median, lowest and highest, by wall clock and by processor."""
    found: dict[str, Any] = {}
    for name in ("least", "straight"):
        found[name] = {}
        for clock in ("wall", "processor"):
            each = [own[clock] / plain[clock] for own, plain in zip(seconds[name], seconds["plain"], strict=True)]
            found[name][clock] = {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}
    return found


# ---- showing --------------------------------------------------------------------------------------------------------------------------------


def plus_minus(told: dict[str, Any], digits: int, factor: float = 1.0) -> str:
    """A mean with half of its interval over seeds."""
    mean, interval = factor * told["mean"], told["interval"]
    return f"{mean:.{digits}f}" + ("" if interval is None else f" ± {factor * (interval[1] - interval[0]) / 2:.{digits}f}")


def in_order(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain first, then objective by objective, by weight."""
    return sorted(summary, key=lambda row: (list(OBJECTIVES).index(row["objective"]), row["weight"]))


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table whose first column is words."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def tables(result: dict[str, Any]) -> str:
    """What docs/results.md shows of the summary: what is had, and what is paid."""
    return had(result) + "\n\n" + paid(result)


def named(row: dict[str, Any]) -> tuple[str, str]:
    """An objective and its weight, in words."""
    return OBJECTIVES[row["objective"]], f"{row['weight']:g}" if row["weight"] else "-"


def had(result: dict[str, Any]) -> str:
    """Excess, its reduction, lines, ends and realism; with what other real images and cross-fades have of the latter."""
    rows = []
    for row in in_order(result["summary"]):
        reduction = plus_minus(row["reduction"], 1, 100) + " %" if row["weight"] else "-"
        others = [
            plus_minus(row[key], digits) for key, digits in (("line_excess", 2), ("end_error", 3), ("precision_on_path", 2), ("precision_on_line", 2))
        ]
        rows.append((*named(row), plus_minus(row["excess"], 3), reduction, *others))
    seen = result["cells"][0]["judged"]["realism"]
    for name, key in (("other real images", "floor"), ("cross-fades of the pairs", "cross_fade")):
        rows.append((name, *["-"] * 5, f"{seen[key]['precision']:.2f}", "-"))
    header = ("training", "λ", "excess of U~", "reduced by", "excess of the line", "errors of ends / Dist²", "precision on the path", "on the line")
    return markdown(header, rows)


def paid(result: dict[str, Any]) -> str:
    """Scores of samples with their floors, reconstruction, time."""
    rows = []
    for row in in_order(result["summary"]):
        times = [plus_minus(row[f"{key}_ratio"], 2) if row["weight"] else "1" for key in ("frechet", "squared_error", "processor_seconds")]
        scores = (plus_minus(row["frechet"], 1), times[0], plus_minus(row["recall"], 2), plus_minus(row["coverage"], 2))
        rows.append((*named(row), *scores, *times[1:]))
    floor = {name: told["floor"] for name, told in result["cells"][0]["samples"].items() if "floor" in told}
    rows.append(("real images (floor)", "-", f"{floor['frechet']:.3f}", "-", f"{floor['recall']:.2f}", f"{floor['coverage']:.2f}", "-", "-"))
    header = ("training", "λ", "Fréchet distance", "/ plain", "recall", "coverage", "squared error of inversion / plain", "processor time / plain")
    return markdown(header, rows)


#: A look for each training: name, colour (safe for the colour-blind), marker.
LOOKS = {
    "least": ("least-cost objective", "#0072B2", "o"),
    "straight": ("straight-line surrogate", "#D55E00", "s"),
    "plain": ("plain", "#444444", "D"),
}
PANELS = (
    ("frechet_ratio", "Fréchet distance of samples / plain"),
    ("squared_error_ratio", "squared error of inversion / plain"),
    ("precision_on_path", "precision of images on the path"),
)


def figure(result: dict[str, Any], path: Path) -> None:
    """The trade-off: reduction of the excess against the Frechet distance and the reconstruction error, over those of the plain run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, 3, figsize=(11, 4.3), constrained_layout=True)
    for axis, (key, label) in zip(axes, PANELS, strict=True):
        for objective in LOOKS:
            draw_objective(axis, result, objective, key)
        axis.axvline(AIM, color="grey", lw=0.8, ls=":")
        axis.set_xlabel("reduction of the excess of Ũ")
        axis.set_ylabel(label)
        axis.set_xlim(-0.09, 0.36)
        if key.endswith("ratio"):
            draw_aim(axis)
        else:
            draw_known(axis, result["cells"][0]["judged"]["realism"])
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    drawn.suptitle(
        f"MNIST, {result['epochs']} epochs, {result['pairs']} held-out pairs, {result['there']} of {result['asked']} trainings\n"
        "numbers: weight λ; large: mean over seeds with Student's 95 % interval; small: one training",
        fontsize=9,
    )
    drawn.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else {"Description": f"{result['command']} --figure {path.name}"})


def draw_aim(axis: Any) -> None:
    """Where what was asked for would be."""
    low = axis.get_ylim()[0]
    axis.fill_between([AIM, 0.36], low, 1 + LOSS, color="#009E73", alpha=0.25, linewidth=0)
    axis.annotate("aim", (AIM + 0.03, 1 + LOSS), textcoords="offset points", xytext=(0, 3), ha="center", fontsize=8, color="#006B4E")
    axis.set_ylim(bottom=low)


def draw_known(axis: Any, seen: dict[str, Any]) -> None:
    """What other real images and cross-fades have of a precision."""
    words = {"textcoords": "offset points", "xytext": (0, 2), "ha": "right", "fontsize": 7, "color": "#444444"}
    for key, name in (("floor", "other real images"), ("cross_fade", "cross-fades")):
        axis.axhline(seen[key]["precision"], color="grey", lw=0.8, ls="--")
        axis.annotate(name, (0.355, seen[key]["precision"]), **words)


def draw_objective(axis: Any, result: dict[str, Any], objective: str, key: str) -> None:
    """Every training of an objective, small, and its means over seeds with whiskers, joined by weight."""
    from matplotlib.patheffects import withStroke

    name, colour, mark = LOOKS[objective]
    each = [row for row in result["comparisons"] if row["objective"] == objective and key in row]
    means = sorted((row for row in result["summary"] if row["objective"] == objective and key in row), key=lambda row: row["weight"])
    axis.plot([row["reduction"] for row in each], [row[key] for row in each], mark, color=colour, markersize=3, alpha=0.5, linestyle="none")
    x, y = ([row[m]["mean"] for row in means] for m in ("reduction", key))
    half = [[0.0 if row[m]["interval"] is None else row[m]["interval"][1] - row[m]["mean"] for row in means] for m in ("reduction", key)]
    axis.errorbar(x, y, half[1], half[0], fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.45)
    axis.plot(x, y, marker=mark, color=colour, markersize=6 if objective == "plain" else 7, markerfacecolor="white", linewidth=1, label=name)
    for row in means:
        if row["weight"]:
            at = (row["reduction"]["mean"], row[key]["mean"])
            side = {"xytext": (-6, 4), "ha": "right"} if objective == "least" else {"xytext": (6, -10), "ha": "left"}
            halo = [withStroke(linewidth=2.5, foreground="white")]
            axis.annotate(f"{row['weight']:g}", at, textcoords="offset points", fontsize=9, weight="bold", color=colour, path_effects=halo, **side)


def write(result: dict[str, Any]) -> None:
    """Write the file, cells last."""
    whole = {key: value for key, value in result.items() if key != "cells"} | {"cells": result["cells"]}
    write_atomically(RESULT, json.dumps(whole, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/cheap-paths"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--weights", type=float, nargs="+", default=[5.0, 2.0, 0.5])
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of --overhead")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.figure or options.table or options.again or options.overhead:
        result = json.loads(RESULT.read_text())
        if options.again:
            write(result | conclusions(result["cells"]))
        if options.overhead:
            name = "overhead" if options.threads == 1 else f"overhead_{options.threads}_threads"
            write(result | {name: overhead(options.threads)})
        if options.table:
            print(tables(result))
        if options.figure:
            figure(result, options.figure)
        return
    if options.score:
        from periplus.scoring import reference as real

        reference = real(periplus.load_data("mnist"), note=print)
        for cell in cells(options):
            if (folder(cell, options) / "seconds.json").exists():
                score_cell(cell, options, reference)
                write(gather(options))
        return
    for cell in cells(options):
        seconds, judged = train_cell(cell, options), judge_cell(cell, options)
        said = f"excess {judged['excess']['mean']:.3f}, ends {judged['end_error']['mean']:.3f}, {seconds['processor_seconds']:.0f} s"
        print(f"{folder(cell, options).name}: {said}", flush=True)
        write(gather(options))


if __name__ == "__main__":
    main()
