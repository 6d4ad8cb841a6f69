"""What a study is asked to do: settings, presets, and the jobs (training runs and sweeps) that follow from them."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from periplus.config import config_for
from periplus.errors import UsageError
from periplus.evaluation import image_size_of
from periplus.machine import cores
from periplus.runs import Run, read_environment

#: The autoencoders of the sweeps. Hidden layers of 128 units: 81 of them are trained for one study.
SMALL = ("--latent-dim", "16", "--hidden", "128", "--schedule", "cosine", "--log-every", "100", "--sample-every", "1000")
BETAS = ("0.001", "0.01", "0.1", "0.3", "1", "2", "10", "10000")
#: What a preset stands for: data; epochs and further options of `periplus train`; betas, epochs and further options of `periplus sweep`.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": "digits",
        "epochs": 60,
        "options": ("--batch-size", "64", "--latent-dim", "16", "--log-every", "25", "--sample-every", "250"),
        "sweeps": {"epochs": 100, "beta": BETAS, "options": ("--batch-size", "64", *SMALL)},
    },
    "quick": {
        "data": "mnist",
        "epochs": 20,
        "options": (),
        "sweeps": {"epochs": 6, "beta": ("0.001", "0.1", "1", "5", "20", "10000"), "options": ("--batch-size", "256", *SMALL, "--images", "5000")},
    },
    "sheet": {
        "data": "mnist",
        "epochs": 100,
        "options": ("--preset", "sheet"),
        "sweeps": {"epochs": 20, "beta": ("0.001", "0.01", "0.1", "1", "3", "10", "100", "10000"), "options": ("--batch-size", "128", *SMALL)},
    },
}
#: What `--resume` need not be told again.
REMEMBERED = ("seeds", "epochs", "sweep_epochs", "archive", "weights", "author", "collaborators", "hours")
#: The sweeps that chapters may ask for: the words after `periplus sweep`.
SWEEPS: dict[str, tuple[str, ...]] = {"vae": ("vae", "--rate", "prior"), "marginal": ("vae", "--rate", "marginal"), "echo": ("echo",)}


@dataclass(frozen=True)
class Cell:
    """One training run of a study: its place below the study's folder and the command that makes it."""

    model: str
    seed: int
    path: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}-{self.seed}"

    @property
    def command(self) -> str:
        """As a person would type it."""
        return shlex.join(("periplus", *self.words))


@dataclass(frozen=True)
class Variant:
    """One more training that a chapter asks for: the first seed's of a model, with further options, for a part of the epochs (one in `shorter`)."""

    name: str
    model: str
    options: tuple[str, ...] = ()
    shorter: int = 1


@dataclass(frozen=True)
class SweepCell:
    """One sweep of a study: betas times seeds, below sweeps/, and the command that makes it."""

    key: str
    words: tuple[str, ...]

    @property
    def path(self) -> str:
        """The sweep's folder below the study's."""
        return f"sweeps/{self.key}"

    @property
    def name(self) -> str:
        return f"sweep-{self.key}"

    @property
    def command(self) -> str:
        """As a person would type it."""
        return shlex.join(("periplus", *self.words))


