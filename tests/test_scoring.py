"""Scores against real images: blocks are disjoint, floors are what fresh images get, scores worsen as images do, copies are found, caches agree."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import periplus
from periplus import cli, metrics
from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.errors import UsageError
from periplus.evaluation import evaluate, write_evaluation
from periplus.features import load_extractor, train_extractor
from periplus.runs import Run, load_run
from periplus.scoring import Reference, class_scores, compare_with, flat, memorising, outside, reference, score, score_run
from periplus.training.steps import hold_out

torch.set_num_threads(1)

#: Which way a score goes as samples get worse.
DISTANCES = ("frechet", "kernel")
SHARES = ("precision", "recall", "density", "coverage")
SMALL = AdversarialConfig("gan", batch_size=32, latent_dim=4, max_steps=16, log_every=2, checkpoint_every=8, sample_every=100, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def judge(digits: ImageData, cache: Path) -> Reference:
    """The digits: a reference of 250 images, five more blocks for floors."""
    return reference(digits, 250, cache)


@pytest.fixture(scope="module")
def trained(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small generator of digits, too young to be any good. Its steps 8 and 16 are kept, and a checkpoint of both."""
    return periplus.train(SMALL, digits, tmp_path_factory.mktemp("run") / "gan")


def scores_of(judge: Reference, images: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    return flat(compare_with(judge, judge.extractor(images), judge.blind(images), labels))


def strict(record: Any) -> Any:
    """Through JSON and back; not a number, and infinity, are not JSON."""
    return json.loads(json.dumps(record, allow_nan=False))


# ---- blocks and floors ----------------------------------------------------------------------------------------------------------------------


def test_the_reference_and_the_floors_are_disjoint_blocks_of_one_size(judge: Reference, digits: ImageData) -> None:
    assert [len(block) for block in judge.blocks] == [250] * 6
    assert len(torch.cat(judge.blocks).unique()) == 1500
    images = digits.images.flatten(1)
    assert torch.equal(judge.features, judge.extractor(digits.images)) and torch.equal(judge.random, judge.blind(digits.images))
    labels = digits.labels
    assert labels is not None
    for block in judge.blocks:  # in random order, not in that of the writers: every block is like the whole
        assert float((images[block].float().mean(0) - images.float().mean(0)).abs().max()) < 5 * 255 * 0.5 / math.sqrt(250)
        assert int(torch.bincount(labels[block], minlength=10).min()) > 10
    record = strict(judge.record())
    assert (record["samples"], record["floor_blocks"], record["data"], record["split"]) == (250, 5, "digits", "train")
    assert record["data_sha256"] == digits.content_hash() and record["extractor"] == strict(load_extractor("digits").record())
    assert record["random_extractor"]["name"] == "random-1"


def test_blocks_are_as_large_as_the_data_allow_and_five_at_most(digits: ImageData, cache: Path) -> None:
    def cut(count: int, samples: int) -> tuple[int, int]:
        found = reference(digits.subset(torch.arange(count)), samples, cache, extractor=load_extractor("digits"))
        return found.samples, len(found.blocks) - 1

    assert cut(1500, 10_000) == (750, 1) and cut(1401, 10_000) == (700, 1)
    assert cut(1500, 400) == (400, 2) and cut(1500, 100) == (100, 5) and cut(200, 100) == (100, 1)


def test_too_few_images_are_refused_in_words(digits: ImageData, cache: Path) -> None:
    with pytest.raises(UsageError, match="digits has 199 images.*100 on each side"):
        reference(digits.subset(torch.arange(199)), cache=cache)
    with pytest.raises(UsageError, match="99 samples were asked for.*100 on each side"):
        reference(digits, 99, cache)


def test_floors_are_what_fresh_real_images_get(digits: ImageData, cache: Path) -> None:
    """Half a thousand images that the reference never saw, in blocks of its size: no score can tell them from the floors' blocks."""
    rest, fresh = digits.split_off(500, 7)
    judge = reference(rest, 125, cache, extractor=load_extractor("digits"))
    assert fresh.labels is not None
    told = [scores_of(judge, x, y) for x, y in zip(fresh.images.split(125), fresh.labels.split(125), strict=True)]
    for name, floors in judge.floors.items():
        assert len(floors) == 5
        low, high = metrics.welch_interval(floors, [one[name] for one in told], 0.9999)
        assert low < 0 < high, name
    spoiled = [scores_of(judge, x) for x in (255 - fresh.images).split(125)]  # and the test sees a difference where there is one
    for name in (*DISTANCES, "frechet_random", "recall", "density", "coverage", "two_sample", "classes"):
        low, high = metrics.welch_interval(judge.floors[name], [one[name] for one in spoiled], 0.999)
        assert not low < 0 < high, name


@pytest.mark.parametrize(("samples", "blocks"), [(200, 2), (100, 3)])
def test_the_floor_of_class_shares_is_what_samples_from_outside_get(samples: int, blocks: int, tmp_path: Path) -> None:
    """Blocks are part of the data that they are held against: 300 data sets of 400 images with ten equal classes, and samples of their law."""
    generator = torch.Generator().manual_seed(0)
    extractor = load_extractor("digits")
    nothing = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
    floors, fair, p_values = [], [], []
    for _ in range(300):
        labels = torch.randint(10, (400,), generator=generator)
        data = ImageData(nothing, labels, tuple("0123456789"), "drawn", "train")
        cut = tuple(torch.arange(400).split(samples))[:blocks]
        drawn = Reference(data, extractor, extractor, nothing, nothing, cut, {})
        floors += [class_scores(drawn, labels[block])["classes"]["value"] * outside(drawn) for block in cut[1:]]
        told = class_scores(drawn, torch.randint(10, (samples,), generator=generator))["classes"]
        fair.append(told["value"])
        p_values.append(told["p_value"])
    error = math.hypot(np.std(floors) / math.sqrt(300), np.std(fair) / math.sqrt(300))
    assert abs(np.mean(floors) - np.mean(fair)) < 3 * error < 0.1 * np.mean(fair)
    assert abs(np.mean([p < 0.05 for p in p_values]) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 300), "the data's own shares are noise as well"


def test_the_floors_of_class_shares_are_taken_as_from_outside(judge: Reference, digits: ImageData) -> None:
    assert digits.labels is not None and len(digits) == 1500
    inside = [class_scores(judge, digits.labels[block])["classes"]["value"] for block in judge.blocks[1:]]
    assert judge.floors["classes"] == pytest.approx([value * math.sqrt(1750 / 1250) for value in inside])


def test_the_floor_is_the_mean_of_its_blocks_and_belongs_to_each_score(judge: Reference, trained: Run) -> None:
    found = strict(score(trained, judge))
    assert (found["step"], found["sampling_seed"]) == (16, 0)
    with_floor = {name: one for name, one in found["scores"].items() if "floors" in one}
    assert set(with_floor) == {*DISTANCES, *SHARES, "frechet_random", "two_sample", "classes", "smallest_class"}
    for name, one in with_floor.items():
        assert one["floors"] == judge.floors[name] and one["floor"] == pytest.approx(sum(one["floors"]) / 5)
    for name in (*DISTANCES, *SHARES, "frechet_random", "two_sample", "smallest_class"):
        assert with_floor[name]["low"] <= with_floor[name]["value"] <= with_floor[name]["high"]
    assert found["scores"]["frechet"]["value"] > 10 * found["scores"]["frechet"]["floor"]
    assert found["scores"]["frechet"]["at_infinity"] is None, "250 images are too few to extrapolate from"
    assert found["scores"]["copying"]["held_out"] == 150 and not found["scores"]["copying"]["copying"]


def test_the_distance_of_real_images_at_infinitely_many_is_zero(digits: ImageData, cache: Path) -> None:
    judge = reference(digits, 375, cache)
    told = [compare_with(judge, judge.features[block], judge.random[block])["frechet"] for block in judge.blocks[1:]]
    for one in told:
        limit = strict(one)["at_infinity"]
        assert abs(limit["value"]) < 3 * limit["standard_error"] and limit["value"] < one["value"] / 2


# ---- scores follow the images ---------------------------------------------------------------------------------------------------------------


def noisy(images: Tensor, strength: float) -> Tensor:
    return (images + strength * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def blurred(images: Tensor, strength: float) -> Tensor:
    place = torch.arange(-3.0, 4)
    line = torch.exp(-(place**2) / (2 * strength**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    return F.conv2d(images, kernel, padding=3)


def occluded(images: Tensor, strength: float) -> Tensor:
    result = images.clone()
    result[:, :, : int(strength)] = 0
    return result


WORSE: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "noise": (noisy, (0.1, 0.2, 0.3, 0.4)),
    "blur": (blurred, (0.4, 0.6, 0.9, 1.3)),
    "occlusion": (occluded, (1, 2, 3, 5)),
}


@pytest.mark.parametrize("what", WORSE)
def test_scores_worsen_with_every_strength_of(what: str, judge: Reference, digits: ImageData) -> None:
    change, strengths = WORSE[what]
    images = digits.images[judge.blocks[1]].float() / 255
    rows = [scores_of(judge, images), *(scores_of(judge, change(images, strength)) for strength in strengths)]
    for name in (*DISTANCES, "frechet_random"):
        values = [row[name] for row in rows]
        assert values == sorted(values) and len(set(values)) == 5, (name, values)
    for name in ("precision", "coverage", "density"):
        values = [row[name] for row in rows]
        assert values[0] > values[2] > values[4], (name, values)
    assert rows[4]["two_sample"] > 0.8 > 0.6 > rows[0]["two_sample"]
    for name in (*DISTANCES, *SHARES, "frechet_random", "two_sample"):  # of uint8 and of floats, labels known and told: the same
        assert rows[0][name] == pytest.approx(judge.floors[name][0], rel=1e-5, abs=1e-7), name


def test_scores_worsen_with_every_class_that_is_missing(judge: Reference, digits: ImageData) -> None:
    assert digits.labels is not None
    pool = torch.cat(judge.blocks[1:])
    rows = []
    for missing in (0, 2, 4, 6, 8):
        kept = pool[digits.labels[pool] >= missing][:250]
        rows.append(scores_of(judge, digits.images[kept]))
    for name in (*DISTANCES, "frechet_random", "classes"):
        values = [row[name] for row in rows]
        assert values == sorted(values) and len(set(values)) == 5, (name, values)
    coverage = [row["coverage"] for row in rows]
    assert coverage == sorted(coverage, reverse=True) and coverage[4] < 0.5
    assert min(row["precision"] for row in rows) > 0.85, "what is there is as real as before"
    assert rows[0]["smallest_class"] > 0.05 and all(row["smallest_class"] < 0.02 for row in rows[1:])
    assert rows[4]["classes"] == pytest.approx(0.8, abs=0.05)


# ---- copies ---------------------------------------------------------------------------------------------------------------------------------


def test_a_generator_that_replays_training_images_is_found_and_fresh_images_are_not_accused(digits: ImageData, cache: Path) -> None:
    known, fresh = digits.split_off(400, 3)
    judge = reference(known, 125, cache, extractor=load_extractor("digits"))
    config = dataclasses.replace(SMALL, held_out=200, seed=4)
    trained, held_out = hold_out(config, known)
    assert held_out is not None
    told = memorising(judge, config, judge.extractor(trained.images[::2]))
    assert told["copying"]["copying"] and told["copying"]["value"] < -8 and told["neighbour_ratio"]["value"] < 0.01
    assert (told["copying"]["held_out"], told["copying"]["samples"]) == (200, 450)
    nearly = memorising(judge, config, judge.extractor(noisy(trained.images[::2].float() / 255, 0.02)))
    assert nearly["copying"]["copying"] and nearly["neighbour_ratio"]["high"] < 0.7
    new = memorising(judge, config, judge.extractor(fresh.images))
    assert not new["copying"]["copying"] and abs(new["copying"]["value"]) < 3
    assert new["neighbour_ratio"]["low"] < 1 < new["neighbour_ratio"]["high"]
    held = memorising(judge, config, judge.extractor(held_out.images))
    assert not held["copying"]["copying"] and held["neighbour_ratio"]["value"] == pytest.approx(1)


def test_without_held_out_images_nothing_is_said_of_copying(judge: Reference) -> None:
    assert memorising(judge, dataclasses.replace(SMALL, held_out=0), judge.features[:200]) == {}
    assert memorising(judge, dataclasses.replace(SMALL, held_out=5), judge.features[:200]) == {}  # too few to fill a cell


# ---- what is kept ---------------------------------------------------------------------------------------------------------------------------


def test_kept_floors_and_features_are_those_of_a_fresh_start(digits: ImageData, judge: Reference, cache: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    kept = reference(digits, 250, cache, note=notes.append)
    assert notes == []
    fresh = reference(digits, 250, tmp_path, note=notes.append)
    assert len(notes) == 3 and "noise floors of digits: 5 blocks of 250 real images" in notes[2]
    for one in (kept, fresh):
        assert one.floors == judge.floors and torch.equal(one.features, judge.features) and torch.equal(one.random, judge.random)
    reference(digits, 300, cache, note=notes.append)  # another number of samples: other floors, the same features
    assert len(notes) == 4 and "blocks of 300" in notes[3]


def test_a_damaged_cache_is_made_again(digits: ImageData, tmp_path: Path) -> None:
    good = reference(digits, 250, tmp_path)
    (floors,) = tmp_path.glob("floors-*.json")
    features = sorted(tmp_path.glob("real-*.safetensors"))
    contents = {path: path.read_bytes() for path in (floors, *features)}
    one_missing = json.dumps({name: of[:-1] for name, of in good.floors.items()}).encode()
    not_finite = contents[floors].replace(str(good.floors["frechet"][0]).encode(), b"NaN")
    assert not_finite != contents[floors]
    damages = [
        (floors, damage) for damage in (contents[floors][:-20], b"", b"{}", b"null", b"[1]", b'{"frechet": 3}', b"\xff", one_missing, not_finite)
    ]
    for path in features:
        flipped = bytearray(contents[path])
        flipped[-5] ^= 64
        damages += [(path, damage) for damage in (contents[path][:-1], b"", bytes(flipped))]
    for path, damage in damages:
        path.write_bytes(damage)
        notes: list[str] = []
        found = reference(digits, 250, tmp_path, note=notes.append)
        assert len(notes) == 1, (path.name, damage[:20], notes)
        assert found.floors == good.floors and torch.equal(found.features, good.features) and torch.equal(found.random, good.random)
        assert path.read_bytes() == contents[path]


def test_scores_of_another_network_are_kept_apart(digits: ImageData, cache: Path, tmp_path: Path) -> None:
    few = digits.subset(torch.arange(200))
    other = train_extractor(few.subset(torch.arange(30)), tmp_path / "other.safetensors")
    a, b = (reference(few, 100, cache, extractor=extractor) for extractor in (load_extractor("digits"), other))
    assert a.record()["extractor"]["sha256"] != b.record()["extractor"]["sha256"]
    assert a.floors["frechet"] != b.floors["frechet"] and a.floors["frechet_random"] == b.floors["frechet_random"]


# ---- runs -----------------------------------------------------------------------------------------------------------------------------------


def test_a_run_is_scored_with_and_without_its_average(judge: Reference, trained: Run) -> None:
    told = strict(score_run(trained, judge))
    last = strict(score(load_run(trained.path, ema=False), judge))["scores"]
    assert told["scores"] == strict(score(trained, judge))["scores"] and told["without_ema"] == last
    assert told["scores"]["frechet"]["value"] != told["without_ema"]["frechet"]["value"]
    assert told["reference"] == strict(judge.record())
    assert "without_ema" not in score_run(trained, judge, last=False)
    assert "without_ema" not in score_run(load_run(trained.path, ema=False), judge), "it would be the same scores twice"


def test_a_run_of_an_earlier_step_is_scored_as_it_was_then(judge: Reference, trained: Run) -> None:
    assert trained.kept == [8, 16]
    then = score_run(trained.at(8), judge)
    assert then["step"] == 8 and then["scores"]["frechet"] != score(trained, judge)["scores"]["frechet"]
    assert then["without_ema"] == score(Run(trained.path, ema=False, step=8), judge)["scores"]


def test_a_snapshot_has_its_average_alone(judge: Reference, digits: ImageData, tmp_path: Path) -> None:
    run = periplus.train(dataclasses.replace(SMALL, checkpoint_every=16), digits, tmp_path / "run")
    assert run.kept == [8, 16] and "without_ema" not in score_run(run.at(8), judge)


def test_without_labels_nothing_is_said_of_classes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "plain.npz", images=random.integers(0, 256, (240, 6, 9), dtype=np.uint8))
    found = reference(periplus.load_data(tmp_path / "plain.npz"), cache=tmp_path)
    assert found.samples == 120 and found.extractor.accuracy is None
    told = strict(compare_with(found, found.features[found.blocks[1]], found.random[found.blocks[1]]))
    assert set(told) == {*DISTANCES, *SHARES, "frechet_random", "two_sample"} == set(found.floors)


def test_an_evaluation_carries_scores_or_says_why_not(digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = digits.subset(torch.arange(150))
    np.savez(tmp_path / "few.npz", images=few.images.numpy(), labels=few.labels)
    run = periplus.train(SMALL, periplus.load_data(tmp_path / "few.npz"), tmp_path / "few")
    cli.run(["evaluate", str(run.path)])
    told = strict(json.loads((run.path / "evaluation.json").read_text(encoding="utf-8")))
    assert told["scores"] is None and "few.npz has 150 images" in told["no_scores"] and told["collapsed"] in (True, False)
    assert "no scores of samples: few.npz has 150 images" in capsys.readouterr().err


def test_an_evaluation_is_the_score_of_the_run(digits: ImageData, trained: Run, judge: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["evaluate", str(trained.path), "--n", "250", "--json"])
    told = json.loads(capsys.readouterr().out)
    wanted = strict(score_run(trained, judge))
    assert {name: told[name] for name in wanted} == wanted
    assert "--n 250" in told["command"]
    assert "scores" not in write_evaluation(trained, evaluate(trained, judged=0), "periplus evaluate")


def test_scores_are_a_function_of_the_seed(trained: Run, judge: Reference) -> None:
    assert score(trained, judge, 1) == score(trained, judge, 1) != score(trained, judge, 2)
