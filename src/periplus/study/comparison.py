"""What `periplus.comparing` found, as tables, figures and sentences: for chapter 2b and for `periplus compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from periplus import metrics, pictures, plots
from periplus.data import ImageData
from periplus.report import Block, Figure, Heading, Paragraph, Table, plain
from periplus.runs import Run
from periplus.study.telling import number

GRID_COLUMNS = 12
#: Samples are told from real images at sight where a classifier of features is right this often.
AT_SIGHT = 0.98
#: A precision from here on is said not to contradict that.
HALF_REAL = 0.5
#: Scores in the table of groups: key, what it is called there, digits after the point.
SHOWN = (
    ("frechet", "Fréchet distance", 2),
    ("frechet_random", "the same, random features", 4),
    ("kernel", "kernel distance", 3),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
    ("density", "density", 3),
    ("coverage", "coverage", 3),
    ("classes", "distance of class shares", 3),
    ("smallest_class", "smallest class", 3),
    ("two_sample", "told apart", 3),
    ("neighbour_ratio", "nearest / held-out", 2),
)


# ---- figures --------------------------------------------------------------------------------------------------------------------------------


def draw_comparison(result: Mapping[str, Any], runs: Mapping[str, Sequence[Run]], data: ImageData, folder: Path, key: str) -> dict[str, str]:
    """The figures of a comparison below `folder`: samples side by side, and quality on the way; returns their paths by name."""
    found = {"grids": draw_grids(runs, data, folder, key)}
    if any(run.get("curve") for group in result["groups"] for run in group["runs"]):
        found["quality"] = draw_curves(result, folder, key)
    return found


def draw_grids(runs: Mapping[str, Sequence[Run]], data: ImageData, folder: Path, key: str) -> str:
    """Two rows of real images, then two rows of samples of the first run of each group; none selected."""
    path = Path("figures") / f"{key}-side-by-side.png"
    count = 2 * GRID_COLUMNS
    rows, labels = [data.images[:count].float() / 255], ["real", ""]
    for label, members in runs.items():
        rows.append(members[0].sample(count).cpu())
        labels += [label, ""]
    shown = torch.cat([block if len(block) == count else torch.cat([block, block.new_ones(count - len(block), *block.shape[1:])]) for block in rows])
    pictures.image_grid(shown, folder / path, GRID_COLUMNS, labels)
    return str(path)


def draw_curves(result: Mapping[str, Any], folder: Path, key: str) -> str:
    """The Fréchet distance of every group's runs against epochs and against seconds, log-log, with the floor."""
    path = Path("figures") / f"{key}-quality.svg"
    floor = {"label": "floor: real images", "y": floor_of(result, "frechet")}
    panels = []
    for axis, label in (("epoch", "epochs"), ("seconds", "seconds of training")):
        drawn = [mean_curve(group, axis) for group in result["groups"]]
        panels.append({
            "x_label": label,
            "y_label": "Fréchet distance" if axis == "epoch" else "",
            "curves": [one for one in drawn if len(one["x"])],
            "levels": [floor] if floor["y"] else [],
            "x_log": True,
            "y_log": True,
        })  # fmt: skip
    plots.lines([panel for panel in panels if panel["curves"]], folder / path, height=3.1)
    return str(path)


def mean_curve(group: Mapping[str, Any], axis: str) -> dict[str, Any]:
    """The mean over a group's runs at the steps that all of them kept, with the lowest and the highest run as the ends of a bar."""
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for run in group["runs"]:
        for point in run.get("curve", ()):
            if point[axis]:
                by_step.setdefault(point["step"], []).append(point)
    shared = [points for _, points in sorted(by_step.items()) if len(points) == len(group["runs"])]
    values = [[p["value"] for p in points] for points in shared]
    curve: dict[str, Any] = {
        "label": group["label"],
        "x": [sum(p[axis] for p in points) / len(points) for points in shared],
        "y": [sum(v) / len(v) for v in values],
    }
    return curve | ({"low": [min(v) for v in values], "high": [max(v) for v in values]} if len(group["runs"]) > 1 else {})


# ---- tables and sentences -------------------------------------------------------------------------------------------------------------------


