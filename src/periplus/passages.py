"""Passages between images: pairs, the inversion of their ends, the cheapest path found between each, and what bounds it.

    targets, pairs = first_pairs(images_of(run), 4)                 or chosen_pairs, class_pairs, file_pairs
    passages       = price(run, targets, pairs, search)
    record         = passage_record(run, passages, search, ...)     JSON-ready, with the answers as sentences

The solver is `periplus.paths`. Its ends are codes, so both images of a pair are located first (`periplus.locating`); a path begins at G(z_A),
not at the image, and the record says how far that is. Several inversions of an image may serve as its end: the best few certified minima are
offered to the solver, and the record says which it took. Whether a path is cheap is judged against the straight line between its ends, and against
what no path between them can undercut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from periplus.data import ImageData
from periplus.errors import UsageError
from periplus.inversion import Inversion, Kind
from periplus.locating import OnProgress, Search, Targets, class_numbers, count, locate, of, of_class, percent, pick
from periplus.paths import Path, certified_lipschitz, minimal_path
from periplus.runs import Run

Norm = Literal["length", "energy"]
Pair = tuple[int, int]
#: What the curves of a pair are called, in the order of pictures and records.
CURVES = ("line", "spherical", "path")
#: A path that saves less than this part of the line's cost is no cheaper worth speaking of.
WORTH = 1e-3


# ---- which pairs --------------------------------------------------------------------------------------------------------------------------


def first_pairs(data: ImageData, n: int = 4) -> tuple[Targets, list[Pair]]:
    """The first n pairs of neighbours in a split: (0, 1), (2, 3), ... Raises UsageError."""
    if not 1 <= n <= len(data) // 2:
        raise UsageError(f"--n is {n}: from 1 to {len(data) // 2} pairs can be made of {data.name} ({data.split})")
    return chosen_pairs(data, [(2 * k, 2 * k + 1) for k in range(n)])


def chosen_pairs(data: ImageData, pairs: Sequence[Pair]) -> tuple[Targets, list[Pair]]:
    """Pairs by position in a split; each image is located once, however many pairs it ends. Raises UsageError."""
    images = sorted({index for pair in pairs for index in pair})
    targets = pick(data, images)
    return check_pairs(targets, [(images.index(a), images.index(b)) for a, b in pairs])


def class_pairs(data: ImageData, classes: Sequence[str], n: int = 4) -> tuple[Targets, list[Pair]]:
    """The first image of one class with the first of another, the second with the second, ... n pairs. Raises UsageError."""
    if len(classes) != 2:
        raise UsageError(f"--classes has {count(len(classes), 'name')}: two are needed, one for each end")
    first, second = (of_class(data, number) for number in class_numbers(data, classes))
    if first == second:
        raise UsageError(f"--classes is {' '.join(classes)}: two different classes are needed (or choose images by --pairs)")
    if not 1 <= n <= min(len(first), len(second)):
        raise UsageError(f"--n is {n}: from 1 to {min(len(first), len(second))} pairs can be made of these classes")
    return chosen_pairs(data, list(zip(first[:n], second[:n], strict=True)))


def file_pairs(targets: Targets) -> tuple[Targets, list[Pair]]:
    """Image files two by two. Raises UsageError for an odd number of them."""
    if len(targets) % 2:
        raise UsageError(f"--files has {count(len(targets), 'name')}: they are taken two by two, so an even number is needed")
    return check_pairs(targets, [(k, k + 1) for k in range(0, len(targets), 2)])


def check_pairs(targets: Targets, pairs: list[Pair]) -> tuple[Targets, list[Pair]]:
    """Raise UsageError for a pair of equal images: its cost would vanish with their distance."""
    for a, b in pairs:
        if bool((targets.images[a] == targets.images[b]).all()):
            raise UsageError(f"'{targets.names[a]}' and '{targets.names[b]}' are the same image: a path needs two different ones")
    return targets, pairs


# ---- pricing ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passages:
    """Paths of P pairs of images, with the inversion that gave their ends.

    Attributes:
        targets, inversion: the images and their codes. pairs: P pairs of rows of these.
        path: the paths. starts: (P, 2) which start of the inversion each path's ends are. lipschitz: the certified constant, or None.
    """

    targets: Targets
    inversion: Inversion
    pairs: list[Pair]
    path: Path
    starts: Tensor
    lipschitz: float | None

    def images(self, end: int) -> Tensor:
        """The images (P, C, H, W) at one end, in [0, 1]."""
        return self.targets.images[[pair[end] for pair in self.pairs]].float() / 255

    def points(self, curve: str) -> Tensor:
        """The nodes (P, N+1, d) of a curve of CURVES."""
        return {"line": self.path.straight_points, "spherical": self.path.spherical_points, "path": self.path.points}[curve]


def price(
    run: Run,
    targets: Targets,
    pairs: Sequence[Pair],
    search: Search | None = None,
    *,
    inversion: Inversion | None = None,
    segments: int = 64,
    norm: Norm = "length",
    alternatives: int = 3,
    on_progress: OnProgress | None = None,
) -> Passages:
    """The cheapest path found between the codes of each pair of images, with what it was computed from.

    Args:
        targets, pairs: images, and pairs of rows of these. search: how their codes are searched; its seed is that of the paths as well.
        inversion: what `locate` has found for the images already.
        alternatives: how many of an image's best certified minima may be its end; 1 takes the best code found, whatever it is.
        segments, norm, on_progress: as in `minimal_path`, which raises UsageError for what it cannot serve.
    """
    if alternatives < 1:
        raise UsageError(f"--alternatives is {alternatives}: at least one code for each end is needed")
    if segments < 1:
        raise UsageError(f"--segments is {segments}: at least one is needed")
    search = search or Search()
    inversion = inversion or locate(run, targets, search)
    ends = [end_starts(inversion, row, alternatives) for row in range(len(targets))]
    most = max(map(len, ends))
    padded = [[starts[k % len(starts)] for k in range(most)] for starts in ends]  # a repeated end changes nothing
    chosen = torch.tensor([[padded[a], padded[b]] for a, b in pairs])
    rows = torch.tensor(pairs)
    z_a, z_b = (inversion.all_z[rows[:, end, None], chosen[:, end]] for end in (0, 1))
    x_a, x_b = (targets.images[rows[:, end]].to(z_a.device) for end in (0, 1))
    lipschitz = certified_lipschitz(run.decoder, run.decode, run.config.latent_dim)
    path = minimal_path(run.decode, z_a, z_b, x_a, x_b, segments, norm, lipschitz=lipschitz, seed=search.seed, on_progress=on_progress)
    starts = chosen.gather(2, path.ends.cpu()[:, :, None])[:, :, 0]
    return Passages(targets, inversion, list(pairs), path, starts, lipschitz)


def end_starts(inversion: Inversion, row: int, alternatives: int) -> list[int]:
    """Which starts of an image may be the end of its paths: the best code found, and the best of each other certified minimum, up to so many."""
    best = int(inversion.best[row])
    order = inversion.all_error[row].argsort(stable=True).tolist()
    seen, found = {int(inversion.cluster[row, best])}, [best]
    for start in order:
        cluster = int(inversion.cluster[row, start])
        if cluster not in seen and bool(inversion.converged[row, start] & inversion.kept[row, start]):
            seen.add(cluster)
            found.append(start)
    return found[:alternatives]


# ---- along a path -------------------------------------------------------------------------------------------------------------------------


def along(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes (P, count, d) at equal steps of length along polylines (P, N+1, d), ends included, and the length up to each, (P, count)."""
    nodes = points.double()
    length = torch.cat([torch.zeros_like(nodes[:, :1, 0]), (nodes[:, 1:] - nodes[:, :-1]).norm(dim=2).cumsum(1)], 1)
    at = torch.linspace(0, 1, count, dtype=torch.float64, device=nodes.device) * length[:, -1:]
    after = torch.searchsorted(length.contiguous(), at.contiguous()).clamp(1, points.shape[1] - 1)
    before = length.gather(1, after - 1)
    part = ((at - before) / (length.gather(1, after) - before).clamp(min=1e-300)).clamp(0, 1)[..., None]
    a, b = (nodes.gather(1, k[..., None].expand(-1, -1, points.shape[2])) for k in (after - 1, after))
    return (a + part * (b - a)).to(points.dtype), at


