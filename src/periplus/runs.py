"""A run is a folder.

    config.toml     every value that was used, read back strictly
    env.json        versions, commit, threads, device; one entry for each session that worked on the run
    metrics.jsonl   one line every `log_every` steps; the same bits whenever the run is made again
    timing.jsonl    seconds of training and images per second at the same steps (apart, because times are never the same twice)
    samples/        grids from fixed codes
    checkpoints/    step-N/, verified (periplus.checkpoints)
    snapshots/      step-N/, the averaged generator alone, on the way there; in the same form

`Run` is the reading side: whatever was trained, its decoder, its samples, its configuration and its metrics.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from periplus import checkpoints
from periplus.autoencoders import AutoencoderNetworks, build_autoencoder
from periplus.channels import EchoChannel, GaussianChannel
from periplus.checkpoints import Checkpoint
from periplus.config import AdversarialConfig, AutoencoderConfig, Config, DataRecord, read_config
from periplus.data import ImageData
from periplus.errors import RunError, UsageError
from periplus.files import write_atomically
from periplus.machine import resolve_device
from periplus.networks import AdversarialNetworks, ImageShape, build_adversarial
from periplus.seeds import stream

BuiltNetworks = AdversarialNetworks | AutoencoderNetworks
Networks = BuiltNetworks | Sequence[nn.Module] | Mapping[str, nn.Module]
Decoder = Networks | nn.Module
PAIRS: dict[type[Config], type[BuiltNetworks]] = {AdversarialConfig: AdversarialNetworks, AutoencoderConfig: AutoencoderNetworks}

CONFIG, ENVIRONMENT, METRICS, TIMING, CHECKPOINTS, SNAPSHOTS, SAMPLES = (
    "config.toml",
    "env.json",
    "metrics.jsonl",
    "timing.jsonl",
    "checkpoints",
    "snapshots",
    "samples",
)


CODE_BLOCK = 256
ENCODE_BLOCK = 1000


# ---- randomness as a function -------------------------------------------------------------------------------------------------------------


def codes(seed: int, name: str, count: int, latent_dim: int, device: str | torch.device = "cpu") -> Tensor:
    """Codes z ~ N(0, 1) (count, latent_dim), drawn on the CPU so that they are the same bits on every device.

    Drawn in blocks of fixed size: torch fills a tensor in an order that depends on its size, and fewer codes must be a prefix of more.
    """
    generator = torch.Generator().manual_seed(stream(seed, name))
    blocks = [torch.randn(CODE_BLOCK, latent_dim, generator=generator) for _ in range(0, count, CODE_BLOCK)]
    return torch.cat(blocks)[:count].to(device)


def marginal_codes(channel: GaussianChannel | EchoChannel, mean: Tensor, log_scale: Tensor, n: int, seed: int) -> Tensor:
    """n codes (n, d) from q(z) over a bank of encodings (M, d), in whole passes over the bank, each a function of (seed, number)."""
    passes = []
    for k in range(-(-n // len(mean))):
        generator = torch.Generator().manual_seed(stream(seed, "marginal", k))
        z = channel.sample(mean, log_scale, generator)
        passes.append(z[torch.randperm(len(mean), generator=generator)])
    return torch.cat(passes)[:n]


# ---- networks -----------------------------------------------------------------------------------------------------------------------------


def build_networks(config: Config, image_shape: ImageShape, networks: Networks | None = None) -> BuiltNetworks:
    """The networks that a resolved configuration asks for, or one's own, as a pair."""
    if networks is not None:
        return as_networks(networks, config)
    if config.architecture == "custom":
        pair = ", ".join(PAIRS[type(config)]._fields)
        raise UsageError(f"this run has architecture 'custom': pass the modules it was trained with as networks=({pair})")
    if isinstance(config, AutoencoderConfig):
        return build_autoencoder(
            config.architecture,
            image_shape,
            config.latent_dim,
            hidden=config.hidden,
            depth=config.depth,
            clip=config.clip,
            sigmoid=config.likelihood == "gaussian",
        )
    return build_adversarial(
        config.architecture,
        image_shape,
        config.latent_dim,
        batch_norm=bool(config.generator_batch_norm),
        dropout=config.critic_dropout or 0.0,
    )


