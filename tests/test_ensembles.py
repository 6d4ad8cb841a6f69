"""Adversarial pairs trained as one program are the pairs trained one by one: same draws, same folders, whatever stops, resumes or breaks.

The comparison is made in double precision, where it is sharp: single precision turns a gradient that is zero but for rounding into a step of Adam of
full length, and moves units across the kinks of their rectifiers.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from periplus import AdversarialConfig, ImageData, load_run, train
from periplus.errors import Interrupted, NonFiniteError, UsageError
from periplus.machine import environment
from periplus.networks import AdversarialNetworks, ImageShape, MLPCritic, MLPGenerator
from periplus.piecewise import piecewise_linear
from periplus.runs import read_environment
from periplus.stacking import Affine, StackedBatchNorm1d, as_views, stack_modules
from periplus.sweeps import Sweep, choose_engine, make_sweep
from periplus.training import adversarial, ensembles, steps
from periplus.training import cells as shared
from periplus.training.interruption import StopRequest
from periplus.training.stacked import FrozenCells, train_stacked, why_not

KINDS: dict[str, dict[str, Any]] = {
    "gan": {"model": "gan", "critic_steps": 2},
    "gan saturating, no dropout": {"model": "gan", "generator_loss": "saturating", "critic_dropout": 0.0},
    "wgan-gp": {"model": "wgan-gp", "critic_steps": 2},
    "wgan-gp, no batch norm": {"model": "wgan-gp", "generator_batch_norm": False},
    "rpgan": {"model": "rpgan", "critic_steps": 2},
}
#: Two seeds; of the second also one with everything else that cells may differ in. The first and the third are of one pace.
CHANGES: list[dict[str, Any]] = [
    {"seed": 0, "penalty_weight": 3.0},
    {"seed": 1, "learning_rate": 1e-3, "beta1": 0.3, "beta2": 0.95, "ema": 0.2},
    {"seed": 1},
]
ENVIRONMENT = environment("cpu")


@pytest.fixture(autouse=True)
def one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking every package for its version takes as long as training one of these cells."""
    known = ENVIRONMENT.copy()
    monkeypatch.setattr("periplus.training.environment", lambda device: {**known, "threads": torch.get_num_threads()})


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mlp with few units."""

    def build(architecture: str, shape: ImageShape, latent_dim: int, *, batch_norm: bool, dropout: float) -> AdversarialNetworks:
        return AdversarialNetworks(MLPGenerator(latent_dim, shape, (12, 20, 24), batch_norm), MLPCritic(shape, (24, 16), dropout))

    monkeypatch.setattr("periplus.runs.build_adversarial", build)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that is computed has double precision."""

    def to_double(images: Tensor) -> Tensor:
        return images.to(torch.float64).div_(255)

    monkeypatch.setattr(steps, "to_float", to_double)
    monkeypatch.setattr(adversarial, "to_float", to_double)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cells(folder: Path, steps: int = 12, **values: Any) -> list[ensembles.Cell]:
    common = {"batch_size": 32, "latent_dim": 5, "log_every": 4, "sample_every": 6, "checkpoint_every": 8, "max_steps": steps, "learning_rate": 3e-4}
    return [(AdversarialConfig(**{**common, **values, **change}), folder / f"cell-{k}") for k, change in enumerate(CHANGES)]


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-6))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is to be the same bits: not the times, not the sessions."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "timing.jsonl", "env.json")
    }


