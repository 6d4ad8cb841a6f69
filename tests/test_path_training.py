"""Training with a path weight: its visits and their guards, the contract of seeds and checkpoints, and that it does what it is for."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from periplus import AdversarialConfig, AutoencoderConfig, load_data, load_run, train
from periplus.data import ImageData
from periplus.errors import Interrupted, RunError, UsageError
from periplus.features import random_extractor
from periplus.locating import Search
from periplus.path_judge import judge_paths
from periplus.paths.loss import SPEED_LIMIT
from periplus.paths.starts import straight
from periplus.training import adversarial, autoencoder, path_term, stacked
from periplus.training.path_term import EVERY, NEAREST, PAIRS, SEGMENTS, PathTerm, typical_squared_distance

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


@pytest.mark.parametrize("guarded", [True, False])
def test_a_generator_that_has_nothing_but_the_term(guarded: bool, digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    """Held ends and middles that are drawn to blends of them: without a critic its images shrink towards one; the floor of Dist^2 ends that."""
    if not guarded:
        monkeypatch.setattr(path_term, "NEAREST", 0.0)
    term, generator = PathTerm(adversary(device="cpu"), digits), generator_of(3.0)
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)

    def squared_distance() -> float:
        z = torch.randn(2, 500, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return float((generator(z[0]) - generator(z[1])).flatten(1).square().sum(1).mean())

    before = squared_distance()
    torch.manual_seed(1)
    for _ in range(300):
        visit = term.visit_generator(generator)
        if visit is not None:
            optimizer.zero_grad()
            visit.scores.mean().backward()
            optimizer.step()
    shrunk = squared_distance() / before
    assert shrunk > 0.1 if guarded else shrunk < 0.06


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
    before = float(adversarial.path_loss(state, config, visit, fake).detach())
    free = dataclasses.replace(config, path_weight=0.0)
    realism = float(-state.critic(visit.inner()).mean().detach())
    assert float(adversarial.path_loss(state, free, visit, fake).detach()) == pytest.approx(realism, rel=1e-5)
    assert before - realism == pytest.approx(EVERY * float(visit.scores.mean().detach()), rel=1e-5)
    paired = adversarial.path_loss(state, dataclasses.replace(free, model="rpgan"), visit, fake[:5])  # fewer real images than images on paths
    assert bool(paired.isfinite())


def test_a_training_shows_its_paths_to_the_critic_and_to_the_generator(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At every fourth step the critic's fakes end in images on the paths that the generator pays for; at the others there is no path."""
    shown: list[torch.Tensor] = []
    paid: list[torch.Tensor | None] = []
    critic_step, generator_step = adversarial.critic_step, adversarial.generator_step

    def critic(state: Any, config: Any, real: torch.Tensor, fake: torch.Tensor, *others: Any) -> Any:
        shown.append(fake.detach().clone())
        return critic_step(state, config, real, fake, *others)

    def generator(state: Any, config: Any, real: torch.Tensor, fake: torch.Tensor, healthy: Any, visit: Any = None) -> Any:
        paid.append(None if visit is None else visit.inner().detach().clone())
        assert (visit is None) == torch.equal(shown[-1], fake.detach())  # what the generator's own loss is of is never replaced
        return generator_step(state, config, real, fake, healthy, visit)

    monkeypatch.setattr(path_term, "NEAREST", 0.0)
    monkeypatch.setattr(adversarial, "critic_step", critic)
    monkeypatch.setattr(adversarial, "generator_step", generator)
    train(adversary(max_steps=2 * EVERY), digits, tmp_path / "run")
    assert [inner is not None for inner in paid] == [True, False, False, False] * 2
    for images, inner in zip(shown, paid, strict=True):
        on_path = [] if inner is None else [bool((inner == image).flatten(1).all(1).any()) for image in images]
        assert sum(on_path) == (0 if inner is None else len(images) // 4) and (inner is None or all(on_path[-len(images) // 4 :]))


# ---- a critic on the path: what it holds, and what it cannot ---------------------------------------------------------------------------------

CIRCLE_PAIRS = 8


def on_a_circle(angle: torch.Tensor) -> torch.Tensor:
    """Images (..., 1, 1, 2) of two pixels on the unit circle: the real ones, whose blends are not."""
    return torch.stack([angle.cos(), angle.sin()], -1)[..., None, None, :]


def radius_of_paths(model: str, weight: float, shown: bool, steps: int = 400) -> float:
    """Pairs of opposite images, held; between them the images of a decoder that can do anything, at first on the circle, then along the gradient of
    weight * U~ + realism by a critic that learns beside them. Fakes are perfect. Returns the mean radius of the middles: 0 is the blend M."""
    torch.manual_seed(0)
    hidden = (nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2))
    critic = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 1), nn.Flatten(0))
    config = AdversarialConfig(model=model, device="cpu", precision="float32").resolve(1000)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9), fused=True)
    state = adversarial.State(critic, critic, critic, optimizer, optimizer, torch.zeros(7))
    arc = on_a_circle(2 * torch.pi * torch.rand(CIRCLE_PAIRS, 1) + torch.linspace(0, torch.pi, SEGMENTS + 1))
    points = straight(torch.zeros(CIRCLE_PAIRS, 3), torch.ones(CIRCLE_PAIRS, 3), SEGMENTS).float()
    free = nn.Parameter(arc[:, 1:-1].clone())
    descent, healthy, radii = torch.optim.Adam([free], lr=0.01, betas=(0.5, 0.9)), torch.ones((), dtype=torch.bool), []
    for _ in range(steps):
        visit = path_term.Visit(points, torch.cat([arc[:, :1], free, arc[:, -1:]], 1), arc[:, 0], arc[:, -1], "least")
        real, fake = (on_a_circle(2 * torch.pi * torch.rand(64)) for _ in range(2))
        _, healthy = adversarial.critic_step(state, config, real, adversarial.with_path_points(fake, visit) if shown else fake, healthy)
        loss = weight * visit.scores.mean() + adversarial.generator_loss(config, critic(visit.inner()), None)
        (free.grad,) = torch.autograd.grad(loss, free)
        descent.step()
        radii.append(float(free[:, 2:-2].detach().flatten(2).norm(dim=2).mean()))
    return sum(radii[-100:]) / 100


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_a_critic_that_has_seen_blends_keeps_paths_among_real_images(weight: float):
    """The guard is that it is shown them: a critic that learns of perfect fakes alone lets every path run through M."""
    assert radius_of_paths("gan", weight, shown=True) > 0.9
    assert radius_of_paths("gan", weight, shown=False) < 0.3