def comparison_blocks(result: Mapping[str, Any], figures: Mapping[str, str], command: str, key: str) -> tuple[Block, ...]:
    """The whole comparison: protocol, pictures, tables, and what follows from them."""
    blocks: list[Block] = [
        Paragraph(protocol_sentence(result)),
        Figure(
            figures["grids"],
            "Real images, and samples of the first run of each group; nothing is selected.",
            command,
            "Rows of real images and of samples of each group",
            label=f"{key}-grids",
        ),
        score_table(result, command, f"{key}-scores"),
    ]
    if result["test"]["comparisons"]:
        blocks.append(verdict_table(result, command, f"{key}-verdicts"))
    if "quality" in figures:
        blocks.append(curve_figure(result, figures["quality"], command, f"{key}-quality"))
    if result["differences"]:
        blocks += [Heading("Where the settings differ"), difference_table(result, command, f"{key}-settings")]
    return tuple(blocks)


def protocol_sentence(result: Mapping[str, Any]) -> str:
    """What was compared with what, by which extractor."""
    told, extractor = result["reference"], result["reference"]["extractor"]
    accuracy = extractor["accuracy"]
    known = (
        f", a network that classifies {100 * accuracy['value']:.2f} % of held-out images rightly"
        if accuracy
        else " (learned without labels: how well it sees is not known)"
    )
    each = ", channel by channel," if extractor["per_channel"] else ""
    blocks = told["floor_blocks"]
    others = f"{blocks} other block{'s' * (blocks != 1)} of {told['samples']:,} real images{' each' * (blocks != 1)}"
    source = f"{plain(told['data'])}, {plain(told['split'])}"
    return (
        f"{told['samples']:,} samples of each run are compared with {told['samples']:,} real images ({source}), and so "
        f"{'is' if blocks == 1 else 'are'} {others}. What these real images get is the *floor*: no generator can be expected to score better with "
        f"so few images. They are compared by the {extractor['features']} features{each} of `{plain(extractor['name'])}` (SHA-256 "
        f"{extractor['sha256'][:12]}){known}. No score here is an FID, and scores by another network cannot be compared with these."
    )


def score_table(result: Mapping[str, Any], command: str, label: str) -> Table:
    """A row for each score, a column for each group and one for the floor: means over runs, with their interval where there are several."""
    groups = result["groups"]
    measures = [m for m in SHOWN if all(m[0] in run["scores"] for group in groups for run in group["runs"])]
    rows: list[tuple[str, ...]] = [
        ("runs", *(str(len(group["runs"])) for group in groups), "-"),
        ("of these collapsed", *(str(sum(run["collapsed"] for run in group["runs"])) for group in groups), "-"),
    ]
    rows += [(title, *(score_cell(group, key, digits) for group in groups), floor_cell(result, key, digits)) for key, title, digits in measures]
    blocks = result["reference"]["floor_blocks"]
    spread = f" (mean, lowest to highest of {blocks} blocks)" if blocks > 1 else ""
    return Table(
        ("score", *(plain(group["label"]) for group in groups), "floor"),
        tuple(rows),
        "Scores of samples: mean over runs ± half of Student's 95 % interval over seeds; for a single run ± half of its own interval, which knows "
        f"nothing of other seeds. Floor: what real images get{spread}. Lower is better for the three distances and for that of class shares; higher "
        "is better for precision, recall, density and coverage. Told apart: accuracy of a classifier that tells samples from real images; 0.5 is "
        "best. Smallest class: its share of the samples. Nearest / held-out: distance to the nearest training image, over that of held-out images. "
        "Classes are those that the network sees. No ±: all runs agree, or there is no interval. Collapsed runs are in the means.",
        command,
        align=("left", *("right" for _ in range(len(groups) + 1))),
        label=label,
    )


def score_cell(group: Mapping[str, Any], key: str, digits: int) -> str:
    """Mean and half-width over seeds."""
    values = [float(run["scores"][key]["value"]) for run in group["runs"]]
    mean = sum(values) / len(values)
    if len(values) > 1:
        low, high = metrics.mean_interval(values)
        half = (high - low) / 2
    else:
        one = group["runs"][0]["scores"][key]
        half = (one["high"] - one["low"]) / 2 if one.get("low") is not None else float("inf")
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half != float("inf") else "")


def floor_of(result: Mapping[str, Any], key: str) -> float | None:
    """The floor of a score, as any run has it."""
    found: float | None = result["groups"][0]["runs"][0]["scores"].get(key, {}).get("floor")
    return found


