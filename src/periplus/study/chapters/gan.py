"""2a: a GAN on small images, its samples and its balance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from periplus import metrics
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, plain
from periplus.study import judging
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import collapse_count, collapse_sentence, joined, number, run_table, settings_of
from periplus.study.workshop import Workshop

PANELS = {
    "critic_loss": "discriminator loss / nats",
    "generator_loss": "generator loss / nats",
    "critic_gap_held_out": "logit gap, held-out images",
    "generator_gradient_norm": "generator gradient norm",
}


def measure(workshop: Workshop) -> Results:
    """The GAN's runs."""
    return judging.measure_model(workshop, "gan")


def draw(results: Results, workshop: Workshop) -> Figures:
    """Samples of every seed, curves, class shares, nearest training images."""
    return judging.draw_model(results, workshop, "2a", PANELS)


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    config, runs = results["config"], results["runs"]
    return (
        Heading("Two networks, one game"),
        Paragraph(
            "A generator $G$ maps codes $z tilde.op cal(N)(0, I)$ to images. A discriminator $D$ gives every image a score: the logit of its being "
            "real. With the logistic function $sigma$, the discriminator minimises the cross-entropy of its two classes,"
        ),
        Equation("L_D = - EE_x [ln sigma(D(x))] - EE_z [ln (1 - sigma(D(G(z))))].", "gan-d"),
        Paragraph(
            "Where the data have the density $p$ and the samples $p_G$, the integrand at an image is $- p ln sigma - p_G ln (1 - sigma)$ with "
            "$sigma = sigma(D)$. Its derivative in $D$ vanishes at $sigma = p \\/ (p + p_G)$, that is, at $D = ln p - ln p_G$. If data and samples "
            "have the same law, the best score is zero and $L_D = 2 ln 2 approx 1.386$ nats [@goodfellow2014]. For the generator two losses are in "
            "use:"
        ),
        Equation('L_G^"sat" = EE_z [ln (1 - sigma(D(G(z))))], quad quad L_G^"ns" = - EE_z [ln sigma(D(G(z)))].', "gan-g"),
        Paragraph(
            "The first, the *saturating* loss, makes a game in which one side wins what the other loses: it is minus the second part of $L_D$. The "
            "second, the *non-saturating* loss, is the cross-entropy of samples that are labelled as real. They are often written as if they were "
            "one, but they are different functions: their slopes with respect to the score are $- sigma$ and $-(1 - sigma)$. Both pull the score up "
            "and both have $p_G = p$ as their fixed point. Early in training, however, the discriminator rejects samples with confidence, "
            "$sigma(D(G(z))) approx 0$: the non-saturating loss then pulls with its full slope, and the saturating one hardly at all. This study "
            f"uses the {plain(config['generator_loss'])} loss; `--generator-loss` chooses."
        ),
        Heading("What was trained"),
        Paragraph(network_sentence(config)),
        settings_of(config),
        Paragraph("The command of the first seed makes its run again, to the bit:"),
        Command(runs[0]["command"]),
        Heading("What came out"),
        *sample_figures(results, "GAN"),
        run_table(results, "gan-runs"),
        neighbour_figure(results, "gan-neighbours"),
        Figure(
            results["figures"]["curves"]["path"],
            "Training of the GAN: every seed is a thin line, their mean the thick one. The gap is the mean score of held-out images less that of "
            "samples, $EE D(x) - EE D(G(z))$: the lead of the discriminator. In a balanced game its loss stays below, but not far below, $2 ln 2$.",
            results["figures"]["curves"]["command"],
            "Curves of losses, gap and gradient norm against epochs",
            width=0.9,
            label="gan-curves",
        ),
        *class_figure(results, "gan-classes"),
        Finding(conclusion(results)),
    )


def network_sentence(config: dict[str, Any]) -> str:
    """What the networks are, from the configuration."""
    norm = "with batch normalisation" if config["generator_batch_norm"] else "without normalisation"
    dropout = f" with dropout {config['critic_dropout']:g}" if config["critic_dropout"] else " without dropout"
    return (
        "The generator is fully connected with 128, 256, 512 and 1024 hidden units. Each layer is linear and followed by a leaky rectifier of slope "
        f"0.2, {norm}; a sigmoid stands at the end. Its opponent has 512 and 256 hidden units{dropout}. The weights begin with Kaiming's variance "
        "for the leaky slope: with the default of the framework every layer shrinks its signal, and the generator begins, and may stay, at one "
        "constant image. Samples are drawn from a running average of the weights of the generator."
    )


