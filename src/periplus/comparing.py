"""Runs against runs: groups of seeds, scores with floors, and a verdict that says what was tested.

Runs with the same settings but for the seed form a *group*; a group's seeds are its repeats. For every measure of `COMPARED` and every pair of groups
the difference of means gets Welch's interval (1947), at 95 % for all of them together (Bonferroni: each at 1 - 0.05 / comparisons); where it lies on
one side of zero the verdict is "better" or "worse", else "cannot tell", which is what one seed always gives. Collapsed runs are counted, and kept.

Quality is also taken along the way, from a run's snapshots: the Frechet distance against epochs and against seconds of training. To compare at equal
epochs, or at equal seconds, each run is read off its own curve at the last point that all of them reached (log of the distance linear in the log of
the epoch, or second, between two snapshots). Seconds are what timing.jsonl says: they compare only where the runs were made on the same machine under
the same load, or where `pace` gives seconds per step that were measured side by side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from periplus import metrics
from periplus.config import NOT_FOR, AdversarialConfig
from periplus.errors import UsageError
from periplus.evaluation import collapse
from periplus.files import write_atomically
from periplus.machine import commit
from periplus.runs import Run
from periplus.scoring import Note, Reference, distance_record, score
from periplus.training.steps import steps_in_all

SCORES = "scores"
#: What verdicts are about: a score, what it is called, and which direction is better.
COMPARED = (
    ("frechet", "Fréchet distance", "lower"),
    ("kernel", "kernel distance", "lower"),
    ("precision", "precision", "higher"),
    ("coverage", "coverage", "higher"),
    ("classes", "distance of class shares", "lower"),
)
#: What a run's settings may differ in and still be the same group.
REPEATS = ("seed", "device", "log_every", "sample_every", "checkpoint_every", "keep_last", "snapshots")
FAMILY_ERROR = 0.05


def compare(
    runs: Sequence[Run], reference: Reference, *, curves: bool = True, pace: Mapping[str, float] | None = None, note: Note = str
) -> dict[str, Any]:
    """All that can be said of runs of one data set side by side, JSON-ready.

    Args:
        runs: of the data of `reference`. curves: score the snapshots too.
        pace: seconds of a step, by the label of a group, measured side by side; by default those of timing.jsonl.

    Returns `reference`, `groups` (label, settings, runs with their scores, whether they collapsed, curves), `differences` of settings, `verdicts` of
    every pair of groups and measure, `equal` (at equal epochs, at equal seconds).
    Raises UsageError for runs of other data, for the same run twice, and for two runs of the same settings and seed.
    """
    check_runs(runs, reference)
    groups = group_runs(runs)
    told = []
    for label, members in groups.items():
        records = [run_record(run, reference, note) for run in members]
        if curves:
            for run, record in zip(members, records, strict=True):
                record["curve"] = curve(run, reference, (pace or {}).get(label), note)
        told.append({"label": label, "settings": settings_of(members[0]), "runs": records})
    result: dict[str, Any] = {"measured_at": commit(), "reference": reference.record(), "groups": told, "differences": differences(told)}
    result |= {"verdicts": verdicts(told), "test": test_of(told)}
    return result | {"equal": equal_resources(told) if curves else []}


def check_runs(runs: Sequence[Run], reference: Reference) -> None:
    """Raise UsageError where runs cannot be compared by this reference, naming the run."""
    if not runs:
        raise UsageError("nothing to compare: name at least one RUN folder")
    wanted = reference.data.content_hash()
    for run in runs:
        if run.data.sha256 != wanted:
            raise UsageError(
                f"{run.path} was trained on other images than {reference.data.name} ('{run.data.source}'): scores of different data do not compare"
            )
    folders = [run.path.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UsageError(f"{folder} is given twice: a run is one repeat of its group")
    for members in group_runs(runs).values():
        seeds: dict[int, Run] = {}
        for run in members:
            other = seeds.setdefault(run.config.seed, run)
            if other is not run:  # copies do not vary: they would make any interval over seeds too narrow
                told = f"{other.path} and {run.path} have the same settings and the same seed, {run.config.seed}"
                raise UsageError(f"{told}: they are one repeat, not two")


# ---- groups ---------------------------------------------------------------------------------------------------------------------------------


def settings_of(run: Run) -> dict[str, Any]:
    """What was chosen for a run, but for its seed, what changes no weight and what its model has no use for."""
    without = (*REPEATS, *NOT_FOR[run.config.model])
    return {k: v for k, v in dataclasses.asdict(run.config).items() if k not in without and v is not None}


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label, in the order in which they came: the model, and in which settings it differs from the other groups of that model."""
    keyed: dict[frozenset[tuple[str, Any]], list[Run]] = {}
    for run in runs:
        keyed.setdefault(frozenset(settings_of(run).items()), []).append(run)  # 1 and 1.0 are one setting
    chosen = [settings_of(members[0]) for members in keyed.values()]
    return dict(zip((label_of(settings, chosen) for settings in chosen), keyed.values(), strict=True))


