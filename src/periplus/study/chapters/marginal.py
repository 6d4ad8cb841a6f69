"""1b: the rate of rate-distortion theory, and why q(z) is hard."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from periplus import metrics
from periplus.information import ESTIMATORS, batch_rate, marginal_rate
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table
from periplus.seeds import stream
from periplus.study import curves
from periplus.study.curves import betas, half, mean, told_beta, values
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import number, where_told
from periplus.study.workshop import Workshop

#: Largest batch, and how many codes the batches of one size hold together.
BATCHES, CODES, FEWEST, MOST = 1024, 16_384, 24, 1000
#: Numbers of components at which the cost is timed, and rows on which the direct way is.
COMPONENTS, DIRECT_ROWS = (512, 2048, 8192), 64


def measure(workshop: Workshop) -> Results:
    """Both sweeps; on one encoder the estimates from batches against the exact rate; the cost."""
    prior, against = workshop.sweeps["vae"], workshop.sweeps["marginal"]
    # an encoder whose rate is near half of ln N: there neither floor nor ceiling hides a bias
    cell = curves.nearest_cell(prior, lambda told: abs(told["marginal_rate"] - told["ln_n"] / 2))
    run = prior.run(cell)
    train, _ = workshop.splits(run)
    mean_, log_scale = (part.float() for part in run.encode(train.images[:10_000]))
    exact = marginal_rate(mean_, log_scale, samples=8, generator=generator("exact"))
    return {
        "sweeps": {"vae": curves.sweep_record(prior), "marginal": curves.sweep_record(against)},
        "encoder": {"beta": cell["values"]["beta"], "seed": cell["seed"], "examples": len(mean_)},
        "exact": {"value": exact.value, "standard_error": exact.standard_error, "samples": exact.samples},
        "estimates": estimates(mean_, log_scale),
        "cost": cost(mean_.shape[1]),
    }


def generator(*names: str | int) -> torch.Generator:
    """Random numbers of this chapter."""
    return torch.Generator().manual_seed(stream(0, "1b", *names))


def estimates(mean_: Tensor, log_scale: Tensor) -> list[dict[str, Any]]:
    """Every estimator at every batch size: the mean over random batches, and its standard error over them."""
    rows, size = [], 2
    while size <= min(BATCHES, len(mean_)):
        count = min(MOST, max(FEWEST, CODES // size))
        random = generator("batches", size)
        found: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
        for _ in range(count):
            own = torch.randperm(len(mean_), generator=random)[:size]
            m, s = mean_[own], log_scale[own]
            z = m + s.exp() * torch.randn(m.shape, generator=random)
            for name in ESTIMATORS:
                found[name].append(float(batch_rate(z, m, s, name, len(mean_)).double().mean()))  # type: ignore[arg-type]
        for name in ESTIMATORS:
            error = statistics.stdev(found[name]) / math.sqrt(count)
            rows.append({"batch": size, "batches": count, "estimator": name, "value": statistics.fmean(found[name]), "standard_error": error})
        size *= 2
    return rows


def cost(d: int) -> list[dict[str, Any]]:
    """Seconds of one exact marginal rate against the number of components, ours and by direct differences (timed on some rows)."""
    rows = []
    for count in COMPONENTS:
        random = generator("cost", count)
        m, s = torch.randn(count, d, generator=random), math.log(0.05) * torch.rand(count, d, generator=random)
        z = (m + s.exp() * torch.randn(m.shape, generator=random))[:DIRECT_ROWS]
        ours = fastest(lambda m=m, s=s: marginal_rate(m, s))
        direct = fastest(lambda z=z, m=m, s=s: direct_density(z, m, s)) * count / DIRECT_ROWS
        rows.append({"components": count, "d": d, "direct_rows": DIRECT_ROWS, "ours": {"seconds": ours}, "direct": {"seconds": direct}})
    return rows


def fastest(work: Any, repeats: int = 3) -> float:
    """Seconds of the fastest of a few runs: what other programs on the machine disturb least."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def direct_density(z: Tensor, mean_: Tensor, log_scale: Tensor) -> Tensor:
    """The definition: all differences (rows, N, d), squared, summed, and a log-sum-exp; without constants."""
    return (-0.5 * ((z[:, None] - mean_) * (-log_scale).exp()).square().sum(2) - log_scale.sum(1)).logsumexp(1)


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw(results: Results, workshop: Workshop) -> Figures:
    """The bias of the estimates, their cost, and the two sweeps' curves."""
    exact, count = results["exact"], results["encoder"]["examples"]
    found: list[dict[str, Any]] = []
    for name in ESTIMATORS:
        own = [row for row in results["estimates"] if row["estimator"] == name]
        ends = [[row["value"] + side * metrics.student(row["batches"]) * row["standard_error"] for row in own] for side in (-1, 1)]
        told = {"x": [row["batch"] for row in own], "y": [row["value"] for row in own], "low": ends[0], "high": ends[1]}
        found.append({"label": name, **told})
    sizes = found[0]["x"]
    found.append({"label": "ln B", "x": sizes, "y": [math.log(size) for size in sizes], "plain": True})
    bias: dict[str, Any] = {
        "x_label": "batch size B",
        "y_label": "estimate / nats",
        "x_log": True,
        "y_log": True,
        "curves": found,
        "levels": [{"label": "exact", "y": exact["value"]}, {"label": "ln N", "y": math.log(count)}],
    }
    seconds: dict[str, Any] = {
        "x_label": "components N",
        "y_label": "seconds",
        "x_log": True,
        "y_log": True,
        "curves": [
            {"label": label, "x": [row["components"] for row in results["cost"]], "y": [row[key]["seconds"] for row in results["cost"]]}
            for key, label in (("ours", "tiled products (marginal_rate)"), ("direct", "all differences"))
        ],
    }
    highest = 3 * results["sweeps"]["vae"]["cells"][0]["test"]["ln_n"]
    return {
        "bias": curves.draw_lines([bias, seconds], workshop, "1b-bias", height=2.4, columns=4),
        "curve": curves.draw_curves(results["sweeps"], workshop, "1b-curve", highest),
    }


