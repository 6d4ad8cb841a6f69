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
        "bounds": curves.draw_lines([panel], workshop, "1d-bounds", height=2.2, columns=4),
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
            'Given $x$, the code $z = m(x) + s(x) dot.o z_1$ is an affine function of $z_1$, with the matrix $S(x) = "diag" s(x)$. An affine map '
            "changes the differential entropy $h$ by the logarithm of its volume factor:"
        ),
        Equation("h(z|x) = h(z_1|x) + ln abs(det S(x)).", "scaling"),
        Paragraph(
            "By the definition of echo noise $z_1$ is independent of $x$, so $h(z_1|x) = h(z_1)$; and it has the law of $z$ itself, so $h(z_1) = "
            "h(z)$. Insert this into the definition of the information:"
        ),
        Equation(
            "I(x;z) = h(z) - EE_x h(z|x) = h(z) - EE_x [h(z) + ln abs(det S(x))] = - EE_x ln abs(det S(x)) = - EE_x sum_j ln s_j (x).", "echo-rate"
        ),
        Paragraph(
            'This is $EE_x "KL"[q^*(z|x) || q^*(z)]$ [@brekelmans2019]. No integral is left, and neither $q^*(z|x)$ nor $q^*(z)$ need be known.'
        ),
        Paragraph(
            "*The sign is minus.* The sheet prints the formula without it. But $S$ contracts, $s < 1$, so $ln abs(det S)$ is negative, and a "
            "divergence never is. *The expectation is needed as well*: for a single $x$ the term $- ln abs(det S(x))$ is not the divergence of this "
            '$x$, because $"KL"[q^*(z|x) || q^*(z)] = - h(z|x) - EE_(q^*(z|x)) ln q^*(z)$, and the last term is $h(z)$ only on average over $x$.'
        ),
        Heading("When it fails"),
        Paragraph(
            "Cancelling $h(z)$ is allowed only where $h(z)$ is finite. If $q^*$ is singular, that is, concentrated on a set of volume zero, then "
            "$h(z) = - infinity$ and there is nothing to cancel. Two inequalities are always left. The second one holds for a channel that is fed "
            "with $N$ different images, because a code cannot say more than which of them it was made from:"
        ),
        Equation("I(x;z) <= - EE_x ln abs(det S(x)), quad I(x;z) <= H(x) = ln N.", "echo-theorem"),
        Paragraph(
            "*Proof of the first.* Start the recursion from any law with a density and call its results $z^((1)), z^((2)), ...$; let $I_K$ be the "
            "information $I(x;z^((K)))$. The scaling above holds exactly at every step, $h(z^((K))) - h(z^((K-1))) = I_K + EE_x ln abs(det S(x))$. "
            "The variances stay bounded, so the entropies cannot grow for ever, and $I_K$ cannot stay above $- EE_x ln abs(det S(x))$ by a fixed "
            "amount. In the limit information can be lost but not gained (it is lower semicontinuous), so $I(x;z)$ is no larger either."
        ),
        Paragraph(
            "Therefore $min(- EE_x ln abs(det S), ln N)$ is an upper bound on the information, and the formula alone is not a measurement. A value "
            "above $ln N$ speaks of a population with more images than those at hand. Below $ln N$ the formula can be wrong as well. [@cases] has "
            "channels whose information is known."
        ),
        Paragraph(
            "*The coin.* Here $z = (1 - s) sum_k s^k x_k$. With $s = 1\\/2$ these are the binary digits of $z$, which is uniform on $[0, 1]$: the "
            "formula is right. With a smaller $s$ there are gaps between the values of $z$, it lives on a Cantor set, and $x$ can be read off "
            "without error. That is $ln 2$ and cannot become more, but the formula goes on counting. *Two equal dimensions*: the formula counts the "
            "same information twice. The independent evidence does not use the formula: KSG compares distances to nearest neighbours "
            "[@kraskov2004], and InfoNCE asks which of many $x$ a code came from [@oord2018]; Fano's inequality turns a rate of errors into a lower "
            "bound."
        ),
        case_table(results["cases"], results["points"], again),
        *statements(results["cases"]),
        Heading("On this study's data"),
        Paragraph(
            f"The third sweep trains `echo` with the same networks, betas and seeds. Its clip $r$ = {record['config']['clip']:g} keeps $s <= r$ "
            "both in the sampler and in the rate, so the rate is never below $- d ln r$. Codes of test images take their noise from training "
            "images, which is the noise that the decoder knows."
        ),
        Command(record["command"]),
        bound_table(record, again),
        Figure(
            figures["bounds"]["path"],
            "The formula of the echo encoders, and bounds on their information about test images: InfoNCE from below (left out where negative), $ln "
            "N$ from above.",
            figures["bounds"]["command"],
            "Formula, InfoNCE and ln N against beta",
            width=0.65,
            label="echo-bounds",
        ),
        Figure(
            figures["curve"]["path"],
            "Distortion against rate on test images: the rate against the prior, that against the $q(z)$ of the training images, and the formula of "
            f"echo noise. Means over seeds with 95 % intervals; points beyond {3 * first['ln_n']:.0f} nats are left out.",
            figures["curve"]["command"],
            "Rate-distortion curves of three models",
            width=0.65,
            label="three-curves",
        ),
        curves.comparison_table(
            {key: sweeps[key] for key in ("echo", "vae", "marginal")},
            {tuple(pair.split(" against ")): rows for pair, rows in results["comparisons"].items()},
            BRIEF,
            again,
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
        ("case", "formula", "ln N", "truth", "truth known because", "independent evidence", "formula right"),
        tuple(rows),
        f"Echo channels whose information is known, in nats. Evidence: estimates from {points:,} independent codes ± standard error; ≥ marks a lower "
        "bound. In the first case the truth is the integral of $- ln s \\/ 0.6$ from $s = 0.2$ to $0.8$.",
        command,
        align=("left", "decimal", "decimal", "decimal", "left", "left", "left"),
        label="cases",
    )


