"""Training with a path weight: its visits and their guards, the contract of seeds and checkpoints, and that it does what it is for."""

import dataclasses
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from periplus import AdversarialConfig, AutoencoderConfig, cli, load_data, load_run, train
from periplus.data import ImageData
from periplus.errors import Interrupted, RunError, UsageError
from periplus.features import random_extractor
from periplus.locating import Search
from periplus.path_judge import judge_paths
from periplus.training import adversarial, autoencoder, path_term, stacked
from periplus.training.path_term import EVERY, NEAREST, PAIRS, PathTerm, typical_squared_distance

STEPS = 20
SMALL: dict[str, Any] = {"max_steps": STEPS, "batch_size": 32, "latent_dim": 6, "log_every": 5, "sample_every": 100, "checkpoint_every": 8, "seed": 3}


#: Longer, and with ends that are nearly exact.
LONGER: dict[str, Any] = {
    "max_steps": 500,
    "epochs": 80,
    "batch_size": 64,
    "latent_dim": 16,
    "hidden": 128,
    "beta": 0.01,
    "checkpoint_every": 500,
    "seed": 0,
}


def adversary(**changes: Any) -> AdversarialConfig:
    return AdversarialConfig(**{"model": "wgan-gp", "path_weight": 2.0, **SMALL, **changes})


def coder(**changes: Any) -> AutoencoderConfig:
    return AutoencoderConfig(**{"model": "vae", "path_weight": 2.0, "hidden": 64, **SMALL, **changes})


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / f"checkpoints/step-{STEPS}").iterdir())}


def stop_in_step(monkeypatch: pytest.MonkeyPatch, room: Any, name: str, step: int) -> None:
    real = getattr(room, name)

    def stopping(state: Any, *arguments: Any) -> Any:
        if state.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return real(state, *arguments)

    monkeypatch.setattr(room, name, stopping)


# ---- contracts ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [adversary(path_weight=0.0), coder(path_weight=0.0)], ids=["wgan-gp", "vae"])
def test_without_a_weight_nothing_of_it_runs(config: Any, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: object) -> None:
        raise AssertionError("the path term runs")

    monkeypatch.setattr(PathTerm, "__init__", never)
    run = train(config, digits, tmp_path / "run")
    assert not any(name.startswith("paths.") for name in run.checkpoint.tensors)
    assert "path_score" not in run.metrics[-1]


