"""Cells trained as one program are the cells trained one by one: same draws, same folders, whatever stops, resumes or breaks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from periplus import AutoencoderConfig, ImageData, load_run, train
from periplus.autoencoders import build_autoencoder
from periplus.errors import Interrupted, NonFiniteError, UsageError
from periplus.machine import environment
from periplus.runs import read_environment
from periplus.stacking import Affine, stack_modules
from periplus.training import cells as shared
from periplus.training import stacked
from periplus.training.interruption import StopRequest
from periplus.training.stacked import FrozenCells, train_stacked, why_not

BETAS = (0.1, 100.0)
KINDS: dict[str, dict[str, Any]] = {
    "vae prior": {"model": "vae"},
    "vae marginal": {"model": "vae", "rate": "marginal"},
    "echo": {"model": "echo"},
    "linear": {"model": "vae", "architecture": "linear", "likelihood": "gaussian"},
    "echo linear": {"model": "echo", "architecture": "linear", "likelihood": "gaussian"},
    "echo chain": {"model": "echo", "batch_size": 4},  # too few rows to close the ring: every batch goes on from the one before
    "deep cosine": {"model": "vae", "depth": 2, "schedule": "cosine"},
}

ENVIRONMENT = environment("cpu")


@pytest.fixture(autouse=True)
def one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking every package for its version takes as long as training one of these cells."""
    known = ENVIRONMENT.copy()
    monkeypatch.setattr("periplus.training.environment", lambda device: {**known, "threads": torch.get_num_threads()})


def cells(folder: Path, steps: int = 20, betas: tuple[float, ...] = BETAS, **values: Any) -> list[stacked.Cell]:
    common = {"batch_size": 64, "latent_dim": 8, "hidden": 24, "log_every": 5, "sample_every": 10, "checkpoint_every": 15, "max_steps": steps}
    configs = [AutoencoderConfig(**{**common, "beta": beta, "seed": seed, **values}) for beta in betas for seed in (0, 1)]
    return [(config, folder / f"beta={config.beta:g},seed={config.seed}") for config in configs]


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is to be the same bits: not the times, not the sessions."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "timing.jsonl", "env.json")
    }


