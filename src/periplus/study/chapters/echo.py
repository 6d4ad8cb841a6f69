"""1c: echo noise, and its recursion written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from periplus import pictures
from periplus.channels import NEGLIGIBLE, EchoChannel, echo_moments, unroll
from periplus.information import active_units
from periplus.plots import densities
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table
from periplus.seeds import stream
from periplus.study import curves
from periplus.study.curves import told_beta
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import counted, number, where_told
from periplus.study.workshop import Workshop

#: Recursions whose law is shown; paths drawn; recursions that stand for infinitely many.
SHOWN, PATHS, LIMIT = (0, 1, 2, 8), 100_000, 120
EDGES, BINS = (-1.5, 3.5), 50
MOST_TERMS = 24
STRIP = 7
#: The example: x ~ U(-1, 1), m = x, s = 0.5 + 0.3 x, so |m| <= 1 and s <= 0.8.
BOUND, RATIO = 1.0, 0.8


def example(x: Tensor) -> tuple[Tensor, Tensor]:
    """m(x) and s(x) of the one-dimensional example."""
    return x, 0.5 + 0.3 * x


def measure(workshop: Workshop) -> Results:
    """The law of the example's codes after some recursions, what is missing after K terms; and one code of a trained encoder taken apart."""
    sums = partial_sums()
    limit = sums[-1]
    edges = torch.linspace(*EDGES, BINS + 1, dtype=torch.float64)
    fine = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[:, None]
    m, s = example(fine)
    moments = [round(float(value), 12) + 0.0 for value in echo_moments(m, s)]  # 0, not -0
    return {
        "sweeps": {"echo": curves.sweep_record(workshop.sweeps["echo"])},
        "example": {
            "paths": PATHS,
            "edges": edges.tolist(),
            "mean_log_scale": float(s.log().mean()),
            "mean": moments[0],
            "second_moment": moments[1],
            "laws": [{"recursions": k, **law(sums[k], edges)} for k in (*SHOWN, LIMIT)],
            "truncation": [truncation(sums[k - 1], limit, k) for k in range(1, MOST_TERMS + 1)],
        },
        "code": take_apart(workshop),
    }


def partial_sums() -> list[Tensor]:
    """The code after 0, 1, ... LIMIT recursions along PATHS independent paths: z_K = z_{K-1} + s(x) s(x1) ... s(x_{K-1}) m(x_K), float64."""
    random = torch.Generator().manual_seed(stream(0, "1c"))
    total = torch.zeros(PATHS, dtype=torch.float64)
    weight = torch.ones(PATHS, dtype=torch.float64)
    kept = []
    for _ in range(LIMIT + 1):
        m, s = example(2 * torch.rand(PATHS, generator=random, dtype=torch.float64) - 1)
        total = total + weight * m
        weight = weight * s
        kept.append(total)
    return kept


def law(z: Tensor, edges: Tensor) -> dict[str, Any]:
    """A histogram as a density, and two moments with standard errors."""
    counts = torch.histogram(z.clamp(edges[0], edges[-1]), edges).hist
    square = z.square()
    return {
        "density": [round(v, 5) for v in (counts / len(z) / (edges[1] - edges[0])).tolist()],
        "mean": float(z.mean()),
        "mean_se": float(z.std() / math.sqrt(len(z))),
        "second_moment": float(square.mean()),
        "second_moment_se": float(square.std() / math.sqrt(len(z))),
    }


def truncation(z: Tensor, limit: Tensor, terms: int) -> dict[str, float]:
    """What is missing after so many terms, the row's own among them: largest and root mean square over paths, and the bound."""
    missing = (z - limit).abs()
    bound = BOUND * RATIO**terms / (1 - RATIO)
    return {"terms": terms, "largest": float(missing.max()), "root_mean_square": float(missing.square().mean().sqrt()), "bound": bound}


