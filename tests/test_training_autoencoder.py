"""The autoencoder loop: closed forms that only a right loop reaches, the extremes of beta, bits that repeat, and what a run tells of its codes."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from periplus import (
    AutoencoderConfig,
    ImageData,
    Interrupted,
    NonFiniteError,
    Run,
    RunError,
    UsageError,
    load_data,
    load_run,
    machine,
    runs,
    seeds,
    train,
)
from periplus.channels import EchoChannel, echo_moments
from periplus.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from periplus.information import batch_rate, marginal_rate
from periplus.networks import MLPGenerator
from periplus.objectives import bernoulli_distortion, gaussian_distortion
from periplus.training import autoencoder, plan
from periplus.training.steps import Batches, apply_gradients

torch.set_num_threads(1)
STEPS = 12
VERSIONS = machine.versions()
MODELS: dict[str, dict[str, Any]] = {
    "prior": {"model": "vae"},
    "marginal": {"model": "vae", "rate": "marginal", "schedule": "cosine"},
    "echo": {"model": "echo", "beta": 4.0},
    "conv": {"model": "vae", "architecture": "conv", "likelihood": "gaussian", "hidden": 8},
}


@pytest.fixture(scope="session")
def few_digits() -> ImageData:
    """Two hundred digits: 180 to train on, so that twelve batches of sixteen cross into a second epoch."""
    return load_data("digits").subset(range(200))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(machine, "versions", lambda: VERSIONS)  # 70 ms each time
    monkeypatch.setattr(machine, "commit", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def config(name: str = "prior", **changes: Any) -> AutoencoderConfig:
    few = {"batch_size": 16, "latent_dim": 4, "hidden": 24, "max_steps": STEPS, "log_every": 5, "sample_every": 6, "checkpoint_every": 4, "seed": 3}
    return AutoencoderConfig(**{"device": "cpu", "precision": "float32", **few, **MODELS[name], **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run that are a function of its configuration and data."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in sorted(files.items()) if name not in (".lock", "env.json", "timing.jsonl")}


def assert_same(folder: Path, reference: Path) -> None:
    found, expected = contents(folder), contents(reference)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def reference(few_digits: ImageData, reference_folder: Path) -> Callable[..., Path]:
    """The folder of an uninterrupted run; each is trained once per session, and nobody writes in it."""

    def make(name: str, **changes: Any) -> Path:
        folder = reference_folder / "-".join([name, *(f"{k}={v}" for k, v in sorted(changes.items()))])
        if not folder.exists():
            train(config(name, **changes), few_digits, folder)
        return folder

    return make


class Stops:
    """Sends this process a signal in the middle of chosen steps, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[int, signal.Signals] = {}
        original = autoencoder.autoencoder_step

        def patched(state: autoencoder.State, *arguments: Any) -> Any:
            if state.step + 1 in self.steps:
                os.kill(os.getpid(), self.steps.pop(state.step + 1))
            return original(state, *arguments)

        monkeypatch.setattr(autoencoder, "autoencoder_step", patched)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    return Stops(monkeypatch)


def quiet(**changes: Any) -> dict[str, Any]:
    """Settings of a run that is trained to its end and measured, and that writes little."""
    return {"held_out": 0, "max_steps": None, "log_every": 10_000, "sample_every": 10**6, "checkpoint_every": 10**6, "seed": 0, **changes}


# ---- the loop arrives where the closed forms say ----------------------------------------------------------------------------------------------


def pixels(data: ImageData) -> Tensor:
    return data.images.double().flatten(1) / 255


