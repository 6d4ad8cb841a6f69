"""Chapters 2c, 2d and 2e on a tiny study: they measure, draw and tell; what they conclude follows from results.json and from nothing else."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from periplus import cli, plots, study
from periplus.data import ImageData, load_data
from periplus.errors import UsageError
from periplus.evaluation import splits_of
from periplus.locating import Search
from periplus.path_judge import judge_paths
from periplus.report import Answers, Finding, to_data
from periplus.runs import load_run
from periplus.study import Settings, made_with, make_study
from periplus.study.archive import write_archive
from periplus.study.chapters import cheap, inversion, paths
from periplus.study.reporting import CONCLUSIONS, build_report, summary, write_report
from periplus.study.settings import PRESETS

torch.set_num_threads(1)

KEYS = ("2c", "2d", "2e")
ROOMS: dict[str, Any] = {"2c": inversion, "2d": paths, "2e": cheap}
SETTINGS = Settings(data="tiny.npz", out=Path("study"), only=KEYS, epochs=2, seeds=2)
COMMAND = "periplus study --only 2c,2d,2e"


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Small numbers of everything, and training in this process."""
    patch.setitem(PRESETS["digits"], "options", ("--batch-size", "16", "--latent-dim", "3", "--held-out", "12", "--sample-every", "100"))
    for room, changes in (
        (inversion, {"IMAGES": 3, "STARTS": 4, "FEW_STARTS": 2, "PLANTED": 4, "SHOWN": 2}),
        (paths, {"PAIRS": 3, "STARTS": 2, "FEW_STARTS": 2, "TRIED": 2, "SEGMENTS": 16, "COARSER": (8,), "SHOWN": 2, "FRAMES": 5, "PLACES": 9}),
        (cheap, {"PAIRS": 3, "STARTS": 2, "SEGMENTS": 8, "SHOWN": 2, "FRAMES": 5}),
    ):
        for name, value in changes.items():
            patch.setattr(room, name, value)

    def train_here(cells: list[Any], settings: Settings, say: Callable[[str], None]) -> None:
        for cell in cells:
            cli.run([*cell.words, "--resume"])

    patch.setattr(study, "train_cells", train_here)


def write_images(path: Path, channels: int = 1, labelled: bool = True) -> None:
    """Bright bars on noise, 8 x 8; the place of the bar is the class."""
    random, labels = np.random.default_rng(0), np.arange(80) % 3
    bars = np.arange(8) // 3 == labels[:, None]
    images = np.clip(random.normal(60, 20, (80, channels, 8, 8)) + 120 * bars[:, None, None, :], 0, 255).astype(np.uint8)
    np.savez(path, images=images, **({"labels": labels} if labelled else {}))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.npz and the study of it. Not to be written to."""
    folder = tmp_path_factory.mktemp("two")
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
    """A chapter's conclusion: the last of its blocks. The summary says the short form, and the whole report can be told."""
    chapter = results["chapters"][key]
    said = str(ROOMS[key].conclusion(chapter))
    last = ROOMS[key].QUESTION.tell(chapter, results)[-1]
    assert isinstance(last, Finding) and last.text == said
    assert (key, CONCLUSIONS[key](chapter)) in next(block.rows for block in summary(results) if isinstance(block, Answers))
    json.dumps(to_data(build_report(results)))
    return said


# ---- what is there --------------------------------------------------------------------------------------------------------------------------


def test_the_study_holds_its_figures_and_commands(original: Path, measured: dict[str, Any]) -> None:
    folder = original / "study"
    drawn = {figure["path"]: shlex.split(figure["command"]) for chapter in measured["chapters"].values() for figure in chapter["figures"].values()}
    assert set(drawn) == {str(p.relative_to(folder)) for p in (folder / "figures").iterdir()}
    assert {Path(path).name for path in drawn} == {
        *("2c-minima.png", "2c-starts.svg", "2c-planted.svg"),
        *("2d-strip-0.png", "2d-strip-1.png", "2d-cost.svg", "2d-scores.svg"),
        *("2e-strip-0.png", "2e-strip-1.png", "2e-scores.svg", "2e-trade-off.svg"),
    }
    for words in drawn.values():
        assert words[:2] == ["periplus", "study"] and words[words.index("--only") + 1] in KEYS
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")
    text = json.dumps(measured["chapters"])
    assert str(original) not in text, "a path of this machine"
    assert made_with(measured["chapters"]["2c"]) == made_with(measured["chapters"]["2d"]) == {("runs", 2, 2)}


