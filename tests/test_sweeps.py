"""Sweeps: the grid and its names, engines, what is kept and what is refused, and figures that agree with what they are made of."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from periplus import cli, plots, sweeps
from periplus.config import AutoencoderConfig, config_for
from periplus.console import StageDisplay
from periplus.engines import Cell, Processes, progress
from periplus.errors import NonFiniteError, PeriplusError, UsageError
from periplus.runs import load_run, read_lines
from periplus.sweeps import Sweep, interval, make_sweep, spelled
from periplus.training import train

SMALL = {"hidden": (12,), "latent_dim": (3,), "batch_size": (16,), "epochs": (2,)}
WORDS = ["--hidden", "12", "--latent-dim", "3", "--batch-size", "16", "--epochs", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars on noise in tiny.npz of the current folder."""
    random = np.random.default_rng(0)
    bars = np.arange(8) // 3 == (np.arange(80) % 3)[:, None]
    images = np.clip(random.normal(60, 20, (80, 8, 8)) + 120 * bars[:, None, :], 0, 255).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", images=images, labels=np.arange(80) % 3)
    monkeypatch.chdir(tmp_path)


def sweep(model: str = "vae", seeds: int = 2, **more: Any) -> Sweep:
    values = {**SMALL, **more.pop("values", {"beta": (0.1, 10.0)})}
    return Sweep(config_for(model), "tiny.npz", Path("out"), values, seeds, **more)


def quiet(line: str) -> None:
    """Nobody listens."""


