"""Locating and pricing: planted codes are found, a stopped search goes on to the same bits, verdicts and sentences follow the data."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import periplus
from periplus import DataError, RunError, UsageError, locating, passages
from periplus.config import AdversarialConfig, AutoencoderConfig
from periplus.locating import Search, Targets

torch.set_num_threads(1)
D = 3


class Linear(nn.Module):
    """G(z) = 0.5 + W z: one minimum for each image, the projection."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(64, D, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor) -> Tensor:
        return (0.5 + z @ self.weight.T).view(-1, 1, 8, 8)


class Folded(Linear):
    """G(z) = 0.5 + W |z|: eight minima for each image in the range."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward((z.square() + 0.01).sqrt())


def train(data: periplus.ImageData, out: Path, generator: nn.Module, epochs: int = 1) -> periplus.Run:
    critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1), nn.Flatten(0))
    config = AdversarialConfig(model="gan", epochs=epochs, max_steps=1, batch_size=16, latent_dim=D, learning_rate=1e-9, ema=0.0, precision="float32")
    return periplus.train(config, data, out, networks=(generator, critic))


@pytest.fixture
def linear(digits: periplus.ImageData, tmp_path: Path) -> periplus.Run:
    return train(digits, tmp_path / "linear", Linear())


@pytest.fixture
def folded(digits: periplus.ImageData, tmp_path: Path) -> periplus.Run:
    return train(digits, tmp_path / "folded", Folded())


def planted(run: periplus.Run, codes: Tensor) -> Targets:
    """Images of these codes, to the nearest of 256 levels."""
    images = (run.decode(codes).clamp(0, 1) * 255).round().to(torch.uint8)
    n = len(codes)
    return Targets(images, tuple(f"planted {k}" for k in range(n)), tuple(range(n)), (None,) * n)


CODES = torch.tensor([[0.5, -0.7, 1.1], [-1.0, 0.4, 0.6], [0.8, 0.9, -0.5]])


# ---- codes ------------------------------------------------------------------------------------------------------------------------------------


def test_a_linear_decoder_has_one_minimum_and_it_is_the_planted_code(linear: periplus.Run) -> None:
    targets, search = planted(linear, CODES), Search(starts=4)
    found = locating.locate(linear, targets, search)
    assert (found.z - CODES).abs().max() < 0.03  # half a grey level, through the pseudo-inverse
    record = locating.inversion_record(linear, targets, found, search)
    assert [image["verdict"] for image in record["images"]] == ["same"] * 3
    assert record["statements"][1].startswith("The same z*? Yes, as far as these starts tell: for 3 of 3 images all 4 end in one certified minimum.")
    assert "for 3 of 3 images (3 smooth)" in record["statements"][2]
    assert "no z* lies on its boundary" in record["statements"][3]


def test_a_folded_decoder_has_several_of_one_image(folded: periplus.Run) -> None:
    targets, search = planted(folded, CODES.abs()), Search(starts=12)
    found = locating.locate(folded, targets, search)
    record = locating.inversion_record(folded, targets, found, search)
    assert {image["verdict"] for image in record["images"]} == {"different"}
    assert all(image["distinct"] > image["distinct_images"] == 1 for image in record["images"])  # the same image, from other codes
    assert "The same z*? No: for 3 of 3 images the 12 starts end in different certified minima" in record["statements"][1]


def test_the_record_agrees_with_the_tensors(folded: periplus.Run) -> None:
    targets, search = planted(folded, CODES.abs()), Search(starts=6)
    found = locating.locate(folded, targets, search)
    record = locating.inversion_record(folded, targets, found, search)
    shown = (folded.decode(found.z).double() - targets.images.double() / 255).square().flatten(1).sum(1)
    for row, image in enumerate(record["images"]):
        assert image["error"] == pytest.approx(float(shown[row]), rel=1e-3)
        assert image["rms"] == pytest.approx(math.sqrt(float(shown[row]) / 64), rel=1e-3)
        assert image["norm"] == pytest.approx(float(found.z[row].norm()))
        assert image["best_share"] == pytest.approx(float((found.cluster[row] == found.cluster[row, found.best[row]]).double().mean()))
        assert len(image["minima"]) == image["distinct"]
        assert sum(minimum["starts"] for minimum in image["minima"]) == round(6 * image["certified_share"])
        assert len({minimum["image"] for minimum in image["minima"]}) == image["distinct_images"]
    assert record["search"]["starts"] == record["starts"] == 6 and not record["encoder_start"]


def test_an_encoder_adds_its_guess(digits: periplus.ImageData, tmp_path: Path) -> None:
    config = AutoencoderConfig(model="vae", max_steps=20, batch_size=32, latent_dim=D, hidden=8, depth=1, precision="float32")
    run = periplus.train(config, digits, tmp_path / "vae")
    targets, search = locating.choose(locating.images_of(run), 2), Search(starts=1)
    begin = locating.starts_of(run, targets, search, locating.pool_of(run, search))
    assert begin.shape == (2, 2, D) and torch.equal(begin[:, 1], run.encode(targets.images)[0])
    found = locating.locate(run, targets, search)
    record = locating.inversion_record(run, targets, found, search)
    assert record["encoder_start"] and record["starts"] == 2
    assert record["statements"][-1].startswith("One of the 2 starts was the encoder's guess")


def test_starts_are_a_function_of_the_image_alone(linear: periplus.Run) -> None:
    data, search = locating.images_of(linear), Search(starts=5)
    pool = locating.pool_of(linear, search)

    def starts(rows: list[int], pool: locating.Pool = pool) -> Tensor:
        return locating.starts_of(linear, locating.pick(data, rows), search, pool)

    together, alone = starts([3, 7, 9]), starts([7])
    assert torch.equal(together[1], alone[0])
    assert len(together[1].unique(dim=0)) == 5
    assert not torch.equal(starts([7], locating.pool_of(linear, Search(seed=1))), alone)
    x = data.images[7].flatten().float() / 255
    near = (linear.decode(alone[0]).flatten(1) - x).square().sum(1)
    assert float(near.mean()) < float((pool.images - x).square().sum(1).mean())  # screened


# ---- stopping -----------------------------------------------------------------------------------------------------------------------------------


def test_a_stopped_search_goes_on_to_the_same_bits(folded: periplus.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locating, "CHUNK", {"cpu": 1})
    targets, search, folder = planted(folded, CODES.abs()), Search(starts=3), tmp_path / "parts"
    whole = locating.locate(folded, targets, search)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        locating.locate(folded, targets, search, folder, stop)
    assert sorted(p.name for p in folder.iterdir()) == ["job.json", "part-000000.safetensors", "part-000001.safetensors"]
    before = (folder / "part-000001.safetensors").stat().st_mtime_ns
    resumed = locating.locate(folded, targets, search, folder)
    assert (folder / "part-000001.safetensors").stat().st_mtime_ns == before  # taken, not made again
    assert resumed.domain == whole.domain
    for name, tensor in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name].nan_to_num(7), tensor.nan_to_num(7)), name


def test_another_job_is_refused_and_a_broken_part_is_named(folded: periplus.Run, tmp_path: Path) -> None:
    targets, search, folder = planted(folded, CODES.abs()), Search(starts=2), tmp_path / "parts"
    locating.locate(folded, targets, search, folder)
    with pytest.raises(RunError, match=r"parts holds another job \(starts was 2, is 3\): choose another folder, or delete it"):
        locating.locate(folded, targets, Search(starts=3), folder)
    with pytest.raises(RunError, match="another job .images was"):
        locating.locate(folded, targets.at([0]), search, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locating, "digest_of", lambda tensors: "of other weights")
        with pytest.raises(RunError, match="another job .weights was"):
            locating.locate(folded, targets, search, folder)
    broken = folder / "part-000000.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(RunError, match=r"part-000000.safetensors cannot be read .*: delete it"):
        locating.locate(folded, targets, search, folder)


# ---- which images -------------------------------------------------------------------------------------------------------------------------------


def test_images_are_chosen_by_place_and_by_class(linear: periplus.Run) -> None:
    data = locating.images_of(linear)
    assert data.split == "test" and len(data) == 297
    assert torch.equal(locating.choose(data, 4).images, data.images[:4])
    of_classes = locating.choose(data, 2, ["3", "8"])
    assert of_classes.labels == ("3", "3", "8", "8")
    assert len(locating.choose(data, None)) == 297
    assert data.labels is not None and len(locating.choose(data, None, ["3"])) == int((data.labels == 3).sum())
    assert locating.pick(data, [5]).names == ("test 5",)


def test_files_are_read_in_the_size_of_the_run(linear: periplus.Run, tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(np.stack([np.full((16, 16), v, np.uint8) for v in (100, 50, 200)], -1)).save(tmp_path / "b.png")
    targets = locating.read_files(linear, [tmp_path / "a.png", tmp_path / "b.png"])
    assert torch.equal(targets.images[0, 0], torch.from_numpy(levels))
    assert (targets.images[1] == round(0.299 * 100 + 0.587 * 50 + 0.114 * 200)).all()
    assert targets.names == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda run, data, folder: locating.choose(data, 0), UsageError, "--n is 0"),
        (lambda run, data, folder: locating.choose(data, 1, ["12"]), UsageError, "--classes has '12'.*digits has 0, 1"),
        (lambda run, data, folder: locating.pick(data, [297]), UsageError, "image 297 does not exist: digits .test. has images 0 to 296"),
        (lambda run, data, folder: locating.images_of(run, "valid"), UsageError, "--split is 'valid': digits has train, test"),
        (lambda run, data, folder: locating.read_files(run, [folder / "no.png"]), DataError, "no.png: no such file"),
        (lambda run, data, folder: locating.read_files(run, [folder / "config.toml"]), DataError, "config.toml.*is not a readable image"),
        (lambda run, data, folder: locating.locate(run, locating.pick(data, [0]), Search(starts=0)), UsageError, "--starts is 0"),
        (lambda run, data, folder: locating.locate(run, locating.pick(data, [0]), Search(radius=-1.0)), UsageError, "radius -1"),
        (lambda run, data, folder: passages.first_pairs(data, 0), UsageError, "--n is 0: from 1 to 148 pairs"),
        (lambda run, data, folder: passages.chosen_pairs(data, [(4, 4)]), UsageError, "'test 4' and 'test 4' are the same image"),
        (lambda run, data, folder: passages.class_pairs(data, ["3"]), UsageError, "--classes has 1 name: two are needed"),
        (lambda run, data, folder: passages.class_pairs(data, ["3", "3"]), UsageError, "two different classes"),
        (lambda run, data, folder: passages.file_pairs(locating.pick(data, [0])), UsageError, "--files has 1 name"),
    ],
)
def test_what_cannot_be_served_is_named(linear: periplus.Run, call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(linear, locating.images_of(linear), linear.path)


# ---- verdicts and sentences -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "converged", "cluster", "verdict"),
    [
        ([1], [1], [0], "one start"),
        ([1, 1, 1], [1, 1, 1], [0, 0, 0], "same"),
        ([1, 1, 1], [1, 1, 1], [0, 1, 0], "different"),
        ([1, 1, 1], [1, 0, 1], [0, 1, 0], "undecided"),  # the one that differs is no certified minimum
        ([1, 1, 1], [1, 0, 1], [0, 0, 1], "different"),
        ([1, 1, 0], [1, 1, 1], [0, 0, 1], "undecided"),  # a start was dropped
        ([1, 1], [0, 0], [0, 0], "undecided"),
    ],
)
def test_verdicts(kept: list[int], converged: list[int], cluster: list[int], verdict: str) -> None:
    assert locating.verdict_of(torch.tensor(kept).bool(), torch.tensor(converged).bool(), torch.tensor(cluster)) == verdict


def image(**values: Any) -> dict[str, Any]:
    minimum = {"error": 1.0, "kind": "smooth", "starts": 2, "frequency": 0.5, "norm": 1.0, "image": 0}
    usual = {"error": 1.0, "kind": "smooth", "start": 0, "on_boundary": False, "best_share": 0.5, "distinct": 1, "distinct_images": 1}
    return {**usual, "certified_error": 1.0, "verdict": "same", "minima": [minimum], **values}


def record(images: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    kinds = dict.fromkeys(("smooth", "kink", "boundary", "flat", "saddle", "unfinished", "escaped"), 0)
    usual = {
        "starts": 4,
        "pixels": 64,
        "dropped": 0,
        "encoder_start": False,
        "domain": {"name": "ball", "radius": 5.0},
        "kinds": {**kinds, "smooth": 8},
    }
    return {**usual, "images": images, **values}


def test_sentences_follow_the_data() -> None:
    same, different, undecided = image(), image(verdict="different", distinct=3, distinct_images=2), image(verdict="undecided")

    def said(*images: dict[str, Any], **values: Any) -> str:
        return " ".join(locating.inversion_statements(record(list(images), **values)))

    assert "The same z*? Yes" in said(same, same)
    assert (
        "The same z*? No: for 1 of 2 images the 4 starts end in different certified minima (3 by code, 2 by image); for 1 of 2 images all 4"
        in said(same, different)
    )
    assert "The same z*? It cannot be told: for 1 of 1 image it is open" in said(undecided)
    assert "The same z*? Not settled" in said(same, undecided)
    one = said(image(verdict="one start"), starts=1)
    assert "It cannot be told: one start per image was searched" in one and "The same z*? No" not in one
    saddle = said(same, image(kind="saddle"))
    assert "local minimum for 1 of 2 images (1 smooth), and not for the other (1 saddle); 1 of these has a certified minimum of larger" in saddle
    assert "for 1 of 2 images z* lies on its boundary" in said(same, image(on_boundary=True))
    flat = {"error": 1.0, "kind": "flat"}
    assert "points of one valley" in said(image(verdict="different", distinct=2, minima=[flat, flat])) and "valley" not in said(different)
    ran = record([same], domain={"name": "free", "escape_radius": 50.0})
    assert "no start ran off" in locating.say_domain(ran)
    ran["kinds"]["escaped"] = 2
    assert "2 starts ran off beyond |z| = 50, and argmin may lie at infinity" in locating.say_domain(ran)
    dropped = said(undecided, dropped=3)
    assert "3 starts were dropped early" in dropped and "not all starts were searched" in dropped and "was reached by" not in dropped


# ---- paths ----------------------------------------------------------------------------------------------------------------------------------------


def priced(run: periplus.Run, **options: Any) -> tuple[passages.Passages, dict[str, Any]]:
    targets, search = planted(run, CODES), Search(starts=6)
    inversion = locating.locate(run, targets, search)
    found = passages.price(run, targets, [(0, 1), (1, 2)], search, inversion=inversion, segments=16, **options)
    return found, passages.passage_record(run, found, search, segments=16, norm="length", alternatives=options.get("alternatives", 3))


def test_the_area_under_the_cost_is_the_cost(folded: periplus.Run) -> None:
    found, _ = priced(folded)
    for curve, cost in (("line", found.path.straight_cost), ("path", found.path.cost)):
        c, length = passages.cost_along(folded, found, curve, 1025)
        assert torch.trapezoid(c, length, dim=1) * found.path.image_distance == pytest.approx(cost, rel=1e-4)
        assert float(c.min()) >= 0.5 - 1e-6


def test_steps_along_a_polyline_are_equal() -> None:
    corner = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]]])
    codes, length = passages.along(corner, 5)
    assert codes[0].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]] and length[0].tolist() == [0, 1, 2, 3, 4]


def test_the_record_of_paths_agrees_with_its_tensors(folded: periplus.Run) -> None:
    found, told = priced(folded)
    for k, pair in enumerate(told["pairs"]):
        for end, row, node in (("a", found.pairs[k][0], 0), ("b", found.pairs[k][1], -1)):
            z = found.path.points[k, node]
            error = (folded.decode(z).double() - found.targets.images[row].double() / 255).square().sum()
            assert torch.equal(z, found.inversion.all_z[row, found.starts[k, 0 if end == "a" else 1]])
            assert pair[end]["error"] == pytest.approx(float(error), rel=1e-3, abs=1e-6) and pair[end]["error"] >= pair[end]["best_error"]
            assert pair[end]["share"] == pytest.approx(pair[end]["error"] / pair["image_distance"])
        assert pair["lower_bound"] <= pair["cost"] <= pair["straight_cost"] * (1 + 1e-6)
        assert pair["saving"] == pytest.approx(1 - pair["cost"] / pair["straight_cost"])


def test_alternatives_are_distinct_minima_and_one_means_the_best(folded: periplus.Run) -> None:
    targets = planted(folded, CODES.abs())
    inversion = locating.locate(folded, targets, Search(starts=12))
    starts = passages.end_starts(inversion, 0, 3)
    assert starts[0] == int(inversion.best[0]) and len({int(inversion.cluster[0, s]) for s in starts}) == len(starts) > 1
    best, _ = priced(folded, alternatives=1)
    several, _ = priced(folded, alternatives=3)
    assert torch.equal(best.starts[:, 0], best.inversion.best[[0, 1]])
    assert (several.path.cost <= best.path.cost * (1 + 1e-4)).all()


def pair(**values: Any) -> dict[str, Any]:
    end = {"name": "test 0", "share": 0.1, "kind": "kink", "is_best": True}
    usual = {"cost": 80.0, "straight_cost": 100.0, "spherical_cost": 120.0, "saving": 0.2, "score": 1.6, "straight_score": 2.0, "lower_bound": 50.0}
    return {**usual, "floor": 50.0, "gap": 0.6, "converged": True, "residual": 1e-4, "minima": 1, "distance": 3.0, "a": end, "b": end, **values}


def test_sentences_of_paths_follow_the_data() -> None:
    def said(*pairs: dict[str, Any], lipschitz: float | None = None) -> str:
        return " ".join(passages.passage_statements({"pairs": list(pairs), "lipschitz": lipschitz}))

    assert "For 1 of 1 pair the path is cheaper than the straight line, by 20.0 %; U~ = 1.60 instead of 2.00" in said(pair())
    assert "no path was found that is cheaper than the straight line" in said(pair(saving=0.0, cost=100.0))
    assert "by at most 50 % (gap at most 100 %)" in said(pair(gap=0.1), pair(gap=1.0)) and "by at most 20 % (gap at most 25 %)" in said(
        pair(gap=0.25)
    )
    assert "no certified Lipschitz constant" in said(pair()) and "constant of 12, which lifts it by 20.00 %" in said(
        pair(lower_bound=60.0), lipschitz=12.0
    )
    left = said(pair(), pair(converged=False, residual=0.3))
    assert "Not converged: 1 of 2 pairs (test 0 to test 0), with a residual up to 0.3" in left and "Not converged" not in said(pair())
    other = copy.deepcopy(pair())
    other["a"] = {**other["a"], "is_best": False, "kind": "unfinished", "share": 0.3}
    assert "10.0 % to 30.0 % of Dist^2; 1 end of 2 took another minimum" in said(other) and "1 of 2 is not certified" in said(other)
    assert "1 of 2 pairs: both images have the same code" in said(pair(), pair(distance=0.0))
