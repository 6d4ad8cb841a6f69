"""1d: the divergence of echo noise in closed form, and when the form is not the truth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from periplus.channels import EchoChannel
from periplus.information import Bound, echo_certificate, infonce, ksg_information, pairwise_log_density
from periplus.metrics import wilson_interval
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Table
from periplus.seeds import stream
from periplus.study import curves
from periplus.study.chapters.echo import example
from periplus.study.curves import betas, half, told_beta, values
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import number
from periplus.study.workshop import Workshop

SWEEPS = ("vae", "marginal", "echo")
POINTS, PAIRS, TERMS = 8000, 2000, 400
PARTNERS = (("echo", "vae"), ("echo", "marginal"), ("marginal", "vae"))
CHANNEL = EchoChannel(clip=0.99, sampler="series")
#: What counts as the formula being off a known truth, in nats.
OFF = 1e-6


def measure(workshop: Workshop) -> Results:
    """Cases whose information is known; the three sweeps, and which lies below which."""
    records = {key: curves.sweep_record(workshop.sweeps[key]) for key in SWEEPS}
    return {
        "sweeps": records,
        "points": POINTS,
        "cases": [uniform(), *(coin(s) for s in (1 / 2, 1 / 3, 1 / 5)), copies()],
        "comparisons": {f"{a} against {b}": curves.compare_sweeps(records[a], records[b], len(PARTNERS)) for a, b in PARTNERS},
    }


# ---- cases whose information is known -------------------------------------------------------------------------------------------------------


def random_for(name: str) -> torch.Generator:
    """Random numbers of one case."""
    return torch.Generator().manual_seed(stream(0, "1d", name))


def chains(draw: Any, count: int, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """(m(x), ln s(x), z) of independent codes (count, d), each with a chain of fresh images of its own. `draw`: n -> (m, s), (n, d) each."""
    z = torch.zeros_like(draw(count)[0])
    for _ in range(terms):
        m, s = draw(count)
        z = m + s * z
    return m, s.log(), z


def uniform() -> dict[str, Any]:
    """x ~ U(-1, 1), m = x, s = 0.5 + 0.3 x: a continuous law of codes, so that the formula is the truth."""
    random = random_for("uniform")

    def draw(count: int) -> tuple[Tensor, Tensor]:
        return example(2 * torch.rand(count, 1, generator=random, dtype=torch.float64) - 1)

    m, log_scale, z = chains(draw, POINTS, 120)
    # - E ln s = - [s ln s - s] / 0.6 between s = 0.2 and s = 0.8
    truth = -((0.8 * math.log(0.8) - 0.8) - (0.2 * math.log(0.2) - 0.2)) / 0.6
    told = ksg_information(m, z)
    estimates = [{"name": "KSG", "value": told.value, "standard_error": told.standard_error, "kind": "estimate"}, gaussian_infonce(m, log_scale, z)]
    return case("x ~ U(-1, 1), m = x, s = 0.5 + 0.3 x", truth, truth, "h(z) is finite", estimates, m, log_scale, z, None)


def gaussian_infonce(m: Tensor, log_scale: Tensor, z: Tensor) -> dict[str, Any]:
    """InfoNCE with the critic of `periplus evaluate`: the Gaussian of the recursion's moments, from codes that are not among the pairs."""
    past = z[PAIRS:]
    mean, scale = (m + log_scale.exp() * past.mean(0))[:PAIRS], (log_scale + 0.5 * past.var(0).log())[:PAIRS]
    found = infonce(pairwise_log_density(z[:PAIRS], mean, scale).T)
    return {"name": "InfoNCE", "value": found.value, "standard_error": found.standard_error, "kind": "lower"}