@torch.no_grad()
def cost_along(run: Run, passages: Passages, curve: str, count: int = 257) -> tuple[Tensor, Tensor]:
    """c / Dist^2 (P, count) at equal steps along a curve of CURVES, and the length to each: the area under it is U / Dist^2 (length reading)."""
    z, length = along(passages.points(curve), count)
    images = run.decode(z).flatten(2).double()
    x_a, x_b = (passages.images(end).to(images).flatten(1)[:, None] for end in (0, 1))
    cost = (images - x_a).square().sum(2) + (images - x_b).square().sum(2)
    return cost / (x_a - x_b).square().sum(2), length


@torch.no_grad()
def images_along(run: Run, passages: Passages, curve: str, count: int) -> Tensor:
    """Images (P, count, C, H, W) in [0, 1] at equal steps along a curve of CURVES."""
    return run.decode(along(passages.points(curve), count)[0]).clamp(0, 1)


# ---- the record ---------------------------------------------------------------------------------------------------------------------------


def passage_record(run: Run, passages: Passages, search: Search, *, segments: int, norm: str, alternatives: int) -> dict[str, Any]:
    """What was found, JSON-ready, without points.

    Returns `run`, `model`, `step`, `data`, `search`, `alternatives`, `segments`, `norm`, `latent_dim`, `domain` of the inversion, `lipschitz`
    (None where no constant is certified); `pairs`, a record for each: `a` and `b` (`end_record`), all of `Path.record()`, `saving` (part of the
    line's cost), `straight_score`, `spherical_score`, `largest_norm` |z| of its nodes; and `statements`, sentences made from all that.
    """
    found = passages.path.record()
    pairs = []
    for k, (a, b) in enumerate(passages.pairs):
        row = found[k]
        pairs.append({
            "a": end_record(passages, a, int(passages.starts[k, 0]), row["image_distance"]),
            "b": end_record(passages, b, int(passages.starts[k, 1]), row["image_distance"]),
            **row,
            "saving": 1 - row["cost"] / row["straight_cost"] if row["straight_cost"] else 0.0,
            "straight_score": row["straight_cost"] / row["floor"] if row["floor"] else None,
            "largest_norm": float(passages.path.points[k].norm(dim=1).max()),
            "spherical_score": row["spherical_cost"] / row["floor"] if row["floor"] else None,
        })  # fmt: skip
    record = {
        "run": str(run.path),
        "model": run.config.model,
        "step": run.step,
        "data": run.data.source,
        "search": asdict(search),
        "alternatives": alternatives,
        "segments": segments,
        "norm": norm,
        "latent_dim": run.config.latent_dim,
        "domain": passages.inversion.domain.to_dict(),
        "lipschitz": passages.lipschitz,
        "pairs": pairs,
    }
    return record | {"statements": passage_statements(record)}