@pytest.mark.parametrize(("beta", "epochs"), [(0.5, 600), (0.1, 800)])
def test_a_linear_gaussian_autoencoder_reaches_reverse_water_filling(beta: float, epochs: int, digits: ImageData, tmp_path: Path) -> None:
    """D_i = min(theta, var_i), R = sum ln(var_i / D_i) / 2, theta = beta / 2, within one percent, from the run's own encoder and decoder.

    Rate and distortion of a linear Gaussian autoencoder depend on the data's second moments alone, so this holds for digits as for Gaussian data.
    """
    x, theta = pixels(digits), beta / 2
    centred = x - x.mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / len(x)).clamp(min=1e-12)
    d = variances.clamp(max=theta)
    distortion, rate, used = float(d.sum()), float(0.5 * (variances / d).log().sum()), int((variances > theta).sum())
    model = {"likelihood": "gaussian", "architecture": "linear", "latent_dim": used + 2, "beta": beta}
    fast = {"epochs": epochs, "batch_size": len(x), "learning_rate": 0.05, "beta2": 0.9, "schedule": "cosine"}
    run = train(config(**quiet(**model, **fast)), digits, tmp_path / "run")
    mean, log_scale = run.encode(digits.images)
    noise = (2 * log_scale.double()).exp().mean(0) @ run.decoder.head.weight.double().square().sum(0)  # type: ignore[union-attr]
    found = float((x - run.decode(mean).flatten(1)).square().sum(1).mean() + noise)
    assert found == pytest.approx(distortion, rel=0.01)
    assert float(run.channel.rate(mean, log_scale).mean()) == pytest.approx(rate, rel=0.01)
    # and the loss, which nothing can beat, to a tenth of that
    assert 0 <= (found + beta * float(run.channel.rate(mean, log_scale).mean())) / (distortion + beta * rate) - 1 < 0.004


def constant_distortion(data: ImageData, likelihood: str) -> float:
    """Of the best constant decoder."""
    x = pixels(data)
    p = x.mean(0)
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).sum()) if likelihood == "bernoulli" else float((x - p).square().sum(1).mean())


def measured(run: Run, data: ImageData) -> tuple[float, float, int]:
    """(distortion, rate, active units) on images, by what the run's own networks say."""
    mean, log_scale = run.encode(data.images)
    z = run.channel.sample(mean, log_scale, torch.Generator().manual_seed(0))
    distortion = autoencoder.distortion_of(run.config, run.decoder(z), data.images / 255)  # type: ignore[arg-type]
    if run.config.rate == "marginal":  # type: ignore[union-attr]
        rate = marginal_rate(mean, log_scale, generator=torch.Generator().manual_seed(0)).value
    else:
        rate = float(run.channel.rate(mean, log_scale).mean())
    return float(distortion.mean()), rate, int((mean.var(0) > 0.01).sum())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(("name", "most"), [("prior", 0.01), ("marginal", 0.01), ("echo", 0.5)])
def test_an_enormous_beta_leaves_the_best_constant(name: str, most: float, likelihood: str, digits: ImageData, tmp_path: Path) -> None:
    """The rate goes to its floor (0.32 nat for echo: 32 dimensions clipped at 0.99), and the decoder to the mean image. At batch 100 the ring of an
    echo channel cannot be closed then: the chain is at work."""
    model = {"beta": 1e4, "likelihood": likelihood, "latent_dim": 32, "hidden": 48}
    fast = {"epochs": 40, "batch_size": 100, "learning_rate": 3e-3, "schedule": "cosine"}
    run = train(config(name, **quiet(**model, **fast)), digits, tmp_path / "run")
    distortion, rate, active = measured(run, digits)
    assert distortion == pytest.approx(constant_distortion(digits, likelihood), rel=0.01)
    assert -0.002 < rate < most and active == 0
    if name == "echo":
        assert rate > -32 * math.log(0.99)
        mean, log_scale = run.encode(digits.images[:100])
        assert not bool(EchoChannel().holds(log_scale)) and run.checkpoint.tensors["chain"].shape == (32,)


