"""Chapters 1a to 1e on a tiny study: they measure, draw and tell; what they conclude follows from results.json and from nothing else."""

from __future__ import annotations

import copy
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from periplus import cli, study
from periplus.errors import RunError, UsageError
from periplus.information import pairwise_log_density
from periplus.report import Answers, Finding, to_data
from periplus.study import Settings, curves, made_with, make_study
from periplus.study.archive import write_archive
from periplus.study.chapters import CHAPTERS, echo, echo_rate, extremes, marginal, sampling
from periplus.study.reporting import CONCLUSIONS, build_report, summary, write_report
from periplus.study.settings import PRESETS, SWEEPS, SweepCell

torch.set_num_threads(1)

KEYS = ("1a", "1b", "1c", "1d", "1e")
ROOMS: dict[str, Any] = {"1a": extremes, "1b": marginal, "1c": echo, "1d": echo_rate, "1e": sampling}
BETAS = ("0.01", "1", "10000")
SETTINGS = Settings(data="tiny.npz", out=Path("study"), only=KEYS, epochs=2, seeds=2)
COMMAND = "periplus study --only 1a,1b,1c,1d,1e"


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Small numbers of everything, and training in this process."""
    options = ("--batch-size", "32", "--latent-dim", "3", "--hidden", "8", "--schedule", "cosine", "--sample-every", "100")
    patch.setitem(PRESETS["digits"], "sweeps", {"epochs": 2, "beta": BETAS, "options": options})
    for room, changes in (
        (extremes, {"SAMPLES": 40}),
        (marginal, {"CODES": 1024, "MOST": 40, "COMPONENTS": (64, 128)}),
        (echo, {"PATHS": 4000, "LIMIT": 60}),
        (echo_rate, {"POINTS": 1200, "PAIRS": 300, "TERMS": 120}),
        (sampling, {"ROWS": {4: 4000, 16: 3200, 100: 2400}, "SERIES_ROWS": 1000, "TIMED": (32,), "GRADIENT_BATCHES": 10}),
    ):
        for name, value in changes.items():
            patch.setattr(room, name, value)

    def train_here(cells: list[Any], settings: Settings, say: Callable[[str], None]) -> None:
        for cell in cells:
            cli.run([*cell.words, "--resume"])

    patch.setattr(study, "train_cells", train_here)


def write_images(path: Path, channels: int = 1) -> None:
    """Bright bars on noise, 8 x 8."""
    random = np.random.default_rng(0)
    bars = np.arange(8) // 3 == (np.arange(90) % 3)[:, None]
    images = np.clip(random.normal(60, 20, (90, channels, 8, 8)) + 120 * bars[:, None, None, :], 0, 255).astype(np.uint8)
    np.savez(path, images=images)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.npz and the study of it. Not to be written to."""
    folder = tmp_path_factory.mktemp("one")
    write_images(folder / "tiny.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_small(patch)
        make_study(SETTINGS, COMMAND, note=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def measured(original: Path) -> dict[str, Any]:
    return dict(json.loads((original / "study" / "results.json").read_text(encoding="utf-8")))


@pytest.fixture
def results(measured: dict[str, Any]) -> dict[str, Any]:
    """The results, to be changed at will."""
    return copy.deepcopy(measured)


def finding(results: dict[str, Any], key: str) -> str:
    """A chapter's conclusion; the last of its blocks and the summary say the same."""
    said = str(ROOMS[key].conclusion(results["chapters"][key]))
    last = ROOMS[key].QUESTION.tell(results["chapters"][key], results)[-1]
    assert isinstance(last, Finding) and last.text == said
    assert (key, CONCLUSIONS[key](results["chapters"][key])) in answers(results)
    return said


def answers(results: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The answers in short on the first page."""
    return next(block.rows for block in summary(results) if isinstance(block, Answers))


# ---- what is there --------------------------------------------------------------------------------------------------------------------------


def test_chapters_stand_in_the_order_of_the_sheet() -> None:
    assert [question.key for question in CHAPTERS] == [*KEYS, "2a", "2b", "2c", "2d", "2e"] == list(CONCLUSIONS)
    assert {key for question in CHAPTERS for key in question.sweeps} == set(SWEEPS)
    with pytest.raises(UsageError, match="there is no chapter '1f'.*known are 1a, 1b, 1c, 1d, 1e, 2a, 2b, 2c, 2d, 2e"):
        study.chosen(("1a", "1f"))
    assert [question.key for question in study.chosen(("1d,1a",))] == ["1a", "1d"]


def test_the_study_holds_three_sweeps_and_its_figures(original: Path, measured: dict[str, Any]) -> None:
    folder = original / "study"
    assert {p.name for p in (folder / "sweeps").iterdir()} == {"vae", "marginal", "echo"}
    assert all(len(list((folder / "sweeps" / key / "cells").iterdir())) == 6 for key in SWEEPS)
    drawn = {figure["path"] for chapter in measured["chapters"].values() for figure in chapter["figures"].values()}
    assert drawn == {str(p.relative_to(folder)) for p in (folder / "figures").iterdir()} and len(drawn) == 11
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")


def test_commands_are_those_that_the_command_line_takes(measured: dict[str, Any]) -> None:
    for chapter in measured["chapters"].values():
        for figure in chapter["figures"].values():
            words = shlex.split(figure["command"])
            assert words[:2] == ["periplus", "study"] and words[words.index("--only") + 1] in KEYS
        for key, record in chapter.get("sweeps", {}).items():
            words = shlex.split(record["command"])
            assert words[:2] == ["periplus", "sweep"] and words[-1] == f"study/sweeps/{key}"
            assert words[words.index("--beta") + 1 : words.index("--beta") + 4] == list(BETAS)
            cli.run([*words[1:], "--dry-run", "--resume"])


def test_sweeps_of_every_preset_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for name, preset in PRESETS.items():
        settings = Settings(preset=name, data="digits", out=Path("o u t"), image_size=12).resolve()
        for key in SWEEPS:
            sweep = settings.sweep(key)
            assert isinstance(sweep, SweepCell) and sweep.name == f"sweep-{key}" and sweep.path == f"sweeps/{key}"
            cli.run([*sweep.words, "--dry-run", "--json"])
            cells = json.loads(capsys.readouterr().out)
            assert len(cells) == 3 * len(preset["sweeps"]["beta"])
    digits = PRESETS["digits"]["sweeps"]
    assert len(digits["beta"]) >= 7


def test_epochs_that_are_given_are_those_of_sweeps_too() -> None:
    own, given = Settings().resolve(), Settings(epochs=7).resolve()
    assert (own.epochs, own.sweep_epochs) == (60, 100) and (given.epochs, given.sweep_epochs) == (7, 7)
    assert "--epochs" not in own.again("1a") and "--epochs 7" in given.again("1a")
    assert "--epochs 60" in Settings(epochs=60).resolve().again("1a")


def test_records_are_what_the_cells_were_found_to_be(original: Path, measured: dict[str, Any]) -> None:
    for key in SWEEPS:
        record = measured["chapters"]["1d"]["sweeps"][key]
        assert (record["epochs"], record["seeds"], len(record["cells"])) == (2, 2, 6)
        for cell in record["cells"]:
            name = f"beta={cell['beta']:g},seed={cell['seed']}"
            found = json.loads((original / "study" / "sweeps" / key / "cells" / name / "evaluation.json").read_text())["splits"]
            for split in ("train", "test"):
                assert cell[split]["distortion"] == found[split]["distortion"]["value"]
                assert cell[split]["active_units"] == found[split]["active_units"]
    assert all(cell["test"]["infonce"] is not None for cell in measured["chapters"]["1d"]["sweeps"]["echo"]["cells"])


def test_a_broken_sweep_is_named(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    make_small(monkeypatch)
    monkeypatch.setattr(study, "train_cells", lambda *_: None)
    Path("study/sweeps/vae/sweep.json").write_text("{")
    with pytest.raises(RunError, match=r"sweep\.json cannot be read .*--resume"):
        make_study(Settings(data="tiny.npz", out=Path("study"), only=("1a",), epochs=2, seeds=2, resume=True), COMMAND, note=lambda line: None)


def test_an_unchanged_study_measures_nothing_again(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, Any]) -> None:
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    make_small(monkeypatch)
    monkeypatch.setattr(study, "train_cells", lambda *_: None)
    monkeypatch.setattr(curves, "sweep_record", lambda *_: pytest.fail("measured again"))
    again = Settings(data="tiny.npz", out=Path("study"), only=("1a", "1c"), epochs=2, seeds=2, resume=True)
    make_study(again, COMMAND, note=lambda line: None)
    found = json.loads(Path("study/results.json").read_text())
    assert found.pop("command").endswith("--only 1a,1b,1c,1d,1e --resume"), "the title names the command that makes all of the report"
    assert found == {name: value for name, value in measured.items() if name != "command"}
    assert made_with(measured["chapters"]["1b"]) == {("sweep", 2, 2)} and made_with(measured["chapters"]["1e"]) == set()


def test_the_archive_holds_what_the_sweeps_found(original: Path, tmp_path: Path) -> None:
    import zipfile

    shutil.copytree(original / "study", tmp_path / "study")
    with zipfile.ZipFile(write_archive(tmp_path / "study", "zip")) as archive:
        names = set(archive.namelist())
    for key in SWEEPS:
        assert {f"study/sweeps/{key}/{name}" for name in ("settings.json", "sweep.json", "sweep.csv", "curve.svg")} <= names
        assert f"study/sweeps/{key}/cells/beta=1,seed=0/evaluation.json" in names
    assert not [name for name in names if "checkpoints" in name or name.endswith(".safetensors")]


# ---- what is measured is true ---------------------------------------------------------------------------------------------------------------


def test_the_examples_law_has_its_moments(measured: dict[str, Any]) -> None:
    told = measured["chapters"]["1c"]["example"]
    assert told["second_moment"] == pytest.approx(0.46296, abs=1e-4) and told["mean"] == pytest.approx(0, abs=1e-9)
    assert told["mean_log_scale"] == pytest.approx(-0.76104, abs=1e-5)
    by_recursions = {row["recursions"]: row for row in told["laws"]}
    assert abs(echo.errors_off(by_recursions[60], told)) < 4
    assert by_recursions[0]["second_moment"] == pytest.approx(1 / 3, abs=0.02)
    assert all(row["largest"] <= row["bound"] * (1 + 1e-9) for row in told["truncation"])


def test_known_cases_are_known(measured: dict[str, Any]) -> None:
    found = {told["name"]: told for told in measured["chapters"]["1d"]["cases"]}
    uniform, half, third, fifth, equal = found.values()
    assert uniform["formula"] == pytest.approx(0.76104, abs=1e-5) and not uniform["statements"]
    ksg, infonce = uniform["estimates"]
    assert abs(ksg["value"] - 0.76104) < 5 * ksg["standard_error"] + 0.02
    assert infonce["value"] < 0.76104 + 4 * infonce["standard_error"]
    assert half["formula"] == half["truth"] == pytest.approx(math.log(2)) and not half["statements"]
    assert (third["formula"], third["truth"]) == pytest.approx((math.log(3), math.log(2))) and third["statements"]
    assert fifth["formula"] == pytest.approx(1.609, abs=1e-3) and fifth["statements"]
    assert (equal["formula"], equal["truth"]) == pytest.approx((0.211, 0.105), abs=1e-3) and "affine function" in equal["statements"][0]
    for told in (third, fifth):  # from 1,200 codes without an error
        assert 0.6 < told["estimates"][0]["value"] <= math.log(2)


def test_batch_estimates_lie_on_their_sides(measured: dict[str, Any]) -> None:
    chapter = measured["chapters"]["1b"]
    exact, count = chapter["exact"], chapter["encoder"]["examples"]
    for row in chapter["estimates"]:
        error = 4 * math.hypot(row["standard_error"], exact["standard_error"])
        if row["estimator"] == "mixture":
            assert row["value"] <= min(math.log(row["batch"]) + 1e-6, exact["value"] + error)
        else:
            assert row["value"] >= exact["value"] - error
        if row["estimator"] == "stratified":
            assert row["value"] <= math.log(count) + 1e-6


def test_the_direct_density_is_the_mixtures() -> None:
    random = torch.Generator().manual_seed(0)
    m, s = torch.randn(40, 3, generator=random), -torch.rand(40, 3, generator=random)
    z = torch.randn(7, 3, generator=random)
    whole = pairwise_log_density(z, m, s).logsumexp(1) + 1.5 * math.log(2 * math.pi)
    assert torch.allclose(marginal.direct_density(z, m, s), whole, atol=1e-4)


def test_samplers_are_as_the_notes_say(measured: dict[str, Any]) -> None:
    """Truth 0.463; one lap of four rows gives 0.577, replacement at B = 16 gives 0.539; a cut gradient is 28 % low."""
    rows = {(row["sampler"], row["batch"]): row for row in measured["chapters"]["1e"]["accuracy"]}
    for sampler, batch, expected in (
        ("closed", 4, 0.577),
        ("replaced", 16, 0.539),
        ("ring", 100, 0.463),
        ("chain", 4, 0.463),
        ("series", 100, 0.463),
    ):
        row = rows[sampler, batch]
        assert abs(row["found"] - expected) < 4 * row["standard_error"] + 0.005, (sampler, batch)
    gradient = measured["chapters"]["1e"]["gradient"]
    assert abs(gradient["cut"]["value"] - 2 / 3) < 5 * gradient["cut"]["standard_error"]
    assert abs(gradient["through"]["value"] - 0.926) < 5 * gradient["through"]["standard_error"]
    laps = {(row["batch"], row["scale"]): row["laps"] for row in measured["chapters"]["1e"]["guard"]}
    assert laps[1024, 0.5] == 1 and laps[100, 0.99] == 16


# ---- conclusions follow the numbers ---------------------------------------------------------------------------------------------------------


def cells_of(results: dict[str, Any], key: str, sweep: str, beta: float) -> list[dict[str, Any]]:
    return [cell for cell in results["chapters"][key]["sweeps"][sweep]["cells"] if cell["beta"] == beta]


def test_1a_the_upper_extreme_is_what_the_numbers_say(results: dict[str, Any]) -> None:
    for cell in cells_of(results, "1a", "vae", 1e4):
        cell["test"] |= {"distortion": 10.05, "constant_distortion": 10.0, "prior_rate": 0.009, "active_units": 0}
    assert "this sweep has reached the upper extreme" in finding(results, "1a")
    cells_of(results, "1a", "vae", 1e4)[1]["test"]["distortion"] = 10.2
    assert "2.0 % off that of the best constant image, *more* than 1 %" in finding(results, "1a")
    assert "has *not* reached the upper extreme" in finding(results, "1a")
    cells_of(results, "1a", "vae", 1e4)[1]["test"] |= {"distortion": 10.0, "prior_rate": 0.02}
    assert "*not* below 0.01" in finding(results, "1a") and "has *not* reached the upper extreme" in finding(results, "1a")


def test_1a_compares_with_the_floors_of_all_seeds(results: dict[str, Any]) -> None:
    record = results["chapters"]["1a"]["sweeps"]["vae"]
    for cell in record["cells"]:
        cell["test"] |= {"entropy_floor": (20.0, 30.0)[cell["seed"]], "constant_distortion": (50.0, 70.0)[cell["seed"]], "distortion": 40.0}
    caption = extremes.sweep_table(record, "").caption
    assert "60.00 (test)" in caption and "possible on test images is 25.00. Every seed holds out other images" in caption
    assert "nats, is 15 above the least possible" in finding(results, "1a")
    for cell in record["cells"]:
        cell["test"] |= {"entropy_floor": 20.0}
    assert "holds out other images" not in extremes.sweep_table(record, "").caption


@pytest.mark.parametrize(
    ("mismatch", "told"), [((30.0, 31.0), "codes *leave* the prior"), ((0.5, 0.1), "do *not* show that the codes leave the prior")]
)
def test_1a_leaving_the_prior_is_what_the_divergence_says(results: dict[str, Any], mismatch: tuple[float, float], told: str) -> None:
    for beta, values in ((0.01, mismatch), (1.0, (0.2, 0.21))):
        for cell, value in zip(cells_of(results, "1a", "vae", beta), values, strict=True):
            cell["test"]["kl_to_prior"] = value
    assert told in finding(results, "1a")
    assert ("codes *leave* the prior" in CONCLUSIONS["1a"](results["chapters"]["1a"])) == ("*leave*" in told)


@pytest.mark.parametrize(
    ("ratios", "told"), [((3.0, 3.1), "*further* from"), ((0.3, 0.31), "*nearer* to"), ((0.5, 2.0), "*not told apart*"), ((None, None), None)]
)
def test_1a_samples_are_where_their_distances_say(results: dict[str, Any], ratios: tuple[Any, Any], told: str | None) -> None:
    for beta, values in ((0.01, ratios), (1.0, (1.0, 1.01))):
        for cell, value in zip(cells_of(results, "1a", "vae", beta), values, strict=True):
            cell["sample_ratio"] = value
    assert f"Prior samples at β = 0.01 are {told}" in finding(results, "1a") if told else "Prior samples" not in finding(results, "1a")


def test_1b_bias_cost_and_order_are_what_the_numbers_say(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["1b"]
    chapter["exact"] |= {"value": 2.0, "standard_error": 0.001}
    for row in chapter["estimates"]:
        row |= {"value": {"mixture": 1.0, "leave-one-out": 3.0, "stratified": 2.0}[row["estimator"]], "standard_error": 0.01}
    said = finding(results, "1b")
    assert "mixture is below it (1), leave-one-out is above it (3), stratified is not told apart from it (2)" in said
    assert "missed by mixture by -1 (*more* than three standard errors), leave-one-out by +1 (*more*" in said and "stratified by +0." in said
    for row in chapter["estimates"]:
        row["value"] = 4.0 - row["value"]
    assert "mixture is above it" in finding(results, "1b")
    chapter["cost"] = [
        {"components": n, "d": 3, "direct_rows": 1, "ours": {"seconds": n**2 / 1e6}, "direct": {"seconds": n**2 / 1e5}} for n in (10, 100)
    ]
    assert "N to the power 2.0" in finding(results, "1b") and "10.0 times less than by all differences" in finding(results, "1b")
    chapter["cost"][1]["direct"]["seconds"] = chapter["cost"][1]["ours"]["seconds"] / 2
    assert "2.0 times as long as by all differences" in finding(results, "1b")
    for shift, told in ((-50.0, "the VAE against q(z) costs less than the β-VAE at every β"), (50.0, "")):
        for cell in chapter["sweeps"]["marginal"]["cells"]:
            cell["test"]["distortion"] += shift + 0.001 * cell["seed"]
        for record in chapter["sweeps"].values():
            for cell in record["cells"]:
                cell["test"]["rate"] = 0.0 if shift < 0 else cell["test"]["rate"]
        if shift < 0:
            assert told in finding(results, "1b")
    for cell in chapter["sweeps"]["marginal"]["cells"]:
        cell["test"]["distortion"] += 50.0
    assert "the β-VAE costs less than the VAE against q(z) at every β" in finding(results, "1b")


def test_1c_convergence_is_what_the_numbers_say(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["1c"]
    told = chapter["example"]
    for row in told["laws"]:
        row |= {"second_moment": told["second_moment"] + (0.1 if row["recursions"] < 2 else 0.0), "second_moment_se": 0.01}
    assert "within three standard errors from 2 recursions on" in finding(results, "1c") and "No code exceeds the error bound" in finding(
        results, "1c"
    )
    told["laws"][-1]["second_moment"] += 1.0
    assert "is *not* that of the closed form" in finding(results, "1c") and "*not* the" in CONCLUSIONS["1c"](chapter)
    told["truncation"][2]["largest"] = 2 * told["truncation"][2]["bound"]
    told["mean_log_scale"] = 0.1
    said = finding(results, "1c")
    assert "The error bound is *broken* at K = 3" in said and "does *not* converge" in said
    assert "does *not* converge" in CONCLUSIONS["1c"](chapter) and "*broken*" in CONCLUSIONS["1c"](chapter)
    chapter["code"]["shares"][0] = 0.9
    assert "mostly its own image: 90 %" in finding(results, "1c")
    chapter["code"] |= {"shares": [0.2, 0.8], "terms_needed": None}
    assert "mostly other images: 20 %" in finding(results, "1c") and "does *not* converge there" in finding(results, "1c")


def test_1d_the_formula_is_judged_by_the_numbers(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["1d"]
    assert "right in 2 of 5 cases" in finding(results, "1d") and "objects to 3 of these 3; it is never too low" in finding(results, "1d")
    chapter["cases"][0]["formula"] -= 0.5
    said = finding(results, "1d")
    assert "right in 1 of 5" in said and "objects to 3 of these 4; in 1 it is *too low*" in said
    for told in chapter["cases"]:
        told["formula"] = told["truth"]
    assert "right in 5 of 5 cases of known truth; it is never too low" in finding(results, "1d")
    for cell in cells_of(results, "1d", "echo", 1e4):
        cell["test"] |= {"rate": 7.0, "ln_n": 9.0, "infonce": 3.5}
    assert "50 % at β = 10⁴" in finding(results, "1d") and "*above* the least that the clip allows" in finding(results, "1d")
    for cell in cells_of(results, "1d", "echo", 1e4):
        cell["test"] |= {"ln_n": 2.0}
    assert "10⁴: there it is not what the code tells" in finding(results, "1d")


@pytest.mark.parametrize("verdict", ["lower", "higher", "cannot tell"])
def test_1d_which_dominates_is_what_the_verdicts_say(results: dict[str, Any], verdict: str) -> None:
    chapter = results["chapters"]["1d"]
    for rows in chapter["comparisons"].values():
        for row in rows:
            row["verdict"] = verdict
    said = finding(results, "1d")
    wanted = {
        "lower": "Echo costs less than the β-VAE at every β",
        "higher": "The β-VAE costs less than echo at every β",
        "cannot tell": "no model costs less",
    }
    count = sum(map(len, chapter["comparisons"].values()))
    assert wanted[verdict] in said and f"{count if verdict == 'cannot tell' else 0} of {count} comparisons *cannot be told*" in said
    assert ("no model costs less than another" in CONCLUSIONS["1d"](chapter)) == (verdict == "cannot tell")
    table = next(b for b in echo_rate.tell(chapter, results) if getattr(b, "label", "") == "three-table")
    assert [cell.startswith("*") for row in table.rows for cell in row[-3:]] == [verdict != "cannot tell"] * count
    chapter["comparisons"]["echo against vae"][0]["verdict"] = "cannot tell"
    assert f"Echo costs less than the β-VAE at β = {', '.join(BETAS[1:]).replace('10000', '10⁴')}" in finding(results, "1d") or verdict != "lower"


def test_comparing_sweeps_is_welchs_interval_of_the_loss() -> None:
    def sweep(costs: tuple[float, float, float]) -> dict[str, Any]:
        cells = [{"beta": 2.0, "seed": k, "test": {"distortion": c - 4.0, "rate": 2.0}} for k, c in enumerate(costs)]
        return {"cells": cells}

    row = curves.compare_sweeps(sweep((10.0, 10.1, 10.2)), sweep((12.0, 12.1, 11.9)), 1)[0]
    assert (row["a"], row["b"], row["verdict"]) == (pytest.approx(10.1), pytest.approx(12.0), "lower") and row["low"] < -1.9 < row["high"]
    assert curves.compare_sweeps(sweep((10.0, 10.1, 10.2)), sweep((10.1, 10.15, 9.9)), 1)[0]["verdict"] == "cannot tell"
    alone = {"cells": sweep((1.0, 0.0, 0.0))["cells"][:1]}
    row = curves.compare_sweeps(alone, sweep((12.0, 12.1, 11.9)), 1)[0]
    assert (row["low"], row["high"], row["verdict"]) == (None, None, "cannot tell")


def test_1e_bias_gradient_and_cost_are_what_the_numbers_say(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["1e"]
    for row in chapter["accuracy"]:
        row |= {"found": chapter["truth"]["second_moment"] * (1.5 if row["batch"] == 16 else 1.0), "errors_off": 9.0 if row["batch"] == 16 else 0.1}
    assert finding(results, "1e").count("*biased*, +50 % at B = 16") == 5
    for row in chapter["accuracy"]:
        row["errors_off"] = 1.0
    assert finding(results, "1e").count("no bias told at any B") == 5
    chapter["truth"]["gradient"] = 1.0
    chapter["gradient"] |= {"through": {"value": 1.0, "standard_error": 0.01}, "cut": {"value": 0.6, "standard_error": 0.01}}
    assert "agrees with the truth; without the part of the noise it is off by -40 %" in finding(results, "1e")
    chapter["gradient"] |= {"through": {"value": 2.0, "standard_error": 0.01}, "cut": {"value": 1.0, "standard_error": 0.01}}
    assert "is *off* by +100.0 %; without the part of the noise it is not told apart" in finding(results, "1e")
    for row in chapter["cost"]:
        row |= {"seconds": 4.0 if row["sampler"] == "series" else 0.1, "megabytes": 1.0 if row["sampler"] == "series" else 2.0}
    assert "40 times faster than the series" in finding(results, "1e") and "2 times more than the series" in finding(results, "1e")


# ---- the report -----------------------------------------------------------------------------------------------------------------------------


def test_the_report_is_a_function_of_results(original: Path, tmp_path: Path, results: dict[str, Any]) -> None:
    shutil.copytree(original / "study" / "figures", tmp_path / "figures")
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (original / "study" / "report.html").read_bytes()
    report = build_report(results)
    assert [chapter.key for chapter in report.chapters] == list(KEYS)
    json.dumps(to_data(report))


def test_one_seed_and_colour_images_go_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)
    write_images(tmp_path / "c $x$ *#.npz", channels=3)
    settings = Settings(data="c $x$ *#.npz", out=Path("o u t"), only=("1a",), epochs=1, seeds=1, archive="tar.gz")
    make_study(settings, COMMAND, note=lambda line: None)
    assert "this sweep has" in json.dumps(extremes.conclusion(json.loads(Path("o u t/results.json").read_text(encoding="utf-8"))["chapters"]["1a"]))
    assert Path("o u t/o u t.tar.gz").is_file() and Path("o u t/report.pdf").read_bytes().startswith(b"%PDF")
