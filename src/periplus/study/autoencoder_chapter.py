"""The chapter on an autoencoder's runs in `periplus report`: settings, curves, reconstructions, samples, rates with their certificates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from periplus import pictures, plots
from periplus.config import AutoencoderConfig
from periplus.evaluation import evaluate_autoencoder
from periplus.report import Block, Chapter, Figure, Finding, Heading, Paragraph, Table
from periplus.runs import Run
from periplus.seeds import stream
from periplus.study import judging
from periplus.study.settings import Cell
from periplus.study.telling import number, settings_of
from periplus.study.workshop import Workshop

PANELS = {
    "distortion": "distortion / nats per image",
    "rate": "rate / nats per image",
    "distortion_held_out": "distortion, held out / nats per image",
    "gradient_norm": "gradient norm",
}
TITLES = {"prior": "VAE, rate against the prior", "marginal": "VAE, rate against q(z)", "echo": "Echo noise"}


def kind_of(run: Run) -> str:
    """What runs are grouped by in a report: a model, or for autoencoders the rate that they were trained with."""
    config = run.config
    return f"{config.model}-{config.rate}" if isinstance(config, AutoencoderConfig) and config.model == "vae" else config.model


def measure_autoencoders(workshop: Workshop, kind: str) -> dict[str, Any]:
    """Every run's evaluation, and the configuration that they share."""
    records = []
    for cell, run in workshop.of(kind):
        train, test = workshop.splits(run)
        record = evaluate_autoencoder(run, train, test)
        records.append({"name": cell.name, "command": cell.command, "seed": run.config.seed, "seconds": run.timing[-1]["seconds"], **record})
    config = {k: v for k, v in dataclasses.asdict(workshop.of(kind)[0][1].config).items() if k != "seed" and v is not None}
    return {"model": kind, "config": config, "runs": records}


def draw_autoencoders(results: dict[str, Any], workshop: Workshop, key: str) -> dict[str, dict[str, str]]:
    """Curves of all runs, and of each run a grid: held-out images, what becomes of them, samples."""
    cells = workshop.of(results["model"])
    again = workshop.again(key)
    path = Path("figures") / f"{key}-curves.svg"
    plots.training_curves(
        [judging.curves(run, TITLES[results["config"]["rate"]], PANELS) for _, run in cells], workshop.folder / path, PANELS, "epochs"
    )
    figures = {"curves": {"path": str(path), "command": again}}
    for cell, run in cells:
        grid = Path("figures") / f"{key}-images-{cell.seed}.png"
        draw_images(run, workshop, grid)
        figures[f"images-{cell.seed}"] = {"path": str(grid), "command": again}
    return figures


def draw_images(run: Run, workshop: Workshop, path: Path, columns: int = 12) -> None:
    """A row of images that the run was not trained on, one of their reconstructions, two of samples; none selected."""
    _, test = workshop.splits(run)
    images = test.images[:columns]
    generator = torch.Generator().manual_seed(stream(run.config.seed, "shown"))
    mean, log_scale = run.encode(test.images[: max(256, columns)])
    rebuilt = run.decode(run.channel.sample(mean.cpu(), log_scale.cpu(), generator).to(run.device))[: len(images)]
    rows = [images.float() / 255, rebuilt.cpu().clamp(0, 1), run.sample(2 * columns).cpu()]
    pictures.image_grid(torch.cat(rows), workshop.folder / path, columns, ["image", "rebuilt", "samples", ""])


def autoencoder_chapter(results: dict[str, Any], cells: list[Cell]) -> Chapter:
    """One kind of autoencoder's runs as a chapter."""
    curves = results["figures"]["curves"]
    blocks: tuple[Block, ...] = (
        Heading("Settings"),
        settings_of(results["config"]),
        Heading("What came out"),
        rate_table(results),
        *(
            Figure(
                results["figures"][f"images-{cell.seed}"]["path"],
                f"Run {cell.seed + 1}, β = {run['beta']:g}: images that it was not trained on, what the decoder makes of their codes, and samples; "
                "none of them is selected.",
                results["figures"][f"images-{cell.seed}"]["command"],
                "Rows of images, reconstructions and samples",
            )
            for cell, run in zip(cells, results["runs"], strict=True)
        ),
        Figure(curves["path"], "Training, every run a thin line.", curves["command"], "Training curves"),
        *(Paragraph(text) for text in statements(results)),
        Finding(conclusion(results)),
    )
    title = TITLES[results["config"]["rate"]]
    return Chapter("", title, "Settings, rates with what bounds them, reconstructions and samples of these runs.", blocks)


def rate_table(results: dict[str, Any]) -> Table:
    """One row for each run, test images."""
    rows = []
    for k, run in enumerate(results["runs"]):
        test = run["splits"]["test"]
        low, high = test["rate"]["interval"]
        likelihood = run["log_likelihood"]
        rows.append(
            (
                f"{k + 1}",
                f"{run['beta']:g}",
                f"{run['seed']}",
                told(test["distortion"]),
                told(test["rate"]["formula"]),
                f"{low:.2f} to {high:.2f}",
                f"{test['rate']['ln_n']:.2f}",
                told(test["bound"]),
                "-" if likelihood is None else told(likelihood),
                f"{test['active_units']}",
            )
        )
    first = results["runs"][0]
    name = first["splits"]["test"]["rate"]["formula"]["name"]
    return Table(
        ("run", "β", "seed", "D", "R", "I(x;z) within", "ln N", "D + R", "ln p(x)", "active"),
        tuple(rows),
        f"Images that were not trained on ({first['splits']['test']['examples']:,}), nats per image, ± one standard error over images. R is {name}; "
        "I(x;z) of these images lies between the best lower and the best upper bound. D + R bounds -ln p(x); ln p(x) is found by importance sampling "
        "where there is a prior and a density. Active: dimensions whose location varies by more than 0.01.".replace("[", "\\["),
        first["command"],
    )


def told(found: dict[str, float]) -> str:
    """A value with its standard error."""
    return f"{found['value']:.2f} ± {found['standard_error']:.2f}"


def statements(results: dict[str, Any]) -> list[str]:
    """What the certificates object to, each sentence once."""
    found = [text for run in results["runs"] for text in run["splits"]["test"]["rate"]["statements"]]
    return [text.replace("$", "\\$").replace("[", "\\[") for text in dict.fromkeys(found)]


def conclusion(results: dict[str, Any]) -> str:
    """What the runs say, computed from them."""
    parts = []
    for k, run in enumerate(results["runs"]):
        test = run["splits"]["test"]
        share = 1 - test["distortion"]["value"] / test["constant_distortion"]
        low, high = test["rate"]["interval"]
        doubts = len(test["rate"]["statements"])
        carried = number(low) if number(low) == number(high) else f"between {number(low)} and {number(high)}"
        parts.append(
            f"Run {k + 1} (β = {run['beta']:g}) takes {100 * share:.0f} % off the distortion of the best constant image; its codes carry {carried} "
            "nats about these images"
            + (
                f"; {'one reservation' if doubts == 1 else f'{doubts} reservations'} about its rate {'is' if doubts == 1 else 'are'} told above."
                if doubts
                else "."
            )
        )
    return "\n".join(parts)
