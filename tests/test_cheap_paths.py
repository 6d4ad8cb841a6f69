"""What is published of cheap passages follows from the cells that were measured: the file's conclusions, the tables and the sentences."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HOUSE = Path(__file__).resolve().parents[1]
RESULTS = HOUSE / "benchmarks" / "results"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    specification = importlib.util.spec_from_file_location("cheap_paths", HOUSE / "benchmarks" / "cheap_paths.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return dict(json.loads((RESULTS / "cheap_paths.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def prose() -> str:
    """The section of docs/results.md, on one line."""
    page = (HOUSE / "docs" / "results.md").read_text(encoding="utf-8")
    return " ".join(page.split("## Cheap passages\n")[1].split("\n## ")[0].split())


def alike(a: Any, b: Any) -> bool:
    """The same but for rounding."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == pytest.approx(b, rel=1e-9, abs=1e-12)) if isinstance(a, float) else bool(a == b)


def test_one_file_holds_it_all(result: dict[str, Any]):
    assert [path.name for path in RESULTS.glob("*cheap_paths*.json")] == ["cheap_paths.json"]
    kinds = {(row["objective"], row["weight"], row["seed"]) for row in result["cells"]}
    grid = {(objective, weight, seed) for objective in ("least", "straight") for weight in (0.5, 2.0, 5.0) for seed in range(3)}
    assert kinds == grid | {("plain", 0.0, seed) for seed in range(3)} and result["there"] == result["asked"] == 21
    for row in result["cells"]:
        judged, samples = row["judged"], row["samples"]
        assert len(judged["scores"]) == judged["settings"]["pairs"] == judged["converged"] == 200
        assert judged["excess"]["mean"] == pytest.approx(sum(judged["scores"]) / 200 - 1)
        assert all(judged[name]["mean"] > 0 for name in ("end_error", "squared_error", "gap")) and row["processor_seconds"] > 0
        assert all(samples[name]["floor"] > 0 for name in ("frechet", "precision", "recall", "density", "coverage"))


def test_conclusions_follow_from_the_cells(bench: ModuleType, result: dict[str, Any]):
    for name, told in bench.conclusions(result["cells"]).items():
        assert alike(told, result[name]) or alike(json.loads(json.dumps(told)), result[name]), name


def test_intervals_are_students_over_seeds(result: dict[str, Any]):
    """By another formula than the benchmark's, from the scores of the pairs."""
    from scipy import stats

    excess = {(row["objective"], row["weight"], row["seed"]): sum(row["judged"]["scores"]) / 200 - 1 for row in result["cells"]}
    for told in result["summary"]:
        own = [excess[told["objective"], told["weight"], seed] for seed in range(3)]
        reduced = [1 - value / excess["plain", 0.0, seed] for seed, value in enumerate(own)]
        for name, values in (("excess", own), ("reduction", reduced)):
            assert told[name]["mean"] == pytest.approx(sum(values) / 3, abs=1e-9)
            if told["objective"] != "plain":
                low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
                assert told[name]["interval"] == pytest.approx([low, high], abs=1e-9)
    for told in result["against_surrogate"]:
        saved = [excess["least", told["weight"], seed] - excess["straight", told["surrogate_weight"], seed] for seed in range(3)]
        low, high = stats.t.interval(0.95, 2, loc=sum(saved) / 3, scale=stats.sem(saved))
        assert told["excess"]["interval"] == pytest.approx([low, high], abs=1e-9)


def test_the_aim_is_reached_by_those_that_reach_it(bench: ModuleType, result: dict[str, Any]):
    row = {name: {"mean": value} for name, value in (("reduction", 0.31), ("frechet_ratio", 1.04), ("squared_error_ratio", 1.05))}
    assert bench.reaches(row)
    for name, value in (("reduction", 0.29), ("frechet_ratio", 1.06), ("squared_error_ratio", 1.06)):
        assert not bench.reaches(row | {name: {"mean": value}})
    assert not bench.reaches({"reduction": {"mean": 0.5}}), "without scores nothing is reached"
    assert result["aim"]["reached_by"] == []


def test_the_page_shows_the_tables_of_the_file(bench: ModuleType, result: dict[str, Any]):
    page = (HOUSE / "docs" / "results.md").read_text(encoding="utf-8")
    assert bench.tables(result) in page, "run: python benchmarks/cheap_paths.py --table"


def interval(told: dict[str, Any], digits: int, sign: int = 1, factor: float = 1.0) -> str:
    """A mean with its interval, as sentences have it."""
    mean, *ends = (sign * factor * value for value in (told["mean"], *told["interval"]))
    return f"{mean:.{digits}f} ({min(ends):.{digits}f} to {max(ends):.{digits}f})"