def floor_cell(result: Mapping[str, Any], key: str, digits: int) -> str:
    """The mean of the blocks of real images, and the lowest and highest of them, with as many digits as the runs have where these show it."""
    found = result["groups"][0]["runs"][0]["scores"].get(key, {})
    if "floors" not in found:
        return "-"
    shown = abs(found["floor"]) >= 10 ** (1 - digits)
    mean, low, high = (
        f"{value:.{digits}f}" if shown else number(value, significant)
        for value, significant in ((found["floor"], 3), (min(found["floors"]), 2), (max(found["floors"]), 2))
    )
    return mean + (f" ({low} to {high})" if len(found["floors"]) > 1 else "")


def verdict_table(result: Mapping[str, Any], command: str, label: str) -> Table:
    """Every pair of groups with repeats, measure by measure."""
    rows = []
    for row in result["verdicts"]:
        if min(len(row["a_values"]), len(row["b_values"])) < 2:
            continue
        low, high = ("∞" if bound is None else number(bound) for bound in row["interval"])
        told = f"*{row['verdict']}*" if row["verdict"] != "cannot tell" else row["verdict"]
        rows.append((plain(row["a"]), plain(row["b"]), row["title"], f"{'-' if low == '∞' else ''}{low} to {high}", told))
    test = result["test"]
    return Table(
        ("the first", "the second", "measure", "interval of the difference", "the first is"),
        tuple(rows),
        f"Verdicts by {test['name']}. The intervals hold at {100 * (1 - test['family_error']):g} % for all {test['comparisons']} comparisons "
        f"together ({100 * test['level_each']:.2f} % each); where zero lies inside, the runs cannot be told apart.",
        command,
        align=("left", "left", "left", "right", "left"),
        label=label,
    )


def curve_figure(result: Mapping[str, Any], path: str, command: str, label: str) -> Figure:
    """Quality on the way."""
    return Figure(
        path,
        "Quality during training: the Fréchet distance of snapshots, against passes over the data and against seconds of training (only times of one "
        "machine under one load can be compared). Means over runs; bars reach from the best run to the worst.",
        command,
        "Curves of the Fréchet distance against epochs and seconds",
        label=label,
    )


def difference_table(result: Mapping[str, Any], command: str, label: str) -> Table:
    """Settings that are not the same in all groups."""
    groups = [group["label"] for group in result["groups"]]
    rows = tuple(
        (name.replace("_", " "), *("-" if values[g] is None else plain(values[g]) for g in groups)) for name, values in result["differences"].items()
    )
    return Table(
        ("setting", *(plain(g) for g in groups)),
        rows,
        "Settings in which the groups differ; - stands where a model has no such setting.",
        command,
        label=label,
    )


def comparison_conclusion(result: Mapping[str, Any]) -> str:
    """What the verdicts say, computed from them."""
    parts = [collapse_count(result), unfinished_count(result), *pair_sentences(result), best_sentence(result)]
    parts += [sight_sentence(group) for group in result["groups"]]
    parts += [equal_sentence(row) for row in result["equal"]]
    return " ".join(part for part in parts if part)


def comparison_headline(result: Mapping[str, Any]) -> str:
    """The verdicts in short: who collapsed, who is better, how far the best is from real images."""
    return " ".join(part for part in (collapse_count(result), *pair_sentences(result), best_sentence(result)) if part)


def pair_sentences(result: Mapping[str, Any]) -> list[str]:
    """What tells each pair of groups apart, and which pairs nothing does."""
    pairs = dict.fromkeys((row["a"], row["b"]) for row in result["verdicts"])
    told = {pair: pair_sentence(*pair, [row for row in result["verdicts"] if (row["a"], row["b"]) == pair]) for pair in pairs}
    parts = [sentence for sentence in told.values() if sentence]
    alone = {group["label"] for group in result["groups"] if len(group["runs"]) == 1}
    open_pairs = [pair for pair, sentence in told.items() if not sentence]
    for single, why in ((False, ""), (True, " (one run of a group has nothing to compare its differences with)")):  # tested, and not even tested
        named = [f"{plain(a)} and {plain(b)}" for a, b in open_pairs if bool(alone & {a, b}) == single]
        if named:
            parts.append(f"All scores together *cannot tell* apart: {'; '.join(named)}{why}.")
    return parts


