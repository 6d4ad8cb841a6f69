"""Pictures of codes and paths: exact pixels in known places, captions that stay in their column, animations that play, commands inside the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from periplus import UsageError, pictures


def flat(*levels: int) -> NDArray[np.uint8]:
    """Images 8 x 8, one for each level."""
    return np.stack([np.full((1, 8, 8), level, np.uint8) for level in levels])


def grey(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("L"))


def test_rows_of_any_lengths_have_their_pixels_and_captions(tmp_path: Path) -> None:
    path = pictures.captioned_rows([flat(10, 20), flat(30)], [["", "1.25\nkink"], ["2.5\nflat"]], tmp_path / "rows.png", scale=10)
    picture = grey(path)
    assert picture.shape[1] == 80 + 5 + 80
    row = (picture.shape[0] + 5) // 2
    for top, left, level in ((0, 0, 10), (0, 85, 20), (row, 0, 30)):
        assert (picture[top : top + 80, left : left + 80] == level).all()
    assert (picture[row : row + 80, 85:] == 255).all()  # a place without an image is white
    assert (picture[80:row, :80] == 255).all() and (picture[80:row, 85:] < 128).any()  # no caption, a caption
    below = picture[80:row, 85:]
    lines = (below < 128).any(1)
    assert np.count_nonzero(lines[1:] & ~lines[:-1]) == 2  # two lines of it


def test_captions_and_headers_stay_in_their_columns(tmp_path: Path) -> None:
    path = pictures.captioned_rows([flat(255, 255, 255)], [["a", "unfinished, 100%", "b"]], tmp_path / "a.png", header=["x", "y", "z"])
    picture = grey(path)
    assert (picture[:, 112:119] == 255).all() and (picture[:, 231:238] == 255).all()  # the gaps between columns are empty
    labelled = grey(pictures.captioned_rows([flat(0)], [["a"]], tmp_path / "b.png", labels=["test 0 (7)"]))
    assert labelled.shape[1] > 112 and (labelled[:, : labelled.shape[1] - 112] < 128).any()


def test_a_strip_holds_the_images_apart_from_the_curve(tmp_path: Path) -> None:
    path = pictures.morph_strip(flat(10)[0], [flat(20, 30, 40), flat(50, 60, 70)], flat(80)[0], tmp_path / "s.png", ["", ""], scale=10)
    picture = grey(path)
    margin = picture.shape[1] - (2 * 80 + 2 * 15 + 3 * 80 + 2 * 5)
    lefts = [margin, *(margin + 95 + 85 * k for k in range(3)), margin + 95 + 250 + 15]
    for row, levels in enumerate(((10, 20, 30, 40, 80), (10, 50, 60, 70, 80))):
        for left, level in zip(lefts, levels, strict=True):
            assert (picture[85 * row : 85 * row + 80, left : left + 80] == level).all()
    assert (picture[:, margin + 80 : margin + 95] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_plays_its_frames_for_ever(tmp_path: Path, channels: int) -> None:
    frames = np.random.default_rng(0).integers(0, 4, (5, channels, 8, 8)).astype(np.uint8) * 85
    path = pictures.animation(frames, tmp_path / "a.gif", milliseconds=70, scale=3, command="periplus path RUN")
    with Image.open(path) as film:
        assert film.n_frames == 5 and film.info["loop"] == 0 and film.info["comment"] == b"periplus path RUN"  # type: ignore[attr-defined]
        for index, frame in enumerate(frames):
            film.seek(index)
            shown = np.asarray(film.convert("RGB"))
            assert film.info["duration"] == 70 and shown.shape == (24, 24, 3)
            assert (shown == np.broadcast_to(frame.transpose(1, 2, 0), (8, 8, 3)).repeat(3, 0).repeat(3, 1)).all()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_equal_frames_are_shown_as_long(tmp_path: Path) -> None:
    with Image.open(pictures.animation(flat(10, 10, 20), tmp_path / "a.gif", milliseconds=50)) as film:
        durations = []
        for index in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(index)
            durations.append(film.info["duration"])
        assert sum(durations) == 150


def test_the_same_numbers_give_the_same_bytes_and_name_their_command(tmp_path: Path) -> None:
    def draw(folder: Path, command: str | None) -> list[bytes]:
        return [
            pictures.captioned_rows([flat(1, 2)], [["a", "b"]], folder / "r.png", command=command).read_bytes(),
            pictures.morph_strip(flat(1)[0], [flat(2)], flat(3)[0], folder / "s.png", ["a"], command=command).read_bytes(),
            pictures.animation(flat(1, 2), folder / "a.gif", command=command).read_bytes(),
        ]

    first, second, other = draw(tmp_path / "1", "periplus x"), draw(tmp_path / "2", "periplus x"), draw(tmp_path / "3", None)
    assert first == second and all(b"periplus x" in a and b"periplus x" not in b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda path: pictures.captioned_rows([flat(1, 2)], [["a"]], path), "captioned_rows: .* do not go together"),
        (lambda path: pictures.captioned_rows([flat(1)], [["a"]], path, labels=["a", "b"]), "2 labels for 1 rows"),
        (lambda path: pictures.morph_strip(flat(1)[0], [flat(1), flat(1, 2)], flat(1)[0], path, ["a", "b"]), "morph_strip: .* do not go together"),
        (lambda path: pictures.animation(flat(1) * np.nan, path), "animation: images must be"),
        (lambda path: pictures.animation(flat(1), path, milliseconds=0), "milliseconds is 0"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, draw: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        draw(tmp_path / "p.png")
    assert not list(tmp_path.iterdir())
