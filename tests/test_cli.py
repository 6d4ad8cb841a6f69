"""The command line: exit codes, one line per error, one document per --json, and a training process that can be stopped."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from periplus import PeriplusError, cli, load_data, runs
from periplus.locks import hold
from periplus.networks import MLPCritic, MLPGenerator

torch.set_num_threads(1)
TINY = [
    *("--batch-size", "16", "--latent-dim", "4", "--max-steps", "6", "--log-every", "2"),
    *("--checkpoint-every", "2", "--sample-every", "3", "--precision", "float32", "--threads", "1"),
]


class Answer(NamedTuple):
    code: object
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("periplus: ") and "Traceback" not in self.err, self.err
        return lines[0].removeprefix("periplus: ")


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """`periplus WORDS...` in this process, with small networks."""
    monkeypatch.setattr("periplus.networks.MLPGenerator", functools.partial(MLPGenerator, widths=(16, 24)))
    monkeypatch.setattr("periplus.networks.MLPCritic", functools.partial(MLPCritic, widths=(24,)))
    before = signal.getsignal(signal.SIGTERM)

    def call(*words: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        return Answer(stop.value.code or 0, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def trained(call: Call, tmp_path: Path) -> Path:
    """A small finished run."""
    answer = call("train", "gan", "--data", "digits", "--out", tmp_path / "run", *TINY)
    assert answer.code == 0, answer
    assert answer.out == f"{tmp_path / 'run'}: 6 steps done\n"
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in sorted(files.items()) if name not in (".lock", "env.json", "timing.jsonl")}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in (folder, *folder.rglob("*")) if p.name != ".lock"}


# ---- errors -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("trian", r"unknown command 'trian' \(did you mean 'train'\?\)"),
        ("train", "periplus train needs one of gan, wgan-gp, rpgan, vae, echo first"),
        ("train gam", r"unknown model 'gam' \(did you mean 'gan'\?\): known are gan, wgan-gp, rpgan, vae, echo"),
        ("train gan", "--data"),
        ("train gan --data digits", "--out"),
        ("train gan --data digits --out OUT --epocs 3", "--epocs"),
        ("train gan --data digits --out OUT --penalty-weight 3", "--penalty-weight"),  # an option of the other model
        ("train gan --data digits --out OUT --epochs many", "--epochs is 'many': a whole number is needed; 'periplus train gan --help'"),
        ("train gan --data digits --out OUT --learning-rate small", "--learning-rate is 'small': a number is needed"),
        ("train gan --data digits --out OUT --threads 1.5", "--threads is '1.5': a whole number is needed"),
        ("study --out OUT --hours many", "--hours is 'many': a number is needed; 'periplus study --help' tells more$"),
        ("train gan --data digits --out OUT --epochs 0", "--epochs is 0: it must be at least 1"),
        ("train gan --data digits --out OUT --learning-rate nan", "--learning-rate.* is nan"),
        ("train gan --data digits --out OUT --learning-rate -1", "--learning-rate.* is -1.0: it must be positive"),
        ("train gan --data digits --out OUT --device warp", "--device is 'warp'"),
        ("train gan --data digits --out OUT --precision int8", "int8.*--precision"),
        ("train gan --data digits --out OUT --threads 0", "--threads is 0"),
        ("train gan --data digits --out OUT --image-size 0", "image_size: 0"),
        ("train gan --data digits --out OUT --batch-size 1400", "--batch-size is 1400, but only 1350 images are left"),
        ("train gan --data digits --out OUT --held-out 1500", "--held-out is 1500: it leaves no image"),
        ("train vae --data digits --out OUT --preset sheet", "--preset sheet is not for 'vae': it is for gan, wgan-gp"),
        ("train gan --data digits --out OUT --preset paper", "--preset paper is not for 'gan': it is for vae, echo"),
        ("train vae --data digits --out OUT --preset papers", "--preset is 'papers': use one of default, sheet, paper, stacked"),
        ("train vae --data digits --out OUT --rate echo", "echo.*--rate"),
        ("train vae --data digits --out OUT --clip 0.99", "--clip"),  # of the other channel
        ("train echo --data digits --out OUT --rate prior", "--rate"),
        ("train echo --data digits --out OUT --estimator mixture", "--estimator"),
        ("train echo --data digits --out OUT --clip 0.9", r"--clip is 0.9: it must be in \[0.985, 1\)"),
        ("train vae --data digits --out OUT --beta -1", "--beta is -1.0: it must be zero or more"),
        ("train vae --data digits --out OUT --architecture custom", "custom.*--architecture"),
        ("train vae --data digits --out OUT --architecture conv --image-size 7", "7x7 cannot be halved twice"),
        ("sample", "RUN"),
        ("report", "at least one RUN"),
        ("data", "needs one of list, fetch, verify"),
        ("data lsit", r"unknown word 'data lsit' \(did you mean 'list'\?\)"),
    ],
)
def test_usage_errors(words: str, named: str, call: Call, tmp_path: Path) -> None:
    answer = call(*words.replace("OUT", str(tmp_path / "run")).split())
    assert answer.code == 2 and answer.out == ""
    assert re.search(named, answer.error), answer.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("nowhere.npz", "nowhere.npz: no such file"),
        ("digitz", "unknown data 'digitz'; did you mean 'digits'"),
        ("torn.npz", "torn.npz"),
        ("empty", "empty"),
    ],
)
def test_data_errors(data: str, named: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "torn.npz", images=np.zeros((50, 8, 8), np.uint8))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "torn.npz").read_bytes()[:-300])
    (tmp_path / "empty").mkdir()
    answer = call("train", "gan", "--data", data if data == "digitz" else f"./{data}", "--out", tmp_path / "run")
    assert answer.code == 3 and named in answer.error
    assert not (tmp_path / "run").exists()


def test_run_errors(trained: Path, call: Call, tmp_path: Path) -> None:
    answer = call("sample", tmp_path / "nowhere")
    assert answer.code == 4 and "nowhere does not exist" in answer.error
    answer = call("sample", tmp_path)
    assert answer.code == 4 and "is not a run: it has no config.toml" in answer.error

    text = (trained / "config.toml").read_text()
    (trained / "config.toml").write_text(text.replace("latent_dim", "latent_din"))
    for words in (("sample", trained), ("train", "gan", "--resume", "--out", trained)):
        answer = call(*words)
        assert answer.code == 4 and "config.toml" in answer.error and "'latent_din' (did you mean 'latent_dim'?)" in answer.error
    (trained / "config.toml").write_text(text)

    for file in (trained / "checkpoints").rglob("manifest.json"):
        file.write_text(file.read_text().replace("1", "2"))
    answer = call("sample", trained)
    warned = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    assert warned and all("manifest damaged" in line for line in warned) and len(answer.err.splitlines()) == len(warned) + 1
    assert answer.code == 4 and f"{trained} has no complete checkpoint" in answer.err.splitlines()[-1]


def test_divergence(call: Call, tmp_path: Path) -> None:
    answer = call("train", "wgan-gp", "--data", "digits", "--out", tmp_path / "run", *TINY, "--json", "--learning-rate", "1e30")
    assert answer.code == 5 and answer.out == ""
    assert str(tmp_path / "run") in answer.error and "lower --learning-rate" in answer.error


def test_an_existing_run_is_refused_before_the_data_are_read(trained: Path, call: Call) -> None:
    before = stamps(trained)
    answer = call("train", "gan", "--data", "nowhere.npz", "--out", trained)
    assert answer.code == 2 and "holds a run already: add --resume (in Python resume=True)" in answer.error
    assert stamps(trained) == before


def test_a_run_is_resumed_as_the_model_it_is(trained: Path, call: Call) -> None:
    answer = call("train", "wgan-gp", "--resume", "--out", trained)
    assert answer.code == 2 and "was trained as 'gan', not 'wgan-gp'" in answer.error
    answer = call("train", "gan", "--resume", "--out", trained, "--batch-size", 32, "--max-steps", 9)
    assert answer.code == 2 and "batch_size = 16, not 32" in answer.err.splitlines()[-1]


def test_debug_raises_and_anything_unexpected_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeriplusError, match="unknown command"):
        cli.main(["trian", "--debug"])

    def broken(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(cli, "run", broken)
    answer = call("doctor")
    assert answer.code == 1 and "unexpected ZeroDivisionError: two lines" in answer.error and "--debug" in answer.error
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor", "--debug"])


def test_no_ruler_in_an_error(call: Call) -> None:
    assert "---; " not in call("train", "gan").error


@pytest.mark.parametrize("columns", [0, -1])
def test_a_grid_has_columns(columns: int, trained: Path, call: Call, tmp_path: Path) -> None:
    answer = call("sample", trained, "--columns", columns, "--out", tmp_path / "grid.png")
    assert answer.code == 2 and "columns" in answer.error


@pytest.mark.parametrize(
    "words", [("sample", "RUN", "--out", "RUN/config.toml/grid.png"), ("train", "gan", "--data", "digits", "--out", "RUN/config.toml/x")]
)
def test_an_out_below_a_file(words: Sequence[str], trained: Path, call: Call) -> None:
    answer = call(*(word.replace("RUN", str(trained)) for word in words))
    assert answer.code == 2 and "config.toml" in answer.err.splitlines()[-1]


# ---- what it prints -----------------------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "study": "--data --out --preset --only --resume --archive --weights --author --collaborators --hours --json --debug",
    "train gan": "--data --out --epochs --batch-size --latent-dim --architecture --learning-rate --seed --device --precision --resume --json --debug",
    "train wgan-gp": "--data --out --epochs --batch-size --latent-dim --learning-rate --seed --penalty-weight --critic-steps --resume --dry-run",
    "train vae": "--data --out --rate --beta --estimator --likelihood --sigma --hidden --depth --schedule --architecture --preset --resume --dry-run",
    "train echo": "--data --out --beta --likelihood --sigma --hidden --depth --clip --schedule --architecture --preset --resume --dry-run --json",
    "sample": "RUN --n --out --seed --json --debug",
    "report": "RUN --out --json --debug",
    "data list": "--root --json --debug",
    "data fetch": "NAME --root --json",
    "data verify": "NAME --root --json",
    "doctor": "--json --debug",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help(command: str, call: Call) -> None:
    answer = call(*command.split(), "--help")
    assert answer.code == 0 and answer.err == ""
    for option in OPTIONS[command].split():
        assert option in answer.out, option


def test_help_of_all(call: Call) -> None:
    answer = call("--help")
    assert answer.code == 0 and call().out == answer.out
    for command in cli.commands():
        assert f"  {command} " in answer.out
    assert "2 usage, 3 data, 4 run or checkpoint, 5 non-finite, 130" in answer.out
    for group, words in (("train", ("gan", "wgan-gp", "rpgan", "vae", "echo")), ("data", ("list", "fetch", "verify"))):
        answer = call(group, "--help")
        assert answer.code == 0 and all(word in answer.out for word in words)
    assert re.fullmatch(r"periplus \d+\.\d+\.\d+\n", call("--version").out)


def test_json_is_one_document(trained: Path, call: Call, tmp_path: Path) -> None:
    record = json.loads(call("sample", trained, "--out", tmp_path / "grid.png", "--json").out)
    assert record == {"run": str(trained), "step": 6, "n": 64, "seed": 0, "out": str(tmp_path / "grid.png")}
    answer = call("train", "wgan-gp", "--data", "digits", "--out", tmp_path / "other", *TINY, "--json")
    record = json.loads(answer.out)
    assert answer.code == 0 and record["step"] == record["steps"] == record["metrics"]["step"] == 6
    assert json.loads(call("train", "wgan-gp", "--out", tmp_path / "other", "--resume", "--json").out) == record
    plan = json.loads(call("train", "gan", "--data", "digits", "--out", tmp_path / "none", "--epochs", 2, "--dry-run", "--json").out)
    assert plan["steps"] == 2 * (1350 // 128) and plan["training_images"] == 1350 and plan["config"]["model"] == "gan"
    names = {entry["name"] for entry in json.loads(call("data", "list", "--root", tmp_path, "--json").out)}
    assert names == {"digits", "mnist", "fashion-mnist", "binarized-mnist", "stacked-mnist"}
    assert all({"ok", "what", "found"} == entry.keys() for entry in json.loads(call("doctor", "--json").out))
    assert json.loads(call("data", "verify", "digits", "--json").out) == []


def test_dry_run_writes_nothing(call: Call, tmp_path: Path) -> None:
    answer = call("train", "gan", "--data", "digits", "--out", tmp_path / "run", "--dry-run", "--preset", "sheet")
    assert answer.code == 0 and "nothing was written" in answer.out
    assert "learning_rate = 0.0001" in answer.out and f"{100 * (1350 // 512)} steps" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_was_read(call: Call, tmp_path: Path) -> None:
    """A folder of two classes in which one file is coloured."""
    random = np.random.default_rng(0)
    for k in range(40):
        file = tmp_path / "images" / ("bag", "trouser")[k % 2] / f"{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3) if k == 4 else (8, 8), np.uint8)).save(file)
    words = ("train", "gan", "--data", tmp_path / "images", "--out", tmp_path / "run", "--batch-size", 16, "--dry-run")
    answer = call(*words)
    why = "RGB because of bag/04.png: 39 of 40 files are grey"
    assert answer.out.splitlines()[0] == f"read images: 36 images to train on + 4 held out, 3 x 8 x 8 ({why}), classes bag, trouser"
    (tmp_path / "images" / "bag" / "04.png").unlink()
    assert ": 36 images to train on + 3 held out, 1 x 8 x 8, classes bag, trouser\n" in call(*words).out
    assert "classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n" in call("train", "gan", "--data", "digits", "--out", tmp_path / "run", "--dry-run").out


def test_resuming_nothing_says_that_it_starts(trained: Path, call: Call, tmp_path: Path) -> None:
    answer = call("train", "gan", "--data", "digits", "--out", tmp_path / "fresh", *TINY, "--resume")
    assert answer.code == 0 and f"nothing to resume in {tmp_path / 'fresh'}: starting\n" in answer.err
    assert "nothing to resume" not in call("train", "gan", "--out", trained, "--resume").err


HIDDEN = {
    "gan": "--penalty-weight --beta",
    "wgan-gp": "--generator-loss",
    "rpgan": "--generator-loss",
    "vae": "--clip --ema --critic-steps",
    "echo": "--rate --estimator --ema",
}


@pytest.mark.parametrize("model", HIDDEN)
def test_help_hides_what_a_model_has_no_use_for_and_tells_its_defaults(model: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    said = call("train", model, "--help").out
    for option in HIDDEN[model].split():
        assert not re.search(rf"{option}\b(?!\d)", said), option
    assert "custom" not in re.search(r"--architecture \{(.*?)\}", said)[1]  # type: ignore[index]
    for option, default in {"vae": {"rate": "prior"}, "echo": {"clip": "0.99"}, "gan": {"beta1": "0.5"}}.get(model, {}).items():
        assert re.search(rf"--{option} [^\n]*\n?[^\n]*\(default: {default}\)", said), option


AUTOENCODER = ["--batch-size", "16", "--latent-dim", "4", "--hidden", "16", "--max-steps", "4", "--log-every", "2", "--threads", "1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vae", {"rate": "prior", "estimator": None, "clip": None, "sigma": None}),
        ("vae --rate marginal --likelihood gaussian", {"rate": "marginal", "estimator": "stratified", "sigma": 0.5**0.5}),
        ("vae --rate marginal --estimator mixture --beta 0.5 --schedule cosine", {"rate": "marginal", "estimator": "mixture", "beta": 0.5}),
        ("echo --clip 0.985", {"rate": "echo", "clip": 0.985}),
    ],
)
def test_autoencoders_are_trained_resumed_and_sampled(words: str, expected: dict[str, object], call: Call, tmp_path: Path) -> None:
    model, run = words.split()[0], tmp_path / "run"
    answer = call("train", *words.split(), "--data", "digits", "--out", run, *AUTOENCODER)
    assert (answer.code, answer.out) == (0, f"{run}: 4 steps done\n"), answer
    config = runs.load_run(run).config
    assert {name: getattr(config, name) for name in expected} == expected and config.model == model
    before = stamps(run)
    answer = call("train", model, "--resume", "--out", run)
    assert answer.code == 0 and "is finished: 4 steps were done" in answer.out and stamps(run) == before
    if config.schedule == "constant":  # type: ignore[union-attr]
        assert call("train", model, "--resume", "--out", run, "--max-steps", 6, "--threads", 1).out.endswith("6 steps done\n")
    else:
        answer = call("train", model, "--resume", "--out", run, "--max-steps", 6, "--threads", 1)
        assert answer.code == 2 and "max_steps = 4, not 6" in answer.err.splitlines()[-1]
    assert call("sample", run, "--n", 6, "--out", tmp_path / "six.npz").code == 0
    assert load_data(tmp_path / "six.npz").images.shape == (6, 1, 8, 8)


def test_dry_run_of_the_papers_preset(call: Call, tmp_path: Path) -> None:
    answer = call("train", "echo", "--preset", "paper", "--data", "digits", "--out", tmp_path / "run", "--dry-run", "--json")
    plan = json.loads(answer.out)
    given = {"architecture": "echo-paper", "latent_dim": 32, "batch_size": 100, "epochs": 200, "learning_rate": 3e-4, "clip": 0.99, "rate": "echo"}
    assert {name: plan["config"][name] for name in given} == given and plan["steps"] == 200 * 13
    assert plan["parameters"].keys() == {"encoder", "decoder"}
    answer = call("train", "vae", "--preset", "paper", "--epochs", 3, "--data", "digits", "--out", tmp_path / "run", "--dry-run")
    assert answer.code == 0 and "epochs = 3" in answer.out and "rate = prior" in answer.out and "nothing was written" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_stacked_preset(call: Call, tmp_path: Path) -> None:
    answer = call("train", "rpgan", "--preset", "stacked", "--data", "digits", "--out", tmp_path / "run", "--dry-run", "--json")
    plan = json.loads(answer.out)
    given = {"model": "rpgan", "architecture": "conv", "latent_dim": 64, "batch_size": 128, "epochs": 50, "penalty_weight": 1.0}
    assert {name: plan["config"][name] for name in given} == given
    answer = call("train", "vae", "--preset", "stacked", "--data", "digits", "--out", tmp_path / "run", "--dry-run")
    assert answer.code == 2 and "--preset stacked is not for 'vae': it is for gan, wgan-gp, rpgan" in answer.err


def test_fast_dev_run(call: Call, tmp_path: Path) -> None:
    answer = call("train", "wgan-gp", "--data", "digits", "--out", tmp_path / "run", "--fast-dev-run", "--batch-size", 8)
    assert answer.code == 0 and answer.out.endswith("3 steps done\n")
    names = contents(tmp_path / "run").keys()
    assert {"metrics.jsonl", "samples/step-2.png", "samples/step-3.png", "checkpoints/step-3/manifest.json"} <= names


def test_resuming_a_finished_run_exits_0_and_changes_nothing(trained: Path, call: Call) -> None:
    before = stamps(trained)
    for words in ((), ("--data", "digits"), ("--threads", "1")):
        answer = call("train", "gan", "--resume", "--out", trained, *words)
        assert answer.code == 0 and "is finished: 6 steps were done; nothing was changed" in answer.out
    assert stamps(trained) == before


def test_resuming_to_more_steps_takes_the_rest_from_the_run(trained: Path, call: Call) -> None:
    answer = call("train", "gan", f"--out={trained}", "--resume", "--max-steps", 8, "--threads", 1)
    assert answer.code == 0 and answer.out.endswith("8 steps done\n")
    config = runs.load_run(trained).config
    assert (config.max_steps, config.batch_size, config.latent_dim, config.checkpoint_every) == (8, 16, 4, 2)


def test_samples(trained: Path, call: Call, tmp_path: Path) -> None:
    assert call("sample", trained).code == 0 and (trained / "samples.png").exists()
    for name in ("a.png", "b.png"):
        assert call("sample", trained, "--n", 6, "--columns", 3, "--out", tmp_path / name).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.width > grid.height
    call("sample", trained, "--n", 6, "--columns", 3, "--seed", 1, "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()

    assert call("sample", trained, "--n", 5, "--out", tmp_path / "five.npz").code == 0
    data = load_data(tmp_path / "five.npz")
    expected = runs.load_run(trained).sample(5)
    assert data.images.shape == (5, 1, 8, 8)
    assert float((data.images / 255 - expected).abs().max()) <= 0.5 / 255 + 1e-6
    answer = call("sample", trained, "--out", tmp_path / "x.jpg")
    assert answer.code == 2 and "x.jpg" in answer.error and ".npz" in answer.error
    assert "n is 0" in call("sample", trained, "--n", 0).error


def test_data_and_doctor(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERIPLUS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answer = call("data", "list", "--root", tmp_path)
    assert answer.code == 0 and all(name in answer.out for name in ("digits", "mnist", "embedded"))
    assert "ok" in call("data", "verify", "digits").out
    answer = call("data", "verify", "nonesuch")
    assert answer.code == 3 and "nonesuch" in answer.error
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/train-images-idx3-ubyte.gz").write_bytes(b"not it")
    answer = call("data", "verify", "mnist", "--root", tmp_path, "--json")
    assert answer.code == 3 and "data fetch mnist" in answer.error
    assert "ok" not in {entry["status"] for entry in json.loads(answer.out)}
    answer = call("doctor")
    assert answer.code == 0 and all(word in answer.out for word in ("python", "torch", "threads", "precision auto"))


def test_a_run_in_use_is_refused_with_its_holder(trained: Path, call: Call) -> None:
    before = stamps(trained)
    with hold(trained, "testing"):
        answer = call("train", "gan", "--resume", "--out", trained, "--max-steps", 8)
    assert answer.code == 2 and f"held by pid {os.getpid()} " in answer.err.splitlines()[-1]
    assert stamps(trained) == before


# ---- real processes -------------------------------------------------------------------------------------------------------------------------------


def test_a_real_process(tmp_path: Path) -> None:
    """Exit code and streams as the shell sees them."""
    words = [sys.executable, "-m", "periplus", "sample", str(tmp_path / "nowhere")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"periplus: {tmp_path / 'nowhere'} does not exist: the folder of a run is needed\n"


def wait_for_metrics(process: subprocess.Popen[str], run: Path) -> None:
    limit = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize(("model", "number"), [("gan", signal.SIGTERM), ("wgan-gp", signal.SIGINT)])
def test_a_stopped_process_goes_on_to_the_same_bits(
    model: str, number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, looked at while it holds the run, asked to end, resumed here, and equal to a run that was left alone. Networks of full size."""
    steps = 15
    few = f"--batch-size 16 --max-steps {steps} --log-every 1 --checkpoint-every 1000 --sample-every 1000 --threads 1 --data digits".split()
    run = tmp_path / "run"
    words = [sys.executable, "-m", "periplus", "train", model, "--out", str(run), *few]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_metrics(process, run)
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(PeriplusError, match=f"held by pid {process.pid} on .* since .*training {model}"):
                cli.run(["train", model, "--out", str(run), *few, "--resume"])
            process.send_signal(number)
            lines = len((run / "metrics.jsonl").read_text().splitlines())
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130 and out == ""
    last = err.splitlines()[-1]
    assert re.fullmatch(rf"periplus: stopped by {number.name} at step \d+ of {steps}; resume with --resume --out {run}", last), err
    assert "Traceback" not in err
    (left,) = (run / "checkpoints").iterdir()
    assert lines <= int(left.name.removeprefix("step-")) <= lines + 2  # within one step of the signal (a step may be between its lines)

    cli.run(["train", model, "--out", str(run), "--resume", "--threads", "1"])
    cli.run(["train", model, "--out", str(tmp_path / "reference"), *few])
    found, expected = contents(run), contents(tmp_path / "reference")
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