def best_sentence(result: Mapping[str, Any]) -> str:
    """The lowest Frechet distance against the floor; nothing where there is no floor."""
    best = min(result["groups"], key=lambda group: mean_of(group, "frechet"))
    least, floor = mean_of(best, "frechet"), floor_of(result, "frechet")
    if not floor:
        return ""
    name = plain(best["label"])
    return f"The lowest mean Fréchet distance, {least:.2f} of {name}, is {least / floor:.1f} times the floor of {number(floor)}."


def mean_of(group: Mapping[str, Any], key: str) -> float:
    """Mean of a score over a group's runs."""
    values = [float(run["scores"][key]["value"]) for run in group["runs"]]
    return sum(values) / len(values)


def collapse_count(result: Mapping[str, Any]) -> str:
    """How many runs collapsed, of which groups."""
    runs = [(group["label"], run) for group in result["groups"] for run in group["runs"]]
    collapsed = [label for label, run in runs if run["collapsed"]]
    if not collapsed:
        return f"None of {len(runs)} runs collapsed." if len(runs) > 1 else "The run did not collapse."
    by_group = ", ".join(f"{collapsed.count(label)} of {plain(label)}" for label in dict.fromkeys(collapsed))
    return f"{len(collapsed)} of {len(runs)} runs collapsed ({by_group}); they are in all means."


def unfinished_count(result: Mapping[str, Any]) -> str:
    """Which runs were judged before the end of their training: interrupted, diverged, still being trained; nothing where none was."""
    runs = [(group["label"], run) for group in result["groups"] for run in group["runs"]]
    early = [f"{plain(label)}: step {run['step']:,} of {run['steps']:,}" for label, run in runs if run.get("steps") and run["step"] < run["steps"]]
    if not early:
        return ""
    was, stays = ("was", "is") if len(early) == 1 else ("were", "are")
    counted = f"{len(early)} of {len(runs)} runs" if len(runs) > 1 else "The run"
    return f"{counted} {was} judged before the end of training ({'; '.join(early)}), and {stays} in all means."


def pair_sentence(a: str, b: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One pair of groups; nothing where no measure tells them apart."""
    told = {verdict: [row["title"] for row in rows if row["verdict"] == verdict] for verdict in ("better", "worse", "cannot tell")}
    parts = [f"*{verdict}* in {', '.join(titles)}" for verdict, titles in told.items() if titles and verdict != "cannot tell"]
    if not parts:
        return ""
    open_ones = f"; they cannot be told apart in {', '.join(told['cannot tell'])}" if told["cannot tell"] else ""
    return f"{plain(a)} is {' and '.join(parts)} than {plain(b)}{open_ones}."


def sight_sentence(group: Mapping[str, Any]) -> str:
    """A warning where every run's samples are told from real images at once, whatever else is said of them; nothing elsewhere."""
    told = [float(run["scores"]["two_sample"]["value"]) for run in group["runs"] if "two_sample" in run["scores"]]
    if len(told) < len(group["runs"]) or min(told, default=0.0) < AT_SIGHT:
        return ""
    precise = mean_of(group, "precision") if all("precision" in run["scores"] for run in group["runs"]) else 0.0
    despite = f": a precision of {precise:.2f} does not make them good" if precise >= HALF_REAL else ""
    right = f"a classifier is right in {100 * min(told):.0f} % or more"
    return f"Samples of {plain(group['label'])} are told from real images *at sight* ({right}){despite}."


def told_seconds(seconds: float) -> str:
    """Whole seconds, or three digits where there are few."""
    return f"{seconds:.0f}" if seconds >= 100 else number(seconds)


def equal_sentence(row: Mapping[str, Any]) -> str:
    """Groups at equal epochs or at equal seconds; nothing where a run was first looked at later than that, for then nothing was tested."""
    means = [(one["label"], one["values"]) for one in row["groups"]]
    if any(value is None for _, values in means for value in values):
        return ""
    what = f"{row['at']:.3g} passes over the training images" if row["axis"] == "epoch" else f"{told_seconds(row['at'])} seconds of training"
    listed = ", ".join(f"{plain(label)} {sum(values) / len(values):.2f}" for label, values in means)
    decided = [f"{plain(v['a'])} {v['verdict']} than {plain(v['b'])}" for v in row["verdicts"] if v["verdict"] != "cannot tell"]
    alone = f" by this score alone, {row['comparisons']} comparisons" if row["comparisons"] > 1 else " by this score alone"
    return f"At {what}, Fréchet distances are {listed}" + (f" ({'; '.join(decided)}{alone})." if decided else " (no pair can be told apart).")
