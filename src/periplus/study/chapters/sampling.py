"""1e: what makes echo noise awkward to draw, and schemes that work."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from periplus import metrics
from periplus.channels import NEGLIGIBLE, EchoChannel, echo_moments
from periplus.report import Block, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table
from periplus.seeds import stream
from periplus.study import curves
from periplus.study.chapters.echo import example
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import number, where_told
from periplus.study.workshop import Workshop

CLIP, TERMS, WARM = 0.99, 100, 160
#: Rows drawn by every sampler at every batch size, in independent batches.
ROWS = {4: 16_000, 16: 32_000, 100: 60_000, 1024: 61_440}
SERIES_ROWS = 20_000
TIMED, DIMENSIONS = (100, 1024), 32
GRADIENT_BATCHES, GRADIENT_ROWS = 60, 1000
#: Images after which weights of the clip's size fall below single precision.
ENDLESS = round(math.log(NEGLIGIBLE) / math.log(CLIP) / 100) * 100
#: A bias that is told: so many standard errors.
TOLD = 3.5
#: The example where chapter 1c, which introduces it, is not there.
EXAMPLE = "An example, $x tilde.op cal(U)(-1, 1)$, $m(x) = x$, $s(x) = 0.5 + 0.3 x$"
SAMPLERS = {
    "ring": "ring, guarded",
    "closed": "ring, one lap only",
    "chain": "persistent chain",
    "series": "series",
    "replaced": "series with replacement",
}
ADVISED = ("ring", "chain", "series")


def measure(workshop: Workshop) -> Results:
    """Moments of every sampler at several batch sizes; a gradient with and without the noise's part; time and memory; what the guard asks for."""
    fine = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[:, None]
    m, s = example(fine)
    truth = float(echo_moments(m, s)[1])
    return {
        "terms": TERMS,
        "truth": {"second_moment": truth, "gradient": 2 * truth},
        "accuracy": [accuracy(sampler, batch, truth) for batch in ROWS for sampler in SAMPLERS],
        "gradient": gradient(),
        "cost": [cost(sampler, batch) for batch in TIMED for sampler in ADVISED],
        "guard": [guard(batch, scale) for batch in (100, 1024) for scale in (0.5, 0.9, 0.985, CLIP)],
    }


# ---- accuracy -------------------------------------------------------------------------------------------------------------------------------