def test_a_critic_of_slope_one_holds_a_path_up_to_a_weight():
    """A gradient penalty limits what realism can cost, to a slope of 1: at equal steps c / Dist^2 = (r^2 + 1) / 2 on a circle of Dist = 2, so
    the weight's pull of 2 w r / N on an image is as strong as realism, 1 / (N - 1), at r = N / (2 w (N - 1)), and there the path stays."""
    for weight in (1.0, 2.0):
        assert radius_of_paths("wgan-gp", weight, shown=True, steps=600) == pytest.approx(SEGMENTS / (SEGMENTS - 1) / (2 * weight), rel=0.2)


# ---- what autoencoders pay ------------------------------------------------------------------------------------------------------------------


class OnALine(nn.Module):
    """The code of an image, (B, 1): -1 for one of two images, 1 for the other."""

    def __init__(self, x_a: torch.Tensor, x_b: torch.Tensor) -> None:
        super().__init__()
        self.x_a, self.unit = x_a, (x_b - x_a).abs().sum()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = 2 * (x - self.x_a).flatten(1).abs().sum(1, keepdim=True) / self.unit - 1
        return mean, torch.full_like(mean, -3.0)


class Table(nn.Module):
    """A decoder of one dimension that can do anything: images at equal steps of the code, from -1 to 1, at first those of a cross-fade."""

    def __init__(self, x_a: torch.Tensor, x_b: torch.Tensor, places: int = 33) -> None:
        super().__init__()
        t = torch.linspace(0, 1, places).view(-1, 1, 1, 1)
        self.images = nn.Parameter((1 - t) * x_a + t * x_b)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        at = ((z[..., 0] + 1) / 2).clamp(0, 1) * (len(self.images) - 1)
        before = at.floor().long().clamp(max=len(self.images) - 2)
        part = (at - before)[..., None, None, None]
        return (1 - part) * self.images[before] + part * self.images[before + 1]


