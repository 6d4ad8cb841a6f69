"""How cheap are a run's passages, on images that it has never seen, and are there images along them?

    record = judge_paths(run, images_of(run), pairs=200)

The first 2 P images of a held-out split are taken two by two, their codes searched anew (`periplus.locating`), and the least-cost path between the
best codes found anew as well (`periplus.paths`, global search): nothing that training kept warm is used, and no network that it trained but the
decoder. Five things are told together, for each can be bought with another:

    score      U~ >= 1, and its excess U~ - 1; with the straight line's, the residual and the gap to what no path can undercut
    ends       squared errors of both codes, by themselves and over Dist^2: a path between codes of other images is no answer
    realism    how many images along the paths lie where real images lie: precision and density (k = 5) in features of a pinned network, of
               images at equal steps of length; beside it what other real images get (the floor), and pixel cross-fades of the same pairs
    jumps      the largest step of the image among 64 steps along the path, over Dist: a decoder that rushes to the middle has 1/2

Intervals are over pairs (standard errors of means); the spread over trainings takes seeds. A pair whose images have one code has no score, and is
counted in `coincident`. Pairs of the split that a run was trained on are judged as well, and are not called held out.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from periplus import metrics
from periplus.data import ImageData
from periplus.errors import UsageError
from periplus.features import Extractor, extractor_for
from periplus.locating import OnProgress, Search, count, locate, percent
from periplus.passages import Passages, first_pairs, images_along, passage_record, price
from periplus.runs import Run

SEARCH = Search(starts=4, keep="best")
SEGMENTS = 32
#: Images looked at along a path, without its ends; steps among which the largest is looked for; neighbours; real images on the other side.
LOOKED_AT, STEPS, NEIGHBOURS, REAL = 9, 64, 5, 5000


def judge_paths(
    run: Run,
    data: ImageData,
    pairs: int = 200,
    search: Search = SEARCH,
    *,
    segments: int = SEGMENTS,
    extractor: Extractor | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Judge a run's passages between the first 2 P images of a split it was not trained on.

    Returns a JSON-ready record: `score`, `excess`, `straight_excess`, `gap`, `end_error`, `jump` (each mean, standard error, median),
    `held_out`, `converged`, `coincident`, `realism`, `settings`, `statements`, and `pairs`, the record of each as in `passage_record`. `extractor`:
    by default that of the data. Raises UsageError where the split has too few images, or no pair has two codes.
    """
    targets, chosen = first_pairs(data, pairs)
    inversion = locate(run, targets, search, on_progress=on_progress)
    settings: dict[str, Any] = {"segments": segments, "norm": "length", "alternatives": 1}
    passages = price(run, targets, chosen, search, inversion=inversion, **settings)
    each = passage_record(run, passages, search, **settings)["pairs"]
    scored = [pair for pair in each if pair["score"] is not None]
    if not scored:
        raise UsageError(f"{run.path}: the images of each pair have one and the same code, and there is no path to judge")
    columns = {
        "score": [pair["score"] for pair in scored],
        "excess": [pair["score"] - 1 for pair in scored],
        "straight_excess": [pair["straight_score"] - 1 for pair in scored],
        "gap": [pair["gap"] for pair in scored],
        "end_error": [(pair["a"]["share"] + pair["b"]["share"]) for pair in each],
        "squared_error": [pair[end]["error"] for pair in each for end in ("a", "b")],
        "jump": largest_steps(run, passages).tolist(),
    }
    record: dict[str, Any] = {name: spread_of(values) for name, values in columns.items()}
    record |= {
        "run": str(run.path),
        "step": run.step,
        "data": run.data.source,
        "split": data.split,
        "held_out": data.split != run.data.split,
        "converged": sum(pair["converged"] for pair in scored),
        "coincident": len(each) - len(scored),
        "realism": realism(run, passages, data, extractor or extractor_for(data)),
        "settings": {"pairs": pairs, "search": asdict(search), **settings},
    }
    return record | {"statements": judge_statements(record), "pairs": each}