def coin(scale: float) -> dict[str, Any]:
    """x fair in {0, 1}, m = x (1 - s), s constant: codes lie in [0, s] for x = 0 and in [1 - s, 1] for x = 1."""
    random = random_for(f"coin {scale}")
    sides: list[Tensor] = []

    def draw(count: int) -> tuple[Tensor, Tensor]:
        sides.append(torch.randint(2, (count, 1), generator=random).double())
        return sides[-1] * (1 - scale), torch.full((count, 1), scale, dtype=torch.float64)

    _, _, z = chains(draw, POINTS, 60)
    errors = int(((z > 0.5) != (sides[-1] > 0.5)).sum())
    worst = wilson_interval(errors, len(z)).high
    lower = math.log(2) + (worst * math.log(worst) + (1 - worst) * math.log(1 - worst) if 0 < worst < 0.5 else -math.log(2))
    estimates = [{"name": "x told from z > 1/2 (Fano)", "value": lower, "standard_error": 0.0, "kind": "lower"}]
    encoded = torch.tensor([[0.0], [1.0]], dtype=torch.float64) * (1 - scale)
    why = "enumeration: z of both sides lie apart" if scale < 0.5 else "z is uniform on [0, 1]"
    name = f"fair coin, m = x (1 - s), s = 1/{round(1 / scale)}"
    logs = torch.full_like(encoded, math.log(scale))
    return case(name, -math.log(scale), math.log(2), why, estimates, encoded, logs, None, 2)


def copies() -> dict[str, Any]:
    """Two identical dimensions, m = (x, x), s = 0.9: one dimension's information, counted twice."""
    random = random_for("copies")

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = 2 * torch.rand(count, 1, generator=random, dtype=torch.float64) - 1
        return x.expand(-1, 2), torch.full((count, 2), 0.9, dtype=torch.float64)

    m, log_scale, z = chains(draw, POINTS, TERMS)
    told = ksg_information(m[:, :1], z[:, :1])
    estimates = [{"name": "KSG", "value": told.value, "standard_error": told.standard_error, "kind": "estimate"}]
    return case(
        "two equal dimensions, m = x ~ U(-1, 1), s = 0.9", -2 * math.log(0.9), -math.log(0.9), "one dimension", estimates, m, log_scale, z, None
    )


def case(
    name: str,
    formula: float,
    truth: float,
    why: str,
    estimates: list[dict[str, Any]],
    m: Tensor,
    log_scale: Tensor,
    z: Tensor | None,
    distinct: int | None,
) -> dict[str, Any]:
    """A case as numbers, with what the certificate says of it. `distinct`: how many examples there are, None for a continuum."""
    lower = [Bound(e["value"], e["standard_error"], "lower", e["name"]) for e in estimates if e["kind"] == "lower"]
    told = echo_certificate(m, log_scale, z, clip=CHANNEL.clip, distinct=distinct, lower=lower).record()
    return {
        "name": name,
        "formula": formula,
        "truth": truth,
        "why": why,
        "estimates": estimates,
        "ln_n": told["ln_n"] if distinct else None,
        "high": min(formula, told["ln_n"]),
        "statements": told["statements"],
    }


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw(results: Results, workshop: Workshop) -> Figures:
    """Formula and bounds against beta; the three curves."""
    record = results["sweeps"]["echo"]
    first = record["cells"][0]["test"]
    labels = {"rate": "formula, -E ln|det S|", "infonce": "InfoNCE (lower bound)"}
    panel = {
        "x_label": "β",
        "y_label": "nats on test images",
        "x_log": True,
        "y_log": True,
        "curves": [curves.against_beta(record, name, label) for name, label in labels.items()],
        "levels": [
            {"label": f"ln {first['examples']}", "y": first["ln_n"]},
            {"label": "floor of the clip", "y": -record["config"]["latent_dim"] * math.log(record["config"]["clip"])},
        ],
    }
    return {
        "bounds": curves.draw_lines([panel], workshop, "1d-bounds", height=2.7, columns=4),
        "curve": curves.draw_curves(results["sweeps"], workshop, "1d-curve", 3 * first["ln_n"]),
    }