@pytest.mark.parametrize("name", ["prior", "echo"])
def test_a_tiny_beta_buys_distortion_with_rate(name: str, digits: ImageData, tmp_path: Path) -> None:
    """The rate is far above, the distortion far below that at beta = 1; never below the grey pixels' own entropy, which no code removes."""
    fast = {"epochs": 40, "batch_size": 100, "learning_rate": 3e-3, "latent_dim": 16, "hidden": 64}
    rates, distortions = [], []
    for beta in (1.0, 1e-3):
        d, r, _ = measured(train(config(name, **quiet(beta=beta, **fast)), digits, tmp_path / f"{beta}"), digits)
        distortions.append(d)
        rates.append(r)
    x = pixels(digits)
    floor = float(-(torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(1).mean())
    assert floor < distortions[1] < floor + 0.4 * (distortions[0] - floor)
    assert rates[1] > 3 * rates[0] + 10


# ---- one step ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("prior", {"beta": 0.7}),
        ("prior", {"likelihood": "gaussian", "sigma": 0.3}),
        ("marginal", {"beta": 2.0, "schedule": "constant"}),
        ("echo", {}),
    ],
)
def test_the_steps_are_those_of_a_plain_loop(name: str, changes: dict[str, Any], few_digits: ImageData, tmp_path: Path) -> None:
    """Three steps written out with .backward() and torch.optim.Adam, from the same weights and random numbers."""
    training = config(name, max_steps=3, held_out=0, **changes)
    echo = training.model == "echo"
    pair = runs.build_networks(training.resolve(200), (1, 8, 8))
    mine = copy.deepcopy(pair)
    start = [p.detach().clone() for half in mine for p in half.parameters()]
    run = train(training, few_digits, tmp_path / "run", networks=(pair[0], pair[1]))
    batches, optimizer = Batches(few_digits.images, 16, seed=3), torch.optim.Adam([p for half in mine for p in half.parameters()], lr=1e-3)
    channel, chain, sigma = EchoChannel(clip=0.99), None, training.sigma or 0.5**0.5
    for step in range(3):
        torch.manual_seed(seeds.stream(3, "step", step))
        x = batches(step)
        mean, log_scale = mine[0](x)
        if echo:
            z, chain = channel.advance(mean, log_scale, chain)
            rate = -log_scale.sum(1)
        else:
            z = mean + log_scale.exp() * torch.randn(16, 4)
            rate = (0.5 * (mean**2 + (2 * log_scale).exp() - 1) - log_scale).sum(1)
        if name == "marginal":
            rate = batch_rate(z, mean, log_scale, "stratified", 200)
        output = mine[1](z)
        if training.likelihood == "gaussian":
            distortion = ((x - output) ** 2).sum((1, 2, 3)) / (2 * sigma**2)
        else:
            distortion = nn.functional.binary_cross_entropy_with_logits(output, x, reduction="none").sum((1, 2, 3))
        optimizer.zero_grad()
        (distortion.mean() + training.beta * rate.mean()).backward()
        optimizer.step()
    tensors = run.checkpoint.tensors
    names = [f"{part}.{k}" for part, half in zip(("encoder", "decoder"), mine, strict=True) for k, _ in half.named_parameters()]
    ours = torch.cat([(tensors[k] - p).flatten() for k, p in zip(names, start, strict=True)])
    theirs = torch.cat(
        [(p.detach() - q).flatten() for half in [[*mine[0].parameters(), *mine[1].parameters()]] for p, q in zip(half, start, strict=True)]
    )
    assert float(theirs.abs().max()) > 2e-3
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    if echo:
        torch.testing.assert_close(tensors["chain"], chain, rtol=1e-3, atol=1e-3)


def test_lines_of_metrics_are_means_over_their_window(few_digits: ImageData, tmp_path: Path, reference: Callable[..., Path]) -> None:
    each = train(config("echo", log_every=1), few_digits, tmp_path / "run").metrics
    lines = load_run(reference("echo")).metrics
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line, (first, last) in zip(lines, [(0, 5), (5, 10), (10, 12)], strict=True):
        for name in autoencoder.MEASURES:
            assert line[name] == pytest.approx(sum(e[name] for e in each[first:last]) / (last - first), rel=1e-9)
        assert line["loss"] == pytest.approx(line["distortion"] + 4 * line["rate"], rel=1e-5)
        assert line["rate_held_out"] == each[last - 1]["rate_held_out"]  # of the moment, not of the window


def test_what_is_watched_is_what_the_run_says_of_held_out_images(few_digits: ImageData, reference: Callable[..., Path]) -> None:
    run = load_run(reference("echo"))
    held_out = few_digits.split_off(20, seeds.stream(3, "held-out"))[1]
    assert run.config.held_out == 20
    assert run.metrics[-1]["rate_held_out"] == pytest.approx(float(run.channel.rate(*run.encode(held_out.images)).mean()), rel=1e-5)


def test_a_cosine_ends_at_nothing(few_digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def spy(optimizer: torch.optim.Adam, *arguments: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return apply_gradients(optimizer, *arguments)

    monkeypatch.setattr(autoencoder, "apply_gradients", spy)
    train(config(schedule="cosine"), few_digits, tmp_path / "cosine")
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * n / 12)) / 2 for n in range(12)])
    rates.clear()
    train(config(), few_digits, tmp_path / "constant")
    assert rates == [1e-3] * 12