# ---- telling --------------------------------------------------------------------------------------------------------------------------------


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    figures, sweeps = results["figures"], results["sweeps"]
    encoder, config = results["encoder"], sweeps["marginal"]["config"]
    highest = 3 * sweeps["vae"]["cells"][0]["test"]["ln_n"]
    return (
        Heading("The loss"),
        Paragraph(
            "Rate-distortion theory charges a code for the information that it has about the image, whatever the law of the codes is. The prior of "
            "the $beta$-VAE is only a convenience. Replace it by the law that the codes really have:"
        ),
        Equation('L = D + beta EE_x "KL"[q(z|x) || q(z)], quad q(z) = EE_x q(z|x), quad EE_x "KL"[q(z|x) || q(z)] = I(x;z).', "rd-loss"),
        Paragraph("How do the two rates differ? Add and subtract $ln q(z)$ under the expectation:"),
        Equation(
            'underbrace(EE_x EE_(q(z|x)) [ln q(z|x) - ln p(z)], "prior rate") = underbrace(EE_x EE_(q(z|x)) [ln q(z|x) - ln q(z)], "marginal rate '
            '" I(x;z)) + underbrace(EE_(q(z)) [ln q(z) - ln p(z)], "KL"[q(z) || p(z)] >= 0).',
            "split",
        ),
        Paragraph(
            "So the prior rate is an upper bound on the information [@hoffman2016] [@alemi2018], and it is tight where the codes follow the prior. "
            f"The table has the three terms, measured on test images of the sweep {where_told(study, '1a', 'of chapter 1a', 'against the prior')}. "
            "The divergence is estimated image by image, so its error is smaller than those of its parts."
        ),
        split_table(sweeps["vae"], figures["curve"]["command"]),
        Heading("Why q(z) is hard for a Gaussian encoder"),
        Paragraph("The law of the codes is a mixture with one component for each of the $N$ images,"),
        Equation('q(z) = 1/N sum_(j=1)^N cal(N)(z; m(x_j), "diag" s(x_j)^2).', "mixture"),
        Paragraph(
            "*Cost.* One value of $ln q(z)$ needs the encodings of all $N$ images. The rate needs $N^2$ log-densities, and every step of training "
            "moves all encodings."
        ),
        Paragraph(
            "*No closed form.* The sum stands inside the logarithm. Neither the entropy of a mixture of normal laws nor its divergence from another "
            "law has a formula, so both must be estimated from samples."
        ),
        Paragraph(
            "*Bias.* A minibatch knows only $B$ of the $N$ components, and $- ln$ of an unbiased estimate of $q(z)$ is a biased estimate of $- ln "
            "q(z)$. Three estimates are in use. The *mixture* of the batch, with the own component of $z$ among the $B$, gives the information in a "
            "game of $B$ images: it is too low, and never above $ln B$ (this is InfoNCE with the perfect critic [@oord2018]). *Leave-one-out* omits "
            "the own component: by Jensen's inequality it is too high, and there is no ceiling. *Stratified* gives the own component the weight "
            "$1\\/N$ and lets the others share the rest [@chen2018]: it is too high, but never above $ln N$."
        ),
        Paragraph("*Rounding.* Where scales $s$ are small against locations $m$, the products of the fast formula below cancel in single precision."),
        Pseudocode(
            "The exact marginal rate of N encodings",
            (
                "$z_i <- m_i + s_i epsilon_i$ for all $i$",
                "*for* each tile of codes $i$ and of components $j$",
                "  $l_(i j) <- [z_i^2, z_i] dot [-1\\/(2 s_j^2), m_j\\/s_j^2] + c_j$, the log-density: one matrix product in float64",
                "  *where* rounding could matter, $l_(i j)$ from the differences $z_i - m_j$ themselves",
                "  $r_i <- r_i + sum_j exp(l_(i j) - l_(i i))$",
                "*return* $ln N - 1\\/N sum_i ln r_i$ and its standard error; $c_j = - sum_k (m_(j k)^2 \\/ (2 s_(j k)^2) + ln s_(j k)) - d\\/2 ln "
                "2 pi$",
            ),
            label="exact-rate",
        ),
        Heading("What it costs, and what batches make of it"),
        Paragraph(
            f"The encoder is the one trained with $beta$ = {told_beta(encoder['beta'])}, seed {encoder['seed']}: its rate is nearest to half of $ln "
            f"N$, so that neither zero nor a ceiling hides a bias. The data are {encoder['examples']:,} training images. For each batch size many "
            "random batches were drawn."
        ),
        Figure(
            figures["bias"]["path"],
            "Left: three estimates of the rate from batches with 95 % intervals over batches, the exact rate, and the ceilings $ln B$ and $ln N$. "
            f"Right: the time of one exact rate in d = {results['cost'][0]['d']} dimensions, by matrix products and by taking all differences (this "
            f"one extrapolated from {results['cost'][0]['direct_rows']} codes).",
            figures["bias"]["command"],
            "Estimates against batch size, and time against number of components",
            label="bias",
        ),
        bias_table(results, figures["bias"]["command"]),
        Heading("Trained with it"),
        Paragraph(
            f"The second sweep is {where_told(study, '1a', 'that of chapter 1a', 'the same')} with `--rate marginal`: its loss is [@rd-loss], with "
            f"the {config['estimator']} estimate from batches of {config['batch_size']}. There is no prior, and samples are drawn from $q(z)$ "
            "itself. Two figures tell what a code costs. One is the exact marginal rate of the test images, at most the logarithm of their number. "
            "The other can be compared with a rate against a prior: $EE [ln q(z|x) - ln q(z)]$ on test images, with $q(z)$ the mixture over the "
            "*training* images, which both sides of a channel could know."
        ),
        Paragraph(
            "This loss has a trap. For $N$ training images the marginal rate is never above $ln N$. Once the encodings are so narrow that they can "
            "all be told apart, the rate stays at $ln N$, however much narrower they become: nothing keeps $s$ from going to zero. The model has "
            "then learned its $N$ images by heart, and the code of any other image lies where $q(z)$ has no mass. The rate of training images "
            "cannot show this. The rate of test images against the $q(z)$ of the training images does."
        ),
        Command(sweeps["marginal"]["command"]),
        marginal_table(sweeps, figures["curve"]["command"]),
        Figure(
            figures["curve"]["path"],
            "Distortion against rate on test images. The rate is that against the prior for the $beta$-VAE, and that against the $q(z)$ of the "
            f"training images for the other model. Means over seeds with 95 % intervals; points beyond {highest:.0f} nats are left out.",
            figures["curve"]["command"],
            "Rate-distortion curves with the prior's and with the marginal rate",
            width=0.65,
            label="marginal-curve",
        ),
        Finding(conclusion(results)),
    )