# ---- telling --------------------------------------------------------------------------------------------------------------------------------


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    figures, sweeps = results["figures"], results["sweeps"]
    again, record = figures["curve"]["command"], sweeps["echo"]
    first = record["cells"][0]["test"]
    return (
        Heading("The identity, and its sign"),
        Paragraph(
            'Given $x$, the code $z = m(x) + s(x) dot.o z_1$ is an affine image of $z_1$, with matrix $S(x) = "diag" s(x)$. Densities scale with the '
            "volume, so with $h$ the differential entropy,"
        ),
        Equation("h(z|x) = h(z_1|x) + ln abs(det S(x)).", "scaling"),
        Paragraph("$z_1$ is independent of $x$ and, by the definition of echo noise, distributed as $z$ itself: $h(z_1|x) = h(z_1) = h(z)$. Hence"),
        Equation(
            "I(x;z) = h(z) - EE_x h(z|x) = h(z) - EE_x [h(z) + ln abs(det S(x))] = - EE_x ln abs(det S(x)) = - EE_x sum_j ln s_j (x),", "echo-rate"
        ),
        Paragraph(
            'and this is $EE_x "KL"[q^*(z|x) || q^*(z)]$ [@brekelmans2019]. The sheet prints it without the minus. The minus belongs there: $S$ '
            "contracts, $s < 1$, so that $ln abs(det S)$ is negative, while a divergence cannot be. (The expectation matters as well: for a single "
            "$x$ the term $- ln abs(det S(x))$ is *not* the divergence of that $x$.) No integral is left; neither $q^*(z|x)$ nor $q^*(z)$ need be "
            "known."
        ),
        Heading("When it fails"),
        Paragraph(
            "The step that cancels $h(z)$ needs $h(z)$ to be finite. If $q^*$ is singular, a law on a set of volume zero, $h(z) = - infinity$ and "
            "there is nothing to cancel. In general only an inequality is left, and for a channel that is fed with $N$ different images there is a "
            "second one, because a code cannot tell more than which image it was:"
        ),
        Equation("I(x;z) <= - EE_x ln abs(det S(x)), quad I(x;z) <= H(x) = ln N,", "echo-theorem"),
        Paragraph(
            "so $min(- EE ln abs(det S), ln N)$ is an upper bound, and the formula by itself is not a measurement. (Why: start the recursion from "
            "any law with a density. Each step then has $h(z^((K))) - h(z^((K-1))) = I_K + EE ln abs(det S)$, exactly. Entropies of bounded "
            "variance cannot grow for ever, so $I_K$ cannot stay above $- EE ln abs(det S)$; and in the limit information is lost, never gained.) "
            "A formula above $ln N$ speaks of a population with more images than those at hand; below $ln N$ it can be wrong as well. Some cases "
            "whose truth is known:"
        ),
        case_table(results["cases"], results["points"], again),
        Paragraph(
            "For the coin, $z = (1 - s) sum_k s^k x_k$: with $s = 1\\/2$ these are binary digits, and $z$ is uniform. With a smaller $s$ there are "
            "gaps, $x$ can be read off $z$ without error, and $z$ lives on a Cantor set: contracting more cannot tell more about a coin than $ln "
            "2$, but the formula goes on counting. Two copies of a dimension count everything twice. The estimates know nothing of the formula: "
            "that of Kraskov et al. compares distances to nearest neighbours [@kraskov2004], InfoNCE asks which $x$ a code came from [@oord2018]."
        ),
        *statements(results["cases"]),
        Heading("On this study's data"),
        Paragraph(
            f"The third sweep: `echo`, the same networks, betas and seeds as before. Its clip $r$ = {record['config']['clip']:g} keeps $s <= r$ in "
            "sampler and rate alike, and puts a floor of $- d ln r$ under the rate. Codes of test images take their noise from training images, as "
            "the decoder knows it."
        ),
        Command(record["command"]),
        bound_table(record, again),
        Figure(
            figures["bounds"]["path"],
            "The formula of the echo encoders and what bounds their information on test images: InfoNCE from below, $ln N$ from above. (Values "
            "below zero are gaps: there the lower bound says nothing.)",
            figures["bounds"]["command"],
            "Formula, InfoNCE and ln N against beta",
            width=0.85,
            label="echo-bounds",
        ),
        Figure(
            figures["curve"]["path"],
            "Distortion against rate on test images: the prior's rate, the rate against the training images' $q(z)$, the echo formula. Means over "
            f"seeds with 95 % intervals; points beyond {3 * first['ln_n']:.0f} nats are left out.",
            figures["curve"]["command"],
            "Rate-distortion curves of three models",
            width=0.75,
            label="three-curves",
        ),
        curves.comparison_table(
            {", ".join(BRIEF[word] for word in pair.split(" against ")): rows for pair, rows in results["comparisons"].items()},
            again,
            "three-table",
            "Which curve lies below which: every model was trained to make D + βR small, so at each β the supporting lines of that slope are "
            "compared. Test images, means over seeds; intervals are Welch's, 95 % for the three comparisons at one β together.",
        ),
        Finding(conclusion(results)),
    )


