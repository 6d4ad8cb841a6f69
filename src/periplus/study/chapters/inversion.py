"""2c: codes of images by descent from several starts, and what each endpoint is."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from periplus import metrics, pictures, plots
from periplus.data import ImageData
from periplus.evaluation import pixels
from periplus.inversion import Effort, Inversion, Kind, invert
from periplus.inversion.clusters import code_distance_tolerance
from periplus.inversion.domains import prior_radius
from periplus.locating import Search, Targets, choose, inversion_record, locate, pool_of, say_domain, say_minima, say_same
from periplus.report import Block, Command, Equation, Figure, Finding, Heading, Paragraph, Pseudocode, Table, plain
from periplus.runs import Run
from periplus.seeds import stream
from periplus.study.question import Figures, Question, Results
from periplus.study.telling import counted, number
from periplus.study.workshop import Workshop

MODEL = "wgan-gp"
IMAGES, STARTS = 10, 16
#: Starts of the runs of other seeds and of the search without a ball, which are looked at in passing.
FEW_STARTS = 4
PLANTED = 50
#: A planted image is found when the root mean square of what is left, per pixel in [0, 1], is at most this.
FOUND_RMS = 1e-3
#: Planted images are searched for their errors alone: one short finish, no further rounds of certificates.
SHORT = Effort(rounds=1, finish=20)
#: Minima of each image that are shown, of different images.
SHOWN = 4
#: Two errors differ when they differ by more than this part.
APART = 0.01
KINDS = {
    "smooth": "smooth minimum",
    "kink": "minimum on a kink",
    "boundary": "minimum on the boundary",
    "flat": "flat minimum",
    "saddle": "saddle",
    "unfinished": "unfinished",
    "escaped": "escaped",
}
#: Symbols of the sentences of a record (escaped by `plain`), for print.
SYMBOLS = {"|z\\*|": "$|z^*|$", "z\\*": "$z^*$", "|z| <=": "$|z| <=$", "|z|^2": "$|z|^2$", "|z|": "$|z|$", "U~": "$tilde(U)$", "Dist^2": '$"Dist"^2$'}
SYMBOL = re.compile("|".join(map(re.escape, SYMBOLS)))
MINIMA = tuple(kind.name.lower() for kind in Kind if kind.is_minimum)


# ---- measuring ------------------------------------------------------------------------------------------------------------------------------


def measure(workshop: Workshop) -> Results:
    """The first test images in the first run, with certificates; planted codes; what bounds the errors; the other seeds in passing."""
    cells = workshop.of(MODEL)
    run = cells[0][1]
    train, test = workshop.splits(run)
    targets, search, parts = choose(test, IMAGES), Search(STARTS), len(cells) + 2
    found = locate(run, targets, search)
    workshop.progress(1, parts)
    record = inversion_record(run, targets, found, search)
    del record["run"]  # its folder: a study may be moved
    baselines = bounding(run, search, train, targets)
    for row, (image, bounds) in enumerate(zip(record["images"], baselines, strict=True)):
        image |= bounds | ends_of(found, row)
    passing = Search(FEW_STARTS)
    few = [record["mean_error"] if k == 0 else float(locate(other, targets, passing).error.mean()) for k, (_, other) in enumerate(cells)]
    workshop.progress(parts - 2, parts)
    known = planted(run)
    workshop.progress(parts - 1, parts)
    return {
        "model": MODEL,
        "config": {k: v for k, v in dataclasses.asdict(run.config).items() if k != "seed" and v is not None},
        "runs": [
            {"name": cell.name, "seed": cell.seed, "starts": STARTS if k == 0 else FEW_STARTS, "mean_error": error}
            for k, ((cell, _), error) in enumerate(zip(cells, few, strict=True))
        ],
        "split": test.split,
        "record": record,
        "certificates": certificates_of(found),
        "planted": known,
        "free": without_ball(run, targets),
        "shown": shown_codes(found),
    }


def ends_of(found: Inversion, row: int) -> dict[str, Any]:
    """All endpoints of one image: squared errors and kinds, in the order of the starts."""
    return {"ends": found.all_error[row].tolist(), "end_kinds": [Kind(k).name.lower() for k in found.kind[row].tolist()]}


def bounding(run: Run, search: Search, train: ImageData, targets: Targets) -> list[dict[str, float]]:
    """Squared errors that a search should undercut, per image: of the nearest of the samples that starts are drawn from, and training images."""
    rows = targets.images.flatten(1).float() / 255
    nearest = metrics.nearest_neighbours(rows, pixels(train.images)).distance[:, 0].double().square().tolist()
    sampled = metrics.nearest_neighbours(rows, pool_of(run, search).images).distance[:, 0].double().square().tolist()
    return [{"training_error": a, "sample_error": b} for a, b in zip(nearest, sampled, strict=True)]


def certificates_of(found: Inversion) -> list[dict[str, Any]]:
    """What the certificates of each kind of endpoint say: relative slopes, smallest eigenvalues, how many directions cross the kink."""
    rows = []
    for kind in Kind:
        of = found.kind == kind
        if not bool(of.any()):
            continue
        eigenvalues = found.min_eigenvalue[of]
        eigenvalues = eigenvalues[eigenvalues.isfinite()]
        rows.append(
            {
                "kind": kind.name.lower(),
                "ends": int(of.sum()),
                "relative_slope": float(found.relative_slope[of].nan_to_num(torch.inf).max()),
                "smallest_eigenvalue": float(eigenvalues.min()) if len(eigenvalues) else None,
                "median_eigenvalue": float(eigenvalues.median()) if len(eigenvalues) else None,
                "codimension": float(found.kink_codimension[of].double().median()),
                "vertices": int(of.sum()) - len(eigenvalues),
            }
        )
    return [{k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()} for row in rows]


def planted(run: Run) -> dict[str, Any]:
    """Images that the generator can make: is the code found that they were made from? How often, from how many starts?"""
    codes = run.sample_codes(2 * PLANTED, stream(0, "2c", "planted"))
    codes = codes[codes.norm(dim=1) < prior_radius(codes.shape[1])][:PLANTED]  # outside the ball nothing is looked for
    with torch.no_grad():
        images = run.decode(codes)
    found = invert(run.decode, images, run.config.latent_dim, STARTS, "ball", effort=SHORT, seed=1)
    right = found.all_error <= FOUND_RMS**2 * images[0].numel()
    distance = (found.z.double() - codes.double()).norm(dim=1)
    same = right.any(1) & (distance <= code_distance_tolerance(codes.shape[1]))
    return {
        "images": len(codes),
        "starts": STARTS,
        "found": int(right.any(1).sum()),
        "found_code": int(same.sum()),
        "hits": right.sum(1).tolist(),
        "largest_error": float(found.error.max()),
    }


def without_ball(run: Run, targets: Targets) -> dict[str, Any]:
    """The same images searched without a ball: how many starts run off, and how far the codes go."""
    found = locate(run, targets, Search(FEW_STARTS, "free"))
    settled = found.kind != Kind.ESCAPED
    norms = found.all_z.double().norm(dim=2)
    return {
        "starts": FEW_STARTS,
        "ends": found.kind.numel(),
        "escaped": found.count(Kind.ESCAPED),
        "escape_radius": found.domain.escape_radius,
        "largest_norm": float(norms[settled].max()) if bool(settled.any()) else None,
        "mean_error": float(found.error.mean()),
    }


def shown_codes(found: Inversion) -> list[list[dict[str, Any]]]:
    """For each image the best code, then the best of each further certified minimum that shows another image; at most SHOWN in all."""
    told = []
    for row in range(len(found)):
        best, seen, chosen = int(found.best[row]), set[int](), []
        for start in [best, *found.all_error[row].argsort(stable=True).tolist()]:
            cluster = int(found.image_cluster[row, start])
            if cluster not in seen and (start == best or bool(found.converged[row, start])):
                seen.add(cluster)
                chosen.append(start)
        told.append(
            [
                {
                    "error": float(found.all_error[row, s]),
                    "kind": Kind(int(found.kind[row, s])).name.lower(),
                    "z": [round(value, 6) for value in found.all_z[row, s].tolist()],
                }
                for s in chosen[:SHOWN]
            ]
        )
    return told


# ---- drawing --------------------------------------------------------------------------------------------------------------------------------


def draw(results: Results, workshop: Workshop) -> Figures:
    """Targets, their best codes' images and those of further minima; the errors of all starts; how often so many starts find a planted code."""
    again = workshop.again("2c")
    figures = {"minima": {"path": str(draw_minima(results, workshop)), "command": again}}
    images = results["record"]["images"]
    path = Path("figures") / "2c-starts.svg"
    things = [
        {
            "name": image["name"].rpartition(" ")[2],
            "values": image["ends"],
            "kinds": [KINDS[kind] for kind in image["end_kinds"]],
            "levels": {"nearest training image": image["training_error"], "nearest of 8,192 samples": image["sample_error"]},
        }
        for image in images
    ]
    plots.search_ends(things, list(KINDS.values()), workshop.folder / path, f"{split_name(results)} image", "squared error")
    figures["starts"] = {"path": str(path), "command": again}
    path = Path("figures") / "2c-planted.svg"
    told = results["planted"]
    counts = list(range(1, told["starts"] + 1))
    curve = {"label": "mean over the planted images", "x": counts, "y": [100 * chance(told, k) for k in counts]}
    plots.lines([{"x_label": "starts", "y_label": "found / %", "curves": [curve], "y_most": 100.0}], workshop.folder / path, height=2.3)
    figures["planted"] = {"path": str(path), "command": again}
    return figures


