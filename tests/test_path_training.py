"""Training with a path weight: the bank of warm paths, its guards, the contract of seeds and checkpoints, and that it does what it is for."""

import dataclasses
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from periplus import AdversarialConfig, AutoencoderConfig, cli, load_data, load_run, train
from periplus.data import ImageData
from periplus.errors import Interrupted, RunError, UsageError
from periplus.path_judge import judge_paths
from periplus.training import adversarial, autoencoder, path_bank, stacked
from periplus.training.path_bank import FRESH, PathBank, Visit, draw_pairs, into_ball, radius

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

    monkeypatch.setattr(PathBank, "__init__", never)
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


def test_the_bank_of_another_run_is_refused(digits: ImageData, tmp_path: Path):
    run = train(adversary(path_weight=0.0), digits, tmp_path / "run")
    bank = PathBank(adversary(device="cpu"), digits)
    with pytest.raises(RunError, match=r"lacks 'paths.codes'"):
        bank.restore(run.checkpoint)


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


# ---- guards of the bank ---------------------------------------------------------------------------------------------------------------------


def test_pairs_are_real_and_different(digits: ImageData):
    few = digits.images[:2].repeat(40, 1, 1, 1)
    a, b = draw_pairs(ImageData(few, None, (), "twice", "train"), 0)
    assert 0 < len(a) < 40 and bool((a != b).flatten(1).any(1).all())
    with pytest.raises(UsageError, match="all the same"):
        draw_pairs(ImageData(few[:1].repeat(9, 1, 1, 1), None, (), "one", "train"), 0)
    a, _ = draw_pairs(digits, 0)
    assert all(bool((digits.images == x).flatten(1).all(1).any()) for x in a[:5])


class Steep(nn.Module):
    """Reaches the image 1 only at infinity."""

    def forward(self, z: Tensor) -> Tensor:
        return z.sum(-1, keepdim=True).sigmoid().expand(-1, 4).unflatten(-1, (1, 2, 2))


@pytest.mark.parametrize("guarded", [True, False])
def test_codes_keep_to_the_prior(guarded: bool, monkeypatch: pytest.MonkeyPatch):
    """The prior's ball holds codes that would run away; without it they do."""
    if not guarded:
        monkeypatch.setattr(path_bank, "into_ball", lambda z: z)
    images = torch.cat([torch.full((8, 1, 2, 2), 255), torch.zeros(8, 1, 2, 2)]).to(torch.uint8)
    torch.manual_seed(0)
    bank = PathBank(adversary(device="cpu", latent_dim=2), ImageData(images, None, (), "two", "train"))
    for step in range(0, 400, 4):
        bank.visit_generator(Steep(), step)
    assert (float(bank.codes.norm(dim=-1).max()) <= radius(2) * 1.0001) is guarded


def test_the_ball_holds_the_prior():
    z = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    moved = (into_ball(z) != z).any(1).double().mean()
    assert float(moved) == pytest.approx(1e-3, abs=4 * (1e-3 / 20_000) ** 0.5)


def a_visit(state: adversarial.State, config: AdversarialConfig, digits: ImageData) -> Visit:
    torch.manual_seed(0)
    assert state.paths is not None
    return state.paths.visit_generator(state.generator, 0)


def test_the_critic_learns_of_images_along_paths(digits: ImageData):
    from periplus.networks import AdversarialNetworks
    from periplus.runs import build_networks

    config = adversary(device="cpu", path_weight=1.0).resolve(len(digits))
    state = adversarial.new_state(config, AdversarialNetworks(*build_networks(config, digits.shape)), "cpu")
    state.paths = PathBank(config, digits)
    visit = a_visit(state, config, digits)
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
    price = float(visit.scores.mean() + path_bank.RECONSTRUCTION * visit.end_errors.mean())
    assert before - realism == pytest.approx(path_bank.EVERY * price, rel=1e-5)


def test_codes_and_paths_are_held_while_the_decoder_learns(digits: ImageData):
    bank = PathBank(adversary(device="cpu"), digits)
    decoder = nn.Sequential(nn.Linear(6, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    torch.manual_seed(0)
    visit = bank.visit_generator(decoder, 0)
    assert not visit.points.requires_grad and visit.images.requires_grad and not bank.codes.requires_grad


def test_warm_paths_and_codes_get_better(digits: ImageData):
    """For a decoder that stands still: every round of visits leaves nearer ends and no dearer paths."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    for parameter in decoder.parameters():
        parameter.data.mul_(3)
    bank = PathBank(adversary(device="cpu"), digits)
    bank.x_a, bank.x_b = bank.x_a[:12], bank.x_b[:12]
    told = []
    for step in range(0, 160, 4):
        torch.manual_seed(step)
        visit = bank.visit_generator(decoder, step)
        told.append((float(visit.end_errors.mean()), visit.scores.mean()))
    assert told[-1][0] < 0.97 * told[1][0]
    line = dataclasses.replace(visit, objective="straight")
    assert float(visit.scores.mean()) < float(dataclasses.replace(line, points=visit.points).scores.mean()) + 0.05
    assert float(bank.offsets[:12].abs().max()) > 0.01 and FRESH > 0


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
