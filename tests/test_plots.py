"""Figures: the same bytes twice, exact pixels, nothing of the user's matplotlib touched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from periplus import pictures, plots
from periplus.errors import UsageError

STEPS = np.arange(0, 500, 10)


def some_runs() -> list[dict[str, Any]]:
    def series(count: int) -> dict[str, Any]:
        return {"loss": 1 + generator.random(count), "distance": generator.random(count)}

    generator = np.random.default_rng(0)
    pairs = [(label, 50 - seed) for label in ("GAN", "WGAN-GP") for seed in range(3)]
    return [{"label": label, "steps": STEPS[:count], "series": series(count)} for label, count in pairs]


def draw_all(folder: Path) -> list[Path]:
    generator = np.random.default_rng(1)
    images = generator.random((12, 1, 8, 8))
    share = np.full(10, 0.1)
    axes = {"loss": "loss / nats", "distance": "distance"}
    bars = {"GAN": {"share": share, "low": share - 0.02, "high": share + 0.03}}
    return [
        pictures.image_grid(images, folder / "grid.png", columns=4, labels=["a", "b", "c"]),
        pictures.neighbour_strip(images, images[::-1], generator.random(12), folder / "strip.png", columns=5),
        plots.training_curves(some_runs(), folder / "curves.svg", axes, log=["loss"], window=3),
        plots.class_bars(bars, folder / "bars.svg", reference=share),
    ]


def test_same_numbers_same_bytes(tmp_path: Path) -> None:
    for first, second in zip(draw_all(tmp_path / "one"), draw_all(tmp_path / "two"), strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert b"dc:date" not in first.read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["bars.svg", "curves.svg", "grid.png", "strip.png"]


def test_a_users_style_neither_changes_the_figure_nor_is_changed(tmp_path: Path) -> None:
    import matplotlib

    share = {"GAN": {"share": np.full(4, 0.25)}}
    before = plots.class_bars(share, tmp_path / "a.svg").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "mine", "axes.facecolor": "red"}):
        settings = dict(matplotlib.rcParams)
        assert plots.class_bars(share, tmp_path / "b.svg").read_bytes() == before
        assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_grid_has_the_exact_pixels(tmp_path: Path, channels: int, kind: str) -> None:
    levels = np.random.default_rng(2).integers(0, 256, (5, channels, 8, 6), dtype=np.uint8)
    images = levels if kind == "uint8" else (levels / 255).astype(np.float32)
    picture = np.asarray(Image.open(pictures.image_grid(images, tmp_path / "g.png", columns=3, scale=16)).convert("RGB"))
    gap = 8
    assert picture.shape == (2 * 128 + gap, 3 * 96 + 2 * gap, 3)
    for index, image in enumerate(levels):
        top, left = (index // 3) * (128 + gap), (index % 3) * (96 + gap)
        tile = picture[top : top + 128, left : left + 96]
        expected = np.broadcast_to(image.transpose(1, 2, 0), (8, 6, 3)).repeat(16, 0).repeat(16, 1)
        assert (tile == expected).all()
    picture = picture.copy()
    for index in range(5):
        top, left = (index // 3) * (128 + gap), (index % 3) * (96 + gap)
        picture[top : top + 128, left : left + 96] = 255
    assert (picture == 255).all()  # gaps and the empty place are white


def test_small_images_are_shown_large(tmp_path: Path) -> None:
    for side in (8, 28, 32):
        picture = Image.open(pictures.image_grid(np.zeros((1, 1, side, side), np.uint8), tmp_path / "g.png"))
        assert 96 <= picture.width <= 128 and picture.width % side == 0


def test_strip_pairs_samples_with_neighbours(tmp_path: Path) -> None:
    samples, neighbours = np.full((3, 1, 8, 8), 50, np.uint8), np.full((3, 1, 8, 8), 200, np.uint8)
    path = pictures.neighbour_strip(samples, neighbours, [1.0, 2.0, 3.0], tmp_path / "s.png", columns=3, scale=10)
    picture = np.asarray(Image.open(path).convert("L"))
    assert (picture[:80, -80:] == 50).all() and (picture[85:165, -80:] == 200).all()
    assert (picture[165:, -80:] < 128).any()  # the distance is written below


ONE = np.ones((1, 1, 2, 2))


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8)), np.zeros((0, 1, 8, 8)), 1.5 * ONE, np.nan * ONE, ONE.astype(np.int64)])
def test_what_are_no_images_is_refused(tmp_path: Path, images: np.ndarray[Any, Any]) -> None:
    with pytest.raises(UsageError, match="image_grid: images must"):
        pictures.image_grid(images, tmp_path / "g.png")
    assert not list(tmp_path.iterdir())


def test_collapsed_runs_are_shown(tmp_path: Path) -> None:
    runs = some_runs()
    runs[0]["series"]["loss"][20:] = np.nan
    runs[1]["series"]["loss"][:] = np.nan
    broken = plots.training_curves(runs, tmp_path / "a.svg", {"loss": "loss"}, log=["loss"])
    whole = plots.training_curves(some_runs(), tmp_path / "b.svg", {"loss": "loss"}, log=["loss"])
    assert broken.read_bytes() != whole.read_bytes()


@pytest.mark.parametrize(("steps", "ticks"), [([7], ["7"]), ([1, 2, 3], ["1", "2", "3"]), ([0.25, 0.5], None), ([0, 500, 60_000], None)])
def test_no_tick_of_steps_is_written_twice(steps: list[float], ticks: list[str] | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    axis.plot(steps, steps, marker="o")
    plots._few_ticks(axis, steps)
    figure.draw_without_rendering()
    low, high = axis.get_xlim()
    shown = [label.get_text() for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert len(set(shown)) == len(shown) > 0 and (ticks is None or shown == ticks)


def test_a_shares_axis_ends_where_shares_do(tmp_path: Path) -> None:
    panel = {"x_label": "starts", "y_label": "found / %", "curves": [{"label": "found", "x": [1, 2, 3], "y": [20.0, 90.0, 100.0]}]}
    free = plots.lines([panel], tmp_path / "free.svg").read_bytes()
    ended = plots.lines([{**panel, "y_most": 100.0}], tmp_path / "ended.svg").read_bytes()
    assert plots.lines([{**panel, "y_most": 1000.0}], tmp_path / "wide.svg").read_bytes() == free != ended


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shape"):
        plots.training_curves([{"label": "a", "steps": [1, 2], "series": {"loss": [1.0]}}], tmp_path / "c.svg")
    with pytest.raises(UsageError, match="shape"):
        plots.class_bars({"a": {"share": [0.5, 0.5]}, "b": {"share": [1.0]}}, tmp_path / "b.svg")
    with pytest.raises(UsageError, match="go together"):
        pictures.neighbour_strip(np.zeros((2, 1, 8, 8)), np.zeros((1, 1, 8, 8)), [1.0], tmp_path / "s.png")
    with pytest.raises(UsageError, match="2 labels for 1 rows"):
        pictures.image_grid(np.zeros((2, 1, 8, 8)), tmp_path / "g.png", labels=["a", "b"])


def some_panels() -> list[dict[str, Any]]:
    x = [1.0, 10.0, 100.0]
    curve = {"label": "found", "x": x, "y": [0.5, 0.2, -0.1], "low": [0.4, 0.1, -0.2], "high": [0.6, 0.3, 0.0]}
    ceiling = {"label": "ceiling", "x": x, "y": [1.0, 2.0, np.nan], "plain": True}
    shared: dict[str, Any] = {"x_label": "size", "y_label": "nats", "x_log": True, "curves": [curve, ceiling]}
    return [{**shared, "y_log": True, "levels": [{"label": "truth", "y": 0.3}]}, shared]


def test_lines_and_densities_are_the_same_bytes_from_the_same_numbers(tmp_path: Path) -> None:
    edges, density = np.linspace(-1, 1, 5), np.array([0.1, 0.4, 0.4, 0.1])
    for draw in (
        lambda path: plots.lines(some_panels(), path),
        lambda path: plots.densities([{"title": "a", "density": density}], edges, path, "z", reference=density),
    ):
        first, second = (draw(tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
        assert first == second and first.startswith(b"<?xml")


def test_lines_and_densities_refuse_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a panel without curves"):
        plots.lines([{"x_label": "x", "y_label": "y", "curves": []}], tmp_path / "l.svg")
    with pytest.raises(UsageError, match=r"found has x of shape \(2,\) and y of shape \(1,\)"):
        plots.lines([{"x_label": "x", "y_label": "y", "curves": [{"label": "found", "x": [1, 2], "y": [1]}]}], tmp_path / "l.svg")
    with pytest.raises(UsageError, match=r"every density must have shape \(3,\)"):
        plots.densities([{"title": "a", "density": [1.0, 2.0]}], [0, 1, 2, 3], tmp_path / "d.svg", "z")
    assert not list(tmp_path.iterdir())


def some_groups(price: float = 14.0) -> list[dict[str, Any]]:
    least = {"label": "least cost", "x": [8.0, 10.0, price], "y": [0.8, 0.7, 0.6], "errors": [0.02, 0.02, 0.03], "words": ["plain", "2", "5"]}
    return [least, {"label": "straight line", "x": [8.0, 12.0], "y": [0.8, 0.75], "errors": [0.02, 0.02], "words": ["plain", "2.5"]}]


def test_trade_off_shows_every_point_with_its_word(tmp_path: Path) -> None:
    drawn = plots.trade_off(some_groups(), tmp_path / "a.svg", "distance", "excess").read_text()
    assert drawn == plots.trade_off(some_groups(), tmp_path / "b.svg", "distance", "excess").read_text()
    written = re.findall(r"<!-- (.*?) -->", drawn)  # texts are drawn as outlines, each below a comment that tells it
    assert {"least cost", "straight line", "plain", "2", "5", "2.5", "distance", "excess"} <= set(written)
    moved = plots.trade_off(some_groups(price=20.0), tmp_path / "c.svg", "distance", "excess").read_text()
    assert moved != drawn


@pytest.mark.parametrize("broken", [[], [{**some_groups()[0], "words": ["plain"]}], [{**some_groups()[0], "errors": [0.1]}]])
def test_trade_off_refuses_what_does_not_fit(broken: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="equal length"):
        plots.trade_off(broken, tmp_path / "t.svg", "distance", "excess")
    assert not list(tmp_path.iterdir())


def test_names_of_points_that_lie_on_each_other_share_a_place() -> None:
    told = [("a", 0.0, 30.0), ("b", 0.01, 29.9), ("c", 5.0, 20.0)]
    places, names = [(x, y) for _, x, y in told], [name for name, _, _ in told]
    assert plots._point_names(places, names, (5.0, 10.0)) == [((0.0, 30.0), "a, b"), ((5.0, 20.0), "c")]
    assert [name for _, name in plots._point_names(places, names, (0.1, 0.1))] == ["a", "b", "c"]
    assert [name for _, name in plots._point_names(places, ["", "b", ""], (5.0, 10.0))] == ["b", ""]


def test_powers_of_ten_are_mathematics_in_figures() -> None:
    assert plots.raised("10, 10⁴") == "10, $10^{4}$" and plots.raised("β = 10⁻³") == "β = $10^{-3}$" and plots.raised("Dist² / 10") == "Dist² / 10"