@dataclass(frozen=True)
class Settings:
    """The options of `periplus study`; None is the preset's own value. `epochs`, where given, are those of runs and sweeps alike."""

    data: str | None = None
    out: Path = Path("study")
    preset: str = "digits"
    only: tuple[str, ...] = ()
    seeds: int | None = None
    epochs: int | None = None
    resume: bool = False
    archive: str | None = None
    weights: bool = False
    author: tuple[str, ...] = ()
    collaborators: tuple[str, ...] = ()
    hours: float | None = None
    image_size: int | None = None
    data_root: Path | None = None
    workers: int | None = None
    sweep_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "workers", "sweep_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}: at least 1 is needed")
        if self.hours is not None and not 0 <= self.hours < math.inf:
            raise UsageError(f"--hours is {self.hours:g}: it must be zero or more")
        if self.weights and not self.archive:
            raise UsageError("--weights puts the weights into the archive: add --archive zip or --archive tar.gz")

    def given(self) -> dict[str, Any]:
        """What a resumed study takes over from the session before, as JSON, where it is not given anew."""
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in REMEMBERED}

    def remembering(self, earlier: dict[str, Any]) -> Settings:
        """These settings with what an earlier session was given (`given`) in the place of what is not given now."""
        missing: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in earlier.items()
            if name in REMEMBERED and value and not getattr(self, name)
        }
        return dataclasses.replace(self, **missing)

    @property
    def batch(self) -> int:
        """The largest batch of the runs and sweeps: a set with fewer training images cannot be studied."""
        preset, name = PRESETS[self.preset], "--batch-size"
        options = [words for words in (preset["options"], preset["sweeps"]["options"]) if name in words]
        return max(int(words[words.index(name) + 1]) for words in options)

    def resolve(self) -> Settings:
        """The preset's values filled in."""
        preset = PRESETS[self.preset]
        return dataclasses.replace(
            self,
            data=self.data or preset["data"],
            epochs=self.epochs or preset["epochs"],
            sweep_epochs=self.sweep_epochs or self.epochs or preset["sweeps"]["epochs"],
            seeds=self.seeds or 3,
            workers=self.workers or cores(),
        )

    def cells(self, models: Iterable[str]) -> list[Cell]:
        """The runs of these models, every seed; models side by side, so that a stopped study has some of each."""
        return [self.cell(model, seed) for seed in range(self.seeds or 3) for model in models]

    def cell(self, model: str, seed: int) -> Cell:
        """One run and its command. One thread each: small networks gain more from runs side by side than from threads, and the bits are fixed."""
        path = f"runs/{model}-{seed}"
        return Cell(model, seed, path, self._train(model, seed, self.epochs or 1, path))

    def variant(self, variant: Variant) -> Cell:
        """The run of a variant and its command; its `model` is the variant's name, so that it is not among the runs of any model."""
        path = f"variants/{variant.name}"
        epochs = max(1, (self.epochs or 1) // variant.shorter)
        return Cell(variant.name, 0, path, self._train(variant.model, 0, epochs, path, *variant.options))

    def _train(self, model: str, seed: int, epochs: int, path: str, *options: str) -> tuple[str, ...]:
        words = ("train", model, "--data", str(self.data), *PRESETS[self.preset]["options"], "--epochs", str(epochs), "--seed", str(seed))
        return (*words, *options, *self._where(), "--threads", "1", "--out", str(self.out / path))

    def sweep(self, key: str) -> SweepCell:
        """One sweep and its command, one thread: it is trained beside the runs."""
        preset = PRESETS[self.preset]["sweeps"]
        words = ("sweep", *SWEEPS[key], "--data", str(self.data), "--beta", *preset["beta"], *preset["options"])
        words += ("--epochs", str(self.sweep_epochs), "--seeds", str(self.seeds))
        return SweepCell(key, (*words, *self._where(), "--workers", "1", "--out", str(self.out / "sweeps" / key)))

    def again(self, *keys: str) -> str:
        """The command that makes chapters of this study again; without any, the whole study."""
        preset = PRESETS[self.preset]
        own = (self.epochs, self.sweep_epochs) == (preset["epochs"], preset["sweeps"]["epochs"])
        words = ["periplus", "study", "--preset", self.preset, "--data", str(self.data), *(() if own else ("--epochs", str(self.epochs)))]
        only = ("--only", ",".join(keys)) if keys else ()
        return shlex.join([*words, "--seeds", str(self.seeds), *self._where(), "--out", str(self.out), *only, "--resume"])

    def _where(self) -> tuple[str, ...]:
        size = ("--image-size", str(self.image_size)) if self.image_size else ()
        root = ("--data-root", str(self.data_root)) if self.data_root else ()
        return size + root

    def record(self) -> dict[str, Any]:
        """What results.json keeps of the settings: what decides the results and the title page, not how the machine was used."""
        kept = ("data", "preset", "seeds", "epochs", "sweep_epochs", "image_size", "author", "collaborators", "hours")
        return {name: getattr(self, name) for name in kept}


def words_of(run: Run) -> tuple[str, ...]:
    """The words after `periplus` that make a run again: every value that is not its model's default."""
    config, data = run.config, run.data
    defaults = config_for(config.model).resolve(data.images)
    words = ["train", config.model, "--data", data.source]
    size = image_size_of(data)
    words += ["--image-size", str(size[0])] if size and size[0] == size[1] else []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(defaults, field.name) or field.name in ("model", "device", "architecture"):
            continue
        option = f"--{field.name.replace('_', '-')}"
        words += [option if value else f"--no-{option[2:]}"] if isinstance(value, bool) else [option, str(value)]
    threads = [session.get("threads") for session in read_environment(run.path)][:1]
    return (*words, *(("--threads", str(threads[0])) if threads else ()), "--out", str(run.path))
