"""`periplus invert` and `periplus path` as a user meets them: files, tables, answers, one-line errors, interruption."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from periplus import cli, latent_commands, load_data, load_run, locating
from periplus.inversion import dataset

torch.set_num_threads(1)
TINY = [*("--latent-dim", "3", "--max-steps", "30", "--precision", "float32", "--threads", "1"), *("--architecture", "mlp", "--device", "cpu")]


class Answer(NamedTuple):
    code: object
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """`periplus WORDS...` in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> Answer:
        capsys.readouterr()
        given = [str(word) for word in words]
        monkeypatch.setattr("sys.argv", ["periplus", *given])
        with pytest.raises(SystemExit) as stop:
            cli.main(given)
        return Answer(stop.value.code or 0, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(call: Call, tmp_path: Path) -> Path:
    """A small autoencoder of digits."""
    words = ["train", "vae", "--data", "digits", "--out", tmp_path / "run", "--hidden", "16", "--depth", "1", "--beta", "0.1", *TINY]
    answer = call(*words)
    assert answer.code == 0, answer.err
    return tmp_path / "run"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


# ---- invert -----------------------------------------------------------------------------------------------------------------------------------


def test_invert_writes_what_it_found_and_how(call: Call, run: Path) -> None:
    answer = call("invert", run, "--n", 2, "--starts", 3)
    assert answer.code == 0, answer.err
    folder = run / "inversion"
    assert sorted(p.name for p in folder.iterdir()) == ["codes.safetensors", "inversion.json", "inversion.png"]
    told, codes = read(folder / "inversion.json"), load_file(folder / "codes.safetensors")
    assert told["command"] == f"periplus invert {run} --n 2 --starts 3"
    assert told["starts"] == 4 and told["domain"]["name"] == "ball" and told["thresholds"]["same_code_rms"] > 0
    decoded = load_run(run).decode(codes["z"]).double()
    target = load_data("digits", "test").images[:2]
    assert torch.equal(codes["images"], target)
    assert [image["error"] for image in told["images"]] == pytest.approx(((decoded - target / 255) ** 2).flatten(1).sum(1).tolist(), rel=1e-3)
    assert all(sentence in answer.out for sentence in told["statements"]) and "0 (1)" in answer.out
    with Image.open(folder / "inversion.png") as picture:
        assert picture.text["Command"] == told["command"]  # type: ignore[attr-defined]


def test_json_is_the_file(call: Call, run: Path, tmp_path: Path) -> None:
    answer = call("invert", run, "--n", 1, "--starts", 1, "--out", tmp_path / "out", "--json", "--domain", "free")
    assert json.loads(answer.out) == read(tmp_path / "out" / "inversion.json")


def test_invert_says_where_there_are_fewer_images_than_asked_for(call: Call, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=load_data("digits").images[:40].numpy(), labels=load_data("digits").labels[:40].numpy())  # type: ignore[union-attr]
    words = ["train", "vae", "--data", tmp_path / "few.npz", "--out", tmp_path / "run", "--hidden", "8", "--depth", "1", "--batch-size", "8", *TINY]
    assert call(*words, "--held-out", "3").code == 0
    answer = call("invert", tmp_path / "run", "--n", 500, "--starts", 1)
    assert answer.code == 0 and "500 were asked for, but 3 images are held out: all are inverted\n" in answer.err
    assert "asked for" not in call("invert", tmp_path / "run", "--n", 3, "--starts", 1).err
    assert "asked for" not in call("invert", tmp_path / "run", "--all", "--starts", 1).err
    evaluated = call("evaluate", tmp_path / "run", "--n", 0, "--likelihood-images", 0).out
    assert re.search(r"train +┃ held out", evaluated) and "least possible distortion / nats" in evaluated


def test_invert_classes_and_files(call: Call, run: Path, tmp_path: Path) -> None:
    told = json.loads(call("invert", run, "--n", 1, "--starts", 1, "--classes", 3, 8, "--json").out)
    assert [image["label"] for image in told["images"]] == ["3", "8"]
    file = tmp_path / "seven.png"
    Image.fromarray(np.asarray(load_data("digits", "test").images[1, 0])).save(file)
    told = json.loads(call("invert", run, "--starts", 1, "--files", file, "--json").out)
    assert [image["name"] for image in told["images"]] == ["seven.png"]
    assert [image["verdict"] for image in json.loads(call("invert", run, "--n", 1, "--starts", 1, "--split", "train", "--json").out)["images"]] != []


def test_a_long_inversion_that_was_stopped_goes_on(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locating, "CHUNK", {"cpu": 2})
    monkeypatch.setattr(latent_commands, "KEPT_ABOVE", 3)
    words = ["invert", run, "--n", 5, "--starts", 1, "--domain", "free", "--out"]
    whole = call(*words, tmp_path / "whole")
    assert whole.code == 0 and f"{tmp_path / 'whole' / 'parts'}: stop at any time" in whole.err
    own = dataset.write_atomically

    def stop(file: Path, content: bytes | str) -> None:
        own(file, content)
        if file.name.startswith("part-"):
            raise KeyboardInterrupt("stopped by SIGTERM")

    with monkeypatch.context() as stopping:
        stopping.setattr(dataset, "write_atomically", stop)
        stopped = call(*words, tmp_path / "again")
    assert stopped.code == 130 and stopped.err.splitlines()[-1] == "periplus: stopped by SIGTERM"
    assert not (tmp_path / "again" / "inversion.json").exists()
    refused = call("invert", run, "--n", 5, "--starts", 2, "--domain", "free", "--out", tmp_path / "again")
    assert refused.code == 4 and "again/parts holds another job (starts was 1, is 2): choose another folder, or delete it" in refused.err
    assert call(*words, tmp_path / "again").code == 0
    first, second = (load_file(tmp_path / name / "codes.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(first[name].double().nan_to_num(7), second[name].double().nan_to_num(7)) for name in first)
    assert not (tmp_path / "again" / "parts").exists()  # all of it is in codes.safetensors


@pytest.mark.parametrize("command", ["invert", "path"])
def test_an_out_that_cannot_be_a_folder_is_refused_before_the_search(call: Call, run: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    answer = call(command, run, "--out", tmp_path / "thesis.tex" / "deep")
    assert answer.code == 2 and "thesis.tex is a file, and a folder is needed" in answer.err and "inverting" not in answer.err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


# ---- path -------------------------------------------------------------------------------------------------------------------------------------


def test_path_writes_what_it_found_and_how(call: Call, run: Path) -> None:
    answer = call("path", run, "--pairs", "0,1", "0,3", "--starts", 2, "--segments", 8, "--steps", 5, "--gif")
    assert answer.code == 0, answer.err
    folder = run / "paths"
    told, points = read(folder / "path.json"), load_file(folder / "points.safetensors")
    assert sorted(p.name for p in folder.iterdir()) == sorted(told["files"])
    assert [(pair["a"]["index"], pair["b"]["index"]) for pair in told["pairs"]] == [(0, 1), (0, 3)]
    assert points["points"].shape == (2, 9, 3) and all(sentence in answer.out for sentence in told["statements"])
    away = (load_run(run).decode(points["points"][:, 0]) - points["image_a"]).double().square().flatten(1).sum(1)
    assert [pair["a"]["error"] for pair in told["pairs"]] == pytest.approx(away.tolist(), rel=1e-3)
    assert all(pair["lower_bound"] <= pair["cost"] for pair in told["pairs"]) and told["lipschitz"] > 0
    with Image.open(folder / "pair-1.gif") as film:
        assert film.info["loop"] == 0 and film.info["comment"].decode() == told["command"]
        assert 1 < film.n_frames <= 2 * latent_commands.FRAMES - 2  # type: ignore[attr-defined]
        shown = 0
        for frame in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(frame)
            shown += film.info["duration"]
        assert shown == (2 * latent_commands.FRAMES - 2) * latent_commands.MILLISECONDS


def test_what_an_earlier_command_left_is_removed(call: Call, run: Path) -> None:
    assert call("path", run, "--n", 2, "--starts", 1, "--segments", 4, "--gif").code == 0
    (run / "paths" / "mine.txt").write_text("kept")
    assert call("path", run, "--n", 1, "--starts", 1, "--segments", 4).code == 0
    names = sorted(p.name for p in (run / "paths").iterdir())
    assert names == ["cost-1.svg", "mine.txt", "pair-1.png", "path.json", "points.safetensors"]


def test_path_of_classes_and_files(call: Call, run: Path, tmp_path: Path) -> None:
    told = json.loads(call("path", run, "--classes", 3, 8, "--n", 1, "--starts", 1, "--segments", 4, "--norm", "energy", "--json").out)
    assert (told["pairs"][0]["a"]["label"], told["pairs"][0]["b"]["label"], told["norm"]) == ("3", "8", "energy")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, image in zip(files, load_data("digits", "test").images, strict=False):
        Image.fromarray(np.asarray(image[0])).save(file)
    told = json.loads(call("path", run, "--files", *files, "--starts", 1, "--segments", 4, "--json").out)
    assert told["pairs"][0]["a"]["name"] == "a.png"


# ---- errors -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ("invert", 2, "RUN"),
        ("invert NOWHERE", 4, "nowhere"),
        ("invert RUN --n 0", 2, "--n is 0"),
        ("invert RUN --starts 0", 2, "--starts is 0"),
        ("invert RUN --domain sphere", 2, "sphere.*--domain"),
        ("invert RUN --domain prior", 2, "--domain prior needs --prior-weight"),
        ("invert RUN --radius -1", 2, "radius -1"),
        ("invert RUN --classes 12", 2, "--classes has '12'"),
        ("invert RUN --classes 1 --files a.png", 2, "--classes and --files choose images in different ways"),
        ("invert RUN --all --files a.png", 2, "--all and --files choose"),
        ("invert RUN --files no.png", 3, "no.png: no such file"),
        ("invert RUN --files BROKEN", 3, "broken.png: is empty"),
        ("invert RUN --split valid", 2, "--split is 'valid'"),
        ("invert RUN --n 1 --out FILE", 2, "a folder is needed"),
        ("path RUN --pairs 0-5", 2, "--pairs has '0-5'.*such as 0,5"),
        ("path RUN --pairs 5,5", 2, "--pairs has '5,5'"),
        ("path RUN --pairs 0,999", 2, "image 999 does not exist"),
        ("path RUN --pairs 0,1 --classes 3 8", 2, "--classes and --pairs choose"),
        ("path RUN --classes 3", 2, "two are needed"),
        ("path RUN --steps 1", 2, "--steps is 1"),
        ("path RUN --n 1 --starts 1 --segments 0", 2, "--segments is 0"),
        ("path RUN --n 1 --starts 1 --alternatives 0", 2, "--alternatives is 0"),
        ("path RUN --norm cubed", 2, "cubed.*--norm"),
    ],
)
def test_errors_are_one_line_that_names_the_value(call: Call, run: Path, tmp_path: Path, words: str, code: int, named: str) -> None:
    (tmp_path / "broken.png").touch()
    (tmp_path / "file").touch()
    places = {"RUN": run, "NOWHERE": tmp_path / "nowhere", "BROKEN": tmp_path / "broken.png", "FILE": tmp_path / "file"}
    answer = call(*(places.get(word, word) for word in words.split()))
    lines = [line for line in answer.err.splitlines() if line.startswith("periplus: ")]
    assert answer.code == code and len(lines) == 1 and "Traceback" not in answer.err, answer.err
    assert re.search(named, lines[0]), lines[0]
    assert not (run / "inversion").exists() and not (run / "paths").exists()


def test_settings_are_checked_before_the_long_search(call: Call, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locating, "locate", lambda *_, **__: pytest.fail("searched"))
    assert call("path", run, "--n", 1, "--segments", 0).code == 2
    assert call("path", run, "--n", 1, "--alternatives", 0).code == 2