def follow_the_path_loss(digits: ImageData, steps: int = 250) -> path_term.Visit:
    """What an autoencoder's path loss, and nothing else, makes of such a decoder between two digits: the last of its visits."""
    x_a, x_b = digits.images[:2, None].float() / 255
    networks = nn.ModuleDict({"encoder": OnALine(x_a, x_b), "decoder": Table(x_a, x_b)})
    config = coder(device="cpu", precision="float32", likelihood="gaussian", sigma=0.7, path_weight=1.0, latent_dim=1)
    optimizer = torch.optim.Adam(networks.parameters(), lr=0.02)
    state = autoencoder.State(networks, optimizer, torch.zeros(4))
    state.paths = PathTerm(config, digits)
    batch = torch.cat([x_a.expand(4, -1, -1, -1), x_b.expand(4, -1, -1, -1)])
    for _ in range(steps):
        optimizer.zero_grad()
        autoencoder.path_loss(state, config, batch).backward()
        optimizer.step()
    visit = state.paths.visit_decoder(lambda x: networks["encoder"](x)[0], networks["decoder"], batch)
    assert visit is not None
    return visit


@pytest.mark.parametrize("without", ["nothing", "RECONSTRUCTION", "SPEED"])
def test_an_autoencoders_decoder_that_could_do_anything(without: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch):
    """Without the errors of the ends one image M for every code; without the limit of speed exact ends, and M at once; with both neither."""
    if without != "nothing":
        monkeypatch.setattr(autoencoder, without, 0.0)
    visit = follow_the_path_loss(digits)
    step = float((visit.images.diff(dim=1).flatten(2).norm(dim=2).max(1).values / (visit.x_a - visit.x_b).flatten(1).norm(dim=1))[0].detach())
    ends, score = float(visit.end_errors[0].detach()), float(visit.scores[0].detach())
    if without == "RECONSTRUCTION":
        assert score < 1.01 and ends > 0.45
    elif without == "SPEED":
        assert score < 1.11 and ends < 0.05 and step > 0.4
    else:
        assert score < 4 / 3 and ends < 0.05 and step < 1.15 * SPEED_LIMIT / SEGMENTS


def test_what_an_autoencoder_pays_is_the_sum_of_three(digits: ImageData):
    from periplus.runs import build_networks

    config = coder(device="cpu", precision="float32", path_weight=3.0).resolve(len(digits))
    networks = build_networks(config, digits.shape)
    state = autoencoder.new_state(config, networks, "cpu")
    state.paths = PathTerm(config, digits)
    images = digits.images[:32].float() / 255
    visit = state.paths.visit_decoder(lambda x: state.networks["encoder"](x)[0], lambda z: autoencoder.decode(state, config, z), images)
    assert visit is not None
    parts = visit.scores + path_term.RECONSTRUCTION * visit.end_errors + path_term.SPEED * visit.speed_excess
    assert float(autoencoder.path_loss(state, config, images).detach()) == pytest.approx(3 * EVERY * float(parts.mean().detach()), rel=1e-5)


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


def test_a_decoder_that_does_not_pay_for_its_ends_has_none(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same in a training, by the judge: without the errors of the ends in the term the codes of held-out images decode to something else."""
    test, found = load_data("digits", split="test"), {}
    for name, factor in (("guarded", path_term.RECONSTRUCTION), ("unguarded", 0.0)):
        monkeypatch.setattr(autoencoder, "RECONSTRUCTION", factor)
        found[name] = judge_paths(train(coder(path_weight=40.0, **LONGER), digits, tmp_path / name), test, 8, segments=8)
    for error in ("end_error", "squared_error"):
        assert found["unguarded"][error]["mean"] > 1.4 * found["guarded"][error]["mean"]


@pytest.mark.parametrize(("images", "pairs"), [(8, 2), (30, 7), (36, 8), (37, 8)])
def test_few_images_are_judged_without_realism(images: int, pairs: int, digits: ImageData, tmp_path: Path) -> None:
    """Neighbours need more real images than there are neighbours, on both sides: with fewer there is no share, and no error."""
    run = train(adversary(path_weight=0.0, max_steps=1), digits, tmp_path / "run")
    few = digits.subset(torch.arange(images))
    record = judge_paths(run, few, pairs, Search(starts=1, keep="best"), segments=4, extractor=random_extractor(1))
    assert (record["realism"] is None) == (images < 37) and len(record["pairs"]) == pairs