def draw_minima(results: Results, workshop: Workshop) -> Path:
    """A column for each image: the target, z*, further minima."""
    run = workshop.of(MODEL)[0][1]
    shown = results["shown"]
    _, test = workshop.splits(run)
    targets = test.images[[image["index"] for image in results["record"]["images"]]].float() / 255
    deepest = max(map(len, shown))
    rows, captions = [targets], [[""] * len(targets)]
    blank = torch.ones_like(targets[0])
    for depth in range(deepest):
        rows.append(torch.stack([decoded(run, codes[depth]["z"]) if depth < len(codes) else blank for codes in shown]))
        captions.append([f"{codes[depth]['error']:.2f}" if depth < len(codes) else "" for codes in shown])
    path = Path("figures") / "2c-minima.png"
    labels = ["target", "best", *(f"minimum {k}" for k in range(2, deepest + 1))]
    return Path("figures") / pictures.captioned_rows(rows, captions, workshop.folder / path, labels).name


@torch.no_grad()
def decoded(run: Run, z: Sequence[float]) -> Tensor:
    """The image (C, H, W) of one code."""
    return run.decode(torch.tensor(z)).clamp(0, 1)


# ---- telling --------------------------------------------------------------------------------------------------------------------------------


def typeset(sentence: str) -> str:
    """A sentence of a record, for print: its symbols become mathematics."""
    return SYMBOL.sub(lambda found: SYMBOLS[found.group()], re.sub(r"(?<=\d)%", " %", plain(sentence)))


