"""2d: the cheapest path between two inverted codes, and what no path can undercut."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from periplus import metrics, pictures, plots
from periplus.data import ImageData
from periplus.errors import UsageError
from periplus.locating import Search, Targets, locate
from periplus.passages import (
    CURVES,
    Pair,
    Passages,
    along,
    chosen_pairs,
    cost_along,
    passage_record,
    price,
    say_convergence,
    say_ends,
)
from periplus.paths import Path as Found
from periplus.paths import minimal_path
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table, plain
from periplus.runs import Run
from periplus.study.chapters.inversion import FEW_STARTS, MODEL, run_path, typeset
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import counted, number
from periplus.study.workshop import Workshop

PAIRS, STARTS, SEGMENTS = 20, 8, 64
#: Pairs on which the solver's choices are tried: nodes, the other norm, the search, other ends.
TRIED = 6
COARSER = (8, 16, 32)
ALTERNATIVES = 3
SHOWN, FRAMES, PLACES = 3, 9, 97
STRIP_WIDTH = 0.85
#: What an even cross-fade of pixels along the line would score, with exact ends.
FADE = 4 / 3
#: A path costs as much as the line when it does to within this part.
WORTH = 1e-3
NAMES = {"line": "straight line", "spherical": "spherical", "path": "cheapest path found"}


# ---- measuring ------------------------------------------------------------------------------------------------------------------------------


def measure(workshop: Workshop) -> Results:
    """The first pairs of test images in the runs of all seeds; in the first, what the solver's choices matter, and a few paths to look at."""
    search = Search(STARTS, keep="best")  # of each image the best code, not all minima
    runs, first, cells = [], None, workshop.of(MODEL)
    for cell, run in cells:
        targets, pairs = pairs_of(workshop.splits(run)[1])
        passages = price(run, targets, pairs, search, segments=SEGMENTS, alternatives=1)
        record = passage_record(run, passages, search, segments=SEGMENTS, norm="length", alternatives=1)
        for name in ("run", "statements"):
            del record[name]
        first = first or (run, passages, record)
        runs.append({"name": cell.name, "seed": cell.seed, **scores_of(record)})
        workshop.progress(len(runs), len(cells) + 2)  # what follows takes about as long as two of these
    assert first is not None
    run, passages, record = first
    return {
        "model": MODEL,
        "config": {k: v for k, v in dataclasses.asdict(run.config).items() if k != "seed" and v is not None},
        "runs": runs,
        "record": record,
        "choices": choices(run, passages),
        "shown": shown(run, passages),
    }


def pairs_of(data: ImageData) -> tuple[Targets, list[Pair]]:
    """The first pairs of neighbours in a split, (0, 1), (2, 3), ..., each image in one pair; equal images make none."""
    neighbours = [(k, k + 1) for k in range(0, len(data) - 1, 2)]
    different = [(a, b) for a, b in neighbours if not bool((data.images[a] == data.images[b]).all())][:PAIRS]
    if not different:
        raise UsageError(f"{data.name} ({data.split}) has no pair of different images: a path needs two")
    return chosen_pairs(data, different)