def split_table(record: dict[str, Any], command: str) -> Table:
    """The three terms at every beta, first seed, with standard errors over images."""
    rows = []
    for cell in record["cells"]:
        if cell["seed"] == 0:
            told = cell["test"]
            parts = [f"{told[name]:.3f} ± {told[f'{name}_se']:.3f}" for name in ("prior_rate", "marginal_rate", "kl_to_prior")]
            rows.append((told_beta(cell["beta"]), *parts))
    first = record["cells"][0]["test"]
    return Table(
        ("β", "prior rate", "marginal rate", "KL[q(z) || p(z)]"),
        tuple(rows),
        f"The parts of the prior rate, in nats per image, ± standard error over the {first['examples']:,} test images; seed 0. An estimate below "
        "zero is zero within its error.",
        command,
        align=("left", "decimal", "decimal", "decimal"),
        label="split-table",
    )


def bias_table(results: Results, command: str) -> Table:
    """Some batch sizes of the figure as numbers."""
    sizes = sorted({row["batch"] for row in results["estimates"]})
    rows = []
    for size in [size for size in (2, 8, 32, 128, 1024) if size in sizes]:
        own = {row["estimator"]: row for row in results["estimates"] if row["batch"] == size}
        found = [f"{own[name]['value']:.3f} ± {own[name]['standard_error']:.3f}" for name in ESTIMATORS]
        rows.append((str(size), str(own["mixture"]["batches"]), *found, f"{math.log(size):.3f}"))
    exact = results["exact"]
    return Table(
        ("B", "batches", *ESTIMATORS, "ln B"),
        tuple(rows),
        f"Three estimates of the rate from batches of B images, in nats ± standard error over batches. The exact rate is {exact['value']:.3f} ± "
        f"{exact['standard_error']:.3f}, ln N = {math.log(results['encoder']['examples']):.3f}.",
        command,
        align=("right", "right", *("decimal",) * 4),
        label="bias-table",
    )


