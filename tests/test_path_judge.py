"""The judge of passages, on decoders whose paths are known in closed form, and on runs that cheat."""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from periplus import AdversarialConfig, Run, cli, load_data, train
from periplus.data import ImageData
from periplus.errors import UsageError
from periplus.locating import images_of
from periplus.path_judge import STEPS, judge_paths, judge_statements, largest_steps, realism, spread_of

STARTS_AND_SEGMENTS = ["--starts", "2", "--segments", "8"]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def short_run(data: ImageData, folder: Path, **changes: Any) -> Run:
    """A generator that has learnt next to nothing."""
    options: dict[str, Any] = {"max_steps": 2, "batch_size": 32, "latent_dim": 2, "log_every": 2, "sample_every": 100, "snapshots": False}
    return train(AdversarialConfig(model="gan", **options | changes), data, folder)


@dataclass
class Pixels:
    """Features that are the pixels."""

    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return (images.float() / 255 if images.dtype == torch.uint8 else images).flatten(1)

    def record(self) -> dict[str, Any]:
        return {"name": "pixels"}


# ---- known answers --------------------------------------------------------------------------------------------------------------------------


def two_halves(z: Tensor) -> Tensor:
    """A linear decoder of two dimensions, orthogonal and of one scale: the grey of the left half of an 8 x 8 image, and of the right."""
    grey = (128 + 32 * z) / 255
    return grey[..., None, :].repeat_interleave(4, dim=-1).expand(*z.shape[:-1], 8, 8)[..., None, :, :]


def test_a_linear_decoder_has_four_thirds_and_exact_ends(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every difference of codes is a right singular vector, so the straight line is the cheapest path: U~ = 4/3, at even speed."""
    codes = torch.cartesian_prod(*(torch.arange(-8, 9) / 4,) * 2)[torch.randperm(289, generator=torch.Generator().manual_seed(1))][:120]
    images = (255 * two_halves(codes)).round().to(torch.uint8)
    run = short_run(digits, tmp_path / "run")
    monkeypatch.setattr(run, "decode", two_halves)
    found = judge_paths(run, ImageData(images, None, (), "halves", "test"), 4, segments=8, extractor=Pixels())
    assert found["excess"]["mean"] == pytest.approx(1 / 3, abs=1e-4) and found["straight_excess"]["mean"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["gap"]["mean"] == pytest.approx(1 / 3, abs=1e-4)  # of this decoder nothing but the floor is known
    assert found["end_error"]["mean"] < 1e-6 and found["squared_error"]["mean"] < 1e-6
    assert found["jump"]["mean"] == pytest.approx(1 / STEPS, rel=1e-3)
    assert found["converged"] == 4 and not found["coincident"] and found["held_out"]
    seen = found["realism"]
    assert seen["path"]["precision"] == seen["line"]["precision"] == seen["cross_fade"]["precision"]  # they are the same images
    for pair in found["pairs"]:
        assert pair["lower_bound"] == pytest.approx(pair["cost"] * 3 / 4, rel=1e-4)


def test_both_ends_count(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A decoder with the one image M = 0: the errors of the ends are (|x_A|^2 + |x_B|^2) / Dist^2, and the score is 1 + 4 |M - g|^2 / Dist^2."""
    run = short_run(digits, tmp_path / "run")
    for parameter in run.decoder.parameters():
        parameter.data.zero_()
    monkeypatch.setattr(run.decoder, "forward", lambda z: 0 * z.sum(-1)[..., None, None, None].expand(*z.shape[:-1], 1, 8, 8))
    test = load_data("digits", split="test")
    found = judge_paths(run, test, 3, segments=8)
    x = test.images[:6].double().flatten(1) / 255
    a, b = x[::2], x[1::2]
    squared = (a - b).square().sum(1)
    each = torch.tensor([pair["score"] for pair in found["pairs"]], dtype=torch.float64)
    torch.testing.assert_close(each, 1 + 4 * ((a + b) / 2).square().sum(1) / squared, rtol=1e-4, atol=0)
    ends = (a.square().sum(1) + b.square().sum(1)) / squared
    assert found["end_error"]["mean"] == pytest.approx(float(ends.mean()), rel=1e-4)
    assert found["squared_error"]["mean"] == pytest.approx(float(x.square().sum(1).mean()), rel=1e-4)
    assert found["jump"]["mean"] == 0.0


def known_paths(decode: Any, path: Tensor, line: Tensor, x_a: Tensor, x_b: Tensor, used: list[int]) -> tuple[Any, Any]:
    """A run with this decoder and P passages with these nodes (P, N+1, d) between these images (P, C, H, W), rows `used` of the data."""
    points = {"path": path, "line": line}
    passages = SimpleNamespace(
        points=points.__getitem__,
        images=lambda end: (x_a, x_b)[end],
        pairs=[(2 * k, 2 * k + 1) for k in range(len(path))],
        targets=SimpleNamespace(index=used),
    )
    return SimpleNamespace(decode=decode), passages


def test_a_rush_to_the_middle_is_half_of_the_distance():
    x_a, x_b = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)

    def rushing(z: Tensor) -> Tensor:
        grey = 0.5 + 0.5 * (z[..., 0] > 0.99) - 0.5 * (z[..., 0] < 0.01)
        return grey[..., None, None, None].expand(*z.shape[:-1], 1, 1, 2)

    line = torch.tensor([[[0.0], [1.0]]])
    for decode, largest in ((rushing, 0.5), (lambda z: z[..., None, None].expand(*z.shape[:-1], 1, 1, 2), 1 / STEPS)):
        run, passages = known_paths(decode, line, line, x_a, x_b, [0, 1])
        assert float(largest_steps(run, passages)) == pytest.approx(largest, rel=1e-5)