def take_apart(workshop: Workshop) -> dict[str, Any]:
    """One code of a trained echo encoder as a sum over images: the first test image and others drawn at random from the training images."""
    run, cell, index, m, s = chosen(workshop)
    weights = torch.cat([torch.ones_like(s[:1]), s[:-1].cumprod(0)])  # (K, d): of each image's location in the code
    encoded, log_scale = run.encode(workshop.splits(run)[0].images[:4096])
    logs = run.channel.log_scale(log_scale).double()
    active = encoded.double().var(0, correction=0) > 0.01
    used = active if bool(active.any()) else torch.ones_like(active)
    share = (weights * m)[:, used].norm(dim=1)
    slowest = float(logs.mean(0).max())
    return {
        "beta": cell["values"]["beta"],
        "seed": cell["seed"],
        "dimensions": m.shape[1],
        "active": active_units(encoded),
        "images": index,
        "weights": weights[:, used].mean(1).tolist(),
        "shares": (share / share.sum()).tolist(),
        "mean_log_scale": {"largest": slowest, "active": float(logs.mean(0)[used].mean())},
        "largest_scale": float(logs.max().exp()),
        "terms_needed": math.ceil(math.log(NEGLIGIBLE) / slowest) if slowest < 0 else None,
        "terms_needed_active": math.ceil(math.log(NEGLIGIBLE) / float(logs.mean(0)[used].max())) if float(logs.mean(0)[used].max()) < 0 else None,
    }


def chosen(workshop: Workshop) -> tuple[Any, dict[str, Any], list[int], Tensor, Tensor]:
    """The encoder, its cell, which training images are the noise, and m, s (K, d) float64 of the test image and of these."""
    swept = workshop.sweeps["echo"]
    cell = curves.nearest_cell(swept, lambda told: abs(told["rate"] - told["ln_n"] / 2))
    run = swept.run(cell)
    train, test = workshop.splits(run)
    random = torch.Generator().manual_seed(stream(0, "1c", "code"))
    index = torch.randperm(len(train), generator=random)[: min(STRIP - 1, len(train))].tolist()
    mean, log_scale = run.encode(torch.cat([test.images[:1], train.images[index]]))
    assert isinstance(run.channel, EchoChannel)
    return run, cell, index, mean.double(), run.channel.log_scale(log_scale).double().exp()


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw(results: Results, workshop: Workshop) -> Figures:
    """The law building up, the truncation error, the strip of images that make a code."""
    again, told = workshop.again("1c"), results["example"]
    path = Path("figures") / "1c-law.svg"
    panels = [{"title": f"{row['recursions']} recursions", "density": row["density"]} for row in told["laws"][:-1]]
    densities(panels, told["edges"], workshop.folder / path, "z", told["laws"][-1]["density"])
    terms = [row["terms"] for row in told["truncation"]]
    found = [
        {"label": label, "x": terms, "y": [row[key] for row in told["truncation"]], "plain": key == "bound"}
        for key, label in (("largest", "largest error"), ("root_mean_square", "root mean square error"), ("bound", "bound M r^K / (1 - r)"))
    ]
    panel = {"x_label": "terms K", "y_label": "what is missing of z", "y_log": True, "curves": found}
    return {
        "law": {"path": str(path), "command": again},
        "truncation": curves.draw_lines([panel], workshop, "1c-truncation", height=2.5),
        "strip": {"path": str(draw_strip(results, workshop)), "command": again},
    }


def draw_strip(results: Results, workshop: Workshop) -> Path:
    """The images of a code with their weights, and what the decoder makes of the sum so far."""
    run, _, index, m, s = chosen(workshop)
    train, test = workshop.splits(run)
    weights = torch.cat([torch.ones_like(s[:1]), s[:-1].cumprod(0)])
    rebuilt = run.decode((weights * m).cumsum(0).float()).clamp(0, 1)
    shown = torch.cat([test.images[:1], train.images[index]]).float() / 255
    path = Path("figures") / "1c-strip.png"
    labels = ("image", "decoded so far", "weight")
    pictures.neighbour_strip(shown, rebuilt, results["code"]["weights"], workshop.folder / path, labels, columns=STRIP)
    return path


