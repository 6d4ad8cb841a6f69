"""Runs against runs: seeds are repeats, verdicts follow from a stated test, and nothing is dropped."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from periplus import AdversarialConfig, ImageData, Run, UsageError, cli, comparing, load_data, load_run, train
from periplus.comparing import compare, curve, equal_resources, group_runs, kept_scores, read_off, verdict, verdicts
from periplus.scoring import Reference, reference
from periplus.study.comparison import comparison_conclusion, score_table, verdict_table

TINY = {"batch_size": 32, "latent_dim": 4, "max_steps": 9, "log_every": 1, "device": "cpu", "held_out": 100, "checkpoint_every": 9}


@pytest.fixture(scope="module")
def judge(digits: ImageData, own_cache: Path) -> Reference:
    return reference(digits, 200)


@pytest.fixture(scope="module")
def folder(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, two seeds each. Scores are kept beside the runs; nothing else is written."""
    folder = tmp_path_factory.mktemp("runs")
    for model in ("gan", "wgan-gp"):
        for seed in (0, 1):
            train(AdversarialConfig(model, seed=seed, **TINY), digits, folder / f"{model}-{seed}")  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    return [load_run(folder / name) for name in ("gan-0", "gan-1", "wgan-gp-0", "wgan-gp-1")]


@pytest.fixture(scope="module")
def compared(runs: list[Run], judge: Reference) -> dict[str, Any]:
    return compare(runs, judge)


@pytest.fixture
def result(compared: dict[str, Any]) -> dict[str, Any]:
    """To be changed at will."""
    return copy.deepcopy(compared)


# ---- groups ---------------------------------------------------------------------------------------------------------------------------------


def test_seeds_are_repeats_of_one_group(runs: list[Run]):
    groups = group_runs(runs)
    assert list(groups) == ["gan", "wgan-gp"] and [len(members) for members in groups.values()] == [2, 2]


def test_labels_name_what_tells_groups_of_one_model_apart(digits: ImageData, runs: list[Run], tmp_path: Path):
    other = train(AdversarialConfig("gan", **TINY | {"latent_dim": 6}), digits, tmp_path / "other")  # type: ignore[arg-type]
    conv = train(AdversarialConfig("gan", architecture="conv", **TINY), digits, tmp_path / "conv")  # type: ignore[arg-type]
    labels = list(group_runs([*runs, other, conv]))
    assert labels == ["gan mlp, latent dim 4", "wgan-gp", "gan mlp, latent dim 6", "gan conv, latent dim 4"]


def test_what_changes_no_weight_makes_no_group(digits: ImageData, runs: list[Run], tmp_path: Path):
    other = train(AdversarialConfig("gan", seed=2, **TINY | {"log_every": 3, "checkpoint_every": 4}), digits, tmp_path / "other")  # type: ignore[arg-type]
    assert len(group_runs([*runs, other])) == 2


def test_differences_of_settings_are_listed(compared: dict[str, Any]):
    found = compared["differences"]
    assert found["model"] == {"gan": "gan", "wgan-gp": "wgan-gp"} and found["penalty_weight"] == {"gan": None, "wgan-gp": 10.0}
    assert "batch_size" not in found and "seed" not in found and "generator_loss" in found


def test_runs_that_cannot_be_compared_are_refused_by_name(digits: ImageData, runs: list[Run], judge: Reference, tmp_path: Path):
    other = train(AdversarialConfig("gan", **TINY), digits.subset(range(900)), tmp_path / "fewer")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"fewer was trained on other images than .*gan-0"):
        compare([*runs, other], judge)
    with pytest.raises(UsageError, match=r"gan-1 is given twice"):
        compare([*runs, load_run(runs[1].path)], judge)
    with pytest.raises(UsageError, match="at least one RUN"):
        compare([], judge)


# ---- verdicts -------------------------------------------------------------------------------------------------------------------------------


def grouped(**values: list[float]) -> list[dict[str, Any]]:
    """Groups whose runs have one score."""
    return [{"label": k, "runs": [{"scores": {"frechet": {"value": v}}, "collapsed": False} for v in of]} for k, of in values.items()]