class Here:
    """An engine in this process: the words of each cell."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, cells: Sequence[Cell], out: Path, display: StageDisplay) -> dict[str, PeriplusError]:
        for cell in cells:
            cli.run([*cell.words, "--resume"])
            self.done.append(cell.name)
        return {}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    engine = Here()
    monkeypatch.setattr(sweeps, "Processes", lambda workers: engine)
    return engine


# ---- the grid -------------------------------------------------------------------------------------------------------------------------------


def test_cells_are_named_from_what_varies_and_their_commands_make_them() -> None:
    asked = sweep(values={"beta": (0.1, 1.0), "rate": ("prior", "marginal"), "likelihood": ("gaussian",)}, image_size=6)
    cells = asked.cells(2)
    assert [cell.name for cell in cells][:4] == [f"rate={rate},beta={beta},seed=0" for rate in ("prior", "marginal") for beta in ("0.1", "1")]
    assert len(cells) == 8 and len({cell.path for cell in cells}) == 8 and asked.varied == ["rate", "beta"]
    for cell in cells:
        words = shlex.split(cell.command)
        assert words[:5] == ["periplus", "train", "vae", "--data", "tiny.npz"] and words[-4:] == ["--threads", "2", "--out", f"out/{cell.path}"]
        from periplus.commands import train_options

        options = cli.parse(train_options(words[2:]), words[3:], "train")
        assert options.config() == cell.config and options.image_size == 6


def test_booleans_and_models_with_presets_are_spelled_as_the_command_line_does() -> None:
    from periplus.commands import preset_config, train_options

    base = preset_config("gan", "sheet")
    asked = Sweep(base, "tiny.npz", Path("out"), {"generator_batch_norm": (True, False), "learning_rate": (1e-4, 3e-4)}, 1, "sheet")
    for cell in asked.cells(1):
        words = shlex.split(cell.command)
        options = cli.parse(train_options(words[2:]), words[3:], "train")
        assert options.config().resolve(100) == cell.config.resolve(100)


@pytest.mark.parametrize(("value", "told"), [(0.1, "0.1"), (1.0, "1"), (1e4, "10000"), (0.1234567891, "0.1234567891"), (3, "3"), ("echo", "echo")])
def test_values_are_spelled_without_losing_a_digit(value: Any, told: str) -> None:
    assert spelled(value) == told and type(value)(told) == value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": {"bta": (1.0,)}}, "'bta' cannot be swept (did you mean 'beta'?)"),
        ({"values": {"seed": (1,)}}, "'seed' cannot be swept"),
        ({"values": {"beta": (1.0, 2.0, 1.0)}}, "--beta names 1 twice"),
        ({"values": {"beta": ()}}, "--beta has no value"),
        ({"seeds": 0}, "--seeds is 0: at least 1"),
        ({"engine": "stakced"}, "--engine is 'stakced' (did you mean 'stacked'?)"),
    ],
)
def test_a_sweep_that_cannot_be_served_says_why(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        sweep(**changes)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vea"], "unknown model 'vea'"),
        (["vae", "--data", "tiny.npz", "--out", "o", "--btea", "1"], "--btea"),
        (["vae", "--data", "tiny.npz", "--out", "o", "--beta", "-1"], "--beta is -1.0: it must be zero or more"),
        (["vae", "--data", "tiny.npz", "--out", "o", "--beta", "x"], "--beta"),
        (["vae", "--data", "tiny.npz", "--out", "o", "--batch-size", "500"], "--batch-size is 500, but only"),
        (["gan", "--data", "tiny.npz", "--out", "o", "--engine", "stacked", "--architecture", "conv"], "--engine stacked: architecture 'conv'"),
        (["vae", "--data", "tiny.npz", "--out", "o", "--engine", "stacked", "--hidden", "8", "9"], "--engine stacked: cells differ in hidden"),
    ],
)
def test_a_command_that_cannot_be_served_leaves_nothing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", *words])
    complaint = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in complaint and "\n" not in complaint and not Path("o").exists()


def test_a_dry_run_prints_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["sweep", "vae", "--data", "tiny.npz", "--out", "o", "--beta", "1", "2", "--seeds", "2", "--dry-run"])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5 and all(": periplus train vae --data tiny.npz" in line for line in told[:4]) and not Path("o").exists()


# ---- from end to end ------------------------------------------------------------------------------------------------------------------------


def test_a_stacked_sweep_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["sweep", "vae", "--data", "tiny.npz", "--out", "out", "--beta", "0.1", "10", "--seeds", "2", *WORDS, "--json"])
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads(Path("out/sweep.json").read_text()) and results["engine"]["name"] == "stacked"
    assert {p.name for p in Path("out").iterdir()} == {".lock", "settings.json", "cells", "measures", "sweep.json", "sweep.csv", "curve.svg"}
    assert len(results["cells"]) == 4 and all(load_run(Path("out") / cell["path"]).step == cell["step"] for cell in results["cells"])
    agree(results)
    cell = results["cells"][3]
    words = shlex.split(cell["command"])[1:]
    cli.run([*words[:-1], "again"])
    mine, other = load_run("again").checkpoint.tensors, load_run(Path("out") / cell["path"]).checkpoint.tensors
    assert all(torch.allclose(mine[name], other[name], rtol=1e-4, atol=1e-5) for name in mine), "the printed command makes the same run"
    # again without and with --resume
    with pytest.raises(UsageError, match="holds a sweep already: add --resume"):
        cli.run(["sweep", "vae", "--data", "tiny.npz", "--out", "out", "--beta", "0.1", "10", "--seeds", "2", *WORDS])
    with pytest.raises(UsageError, match=r"was begun with seeds = 2, not 3"):
        cli.run(["sweep", "vae", "--data", "tiny.npz", "--out", "out", "--seeds", "3", "--resume"])
    with pytest.raises(UsageError, match=r"was begun with values = "):
        cli.run(["sweep", "vae", "--data", "tiny.npz", "--out", "out", "--beta", "1", "--resume"])
    with pytest.raises(UsageError, match="is a sweep of 'vae', not 'echo'"):
        cli.run(["sweep", "echo", "--out", "out", "--resume"])
    before = {p: p.stat().st_mtime_ns for p in Path("out/cells").rglob("*")}
    capsys.readouterr()
    cli.run(["sweep", "vae", "--out", "out", "--resume", "--json"])
    again = json.loads(capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in Path("out/cells").rglob("*")} == before
    assert {k: v for k, v in again.items() if k != "command"} == {k: v for k, v in results.items() if k != "command"}


def agree(results: dict[str, Any]) -> None:
    """CSV, cells and points tell the same figures."""
    rows = list(csv.DictReader(io.StringIO(Path("out/sweep.csv").read_text())))
    assert [row["name"] for row in rows] == [cell["name"] for cell in results["cells"]]
    for row, cell in zip(rows, results["cells"], strict=True):
        for name, value in {**cell["values"], **cell["measures"], "seed": cell["seed"], "step": cell["step"]}.items():
            assert row[name] == "" if value is None else str(value) == row[name], name
        assert cell["measures"]["bound"] == pytest.approx(cell["measures"]["distortion"] + cell["measures"]["rate"], rel=1e-5)
    for point in results["points"]:
        own = [cell["measures"]["rate"] for cell in results["cells"] if cell["values"] == point["values"]]
        assert point["seeds"] == len(own) == 2
        told = point["measures"]["rate"]
        half = 12.706204736 * abs(own[0] - own[1]) / 2  # t(0.975, 1) s / sqrt(2), with s = |a - b| / sqrt(2)
        assert told["mean"] == pytest.approx(sum(own) / 2) and told["high"] - told["mean"] == pytest.approx(half)
    low, high = results["points"]
    assert low["measures"]["rate"]["mean"] > high["measures"]["rate"]["mean"], "a dearer rate is a smaller one"


def test_other_fields_are_swept_by_processes(in_process: Here) -> None:
    results = make_sweep(sweep(model="echo", seeds=1, values={"hidden": (8, 12)}), "periplus sweep", quiet)
    assert in_process.done == ["hidden=8,seed=0", "hidden=12,seed=0"] and results["engine"] == {"name": "processes", "threads": 1}
    assert [point["values"] for point in results["points"]] == [{"hidden": 8}, {"hidden": 12}]
    assert results["points"][0]["measures"]["rate"]["low"] is None, "one seed has no interval"
    assert Path("out/curve.svg").exists()


def test_adversarial_models_are_swept_and_judged(in_process: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "evaluate_collapse", lambda run, data: {"collapsed": False, "smallest_share": 0.1, "spread": run.config.ema})
    asked = Sweep(config_for("gan"), "tiny.npz", Path("out"), {"ema": (0.0, 0.5), "batch_size": (16,), "epochs": (1,), "latent_dim": (3,)}, 1)
    results = make_sweep(asked, "periplus sweep", quiet)
    for cell in results["cells"]:
        last = load_run(Path("out") / cell["path"]).metrics[-1]
        assert cell["measures"]["critic_loss"] == last["critic_loss"] and cell["measures"]["spread"] == cell["values"]["ema"]
    assert not Path("out/curve.svg").exists() and Path("out/sweep.csv").exists()
    header, rows = sweeps.table_rows(results)
    assert header[:2] == ("ema", "seeds") and rows[1][0] == "0.5"


def test_a_cell_that_fails_leaves_the_others_and_ends_the_sweep_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from periplus.training import stacked

    taken = stacked.stacked_step

    def broken(stack: Any, loss: Any, step: int, healthy: torch.Tensor) -> Any:
        with torch.no_grad():
            stack.networks["decoder"].head.weight[1, 0, 0] *= math.nan
        return taken(stack, loss, step, healthy)

    with monkeypatch.context() as patch:
        patch.setattr(stacked, "stacked_step", broken)
        with pytest.raises(NonFiniteError, match="beta=10,seed=0: a loss or gradient became non-finite by step 1 ") as caught:
            make_sweep(sweep(), "periplus sweep", quiet)
    results = json.loads(Path("out/sweep.json").read_text())
    assert caught.value.exit_code == 5 and ["error" in cell for cell in results["cells"]] == [False, True, False, False]
    assert [(point["seeds"], point["failed"]) for point in results["points"]] == [(2, 0), (1, 1)]
    assert list(csv.DictReader(io.StringIO(Path("out/sweep.csv").read_text())))[1]["error"].startswith("beta=10,seed=0: ")
    results = make_sweep(sweep(resume=True), "periplus sweep", quiet)
    assert all("measures" in cell for cell in results["cells"])


def test_processes_keep_going_when_one_cell_fails() -> None:
    """Real children: one of them asks for a batch that the data cannot fill."""
    out = Path("out")
    out.mkdir()
    good, bad = sweep(seeds=1, values={"beta": (1.0,)}).cells(1)[0], sweep(seeds=1, values={"beta": (2.0,), "batch_size": (79,)}).cells(1)[0]
    bad = Cell("bad", "cells/bad", (*bad.words[:-1], "out/cells/bad"), bad.config)
    with StageDisplay(["bad", good.name], quiet) as display:
        failed = Processes(1)([bad, good], out, display)
    assert list(failed) == ["bad"] and isinstance(failed["bad"], UsageError) and "(made by: periplus train vae" in str(failed["bad"])
    alone = train(good.config, "tiny.npz", "alone")
    assert all(torch.equal(a, load_run(out / good.path).checkpoint.tensors[name]) for name, a in alone.checkpoint.tensors.items())


def test_progress_of_a_sweep_is_that_of_its_cells(tmp_path: Path) -> None:
    """Four cells of which two were begun: a quarter is done in 10 s, one by one; all at once, the same lines stand for less."""
    settings = {"values": {"beta": [0.1, 10.0]}, "seeds": 2}
    config = sweep(seeds=1, values={"beta": (1.0,)}).cells(1)[0].config
    train(config, "tiny.npz", tmp_path / "cells" / "a")
    step = read_lines(tmp_path / "cells" / "a" / "timing.jsonl")[-1]["step"]
    shutil.copytree(tmp_path / "cells" / "a", tmp_path / "cells" / "b")
    for name in ("a", "b"):
        line = {"step": step // 2, "seconds": 5.0, "images_per_second": 1.0}
        (tmp_path / "cells" / name / "timing.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"engine": "processes"}))
    assert progress(tmp_path) == (2 * (step // 2), 4 * step, "4 runs, 30 s left")
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"engine": "stacked"}))
    assert progress(tmp_path)[2] == "4 runs, 15 s left"
    for name in ("a", "b"):  # begun, and killed before a line was whole
        (tmp_path / "cells" / name / "timing.jsonl").write_text("")
    assert progress(tmp_path) == (0, 1, "")
    (tmp_path / "settings.json").write_text("{")
    assert progress(tmp_path) == (0, 1, "")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["stacked", "processes"])
def test_a_sweep_that_is_stopped_and_killed_comes_to_the_same_results(engine: str) -> None:
    """SIGTERM in the middle of training, SIGKILL a little later, then to the end: the figures of a sweep that was left alone."""
    words = ["sweep", "vae", "--data", "tiny.npz", "--beta", "0.1", "10", "--seeds", "1", "--engine", engine, "--workers", "1", "--json"]
    words += ["--hidden", "12", "--latent-dim", "3", "--batch-size", "16", "--epochs", "120", "--log-every", "10", "--checkpoint-every", "100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "periplus", *words, "--out", "out", "--resume"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    timing = Path("out/cells/beta=0.1,seed=0/timing.jsonl")
    with begin() as stopped:
        wait_for_lines(timing, 1)
        stopped.send_signal(signal.SIGTERM)
        _, complaint = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and complaint.splitlines()[-1].startswith("periplus: stopped by SIGTERM")
    lines = len(timing.read_text().splitlines())
    with begin() as killed:
        wait_for_lines(timing, lines + 1)
        killed.kill()
    cli_results(words, "whole")
    cli_results([*words, "--resume"], "out")
    hurt, whole = (json.loads((Path(name) / "sweep.json").read_text()) for name in ("out", "whole"))
    assert [cell["measures"] for cell in hurt["cells"]] == [cell["measures"] for cell in whole["cells"]] and hurt["points"] == whole["points"]


def cli_results(words: list[str], out: str) -> None:
    """The command in this process, until whoever was killed has let go of the folder."""
    for _ in range(100):
        with contextlib.suppress(UsageError), contextlib.redirect_stdout(io.StringIO()):
            cli.run([*words, "--out", out])
            return
        time.sleep(0.2)
    pytest.fail("the folder stayed locked")


def wait_for_lines(path: Path, count: int) -> None:
    until = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < until, f"{path} did not get {count} lines"
        time.sleep(0.02)


# ---- figures --------------------------------------------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    told = interval([1.0, 2.0, 4.0])
    half = 4.302652729911275 * math.sqrt(7 / 3) / math.sqrt(3)  # t(0.975, 2) from the table; s^2 = 7/3
    assert told["mean"] == pytest.approx(7 / 3) and told["low"] == pytest.approx(7 / 3 - half) and told["high"] == pytest.approx(7 / 3 + half)
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None}
    assert interval([]) == interval([1.0, None]) == {"mean": None, "low": None, "high": None}
    assert interval([True, False])["mean"] == 0.5


def test_measures_are_kept_until_the_checkpoint_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = sweep(seeds=1, values={"beta": (0.1, 10.0)})
    make_sweep(asked, "periplus sweep", quiet)
    measured: list[str] = []
    monkeypatch.setattr(sweeps, "measure_cell", lambda run, data, sweep: measured.append(run.path.name) or {"rate": 1.0, "distortion": 2.0})
    resumed = sweep(seeds=1, values={"beta": (0.1, 10.0)}, resume=True)
    make_sweep(resumed, "periplus sweep", quiet)
    assert not measured
    kept = Path("out/measures/beta=10,seed=0.json")
    record = json.loads(kept.read_text())
    kept.write_text(json.dumps({**record, "inputs": {**record["inputs"], "checkpoint": "another"}}))
    results = make_sweep(resumed, "periplus sweep", quiet)
    assert measured == ["beta=10,seed=0"] and results["cells"][1]["measures"] == {"rate": 1.0, "distortion": 2.0}
    folder = Path("out/cells/beta=10,seed=0")
    train(AutoencoderConfig(**{**vars(load_run(folder).config), "epochs": 3}), "tiny.npz", folder, resume=True)
    with pytest.raises(UsageError, match="epochs = 3, not 2"):
        make_sweep(resumed, "periplus sweep", quiet)


def test_one_curve_for_each_setting_beside_beta(tmp_path: Path) -> None:
    told = {"mean": 1.0, "low": 0.5, "high": 1.5}
    points = [
        {"values": {"rate": r, "beta": b}, "seeds": 1, "measures": {"rate": told, "distortion": told}}
        for r in ("prior", "marginal")
        for b in (1.0, 2.0)
    ]
    results = {"settings": {"model": "vae"}, "cells": [], "points": points}
    curves = sweeps.rate_distortion_curves(results)
    assert [(curve["label"], [p["name"] for p in curve["points"]]) for curve in curves] == [("rate=prior", ["1", "2"]), ("rate=marginal", ["1", "2"])]
    first = plots.rate_distortion(curves, tmp_path / "a.svg").read_bytes()
    assert first == plots.rate_distortion(curves, tmp_path / "b.svg").read_bytes() and first.startswith(b"<?xml")
    with pytest.raises(UsageError, match="without points"):
        plots.rate_distortion([], tmp_path / "c.svg")