@pytest.mark.parametrize(
    ("config", "room", "name"),
    [
        (adversary(), adversarial, "train_step"),
        (adversary(model="rpgan", critic_steps=2), adversarial, "train_step"),
        (adversary(model="gan", path_objective="straight"), adversarial, "train_step"),
        (coder(), autoencoder, "autoencoder_step"),
        (coder(model="echo"), autoencoder, "autoencoder_step"),
    ],
    ids=["wgan-gp", "rpgan", "gan", "vae", "echo"],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(config: Any, room: Any, name: str, digits: ImageData, tmp_path: Path):
    train(config, digits, tmp_path / "whole")
    for step in (5, 14):
        with pytest.MonkeyPatch.context() as patch:
            stop_in_step(patch, room, name, step)
            with pytest.raises(Interrupted):
                train(config, digits, tmp_path / "parts", resume=True)
    train(config, digits, tmp_path / "parts", resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    lines = [(tmp_path / part / "metrics.jsonl").read_text() for part in ("whole", "parts")]
    assert lines[0] == lines[1] and "path_score" in lines[0]


def test_the_checkpoint_of_another_run_is_refused(digits: ImageData, tmp_path: Path):
    run = train(adversary(path_weight=0.0), digits, tmp_path / "run")
    with pytest.raises(RunError, match=r"lacks 'paths.sums'"):
        PathTerm(adversary(device="cpu"), digits).restore(run.checkpoint)


def test_the_configuration_is_kept_and_checked(digits: ImageData, tmp_path: Path):
    run = train(adversary(max_steps=2, path_objective="straight"), digits, tmp_path / "run")
    assert load_run(run.path).config.path_weight == 2.0 and load_run(run.path).config.path_objective == "straight"
    for cls in (adversary, coder):
        with pytest.raises(UsageError, match=r"path_weight.*zero or more"):
            cls(path_weight=-1.0)
        with pytest.raises(UsageError, match="path_objective"):
            cls(path_objective="bowed")


@pytest.mark.parametrize("config", [adversary(), coder()], ids=["wgan-gp", "vae"])
def test_stacks_refuse_it(config: Any):
    assert "path weight" in str(stacked.why_not([dataclasses.replace(config, seed=seed) for seed in (0, 1)]))


# ---- visits and their guards ----------------------------------------------------------------------------------------------------------------


def generator_of(scale: float, d: int = 6) -> nn.Module:
    """A smooth generator of 8 x 8 images whose outputs move by `scale`."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(d, 32), nn.Tanh(), nn.Linear(32, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    for parameter in module.parameters():
        parameter.data.mul_(scale)
    return module


def test_the_distance_of_real_pairs(digits: ImageData):
    """E ||x - x'||^2 = 2 tr Cov for independent x, x'."""
    flat = digits.images.flatten(1).double() / 255
    assert typical_squared_distance(digits, 0) == pytest.approx(2 * float(flat.var(0).sum()), rel=0.05)
    with pytest.raises(UsageError, match="all the same"):
        typical_squared_distance(ImageData(digits.images[:1].repeat(9, 1, 1, 1), None, (), "one", "train"), 0)


@pytest.mark.parametrize("guarded", [True, False])
def test_pairs_of_like_images_are_left_out(guarded: bool, digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    """A generator whose images hardly differ has no pair to be asked about; unguarded, its gradient is a hundred times that of another."""
    if not guarded:
        monkeypatch.setattr(path_term, "NEAREST", 0.0)
    term, gradients = PathTerm(adversary(device="cpu"), digits), []
    for scale in (3.0, 0.02):
        generator = generator_of(scale)
        visit = term.visit_generator(generator)
        if visit is None:
            gradients.append(None)
            continue
        assert not guarded or bool(((visit.x_a - visit.x_b).flatten(1).square().sum(1) >= term.nearest).all())
        (slope,) = torch.autograd.grad(visit.scores.mean(), visit.images)
        gradients.append(float(slope.norm()))
    far, near = gradients
    assert far is not None and (near is None if guarded else near is not None and near > 100 * far)
    assert NEAREST > 0 or not guarded


@pytest.mark.parametrize("objective", ["least", "straight"])
def test_the_ends_of_a_generated_pair_are_exact_and_held(objective: str, digits: ImageData):
    generator = generator_of(3.0)
    visit = PathTerm(adversary(device="cpu", path_objective=objective), digits).visit_generator(generator)
    assert visit is not None and 0 < len(visit.x_a) <= PAIRS and not visit.points.requires_grad
    torch.testing.assert_close(visit.x_a, generator(visit.points[:, 0]).detach())
    torch.testing.assert_close(visit.images, generator(visit.points.flatten(0, 1)).unflatten(0, visit.points.shape[:2]))
    assert float(visit.end_errors.detach().max()) == 0.0
    (slope,) = torch.autograd.grad(visit.scores.sum(), visit.images, retain_graph=True)
    assert float(slope[:, 0].abs().max()) > 0  # the price of an end is not the generator's to change:
    (whole,) = torch.autograd.grad(visit.scores.sum(), generator[0].weight, retain_graph=True)
    inner = visit.images[:, 1:-1]
    (alone,) = torch.autograd.grad(inner, generator[0].weight, slope[:, 1:-1])
    torch.testing.assert_close(whole, alone)


def test_a_few_steps_of_the_solver_make_paths_cheaper_than_lines(digits: ImageData):
    scores = {}
    for objective in ("least", "straight"):
        torch.manual_seed(0)
        visit = PathTerm(adversary(device="cpu", path_objective=objective), digits).visit_generator(generator_of(3.0, 6))
        assert visit is not None
        scores[objective] = dataclasses.replace(visit, objective="least").scores.detach()
    assert bool((scores["least"] <= scores["straight"] + 1e-6).all()) and float(scores["least"].mean()) < 0.985 * float(scores["straight"].mean())


def test_an_autoencoders_pairs_are_of_the_batch_and_different(digits: ImageData):
    images = digits.images[:40].float() / 255
    images[PAIRS] = images[0]  # the first pair
    encode, decode = nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), generator_of(3.0)
    visit = PathTerm(coder(device="cpu"), digits).visit_decoder(encode, decode, images)
    assert visit is not None and torch.equal(visit.x_a, images[1:PAIRS]) and torch.equal(visit.x_b, images[PAIRS + 1 : 2 * PAIRS])
    torch.testing.assert_close(visit.points[:, 0], encode(visit.x_a).detach())
    assert not visit.points.requires_grad and visit.images.requires_grad and float(visit.end_errors.detach().min()) > 0
    assert PathTerm(coder(device="cpu"), digits).visit_decoder(encode, decode, images[:1].repeat(9, 1, 1, 1)) is None


def test_the_critic_learns_of_images_along_paths(digits: ImageData):
    from periplus.networks import AdversarialNetworks
    from periplus.runs import build_networks

    config = adversary(device="cpu", path_weight=1.0).resolve(len(digits))
    state = adversarial.new_state(config, AdversarialNetworks(*build_networks(config, digits.shape)), "cpu")
    state.paths = PathTerm(config, digits)
    state.paths.nearest = 0.0  # an untrained generator's images are much alike
    visit = state.paths.visit_generator(state.generator)
    assert visit is not None
    fake = torch.rand(32, 1, 8, 8)
    shown = adversarial.with_path_points(fake, visit)
    assert shown.shape == fake.shape and torch.equal(shown[:24], fake[:24]) and not shown.requires_grad
    inner = visit.inner().detach()
    assert all(bool((inner == image).flatten(1).all(1).any()) for image in shown[24:])
    # and what the generator pays for them is its loss by that critic
    before = float(adversarial.path_loss(state, config, visit, None))
    free = dataclasses.replace(config, path_weight=0.0)
    realism = float(-state.critic(visit.inner()).mean())
    assert float(adversarial.path_loss(state, free, visit, None)) == pytest.approx(realism, rel=1e-5)
    assert before - realism == pytest.approx(EVERY * float(visit.scores.mean()), rel=1e-5)
    paired = adversarial.path_loss(state, dataclasses.replace(free, model="rpgan"), visit, torch.zeros(5))  # fewer real images than images on paths
    assert bool(paired.isfinite())


# ---- what it is for -------------------------------------------------------------------------------------------------------------------------


def test_it_lowers_the_score_that_the_judge_finds(digits: ImageData, tmp_path: Path):
    """An autoencoder's decoder, held-out pairs, codes and paths found anew; and not by jumping."""
    plain, cheap = (train(coder(path_weight=w, **LONGER), digits, tmp_path / f"{w}") for w in (0.0, 20.0))
    test = load_data("digits", split="test")
    found = [judge_paths(run, test, 8, segments=16) for run in (plain, cheap)]
    assert found[1]["excess"]["mean"] < 0.92 * found[0]["excess"]["mean"]
    assert found[1]["jump"]["mean"] < 0.15
    json.dumps(found)
    for record in found:
        assert all(pair["score"] >= 1 for pair in record["pairs"])
        seen = record["realism"]
        assert seen["floor"]["precision"] > 0.8 > seen["cross_fade"]["precision"] - 0.2
        assert "held-out pairs" in record["statements"][0]


def test_the_judge_on_the_command_line(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(adversary(max_steps=4), digits, tmp_path / "run")
    words = ["path", str(tmp_path / "run"), "--judge", "--n", "3", "--starts", "2", "--segments", "8"]
    monkeypatch.setattr(sys, "argv", ["periplus", *words])
    cli.run(words)
    assert "3 held-out pairs: U~ = " in capsys.readouterr().out
    found = json.loads((tmp_path / "run/paths/judge.json").read_text())
    assert found["command"] == shlex.join(["periplus", *words])
    assert found["settings"]["pairs"] == len(found["pairs"]) == 3 and found["realism"]["extractor"]["name"]
    assert found["excess"]["mean"] == pytest.approx(sum(pair["score"] for pair in found["pairs"]) / 3 - 1)
    with pytest.raises(UsageError, match="--judge takes the first"):
        cli.run([*words, "--pairs", "0,5"])


@pytest.mark.parametrize(("images", "pairs"), [(8, 2), (30, 7), (36, 8), (37, 8)])
def test_few_images_are_judged_without_realism(images: int, pairs: int, digits: ImageData, tmp_path: Path) -> None:
    """Neighbours need more real images than there are neighbours, on both sides: with fewer there is no share, and no error."""
    run = train(adversary(path_weight=0.0, max_steps=1), digits, tmp_path / "run")
    few = digits.subset(torch.arange(images))
    record = judge_paths(run, few, pairs, Search(starts=1, keep="best"), segments=4, extractor=random_extractor(1))
    assert (record["realism"] is None) == (images < 37) and len(record["pairs"]) == pairs
