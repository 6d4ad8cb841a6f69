"""The study: its folder, its stages, its conclusions, its archive; what happens when it is stopped, killed, or given strange data.

One tiny study is made for the session and copied by the tests; it lies at a relative path, so that a copy's commands are its own. Runs are trained
in this process by the very words of their cells, which saves an interpreter's start each; the tests of stopping, killing and failing start real ones.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import hashlib
import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import periplus
from periplus import cli, console, metrics, study
from periplus.commands import train_options
from periplus.config import ADVERSARIAL_DEFAULTS, DataRecord, write_config
from periplus.data import load_data
from periplus.errors import DataError, NonFiniteError, PeriplusError, RunError, UsageError
from periplus.evaluation import SMALLEST_SHARE, SMALLEST_SPREAD
from periplus.locks import hold
from periplus.report import Answers, Finding, KeyNumbers, plain
from periplus.runs import describe_data, load_run, read_environment
from periplus.study import Settings, make_study
from periplus.study import cells as cells_room
from periplus.study.archive import write_archive
from periplus.study.chapters import gan, penalty
from periplus.study.judging import compare_models, measure_run, nearest_distances
from periplus.study.reporting import build_report, report_runs, summary, write_report
from periplus.study.settings import PRESETS, Cell, image_size_of, words_of
from periplus.study.telling import number
from periplus.training import plan
from periplus.training.adversarial import hold_out

torch.set_num_threads(1)

#: The chapters on adversarial models; those on rate and distortion have tests of their own (test_chapters_one.py).
TWO = ("2a", "2b")
TINY = Settings(data="tiny.npz", out=Path("study"), only=TWO, epochs=2, seeds=2, author=("Ada",), hours=3.5)
COMMAND = "periplus study --data tiny.npz --out study --epochs 2 --seeds 2"
ODD = "a 'q' \"d\" $x$ #let <b>& `c` *s* [@r] \\n é.npz"


def write_images(path: Path, count: int = 80, channels: int = 1, labelled: bool = True) -> Path:
    """Bright bars on noise, 8 x 8; the place of the bar is the class."""
    random = np.random.default_rng(count)
    labels = np.arange(count) % 3
    bars = np.arange(8) // 3 == labels[:, None]
    images = np.clip(random.normal(60, 20, (count, channels, 8, 8)) + 120 * bars[:, None, None, :], 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images if channels > 1 else images[:, 0], **({"labels": labels} if labelled else {}))
    return path


def train_here(cells: list[Cell], settings: Settings, say: Callable[[str], None]) -> None:
    """What `train_cells` does, in this process."""
    for cell in cells:
        cli.run([*cell.words, "--resume"])


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.npz and the study of it. Not to be written to."""
    folder = tmp_path_factory.mktemp("original")
    write_images(folder / "tiny.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(study, "train_cells", train_here)
        make_study(TINY, COMMAND, note=lambda line: None)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the study, times of files included, in the current folder's `study`; resuming it trains in this process."""
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(study, "train_cells", train_here)
    return Path("study")


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures and no report, where only results.json is looked at."""
    for name in ("draw_model", "draw_side_by_side"):
        monkeypatch.setattr(gan.judging, name, lambda *_: {})
    monkeypatch.setattr(study, "write_report", lambda folder: [])


@pytest.fixture
def results(original: Path) -> dict[str, Any]:
    """The results of the tiny study, to be changed at will."""
    return read(original / "study")


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def quiet(line: str) -> None:
    """Nobody listens."""


def all_figures(results: dict[str, Any]) -> Iterator[dict[str, str]]:
    for chapter in results["chapters"].values():
        yield from chapter["figures"].values()


# ---- the folder -----------------------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_is_promised_and_nothing_else(original: Path) -> None:
    folder = original / "study"
    assert {p.name for p in folder.iterdir()} == {".lock", "figures", "report.html", "report.pdf", "results.json", "runs", "stages"}
    assert {p.name for p in (folder / "stages").iterdir()} == {"settings.json", "2a.json", "2b.json"}
    assert {p.name for p in (folder / "runs").iterdir()} == {"gan-0", "gan-1", "wgan-gp-0", "wgan-gp-1"}
    per_chapter = ("samples-0.png", "samples-1.png", "curves.svg", "classes.svg", "neighbours.png")
    assert {p.name for p in (folder / "figures").iterdir()} == {f"{key}-{name}" for key in ("2a", "2b") for name in per_chapter} | {
        "2b-side-by-side.png"
    }
    assert not [p for p in folder.rglob(".*") if p.name != ".lock"], "half-written files stayed behind"


def test_results_tell_where_everything_comes_from(original: Path, results: dict[str, Any]) -> None:
    assert results["command"] == COMMAND
    wanted = {"data": "tiny.npz", "preset": "digits", "seeds": 2, "epochs": 2, "sweep_epochs": 2, "image_size": None}
    assert results["settings"] == wanted | {"author": ["Ada"], "collaborators": [], "hours": 3.5}
    data = load_data(original / "tiny.npz")
    assert results["data"]["sha256"] == data.content_hash()
    assert (results["data"]["images"], results["data"]["channels"], results["data"]["height"], results["data"]["width"]) == (80, 1, 8, 8)
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert set(results["chapters"]) == {"2a", "2b"}


@pytest.mark.parametrize(("key", "model"), [("2a", "gan"), ("2b", "wgan-gp")])
def test_a_chapter_has_a_record_for_every_seed(original: Path, results: dict[str, Any], key: str, model: str) -> None:
    chapter = results["chapters"][key]
    assert chapter["model"] == chapter["config"]["model"] == model and chapter["config"]["epochs"] == 2 and "seed" not in chapter["config"]
    assert [(r["name"], r["seed"]) for r in chapter["runs"]] == [(f"{model}-0", 0), (f"{model}-1", 1)]
    for record in chapter["runs"]:
        run = load_run(original / "study" / "runs" / record["name"])
        words = shlex.split(record["command"])
        assert words[:5] == ["periplus", "train", model, "--data", "tiny.npz"]
        assert words[words.index("--seed") + 1] == str(run.config.seed) == str(record["seed"])
        assert record["last_metrics"] == run.metrics[-1] and record["step"] == run.step and record["seconds"] == run.timing[-1]["seconds"]
        assert math.fsum(s["value"] for s in record["shares"]) == pytest.approx(1)
        assert record["smallest_share"] == min(s["value"] for s in record["shares"])
    assert chapter["runs"][0]["spread"] != chapter["runs"][1]["spread"]
    assert key == "2a" or chapter["other"] == {k: v for k, v in results["chapters"]["2a"].items() if k != "figures"}
    assert key == "2a" or chapter["comparison"] == compare_models(chapter, chapter["other"])


def test_every_figure_exists_and_has_a_command(original: Path, results: dict[str, Any]) -> None:
    figures = list(all_figures(results))
    assert {f["path"] for f in figures} == {str(p.relative_to(original / "study")) for p in (original / "study" / "figures").iterdir()}
    assert all(f["command"].startswith("periplus ") for f in figures)


def test_the_samples_are_made_again_by_their_command(folder: Path, results: dict[str, Any]) -> None:
    figure = results["chapters"]["2b"]["figures"]["samples-1"]
    before = (folder / figure["path"]).read_bytes()
    (folder / figure["path"]).unlink()
    cli.run(shlex.split(figure["command"])[1:])
    assert (folder / figure["path"]).read_bytes() == before
    assert before != (folder / "figures" / "2b-samples-0.png").read_bytes()


def test_the_curves_are_made_again_by_their_command(folder: Path, results: dict[str, Any], lean: None) -> None:
    cli.run(shlex.split(results["chapters"]["2a"]["figures"]["curves"]["command"])[1:])
    assert read(folder)["chapters"]["2a"]["runs"] == results["chapters"]["2a"]["runs"]


def test_the_reports_are_a_pdf_and_a_page_that_needs_nothing_else(original: Path) -> None:
    assert (original / "study" / "report.pdf").read_bytes().startswith(b"%PDF")
    page = (original / "study" / "report.html").read_text(encoding="utf-8")
    addresses = re.findall(r"""\b(?:src|href|srcset|data|action|poster)\s*=\s*["']([^"']*)""", page)
    assert len(addresses) > 10 and not [a[:80] for a in addresses if not a.startswith(("data:image/", "#"))]
    assert "<script" not in page and "@import" not in page and "<link" not in page and "<iframe" not in page
    assert not re.findall(r"url\((?!['\"]?(?:data:|#))[^)]*\)", page)
    assert "Ada" in page and html.escape(COMMAND) in re.sub(r"<wbr>|</?span[^>]*>", "", page)


# ---- measures -------------------------------------------------------------------------------------------------------------------------------


def test_neighbour_distances_are_those_of_brute_force(original: Path, results: dict[str, Any]) -> None:
    data = load_data(original / "tiny.npz")
    record = results["chapters"]["2a"]["runs"][1]
    run = load_run(original / "study" / "runs" / "gan-1")
    train, held_out = hold_out(run.config, data)
    assert held_out is not None and len(train) + len(held_out) == 80
    reference = train.images.flatten(1).double() / 255
    nearest = [
        torch.cdist(rows, reference).min(1).values
        for rows in (run.sample(1000, seed=1).flatten(1).double(), held_out.images.flatten(1).double() / 255)
    ]
    assert record["neighbour_distance"] == pytest.approx(float(nearest[0].median()), rel=1e-5)
    assert record["neighbour_distance_held_out"] == pytest.approx(float(nearest[1].median()), rel=1e-5)
    assert record["neighbour_ratio"] == pytest.approx(record["neighbour_distance"] / record["neighbour_distance_held_out"], rel=1e-6)
    low, high = record["neighbour_ratio_interval"]
    assert low <= record["neighbour_ratio"] <= high


def test_a_training_image_is_its_own_nearest_neighbour() -> None:
    rows = torch.rand(50, 64, generator=torch.Generator().manual_seed(0))
    assert nearest_distances(rows[10:20], rows).tolist() == [0.0] * 10


def test_share_distance_is_total_variation(original: Path, results: dict[str, Any]) -> None:
    shares = torch.bincount(load_data(original / "tiny.npz").labels) / 80  # type: ignore[arg-type]
    for record in results["chapters"]["2b"]["runs"]:
        told = [s["value"] for s in record["shares"]]
        assert record["share_distance"] == pytest.approx(sum(max(0.0, a - b) for a, b in zip(told, shares.tolist(), strict=True)))


def test_a_run_without_held_out_images_has_no_neighbour_ratio(folder: Path) -> None:
    cli.run(shlex.split("train gan --data tiny.npz --epochs 1 --batch-size 16 --held-out 0 --threads 1 --out bare"))
    record = measure_run(Cell("gan", 7, "bare", ()), load_run("bare"), load_data("tiny.npz"))
    assert record["seed"] == 7 and record["neighbour_distance"] > 0
    assert record["neighbour_ratio"] is record["neighbour_ratio_interval"] is record["neighbour_distance_held_out"] is None
    assert "held-out" not in gan.conclusion({"runs": [record]})


# ---- conclusions follow the numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "room"), [("2a", gan), ("2b", penalty)])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((False, False), "None of 2 runs collapsed"),
        ((True, False), "1 of 2 runs collapsed (seed 0)"),
        ((False, True), "1 of 2 runs collapsed (seed 1)"),
        ((True, True), "2 of 2 runs collapsed (seeds 0, 1)"),
    ],
)
def test_collapse_is_what_the_flags_say(results: dict[str, Any], key: str, room: Any, flags: tuple[bool, bool], told: str) -> None:
    chapter = results["chapters"][key]
    for run, flag in zip(chapter["runs"], flags, strict=True):
        run["collapsed"] = flag
    assert room.conclusion(chapter).startswith(told)
    assert dict(answers(results))[key].startswith(told)
    assert isinstance(found := room.QUESTION.tell(chapter, results)[-1], Finding) and found.text.startswith(told)


