"""From results to report: blocks are told from results.json and the figures beside it, then rendered as PDF and HTML."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from periplus import metrics
from periplus.config import AutoencoderConfig
from periplus.console import duration, note
from periplus.data import load_data
from periplus.errors import UsageError
from periplus.evaluation import image_size_of
from periplus.files import read_json, write_atomically
from periplus.report import (
    Answers,
    Chapter,
    Figure,
    Finding,
    Heading,
    KeyNumbers,
    Paragraph,
    Reference,
    Report,
    code,
    plain,
    to_data,
    write_html,
    write_pdf,
)
from periplus.runs import load_run
from periplus.scoring import SAMPLES
from periplus.study import curves, judging
from periplus.study.autoencoder_chapter import autoencoder_chapter, draw_autoencoders, kind_of, measure_autoencoders
from periplus.study.chapters import CHAPTERS, cheap, echo, echo_rate, extremes, gan, inversion, marginal, paths, penalty, sampling
from periplus.study.settings import Cell, words_of
from periplus.study.telling import called, collapse_sentence, counted, run_table, settings_of
from periplus.study.workshop import Workshop

REFERENCES = (
    Reference("kingma2014", "D. P. Kingma, M. Welling, Auto-encoding variational Bayes, ICLR 2014."),
    Reference("higgins2017", "I. Higgins et al., β-VAE: learning basic visual concepts with a constrained variational framework, ICLR 2017."),
    Reference("hoffman2016", "M. D. Hoffman, M. J. Johnson, ELBO surgery, NeurIPS workshop on approximate inference 2016."),
    Reference("alemi2018", "A. A. Alemi et al., Fixing a broken ELBO, ICML 2018."),
    Reference("chen2018", "R. T. Q. Chen et al., Isolating sources of disentanglement in variational autoencoders, NeurIPS 2018."),
    Reference("oord2018", "A. van den Oord, Y. Li, O. Vinyals, Representation learning with contrastive predictive coding, arXiv:1807.03748, 2018."),
    Reference(
        "brekelmans2019", "R. Brekelmans, D. Moyer, A. Galstyan, G. Ver Steeg, Exact rate-distortion in autoencoders via echo noise, NeurIPS 2019."
    ),
    Reference("kraskov2004", "A. Kraskov, H. Stögbauer, P. Grassberger, Estimating mutual information, Physical Review E 69, 066138, 2004."),
    Reference("goodfellow2014", "I. Goodfellow et al., Generative adversarial nets, NeurIPS 2014."),
    Reference("arjovsky2017", "M. Arjovsky, S. Chintala, L. Bottou, Wasserstein generative adversarial networks, ICML 2017."),
    Reference("gulrajani2017", "I. Gulrajani et al., Improved training of Wasserstein GANs, NeurIPS 2017."),
    Reference("creswell2019", "A. Creswell, A. A. Bharath, Inverting the generator of a generative adversarial network, IEEE TNNLS 30, 2019."),
    Reference("lewis2013", "A. S. Lewis, M. L. Overton, Nonsmooth optimization via quasi-Newton methods, Math. Programming 141, 2013."),
    Reference("luksan1998", "L. Lukšan, J. Vlček, A bundle-Newton method for nonsmooth unconstrained minimization, Math. Programming 83, 1998."),
    Reference(
        "burke2005",
        "J. V. Burke, A. S. Lewis, M. L. Overton, A robust gradient sampling algorithm for nonsmooth, nonconvex optimization, SIAM J. Optimization "
        "15, 2005.",
    ),
    Reference(
        "arvanitidis2018", "G. Arvanitidis, L. K. Hansen, S. Hauberg, Latent space oddity: on the curvature of deep generative models, ICLR 2018."
    ),
    Reference("nocedal2006", "J. Nocedal, S. J. Wright, Numerical optimization, 2nd edition, Springer 2006."),
)


#: What each chapter concludes, in a sentence or two, for the first page.
CONCLUSIONS = {
    "1a": extremes.headline,
    "1b": marginal.headline,
    "1c": echo.headline,
    "1d": echo_rate.headline,
    "1e": sampling.headline,
    "2a": gan.headline,
    "2b": penalty.headline,
    "2c": inversion.headline,
    "2d": paths.headline,
    "2e": cheap.headline,
}


def write_report(folder: Path) -> list[Path]:
    """report.pdf and report.html of the study in a folder, from its results.json. Raises RunError where that cannot be read."""
    results = read_json(folder / "results.json", "make the study again with --resume")
    report = build_report(results)
    return [write_pdf(report, folder / "report.pdf", folder), write_html(report, folder / "report.html", folder)]


def build_report(results: dict[str, Any]) -> Report:
    """The report of a study: a function of its results.json alone."""
    questions = [q for q in CHAPTERS if q.key in results["chapters"]]
    settings, data = results["settings"], results["data"]
    told = summary(results)
    chapters = tuple(Chapter(q.key, q.title, q.question, q.tell(results["chapters"][q.key], results)) for q in questions)
    return Report(
        title="Deep generative models of small images",
        subtitle=f"{plain(called(data['source']))}: {data['images']:,} images of {data['height']} x {data['width']} pixels, {data['channels']} "
        f"channel{'s' * (data['channels'] != 1)}",
        authors=tuple(settings["author"]),
        collaborators=tuple(settings["collaborators"]),
        hours=settings["hours"],
        summary_blocks=told,
        chapters=chapters,
        environment=environment_rows(results),
        references=cited((*told, *chapters)),
    )


def cited(told: Sequence[Any]) -> tuple[Reference, ...]:
    """The references that these blocks and chapters cite."""
    said = json.dumps(to_data(told))
    return tuple(reference for reference in REFERENCES if f"[@{reference.label}]" in said)


def summary(results: dict[str, Any]) -> tuple[Any, ...]:
    """The first page: what this is, the key figures, an answer in short for each chapter."""
    chapters = results["chapters"]
    told = [(key, conclusion(chapters[key])) for key, conclusion in CONCLUSIONS.items() if key in chapters]
    numbers = (*rate_numbers(chapters), *run_numbers(chapters), *latent_numbers(chapters))
    questions = "one question" if len(told) == 1 else f"{len(told)} questions"
    blocks: list[Any] = [
        Paragraph(
            f"This report answers {questions} about generative models of these images. Each chapter has the question, the derivation, what was "
            "measured in this run with its uncertainty, and a conclusion that is computed from these numbers. Below every figure and table stands "
            f"the command that makes it again; the whole report is made by {code(results['command'])}."
        )
    ]
    if numbers:
        blocks.append(KeyNumbers(numbers))
    return (*blocks, *([Answers(tuple(told))] if told else []))


def rate_numbers(chapters: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The key figures of the chapters on rate and distortion, of those that are there."""
    rows = []
    if "1a" in chapters:
        record = chapters["1a"]["sweeps"]["vae"]
        lowest = curves.betas(record)[0]
        rate, information = (curves.mean(curves.values(record, lowest, name)) for name in ("prior_rate", "marginal_rate"))
        rows.append((f"{rate:.1f} nats", f"rate of the β-VAE at β = {curves.told_beta(lowest)}; {information:.1f} of them tell images apart"))
    if "1d" in chapters:
        cases = chapters["1d"]["cases"]
        right = sum(abs(told["formula"] - told["truth"]) < echo_rate.OFF for told in cases)
        rows.append((f"{right} of {len(cases)}", "echo channels of known information: the closed form is right"))
    if "1e" in chapters:
        cost = chapters["1e"]["cost"]
        batch = max(row["batch"] for row in cost)
        seconds = {row["sampler"]: row["seconds"] for row in cost if row["batch"] == batch}
        rows.append((f"{seconds['series'] / seconds['ring']:.0f} times", f"faster than a series: a ring of echo noise, B = {batch:,}"))
    return tuple(rows)


