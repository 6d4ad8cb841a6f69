"""What samples are judged by: shipped networks are what was shipped, features are functions of one image, training is a function of the data."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import periplus
from periplus import features
from periplus.data import ImageData
from periplus.errors import RunError, UsageError
from periplus.features import FEATURES, FeatureNetwork, extractor_for, load_extractor, random_extractor, read_extractor, train_extractor
from periplus.features.network import folded
from periplus.features.recipe import batches, rise_and_fall, shifted, steps_for, turned

torch.set_num_threads(1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """uint8 images that nobody has drawn."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def bars(count: int, labelled: bool = True, channels: int = 1, name: str = "bars") -> ImageData:
    """Bright bars on noise, 8 x 8; the place of the bar is the class."""
    labels = torch.arange(count) % 3
    bright = (torch.arange(8) // 3 == labels[:, None])[:, None, None, :].expand(count, channels, 8, 8)
    images = (noise(count, channels, 8, 8) // 4) + 150 * bright
    return ImageData(images.to(torch.uint8), labels if labelled else None, ("left", "middle", "right") if labelled else (), name, "all")


def flip_bit(path: Path, place: int) -> None:
    """Damage one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# ---- the networks that are shipped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", features.SHIPPED)
def test_a_shipped_network_is_the_file_whose_hash_is_pinned(name: str) -> None:
    found = load_extractor(name)
    assert found.sha256 == features.SHIPPED[name] == hashlib.sha256(features.shipped_file(name).read_bytes()).hexdigest()
    assert found.record()["sha256"] == features.SHIPPED[name] and found.record()["name"] == f"{name}-recipe-1"


@pytest.mark.parametrize("place", [-1, -2000, 100])
def test_a_shipped_network_with_one_changed_bit_is_refused(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "digits.safetensors"
    path.write_bytes(features.shipped_file("digits").read_bytes())
    monkeypatch.setattr(features, "shipped_file", lambda name: path)
    assert load_extractor("digits").sha256 == features.SHIPPED["digits"]
    flip_bit(path, place)
    with pytest.raises(RunError, match=r"digits\.safetensors"):
        load_extractor("digits")


def test_no_other_network_is_shipped() -> None:
    with pytest.raises(UsageError, match="no extractor 'inception'.*mnist and digits"):
        load_extractor("inception")


def test_the_digits_network_is_as_accurate_as_it_says() -> None:
    test = periplus.load_data("digits", "test")
    judge = load_extractor("digits")
    right = (judge.classify(judge(test.images)) == test.labels).double().mean()
    assert judge.accuracy is not None and float(right) == judge.accuracy.value > 0.97
    assert judge.accuracy.low < judge.accuracy.value < judge.accuracy.high


def test_the_digits_network_was_trained_on_the_digits(digits: ImageData) -> None:
    assert load_extractor("digits").trained_on == digits.content_hash()
    assert load_extractor("digits").classes == digits.classes


def test_the_mnist_network_is_as_accurate_as_it_says(real_data: Path) -> None:
    """On 1500 test images: the share that it gets right lies in the interval that it claims, widened by the noise of so few."""
    test = periplus.load_data("mnist", "test", root=real_data)
    judge = load_extractor("mnist")
    assert judge.accuracy is not None and judge.accuracy.value >= 0.993
    some = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:1500])
    right = float((judge.classify(judge(some.images)) == some.labels).double().mean())
    error = (judge.accuracy.value * (1 - judge.accuracy.value) / len(some)) ** 0.5
    assert right >= 0.993 and abs(right - judge.accuracy.value) < 3 * error


# ---- features are functions of one image ----------------------------------------------------------------------------------------------------


def test_folding_batch_normalisation_changes_no_feature() -> None:
    torch.manual_seed(0)
    trained = FeatureNetwork(2, 5, batch_norm=True).train()
    with torch.no_grad():
        for layer in trained.body:
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
        for seed in range(20):  # running means and variances that are not those of the start
            trained(noise(32, 2, 9, 7, seed=seed).float() / 255)
    plain = folded(trained.eval(), 2, 5)
    x = noise(64, 2, 9, 7, seed=99).float() / 255
    with torch.no_grad():
        wanted, found = trained(x), plain(x)
        assert float(wanted.std()) > 0.1
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert torch.allclose(plain.head(found), trained.head(wanted), rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in plain.body)


def test_features_depend_on_no_neighbour_and_on_no_number_of_images(digits: ImageData) -> None:
    judge, images = load_extractor("digits"), digits.images[:1100]
    whole = judge(images)
    assert whole.shape == (1100, FEATURES) and whole.dtype == torch.float32 and not whole.requires_grad
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(1))
    assert torch.equal(judge(images[order]), whole[order])  # to the bit: blocks have one size
    assert torch.equal(judge(images[:501]), whole[:501])
    for few in (1, 2, 37):
        assert torch.allclose(judge(images[:few]), whole[:few], rtol=1e-5, atol=1e-5)


def test_bytes_and_floats_are_the_same_images(digits: ImageData) -> None:
    judge, images = load_extractor("digits"), digits.images[:600]
    assert torch.equal(judge(images), judge(images.float() / 255))
    assert torch.allclose(judge(images), judge(images.double() / 255), atol=1e-5)


def test_images_that_the_network_does_not_take_are_refused_in_words() -> None:
    with pytest.raises(UsageError, match="digits-recipe-1.*1 channel"):
        load_extractor("digits")(noise(4, 3, 8, 8))
    with pytest.raises(UsageError, match="digits-recipe-1"):
        load_extractor("digits")(noise(4, 8, 8))
    with pytest.raises(UsageError, match="digits-recipe-1"):
        load_extractor("digits")(noise(0, 1, 8, 8))


def test_a_network_per_channel_is_the_concatenation_of_its_channels() -> None:
    data = ImageData(noise(40, 3, 28, 28), torch.zeros(40, dtype=torch.int64), ("000",), "stacked-mnist", "train", "stacked-mnist")
    judge, single = extractor_for(data), load_extractor("mnist")
    found = judge(data.images)
    assert judge.per_channel and judge.name == "mnist-per-channel" and judge.sha256 == single.sha256
    assert torch.equal(found, torch.cat([single(data.images[:, [k]]) for k in range(3)], 1))
    assert torch.equal(judge.classify(found), torch.stack([single.classify(single(data.images[:, [k]])) for k in range(3)], 1))


def test_random_weights_are_the_same_for_everybody() -> None:
    code = "import torch; torch.manual_seed(5); from periplus.features import random_extractor as r; print(r(1).sha256, r(3).sha256)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300, env=environment)
    before = torch.get_rng_state()
    assert told.stdout.split() == [random_extractor(1).sha256, random_extractor(3).sha256]
    assert torch.equal(before, torch.get_rng_state())
    one = random_extractor(1)
    assert one.name == "random-1" and one.accuracy is None and one.trained_on is None
    spread = one(noise(300, 1, 28, 28)).std(0)
    assert float(spread.median()) > 1e-3, "features that are constant judge nothing"
    with pytest.raises(UsageError, match="random-1.*no classes"):
        one.classify(one(noise(2, 1, 28, 28)))


# ---- networks that are trained once ---------------------------------------------------------------------------------------------------------


def test_named_sets_are_judged_by_shipped_networks_and_their_namesakes_are_not(digits: ImageData, tmp_path: Path) -> None:
    assert extractor_for(digits).sha256 == features.SHIPPED["digits"]
    binarised = ImageData(noise(4, 1, 28, 28), None, (), "binarized-mnist", "train", "binarized-mnist")
    assert extractor_for(binarised).sha256 == features.SHIPPED["mnist"]
    folder = tmp_path / "mnist.d"
    folder.mkdir()
    np.savez(folder / "digits", images=bars(24).images.numpy())
    (folder / "digits.npz").rename(folder / "digits")  # a file whose name is that of a set, and whose images are not
    found = periplus.load_data(folder / "digits")
    assert found.name == "digits" and found.shape == digits.shape
    assert extractor_for(found, tmp_path).sha256 != features.SHIPPED["digits"]


def test_stacked_images_of_another_size_get_a_network_of_their_own(tmp_path: Path) -> None:
    data = replace(bars(24, channels=3), name="stacked-mnist", source="stacked-mnist")
    assert not extractor_for(data, tmp_path).per_channel


def test_a_network_is_trained_once_and_a_damaged_file_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    data, notes, steps = bars(60), list[str](), list[tuple[int, int]]()

    def judge() -> features.Extractor:
        notes.clear()
        steps.clear()
        return extractor_for(data, tmp_path, lambda done, of: steps.append((done, of)), notes.append)

    state = torch.get_rng_state()
    first = judge()
    assert torch.equal(state, torch.get_rng_state()), "training took random numbers that are the user's"
    assert steps == [(n, steps_for(54)) for n in range(1, steps_for(54) + 1)]  # a tenth is held out
    (path,) = tmp_path.glob("*.safetensors")
    assert len(notes) == 1 and str(path) in notes[0] and path.name.startswith(f"bars-{data.content_hash()[:16]}")
    content = path.read_bytes()
    assert first.sha256 == hashlib.sha256(content).hexdigest() and first.trained_on == data.content_hash()
    assert first.accuracy is not None and first.accuracy.value > 0.5 and first.classes == data.classes

    again = judge()
    assert (steps, notes, again.sha256, again.record()) == ([], [], first.sha256, first.record())
    assert torch.equal(again(data.images), first(data.images))

    for damage in (lambda: path.write_bytes(content[:-7]), lambda: path.write_bytes(b""), lambda: flip_bit(path, -1)):
        damage()
        torch.set_num_threads(2)  # whatever their number, one is used
        try:
            mended = judge()
        finally:
            torch.set_num_threads(1)
        assert len(steps) == steps_for(54) and "made again" in notes[0] and str(path) in notes[0]
        assert mended.sha256 == first.sha256 and path.read_bytes() == content
    assert torch.equal(state, torch.get_rng_state())


def test_other_data_of_the_same_name_get_another_network(tmp_path: Path) -> None:
    a, b = (extractor_for(data, tmp_path) for data in (bars(24), bars(27)))
    assert a.sha256 != b.sha256 and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_without_labels_a_network_learns_turns_and_tells_no_classes(tmp_path: Path) -> None:
    data = bars(360, labelled=False).subset(torch.arange(0, 360, 3))  # bars at the left: all four turns of them look different
    judge = train_extractor(data, tmp_path / "network.safetensors")
    assert judge.classes == () and judge.accuracy is None
    with pytest.raises(UsageError, match="tells no classes"):
        judge.classify(judge(data.images))
    turns = torch.arange(4).repeat_interleave(len(data))
    told = judge.network.head(judge(turned(data.images.repeat(4, 1, 1, 1), turns))).argmax(1)
    assert float((told == turns).double().mean()) > 0.6  # 0.25 by chance


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_what_is_no_network_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"odd\.safetensors is not a feature network"):
        read_extractor(path)
    with pytest.raises(RunError, match=r"absent\.safetensors is not a feature network"):
        read_extractor(tmp_path / "absent.safetensors")


# ---- the recipe -----------------------------------------------------------------------------------------------------------------------------


def test_shifts_move_by_a_pixel_at_most_and_repeat_the_border() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    found = shifted(image.expand(400, 1, 8, 8), torch.Generator().manual_seed(0))
    moves = {
        (dy, dx): image[0, 0][(torch.arange(8) + dy).clamp(0, 7)][:, (torch.arange(8) + dx).clamp(0, 7)] for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    }
    counts = {move: int((found[:, 0] == wanted).all((1, 2)).sum()) for move, wanted in moves.items()}
    assert sum(counts.values()) == 400 and min(counts.values()) > 400 / 9 - 4 * (400 / 9) ** 0.5


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 5, 8)])
def test_turns_are_four_different_images_of_one_shape(shape: tuple[int, int, int]) -> None:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    found = turned(image.expand(4, *shape), torch.arange(4))
    assert found.shape == (4, *shape) and len(found.unique(dim=0)) == 4
    assert torch.equal(found[0], image[0]) and torch.equal(found[2], image[0].flip((1,)) if shape[1] != shape[2] else image[0].flip((1, 2)))
    assert torch.equal(found.flatten(1).sort().values, image.flatten(1).sort().values.expand(4, -1))


def test_batches_pass_over_all_images_and_the_step_size_rises_and_falls() -> None:
    rows = torch.cat(list(batches(300, 30, torch.Generator().manual_seed(0))))
    counts = torch.bincount(rows, minlength=300)
    assert len(rows) == 30 * 128 and int(counts.max() - counts.min()) <= 1
    factors = [rise_and_fall(step, 200) for step in range(200)]
    assert max(factors) == 1 == factors[19] and factors[0] == pytest.approx(0.05) and factors[-1] < 1e-3
    assert factors[:20] == sorted(factors[:20]) and factors[19:] == sorted(factors[19:], reverse=True)
    assert steps_for(60_000) == 10 * 60_000 // 128 and steps_for(100) == 40 * 100 // 128 and steps_for(1) == 1
