"""2b: the gradient penalty, and a comparison."""

from __future__ import annotations

from typing import Any

from periplus.comparing import compare, group_runs
from periplus.errors import UsageError
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table
from periplus.runs import Run
from periplus.scoring import reference
from periplus.study import judging
from periplus.study.chapters.gan import class_figure, neighbour_figure, network_sentence, sample_figures
from periplus.study.comparison import comparison_blocks, comparison_conclusion, comparison_headline, draw_comparison
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import collapse_count, collapse_sentence, counted, joined, number, run_table, settings_of
from periplus.study.workshop import Workshop

PANELS = {
    "critic_loss": "critic loss / score",
    "critic_gap_held_out": "score gap, held-out images",
    "penalty": "penalty / (score per pixel value)²",
    "generator_gradient_norm": "generator gradient norm",
}


def measure(workshop: Workshop) -> Results:
    """The WGAN-GP's runs, and their comparison with the GAN's: by scores with floors, where there are images enough for these."""
    ours = judging.measure_model(workshop, "wgan-gp")
    other = judging.measure_model(workshop, "gan")
    return {**ours, "other": other, "comparison": judging.compare_models(ours, other), "scores": compare_scores(workshop)}


def compare_scores(workshop: Workshop) -> Results | None:
    """What `periplus compare` finds of both models' runs; None where there are too few images for scores."""
    try:
        judge = reference(workshop.data, note=workshop.say)
    except UsageError as error:
        workshop.say(f"no scores of samples: {error}")
        return None
    runs, done = both(workshop), 0

    def scored(line: str) -> None:
        """Count what is scored, a snapshot each, in place of a line for each."""
        nonlocal done
        done += 1
        workshop.progress(done, max(done + 1, sum(len(run.kept) for run in runs)))

    return compare(runs, judge, note=scored)


def both(workshop: Workshop) -> list[Run]:
    """The runs of both models."""
    return [run for model in ("wgan-gp", "gan") for _, run in workshop.of(model)]


def draw(results: Results, workshop: Workshop) -> Figures:
    """Samples of every seed, curves, class shares, nearest training images."""
    figures = judging.draw_model(results, workshop, "2b", PANELS)
    if results["scores"] is None:
        return figures | {"side-by-side": judging.draw_side_by_side(workshop, ("gan", "wgan-gp"), "2b")}
    drawn = draw_comparison(results["scores"], group_runs(both(workshop)), workshop.data, workshop.folder, "2b")
    return figures | {name: {"path": path, "command": workshop.again("2b")} for name, path in drawn.items()}


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    config, runs = results["config"], results["runs"]
    return (
        Heading("From a divergence to a distance"),
        Paragraph(
            "Where the laws of data and samples hardly overlap, a perfect discriminator measures the same divergence however far apart they are, "
            "and the generator gets no direction. The Wasserstein-1 distance does not have this defect [@arjovsky2017]. By duality it is the "
            "largest difference of means that a function with slopes of at most one can make,"
        ),
        Equation('W_1 = max_(norm(D)_"Lip" <= 1) EE_x [D(x)] - EE_z [D(G(z))].', "w1"),
        Paragraph(
            "It remains to keep the slopes of the critic $D$ at most one. An optimal critic has a gradient of norm one almost everywhere on the "
            "segments between real and generated points that belong together. These pairs are not known. The gradient penalty [@gulrajani2017] "
            "therefore asks for norm one at random points $hat(x)$ of segments between random pairs. The result is a relaxation: the constraint is "
            "not enforced, but deviations in both directions cost something:"
        ),
        Equation(
            "L_D = EE_z [D(G(z))] - EE_x [D(x)] + lambda EE_(hat(x)) [(norm(nabla D(hat(x)))_2 - 1)^2], quad "
            "hat(x) = epsilon x + (1 - epsilon) G(z), quad epsilon tilde.op cal(U)[0, 1],",
            "gp",
        ),
        Equation("L_G = - EE_z [D(G(z))].", "wgan-g"),
        Paragraph(
            "Four details matter in a program. The norm is taken for each example over all its channels and pixels, neither over the batch nor for "
            "each pixel. $epsilon$ is drawn once for each example. The penalty belongs to the same step of the optimiser as the loss of the critic, "
            "and sends no gradient into the generator. And the critic must not mix the examples of a batch: with batch normalisation in the critic "
            "the score of one example depends on the others, and its gradient is not the one that the formula means. Periplus refuses such a critic."
        ),
        Pseudocode(
            "One step of WGAN-GP",
            (
                "*draw* a batch $x$; codes $z$; $epsilon$ for each example",
                "$tilde(x) <- G(z)$, without gradient; $hat(x) <- epsilon x + (1 - epsilon) tilde(x)$",
                "$g_i <- nabla_(hat(x)_i) D(hat(x)_i)$ for each example, itself differentiable in the weights of $D$",
                "*descend* in the weights of $D$ along $nabla [overline(D(tilde(x))) - overline(D(x)) + lambda overline((norm(g_i) - 1)^2)]$",
                "*draw* fresh codes $z$; *descend* in the weights of $G$ along $nabla [- overline(D(G(z)))]$",
                "*update* the running average of the weights of $G$",
            ),
        ),
        Heading("What was trained"),
        Paragraph(network_sentence(config)),
        settings_of(config),
        Command(runs[0]["command"]),
        Heading("What came out"),
        *sample_figures(results, "WGAN-GP"),
        run_table(results, "wgan-runs"),
        neighbour_figure(results, "wgan-neighbours"),
        Figure(
            results["figures"]["curves"]["path"],
            "Training of the WGAN-GP: every seed is a thin line, their mean the thick one. The gap $EE D(x) - EE D(G(z))$ on held-out images is the "
            "critic's estimate of the distance, from images that it has not seen; where it falls, the samples come, roughly, nearer to the data. Its "
            "unit is the slope of the critic, which the penalty holds near one.",
            results["figures"]["curves"]["command"],
            "Curves of losses, gap, penalty and gradient norm against epochs",
            width=0.9,
            label="wgan-curves",
        ),
        *class_figure(results, "wgan-classes"),
        Heading("Side by side"),
        Paragraph(
            f"Both models had the same widths of the generator, {counted(config['epochs'], 'epoch')} and {counted(len(runs), 'seed')}. The seeds "
            "are the sample: Welch's intervals are for the difference of means over seeds, and hold at 95 % for all rows of the table together."
        ),
        *side_by_side(results),
        Finding(conclusion(results)),
    )


