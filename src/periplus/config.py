"""Configurations: frozen dataclasses of plain values, and the strict TOML they are kept in.

A field that is None means "the default of this model"; `resolve` fills it in, so that a run's `config.toml` states every value that was used.
Reading is strict: an unknown key, a value of the wrong type or out of range is an error that names the key, the value and the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from periplus.errors import RunError, UsageError
from periplus.files import write_atomically

T = typing.TypeVar("T")
AdversarialModel = Literal["gan", "wgan-gp", "rpgan"]
AutoencoderModel = Literal["vae", "echo"]

#: What a None in AdversarialConfig stands for, by model. Measured choices: LOG.md says what else was tried and how it failed.
ADVERSARIAL_DEFAULTS: dict[str, dict[str, Any]] = {
    "gan": {"beta1": 0.5, "beta2": 0.999, "generator_batch_norm": True, "critic_dropout": 0.3, "penalty_weight": 0.0},
    "wgan-gp": {"beta1": 0.5, "beta2": 0.9, "generator_batch_norm": True, "critic_dropout": 0.0, "penalty_weight": 10.0},
    "rpgan": {"beta1": 0.0, "beta2": 0.99, "generator_batch_norm": True, "critic_dropout": 0.0, "penalty_weight": 1.0},
}


@dataclass(frozen=True)
class AdversarialConfig:
    """Everything that decides an adversarial training run. Plain values; None is the model's own default (see `resolve`)."""

    model: AdversarialModel = "wgan-gp"
    """gan (Goodfellow et al. 2014), wgan-gp (Gulrajani et al. 2017) or rpgan: relativistic pairing with R1 + R2 (Huang et al. 2024)."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    latent_dim: int = 32
    """Dimension of the code z ~ N(0, 1)."""
    architecture: Literal["mlp", "conv", "custom"] = "mlp"
    """mlp: 128-256-512-1024 generator. conv: fully connected, then two transposed convolutions. custom: the modules given as networks=."""
    learning_rate: float = 2e-4
    """Adam's step size, for both networks."""
    beta1: float | None = None
    """Adam's first decay."""
    beta2: float | None = None
    """Adam's second decay."""
    critic_steps: int = 1
    """Critic steps per generator step."""
    generator_loss: Literal["non-saturating", "saturating"] = "non-saturating"
    """gan only: which of the two generator losses."""
    penalty_weight: float | None = None
    """wgan-gp: lambda, the weight of the gradient penalty. rpgan: gamma, twice the weight of R1 and of R2. gan: none."""
    generator_batch_norm: bool | None = None
    """Batch normalisation in the generator's hidden layers."""
    critic_dropout: float | None = None
    """Dropout probability in the critic's hidden layers."""
    ema: float = 0.999
    """Decay per step of the averaged generator that is sampled from; 0 turns averaging off."""
    path_weight: float = 0.0
    """Weight of U~, the score of least-cost paths between the generator's images (periplus.training.path_term); 0 leaves the term out."""
    path_objective: Literal["least", "straight"] = "least"
    """What the path term prices. least: the cheapest path found. straight: the straight line between the codes, its surrogate."""
    held_out: int | None = None
    """Images drawn by seed and kept out of training, for the critic's gap; a tenth of the data, at most 1000."""
    seed: int = 0
    """Of weights, batches, codes and everything else that is random."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32. bfloat16: autocast, for machines that multiply it natively."""
    max_steps: int | None = None
    """Stop after so many generator steps, whatever the epochs say."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 500
    """Steps between sample grids."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is always one at the end and one at an interruption."""
    keep_last: int = 2
    """Scheduled checkpoints kept."""
    snapshots: bool = True
    """Keep the averaged generator as it was after log_every x 4, 8, 16, ... steps: quality against time is judged on these."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "latent_dim", "critic_steps", "log_every", "sample_every", "checkpoint_every", "keep_last"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "batch_size", self.batch_size >= 2, "at least 2")
        _check(self, "learning_rate", self.learning_rate > 0, "positive")
        _check(self, "penalty_weight", self.penalty_weight is None or self.penalty_weight >= 0, "zero or more")
        for name in ("beta1", "beta2", "critic_dropout", "ema"):
            value = getattr(self, name)
            _check(self, name, value is None or 0 <= value < 1, "in [0, 1)")
        _check(self, "held_out", self.held_out is None or self.held_out >= 0, "zero or more")
        _check(self, "max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1")
        _check(self, "path_weight", self.path_weight >= 0, "zero or more")
        _check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")

    @classmethod
    def sheet(cls, model: AdversarialModel, **changes: Any) -> Self:
        """The course sheet's own setting (2a): learning rate 1e-4, 100 epochs, one critic step per generator step.

        The sheet leaves the batch size open: 512 here, the fewest seconds per epoch on two cores (11,500 steps on MNIST).
        """
        return cls(**{"model": model, "learning_rate": 1e-4, "epochs": 100, "critic_steps": 1, "batch_size": 512, **changes})

    @classmethod
    def stacked(cls, model: AdversarialModel = "rpgan", **changes: Any) -> Self:
        """Stacked MNIST (a thousand modes): convolutions, 64 dimensions, Adam 2e-4, 50 epochs of 60,000 images (23,000 steps).

        rpgan with both penalties is the recipe of R3GAN (Huang et al. 2024), whose paper reports 1000 modes; the pair here is far smaller than theirs
        and has batch normalisation in its generator, gamma 1 for both penalties and no schedules. Hours on two cores.
        """
        return cls(**{"model": model, "architecture": "conv", "latent_dim": 64, "batch_size": 128, "learning_rate": 2e-4, "epochs": 50, **changes})

    @property
    def batches_per_step(self) -> int:
        """Batches of real images that one step of the run takes."""
        return self.critic_steps

    @property
    def defaults(self) -> dict[str, Any]:
        """What a None stands for in a configuration of this model."""
        return ADVERSARIAL_DEFAULTS[self.model]

    def resolve(self, images: int) -> Self:
        """This configuration with every None filled in, for a data set of so many images. `max_steps` stays None when not given."""
        return _fill_in(self, images)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that decides an autoencoder's training run: loss = distortion + beta * rate, nats per example, sums over pixels."""

    model: AutoencoderModel = "vae"
    """vae: a Gaussian channel (Kingma and Welling 2014). echo: echo noise (Brekelmans et al. 2019)."""
    rate: Literal["prior", "marginal", "echo"] | None = None
    """vae only. prior: KL[q(z|x) || N(0, 1)], the beta-VAE. marginal: a minibatch estimate of KL[q(z|x) || q(z)], the rate itself."""
    beta: float = 1.0
    """Weight of the rate: nats of distortion paid for a nat of rate."""
    estimator: Literal["stratified", "leave-one-out", "mixture"] | None = None
    """rate marginal only: how q(z) is estimated from the batch (periplus.information.batch_rate tells the bias of each)."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """bernoulli: cross-entropy, grey pixels as they are. gaussian: squared error / (2 sigma^2)."""
    sigma: float | None = None
    """gaussian only: the fixed standard deviation of a pixel; by default 1/sqrt(2), so that the distortion is the squared error."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    latent_dim: int = 32
    """Dimension of the code z."""
    architecture: Literal["mlp", "conv", "echo-paper", "linear", "custom"] = "mlp"
    """mlp: fully connected. conv: two strided convolutions. echo-paper: that of Brekelmans et al. linear: both halves affine. custom: networks=."""
    hidden: int = 512
    """Units of a hidden layer (mlp), of the fully connected layer (conv)."""
    depth: int = 1
    """Hidden layers of the mlp, encoder and decoder each."""
    clip: float | None = None
    """echo only: upper limit r of the scale s, in the sampler and in the rate; the rate cannot fall below -latent_dim ln r."""
    learning_rate: float = 1e-3
    """Adam's step size, at the start."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the step size goes on: as it is, or down to zero along half a cosine."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    path_weight: float = 0.0
    """Weight of U~, the score of least-cost paths between training images (periplus.training.path_term); 0 leaves the term out."""
    path_objective: Literal["least", "straight"] = "least"
    """What the path term prices. least: the cheapest path found. straight: the straight line between the codes, its surrogate."""
    held_out: int | None = None
    """Images drawn by seed and kept out of training, to watch overfitting; a tenth of the data, at most 1000."""
    seed: int = 0
    """Of weights, batches, noise and everything else that is random."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32. bfloat16: autocast, for machines that multiply it natively."""
    max_steps: int | None = None
    """Stop after so many steps, whatever the epochs say."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 500
    """Steps between grids of samples and reconstructions."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is always one at the end and one at an interruption."""
    keep_last: int = 2
    """Scheduled checkpoints kept."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "latent_dim", "hidden", "depth", "log_every", "sample_every", "checkpoint_every", "keep_last"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "batch_size", self.batch_size >= 2, "at least 2")
        _check(self, "learning_rate", self.learning_rate > 0, "positive")
        _check(self, "beta", self.beta >= 0, "zero or more")
        _check(self, "sigma", self.sigma is None or self.sigma > 0, "positive")
        _check(self, "clip", self.clip is None or 0.985 <= self.clip < 1, "in [0.985, 1)")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _check(self, "held_out", self.held_out is None or self.held_out >= 0, "zero or more")
        _check(self, "max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1")
        _check(self, "path_weight", self.path_weight >= 0, "zero or more")
        _check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        _check(self, "rate", self.rate is None or (self.rate == "echo") == (self.model == "echo"), f"left out for '{self.model}', or one of its own")
        _check(self, "clip", self.clip is None or self.model == "echo", f"left out for '{self.model}': only an echo channel has one")
        _check(self, "estimator", self.estimator is None or self.rate == "marginal", "left out, unless the rate is marginal")
        _check(self, "sigma", self.sigma is None or self.likelihood == "gaussian", "left out, unless the likelihood is gaussian")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """The protocol of Brekelmans et al. 2019, from their configuration files: 32 dimensions, batch 100, 200 epochs, Adam 3e-4, convolutions.

        Two things differ, because theirs were defects: the clip of the scale (0.99 here for sampler and rate; 0.8526 and 0.8359 there, which puts
        5.7 nats under every rate) and the learning rate's schedule (constant; theirs rose where it should have fallen).
        """
        setting = {"model": "echo", "architecture": "echo-paper", "latent_dim": 32, "batch_size": 100, "epochs": 200, "learning_rate": 3e-4}
        return cls(**{**setting, **changes})

    @property
    def batches_per_step(self) -> int:
        """Batches of images that one step of the run takes."""
        return 1

    @property
    def defaults(self) -> dict[str, Any]:
        """What a None stands for in a configuration of this model."""
        chosen = dict(AUTOENCODER_DEFAULTS[self.model])
        if (self.rate or chosen["rate"]) == "marginal":
            chosen["estimator"] = "stratified"
        if self.likelihood == "gaussian":
            chosen["sigma"] = math.sqrt(0.5)
        return chosen

    def resolve(self, images: int) -> Self:
        """This configuration with every None filled in, for a data set of so many images. `max_steps` stays None when not given."""
        return _fill_in(self, images)


#: What a None in AutoencoderConfig stands for, by model.
AUTOENCODER_DEFAULTS: dict[str, dict[str, Any]] = {"vae": {"rate": "prior"}, "echo": {"rate": "echo", "clip": 0.99}}

Config = AdversarialConfig | AutoencoderConfig
KINDS: dict[str, type[Config]] = {"adversarial": AdversarialConfig, "autoencoder": AutoencoderConfig}
#: Every model, with the configuration it is trained by.
MODELS: dict[str, type[Config]] = {
    **dict.fromkeys(typing.get_args(AdversarialModel), AdversarialConfig),
    **dict.fromkeys(typing.get_args(AutoencoderModel), AutoencoderConfig),
}


#: Configuration fields that a model has no use for.
NOT_FOR: dict[str, tuple[str, ...]] = {
    "gan": ("penalty_weight",),
    "wgan-gp": ("generator_loss",),
    "rpgan": ("generator_loss",),
    "vae": ("clip",),
    "echo": ("rate", "estimator"),
}


def config_for(model: str, **values: Any) -> Config:
    """The configuration of a model by name. Raises UsageError for an unknown one."""
    if model not in MODELS:
        raise UsageError(f"unknown model '{model}'{nearest(model, MODELS)}: known are {', '.join(MODELS)}")
    return MODELS[model](model=model, **values)  # type: ignore[arg-type]


C = typing.TypeVar("C", bound=Config)


def held_out_of(images: int) -> int:
    """How many of so many images are held out where nothing else is asked for."""
    return min(1000, images // 10)


def _fill_in(config: C, images: int) -> C:
    known = config.defaults | {"held_out": held_out_of(images)}
    return dataclasses.replace(config, **{k: v for k, v in known.items() if getattr(config, k) is None})


def _check(config: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UsageError(f"{option(name)} is {getattr(config, name)!r}: it must be {rule}")


def option(name: str) -> str:
    """How a field is typed on the command line, with the field's own name where it differs."""
    dashed = f"--{name.replace('_', '-')}"
    return dashed if "_" not in name else f"{dashed} ({name})"