def spread_of(values: list[float]) -> dict[str, float | None]:
    """Mean with its standard error (None of a single value), and median."""
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else None
    return {"mean": float(found.mean()), "standard_error": error, "median": float(found.median())}


def largest_steps(run: Run, passages: Passages) -> Tensor:
    """The largest change of the image from one of STEPS equal steps of length to the next, over Dist, (P,)."""
    images = images_along(run, passages, "path", STEPS + 1).flatten(2).double()
    x_a, x_b = (passages.images(end).to(images).flatten(1) for end in (0, 1))
    share: Tensor = images.diff(dim=1).norm(dim=2).max(1).values / (x_a - x_b).norm(dim=1)
    return share.cpu()


def realism(run: Run, passages: Passages, data: ImageData, extractor: Extractor) -> dict[str, Any] | None:
    """Precision and density of images along paths and lines, of cross-fades of the same pairs, and of real images that are no end of any.

    None where too few real images are left to have neighbours.
    """
    used = set(passages.targets.index)
    others = torch.tensor([row for row in range(len(data)) if row not in used])
    real = others[: min(REAL, len(others) * 3 // 4)]
    floor = others[len(real) :][: len(passages.pairs) * LOOKED_AT]
    if min(len(real), len(floor)) <= NEIGHBOURS:
        return None
    x_a, x_b = (passages.images(end)[:, None] for end in (0, 1))
    t = torch.linspace(0, 1, LOOKED_AT + 2)[1:-1, None, None, None]
    shown = {
        "path": images_along(run, passages, "path", LOOKED_AT + 2)[:, 1:-1].flatten(0, 1).cpu(),
        "line": images_along(run, passages, "line", LOOKED_AT + 2)[:, 1:-1].flatten(0, 1).cpu(),
        "cross_fade": ((1 - t) * x_a + t * x_b).flatten(0, 1),
        "floor": data.images[floor],
    }
    features = extractor(data.images[real])
    told: dict[str, Any] = {}
    for name, images in shown.items():
        found = metrics.precision_recall_density_coverage(features, extractor(images), NEIGHBOURS)
        told[name] = {
            "precision": found.precision,
            "precision_interval": list(found.precision_interval),
            "density": found.density,
            "density_interval": list(found.density_interval),
            "images": len(images),
        }
    return told | {"k": NEIGHBOURS, "real": len(real), "extractor": extractor.record()}


def judge_statements(record: dict[str, Any]) -> list[str]:
    """What a judgement says, in sentences."""
    scored, seen, score = record["settings"]["pairs"] - record["coincident"], record["realism"], record["score"]
    error = "" if score["standard_error"] is None else f" (standard error {score['standard_error']:.3f})"
    said = [
        f"{count(scored, 'held-out pair' if record['held_out'] else 'pair')}: U~ = {score['mean']:.3f}{error} "
        f"on the path found, {record['straight_excess']['mean'] + 1:.3f} on the straight line; 4/3 is a cross-fade, "
        f"and 1 what no path undercuts. {record['converged']} of {scored} converged; above the lower bound of each by "
        f"{percent(record['gap']['mean'])} on average (gap).",
        f"The ends: a squared error of {record['squared_error']['mean']:.4g} for each image, both together {percent(record['end_error']['mean'], 1)} "
        f"of Dist^2. The largest of {STEPS} steps along a path moves the image by {percent(record['jump']['mean'], 1)} of Dist.",
    ]
    if not record["held_out"]:
        said.append(f"The run was trained on this split ({record['split']}): these pairs are not held out, and say nothing of others.")
    if record["coincident"]:
        said.append(f"{count(record['coincident'], 'pair')} more: one code for both images, and so no score.")
    if seen is None:
        return [*said, "Realism along the path: too few real images are left to tell."]
    shares = {name: percent(seen[name]["precision"]) for name in ("path", "line", "cross_fade", "floor")}
    return [
        *said,
        f"Along the path {shares['path']} of the images lie among real ones (precision, k = {seen['k']}); along the line {shares['line']}; "
        f"of cross-fades {shares['cross_fade']}; of other real images {shares['floor']}.",
    ]
