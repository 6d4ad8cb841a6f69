"""A run is a folder: what is in it, how strictly it is read, and that reading it leaves no trace."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from periplus import AdversarialConfig, ImageData, Run, RunError, UsageError, load_data, load_run, train
from periplus.checkpoints import load_checkpoint
from periplus.config import ADVERSARIAL_DEFAULTS, DataRecord, read_config, write_config
from periplus.networks import MLPCritic, MLPGenerator
from periplus.runs import append_line, codes, cut_lines, cut_samples, read_lines, stream

torch.set_num_threads(1)
KILL_RUNS = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_runs.py"
RECORD = DataRecord("digits", "train", 200, 1, 8, 8, "0" * 64)


def config(**changes: Any) -> AdversarialConfig:
    few = {"batch_size": 16, "latent_dim": 4, "max_steps": 6, "log_every": 2, "sample_every": 3, "checkpoint_every": 2, "keep_last": 2}
    return AdversarialConfig(**{"model": "gan", "device": "cpu", "precision": "float32", **few, **changes})


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_data("digits").subset(range(200))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("periplus.networks.MLPGenerator", functools.partial(MLPGenerator, widths=(16, 24)))
    monkeypatch.setattr("periplus.networks.MLPCritic", functools.partial(MLPCritic, widths=(24,)))


@pytest.fixture
def run(digits: ImageData, tmp_path: Path) -> Run:
    return train(config(), digits, tmp_path / "run")


# ---- the folder -----------------------------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_interface_says(run: Run) -> None:
    names = sorted(str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file())
    checkpoint = ("manifest.json", "state.json", "state.safetensors")
    assert names == sorted(
        [
            *(".lock", "config.toml", "env.json", "metrics.jsonl", "timing.jsonl", "samples/step-3.png", "samples/step-6.png"),
            *(f"checkpoints/step-{step}/{name}" for step in (4, 6) for name in checkpoint),
        ]
    )
    assert (run.path / ".lock").read_bytes() == b""
    assert not any(name.endswith((".pt", ".pth", ".pkl", ".pickle", ".npy")) for name in names)


def test_the_environment_is_recorded_once_per_session(run: Run, digits: ImageData) -> None:
    record = json.loads((run.path / "env.json").read_text())
    assert record["data_sha256"] == run.data.sha256 == digits.content_hash()
    assert len(record["sessions"]) == 1
    session = record["sessions"][0]
    assert {"versions", "commit", "threads", "device", "cores", "processor"} <= session.keys()
    assert session["threads"] == 1 and session["versions"]["torch"] == torch.__version__
    train(config(max_steps=8), digits, run.path, resume=True)
    assert len(json.loads((run.path / "env.json").read_text())["sessions"]) == 2


def test_checkpoints_hold_no_times_and_lines_of_metrics_neither(run: Run) -> None:
    assert load_checkpoint(run.path / "checkpoints/step-6").values == {"summed": 0}
    assert not {"seconds", "time", "images_per_second"} & set(run.metrics[0])
    assert set(run.timing[0]) == {"step", "seconds", "images_per_second"}


def test_reading_a_run_leaves_no_trace(run: Run) -> None:
    def everything() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in (run.path, *run.path.rglob("*"))}

    before = everything()
    again = load_run(run.path)
    again.sample(3)
    assert again.metrics and again.timing and again.step == 6 and again.config == run.config
    assert everything() == before
    with pytest.raises(RunError, match="nowhere does not exist"):
        load_run(run.path / "nowhere")
    assert not (run.path / "nowhere").exists()


def test_weights_are_read_when_first_used(run: Run) -> None:
    """A run whose checkpoints are gone still shows its configuration and metrics."""
    for file in (run.path / "checkpoints").rglob("state.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    again = load_run(run.path)
    assert again.metrics[-1]["step"] == 6
    with pytest.warns(UserWarning, match="wrong size"), pytest.raises(RunError, match=r"run has no complete checkpoint yet"):
        again.sample(1)


# ---- lines ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ['{"step": 8, "epo', '{"step": 8}', "{", "\x00\x00\x00"])
def test_a_torn_last_line_is_left_out(torn: str, run: Run, digits: ImageData, tmp_path: Path) -> None:
    metrics = run.path / "metrics.jsonl"
    before = run.metrics
    with open(metrics, "a") as file:
        file.write(torn)
    assert load_run(run.path).metrics == before
    train(config(max_steps=8), digits, run.path, resume=True)
    straight = train(config(max_steps=8), digits, tmp_path / "straight")
    assert metrics.read_bytes() == (straight.path / "metrics.jsonl").read_bytes()


def test_a_broken_line_in_the_middle_is_named(run: Run, digits: ImageData) -> None:
    metrics = run.path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    with pytest.raises(RunError, match=r"metrics.jsonl: line 2 is not JSON.*restore the file or delete that line"):
        _ = load_run(run.path).metrics
    with pytest.raises(RunError, match=r"metrics.jsonl: line 2"):
        train(config(max_steps=8), digits, run.path, resume=True)


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"3\n", b"[]\n", b"null\n", b"{}\n"])
def test_a_line_that_is_no_record_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl: line 2"):
        cut_lines(path, 1)


def test_lines_and_grids_beyond_a_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    values = [0.1, 1e-320, 1e300, 1 / 3, -0.0, 2.5e-8]
    for step in range(1, 7):
        append_line(path, {"step": step, "value": values[step - 1]})
    whole = path.read_bytes().splitlines(keepends=True)
    for step in (6, 3, 0):
        cut_lines(path, step)
        assert path.read_bytes() == b"".join(whole[:step])
    for name in ("step-2.png", "step-10.png", "step-3.png", "mine.png"):
        (tmp_path / name).touch()
    cut_samples(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["mine.png", "step-2.png", "step-3.png"]


# ---- configuration --------------------------------------------------------------------------------------------------------------------------------


def rewrite(run: Run, old: str, new: str) -> None:
    path = run.path / "config.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch_size =", "batch_sise =", r"\[training\] unknown key 'batch_sise' \(did you mean 'batch_size'\?\)"),
        ("sha256 =", "sha265 =", r"\[data\] unknown key 'sha265' \(did you mean 'sha256'\?\)"),
        ("[training]", "[traning]", r"unknown key 'traning' \(did you mean 'training'\?\)"),
        ("batch_size = 16", 'batch_size = "16"', "batch_size.* is '16': an integer is needed"),
        ("batch_size = 16", "batch_size = true", "batch_size.* is True: an integer is needed"),
        ("batch_size = 16", "batch_size = 1", "batch_size.* is 1: it must be at least 2"),
        ("ema = 0.999", "ema = nan", "ema is nan: a finite number is needed"),
        ("ema = 0.999", "ema = 1.0", r"ema is 1.0: it must be in \[0, 1\)"),
        ('model = "gan"', 'model = "gam"', "model is 'gam': one of gan, wgan-gp, rpgan is needed"),
        ('kind = "adversarial"', 'kind = "adverbial"', "kind is 'adverbial'; known kinds: adversarial"),
        ("images = 200\n", "", r"\[data\] lacks images"),
        ("images = 200", "images = 200.5", "images is 200.5: an integer is needed"),
        ("[training]", "[training", "is not valid TOML"),
        ("seed = 0", "seed = 0\nseed = 1", "is not valid TOML"),
    ],
)
def test_the_configuration_is_read_strictly(old: str, new: str, said: str, run: Run) -> None:
    rewrite(run, old, new)
    with pytest.raises(RunError, match=rf"config.toml.*{said}"):
        load_run(run.path)


def test_a_configuration_that_is_not_text(run: Run) -> None:
    (run.path / "config.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="config.toml is not valid TOML"):
        load_run(run.path)


def test_the_environment_that_cannot_be_read(run: Run, digits: ImageData) -> None:
    for damage in ("{", "[]", '{"data_sha256": ""}'):
        (run.path / "env.json").write_text(damage)
        with pytest.raises(RunError, match="env.json cannot be read"):
            train(config(max_steps=8), digits, run.path, resume=True)


@given(
    source=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    learning_rate=st.floats(1e-300, 1e300, allow_subnormal=False),
    seed=st.integers(0, 2**63 - 1),
    max_steps=st.none() | st.integers(1, 10**9),
    beta1=st.none() | st.floats(0, 1, exclude_max=True),
    batch_norm=st.none() | st.booleans(),
    model=st.sampled_from(["gan", "wgan-gp", "rpgan"]),
)
@settings(max_examples=60, deadline=None)
def test_configurations_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, source: str, batch_norm: bool | None, **values: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip" / "config.toml"
    written = config(**values, generator_batch_norm=batch_norm), replace(RECORD, source=source)
    write_config(path, *written)
    assert read_config(path) == written
    assert written[0].resolve(200).resolve(999) == written[0].resolve(200)  # every value but max_steps is stated


@pytest.mark.parametrize("model", ADVERSARIAL_DEFAULTS)
def test_config_toml_states_every_value_used(model: str, digits: ImageData, tmp_path: Path) -> None:
    run = train(config(model=model, max_steps=1, device="auto", precision="auto"), digits, tmp_path / "run")
    stated = {k: v for k, v in asdict(run.config).items() if v is None}
    assert stated == {}
    assert run.config.device != "auto" and run.config.precision != "auto" and run.config.held_out == 20
    assert read_config(run.path / "config.toml")[1] == run.data


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"batch_size": 1}, {"latent_dim": 0}, {"learning_rate": 0.0}, {"ema": 1.0}, {"critic_steps": 0}, {"seed": -1}]
)
def test_values_out_of_range_are_named(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
        config(**changes)


# ---- randomness -----------------------------------------------------------------------------------------------------------------------------------


def test_streams_differ_and_do_not_change() -> None:
    seeds = {stream(seed, name, step) for seed in range(5) for name in ("step", "epoch") for step in range(50)}
    assert len(seeds) == 500 and all(0 <= s < 2**63 for s in seeds)
    assert stream(1, 23) != stream(12, 3) and stream(1, "a/b") == stream(1, "a", "b")
    assert stream(0, "networks") == 3193504189989053054  # changing this changes every run ever made


def test_fewer_codes_are_a_prefix_of_more() -> None:
    many = codes(0, "samples", 700, 3)
    assert all(torch.equal(codes(0, "samples", n, 3), many[:n]) for n in (1, 15, 16, 255, 256, 257, 512))
    assert abs(float(many.mean())) < 0.1 and abs(float(many.std()) - 1) < 0.1
    assert len(many.unique(dim=0)) == 700


# ---- kills ----------------------------------------------------------------------------------------------------------------------------------------


def campaign(folder: Path, kills: int, steps: int) -> dict[str, Any]:
    words = [sys.executable, KILL_RUNS, "--kills", kills, "--steps", steps, "--out", folder / "runs", "--results", folder / "result.json"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert record["complete"] and record["kills"] == kills and record["lost"] == record["different"] == 0
    assert record["inside_a_save"] >= kills // 2
    assert all(0 <= kill["step"] <= steps for kill in record["fell"])
    return record


def test_two_kills(tmp_path: Path) -> None:
    campaign(tmp_path, kills=2, steps=12)


@pytest.mark.slow
def test_twelve_kills(tmp_path: Path) -> None:
    assert {kill["kind"] for kill in campaign(tmp_path, kills=12, steps=60)["fell"]} == {"save", "file", "moment"}


def begin(folder: Path) -> Callable[[str], None]:
    def put(name: str) -> None:
        (folder / name).write_text("half of a fi")

    folder.mkdir()
    (folder / ".lock").touch()
    return put


def test_a_run_killed_while_its_configuration_was_written(digits: ImageData, tmp_path: Path) -> None:
    """Nothing is lost yet, and 'without a complete checkpoint it starts at 0'."""
    begin(tmp_path / "run")(".config.toml.12345")
    assert train(config(), digits, tmp_path / "run", resume=True).step == 6


def test_what_killed_writes_left_is_cleared(run: Run, digits: ImageData) -> None:
    left = [run.path / name for name in (".env.json.12345", ".metrics.jsonl.12345", ".config.toml.1", "samples/.step-6.png.77")]
    for path in left:
        path.write_text("half of a fi")
    train(config(max_steps=8), digits, run.path, resume=True)
    assert [path.name for path in left if path.exists()] == []