def test_one_run_is_not_counted_among_one(results: dict[str, Any]) -> None:
    run = results["chapters"]["2a"]["runs"][0]
    for flag, told in ((True, "The run collapsed; collapsed means"), (False, "The run did not collapse; collapsed means")):
        assert gan.conclusion({"runs": [run | {"collapsed": flag}]}).startswith(told)


def answers(results: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The answers in short on the first page."""
    return next(b.rows for b in summary(results) if isinstance(b, Answers))


def test_the_summary_counts_the_runs_of_both_chapters(results: dict[str, Any]) -> None:
    runs = [run for chapter in results["chapters"].values() for run in chapter["runs"]]
    for count in range(5):
        for k, run in enumerate(runs):
            run |= {"collapsed": k < count, "spread": 0.61 + k, "smallest_share": 0.0123 + k, "seconds": 60.0 * count}
        rows = next(b for b in summary(results) if isinstance(b, KeyNumbers)).rows
        assert [value for value, _ in rows] == [f"{count} of 4", "1.2 %"]
    runs[2]["smallest_share"] = None  # data without classes
    assert next(b for b in summary(results) if isinstance(b, KeyNumbers)).rows[1][0] == "0.61"


@pytest.mark.parametrize("key", ["2a", "2b"])
def test_spreads_are_told_as_they_stand(results: dict[str, Any], key: str) -> None:
    chapter = results["chapters"][key]
    for spreads in ((0.111, 0.987), (1.53, 0.00042)):
        for run, spread in zip(chapter["runs"], spreads, strict=True):
            run["spread"] = spread
        text = {"2a": gan, "2b": penalty}[key].conclusion(chapter)
        assert f"the spread is {number(spreads[0], zeros=True)}, {number(spreads[1], zeros=True)} of that of the data" in text


@pytest.mark.parametrize(
    ("intervals", "told"),
    [
        (((0.5, 0.7), (0.6, 0.99)), "nearer to the training images than held-out images are, which copying would explain"),
        (((1.01, 1.7), (1.2, 1.4)), "further from the training images than held-out images are"),
        (((0.9, 1.1), (0.95, 1.05)), "about as far from the training images"),
        (((0.5, 0.9), (1.1, 1.4)), "about as far from the training images"),  # the seeds disagree
        (((0.5, 0.9), (0.9, 1.1)), "about as far from the training images"),
    ],
)
def test_nearness_is_what_the_intervals_say(results: dict[str, Any], intervals: tuple[tuple[float, float], ...], told: str) -> None:
    chapter = results["chapters"]["2a"]
    for run, (low, high) in zip(chapter["runs"], intervals, strict=True):
        run |= {"neighbour_ratio": (low + high) / 2, "neighbour_ratio_interval": [low, high]}
    text = gan.conclusion(chapter)
    assert f"Samples are {told}" in text
    assert f"within {number(min(i[0] for i in intervals))} to {number(max(i[1] for i in intervals))}" in text
    assert f"Samples are {told}" in dict(answers(results))["2a"]


@pytest.mark.parametrize(
    ("train", "held_out", "told"),
    [
        ((2.0, 2.1, 1.9), (1.0, 1.0, 1.0), "by heart"),
        ((1.1, 0.9, 1.0), (1.0, 1.0, 1.0), "cannot tell it from zero"),
        ((0.1, 0.2, 0.15), (-1.0, -1.1, -0.9), "by heart"),
        ((-1.0, -1.2, -0.8), (1.0, 1.0, 1.0), "cannot tell it from zero"),
        ((2.0,), (1.0,), "one seed cannot tell"),
    ],
)
def test_learning_by_heart_is_what_the_gaps_say(results: dict[str, Any], train: tuple[float, ...], held_out: tuple[float, ...], told: str) -> None:
    chapter = results["chapters"]["2a"]
    first = chapter["runs"][0]
    chapter["runs"] = [first | {"last_metrics": {"critic_gap_train": a, "critic_gap_held_out": b}} for a, b in zip(train, held_out, strict=True)]
    text = gan.conclusion(chapter)
    means = f"{number(sum(train) / len(train))} on training and {number(sum(held_out) / len(train))} on held-out images"
    assert told in text and means in text
    for run in chapter["runs"]:
        del run["last_metrics"]["critic_gap_held_out"]
    assert "lead of the discriminator" not in gan.conclusion(chapter)


def test_the_comparison_is_what_the_verdicts_say(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["2b"]
    rows = chapter["comparison"]
    assert len(rows) == 3
    for verdicts in (("better", "worse", "cannot tell"), ("worse", "better", "better"), ("cannot tell",) * 3):
        for row, verdict in zip(rows, verdicts, strict=True):
            row["verdict"] = verdict
        text = penalty.conclusion(chapter)
        told = {row["title"]: f"*{row['verdict']}* than the GAN in: {row['title']}." in text for row in rows}
        assert told == {row["title"]: row["verdict"] != "cannot tell" for row in rows}
        unsure = "; ".join(row["title"] for row in rows if row["verdict"] == "cannot tell")
        assert ("*cannot tell*" in text) == bool(unsure) and unsure in text
        assert [row[-1] for row in penalty.comparison_table(chapter).rows] == list(verdicts)
        short = dict(answers(results))["2b"]
        assert all((f"{row['verdict']} in {row['title']}" in short) == (row["verdict"] != "cannot tell") for row in rows)
        assert ("*cannot be told* apart" in short) == (set(verdicts) == {"cannot tell"})
    rows[1] |= {"interval": [None, 0.123], "a": [0.5, 0.25], "b": [4.0, 8.0]}
    assert penalty.comparison_table(chapter).rows[1][2:5] == ("0.500, 0.250", "4.00, 8.00", "-∞ to 0.123")


@pytest.mark.parametrize("draw", range(8))
def test_conclusions_name_no_number_that_is_not_in_the_results(results: dict[str, Any], draw: int) -> None:
    random = np.random.default_rng(draw)
    for chapter in (results["chapters"]["2a"], results["chapters"]["2b"], results["chapters"]["2b"]["other"]):
        for run in chapter["runs"]:
            run |= {k: float(random.lognormal(0, 2)) for k in ("spread", "neighbour_ratio", "seconds")}
            run |= {"collapsed": bool(random.integers(2)), "smallest_share": float(random.uniform()), "seed": int(random.integers(10**6))}
            run["neighbour_ratio_interval"] = sorted(random.lognormal(0, 1, 2).tolist())
            run["last_metrics"] |= {k: float(random.normal(0, 5)) for k in ("critic_gap_train", "critic_gap_held_out")}
    a, b = results["chapters"]["2a"], results["chapters"]["2b"]
    rule = {f"{100 * SMALLEST_SHARE:g}", f"{SMALLEST_SPREAD:g}", "95"}
    for chapter, room in ((a, gan), (b, penalty)):
        runs = chapter["runs"]
        values = [r[k] * scale for r in runs for k, scale in (("spread", 1), ("neighbour_ratio", 1), ("smallest_share", 100))]
        values += [end for r in runs for end in r["neighbour_ratio_interval"]]
        values += [sum(r["last_metrics"][k] for r in runs) / 2 for k in ("critic_gap_train", "critic_gap_held_out")]
        allowed = rule | {str(r["seed"]) for r in runs} | {"2", str(sum(r["collapsed"] for r in runs))}
        allowed |= {word for v in values for word in (number(v), number(v, zeros=True))}
        gaps = [r["last_metrics"]["critic_gap_train"] - r["last_metrics"]["critic_gap_held_out"] for r in runs]
        allowed |= {number(end) for end in metrics.mean_interval(gaps)}
        said = set(re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?: × 10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?", room.conclusion(chapter)))
        assert len(said) >= 5 and said <= allowed, said - allowed


# ---- telling is a pure function -------------------------------------------------------------------------------------------------------------


def test_telling_is_a_function_of_results_and_figures(original: Path, folder: Path, tmp_path: Path) -> None:
    """The same bytes twice, elsewhere, and without runs and stages."""
    elsewhere = tmp_path / "another place"
    elsewhere.mkdir()
    shutil.copy(folder / "results.json", elsewhere)
    shutil.copytree(folder / "figures", elsewhere / "figures")
    for _ in range(2):
        write_report(elsewhere)
        for name in ("report.pdf", "report.html"):
            assert (elsewhere / name).read_bytes() == (original / "study" / name).read_bytes(), name


def test_the_report_follows_results_changed_by_hand(folder: Path) -> None:
    changed = read(folder)
    for run in changed["chapters"]["2a"]["runs"]:
        run["collapsed"] = not run["collapsed"]
        run["spread"] = 0.4321
    pdf = (folder / "report.pdf").read_bytes()
    (folder / "results.json").write_text(json.dumps(changed), encoding="utf-8")
    write_report(folder)
    assert (folder / "report.pdf").read_bytes() != pdf
    page = (folder / "report.html").read_text(encoding="utf-8")
    count = sum(r["collapsed"] for r in changed["chapters"]["2a"]["runs"])
    assert (f"{count} of 2 runs collapsed" if count else "None of 2 runs collapsed") in page and "0.432, 0.432 of that of the data" in page


def test_an_unreadable_results_json_is_named(tmp_path: Path) -> None:
    for content in (None, b"", b'{"chapters": '):
        if content is not None:
            (tmp_path / "results.json").write_bytes(content)
        with pytest.raises(RunError, match=r"results\.json cannot be read .* --resume"):
            write_report(tmp_path)


def test_a_report_of_one_chapter_has_no_other(results: dict[str, Any]) -> None:
    del results["chapters"]["2b"]
    report = build_report(results)
    assert [c.key for c in report.chapters] == ["2a"]
    assert [key for key, _ in answers(results)] == ["2a"]
    assert [r.label for r in report.references] == ["goodfellow2014"]  # what this chapter cites


@pytest.mark.parametrize(
    ("source", "told"),
    [("mnist", "mnist"), ("/tmp/of mine/clothes/bag/", "bag"), ("photos/cats.npz", "cats.npz"), ("C:\\photos\\cats", "cats"), ("/", "/")],
)
def test_a_folder_is_told_by_its_own_name(results: dict[str, Any], source: str, told: str) -> None:
    results["data"]["source"] = source
    assert build_report(results).subtitle.startswith(f"{plain(told)}: 80 images")


def test_the_time_of_training_is_that_of_all_runs(results: dict[str, Any]) -> None:
    for run in (run for key in TWO for run in results["chapters"][key]["runs"]):
        run["seconds"] = 30.0
    assert dict(build_report(results).environment)["time of adversarial training"] == "2 min 00 s in 4 runs together"
    results["chapters"] = {}
    assert "time of adversarial training" not in dict(build_report(results).environment)


def test_what_is_not_known_of_the_environment_is_left_out(results: dict[str, Any]) -> None:
    assert {"measured at commit", "trained on"} <= dict(build_report(results).environment).keys()
    results["environment"]["commit"] = None
    for chapter in results["chapters"].values():
        for run in chapter["runs"]:
            run["environment"]["commit"] = None
    rows = dict(build_report(results).environment)
    assert not [name for name in rows if "commit" in name] and not [value for value in rows.values() if "None" in value]


# ---- stages ---------------------------------------------------------------------------------------------------------------------------------


def test_an_unchanged_study_measures_nothing_again(folder: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def times() -> dict[Path, int]:
        kept = [p for part in ("stages", "runs") for p in (folder / part).rglob("*") if p.is_file()]
        return {p: p.stat().st_mtime_ns for p in kept}

    before, figures = times(), {p: p.read_bytes() for p in (folder / "figures").iterdir()}
    monkeypatch.setattr(gan.judging, "measure_model", lambda *_: pytest.fail("measured again"))
    files = make_study(dataclasses.replace(TINY, resume=True), "again", note=quiet)
    assert times() == before
    assert read(folder) == results | {"command": "again"}
    assert {p: p.read_bytes() for p in (folder / "figures").iterdir()} == figures
    assert sorted(p.name for p in files) == ["report.html", "report.pdf", "results.json"] and all(p.is_file() for p in files)


@pytest.mark.parametrize("stale", ["gan-1", "version"])
def test_a_stage_is_measured_again_when_its_inputs_change(folder: Path, results: dict[str, Any], lean: None, stale: str) -> None:
    """...and the chapter that --only leaves out stays as it is."""
    path = folder / "stages" / "2a.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    genuine = dict(kept["inputs"])
    kept["inputs"][stale] = "0" * 64
    path.write_text(json.dumps(kept | {"result": {"stale": True}}), encoding="utf-8")
    edited = copy.deepcopy(results)
    edited["chapters"]["2b"]["left"] = "alone"
    (folder / "results.json").write_text(json.dumps(edited), encoding="utf-8")
    other = (folder / "stages" / "2b.json").stat().st_mtime_ns
    make_study(dataclasses.replace(TINY, resume=True, only=("2a",)), COMMAND, note=quiet)
    after = read(folder)["chapters"]
    assert after["2a"] == results["chapters"]["2a"] | {"figures": {}}  # measuring is deterministic
    assert after["2b"] == edited["chapters"]["2b"] and (folder / "stages" / "2b.json").stat().st_mtime_ns == other
    assert json.loads(path.read_text(encoding="utf-8"))["inputs"] == genuine


def test_one_seed_cannot_tell_and_says_so_in_json(folder: Path, lean: None) -> None:
    make_study(dataclasses.replace(TINY, resume=True, seeds=1), "one seed", note=quiet)
    chapter = read(folder)["chapters"]["2b"]
    assert [r["seed"] for r in chapter["runs"]] == [0] and {row["verdict"] for row in chapter["comparison"]} == {"cannot tell"}
    assert "With 1 seed this study *cannot tell*" in penalty.conclusion(chapter)
    table = penalty.comparison_table(chapter | {"figures": {"curves": {"command": ""}}})
    assert {row[4] for row in table.rows} == {"-∞ to ∞"}
    json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)  # no Infinity, no NaN: they are not JSON


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "other.npz"},
        {"preset": "quick"},
    ],
)
def test_a_finished_study_is_not_resumed_with_other_settings(
    folder: Path, results: dict[str, Any], lean: None, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    write_images(Path("other.npz"), 90)
    monkeypatch.setattr(gan.judging, "measure_model", lambda *_: pytest.fail("measured runs of one thing on another"))
    with pytest.raises(UsageError, match="was begun with (data|preset) ="):
        make_study(dataclasses.replace(TINY, resume=True, only=("2a",), **changes), "again", note=quiet)
    assert read(folder) == results


def test_a_resumed_study_remembers_names_seeds_and_hours(folder: Path, results: dict[str, Any], lean: None) -> None:
    told = {"author": ("A. Student",), "collaborators": ("B. Helper", "C. Friend"), "hours": 12.5}
    make_study(dataclasses.replace(TINY, resume=True, **told), "again", note=quiet)
    make_study(
        Settings(data=TINY.data, out=TINY.out, only=TINY.only, resume=True, hours=13.0), "again", note=quiet
    )  # neither names, nor seeds, nor epochs
    found = read(folder)["settings"]
    assert (found["author"], found["collaborators"], found["hours"]) == (["A. Student"], ["B. Helper", "C. Friend"], 13.0)
    assert (found["seeds"], found["epochs"]) == (results["settings"]["seeds"], results["settings"]["epochs"])


def test_chapters_of_other_runs_are_not_lost(folder: Path, results: dict[str, Any], lean: None) -> None:
    with pytest.raises(
        UsageError, match=r"chapters of other runs \(2b: 2 seeds and 2 epochs \(runs\)\) than the 1 seed and 2 epochs asked for: give theirs"
    ):
        make_study(dataclasses.replace(TINY, resume=True, only=("2a",), seeds=1), "again", note=quiet)
    assert read(folder) == results
    make_study(dataclasses.replace(TINY, resume=True, only=("2a",)), "again", note=quiet)
    found = read(folder)
    assert set(found["chapters"]) == {"2a", "2b"}
    assert "--only 2a,2b" in found["command"], "the title names the command that makes all chapters of the report"


def test_a_set_that_fills_no_batch_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "train_cells", lambda *_: pytest.fail("training began"))
    write_images(tmp_path / "few.npz", 70)
    with pytest.raises(UsageError, match=r"few.npz has 70 images: a study with preset 'digits' needs at least 71, one batch of 64"):
        make_study(Settings(data=str(tmp_path / "few.npz"), out=tmp_path / "new"), "periplus study", note=quiet)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes", [{"hours": -3.0}, {"hours": math.nan}, {"hours": math.inf}, {"weights": True}])
def test_hours_below_zero_and_weights_of_no_archive_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--hours is|--weights puts"):
        Settings(**changes)


def test_a_study_is_not_resumed_with_fewer_epochs(folder: Path, lean: None) -> None:
    with contextlib.suppress(UsageError):
        make_study(dataclasses.replace(TINY, resume=True, epochs=1, only=("2a",)), "again", note=quiet)
    after = read(folder)
    assert after["settings"]["epochs"] == after["chapters"]["2a"]["config"]["epochs"]


# ---- what is asked for ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "keys"),
    [
        ((), ["1a", "1b", "1c", "1d", "1e", "2a", "2b", "2c", "2d", "2e"]),
        (("2b",), ["2b"]),
        (("2b", "2a"), ["2a", "2b"]),
        (("2b,2a",), ["2a", "2b"]),
        ((" 2a ,",), ["2a"]),
    ],
)
def test_chapters_come_in_the_order_of_the_sheet(only: tuple[str, ...], keys: list[str]) -> None:
    assert [q.key for q in study.chosen(only)] == keys


def test_an_unknown_chapter_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--only: there is no chapter '2bb' \(did you mean '2b'\?\): known are 1a, 1b, 1c, 1d, 1e, 2a, 2b"
    ) as caught:
        make_study(Settings(out=tmp_path / "new", only=("2a", "2bb")), "periplus study", note=quiet)
    assert caught.value.exit_code == 2 and not (tmp_path / "new").exists()


def test_nothing_is_made_for_data_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.npz"):
        make_study(Settings(data=str(tmp_path / "absent.npz"), out=tmp_path / "new"), "periplus study", note=quiet)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"seeds": -1}, {"epochs": 0}, {"workers": 0}, {"workers": -1}])
def test_counts_below_one_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]) -> None:
    monkeypatch.setattr(study, "train_cells", lambda *_: pytest.fail("training began"))
    with pytest.raises(UsageError):
        make_study(Settings(out=tmp_path / "new", **changes), "periplus study", note=quiet)  # type: ignore[arg-type]


def test_settings_take_from_the_preset_what_is_not_given() -> None:
    for name, preset in PRESETS.items():
        resolved = Settings(preset=name).resolve()
        assert (resolved.data, resolved.epochs, resolved.seeds) == (preset["data"], preset["epochs"], 3) and (resolved.workers or 0) >= 1
    given = Settings(preset="sheet", data="x", epochs=7, seeds=2, workers=5).resolve()
    assert (given.data, given.epochs, given.seeds, given.workers) == ("x", 7, 2, 5)


def test_cells_are_commands_that_the_command_line_takes() -> None:
    settings = Settings(data=ODD, out=Path("o u t"), image_size=12, data_root=Path("r"), preset="sheet", seeds=2).resolve()
    cells = settings.cells(("gan", "wgan-gp"))
    assert [c.name for c in cells] == ["gan-0", "wgan-gp-0", "gan-1", "wgan-gp-1"]
    for cell in cells:
        words = shlex.split(cell.command)
        assert words == ["periplus", *cell.words]
        options = cli.parse(train_options(words[2:]), words[3:], "periplus train")
        config = options.config()
        assert (options.data, options.out, options.image_size, options.threads) == (ODD, Path("o u t") / cell.path, 12, 1)
        assert (config.model, config.seed, config.epochs, config.learning_rate) == (cell.model, cell.seed, 100, 1e-4)


@pytest.mark.parametrize(
    ("inside", "resume", "complaint"),
    [
        ("a file", False, "is a file: choose another --out"),
        ("a file", True, "is a file: choose another --out"),
        ("runs", False, "holds a study already: add --resume"),
        ("stages", False, "holds a study already: add --resume"),
        ("thesis.txt", False, "is not empty and not a study"),
        ("runs", True, None),
        (".lock", False, None),
        (None, False, None),
        ("absent", False, None),
    ],
)
def test_nothing_is_overwritten(tmp_path: Path, inside: str | None, resume: bool, complaint: str | None) -> None:
    out = tmp_path / "out"
    if inside == "a file":
        out.write_text("mine")
    elif inside != "absent":
        out.mkdir()
        if inside in ("runs", "stages"):
            (out / inside).mkdir()
        elif inside:
            (out / inside).write_text("mine")
    with pytest.raises(UsageError, match=complaint) if complaint else contextlib.nullcontext():
        study.check_folder(out, resume)


def test_resume_does_not_make_a_study_of_somebody_elses_folder(tmp_path: Path) -> None:
    (tmp_path / "report.pdf").write_text("a thesis")
    with pytest.raises(UsageError):
        study.check_folder(tmp_path, resume=True)


def test_two_studies_do_not_work_in_one_folder(folder: Path, results: dict[str, Any]) -> None:
    with hold(folder, "study"), pytest.raises(UsageError, match=rf"held by pid {os.getpid()} .*\(study\)"):
        make_study(dataclasses.replace(TINY, resume=True), "again", note=quiet)
    assert read(folder) == results


# ---- strange data ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study, archive included, of colour images without labels, with every name full of what means something to typst, HTML or a shell."""
    folder = tmp_path_factory.mktemp("odd")
    write_images(folder / ODD, channels=3, labelled=False)
    out = folder / "out $y$ #x <i> *z*"
    settings = Settings(str(folder / ODD), out, only=TWO, epochs=1, seeds=1, author=("<b>#A$",), collaborators=("[@x] `y`",), archive="zip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train_cells", train_here)
        files = make_study(settings, f"periplus study --data '{ODD}'", note=quiet)
    assert [p.name for p in files] == ["report.pdf", "report.html", "results.json", f"{out.name}.zip"]
    return out


def test_colour_images_without_labels_go_all_the_way(odd: Path) -> None:
    results = read(odd)
    assert (results["data"]["channels"], results["settings"]["data"]) == (3, str(odd.parent / ODD))
    for chapter in results["chapters"].values():
        assert [(r["shares"], r["smallest_share"], r["share_distance"], r["classifier_error"]) for r in chapter["runs"]] == [(None,) * 4]
        assert "classes" not in chapter["figures"]
    assert [row["key"] for row in results["chapters"]["2b"]["comparison"]] == ["spread", "neighbour_ratio"]
    assert "class has" not in gan.conclusion(results["chapters"]["2a"])
    assert not list((odd / "figures").glob("*classes*"))
    rows = next(b for b in summary(results) if isinstance(b, KeyNumbers)).rows
    assert not [what for _, what in rows if "class" in what]


def test_names_are_shown_and_never_obeyed(odd: Path) -> None:
    assert (odd / "report.pdf").read_bytes().startswith(b"%PDF")
    page = (odd / "report.html").read_text(encoding="utf-8")
    assert "<b>&" not in page and "<i> *z*" not in page and "<b>#A" not in page
    shown = html.unescape(re.sub(r"<[^>]*>", "", page)).replace("\u200b", "")
    for name in (ODD, "<b>#A$", "[@x] `y`"):
        assert name in shown, name


def test_commands_of_runs_with_odd_names_are_quoted(odd: Path) -> None:
    words = shlex.split(read(odd)["chapters"]["2a"]["runs"][0]["command"])
    assert words[words.index("--data") + 1] == str(odd.parent / ODD) and words[-1] == str(odd / "runs" / "gan-0")


def test_commands_of_figures_with_odd_names_are_quoted(odd: Path) -> None:
    for figure in all_figures(read(odd)):
        words = shlex.split(figure["command"])
        assert words[words.index("--out") + 1] in (str(odd), str(odd / figure["path"]))


# ---- the archive ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_an_archive_is_complete_verified_and_without_weights(folder: Path, form: str) -> None:
    path = write_archive(folder, form)
    assert path == folder / f"study.{form}"
    if form == "zip":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            content = {i.filename: archive.read(i) for i in archive.infolist()}
    else:
        with tarfile.open(path) as archive:
            content = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
    manifest = json.loads(content.pop("study/MANIFEST.json"))
    assert {f"study/{name}" for name in manifest} == set(content)
    for name, entry in manifest.items():
        on_disk = (folder / name).read_bytes()
        assert content[f"study/{name}"] == on_disk
        assert entry == {"bytes": len(on_disk), "sha256": hashlib.sha256(on_disk).hexdigest()}
    runs = [f"runs/{m}-{s}/{f}" for m in ("gan", "wgan-gp") for s in (0, 1) for f in ("config.toml", "env.json", "metrics.jsonl", "timing.jsonl")]
    figures = [f"figures/{p.name}" for p in (folder / "figures").iterdir()]
    assert set(manifest) == {"report.pdf", "report.html", "results.json", *(f"stages/{s}.json" for s in ("settings", "2a", "2b")), *runs, *figures}


def test_weights_in_an_archive_make_runs_that_can_be_used(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(write_archive(folder, "zip", weights=True)) as archive:
        archive.extractall(tmp_path)
    for path in sorted((folder / "runs").iterdir()):
        unpacked = load_run(tmp_path / "study" / "runs" / path.name)
        assert torch.equal(unpacked.sample(3), load_run(path).sample(3))


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_archives_of_equal_contents_are_equal(folder: Path, form: str, tmp_path: Path) -> None:
    first = write_archive(folder, form).read_bytes()
    assert write_archive(folder, form).read_bytes() == first, "an archive must not contain an earlier one"
    for path in folder.rglob("*"):
        os.utime(path, (10**9, 10**9))
    shutil.copytree(folder, tmp_path / "elsewhere" / "study")
    assert write_archive(tmp_path / "elsewhere" / "study", form).read_bytes() == first
    (folder / "report.pdf").write_bytes(b"%PDF changed")
    assert write_archive(folder, form).read_bytes() != first


def test_an_unknown_form_of_archive_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="--archive is 'rar': use zip or tar.gz"):
        write_archive(folder, "rar")


# ---- reports of runs ------------------------------------------------------------------------------------------------------------------------


def test_a_report_of_one_run(folder: Path) -> None:
    files = report_runs([folder / "runs" / "gan-1"], Path("one"))
    assert [p.name for p in files] == ["report.pdf", "report.html", "report.json"] and files[0].read_bytes().startswith(b"%PDF")
    told = json.loads(files[2].read_text(encoding="utf-8"))
    measured = read(folder)["chapters"]["2a"]["runs"][1]
    same = ("spread", "shares", "collapsed", "neighbour_ratio", "last_metrics", "step")
    assert list(told) == ["gan"] and [{k: r[k] for k in same} for r in told["gan"]["runs"]] == [{k: measured[k] for k in same}]


@pytest.fixture(scope="module")
def two(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three runs of two models."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(original)
        report_runs([Path("study/runs") / name for name in ("wgan-gp-0", "gan-0", "gan-1")], out)
    return out


def test_a_report_of_two_models(two: Path) -> None:
    told = json.loads((two / "report.json").read_text(encoding="utf-8"))
    assert [(model, len(r["runs"])) for model, r in told.items()] == [("wgan-gp", 1), ("gan", 2)]
    assert all((two / f["path"]).is_file() for r in told.values() for f in r["figures"].values())
    first, second = (two / told["gan"]["figures"][f"samples-{s}"]["path"] for s in (0, 1))
    assert first.read_bytes() != second.read_bytes()
    page = (two / "report.html").read_text(encoding="utf-8")
    assert "gan-0" in page and "wgan-gp-0" in page and (two / "report.pdf").read_bytes().startswith(b"%PDF")


def test_commands_in_a_report_of_runs_can_be_run(two: Path) -> None:
    told = json.loads((two / "report.json").read_text(encoding="utf-8"))
    for figure in (f for r in told.values() for f in r["figures"].values()):
        words = shlex.split(figure["command"])
        if words[1] == "study":
            study.chosen((words[words.index("--only") + 1],))


def test_training_commands_in_a_report_of_runs_are_those_of_the_runs(two: Path) -> None:
    told = json.loads((two / "report.json").read_text(encoding="utf-8"))
    assert "--epochs 2" in told["gan"]["runs"][1]["command"] and "--seed 1" in told["gan"]["runs"][1]["command"]


@pytest.mark.parametrize(
    "options",
    [
        "gan --batch-size 8 --generator-loss saturating --ema 0 --critic-dropout 0 --beta1 0.25 --seed 3",
        "gan --held-out 0 --batch-size 16 --max-steps 3 --image-size 6",
        "wgan-gp --batch-size 64 --penalty-weight 0.5 --critic-steps 2 --learning-rate 3e-5 --latent-dim 3 --checkpoint-every 2",
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_words_of_a_run_are_a_command_for_the_same_run(tmp_path: Path, options: str, turned: bool) -> None:
    """The folder alone, as a run would leave it, with batch normalisation as the model has it or the other way round."""
    model, *rest = shlex.split(options)
    data = load_data(write_images(tmp_path / ODD), image_size=6 if "--image-size" in rest else None)
    flags = {True: ["--no-generator-batch-norm"], False: ["--generator-batch-norm"]}
    rest += flags[bool(ADVERSARIAL_DEFAULTS[model]["generator_batch_norm"])] if turned else []
    words = ["train", model, "--data", str(tmp_path / ODD), *rest, "--out", str(tmp_path / "run")]
    asked = cli.parse(train_options(words[1:]), words[2:], "periplus train").config()
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run" / "config.toml", plan(asked, data).config, describe_data(data, str(tmp_path / ODD)))
    found = list(words_of(load_run(tmp_path / "run")))
    again = cli.parse(train_options(found[1:]), found[2:], "periplus train")
    assert plan(again.config(), data) == plan(asked, data)
    assert (again.data, again.out, again.image_size) == (str(tmp_path / ODD), tmp_path / "run", data.shape[1] if again.image_size else None)
    assert load_data(again.data, image_size=again.image_size).shape == data.shape


def test_runs_of_different_data_are_refused(folder: Path) -> None:
    write_images(Path("other.npz"), 90)
    cli.run(shlex.split("train gan --data other.npz --epochs 1 --threads 1 --batch-size 16 --out other"))
    with pytest.raises(UsageError, match=r"other was trained on 'other\.npz', .*gan-0 on 'tiny\.npz'"):
        report_runs([folder / "runs" / "gan-0", Path("other")], Path("both"))
    assert not Path("both").exists()


def test_a_report_of_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        report_runs([tmp_path], tmp_path / "out")


def test_path_data_are_loaded_at_the_size_of_the_run() -> None:
    assert image_size_of(DataRecord("some.npz", "all", 10, 1, 12, 14, "0")) == (12, 14)


def test_named_data_are_loaded_at_the_size_of_the_run() -> None:
    assert image_size_of(DataRecord("digits", "train", 1500, 1, 12, 12, "0")) == (12, 12)
    assert image_size_of(DataRecord("digits", "train", 1500, 1, 8, 8, "0")) is None


# ---- comparing ------------------------------------------------------------------------------------------------------------------------------


def model_of(spreads: list[float], shares: list[float | None] | None = None, ratios: list[float | None] | None = None) -> dict[str, Any]:
    shares, ratios = shares or [None] * len(spreads), ratios or [None] * len(spreads)
    return {"runs": [{"spread": s, "share_distance": d, "neighbour_ratio": r} for s, d, r in zip(spreads, shares, ratios, strict=True)]}


def verdicts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, str]:
    return {row["key"]: row["verdict"] for row in compare_models(a, b)}


def test_clear_differences_are_told_and_both_ways_round() -> None:
    a = model_of([0.99, 1.01, 1.02], [0.02, 0.03, 0.025], [1.5, 1.52, 1.49])
    b = model_of([0.60, 0.61, 0.62], [0.30, 0.33, 0.31], [0.98, 1.01, 1.02])
    assert verdicts(a, b) == {"share_distance": "better", "spread": "better", "neighbour_ratio": "worse"}
    assert verdicts(b, a) == {"share_distance": "worse", "spread": "worse", "neighbour_ratio": "better"}


def test_nearer_one_counts_from_both_sides() -> None:
    far_above, near_below = model_of([1.5, 1.51, 1.52]), model_of([0.9, 0.91, 0.92])
    assert verdicts(far_above, near_below) == {"spread": "worse"} and verdicts(near_below, far_above) == {"spread": "better"}
    assert verdicts(model_of([1.1, 1.11, 1.12]), model_of([0.9, 0.89, 0.88])) == {"spread": "cannot tell"}


def test_overlapping_seeds_and_single_seeds_cannot_tell() -> None:
    assert metrics.welch_interval([1.0], [2.0, 3.0]) == (-math.inf, math.inf)
    assert verdicts(model_of([0.5, 0.9, 0.7]), model_of([0.6, 0.8, 0.75])) == {"spread": "cannot tell"}
    row = compare_models(model_of([1.0]), model_of([0.1]))[0]
    assert row["interval"] == [None, None] and row["verdict"] == "cannot tell" and row["a"] == [1.0] and row["b"] == [0.1]
    assert verdicts(model_of([1.0]), model_of([0.1, 0.1, 0.1])) == {"spread": "cannot tell"}


def test_measures_that_a_run_lacks_are_left_out() -> None:
    assert list(verdicts(model_of([1.0, 0.9], [0.1, None]), model_of([1.0, 0.9], [0.1, 0.2]))) == ["spread"]


def test_intervals_are_corrected_for_the_number_of_measures() -> None:
    random = np.random.default_rng(0)
    a, b = ([random.uniform(0, 1, 4).tolist() for _ in range(3)] for _ in range(2))
    rows = {row["key"]: row["interval"] for row in compare_models(model_of(*a), model_of(*b))}
    assert rows["share_distance"] == pytest.approx(welch(a[1], b[1], 1 - 0.05 / 3))
    assert compare_models(model_of(a[0]), model_of(b[0]))[0]["interval"] == pytest.approx(welch([1 - v for v in a[0]], [1 - v for v in b[0]], 0.95))


def welch(a: list[float], b: list[float], confidence: float) -> list[float]:
    """Welch's interval from its formula (Welch 1947, Satterthwaite 1946)."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(va + vb)
    return [float(np.mean(a) - np.mean(b) - half), float(np.mean(a) - np.mean(b) + half)]


def test_welch_interval_is_the_formula_and_scipys() -> None:
    random = np.random.default_rng(1)
    for _ in range(30):
        a, b = (random.normal(random.normal(), random.uniform(0.1, 5), random.integers(2, 9)).tolist() for _ in range(2))
        confidence = float(random.uniform(0.5, 0.999))
        found = metrics.welch_interval(a, b, confidence)
        assert found == pytest.approx(welch(a, b, confidence))
        assert found == pytest.approx(tuple(stats.ttest_ind(a, b, equal_var=False).confidence_interval(confidence)))
        assert metrics.welch_interval(b, a, confidence) == pytest.approx((-found[1], -found[0]))
    assert metrics.welch_interval([2.0, 2.0], [1.5, 1.5, 1.5]) == (-math.inf, math.inf)  # no spread, no interval: two equal seeds prove nothing
    assert metrics.welch_interval([2.0, 2.0, 2.0], [1.5, 1.6]) == pytest.approx(welch([2.0, 2.0, 2.0], [1.5, 1.6], 0.95))


@pytest.mark.filterwarnings("error")
def test_intervals_of_values_that_differ_by_rounding_do_not_warn() -> None:
    nearly = [0.1 + 0.2, 0.3, 0.3]
    assert len(set(nearly)) == 2
    assert metrics.mean_interval(nearly) == metrics.welch_interval(nearly, [0.5, 0.5]) == (-math.inf, math.inf)
    assert metrics.mean_interval([0.0, 0.0]) == (-math.inf, math.inf)
    varied = [0.4, 0.5, 0.7]
    assert metrics.welch_interval(nearly, varied) == pytest.approx(tuple(0.3 - end for end in reversed(metrics.mean_interval(varied))))
    assert metrics.mean_interval(varied) == pytest.approx(tuple(stats.ttest_1samp(varied, 0.0).confidence_interval(0.95)))


def test_welch_interval_covers_as_often_as_it_says() -> None:
    """Spreads 1 and 3, sizes 6 and 10: within four standard errors of 95 % (Welch's own error is a few tenths of a per cent here)."""
    random, trials = np.random.default_rng(2), 600
    covered = 0
    for _ in range(trials):
        low, high = metrics.welch_interval(random.normal(5, 1, 6).tolist(), random.normal(3, 3, 10).tolist())
        covered += low <= 2 <= high
    assert abs(covered / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


# ---- what a person sees ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (90061, "25 h 01 min"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, told: str) -> None:
    assert console.duration(seconds) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (0, "0"),
        (0.5, "0.5"),
        (1.23456, "1.23"),
        (-0.00123, "-0.00123"),
        (1.26e-4, "1.3 × 10⁻⁴"),
        (1234.5, "1,234"),
        (2.5e6, "2.5 × 10⁶"),
    ],
)
def test_numbers_for_print(value: float | None, told: str) -> None:
    assert number(value) == told


def test_chapters_are_announced_counted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = iter([0.0, *[0.0] * 2, 10.0, 40.0, 50.0, *[50.0] * 3])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.ChapterDisplay({"2c": "Inversion", "2d": "Paths"}, said.append) as display:
        display.begin("2d")
        display(1, 5)
        display(2, 5)  # 40 s for two of five
        display(3, 5)
        display.end()
    assert said == ["chapter 2d: Paths (2 of 2)", "chapter 2d: 2 of 5 parts, about 1 min 00 s left"]


def test_chapters_tell_how_far_they_are(folder: Path, lean: None) -> None:
    for path in folder.glob("runs/*/scores/*"):
        path.unlink()
    (folder / "stages" / "2b.json").unlink()
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console.ChapterDisplay, "__call__", lambda self, done, parts: seen.append((done, parts)))
        patch.setattr(penalty, "reference", lambda data, note: None)
        patch.setattr(penalty, "compare", lambda runs, judge, note: [note(f"scoring {k}") for k in range(3)] and None)
        make_study(dataclasses.replace(TINY, resume=True), COMMAND, note=said.append)
    assert [done for done, _ in seen] == [1, 2, 3] and all(done < parts for done, parts in seen)
    assert said[-1] == "writing report.pdf and report.html" and "chapter 2b: The gradient penalty, and a comparison (2 of 2)" in said
    assert not any("scoring" in line for line in said), "a line for every snapshot is no progress"


def test_progress_of_a_run_that_another_process_works_on(folder: Path, tmp_path: Path) -> None:
    assert cells_room.progress(tmp_path / "not yet") == (0, 1, "")
    run = folder / "runs" / "gan-0"
    step, steps, told = cells_room.progress(run)
    assert (step, steps) == (2, 2) and told.endswith("images/s, 0 s left")
    (run / "timing.jsonl").write_text('{"step": 1, "seconds": 1.0, "images_per_second": 2.0}\n{"step": 2, "sec')
    assert cells_room.progress(run) == (1, 2, "2 images/s, 32 s left")  # a step of 64 images at 2 a second; the torn line does not count
    (run / "timing.jsonl").write_text("")
    assert cells_room.progress(run) == (0, 1, "")


# ---- failing, stopping, being killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [(1, PeriplusError, 1), (2, UsageError, 2), (3, DataError, 3), (4, RunError, 4), (5, NonFiniteError, 5), (-9, PeriplusError, 1)],
)
def test_a_cell_fails_with_its_own_line_and_exit_code(tmp_path: Path, code: int, kind: type[PeriplusError], exit_code: int) -> None:
    cell = Cell("gan", 0, "runs/gan-0", ("train", "gan", "--data", "a b.npz"))
    cells_room.log_of(cell, tmp_path).parent.mkdir()
    cells_room.log_of(cell, tmp_path).write_text("gan: step 1\nperiplus: it went wrong\n\n")
    with pytest.raises(PeriplusError) as caught:
        cells_room.finish(cell, SimpleNamespace(returncode=code), tmp_path)  # type: ignore[arg-type]
    assert type(caught.value) is kind and caught.value.exit_code == exit_code
    assert str(caught.value) == "gan-0: it went wrong (made by: periplus train gan --data 'a b.npz')"
    cells_room.log_of(cell, tmp_path).write_text("")
    with pytest.raises(kind, match=f"gan-0: exit code {code} "):
        cells_room.finish(cell, SimpleNamespace(returncode=code), tmp_path)  # type: ignore[arg-type]
    for stopped in (130, -signal.SIGINT, -signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt, match="gan-0 was stopped; go on with --resume"):
            cells_room.finish(cell, SimpleNamespace(returncode=stopped), tmp_path)  # type: ignore[arg-type]
    cells_room.finish(cell, SimpleNamespace(returncode=0), tmp_path)  # type: ignore[arg-type]


def test_a_cell_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = write_images(tmp_path / "few.npz", 40), write_images(tmp_path / "many.npz", 80)
    out = tmp_path / "out"
    out.mkdir()
    failing = Settings(data=str(few), out=out, epochs=1, workers=2).resolve()
    endless = dataclasses.replace(failing, data=str(many), epochs=10**6)
    processes: list[subprocess.Popen[bytes]] = []

    def start(cell: Cell, out: Path, real: Any = cells_room.start) -> subprocess.Popen[bytes]:
        processes.append(real(cell, out))
        return processes[-1]

    monkeypatch.setattr(cells_room, "start", start)
    try:
        with pytest.raises(UsageError) as caught:
            cells_room.train_cells([endless.cell("wgan-gp", 0), failing.cell("gan", 1), endless.cell("gan", 2)], failing, quiet)
        message = str(caught.value)
        assert message.startswith("gan-1: --batch-size is 64, but only 36 images are left for training") and "\n" not in message
        assert message.endswith(f"(made by: {failing.cell('gan', 1).command})") and caught.value.exit_code == 2
        assert len(processes) == 2 and all(p.poll() is not None for p in processes), "the third was never begun, and nothing is left running"
    finally:
        for process in processes:
            process.kill()
            process.wait()


def children_of(out: Path) -> list[int]:
    """Living processes that train below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            alive = (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and b"periplus.study.child" in words and any(str(out).encode() in word for word in words):
                found.append(int(process.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition came true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a child ends with its killed parent only where the kernel sees to it")
def test_a_study_that_is_stopped_and_then_killed_comes_to_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lean: None
) -> None:
    out, whole = tmp_path / "hurt", tmp_path / "whole"
    data = str(write_images(tmp_path / "tiny.npz"))
    settings = Settings(data=data, out=out, epochs=50, seeds=1, only=("2a",))
    words = ["study", "--data", data, "--out", str(out), "--epochs", "50", "--seeds", "1", "--only", "2a", "--workers", "1", "--resume"]
    run = out / "runs" / "gan-0"

    def begin() -> subprocess.Popen[str]:
        """The study, in another process."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "periplus", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )

    with begin() as stopped:
        assert wait_for(lambda: (run / "timing.jsonl").exists() and (run / "timing.jsonl").read_text().count("\n"), 60)
        assert len(children_of(out)) == 1
        stopped.send_signal(signal.SIGTERM)
        complaint = stopped.communicate(timeout=30)[1]
    assert stopped.returncode == 130 and complaint.splitlines()[-1].startswith("periplus: stopped by SIGTERM")
    assert not children_of(out)
    at = load_run(run).step
    assert 25 <= at < 50, "SIGTERM left a checkpoint"

    with begin() as killed:
        assert wait_for(lambda: len(read_environment(run)) == 2, 60)  # the child has taken the run up again
        assert len(children_of(out)) == 1
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)
        assert wait_for(lambda: not children_of(out), 10), "a child went on training behind the study's back"
    assert at <= load_run(run).step < 50

    monkeypatch.setattr(study, "train_cells", train_here)
    for folder in (out, whole):
        make_study(dataclasses.replace(settings, out=folder, resume=True), "periplus study", note=quiet)
    chapters = [without_times(read(folder)["chapters"], folder) for folder in (out, whole)]
    assert chapters[0] == chapters[1] and chapters[0]["2a"]["runs"][0]["step"] == 50
    assert (run / "metrics.jsonl").read_bytes() == (whole / "runs" / "gan-0" / "metrics.jsonl").read_bytes()