def test_the_interval_is_welchs():
    a, b = [1.0, 1.2, 1.1], [2.0, 2.4, 2.1]
    for comparisons in (1, 5):
        exact = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 0.05 / comparisons)
        assert verdict(a, b, "lower", comparisons)["interval"] == pytest.approx([exact.low, exact.high])


def test_better_is_where_the_measure_says():
    low, high = [1.0, 1.01, 1.02], [3.0, 3.01, 3.02]
    assert verdict(low, high, "lower", 1)["verdict"] == verdict(high, low, "higher", 1)["verdict"] == "better"
    assert verdict(high, low, "lower", 1)["verdict"] == verdict(low, high, "higher", 1)["verdict"] == "worse"
    assert verdict([1.0, 3.0, 2.0], [2.1, 1.5, 2.5], "lower", 1)["verdict"] == "cannot tell"


def test_one_run_can_tell_nothing():
    told = verdict([1.0], [100.0, 101.0], "lower", 1)
    assert told["verdict"] == "cannot tell" and told["interval"] == [None, None]


def test_comparisons_are_corrected_for_their_number_and_single_runs_are_none():
    three = grouped(a=[1.0, 1.1], b=[2.0, 2.1], c=[3.0, 3.3], single=[9.0])
    assert comparing.test_of(three)["comparisons"] == 3 and comparing.test_of(three)["level_each"] == pytest.approx(1 - 0.05 / 3)
    rows = {(row["a"], row["b"]): row for row in verdicts(three)}
    assert len(rows) == 6 and rows["a", "single"]["verdict"] == "cannot tell"
    assert rows["a", "b"]["interval"] == pytest.approx(verdict([1.0, 1.1], [2.0, 2.1], "lower", 3)["interval"])


def test_false_verdicts_are_as_rare_as_stated():
    """Three seeds a group, one law: in 400 repeats of three pairs at most 5 % of families have a verdict, and three standard errors."""
    import numpy as np

    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        groups = grouped(**{name: random.normal(0, 1, 3).tolist() for name in "abc"})
        wrong += any(row["verdict"] != "cannot tell" for row in verdicts(groups))
    assert wrong <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


# ---- along the way --------------------------------------------------------------------------------------------------------------------------


def test_a_curve_has_a_point_for_every_kept_step(runs: list[Run], judge: Reference, compared: dict[str, Any]):
    points = compared["groups"][0]["runs"][0]["curve"]
    assert [p["step"] for p in points] == runs[0].kept == [4, 8, 9]
    lines = {line["step"]: line for line in runs[0].timing}
    assert [p["seconds"] for p in points] == [lines[step]["seconds"] for step in (4, 8, 9)]
    assert [p["epoch"] for p in points] == pytest.approx([step * 32 / 1400 for step in (4, 8, 9)], abs=1e-3)
    assert points[-1]["value"] == pytest.approx(compared["groups"][0]["runs"][0]["scores"]["frechet"]["value"], rel=1e-9)
    paced = curve(runs[0], judge, pace=0.5)
    assert [p["seconds"] for p in paced] == [2.0, 4.0, 4.5]


def test_reading_off_is_exact_for_powers_and_knows_its_limits():
    points = [{"epoch": x, "value": 7 * x**-1.5} for x in (1.0, 2.0, 8.0)]
    for where in (1.0, 1.3, 2.0, 5.0, 8.0):
        assert read_off(points, "epoch", where) == pytest.approx(7 * where**-1.5)
    assert read_off(points, "epoch", 0.9) is None and read_off(points, "epoch", 9.0) is None


def test_equal_resources_are_the_last_that_all_reached():
    def made(end: float, factor: float) -> dict[str, Any]:
        return {"curve": [{"epoch": x, "seconds": 10 * x * factor, "value": factor / x} for x in (1.0, 2.0, end)], "scores": {}}

    groups = [{"label": "fast", "runs": [made(4.0, 1.0), made(4.0, 1.01)]}, {"label": "slow", "runs": [made(3.0, 2.0), made(3.0, 2.02)]}]
    epochs, seconds = equal_resources(groups)
    assert (epochs["axis"], epochs["at"], seconds["axis"], seconds["at"]) == ("epoch", 3.0, "seconds", 40.0)
    assert epochs["groups"][0]["values"] == pytest.approx([1 / 3, 1.01 / 3]) and epochs["groups"][1]["values"] == pytest.approx([2 / 3, 2.02 / 3])
    assert seconds["groups"][0]["values"][0] == pytest.approx(1 / 4) and seconds["groups"][1]["values"][0] == pytest.approx(1.0)
    assert epochs["verdicts"][0]["verdict"] == "better"