# ---- telling --------------------------------------------------------------------------------------------------------------------------------


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    figures, told, code = results["figures"], results["example"], results["code"]
    return (
        Heading("Noise made of other codes"),
        Paragraph(
            "The noise of an echo encoder [@brekelmans2019] does not come from a law that somebody chose. It is another code: the code of an image "
            "$x_1$ that is drawn from the data, independently of $x$,"
        ),
        Equation(unroll(0, "typst") + ", quad z_1 tilde.op q^*(z|x_1), quad x_1 tilde.op p(x).", "echo"),
        Paragraph(
            "Here $m$ is a location and $s > 0$ a scale for every dimension; $dot.o$ multiplies dimension by dimension. $z_1 tilde.op q^*(z|x_1)$ "
            "means that $z_1$ is itself a code, made by the same recipe, with noise of its own. So the law $q^*$ is defined by itself: it is the "
            "fixed point of this recipe. Because $x_1$ is a fresh draw from the data, $z_1$ follows the law of *all* codes, $q^*(z) = EE_x "
            "q^*(z|x)$, and is independent of $x$. The noise has the same shape as the "
            f"signal{where_told(study, '1d', ', and chapter 1d rests on this', '')}."
        ),
        Paragraph("Put the recipe into itself once, and once more, with $x_1, x_2, ...$ independent draws from the data:"),
        Equation(unroll(1, "typst") + ",", "echo-1"),
        Equation(unroll(2, "typst") + ".", "echo-2"),
        Paragraph(
            "Multiplied out, a code is a weighted sum of the locations of a whole chain of images. The weight of an image is the product of the "
            "scales of the images before it, as an echo becomes weaker from wall to wall:"
        ),
        Equation("z = sum_(k=0)^infinity (product_(i=0)^(k-1) s(x_i)) dot.o m(x_k), quad x_0 = x.", "echo-series"),
        Heading("When there is a limit"),
        Paragraph(
            "The logarithm of a weight is a sum of independent terms, which changes by $EE ln s$ per step on average. If in every dimension $EE ln "
            "s < 0$ and $EE ln^+ |m| < infinity$, the weights fall geometrically, the series converges with probability one, and $q^*$ exists and "
            "is unique: where the recursion was started is forgotten. If moreover $|m| <= M$ and $s <= r < 1$, what is missing after $K$ terms (the "
            "term $m(x)$ is the first) is at most"
        ),
        Equation("abs(z - z^((K))) <= sum_(k >= K) r^k M = M r^K / (1 - r).", "truncation"),
        Paragraph(
            "The moments follow without any simulation, because $z_1$ is independent of $x$ and has the law of $z$. Take the means of $z$ and of "
            "$z^2$ on both sides of [@echo], dimension by dimension, and solve:"
        ),
        Equation("EE z = (EE m) / (1 - EE s), quad EE z^2 = (EE m^2 + 2 EE[m s] EE z) / (1 - EE s^2).", "echo-moments"),
        Pseudocode(
            "One code, by its definition",
            (
                "$z <- m(x)$; $w <- s(x)$",
                "*for* $k = 1, 2, ...$ *until* $max w$ is negligible",
                "  *draw* $x_k$ from the data, independent of all before",
                "  $z <- z + w dot.o m(x_k)$; $w <- w dot.o s(x_k)$",
                "*return* $z$",
            ),
        ),
        Heading("An example, and its law"),
        Paragraph(
            "Let $x tilde.op cal(U)(-1, 1)$, $m(x) = x$ and $s(x) = 0.5 + 0.3 x$. Large locations have large scales, so the law of the codes is "
            f"skewed. Here $M = 1$, $r = 0.8$ and $EE ln s = {told['mean_log_scale']:.4f}$."
        ),
        Figure(
            figures["law"]["path"],
            f"How the law of the codes builds up. Grey: histograms of {told['paths']:,} codes after 0, 1, 2 and 8 recursions. Line: the limit, after "
            f"{told['laws'][-1]['recursions']} recursions.",
            figures["law"]["command"],
            "Histograms of codes after several recursions",
            label="law",
        ),
        law_table(told, figures["law"]["command"]),
        Figure(
            figures["truncation"]["path"],
            "What is missing of a code after $K$ terms: the largest and the root mean square over the same codes, and the bound [@truncation].",
            figures["truncation"]["command"],
            "Truncation error against the number of terms",
            width=0.8,
            label="truncation-figure",
        ),
        Heading("A code of this study's data"),
        Paragraph(
            f"The same for real images. The encoder is the one of the echo sweep{where_told(study, '1d', ' of chapter 1d')} with $beta$ = "
            f"{told_beta(code['beta'])}, seed {code['seed']}; {code['active']} of its {code['dimensions']} dimensions are active. The code is that "
            "of the first test image. The images that make its noise are drawn at random from the training images."
        ),
        Command(results["sweeps"]["echo"]["command"]),
        Figure(
            figures["strip"]["path"],
            "What a code is made of. First row: the image itself, then the images that make its noise. Second row: what the decoder makes of the "
            "sum up to there. Below: the weight of the image in the code, averaged over "
            + ("the active dimensions." if code["active"] else "all dimensions (none is active)."),
            figures["strip"]["command"],
            "Images, partial sums decoded, and weights",
            label="strip",
        ),
        Finding(conclusion(results)),
    )