def as_networks(networks: Networks, config: Config) -> BuiltNetworks:
    """(generator, critic) or (encoder, decoder) from a pair or from a mapping with these keys. Raises UsageError for anything else."""
    kind = PAIRS[type(config)]
    first, second = kind._fields
    try:
        pair = (networks[first], networks[second]) if isinstance(networks, Mapping) else tuple(networks)
    except (KeyError, TypeError):
        pair = ()
    if len(pair) != 2 or not all(isinstance(m, nn.Module) for m in pair):
        raise UsageError(f"networks must be a pair ({first}, {second}) of torch modules, or a mapping with the keys '{first}' and '{second}'")
    return kind(*pair)


def channel_of(config: AutoencoderConfig) -> GaussianChannel | EchoChannel:
    """The noise between encoder and decoder."""
    return GaussianChannel() if config.clip is None else EchoChannel(clip=config.clip)


# ---- the reading side ---------------------------------------------------------------------------------------------------------------------


class Run:
    """A trained (or half-trained) model in its folder. Cheap to make: weights are read and verified when first used.

    Attributes:
        path: the folder. config: the resolved configuration. data: what it was trained on (name, shape, hash).
    """

    def __init__(
        self, path: str | os.PathLike[str], device: str = "cpu", networks: Decoder | None = None, ema: bool = True, step: int | None = None
    ) -> None:
        self.path = Path(path)
        self.config, self.data = read_config(self.path / CONFIG)
        self.device = resolve_device(device)
        self._networks = networks
        self._ema = ema
        self._step = step
        self._checkpoint: Checkpoint | None = None
        self._modules: dict[str, nn.Module] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, model={self.config.model!r}, data={self.data.source!r})"

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W)."""
        return (self.data.channels, self.data.height, self.data.width)

    @property
    def checkpoint(self) -> Checkpoint:
        """The newest checkpoint that verifies, or that of the step that was asked for. Raises RunError where there is none."""
        if self._checkpoint is None and self._step is not None:
            name = f"step-{self._step}"
            whole = self.path / CHECKPOINTS / name
            self._checkpoint = checkpoints.load_checkpoint(whole if whole.is_dir() else self.path / SNAPSHOTS / name)
        if self._checkpoint is None:
            self._checkpoint = checkpoints.latest_checkpoint(self.path / CHECKPOINTS, warn=_warn)
            if self._checkpoint is None:
                raise RunError(f"{self.path} has no complete checkpoint yet: train it further with --resume")
        return self._checkpoint

    @property
    def step(self) -> int:
        """Steps done at the newest checkpoint, or those that were asked for."""
        return self.checkpoint.step

    @property
    def kept(self) -> list[int]:
        """Steps whose weights can be opened with `at`, ascending: snapshots on the way, and the checkpoints."""
        folders = [path for name in (SNAPSHOTS, CHECKPOINTS) for path in checkpoints.list_checkpoints(self.path / name)]
        return sorted({int(path.name.removeprefix("step-")) for path in folders})

    def at(self, step: int) -> Run:
        """The run as it was after so many steps. Raises RunError where these weights were not kept."""
        if step not in self.kept:
            raise RunError(f"{self.path} keeps nothing of step {step}: it has {', '.join(map(str, self.kept)) or 'no checkpoint yet'}")
        return Run(self.path, self.device, self._networks, self._ema, step)

    def _load(self, part: str, prefix: str) -> nn.Module:
        """One of the run's networks (a field of its pair) with the weights under a prefix of the checkpoint, in evaluation mode."""
        if part not in self._modules:
            with torch.random.fork_rng(devices=[]):  # new networks draw weights, from somebody's random numbers: not from the user's
                own = self._networks
                module = own if isinstance(own, nn.Module) else getattr(build_networks(self.config, self.image_shape, own), part)
            if self._networks is not None:
                module = copy.deepcopy(module)  # the user's own module stays as it is
            load_module(module, self.checkpoint, prefix)
            self._modules[part] = module.to(self.device).eval().requires_grad_(False)
        return self._modules[part]

    @property
    def generator(self) -> nn.Module:
        """The generator in evaluation mode: the averaged one (EMA), unless the run was loaded with ema=False."""
        if isinstance(self.config, AutoencoderConfig):
            raise UsageError(f"{self.path} is an autoencoder ('{self.config.model}'): it has an encoder and a decoder, no generator")
        return self._load("generator", "ema." if self._ema else "generator.")

    @property
    def decoder(self) -> nn.Module:
        """What turns codes into images, in evaluation mode: an autoencoder's decoder (logits for a Bernoulli likelihood), or the generator."""
        return self._load("decoder", "decoder.") if isinstance(self.config, AutoencoderConfig) else self.generator

    @property
    def encoder(self) -> nn.Module:
        """An autoencoder's encoder in evaluation mode. Raises UsageError for models without one."""
        if not isinstance(self.config, AutoencoderConfig):
            raise UsageError(f"{self.path} has no encoder ('{self.config.model}'): find codes of its images by inversion")
        if isinstance(self._networks, nn.Module):
            raise UsageError(f"{self.path} was opened with its decoder alone: pass networks=(encoder, decoder)")
        return self._load("encoder", "encoder.")

    @property
    def channel(self) -> GaussianChannel | EchoChannel:
        """The noise between an autoencoder's encoder and decoder: `.sample(mean, log_scale)`, `.rate(mean, log_scale)`."""
        if not isinstance(self.config, AutoencoderConfig):
            raise UsageError(f"{self.path} has no channel ('{self.config.model}' is not an autoencoder)")
        return channel_of(self.config)

    def decode(self, z: Tensor) -> Tensor:
        """Codes (..., d) on the run's device to images (..., C, H, W) in [0, 1]; differentiable with respect to z, each code on its own.

        The mean image of an autoencoder's likelihood. (One's own, or a linear, decoder of a Gaussian likelihood may leave [0, 1].)
        """
        if z.shape[-1:] != (self.config.latent_dim,):
            raise UsageError(f"codes have shape {tuple(z.shape)}: the last dimension must be {self.config.latent_dim}")
        output: Tensor = self.decoder(z.reshape(-1, self.config.latent_dim))
        images = output.sigmoid() if getattr(self.config, "likelihood", None) == "bernoulli" else output
        return images.reshape(*z.shape[:-1], *self.image_shape)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), uint8 or in [0, 1], to (mean, log_scale), (N, d) each. (An echo channel clamps log_scale itself.)"""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise UsageError(f"images have shape {tuple(images.shape)}: (N, {', '.join(map(str, self.image_shape))}) is needed")
        parts = []
        for block in images.split(ENCODE_BLOCK):
            x = block.to(self.device)
            parts.append(self.encoder(x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.float()))
        return torch.cat([mean for mean, _ in parts]), torch.cat([log_scale for _, log_scale in parts])

    def sample_codes(self, n: int, seed: int = 0) -> Tensor:
        """n codes (n, d) from what the decoder was trained on; a function of the seed, and fewer codes are a prefix of more.

        N(0, 1) for generators and for autoencoders held to that prior. An autoencoder whose rate is taken against its own marginal has no prior but
        q(z): codes are drawn from it over the bank of encodings that its checkpoint keeps: a mixture for a Gaussian channel, the recursion for echo.
        """
        if getattr(self.config, "rate", "prior") == "prior":
            return codes(seed, "samples", n, self.config.latent_dim, self.device)
        try:
            mean, log_scale = (self.checkpoint.tensors[f"marginal.{name}"] for name in ("mean", "log_scale"))
        except KeyError as error:
            raise RunError(f"{self.checkpoint.path} lacks {error}: it is not of this version") from None
        return marginal_codes(self.channel, mean.float(), log_scale.float(), n, seed).to(self.device)

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n images (n, C, H, W) in [0, 1] from codes of `sample_codes`. The same seed gives the same images, and a prefix for a smaller n.

        Whole blocks are decoded, and the rest cut off: matrix products round differently for different batch sizes.
        """
        if n < 1:
            raise UsageError(f"n is {n}: at least one sample must be asked for")
        z = self.sample_codes(-(-n // CODE_BLOCK) * CODE_BLOCK, seed)
        return torch.cat([self.decode(block) for block in z.split(CODE_BLOCK)])[:n].clamp(0, 1)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.path / METRICS)

    @property
    def timing(self) -> list[dict[str, Any]]:
        """The lines of timing.jsonl."""
        return read_lines(self.path / TIMING)


def load_run(path: str | os.PathLike[str], device: str = "cpu", networks: Decoder | None = None, ema: bool = True) -> Run:
    """Open a run folder.

    Args:
        path: the folder that `periplus train` or `periplus.train` wrote.
        device: where its networks go: cpu, cuda, auto.
        networks: one's own (generator, critic) or (encoder, decoder), or the generator or decoder alone, for a run that was trained with them.
        ema: the averaged generator (default) or the last one.

    Raises:
        RunError: not a run, an unknown key in its config.toml, no checkpoint that verifies (when the weights are first used).
    """
    return Run(path, device, networks, ema)


def load_module(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Load the tensors under a prefix strictly. Raises RunError that names what does not fit."""
    tensors = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{checkpoint.path} does not fit the network it is loaded into: {reason}") from None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


# ---- the writing side ---------------------------------------------------------------------------------------------------------------------


def describe_data(data: ImageData, source: str | None = None) -> DataRecord:
    """What a run remembers of its data. `source` is what load_data was given, if that was not the name."""
    return DataRecord(source or data.source or data.name, data.split, len(data), *data.shape, data.content_hash())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a torn last line (a kill while it was written) is left out."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise RunError(f"{path}: line {number} is not JSON ({error}): restore the file or delete that line") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise RunError(f"{path}: line {number} is not a record with a step: restore the file or delete that line")
        records.append(record)
    return records


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSON-lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_lines(path: Path, step: int) -> None:
    """Keep the records up to a step: what a resumed run has not done yet must not be in its files."""
    kept = [r for r in read_lines(path) if r["step"] <= step]
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept))


def cut_samples(folder: Path, step: int) -> None:
    """Remove sample grids of later steps."""
    for grid in folder.glob("step-*.png"):
        if int(grid.stem.removeprefix("step-")) > step:
            grid.unlink()


def sync_file(path: Path) -> None:
    """Push a file to the disk: a checkpoint must not outlive the lines that lead to it."""
    if path.exists():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def write_environment(folder: Path, environment: dict[str, Any], data: DataRecord) -> None:
    """Add this session to env.json."""
    path = folder / ENVIRONMENT
    sessions = read_environment(folder)
    sessions.append(environment)
    write_atomically(path, json.dumps({"data_sha256": data.sha256, "sessions": sessions}, indent=2) + "\n")


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """The sessions recorded in env.json, the first one first."""
    path = folder / ENVIRONMENT
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["sessions"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}): restore it, or delete it to lose only the record of the environment") from None


def check_same_run(folder: Path, config: Config, data: DataRecord) -> Config:
    """The stored configuration of a run to be resumed, after checking that this is the same run.

    `epochs` may grow, and `max_steps` change: batches and random numbers are functions of (seed, step), so a longer run passes through the shorter
    one's weights. (Not where the learning rate follows a schedule that ends with the run.)
    Raises UsageError that names the first value that differs.
    """
    stored, stored_data = read_config(folder / CONFIG)
    if type(stored) is not type(config):
        raise UsageError(f"{folder} was trained as '{stored.model}', not '{config.model}'")
    open_ended = getattr(config, "schedule", "constant") == "constant"
    for field in dataclasses.fields(stored):
        was, is_now = getattr(stored, field.name), getattr(config, field.name)
        grows = open_ended and (field.name == "max_steps" or (field.name == "epochs" and was < is_now))
        if was != is_now and not grows:
            raise UsageError(f"{folder} was trained with {field.name} = {was!r}, not {is_now!r}: leave it out to resume, or choose another --out")
    for field in dataclasses.fields(stored_data):
        was, is_now = getattr(stored_data, field.name), getattr(data, field.name)
        if was != is_now and field.name != "source":
            raise UsageError(f"{folder} was trained on other data ({field.name} was {was}, is {is_now}): resume it with '{stored_data.source}'")
    return stored