def tell(results: Results, study: dict[str, Any]) -> tuple[Block, ...]:
    """The chapter."""
    record, figures, again = results["record"], results["figures"], results["figures"]["starts"]["command"]
    few = results["planted"]["images"]
    return (
        Heading("What is asked"),
        Paragraph("A generator has no encoder. Which code belongs to an image $x$? The one whose image is nearest [@creswell2019]:"),
        Equation('z^* in limits("argmin")_(norm(z) <= R) f(z), quad f(z) = norm(G(z) - x)^2 = sum_i (G(z)_i - x_i)^2.', "inversion"),
        Paragraph(
            f"The images are the first {len(record['images'])} {plain(split_name(results))} images, which the generator has not seen. The generator "
            f"is the run {plain(results['runs'][0]['name'])}, with codes of $d = {record['latent_dim']}$ dimensions. *Why a ball?* The last layer "
            "is a sigmoid, and no finite code makes a pixel exactly 0 or 1. Over all of $RR^d$ the infimum may therefore lie at infinity, and $z^*$ "
            f"need not exist. In a ball, which is compact, a minimum exists. $R = {number(record['domain'].get('radius'), 4)}$ holds 99.9 % of the "
            f"codes that the generator was trained on. {free_sentence(results['free'], record['domain'].get('radius'))}"
        ),
        Heading("What descent can find"),
        Paragraph(
            "Two things are called a minimum here. The argmin is *global* by definition, and it is always a *local* minimum as well. Descent from "
            "one start finds at best a local minimum, and nothing that it sees there tells whether another one is lower. So many starts only give "
            "an upper bound on the least error. How good the bound is can be tested on images whose least error is known."
        ),
        Paragraph(
            "At a local minimum the gradient need not vanish. The layers of the generator are leaky rectifiers, so $f$ is made of smooth pieces "
            "that meet in *kinks*; and the ball has a boundary. The table lists what an endpoint of descent can be, and how that is tested:"
        ),
        kinds_table(results, again),
        Paragraph(
            f"*Stationary* means: Newton's step promises to lower $f$ by no more than the part {told_power(record['thresholds']['decrease'])} of "
            "itself, about what single precision resolves. At a kink no gradient of the smooth pieces vanishes. There a convex combination of "
            "gradients from close by takes the place of the gradient (Clarke's condition [@burke2005]). This condition also holds on ridges, so two "
            "more tests follow: none of 58 sampled directions leads lower, and the exact Hessian is positive on the directions along the kink, "
            "which no difference of gradients spans. All this is local: it speaks of a neighbourhood of "
            f"{record['thresholds']['neighbourhood_rms']:g} per coordinate, where the standard deviation of the prior is 1."
        ),
        Heading("The method"),
        Paragraph(
            "All starts of all images are rows of one batch. First-order methods wait for small gradients, which a kink does not have, and Newton's "
            "method trusts one Hessian where several pieces meet. BFGS with a weak Wolfe line search does converge at kinks, as a rule "
            "[@lewis2013]. A bundle-Newton method then takes the last steps to the precision of the numbers [@luksan1998]. The constraint is "
            "removed by a change of coordinates: a point of the ball is the shadow of a point on a sphere in one more dimension, and the sphere has "
            "no boundary,"
        ),
        Equation("z(y) = y / (1 + norm(y)^2 \\/ (4 R^2)), quad y in RR^d.", "chart"),
        Pseudocode(
            "Codes of images, all starts side by side",
            (
                "*for* each start: *draw* 32 codes from $cal(N)(0, I)$, *keep* the one whose image is nearest to $x$",
                "*descend* with all rows at once, in the coordinates $y$",
                "  $p <- -H nabla f(y)$; *try* $y + t p$; *bisect* $t$ until Wolfe's weak conditions hold",
                "  $y <- y + t p$; *update* the inverse Hessian $H$ (BFGS); rows that hardly fall any more *leave*",
                "*repeat*, a few rounds",
                "  $B <-$ the exact Hessian at $y$, made positive; *descend* again from $H = B^(-1)$",
                "  pieces $<- {(nabla f(y), 0)}$; *repeat*",
                '    $s <- limits("argmin")_s max_i (g_i dot s - a_i) + 1/2 s^top B s$, over the pieces $(g_i, a_i)$ met so far',
                "    *if* $f(y + s)$ is lower: $y <- y + s$; *else add* the piece met at $y + s$",
                "  *certify* $y$: promised decrease, sampled neighbours, curvature along kink and boundary",
                "  *if* it fails: $y <-$ the lowest point seen; *else* the row *leaves*",
                "*join* endpoints that lie within 0.01 per coordinate: they are one minimum",
            ),
            label="inversion-code",
        ),
        Heading("What was found"),
        Figure(
            figures["minima"]["path"],
            "First row: the targets, not selected. Second row: the image of the best code found. Then: images of further certified minima, in the "
            f"order of their errors, that differ from each other by more than {record['thresholds']['same_image_rms']:g} per pixel (root mean "
            "square, pixels in [0, 1]). Below each image its squared error.",
            figures["minima"]["command"],
            "Rows of targets and of their inversions",
            label="minima",
        ),
        Figure(
            figures["starts"]["path"],
            f"Where the {record['starts']} starts of each image ended, sorted by squared error (summed over {record['pixels']} pixels). Lines: the "
            "errors of the nearest training image and of the nearest sample of the generator, which a search should undercut.",
            figures["starts"]["command"],
            "Sorted errors of all starts for every image, marked by kind",
            label="starts",
        ),
        image_table(results, again),
        certificate_table(results, again),
        Heading("Is the best of the starts the minimum?"),
        Paragraph(
            f"For a test image the least error is not known. So {few} images were planted: $x = G(z_0)$ for codes $z_0$ drawn from the prior, for "
            f"which the least error is zero. An image counts as found where the root mean square of what is left is at most {FOUND_RMS:g} per "
            "pixel. Its code counts as found where $z^*$ is also within 0.01 per coordinate of $z_0$."
        ),
        Figure(
            figures["planted"]["path"],
            f"Share of the {few} planted images that so many starts find, on average over all choices of these starts among those that were "
            "searched.",
            figures["planted"]["command"],
            "Share of planted images found against starts",
            width=0.8,
            label="planted",
        ),
        Paragraph(f"{planted_sentence(results['planted'])} {reachable_sentence(record)}"),
        *seeds_block(results),
        Paragraph("The same search from the command line:"),
        Command(f"periplus invert {run_path(results)} --n {len(record['images'])} --starts {record['search']['starts']}"),
        Finding(conclusion(results)),
    )