def law_table(told: dict[str, Any], command: str) -> Table:
    """Moments after some recursions against the limit's closed form."""
    rows = tuple(
        (
            "limit" if row is told["laws"][-1] else str(row["recursions"]),
            f"{row['mean']:.4f} ± {row['mean_se']:.4f}",
            f"{row['second_moment']:.4f} ± {row['second_moment_se']:.4f}",
            f"{errors_off(row, told):.1f}",
        )
        for row in told["laws"]
    )
    return Table(
        ("recursions", "E z", "E z²", "error of E z², in standard errors"),
        rows,
        f"Moments of the codes of the example ± standard error. The closed form [@echo-moments] gives E z = {told['mean']:.4f} and E z² = "
        f"{told['second_moment']:.4f}.",
        command,
        align=("left", "decimal", "decimal", "decimal"),
        label="law-table",
    )


def errors_off(row: dict[str, Any], told: dict[str, Any]) -> float:
    """By how many standard errors a second moment is off the closed form."""
    return float((row["second_moment"] - told["second_moment"]) / row["second_moment_se"])


def headline(results: Results) -> str:
    """The conclusion in one sentence."""
    told = results["example"]
    limit = told["laws"][-1]
    agrees = "as the closed form has it" if abs(errors_off(limit, told)) < 3 else f"*not* the {number(told['second_moment'], 4)} of the closed form"
    return (
        "A code is a weighted sum over a chain of images. "
        + (
            f"The example converges; its second moment is {number(limit['second_moment'], 4)}, {agrees}, "
            if told["mean_log_scale"] < 0
            else "The example does *not* converge, "
        )
        + (f"and the error bound is *broken* for {len(broken(told))} numbers of terms." if broken(told) else "and no code exceeds the error bound.")
    )


def conclusion(results: Results) -> str:
    """What the example and the trained code show, computed from them."""
    return f"{example_sentence(results['example'])}\n{code_sentence(results['code'])}"


def broken(told: dict[str, Any]) -> list[int]:
    """Numbers of terms at which some code exceeds the bound on what is missing."""
    return [row["terms"] for row in told["truncation"] if row["largest"] > row["bound"]]


def example_sentence(told: dict[str, Any]) -> str:
    """Whether the example converges to the closed form, within the bound, and from how many recursions on."""
    agreeing = [row["recursions"] for row in told["laws"] if abs(errors_off(row, told)) < 3]
    limit = told["laws"][-1]
    converges = "converges" if told["mean_log_scale"] < 0 else "does *not* converge"
    found, truth = number(limit["second_moment"], 4), number(told["second_moment"], 4)
    if abs(errors_off(limit, told)) < 3:
        first = min(k for k in agreeing if all(k2 in agreeing for k2 in [row["recursions"] for row in told["laws"]] if k2 >= k))
        match = f"The second moment of its limit is {found}, that of the closed form {truth}; they agree within three standard errors from "
        match += f"{counted(first, 'recursion')} on (of those shown)."
    else:
        off = number(abs(errors_off(limit, told)))
        match = f"The second moment of its limit, {found}, is *not* that of the closed form, {truth}: it is {off} standard errors off."
    over = broken(told)
    held = f"The error bound is *broken* at K = {', '.join(map(str, over))}" if over else "No code exceeds the error bound at any K"
    closest = max(row["largest"] / row["bound"] for row in told["truncation"])
    return f"The example {converges} (E ln s = {told['mean_log_scale']:.3f}). {match} {held}; the largest error is {100 * closest:.0f} % of it."


def code_sentence(code: dict[str, Any]) -> str:
    """How much of the trained code is its own image, and how long its echo is."""
    own, first, last = code["shares"][0], code["weights"][1] if len(code["weights"]) > 1 else 0.0, code["weights"][-1]
    whose = "mostly its own image" if own > 0.5 else "mostly other images"
    needed = code["terms_needed"]
    if needed is None:
        end = f"In its slowest dimension E ln s = {number(code['mean_log_scale']['largest'])}: the recursion does *not* converge there."
    else:
        end = f"In its slowest dimension the weights fall below single precision after {needed:,} images, on average"
        if code["terms_needed_active"] is not None and code["active"] and code["terms_needed_active"] < needed:
            end += f"; in the slowest active one after {code['terms_needed_active']:,}"
        end += "."
    return (
        f"The trained code is {whose}: {100 * own:.0f} % of the summed lengths of its terms, over active dimensions, are its own. The first image "
        f"of its noise has the weight {number(first, 2)}, the last one shown {number(last, 2)}. {end}"
    )


QUESTION = Question(
    "1c",
    "Echo noise, written out",
    "Write out two recursions of the echo encoder $z = m(x) + s(x) dot.o z_1$, and explain what its noise is.",
    (),
    measure,
    draw,
    tell,
    ("echo",),
)