def marginal_table(sweeps: dict[str, Any], command: str) -> Table:
    """Both sweeps beside each other, on test images."""
    prior, against = sweeps["vae"], sweeps["marginal"]
    rows = []
    for beta in betas(against):
        row = [told_beta(beta)]
        row += [half(values(record, beta, "distortion")) for record in (prior, against)]
        row += [half(values(record, beta, "marginal_rate")) for record in (prior, against)]
        rows.append((*row, half(values(prior, beta, "rate")), half(values(against, beta, "rate"))))
    return Table(
        ("β", "D, prior", "D, marginal", "I, prior", "I, marginal", "R, prior", "R, marginal"),
        tuple(rows),
        "The two sweeps on test images, in nats per image: mean over seeds ± half of the 95 % interval. D: distortion. I: exact marginal rate of "
        f"these images, at most {prior['cells'][0]['test']['ln_n']:.2f}. R: what a code costs, for the first model against the prior, for the "
        "second against the q(z) of its training images.",
        command,
        align=("left", *("decimal",) * 6),
        label="marginal-table",
    )


def headline(results: Results) -> str:
    """The conclusion in a sentence or two."""
    exact, last = results["exact"]["value"], results["estimates"][-1]["batch"]
    off = {row["estimator"]: row["value"] - exact for row in results["estimates"] if row["batch"] == last}
    told = ", ".join(f"{name} {value:+.2f}" for name, value in off.items())
    return (
        f"q(z) needs all images: estimates from batches of {last:,} are off the exact rate of {exact:.2f} nats by {told}. "
        f"{by_heart_sentence(results['sweeps']['marginal'])}"
    )