def same_run(a: Path, b: Path, tolerance: float = 1e-9) -> None:
    """Two folders hold the same run up to rounding: files, tensors, lines of metrics, pictures."""
    assert {str(p.relative_to(a)) for p in a.rglob("*")} == {str(p.relative_to(b)) for p in b.rglob("*")}
    assert (a / "config.toml").read_bytes() == (b / "config.toml").read_bytes()
    one, other = load_run(a), load_run(b)
    assert one.checkpoint.values == other.checkpoint.values and one.step == other.step
    assert one.checkpoint.tensors.keys() == other.checkpoint.tensors.keys()
    idle = ("critic.head.bias", "critic_optimizer.5.") if one.config.model == "rpgan" else ()  # only differences of scores count: no gradient
    for name, tensor in one.checkpoint.tensors.items():
        wanted = other.checkpoint.tensors[name]
        assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape, name
        assert name.startswith(idle or "-") or relative_difference(tensor, wanted) < tolerance, name
    for line, wanted_line in zip(one.metrics, other.metrics, strict=True):
        assert line == {name: pytest.approx(value, rel=1000 * tolerance, abs=1000 * tolerance) for name, value in wanted_line.items()}
    for picture in (b / "samples").iterdir():
        assert (a / "samples" / picture.name).read_bytes() == picture.read_bytes()


# ---- the same cells -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_is_the_run_trained_by_itself(kind: str, digits: ImageData, tmp_path: Path) -> None:
    together, alone = cells(tmp_path / "together", **KINDS[kind]), cells(tmp_path / "alone", **KINDS[kind])
    train_stacked(together, digits)
    for (config, folder), (_, expected) in zip(together, alone, strict=True):
        train(config, digits, expected)
        same_run(folder, expected)
        assert {"critic_gap_train", "critic_gap_held_out"} <= load_run(folder).metrics[-1].keys()
    ends = [(folder / "metrics.jsonl").read_bytes() for _, folder in together]
    assert len(set(ends)) == len(ends), "cells differ among themselves"


@pytest.mark.parametrize("kind", KINDS)
def test_in_single_precision_as_well_but_for_what_adam_makes_of_rounding(kind: str, digits: ImageData, tmp_path: Path) -> None:
    """A step of Adam is at most 1 / sqrt(1 - beta2) learning rates long: few weights go astray, and none of them far."""
    together, alone = cells(tmp_path / "together", **KINDS[kind]), cells(tmp_path / "alone", **KINDS[kind])
    train_stacked(together, digits)
    for (config, folder), (_, expected) in zip(together, alone, strict=True):
        train(config, digits, expected)
        one, other = load_run(folder), load_run(expected)
        for name, tensor in one.checkpoint.tensors.items():
            wanted = other.checkpoint.tensors[name]
            assert tensor.dtype == wanted.dtype
            if name.startswith(("generator.", "critic.", "ema.")) and name != "critic.head.bias":
                apart = (tensor.double() - wanted.double()).abs()
                assert apart.max() < 0.05 and apart.mean() < 1e-3 * wanted.double().abs().max(), name
        for line, wanted_line in zip(one.metrics, other.metrics, strict=True):
            assert line == {name: pytest.approx(value, rel=0.02, abs=0.02) for name, value in wanted_line.items()}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("kind", ["gan", "wgan-gp"])
def test_a_cell_goes_on_alone_where_the_stack_left_it(kind: str, digits: ImageData, tmp_path: Path) -> None:
    together = cells(tmp_path / "together", 10, **KINDS[kind])
    train_stacked(together, digits)
    longer, folder = AdversarialConfig(**{**vars(together[1][0]), "max_steps": 16}), together[1][1]
    train(longer, digits, folder, resume=True)
    train(longer, digits, tmp_path / "whole")
    one, other = load_run(folder), load_run(tmp_path / "whole")
    assert all(relative_difference(tensor, other.checkpoint.tensors[name]) < 1e-9 for name, tensor in one.checkpoint.tensors.items())


# ---- layers side by side --------------------------------------------------------------------------------------------------------------------