# ---- the same seed, stopping and going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_bits(name: str, few_digits: ImageData, tmp_path: Path, reference: Callable[..., Path]) -> None:
    torch.manual_seed(random.randrange(2**40))
    before = torch.get_rng_state()
    train(config(name), few_digits, tmp_path / "again")
    assert torch.equal(before, torch.get_rng_state())
    assert_same(tmp_path / "again", reference(name))
    assert {"config.toml", "metrics.jsonl", "samples/step-6.png", "samples/step-12.png"} <= contents(tmp_path / "again").keys()
    tensors, others = (load_checkpoint(folder / "checkpoints/step-12").tensors for folder in (reference(name), reference(name, seed=4)))
    for key in (key for key in tensors if torch.equal(tensors[key], others[key])):  # counts are, and what is zero for every seed
        assert key.endswith(".step") or not bool(tensors[key].any()), key
    assert ("chain" in tensors) == (name == "echo") and ("marginal.mean" in tensors) == (name in ("echo", "marginal"))


@pytest.mark.parametrize(("name", "steps"), [("prior", (1, 7)), ("marginal", (4, 6, 11)), ("echo", (1, 3, 5, 6, 9, 11)), ("conv", (2,))])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    name: str, steps: tuple[int, ...], few_digits: ImageData, tmp_path: Path, reference: Callable[..., Path], stops: Stops
) -> None:
    expected = reference(name)
    for step in steps:
        number = signal.SIGINT if step % 2 else signal.SIGTERM
        stops.steps[step] = number
        with pytest.raises(Interrupted, match=f"stopped by {number.name} at step {step} of {STEPS}"):
            train(config(name), few_digits, tmp_path / "run", resume=True)
    train(config(name), few_digits, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", expected)


def test_the_chain_of_these_echo_runs_is_at_work(reference: Callable[..., Path], few_digits: ImageData) -> None:
    """Sixteen rows at scales of a half cannot close a ring: the guard trips, and the state that the checkpoint keeps decides the next codes."""
    run = load_run(reference("echo"))
    mean, log_scale = run.encode(few_digits.images[:16])
    assert not bool(EchoChannel().holds(log_scale))
    chain, draws = run.checkpoint.tensors["chain"], []
    for state in (chain, chain + 1):
        draws.append(run.channel.advance(mean, log_scale, state, torch.Generator().manual_seed(0))[0])  # type: ignore[union-attr]
    assert float((draws[0] - draws[1]).abs().max()) > 0.1


def test_a_crash_between_checkpoints_goes_back_to_the_last_one(
    few_digits: ImageData, tmp_path: Path, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, step = reference("echo", log_every=1, sample_every=1), autoencoder.autoencoder_step

    def crash(state: autoencoder.State, *arguments: Any) -> Any:
        if state.step == 7:
            raise OSError("the plug was pulled")
        return step(state, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the plug"):
        patch.setattr(autoencoder, "autoencoder_step", crash)
        train(config("echo", log_every=1, sample_every=1), few_digits, tmp_path / "run")
    assert load_run(tmp_path / "run").step == 4 and (tmp_path / "run/samples/step-7.png").exists()
    train(config("echo", log_every=1, sample_every=1), few_digits, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("name", ["prior", "echo"])
def test_a_run_made_longer_ends_in_the_weights_of_a_long_one(name: str, few_digits: ImageData, tmp_path: Path) -> None:
    short, long = ({"epochs": epochs, "max_steps": None, "checkpoint_every": 100, "log_every": 7} for epochs in (1, 2))
    at_once = train(config(name, **long), few_digits, tmp_path / "at-once")
    train(config(name, **short), few_digits, tmp_path / "grown")
    grown = train(config(name, **long), few_digits, tmp_path / "grown", resume=True)
    assert grown.step == at_once.step == 22 and grown.config == at_once.config
    assert all(torch.equal(tensor, grown.checkpoint.tensors[key]) for key, tensor in at_once.checkpoint.tensors.items())


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("marginal", {"max_steps": 20}, "max_steps = 12, not 20"),  # under a cosine the first steps of a longer run are other steps
        ("marginal", {"epochs": 21}, "epochs = 20, not 21"),
        ("marginal", {"schedule": "constant"}, "schedule = 'cosine', not 'constant'"),
        ("marginal", {"estimator": "mixture"}, "estimator = 'stratified', not 'mixture'"),
        ("prior", {"beta": 2.0}, "beta = 1.0, not 2.0"),
        ("prior", {"epochs": 19}, "epochs = 20, not 19"),
        ("prior", {"rate": "marginal"}, "rate = 'prior', not 'marginal'"),
        ("echo", {"clip": 0.985}, "clip = 0.99, not 0.985"),
        ("echo", {"model": "vae"}, "model = 'echo', not 'vae'"),
    ],
)
def test_another_configuration_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, few_digits: ImageData, reference: Callable[..., Path]
) -> None:
    before = contents(reference(name))
    with pytest.raises(UsageError, match=named):
        train(config(name, **changes), few_digits, reference(name), resume=True)
    assert contents(reference(name)) == before


CHILD = """
import sys, torch
torch.set_num_threads(1)
from periplus import AutoencoderConfig, load_data, train
import json
train(AutoencoderConfig(**json.loads(sys.argv[1])), load_data("digits").subset(range(200)), sys.argv[2], resume=True)
"""


def test_a_killed_run_goes_on_to_the_same_bits(few_digits: ImageData, tmp_path: Path) -> None:
    """SIGKILL from outside, at whatever it is doing."""
    values = {**config("echo").__dict__, "max_steps": 80, "checkpoint_every": 10, "epochs": 50, "log_every": 7, "sample_every": 30}
    training, run = AutoencoderConfig(**values), tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(values), str(run)], stderr=subprocess.PIPE) as child:
        limit = time.monotonic() + 120
        while len(list_checkpoints(run / "checkpoints")) < 2:
            assert child.poll() is None and time.monotonic() < limit, child.communicate()
            time.sleep(0.002)
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    train(training, few_digits, run, resume=True)
    train(training, few_digits, tmp_path / "reference")
    assert_same(run, tmp_path / "reference")


