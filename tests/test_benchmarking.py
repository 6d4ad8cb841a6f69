"""The benchmark measures what it says: the same objective on all sides, operations counted right. Timings themselves are never asserted."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import periplus
from periplus import checkpoints, cli, objectives, textbook
from periplus.benchmarking import (
    FAKES,
    JUDGES,
    Rounds,
    bench_train,
    critic_steps,
    our_step,
    same_networks,
    significant,
    state_judged,
    step_flop,
    summary,
    tables,
)
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.errors import NonFiniteError
from periplus.networks import ConvCritic, ConvGenerator, MLPCritic, MLPGenerator, build_adversarial
from periplus.textbook import PictureData, Textbook, from_loader, in_memory
from periplus.training.adversarial import PENALTIES, critic_step, judge, new_state, scores
from periplus.training.steps import to_float

GENERATOR, CRITIC = (12, 20), (16, 8)
MODELS = ("gan", "wgan-gp", "rpgan")


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("periplus.networks.MLPGenerator", functools.partial(MLPGenerator, widths=GENERATOR))
    monkeypatch.setattr("periplus.networks.MLPCritic", functools.partial(MLPCritic, widths=CRITIC))
    monkeypatch.setattr("periplus.networks.ConvGenerator", functools.partial(ConvGenerator, channels=(6, 5, 4)))
    monkeypatch.setattr("periplus.networks.ConvCritic", functools.partial(ConvCritic, channels=(4, 6), hidden=10))


def config(model: str = "wgan-gp", **changes: object) -> AdversarialConfig:
    chosen = {"batch_size": 16, "latent_dim": 5, "device": "cpu", "precision": "float32", "held_out": 0, **changes}
    return AdversarialConfig(model, **chosen).resolve(1500)  # type: ignore[arg-type]


def loop(settings: AdversarialConfig, data: ImageData) -> Textbook:
    return Textbook(settings, *same_networks(settings, data), in_memory(data, settings.batch_size, "cpu"))


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ---- batches --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_become_the_images_that_they_are(channels: int) -> None:
    images = torch.randint(256, (5, channels, 4, 6), dtype=torch.uint8)
    data = ImageData(images, torch.arange(5), tuple("abcde"), "noise", "train")
    pictures = PictureData(data)
    assert len(pictures) == 5
    for k in range(5):
        image, label = pictures[k]
        torch.testing.assert_close(image, to_float(images[k]), rtol=0, atol=0)
        assert label == k and image.is_contiguous()
    assert textbook.picture_to_float(Image.new("RGB", (3, 2))).shape == (3, 2, 3)


@pytest.mark.parametrize("source", [*(functools.partial(from_loader, workers=w) for w in (0, 1, 2)), functools.partial(in_memory, device="cpu")])
def test_batches_are_whole_epochs_in_a_new_order(source: Callable[..., object], digits: ImageData) -> None:
    few = digits.subset(range(10))
    batches = source(few, 5)
    epochs = [torch.cat([next(batches), next(batches)]) for _ in range(4)]  # type: ignore[call-overload]
    batches.close()  # type: ignore[attr-defined]
    expected = to_float(few.images).flatten(1)
    for epoch in epochs:
        found = torch.cdist(epoch.flatten(1), expected).argmin(1)
        assert sorted(found.tolist()) == list(range(10))
        torch.testing.assert_close(epoch.flatten(1), expected[found])
    assert any(not torch.equal(epochs[0], epoch) for epoch in epochs[1:])


# ---- the textbook's loop --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@pytest.mark.parametrize("model", MODELS)
def test_the_textbook_trains(model: str, architecture: str, precision: str, digits: ImageData) -> None:
    torch.manual_seed(0)
    trained = loop(config(model, architecture=architecture, precision=precision, critic_steps=2), digits)
    before = [weights(trained.generator), weights(trained.critic)]
    for _ in range(3):
        trained.step()
    assert len(trained.losses) == 3 and all(math.isfinite(loss) for pair in trained.losses for loss in pair)
    for module, start in zip((trained.generator, trained.critic), before, strict=True):
        moved = (weights(module) - start).abs()
        assert float((moved > 0).float().mean()) > 0.9 and bool(moved.isfinite().all())
        assert float(moved.max()) < 10 * 3 * 2e-4  # a step of Adam is hardly ever longer than its learning rate


def test_its_penalty_is_ours_on_the_same_interpolates(digits: ImageData) -> None:
    critic = MLPCritic(digits.shape, widths=(16, 8))
    real, fake = to_float(digits.images[:20]), torch.rand(20, *digits.shape)
    torch.manual_seed(3)
    theirs = textbook.gradient_penalty(critic, real, fake)
    torch.manual_seed(3)
    ours = objectives.gradient_penalty(critic, real, fake).mean()
    torch.testing.assert_close(theirs, ours)
    for a, b in zip(*(torch.autograd.grad(p, list(critic.parameters()), materialize_grads=True) for p in (theirs, ours)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    with_graph = real.clone().requires_grad_()
    theirs = textbook.squared_slope(critic(with_graph), with_graph)
    torch.testing.assert_close(theirs, objectives.zero_centred_penalty(critic, real).mean())


@pytest.mark.parametrize("model", MODELS)
def test_its_losses_are_ours(model: str, digits: ImageData) -> None:
    """On the same images and fakes: the critic's loss, with the penalty's weight, and its gradient; the generator's loss."""
    settings = config(model, critic_dropout=0.0)
    generator, critic = build_adversarial("mlp", digits.shape, 5)
    real, fake = to_float(digits.images[:20]), generator(torch.randn(20, 5))
    torch.manual_seed(3)
    theirs = textbook.critic_loss(critic, real, fake.detach(), settings)
    theirs.backward()
    theirs_on_generator = textbook.generator_loss(critic, real, fake, settings)
    state = new_state(settings, periplus.networks.AdversarialNetworks(generator, copy.deepcopy(critic)), "cpu")
    torch.manual_seed(3)
    measures, _ = critic_step(state, settings, real, fake, torch.tensor(True))
    torch.testing.assert_close(theirs.detach(), measures[0])
    for mine, other in zip(state.critic.parameters(), critic.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, torch.zeros_like(mine) if other.grad is None else other.grad, atol=1e-5, rtol=1e-3)
    score = scores(critic, fake)
    expected = {
        "gan": objectives.gan_generator_loss(score),
        "wgan-gp": objectives.wgan_generator_loss(score),
        "rpgan": objectives.relativistic_generator_loss(scores(critic, real), score),
    }
    torch.testing.assert_close(theirs_on_generator, expected[model])