def test_stacked_batch_normalisation_has_the_bits_of_each_layer() -> None:
    layers = [nn.BatchNorm1d(6) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    stacked = as_views(layers)
    assert isinstance(stacked, StackedBatchNorm1d)
    single = [nn.BatchNorm1d(6) for _ in range(3)]
    for layer, mine in zip(single, layers, strict=True):
        layer.load_state_dict(mine.state_dict())
    for training in (True, True, False):
        x = torch.randn(3, 9, 6)
        y = stacked.train(training)(x.flatten(0, 1)).view(3, 9, 6)
        for c, layer in enumerate(single):
            assert torch.equal(y[c], layer.train(training)(x[c]))
            for name, value in layer.state_dict().items():
                assert torch.equal(layers[c].state_dict()[name], value), name
    with pytest.raises(UsageError, match="running statistics"):
        stack_modules([nn.BatchNorm1d(6, affine=False)])
    with pytest.raises(UsageError, match="a Conv2d cannot be stacked"):
        stack_modules([nn.Conv2d(1, 1, 1)])


def test_the_gradient_of_stacked_critics_is_that_of_each() -> None:
    critics = [MLPCritic((1, 3, 4), (7, 5)).double() for _ in range(3)]
    images = torch.rand(3, 6, 1, 3, 4, dtype=torch.float64)
    chain = piecewise_linear(stack_modules(critics))
    assert chain is not None
    h = chain.first(images.flatten(0, 1))
    scores, slopes = chain.scores(h)
    gradient = chain.gradient(slopes, (1, 3, 4)).view(images.shape)
    for c, critic in enumerate(critics):
        x = images[c].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(critic(x).sum(), x)
        torch.testing.assert_close(gradient[c], wanted)
        torch.testing.assert_close(scores.view(3, 6)[c], critic(x))


def test_the_affine_layers_own_backward_is_right_without_a_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, generator=draw, requires_grad=True) for shape in ((3, 4, 2), (3, 5, 2)))
    assert torch.autograd.gradcheck(lambda x, weight: Affine.apply(x, weight, None), (x, weight))


# ---- stopping -------------------------------------------------------------------------------------------------------------------------------


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal after so many steps."""
    taken = ensembles.ensemble_step
    requests: list[StopRequest] = []

    class Request(StopRequest):
        def __init__(self) -> None:
            super().__init__()
            requests.append(self)

    def counted(ensemble: Any, task: Any, number: int, healthy: Tensor) -> Any:
        if number == step - 1:
            requests[-1].requested = "SIGTERM"
        return taken(ensemble, task, number, healthy)

    monkeypatch.setattr(shared, "StopRequest", Request)
    monkeypatch.setattr(ensembles, "ensemble_step", counted)


@pytest.mark.parametrize(("kind", "step"), [("gan", 5), ("gan", 8), ("wgan-gp", 7), ("rpgan", 1)])
def test_stopping_and_going_on_gives_the_same_bits(kind: str, step: int, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, hurt = cells(tmp_path / "whole", **KINDS[kind]), cells(tmp_path / "hurt", **KINDS[kind])
    train_stacked(whole, digits)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step} of 12 of 3 cells"):
            train_stacked(hurt, digits)
    assert [load_run(folder).step for _, folder in hurt] == [step] * len(hurt)
    train_stacked(hurt, digits, resume=True)
    for (_, folder), (_, expected) in zip(hurt, whole, strict=True):
        assert contents(folder) == contents(expected)


@pytest.mark.usefixtures("doubles")
def test_finished_cells_are_left_out_and_others_are_brought_to_the_end(digits: ImageData, tmp_path: Path) -> None:
    whole, hurt = cells(tmp_path / "whole"), cells(tmp_path / "hurt")
    train_stacked(whole, digits)
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    behind, absent, done = (folder for _, folder in hurt)
    shutil.rmtree(behind / "checkpoints" / "step-12")
    shutil.rmtree(absent)
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    train_stacked(hurt, digits, resume=True)
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*")} == before
    for (_, folder), (_, expected) in zip(hurt, whole, strict=True):
        same_run(folder, expected)
    assert [session["stacked_cells"] for session in read_environment(behind)] == [3, 1]


# ---- one that breaks ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "part"), [("gan", "generator"), ("wgan-gp", "critic")])
@pytest.mark.parametrize("cell", [0, 2])
def test_a_cell_that_breaks_does_not_touch_the_others(
    kind: str, part: str, cell: int, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cell` counts in the stack, where cells are sorted by their pace: 0, 2, 1 of those asked for."""
    whole, hurt = cells(tmp_path / "whole", **KINDS[kind]), cells(tmp_path / "hurt", **KINDS[kind])
    train_stacked(whole, digits)
    taken = ensembles.ensemble_step

    def broken(ensemble: Any, task: Any, number: int, healthy: Tensor) -> Any:
        if number == 9:
            with torch.no_grad():
                getattr(ensemble, part).head.weight[cell, 0, 0] = math.nan
        return taken(ensemble, task, number, healthy)

    with monkeypatch.context() as patch:
        patch.setattr(ensembles, "ensemble_step", broken)
        with pytest.raises(NonFiniteError) as caught:
            train_stacked(hurt, digits)
    sick = {0: 0, 2: 1}[cell]
    assert isinstance(caught.value, FrozenCells) and list(caught.value.lines) == [hurt[sick][1]]
    assert str(caught.value).startswith(f"1 of 3 cells stopped: cell-{sick}; ") and "by step 10" in str(caught.value) and caught.value.exit_code == 5
    for k, ((_, folder), (_, expected)) in enumerate(zip(hurt, whole, strict=True)):
        if k != sick:
            assert contents(folder) == contents(expected)
    left = load_run(hurt[sick][1])
    assert left.step == 8 and [line["step"] for line in left.metrics] == [4, 8], "the last good checkpoint, and nothing after it"
    train_stacked(hurt, digits, resume=True)
    assert load_run(hurt[sick][1]).step == 12


