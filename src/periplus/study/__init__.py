"""The study: the course sheet's questions, answered with evidence.

A study is a folder:

    runs/MODEL-SEED/       what was trained (periplus.runs)
    variants/NAME/         trainings of one chapter alone
    sweeps/NAME/           sweeps of beta times seeds (periplus.sweeps)
    stages/NAME.json       what was measured, each with the inputs that it was measured from; measured again only when these change
    figures/               what was drawn
    results.json           settings, environment, and the results of every chapter: the one source of the report
    report.pdf, report.html, and an archive when asked for

The report is rendered from `results.json` alone: change a number there and the conclusion changes with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from periplus.config import held_out_of, nearest
from periplus.console import ChapterDisplay
from periplus.data import ImageData, load_data
from periplus.errors import UsageError
from periplus.files import read_json, write_atomically
from periplus.locks import hold
from periplus.machine import environment
from periplus.runs import Run, describe_data, load_run, read_environment
from periplus.study.archive import write_archive
from periplus.study.cells import train_cells
from periplus.study.chapters import CHAPTERS
from periplus.study.question import Question
from periplus.study.reporting import write_report
from periplus.study.settings import Settings, SweepCell
from periplus.study.telling import counted
from periplus.study.workshop import Swept, Workshop

__all__ = ["Settings", "make_study"]


def make_study(settings: Settings, command: str, note: Callable[[str], None] | None = None) -> list[Path]:
    """Make a study, or go on with one, and return its files: report.pdf, report.html, results.json and the archive, if asked for.

    Raises UsageError (unknown chapters, a folder in use, other settings than the study was begun with), DataError, RunError.
    """
    from periplus import console

    say = note or console.note
    questions = chosen(settings.only)
    folder = settings.out
    check_folder(folder, settings.resume)
    settings = remembered(settings, folder)
    given = settings.given()
    settings = settings.resolve()
    data = load_data(settings.data or "digits", root=settings.data_root, image_size=settings.image_size)
    check_size(data, settings)
    check_chapters(folder, {question.key for question in questions}, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder, "study"):
        begin(folder, settings, given)
        cells = settings.cells(dict.fromkeys(model for question in questions for model in question.models))
        cells += [settings.variant(variant) for question in questions for variant in question.variants]
        sweeps = [settings.sweep(key) for key in dict.fromkeys(key for question in questions for key in question.sweeps)]
        train_cells([*sweeps, *cells], settings, say)  # the long ones first
        runs = {cell.name: load_run(folder / cell.path) for cell in cells}
        made = {sweep.key: swept(folder, sweep) for sweep in sweeps}
        with ChapterDisplay({question.key: question.title for question in questions}, say) as display:
            workshop = Workshop(folder, data, runs, cells, settings.again, say, made, settings.data_root, display)
            chapters = {question.key: answer(question, workshop, display) for question in questions}
        earlier = earlier_chapters(folder, set(chapters))
        results = {
            "command": whole_command(settings, {*earlier, *chapters}) if earlier else command,
            "settings": settings.record(),
            "data": vars(describe_data(data, settings.data)),
            "environment": environment("cpu"),
            "chapters": earlier | chapters,
        }
        write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
        say("writing report.pdf and report.html")
        files = [*write_report(folder), folder / "results.json"]
        if settings.archive:
            files.append(write_archive(folder, settings.archive, settings.weights))
    return files


def answer(question: Question, workshop: Workshop, display: ChapterDisplay) -> dict[str, Any]:
    """Measure a chapter (or take what was measured from the same inputs before) and draw its figures."""
    display.begin(question.key)
    inputs = workshop.inputs((*question.models, *(variant.name for variant in question.variants)), question.sweeps)
    measured = workshop.stage(question.key, inputs, lambda: question.measure(workshop))
    for drawn in (workshop.folder / "figures").glob(f"{question.key}-*"):
        drawn.unlink()  # figures of seeds that are no longer asked for would stay
    commands = {cell.name: cell.command for cell in workshop.cells}
    if question.variants:
        measured["variants"] = {variant.name: workshop.of(variant.name)[0][0].command for variant in question.variants}
    for record in (*measured.get("runs", ()), *measured.get("other", {"runs": ()})["runs"]):
        record["command"] = commands[record["name"]]  # the study may have moved since it was measured
        record["environment"] = trained_in(workshop.runs[record["name"]])
    for key, record in measured.get("sweeps", {}).items():
        made = workshop.sweeps[key]
        record["command"] = made.cell.command
        record["environment"] = trained_in(made.run(made.cells[0]))
    figures = question.draw(measured, workshop)
    display.end()
    return {**measured, "figures": figures}


def whole_command(settings: Settings, keys: set[str]) -> str:
    """The command that makes a report of these chapters: several sessions may have made them, with --only."""
    named = [question.key for question in CHAPTERS if question.key in keys]
    return settings.again(*(() if len(named) == len(CHAPTERS) else named))


def swept(folder: Path, sweep: SweepCell) -> Swept:
    """A sweep of the study in a folder, once it is made. Raises RunError where its results cannot be read."""
    return Swept(sweep, folder / sweep.path, read_json(folder / sweep.path / "sweep.json", "make the study again with --resume"))


def trained_in(run: Run) -> dict[str, Any]:
    """What a run's figures depend on beside its configuration: commit, device, threads and torch of the session that began it."""
    session = (read_environment(run.path) or [{}])[0]
    return {name: session.get(name) for name in ("commit", "device", "threads")} | {"torch": session.get("versions", {}).get("torch")}