def inputs(batches: int, batch: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """m and ln s (batches, B, 1) of the example's images."""
    m, s = example(2 * torch.rand(batches, batch, 1, generator=random) - 1)
    return m, s.log()


def accuracy(sampler: str, batch: int, truth: float) -> dict[str, Any]:
    """E z^2 over independent batches, and how many independent rows a batch is worth."""
    random = torch.Generator().manual_seed(stream(0, "1e", sampler, batch))
    rows = min(ROWS[batch], SERIES_ROWS * (5 if batch < 50 else 1)) if sampler in ("series", "replaced") else ROWS[batch]
    batches = max(12, rows // batch)
    z = draw_codes(sampler, batches, batch, random).double()
    per_batch = z.square().flatten(1).mean(1)
    found, error = float(per_batch.mean()), float(per_batch.std() / math.sqrt(batches))
    # the variance of a batch's mean of z, over that of as many independent rows
    effect = float(z.flatten(1).mean(1).var() * batch / z.var())
    told = {"found": found, "standard_error": error, "errors_off": (found - truth) / error, "design_effect": effect}
    return {"sampler": sampler, "batch": batch, "batches": batches, **told}


def draw_codes(sampler: str, batches: int, batch: int, random: torch.Generator) -> Tensor:
    """Codes (batches, B, 1) of fresh images, batches independent of each other."""
    mean, log_scale = inputs(batches, batch, random)
    if sampler == "replaced":
        return replaced(mean, log_scale, random)
    if sampler == "chain":
        channel, state = EchoChannel(CLIP, "chain"), torch.zeros(batches, 1)
        for _ in range(math.ceil(WARM / batch)):
            _, state = channel.advance(*inputs(batches, batch, random), state, random)
        return channel.advance(mean, log_scale, state, random)[0]
    if sampler == "series":
        channel = EchoChannel(CLIP, "series", min(batch, TERMS))
        # a batch at a time: the series keeps B K d numbers
        return torch.stack([channel.sample(m, s, random) for m, s in zip(mean, log_scale, strict=True)])
    channel = EchoChannel(CLIP, "ring")
    if sampler == "closed":
        return channel.transmit(mean, log_scale, channel.noise(mean.shape, random))
    return torch.stack([channel.sample(m, s, random) for m, s in zip(mean, log_scale, strict=True)])


def replaced(mean: Tensor, log_scale: Tensor, random: torch.Generator) -> Tensor:
    """The series that draws its rows with replacement, the row itself among them: what not to do."""
    z = torch.zeros_like(mean)
    batches, batch, _ = mean.shape
    weight = torch.ones_like(mean)
    here = torch.arange(batch).expand(batches, batch)[..., None]
    for _ in range(TERMS):
        z = z + weight * mean.gather(1, here)
        weight = weight * log_scale.gather(1, here).exp()
        here = torch.randint(batch, (batches, batch, 1), generator=random)
    return z


def gradient() -> dict[str, Any]:
    """d/da E z^2 at a = 1 for locations a m(x): through the noise, and with the noise cut out of the graph."""
    random = torch.Generator().manual_seed(stream(0, "1e", "gradient"))
    channel = EchoChannel(CLIP, "ring")
    found: dict[str, list[float]] = {"through": [], "cut": []}
    for _ in range(GRADIENT_BATCHES):
        mean, log_scale = (part[0] for part in inputs(1, GRADIENT_ROWS, random))
        factor = torch.ones((), requires_grad=True)
        order = channel.noise(mean.shape, random)
        z = channel.transmit(factor * mean, log_scale, order)
        found["through"].append(float(torch.autograd.grad(z.square().mean(), factor, retain_graph=True)[0]))
        before = torch.empty_like(z)
        before[order] = z.detach()[order.roll(1)]  # the code that each row had as noise
        again = channel.step(factor * mean, log_scale, before)
        found["cut"].append(float(torch.autograd.grad(again.square().mean(), factor)[0]))
    told: dict[str, Any] = {
        name: {"value": statistics.fmean(each), "standard_error": statistics.stdev(each) / math.sqrt(len(each))} for name, each in found.items()
    }
    return {**told, "batches": GRADIENT_BATCHES, "rows": GRADIENT_ROWS}


# ---- cost -----------------------------------------------------------------------------------------------------------------------------------


def codes_for(sampler: str, batch: int) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor]]:
    """What draws codes at d = 32 with a graph behind them, and the m and ln s that they are drawn from.

    Scales lie between 0.05 and 0.9, where the guard holds; the chain starts from its state.
    """
    random = torch.Generator().manual_seed(stream(0, "1e", "cost"))
    mean = torch.randn(batch, DIMENSIONS, generator=random).requires_grad_()
    log_scale = (0.05 + 0.85 * torch.rand(batch, DIMENSIONS, generator=random)).log().requires_grad_()
    channel = EchoChannel(CLIP, sampler, TERMS if sampler == "series" else None)
    state = torch.zeros(DIMENSIONS)

    def codes() -> Tensor:
        return channel.advance(mean, log_scale, state, random)[0] if sampler == "chain" else channel.sample(mean, log_scale, random)

    return codes, (mean, log_scale)


def cost(sampler: str, batch: int) -> dict[str, Any]:
    """Seconds of a pass forward and backward (the fastest of several), and what is kept in memory between the two."""
    codes, leaves = codes_for(sampler, batch)
    kept = kept_bytes(codes)
    times = []
    for _ in range(3 if sampler == "series" else 15):
        begun = time.perf_counter()
        torch.autograd.grad(codes().sum(), leaves)
        times.append(time.perf_counter() - begun)
    return {"sampler": sampler, "batch": batch, "seconds": min(times), "megabytes": kept / 1e6, "d": DIMENSIONS, "terms": TERMS}


