"""2e: training so that the cheapest path is cheap, judged on pairs that training never saw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from periplus import pictures, plots
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.features import JUDGES, Extractor, extractor_for, random_extractor
from periplus.locating import Search
from periplus.passages import along, chosen_pairs, price
from periplus.path_judge import judge_paths
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table
from periplus.runs import Run
from periplus.study.chapters.inversion import MODEL
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import number
from periplus.study.workshop import Workshop
from periplus.training import train
from periplus.training.path_term import EVERY, NEAREST, PATH_STEPS
from periplus.training.path_term import PAIRS as PAIRS_OF_VISIT
from periplus.training.path_term import SEGMENTS as PATH_SEGMENTS

PAIRS, STARTS, SEGMENTS, SHOWN, FRAMES = 8, 4, 16, 3, 9
WEIGHT = 1.0
#: Three trainings for one question: each of a part of the other chapters' epochs.
SHORTER = 3
VARIANTS = ("plain", "straight", "least")
NAMES = {"plain": "plain", "straight": "straight-line surrogate", "least": "least-cost objective"}


# ---- measuring ------------------------------------------------------------------------------------------------------------------------------


def measure(workshop: Workshop) -> Results:
    """The first seed's configuration trained three ways, each judged on the same held-out pairs."""
    _, first = workshop.of(MODEL)[0]
    runs = {name: trained(workshop, first, name) for name in VARIANTS}
    test = workshop.splits(first)[1]
    eyes, pairs = eyes_of(test), min(PAIRS, len(test) // 4)
    judged = {}
    for name, run in runs.items():
        record = judge_paths(run, test, pairs, Search(STARTS, keep="best"), segments=SEGMENTS, extractor=eyes)
        judged[name] = {key: record[key] for key in ("excess", "straight_excess", "end_error", "jump", "converged", "realism")}
        judged[name]["scores"] = [pair["score"] for pair in record["pairs"]]
    return {
        "model": MODEL,
        "weight": WEIGHT,
        "epochs": runs["plain"].config.epochs,
        "pairs": pairs,
        "judged": judged,
        "commands": {name: command(workshop, runs[name]) for name in VARIANTS},
        "shown": {name: strips(run, test, min(SHOWN, pairs)) for name, run in runs.items()},
    }


def configuration(first: Run, variant: str) -> AdversarialConfig:
    """The first seed's, shorter, and with the path term of a variant."""
    assert isinstance(first.config, AdversarialConfig)
    shorter = dataclasses.replace(first.config, epochs=max(1, first.config.epochs // SHORTER), snapshots=False)
    if variant == "plain":
        return shorter
    return dataclasses.replace(shorter, path_weight=WEIGHT, path_objective="least" if variant == "least" else "straight")


def trained(workshop: Workshop, first: Run, variant: str) -> Run:
    """The run of a variant; what is there already is kept."""
    workshop.say(f"2e: training, {NAMES[variant]}")
    return train(configuration(first, variant), workshop.data, folder_of(workshop, variant), source=first.data.source, resume=True)


def folder_of(workshop: Workshop, variant: str) -> Path:
    """Where a variant's run is."""
    return workshop.folder / "cheap" / variant


def command(workshop: Workshop, run: Run) -> str:
    """How a person would train it, beside the options of the other chapters."""
    config = run.config
    words = f"periplus train {MODEL} --data {run.data.source} --epochs {config.epochs} --seed {config.seed} --batch-size {config.batch_size}"
    words += f" --latent-dim {config.latent_dim}"
    return words + (f" --path-weight {config.path_weight:g} --path-objective {config.path_objective}" if config.path_weight else "")


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
    """Morphs before and after, and the scores of all pairs."""
    again = workshop.again("2e")
    runs = {name: workshop_run(workshop, name) for name in VARIANTS}
    test = workshop.splits(workshop.of(MODEL)[0][1])[1]
    figures = {}
    for k in range(len(results["shown"]["plain"])):
        with torch.no_grad():
            curves = [runs[name].decode(torch.tensor(results["shown"][name][k])).clamp(0, 1) for name in VARIANTS]
        path = Path("figures") / f"2e-strip-{k}.png"
        start, end = (test.images[2 * k + side].float() / 255 for side in (0, 1))
        pictures.morph_strip(start, curves, end, workshop.folder / path, list(VARIANTS))
        figures[f"strip-{k}"] = {"path": str(path), "command": again}
    path = Path("figures") / "2e-scores.svg"
    groups = [{"label": NAMES[name], "y": results["judged"][name]["scores"]} for name in VARIANTS]
    plots.paired_dots(
        groups, workshop.folder / path, f"the {results['pairs']} pairs, by the plain score", "score Ũ", {"cross-fade": 4 / 3, "floor": 1.0}
    )
    return figures | {"scores": {"path": str(path), "command": again}}


def workshop_run(workshop: Workshop, variant: str) -> Run:
    """A variant's run, as it was trained."""
    return Run(folder_of(workshop, variant))


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
            "and then all at once the blend scores nearly 1 as well: a critic that has seen images on paths judges them. A steeper generator, with "
            "codes nearer to each other, has a smaller $U$: $tilde(U)$ divides by $l$, and the prior is fixed. Pairs of like images have a small "
            "$U$: these are left out. The surrogate puts the straight line for $Z^*$, all else the same. Whether it helps is judged on *real* "
            "images that training never saw, with codes and paths found anew."
        ),
        Heading("What was found"),
        Paragraph(
            f"The first seed's generator was trained three ways for {results['epochs']} epochs, $lambda = {results['weight']:g}$, and judged on "
            f"{results['pairs']} pairs of test images, with codes and paths found anew."
        ),
        *strip_figures(results),
        Figure(
            results["figures"]["scores"]["path"], "Scores of the same held-out pairs.", again, "Dots for each pair and training", label="cheap-scores"
        ),
        table(results, again),
        Paragraph("The same from the command line, and the judgement of any run:"),
        Command(results["commands"]["least"]),
        Command("periplus path RUN --judge --n 200"),
        Finding(conclusion(results)),
    )


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
        for k in range(len(results["shown"]["plain"]))
    )


