"""Neighbours against brute force, proportions against scipy and by simulation, and the verdict on generators that are known to have collapsed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from periplus import ImageData, evaluation, load_data, metrics
from periplus.errors import UsageError


def rows(n: int, f: int, seed: int = 0) -> Tensor:
    return torch.rand(n, f, generator=torch.Generator().manual_seed(seed))


# ---- neighbours -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("tile", [1, 7, 2048])
def test_neighbours_are_those_of_brute_force(k: int, tile: int):
    queries, reference = rows(23, 17), rows(40, 17, seed=1)
    found = metrics.nearest_neighbours(queries, reference, k, tile)
    exact = cdist(queries.double().numpy(), reference.double().numpy())
    assert found.row.shape == found.distance.shape == (23, k)
    np.testing.assert_array_equal(found.row.numpy(), exact.argsort(1)[:, :k])
    np.testing.assert_allclose(found.distance.numpy(), np.sort(exact, 1)[:, :k], rtol=1e-5)


def test_a_copy_is_at_distance_exactly_zero():
    """|q|^2 + |r|^2 - 2 q.r leaves rounding where a difference leaves nothing."""
    reference = rows(200, 784)
    found = metrics.nearest_neighbours(reference[50:90], reference, k=2)
    assert (found.distance[:, 0] == 0).all() and found.row[:, 0].tolist() == list(range(50, 90))
    exact = cdist(reference[50:90].double().numpy(), reference.double().numpy())
    np.testing.assert_allclose(found.distance[:, 1].numpy(), np.sort(exact, 1)[:, 1], rtol=1e-5)


def test_a_near_copy_is_as_far_away_as_it_is():
    queries, reference = rows(20, 784), torch.cat([rows(100, 784, seed=1), rows(20, 784)])
    reference[100:, 0] += 1e-3
    found = metrics.nearest_neighbours(queries, reference)
    assert found.row[:, 0].tolist() == list(range(100, 120))
    torch.testing.assert_close(found.distance, torch.full((20, 1), 1e-3), rtol=1e-3, atol=0)


def test_images_of_the_set_find_themselves(digits: ImageData):
    reference = evaluation.pixels(digits.images)
    found = metrics.nearest_neighbours(reference[:300], reference, tile=128)
    assert not found.distance.any() and reference[found.row[:, 0]].equal(reference[:300])


FLOAT32_RANKING = "reported: candidates are ranked in float32 by the product form, which loses small differences of long rows"


def test_neighbours_far_from_the_origin_are_those_of_brute_force():
    """Features need not be centred."""
    reference = rows(200, 784) + 30
    exact = cdist(reference[50:90].double().numpy(), reference.double().numpy())
    np.testing.assert_array_equal(metrics.nearest_neighbours(reference[50:90], reference, k=2).row.numpy(), exact.argsort(1)[:, :2])


def test_a_copy_is_found_among_near_copies():
    queries = (rows(10, 1024) * 255).round() / 255
    reference = queries.repeat(50, 1)
    pixel = torch.randint(1024, (490,), generator=torch.Generator().manual_seed(0))
    reference[torch.arange(10, 500), pixel] += 1 / 255  # one grey level in one pixel, in all but the first ten
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert not metrics.nearest_neighbours(queries, reference[order]).distance.any()


@pytest.mark.parametrize("k", [0, -1, 6])
def test_more_neighbours_than_there_are_rows_are_refused(k: int):
    with pytest.raises(UsageError, match=f"k is {k}.*5 reference rows"):
        metrics.nearest_neighbours(rows(2, 3), rows(5, 3), k)


def test_labels_are_voted_for_and_ties_go_to_the_nearest():
    reference, labels = torch.tensor([[0.0], [1.0], [2.1], [3.3], [10.0]]), torch.tensor([7, 5, 5, 7, 2])

    def vote(query: float, k: int) -> int:
        return metrics.neighbour_labels(torch.tensor([[query]]), reference, labels, k).item()

    assert vote(0.0, 1) == 7
    assert vote(0.0, 2) == 7  # one vote each: the nearest
    assert vote(0.0, 3) == 5  # two against the nearest one
    assert vote(0.0, 4) == 7  # two each: the class of the nearest
    assert vote(2.0, 4) == 5
    assert vote(10.0, 3) == 2  # three different classes
    assert vote(10.0, 5) == 7  # 2, 7, 5, 5, 7: two each, and a 7 is nearer than a 5
    assert vote(-5.0, 5) == 7


def test_a_known_image_is_given_its_own_label(digits: ImageData):
    reference = evaluation.pixels(digits.images)
    assert metrics.neighbour_labels(reference[:200], reference, digits.labels, k=1).equal(digits.labels[:200])


# ---- proportions ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 10), (1, 297), (50, 10_000), (0, 10_000), (9999, 10_000)])
def test_wilson_intervals_are_those_of_scipy(successes: int, trials: int):
    share = metrics.wilson_interval(successes, trials)
    exact = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert share.value == successes / trials
    assert share.low == pytest.approx(exact.low, abs=1e-7) and share.high == pytest.approx(exact.high, abs=1e-7)


def test_an_interval_holds_its_own_value_and_stays_in_the_unit_interval():
    """By exact comparison: an error bar of length -1e-16 stops a plot."""
    for trials in range(1, 400):
        for successes in {0, 1, trials // 2, trials - 1, trials}:
            share = metrics.wilson_interval(successes, trials)
            assert 0 <= share.low <= share.value <= share.high <= 1 and share.low < share.high
        assert metrics.wilson_interval(0, trials).low == 0 and metrics.wilson_interval(trials, trials).high == 1


@pytest.mark.parametrize(("p", "trials"), [(0.1, 300), (0.5, 50), (0.005, 10_000)])
def test_wilson_intervals_cover_the_truth_as_often_as_they_say(p: float, trials: int):
    """Coverage is exactly computable: the binomial weight of the counts whose interval holds p. And simulated, in standard errors of that."""
    covers = np.array([(share := metrics.wilson_interval(k, trials)).low <= p <= share.high for k in range(min(trials, 400) + 1)])
    exact = scipy.stats.binom.pmf(np.arange(len(covers)), trials, p)[covers].sum()
    assert abs(exact - 0.95) < 0.015  # the counts are whole numbers: no interval covers with exactly 95 %
    draws = np.random.default_rng(0).binomial(trials, p, 4000)
    assert abs(covers[draws].mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)


def test_class_shares_count_every_class():
    labels = torch.tensor([0] * 5 + [2] * 3 + [3] * 2)
    shares = metrics.class_shares(labels, 6)
    assert [s.value for s in shares] == [0.5, 0, 0.3, 0.2, 0, 0]
    assert sum(s.value for s in shares) == pytest.approx(1)
    assert shares[2] == metrics.wilson_interval(3, 10) and shares[1].low == 0 and shares[1].high > 0


def test_class_shares_of_nothing_are_refused():
    with pytest.raises(UsageError, match="no labels"):
        metrics.class_shares(torch.zeros(0, dtype=torch.int64), 10)


# ---- spread ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 20, 101])
@pytest.mark.parametrize("tile", [3, 2048])
def test_mean_pairwise_distance_is_that_of_scipy(n: int, tile: int):
    x = rows(n, 30)
    assert metrics.mean_pairwise_distance(x, tile) == pytest.approx(pdist(x.double().numpy()).mean(), rel=1e-5)


def test_mean_pairwise_distance_of_known_figures():
    assert metrics.mean_pairwise_distance(torch.eye(4)) == pytest.approx(math.sqrt(2))
    assert metrics.mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == 5
    assert metrics.mean_pairwise_distance(torch.full((300, 784), 0.7)) < 0.02  # a product form that cancels would leave more
    x = rows(60, 12)
    assert metrics.mean_pairwise_distance(3 * x + 1) == pytest.approx(3 * metrics.mean_pairwise_distance(x), rel=1e-4)


def test_a_single_row_has_no_pairwise_distance():
    with pytest.raises(UsageError, match="two rows"):
        metrics.mean_pairwise_distance(rows(1, 4))


# ---- the verdict ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out() -> ImageData:
    return load_data("digits", "test")


def test_real_images_have_not_collapsed(digits: ImageData, held_out: ImageData):
    record = evaluation.collapse(held_out.images, digits)
    assert record["collapsed"] is False and record["samples"] == 297
    assert 0.9 < record["spread"] < 1.1 and record["smallest_share"] > 0.05
    assert sum(share["value"] for share in record["shares"]) == pytest.approx(1)
    error = record["classifier_error"]
    assert error["low"] <= error["value"] <= error["high"] < 0.1


def test_real_images_say_the_same_as_bytes_and_as_floats(digits: ImageData, held_out: ImageData):
    assert evaluation.collapse(held_out.images, digits) == evaluation.collapse(held_out.images.float() / 255, digits)


def test_a_constant_generator_has_collapsed(digits: ImageData):
    record = evaluation.collapse(digits.images[:1].expand(500, -1, -1, -1), digits)
    assert record["collapsed"] is True and record["spread"] < 0.01 and record["smallest_share"] == 0


def test_a_generator_of_one_class_has_collapsed_though_it_is_as_wide_as_the_data(digits: ImageData):
    ones = digits.images[digits.labels == 1]
    record = evaluation.collapse(ones, digits)
    assert record["spread"] > evaluation.SMALLEST_SPREAD and record["collapsed"] is True
    assert record["shares"][1]["value"] > 0.95 and record["smallest_share"] == 0


def test_a_generator_that_leaves_one_class_out_has_collapsed(digits: ImageData, held_out: ImageData):
    record = evaluation.collapse(held_out.images[held_out.labels != 0], digits)
    assert record["collapsed"] is True and record["shares"][0]["value"] < 0.005


def test_without_labels_the_spread_decides(digits: ImageData, held_out: ImageData):
    unlabelled = replace(digits, labels=None)
    record = evaluation.collapse(held_out.images, unlabelled)
    assert record["collapsed"] is False and record["shares"] is None and record["smallest_share"] is None and record["classifier_error"] is None
    assert evaluation.collapse(held_out.images // 3, unlabelled)["collapsed"] is True
    assert evaluation.collapse(torch.full((40, 1, 8, 8), math.nan), unlabelled)["collapsed"] is True


def test_classes_that_the_data_lacks_are_not_missed(digits: ImageData, held_out: ImageData):
    """`classes` names ten; a subset of two of them is a set of two classes."""
    data = digits.subset((digits.labels == 3) | (digits.labels == 7))
    images = held_out.images[(held_out.labels == 3) | (held_out.labels == 7)]
    assert evaluation.collapse(images, data)["collapsed"] is False
    assert evaluation.collapse(digits.images[digits.labels == 3], data)["collapsed"] is True