@pytest.mark.parametrize(
    ("lost", "said"),
    [("sums", "lacks the state of the metrics"), ("encoder.code.head.bias", "does not fit the network"), ("marginal.mean", "not of this version")],
)
def test_a_checkpoint_of_another_version_is_refused(lost: str, said: str, few_digits: ImageData, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config("echo", max_steps=4), few_digits, folder)
    whole = load_checkpoint(folder / "checkpoints/step-4")
    kept = {name: tensor for name, tensor in whole.tensors.items() if name != lost}
    save_checkpoint(folder / "checkpoints", 5, kept, whole.values)
    with pytest.raises(RunError, match=f"step-5 .*{said}"):
        if lost == "marginal.mean":
            load_run(folder).sample(3)
        else:
            train(config("echo"), few_digits, folder, resume=True)


# ---- what is not finite -----------------------------------------------------------------------------------------------------------------------


class Turning(nn.Module):
    """An encoder that goes bad at its n-th call in training, and notes the parameters of both networks at that moment."""

    def __init__(self, turn: int, how: str) -> None:
        super().__init__()
        self.linear, self.turn, self.how, self.calls = nn.Linear(64, 8), turn, how, 0
        self.noted: list[Tensor] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.linear(images.flatten(1)).chunk(2, 1)
        self.calls += self.training
        if self.training and self.calls == self.turn:
            self.noted = parameters(self, *self.watched)
            if self.how == "gradient":  # the value is finite, and only its derivative is not
                return mean, log_scale + (0 * mean).abs().sqrt()
            return mean + float(self.how), log_scale
        return mean, log_scale - 1


def parameters(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def own_decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)))


@pytest.mark.parametrize("name", ["prior", "marginal", "echo"])
@pytest.mark.parametrize(("turn", "how"), [(1, "nan"), (6, "nan"), (6, "inf"), (6, "gradient")])
def test_nothing_is_updated_with_what_is_not_finite(name: str, turn: int, how: str, few_digits: ImageData, tmp_path: Path) -> None:
    decoder, encoder, folder = own_decoder(), Turning(turn, how), tmp_path / "run"
    encoder.watched = [decoder]  # in a list: not a part of this network
    kept = "there is no checkpoint yet" if turn == 1 else f"the last good checkpoint is .*step-{turn - 1}"
    with pytest.raises(NonFiniteError, match=f"non-finite by step {turn} in .*run; nothing was updated with it, {kept}: lower --learning-rate"):
        train(config(name, checkpoint_every=1, log_every=1, sample_every=99), few_digits, folder, networks=(encoder, decoder))
    now = parameters(encoder, decoder)
    assert encoder.noted and all(torch.equal(a, b) for a, b in zip(encoder.noted, now, strict=True))
    for file in folder.glob("*.jsonl"):
        assert len(file.read_text().splitlines()) == turn - 1
    if turn > 1:
        run = load_run(folder, networks=(Turning(0, "nan"), own_decoder()))
        assert run.step == turn - 1 and all(bool(tensor.isfinite().all()) for tensor in run.checkpoint.tensors.values())
        assert bool(run.sample(4).isfinite().all())


