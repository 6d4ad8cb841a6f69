"""Runs against runs: what a group is, what a verdict rests on, curves, equal resources, and `periplus compare` from end to end."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import periplus
from periplus import cli, comparing, study
from periplus.comparing import COMPARED, compare, curve, differences, equal_resources, group_runs, kept_scores, read_off, verdict, verdicts
from periplus.config import AdversarialConfig, AutoencoderConfig, Config, DataRecord, write_config
from periplus.data import ImageData
from periplus.errors import PeriplusError, UsageError
from periplus.evaluation import collapse
from periplus.networks import MLPCritic, MLPGenerator
from periplus.report import Finding, plain
from periplus.runs import Run, load_run
from periplus.scoring import Reference, reference, score
from periplus.study import Settings, make_study
from periplus.study.chapters import penalty
from periplus.study.comparison import comparison_blocks, comparison_conclusion, equal_sentence, protocol_sentence, score_table
from periplus.study.settings import PRESETS

torch.set_num_threads(1)

SMALL = AdversarialConfig(batch_size=32, latent_dim=4, max_steps=20, log_every=2, checkpoint_every=50, sample_every=100, held_out=60, device="cpu")
KEPT = [8, 16, 20]
N = 150


@pytest.fixture(scope="module", autouse=True)
def small_networks() -> Iterator[None]:
    """Half of the time here would go into hashing large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("periplus.networks.MLPGenerator", functools.partial(MLPGenerator, widths=(16, 24)))
        patch.setattr("periplus.networks.MLPCritic", functools.partial(MLPCritic, widths=(24,)))
        yield