# ---- our contenders -------------------------------------------------------------------------------------------------------------------------


def test_our_step_is_that_of_a_run(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of the contender leave the weights that a run of three steps has."""
    kept = []
    monkeypatch.setattr("periplus.benchmarking.new_state", lambda *arguments: kept.append(new_state(*arguments)) or kept[0])
    settings = config(max_steps=3)
    step = our_step(settings, digits)
    for _ in range(3):
        step()
    periplus.train(settings, digits, tmp_path / "run")
    stored = checkpoints.latest_checkpoint(tmp_path / "run/checkpoints", warn=pytest.fail)
    assert stored is not None
    for name, tensor in kept[0].tensors().items():
        if name != "sums" and not name.startswith("ema."):  # the last line of metrics zeroes the sums, a checkpoint calibrates the average
            assert torch.equal(tensor, stored.tensors[name]), name


def test_what_is_not_finite_ends_the_benchmark(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("periplus.benchmarking.train_step", lambda *_: torch.tensor(False))
    with pytest.raises(NonFiniteError, match="wgan-gp became non-finite at batch size 16"):
        our_step(config(), digits)()


@pytest.mark.parametrize("model", ["wgan-gp", "rpgan"])
def test_the_critic_alone_takes_the_steps_of_training(model: str, digits: ImageData) -> None:
    """In our way to the bit what `critic_step` does, differentiated twice nearly that, and without penalty something else."""
    settings = config(model)
    real, fake = to_float(digits.images[:16]), torch.rand(16, *digits.shape)
    ends = {}
    for name in (*JUDGES, "run"):
        state = state_judged(settings, digits, name)
        torch.manual_seed(5)
        _, healthy = critic_step(state, settings, real, fake, torch.tensor(True), **({"judged": JUDGES[name]} if name in JUDGES else {}))
        assert healthy
        ends[name] = torch.cat([p.grad.flatten() for p in state.critic.parameters() if p.grad is not None])
    assert torch.equal(ends["ours"], ends["run"])
    torch.testing.assert_close(ends["double_backward"], ends["run"], atol=1e-5, rtol=1e-3)
    assert float((ends["none"] - ends["run"]).norm()) > 1e-2 * float(ends["run"].norm())
    assert set(critic_steps(settings, digits)) == {f"{fakes}_{way}" for fakes in FAKES for way in JUDGES}
    for step in critic_steps(settings, digits).values():
        step()


def test_first_order_is_what_is_called_ours(digits: ImageData) -> None:
    """The networks of the benchmark have a penalty in first order; else the two ways would be one."""
    for architecture in ("mlp", "conv"):
        critic = same_networks(config(architecture=architecture), digits).critic
        real, fake = to_float(digits.images[:4]), torch.rand(4, *digits.shape)
        of_first_order = judge(critic, real, fake, "interpolated")[2]
        names, nodes = set(), [of_first_order.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node.name() not in names:
                names.add(node.name())
                nodes += [parent for parent, _ in node.next_functions]
        assert not any("BackwardBackward" in name and "LeakyRelu" not in name for name in names), names


# ---- counting -------------------------------------------------------------------------------------------------------------------------------


def pairs(*widths: int) -> list[int]:
    return [a * b for a, b in zip(widths[:-1], widths[1:], strict=True)]


@pytest.mark.parametrize("model", MODELS)
def test_operations_are_counted_as_by_hand(model: str, digits: ImageData) -> None:
    batch, pixels = 16, 64
    settings = config(model)
    g, c = pairs(settings.latent_dim, *GENERATOR, pixels), pairs(pixels, *CRITIC, 1)
    one = 2 * batch  # operations for each weight that a batch passes
    generator = one * (sum(g) + sum(g) + sum(g[1:]))  # forward; back to the weights; back to what a layer receives, codes excepted
    hidden = c[:-1]  # where passes are written out, the one score of the last layer is a sum, no matrix product, but for its gradient
    scored, sloped = 2, {"gan": 0, "wgan-gp": 1, "rpgan": 2}[model]  # batches
    if model == "gan":  # its dropout needs passes as they come
        critic, through = scored * one * (sum(c) + sum(c) + sum(c[1:])), one * (sum(c) + sum(c))
    else:  # forward; to the weights from scores and slopes at once; back to what a layer receives. The generator's: forward, back to the images
        weights = scored * sum(c) + sloped * sum(hidden)
        critic, through = one * (scored * sum(hidden) + weights + scored * sum(hidden[1:])), 2 * one * sum(hidden)
    # slopes: down to the images, and up to the last rectifiers; between images also what rectifiers receive there, but for the first layer
    slopes = one * (sloped * (sum(hidden) + sum(hidden[:-1])) + (sum(hidden[1:]) if model == "wgan-gp" else 0))
    relative = one * sum(hidden) if model == "rpgan" else 0  # the generator's loss has the scores of real images in it
    assert step_flop(settings, digits) == generator + critic + through + slopes + relative


def test_convolutions_are_counted_as_by_hand(digits: ImageData) -> None:
    """A GAN's step. Multiplications of a convolution: weights times places of its output; transposed, times places of its input."""
    batch, settings = 16, config("gan", architecture="conv")
    g = [5 * 6 * 4, 6 * 5 * 16 * 4, 5 * 4 * 16 * 16, 4 * 1 * 9 * 64]  # 2 x 2, then 4 x 4 and 8 x 8 places
    c = [1 * 4 * 16 * 16, 4 * 6 * 16 * 4, 6 * 4 * 10, 10]
    one = 2 * batch
    generator, critic, through = one * (3 * sum(g) - g[0]), 2 * one * (3 * sum(c) - c[0]), one * 2 * sum(c)
    assert step_flop(settings, digits) == generator + critic + through


# ---- numbers --------------------------------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    rounds = Rounds([{"a": 10.0, "b": 5.0}, {"a": 100.0, "b": 20.0}, {"a": 3.0, "b": 3.0}])
    assert rounds.ratio("a", "b") == {"median": 2.0, "lowest": 1.0, "highest": 5.0, "rounds": [2.0, 5.0, 1.0]}
    assert summary([123456.0, 2.0])["rounds"] == [123500.0, 2.0] and significant(0.00123456) == 0.001235


SUMMARY = {"median", "lowest", "highest", "rounds"}


@pytest.mark.parametrize(("model", "precision"), [("gan", "float32"), ("wgan-gp", "bfloat16")])
def test_the_record(model: str, precision: str, digits: ImageData) -> None:
    settings = AdversarialConfig(model, latent_dim=5, device="cpu", precision=precision)  # type: ignore[arg-type]
    said: list[str] = []
    drawn = torch.random.get_rng_state()
    record = bench_train(settings, digits, (16, 32), rounds=2, seconds=0.004, product_size=64, say=said.append)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert json.loads(json.dumps(record)) == record
    assert {"model", "architecture", "data", "device", "precision", "threads", "rounds", "config", "batch_sizes", "commit", "machine"} <= set(record)
    assert record["data"] == {"name": "digits", "images": 1350, "shape": [1, 8, 8]} and record["threads"] == record["machine"]["threads"]
    assert len(said) == 4 and [s["batch_size"] for s in record["batch_sizes"]] == [16, 32]
    books = {"textbook_0", "textbook_1", "textbook_2"}
    extra = {"periplus_float32", "memory_bfloat16"} if precision == "bfloat16" else set()
    names = {"periplus", "memory"} | books | extra
    for size in record["batch_sizes"]:
        rates = size["images_per_second"]
        assert set(rates) == names and all(set(r) == SUMMARY and len(r["rounds"]) == 2 and r["lowest"] > 0 for r in rates.values())
        assert size["textbook"] == max(books, key=lambda name: rates[name]["median"])
        first = rates["periplus"]["rounds"][0] / rates[size["textbook"]]["rounds"][0]
        assert size["ratio"]["textbook"]["rounds"][0] == pytest.approx(first, rel=2e-3)
        assert size["seconds_per_100_epochs"]["memory"] == pytest.approx(135_000 / rates["memory"]["median"], rel=2e-3)
        assert set(size["product_gflop_per_second"]) == {"float32", precision}
        assert set(size["ratio"]) == {"textbook", "memory"} | extra and set(size["share_of_product"]) == {"float32", precision}
        for kind, name in {"float32": "periplus_float32" if extra else "periplus", precision: "periplus"}.items():
            share = size["step_gflop"] * rates[name]["rounds"][1] / size["batch_size"] / size["product_gflop_per_second"][kind]["rounds"][1]
            assert size["share_of_product"][kind]["rounds"][1] == pytest.approx(share, rel=3e-3)
        assert set(size["ratio_limit"]) == {"textbook", "memory"}  # what is left of the ratio is the share of the product, but for rounding
        for name, limit in size["ratio_limit"].items():
            for found, share, bound in zip(
                size["ratio"][name]["rounds"], size["share_of_product"][precision]["rounds"], limit["rounds"], strict=True
            ):
                assert found / share == pytest.approx(bound, rel=3e-3)
        assert (size["penalty"] is None) == (PENALTIES[model] == "none")
        for fakes in FAKES if size["penalty"] else ():
            found = size["penalty"][fakes]
            assert set(found["milliseconds"]) == {"none", "ours", "double_backward"} and set(found["over_none"]) == {"ours", "double_backward"}
    assert sum("bound" in row[0] for row in next(tables(record))[1]) == 2
    for (header, rows), size in zip(tables(record), record["batch_sizes"], strict=True):
        assert header == [f"batch {size['batch_size']}", "median", "lowest", "highest"] and all(len(row) == 4 for row in rows)
        assert sum("penalty" in row[0] or "twice" in row[0] for row in rows) == (0 if model == "gan" else 4)
        assert float(rows[0][1].replace(",", "")) == pytest.approx(size["images_per_second"]["periplus"]["median"], rel=1e-2)


# ---- the command ----------------------------------------------------------------------------------------------------------------------------

TINY = ("--data", "digits", "--batch-sizes", "16", "--rounds", "1", "--seconds", "0.01", "--threads", "1", "--device", "cpu")


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *map(str, words)])
    return (stop.value.code or 0, *capsys.readouterr())


