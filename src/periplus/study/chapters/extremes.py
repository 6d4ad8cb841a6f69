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
        labels += [f"β = {beta:g}: rebuilt", "prior samples"]
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
            'An encoder maps an image $x$ to a normal law $q(z|x) = cal(N)(m(x), "diag" s(x)^2)$ of codes $z$. A decoder maps a code to a law '
            "$p(x|z)$ of images. The loss of the $beta$-VAE [@higgins2017] adds the distortion $D$, what the decoder gets wrong, and $beta$ times "
            "the rate $R$, what the code costs:"
        ),
        Equation(
            'L_beta = D + beta R, quad D = EE_x EE_(z tilde.op q(z|x)) [- ln p(x|z)], quad R = EE_x "KL"[q(z|x) || p(z)], quad p(z) = cal(N)(0, I).',
            "beta-loss",
        ),
        Paragraph(
            "Both are in nats per image, summed over pixels. At $beta = 1$ the loss is the negative evidence lower bound of the variational "
            "autoencoder [@kingma2014]. Let $q(z) = EE_x q(z|x)$ be the law of the codes when images are drawn from the data. The rate then has two "
            "parts [@hoffman2016]: the information $I(x;z)$ that the code has about the image, and the divergence of the codes from the prior,"
        ),
        Equation('R = EE_x "KL"[q(z|x) || q(z)] + "KL"[q(z) || p(z)] = I(x;z) + "KL"[q(z) || p(z)].', "rate-split"),
        Heading("β to infinity: the code says nothing"),
        Paragraph(
            "A rate of zero is always possible: let $q(z|x) = p(z)$ for every $x$. The code then says nothing about the image, and the best decoder "
            "gives one and the same law for all images. For pixels $x_i in [0, 1]$ and a Bernoulli likelihood this law is the mean image "
            "$overline(x)_i = EE_x x_i$. Its distortion is a sum of binary entropies,"
        ),
        Equation("D_infinity = min_c EE_x [- ln p_c (x)] = sum_i H_b (overline(x)_i), quad H_b (p) = - p ln p - (1 - p) ln (1 - p)", "constant"),
        Paragraph(
            "(for a Gaussian likelihood: the total variance of the data, in the unit of the likelihood). So the least loss is never above "
            "$D_infinity$, and a model that reaches it has $R <= D_infinity \\/ beta$. For $beta -> infinity$ the rate goes to zero and the "
            "distortion to $D_infinity$. On test images the distortion is slightly different, because the mean is that of the training images. A "
            'dimension $j$ of the code is called *active* where its location depends on the image, $"Var"_x m_j (x) > 0.01$. In this limit none is '
            "active."
        ),
        Heading("β to zero: the code says everything"),
        Paragraph(
            "For $beta -> 0$ a code costs nothing, and noise in it only does harm. So $s -> 0$, and the model becomes a deterministic autoencoder. "
            "The distortion falls to what the decoder and its training allow. No decoder can go below "
            + (
                "the entropy $EE_x sum_i H_b (x_i)$ of the grey pixels themselves, which is zero for images in black and white. "
                if bernoulli
                else "zero. "
            )
            + "The rate contains $- sum_j ln s_j$ and grows without bound, until the optimiser or the precision of the numbers stops it. Not all of "
            "this rate is information. The data are $N$ images, and no code can say more than which of them it was made from: $I(x;z) <= H(x) = ln "
            'N$. The rest of the rate must be $"KL"[q(z) || p(z)]$: the codes leave the prior. Samples of the prior then lie where the decoder was '
            "never trained, and need not look like data."
        ),
        Paragraph(
            "The last step is an observation about training and no theorem: a linear model of Gaussian data keeps $q(z) = p(z)$ for every $beta > "
            "0$. Therefore the divergence is measured below."
        ),
        Heading("What was trained"),
        Paragraph(
            f"{len(betas(record))} values of $beta$ with {counted(record['seeds'], 'seed')} each. Encoder and decoder have "
            f"{counted(record['config'].get('depth', 1), 'hidden layer')} of {record['config']['hidden']} units. $q(z)$ is computed exactly, as the "
            f"mixture of the encodings of all images{where_told(study, '1b', ' (chapter 1b)')}."
        ),
        settings_of(record["config"]),
        Command(record["command"]),
        Heading("What came out"),
        sweep_table(record, figures["curve"]["command"]),
        Figure(
            figures["curve"]["path"],
            "Distortion against rate on test images. Each point is one $beta$, written beside it: the mean over seeds with 95 % intervals; dots are "
            "single seeds.",
            figures["curve"]["command"],
            "Rate-distortion curve of the beta-VAE",
            width=0.8,
            label="vae-curve",
        ),
        Figure(
            figures["extremes"]["path"],
            "Both extremes. Left: the distortion lies between the best constant image (above) and the entropy of the pixels (below). Right: the "
            "rate and its two parts on test images; the marginal rate $I(x;z)$ cannot exceed the logarithm of their number. Estimates that are "
            "below zero by noise have no place on this axis and are left out.",
            figures["extremes"]["command"],
            "Distortion and rates against beta",
            label="vae-extremes",
        ),
        Figure(
            figures["images"]["path"],
            "Test images in the first row. Below, for the smallest $beta$, the one nearest to 1 and the largest: their reconstructions, and images "
            "decoded from samples of the prior. Seed 0; nothing is selected.",
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
        row.append(half([float(v) for v in values(record, beta, "active_units")], 1))
        rows.append((*row, half(ratios(record, beta))))
    first = record["cells"][0]
    return Table(
        ("β", "D, train", "D, test", "rate R", "I(x;z)", "KL[q(z) || p(z)]", "active units", "samples"),
        tuple(rows),
        f"The sweep over β: mean over {counted(record['seeds'], 'seed')} ± half of the 95 % interval. Distortion D, rate R and its two parts are in "
        f"nats per image, the last three on test images ($N$ = {first['test']['examples']:,}, $ln N$ = {first['test']['ln_n']:.2f}). "
        f"The best constant image has D = {level(record, 'constant_distortion', 'train'):.2f} (train) and {level(record, 'constant_distortion'):.2f} "
        f"(test); the least distortion possible on test images is {level(record, 'entropy_floor'):.2f}.{whose_images(record)} Active units: of "
        f"{record['config']['latent_dim']}. Samples: median distance of prior samples to the nearest training image, divided by that of test images.",
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
    return " Every seed holds out other images: the intervals contain this difference too, and these bounds are means over seeds." if several else ""


def ratios(record: dict[str, Any], beta: float) -> list[float]:
    """How far prior samples are from the data at one beta, by seed."""
    return [cell["sample_ratio"] for cell in record["cells"] if cell["beta"] == beta and cell["sample_ratio"] is not None]


def conclusion(results: Results) -> str:
    """What the sweep says about both extremes, computed from it."""
    record = results["sweeps"]["vae"]
    return "\n".join(said for said in (at_infinity(record), at_zero(record), prior_sentence(record), samples_sentence(record)) if said)


def headline(results: Results) -> str:
    """The conclusion in two sentences."""
    record = results["sweeps"]["vae"]
    least, most = betas(record)[0], betas(record)[-1]
    upper = "the code says nothing, the upper extreme is reached" if reached(record) else "the upper extreme is *not* reached"
    rate, marginal = (values(record, least, name) for name in ("prior_rate", "marginal_rate"))
    leave = "the codes *leave* the prior" if leaves_prior(record) else "that the codes leave the prior is *not* shown"
    return (
        f"At β = {told_beta(most)} the rate is at most {number(max(values(record, most, 'prior_rate')))} nats: {upper}. At β = {told_beta(least)} "
        f"the rate is {half(rate)} nats, of which {half(marginal)} are information; {leave}."
    )


def excesses(record: dict[str, Any]) -> list[float]:
    """By which part the distortion at the largest beta is off that of the best constant image, on test images, by seed."""
    beta = betas(record)[-1]
    return [d / c - 1 for d, c in zip(values(record, beta, "distortion"), values(record, beta, "constant_distortion"), strict=True)]


def reached(record: dict[str, Any]) -> bool:
    """Whether the largest beta has a rate of next to nothing and the distortion of the best constant image, for every seed."""
    return max(values(record, betas(record)[-1], "prior_rate")) < SILENT_RATE and max(map(abs, excesses(record))) < CONSTANT_SHARE


def at_infinity(record: dict[str, Any]) -> str:
    """Whether the largest beta reaches R = 0 and the best constant."""
    beta = betas(record)[-1]
    rates, worst = values(record, beta, "prior_rate"), max(excesses(record), key=abs)
    active = max(values(record, beta, "active_units"))
    silent = "" if max(rates) < SILENT_RATE else "*not* "
    told = f"the distortion on test images is within {100 * abs(worst):.2f} % of that of the best constant image"
    if abs(worst) >= CONSTANT_SHARE:
        limit = f"*more* than {100 * CONSTANT_SHARE:g} %"
        told = f"the distortion on test images is up to {100 * abs(worst):.1f} % off that of the best constant image, {limit}"
    verdict = "this sweep has reached the upper extreme" if reached(record) else "this sweep has *not* reached the upper extreme"
    return (
        f"At β = {told_beta(beta)} the rate is at most {number(max(rates))} nats ({silent}below {SILENT_RATE:g}), {told}, and "
        f"{active:g} unit{'s are' if active != 1 else ' is'} active: {verdict}."
    )


def at_zero(record: dict[str, Any]) -> str:
    """What the smallest beta does."""
    beta = betas(record)[0]
    distortion, rate, marginal = (values(record, beta, name) for name in ("distortion", "prior_rate", "marginal_rate"))
    floor, ln_n = mean(values(record, beta, "entropy_floor")), mean(values(record, beta, "ln_n"))
    full = min(marginal) > 0.99 * ln_n
    return (
        f"At β = {told_beta(beta)} the rate is {half(rate)} nats, of which {half(marginal)} are information about the image "
        f"({'all' if full else 'not all'} that {math.exp(ln_n):,.0f} images have: ln N = {ln_n:.2f}). The distortion, {half(distortion)} "
        f"nats, is {number(mean(distortion) - floor)} above the least possible."
    )


def one_of(record: dict[str, Any]) -> float:
    """The beta nearest to 1."""
    return min(betas(record), key=lambda beta: abs(math.log(max(beta, 1e-30))))


def leaves_prior(record: dict[str, Any]) -> bool:
    """Whether the divergence from the prior is larger at the smallest beta than at the one nearest 1, interval against interval."""
    beta, one = betas(record)[0], one_of(record)
    here, there = (curves.spread(values(record, b, "kl_to_prior")) for b in (beta, one))
    return beta != one and here[1] > there[2]


def prior_sentence(record: dict[str, Any]) -> str:
    """Whether codes leave the prior as beta falls."""
    beta, one = betas(record)[0], one_of(record)
    divergences = [curves.spread(values(record, b, "kl_to_prior")) for b in betas(record)]
    falling = all(a[0] >= b[0] or a[1] <= b[2] for a, b in zip(divergences, divergences[1:], strict=False))
    if leaves_prior(record):
        verdict = f"the codes *leave* the prior as β falls{'' if falling else ' (though not at every step)'}"
    else:
        verdict = "these seeds do *not* show that the codes leave the prior as β falls"
    here, there = (half(values(record, b, "kl_to_prior")) for b in (beta, one))
    alone = " (one seed: nothing is known of others)" if len(values(record, beta, "kl_to_prior")) == 1 else ""
    return f"KL[q(z) || p(z)] is {here} nats at β = {told_beta(beta)} and {there} at β = {told_beta(one)}: {verdict}{alone}."


def samples_sentence(record: dict[str, Any]) -> str:
    """Whether prior samples are further from the data at the smallest beta than at the one nearest 1; nothing where that was not measured."""
    beta, one = betas(record)[0], one_of(record)
    here, there = ratios(record, beta), ratios(record, one)
    if not here or not there or beta == one:
        return ""
    low, high = metrics.welch_interval(here, there)
    than = f"than those at β = {told_beta(one)}"
    verdict = (
        f"*further* from the data {than}"
        if low > 0
        else f"*nearer* to the data {than}"
        if high < 0
        else f"*not told apart* in their distance from the data from those at β = {told_beta(one)}"
    )
    return (
        f"Prior samples at β = {told_beta(beta)} are {verdict}: {half(here)} times as far from the nearest training image as test images are, "
        f"against {half(there)} times."
    )


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