def statements(cases: list[dict[str, Any]]) -> tuple[Block, ...]:
    """What the certificate says, case by case, in its own words."""
    said = [f"*{told['name']}*: {' '.join(told['statements'])}" for told in cases if told["statements"]]
    if not said:
        return ()
    return (
        Paragraph("Periplus attaches a certificate to every echo rate. Word for word, these objections come with the cases above. " + " ".join(said)),
    )


def bound_table(record: dict[str, Any], command: str) -> Table:
    """Formula and bounds at every beta."""
    rows = []
    for beta in betas(record):
        seeds = max(1, len(values(record, beta, "rate")))
        doubted = sum(bool(cell["test"]["statements"]) for cell in record["cells"] if cell["beta"] == beta)
        row = [told_beta(beta), *(half(values(record, beta, name)) for name in ("distortion", "rate", "infonce", "rate_low", "rate_high"))]
        rows.append((*row, half([float(v) for v in values(record, beta, "active_units")], 1), f"{doubted} of {seeds}"))
    first = record["cells"][0]["test"]
    return Table(
        ("β", "D", "formula", "InfoNCE", "I at least", "I at most", "active", "doubted"),
        tuple(rows),
        "Echo encoders on test images, in nats per image: mean over seeds ± half of the 95 % interval. D: distortion. I: between which bounds the "
        f"information about these {first['examples']:,} images lies (ln N = {first['ln_n']:.2f}). Active: units. Doubted: runs whose certificate "
        "objects to the formula.",
        command,
        align=("left", *("decimal",) * 6, "left"),
        label="echo-table",
    )


