"""The speedrun's referee: judging does not count, luck makes no record, what does not arrive is not left out."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "speedrun"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"speedrun_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


referee = load("run")

#: Yields noise first and then training images; decoding takes half a second, which is judging; a fifth of a second of "training" lies in between.
ENTRY = """
import time, torch
from periplus import load_data

def train(source, seed):
    images = load_data(source).images.float() / 255
    def noise(z):
        time.sleep(0.5)
        return torch.rand(len(z), *images.shape[1:], generator=torch.Generator().manual_seed(seed))
    yield 1, 3, noise
    time.sleep(0.2)
    yield 2, 3, lambda z: images[(z[:, 0].sigmoid() * len(images)).long()]
    raise AssertionError("trained on after it had arrived")
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1] / "src")}
    return subprocess.run([sys.executable, FOLDER / "run.py", *map(str, words)], capture_output=True, text=True, env=environment, timeout=300)


def test_a_run_is_timed_without_its_judging(tmp_path: Path) -> None:
    (tmp_path / "entry.py").write_text(ENTRY)
    began = time.time()
    done = run("--smoke", "--runs", 1, "--threads", 1, "--entry", tmp_path / "entry.py", "--out", tmp_path / "out.json")
    wall = time.time() - began
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    (told,) = result["runs"]
    first, second = told["checks"]
    assert told["reached"] and told["step"] == 2 and first["value"] > result["target"] >= second["value"]
    assert 0.199 <= second["seconds"] - first["seconds"] < 0.2 + told["judging_seconds"] - 0.5  # its own work, without the half second of decoding
    assert told["judging_seconds"] > 0.5 and told["seconds"] + told["judging_seconds"] < wall
    assert told["seconds"] > 0.4  # imports count: nothing imports torch in less
    assert told["confirmed"] < result["target"] and told["noise_floor"] < result["target"]
    assert told["environment"]["threads"] == 1 and not result["summary"]["is_record"]  # --smoke, and one run
    assert done.stdout == f"{referee.row(result)}\n" and done.stdout.count("|") == 7


def outcome(seconds: float | None, confirmed: float = 0.9) -> dict[str, object]:
    return {"reached": seconds is not None, "seconds": seconds, "confirmed": None if seconds is None else confirmed}


def test_what_does_not_arrive_is_not_left_out() -> None:
    five = [outcome(float(s)) for s in (5, 3, 9, 4, 6)]
    told = referee.summarise(five, 1.0, False)
    assert (told["median"], told["low"], told["high"], told["runs"], told["is_record"]) == (5, 3, 9, 5, True)
    assert not referee.summarise(five[:4], 1.0, False)["is_record"]  # too few
    assert not referee.summarise(five, 1.0, True)["is_record"]  # a smoke test, or another target
    missing = referee.summarise([*five, outcome(None)], 1.0, False)
    assert missing["median"] is None and missing["reached"] == 5 and not missing["is_record"]
    lucky = referee.summarise([outcome(5.0, confirmed) for confirmed in (0.9, 1.3, 0.9, 0.95, 1.0)], 1.0, False)
    assert not lucky["is_record"]  # on other samples the mean misses the target


def test_the_clock_stands_still_while_it_is_stopped() -> None:
    clock = referee.Clock(time.time() - 100)
    before = clock.seconds()
    with pytest.raises(KeyError), clock.stopped():
        time.sleep(0.05)
        raise KeyError
    assert before >= 100 and clock.stopped_for >= 0.05
    assert clock.seconds() == pytest.approx(time.time() - clock.started - clock.stopped_for, abs=0.01)


def test_the_entry_trains_the_same_from_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = load("entry")
    monkeypatch.setattr(entry, "CHECK_EVERY", 3)
    weights = []
    for seed in (0, 0, 1):
        candidates = entry.train("digits", seed)
        next(candidates)
        step, dimension, decode = next(candidates)
        assert step == 6 and decode(torch.zeros(2, dimension)).shape == (2, 1, 8, 8)
        weights.append(torch.cat([p.flatten() for p in decode.parameters()]).clone())
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--runs", 0, "--smoke"], "--runs is 0"), (["--entry", "no.py", "--smoke"], "no such file")],
)
def test_usage_errors(words: list[object], message: str) -> None:
    done = run(*words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