def scores_of(record: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the pairs of every seed: scores of the curves, the bound's, and whether the path converged."""
    pairs = usable(record)
    return {
        "line": [pair["straight_score"] for pair in pairs],
        "spherical": [pair["spherical_score"] for pair in pairs],
        "path": [pair["score"] for pair in pairs],
        "bound": [pair["lower_bound"] / pair["floor"] for pair in pairs],
        "converged": sum(pair["converged"] for pair in pairs),
    }


def usable(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs whose codes differ."""
    return [pair for pair in record["pairs"] if pair["distance"] > 0]


def choices(run: Run, passages: Passages) -> dict[str, Any]:
    """On a few pairs: fewer nodes, the norm squared, only downhill from the line, several inversions to choose the ends from."""
    tried = [k for k in range(len(passages.pairs)) if float(passages.path.distance[k]) > 0][:TRIED]
    if not tried:
        return {"pairs": 0}
    path, pairs = passages.path, [passages.pairs[k] for k in tried]

    def again(**options: Any) -> Found:
        fixed: dict[str, Any] = {"inversion": passages.inversion, "alternatives": 1, "segments": SEGMENTS}
        return price(run, passages.targets, pairs, **(fixed | options)).path

    a, b = path.points[tried, 0], path.points[tried, -1]
    x_a, x_b = (passages.images(end)[tried].to(a) for end in (0, 1))
    told = {
        "pairs": len(tried),
        "line": (path.straight_cost / path.floor)[tried].tolist(),
        "segments": {str(n): again(segments=n).score.tolist() for n in COARSER} | {str(SEGMENTS): path.score[tried].tolist()},
        "energy": again(norm="energy").score.tolist(),
        "downhill": minimal_path(run.decode, a, b, x_a, x_b, SEGMENTS, everywhere=False).score.tolist(),
    }
    ends = sorted({row for pair in pairs for row in pair})
    targets, pairs = passages.targets.at(ends), [(ends.index(a), ends.index(b)) for a, b in pairs]
    found = locate(run, targets, Search(FEW_STARTS))  # all their minima this time
    one, several = (price(run, targets, pairs, inversion=found, segments=SEGMENTS, alternatives=n).path.cost.tolist() for n in (1, ALTERNATIVES))
    return {**told, "one": one, "several": several, "alternatives": ALTERNATIVES}


def shown(run: Run, passages: Passages) -> list[dict[str, Any]]:
    """A few pairs to look at: codes at equal steps along each curve, and the cost along it."""
    costs = {curve: cost_along(run, passages, curve, PLACES) for curve in CURVES}
    frames = {curve: along(passages.points(curve), FRAMES)[0] for curve in CURVES}
    return [
        {
            "pair": k,
            "codes": {curve: [[round(value, 6) for value in z] for z in frames[curve][k].tolist()] for curve in CURVES},
            "cost": {curve: [round(value, 6) for value in costs[curve][0][k].tolist()] for curve in CURVES},
            "length": {curve: [round(value, 6) for value in costs[curve][1][k].tolist()] for curve in CURVES},
        }
        for k in range(min(SHOWN, len(passages.pairs)))
    ]


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw(results: Results, workshop: Workshop) -> Figures:
    """Morph strips, the cost along the paths, the scores of all pairs."""
    again, pairs = workshop.again("2d"), results["record"]["pairs"]
    figures = {
        f"strip-{k}": {"path": draw_strip(example, pairs[example["pair"]], workshop), "command": again} for k, example in enumerate(results["shown"])
    }
    panels = [
        {
            "x_label": f"length, {ends_of(pairs[example['pair']])}",
            "y_label": "c / Dist²" if k == 0 else "",
            "curves": [{"label": NAMES[c], "x": example["length"][c], "y": example["cost"][c], "plain": True} for c in CURVES],
            "levels": [{"label": "lowest cost that a place can have", "y": 0.5}],
        }
        for k, example in enumerate(results["shown"])
    ]
    path = Path("figures") / "2d-cost.svg"
    plots.lines(panels, workshop.folder / path, height=2.6, columns=4)
    figures["cost"] = {"path": str(path), "command": again}
    if told := results["runs"][0]["line"]:
        path = Path("figures") / "2d-scores.svg"
        groups = [{"label": NAMES[c], "y": results["runs"][0][c]} for c in CURVES]
        plots.paired_dots(
            groups, workshop.folder / path, f"the {len(told)} pairs, by the line's score", "score Ũ", {"cross-fade": FADE, "floor": 1.0}
        )
        figures["scores"] = {"path": str(path), "command": again}
    return figures


def draw_strip(example: dict[str, Any], pair: dict[str, Any], workshop: Workshop) -> str:
    """One pair: the images at both ends, what is decoded along the three curves between them."""
    run = workshop.of(MODEL)[0][1]
    images = workshop.splits(run)[1].images
    with torch.no_grad():
        curves = [run.decode(torch.tensor(example["codes"][curve])).clamp(0, 1) for curve in CURVES]
    path = Path("figures") / f"2d-strip-{example['pair']}.png"
    start, end = (images[pair[name]["index"]].float() / 255 for name in ("a", "b"))
    pictures.morph_strip(start, curves, end, workshop.folder / path, ["line", "spherical", "path"])
    return str(path)


def ends_of(pair: dict[str, Any]) -> str:
    """A pair by the positions of its images."""
    return f"{pair['a']['index']} to {pair['b']['index']}"


# ---- telling --------------------------------------------------------------------------------------------------------------------------------


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    record, figures = results["record"], results["figures"]
    again = figures["cost"]["command"]
    return (
        Heading("What is asked"),
        Paragraph(
            "Two images $x_A$ and $x_B$ have been inverted to codes $z_A$ and $z_B$. Every place $z$ costs as much as its image differs from both, "
            "$c(z)$. Among all paths $Z$ from one code to the other, which one costs least?"
        ),
        Equation(
            "U(Z) = integral_0^1 c(Z(t)) norm(Z'(t)) dif t, quad c(z) = norm(G(z) - x_A)^2 + norm(G(z) - x_B)^2, quad Z(0) = z_A, Z(1) = z_B.",
            "functional",
        ),
        Paragraph(
            "(A relative are the shortest paths in the metric that $G$ pulls back [@arvanitidis2018]; their cost does not know the two images.) Let "
            '$M = (x_A + x_B) \\/ 2$, $"Dist" = norm(x_A - x_B)$ and $l = norm(z_A - z_B)$. Because $x_A = M + (x_A - x_B) \\/ 2$ and $x_B = M - '
            "(x_A - x_B) \\/ 2$, the mixed terms of the two squares cancel:"
        ),
        Equation(
            'c(z) = 2 norm(G(z) - M)^2 + 1/2 "Dist"^2, quad "so" quad U(Z) >= 1/2 "Dist"^2 l, quad tilde(U) = U / (1/2 "Dist"^2 l) >= 1.', "floor"
        ),
        Paragraph(
            'The cheapest possible place shows the mean of the two images, and even this costs $1/2 "Dist"^2$; and no path is shorter than the '
            "line. The score $tilde(U)$ has no unit. Two examples, with exact ends: a generator that cross-fades the pixels evenly along the line, "
            '$G = x_A + t (x_B - x_A)$, has $c = (t^2 + (1 - t)^2) "Dist"^2$ and scores $4\\/3$; one that stays at $x_A$ and jumps to $x_B$ scores '
            "2."
        ),
        Heading("Two readings of the norm, one problem"),
        Paragraph(
            "The norm in $U$ can be read as it stands. $U$ is then a line integral, which does not depend on the speed of the path. Or it can be "
            "meant squared; $U$ is then an energy, which does. Both readings are minimisations of the same functional $E$, with two weights $w$. By "
            "the inequality of Cauchy and Schwarz,"
        ),
        Equation("(integral_0^1 c norm(Z') dif t)^2 <= E(Z) = integral_0^1 w(Z) norm(Z')^2 dif t, quad w = c^2,", "energy"),
        Paragraph(
            "with equality where $c norm(Z')$ is constant in time. Every path can be run through at such a speed, so $min U = sqrt(min E)$, and the "
            "path is the same. The squared reading is $E$ with $w = c$ instead, and its minimum is $min E$ itself. This study reads the norm as it "
            "stands; below the squared reading is computed as well. In both cases the *energy* is what is discretised. A discrete length does not "
            "determine where along the curve its nodes are: its Hessian is singular, the nodes gather where it is cheap, and the sum jumps over "
            "what is dear between them. The energy spreads the nodes so that every step costs the same. With nodes $Z_0, ..., Z_N$, steps $d_i = "
            "Z_(i+1) - Z_i$ and $overline(w)_i = (w_i + w_(i+1)) \\/ 2$,"
        ),
        Equation("E_h = N sum_(i=0)^(N-1) overline(w)_i norm(d_i)^2,", "discrete"),
        Equation(
            "g_i = (partial E_h) / (partial Z_i) = 2 N (overline(w)_(i-1) d_(i-1) - overline(w)_i d_i) + s_i, quad "
            "s_i = N / 2 nabla w_i (norm(d_(i-1))^2 + norm(d_i)^2), quad nabla c = 4 J^top (G - M),",
            "path-gradient",
        ),
        Paragraph(
            "where $J$ is the Jacobian of $G$, so that $J^top (G - M)$ is one backward pass through the generator. (Near a kink of $G$ the gradient "
            "jumps. Where this disturbs, the solver puts further points into every segment.)"
        ),
        Heading("The solver"),
        Paragraph(
            "If $overline(w)$ is held fixed, the Hessian $H$ of $E_h$ is $2 N$ times the Laplacian of a chain with weights $overline(w)_i$. The "
            "equation $H u = q$ with $u = 0$ at both ends is solved by two cumulative sums, in $O(N d)$: first the flow through each segment, then "
            "the potential. For $q_1, ..., q_(N-1)$ and $Q_0 = 0$,"
        ),
        Equation(
            "Q_i = q_1 + ... + q_i, quad p = (sum_i Q_i \\/ overline(w)_i) / (sum_i 1 \\/ overline(w)_i), quad "
            "(H^(-1) q)_i = sum_(j < i) (p - Q_j) / (2 N overline(w)_j).",
            "precondition",
        ),
        Paragraph(
            "where $p$ is chosen such that the last node stays where it is. This $H^(-1)$ is the initial matrix of L-BFGS [@nocedal2006]. It "
            "measures steps in the metric of the path, so that the number of iterations does not grow with the number of nodes. The residual, "
            "$sqrt(g^top H^(-1) g \\/ 2 E)$, has no unit; a path has *converged* when it is at most $10^(-3)$."
        ),
        Pseudocode(
            "Cheapest paths, many pairs side by side",
            (
                '*divide* $c$ by $"Dist"^2$: what is accepted must not depend on its scale',
                "*begin* with 8 segments: the line; the spherical arc; bows through the cheapest of 96 places halfway; bows",
                "  through the place where descent on $c$ from there ends; for $d <= 8$ a walk over a graph of 3,000 places;",
                '  all inside $norm(z - z_A) + norm(z - z_B) <= 2 U_"line" \\/ "Dist"^2$: a path that leaves it is dearer than the line',
                "*for* $N = 8, 16, 32, 64$; the best two different paths of a pair go on to 16, the best one further",
                "  *repeat* until the residual is small",
                "    $c, nabla c$ at all points of all paths: one pass of $G$, forward and backward",
                "    $p <- -$ L-BFGS direction, from the last 10 differences and $H^(-1)$",
                "    *shorten* $t$ until $E_h (Z + t p) <= E_h (Z) + 10^(-4) t g^top p$; $Z <- Z + t p$",
                "  *halve* the segments",
                "where the residual stays large: *repeat* with 4, then 8 points to a segment",
                "*measure* $U$ of the polyline by Simpson's rule, points doubled until it changes by less than $10^(-4)$",
            ),
            label="path-code",
        ),
        Heading("What no path can undercut"),
        Paragraph(
            'The floor $1/2 "Dist"^2 l$ is a lower bound, but a poor one where the generator cannot make the image $M$. A better one uses a '
            "Lipschitz constant $L$ of $G$ that holds everywhere. Along a path of length $S >= l$ the distance $r = norm(G - M)$ changes by at most "
            "$L$ per unit of length. From $r_A$ and $r_B$ at its ends it can fall no faster than $r(a) >= max(r_A - L a, r_B - L (S - a), 0)$, with "
            "$a$ the length from $z_A$. The integral of $2 r^2$ over this profile, added to the floor, grows with $S$, so that $S = l$ gives"
        ),
        Equation('U(Z) >= 1/2 "Dist"^2 l + 2 / (3 L) (r_A^3 + r_B^3 - 2 rho^3), quad rho = max(0, (r_A + r_B - L l) \\/ 2).', "lipschitz"),
        Paragraph(lipschitz_sentence(record)),
        Heading("What was found"),
        *strips(results),
        Figure(
            figures["cost"]["path"],
            "The cost of the places along the three curves of these pairs, against the length from $z_A$. The area under a curve is its $U \\/ "
            '"Dist"^2$.',
            figures["cost"]["command"],
            "Cost along line, spherical interpolation and path",
            label="path-cost",
        ),
        *scores_figure(results),
        pair_table(results, again),
        seed_table(results, again),
        *choices_blocks(results, again),
        Paragraph("The same search from the command line, with certificates of the ends:"),
        Command(f"periplus path {run_path(results)} --n {len(record['pairs'])} --starts {record['search']['starts']} --alternatives 1"),
        Finding(conclusion(results)),
    )


def lipschitz_sentence(record: dict[str, Any]) -> str:
    """The constant, and what it is worth."""
    if record["lipschitz"] is None:
        return "For this generator no constant is certified, and the largest slope over samples would be none. So the floor is the bound."
    pairs = usable(record)
    told = f", and lifts the floor by {100 * fmean(p['lower_bound'] / p['floor'] - 1 for p in pairs):.2f} % on average" if pairs else ""
    return (
        "The largest slope over samples is no such constant. One is certified from the weights alone: by norms of products of consecutive matrices, "
        f"cut where a rectifier may change its slope. It is $L = {number(record['lipschitz'], 4)}$ here{told}."
    )


def strips(results: Results) -> tuple[Block, ...]:
    """The pairs to look at."""
    pairs = results["record"]["pairs"]
    blocks = []
    for k, example in enumerate(results["shown"]):
        pair, drawn = pairs[example["pair"]], results["figures"][f"strip-{k}"]
        scores = (
            f": $tilde(U)$ = {pair['straight_score']:.2f} for the line, {pair['spherical_score']:.2f} for spherical interpolation, "
            f"{pair['score']:.2f} for the path"
            if pair["distance"] > 0
            else ""
        )
        ends = ends_of(pair).replace(" to ", " to test image ")
        caption = f"From test image {ends}, at equal steps of length{scores}. The outermost columns are the images themselves."
        blocks.append(Figure(drawn["path"], caption, drawn["command"], "Images along line, spherical interpolation and cheapest path", STRIP_WIDTH))
    return tuple(blocks)


def scores_figure(results: Results) -> tuple[Block, ...]:
    """All pairs, where there are any whose codes differ."""
    if "scores" not in results["figures"]:
        return ()
    return (
        Figure(
            results["figures"]["scores"]["path"],
            f"Scores of all pairs in {plain(results['runs'][0]['name'])}, in the order of the score of the line.",
            results["figures"]["scores"]["command"],
            "Scores of line, spherical interpolation and path for every pair",
            label="path-scores",
        ),
    )


def pair_table(results: Results, command: str) -> Table:
    """Pair by pair."""
    rows = tuple(
        (
            ends_of(pair),
            f"{pair['distance']:.2f}",
            f"{pair['image_distance']:.1f}",
            f"{pair['straight_cost']:.1f}",
            f"{pair['spherical_cost']:.1f}",
            f"{pair['cost']:.1f}",
            f"{pair['lower_bound']:.1f}",
            "-" if pair["gap"] is None else f"{100 * pair['gap']:.1f} %",
            "-" if pair["score"] is None else f"{pair['score']:.3f}",
            str(pair["minima"]),
            pair["start"] + ("" if pair["converged"] else " (not converged)"),
        )
        for pair in results["record"]["pairs"]
    )
    record = results["record"]
    return Table(
        ("images", "l", "Dist²", "U, line", "U, spherical", "U, path", "bound", "gap", "Ũ, path", "minima", "began as"),
        rows,
        f"The pairs of test images in {plain(results['runs'][0]['name'])}. l: distance of the codes. Dist²: squared distance of the images, summed "
        "over pixels in [0, 1]. U: cost of the three curves (that of the path to a relative error of at most "
        f"{number(max(p['quadrature_error'] for p in record['pairs']), 1)}). Bound: the better of the two lower bounds; gap: by how much the path "
        "is above it. Minima: different local minima that the search met with 8 segments. Began as: the beginning that led to the path. N = "
        f"{record['segments']} segments.",
        command,
        align=("left", *("decimal",) * 8, "right", "left"),
        label="pairs",
    )


def mean_and_interval(values: Sequence[float]) -> str:
    """A mean with its 95 % interval over pairs."""
    if not values:
        return "-"
    low, high = metrics.mean_interval(values)
    return f"{fmean(values):.3f} ({fixed(low)} to {fixed(high)})"


def fixed(value: float) -> str:
    """An end of an interval with three digits after the point."""
    return f"{value:.3f}" if math.isfinite(value) else number(value)


def ratios(run: dict[str, Any]) -> list[float]:
    """U of the path over that of the line, pair by pair."""
    return [path / line for path, line in zip(run["path"], run["line"], strict=True)]


def seed_table(results: Results, command: str) -> Table:
    """Every seed's generator."""
    rows = tuple(
        (
            str(run["seed"]),
            str(len(run["path"])),
            *(mean_and_interval(run[curve]) for curve in CURVES),
            mean_and_interval(ratios(run)),
            f"{run['converged']} of {len(run['path'])}",
        )
        for run in results["runs"]
    )
    return Table(
        ("seed", "pairs", "Ũ, line", "Ũ, spherical", "Ũ, path", "path / line", "converged"),
        rows,
        "Means over pairs with Student's 95 % intervals over pairs, for the generator of each seed. Every image is in one pair. The pairs are the "
        "same for all seeds, their codes are not.",
        command,
        align=("right", "right", *("decimal",) * 4, "left"),
        label="path-seeds",
    )


def choices_blocks(results: Results, command: str) -> tuple[Block, ...]:
    """What the solver's choices matter."""
    told = results["choices"]
    if not told["pairs"]:
        return ()
    segments = sorted(told["segments"], key=int)
    finest = told["segments"][segments[-1]]
    rows = []
    before: list[float] | None = None
    for name in segments:
        values = told["segments"][name]
        change = None if before is None else fmean(abs(a - b) for a, b in zip(values, before, strict=True))
        rows.append((f"N = {name}", f"{fmean(values):.4f}", "-" if change is None else f"{change:.4f}", gone(values, finest)))
        before = values
    rows.append(("descent from the line alone", f"{fmean(told['downhill']):.4f}", "-", gone(told["downhill"], finest)))
    rows.append(("norm squared", f"{fmean(told['energy']):.4f}", "-", "-"))
    return (
        Heading("What the choices change"),
        Paragraph(
            f"The first {told['pairs']} pairs were priced again: with fewer segments, by descent from the line alone, and with the norm squared, "
            'for which the floor is $1/2 "Dist"^2 l^2$ (at constant speed the line has the same score in both readings).'
        ),
        Table(
            ("choice", "mean score", "change from the row above", "against N = " + segments[-1]),
            tuple(rows),
            "Mean scores of the cheapest paths found for these pairs. Change: mean of the absolute differences from the row above. Last column: how "
            "much dearer the paths are than the finest ones.",
            command,
            align=("left", "decimal", "decimal", "decimal"),
            label="choices",
        ),
        Paragraph(choices_sentence(told)),
    )


def gone(values: Sequence[float], finest: Sequence[float]) -> str:
    """How much dearer, on average, in per cent."""
    return f"{100 * (fmean(a / b for a, b in zip(values, finest, strict=True)) - 1):+.2f} %".replace("-0.00", "+0.00")


def choices_sentence(told: dict[str, Any]) -> str:
    """Order of the discretisation, worth of the search, worth of other ends."""
    segments = sorted(told["segments"], key=int)
    changes = [
        fmean(abs(a - b) for a, b in zip(told["segments"][m], told["segments"][n], strict=True)) for m, n in zip(segments, segments[1:], strict=False)
    ]
    parts = []
    if len(changes) > 1 and all(change > 0 for change in changes):
        shrinks = [a / b for a, b in zip(changes, changes[1:], strict=False)]
        parts.append(
            f"When the segments are halved, the change shrinks by a factor of {' and '.join(number(s, 2) for s in shrinks)}. For a smooth generator "
            "it would be 4 (order $h^2$); kinks make it uneven."
        )
    downhill, finest = told["downhill"], told["segments"][segments[-1]]
    better = sum(a > b * (1 + WORTH) for a, b in zip(downhill, finest, strict=True))
    found = f"The search from other beginnings found a cheaper path than descent from the line alone for {better} of {told['pairs']} pairs"
    parts.append(f"{found}{f'; without it paths would be {gone(downhill, finest)} dearer on average' if better else ''}.")
    if told["line"]:
        saved = [100 * (1 - fmean(a / b for a, b in zip(values, told["line"], strict=True))) for values in (finest, told["energy"])]
        parts.append(f"In the squared reading the path saves {saved[1]:.1f} % of the cost of the line, in the length reading {saved[0]:.1f} %.")
    if told["several"]:
        ends = fmean(a / b for a, b in zip(told["several"], told["one"], strict=True)) - 1
        free = f"If a path may end at any of up to {told['alternatives']} certified minima of each image, it is"
        parts.append(
            f"{free} {100 * -ends:.1f} % cheaper in $U$ on average." if ends < -WORTH else f"{free} not cheaper on average ({100 * ends:+.1f} %)."
        )
    return " ".join(parts)


def saving_sentence(run: dict[str, Any]) -> str:
    """How much cheaper than the line: the mean ratio, with its interval over pairs."""
    found = ratios(run)
    low, high = metrics.mean_interval(found)
    cheaper, dearer = sum(r < 1 - WORTH for r in found), sum(r > 1 + WORTH for r in found)
    interval = f"mean ratio {number(fmean(found))}, 95 % interval over {counted(len(found), 'pair')} {number(low)} to {number(high)}"
    scores = f"The mean score $tilde(U)$ is {number(fmean(run['path']))}, that of the line {number(fmean(run['line']))}"
    count = f"it is cheaper for {cheaper}" + (f" and dearer for {dearer}" if dearer else "")
    return f"The path found is {saved(run)} ({interval}); {count} of {len(found)} pairs. {scores}; the floor is 1, a cross-fade has $4\\/3$."


def saved(run: dict[str, Any]) -> str:
    """Whether the path is cheaper than the line, on average over pairs, and by how much."""
    found = ratios(run)
    low, high = metrics.mean_interval(found)
    if low > 1 - WORTH and high < 1 + WORTH:
        return f"as dear as the straight line, to within {100 * WORTH:g} % on average"
    if high < 1:
        return f"cheaper than the straight line, by {100 * (1 - fmean(found)):.1f} % on average"
    if low > 1:
        return f"*dearer* than the straight line, by {100 * (fmean(found) - 1):.1f} % on average"
    return "*not told apart* from the straight line"


def fade_sentence(run: dict[str, Any]) -> str:
    """The path against what a cross-fade of pixels would score."""
    above, count = sum(score > FADE for score in run["path"]), len(run["path"])
    return f"For {above} of {counted(count, 'pair')} the path scores more than the $4\\/3$ of an even cross-fade of pixels with exact ends."


def spherical_sentence(run: dict[str, Any]) -> str:
    """Spherical interpolation against the line."""
    found = [a / b for a, b in zip(run["spherical"], run["line"], strict=True)]
    low, high = metrics.mean_interval(found)
    verdict = "dearer than the line" if low > 1 else "cheaper than the line" if high < 1 else "not told apart from the line"
    return f"Spherical interpolation is {verdict} (mean ratio {number(fmean(found))}, {number(low)} to {number(high)})."


def winners_sentence(pairs: Sequence[dict[str, Any]]) -> str:
    """Where the winning beginnings were."""
    won = Counter(pair["start"] for pair in pairs).most_common()
    listed = ", ".join(f"{name} {count}" for name, count in won)
    alike = " All beginnings of a pair led to the same minimum, so which one came first means little." if all(p["minima"] == 1 for p in pairs) else ""
    return f"The best path of a pair began as: {listed}.{alike}"


def left_open(pairs: Sequence[dict[str, Any]]) -> str:
    """What the gap does not exclude."""
    gaps = [pair["gap"] for pair in pairs]
    mean, most = fmean(gaps), max(gaps)
    return (
        f"The mean gap to the lower bound is {100 * mean:.0f} %. Between the same codes a path that is {100 * mean / (1 + mean):.0f} % cheaper is "
        f"therefore not excluded ({100 * most / (1 + most):.0f} % for the pair of the largest gap). It is not made likely either: the bounds "
        "suppose that the generator can make the mean of the two images, or nearly."
    )


def headline(results: Results) -> str:
    """The answer, short."""
    pairs = usable(results["record"])
    if not pairs:
        return "The images of every pair have the same code: there is no path to price."
    first, gap = results["runs"][0], fmean(pair["gap"] for pair in pairs)
    cheaper = sum(ratio < 1 - WORTH for ratio in ratios(first))
    return (
        f"The path found is {saved(first)}; it is cheaper for {cheaper} of {counted(len(ratios(first)), 'pair')}. A path that is "
        f"{100 * gap / (1 + gap):.0f} % cheaper still is not excluded by the lower bound."
    )


def conclusion(results: Results) -> str:
    """How much cheaper, in every seed; from where; the gap and what it leaves open; what did not converge; the ends."""
    pairs = usable(results["record"])
    if not pairs:
        return headline(results)
    first = results["runs"][0]
    parts = [f"{saving_sentence(first)} {fade_sentence(first)}", spherical_sentence(first)]
    if len(results["runs"]) > 1:
        told = ", ".join(f"{fixed(fmean(ratios(run)))} (seed {run['seed']})" for run in results["runs"] if run["path"])
        parts.append(f"The mean ratios of path and line in the generators of all seeds: {told}.")
    parts += [
        f"{winners_sentence(pairs)} {typeset(say_convergence(pairs))}",
        left_open(pairs),
        typeset(say_ends(pairs)),
    ]
    return "\n".join(parts)


QUESTION = Question(
    "2d",
    "Cheapest paths",
    "Describe, in words and in pseudocode, how to find a discretised path of least cost between two inverted codes, and implement it. How much "
    "cheaper is it than the straight line, and could there be a cheaper one?",
    (MODEL,),
    measure,
    draw,
    tell,
)