def case_table(cases: list[dict[str, Any]], points: int, command: str) -> Table:
    """Formula, truth, estimates."""
    rows = []
    for told in cases:
        found = "; ".join(
            f"{e['name']} {'≥ ' if e['kind'] == 'lower' else ''}{e['value']:.3f}" + (f" ± {e['standard_error']:.3f}" if e["standard_error"] else "")
            for e in told["estimates"]
        )
        ln_n = "-" if told["ln_n"] is None else f"{told['ln_n']:.4f}"
        verdict = "yes" if abs(told["formula"] - told["truth"]) < OFF else "*no*"
        rows.append((told["name"], f"{told['formula']:.4f}", ln_n, f"{told['truth']:.4f}", told["why"], found, verdict))
    return Table(
        ("case", "formula", "ln N", "truth", "because", "independent evidence", "formula right"),
        tuple(rows),
        "Echo channels whose information is known, nats. The truth of the first is $- [s ln s - s]\\/0.6$ between $s = 0.2$ and $0.8$; estimates "
        f"from {points:,} independent codes, ± standard error.",
        command,
        align=("left", "decimal", "decimal", "decimal", "left", "left", "left"),
        label="cases",
    )


def statements(cases: list[dict[str, Any]]) -> tuple[Block, ...]:
    """What the certificate says, case by case, in its own words."""
    said = [f"*{told['name']}*: {' '.join(told['statements'])}" for told in cases if told["statements"]]
    if not said:
        return ()
    return (Paragraph("What Periplus' certificate says of these cases, word for word. " + " ".join(said)),)


def bound_table(record: dict[str, Any], command: str) -> Table:
    """Formula and bounds at every beta."""
    rows = []
    for beta in betas(record):
        seeds = max(1, len(values(record, beta, "rate")))
        doubted = sum(bool(cell["test"]["statements"]) for cell in record["cells"] if cell["beta"] == beta)
        row = [told_beta(beta), *(half(values(record, beta, name)) for name in ("distortion", "rate", "infonce", "rate_low", "rate_high"))]
        rows.append((*row, half([float(v) for v in values(record, beta, "active_units")]), f"{doubted} of {seeds}"))
    first = record["cells"][0]["test"]
    return Table(
        ("β", "D", "formula", "InfoNCE", "I at least", "I at most", "active", "doubted"),
        tuple(rows),
        "Echo encoders on test images, nats: mean over seeds ± half the 95 % interval. I: what the certificate leaves of the information about "
        f"these {first['examples']:,} images (ln N = {first['ln_n']:.2f}). Doubted: cells whose certificate has an objection to the formula.",
        command,
        align=("left", *("decimal",) * 6, "left"),
        label="echo-table",
    )