def split_name(results: Results) -> str:
    """What images that were not trained on are called: test, or held-out where a set has one split."""
    return str(results["split"]).rpartition("/")[2]


def run_path(results: Results) -> str:
    """Where the first run lies, from the command that made it."""
    return shlex.quote(shlex.split(results["runs"][0]["command"])[-1])


def told_power(value: float) -> str:
    """A small threshold as a power of ten."""
    return f"$10^({round(math.log10(value))})$"


def kinds_table(results: Results, command: str) -> Table:
    """What a minimum may be, and how it is told."""
    counts, total = results["record"]["kinds"], sum(results["record"]["kinds"].values())
    meaning = {
        "smooth": ("a minimum: the gradient vanishes", "all eigenvalues positive"),
        "kink": ("a minimum: a convex combination of gradients close by vanishes", "positive along the kink"),
        "boundary": ("a minimum: the gradient along the boundary vanishes, and $f$ falls outwards", "positive along the boundary"),
        "flat": ("a minimum in a valley: as one of the above", "an eigenvalue is within 1e-5 of the largest from 0"),
        "saddle": ("no minimum: as one of the above", "an eigenvalue is negative"),
        "unfinished": ("not shown to be stationary", "-"),
        "escaped": ("the code ran off", "-"),
    }
    rows = tuple(
        (kind, *meaning[kind], str(counts[kind]), f"{100 * counts[kind] / total:.0f} %")
        for kind in KINDS
        if counts[kind] or kind in ("smooth", "kink", "boundary")
    )
    return Table(
        ("kind", "first order", "second order", "endpoints", "share"),
        rows,
        f"Kinds of endpoints, the tests that define them, and how many of the {total} endpoints were of each kind.",
        command,
        align=("left", "left", "left", "right", "right"),
        label="kinds",
    )