def run_numbers(chapters: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The key figures of the adversarial runs, of those that are there."""
    runs = [run for key in ("2a", "2b") if key in chapters for run in chapters[key]["runs"]]
    if not runs:
        return ()
    collapsed = sum(run["collapsed"] for run in runs)
    told = [(f"{collapsed} of {len(runs)}", "adversarial runs collapsed")]
    shares = [run["smallest_share"] for run in runs]
    if None not in shares:
        told.append((f"{100 * min(shares):.1f} %", "of the samples: the smallest class of any run"))
    else:
        told.append((f"{min(run['spread'] for run in runs):.2f}", "smallest spread of samples, over that of the data"))
    return tuple(told)


def latent_numbers(chapters: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The key figures of inversion and of paths, of those that are there."""
    rows = []
    if "2c" in chapters:
        images = chapters["2c"]["record"]["images"]
        certified = sum(image["kind"] in inversion.MINIMA for image in images)
        rows.append((f"{certified} of {len(images)}", "best codes of test images are certified local minima"))
    if "2d" in chapters and chapters["2d"]["runs"][0]["path"]:
        found = paths.ratios(chapters["2d"]["runs"][0])
        saved = 100 * (1 - fmean(found))
        low, high = (100 * (1 - end) for end in reversed(metrics.mean_interval(found)))
        interval = f" ({low:.1f} to {high:.1f} %)" if math.isfinite(low) else ""
        rows.append((f"{saved:.1f} %", f"the path found is cheaper than the straight line{interval}"))
    if "2e" in chapters:
        name = cheap.name_of("least", chapters["2e"]["weights"][-1])
        change, low, high = cheap.change_of(chapters["2e"], cheap.PLAIN, name)
        interval = f" ({low:+.0f} to {high:+.0f} %)" if math.isfinite(low) else ""
        rows.append((f"{change:+.0f} %", f"excess cost of paths when training asks for cheap ones{interval}"))
    return tuple(rows)


def environment_rows(results: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What the figures depend on, beside the settings; what is not known is left out."""
    environment, data = results["environment"], results["data"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    device, threads = joined_set(results, "device"), joined_set(results, "threads")
    rows = (
        ("command", results["command"]),
        ("data", f"{data['source']} ({data['split']}), SHA-256 {data['sha256']}"),
        ("software", versions),
        ("measured at commit", environment["commit"] or ""),
        ("trained at commit", joined_set(results, "commit")),
        ("trained on", ", ".join(([device] if device else []) + ([f"threads {threads}"] if threads else []))),
        ("time of adversarial training", training_time(results)),
        ("machine", f"{environment['processor']}, {counted(environment['cores'], 'core')}, {environment['system']}"),
    )
    return tuple((name, value) for name, value in rows if value)  # outside a checkout no commit is known


def training_time(results: dict[str, Any]) -> str:
    """How long the runs of 2a and 2b took, one after another, in words; nothing without them."""
    runs = [run for key in ("2a", "2b") for run in results["chapters"].get(key, {"runs": ()})["runs"]]
    return f"{duration(sum(run['seconds'] for run in runs))} in {counted(len(runs), 'run')} together" if runs else ""


def joined_set(results: dict[str, Any], name: str) -> str:
    """The different values of one fact of the environments in which a study's runs were trained."""
    chapters = results["chapters"].values()
    runs = [run for chapter in chapters for run in (*chapter.get("runs", ()), *chapter.get("sweeps", {}).values())]
    found = {run["environment"].get(name) for run in runs if "environment" in run} - {None}
    return ", ".join(sorted(map(str, found)))


# ---- a report of runs -----------------------------------------------------------------------------------------------------------------------


def report_runs(folders: Sequence[Path], out: Path, data_root: Path | None = None) -> list[Path]:
    """report.pdf, report.html and report.json of runs, grouped by model. Raises UsageError for runs of different data."""
    runs = [load_run(folder) for folder in folders]
    record = runs[0].data
    for run in runs:
        if run.config.architecture == "custom":
            raise UsageError(f"{run.path} was trained with one's own networks: only Python can sample it, load_run(..., networks=...)")
    for run in runs[1:]:
        if run.data.sha256 != record.sha256:
            raise UsageError(f"{run.path} was trained on '{run.data.source}', {runs[0].path} on '{record.source}': report them apart")
    data = load_data(record.source, record.split, root=data_root, image_size=image_size_of(record))
    if data.content_hash() != record.sha256:
        raise UsageError(
            f"{runs[0].path} was trained on other data than '{record.source}' gives now: its images cannot be told apart from held-out ones"
        )
    out.mkdir(parents=True, exist_ok=True)
    chapters = []
    results: dict[str, Any] = {}
    again = shlex.join(["periplus", "report", *map(str, folders), "--out", str(out)])
    for model in dict.fromkeys(kind_of(run) for run in runs):
        group = [(folder, run) for folder, run in zip(folders, runs, strict=True) if kind_of(run) == model]
        cells = [Cell(model, k, str(folder.resolve()), words_of(run)) for k, (folder, run) in enumerate(group)]
        named = {cell.name: run for cell, (_, run) in zip(cells, group, strict=True)}
        workshop = Workshop(out, data, named, cells, lambda key: again, note, data_root=data_root)
        if isinstance(group[0][1].config, AutoencoderConfig):
            note(f"measuring {counted(len(group), 'run')} of {group[0][1].config.model}")
            measured = measure_autoencoders(workshop, model)
            results[model] = {**measured, "figures": draw_autoencoders(measured, workshop, f"report-{model}")}
            chapters.append(autoencoder_chapter(results[model], cells))
            continue
        note(f"measuring {counted(len(group), 'run')} of {model}, {SAMPLES:,} samples each")
        measured = judging.measure_model(workshop, model)
        panels = gan.PANELS if model == "gan" else penalty.PANELS
        results[model] = {**measured, "figures": judging.draw_model(measured, workshop, f"report-{model}", panels)}
        chapters.append(run_chapter(results[model]))
    write_atomically(out / "report.json", json.dumps(results, indent=1) + "\n")
    report = Report(
        title=f"Runs on {plain(called(record.source))}",
        subtitle=", ".join(plain(folder.name) for folder in folders),
        chapters=tuple(chapters),
        references=(),
    )
    return [write_pdf(report, out / "report.pdf", out), write_html(report, out / "report.html", out), out / "report.json"]


def run_chapter(results: dict[str, Any]) -> Chapter:
    """One model's runs as a chapter."""
    model = results["model"]
    curves = results["figures"]["curves"]
    blocks = (
        Heading("Settings"),
        settings_of(results["config"]),
        Heading("Samples"),
        *gan.sample_figures(results, model),
        run_table(results, f"{model}-runs"),
        Figure(curves["path"], "Training, every run a thin line.", curves["command"], "Training curves"),
        *gan.class_figure(results, f"{model}-classes"),
        gan.neighbour_figure(results, f"{model}-neighbours"),
        Finding(collapse_sentence(results["runs"])),
    )
    return Chapter(
        "", f"{judging.TITLES[model]}: what was trained, and what came out", "Settings, samples, curves and measures of these runs.", blocks
    )