# ---- what is refused, what is told, who chooses ---------------------------------------------------------------------------------------------


def test_what_cannot_be_stacked_is_refused_in_words() -> None:
    one = AdversarialConfig()
    assert why_not([one, *(AdversarialConfig(**change) for change in CHANGES)]) is None
    assert why_not([AdversarialConfig(model="gan")]) is None
    assert "cells differ in critic_steps" in str(why_not([one, AdversarialConfig(critic_steps=2)]))
    assert "cells differ in model" in str(why_not([one, AdversarialConfig(model="gan")]))
    assert "conv" in str(why_not([AdversarialConfig(architecture="conv")]))
    assert "float32" in str(why_not([AdversarialConfig(precision="bfloat16")]))
    assert "dropout" in str(why_not([AdversarialConfig(critic_dropout=0.5)]))


def test_times_are_shares_and_say_so(digits: ImageData, tmp_path: Path) -> None:
    told: list[Any] = []
    train_stacked(cells(tmp_path, 8), digits, on_progress=told.append)
    assert [p.step for p in told] == [4, 8]
    for _, folder in cells(tmp_path):
        lines = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [4, 8] and {line["cells"] for line in lines} == {3}
        assert read_environment(folder)[0]["stacked_cells"] == 3


def test_a_sweep_of_pairs_as_one_program(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pairs are stacked without being asked for; the sheet's own widths on a CPU are not."""
    base = AdversarialConfig(batch_size=32, latent_dim=5, max_steps=4)
    sweep = Sweep(base, "digits", tmp_path / "sweep", {"penalty_weight": (1.0, 10.0)}, seeds=2, workers=1)
    results = make_sweep(sweep, "periplus sweep", lambda line: None)
    assert results["engine"]["name"] == "stacked" and len(results["cells"]) == 4
    assert all("collapsed" in cell["measures"] and load_run(tmp_path / "sweep" / cell["path"]).step == 4 for cell in results["cells"])
    monkeypatch.undo()
    assert choose_engine(Sweep(base, "digits", tmp_path / "other", {}, seeds=2), digits)[0] == "processes"