def without_times(value: Any, folder: Path) -> Any:
    """Results without what is never the same twice, and with the folder's name taken out of commands."""
    if isinstance(value, dict):
        return {k: without_times(v, folder) for k, v in value.items() if k not in ("seconds", "images_per_second")}
    if isinstance(value, list):
        return [without_times(v, folder) for v in value]
    return value.replace(str(folder), "OUT") if isinstance(value, str) else value


@pytest.mark.parametrize("split", ["train", "all"])
def test_a_report_measures_on_the_data_of_the_run(split: str, tmp_path: Path) -> None:
    """...and on no other: held-out images are drawn from the data by seed, so other data would hold out others."""
    data = load_data("digits", split=split).subset(range(100))
    config = periplus.AdversarialConfig("gan", max_steps=1, batch_size=16)
    torch.set_num_threads(1)
    periplus.train(config, data, tmp_path / "run")
    with pytest.raises(UsageError, match="was trained on other data than 'digits' gives now"):
        report_runs([tmp_path / "run"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_two_chapters_use_one_label() -> None:
    """A whole study is one document: chapters that are tested apart must not call two things the same."""
    owners: dict[str, str] = {}
    for path in sorted((Path(periplus.__file__).parent / "study").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            named = [k.value for k in node.keywords if k.arg == "label"]
            if isinstance(node.func, ast.Name) and node.func.id == "Equation":
                named += node.args[1:2]
            for label in {n.value for n in named if isinstance(n, ast.Constant) and isinstance(n.value, str)}:
                assert owners.setdefault(label, path.name) == path.name, f"'{label}' is a label in {owners[label]} and in {path.name}"
    assert {"path-gradient", "gradient", "inversion"} <= owners.keys()