def test_realism_tells_the_path_from_the_line_and_leaves_the_ends_out():
    """Real images are light, but for the ends, which are dark and equal. The path is decoded to light images, the line to black ones; cross-fades
    are the very images of the ends, and these are nobody's neighbours."""
    light = 200 + torch.randint(0, 20, (120, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.full((2, 1, 2, 2), 60), light]).to(torch.uint8)
    data = ImageData(images, None, (), "greys", "test")
    nodes = torch.stack([torch.linspace(-1, 1, 9), torch.ones(9)], 1)[None]
    run, passages = known_paths(
        lambda z: (210 / 255 * z[..., 1])[..., None, None, None].expand(*z.shape[:-1], 1, 2, 2),
        nodes,
        nodes * torch.tensor([1.0, 0.0]),
        *(images[k : k + 1].float() / 255 for k in (0, 1)),
        used=[0, 1],
    )
    eyes = Pixels()
    found = realism(run, passages, data, eyes)
    assert found is not None and found["extractor"] == {"name": "pixels"}
    assert {name: found[name]["precision"] for name in ("path", "line", "cross_fade")} == {"path": 1.0, "line": 0.0, "cross_fade": 0.0}
    assert found["floor"]["precision"] > 0.8
    real, floor = eyes.seen[0], eyes.seen[-1]
    assert len(real) == found["real"] and not bool((real == 60).any()) and not bool((floor == 60).any())
    assert realism(run, passages, data.subset(range(6)), eyes) is None


def test_a_single_pair_has_no_standard_error():
    assert spread_of([1.5]) == {"mean": 1.5, "standard_error": None, "median": 1.5}
    assert spread_of([1.0, 3.0])["standard_error"] == pytest.approx(1.0)


# ---- what it says ---------------------------------------------------------------------------------------------------------------------------