def same_run(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    """Two folders hold the same run up to rounding."""
    assert {str(p.relative_to(a)) for p in a.rglob("*")} == {str(p.relative_to(b)) for p in b.rglob("*")}
    assert (a / "config.toml").read_bytes() == (b / "config.toml").read_bytes()
    one, other = load_run(a), load_run(b)
    assert one.checkpoint.values == other.checkpoint.values and one.step == other.step
    assert one.checkpoint.tensors.keys() == other.checkpoint.tensors.keys()
    for name, tensor in one.checkpoint.tensors.items():
        wanted = other.checkpoint.tensors[name]
        assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape, name
        assert relative_difference(tensor, wanted) < tolerance, name
    for line, wanted_line in zip(one.metrics, other.metrics, strict=True):
        assert line == {name: pytest.approx(value, rel=tolerance, abs=1e-5) for name, value in wanted_line.items()}


# ---- the same cells -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_is_the_run_trained_by_itself(kind: str, digits: ImageData, tmp_path: Path) -> None:
    together, alone = cells(tmp_path / "together", **KINDS[kind]), cells(tmp_path / "alone", **KINDS[kind])
    train_stacked(together, digits)
    for (config, folder), (_, expected) in zip(together, alone, strict=True):
        train(config, digits, expected)
        same_run(folder, expected)
    ends = [(folder / "metrics.jsonl").read_bytes() for _, folder in together]
    assert len(set(ends)) == len(ends), "cells differ among themselves"


def test_an_echo_ring_is_lengthened_for_each_cell_by_its_own_draws(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a tiny batch and a wide code trips the guard at step 0, where log and grid then go on with the generator."""
    values = {"model": "echo", "batch_size": 4, "latent_dim": 8, "log_every": 1, "sample_every": 1}
    together, alone = cells(tmp_path / "together", 3, (1.0,), **values), cells(tmp_path / "alone", 3, (1.0,), **values)
    laps: list[int] = []
    lengthen = stacked.EchoChannel.laps
    monkeypatch.setattr(stacked.EchoChannel, "laps", lambda self, log_scale: laps.append(lengthen(self, log_scale)) or laps[-1])
    train_stacked(together, digits)
    assert max(laps[:2]) > 1
    for (config, folder), (_, expected) in zip(together, alone, strict=True):
        train(config, digits, expected)
        same_run(folder, expected)
        assert contents(folder).keys() == contents(expected).keys()
        assert (folder / "samples" / "step-1.png").read_bytes() == (expected / "samples" / "step-1.png").read_bytes()


def test_a_cell_goes_on_alone_where_the_stack_left_it(digits: ImageData, tmp_path: Path) -> None:
    config, folder = cells(tmp_path / "together", 10)[2]
    train_stacked(cells(tmp_path / "together", 10), digits)
    longer = AutoencoderConfig(**{**vars(config), "max_steps": 25})
    train(longer, digits, folder, resume=True)
    train(longer, digits, tmp_path / "whole")
    assert relative_difference(*(load_run(f).checkpoint.tensors["encoder.body.0.weight"] for f in (folder, tmp_path / "whole"))) < 1e-5


def test_stacked_modules_compute_what_each_module_does() -> None:
    for architecture, clip in (("mlp", None), ("mlp", 0.99), ("linear", None), ("linear", 0.99)):
        pairs = [build_autoencoder(architecture, (1, 3, 4), 2, hidden=5, depth=2, clip=clip) for _ in range(3)]
        encoder, decoder = (stack_modules([pair[k] for pair in pairs]) for k in (0, 1))
        images = torch.rand(3, 7, 1, 3, 4)
        mean, log_scale = encoder(images.flatten(0, 1))
        output = decoder(mean).view(3, 7, 1, 3, 4)
        assert [name for name, _ in encoder.named_parameters()] == [name for name, _ in pairs[0].encoder.named_parameters()]
        for c, pair in enumerate(pairs):
            expected = pair.encoder(images[c])
            assert torch.allclose(mean.view(3, 7, 2)[c], expected[0], atol=1e-6)
            assert torch.allclose(log_scale.view(3, 7, 2)[c], expected[1], atol=1e-6)
            assert torch.allclose(output[c], pair.decoder(expected[0]), atol=1e-6)


def test_the_affine_layers_own_backward_is_right() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=draw, requires_grad=True) for shape in ((3, 4, 2), (3, 5, 2), (3, 5)))
    assert torch.autograd.gradcheck(Affine.apply, (x, weight, bias))


# ---- stopping -------------------------------------------------------------------------------------------------------------------------------


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal after so many steps."""
    taken = stacked.stacked_step
    requests: list[StopRequest] = []

    class Request(StopRequest):
        def __init__(self) -> None:
            super().__init__()
            requests.append(self)

    def counted(stack: Any, loss: Any, number: int, healthy: Tensor) -> Any:
        if number == step - 1:
            requests[-1].requested = "SIGTERM"
        return taken(stack, loss, number, healthy)

    monkeypatch.setattr(shared, "StopRequest", Request)
    monkeypatch.setattr(stacked, "stacked_step", counted)


@pytest.mark.parametrize(("kind", "step"), [("vae prior", 7), ("vae marginal", 15), ("echo", 7), ("echo chain", 1), ("echo chain", 7)])
def test_stopping_and_going_on_gives_the_same_bits(kind: str, step: int, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, hurt = cells(tmp_path / "whole", **KINDS[kind]), cells(tmp_path / "hurt", **KINDS[kind])
    train_stacked(whole, digits)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step} of 20"):
            train_stacked(hurt, digits)
    assert [load_run(folder).step for _, folder in hurt] == [step] * len(hurt)
    train_stacked(hurt, digits, resume=True)
    for (_, folder), (_, expected) in zip(hurt, whole, strict=True):
        assert contents(folder) == contents(expected)


def test_finished_cells_are_left_out_and_others_are_brought_to_the_end(digits: ImageData, tmp_path: Path) -> None:
    whole, hurt = cells(tmp_path / "whole"), cells(tmp_path / "hurt")
    train_stacked(whole, digits)
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    behind, absent, done = (folder for _, folder in hurt[:3])
    shutil.rmtree(behind / "checkpoints" / "step-20")
    shutil.rmtree(absent)
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    train_stacked(hurt, digits, resume=True)
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*")} == before
    for (_, folder), (_, expected) in zip(hurt, whole, strict=True):
        same_run(folder, expected, 1e-6)
    assert [session["stacked_cells"] for session in read_environment(behind)] == [4, 1]


# ---- one that breaks ------------------------------------------------------------------------------------------------------------------------


def break_cell(cell: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a number in one weight of one cell before a step."""
    taken = stacked.stacked_step

    def broken(stack: Any, loss: Any, number: int, healthy: Tensor) -> Any:
        if number == step:
            with torch.no_grad():
                stack.networks["decoder"].head.weight[cell, 0, 0] = math.nan
        return taken(stack, loss, number, healthy)

    monkeypatch.setattr(stacked, "stacked_step", broken)


@pytest.mark.parametrize("kind", ["vae prior", "vae marginal", "echo"])
@pytest.mark.parametrize("cell", [0, 3])
def test_a_cell_that_breaks_does_not_touch_the_others(
    kind: str, cell: int, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, hurt = cells(tmp_path / "whole", **KINDS[kind]), cells(tmp_path / "hurt", **KINDS[kind])
    train_stacked(whole, digits)
    with monkeypatch.context() as patch:
        break_cell(cell, 17, patch)
        with pytest.raises(NonFiniteError) as caught:
            train_stacked(hurt, digits)
    name = hurt[cell][1].name
    assert isinstance(caught.value, FrozenCells) and list(caught.value.lines) == [hurt[cell][1]]
    assert str(caught.value).startswith(f"1 of 4 cells stopped: {name}; ") and "by step 18" in str(caught.value) and caught.value.exit_code == 5
    for k, ((_, folder), (_, expected)) in enumerate(zip(hurt, whole, strict=True)):
        if k != cell:
            assert contents(folder) == contents(expected)
    broken = load_run(hurt[cell][1])
    assert broken.step == 15 and [line["step"] for line in broken.metrics] == [5, 10, 15], "the last good checkpoint, and nothing after it"
    train_stacked(hurt, digits, resume=True)
    same_run(hurt[cell][1], whole[cell][1], 1e-6)


# ---- what is refused, and what is told ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_stacked_is_refused_in_words(digits: ImageData, tmp_path: Path) -> None:
    one = AutoencoderConfig()
    assert why_not([one, AutoencoderConfig(beta=3.0, seed=7)]) is None
    assert "learning_rate" in str(why_not([one, AutoencoderConfig(learning_rate=1.0)]))
    assert "conv" in str(why_not([AutoencoderConfig(architecture="conv")]))
    assert "float32" in str(why_not([AutoencoderConfig(precision="bfloat16")]))
    with pytest.raises(UsageError, match="cells differ in hidden"):
        train_stacked([(one, tmp_path / "a"), (AutoencoderConfig(hidden=3), tmp_path / "b")], digits)
    assert not list(tmp_path.iterdir())
    train_stacked(cells(tmp_path, 1), digits)
    with pytest.raises(UsageError, match="holds a run already"):
        train_stacked(cells(tmp_path, 1), digits)


def test_times_are_shares_and_say_so(digits: ImageData, tmp_path: Path) -> None:
    told: list[Any] = []
    train_stacked(cells(tmp_path, 10), digits, on_progress=told.append)
    assert [p.step for p in told] == [5, 10]
    for _, folder in cells(tmp_path):
        lines = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [5, 10] and {line["cells"] for line in lines} == {4}
        assert read_environment(folder)[0]["stacked_cells"] == 4


def test_the_clock_gives_a_cell_its_share(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((100.0, 112.0))
    monkeypatch.setattr(shared.time, "perf_counter", lambda: next(now))
    config, folder = cells(tmp_path)[0]
    monkeypatch.setattr("periplus.training.journal.time.perf_counter", lambda: next(now))
    folder.mkdir(parents=True)
    clock = shared.ShareClock(folder, config, 1000, 0)
    clock.cells = 6
    assert clock.lap(10) == 10 * 64 / 2.0
    assert json.loads((folder / "timing.jsonl").read_text()) == {"step": 10, "seconds": 2.0, "images_per_second": 320.0, "cells": 6}
