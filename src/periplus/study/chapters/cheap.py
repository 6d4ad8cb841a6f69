"""2e: training so that the cheapest path is cheap, judged on pairs that training never saw."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
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
                "errors": [half_width(row["scores"]) for row in rows],
                "words": [PLAIN if objective == "least" else "", *(f"λ = {weight:g}" for weight in results["weights"])],
            }
        )
    return found


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
            "Between two codes the least $U$ is a property of the generator. So the generator is asked, while it learns, to make least-cost paths "
            'between its own images cheap, whose codes are known. With $tilde(U) = U \\/ (1/2 "Dist"^2 l)$, and $Z^*$ the cheapest path found, its '
            "loss becomes"
        ),
        Equation(
            "L = L_G + lambda thin EE[tilde(U)(Z^*)] - EE_t [D(G(Z^*(t)))].",
            "cheap-loss",
        ),
        Paragraph(
            "$Z^*$ depends on the generator, but nothing needs to be differentiated through the search: by the envelope theorem the derivative of a "
            "minimum is the partial derivative at the minimiser, the path held. The images at the ends are held too: only what lies between them is "
            "asked to move."
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
            "One image $M$ for every code scores 1: the pairs are of the generator's own images, held, which the critic judges as ever. Exact ends "
            "and then all at once the blend scores nearly 1 as well: a critic that has seen images on paths judges them, though one whose slope a "
            "penalty holds at 1 can charge only so much, and a large $lambda$ buys blends all the same. A steeper generator, with codes nearer to "
            "each other, has a smaller $U$: $tilde(U)$ divides by $l$, and the prior is fixed. Pairs of like images have a small $U$: these are left "
            "out. The surrogate puts the straight line for $Z^*$, all else the same. Whether it helps is judged on *real* images that training never "
            "saw, with codes and paths found anew."
        ),
        Heading("What was found"),
        Paragraph(
            f"The first seed's generator was trained in five ways for {results['epochs']} epochs, $lambda$ = "
            f"{' and '.join(f'{weight:g}' for weight in results['weights'])}, and judged on {results['pairs']} pairs of test images, with codes and "
            f"paths found anew. What it costs in samples is told by the Fréchet distance between features of {results['samples']:,} of them and of "
            f"as many training images ({results['extractor']['name']}); two such sets of images are {number(results['frechet_floor'])} apart."
        ),
        *strip_figures(results),
        Figure(
            results["figures"]["scores"]["path"], "Scores of the same held-out pairs.", again, "Dots for each pair and training", label="cheap-scores"
        ),
        Figure(
            results["figures"]["trade-off"]["path"],
            "What a cheaper path costs: down is cheaper, left is better samples. Whiskers: Student's 95 % over pairs; one training each.",
            again,
            "Excess against the distance of samples, a curve for each objective",
            label="cheap-trade-off",
        ),
        table(results, again),
        Paragraph("The same from the command line, and the judgement of any run:"),
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
            "The cheapest path found, at equal steps of length, in the generator of each training.",
            results["figures"][f"strip-{k}"]["command"],
            "Three rows of images that change from one digit into another",
            label=f"cheap-strip-{k}",
        )
        for k in range(len(results["shown"][PLAIN]))
    )


def table(results: Results, again: str) -> Table:
    """Training by training."""
    rows = []
    for name, judged in results["judged"].items():
        seen = judged["realism"]
        on_path = "-" if seen is None else f"{100 * seen['path']['precision']:.0f} %"
        cells = (judged[key]["mean"] for key in ("excess", "straight_excess", "end_error", "jump"))
        rows.append((name.replace("-", ", λ = "), *(number(value) for value in cells), on_path, number(judged["frechet"]["value"])))
    seen = results["judged"][PLAIN]["realism"]
    known = "" if seen is None else (
        f" Real images are among real ones to {100 * seen['floor']['precision']:.0f} %, cross-fades of the pairs to "
        f"{100 * seen['cross_fade']['precision']:.0f} % (k = {seen['k']}, features: {seen['extractor']['name']})."
    )  # fmt: skip
    converged = min(judged["converged"] for judged in results["judged"].values())
    bounds = f"An excess of 0 is what no path undercuts, 1/3 an even cross-fade; at least {converged} of {results['pairs']} paths of each converged."
    return Table(
        ("training", "excess of Ũ", "of the line", "errors of ends / Dist²", "largest step / Dist", "among real images", "Fréchet distance"),
        tuple(rows),
        f"Means over {results['pairs']} pairs. {bounds}{known}",
        again,
        align=("left", *["right"] * 6),
        label="cheap-table",
    )


def conclusion(results: Results) -> str:
    """What the trainings say, computed from them: reductions with intervals over pairs, and what samples paid."""
    said = []
    for weight in results["weights"]:
        for objective in reversed(OBJECTIVES):
            name = name_of(objective, weight)
            said.append(
                f"{title_of(name).capitalize()}: the excess of $tilde(U)$ is {reduction(results, PLAIN, name)}, at {price_of(results, name)}."
            )
    straight, least = (name_of(objective, results["weights"][-1]) for objective in OBJECTIVES)
    said.append(
        f"Against the surrogate of the same weight ({results['weights'][-1]:g}) the least-cost objective's is {reduction(results, straight, least)}."
    )
    said.append(lines(results, straight))
    said.append(
        "Intervals are Student's over these pairs (95 %), of one training each; docs/results.md has three seeds of each on MNIST and 200 pairs."
    )
    return " ".join(said)


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
    return f"{frechet:.2f} times the Fréchet distance of samples and {error:.2f} times the squared error of inversion"


def reduction(results: Results, base: str, name: str) -> str:
    """How much smaller an excess is, of the same pairs, in words with its interval."""
    before, after = (torch.tensor(results["judged"][key]["scores"], dtype=torch.float64) - 1 for key in (base, name))
    if len(before) < 2:
        return "of one pair only: nothing can be said of it"
    saved, mean = (before - after).tolist(), float(before.mean())
    half = half_width(saved)
    low, high = ((statistics.fmean(saved) + side * half) / mean for side in (-1, 1))
    verdict = "smaller" if low > 0 else "larger" if high < 0 else "*not told apart*"
    part = statistics.fmean(saved) / mean
    if high < 0:
        part, low, high = -part, -high, -low
    return f"{verdict}, by {100 * part:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def half_width(values: Sequence[float]) -> float:
    """Half of Student's 95 % interval of the mean of values over pairs; 0 where they do not vary, and of a single one."""
    low, high = metrics.mean_interval(values)
    return (high - low) / 2 if math.isfinite(low) else 0.0


def headline(results: Results) -> str:
    """The short form."""
    name = name_of("least", results["weights"][-1])
    return (
        f"Asked for cheap paths while it learns, the generator has an excess of $tilde(U)$ that is {reduction(results, PLAIN, name)}, at "
        f"{price_of(results, name)}."
    )


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
