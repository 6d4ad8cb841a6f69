"""Training: `train(config, data, out)` makes a run folder, or goes on with one.

The loops themselves are in `periplus.training.adversarial` and `periplus.training.autoencoder`; this is the door they share: resolving the
configuration, taking the folder's lock, refusing to overwrite, finding the checkpoint to go on from.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from periplus import checkpoints
from periplus.autoencoders import AutoencoderNetworks
from periplus.checkpoints import Checkpoint
from periplus.config import AutoencoderConfig, Config, DataRecord, read_config, write_config
from periplus.data import ImageData, load_data
from periplus.errors import RunError, UsageError
from periplus.files import discard_leftovers, is_leftover
from periplus.locks import hold
from periplus.machine import deterministic, environment, keep_freed_memory, resolve_device, resolve_precision
from periplus.networks import AdversarialNetworks, parameter_count
from periplus.runs import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    SAMPLES,
    SNAPSHOTS,
    TIMING,
    BuiltNetworks,
    Networks,
    Run,
    build_networks,
    check_same_run,
    cut_lines,
    cut_samples,
    describe_data,
    read_environment,
    write_environment,
)
from periplus.seeds import stream
from periplus.training import adversarial, autoencoder
from periplus.training.journal import OnProgress, Progress, prune
from periplus.training.steps import steps_in_all

__all__ = ["Plan", "Progress", "plan", "train"]

Warn = Callable[[str], None]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def resolve(config: Config, data: ImageData, networks: Networks | None = None) -> Config:
    """The configuration with device, precision and every default filled in, as it will stand in config.toml."""
    device = resolve_device(config.device)
    architecture: Any = "custom" if networks is not None else config.architecture
    known = dataclasses.replace(config, device=device, precision=resolve_precision(config.precision, device), architecture=architecture)
    return known.resolve(len(data))


def check_networks(config: Config, networks: BuiltNetworks, data: ImageData) -> None:
    """Try networks on two examples. Raises UsageError that says which of them does what."""
    if isinstance(config, AutoencoderConfig):
        autoencoder.check_networks(AutoencoderNetworks(*networks), config, data.shape)
    else:
        adversarial.check_networks(AdversarialNetworks(*networks), config, data.shape)


def run_loop(
    config: Config, networks: BuiltNetworks, data: ImageData, folder: Path, start: Checkpoint | None, on_progress: OnProgress | None
) -> None:
    """Train with the loop that the configuration is for."""
    if isinstance(config, AutoencoderConfig):
        autoencoder.train_autoencoder(config, data, folder, AutoencoderNetworks(*networks), start, on_progress)
    else:
        adversarial.train_adversarial(config, data, folder, AdversarialNetworks(*networks), start, on_progress)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `train` would do: the resolved configuration, steps, training images, trainable parameters of each network."""

    config: Config
    steps: int
    training_images: int
    parameters: dict[str, int]


def plan(config: Config, data: ImageData, networks: Networks | None = None) -> Plan:
    """Resolve and check everything that `train` would, without writing or training anything. Raises UsageError as `train` does."""
    resolved = resolve(config, data, networks)
    images = len(data) - (resolved.held_out or 0)
    with torch.random.fork_rng(devices=[]):
        built = build_networks(resolved, data.shape, networks)
    check_networks(resolved, built, data)
    return Plan(resolved, steps_in_all(resolved, images), images, {k: parameter_count(v) for k, v in built._asdict().items()})


def train(
    config: Config,
    data: ImageData | str | os.PathLike[str],
    out: str | os.PathLike[str],
    networks: Networks | None = None,
    *,
    source: str | None = None,
    resume: bool = False,
    allow_other_threads: bool = False,
    on_progress: OnProgress | None = None,
    warn: Warn = _warn,
) -> Run:
    """Train a model into a run folder and open it.

    Args:
        config: an AdversarialConfig or an AutoencoderConfig.
        data: images, uint8, or what `load_data` takes.
        out: the run folder. It must be absent or empty, unless `resume`.
        networks: one's own. (generator, critic): the generator maps (B, latent_dim) to (B, C, H, W) in [0, 1], the critic images to (B,).
            (encoder, decoder): the encoder maps images to (mean, log_scale), (B, latent_dim) each, the decoder codes to (B, C, H, W), logits for a
            Bernoulli likelihood, the mean image for a Gaussian one.
        source: what `load_data` was given, to be written down; by default the name of the data.
        resume: go on from the newest checkpoint that verifies (from step 0 where there is none); a finished run is returned as it is.
        allow_other_threads: go on with another thread count than the run was started with. The bits will differ from then on.
        on_progress: called at every line of metrics.
        warn: called with a line of text for what is odd but not wrong, such as a damaged checkpoint that was passed over.

    Raises:
        UsageError: a value that cannot be served, a folder in use or with something in it, a resumed run with another configuration or data.
        RunError: the folder is damaged. NonFiniteError: training diverged. Interrupted: a signal came; a checkpoint is left.
    """
    folder = Path(out)
    if not isinstance(data, ImageData):
        data, source = load_data(data), source or str(data)
    decided = plan(config, data, networks)
    check_vacant(folder, resume)
    if resume and is_finished(folder, decided, describe_data(data, source)):
        return Run(folder, decided.config.device, networks)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder, f"training {decided.config.model}"):
        start = prepare(folder, decided.config, describe_data(data, source), resume, allow_other_threads, warn)
        if start is None or start.step < decided.steps:
            with torch.random.fork_rng(devices=cuda_index(decided.config.device)), deterministic(decided.config.device):
                torch.manual_seed(stream(config.seed, "networks"))
                built = build_networks(decided.config, data.shape, networks)
                keep_freed_memory()
                run_loop(decided.config, built, data, folder, start, on_progress)
    return Run(folder, decided.config.device, networks)