def begin(folder: Path, settings: Settings, given: dict[str, Any]) -> None:
    """Write down what the study is of and was given, or raise UsageError where it was begun as another one."""
    path = folder / "stages" / "settings.json"
    now = {name: settings.record()[name] for name in ("preset", "data", "image_size")}
    was = read_json(path, "choose another --out") if path.exists() else {}
    for name, value in now.items():
        if was and was.get(name) != value:
            raise UsageError(f"{folder} was begun with {name} = {was.get(name)!r}, not {value!r}: choose another --out")
    if was != now | {"given": given}:
        write_atomically(path, json.dumps(now | {"given": given}, indent=1) + "\n")


def remembered(settings: Settings, folder: Path) -> Settings:
    """The settings with what an earlier session of the study was given: `--resume` need not be told names and seeds again."""
    path = folder / "stages" / "settings.json"
    earlier = read_json(path, "choose another --out").get("given") if path.exists() else None
    return settings.remembering(earlier) if isinstance(earlier, dict) else settings


def check_size(data: ImageData, settings: Settings) -> None:
    """Raise UsageError, before anything is made, for a set too small to fill one batch. A study that was begun knows its data."""
    if (settings.out / "stages" / "settings.json").exists():
        return
    if len(data) - held_out_of(len(data)) < settings.batch:
        least = next(size for size in range(settings.batch, 2 * settings.batch + 2) if size - held_out_of(size) >= settings.batch)
        raise UsageError(
            f"{settings.data} has {len(data)} images: a study with preset '{settings.preset}' needs at least {least}, one batch of "
            f"{settings.batch} beside those that are held out"
        )


def chosen(only: tuple[str, ...]) -> list[Question]:
    """The chapters asked for, in the order of the sheet. Raises UsageError for an unknown one."""
    known = {question.key: question for question in CHAPTERS}
    keys = [key.strip() for word in only for key in word.split(",") if key.strip()]
    for key in keys:
        if key not in known:
            raise UsageError(f"--only: there is no chapter '{key}'{nearest(key, known)}: known are {', '.join(known)}")
    return [question for question in CHAPTERS if not keys or question.key in keys]


def check_folder(folder: Path, resume: bool) -> None:
    """Raise UsageError where something would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    if not folder.exists() or not any(entry.name != ".lock" for entry in folder.iterdir()):
        return
    if any((folder / name).exists() for name in ("runs", "variants", "sweeps", "stages", "logs")):
        if resume:
            return
        raise UsageError(f"{folder} holds a study already: add --resume to go on with it, or choose another --out")
    raise UsageError(f"{folder} is not empty and not a study: choose another --out")


def check_chapters(folder: Path, made_now: set[str], settings: Settings) -> None:
    """Raise UsageError where chapters that are not made again now (--only) are of other runs: the report would hold two studies, or lose chapters."""
    others: dict[str, list[str]] = {}
    for key, chapter in earlier_chapters(folder, made_now).items():
        made = made_with(chapter)
        if not made <= {("runs", settings.epochs, settings.seeds), ("sweep", settings.sweep_epochs, settings.seeds)}:
            was = " and ".join(f"{counted(seeds or 0, 'seed')} and {counted(epochs or 0, 'epoch')} ({what})" for what, epochs, seeds in sorted(made))
            others.setdefault(was, []).append(key)
    if others:
        told = "; ".join(f"{', '.join(keys)}: {was}" for was, keys in others.items())
        now = f"{counted(settings.seeds or 0, 'seed')} and {counted(settings.epochs or 0, 'epoch')}"
        raise UsageError(
            f"{folder} has chapters of other runs ({told}) than the {now} asked for: give theirs, leave out --only to make all chapters "
            f"again, or choose another --out"
        )


def earlier_chapters(folder: Path, made_now: set[str]) -> dict[str, Any]:
    """Chapters of an earlier session of this study that are not made again now (--only)."""
    path = folder / "results.json"
    chapters = read_json(path, "delete it, and it is made again").get("chapters", {}) if path.exists() else {}
    return {key: chapter for key, chapter in chapters.items() if key not in made_now}


def made_with(chapter: dict[str, Any]) -> set[tuple[str, int | None, int | None]]:
    """Epochs and seeds of the runs and of the sweeps that a chapter was measured on."""
    made: set[tuple[str, int | None, int | None]] = {("sweep", s["epochs"], s["seeds"]) for s in chapter.get("sweeps", {}).values()}
    made |= {("runs", chapter["first"]["epochs"], chapter["first"]["seeds"])} if "first" in chapter else set()
    return made | ({("runs", chapter["config"]["epochs"], len(chapter["runs"]))} if "runs" in chapter else set())
