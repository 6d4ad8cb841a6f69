"""1a: the beta-VAE at its two extremes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from periplus import metrics, pictures
from periplus.evaluation import pixels
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Table
from periplus.runs import Run
from periplus.seeds import stream
from periplus.study import curves
from periplus.study.curves import betas, half, mean, told_beta, values
from periplus.study.judging import nearest_distances
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import counted, number, settings_of, where_told
from periplus.study.workshop import Workshop

COLUMNS = 12
SAMPLES = 500
NEIGHBOUR_IMAGES = 10_000
#: What counts as having reached an extreme.
CONSTANT_SHARE = 0.01
SILENT_RATE = 0.01


def measure(workshop: Workshop) -> Results:
    """The sweep of the beta-VAE, and how far from the data each cell's prior samples are."""
    swept = workshop.sweeps["vae"]
    record = curves.sweep_record(swept)
    for cell, told in zip(swept.cells, record["cells"], strict=True):
        told["sample_ratio"] = sample_ratio(swept.run(cell), workshop)
    return {"sweeps": {"vae": record}}


def sample_ratio(run: Run, workshop: Workshop) -> float | None:
    """Median distance of prior samples to their nearest training image, over that of test images; None where test images are training images."""
    train, test = (pixels(data.images[:NEIGHBOUR_IMAGES]) for data in workshop.splits(run))
    fresh = nearest_distances(test[:SAMPLES], train).median()
    return float(nearest_distances(run.sample(SAMPLES, seed=1).flatten(1), train).median() / fresh) if fresh > 0 else None


def draw(results: Results, workshop: Workshop) -> Figures:
    """The rate-distortion curve, rates and distortions against beta, and what three betas make of images and of the prior."""
    record = results["sweeps"]["vae"]
    first = record["cells"][0]["test"]
    common: dict[str, Any] = {"x_label": "β", "x_log": True}
    distortions = {
        **common,
        "y_label": "distortion / nats",
        "curves": [curves.against_beta(record, "distortion", f"D, {split}", split) for split in ("train", "test")],
        "levels": [
            {"label": "best constant image, test", "y": level(record, "constant_distortion")},
            {"label": "entropy of the grey pixels, test", "y": level(record, "entropy_floor")},
        ],
    }
    names = {"prior_rate": "rate, KL[q(z|x) || p(z)]", "marginal_rate": "marginal rate", "kl_to_prior": "KL[q(z) || p(z)]"}
    rates = {
        **common,
        "y_label": "rates on test images / nats",
        "y_log": True,
        "curves": [curves.against_beta(record, name, label) for name, label in names.items()],
        "levels": [{"label": f"ln {first['examples']}", "y": first["ln_n"]}],
    }
    return {
        "curve": curves.draw_curves(results["sweeps"], workshop, "1a-curve"),
        "extremes": curves.draw_lines([distortions, rates], workshop, "1a-extremes"),
        "images": draw_images(workshop),
    }


def three(found: list[float]) -> list[float]:
    """The smallest, the one nearest to 1, the largest."""
    middle = min(found, key=lambda beta: abs(math.log(max(beta, 1e-30))))
    return list(dict.fromkeys((found[0], middle, found[-1])))