def kept_bytes(codes: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that the graph keeps for the backward pass, each memory counted once."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        z = codes()
    del z
    return sum(sizes.values())


def guard(batch: int, scale: float) -> dict[str, Any]:
    """How often a batch has to be shuffled for a ring of one constant scale to forget its beginning."""
    return {"batch": batch, "scale": scale, "laps": EchoChannel(CLIP).laps(torch.full((batch, 1), math.log(scale)))}


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw(results: Results, workshop: Workshop) -> Figures:
    """The relative bias of the second moment against batch size, for every sampler."""
    truth = results["truth"]["second_moment"]
    found = []
    for sampler, name in SAMPLERS.items():
        own = [row for row in results["accuracy"] if row["sampler"] == sampler]
        told = {
            key: [100 * ((row["found"] + side * metrics.student(row["batches"]) * row["standard_error"]) / truth - 1) for row in own]
            for key, side in (("y", 0), ("low", -1), ("high", 1))
        }
        found.append({"label": name, "x": [row["batch"] for row in own], **told})
    panel = {"x_label": "batch size B", "y_label": "bias of E z² / %", "x_log": True, "curves": found, "levels": [{"label": "none", "y": 0.0}]}
    return {"bias": curves.draw_lines([panel], workshop, "1e-bias", height=2.5, columns=3)}


# ---- telling --------------------------------------------------------------------------------------------------------------------------------


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    again, truth = results["figures"]["bias"]["command"], results["truth"]
    return (
        Heading("What is difficult"),
        Paragraph(
            "*The recursion never ends.* A code is an infinite series, and the largest scale decides where one may stop. A dimension that the "
            f"encoder does not use has $s$ near its upper limit $r$ = {CLIP:g}: there the weights fall below $2^(-23)$, the resolution of single "
            f"precision, only after some {ENDLESS:,} images."
        ),
        Paragraph(
            "*Every code needs other codes.* The noise is made of codes of fresh images. In training the images at hand are those of the batch, so "
            "the rows of a batch are noise for each other. Given the images, the rows are *not independent*; the loss of a batch varies more than "
            "its size suggests; and a batch of one row has no noise at all."
        ),
        Paragraph(
            "*A small batch is not the data.* A chain that is longer than the batch meets the same images again, the row itself among them. A term "
            "that repeats is correlated with itself, which changes the law of the codes. Drawing with replacement is worst, because a row can be "
            "its own noise at once."
        ),
        Paragraph(
            "*The noise has a gradient.* $z_1$ depends on the weights of the encoder as $z$ does. Normal noise can be treated as a constant; here "
            "this would lose a part of the derivative. Let row $k - 1$ be the noise of row $k$, let $g_k$ be the derivative that the loss $L$ sends "
            "directly to $z_k$, and $lambda_k$ the whole derivative. Then"
        ),
        Equation(
            "lambda_k = g_k + s_(k+1) dot.o lambda_(k+1), quad (partial L) / (partial m_k) = lambda_k, quad "
            "(partial L) / (partial s_k) = lambda_k dot.o z_(k-1),",
            "adjoint",
        ),
        Paragraph(
            "so the gradient runs along the chain in the other direction. A running product of scales must never be divided by one of its factors: "
            "the products underflow to zero."
        ),
        Heading("Schemes that work"),
        Paragraph(
            "*Series* [@brekelmans2019]. Every row sums $K$ terms along a list of its own, a random order of the *other* rows. This is right if $K$ "
            "is large enough and no row repeats. Time and memory grow as $B K d$."
        ),
        Paragraph(
            "*Ring*. Put the batch in a random order, let every row be the noise of the next one, and close the chain to a ring. The recursion is "
            "then a linear system, which one pass and one division solve. There is no burn-in, and the work is $B d$:"
        ),
        Pseudocode(
            "The ring, its guard, and its lengthening",
            (
                "*draw* a random order of the batch; $A <- product_k s_k$, dimension by dimension",
                "*while* $max_j A_j > 2^(-23)$ (the guard, for the whole vector)",
                "  *append* one more random order of the same batch; $A <- A dot.o product_k s_k$",
                "$y_0 <- 0$; *for* all rows in order: $y_k <- m_k + s_k dot.o y_(k-1)$, $p_k <- s_k dot.o p_(k-1)$",
                "$z_0 <- y_B \\/ (1 - A)$, where the ring closes",
                "*return* $z_k = y_k + p_k dot.o z_0$ of the last lap",
            ),
            label="ring",
        ),
        Paragraph(
            "After a full turn the history of a row contains the row itself, with the weight $A$. The guard keeps this weight below what single "
            "precision can see. Where the guard does not hold (an unused dimension, a batch of some hundred rows) the ring is lengthened by further "
            "random orders of the same batch. This is still linear in time, but images repeat: in a slow dimension the mean of the batch, which has "
            'the variance $"Var"(m) \\/ B$, enters with the weight $1\\/(1 - s)$, and the variance of the codes is too high by a share of up to $(1 '
            "+ s)\\/((1 - s) B)$."
        ),
        Pseudocode(
            "The persistent chain",
            (
                "*keep* the last code $z_0$ of the batch before, without its gradient (at the beginning: a ring)",
                "*for* the rows of the batch in random order: $z_k <- m_k + s_k dot.o z_(k-1)$",
                "*keep* $z_B$, in the checkpoint as well",
            ),
            label="chain",
        ),
        Paragraph(
            "The chain meets fresh images only, so repetition does not change its law. Its first rows miss the part of their gradient that lies in "
            "the batch before. Periplus closes the ring where the guard holds, and continues the chain where it does not."
        ),
        Heading("Accuracy"),
        Paragraph(
            f"{where_told(study, '1c', 'The example of chapter 1c', EXAMPLE)} has $EE z^2$ = {truth['second_moment']:.4f} in closed form. Because "
            "the rows of a batch depend on each other, standard errors are taken over independent batches. The last column is the price of this "
            "dependence: the variance of the mean of a batch, divided by the variance of the mean of as many independent rows."
        ),
        accuracy_table(results, again),
        Figure(
            results["figures"]["bias"]["path"],
            "Bias of $EE z^2$ in per cent of the truth, for batches of 4 to 1,024 rows, with 95 % intervals over independent batches.",
            again,
            "Bias against batch size of five samplers",
            width=0.8,
            label="sampling-bias",
        ),
        gradient_table(results, again),
        Heading("Cost"),
        cost_table(results["cost"], again),
        guard_table(results["guard"], again),
        Finding(conclusion(results)),
    )


def accuracy_table(results: Results, command: str) -> Table:
    """Every sampler at every batch size."""
    rows = tuple(
        (
            str(row["batch"]),
            SAMPLERS[row["sampler"]],
            str(row["batches"]),
            f"{row['found']:.4f} ± {row['standard_error']:.4f}",
            f"{100 * (row['found'] / results['truth']['second_moment'] - 1):+.1f} %",
            f"{row['errors_off']:+.1f}",
            f"{row['design_effect']:.2f}",
        )
        for row in results["accuracy"]
    )
    return Table(
        ("B", "sampler", "batches", "E z²", "bias", "in standard errors", "dependence"),
        rows,
        f"Second moments from {len(SAMPLERS)} samplers ± standard error; the truth is {results['truth']['second_moment']:.4f}. The series has "
        f"{results['terms']} terms, or as many as the batch has rows. With replacement, a row may meet itself.",
        command,
        align=("right", "left", "right", "decimal", "decimal", "decimal", "decimal"),
        label="accuracy",
    )


def gradient_table(results: Results, command: str) -> Table:
    """The derivative with and without the noise's part."""
    truth, names = results["truth"]["gradient"], {"through": "through the noise", "cut": "noise cut out of the graph"}
    rows = tuple(
        (name, f"{told['value']:.4f} ± {told['standard_error']:.4f}", f"{100 * (told['value'] / truth - 1):+.1f} %")
        for name, told in ((name, results["gradient"][key]) for key, name in names.items())
    )
    return Table(
        ("gradient", "d/da E z²", "bias"),
        rows,
        "The derivative of $EE z^2$ when all locations are multiplied by $a$, at $a = 1$. The codes are proportional to $a$, so the truth is $2 EE "
        f"z^2$ = {truth:.4f}. Means over {results['gradient']['batches']} rings of {results['gradient']['rows']:,} rows ± standard error.",
        command,
        align=("left", "decimal", "decimal"),
        label="gradient",
    )


def cost_table(rows: list[dict[str, Any]], command: str) -> Table:
    """Time and memory, with the ratio to the series."""
    told = []
    for row in rows:
        series = next(other for other in rows if other["sampler"] == "series" and other["batch"] == row["batch"])
        less = "-" if row is series else f"{series['seconds'] / row['seconds']:.0f}"
        smaller = "-" if row is series else f"{series['megabytes'] / row['megabytes']:.0f}"
        times = (f"{1000 * row['seconds']:.2f}", less, f"{row['megabytes']:.2f}", smaller)
        told.append((str(row["batch"]), SAMPLERS[row["sampler"]], *times))
    return Table(
        ("B", "sampler", "time / ms", "times faster", "kept / MB", "times smaller"),
        tuple(told),
        f"The cost of one pass forward and backward in d = {rows[0]['d']} dimensions, where the guard holds: one thread, the fastest of several, "
        f"and ratios to the series of K = {rows[0]['terms']} terms in the same run. Kept: memory that the graph holds for the backward pass. Times "
        "depend on what else the machine did.",
        command,
        align=("right", "left", "decimal", "decimal", "decimal", "decimal"),
        label="cost",
    )


def guard_table(rows: list[dict[str, Any]], command: str) -> Table:
    """Shuffles that the guard asks for."""
    scales = sorted({row["scale"] for row in rows})
    laps = {(row["batch"], row["scale"]): row["laps"] for row in rows}
    told = tuple((str(batch), *(str(laps[batch, scale]) for scale in scales)) for batch in sorted({row["batch"] for row in rows}))
    return Table(
        ("B", *(f"s = {scale:g}" for scale in scales)),
        told,
        "How often the guard asks for a random order of a batch of B rows, by the scale s of the slowest dimension.",
        command,
        align=("right", *("decimal",) * len(scales)),
        label="guard",
    )


def headline(results: Results) -> str:
    """The conclusion in two sentences."""
    biased = [name for name, off in biases(results).items() if off]
    told = f"Biased in small batches: {'; '.join(biased)}." if biased else "No sampler is told to be biased."
    return f"{told} {gradient_sentence(results)} {cost_sentence(results['cost'])}"


def conclusion(results: Results) -> str:
    """Which samplers are biased where, what cutting the noise costs, and what the schemes cost."""
    return "\n".join((accuracy_sentence(results), gradient_sentence(results), cost_sentence(results["cost"])))


def biases(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The samplers by their names in print, with the batch sizes at which each is told apart from the truth."""
    rows = {name: [row for row in results["accuracy"] if row["sampler"] == sampler] for sampler, name in SAMPLERS.items()}
    return {name: [row for row in own if abs(row["errors_off"]) > TOLD] for name, own in rows.items()}


def accuracy_sentence(results: Results) -> str:
    """Batch sizes at which each sampler is told apart from the truth."""
    truth, parts = results["truth"]["second_moment"], []
    for name, off in biases(results).items():
        if off:
            told = ", ".join(f"{100 * (row['found'] / truth - 1):+.0f} % at B = {row['batch']}" for row in off)
            parts.append(f"{name}: *biased*, {told}")
        else:
            parts.append(f"{name}: no bias told at any B")
    return f"Bias of the second moment, told from {TOLD:g} standard errors on: {'; '.join(parts)}."


def gradient_sentence(results: Results) -> str:
    """What cutting the noise out of the graph does to the gradient."""
    truth = results["truth"]["gradient"]
    through, cut = (results["gradient"][key] for key in ("through", "cut"))
    right = abs(through["value"] - truth) < TOLD * through["standard_error"]
    off = 100 * (cut["value"] / truth - 1)
    whole = "agrees with the truth" if right else f"is *off* by {100 * (through['value'] / truth - 1):+.1f} %"
    told = abs(cut["value"] - truth) > TOLD * cut["standard_error"]
    return (
        f"The gradient through the ring {whole}; without the part of the noise it is {f'off by {off:+.0f} %' if told else 'not told apart from it'}."
    )


def cost_sentence(rows: list[dict[str, Any]]) -> str:
    """Ratios at the largest batch."""
    batch = max(row["batch"] for row in rows)
    own = {row["sampler"]: row for row in rows if row["batch"] == batch}
    ring, series = own["ring"], own["series"]
    faster, smaller = series["seconds"] / ring["seconds"], series["megabytes"] / ring["megabytes"]
    return (
        f"At B = {batch:,} the ring takes {number(1000 * ring['seconds'])} ms, {told_ratio(faster, 'faster', 'slower')} than the series, and keeps "
        f"{number(ring['megabytes'])} MB for the backward pass, {told_ratio(smaller, 'less', 'more')} than the series."
    )


def told_ratio(ratio: float, better: str, worse: str) -> str:
    """A ratio in words."""
    return f"{max(ratio, 1 / ratio):.0f} times {better if ratio >= 1 else worse}"


QUESTION = Question(
    "1e",
    "Drawing echo noise",
    "What computational issues come with sampling echo noise, and which schemes deal with them?",
    (),
    measure,
    draw,
    tell,
)
