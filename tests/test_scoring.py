"""Scores and their floors: real images get the floor, worse images get worse, copies are noticed, and what was computed once is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from periplus import AdversarialConfig, ImageData, Run, UsageError, evaluation, load_data, scoring, train
from periplus.features import load_extractor
from periplus.scoring import COPIES, Reference, compare_with, flat, memorising, reference, score, score_run

DISTANCES = ("frechet", "frechet_random", "kernel")


@pytest.fixture(scope="module")
def everything() -> ImageData:
    """All 1797 digits."""
    return load_data("digits", "all")


@pytest.fixture(scope="module")
def judge(digits: ImageData, own_cache: Path) -> Reference:
    return reference(digits)


@pytest.fixture(scope="module")
def run(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = AdversarialConfig("gan", batch_size=32, latent_dim=4, max_steps=8, log_every=1, device="cpu", held_out=150)
    return train(config, digits, tmp_path_factory.mktemp("run") / "gan")


def scores_of(judge: Reference, images: Tensor) -> dict[str, float]:
    return flat(compare_with(judge, judge.extractor(images), judge.blind(images)))


# ---- the reference --------------------------------------------------------------------------------------------------------------------------


def test_blocks_are_disjoint_and_as_large_as_can_be(judge: Reference, digits: ImageData):
    rows = torch.cat(judge.blocks)
    assert len(rows.unique()) == len(rows) and [len(b) for b in judge.blocks] == [750, 750] and judge.samples == 750
    many = reference(digits, samples=250)
    assert len(many.blocks) == 6 and len(torch.cat(many.blocks).unique()) == 1500
    assert all(len(of) == 5 for of in many.floors.values())


def test_a_reference_says_what_it_is(judge: Reference, digits: ImageData):
    told = judge.record()
    assert (told["data"], told["split"], told["samples"], told["floor_blocks"]) == ("digits", "train", 750, 1)
    assert told["data_sha256"] == digits.content_hash()
    assert told["extractor"]["sha256"] == load_extractor("digits").sha256 and told["random_extractor"]["name"] == "random-1"
    json.dumps(told, allow_nan=False)


def test_floors_are_what_real_images_get(judge: Reference, digits: ImageData):
    again = scores_of(judge, digits.images[judge.blocks[1]])
    for name, floors in judge.floors.items():
        if name not in ("classes", "smallest_class"):  # floors take the classes that the images have, scores those that the extractor says
            assert floors == [pytest.approx(again[name], rel=1e-4, abs=1e-6)]
    assert judge.floors["two_sample"][0] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 750))
    assert judge.floors["coverage"][0] > 0.93 and abs(judge.floors["kernel"][0]) < 0.02


def test_what_was_computed_once_is_kept_and_a_damaged_cache_is_made_again(digits: ImageData, tmp_path: Path):
    said: list[str] = []
    first = reference(digits, 300, tmp_path, note=said.append)
    assert [line.split(" ")[0] for line in said] == ["features", "features", "noise"]
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    second = reference(digits, 300, tmp_path, note=said.append)
    assert len(said) == 3 and {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == stamps
    assert torch.equal(first.features, second.features) and first.floors == second.floors
    for path in stamps:
        path.write_bytes(path.read_bytes()[:50])
    third = reference(digits, 300, tmp_path, note=said.append)
    assert len(said) == 6 and torch.equal(first.features, third.features) and first.floors == third.floors


def test_too_few_images_are_refused_with_the_number(digits: ImageData):
    with pytest.raises(UsageError, match=r"digits has 180 images.*need 100 on each side"):
        reference(digits.subset(range(180)))
    with pytest.raises(UsageError, match="50 samples were asked for"):
        reference(digits, samples=50)


# ---- scores ---------------------------------------------------------------------------------------------------------------------------------


def spoilt(images: Tensor, how: str, strength: int) -> Tensor:
    """Real digits (N, 1, 8, 8) in [0, 1], made worse: 0 leaves them as they are."""
    generator = torch.Generator().manual_seed(7)
    if how == "noise":
        return (images + 0.1 * strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    if how == "blur":
        kernel = torch.tensor([0.25, 0.5, 0.25])
        for _ in range(strength):
            images = torch.nn.functional.conv2d(images, kernel[None, None, :, None], padding=(1, 0))
            images = torch.nn.functional.conv2d(images, kernel[None, None, None, :], padding=(0, 1))
        return images
    hidden = images.clone()
    hidden[:, :, : 2 * strength] = 0
    return hidden


@pytest.mark.parametrize("how", ["noise", "blur", "occlusion"])
def test_worse_images_get_worse_distances(judge: Reference, digits: ImageData, how: str):
    real = digits.images[judge.blocks[1]].float() / 255
    told = [scores_of(judge, spoilt(real, how, strength)) for strength in range(5 if how != "occlusion" else 4)]
    for name in ("frechet", "kernel"):
        values = [one[name] for one in told]
        assert values == sorted(values) and values[-1] > values[0] + 0.5
    assert told[-1]["two_sample"] > 0.9 and told[-1]["coverage"] < told[0]["coverage"] - 0.2


def test_missing_classes_are_seen(judge: Reference, digits: ImageData):
    assert digits.labels is not None
    rows = judge.blocks[1]
    told = []
    for missing in (0, 2, 4, 6, 8):
        kept = rows[digits.labels[rows] >= missing]
        repeated = kept.repeat(10)[: len(rows)]
        told.append(scores_of(judge, digits.images[repeated]))
    for name in ("frechet", "classes"):
        values = [one[name] for one in told]
        assert values == sorted(values)
    assert [one["recall"] for one in told] == sorted((one["recall"] for one in told), reverse=True)
    assert told[0]["smallest_class"] > 0.07 and told[1]["smallest_class"] < 0.02


def test_a_score_has_a_value_an_interval_and_a_floor(run: Run, judge: Reference):
    told = score_run(run, judge)
    json.dumps(told, allow_nan=False)
    assert told["reference"] == judge.record() and told["step"] == run.step
    for name in (*DISTANCES, "precision", "recall", "density", "coverage", "two_sample"):
        one = told["scores"][name]
        assert one["low"] <= one["value"] <= one["high"] and one["floors"] == judge.floors[name]
        assert one["floor"] == pytest.approx(sum(one["floors"]) / len(one["floors"]))
    assert told["scores"]["frechet"]["value"] > 10 * told["scores"]["frechet"]["floor"], "eight steps make no digits"
    assert told["scores"]["coverage"]["k"] == 5


def test_weights_with_and_without_averaging_are_judged(run: Run, judge: Reference):
    told = score_run(run, judge)
    plain = Run(run.path, ema=False)
    assert told["without_ema"] == score(plain, judge)["scores"] and told["scores"] != told["without_ema"]
    assert "without_ema" not in score_run(run, judge, last=False)


def test_scores_are_a_function_of_the_seed(run: Run, judge: Reference):
    assert score(run, judge, 1) == score(run, judge, 1) != score(run, judge, 2)


# ---- copies ---------------------------------------------------------------------------------------------------------------------------------


def test_replayed_training_images_are_called_copies_and_held_out_ones_are_not(run: Run, judge: Reference):
    rest, held_out = judge.data.split_rows(150, scoring.held_out_seed(run.config))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        chosen = rest[torch.randint(len(rest), (400,), generator=generator)]
        noise = 0.01 * torch.randn(400, judge.features.shape[1], generator=generator)
        told = memorising(judge, run.config, judge.features[chosen] + noise)
        assert told["copying"]["copying"] and told["copying"]["value"] < -5 and told["neighbour_ratio"]["high"] < 1
    told = memorising(judge, run.config, judge.features[held_out])
    assert not told["copying"]["copying"] and told["neighbour_ratio"]["value"] == pytest.approx(1), "these are the very images that it held out"
    test = judge.extractor(load_data("digits", "test").images)
    told = memorising(judge, run.config, test)
    assert not told["copying"]["copying"] and told["copying"]["held_out"] == len(held_out) and told["copying"]["samples"] == min(len(test), COPIES)


def test_without_held_out_images_nothing_is_said_of_copies(run: Run, judge: Reference):
    import dataclasses

    assert memorising(judge, dataclasses.replace(run.config, held_out=0), judge.features[:300]) == {}


# ---- evaluation -----------------------------------------------------------------------------------------------------------------------------


def test_evaluate_writes_the_scores(run: Run, judge: Reference):
    record: dict[str, Any] = evaluation.evaluate(run)
    assert record["scores"] == score(run, judge)["scores"] and record["reference"]["samples"] == 750 and "collapsed" in record
    assert "scores" not in evaluation.evaluate(run, judged=0)


def test_evaluate_goes_on_where_scores_cannot_be_had(run: Run):
    said: list[str] = []
    record = evaluation.evaluate(run, judged=20, note=said.append)
    assert record["scores"] is None and "need 100 on each side" in record["no_scores"] and "no scores of samples" in said[-1]