def headline(results: Results) -> str:
    """The conclusion in two sentences."""
    return f"{case_sentence(results['cases'])} {curve_sentence(results['comparisons'])}"


def conclusion(results: Results) -> str:
    """Where the formula holds, and which model lies below which, computed."""
    return " ".join((case_sentence(results["cases"]), sweep_sentence(results["sweeps"]["echo"]), curve_sentence(results["comparisons"])))


def case_sentence(cases: list[dict[str, Any]]) -> str:
    """How many cases the formula gets right, whether it is ever too low, and whether every wrong one was noticed."""
    right = [told for told in cases if abs(told["formula"] - told["truth"]) < OFF]
    wrong = [told for told in cases if told not in right]
    low = [told for told in wrong if told["formula"] < told["truth"]]
    noticed = [told for told in wrong if told["statements"]]
    said = f"The formula is right in {len(right)} of {len(cases)} cases of known truth"
    if wrong:
        worst = max(wrong, key=lambda told: abs(told["formula"] - told["truth"]))
        said += f" and wrong in {len(wrong)}, by up to {number(abs(worst['formula'] - worst['truth']))} nats ({worst['name']})"
        said += f"; the certificate objects to {len(noticed)} of these {len(wrong)}"
    said += "; it is never too low." if not low else f"; in {len(low)} it is *too low*, which the theorem excludes."
    return said


def sweep_sentence(record: dict[str, Any]) -> str:
    """Up to which beta the formula of the trained encoders is above ln N, and how much of it a lower bound confirms elsewhere."""
    above = [beta for beta in betas(record) if min(values(record, beta, "rate")) > min(values(record, beta, "ln_n"))]
    parts = []
    if above:
        parts.append(
            f"On the data the formula is above ln N at β = {', '.join(map(told_beta, above))}, where it is not what the code tells about these images"
        )
    below = [beta for beta in betas(record) if beta not in above]
    confirmed = {
        beta: max(0.0, curves.mean(values(record, beta, "infonce")) / curves.mean(values(record, beta, "rate")))
        for beta in below
        if values(record, beta, "infonce")
    }
    if confirmed:
        told = ", ".join(f"{100 * share:.0f} % at β = {told_beta(beta)}" for beta, share in confirmed.items())
        parts.append(f"{'elsewhere' if above else 'On the data'} InfoNCE confirms {told} of it")
    last = betas(record)[-1]
    floor = -record["config"]["latent_dim"] * math.log(record["config"]["clip"])
    rate = curves.mean(values(record, last, "rate"))
    parts.append(
        f"at β = {told_beta(last)} the rate is {number(rate)} nats, {'at' if rate < 1.05 * floor else '*above*'} the clip's floor of {number(floor)}"
    )
    return "; ".join(parts) + "."


def curve_sentence(comparisons: dict[str, list[dict[str, Any]]]) -> str:
    """Which model lies below which."""
    parts = [curves.verdict_sentence(rows, *(SHORT[word] for word in pair.split(" against "))) for pair, rows in comparisons.items()]
    everywhere = [pair for pair, rows in comparisons.items() if {row["verdict"] for row in rows} == {"lower"}]
    told = "One dominates" if everywhere else "No model lies below another at every β"
    which = f" everywhere ({'; '.join(everywhere)})" if everywhere else ""
    return f"{told}{which}: {'; '.join(parts)}."


BRIEF = {"vae": "β-VAE", "marginal": "VAE against q(z)", "echo": "echo"}
SHORT = {"vae": "the β-VAE", "marginal": "the VAE against q(z)", "echo": "echo"}

QUESTION = Question(
    "1d",
    "The rate of echo noise in closed form",
    "Derive the divergence of the echo encoder from its marginal in closed form. When is the form not the truth, and what does echo noise buy?",
    (),
    measure,
    draw,
    tell,
    SWEEPS,
)