def check_types(config: Any) -> None:
    """Raise UsageError unless every field of a flat dataclass holds a value of its annotated type. Integers pass as floats, booleans do not."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            raise UsageError(f"{option(field.name)} is {value!r}: {_describe(hints[field.name])} is needed")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(h) for h in typing.get_args(hint) if h is not type(None))
    return {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}.get(hint, str(hint))


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known word, or ''."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


# ---- TOML ------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataRecord:
    """What a run remembers of its data: enough to find it again and to refuse another."""

    source: str
    split: str
    images: int
    channels: int
    height: int
    width: int
    sha256: str


def write_config(path: Path, config: Config, data: DataRecord) -> None:
    """Write a run's config.toml whole or not at all."""
    kind = next(k for k, cls in KINDS.items() if type(config) is cls)
    lines = ["# A run of Periplus: every value that was used. Read back strictly.", f"kind = {_toml(kind)}"]
    for table, record in (("data", data), ("training", config)):
        lines += ["", f"[{table}]"]
        lines += [f"{k} = {_toml(v)}" for k, v in dataclasses.asdict(record).items() if v is not None]
    write_atomically(path, "\n".join(lines) + "\n")


def read_config(path: Path) -> tuple[Config, DataRecord]:
    """Read a run's config.toml. Raises RunError that names the file, and the key with its nearest known neighbour."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.exists():
            raise RunError(f"{path.parent} does not exist: the folder of a run is needed") from None
        raise RunError(f"{path.parent} is not a run: it has no config.toml") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad TOML, bad UTF-8, an integer of thousands of digits, a tower of brackets
        raise RunError(f"{path} is not valid TOML: {error}") from None
    _check_keys(path, "", tables, ("kind", "data", "training"))
    kind = tables.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RunError(f"{path}: kind is {kind!r}; known kinds: {', '.join(KINDS)}")
    return _read_table(path, "training", tables, KINDS[kind]), _read_table(path, "data", tables, DataRecord)


def _read_table(path: Path, table: str, tables: dict[str, Any], cls: type[T]) -> T:
    values = tables.get(table)
    if not isinstance(values, dict):
        raise RunError(f"{path}: table [{table}] is missing")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    _check_keys(path, f"[{table}] ", values, [f.name for f in fields])
    missing = [f.name for f in fields if f.name not in values and f.default is dataclasses.MISSING]
    if missing:
        raise RunError(f"{path}: [{table}] lacks {', '.join(missing)}")
    try:
        record = cls(**values)
        check_types(record)
    except UsageError as error:
        raise RunError(f"{path}: {error}") from None
    return record


def _check_keys(path: Path, where: str, found: dict[str, Any], known: typing.Sequence[str]) -> None:
    for key in found:
        if key not in known:
            raise RunError(f"{path}: {where}unknown key '{key}'{nearest(key, known)}")


def _toml(value: str | int | float | bool) -> str:
    """A TOML scalar. JSON strings are TOML strings as long as nothing outside ASCII is escaped; DEL alone needs it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