def test_the_commands_told_are_taken_by_the_command_line(measured: dict[str, Any]) -> None:
    for key, command in (("2c", "periplus invert study/runs/wgan-gp-0"), ("2d", "periplus path study/runs/wgan-gp-0")):
        blocks = to_data(ROOMS[key].QUESTION.tell(measured["chapters"][key], measured))
        told = [block["text"] for block in blocks if block["kind"] == "Command"]
        assert len(told) == 1 and told[0].startswith(command)


def test_tables_and_figures_have_commands(measured: dict[str, Any]) -> None:
    for key in KEYS:
        blocks = to_data(ROOMS[key].QUESTION.tell(measured["chapters"][key], measured))
        assert all(block["command"].startswith("periplus study") for block in blocks if block["kind"] in ("Figure", "Table"))
        kinds = {block["kind"] for block in blocks}
        assert {"Equation", "Pseudocode", "Figure", "Table", "Finding", "Command"} <= kinds


def test_what_is_shown_is_what_was_found(original: Path, measured: dict[str, Any]) -> None:
    """Errors of the codes in results.json, computed anew from the run and the data."""
    chapter = measured["chapters"]["2c"]
    run = load_run(original / "study" / "runs" / "wgan-gp-0")
    data = load_data(original / "tiny.npz")
    train, test = splits_of(run, data)
    assert chapter["split"] == test.split and len(chapter["record"]["images"]) == len(chapter["shown"]) == 3
    for k, (image, codes) in enumerate(zip(chapter["record"]["images"], chapter["shown"], strict=True)):
        target = test.images[k].double() / 255
        for code in codes:
            error = float((run.decode(torch.tensor(code["z"])).double() - target).square().sum())
            assert error == pytest.approx(code["error"], rel=1e-3)
        assert codes[0]["error"] == image["error"] == min(e for e, kind in zip(image["ends"], image["end_kinds"], strict=True) if kind != "escaped")
        nearest = (train.images.double() / 255 - target).square().flatten(1).sum(1).min()
        assert image["training_error"] == pytest.approx(float(nearest), rel=1e-4)
        assert image["sample_error"] > 0


def test_costs_along_a_path_add_up(measured: dict[str, Any]) -> None:
    """The area under the drawn curve of the path is its U, by the trapezoid rule on few places."""
    chapter = measured["chapters"]["2d"]
    for example in chapter["shown"]:
        pair = chapter["record"]["pairs"][example["pair"]]
        for curve, name in (("line", "straight_cost"), ("path", "cost")):
            area = np.trapezoid(example["cost"][curve], example["length"][curve]) * pair["image_distance"]
            assert area == pytest.approx(pair[name], rel=0.05)
        assert min(min(values) for values in example["cost"].values()) >= 0.5 - 1e-6


def test_chance_is_that_of_drawing_starts_without_replacement() -> None:
    told = {"starts": 4, "hits": [0, 1, 4]}
    assert inversion.chance(told, 1) == pytest.approx((0 + 1 / 4 + 1) / 3)
    assert inversion.chance(told, 2) == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert inversion.chance(told, 4) == pytest.approx(2 / 3)


# ---- conclusions follow the numbers: 2c -----------------------------------------------------------------------------------------------------