def label_of(settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """A group's name: the model, and what tells it from the other groups of that model: "gan", "gan conv, epochs 10"."""
    kin = [other for other in others if other["model"] == settings["model"]]
    varied = [name for name in settings if any(other.get(name) != settings[name] for other in kin)]
    model = f"{settings['model']} {settings['architecture']}" if "architecture" in varied else settings["model"]
    return ", ".join([model, *(f"{name.replace('_', ' ')} {settings[name]}" for name in varied if name != "architecture")])


def differences(groups: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings in which the groups differ: by name, the value of each group."""
    names = dict.fromkeys(name for group in groups for name in group["settings"])
    table = {name: {group["label"]: group["settings"].get(name) for group in groups} for name in names}
    return {name: values for name, values in table.items() if len(set(values.values())) > 1}


# ---- scores of a run, kept beside it --------------------------------------------------------------------------------------------------------


def run_record(run: Run, reference: Reference, note: Note = str) -> dict[str, Any]:
    """Scores of a run's newest weights, whether it collapsed, what its training took, and how many steps it was meant to have."""
    found = kept_scores(run, reference, whole=True, note=note)
    timing = run.timing[-1] if run.timing else {}
    return {
        "run": str(run.path),
        "seed": run.config.seed,
        "step": run.step,
        "steps": steps_in_all(run.config, run.data.images - (run.config.held_out or 0)),
        "epoch": epoch_of(run, run.step),
        "seconds": timing.get("seconds"),
        "collapsed": found["collapse"]["collapsed"],
        "collapse": found["collapse"],
        "scores": found["scores"],
    }


def kept_scores(run: Run, reference: Reference, *, whole: bool, note: Note = str) -> dict[str, Any]:
    """Scores of a run at its step, from RUN/scores/step-N.json where the same weights were judged by the same reference; else made, and kept there.

    whole: all scores and the verdict of collapse; otherwise the Frechet distance alone, which is what a curve needs.
    """
    path = run.path / SCORES / f"step-{run.step}.json"
    key = {"reference": reference.record(), "weights": weights_hash(run), "sampling_seed": 0}
    found = read_kept(path)
    if found.get("key") == key and (found.get("whole") or not whole):
        return found
    note(f"scoring {run.path} at step {run.step}")
    record: dict[str, Any] = {"key": key, "whole": whole}
    if whole:
        record |= {"scores": score(run, reference)["scores"], "collapse": collapse(run.sample(reference.samples), reference.data, run.device)}
    else:
        features = reference.extractor(run.sample(reference.samples).cpu())
        record["scores"] = {"frechet": distance_record(metrics.frechet_distance(reference.features[reference.blocks[0]], features))}
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    return record


def read_kept(path: Path) -> dict[str, Any]:
    """A kept record, or nothing: what cannot be read is made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def weights_hash(run: Run) -> str:
    """SHA-256 of the weights that a run samples from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(run.decoder.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- along the way --------------------------------------------------------------------------------------------------------------------------


def curve(run: Run, reference: Reference, pace: float | None = None, note: Note = str) -> list[dict[str, Any]]:
    """The Frechet distance of every snapshot and of the newest weights: step, epoch, seconds, value, low, high."""
    points = []
    for step in run.kept if isinstance(run.config, AdversarialConfig) else [run.step]:
        at = run.at(step)
        found = kept_scores(at, reference, whole=False, note=note)["scores"]["frechet"]
        seconds = step * pace if pace is not None else seconds_of(run, step)
        points.append({"step": step, "epoch": epoch_of(run, step), "seconds": seconds, **{k: found[k] for k in ("value", "low", "high")}})
    return points


def epoch_of(run: Run, step: int) -> float | None:
    """Passes over the training images after so many steps, as metrics.jsonl has it."""
    return next((float(line["epoch"]) for line in run.metrics if line["step"] == step), None)


def seconds_of(run: Run, step: int) -> float | None:
    """Seconds of training after so many steps, as timing.jsonl has it."""
    return next((float(line["seconds"]) for line in run.timing if line["step"] == step), None)


def read_off(points: Sequence[Mapping[str, Any]], axis: str, where: float) -> float | None:
    """The Frechet distance of a curve at a point of its axis, log-log between two snapshots; None outside of the curve."""
    known = [(float(p[axis]), float(p["value"])) for p in points if p[axis]]
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x0 <= where <= x1:
            share = math.log(where / x0) / math.log(x1 / x0) if x1 > x0 else 1.0
            return math.exp((1 - share) * math.log(max(y0, 1e-12)) + share * math.log(max(y1, 1e-12)))
    return next((y for x, y in known if math.isclose(x, where)), None)


def equal_resources(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The Frechet distance of every run at the last epoch, and at the last second, that all runs reached; verdicts for each pair of groups.

    These verdicts are a family of their own: each is corrected for `comparisons`, the pairs of groups times the axes.
    """
    known = {axis: [[p for p in run["curve"] if p[axis]] for group in groups for run in group["runs"]] for axis in ("epoch", "seconds")}
    axes = [axis for axis, curves in known.items() if len(groups) > 1 and all(curves)]
    correction = max(1, len(axes) * math.comb(sum(len(group["runs"]) > 1 for group in groups), 2))  # one run alone is never judged
    found = []
    for axis in axes:
        where = min(float(points[-1][axis]) for points in known[axis])
        values = [[read_off(run["curve"], axis, where) for run in group["runs"]] for group in groups]
        rows = [{"label": group["label"], "values": of} for group, of in zip(groups, values, strict=True)]
        complete = all(v is not None for of in values for v in of)
        pairs = itertools.combinations(range(len(groups)), 2) if complete else ()
        judged = [
            {"a": groups[i]["label"], "b": groups[j]["label"], **verdict(values[i], values[j], "lower", correction)}  # type: ignore[arg-type]
            for i, j in pairs
        ]
        found.append({"axis": axis, "at": where, "groups": rows, "verdicts": judged, "comparisons": correction})
    return found


# ---- verdicts -------------------------------------------------------------------------------------------------------------------------------


def verdicts(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of groups, measure by measure: values by seed, interval of the difference a - b, and what `a` is."""
    comparisons = test_of(groups)["comparisons"]
    return [
        {"a": a["label"], "b": b["label"], "measure": key, "title": title, "direction": direction}
        | verdict(values_of(a, key), values_of(b, key), direction, max(1, comparisons))
        for a, b in itertools.combinations(groups, 2)
        for key, title, direction in measures_of(groups)
    ]


def measures_of(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The compared measures that all runs have."""
    return [measure for measure in COMPARED if all(measure[0] in run["scores"] for group in groups for run in group["runs"])]


def values_of(group: Mapping[str, Any], measure: str) -> list[float]:
    """One measure of a group, by seed."""
    return [float(run["scores"][measure]["value"]) for run in group["runs"]]


def verdict(a: Sequence[float], b: Sequence[float], direction: str, comparisons: int) -> dict[str, Any]:
    """Welch's interval of mean(a) - mean(b), corrected for so many comparisons, and what `a` is: better, worse, or cannot tell."""
    low, high = metrics.welch_interval(a, b, 1 - FAMILY_ERROR / comparisons)
    smaller, larger = ("better", "worse") if direction == "lower" else ("worse", "better")
    told = smaller if high < 0 else larger if low > 0 else "cannot tell"
    bounds = [bound if math.isfinite(bound) else None for bound in (low, high)]  # JSON has no infinity
    return {"a_values": list(a), "b_values": list(b), "interval": bounds, "verdict": told}


def test_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the verdicts rest on. Groups of one run can be told from nothing, and are not among the comparisons that are corrected for."""
    repeated = sum(len(group["runs"]) > 1 for group in groups)
    comparisons = len(measures_of(groups)) * math.comb(repeated, 2)
    return {
        "name": "Welch's interval of the difference of means over seeds",
        "family_error": FAMILY_ERROR,
        "comparisons": comparisons,
        "level_each": 1 - FAMILY_ERROR / max(1, comparisons),
    }