@pytest.fixture
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("periplus.benchmarking.bench_train", functools.partial(bench_train, product_size=64))


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_product: None) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "train", *TINY, "--model", "gan", "--out", "there/b.json")
    assert code == 0 and out.endswith("there/b.json\n") and "periplus / fastest textbook" in out and "round 1 of 1" in err
    record = json.loads((tmp_path / "there/b.json").read_text())
    assert record["model"] == "gan" and record["command"].split()[0] == "periplus" and record["batch_sizes"][0]["penalty"] is None
    code, out, _ = call(capsys, "train", *TINY, "--architecture", "conv", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "bench_train.json").read_text())
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    code, out, _ = call(capsys, "train", *TINY, "--model", "rpgan")
    assert code == 0 and out.endswith("benchmarks/results/bench_train_rpgan_mlp_digits_float32_cpu.json\n")
    assert len(list((tmp_path / "benchmarks/results").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "periplus bench needs one of train first"),
        ("trian", "unknown word 'bench trian' (did you mean 'train'?)"),
        ("train --model vae", "--model"),
        ("train --architecture linear", "--architecture"),
        ("train --data digits --batch-sizes 1", "--batch-sizes has 1: from 2 to the 1350"),
        ("train --data digits --batch-sizes 16 1351", "--batch-sizes has 1351: from 2 to the 1350 training images can be served"),
        ("train --data digits --batch-sizes", "--batch-sizes"),
        ("train --data digits --rounds 0", "--rounds is 0: at least 1 is needed"),
        ("train --data digits --seconds 0", "--seconds is 0: more than 0"),
        ("train --data digits --seconds nan", "--seconds is nan"),
        ("train --data digits --threads 0", "--threads is 0: at least 1 is needed"),
        ("train --data digits --device warp", "--device is 'warp'"),
        ("train --data digits --precision int8", "--precision"),
        ("train --data digits --image-size 7 --architecture conv", "7x7 cannot be halved twice"),
        ("train --data digits --out FOLDER", "a folder: name a file"),
        ("train --data nonesuch", "nonesuch"),
    ],
)
def test_bad_options_are_named(words: str, named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words.replace("FOLDER", str(tmp_path)).split())
    assert code in (2, 3) and not out and len(err.splitlines()) == 1 and named in err, err
    assert not list(tmp_path.iterdir())