def image_table(results: Results, command: str) -> Table:
    """Image by image."""
    rows = tuple(
        (
            image["name"].rpartition(" ")[2] + (f" ({plain(image['label'])})" if image["label"] is not None else ""),
            f"{image['error']:.3f}",
            KINDS[image["kind"]].removeprefix("minimum ").removesuffix(" minimum"),
            f"{max(image['ends']):.3f}",
            f"{image['sample_error']:.2f}",
            f"{image['training_error']:.2f}",
            str(image["distinct"]),
            str(image["distinct_images"]),
            f"{100 * image['best_share']:.0f} %",
        )
        for image in results["record"]["images"]
    )
    return Table(
        ("image", "best", "best is a minimum", "worst", "sample", "training", "minima", "their images", "share of best"),
        rows,
        "Image by image (class in brackets). Squared errors, summed over pixels: of the best and of the worst endpoint, of the nearest of the 8,192 "
        "samples that starts are drawn from, and of the nearest training image. Then the number of different certified minima, that of different "
        "images that they show, and the share of starts that ended at the best code.",
        command,
        align=("left", "decimal", "left", *("decimal",) * 3, *("right",) * 3),
        label="images",
    )


def certificate_table(results: Results, command: str) -> Table:
    """The numbers behind the certificates."""
    rows = tuple(
        (
            row["kind"],
            str(row["ends"]),
            *("-" if row[name] is None else f"{1000 * row[name]:.2f}" for name in ("relative_slope", "smallest_eigenvalue", "median_eigenvalue")),
            f"{row['codimension']:g}",
            str(row["vertices"]),
        )
        for row in results["certificates"]
    )
    return Table(
        ("kind", "endpoints", "largest slope / 10⁻³", "smallest eigenvalue / 10⁻³", "median eigenvalue / 10⁻³", "across the kink", "vertices"),
        rows,
        "The numbers behind the certificates. Largest slope: of the gradient $g$, or of the convex combination, as $norm(g) \\/ sqrt(2 L f)$ with "
        "the largest eigenvalue $L$ of the Hessian (no error of size $f$ allows more than 1). Eigenvalues: the smallest one of each endpoint, its "
        "minimum and median over endpoints. Across the kink: median number of directions. Vertices: endpoints where no direction along the kink is "
        "left.",
        command,
        align=("left", "right", *("decimal",) * 3, "right", "right"),
        label="certificates",
    )


