"""Feature networks: what ships is what was measured, what is made is made once, and no feature depends on its neighbours."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from periplus import ImageData, UsageError, features, load_data
from periplus.errors import RunError
from periplus.features import Extractor, extractor_for, load_extractor, random_extractor, read_extractor, shipped_file, train_extractor
from periplus.features.network import FeatureNetwork, folded
from periplus.features.recipe import rise_and_fall, steps_for, train_network, turned


def few(count: int = 120, channels: int = 1, labelled: bool = True, side: int = 8) -> ImageData:
    """Bright quarters: the place is the class."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 60, (count, channels, side, side), generator=generator)
    for k in range(4):
        rows, columns = slice(side // 2 * (k // 2), side // 2 * (k // 2 + 1)), slice(side // 2 * (k % 2), side // 2 * (k % 2 + 1))
        images[labels == k, :, rows, columns] += 150
    return ImageData(images.to(torch.uint8), labels if labelled else None, tuple("abcd") if labelled else (), "quarters", "train")


# ---- what ships -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_shipped_networks_are_small_and_what_was_pinned(name: str):
    assert shipped_file(name).stat().st_size <= 300_000
    assert hashlib.sha256(shipped_file(name).read_bytes()).hexdigest() == features.SHIPPED[name] == load_extractor(name).sha256


def test_a_changed_byte_of_a_shipped_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = bytearray(shipped_file("digits").read_bytes())
    content[-1] ^= 1
    (tmp_path / "digits.safetensors").write_bytes(content)
    monkeypatch.setattr(features, "shipped_file", lambda name: tmp_path / f"{name}.safetensors")
    with pytest.raises(RunError, match="is not the file that was shipped"):
        load_extractor("digits")


def test_other_names_are_not_shipped():
    with pytest.raises(UsageError, match="'mnist' and|mnist and digits"):
        load_extractor("inception")


def test_recorded_accuracy_is_that_of_the_test_digits():
    extractor, test = load_extractor("digits"), load_data("digits", "test")
    right = (extractor.classify(extractor(test.images)) == test.labels).double().mean().item()
    assert extractor.accuracy is not None and right == pytest.approx(extractor.accuracy.value, abs=1e-12) and right > 0.97


def test_mnist_network_is_as_good_as_promised(real_data: Path):
    extractor, test = load_extractor("mnist"), load_data("mnist", "test", root=real_data)
    assert extractor.accuracy is not None and extractor.accuracy.value >= 0.993
    rows = torch.arange(0, 10_000, 5)
    wrong = (extractor.classify(extractor(test.images[rows])) != test.labels[rows]).sum().item()
    assert wrong <= 2000 * 0.004 + 4 * (2000 * 0.004) ** 0.5


# ---- features -------------------------------------------------------------------------------------------------------------------------------


def test_features_depend_on_no_other_image(digits: ImageData):
    extractor = load_extractor("digits")
    whole = extractor(digits.images[:1200])
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(extractor(digits.images[:1200][order]), whole[order])
    assert torch.allclose(extractor(digits.images[:10]), whole[:10], rtol=1e-5, atol=1e-5)


def test_bytes_and_floats_are_the_same_images(digits: ImageData):
    extractor = load_extractor("digits")
    assert torch.equal(extractor(digits.images[:50]), extractor(digits.images[:50].float() / 255))


def test_folding_the_batch_norm_changes_no_feature():
    torch.manual_seed(0)
    network = FeatureNetwork(2, 5, batch_norm=True)
    for layer in network.body:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2), nn.init.normal_(layer.bias)
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    images = torch.rand(20, 2, 11, 9)
    with torch.no_grad():
        assert torch.allclose(folded(network.eval(), 2, 5)(images), network(images), rtol=1e-4, atol=1e-5)