def conclusion(results: Results) -> str:
    """What was measured, in words that follow from it."""
    sweeps = results["sweeps"]
    return "\n".join((bias_sentence(results), cost_sentence(results["cost"]), sweep_sentence(sweeps), by_heart_sentence(sweeps["marginal"])))


def bias_sentence(results: Results) -> str:
    """On which side of the exact rate each estimate lies, and from which batch size on it cannot be told from it."""
    exact = results["exact"]
    first, last = [], []
    for name in ESTIMATORS:
        own = [row for row in results["estimates"] if row["estimator"] == name]
        errors = [(row["value"] - exact["value"]) / math.hypot(row["standard_error"], exact["standard_error"]) for row in own]
        side = "below it" if errors[0] < -3 else "above it" if errors[0] > 3 else "not told apart from it"
        first.append(f"{name} is {side} ({number(own[0]['value'])})")
        last.append(f"{name} by {own[-1]['value'] - exact['value']:+.2g}" + (" (*more* than three standard errors)" if abs(errors[-1]) > 3 else ""))
    sizes = [row["batch"] for row in results["estimates"]]
    return (
        f"The exact rate is {exact['value']:.3f} ± {exact['standard_error']:.3f} nats. From batches of {min(sizes)}, {', '.join(first)}; from "
        f"batches of {max(sizes):,} it is missed by {', '.join(last)}."
    )


def cost_sentence(rows: list[dict[str, Any]]) -> str:
    """How the time grows, and the ratio at the largest size."""
    first, last = rows[0], rows[-1]
    power = math.log(last["ours"]["seconds"] / first["ours"]["seconds"]) / math.log(last["components"] / first["components"])
    ratio = last["direct"]["seconds"] / last["ours"]["seconds"]
    return (
        f"The time of an exact rate grows as N to the power {power:.1f}. For N = {last['components']:,} it takes "
        f"{number(last['ours']['seconds'], 2)} s, "
        + (f"{ratio:.1f} times less than by all differences." if ratio > 1 else f"{1 / ratio:.1f} times as long as by all differences.")
    )


def sweep_sentence(sweeps: dict[str, Any]) -> str:
    """Where training against q(z) gives the lower cost, by its own rate."""
    rows = curves.compare_sweeps(sweeps["marginal"], sweeps["vae"], 1)
    told = curves.verdict_sentence(rows, "the VAE against q(z)", "the β-VAE")
    return f"By D + βR on test images, each model with the rate that it was trained with: {told}."


def by_heart_sentence(record: dict[str, Any]) -> str:
    """Where the encoders trained against q(z) tell all training images apart, and what codes of other images then cost."""
    full = [b for b in betas(record) if min(values(record, b, "marginal_rate", "train")) > 0.99 * min(values(record, b, "ln_n", "train"))]
    dear = [b for b in full if min(values(record, b, "rate")) > 2 * min(values(record, b, "ln_n", "train"))]
    if not full:
        return "Trained against q(z), the encoders tell all training images apart at no β."
    told = f"Trained against q(z), the encoders tell all training images apart at β = {', '.join(map(told_beta, full))}"
    if not dear:
        return f"{told}; a test code costs at most twice ln N."
    cost = mean(values(record, dear[0], "rate"))
    return f"{told} and know them *by heart*: at β = {told_beta(dear[0])} a test code costs {cost:,.0f} nats."


QUESTION = Question(
    "1b",
    "The rate itself, and why q(z) is hard",
    "Replace the prior's term by the divergence from the law of codes: what does the loss become, and why is that law hard to compute for Gaussian "
    "encoders?",
    (),
    measure,
    draw,
    tell,
    ("vae", "marginal"),
)