def test_pairs_that_were_trained_on_are_not_called_held_out(digits: ImageData, tmp_path: Path):
    run = short_run(digits, tmp_path / "run")
    for split in ("train", "test"):
        found = judge_paths(run, images_of(run, split), 1, segments=4)
        held_out = split == "test"
        assert found["held_out"] == held_out and ("1 held-out pair:" in found["statements"][0]) == held_out
        assert any("was trained on this split (train)" in said for said in found["statements"]) != held_out
        json.loads(json.dumps(found, allow_nan=False))


def test_images_that_a_run_kept_from_training_are_held_out(digits: ImageData, tmp_path: Path):
    data = ImageData(digits.images[:200], None, (), "mine", "all")
    run = short_run(data, tmp_path / "run", held_out=40)
    _, kept = data.split_off(40, 0)
    assert judge_paths(run, kept, 1, segments=4)["held_out"] and not judge_paths(run, data, 1, segments=4)["held_out"]


def test_pairs_with_one_code_have_no_score_and_are_counted(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from periplus import path_judge

    run = short_run(digits, tmp_path / "run")
    test, real, same = load_data("digits", split="test"), path_judge.locate, 2

    def one_code(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        found.all_z[:same] = found.all_z[0, 0]
        return found

    monkeypatch.setattr(path_judge, "locate", one_code)
    found = judge_paths(run, test, 3, segments=4)
    assert found["coincident"] == 1 and found["pairs"][0]["score"] is None
    assert found["score"]["mean"] == pytest.approx(sum(pair["score"] for pair in found["pairs"][1:]) / 2)
    assert "2 held-out pairs:" in found["statements"][0] and "1 pair more: one code for both images" in " ".join(found["statements"])
    same = 6
    with pytest.raises(UsageError, match="one and the same code"):
        judge_paths(run, test, 3, segments=4)


def test_a_judgement_says_scores_bounds_ends_and_realism():
    record = {name: {"mean": mean, "standard_error": 0.01, "median": mean} for name, mean in (("score", 1.75), ("straight_excess", 1.0))}
    record |= {name: {"mean": mean} for name, mean in (("gap", 0.74), ("end_error", 0.2), ("squared_error", 9.9312), ("jump", 0.06))}
    shares = {name: {"precision": value} for name, value in (("path", 0.88), ("line", 0.87), ("cross_fade", 0.84), ("floor", 0.93))}
    whole: dict[str, Any] = record | {"settings": {"pairs": 200}, "coincident": 0, "held_out": True, "converged": 199}
    said = judge_statements(whole | {"realism": shares | {"k": 5}})
    assert said[0].startswith("200 held-out pairs: U~ = 1.750 (standard error 0.010) on the path found, 2.000 on the straight line;")
    assert "199 of 200 converged; above the lower bound of each by 74 % on average (gap)" in said[0]
    assert "a squared error of 9.931 for each image, both together 20.0 % of Dist^2" in said[1] and "moves the image by 6.0 % of Dist" in said[1]
    assert "Along the path 88 % of the images lie among real ones (precision, k = 5); along the line 87 %; of cross-fades 84 %" in said[2]
    assert "too few real images" in judge_statements(whole | {"realism": None})[-1]


def test_the_judge_on_the_command_line(
    digits: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_run(digits, tmp_path / "run")
    words = ["path", str(tmp_path / "run"), "--judge", "--n", "3", *STARTS_AND_SEGMENTS]
    monkeypatch.setattr(sys, "argv", ["periplus", *words])
    cli.run(words)
    assert "3 held-out pairs: U~ = " in capsys.readouterr().out
    found = json.loads((tmp_path / "run/paths/judge.json").read_text())
    assert found["command"] == shlex.join(["periplus", *words])
    assert found["settings"]["pairs"] == len(found["pairs"]) == 3 and found["realism"]["extractor"]["name"]
    assert found["excess"]["mean"] == pytest.approx(sum(pair["score"] for pair in found["pairs"]) / 3 - 1)
    for more in (["--pairs", "0,5"], ["--gif"]):
        with pytest.raises(UsageError, match="--judge takes the first"):
            cli.run([*words, *more])