def seeds_block(results: Results) -> tuple[Block, ...]:
    """The runs of other seeds, where there are any."""
    runs = results["runs"]
    if len(runs) < 2:
        return ()
    told = ", ".join(f"{number(run['mean_error'])} (seed {run['seed']}, {counted(run['starts'], 'start')})" for run in runs)
    return (Paragraph(f"The mean squared error of the best codes of the same images, in the generators of all seeds: {told}."),)


def free_sentence(free: dict[str, Any], radius: float | None) -> str:
    """What happens without a ball."""
    count, norm = f"{free['escaped']}" if free["escaped"] else "none", free["largest_norm"]
    beyond = f"Without the ball {count} of {free['ends']} starts ran off beyond $norm(z) = {free['escape_radius']:.3g}$"
    if norm is None:
        return f"{beyond}."
    if free["escaped"]:
        return f"{beyond}, and the others ended at norms up to {norm:.3g}."
    left = radius is not None and norm > radius
    return f"{beyond}, {'but codes left the ball' if left else 'and all codes stayed in the ball'}: norms go up to {norm:.3g}."


def chance(planted: dict[str, Any], starts: int) -> float:
    """The mean share of planted images that so many of their starts find: 1 - C(misses, k) / C(all, k) for each."""
    total = planted["starts"]
    return fmean(1 - math.comb(total - hits, starts) / math.comb(total, starts) for hits in planted["hits"])


def planted_sentence(planted: dict[str, Any]) -> str:
    """How often starts find a minimum that is known."""
    image, code = (metrics.wilson_interval(planted[name], planted["images"]) for name in ("found", "found_code"))
    single = chance(planted, 1)
    return (
        f"The best of {planted['starts']} starts found {planted['found']} of {planted['images']} planted images (95 % Wilson interval "
        f"{100 * image.low:.0f} to {100 * image.high:.0f} %), {planted['found_code']} of them with the very code that they were made from "
        f"({100 * code.low:.0f} to {100 * code.high:.0f} %). A single start finds {100 * single:.0f} %."
    )