def side_by_side(results: Results) -> tuple[Block, ...]:
    """Samples and measures of both models: scores with floors, or a plain table where there were too few images for these."""
    if results["scores"] is not None:
        figures = {name: results["figures"][name]["path"] for name in ("grids", "quality") if name in results["figures"]}
        return comparison_blocks(results["scores"], figures, results["figures"]["grids"]["command"], "2b")
    return (
        Figure(
            results["figures"]["side-by-side"]["path"],
            "Training images, and samples of the first seed of each model; none selected.",
            results["figures"]["side-by-side"]["command"],
            "Rows of real images, of GAN samples and of WGAN-GP samples",
            label="side-by-side",
        ),
        comparison_table(results),
    )


def comparison_table(results: Results) -> Table:
    """Measure by measure."""
    rows = tuple(
        (
            row["title"],
            row["direction"],
            joined(row["a"]),
            joined(row["b"]),
            " to ".join(number(bound) if bound is not None else infinite for bound, infinite in zip(row["interval"], ("-∞", "∞"), strict=True)),
            row["verdict"],
        )
        for row in results["comparison"]
    )
    return Table(
        ("measure", "better", "WGAN-GP, by seed", "GAN, by seed", "interval of the difference", "WGAN-GP is"),
        rows,
        "WGAN-GP against GAN. Distance of class shares: total variation from the shares of the data. Spread and nearest / held-out are those of "
        "[@wgan-runs]; their intervals are for the difference of the distances from 1.",
        results["figures"]["curves"]["command"],
        align=("left", "left", "right", "right", "right", "left"),
        label="comparison",
    )


def conclusion(results: Results) -> str:
    """What the runs say, computed from them."""
    if results["scores"] is not None:
        return comparison_conclusion(results["scores"])
    parts = [collapse_sentence(results["runs"])]
    decided = [row for row in results["comparison"] if row["verdict"] != "cannot tell"]
    open_rows = [row for row in results["comparison"] if row["verdict"] == "cannot tell"]
    for row in decided:
        parts.append(f"WGAN-GP is *{row['verdict']}* than the GAN in: {row['title']}.")
    if open_rows:
        seeds = len(results["runs"])
        parts.append(f"With {counted(seeds, 'seed')} this study *cannot tell* them apart in: {'; '.join(row['title'] for row in open_rows)}.")
    return "\n".join(parts)


def headline(results: Results) -> str:
    """The conclusion in a sentence or two."""
    if results["scores"] is not None:
        return comparison_headline(results["scores"])
    decided = [f"{row['verdict']} in {row['title']}" for row in results["comparison"] if row["verdict"] != "cannot tell"]
    told = f"WGAN-GP is {', '.join(decided)} than the GAN" if decided else "WGAN-GP and the GAN *cannot be told* apart"
    return f"{collapse_count(results['runs'])}. With {counted(len(results['runs']), 'seed')} {told}."


QUESTION = Question(
    "2b",
    "The gradient penalty, and a comparison",
    "Explain the gradient penalty of the Wasserstein GAN, train one, and compare it with the GAN.",
    ("gan", "wgan-gp"),
    measure,
    draw,
    tell,
)