def cuda_index(device: str) -> list[int]:
    """The GPU whose random state a run on this device disturbs, if any."""
    chosen = torch.device(device)
    return [] if chosen.type != "cuda" else [chosen.index if chosen.index is not None else torch.cuda.current_device()]


def check_vacant(folder: Path, resume: bool) -> None:
    """Raise UsageError where a run, or anything else, would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    if resume or not folder.exists():
        return
    if (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds a run already: add --resume (in Python resume=True) to go on with it, or choose another --out")
    if any(entry.name != ".lock" and not is_leftover(entry.name) for entry in folder.iterdir()):
        raise UsageError(f"{folder} is not empty and not a run: choose another --out")


def is_finished(folder: Path, decided: Plan, record: DataRecord) -> bool:
    """Whether a run has nothing left to do, not even to tidy up. Reads only. Raises UsageError where it is another run than the one asked for."""
    if not (folder / CONFIG).exists():
        return False
    stored = check_same_run(folder, decided.config, record)
    found = checkpoints.list_checkpoints(folder / CHECKPOINTS)
    if not found or len(found) > stored.keep_last or int(found[-1].name.removeprefix("step-")) < decided.steps:
        return False
    try:
        checkpoints.verify_checkpoint(found[-1])
    except RunError:
        return False
    return True


def prepare(folder: Path, config: Config, record: DataRecord, resume: bool, other_threads: bool, warn: Warn) -> Checkpoint | None:
    """Lay out the folder, or bring an interrupted one to the state of its newest good checkpoint, which is returned."""
    for place in (folder, folder / SAMPLES):
        discard_leftovers(place)
    if not (folder / CONFIG).exists():
        check_vacant(folder, resume=False)  # under the lock: another process may have begun in between
        write_config(folder / CONFIG, config, record)
        write_environment(folder, environment(config.device), record)
        return None
    if not resume:
        check_vacant(folder, resume)
    stored = check_same_run(folder, config, record)
    for place in (folder / CHECKPOINTS, folder / SNAPSHOTS):
        checkpoints.discard_leftovers(place)
    found = checkpoints.latest_checkpoint(folder / CHECKPOINTS, warn=warn)
    if found is not None and found.path == checkpoints.list_checkpoints(folder / CHECKPOINTS)[-1]:
        prune(folder, stored, found.step)  # a kill may have come between the last save and its pruning
    if found is not None and found.step >= steps_in_all(config, record.images - (config.held_out or 0)):
        return found
    check_threads(folder, other_threads)
    if stored != config:
        write_config(folder / CONFIG, config, record)
    write_environment(folder, environment(config.device), record)
    for name in (METRICS, TIMING):
        cut_lines(folder / name, found.step if found else 0)
    cut_samples(folder / SAMPLES, found.step if found else 0)
    checkpoints.cut(folder / SNAPSHOTS, found.step if found else 0)
    return found


def check_threads(folder: Path, allowed: bool) -> None:
    """Raise UsageError when this process would compute with another number of threads than the run was started with."""
    sessions = read_environment(folder)
    was, now = (sessions[0].get("threads") if sessions else None), torch.get_num_threads()
    if was is not None and was != now and not allowed:
        raise UsageError(
            f"{folder} was trained with {was} threads, this process has {now}: set OMP_NUM_THREADS={was}, or pass --allow-other-threads and "
            "give up bit-exact resumption"
        )


def stored_config(out: str | os.PathLike[str]) -> tuple[Config, str] | None:
    """The configuration and the data source of the run in a folder, or None where there is no run."""
    path = Path(out) / CONFIG
    if not path.exists():
        return None
    config, data = read_config(path)
    return config, data.source