def test_each_channel_is_an_image_of_its_own(digits: ImageData):
    single = load_extractor("digits")
    stacked = Extractor("stacked", single.sha256, single.network, single.classes, per_channel=True)
    images = torch.cat([digits.images[:30], digits.images[30:60]], 1)
    told = stacked(images)
    assert torch.allclose(told, torch.cat([single(digits.images[:30]), single(digits.images[30:60])], 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(stacked.classify(told), torch.stack([single.classify(told[:, :64]), single.classify(told[:, 64:])], 1))


def test_the_random_network_is_the_same_for_everybody():
    code = "from periplus.features import random_extractor; print(random_extractor(1).sha256)"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    torch.manual_seed(5)
    assert random_extractor(1).sha256 == elsewhere != random_extractor(3).sha256
    with pytest.raises(UsageError, match="tells no classes"):
        random_extractor(1).classify(torch.zeros(2, 64))


def test_random_features_keep_the_scale_of_their_layers(digits: ImageData):
    told = random_extractor(1)(digits.images[:300])
    assert 0.05 < told.std().item() < 5


# ---- the recipe -----------------------------------------------------------------------------------------------------------------------------


def test_the_recipe_learns_and_gives_the_same_bytes_twice(tmp_path: Path):
    data = few()
    first, again = (train_extractor(data, tmp_path / name, seed=3) for name in ("a", "b"))
    assert first.sha256 == again.sha256 and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.sha256 != train_extractor(data, tmp_path / "c", seed=4).sha256
    assert first.accuracy is not None and first.accuracy.value > 0.9 and first.classes == tuple("abcd")


def test_the_number_of_threads_is_given_back_and_does_not_matter():
    before = torch.get_num_threads()
    seen: list[int] = []
    train_network(few(32), on_step=lambda step, steps: seen.append(torch.get_num_threads()))
    assert set(seen) == {1} and torch.get_num_threads() == before


def test_unlabelled_images_are_told_by_their_turns(tmp_path: Path):
    extractor = train_extractor(few(labelled=False), tmp_path / "turns")
    assert extractor.classes == () and extractor.accuracy is None
    with pytest.raises(UsageError, match="tells no classes"):
        extractor.classify(torch.zeros(1, 64))


@pytest.mark.parametrize("shape", [(6, 6), (5, 7)])
def test_turns_are_four_different_ones(shape: tuple[int, int]):
    images = torch.rand(1, 1, *shape).expand(4, -1, -1, -1)
    made = turned(images, torch.arange(4))
    assert torch.equal(made[0], images[0]) and len({m.numpy().tobytes() for m in made}) == 4
    assert all(torch.equal(m.flatten().sort().values, images[0].flatten().sort().values) for m in made)


def test_the_learning_rate_rises_and_falls():
    rates = [rise_and_fall(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1) and rates[0] < 0.2 and rates[-1] < 0.01
    assert steps_for(60_000) == 4687 and steps_for(1500) == 468 and steps_for(3) == 1


# ---- the cache ------------------------------------------------------------------------------------------------------------------------------


def test_a_network_is_made_once_and_made_again_when_damaged(tmp_path: Path):
    said: list[str] = []
    first = extractor_for(few(), tmp_path, note=said.append)
    (path,) = tmp_path.iterdir()
    assert len(said) == 1 and "training the feature network of quarters once" in said[0]
    stamp = path.stat().st_mtime_ns
    assert extractor_for(few(), tmp_path, note=said.append).sha256 == first.sha256 and path.stat().st_mtime_ns == stamp and len(said) == 1
    path.write_bytes(path.read_bytes()[:1000])
    assert extractor_for(few(), tmp_path, note=said.append).sha256 == first.sha256
    assert "is not a feature network" in said[1] and "made again" in said[1]


def test_other_data_get_another_network(tmp_path: Path):
    assert extractor_for(few(), tmp_path).trained_on == few().content_hash() != extractor_for(few(121), tmp_path).trained_on
    assert len(list(tmp_path.iterdir())) == 2


def test_known_sets_are_judged_by_what_ships(digits: ImageData, tmp_path: Path):
    assert extractor_for(digits, tmp_path).sha256 == features.SHIPPED["digits"] and not list(tmp_path.iterdir())
    larger = ImageData(torch.zeros(40, 1, 12, 12, dtype=torch.uint8), None, (), "digits", "train")
    assert extractor_for(larger, tmp_path).sha256 != features.SHIPPED["digits"]


def test_anything_else_is_not_a_network(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"not this")
    with pytest.raises(RunError, match=r"x is not a feature network"):
        read_extractor(tmp_path / "x")
    with pytest.raises(RunError, match=r"absent is not a feature network"):
        read_extractor(tmp_path / "absent")
    shutil.copy(shipped_file("digits"), tmp_path / "fine")
    assert read_extractor(tmp_path / "fine").sha256 == features.SHIPPED["digits"]