def set_images(results: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Give every image of 2c these values."""
    record = results["chapters"]["2c"]["record"]
    for image in record["images"]:
        image.update(copy.deepcopy(values))
    return dict(record)


@pytest.mark.parametrize(
    ("verdict", "told"), [("different", "? No"), ("same", "? Yes, as far as these starts tell"), ("undecided", "? It cannot be told")]
)
def test_2c_the_same_code_is_what_the_verdicts_say(results: dict[str, Any], verdict: str, told: str) -> None:
    set_images(results, verdict=verdict)
    assert told in finding(results, "2c")
    assert told in CONCLUSIONS["2c"](results["chapters"]["2c"])


def test_2c_one_start_only(results: dict[str, Any]) -> None:
    record = set_images(results, verdict="one start", ends=[0.5], end_kinds=["kink"], minima=[], error=0.5)
    record["starts"] = results["chapters"]["2c"]["record"]["starts"] = 1
    results["chapters"]["2c"]["planted"] |= {"starts": 1, "hits": [1, 0, 1, 1], "found": 3, "found_code": 2}
    said = finding(results, "2c")
    assert "one start" in said.lower() and "One start says nothing of how starts differ" in said
    assert "A single start finds 75 %" in said


def test_2c_nothing_certified(results: dict[str, Any]) -> None:
    record = set_images(results, verdict="undecided", kind="unfinished", minima=[], distinct=0, distinct_images=0, certified_error=None)
    results["chapters"]["2c"]["record"]["kinds"] = {kind: 12 if kind == "unfinished" else 0 for kind in record["kinds"]}
    assert "No best endpoint is certified" in CONCLUSIONS["2c"](results["chapters"]["2c"])
    said = finding(results, "2c")
    assert "It cannot be told" in said and "No certified minimum lies more than 1 % above" in said and "on a kink" not in said


def test_2c_everything_flat(results: dict[str, Any]) -> None:
    minima = [{"error": 0.5, "kind": "flat", "starts": 2, "frequency": 0.5, "norm": 1.0, "image": 0} for _ in range(2)]
    record = set_images(results, verdict="different", kind="flat", minima=minima, distinct=2, distinct_images=1, error=0.5)
    results["chapters"]["2c"]["record"]["kinds"] = {kind: 12 if kind == "flat" else 0 for kind in record["kinds"]}
    said = finding(results, "2c")
    assert "flat" in said and "valley" in said
    assert "certified as one for 3 of 3" in CONCLUSIONS["2c"](results["chapters"]["2c"])


def test_2c_minima_above_the_best_are_counted(results: dict[str, Any]) -> None:
    minimum = {"kind": "kink", "starts": 1, "frequency": 0.25, "norm": 1.0, "image": 0}
    set_images(results, error=1.0, ends=[1.0, 2.0], minima=[minimum | {"error": e} for e in (1.0, 1.005, 1.02, 2.0)])
    assert "6 certified minima, of 3 of 3 images, lie more than 1 % above" in finding(results, "2c")
    assert "worst endpoint of an image has 2 times" in finding(results, "2c")
    set_images(results, minima=[minimum | {"error": e} for e in (1.0, 1.005)])
    assert "No certified minimum lies more than 1 % above" in finding(results, "2c")


def test_2c_planted_images_are_counted(results: dict[str, Any]) -> None:
    planted = results["chapters"]["2c"]["planted"]
    planted |= {"images": 50, "starts": 4, "found": 40, "found_code": 10, "hits": [4] * 20 + [2] * 20 + [0] * 10}
    said = finding(results, "2c")
    assert "The best of 4 starts found 40 of 50 planted images (95 % Wilson interval 67 to 89 %), 10 of them with the very code" in said
    assert "A single start finds 60 %" in said
    assert "The best of 4 starts found 40 of 50 images" in CONCLUSIONS["2c"](results["chapters"]["2c"])


def test_2c_baselines_are_told_as_they_stand(results: dict[str, Any]) -> None:
    set_images(results, error=0.5, sample_error=4.0, training_error=0.25)
    said = finding(results, "2c")
    assert "of the best codes is 0.5; that of the nearest of 8,192 samples is 4, that of the nearest training image 0.25" in said
    assert "undercuts both for 0 of 3" in said


@pytest.mark.parametrize(
    ("escaped", "norm", "told"),
    [
        (0, 99.0, "Without the ball none of 6 starts ran off beyond"),
        (0, 99.0, "but codes left the ball: norms go up to 99"),
        (0, 0.5, "and all codes stayed in the ball: norms go up to 0.5"),
        (5, 99.0, "Without the ball 5 of 6 starts ran off beyond"),
        (5, 99.0, "and the others ended at norms up to 99"),
    ],
)
def test_2c_why_a_ball(results: dict[str, Any], escaped: int, norm: float, told: str) -> None:
    chapter = results["chapters"]["2c"]
    chapter["free"] |= {"escaped": escaped, "ends": 6, "largest_norm": norm}
    assert any(told in block.get("text", "") for block in to_data(inversion.QUESTION.tell(chapter, results)))


def test_symbols_of_records_are_set_as_mathematics() -> None:
    said = inversion.typeset("The same z*? |z*| is 3; |z| <= 6.2; U~ = 43% of Dist^2; a * b")
    assert said == 'The same $z^*$? $|z^*|$ is 3; $|z| <=$ 6.2; $tilde(U)$ = 43 % of $"Dist"^2$; a \\* b'


# ---- conclusions follow the numbers: 2d -----------------------------------------------------------------------------------------------------


def set_scores(results: dict[str, Any], line: list[float], path: list[float], spherical: list[float] | None = None) -> dict[str, Any]:
    """Give the first run of 2d these scores."""
    chapter = results["chapters"]["2d"]
    chapter["runs"][0] |= {"line": line, "path": path, "spherical": spherical or line, "bound": [1.0] * len(line)}
    return dict(chapter)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ([1.5, 1.6, 1.4], "The path found is cheaper than the straight line, by 25.0 % on average"),
        ([2.5, 2.6, 2.4], "The path found is *dearer* than the straight line, by 25.0 % on average"),
        ([2.2, 1.8, 2.0], "The path found is *not told apart* from the straight line"),
        ([1.9998, 1.9999, 1.9998], "The path found is as dear as the straight line, to within 0.1 %"),
    ],
)
def test_2d_the_saving_is_what_the_scores_say(results: dict[str, Any], path: list[float], told: str) -> None:
    chapter = set_scores(results, [2.0, 2.0, 2.0], path)
    assert told in finding(results, "2d") and told in CONCLUSIONS["2d"](chapter)
    assert f"(mean ratio {sum(path) / 6:.3g}, 95 % interval over 3 pairs" in finding(results, "2d")
    cheaper, dearer = sum(p < 1.99 for p in path), sum(p > 2 for p in path)
    assert f"it is cheaper for {cheaper}{f' and dearer for {dearer}' if dearer else ''} of 3 pairs" in finding(results, "2d")


def test_2d_paths_are_held_against_a_cross_fade(results: dict[str, Any]) -> None:
    set_scores(results, [2.0, 2.0, 2.0], [1.3, 1.34, 1.4])
    assert "For 2 of 3 pairs the path scores more than the $4\\/3$" in finding(results, "2d")


def test_2d_one_pair_has_no_interval(results: dict[str, Any]) -> None:
    set_scores(results, [2.0], [1.5])
    assert "*not told apart*" in finding(results, "2d") and "-∞ to ∞" in finding(results, "2d")


def test_2d_spherical_interpolation_is_judged_by_its_numbers(results: dict[str, Any]) -> None:
    set_scores(results, [2.0, 2.0, 2.0], [1.5, 1.6, 1.4], [2.5, 2.6, 2.4])
    assert "Spherical interpolation is dearer than the line" in finding(results, "2d")
    set_scores(results, [2.0, 2.0, 2.0], [1.5, 1.6, 1.4], [1.7, 1.8, 1.6])
    assert "Spherical interpolation is cheaper than the line" in finding(results, "2d")


def test_2d_what_did_not_converge_is_named(results: dict[str, Any]) -> None:
    pairs = results["chapters"]["2d"]["record"]["pairs"]
    for pair in pairs:
        pair |= {"converged": False, "residual": 0.5}
    assert f"Not converged: {len(pairs)} of {len(pairs)} pairs" in finding(results, "2d")
    for pair in pairs:
        pair |= {"converged": True}
    assert "stationary (converged)" in finding(results, "2d")


def test_2d_the_gap_says_what_is_left_open(results: dict[str, Any]) -> None:
    for k, pair in enumerate(results["chapters"]["2d"]["record"]["pairs"]):
        pair["gap"] = 1.0 if k == 0 else 0.25
    said = finding(results, "2d")
    assert "The mean gap to the lower bound is 50 %. Between the same codes a path that is 33 % cheaper is therefore not excluded (50 %" in said
    assert "A path that is 33 % cheaper still is not excluded" in CONCLUSIONS["2d"](results["chapters"]["2d"])


def test_2d_winners_and_seeds_are_listed(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["2d"]
    for k, pair in enumerate(chapter["record"]["pairs"]):
        pair |= {"start": ("bow", "bow", "line")[k], "minima": 1}
    for run in chapter["runs"]:
        run |= {"line": [2.0, 2.0], "path": [1.0, 1.5 + run["seed"] / 2], "spherical": [2.0, 2.0]}
    assert "The best path of a pair began as: bow 2, line 1. All beginnings of a pair led to the same minimum" in finding(results, "2d")
    chapter["record"]["pairs"][1]["minima"] = 2
    assert "line 1." in finding(results, "2d") and "All beginnings" not in finding(results, "2d")
    assert "in the generators of all seeds: 0.625 (seed 0), 0.750 (seed 1)." in finding(results, "2d")


def test_2d_pairs_with_one_code_are_left_out(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["2d"]
    for pair in chapter["record"]["pairs"]:
        pair |= {"distance": 0.0, "score": None, "gap": None, "straight_score": None, "spherical_score": None, "floor": 0.0, "lower_bound": 0.0}
    for run in chapter["runs"]:
        run |= {"line": [], "path": [], "spherical": [], "bound": [], "converged": 0}
    chapter["choices"] = {"pairs": 0}
    del chapter["figures"]["scores"]
    assert finding(results, "2d") == "The images of every pair have the same code: there is no path to price."


def test_2d_the_choices_are_told_by_their_numbers() -> None:
    told = {
        "pairs": 2,
        "line": [2.0, 2.0],
        "segments": {"8": [1.168, 1.168], "16": [1.118, 1.118], "32": [1.105, 1.105]},
        "downhill": [1.3, 1.105],
        "energy": [1.5, 1.5],
        "one": [10.0, 10.0],
        "several": [9.0, 9.0],
        "alternatives": 3,
    }
    said = paths.choices_sentence(told)
    assert "shrinks by a factor of 3.8" in said and "for 1 of 2 pairs; without it paths would be +8.82 % dearer on average" in said
    assert "saves 25.0 % of the cost of the line, in the length reading 44.8 %" in said and "it is 10.0 % cheaper in $U$" in said
    said = paths.choices_sentence(told | {"downhill": [1.105, 1.105], "several": [10.0, 10.0]})
    assert "for 0 of 2 pairs." in said and "not cheaper on average (+0.0 %)" in said


def test_2d_a_generator_without_a_constant(results: dict[str, Any]) -> None:
    chapter = results["chapters"]["2d"]
    chapter["record"]["lipschitz"] = None
    assert any("no constant is certified" in block.get("text", "") for block in to_data(paths.QUESTION.tell(chapter, results)))


# ---- pairs and plots ------------------------------------------------------------------------------------------------------------------------


def test_pairs_are_of_different_images() -> None:
    images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    images[3], images[6] = 9, 7
    _, pairs = paths.pairs_of(ImageData(images, None, (), "few", "test"))
    assert pairs == [(0, 1), (2, 3)]
    with pytest.raises(UsageError, match="no pair of different images"):
        paths.pairs_of(ImageData(images[:2], None, (), "few", "test"))


def test_plots_of_searches_and_pairs(tmp_path: Path) -> None:
    things = [{"name": "a", "values": [1.0, 3.0], "kinds": ["x", "y"], "levels": {"b": 90.0}}, {"name": "c", "values": [2.0], "kinds": ["y"]}]
    first = plots.search_ends(things, ["x", "y", "z"], tmp_path / "a.svg", "thing", "value").read_bytes()
    assert first == plots.search_ends(things, ["x", "y", "z"], tmp_path / "b.svg", "thing", "value").read_bytes() and b"<svg" in first
    with pytest.raises(UsageError, match="a kind for every value"):
        plots.search_ends([{"name": "a", "values": [1.0], "kinds": []}], ["x"], tmp_path / "c.svg", "", "")
    plots.paired_dots([{"label": "a", "y": [1.0, np.nan]}, {"label": "b", "y": [2.0, np.nan]}], tmp_path / "d.svg", "x", "y", {"one": 1.0})
    with pytest.raises(UsageError, match="groups of values"):
        plots.paired_dots([], tmp_path / "e.svg", "x", "y")


# ---- the report -----------------------------------------------------------------------------------------------------------------------------


def test_the_report_is_a_function_of_results(original: Path, tmp_path: Path, results: dict[str, Any]) -> None:
    shutil.copytree(original / "study" / "figures", tmp_path / "figures")
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (original / "study" / "report.html").read_bytes()
    page = re.sub(r"<[^>]*>", "", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Cheapest paths" in page and "Inversion" in page


def test_colour_images_without_labels_and_one_seed_go_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch)
    write_images(tmp_path / "c $x$ *#.npz", channels=3, labelled=False)
    make_study(Settings(data="c $x$ *#.npz", out=Path("o u t"), only=KEYS, epochs=1, seeds=1), COMMAND, note=lambda line: None)
    chapters = json.loads(Path("o u t/results.json").read_text(encoding="utf-8"))["chapters"]
    assert len(chapters["2d"]["runs"]) == 1 and Path("o u t/report.pdf").read_bytes().startswith(b"%PDF")
    assert "of all seeds" not in paths.conclusion(chapters["2d"])


# ---- conclusions follow the numbers: 2e -----------------------------------------------------------------------------------------------------


def set_judged(results: dict[str, Any], **scores: list[float]) -> dict[str, Any]:
    """Give the trainings of 2e these scores."""
    chapter = dict(results["chapters"]["2e"])
    for name, values in scores.items():
        chapter["judged"][name]["scores"] = values
    return chapter


def test_2e_holds_its_trainings_and_their_morphs(original: Path, measured: dict[str, Any]) -> None:
    chapter = measured["chapters"]["2e"]
    assert list(chapter["judged"]) == ["plain", "straight-0.5", "least-0.5", "straight-2", "least-2"] and chapter["pairs"] == 3
    for name, told in chapter["judged"].items():
        run = load_run(original / "study/variants" / f"cheap-{name}")
        weight, objective = (0.0, "least") if name == "plain" else (float(name.split("-")[1]), name.split("-")[0])
        assert (run.config.path_weight, run.config.path_objective, run.config.epochs) == (weight, objective, 1)
        command = chapter["variants"][f"cheap-{name}"]
        assert command.split()[:3] == ["periplus", "train", "wgan-gp"] and f"--out study/variants/cheap-{name}" in command
        assert ("--path-weight 2 --path-objective least" in command) == (name == "least-2") and ("path-weight" in command) == (name != "plain")
        assert told["frechet"]["value"] > chapter["frechet_floor"] > 0
    with tarfile.open(write_archive(original / "study", "tar.gz")) as archive:
        assert "study/variants/cheap-least-2/config.toml" in archive.getnames()
    (original / "study/study.tar.gz").unlink()
    for name in ("2e-strip-0.png", "2e-strip-1.png", "2e-scores.svg", "2e-trade-off.svg"):
        assert (original / "study/figures" / name).stat().st_size > 500
    assert made_with(chapter) == {("runs", 2, 2)}


def test_2e_says_what_the_scores_say(results: dict[str, Any]) -> None:
    chapter = set_judged(results, plain=[1.8, 1.7, 1.9], **{"straight-2": [1.7, 1.6, 1.8], "least-2": [1.4, 1.35, 1.45]})
    for name, value in {"plain": 2.0, "least-2": 3.0}.items():
        chapter["judged"][name]["frechet"]["value"] = value
        chapter["judged"][name]["squared_error"]["mean"] = 10 * value
    said = finding(results, "2e")
    assert "With the least-cost objective, λ = 2 the excess is smaller by 50 % (95 % interval 34 to 66 %)" in said
    assert "the Fréchet distance of samples is 1.50 times that of the plain training, the squared error of inversion 1.50 times." in said
    assert "Least-cost objective against surrogate, λ = 2: the excess is smaller by 43 %" in said
    set_judged(results, **{"least-2": [1.9, 1.6, 1.95]})
    assert "*not told apart* from that of the plain training: it changes by +2 %" in CONCLUSIONS["2e"](results["chapters"]["2e"])
    set_judged(results, **{"least-2": [2.8, 2.75, 2.9]})
    assert "*larger* by 127 %" in finding(results, "2e")
    set_judged(results, **{"least-2": [2.8, 2.7, 2.9]})
    assert "changed by +125 % for every pair alike" in finding(results, "2e")


def test_2e_intervals_are_students_over_pairs(results: dict[str, Any]) -> None:
    """With two pairs a normal interval would exclude zero; Student's, with one degree of freedom, is 6.5 times as wide."""
    others = {name: [1.7, 1.7] for name in ("straight-0.5", "least-0.5", "straight-2")}
    set_judged(results, plain=[1.8, 1.8], **others, **{"least-2": [1.5, 1.6]})
    assert "the excess is *not told apart* from that of the plain training: it changes by -31 % (-111 to +48 %)" in finding(results, "2e")
    assert cheap.half_interval([0.0, 0.1]) == pytest.approx(0.05 * 12.7062, rel=1e-4) and cheap.half_interval([0.3]) == 0.0


def test_2e_says_whether_the_surrogate_lowers_what_it_prices(results: dict[str, Any]) -> None:
    judged = results["chapters"]["2e"]["judged"]
    judged["plain"]["straight_excess"]["mean"], judged["straight-2"]["straight_excess"]["mean"] = 0.98, 2.1
    assert "have an excess of 2.1 on these pairs, 0.98 without it: what it lowers between codes of the prior it does not lower here." in finding(
        results, "2e"
    )
    judged["straight-2"]["straight_excess"]["mean"] = 0.5
    assert "have an excess of 0.5 on these pairs, 0.98 without it." in finding(results, "2e")


def test_2e_shows_morphs_before_and_after_and_the_bound(original: Path, results: dict[str, Any]) -> None:
    """A row of images for each of three trainings, from codes in results.json that begin and end where the judge's paths do."""
    chapter = results["chapters"]["2e"]
    assert list(chapter["shown"]) == ["plain", "straight-2", "least-2"]
    test = splits_of(load_run(original / "study/runs/wgan-gp-0"), load_data(original / "tiny.npz"))[1]
    for name, shown in chapter["shown"].items():
        run = load_run(original / "study/variants" / f"cheap-{name}")
        images = run.decode(torch.tensor(shown)).detach().double().flatten(2)
        assert images.shape[:2] == (2, 5)
        ends = images[:, [0, -1]].flatten(0, 1) - test.images[:4].double().flatten(1) / 255
        pairs = judge_paths(run, test, 3, Search(2, keep="best"), segments=8, extractor=cheap.eyes_of(test))["pairs"][:2]
        assert ends.square().sum(1).tolist() == pytest.approx([pair[end]["error"] for pair in pairs for end in ("a", "b")], rel=1e-3)
    blocks = to_data(cheap.QUESTION.tell(chapter, results))
    captions = [block["caption"] for block in blocks if block["kind"] == "Table"]
    assert "0 is what no path undercuts" in captions[0] and "of the 3 paths of a training converged" in captions[0]
    told = [block["text"] for block in blocks if block["kind"] == "Command"]
    assert told[1] == "periplus path study/variants/cheap-least-2 --judge --n 3 --starts 2 --segments 8"


def test_2e_is_judged_by_the_command_that_it_tells(original: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The very scores of the chapter, by the command line."""
    monkeypatch.chdir(original)
    blocks = to_data(cheap.QUESTION.tell(measured["chapters"]["2e"], measured))
    told = [block["text"] for block in blocks if block["kind"] == "Command"][1]
    cli.run([*shlex.split(told)[1:], "--out", str(tmp_path / "judged")])
    found = json.loads((tmp_path / "judged/judge.json").read_text())
    scores = measured["chapters"]["2e"]["judged"]["least-2"]["scores"]
    assert [pair["score"] for pair in found["pairs"]] == pytest.approx(scores, rel=1e-6)
