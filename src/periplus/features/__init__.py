"""What samples are judged by: features of small networks, each with a name and the hash of its weights.

A distance between feature distributions says nothing without the features: a score carries its extractor's record (`Extractor.record`), and two
scores compare only where these are the same. None of them is Inception's, and no score here is an FID.

* `load_extractor("mnist")`, `load_extractor("digits")`: classifiers whose weights come with the package. MNIST's also judges binarised MNIST, and
  channel by channel stacked MNIST.
* `extractor_for(data)`: the above where it fits; else a network trained once on these data by the same recipe and kept in the cache, under the
  hash of the data.
* `random_extractor(channels)`: weights that nobody has trained. Where it and a trained one disagree, one of them is blind to the difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from periplus import metrics
from periplus.data import ImageData
from periplus.data.sources import cache_folder
from periplus.errors import RunError, UsageError
from periplus.features.network import FEATURES, FeatureNetwork, random_network
from periplus.features.recipe import RECIPE, OnStep, train_network
from periplus.files import write_atomically
from periplus.seeds import stream

__all__ = ["FEATURES", "Extractor", "FeatureNetwork", "extractor_for", "load_extractor", "random_extractor", "read_extractor", "train_extractor"]

#: The networks that come with the package, and the SHA-256 of their files (made by benchmarks/feature_network.py).
SHIPPED = {
    "mnist": "d71f122302d5155598eb41451cb41bdd961ca043d39ea945acfd6ad5e80dbef3",
    "digits": "8b4a7efb2d16256dd08704dc20bfbbfe3496af208cbe31855bfedeaa9524e7ce",
}
#: Named sets that are judged by a shipped network, with the shape of their images; STACKED's channel by channel.
STACKED = "stacked-mnist"
JUDGES = {
    "mnist": ("mnist", (1, 28, 28)),
    "binarized-mnist": ("mnist", (1, 28, 28)),
    "digits": ("digits", (1, 8, 8)),
    STACKED: ("mnist", (3, 28, 28)),
}
BLOCK = 500
#: A tenth of the data, at most so many, stays out of training: the accuracy is measured there.
MOST_HELD_OUT = 10_000


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A feature network with what must be said of it. Called with images (N, C, H, W), uint8 or in [0, 1], it returns features (N, F) float32.

    name: which network. sha256: of its weights. accuracy: share of held-out images that it classifies rightly, with its 95 % interval (None for
    random weights). classes: what `classify` returns numbers of; empty where it tells no classes. per_channel: each channel is an image of its own.
    """

    name: str
    sha256: str
    network: FeatureNetwork
    classes: tuple[str, ...] = ()
    accuracy: metrics.Share | None = None
    trained_on: str | None = None
    per_channel: bool = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.per_channel:
            return torch.cat([self.features(channel) for channel in images.split(1, dim=1)], 1)
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 64) of images with the channels that the network takes; in blocks of one size, so that none depends on its neighbours.

        Raises UsageError for images of other channels, and for none at all.
        """
        channels = self.network.channels
        if images.dim() != 4 or not len(images) or images.shape[1] != channels:
            plural = "s" * (channels != 1)
            raise UsageError(
                f"images have shape {tuple(images.shape)}: '{self.name}' takes (N, {channels}, H, W), {channels} channel{plural}, N >= 1"
            )
        parts = []
        for block in images.split(BLOCK):
            x = block.float() / 255 if block.dtype == torch.uint8 else block.float()
            short = BLOCK - len(x)
            x = torch.cat([x, x.new_zeros(short, *x.shape[1:])]) if short and len(images) > BLOCK else x
            parts.append(self.network(x.contiguous(memory_format=torch.channels_last))[: len(block)])
        return torch.cat(parts)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Classes (N,) of features (N, F) that this extractor returned; with `per_channel` (N, C), one of each channel."""
        if not self.classes:
            raise UsageError(f"the extractor '{self.name}' tells no classes: its network was not trained on labels")
        if self.per_channel:
            return torch.stack([self.network.head(part).argmax(1) for part in features.split(FEATURES, 1)], 1)
        return self.network.head(features).argmax(1)  # type: ignore[no-any-return]

    def record(self) -> dict[str, Any]:
        """JSON-ready: what a score by this extractor must carry."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "features": FEATURES,
            "per_channel": self.per_channel,
            "trained_on": self.trained_on,
            "accuracy": None if self.accuracy is None else self.accuracy._asdict(),
        }


# ---- where extractors come from -------------------------------------------------------------------------------------------------------------


def load_extractor(name: str) -> Extractor:
    """An extractor that comes with the package: 'mnist' or 'digits'.

    Raises UsageError for another name, RunError where the file is not what was shipped.
    """
    if name not in SHIPPED:
        raise UsageError(f"no extractor '{name}' comes with Periplus: {' and '.join(SHIPPED)} do; extractor_for(data) trains one for other data")
    path = shipped_file(name)
    found = read_extractor(path)
    if found.sha256 != SHIPPED[name]:
        raise RunError(f"{path} is not the file that was shipped (SHA-256 {found.sha256}, not {SHIPPED[name]}): install Periplus again")
    return found


def shipped_file(name: str) -> Path:
    """Where the weights of a shipped network lie."""
    return Path(__file__).parent / f"{name}.safetensors"


def random_extractor(channels: int) -> Extractor:
    """A network with random weights, the same for everybody, for images of so many channels."""
    network = random_network(channels)
    return Extractor(f"random-{channels}", hashlib.sha256(packed(network, {})).hexdigest(), network)


def extractor_for(data: ImageData, cache: Path | None = None, on_step: OnStep | None = None, note: Callable[[str], object] = str) -> Extractor:
    """The extractor by which generators of such data are judged.

    Args:
        data: all images of the split that generators are trained on.
        cache: a folder for networks that had to be trained; by default the cache of this machine's user.
        on_step, note: told while a network is trained, and before.
    """
    known = data.source or data.name  # a folder may be called mnist, and hold something else
    judge, shape = JUDGES.get(known, ("", ()))
    if judge and data.shape == shape:
        found = load_extractor(judge)
        return dataclasses.replace(found, name="mnist-per-channel", per_channel=True) if known == STACKED else found
    path = (cache or cache_folder() / "features") / f"{file_name(data)}-recipe-{RECIPE}.safetensors"
    if path.exists():
        try:
            return read_kept(path)
        except RunError as error:
            note(f"{error}; it is made again")
    note(f"training the feature network of {data.name} once ({path})")
    found = train_extractor(data, path, on_step=on_step)
    write_atomically(digest_file(path), found.sha256 + "\n")
    return found


def read_kept(path: Path) -> Extractor:
    """A network from the cache. Raises RunError unless it is to the bit what was written: damaged weights would give other scores without a word."""
    found = read_extractor(path)
    beside = digest_file(path)
    if not beside.is_file() or beside.read_bytes().strip() != found.sha256.encode():
        raise RunError(f"{path} is damaged: its SHA-256 is not that in {beside.name}")
    return found


def digest_file(path: Path) -> Path:
    """Where the SHA-256 of a network in the cache is written."""
    return path.with_suffix(".sha256")


def file_name(data: ImageData) -> str:
    """A name for the network of these data: theirs, as far as a file may be called so, and the beginning of their hash."""
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in data.name)[:40].strip("-")
    return f"{plain or 'data'}-{data.content_hash()[:16]}"


def train_extractor(data: ImageData, path: Path, test: ImageData | None = None, seed: int = 0, on_step: OnStep | None = None) -> Extractor:
    """Train a network on data by the recipe and write it to a file, with its accuracy on a tenth that is held out (or on a test split)."""
    trained_on = data.content_hash()
    if test is None and len(data) >= 20:
        data, test = data.split_off(min(MOST_HELD_OUT, len(data) // 10), stream(seed, "features held out"))
    network = train_network(data, seed, on_step)
    told = {"name": data.name, "recipe": RECIPE, "seed": seed, "trained_on": trained_on, "images": len(data)}
    told["classes"] = list(data.classes) if data.labels is not None else []
    if test is not None and test.labels is not None and data.labels is not None:
        told["accuracy"] = list(accuracy(network, test.images, test.labels))
    write_atomically(path, packed(network, told))
    return read_extractor(path)


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: Tensor, labels: Tensor) -> metrics.Share:
    """Share of images (N, C, H, W) that the network classifies rightly, with its 95 % interval."""
    right = sum(
        int((network.head(network(x.float() / 255)).argmax(1) == y).sum()) for x, y in zip(images.split(BLOCK), labels.split(BLOCK), strict=True)
    )
    return metrics.wilson_interval(right, len(labels))


def packed(network: FeatureNetwork, told: dict[str, Any]) -> bytes:
    """The bytes of a network's file."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return safetensors.torch.save(tensors, {"periplus": json.dumps(told, sort_keys=True)})


def read_extractor(path: Path) -> Extractor:
    """An extractor from a file that `train_extractor` wrote. Raises RunError that names the file where it is anything else."""
    try:
        content = path.read_bytes()
        with safetensors.safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["periplus"])
        tensors = safetensors.torch.load(content)
        network = FeatureNetwork(tensors["body.0.weight"].shape[1], len(tensors["head.bias"]))
        network.load_state_dict(tensors)
        accuracy = metrics.Share(*told["accuracy"]) if told.get("accuracy") else None
        name, classes, trained_on = f"{told['name']}-recipe-{told['recipe']}", tuple(told["classes"]), str(told["trained_on"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise RunError(f"{path} is not a feature network ({' '.join(str(error).split())})") from None
    sha256 = hashlib.sha256(content).hexdigest()
    return Extractor(name, sha256, network.eval().requires_grad_(False), classes, accuracy, trained_on)