def baseline_sentence(images: Sequence[dict[str, Any]]) -> str:
    """The best errors against what bounds them."""
    best, sample, training = (fmean(image[key] for image in images) for key in ("error", "sample_error", "training_error"))
    below = sum(image["error"] < min(image["sample_error"], image["training_error"]) for image in images)
    return (
        f"The mean squared error of the best codes is {number(best)}; that of the nearest of 8,192 samples is {number(sample)}, that of the nearest "
        f"training image {number(training)}. The best code undercuts both for {below} of {len(images)} images."
    )


def spread_sentence(record: dict[str, Any]) -> str:
    """How much starts differ, and whether local minima are global ones."""
    images = record["images"]
    if record["starts"] < 2:
        return "One start says nothing of how starts differ."
    ratios = [max(image["ends"]) / image["error"] for image in images if image["error"] > 0]
    higher = [sum(m["error"] > (1 + APART) * image["error"] for m in image["minima"]) for image in images]
    worse = sum(n > 0 for n in higher)
    told = f"The worst endpoint of an image has {number(median(ratios))} times the error of its best one (median)." if ratios else ""
    if worse:
        return (
            f"{told} {sum(higher)} certified minima, of {worse} of {len(images)} images, lie more than {100 * APART:g} % above the best endpoint: "
            "they are local minima and *not* the argmin."
        )
    return f"{told} No certified minimum lies more than {100 * APART:g} % above the best endpoint of its image."


def reachable_sentence(record: dict[str, Any]) -> str:
    """Whether test images are like planted ones."""
    images = record["images"]
    reached = sum(image["error"] <= FOUND_RMS**2 * record["pixels"] for image in images)
    told = f"Of the test images {reached} of {len(images)} have a code as good as that"
    if reached == len(images):
        return f"{told}: they are like planted ones."
    return f"{told}. The others seem to lie off the range of the generator, and there starts may succeed less often."


def certified_sentence(record: dict[str, Any]) -> str:
    """Is the best endpoint a local minimum?"""
    images = record["images"]
    certified = sum(image["kind"] in MINIMA for image in images)
    if not certified:
        return "Local minima? No best endpoint is certified as one: what descent found may be no minimum at all."
    return f"Local minima? The best endpoint is certified as one for {certified} of {len(images)} images."


def argmin_sentence(record: dict[str, Any]) -> str:
    """What the best endpoint may be called."""
    images = record["images"]
    kinked = sum(image["kind"] in ("kink", "boundary") for image in images)
    where = f" {kinked} of {len(images)} best endpoints lie on a kink or on the boundary, where no gradient need vanish." if kinked else ""
    return f"The argmin itself is a local minimum by definition, but for no image is it proved that the best endpoint is the argmin.{where}"


def headline(results: Results) -> str:
    """The answer, short."""
    record, planted = results["record"], results["planted"]
    return (
        f"{typeset(same_in_short(record))} {certified_sentence(record)} The best of {planted['starts']} starts found {planted['found']} of "
        f"{planted['images']} images whose least error is known to be zero."
    )


def same_in_short(record: dict[str, Any]) -> str:
    """The first sentence on whether starts give the same code."""
    return re.split(r"(?<=\.) (?=[A-Z])", say_same(record))[0]


def conclusion(results: Results) -> str:
    """Both questions, from the certificates, and what bounds the answer."""
    record = results["record"]
    parts = (
        typeset(say_same(record)),
        f"{typeset(say_minima(record))} {argmin_sentence(record)}",
        spread_sentence(record),
        f"{baseline_sentence(record['images'])} {planted_sentence(results['planted'])}",
        typeset(say_domain(record)),
    )
    return "\n".join(part.strip() for part in parts)


QUESTION = Question(
    "2c",
    "Inversion",
    "Find the codes whose images are nearest to the first test images, by descent from several starts. Is it the same code each time? Is what is "
    "found a local minimum?",
    (MODEL,),
    measure,
    draw,
    tell,
)