def table(results: Results, again: str) -> Table:
    """Training by training."""
    rows = []
    for name in VARIANTS:
        judged = results["judged"][name]
        seen = judged["realism"]
        on_path = "-" if seen is None else f"{100 * seen['path']['precision']:.0f} %"
        cells = (judged["excess"]["mean"], judged["straight_excess"]["mean"], judged["end_error"]["mean"], judged["jump"]["mean"])
        rows.append((NAMES[name], *(number(value) for value in cells), on_path))
    seen = results["judged"]["plain"]["realism"]
    known = "" if seen is None else (
        f" Real images are among real ones to {100 * seen['floor']['precision']:.0f} %, cross-fades of the pairs to "
        f"{100 * seen['cross_fade']['precision']:.0f} % (k = {seen['k']}, features: {seen['extractor']['name']})."
    )  # fmt: skip
    return Table(
        ("training", "excess of Ũ", "of the line", "errors of ends / Dist²", "largest step / Dist", "among real images"),
        tuple(rows),
        f"Means over {results['pairs']} pairs.{known}",
        again,
        align=("left", *["right"] * 5),
        label="cheap-table",
    )


def conclusion(results: Results) -> str:
    """What the three trainings say, computed from them: reductions with intervals over pairs."""
    said = [f"{NAMES[name].capitalize()}: the excess of $tilde(U)$ is {reduction(results, 'plain', name)}." for name in ("straight", "least")]
    said.append(f"Against the surrogate the least-cost objective's excess is {reduction(results, 'straight', 'least')}.")
    ratio = results["judged"]["least"]["end_error"]["mean"] / max(results["judged"]["plain"]["end_error"]["mean"], 1e-12)
    said.append(f"The errors of its ends are {number(ratio)} times those of the plain training.")
    said.append("Of one seed and few pairs: benchmarks/cheap_paths.py has the grid.")
    return " ".join(said)


def reduction(results: Results, base: str, name: str) -> str:
    """How much smaller an excess is, of the same pairs, in words with its interval."""
    before, after = (torch.tensor(results["judged"][key]["scores"], dtype=torch.float64) - 1 for key in (base, name))
    if len(before) < 2:
        return "of one pair only: nothing can be said of it"
    saved, mean = before - after, float(before.mean())
    half = 1.96 * float(saved.std()) / len(saved) ** 0.5
    low, high = ((float(saved.mean()) + side * half) / mean for side in (-1, 1))
    verdict = "smaller" if low > 0 else "larger" if high < 0 else "*not told apart*"
    part = float(saved.mean()) / mean
    if high < 0:
        part, low, high = -part, -high, -low
    return f"{verdict}, by {100 * part:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def headline(results: Results) -> str:
    """The short form."""
    return f"Asked for cheap paths while it learns, the generator has an excess of $tilde(U)$ that is {reduction(results, 'plain', 'least')}."


QUESTION = Question(
    "2e",
    "Training for cheap paths",
    "Change the training so that the least cost of a path between two images becomes small, without giving up samples, reconstruction or realism.",
    (MODEL,),
    measure,
    draw,
    tell,
)