def draw_images(workshop: Workshop) -> dict[str, str]:
    """Test images, then for three betas their reconstructions and samples of the prior; nothing selected."""
    swept = workshop.sweeps["vae"]
    cells = {cell["values"]["beta"]: cell for cell in swept.cells if cell["seed"] == 0}
    rows, labels, images = [], ["test images"], None
    for beta in three(sorted(cells)):
        run = swept.run(cells[beta])
        if images is None:
            _, test = workshop.splits(run)
            images = test.images[:COLUMNS].repeat(-(-COLUMNS // len(test)), 1, 1, 1)[:COLUMNS]
            rows.append(images.float() / 255)
        generator = torch.Generator().manual_seed(stream(0, "reconstructions"))
        z = run.channel.sample(*run.encode(images), generator)
        rows += [run.decode(z).clamp(0, 1), run.sample(COLUMNS).clamp(0, 1)]
        labels += [f"β = {told_beta(beta)}: rebuilt", "prior samples"]
    path = Path("figures") / "1a-images.png"
    pictures.image_grid(torch.cat(rows), workshop.folder / path, COLUMNS, labels)
    return {"path": str(path), "command": workshop.again("1a")}


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    record, figures = results["sweeps"]["vae"], results["figures"]
    bernoulli = record["config"]["likelihood"] == "bernoulli"
    return (
        Heading("The loss"),
        Paragraph(
            'An encoder sends an image $x$ to a normal law $q(z|x) = cal(N)(m(x), "diag" s(x)^2)$ of codes, a decoder sends a code $z$ to a law of '
            "images. The $beta$-VAE [@higgins2017] weighs what the decoder misses against what the code costs,"
        ),
        Equation(
            'L_beta = D + beta R, quad D = EE_x EE_(z tilde.op q(z|x)) [- ln p(x|z)], quad R = EE_x "KL"[q(z|x) || p(z)], quad p(z) = cal(N)(0, I),',
            "beta-loss",
        ),
        Paragraph(
            "in nats per image, summed over pixels; $beta = 1$ is the negative evidence bound of the variational autoencoder [@kingma2014]. With "
            "$q(z) = EE_x q(z|x)$, the law of codes when images are drawn from the data, the rate splits into what the code tells about the image, "
            "and how far codes are from the prior [@hoffman2016]:"
        ),
        Equation('R = I(x;z) + "KL"[q(z) || p(z)].', "rate-split"),
        Heading("β to infinity: nothing is said"),
        Paragraph(
            "For $beta -> infinity$ every nat of rate costs more than it can save. $R = 0$ is possible, with $q(z|x) = p(z)$ for every $x$; then "
            "$z$ knows nothing of $x$, and the best decoder is the one constant law that fits all images best. For pixels $x_i in [0, 1]$ and a "
            "Bernoulli likelihood that is the mean image, and, with $H_b (p) = -p ln p - (1 - p) ln (1 - p)$ and $overline(x)_i = EE_x x_i$,"
        ),
        Equation("D_infinity = min_c EE_x [- ln p_c (x)] = sum_i H_b (overline(x)_i),", "constant"),
        Paragraph(
            "for squared errors the total variance of the data. On test images, against the mean of the training images, it is slightly different. "
            "The loss itself stays finite: $L_infinity = D_infinity$. The encoder's dimensions fall silent: those whose location varies, "
            '$"Var"_x m_j (x) > 0.01$, are called active, and none is left.'
        ),
        Heading("β to zero: everything is said"),
        Paragraph(
            "For $beta -> 0$ noise has no use: $s -> 0$, and the model becomes a deterministic autoencoder. $D$ falls to what decoder and training "
            "allow, at best "
            + (
                "the entropy $EE_x sum_i H_b (x_i)$ of the grey pixels themselves, which no decoder can go below (it is zero for black and white). "
                if bernoulli
                else "zero. "
            )
            + "Meanwhile $R$ contains $- sum_j ln s_j$ and grows without bound, stopped by the optimiser or by float precision only. Not all "
            "of that is information. The data at hand are $N$ images, and whatever the code does, $I(x;z) <= H(x) = ln N$: the rest of $R$ must be "
            '$"KL"[q(z) || p(z)]$. Codes leave the prior, the decoder is never trained where prior samples fall, and what it draws there need not '
            "look like data. (This is a statement about training, not a law: a linear model with Gaussian data keeps $q(z) = p(z)$ for every $beta "
            "> 0$. So it is measured below, by the divergence.)"
        ),
        Heading("What was trained"),
        Paragraph(
            f"{len(betas(record))} values of $beta$, {counted(record['seeds'], 'seed')} each, one hidden layer of "
            f"{record['config']['hidden']} units on either side. $q(z)$ is evaluated exactly, as the mixture of all encodings of the "
            f"split{where_told(study, '1b', ' (chapter 1b)')}."
        ),
        settings_of(record["config"]),
        Command(record["command"]),
        Heading("What came out"),
        sweep_table(record, figures["curve"]["command"]),
        Figure(
            figures["curve"]["path"],
            "Distortion against rate on test images, a point for each $beta$: mean over seeds with 95 % intervals, and the single seeds as dots.",
            figures["curve"]["command"],
            "Rate-distortion curve of the beta-VAE",
            label="vae-curve",
        ),
        Figure(
            figures["extremes"]["path"],
            "The two extremes, against $beta$. Left: distortion, between the best constant image and the entropy of the pixels. Right: the rate "
            "and its two parts on test images; the marginal rate cannot exceed the logarithm of their number. (Values below zero, which are noise "
            "of the estimate, are gaps.)",
            figures["extremes"]["command"],
            "Distortion and rates against beta",
            label="vae-extremes",
        ),
        Figure(
            figures["images"]["path"],
            "Test images; for the smallest $beta$, the one nearest 1 and the largest: their reconstructions, and samples of the prior. Seed 0, not "
            "selected.",
            figures["images"]["command"],
            "Reconstructions and prior samples at three betas",
            label="vae-images",
        ),
        Finding(conclusion(results)),
    )


def sweep_table(record: dict[str, Any], command: str) -> Table:
    """A row for each beta."""
    rows = []
    for beta in betas(record):
        row: list[str] = [told_beta(beta)]
        row += [half(values(record, beta, "distortion", split)) for split in ("train", "test")]
        row += [half(values(record, beta, name)) for name in ("prior_rate", "marginal_rate", "kl_to_prior")]
        row.append(half([float(v) for v in values(record, beta, "active_units")]))
        rows.append((*row, half(ratios(record, beta))))
    first = record["cells"][0]
    return Table(
        ("β", "D, train", "D, test", "rate R", "marginal rate", "KL[q(z) || p(z)]", "active units", "samples"),
        tuple(rows),
        f"The sweep, in nats per image: mean over {counted(record['seeds'], 'seed')} ± half the 95 % interval. Rates on test images ($N$ = "
        f"{first['test']['examples']:,}, $ln N$ = {first['test']['ln_n']:.2f}). "
        f"Best constant image: {level(record, 'constant_distortion', 'train'):.2f} (train), {level(record, 'constant_distortion'):.2f} (test). "
        f"Least distortion possible on test images: {level(record, 'entropy_floor'):.2f}.{whose_images(record)} "
        f"Samples: median distance of prior samples to the nearest training image, over that of test images.",
        command,
        align=("left", *("decimal",) * 7),
        label="vae-table",
    )


def level(record: dict[str, Any], name: str, split: str = "test") -> float:
    """A figure of the images alone, such as the best constant image's distortion: its mean over seeds, which may hold out other images each."""
    return mean(values(record, betas(record)[0], name, split))


def whose_images(record: dict[str, Any]) -> str:
    """A sentence where seeds have other test images each; nothing where they share them."""
    several = len(set(values(record, betas(record)[0], "entropy_floor"))) > 1
    return (
        " Every seed holds out other images: intervals hold that difference too, and what no sweep can undercut is the mean over seeds."
        if several
        else ""
    )


def ratios(record: dict[str, Any], beta: float) -> list[float]:
    """How far prior samples are from the data at one beta, by seed."""
    return [cell["sample_ratio"] for cell in record["cells"] if cell["beta"] == beta and cell["sample_ratio"] is not None]


def conclusion(results: Results) -> str:
    """What the sweep says about both extremes, computed from it."""
    record = results["sweeps"]["vae"]
    return " ".join(said for said in (at_infinity(record), at_zero(record), prior_sentence(record), samples_sentence(record)) if said)


def headline(results: Results) -> str:
    """The conclusion in two sentences."""
    record = results["sweeps"]["vae"]
    return f"{at_infinity(record)} {prior_sentence(record)}"


def at_infinity(record: dict[str, Any]) -> str:
    """Whether the largest beta reaches R = 0 and the best constant."""
    beta = betas(record)[-1]
    excess = [d / c - 1 for d, c in zip(values(record, beta, "distortion"), values(record, beta, "constant_distortion"), strict=True)]
    rates = values(record, beta, "prior_rate")
    worst = max(excess, key=abs)
    silent, constant = max(rates) < SILENT_RATE, abs(worst) < CONSTANT_SHARE
    active = max(values(record, beta, "active_units"))
    said = f"At β = {told_beta(beta)} the rate is at most {number(max(rates))} nats ({'' if silent else '*not* '}below {SILENT_RATE:g})"
    told = f"the distortion on test images is within {100 * abs(worst):.2f} % of the best constant image's"
    if not constant:
        limit = f"*more* than {100 * CONSTANT_SHARE:g} %"
        told = f"the distortion on test images is up to {100 * abs(worst):.1f} % off that of the best constant image, {limit}"
    verdict = "this sweep has reached the upper extreme" if silent and constant else "this sweep has *not* reached the upper extreme"
    return f"{said}, {told}, and {active:g} unit{'s are' if active != 1 else ' is'} active: {verdict}."


def at_zero(record: dict[str, Any]) -> str:
    """What the smallest beta does."""
    beta = betas(record)[0]
    distortion, rate, marginal = (values(record, beta, name) for name in ("distortion", "prior_rate", "marginal_rate"))
    floor, ln_n = mean(values(record, beta, "entropy_floor")), mean(values(record, beta, "ln_n"))
    full = min(marginal) > 0.99 * ln_n
    return (
        f"At β = {told_beta(beta)} the rate is {half(rate)} nats, of which {half(marginal)} are information about the image "
        f"({'all' if full else 'not all'} that {number(math.exp(ln_n), 4)} images have: ln N = {ln_n:.2f}); the distortion, {half(distortion)} "
        f"nats, is {number(mean(distortion) - floor)} above the least possible."
    )


def one_of(record: dict[str, Any]) -> float:
    """The beta nearest to 1."""
    return min(betas(record), key=lambda beta: abs(math.log(max(beta, 1e-30))))


def prior_sentence(record: dict[str, Any]) -> str:
    """Whether codes leave the prior as beta falls."""
    beta, one = betas(record)[0], one_of(record)
    mismatch = values(record, beta, "kl_to_prior")
    divergences = [curves.spread(values(record, b, "kl_to_prior")) for b in betas(record)]
    falling = all(a[0] >= b[0] or a[1] <= b[2] for a, b in zip(divergences, divergences[1:], strict=False))
    far = curves.spread(mismatch)[1] > curves.spread(values(record, one, "kl_to_prior"))[2] and beta != one
    if far:
        verdict = f"codes *leave* the prior as β falls{'' if falling else ' (though not at every step)'}"
    else:
        verdict = "these seeds do *not* show codes leaving the prior as β falls"
    where = f"at β = {told_beta(beta)} and"
    return f"KL[q(z) || p(z)] is {half(mismatch)} nats {where} {half(values(record, one, 'kl_to_prior'))} at β = {told_beta(one)}: {verdict}."


def samples_sentence(record: dict[str, Any]) -> str:
    """Whether prior samples are further from the data at the smallest beta than at the one nearest 1; nothing where that was not measured."""
    beta, one = betas(record)[0], one_of(record)
    here, there = ratios(record, beta), ratios(record, one)
    if not here or not there or beta == one:
        return ""
    low, high = metrics.welch_interval(here, there)
    verdict = "*further* from the data" if low > 0 else "*nearer* to the data" if high < 0 else "*not tellably* further from or nearer to the data"
    told = f"{half(here)} times as far from the nearest training image as test images are, against {half(there)}"
    return f"Prior samples are {verdict} at the smallest β: {told}."


QUESTION = Question(
    "1a",
    "The β-VAE and its two extremes",
    "What does the loss of a β-VAE become as β goes to zero and as it goes to infinity, and what becomes of reconstructions and samples?",
    (),
    measure,
    draw,
    tell,
    ("vae",),
)