def end_record(passages: Passages, row: int, start: int, squared_distance: float) -> dict[str, Any]:
    """One end: which image, squared `error` of the code used, its `share` of Dist^2 and `kind`, and the `best_error` that was found."""
    inversion = passages.inversion
    error = float(inversion.all_error[row, start])
    return passages.targets.record(row) | {
        "error": error,
        "share": error / squared_distance,
        "kind": Kind(int(inversion.kind[row, start])).name.lower(),
        "best_error": float(inversion.error[row]),
        "is_best": start == int(inversion.best[row]),
    }


# ---- the answers, as sentences --------------------------------------------------------------------------------------------------------------


def passage_statements(record: Mapping[str, Any]) -> list[str]:
    """What a record says, in sentences: what was saved, the gap, what did not converge, and what the ends are."""
    pairs = [pair for pair in record["pairs"] if pair["distance"] > 0]
    same = len(record["pairs"]) - len(pairs)
    said = [] if not same else [f"{of(same, record['pairs'], 'pair')}: both images have the same code, and the path is a point."]
    return [*said, say_saving(pairs), say_gap(record, pairs), say_convergence(pairs), say_ends(pairs)] if pairs else said


def say_saving(pairs: Sequence[Mapping[str, Any]]) -> str:
    """How much cheaper than the straight line?"""
    cheaper = [pair["saving"] for pair in pairs if pair["saving"] > WORTH]
    scores = f"U~ = {middle(pairs, 'score', '.2f')} instead of {middle(pairs, 'straight_score', '.2f')} (1 is the floor, 4/3 a cross-fade)"
    if not cheaper:
        return f"{count(len(pairs), 'pair')}: no path was found that is cheaper than the straight line; {scores}."
    how = f"by {percent(cheaper[0], 1)}" if len(cheaper) == 1 else f"by {percent(min(cheaper), 1)} to {percent(max(cheaper), 1)}"
    arc = sum(pair["spherical_cost"] > pair["straight_cost"] for pair in pairs)
    return (
        f"For {of(len(cheaper), pairs, 'pair')} the path is cheaper than the straight line, {how}; {scores}. "
        f"Spherical interpolation is dearer than the line for {of(arc, pairs, 'pair')}."
    )