# ---- what is kept ---------------------------------------------------------------------------------------------------------------------------


def test_scores_are_made_once_and_again_when_anything_changed(
    digits: ImageData, folder: Path, judge: Reference, compared: dict[str, Any], tmp_path: Path
):
    shutil.copytree(folder / "gan-0", tmp_path / "run")
    said: list[str] = []
    run = load_run(tmp_path / "run")
    kept_scores(run, judge, whole=True, note=said.append)
    assert not said, "they came with the folder"
    other = reference(digits, 150)
    kept_scores(run, other, whole=True, note=said.append)
    assert len(said) == 1
    kept_scores(run, judge, whole=True, note=said.append)
    assert len(said) == 2
    (tmp_path / "run/scores/step-9.json").write_text("{torn")
    assert kept_scores(run, judge, whole=True, note=said.append)["scores"] == compared["groups"][0]["runs"][0]["scores"] and len(said) == 3
    for name in ("snapshots", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / name)
        shutil.copytree(folder / "gan-1" / name, tmp_path / "run" / name)
    kept_scores(load_run(tmp_path / "run"), judge, whole=True, note=said.append)
    assert len(said) == 4, "other weights"


# ---- in words -------------------------------------------------------------------------------------------------------------------------------


def test_collapsed_runs_are_counted_and_stay_in_the_means(result: dict[str, Any]):
    for group in result["groups"]:
        for run in group["runs"]:
            run["collapsed"] = False
    result["groups"][0]["runs"][0]["collapsed"] = True
    assert "1 of 4 runs collapsed (1 of gan); they are in all means." in comparison_conclusion(result)
    rows = {row[0]: row for row in score_table(result, "x", "x").rows}
    assert rows["of these collapsed"][1:3] == ("1", "0") and rows["runs"][1:3] == ("2", "2")
    values = [run["scores"]["frechet"]["value"] for run in result["groups"][0]["runs"]]
    assert rows["Fréchet distance"][1].startswith(f"{sum(values) / 2:.2f}")


def test_the_conclusion_is_what_the_verdicts_say(result: dict[str, Any]):
    for told in ("better", "worse", "cannot tell"):
        for row in result["verdicts"]:
            row["verdict"] = told
        text = comparison_conclusion(result)
        assert (f"gan is *{told}* in" in text) == (told != "cannot tell") and ("*cannot tell* apart: gan and wgan-gp" in text) == (
            told == "cannot tell"
        )
        assert {row[-1].strip("*") for row in verdict_table(result, "x", "x").rows} == {told}


# ---- the command ----------------------------------------------------------------------------------------------------------------------------


def test_compare_writes_json_a_page_and_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["compare", *(str(folder / name) for name in ("gan-0", "gan-1", "wgan-gp-0", "wgan-gp-1")), "--n", "200", "--out", str(tmp_path / "out")]
    cli.run(words)
    told = json.loads((tmp_path / "out/compare.json").read_text(), parse_constant=pytest.fail)
    assert told["command"].startswith("periplus compare ") and len(told["groups"]) == 2 and told["test"]["comparisons"] == 5
    page = (tmp_path / "out/compare.html").read_text()
    assert "None of 4 runs collapsed" in page or "runs collapsed" in page
    assert 'src="http' not in page and told["reference"]["extractor"]["sha256"][:12] in page
    assert {p.name for p in (tmp_path / "out/figures").iterdir()} == {"compare-side-by-side.png", "compare-quality.svg"}
    assert "Fréchet distance" in capsys.readouterr().out
    cli.run([*words, "--json", "--no-curves"])
    assert json.loads(capsys.readouterr().out)["equal"] == []


def test_compare_refuses_what_it_cannot_do(digits: ImageData, folder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="at least one RUN"):
        cli.run(["compare"])
    other = train(AdversarialConfig("gan", **TINY), load_data("digits", "test"), tmp_path / "test-split", source="digits")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="compare them apart"):
        cli.run(["compare", str(folder / "gan-0"), str(other.path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