def headline(results: Results) -> str:
    """The conclusion in two sentences."""
    cases, comparisons = results["cases"], results["comparisons"]
    wrong = wrong_cases(cases)
    low = any(told["formula"] < told["truth"] for told in wrong)
    decided = [row for rows in comparisons.values() for row in rows if row["verdict"] != "cannot tell"]
    count = sum(map(len, comparisons.values()))
    return (
        f"The rate is $- EE ln abs(det S)$, with a minus. It is an upper bound, {'*violated* in these cases' if low else 'never too low'} and too "
        f"high in {sum(told['formula'] > told['truth'] for told in wrong)} of {len(cases)} cases whose truth is known. On the data {len(decided)} "
        f"of {count} comparisons of models are decided; {dominance_sentence(comparisons)}"
    )


def conclusion(results: Results) -> str:
    """Where the formula holds, and which model costs less where, computed."""
    return "\n".join((case_sentence(results["cases"]), sweep_sentence(results["sweeps"]["echo"]), curve_sentence(results["comparisons"])))


def wrong_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases in which the formula is not the truth."""
    return [told for told in cases if not abs(told["formula"] - told["truth"]) < OFF]


def case_sentence(cases: list[dict[str, Any]]) -> str:
    """How many cases the formula gets right, whether it is ever too low, and whether every wrong one was noticed."""
    wrong = wrong_cases(cases)
    low = [told for told in wrong if told["formula"] < told["truth"]]
    noticed = [told for told in wrong if told["statements"]]
    said = f"The formula is right in {len(cases) - len(wrong)} of {len(cases)} cases of known truth"
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
            f"On the data the formula is above ln N at β = {', '.join(map(told_beta, above))}: there it is not what the code tells about these "
            "images."
        )
    confirmed = {
        beta: max(0.0, curves.mean(values(record, beta, "infonce")) / curves.mean(values(record, beta, "rate")))
        for beta in betas(record)
        if beta not in above and values(record, beta, "infonce")
    }
    if confirmed:
        told = ", ".join(f"{100 * share:.0f} % at β = {told_beta(beta)}" for beta, share in confirmed.items())
        parts.append(f"{'Elsewhere' if above else 'On the data'} InfoNCE confirms a part of it: {told}.")
    last = betas(record)[-1]
    floor = -record["config"]["latent_dim"] * math.log(record["config"]["clip"])
    rate = curves.mean(values(record, last, "rate"))
    where = "the least that the clip allows" if rate < 1.05 * floor else f"*above* the least that the clip allows, {number(floor)}"
    return " ".join([*parts, f"At β = {told_beta(last)} the rate is {number(rate)} nats, {where}."])


def dominance_sentence(comparisons: dict[str, list[dict[str, Any]]]) -> str:
    """Whether a model costs less than another one at every beta."""
    everywhere = [tuple(SHORT[word] for word in pair.split(" against ")) for pair, rows in comparisons.items() if verdicts(rows) == {"lower"}]
    everywhere += [
        tuple(SHORT[word] for word in reversed(pair.split(" against "))) for pair, rows in comparisons.items() if verdicts(rows) == {"higher"}
    ]
    if not everywhere:
        return "no model costs less than another one at every β."
    return "; ".join(f"{a} costs less than {b} at every β" for a, b in everywhere) + "."


def verdicts(rows: list[dict[str, Any]]) -> set[str]:
    """The different verdicts of one pair."""
    return {row["verdict"] for row in rows}


def curve_sentence(comparisons: dict[str, list[dict[str, Any]]]) -> str:
    """Which model costs less where; what is undecided is counted."""
    told = []
    for pair, rows in comparisons.items():
        first, second = (SHORT[word] for word in pair.split(" against "))
        told.append(curves.verdict_sentence(rows, first, second, undecided=False))
    said = "; ".join(part for part in told if part)
    count, left = sum(map(len, comparisons.values())), sum(row["verdict"] == "cannot tell" for rows in comparisons.values() for row in rows)
    decided = f" {said[0].upper()}{said[1:]}." if said else ""
    return f"By D + βR on test images {dominance_sentence(comparisons)}{decided} {left} of {count} comparisons *cannot be told*."


#: What the sweeps are called in a table's header, and in sentences.
BRIEF = {"vae": "β-VAE", "marginal": "q(z)", "echo": "echo"}
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