@pytest.fixture(scope="module")
def judge(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(digits, N, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def originals(small_networks: None, digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gan-0, gan-1, wgan-gp-0, wgan-gp-1: short runs on the digits. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    for model, seed in itertools.product(("gan", "wgan-gp"), (0, 1)):
        periplus.train(dataclasses.replace(SMALL, model=model, seed=seed), digits, folder / f"{model}-{seed}")
    return folder


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """A copy of the runs."""
    return shutil.copytree(originals, tmp_path / "runs")


def four(folder: Path) -> list[Run]:
    return [load_run(folder / name) for name in ("gan-0", "gan-1", "wgan-gp-0", "wgan-gp-1")]


def strict(text: str) -> Any:
    """JSON, which knows neither infinity nor what is not a number."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def run_of(config: Config, path: Path, source: str = "digits", sha256: str = "0" * 64) -> Run:
    """A run of which nothing but its configuration is looked at."""
    write_config(path / "config.toml", config.resolve(1500), DataRecord(source, "train", 1500, 1, 8, 8, sha256))
    return load_run(path)


def group(label: str, **measures: Sequence[float]) -> dict[str, Any]:
    """A group as `compare` makes it, from the values of its runs."""
    floors = {"frechet": 0.5}
    rows = [
        {
            key: {"value": value, **({"floor": floors[key], "floors": [floors[key]]} if key in floors else {})}
            for key, value in zip(measures, of, strict=True)
        }
        for of in zip(*measures.values(), strict=True)
    ]
    return {"label": label, "settings": {}, "runs": [{"scores": row, "collapsed": False} for row in rows]}


# ---- verdicts -------------------------------------------------------------------------------------------------------------------------------

A, B = (1.0, 1.2, 0.9, 1.1), (2.0, 2.3, 2.9)


@pytest.mark.parametrize("comparisons", [1, 5, 15])
def test_the_interval_is_that_of_welch_shared_among_the_comparisons(comparisons: int) -> None:
    """From the formula: difference +- t(1 - 0.05 / 2m; nu) s, with Welch and Satterthwaite's nu."""
    found = verdict(A, B, "lower", comparisons)
    parts = [np.var(x, ddof=1) / len(x) for x in (A, B)]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (A, B), strict=True))
    half = stats.t.ppf(1 - 0.05 / comparisons / 2, freedom) * math.sqrt(sum(parts))
    middle = np.mean(A) - np.mean(B)
    assert found["interval"] == pytest.approx([middle - half, middle + half], rel=1e-9)
    oracle = stats.ttest_ind(A, B, equal_var=False).confidence_interval(1 - 0.05 / comparisons)
    assert found["interval"] == pytest.approx([oracle.low, oracle.high])
    assert (found["a_values"], found["b_values"]) == (list(A), list(B))


def test_better_and_worse_follow_the_direction_and_the_side() -> None:
    assert verdict(A, B, "lower", 1)["verdict"] == "better" == verdict(B, A, "higher", 1)["verdict"]
    assert verdict(B, A, "lower", 1)["verdict"] == "worse" == verdict(A, B, "higher", 1)["verdict"]
    assert verdict(A, (1.0, 1.3, 0.8), "lower", 1)["verdict"] == "cannot tell"
    assert verdict(A, B, "lower", 1)["verdict"] == "better" and verdict(A, B, "lower", 100)["verdict"] == "cannot tell"
    assert {direction for _, _, direction in COMPARED} == {"lower", "higher"}
    assert {key for key, _, direction in COMPARED if direction == "higher"} == {"precision", "coverage"}


@pytest.mark.parametrize(("a", "b"), [((1.0,), (9.0,)), ((1.0,), B), (A, (9.0,)), ((1.0, 1.0), (9.0, 9.0))])
def test_one_seed_or_no_variation_cannot_tell(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    assert verdict(a, b, "lower", 1)["verdict"] == "cannot tell" and verdict(a, b, "lower", 1)["interval"] == [None, None]


def test_verdicts_count_every_pair_and_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group(name, frechet=[k, k + 0.3, k + 0.1], coverage=[0.5 + k / 20, 0.52, 0.51]) for k, name in enumerate("abc")]
    found = verdicts(groups)
    assert [(row["a"], row["b"], row["measure"]) for row in found] == [
        (a, b, measure) for a, b in ("ab", "ac", "bc") for measure in ("frechet", "coverage")
    ]
    assert comparing.test_of(groups)["comparisons"] == 6 and comparing.test_of(groups)["level_each"] == pytest.approx(1 - 0.05 / 6)
    for row in found:
        key = row["measure"]
        a, b = ([run["scores"][key]["value"] for run in groups["abc".index(row[side])]["runs"]] for side in "ab")
        assert row["interval"] == verdict(a, b, "lower", 6)["interval"] and (row["a_values"], row["b_values"]) == (a, b)
    del groups[2]["runs"][1]["scores"]["coverage"]  # a measure that one run lacks is not compared
    assert {row["measure"] for row in verdicts(groups)} == {"frechet"} and comparing.test_of(groups)["comparisons"] == 3
    assert verdicts(groups[:1]) == [] and comparing.test_of(groups[:1])["comparisons"] == 0


def test_equal_groups_are_told_apart_in_a_twentieth_of_the_comparisons_at_most() -> None:
    """All measures and pairs of three groups of three seeds together: 15 tests without the correction would be wrong in half of the cases."""
    draw, wrong, trials = random.Random(0), 0, 40
    keys = [key for key, _, _ in COMPARED]
    for _ in range(trials):
        groups = [group(name, **{key: [draw.gauss(0, 1) for _ in range(3)] for key in keys}) for name in "abc"]
        wrong += any(row["verdict"] != "cannot tell" for row in verdicts(groups))
    assert wrong / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


# ---- groups ---------------------------------------------------------------------------------------------------------------------------------


def test_seeds_are_repeats_and_labels_name_what_differs(tmp_path: Path) -> None:
    gan, wgan = AdversarialConfig("gan"), AdversarialConfig("wgan-gp")
    configs = (gan, wgan, dataclasses.replace(gan, seed=1, log_every=7, device="cpu", snapshots=False), dataclasses.replace(gan, learning_rate=1e-3))
    runs = [run_of(config, tmp_path / str(k)) for k, config in enumerate(configs)]
    found = group_runs(runs)
    assert list(found) == ["gan, learning rate 0.0002", "wgan-gp", "gan, learning rate 0.001"]
    assert [[run.path.name for run in members] for members in found.values()] == [["0", "2"], ["1"], ["3"]]
    told = differences([{"label": label, "settings": comparing.settings_of(members[0])} for label, members in found.items()])
    assert set(told) == {"model", "beta2", "critic_dropout", "generator_loss", "penalty_weight", "learning_rate"}
    assert told["learning_rate"] == {"gan, learning rate 0.0002": 2e-4, "wgan-gp": 2e-4, "gan, learning rate 0.001": 1e-3}


def test_another_architecture_is_named_with_the_model(tmp_path: Path) -> None:
    configs = (AdversarialConfig("gan"), AdversarialConfig("gan", latent_dim=6), AdversarialConfig("gan", architecture="conv"))
    found = group_runs([run_of(config, tmp_path / str(k)) for k, config in enumerate(configs)])
    assert list(found) == ["gan mlp, latent dim 32", "gan mlp, latent dim 6", "gan conv, latent dim 32"]


def test_a_setting_that_only_some_have_is_named(tmp_path: Path) -> None:
    configs = (AdversarialConfig("gan"), AdversarialConfig("gan", max_steps=10), AutoencoderConfig("vae", beta=2.0), AutoencoderConfig("vae"))
    found = group_runs([run_of(config, tmp_path / str(k)) for k, config in enumerate(configs)])
    assert list(found) == ["gan", "gan, max steps 10", "vae, beta 2.0", "vae, beta 1.0"]
    told = differences([{"label": label, "settings": comparing.settings_of(members[0])} for label, members in found.items()])
    assert told["max_steps"] == {"gan": None, "gan, max steps 10": 10, "vae, beta 2.0": None, "vae, beta 1.0": None}


def test_one_and_one_point_zero_are_one_setting_and_no_run_is_lost(tmp_path: Path) -> None:
    betas = (1, 1.0, 2)
    found = group_runs([run_of(AutoencoderConfig("vae", beta=beta, seed=k), tmp_path / str(k)) for k, beta in enumerate(betas)])
    assert [len(members) for members in found.values()] == [2, 1]
    pair = group_runs([load_run(tmp_path / name) for name in "01"])
    assert [len(members) for members in pair.values()] == [2], "two groups of one label would be one group without the first one's runs"
    labelled = [{"label": label, "settings": comparing.settings_of(members[-1])} for label, members in found.items()]
    assert (
        set(differences(labelled)) == {"beta"} and set(differences([{**labelled[0]}, {**labelled[0], "settings": {"beta": 1}}])) & {"beta"} == set()
    )


def test_what_cannot_be_compared_is_refused_by_name(judge: Reference, originals: Path, tmp_path: Path) -> None:
    run, other = load_run(originals / "gan-0"), run_of(AdversarialConfig("gan"), tmp_path / "other", "mnist")
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([], judge)
    for runs in ([run, other], [other, run]):  # the odd one is named, wherever it stands
        with pytest.raises(UsageError, match=re.escape(f"{other.path} was trained on other images than digits ('mnist')")):
            compare(runs, judge)
    with pytest.raises(UsageError, match="gan-0 is given twice"):
        compare([run, load_run(originals / "gan-1" / ".." / "gan-0")], judge)
    copied = load_run(shutil.copytree(run.path, tmp_path / "copied"))
    with pytest.raises(UsageError, match=r"gan-0 and .*copied have the same settings and the same seed, 0: they are one repeat, not two"):
        compare([run, load_run(originals / "wgan-gp-0"), load_run(originals / "gan-1"), copied], judge)


# ---- scores of a run ------------------------------------------------------------------------------------------------------------------------


def test_a_comparison_holds_the_scores_of_its_runs(judge: Reference, folder: Path) -> None:
    runs = four(folder)
    found = strict(json.dumps(compare(runs, judge)))
    assert [g["label"] for g in found["groups"]] == ["gan", "wgan-gp"] and found["reference"] == strict(json.dumps(judge.record()))
    told = [one for g in found["groups"] for one in g["runs"]]
    assert [(one["run"], one["seed"], one["step"]) for one in told] == [(str(run.path), run.config.seed, 20) for run in runs]
    for run, one in zip(runs, told, strict=True):
        assert one["scores"] == strict(json.dumps(score(run, judge)["scores"]))
        assert one["collapse"] == strict(json.dumps(collapse(run.sample(N), judge.data))) and one["collapsed"] == one["collapse"]["collapsed"]
        assert one["epoch"] == run.metrics[-1]["epoch"] and one["seconds"] == run.timing[-1]["seconds"]
    rows = {row["measure"]: row for row in found["verdicts"]}
    assert set(rows) == {key for key, _, _ in COMPARED} and found["test"]["comparisons"] == 5
    assert rows["frechet"]["a_values"] == [one["scores"]["frechet"]["value"] for one in told[:2]]
    assert any(one["collapsed"] for one in told), "so young a generator has collapsed, and is in the means all the same"


def test_runs_that_were_judged_before_their_end_are_named(judge: Reference, folder: Path) -> None:
    whole, early = load_run(folder / "gan-0"), load_run(folder / "gan-1").at(8)
    found = compare([whole, early, load_run(folder / "wgan-gp-0")], judge, curves=False)
    assert [(one["step"], one["steps"]) for g in found["groups"] for one in g["runs"]] == [(20, 20), (8, 20), (20, 20)]
    assert "1 of 3 runs was judged before the end of training (gan: step 8 of 20), and is in all means." in comparison_conclusion(found)
    assert "The run was judged before the end of training (gan: step 8 of 20)" in comparison_conclusion(compare([early], judge, curves=False))
    assert "before the end" not in comparison_conclusion(compare([whole], judge, curves=False))


def test_a_curve_has_a_point_for_each_kept_step(judge: Reference, folder: Path) -> None:
    run = load_run(folder / "gan-0")
    points = curve(run, judge)
    assert [p["step"] for p in points] == run.kept == KEPT
    assert [p["epoch"] for p in points] == pytest.approx([step * 32 / 1440 for step in KEPT], abs=1e-4)
    seconds = [p["seconds"] for p in points]
    assert seconds == sorted(seconds) and len(set(seconds)) == 3 and seconds[-1] == run.timing[-1]["seconds"]
    for p in points:
        wanted = score(run.at(p["step"]), judge)["scores"]["frechet"]
        assert {k: p[k] for k in ("value", "low", "high")} == {k: wanted[k] for k in ("value", "low", "high")}
    assert len({p["value"] for p in points}) == 3
    assert [p["seconds"] for p in curve(run, judge, pace=0.5)] == [4, 8, 10]


def test_kept_scores_are_used_again(judge: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    first = compare(four(folder), judge, note=notes.append)
    assert len(notes) == 4 * len(KEPT) and len(set(notes)) == len(notes), "each step of each run once"

    def refuse(*_: object) -> None:
        raise AssertionError("scored twice")

    for name in ("score", "collapse"):
        monkeypatch.setattr(comparing, name, refuse)
    monkeypatch.setattr(Run, "sample", refuse)
    again = compare(four(folder), judge, note=notes.append)
    assert again == first and len(notes) == 4 * len(KEPT)


def test_kept_scores_are_made_again_where_weights_or_reference_changed(judge: Reference, folder: Path) -> None:
    run = load_run(folder / "gan-0")
    notes: list[str] = []

    def kept(run: Run, by: Reference = judge, whole: bool = True) -> Any:
        notes.clear()
        found = kept_scores(run, by, whole=whole, note=notes.append)
        return found["scores"]["frechet"]["value"]

    value = kept(run)
    path = run.path / "scores" / "step-20.json"
    assert notes == [f"scoring {run.path} at step 20"] and kept(run) == value and notes == []
    for damage in (b"", path.read_bytes()[:-30], b"[]", b"{}", b"\xff"):
        path.write_bytes(damage)
        assert kept(run) == value and len(notes) == 1
    smaller = reference(judge.data, 120, folder)
    assert kept(run, smaller) != value and len(notes) == 1
    assert kept(run) == value and len(notes) == 1
    last = load_run(run.path, ema=False)
    assert kept(last) != value and len(notes) == 1 and kept(run) == value
    shutil.rmtree(run.path / "checkpoints")
    shutil.copytree(folder / "gan-1" / "checkpoints", run.path / "checkpoints")
    assert kept(load_run(run.path)) == kept(load_run(folder / "gan-1")) != value
    assert kept(load_run(folder / "gan-1"), whole=False) == kept(load_run(folder / "gan-1")) and notes == []
    early = load_run(folder / "gan-1").at(8)
    short = kept(early, whole=False)
    assert len(notes) == 1 and kept(early) == short and len(notes) == 1, "the distance alone is not all scores"


# ---- equal resources ------------------------------------------------------------------------------------------------------------------------


def law(epochs: Sequence[float], factor: float, power: float, pace: float = 2.0) -> list[dict[str, Any]]:
    """A curve whose distance falls as a power of the epoch."""
    return [{"step": k, "epoch": e, "seconds": e * pace, "value": factor * e**-power} for k, e in enumerate(epochs)]


def test_reading_off_is_exact_on_a_power_law_and_silent_outside() -> None:
    points = law((1, 3, 10, 40), 7.0, 0.8)
    for where in (1, 1.5, 3, 9.99, 40):
        assert read_off(points, "epoch", where) == pytest.approx(7 * where**-0.8)
        assert read_off(points, "seconds", 2 * where) == pytest.approx(7 * where**-0.8)
    for where in (0.99, 40.1, 0):
        assert read_off(points, "epoch", where) is None
    assert read_off(points[:1], "epoch", 1.0) == 7.0 and read_off(points[:1], "epoch", 2.0) is None
    assert read_off([], "epoch", 1.0) is None and read_off([{"epoch": None, "value": 1.0}], "epoch", 1.0) is None
    assert read_off(law((1, 2), 0.0, 1.0), "epoch", 1.5) is not None  # a distance of zero has no logarithm


def groups_with_curves() -> list[dict[str, Any]]:
    """a: slow and better. b: three times as fast, and one of its runs stops early."""
    curves = {
        "a": [law((1, 4, 16), factor, 1.0, pace=3.0) for factor in (4.0, 4.1, 4.2)],
        "b": [law(epochs, factor, 1.0, pace=1.0) for epochs, factor in (((1, 4, 16), 8.0), ((1, 4, 8), 8.1), ((1, 4, 16), 8.2))],
    }
    return [{"label": label, "runs": [{"curve": points} for points in of]} for label, of in curves.items()]


def test_equal_epochs_and_seconds_are_read_at_the_last_common_point() -> None:
    epochs, seconds = equal_resources(groups_with_curves())
    assert (epochs["axis"], epochs["at"], seconds["axis"], seconds["at"]) == ("epoch", 8, "seconds", 8)
    assert [row["values"] for row in epochs["groups"]] == [pytest.approx([0.5, 0.5125, 0.525]), pytest.approx([1.0, 1.0125, 1.025])]
    assert [row["values"] for row in seconds["groups"]] == [pytest.approx([1.5, 1.5375, 1.575]), pytest.approx([1.0, 1.0125, 1.025])]
    assert [row["verdict"] for row in epochs["verdicts"]] == ["better"] and [row["verdict"] for row in seconds["verdicts"]] == ["worse"]
    for row in (epochs, seconds):  # one family: two axes, one pair
        a, b = (of["values"] for of in row["groups"])
        assert row["verdicts"][0]["interval"] == verdict(a, b, "lower", 2)["interval"] and row["comparisons"] == 2


def test_equal_resources_need_two_groups_and_a_common_point() -> None:
    groups = groups_with_curves()
    assert equal_resources(groups[:1]) == []
    groups[1]["runs"][0]["curve"] = law((0.5, 0.7), 1.0, 1.0)  # ended before the others were first looked at
    epochs, _ = equal_resources(groups)
    assert epochs["at"] == 0.7 and epochs["verdicts"] == [] and epochs["groups"][0]["values"] == [None] * 3
    for run in groups[0]["runs"]:
        for point in run["curve"]:
            point["seconds"] = None
    assert [row["axis"] for row in equal_resources(groups)] == ["epoch"]


# ---- sentences ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `periplus compare` was called for the four runs; nobody was told of anything."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(originals, folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.run(["compare", "runs/gan-0", "runs/gan-1", "runs/wgan-gp-0", "runs/wgan-gp-1", "--n", str(N), "--out", "out"])
    return folder


@pytest.fixture
def result(compared: Path) -> dict[str, Any]:
    return dict(strict((compared / "out" / "compare.json").read_text(encoding="utf-8")))


def test_the_command_writes_json_html_and_figures(compared: Path, result: dict[str, Any], judge: Reference) -> None:
    out = compared / "out"
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
        *("compare.json", "compare.html", "figures/compare-side-by-side.png", "figures/compare-quality.svg"),
    }
    assert result["command"] == f"periplus compare runs/gan-0 runs/gan-1 runs/wgan-gp-0 runs/wgan-gp-1 --out out --n {N}"
    assert result["reference"] == strict(json.dumps(judge.record())) and "measured_at" in result
    for one in (one for g in result["groups"] for one in g["runs"]):
        assert [p["step"] for p in one["curve"]] == KEPT and len(one["scores"]["frechet"]["floors"]) == 5
    assert [row["axis"] for row in result["equal"]] == ["epoch", "seconds"] and result["equal"][0]["at"] == pytest.approx(20 * 32 / 1440, abs=1e-4)
    assert "penalty_weight" in result["differences"] and str(compared) not in json.dumps(result)
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert page.count("data:image") >= 2 or page.count("<svg") >= 1
    assert result["reference"]["extractor"]["sha256"][:12] in page and "is the <em>floor</em>: no generator can be expected to score better" in page
    for row in result["verdicts"]:
        assert row["title"] in page and row["verdict"] in page
    assert 'src="http' not in page and 'href="http' not in page.replace("https://doi.org", "") or "cdn" not in page


def numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?", text)


def test_numbers_in_the_conclusion_are_in_the_json(result: dict[str, Any]) -> None:
    said = comparison_conclusion(result)
    means = {g["label"]: np.mean([one["scores"]["frechet"]["value"] for one in g["runs"]]) for g in result["groups"]}
    floor = result["groups"][0]["runs"][0]["scores"]["frechet"]["floor"]
    best = min(means, key=lambda label: means[label])
    assert f"The lowest mean Fréchet distance, {means[best]:.2f} of {best}, is {means[best] / floor:.1f} times the floor of {floor:.3g}." in said
    for row in result["equal"]:
        where = f"{row['at']:.3g} passes over the training images" if row["axis"] == "epoch" else f"{row['at']:.3g} seconds of training"
        listed = ", ".join(f"{of['label']} {np.mean(of['values']):.2f}" for of in row["groups"])
        assert f"At {where}, Fréchet distances are {listed}" in said
    collapsed = [g["label"] for g in result["groups"] for one in g["runs"] if one["collapsed"]]
    counted = ", ".join(f"{collapsed.count(label)} of {label}" for label in dict.fromkeys(collapsed))
    assert collapsed and f"{len(collapsed)} of 4 runs collapsed ({counted}); they are in all means." in said


def test_the_conclusion_is_computed_from_the_verdicts(result: dict[str, Any]) -> None:
    for row in result["verdicts"]:
        row["verdict"] = "cannot tell"
    undecided = comparison_conclusion(result)
    assert "All scores together *cannot tell* apart: gan and wgan-gp." in undecided
    result["verdicts"][0]["verdict"] = "better"
    result["verdicts"][3]["verdict"] = "worse"
    said = comparison_conclusion(result)
    assert "gan is *better* in Fréchet distance and *worse* in coverage than wgan-gp" in said
    assert "they cannot be told apart in kernel distance, precision, distance of class shares" in said
    shown = [
        block for block in comparison_blocks(result, {"grids": "x.png"}, "command", "compare") if getattr(block, "label", "") == "compare-verdicts"
    ]
    assert [row[-1] for row in shown[0].rows] == ["*better*", "cannot tell", "cannot tell", "*worse*", "cannot tell"]  # type: ignore[union-attr]
    result["equal"][0]["verdicts"][0]["verdict"] = "better"
    assert "(gan better than wgan-gp by this score alone, 2 comparisons)" in comparison_conclusion(result)


def test_samples_that_anything_tells_from_real_images_are_said_to_be(result: dict[str, Any]) -> None:
    for one, told in zip(result["groups"][0]["runs"], (0.985, 1.0), strict=True):
        one["scores"]["two_sample"]["value"] = told
        one["scores"]["precision"]["value"] = 0.9
    for one in result["groups"][1]["runs"]:
        one["scores"]["two_sample"]["value"] = 0.97
    said = comparison_conclusion(result)
    warned = (
        "Samples of gan are told from real images *at sight* (a classifier is right in 98 % or more): a precision of 0.90 does not make them good."
    )
    assert warned in said and said.count("at sight") == 1
    result["groups"][0]["runs"][0]["scores"]["two_sample"]["value"] = 0.9  # one run that is not: no warning of the group
    assert "at sight" not in comparison_conclusion(result)


def test_a_network_without_labels_is_said_to_be_unknown(result: dict[str, Any]) -> None:
    assert "of held-out images rightly" in protocol_sentence(result)
    result["reference"]["extractor"]["accuracy"] = None
    assert "learned without labels: how well it sees is not known" in protocol_sentence(result)


def test_features_of_stacked_images_are_said_to_be_of_each_channel(result: dict[str, Any]) -> None:
    assert "They are compared by the 64 features of `digits-recipe-1`" in protocol_sentence(result).replace("\\", "")
    result["reference"]["extractor"] |= {"per_channel": True}
    assert "They are compared by the 64 features, channel by channel, of" in protocol_sentence(result)


def test_one_run_is_the_reason_for_no_pair_but_its_own() -> None:
    groups = [group(label, frechet=values) for label, values in (("a", (1.0, 1.2)), ("b", (1.1, 1.3)), ("c", (9.0,)))]
    told = {"groups": groups, "verdicts": verdicts(groups), "equal": []}
    why = "(one run of a group has nothing to compare its differences with)"
    assert (
        f"All scores together *cannot tell* apart: a and b. All scores together *cannot tell* apart: a and c; b and c {why}."
        in comparison_conclusion(told)
    )
    assert "the floor of 0.5." in comparison_conclusion(told)


def test_nothing_is_said_of_equal_resources_that_a_run_has_no_point_at() -> None:
    groups = groups_with_curves()
    groups[1]["runs"][0]["curve"] = law((10, 16), 8.0, 1.0)  # first looked at after another one had ended
    epochs, _ = equal_resources(groups)
    assert epochs["at"] == 8 and epochs["verdicts"] == [] and epochs["groups"][1]["values"] == [None, pytest.approx(1.0125), pytest.approx(1.025)]
    assert equal_sentence(epochs) == "", "a mean of the others, called untold apart, would be a verdict that nobody made"


def test_collapsed_runs_are_counted_and_stay_in_every_mean(result: dict[str, Any]) -> None:
    told = [one for g in result["groups"] for one in g["runs"]]
    for one in told:
        one["collapsed"] = False
    table = {row[0]: row[1:] for row in score_table(result, "command", "scores").rows}
    assert "None of 4 runs collapsed." in comparison_conclusion(result) and table["of these collapsed"] == ("0", "0", "-")
    told[0]["collapsed"] = True
    marked = {row[0]: row[1:] for row in score_table(result, "command", "scores").rows}
    assert "1 of 4 runs collapsed (1 of gan); they are in all means." in comparison_conclusion(result)
    assert marked.pop("of these collapsed") == ("1", "0", "-") and marked == {k: v for k, v in table.items() if k != "of these collapsed"}
    values = [one["scores"]["frechet"]["value"] for one in told[:2]]
    half = stats.t.ppf(0.975, 1) * np.std(values, ddof=1) / math.sqrt(2)
    floors = told[0]["scores"]["frechet"]["floors"]
    assert table["runs"] == ("2", "2", "-")
    assert table["Fréchet distance"][0] == f"{np.mean(values):.2f} ± {half:.2f}"
    assert table["Fréchet distance"][-1] == f"{np.mean(floors):.2f} ({min(floors):.2f} to {max(floors):.2f})"


def test_the_command_prints_the_same_again_without_scoring(
    compared: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(compared)
    words = result["command"].split()[1:]
    capsys.readouterr()
    cli.run([*words[:-4], "--out", "again", *words[-2:], "--json"])
    told = capsys.readouterr()
    again = strict(told.out)
    assert again.pop("command") == result["command"].replace("--out out", "--out again") and "scoring" not in told.err
    assert again == {key: value for key, value in result.items() if key != "command"}
    cli.run([*words[:-4], "--out", "bare", *words[-2:], "--no-curves"])
    said = capsys.readouterr().out
    bare = strict((compared / "bare" / "compare.json").read_text(encoding="utf-8"))
    assert bare["verdicts"] == result["verdicts"] and bare["equal"] == []
    assert not (compared / "bare" / "figures" / "compare-quality.svg").exists()
    assert "compare.html" in said and "cannot" in said and "floor" in said and "*" not in said
    for folder in ("again", "bare"):
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ([], 2, "at least one RUN"),
        (["GAN", "GAN"], 2, "gan-0 is given twice"),
        (["GAN", "--n", "1"], 2, "--n is 1: at least 100 are needed"),
        (["GAN", "--n", "99"], 2, "--n is 99: at least 100 are needed"),
        (["absent"], 4, "absent"),
        (["GAN", "OTHER"], 2, "other was trained on 'mnist'"),
        (["OWN"], 2, "own was trained with one's own networks"),
        (["GAN", "OWN"], 2, "own was trained with one's own networks"),
    ],
)
def test_what_the_command_refuses(
    words: list[str], code: int, named: str, folder: Path, judge: Reference, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(AdversarialConfig("gan"), tmp_path / "other", "mnist")
    run_of(AdversarialConfig("gan", architecture="custom"), tmp_path / "own", sha256=judge.data.content_hash())
    places = {"GAN": "runs/gan-0", "OTHER": "other", "OWN": "own"}
    with pytest.raises(PeriplusError, match=re.escape(named)) as refused:
        cli.run(["compare", *(places.get(word, word) for word in words), "--out", "out"])
    assert refused.value.exit_code == code and not (tmp_path / "out").exists()


# ---- chapter 2b -----------------------------------------------------------------------------------------------------------------------------


def test_chapter_2b_compares_by_scores_where_there_are_images_enough(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert digits.labels is not None
    few = (digits.labels < 3).nonzero()[:, 0][:210]
    np.savez("few.npz", images=digits.images[few].numpy(), labels=digits.labels[few].numpy())
    monkeypatch.setitem(PRESETS["digits"], "options", ("--batch-size", "16", "--latent-dim", "3", "--held-out", "30", "--log-every", "4"))
    monkeypatch.setattr(study, "train_cells", lambda cells, settings, say: [cli.run([*cell.words, "--resume"]) for cell in cells])
    make_study(Settings(data="few.npz", out=Path("study"), only=("2b",), epochs=2, seeds=2), "periplus study", note=lambda line: None)
    results = strict(Path("study/results.json").read_text(encoding="utf-8"))
    chapter = results["chapters"]["2b"]
    told = chapter["scores"]
    assert [g["label"] for g in told["groups"]] == ["wgan-gp", "gan"] and told["reference"]["samples"] == 105
    assert all(Path("study", chapter["figures"][name]["path"]).is_file() for name in ("grids", "quality"))
    assert penalty.conclusion(chapter) == comparison_conclusion(told)
    last = penalty.QUESTION.tell(chapter, results)[-1]
    assert isinstance(last, Finding) and last.text == penalty.conclusion(chapter)
    changed = copy.deepcopy(chapter)
    for row in changed["scores"]["verdicts"]:
        row["verdict"] = "better"
    assert f"{plain('wgan-gp')} is *better* in Fréchet distance" in penalty.conclusion(changed) != penalty.conclusion(chapter)
    changed["scores"] = None
    assert "cannot tell" in penalty.conclusion(changed) or "WGAN-GP is" in penalty.conclusion(changed)
    assert str(tmp_path) not in json.dumps(chapter)
