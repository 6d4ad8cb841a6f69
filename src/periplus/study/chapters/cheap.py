"""2e: training so that the cheapest path is cheap, judged on pairs that training never saw."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from periplus import metrics, pictures, plots
from periplus.data import ImageData
from periplus.features import JUDGES, Extractor, extractor_for, random_extractor
from periplus.locating import Search
from periplus.passages import along, chosen_pairs, price
from periplus.path_judge import judge_paths
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table
from periplus.runs import Run
from periplus.study.chapters.inversion import MODEL
from periplus.study.chapters.paths import STRIP_WIDTH
from periplus.study.question import Figures, Question, Results
from periplus.study.settings import Variant
from periplus.study.telling import number
from periplus.study.workshop import Workshop
from periplus.training.path_term import EVERY, NEAREST, PATH_STEPS
from periplus.training.path_term import PAIRS as PAIRS_OF_VISIT
from periplus.training.path_term import SEGMENTS as PATH_SEGMENTS

PAIRS, STARTS, SEGMENTS, SHOWN, FRAMES = 8, 4, 16, 3, 9
WEIGHTS = (0.5, 2.0)
#: Five trainings for one question: each of a part of the other chapters' epochs.
SHORTER = 4
#: What is kept of a judgement, beside the scores.
KEPT = ("excess", "straight_excess", "gap", "end_error", "squared_error", "jump", "converged", "realism")
#: Samples whose distance to training images is taken, at most.
SAMPLES = 10_000
PLAIN, OBJECTIVES = "plain", ("straight", "least")
NAMES = {"straight": "straight-line surrogate", "least": "least-cost objective"}


def name_of(objective: str, weight: float) -> str:
    """What a training is called: in results, below variants/, in tables."""
    return f"{objective}-{weight:g}"


TRAININGS: tuple[str, ...] = (PLAIN, *(name_of(objective, weight) for weight in WEIGHTS for objective in OBJECTIVES))
#: Those whose paths are shown, and whose pairs are drawn one by one.
SHOWN_TRAININGS = (PLAIN, *(name_of(objective, WEIGHTS[-1]) for objective in OBJECTIVES))


def variants() -> tuple[Variant, ...]:
    """Every training as a job of the study."""
    found = [Variant(f"cheap-{PLAIN}", MODEL, (), SHORTER)]
    for weight in WEIGHTS:
        for objective in OBJECTIVES:
            options = ("--path-weight", f"{weight:g}", "--path-objective", objective)
            found.append(Variant(f"cheap-{name_of(objective, weight)}", MODEL, options, SHORTER))
    return tuple(found)


# ---- measuring ------------------------------------------------------------------------------------------------------------------------------


def measure(workshop: Workshop) -> Results:
    """The first seed's configuration trained in five ways, each judged on the same held-out pairs, its samples by their distance to real images."""
    of_model = workshop.of(MODEL)
    first = of_model[0][1]
    train, test = workshop.splits(first)
    eyes, pairs = eyes_of(test), min(PAIRS, len(test) // 4)
    count = min(SAMPLES, len(train) // 2)
    real = eyes(train.images[:count]), eyes(train.images[count : 2 * count])
    judged: Results = {}
    for name in TRAININGS:
        run = run_of(workshop, name)
        record = judge_paths(run, test, pairs, Search(STARTS, keep="best"), segments=SEGMENTS, extractor=eyes)
        judged[name] = {key: record[key] for key in KEPT}
        judged[name]["scores"] = [pair["score"] for pair in record["pairs"]]
        found = metrics.frechet_distance(real[0], eyes(run.sample(count)))
        judged[name]["frechet"] = {"value": found.value, "low": found.low, "high": found.high}
        workshop.progress(len(judged), len(TRAININGS) + 1)
    return {
        "model": MODEL,
        "first": {"epochs": first.config.epochs, "seeds": len(of_model)},
        "weights": list(WEIGHTS),
        "epochs": run_of(workshop, PLAIN).config.epochs,
        "pairs": pairs,
        "starts": STARTS,
        "segments": SEGMENTS,
        "samples": count,
        "extractor": eyes.record(),
        "frechet_floor": metrics.frechet_distance(*real).value,
        "judged": judged,
        "shown": {name: strips(run_of(workshop, name), test, min(SHOWN, pairs)) for name in SHOWN_TRAININGS},
    }


def run_of(workshop: Workshop, name: str) -> Run:
    """The run of a training."""
    return workshop.of(f"cheap-{name}")[0][1]


def eyes_of(data: ImageData) -> Extractor:
    """The feature network that comes with the package where it fits these data, else one with random weights: none is trained for a chapter."""
    return extractor_for(data) if (data.source or data.name) in JUDGES else random_extractor(data.shape[0])


def strips(run: Run, data: ImageData, count: int) -> list[list[list[float]]]:
    """Codes at equal steps of the cheapest paths of the first pairs, (count, FRAMES, d)."""
    targets, pairs = chosen_pairs(data, [(2 * k, 2 * k + 1) for k in range(count)])
    passages = price(run, targets, pairs, Search(STARTS, keep="best"), segments=SEGMENTS, alternatives=1)
    codes = along(passages.points("path"), FRAMES)[0]
    return [[[round(value, 6) for value in z] for z in path] for path in codes.tolist()]


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw(results: Results, workshop: Workshop) -> Figures:
    """Morphs before and after, the scores of all pairs, and what a cheaper path costs in samples."""
    again = workshop.again("2e")
    runs = {name: run_of(workshop, name) for name in SHOWN_TRAININGS}
    test = workshop.splits(workshop.of(MODEL)[0][1])[1]
    figures = {}
    for k in range(len(results["shown"][PLAIN])):
        with torch.no_grad():
            curves = [run.decode(torch.tensor(results["shown"][name][k])).clamp(0, 1) for name, run in runs.items()]
        path = Path("figures") / f"2e-strip-{k}.png"
        start, end = (test.images[2 * k + side].float() / 255 for side in (0, 1))
        pictures.morph_strip(start, curves, end, workshop.folder / path, [name.split("-")[0] for name in runs])
        figures[f"strip-{k}"] = {"path": str(path), "command": again}
    path = Path("figures") / "2e-scores.svg"
    groups = [{"label": title_of(name), "y": results["judged"][name]["scores"]} for name in SHOWN_TRAININGS]
    plots.paired_dots(
        groups, workshop.folder / path, f"the {results['pairs']} pairs, by the plain score", "score Ũ", {"cross-fade": 4 / 3, "floor": 1.0}
    )
    figures["scores"] = {"path": str(path), "command": again}
    path = Path("figures") / "2e-trade-off.svg"
    plots.trade_off(curves_of(results), workshop.folder / path, "Fréchet distance of samples", "excess of Ũ, held-out pairs")
    return figures | {"trade-off": {"path": str(path), "command": again}}


def curves_of(results: Results) -> list[dict[str, Any]]:
    """The trade-off: from the plain training along the weights of each objective."""
    found = []
    for objective in reversed(OBJECTIVES):
        names = [PLAIN, *(name_of(objective, weight) for weight in results["weights"])]
        rows = [results["judged"][name] for name in names]
        found.append(
            {
                "label": NAMES[objective],
                "x": [row["frechet"]["value"] for row in rows],
                "y": [row["excess"]["mean"] for row in rows],
                "errors": [half_interval([score - 1 for score in row["scores"]]) for row in rows],
                "words": [PLAIN if objective == "least" else "", *(f"λ = {weight:g}" for weight in results["weights"])],
            }
        )
    return found


def half_interval(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of a mean; 0 of one value, which has none."""
    low, high = metrics.mean_interval(values)
    return (high - low) / 2 if math.isfinite(low) else 0.0


def title_of(name: str) -> str:
    """A training in words: "least-cost objective, λ = 2"."""
    objective, _, weight = name.partition("-")
    return f"{NAMES[objective]}, λ = {weight}" if weight else name


# ---- telling --------------------------------------------------------------------------------------------------------------------------------


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    again = results["figures"]["scores"]["command"]
    return (
        Heading("What can be changed"),
        Paragraph(
            "Between two codes the least cost is a property of the generator. So the generator is asked, while it learns, to make the least-cost "
            "paths between its own images cheap; of these images the codes are known. Let $Z^*$ be the cheapest path found, and $tilde(U)(Z^*) = "
            f'U(Z^*) \\/ (1/2 "Dist"^2 l) >= 1$ its score. This study calls $tilde(U) - 1$ the *excess*. At every {EVERY}th step of the generator '
            "its loss is"
        ),
        Equation(
            f"L = L_G + {EVERY} lambda thin EE[tilde(U)(Z^*)] - EE_t [D(G(Z^*(t)))],",
            "cheap-loss",
        ),
        Paragraph(
            f"where the factor {EVERY} makes up for the steps without this term, so that the weight of $tilde(U)$ is $lambda$ on average. The last "
            "term is the realism of images along the path: to the critic they are samples like others."
        ),
        Paragraph(
            "$Z^*$ depends on the weights $theta$ of the generator. Yet nothing is differentiated through the search. At a minimiser the derivative "
            "of $U$ in $Z$ vanishes, so that by the envelope theorem"
        ),
        Equation(
            "dif / (dif theta) min_Z U(Z; theta) = (partial U) / (partial theta) (Z^*; theta) + (partial U) / (partial Z) (partial Z^*) / (partial "
            "theta) = (partial U) / (partial theta) (Z^*; theta).",
            "envelope",
        ),
        Paragraph(
            f"The path is held while the generator is changed. (After {PATH_STEPS} steps of the solver $Z^*$ is only near the minimiser, so this "
            "derivative is an approximation.) The codes and the images at both ends are held as well: only what lies between them is asked to move."
        ),
        Pseudocode(
            f"What is added at every {EVERY}th step of the generator",
            (
                f"*draw* {PAIRS_OF_VISIT} pairs of codes $z_A, z_B$ from the prior; $x_A = G(z_A)$, $x_B = G(z_B)$, held",
                f"*leave out* pairs with $norm(x_A - x_B)^2$ below {NEAREST:g} times the mean of real pairs",
                f"$Z <-$ the straight lines in {PATH_SEGMENTS} segments; {PATH_STEPS} steps of the path solver",
                "*show* images on these paths to the critic among the fakes",
                "*descend* in the weights of $G$ along $nabla L$, with $z_A, z_B, Z$ held",
            ),
            label="cheap-code",
        ),
        Heading("What would be cheating"),
        Paragraph(
            "*One image for every code.* The mean $M$ of a pair everywhere scores 1. But the pairs are images of the generator itself, held, and "
            "the critic judges them as ever. *A jump.* A generator that is exact at the ends and shows $M$ everywhere between them scores nearly 1. "
            "But the critic has seen images of paths among the samples, and judges them: one whose slope a penalty holds at 1 can charge only so "
            "much, and a large $lambda$ buys blends all the same. *A steeper generator.* With codes nearer to each other $U$ "
            "is smaller. But $tilde(U)$ divides by $l$, and the prior is fixed. *Pairs of similar images.* Their $U$ is small. But such pairs are "
            "left out."
        ),
        Paragraph(
            "For comparison, the *surrogate* takes the straight line for $Z^*$; everything else is the same. Whether training helps is judged on "
            "*real* images that it never saw, with codes and paths found anew."
        ),
        Heading("What was found"),
        Paragraph(
            f"The generator of the first seed was trained in five ways for {results['epochs']} epochs, $lambda$ = "
            f"{' and '.join(f'{weight:g}' for weight in results['weights'])}, and judged on {results['pairs']} pairs of test images. What the "
            f"samples lose is told by the Fréchet distance between features of {results['samples']:,} samples and of as many training images "
            f"({results['extractor']['name']}); two such sets of real images are {number(results['frechet_floor'])} apart."
        ),
        *strip_figures(results),
        Figure(
            results["figures"]["scores"]["path"],
            "Scores $tilde(U)$ of the cheapest paths of the same held-out pairs, for three trainings, in the order of the plain score.",
            again,
            "Dots for each pair and training",
            label="cheap-scores",
        ),
        Figure(
            results["figures"]["trade-off"]["path"],
            "What a cheaper path costs in samples: lower is cheaper, further left are better samples. Whiskers: 95 % intervals over pairs. Every "
            "point is one training.",
            again,
            "Excess against the distance of samples, a curve for each objective",
            label="cheap-trade-off",
        ),
        table(results, again),
        Paragraph("The command of the last training, and that which judges the paths of any run:"),
        Command(results["variants"][f"cheap-{SHOWN_TRAININGS[-1]}"]),
        Command(judgement(results, SHOWN_TRAININGS[-1])),
        Finding(conclusion(results)),
    )


def judgement(results: Results, name: str) -> str:
    """The command that judges a training as it was judged here."""
    words = shlex.split(results["variants"][f"cheap-{name}"])
    folder = words[words.index("--out") + 1]
    effort = {"--n": results["pairs"], "--starts": results.get("starts", STARTS), "--segments": results.get("segments", SEGMENTS)}
    return shlex.join(["periplus", "path", folder, "--judge", *(str(word) for pair in effort.items() for word in pair)])


def strip_figures(results: Results) -> tuple[Block, ...]:
    """Morphs of the first pairs."""
    return tuple(
        Figure(
            results["figures"][f"strip-{k}"]["path"],
            f"Pair {k + 1}: the cheapest path found, at equal steps of length, in the generator of three trainings: without the term, with the "
            f"surrogate and with the least-cost objective, $lambda$ = {WEIGHTS[-1]:g}.",
            results["figures"][f"strip-{k}"]["command"],
            "Three rows of images that change from one image into another",
            STRIP_WIDTH,
            label=f"cheap-strip-{k}",
        )
        for k in range(len(results["shown"][PLAIN]))
    )


def table(results: Results, again: str) -> Table:
    """Training by training."""
    rows = []
    for name, judged in results["judged"].items():
        seen = judged["realism"]
        on_path = "-" if seen is None else f"{100 * seen['path']['precision']:.0f}"
        cells = (judged[key]["mean"] for key in ("excess", "straight_excess", "end_error", "jump"))
        rows.append((name.replace("-", ", λ = "), *(f"{value:.3f}" for value in cells), on_path, f"{judged['frechet']['value']:.2f}"))
    seen = results["judged"][PLAIN]["realism"]
    converged = min(judged["converged"] for judged in results["judged"].values())
    known = (
        ""
        if seen is None
        else f" Real: share of the images along the paths that lie among real ones (precision, k = {seen['k']}, features of "
        f"{seen['extractor']['name']}); other real images have {100 * seen['floor']['precision']:.0f} %, cross-fades of the pairs "
        f"{100 * seen['cross_fade']['precision']:.0f} %."
    )
    return Table(
        ("training", "excess, path", "excess, line", "errors of ends / Dist²", "largest step / Dist", "real / %", "Fréchet distance"),
        tuple(rows),
        f"Means over {results['pairs']} held-out pairs. Excess: score less 1, of the cheapest path and of the straight line; 0 is what no "
        f"path undercuts, 1/3 an even cross-fade, and at least {converged} of the {results['pairs']} paths of a training converged. Errors of ends: "
        "squared errors of both codes together. Largest step: the largest change of the image among 64 equal steps along the path (even steps of a "
        f"cross-fade: 0.016).{known} Fréchet distance: of samples.",
        again,
        align=("left", *["decimal"] * 6),
        label="cheap-table",
    )


def conclusion(results: Results) -> str:
    """What the trainings say, computed from them: reductions with intervals over pairs, and what samples paid."""
    said = []
    for weight in results["weights"]:
        for objective in reversed(OBJECTIVES):
            name = name_of(objective, weight)
            said.append(f"With the {title_of(name)} the excess is {reduction(results, PLAIN, name)}; {price_of(results, name)}.")
    straight, least = (name_of(objective, results["weights"][-1]) for objective in OBJECTIVES)
    said.append(
        f"Least-cost objective against surrogate, λ = {results['weights'][-1]:g}: the excess is {reduction(results, straight, least)}. These are "
        "single trainings and few pairs; `benchmarks/cheap_paths.py` repeats them with seeds and more pairs."
    )
    said.append(lines(results, straight))
    return "\n".join(said)


def lines(results: Results, surrogate: str) -> str:
    """Whether the surrogate has lowered, on these pairs, what it prices."""
    before, after = (results["judged"][name]["straight_excess"]["mean"] for name in (PLAIN, surrogate))
    told = f"The straight *lines* that it prices have an excess of {number(after)} on these pairs, {number(before)} without it"
    return f"{told}: what it lowers between codes of the prior it does not lower here." if after >= before else f"{told}."


def price_of(results: Results, name: str) -> str:
    """What a training paid, over the plain one."""
    own, plain = results["judged"][name], results["judged"][PLAIN]
    frechet = own["frechet"]["value"] / max(plain["frechet"]["value"], 1e-12)
    error = own["squared_error"]["mean"] / max(plain["squared_error"]["mean"], 1e-12)
    return f"the Fréchet distance of samples is {frechet:.2f} times that of the plain training, the squared error of inversion {error:.2f} times"


def reduction(results: Results, base: str, name: str) -> str:
    """How much smaller an excess is, of the same pairs, in words with its interval."""
    if len(results["judged"][base]["scores"]) < 2:
        return "that of one pair only: nothing can be said of it"
    change, low, high = change_of(results, base, name)
    if not math.isfinite(low):
        return f"changed by {change:+.0f} % for every pair alike, so that there is no interval"
    if high < 0:
        return f"smaller by {-change:.0f} % (95 % interval {-high:.0f} to {-low:.0f} %)"
    if low > 0:
        return f"*larger* by {change:.0f} % (95 % interval {low:.0f} to {high:.0f} %)"
    which = "plain training" if base == PLAIN else "surrogate"
    return f"*not told apart* from that of the {which}: it changes by {change:+.0f} % ({low:+.0f} to {high:+.0f} %)"


def change_of(results: Results, base: str, name: str) -> tuple[float, float, float]:
    """The mean change of the excess from one training to another in per cent of its mean, with Student's 95 % interval over pairs."""
    before, after = ([score - 1 for score in results["judged"][key]["scores"]] for key in (base, name))
    changes, mean = [b - a for a, b in zip(before, after, strict=True)], fmean(before)
    change, low, high = (100 * value / mean for value in (fmean(changes), *metrics.mean_interval(changes)))
    return change, low, high


def headline(results: Results) -> str:
    """The short form."""
    name = name_of("least", results["weights"][-1])
    asked = "Asked for cheap paths while it learns, the generator has an excess cost that is"
    return f"{asked} {reduction(results, PLAIN, name)}; {price_of(results, name)}."


QUESTION = Question(
    "2e",
    "Training for cheap paths",
    "Change the training so that the least cost of a path between two images becomes small, without giving up samples, reconstruction or realism.",
    (MODEL,),
    measure,
    draw,
    tell,
    variants=variants(),
)