@pytest.mark.parametrize("name", ["prior", "marginal", "echo"])
def test_an_absurd_learning_rate_is_told(name: str, few_digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="lower --learning-rate") as caught:
        train(config(name, learning_rate=1e30), few_digits, tmp_path / "run")
    assert caught.value.exit_code == 5


# ---- one's own networks -----------------------------------------------------------------------------------------------------------------------


class OwnEncoder(nn.Module):
    """Whatever a function makes of the output of one affine layer."""

    def __init__(self, function: Callable[[Tensor], Any] | None = None, features: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(features, 8), nn.Dropout(dropout))
        self.function = function or (lambda h: (h[:, :4], h[:, 4:] - 1))

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


@pytest.mark.parametrize("name", ["prior", "marginal", "echo"])
@pytest.mark.parametrize("form", ["pair", "mapping"])
def test_own_networks_train_and_load(name: str, form: str, few_digits: ImageData, tmp_path: Path) -> None:
    def networks() -> Any:
        pair = OwnEncoder(), own_decoder()
        return pair if form == "pair" else {"decoder": pair[1], "encoder": pair[0]}

    run = train(config(name, max_steps=3), few_digits, tmp_path / "run", networks=networks())
    assert run.config.architecture == "custom"
    again = load_run(tmp_path / "run", networks=networks())
    assert torch.equal(run.sample(5), again.sample(5))
    assert torch.equal(run.encode(few_digits.images)[0], again.encode(few_digits.images)[0])
    alone = load_run(tmp_path / "run", networks=own_decoder())
    assert torch.equal(alone.sample(5), run.sample(5))
    with pytest.raises(UsageError, match=r"opened with its decoder alone: pass networks=\(encoder, decoder\)"):
        alone.encode(few_digits.images)
    with pytest.raises(UsageError, match=r"pass the modules it was trained with as networks=\(encoder, decoder\)"):
        load_run(tmp_path / "run").sample(5)
    with pytest.raises(RunError, match="does not fit the network"):
        load_run(tmp_path / "run", networks=(OwnEncoder(), MLPGenerator(4, (1, 8, 8)))).sample(5)


def test_an_interrupted_run_of_own_networks(few_digits: ImageData, tmp_path: Path, stops: Stops) -> None:
    torch.manual_seed(0)
    first = OwnEncoder(dropout=0.2), own_decoder()
    train(config("echo"), few_digits, tmp_path / "reference", networks=copy.deepcopy(first))
    stops.steps[7] = signal.SIGTERM
    with pytest.raises(Interrupted):
        train(config("echo"), few_digits, tmp_path / "run", networks=first)
    train(config("echo"), few_digits, tmp_path / "run", networks=(OwnEncoder(dropout=0.2), own_decoder()), resume=True)  # other initial weights
    assert_same(tmp_path / "run", tmp_path / "reference")


def test_own_networks_are_watched_and_banked_in_evaluation_mode(few_digits: ImageData, tmp_path: Path) -> None:
    encoder = OwnEncoder(dropout=0.5)
    run = train(config("echo"), few_digits, tmp_path / "run", networks=(encoder, own_decoder()))
    bank = {tuple(row.tolist()) for row in run.checkpoint.tensors["marginal.mean"].round(decimals=4)}
    kept, held_out = few_digits.split_off(20, seeds.stream(3, "held-out"))
    assert {tuple(row.tolist()) for row in run.encode(kept.images)[0].round(decimals=4)} == bank
    assert run.metrics[-1]["rate_held_out"] == pytest.approx(float(run.channel.rate(*run.encode(held_out.images)).mean()), rel=1e-5)
    assert encoder.training


def test_an_own_decoder_starts_where_its_owner_put_it(few_digits: ImageData, tmp_path: Path) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 64)

        def forward(self, z: Tensor) -> Tensor:
            output: Tensor = self.head(z).view(-1, 1, 8, 8)
            return output

    decoder = Headed()
    before = decoder.head.bias.detach().clone()
    train(config(max_steps=1), few_digits, tmp_path / "run", networks=(OwnEncoder(), decoder))
    assert float((decoder.head.bias.detach() - before).abs().max()) < 1.1e-3  # one step of Adam