def sample_figures(results: Results, name: str) -> tuple[Block, ...]:
    """The first seed's samples large, the others' side by side."""
    figures = results["figures"]
    first, *others = [r["seed"] for r in results["runs"]]
    width = 1.0 / max(1, len(others)) - 0.01
    return (
        Figure(
            figures[f"samples-{first}"]["path"],
            f"Samples of the {name}, seed {first}; not selected.",
            figures[f"samples-{first}"]["command"],
            width=1.0,
        ),
        *(
            Figure(
                figures[f"samples-{s}"]["path"],
                f"Samples of the {name}, seed {s}; not selected.",
                figures[f"samples-{s}"]["command"],
                width=max(0.3, width),
            )
            for s in others
        ),
    )


def class_figure(results: Results, label: str) -> tuple[Block, ...]:
    """Class shares, where the data have classes."""
    if "classes" not in results["figures"]:
        return ()
    run = results["runs"][0]
    error = run["classifier_error"]
    return (
        Figure(
            results["figures"]["classes"]["path"],
            f"Classes of {run['samples']:,} samples of each run. A sample has the class of most of its three nearest neighbours among real images; "
            f"on real images this rule errs in {100 * error['value']:.1f} % (95 % interval {100 * error['low']:.1f} to {100 * error['high']:.1f} "
            "%). Whiskers are 95 % Wilson intervals.",
            results["figures"]["classes"]["command"],
            "Bars of class shares",
            width=0.9,
            label=label,
        ),
    )


def neighbour_figure(results: Results, label: str) -> Figure:
    """Samples and their nearest training images."""
    return Figure(
        results["figures"]["neighbours"]["path"],
        "Samples (above), the nearest of all training images (below) and the Euclidean distance of the two, with pixels in $[0, 1]$. A distance of 0 "
        "would be a copy.",
        results["figures"]["neighbours"]["command"],
        "Pairs of samples and nearest training images",
        label=label,
    )


def conclusion(results: Results) -> str:
    """What the runs say, computed from them."""
    runs = results["runs"]
    parts = [collapse_sentence(runs)]
    if all("critic_gap_held_out" in r["last_metrics"] for r in runs):
        parts.append(overfitting_sentence(runs))
    ratios = [r["neighbour_ratio"] for r in runs]
    if all(r is not None for r in ratios):
        low, high = bounds_of_nearness(runs)
        parts.append(
            f"Samples are {nearness(runs)}: their median distance to the nearest training image is {joined(ratios)} times that of held-out images "
            f"(95 % intervals within {number(low)} to {number(high)})."
        )
    return "\n".join(parts)


def headline(results: Results) -> str:
    """The conclusion in a sentence or two."""
    runs = results["runs"]
    near = "" if any(r["neighbour_ratio"] is None for r in runs) else f" Samples are {nearness(runs)}."
    return f"{collapse_count(runs)}.{near} Two different losses of the generator go by one name; this study uses the {generator_loss(results)} one."


def generator_loss(results: Results) -> str:
    """The loss that the generators were trained with."""
    return plain(results["config"]["generator_loss"])


def bounds_of_nearness(runs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The lowest and the highest end of the intervals of all runs."""
    return min(r["neighbour_ratio_interval"][0] for r in runs), max(r["neighbour_ratio_interval"][1] for r in runs)


def nearness(runs: Sequence[dict[str, Any]]) -> str:
    """Whether samples are as far from the training images as new data are, by the intervals of all runs."""
    low, high = bounds_of_nearness(runs)
    if high < 1:
        return "nearer to the training images than held-out images are, which copying would explain"
    if low > 1:
        return "further from the training images than held-out images are"
    return "about as far from the training images as held-out images are"


def overfitting_sentence(runs: Sequence[dict[str, Any]]) -> str:
    """Whether the discriminator's lead is larger on images that it trains on than on held-out ones; seeds are the sample."""
    train, held_out = ([r["last_metrics"][f"critic_gap_{part}"] for r in runs] for part in ("train", "held_out"))
    low, high = metrics.mean_interval([a - b for a, b in zip(train, held_out, strict=True)])
    means = f"{number(judging.mean(train))} on training and {number(judging.mean(held_out))} on held-out images"
    told = f"At the end the lead of the discriminator is {means}"
    if math.isinf(low):
        return f"{told}; one seed cannot tell whether the difference is more than chance."
    interval = f"The difference has the 95 % interval {number(low)} to {number(high)} over seeds"
    verdict = "it has begun to learn its training images by heart" if low > 0 else "these seeds cannot tell it from zero"
    return f"{told}. {interval}: {verdict}."


QUESTION = Question(
    "2a",
    "A generative adversarial network",
    "Train a GAN with fully connected networks on the images, show its samples, and describe how the training went.",
    ("gan",),
    measure,
    draw,
    tell,
)
