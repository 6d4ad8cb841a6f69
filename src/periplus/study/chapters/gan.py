"""2a: a GAN on small images, its samples and its balance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from periplus import metrics
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, plain
from periplus.study import judging
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import collapse_sentence, joined, number, run_table, settings_of
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
            "A generator $G$ maps codes $z tilde.op cal(N)(0, I)$ to images; a discriminator $D$ gives every image a score, the logit of its being "
            "real. With $sigma$ the logistic function, $D$ minimises the cross-entropy of its two-class problem,"
        ),
        Equation("L_D = - EE_x [ln sigma(D(x))] - EE_z [ln (1 - sigma(D(G(z))))]", "gan-d"),
        Paragraph(
            "whose minimum over all functions is $D(x) = ln p(x) - ln p_G (x)$, the log-ratio of the densities of data and samples; an undecided "
            "discriminator has $L_D = 2 ln 2 approx 1.386$ nats [@goodfellow2014]. For the generator two losses are in use:"
        ),
        Equation('L_G^"ns" = - EE_z [ln sigma(D(G(z)))], quad quad L_G^"sat" = EE_z [ln (1 - sigma(D(G(z))))].', "gan-g"),
        Paragraph(
            "They are often written as if they were one. They share their fixed point, but not their slopes with respect to the score: "
            "$-(1 - sigma)$ for the first, the *non-saturating* loss, and $-sigma$ for the second, the *saturating* one. Early on the discriminator "
            "rejects fakes with confidence, $sigma(D(G(z))) approx 0$: the first then pulls with full force where the second has stopped pulling. "
            f"This study uses the {plain(config['generator_loss'])} loss; `--generator-loss` chooses."
        ),
        Heading("What was trained"),
        Paragraph(network_sentence(config)),
        settings_of(config),
        Paragraph("Each run is made again, to the bit, by its command; for the first seed:"),
        Command(runs[0]["command"]),
        Heading("What came out"),
        *sample_figures(results, "GAN"),
        run_table(results, "gan-runs"),
        Figure(
            results["figures"]["curves"]["path"],
            "Training of the GAN, every seed a thin line. Losses are means between two points. The gap is $EE D(x) - EE D(G(z))$ on held-out images: "
            "the discriminator's lead. A balanced game keeps the loss below, but not far below, $2 ln 2$.",
            results["figures"]["curves"]["command"],
            "Curves of losses, gap and gradient norm against epochs",
            label="gan-curves",
        ),
        *class_figure(results, "gan-classes"),
        neighbour_figure(results, "gan-neighbours"),
        Finding(conclusion(results)),
    )


def network_sentence(config: dict[str, Any]) -> str:
    """What the networks are, from the configuration."""
    norm = "with batch normalisation" if config["generator_batch_norm"] else "without normalisation"
    dropout = f" with dropout {config['critic_dropout']:g}" if config["critic_dropout"] else " without dropout"
    return (
        "The generator is fully connected, 128-256-512-1024 hidden units, each layer linear, then a leaky rectifier of slope 0.2, "
        f"{norm}, a sigmoid at the end; its opponent has 512-256 hidden units{dropout}. Weights start with Kaiming's variance for the leaky slope: "
        "with the framework's default initialisation every layer shrinks its signal and the generator starts, and may stay, at one constant image. "
        "Images are sampled from a running average of the generator's weights."
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
            f"Classes of {run['samples']:,} samples of each run, told by their three nearest neighbours among real images (error "
            f"{100 * error['value']:.1f} %, 95 % interval {100 * error['low']:.1f} to {100 * error['high']:.1f} %, on real images); whiskers are "
            "95 % Wilson intervals.",
            results["figures"]["classes"]["command"],
            "Bars of class shares",
            label=label,
        ),
    )


def neighbour_figure(results: Results, label: str) -> Figure:
    """Samples and their nearest training images."""
    return Figure(
        results["figures"]["neighbours"]["path"],
        "Samples (above), the nearest of all training images (below) and their Euclidean distance with pixels in $[0, 1]$. A distance of 0 would be "
        "a copy.",
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
        low, high = min(r["neighbour_ratio_interval"][0] for r in runs), max(r["neighbour_ratio_interval"][1] for r in runs)
        verdict = (
            "nearer to the training images than fresh data are, which copying would explain"
            if high < 1
            else "further from the training images than fresh data are"
            if low > 1
            else "about as far from the training images as fresh data are"
        )
        parts.append(
            f"Samples are {verdict}: their median nearest distance is {joined(ratios)} times that of held-out images (95 % intervals within "
            f"{number(low)} to {number(high)})."
        )
    return " ".join(parts)


def overfitting_sentence(runs: Sequence[dict[str, Any]]) -> str:
    """Whether the discriminator's lead is larger on images that it trains on than on held-out ones; seeds are the sample."""
    train, held_out = ([r["last_metrics"][f"critic_gap_{part}"] for r in runs] for part in ("train", "held_out"))
    low, high = metrics.mean_interval([a - b for a, b in zip(train, held_out, strict=True)])
    told = f"At the end the discriminator's lead is {number(judging.mean(train))} on training and {number(judging.mean(held_out))} on held-out images"
    if math.isinf(low):
        return f"{told}; one seed cannot tell whether the difference is more than chance."
    interval = f"the difference has the 95 % interval {number(low)} to {number(high)} over seeds"
    verdict = "it has begun to learn its training images by heart" if low > 0 else "these seeds cannot tell it from none"
    return f"{told}: {interval}; {verdict}."


QUESTION = Question(
    "2a",
    "A generative adversarial network",
    "Train a GAN with fully connected networks on the images, show its samples, and describe how the training went.",
    ("gan",),
    measure,
    draw,
    tell,
)
