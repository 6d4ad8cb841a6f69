"""Training: the same seed is the same bits, a stop costs nothing, nothing non-finite gets in, and the step is the step of the papers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import periplus.training
from periplus import (
    AdversarialConfig,
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
from periplus.checkpoints import list_checkpoints, load_checkpoint
from periplus.data import composites, formats
from periplus.networks import AdversarialNetworks, ConvCritic, ConvGenerator, MLPCritic, MLPGenerator, recalibrate_batch_norm
from periplus.training import adversarial, journal, written
from periplus.training.adversarial import average_weight, critic_step, generator_step, make_fakes, new_state, update_average
from periplus.training.steps import WATCHED, Batches, hold_out, some_images

torch.set_num_threads(1)
MODELS = ("gan", "wgan-gp", "rpgan")
STEPS = 12
VERSIONS = machine.versions()


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """Two hundred digits: 180 to train on, so that twelve batches of sixteen cross into a second epoch."""
    return load_data("digits").subset(range(200))


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("periplus.networks.MLPGenerator", functools.partial(MLPGenerator, widths=(16, 24)))
    monkeypatch.setattr("periplus.networks.MLPCritic", functools.partial(MLPCritic, widths=(24,)))
    monkeypatch.setattr(machine, "versions", lambda: VERSIONS)  # 70 ms each time
    monkeypatch.setattr(machine, "commit", lambda: None)


def config(model: str = "gan", **changes: Any) -> AdversarialConfig:
    few = {"batch_size": 16, "latent_dim": 4, "max_steps": STEPS, "log_every": 5, "sample_every": 6, "checkpoint_every": 4, "keep_last": 2}
    return AdversarialConfig(**{"model": model, "device": "cpu", "precision": "float32", "seed": 3, **few, **changes})


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
def reference(digits: ImageData, reference_folder: Path) -> Callable[..., Path]:
    """The folder of an uninterrupted run; each is trained once per session, and nobody writes in it."""

    def make(model: str, **changes: Any) -> Path:
        folder = reference_folder / "-".join([model, *(f"{k}={v}" for k, v in sorted(changes.items()))])
        if not folder.exists():
            train(config(model, **changes), digits, folder)
        return folder

    return make


class Stops:
    """Sends this process a signal in the middle of chosen steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[int, signal.Signals] = {}

        def patched(ema: nn.Module, generator: nn.Module, decay: float, step: int) -> None:
            if step + 1 in self.steps:
                os.kill(os.getpid(), self.steps.pop(step + 1))
            update_average(ema, generator, decay, step)

        monkeypatch.setattr(adversarial, "update_average", patched)

    def at(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.steps[step] = number


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Stops:
    return Stops(monkeypatch)


def stop_at(stops: Stops, step: int, training: AdversarialConfig, data: ImageData, folder: Path, number: signal.Signals = signal.SIGTERM) -> None:
    """Train, or go on, and be interrupted in the middle of that step."""
    stops.at(step, number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} at step {step} of {STEPS}"):
        train(training, data, folder, resume=True)
    assert [path.name for path in list_checkpoints(folder / "checkpoints")][-1] == f"step-{step}"


# ---- snapshots --------------------------------------------------------------------------------------------------------------------------------


def test_snapshots_are_the_averaged_generator_of_their_step(digits: ImageData, tmp_path: Path):
    run = train(config(max_steps=10, log_every=1), digits, tmp_path / "long")
    assert run.kept == [4, 8, 10]
    for step in (4, 8):
        short = train(config(max_steps=step, log_every=1), digits, tmp_path / f"short-{step}")
        assert torch.equal(run.at(step).sample(10), short.sample(10))
    assert torch.equal(run.at(10).sample(10), run.sample(10))
    with pytest.raises(RunError, match=r"keeps nothing of step 5: it has 4, 8, 10"):
        run.at(5)


def test_snapshots_can_be_left_out(digits: ImageData, tmp_path: Path):
    run = train(config(max_steps=10, log_every=1, snapshots=False), digits, tmp_path / "run")
    assert not (tmp_path / "run/snapshots").exists() and run.kept == [8, 10]


def test_going_on_from_an_earlier_checkpoint_drops_later_snapshots(digits: ImageData, tmp_path: Path):
    first = config(max_steps=10, log_every=1, checkpoint_every=6)
    train(first, digits, tmp_path / "run")
    reference = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-10")  # as if the last save had never come
    plan_steps = dataclasses.replace(first, max_steps=7)
    assert train(plan_steps, digits, tmp_path / "run", resume=True).kept == [4, 6, 7]
    assert train(first, digits, tmp_path / "run", resume=True).kept == [4, 6, 8, 10]
    again = contents(tmp_path / "run")
    assert {name for name in again if name.startswith("snapshots")} == {name for name in reference if name.startswith("snapshots")}
    assert all(again[name] == reference[name] for name in again if name.startswith("snapshots"))


# ---- the same seed ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_gives_the_same_bits(model: str, digits: ImageData, tmp_path: Path, reference: Callable[..., Path]) -> None:
    torch.manual_seed(random.randrange(2**40))  # whatever the user did before
    train(config(model), digits, tmp_path / "again")
    assert_same(tmp_path / "again", reference(model))
    assert {"config.toml", "metrics.jsonl", "samples/step-6.png", "samples/step-12.png"} <= contents(tmp_path / "again").keys()
    assert [path.name for path in list_checkpoints(tmp_path / "again/checkpoints")] == ["step-8", "step-12"]


@pytest.mark.parametrize("model", MODELS)
def test_another_seed_gives_other_bits(model: str, reference: Callable[..., Path]) -> None:
    one, other = reference(model), reference(model, seed=4)
    tensors = [load_checkpoint(folder / "checkpoints/step-12").tensors for folder in (one, other)]
    same = [name for name in tensors[0] if torch.equal(tensors[0][name], tensors[1][name])]
    for name in same:  # counts are, and what is zero for every seed: the slope of the Wasserstein critic's last bias
        assert name.endswith((".step", "num_batches_tracked")) or not tensors[0][name].any(), name
    assert contents(one)["metrics.jsonl"] != contents(other)["metrics.jsonl"]
    assert contents(one)["samples/step-6.png"] != contents(other)["samples/step-6.png"]


def test_no_state_outside_the_library_is_touched(digits: ImageData, tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(config(max_steps=2), digits, tmp_path / "run")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate(), torch.get_num_threads())
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_sampling_does_not_touch_the_users_random_numbers(reference: Callable[..., Path]) -> None:
    before = torch.get_rng_state()
    load_run(reference("gan")).sample(2)
    assert torch.equal(before, torch.get_rng_state())


# ---- stopping and going on ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "steps"),
    [
        *(("gan", {}, (step,)) for step in (1, 4, 7, 11)),  # before any checkpoint; at one; inside a window of metrics; the last but one
        ("wgan-gp", {}, (3,)),
        ("wgan-gp", {"critic_steps": 2}, (2,)),
        ("wgan-gp", {"critic_steps": 2}, (7, 9)),
        ("gan", {"ema": 0.0, "held_out": 0}, (6, 7, 8)),
        ("rpgan", {"critic_steps": 2}, (3, 9)),
        ("wgan-gp", {"precision": "bfloat16"}, (5,)),
        ("rpgan", {"precision": "bfloat16"}, (5,)),
        ("gan", {"architecture": "conv"}, (7,)),
        ("wgan-gp", {"architecture": "conv", "critic_steps": 2}, (3, 8)),
        ("rpgan", {"architecture": "conv"}, (5,)),
    ],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    model: str, changes: dict[str, Any], steps: tuple[int, ...], digits: ImageData, tmp_path: Path, reference: Callable[..., Path], stops: Stops
) -> None:
    expected = reference(model, **changes)
    for step in steps:
        stop_at(stops, step, config(model, **changes), digits, tmp_path / "run")
    train(config(model, **changes), digits, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", expected)


def test_a_run_interrupted_at_every_single_step(digits: ImageData, tmp_path: Path, reference: Callable[..., Path], stops: Stops) -> None:
    expected = reference("wgan-gp", critic_steps=2)
    for step in range(1, STEPS):
        number = signal.SIGINT if step % 2 else signal.SIGTERM
        stop_at(stops, step, config("wgan-gp", critic_steps=2), digits, tmp_path / "run", number)
    train(config("wgan-gp", critic_steps=2), digits, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", expected)


def test_a_signal_in_the_last_step_lets_it_finish(digits: ImageData, tmp_path: Path, reference: Callable[..., Path], stops: Stops) -> None:
    stops.at(STEPS)
    train(config("gan"), digits, tmp_path / "run")
    assert_same(tmp_path / "run", reference("gan"))


def test_a_crash_between_checkpoints_goes_back_to_the_last_one(
    digits: ImageData, tmp_path: Path, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the crashed session wrote beyond its checkpoint (lines of metrics, sample grids) must not stay."""
    changes = {"log_every": 1, "sample_every": 1}
    expected = reference("gan", **changes)

    def crash(ema: nn.Module, generator: nn.Module, decay: float, step: int) -> None:
        if step == 7:
            raise OSError("the plug was pulled")
        update_average(ema, generator, decay, step)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the plug"):
        patch.setattr(adversarial, "update_average", crash)
        train(config(**changes), digits, tmp_path / "run")
    assert load_run(tmp_path / "run").metrics[-1]["step"] == 7
    assert (tmp_path / "run/samples/step-7.png").exists()
    assert load_run(tmp_path / "run").step == 4
    steps, grids = [], []

    def look(progress: journal.Progress) -> None:
        steps.append(progress.step)
        grids.append(sorted(int(file.stem.removeprefix("step-")) for file in (tmp_path / "run/samples").iterdir()))

    train(config(**changes), digits, tmp_path / "run", resume=True, on_progress=look)
    assert steps == list(range(5, 13))
    assert grids == [list(range(1, step)) for step in steps]  # none from beyond the checkpoint
    assert_same(tmp_path / "run", expected)


def test_without_a_complete_checkpoint_a_run_starts_at_0(
    digits: ImageData, tmp_path: Path, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference("gan", log_every=1)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(adversarial, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        train(config(log_every=1), digits, tmp_path / "run")
    with pytest.raises(RunError, match="no complete checkpoint yet"):
        load_run(tmp_path / "run").sample(1)
    train(config(log_every=1), digits, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", expected)


def test_a_kill_between_the_last_checkpoint_and_its_pruning(
    digits: ImageData, tmp_path: Path, reference: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is trained then, but a checkpoint too many is left."""
    expected, folder, prune = reference("gan"), tmp_path / "run", journal.checkpoints.prune

    def crash(checkpoints: Path, *arguments: Any) -> None:
        if (checkpoints / f"step-{STEPS}").exists():
            raise OSError("the plug was pulled")
        prune(checkpoints, *arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the plug"):
        patch.setattr(journal.checkpoints, "prune", crash)
        train(config(), digits, folder)
    train(config(), digits, folder, resume=True)
    assert_same(folder, expected)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_made_longer_ends_in_the_weights_of_a_long_one(model: str, digits: ImageData, tmp_path: Path) -> None:
    short, long = ({"epochs": epochs, "max_steps": None, "checkpoint_every": 100, "log_every": 7} for epochs in (1, 2))
    at_once = train(config(model, **long), digits, tmp_path / "at-once")
    train(config(model, **short), digits, tmp_path / "grown")
    assert load_run(tmp_path / "grown").step == 11
    grown = train(config(model, **long), digits, tmp_path / "grown", resume=True)
    assert grown.step == at_once.step == 22
    assert grown.config == at_once.config
    assert [path.name for path in list_checkpoints(tmp_path / "grown/checkpoints")] == ["step-22"]
    for name, tensor in at_once.checkpoint.tensors.items():
        assert torch.equal(tensor, grown.checkpoint.tensors[name]), name


def test_resuming_a_finished_run_changes_nothing(digits: ImageData, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(config(), digits, folder)

    def everything() -> dict[str, tuple[int, bytes]]:
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*") if p.name != ".lock"}

    before = everything()
    assert train(config(), digits, folder, resume=True).step == STEPS
    assert train(config(max_steps=5), digits, folder, resume=True).step == STEPS  # a shorter one is finished, too
    torch.set_num_threads(2)
    try:
        assert train(config(), digits, folder, resume=True).step == STEPS
    finally:
        torch.set_num_threads(1)
    assert everything() == before


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(digits: ImageData, tmp_path: Path, reference: Callable[..., Path]) -> None:
    folder = tmp_path / "run"
    train(config("wgan-gp"), digits, folder)
    damaged = folder / "checkpoints/step-12/state.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-12/state.safetensors: damaged.*using .*step-8 instead"):
        assert load_run(folder).step == 8
    said: list[str] = []
    steps: list[int] = []
    train(config("wgan-gp"), digits, folder, resume=True, warn=said.append, on_progress=lambda p: steps.append(p.step))
    assert len(said) == 1 and str(damaged) in said[0] and "step-8 instead" in said[0]
    assert steps == [10, 12]
    assert_same(folder, reference("wgan-gp"))


def test_a_second_signal_is_not_swallowed(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever presses Ctrl-C twice means it; and the run can still be resumed."""

    def twice(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # to this thread: another may take a process's signals late, and two in one
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell starts in the background ignore it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            patch.setattr(adversarial, "update_average", twice)
            train(config(), digits, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(caught.value, Interrupted)
    assert train(config(), digits, tmp_path / "run", resume=True).step == STEPS


# ---- what may not be resumed or overwritten -------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_not_overwritten(digits: ImageData, tmp_path: Path) -> None:
    train(config(max_steps=1), digits, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match=r"run holds a run already: add --resume"):
        train(config(max_steps=1), digits, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_a_folder_with_anything_else_in_it_is_refused(digits: ImageData, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UsageError, match="is not empty and not a run"):
            train(config(), digits, tmp_path, resume=resume)
    assert {p.name for p in tmp_path.iterdir()} <= {"thesis.txt", ".lock"}
    with pytest.raises(UsageError, match="is a file"):
        train(config(), digits, tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed = 3, not 4"),
        ({"batch_size": 8}, "batch_size = 16, not 8"),
        ({"learning_rate": 1e-3}, "learning_rate = 0.0002, not 0.001"),
        ({"model": "wgan-gp"}, "model = 'gan', not 'wgan-gp'"),
        ({"keep_last": 5}, "keep_last = 2, not 5"),
        ({"held_out": 10}, "held_out = 20, not 10"),
    ],
)
def test_another_configuration_is_refused_by_name(
    changes: dict[str, Any], named: str, digits: ImageData, tmp_path: Path, reference: Callable[..., Path]
) -> None:
    folder = reference("gan")
    before = contents(folder)
    with pytest.raises(UsageError, match=named):
        train(config(**changes), digits, folder, resume=True)
    assert contents(folder) == before


def test_other_data_are_refused(digits: ImageData, reference: Callable[..., Path]) -> None:
    images = digits.images.clone()
    images[17, 0, 3, 3] ^= 1
    other = ImageData(images, digits.labels, digits.classes, digits.name, digits.split)
    with pytest.raises(UsageError, match=r"trained on other data \(sha256 was"):
        train(config(), other, reference("gan"), resume=True)


def test_another_thread_count_is_refused_unless_allowed(digits: ImageData, tmp_path: Path, stops: Stops) -> None:
    stop_at(stops, 3, config(), digits, tmp_path / "run")
    torch.set_num_threads(2)
    try:
        with pytest.raises(UsageError, match="was trained with 1 threads, this process has 2.*--allow-other-threads"):
            train(config(), digits, tmp_path / "run", resume=True)
        assert train(config(), digits, tmp_path / "run", resume=True, allow_other_threads=True).step == STEPS
    finally:
        torch.set_num_threads(1)


def test_a_data_set_smaller_than_a_batch_is_refused(digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--batch-size is 16, but only 15 images are left"):
        train(config(held_out=185), digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(config(held_out=184, max_steps=2), digits, tmp_path / "run").step == 2


# ---- data -----------------------------------------------------------------------------------------------------------------------------------------


def numbered(count: int) -> ImageData:
    """Images that say which they are: pixel 0 and 1 spell the number."""
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    return ImageData(images, None, (), "numbered", "all")


def numbers(images: Tensor) -> list[int]:
    pixels = (images * 255).round().long() if images.is_floating_point() else images.long()
    return (pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 0, 1]).tolist()


def test_batches_are_a_pure_function_and_each_epoch_a_permutation() -> None:
    data, size = numbered(300).images, 32
    batches = Batches(data, size, seed=7)
    assert batches.per_epoch == 9
    seen = [numbers(batches(index)) for index in range(27)]
    for epoch in range(3):
        drawn = list(itertools.chain(*seen[9 * epoch : 9 * epoch + 9]))
        assert len(set(drawn)) == len(drawn) == 9 * size
    assert seen[0] != seen[9] != seen[18]
    torch.manual_seed(1)
    order = random.Random(0).sample(range(27), 27)
    assert [numbers(batches(index)) for index in order] == [seen[index] for index in order]
    assert numbers(Batches(data, size, seed=7)(20)) == seen[20]
    assert numbers(Batches(data, size, seed=8)(20)) != seen[20]
    assert batches(3).dtype == torch.float32 and float(batches(3).max()) <= 1


@pytest.mark.parametrize(("model", "critic_steps"), [("gan", 1), ("wgan-gp", 3)])
def test_held_out_images_are_never_trained_on_and_no_batch_is_used_twice(
    model: str, critic_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = numbered(300), []

    def spy(state: Any, settings: Any, real: Tensor, fake: Tensor, healthy: Tensor) -> Any:
        seen.append(numbers(real))
        return critic_step(state, settings, real, fake, healthy)

    monkeypatch.setattr(adversarial, "critic_step", spy)
    training = config(model, held_out=44, epochs=2, max_steps=None, critic_steps=critic_steps)
    train(training, data, tmp_path / "run")
    kept, held_out = hold_out(training, data)
    assert held_out is not None
    assert sorted(numbers(kept.images) + numbers(held_out.images)) == list(range(300))
    assert len(held_out) == 44 and len(seen) == 32 // critic_steps * critic_steps
    for epoch in range(2):
        drawn = list(itertools.chain(*seen[16 * epoch : 16 * epoch + 16]))
        assert len(set(drawn)) == len(drawn) and not set(drawn) & set(numbers(held_out.images))
    assert numbers(hold_out(config(held_out=44, seed=9), data)[1].images) != numbers(held_out.images)  # type: ignore[union-attr]


def test_without_held_out_images_all_are_trained_on(digits: ImageData, tmp_path: Path) -> None:
    run = train(config(held_out=0, max_steps=3, log_every=1), digits, tmp_path / "run")
    assert hold_out(run.config, digits) == (digits, None)
    assert "critic_gap_train" not in run.metrics[-1] and run.metrics[-1]["epoch"] == round(3 * 16 / 200, 4)


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 5, 9), (3, 7, 4)])
def test_colour_and_oblong_images_train(shape: tuple[int, int, int], tmp_path: Path) -> None:
    images = torch.randint(0, 256, (40, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run = train(config("wgan-gp", max_steps=2), ImageData(images, None, (), "noise", "all"), tmp_path / "run")
    assert run.sample(3).shape == (3, *shape)
    assert load_run(tmp_path / "run").image_shape == shape


# ---- one step -------------------------------------------------------------------------------------------------------------------------------------


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["written out", "first order", "twice"])
def test_each_step_moves_one_network_only(model: str, way: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's step sends no gradient into the generator (PyTorch-GAN's WGAN-GP does), nor the generator's into the critic."""
    if way == "twice":
        for room in (adversarial, written):
            monkeypatch.setattr(room, "piecewise_linear", lambda critic: None)
    training = config(model).resolve(len(digits))
    generator, critic = MLPGenerator(4, (1, 8, 8), widths=(16, 24)), MLPCritic((1, 8, 8), widths=(24,))
    state = new_state(training, AdversarialNetworks(generator, critic), "cpu")
    assert (state.written_critic is None) == (way == "twice") and state.written_generator is not None
    if way != "written out":
        state.written_critic = state.written_generator = None
    real, healthy = digits.images[:16] / 255, torch.tensor(True)
    fake = make_fakes(state, training, real)
    reached: list[Tensor] = []
    assert fake.requires_grad == (way != "written out")
    if fake.requires_grad:
        fake.register_hook(reached.append)

    before = parameters(state.generator), parameters(critic)
    critic_step(state, training, real, fake, healthy)
    assert not reached and all(p.grad is None for p in state.generator.parameters())
    assert same(parameters(state.generator), before[0]) and not same(parameters(critic), before[1])

    before = parameters(state.generator), parameters(critic)
    gradients = [p.grad.clone() for p in critic.parameters() if p.grad is not None]
    generator_step(state, training, real, fake, healthy)
    assert way == "written out" or (len(reached) == 1 and bool(reached[0].any()))
    assert same(parameters(critic), before[1]) and not same(parameters(state.generator), before[0])
    assert same([p.grad for p in critic.parameters() if p.grad is not None], gradients)
    assert same(parameters(state.ema), parameters(copy.deepcopy(state.ema)))


def plain_losses(model: str, critic: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The critic's loss as textbooks have it, with double backward, and the generator's as a function of its fakes."""
    softplus = nn.functional.softplus

    def slope(images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
        return found.flatten(1).norm(dim=1)

    if model == "gan":
        loss = softplus(-critic(real)).mean() + softplus(critic(fake)).mean()
        return loss, lambda images: softplus(-critic(images)).mean()
    if model == "wgan-gp":
        e = torch.rand(16, 1, 1, 1)
        penalty = (slope(e * real + (1 - e) * fake) - 1).square().mean()
        return critic(fake).mean() - critic(real).mean() + 10 * penalty, lambda images: -critic(images).mean()
    zero_centred = slope(real).square().mean() + slope(fake).square().mean()
    loss = softplus(critic(fake) - critic(real)).mean() + 0.3 / 2 * zero_centred
    return loss, lambda images: softplus(critic(real) - critic(images)).mean()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("model", "betas"), [("gan", (0.5, 0.999)), ("wgan-gp", (0.5, 0.9)), ("rpgan", (0.0, 0.99))])
def test_the_steps_are_those_of_a_plain_loop(model: str, betas: tuple[float, float], kind: str, digits: ImageData, tmp_path: Path) -> None:
    """Three steps, written out with .backward() and torch.optim.Adam, from the same weights and random numbers."""
    weight = {"gan": None, "wgan-gp": 10.0, "rpgan": 0.3}[model]
    training = config(model, max_steps=3, critic_steps=2, checkpoint_every=1, held_out=0, ema=0.5, penalty_weight=weight)
    generator: nn.Module = MLPGenerator(4, (1, 8, 8), widths=(16,)) if kind == "mlp" else ConvGenerator(4, (1, 8, 8), channels=(8, 6, 4))
    critic: nn.Module = MLPCritic((1, 8, 8), widths=(16,)) if kind == "mlp" else ConvCritic((1, 8, 8), channels=(4, 6), hidden=8)
    mine = copy.deepcopy(generator), copy.deepcopy(critic)
    initial = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in mine]
    run = train(training, digits, tmp_path / "run", networks=(generator, critic))

    batches = Batches(digits.images, 16, seed=3)
    optimizers = [torch.optim.Adam(module.parameters(), lr=2e-4, betas=betas) for module in mine]
    for step in range(3):
        torch.manual_seed(seeds.stream(3, "step", step))
        for k in range(2):
            real = batches(2 * step + k)
            fake = mine[0](torch.randn(16, 4))
            loss, generator_loss = plain_losses(model, mine[1], real, fake.detach())
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
        optimizers[0].zero_grad()
        generator_loss(fake).backward()
        optimizers[0].step()
    for prefix, module, start in zip(("generator.", "critic."), mine, initial, strict=True):
        moved, expected = (
            torch.cat([(state[name] - start[name]).flatten() for name in start])
            for state in ({name: run.checkpoint.tensors[prefix + name] for name in start}, module.state_dict())
        )
        assert float(expected.abs().max()) > 5e-4  # three steps of 2e-4 at least
        assert float((moved - expected).norm() / expected.norm()) < 0.02  # Adam blows up the rounding of gradients that are nearly zero


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_the_average(decay: float, digits: ImageData, tmp_path: Path) -> None:
    """EMA in float64 by hand, over the generators that the checkpoints hold; with a warm-up of (1 + n) / (10 + n)."""
    networks = MLPGenerator(4, (1, 8, 8), widths=(16,)), MLPCritic((1, 8, 8), widths=(16,))
    average = {name: tensor.double() for name, tensor in networks[0].state_dict().items()}
    train(config("wgan-gp", ema=decay, checkpoint_every=1, keep_last=99, max_steps=8), digits, tmp_path / "run", networks=networks)
    paths = list_checkpoints(tmp_path / "run/checkpoints")
    assert len(paths) == 8
    for step, path in enumerate(paths):
        tensors = load_checkpoint(path).tensors
        kept = min(decay, (1 + step) / (10 + step))
        for name in average:
            average[name] = kept * average[name] + (1 - kept) * tensors[f"generator.{name}"].double()
            torch.testing.assert_close(tensors[f"ema.{name}"].double(), average[name], rtol=1e-5, atol=1e-7)
            assert decay or torch.equal(tensors[f"ema.{name}"], tensors[f"generator.{name}"])


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99, 0.999])
def test_the_average_of_a_long_memory_takes_steps_together(decay: float) -> None:
    """Eight at a time where each would weigh less than 1/64: the weights of the past are the same at every eighth step, and nothing is forgotten."""
    kept = whole = 1.0
    waited = 0
    for step in range(3000):
        each = 1 - min(decay, (1 + step) / (10 + step))
        found = average_weight(decay, step)
        assert found in (0.0, pytest.approx(each)) or each < 1 / 64
        kept, whole, waited = kept * (1 - found), whole * (1 - each), 0 if found else waited + 1
        assert waited < 8
        if step % 8 == 7:
            assert found > 0 and kept == pytest.approx(whole, rel=1e-9)
    assert (decay >= 0.99) == (average_weight(decay, 2000) == 0)


def test_the_averaged_generator_has_the_statistics_of_its_own_activations(reference: Callable[..., Path], digits: ImageData) -> None:
    run = load_run(reference("gan"))
    generator = run.generator
    layer = next(m for m in generator.modules() if isinstance(m, nn.BatchNorm1d))
    entering: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: entering.append(inputs[0]))
    generator(runs.codes(run.config.seed, "calibration", adversarial.CALIBRATION_CODES, run.config.latent_dim))
    handle.remove()
    torch.testing.assert_close(layer.running_mean, entering[0].mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.running_var, entering[0].var(0), rtol=5e-2, atol=1e-4)  # mean of the variances of eight batches
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    recalibrate_batch_norm(generator, runs.codes(run.config.seed, "calibration", adversarial.CALIBRATION_CODES, run.config.latent_dim))
    assert all(torch.equal(before[k], v) for k, v in generator.state_dict().items())


def test_lines_of_metrics_are_means_over_their_window(digits: ImageData, tmp_path: Path, reference: Callable[..., Path]) -> None:
    each = train(config("wgan-gp", log_every=1), digits, tmp_path / "run").metrics
    lines = load_run(reference("wgan-gp")).metrics
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line, (first, last) in zip(lines, [(0, 5), (5, 10), (10, 12)], strict=True):
        for name in adversarial.MEASURES:
            assert line[name] == pytest.approx(np.mean([e[name] for e in each[first:last]]), rel=1e-9)
        for name in ("critic_gap_train", "critic_gap_held_out", "epoch"):  # of the moment, not of the window
            assert line[name] == each[last - 1][name]


# ---- what is not finite ---------------------------------------------------------------------------------------------------------------------------


class Turning(nn.Module):
    """A critic that goes bad at its n-th call in training, and notes the parameters of both networks at that moment."""

    def __init__(self, turn: int, how: str) -> None:
        super().__init__()
        self.linear, self.turn, self.how = nn.Linear(64, 1), turn, how
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.noted: list[list[Tensor]] = []

    def watch(self, generator: nn.Module) -> Turning:
        self.watched = [generator]  # in a list: not a part of this network
        return self

    def forward(self, images: Tensor) -> Tensor:
        score = self.linear(images.flatten(1))[:, 0]
        if not self.training:
            return score
        self.calls += 1
        if int(self.calls) != self.turn:
            return score
        self.noted = [parameters(self.watched[0]), parameters(self)]
        if self.how == "gradient":  # the value is finite, and only its derivative is not
            return score + (0 * (self.linear.weight.sum() + images.sum())).abs().sqrt()
        return score * float(self.how)


def custom_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))


@pytest.mark.parametrize(
    ("model", "turn", "how", "bad"),
    [
        ("gan", 7, "nan", 4),  # two calls in each step: the critic's, the generator's
        ("gan", 8, "nan", 4),
        ("gan", 5, "gradient", 3),
        ("gan", 6, "gradient", 3),
        ("wgan-gp", 10, "inf", 4),  # three: the scores, the penalty, the generator's
        ("wgan-gp", 11, "nan", 4),
        ("wgan-gp", 12, "-inf", 4),
        ("gan", 1, "nan", 1),
    ],
)
def test_nothing_is_updated_with_what_is_not_finite(model: str, turn: int, how: str, bad: int, digits: ImageData, tmp_path: Path) -> None:
    generator = custom_generator()
    critic = Turning(turn, how).watch(generator)
    folder = tmp_path / "run"
    kept = "there is no checkpoint yet" if bad == 1 else f"the last good checkpoint is .*step-{bad - 1}"
    with pytest.raises(NonFiniteError, match=f"non-finite by step {bad} in .*run; nothing was updated with it, {kept}"):
        train(config(model, checkpoint_every=1, log_every=1), digits, folder, networks=(generator, critic))
    assert same(parameters(generator), critic.noted[0]) and same(parameters(critic), critic.noted[1])
    for file in folder.glob("*.jsonl"):
        assert len(file.read_text().splitlines()) == bad - 1
    if bad > 1:
        run = load_run(folder, networks=(custom_generator(), Turning(0, "nan")))
        assert run.step == bad - 1 and bool(run.sample(4).isfinite().all())
        assert all(bool(tensor.isfinite().all()) for tensor in run.checkpoint.tensors.values())


@pytest.mark.parametrize("model", MODELS)
def test_an_absurd_learning_rate_is_told(model: str, digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="lower --learning-rate") as caught:
        train(config(model, learning_rate=1e30), digits, tmp_path / "run")
    assert caught.value.exit_code == 5


# ---- one's own networks ---------------------------------------------------------------------------------------------------------------------------


def custom_critic(features: int = 64) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))  # (B, 1) is accepted


class Function(nn.Module):
    """A module of one parameter around any function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.function(self.scale * x)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("form", ["pair", "mapping"])
def test_own_networks_train_and_load(model: str, form: str, digits: ImageData, tmp_path: Path) -> None:
    def networks() -> Any:
        pair = custom_generator(), custom_critic()
        return pair if form == "pair" else {"critic": pair[1], "generator": pair[0]}

    run = train(config(model, max_steps=3), digits, tmp_path / "run", networks=networks())
    assert run.config.architecture == "custom"
    again = load_run(tmp_path / "run", networks=networks())
    assert torch.equal(run.sample(5), again.sample(5))
    with pytest.raises(UsageError, match="architecture 'custom': pass the modules"):
        load_run(tmp_path / "run").sample(5)
    with pytest.raises(RunError, match="does not fit the network"):
        load_run(tmp_path / "run", networks=(MLPGenerator(4, (1, 8, 8)), custom_critic())).sample(5)
    with pytest.raises(UsageError, match="architecture"):
        train(config(model, max_steps=3), digits, tmp_path / "run", resume=True)


def test_an_interrupted_run_of_own_networks(digits: ImageData, tmp_path: Path, stops: Stops) -> None:
    torch.manual_seed(0)
    first = custom_generator(), custom_critic()
    train(config(), digits, tmp_path / "reference", networks=copy.deepcopy(first))
    stops.at(7)
    with pytest.raises(Interrupted):
        train(config(), digits, tmp_path / "run", networks=first)
    train(config(), digits, tmp_path / "run", networks=(custom_generator(), custom_critic()), resume=True)  # other initial weights
    assert_same(tmp_path / "run", tmp_path / "reference")


def test_critics_that_mix_examples(digits: ImageData, tmp_path: Path) -> None:
    """A GAN may have one (two passes); the gradient penalty has no meaning then and says so."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    assert train(config(max_steps=2), digits, tmp_path / "gan", networks=(custom_generator(), copy.deepcopy(critic))).step == 2
    with pytest.raises(UsageError, match="the critic mixes the examples of a batch"):
        train(config("wgan-gp", max_steps=2), digits, tmp_path / "wgan-gp", networks=(custom_generator(), critic))


@pytest.mark.parametrize(
    ("networks", "said"),
    [
        ((custom_generator(),), "must be a pair"),
        ((custom_generator(), custom_critic(), custom_critic()), "must be a pair"),
        ((custom_generator(), len), "must be a pair"),
        ({"generator": custom_generator(), "discriminator": custom_critic()}, "mapping with the keys 'generator' and 'critic'"),
        ((nn.Linear(5, 64), custom_critic()), r"the generator does not take codes of shape \(2, 4\)"),
        ((nn.Linear(4, 64), custom_critic()), r"the generator returned shape \(2, 64\) for 2 codes: \(2, 1, 8, 8\)"),
        ((Function(lambda z: (z.sum() - 1).expand(2, 1, 8, 8)), custom_critic()), r"the generator returned values outside \[0, 1\]"),
        ((Function(lambda z: (z.sum() + 1.5).expand(2, 1, 8, 8)), custom_critic()), r"the generator returned values outside \[0, 1\]"),
        ((custom_generator(), Function(lambda x: x)), r"the critic returned shape \(2, 1, 8, 8\) for a batch of 2"),
        ((custom_generator(), Function(lambda x: x.mean())), r"the critic returned shape \(\) for a batch of 2"),
    ],
)
def test_networks_that_do_not_fit_are_refused(networks: Any, said: str, digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train(config(), digits, tmp_path / "run", networks=networks)
    assert not (tmp_path / "run").exists()


class Still(nn.Module):
    """A generator without parameters."""

    def forward(self, z: Tensor) -> Tensor:
        return z.new_zeros(len(z), 1, 8, 8)


@pytest.mark.parametrize(
    ("networks", "said"),
    [
        pytest.param((custom_generator(), custom_critic(100)), "the critic", id="critic of other images"),
        pytest.param((nn.Sequential(nn.Linear(4, 64, bias=False), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))), custom_critic()), "outside", id="tanh"),
        pytest.param((Function(lambda z: (z.sum() * torch.nan).expand(2, 1, 8, 8)), custom_critic()), "the generator", id="nan"),
        pytest.param((Function(lambda z: (z, z)), custom_critic()), "the generator", id="tuple"),
        pytest.param((Still(), custom_critic()), "the generator", id="nothing to train"),
    ],
)
def test_networks_that_fit_even_less_are_refused(networks: Any, said: str, digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train(config(max_steps=2), digits, tmp_path / "run", networks=networks)


def test_own_networks_can_be_trained_further_after_sampling(digits: ImageData, tmp_path: Path) -> None:
    networks = custom_generator(), custom_critic()
    train(config(max_steps=2), digits, tmp_path / "run", networks=networks).sample(1)
    assert train(config(max_steps=4), digits, tmp_path / "run", networks=networks, resume=True).step == 4


# ---- the reading side -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gan(reference: Callable[..., Path]) -> Run:
    return load_run(reference("gan"))


def test_decode_takes_any_leading_shape(gan: Run) -> None:
    z = runs.codes(0, "test", 30, 4)
    flat = gan.decode(z)
    assert flat.shape == (30, 1, 8, 8) and not flat.requires_grad
    assert torch.equal(gan.decode(z.reshape(2, 5, 3, 4)), flat.reshape(2, 5, 3, 1, 8, 8))
    assert gan.decode(z[0]).shape == (1, 8, 8)
    assert gan.decode(z[:0]).shape == (0, 1, 8, 8)
    for wrong in (z[:, :3], torch.zeros(()), z.T):
        with pytest.raises(UsageError, match="the last dimension must be 4"):
            gan.decode(wrong)


def test_decode_takes_each_code_on_its_own(gan: Run) -> None:
    """Batch normalisation uses its stored statistics: who else is in the batch does not matter."""
    z = runs.codes(0, "test", 64, 4)
    together, far = gan.decode(z), gan.decode(torch.cat([z[:1], 100 + z[1:]]))
    torch.testing.assert_close(far[0], together[0], rtol=1e-5, atol=1e-6)
    for index in (0, 7, 63):
        torch.testing.assert_close(gan.decode(z[index]), together[index], rtol=1e-5, atol=1e-6)
    assert torch.equal(gan.decode(z), together)  # decoding moves no running statistics


def test_decode_is_differentiable(gan: Run) -> None:
    z = runs.codes(0, "test", 3, 4).requires_grad_()
    images = gan.decode(z)
    gradient: Tensor = torch.autograd.grad(images[1].sum(), z)[0]
    assert float(gradient[1].norm()) > 0 and not gradient[[0, 2]].any()
    code, direction, h = z[1].detach(), torch.ones(4) / 2, 1e-2
    slope = (gan.decode(code + h * direction).sum() - gan.decode(code - h * direction).sum()) / (2 * h)
    assert float(slope) == pytest.approx(float(gradient[1] @ direction), rel=2e-2, abs=1e-2)
    assert all(p.grad is None for p in gan.generator.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_samples(model: str, reference: Callable[..., Path]) -> None:
    run = load_run(reference(model))
    images = run.sample(1300)
    assert images.shape == (1300, 1, 8, 8) and float(images.min()) >= 0 and float(images.max()) <= 1
    for n in (1, 7, 256, 257, 1001):
        torch.testing.assert_close(run.sample(n), images[:n], rtol=1e-5, atol=1e-6)
    assert torch.equal(load_run(reference(model)).sample(64), run.sample(64))
    assert not torch.allclose(run.sample(4, seed=1), images[:4])
    assert len(images.flatten(1).unique(dim=0)) == 1300
    with pytest.raises(UsageError, match="n is 0"):
        run.sample(0)


def test_the_average_and_the_last_generator_differ(reference: Callable[..., Path]) -> None:
    folder = reference("wgan-gp")
    tensors = load_checkpoint(folder / "checkpoints/step-12").tensors
    for ema, prefix in ((True, "ema."), (False, "generator.")):
        state = load_run(folder, ema=ema).generator.state_dict()
        assert all(torch.equal(state[name], tensors[prefix + name]) for name in state)
    assert not torch.equal(load_run(folder).sample(2), load_run(folder, ema=False).sample(2))


def test_grids_and_lines_and_progress_agree(digits: ImageData, tmp_path: Path) -> None:
    told = []
    run = train(config(log_every=4), digits, tmp_path / "run", on_progress=told.append)
    assert [(p.step, p.steps) for p in told] == [(4, 12), (8, 12), (12, 12)]
    assert [{"step": p.step, **p.metrics} for p in told] == [{k: v for k, v in line.items() if k != "epoch"} for line in run.metrics]
    assert told[-1].seconds_left == 0 and told[0].seconds_left > 0 and told[0].images_per_second > 0
    assert [line["step"] for line in run.timing] == [4, 8, 12]
    seconds = [line["seconds"] for line in run.timing]
    assert seconds == sorted(seconds)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [
        round(n * 16 / 180, 4) for n in (4, 8, 12)
    ]


def test_a_plan_writes_nothing_and_says_what_train_does(digits: ImageData, tmp_path: Path) -> None:
    decided = periplus.training.plan(config(max_steps=None, epochs=3, critic_steps=2), digits)
    assert (decided.steps, decided.training_images, decided.config.held_out) == (3 * 11 // 2, 180, 20)
    run = train(config(max_steps=None, epochs=3, critic_steps=2), digits, tmp_path / "run")
    assert run.step == decided.steps and run.config == decided.config
    sizes = {part: sum(t.numel() for k, t in run.checkpoint.tensors.items() if k.startswith(f"{part}.")) for part in ("critic",)}
    assert decided.parameters["critic"] == sizes["critic"]


@pytest.fixture(autouse=True)
def no_stray_warnings() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", UserWarning)
        yield


def test_the_critic_is_watched_on_images_of_all_classes() -> None:
    """Folders of classes come sorted: their first images are all of one class."""
    digits = load_data("digits")
    assert digits.labels is not None
    ordered = digits.subset(digits.labels.argsort())
    watched = some_images(config(), ordered)
    assert len(watched) == WATCHED < len(digits)
    known = {row.numpy().tobytes(): int(label) for row, label in zip(ordered.images, ordered.labels, strict=True)}
    assert len({known[row.numpy().tobytes()] for row in watched}) == 10


def test_a_generator_alone_is_enough_to_sample(digits: ImageData, tmp_path: Path) -> None:
    networks = custom_generator(), custom_critic()
    run = train(config(max_steps=2), digits, tmp_path / "run", networks=networks)
    assert torch.equal(load_run(tmp_path / "run", networks=custom_generator()).sample(3), run.sample(3))


def test_a_batch_normed_critic_is_refused_before_anything_is_made(digits: ImageData, tmp_path: Path) -> None:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with pytest.raises(UsageError, match="batch normalisation"):
        train(config("wgan-gp"), digits, tmp_path / "run", networks=(custom_generator(), critic))
    assert not (tmp_path / "run").exists()


# ---- stacked digits --------------------------------------------------------------------------------------------------------------------------


def test_the_stacked_preset_trains_on_three_channels(tmp_path: Path) -> None:
    """The recipe for a thousand modes, a few steps of it, on digits of 8 x 8: both networks move, samples have three different channels."""
    grey = load_data("digits")
    loaded = formats.Loaded(grey.images.numpy(), grey.labels.numpy(), grey.classes)  # type: ignore[union-attr]
    stacked = composites.stack_digits(loaded, 300, "digits", "train")
    data = ImageData(torch.from_numpy(stacked.images), torch.from_numpy(stacked.labels), stacked.classes, "stacked-digits", "train")
    run = train(AdversarialConfig.stacked(batch_size=16, max_steps=6, log_every=3, held_out=30), data, tmp_path / "run")
    assert run.config.model == "rpgan" and run.config.architecture == "conv" and run.step == 6
    samples = run.sample(20)
    assert samples.shape == (20, 3, 8, 8) and not samples[:, 0].equal(samples[:, 1])
    assert all(np.isfinite(value) for line in run.metrics for value in line.values())