def test_sentences_have_the_figures_of_the_file(result: dict[str, Any], prose: str):
    rows = {(row["objective"], row["weight"]): row for row in result["summary"]}
    same, like = ({row["weight"]: row for row in result[name]} for name in ("against_surrogate", "at_like_samples"))
    best = max((row for row in rows.values()), key=lambda row: row["reduction"]["mean"])
    assert (best["objective"], best["weight"]) == ("least", 2.0) and "**The aim is missed**" in prose
    mean, low, high = (100 * value for value in (best["reduction"]["mean"], *best["reduction"]["interval"]))
    assert f"is {mean:.0f} % ({low:.0f} to {high:.0f}), for {best['frechet_ratio']['mean']:.2f} times the Fréchet distance and" in prose
    assert f"{best['squared_error_ratio']['mean']:.2f} times the error; the least that is paid is" in prose
    cheapest = min((row for key, row in rows.items() if key[0] != "plain"), key=lambda row: row["frechet_ratio"]["mean"])
    mean, low, high = (100 * value for value in (cheapest["reduction"]["mean"], *cheapest["reduction"]["interval"]))
    assert f"{cheapest['frechet_ratio']['mean']:.2f} times the Fréchet distance, for a reduction that cannot be told from none" in prose
    assert f"({mean:.0f} %, {low:.0f} to {high:.0f})" in prose and low < 0 < high
    for told, name, digits, sign in (
        *((same[2.0], "excess", 3, -1), (same[2.0], "frechet", 1, -1), (same[2.0], "squared_error_ratio", 2, -1)),
        *((same[5.0], "excess", 3, 1), (same[5.0], "squared_error_ratio", 2, -1), (same[5.0], "precision_on_path", 2, 1)),
        *((same[0.5], "frechet", 1, -1), (like[2.0], "excess", 3, -1), (like[2.0], "frechet", 1, 1)),
    ):
        said = interval(told[name], digits, sign)
        said_in_page = re.sub(r"[(),]", " ", prose)
        assert " ".join(re.sub(r"[(),]", " ", said).split()) in " ".join(said_in_page.split()).replace(" of the plain one", ""), (name, said)
    assert same[0.5]["excess"]["interval"][0] < 0 < same[0.5]["excess"]["interval"][1]
    assert like[2.0]["surrogate_weight"] == 0.5 and like[2.0]["excess"]["interval"][0] < 0 < like[2.0]["excess"]["interval"][1]
    lines = [f"{rows[key]['line_excess']['mean']:.2f}" for key in (("plain", 0.0), *(("straight", weight) for weight in (0.5, 2.0, 5.0)))]
    assert f"the excess of held-out *lines* goes from {lines[0]} to {lines[1]}, {lines[2]} and {lines[3]} with its weight" in prose
    assert f"({rows['least', 5.0]['line_excess']['mean']:.2f} at λ = 5)" in prose


def test_the_overhead_is_told_as_it_was_measured(bench: ModuleType, result: dict[str, Any], prose: str):
    least = [row for row in result["comparisons"] if row["objective"] == "least"]
    means = [row["processor_seconds_ratio"] for row in result["summary"] if row["objective"] == "least"]
    low, high = (f"{function(row['mean'] for row in means):.2f}" for function in (min, max))
    most = max(row["processor_seconds_ratio"] for row in least)
    assert f"one thread: {low} to {high} times the plain processor time on average, {most:.2f} at most" in prose
    assert f"the intervals reach {max(row['interval'][1] for row in means):.1f}" in prose
    told = result["overhead"]
    assert told["ratios"] == bench.ratios(told["seconds"])
    for name, words in (("least", "in turn, one thread: {}"), ("straight", "surrogate {}")):
        wall = told["ratios"][name]["wall"]
        said = f"{wall['median']:.2f} ({wall['lowest']:.2f} to {wall['highest']:.2f}"
        assert words.format(said) in prose
    assert told["threads"] == 1 and told["ratios"]["least"]["wall"]["highest"] < 2
    two = result["overhead_2_threads"]
    assert two["threads"] == 2 and two["ratios"] == bench.ratios(two["seconds"]) and two["ratios"]["least"]["wall"]["median"] < 2
    (wall, processor), line = (two["ratios"]["least"][clock] for clock in ("wall", "processor")), two["ratios"]["straight"]["wall"]
    said = [f"{clock['lowest']:.2f} to {clock['highest']:.2f}" for clock in (wall, processor)]
    assert f"{wall['median']:.2f} ({said[0]} by the clock, {said[1]} by the processor)" in prose
    assert f"the surrogate {line['median']:.2f} ({line['lowest']:.2f} to {line['highest']:.2f};" in prose


def test_ratios_are_taken_within_a_round(bench: ModuleType):
    def clocks(*walls: float) -> list[dict[str, float]]:
        return [{"wall": wall, "processor": 2 * wall} for wall in walls]

    found = bench.ratios({"plain": clocks(1, 2, 4), "least": clocks(2, 3, 6), "straight": clocks(1, 2, 5)})
    assert found["least"]["wall"] == {"median": 1.5, "lowest": 1.5, "highest": 2.0}
    assert found["straight"]["processor"] == {"median": 1.0, "lowest": 1.0, "highest": 1.25}


def test_the_weights_of_the_most_like_samples(bench: ModuleType):
    rows = [("least", 1.0, 10.0), ("least", 2.0, 14.0), ("straight", 0.5, 11.0), ("straight", 4.0, 15.0), ("plain", 0.0, 8.0)]
    summary = [{"objective": objective, "weight": weight, "frechet": {"mean": value}} for objective, weight, value in rows]
    assert bench.alike(summary) == [(1.0, 0.5), (2.0, 4.0)]
    assert bench.shared_weights(summary) == []