BATCH_NORMED = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Unflatten(1, (1, 8, 8)))


class Still(nn.Module):
    """A decoder without parameters."""

    def forward(self, z: Tensor) -> Tensor:
        return z.new_zeros(len(z), 1, 8, 8)


@pytest.mark.parametrize(
    ("networks", "said"),
    [
        pytest.param((OwnEncoder(),), r"must be a pair \(encoder, decoder\)", id="one"),
        pytest.param({"encoder": OwnEncoder(), "generator": own_decoder()}, "mapping with the keys 'encoder' and 'decoder'", id="keys"),
        pytest.param((OwnEncoder(lambda h: h), own_decoder()), r"the encoder must return \(mean, log_scale\), each of shape \(2, 4\)", id="no tuple"),
        pytest.param((OwnEncoder(lambda h: (h, h)), own_decoder()), "the encoder must return", id="too wide"),
        pytest.param((OwnEncoder(lambda h: (h[:, :4], h[:, 4:], h)), own_decoder()), "the encoder must return", id="three"),
        pytest.param((OwnEncoder(lambda h: (h[:, :4], 1.0)), own_decoder()), "the encoder must return", id="a number"),
        pytest.param((OwnEncoder(features=100), own_decoder()), r"do not take images of shape \(2, 1, 8, 8\)", id="other images"),
        pytest.param((OwnEncoder(), nn.Linear(5, 64)), "the networks do not take", id="other codes"),
        pytest.param((OwnEncoder(), nn.Linear(4, 64)), r"the decoder returned shape \(2, 64\) for 2 codes: shape \(2, 1, 8, 8\)", id="flat"),
        pytest.param((OwnEncoder(), OwnEncoder(features=4)), "the decoder returned a tuple for 2 codes", id="two encoders"),
        pytest.param((OwnEncoder(), BATCH_NORMED), "the decoder normalises over the batch", id="batch norm"),
        pytest.param((nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), OwnEncoder()), own_decoder()), "the encoder normalises", id="batch norm first"),
        pytest.param((OwnEncoder(), Still()), "the decoder has no trainable parameters", id="still"),
    ],
)
def test_networks_that_do_not_fit_are_refused(networks: Any, said: str, few_digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train(config(), few_digits, tmp_path / "run", networks=networks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["marginal", "echo"])
def test_one_held_out_image_is_not_watched(name: str, few_digits: ImageData, tmp_path: Path) -> None:
    """It has no echo noise and no marginal of its own."""
    run = train(config(name, held_out=1), few_digits, tmp_path / "run")
    assert run.step == STEPS and "rate_held_out" not in run.metrics[-1]


def test_a_plan_says_what_train_does(few_digits: ImageData) -> None:
    decided = plan(config("marginal", max_steps=None, epochs=3), few_digits)
    assert (decided.steps, decided.training_images, decided.config.estimator) == (33, 180, "stratified")
    assert decided.parameters == {"encoder": 64 * 24 + 24 + 24 * 8 + 8, "decoder": 4 * 24 + 24 + 24 * 64 + 64}
    with pytest.raises(UsageError, match="7x7 cannot be halved twice"):
        plan(config("conv"), ImageData(torch.zeros(50, 1, 7, 7, dtype=torch.uint8), None, (), "grey", "all"))


# ---- the reading side -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_samples(name: str, reference: Callable[..., Path]) -> None:
    run, before = load_run(reference(name)), torch.get_rng_state()
    images, z = run.sample(600), run.sample_codes(600)
    assert images.shape == (600, 1, 8, 8) and float(images.min()) >= 0 and float(images.max()) <= 1 and z.shape == (600, 4)
    torch.testing.assert_close(run.decode(z).clamp(0, 1), images, rtol=1e-5, atol=1e-6)
    for n in (1, 7, 179, 256, 257, 512):
        assert torch.equal(run.sample_codes(n), z[:n])
        torch.testing.assert_close(run.sample(n), images[:n], rtol=1e-5, atol=1e-6)
    assert torch.equal(load_run(reference(name)).sample(64), images[:64])
    assert not torch.allclose(run.sample_codes(4, seed=1), z[:4]) and len(z.unique(dim=0)) == 600
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", MODELS)
def test_encoding_and_decoding(name: str, few_digits: ImageData, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(reference(name))
    mean, log_scale = run.encode(few_digits.images)
    assert mean.shape == log_scale.shape == (200, 4) and not mean.requires_grad
    assert torch.equal(run.encode(few_digits.images / 255)[0], mean) and torch.equal(run.encode((few_digits.images / 255).double())[1], log_scale)
    monkeypatch.setattr(runs, "ENCODE_BLOCK", 7)
    torch.testing.assert_close(run.encode(few_digits.images)[0], mean, rtol=1e-4, atol=1e-5)
    for wrong in (few_digits.images[0], few_digits.images[:, :, 1:], few_digits.images.expand(-1, 3, -1, -1)):
        with pytest.raises(UsageError, match=r"images have shape .*: \(N, 1, 8, 8\) is needed"):
            run.encode(wrong)
    z = mean[:3].clone().requires_grad_()
    images = run.decode(z.reshape(3, 1, 4))
    assert images.shape == (3, 1, 1, 8, 8) and float(images.detach().min()) >= 0 and float(images.detach().max()) <= 1
    slope: Tensor = torch.autograd.grad(images[1].sum(), z)[0]
    assert bool(slope[1].any()) and not bool(slope[[0, 2]].any())
    logits = run.decoder(mean[:3])
    torch.testing.assert_close(images.detach()[:, 0], logits if name == "conv" else logits.sigmoid())
    with pytest.raises(UsageError, match="an autoencoder .*no generator"):
        _ = run.generator


def test_what_an_autoencoder_has_a_generator_has_not(few_digits: ImageData, tmp_path: Path) -> None:
    from periplus import AdversarialConfig

    run = train(AdversarialConfig("gan", batch_size=16, max_steps=1, device="cpu"), few_digits, tmp_path / "run")
    with pytest.raises(UsageError, match="no encoder .*inversion"):
        run.encode(few_digits.images)
    with pytest.raises(UsageError, match="has no channel"):
        _ = run.channel


def test_codes_of_a_prior_are_standard_normal(reference: Callable[..., Path]) -> None:
    z = load_run(reference("prior")).sample_codes(20_000)
    assert float(z.mean(0).abs().max()) < 4 / math.sqrt(20_000) and float((z.var(0) - 1).abs().max()) < 4 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize("name", ["marginal", "echo"])
def test_codes_of_a_marginal_have_its_moments(name: str, digits: ImageData, tmp_path: Path) -> None:
    """q(z) over all training images, in closed form from their encodings: a mixture of Gaussians, or the fixed point of the recursion."""
    run = train(config(name, **quiet(epochs=8, batch_size=100, beta=0.5, learning_rate=3e-3)), digits, tmp_path / "run")
    mean, log_scale = (part.double() for part in run.encode(digits.images))
    assert run.checkpoint.tensors["marginal.mean"].shape == (1500, 4)
    scale = log_scale.exp()
    first, second = echo_moments(mean, scale) if name == "echo" else (mean.mean(0), (mean**2 + scale**2).mean(0))
    passes = (
        run.sample_codes(1500 * 30, seed=5).double().view(30, 1500, 4)
    )  # a pass is a whole sweep of the bank: passes are independent, rows are not
    for moment, expected in ((passes.mean(1), first), (passes.square().mean(1), second)):
        error = moment.std(0) / math.sqrt(30)
        assert bool(((moment.mean(0) - expected).abs() < 4 * error + 1e-3 * second).all()), (moment.mean(0), expected, error)
    spread = (second - first**2).sqrt()
    assert float(spread.max()) > 0.05 and float((second - 1).abs().max()) > 0.02  # nothing like the prior, so that this can fail


def test_pixels_have_these_distortions_in_a_run(few_digits: ImageData, tmp_path: Path) -> None:
    """The logged distortion is summed over pixels, averaged over examples: of the mean image at the start."""
    x = few_digits.images / 255
    mean = x.mean(0, keepdim=True).clamp(0.002, 0.998)
    for likelihood, expected in (("bernoulli", bernoulli_distortion(mean.logit().expand_as(x), x)), ("gaussian", gaussian_distortion(mean, x, 0.5))):
        changes = {"likelihood": likelihood, "sigma": 0.5 if likelihood == "gaussian" else None, "max_steps": 1, "batch_size": 200, "held_out": 0}
        run = train(config(**changes), few_digits, tmp_path / likelihood)
        assert run.metrics[0]["distortion"] == pytest.approx(float(expected.mean()), rel=0.6)