def say_gap(record: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    """How much cheaper could the best path be?"""
    lifted = median(pair["lower_bound"] / pair["floor"] - 1 for pair in pairs)
    if record["lipschitz"] is None:
        source = "the floor (c is nowhere below Dist^2 / 2): this decoder has no certified Lipschitz constant"
    else:
        source = f"the floor and a certified Lipschitz constant of {record['lipschitz']:.4g}, which lifts it by {percent(lifted, 2)}"
    largest = max(pairs, key=lambda pair: float(pair["gap"]))
    return (
        f"Gap: between these codes a path costs at least its lower bound, so the best can be cheaper than the one found by at most "
        f"{percent(largest['gap'] / (1 + largest['gap']))} (gap at most {percent(largest['gap'])}). The bound is from {source}; "
        "how much of the gap is the path's and how much the bound's is not known."
    )


def say_convergence(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Which paths are stationary?"""
    left = [pair for pair in pairs if not pair["converged"]]
    several = sum(pair["minima"] > 1 for pair in pairs)
    found = f"the search met more than one local minimum, paths between other ends included, for {of(several, pairs, 'pair')}"
    if not left:
        what = "The path is" if len(pairs) == 1 else f"All {len(pairs)} paths are"
        return f"{what} stationary (converged); {found}. Stationary does not mean globally cheapest."
    worst = max(pair["residual"] for pair in left)
    names = ", ".join(f"{pair['a']['name']} to {pair['b']['name']}" for pair in left[:5]) + (", ..." if len(left) > 5 else "")
    return f"Not converged: {of(len(left), pairs, 'pair')} ({names}), with a residual up to {worst:.2g}: cheaper paths may be near; {found}."


def say_ends(pairs: Sequence[Mapping[str, Any]]) -> str:
    """How far from the images do the paths begin and end?"""
    ends = [pair[end] for pair in pairs for end in ("a", "b")]
    shares = [end["share"] for end in ends]
    other = sum(not end["is_best"] for end in ends)
    uncertified = sum(not Kind[end["kind"].upper()].is_minimum for end in ends)
    said = f"The ends are inverted codes, not the images: their squared errors are {percent(min(shares), 1)} to {percent(max(shares), 1)} of Dist^2"
    said += f"; {count(other, 'end')} of {len(ends)} took another minimum than the best code, from which the path was cheaper" if other else ""
    are, what = ("is", "a local minimum") if uncertified == 1 else ("are", "local minima")
    said += f"; {uncertified} of {len(ends)} {are} not certified as {what}" if uncertified else ""
    return f"{said}."


def middle(pairs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """A value, or the median of several with its word."""
    value = median(pair[key] for pair in pairs)
    return f"{value:{form}}" + (" (median)" if len(pairs) > 1 else "")
