"""Scores of samples, each with the value that real images get: the noise floor.

All images of a split are put in an order drawn by a fixed seed and cut into blocks of n. The first block is the *reference*; n samples of a generator
are compared with it, and so are the other blocks (up to five): what these get is what a perfect generator would get at these numbers. n is 10,000, or
half of a smaller split. A score here is never called FID: it carries its extractor's name and hash (`periplus.features`).

Five things are asked of the samples: how far are they from the reference (Frechet, kernel), do they lie where it lies and everywhere it lies
(precision, recall, density, coverage), do they fall into its classes as it does, can a classifier tell the two apart, and are they nearer to the
training images than images that were held out. A second extractor with random weights gives the first score again: a failure that one extractor
cannot see, the other may.

Intervals cover the drawing of samples and of the reference, not the training: for that there are seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from periplus import metrics
from periplus.config import Config
from periplus.data import ImageData
from periplus.data.sources import cache_folder
from periplus.errors import UsageError
from periplus.features import Extractor, extractor_for, random_extractor
from periplus.features.recipe import OnStep
from periplus.files import write_atomically
from periplus.runs import Run
from periplus.seeds import stream
from periplus.training.steps import held_out_seed

SAMPLES = 10_000
FEWEST = 100
#: Disjoint blocks of real images that are judged like samples, at most.
FLOORS = 5
NEIGHBOURS = 5
#: Samples that are looked for among the training images: more would say the same, later.
COPIES = 3000
#: Samples whose modes are counted: the usual number, and figures for others do not compare.
MODE_SAMPLES = 26_000
#: Raised whenever a score of the same samples would change.
PROTOCOL = 2

Note = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples of generators of one data set are judged against: real features by two extractors, and what real images get.

    features, random: (N, F) of all images of the split, in its order. blocks: rows of the reference and of the floors' blocks, n each.
    """

    data: ImageData
    extractor: Extractor
    blind: Extractor
    features: Tensor
    random: Tensor
    blocks: tuple[Tensor, ...]
    floors: Mapping[str, Any]

    @property
    def samples(self) -> int:
        """Rows on either side of a comparison."""
        return len(self.blocks[0])

    def record(self) -> dict[str, Any]:
        """JSON-ready: what every score made with it must carry."""
        return {
            "protocol": PROTOCOL,
            "data": self.data.name,
            "split": self.data.split,
            "data_sha256": self.data.content_hash(),
            "samples": self.samples,
            "floor_blocks": len(self.blocks) - 1,
            "extractor": self.extractor.record(),
            "random_extractor": self.blind.record(),
        }


def reference(
    data: ImageData,
    samples: int = SAMPLES,
    cache: Path | None = None,
    on_step: OnStep | None = None,
    note: Note = str,
    extractor: Extractor | None = None,
) -> Reference:
    """Features and floors of a data set; what was computed once is kept in a cache.

    Args:
        data: all images of the split that generators were trained on.
        samples: on each side; no more than half of the images.
        cache: a folder; by default that of this machine's user. on_step, note: told of long work.
        extractor: another than `extractor_for(data)`.

    Raises UsageError where there are too few images to compare anything.
    """
    count = min(samples, len(data) // 2)
    if count < FEWEST:
        asked = "" if samples >= FEWEST else f", and {samples} samples were asked for"
        raise UsageError(f"{data.name} has {len(data)} images{asked}: scores need {2 * FEWEST}, {FEWEST} on each side")
    cache = cache or cache_folder() / "features"
    chosen = extractor or extractor_for(data, cache, on_step, note)
    blind = random_extractor(data.shape[0])
    features, random = (real_features(data, e, cache, note) for e in (chosen, blind))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream(0, "reference")))
    blocks = tuple(order[: count * (len(data) // count)].split(count))[: FLOORS + 1]
    without = Reference(data, chosen, blind, features, random, blocks, {})
    return Reference(data, chosen, blind, features, random, blocks, real_floors(without, cache, note))


# ---- what is computed once ------------------------------------------------------------------------------------------------------------------


def real_features(data: ImageData, extractor: Extractor, cache: Path, note: Note) -> Tensor:
    """Features (N, F) of all images, from the cache where they are there."""
    path = cache / f"real-{data.content_hash()[:16]}-{extractor.sha256[:16]}{'-channels' if extractor.per_channel else ''}.safetensors"
    try:
        kept = safetensors.torch.load(path.read_bytes())
        if torch.equal(kept["sha256"], digest(kept["features"])) and len(kept["features"]) == len(data):
            return kept["features"]
    except (OSError, SafetensorError, KeyError):
        pass
    note(f"features of {len(data):,} real images by {extractor.name}, once ({path})")
    features = extractor(data.images)
    write_atomically(path, safetensors.torch.save({"features": features, "sha256": digest(features)}))
    return features


def digest(features: Tensor) -> Tensor:
    """SHA-256 of features, as 32 numbers that are kept beside them: a damaged cache would move every score without a word."""
    return torch.tensor(list(hashlib.sha256(features.contiguous().numpy().tobytes()).digest()), dtype=torch.uint8)


def real_floors(reference: Reference, cache: Path, note: Note) -> dict[str, Any]:
    """What the other blocks of real images get against the reference, from the cache where it is there."""
    key = hashlib.sha256(json.dumps(reference.record(), sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"floors-{key}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found and all(len(of) == len(reference.blocks) - 1 and all(map(math.isfinite, of)) for of in found.values()):
            return found
    except (OSError, ValueError, TypeError, AttributeError):  # absent, not JSON, or JSON of something else: made again
        pass
    note(
        f"noise floors of {reference.data.name}: {len(reference.blocks) - 1} block{'s' * (len(reference.blocks) != 2)} of "
        f"{reference.samples:,} real images against the reference, once"
    )
    told = []
    for block in reference.blocks[1:]:
        labels = None if reference.data.labels is None else reference.data.labels[block]
        told.append(flat(compare_with(reference, reference.features[block], reference.random[block], labels)))
    floors = {name: [float(one[name]) for one in told] for name in told[0]}
    if "classes" in floors:
        floors["classes"] = [value * outside(reference) for value in floors["classes"]]
    write_atomically(path, json.dumps(floors, indent=1) + "\n")
    return floors


def outside(reference: Reference) -> float:
    """What the distance of a block's class shares from those of the data is multiplied by to be that of as many samples from outside.

    A block is part of the N images whose shares it is held against: the difference varies as 1/n - 1/N, that of samples as 1/n + 1/N. With half of
    the data in a block, as in small splits, its distance is too small by a factor of 1.7.
    """
    images, samples = len(reference.data), reference.samples
    return math.sqrt((images + samples) / (images - samples))


# ---- scores ---------------------------------------------------------------------------------------------------------------------------------


def compare_with(reference: Reference, features: Tensor, random: Tensor, labels: Tensor | None = None) -> dict[str, dict[str, Any]]:
    """Every score of n samples but those of memorising: a record each with `value`, `low`, `high` where it has an interval, and what it is of.

    labels: classes of the samples where they are known (real images); by default what the extractor says of them.
    """
    real = reference.features[reference.blocks[0]]
    found = metrics.precision_recall_density_coverage(real, features, NEIGHBOURS)
    record: dict[str, dict[str, Any]] = {
        "frechet": distance_record(metrics.frechet_distance(real, features)) | {"at_infinity": extrapolated(real, features)},
        "frechet_random": distance_record(metrics.frechet_distance(reference.random[reference.blocks[0]], random)),
        "kernel": distance_record(metrics.kernel_distance(real, features)),
    }
    for name in ("precision", "recall", "density", "coverage"):
        low, high = getattr(found, f"{name}_interval")
        record[name] = {"value": getattr(found, name), "low": low, "high": high, "k": NEIGHBOURS}
    told = metrics.classifier_two_sample_test(real, features)
    record["two_sample"] = {"value": told.accuracy, "low": told.low, "high": told.high, "p_value": told.p_value}
    if reference.data.labels is not None and reference.extractor.classes and not reference.extractor.per_channel:
        record |= class_scores(reference, reference.extractor.classify(features) if labels is None else labels)
    return record


def distance_record(found: Any) -> dict[str, Any]:
    """A distance with its interval."""
    return {"value": found.value, "standard_error": found.standard_error, "low": found.low, "high": found.high}


def extrapolated(real: Tensor, features: Tensor) -> dict[str, Any] | None:
    """The Frechet distance at infinitely many samples; None where there are too few to extrapolate from."""
    try:
        return distance_record(metrics.frechet_distance_infinite(real, features))
    except UsageError:
        return None


def class_scores(reference: Reference, labels: Tensor) -> dict[str, dict[str, Any]]:
    """How the samples' classes are spread: distance from the data's shares, and the smallest share of a class that the data has."""
    assert reference.data.labels is not None
    classes = len(reference.data.classes)
    counts, real = (torch.bincount(of, minlength=classes) for of in (labels, reference.data.labels))
    apart = metrics.class_distance(counts, real, float(real.sum()))
    shares = metrics.class_shares(labels, classes)
    smallest = min((shares[k] for k in real.nonzero()[:, 0].tolist()), key=lambda share: share.value)
    return {
        "classes": {"value": apart.total_variation, "kl": finite(apart.kl), "p_value": apart.p_value, "shares": [s._asdict() for s in shares]},
        "smallest_class": smallest._asdict(),
    }


def memorising(reference: Reference, config: Config, features: Tensor) -> dict[str, dict[str, Any]]:
    """Are samples nearer to the images that a run was trained on than the images that it held out? Empty where it held out too few to tell."""
    if not config.held_out:
        return {}
    trained, held_out = (reference.features[rows] for rows in reference.data.split_rows(config.held_out, held_out_seed(config)))
    few = features[:COPIES]
    try:
        copying = metrics.data_copying_test(trained, held_out, few)
        ratio = metrics.neighbour_ratio(trained, held_out, few)
    except UsageError:  # too few held out, or data full of duplicates: nothing can be said
        return {}
    return {
        "copying": {"value": copying.z, "p_value": copying.p_value, "copying": copying.copying, "samples": len(few), "held_out": len(held_out)},
        "neighbour_ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high, "samples": len(few), "held_out": len(held_out)},
    }


# ---- a run ----------------------------------------------------------------------------------------------------------------------------------


def score(run: Run, reference: Reference, seed: int = 0) -> dict[str, Any]:
    """All scores of a run's samples, JSON-ready: value, interval, `floor` (mean over the blocks of real images) and `floors` of each.

    One pass: samples are drawn once, turned into features once.
    """
    images = run.sample(reference.samples, seed).cpu()
    features = reference.extractor(images)
    record = compare_with(reference, features, reference.blind(images))
    floors = {name: {"floor": math.fsum(of) / len(of), "floors": of} for name, of in reference.floors.items()}
    found = {name: one | floors.get(name, {}) for name, one in record.items()} | memorising(reference, run.config, features)
    if reference.extractor.per_channel:
        found["modes"] = mode_scores(run, reference, seed)
    return {"step": run.step, "sampling_seed": seed, "scores": found}


def mode_scores(run: Run, reference: Reference, seed: int) -> dict[str, Any]:
    """Modes of 1000 that 26,000 samples of stacked images fall into, and KL (nats) of their shares, by the digit classifier; real images beside."""
    said = [reference.extractor.classify(reference.extractor(block)) for block in run.sample(MODE_SAMPLES, seed).cpu().split(SAMPLES)]
    found = metrics.modes(torch.cat(said))
    real = metrics.modes(reference.extractor.classify(reference.features[:MODE_SAMPLES]))
    told = {"value": float(found.found), "of": found.of, "kl": found.kl, "kl_floor": found.kl_floor, "samples": found.samples}
    return told | {"real": {"found": real.found, "kl": real.kl, "samples": real.samples}}


def score_run(run: Run, reference: Reference, seed: int = 0, last: bool = True) -> dict[str, Any]:
    """What `evaluation.json` holds of a run's samples: scores of the averaged generator and, beside it, of the last one as it is.

    last: whether the weights without averaging are judged too (generators that keep an average).
    """
    told = {"reference": reference.record(), **score(run, reference, seed)}
    plain = without_average(run) if last else None
    return told if plain is None else {**told, "without_ema": score(plain, reference, seed)["scores"]}


def without_average(run: Run) -> Run | None:
    """The same run at the same step with its last generator; None where there is no average, or nothing else (a snapshot)."""
    averaged = run._ema and getattr(run.config, "ema", 0.0) > 0
    if not averaged or not any(name.startswith("generator.") for name in run.checkpoint.tensors):
        return None
    return Run(run.path, run.device, run._networks, ema=False, step=run.step)


def flat(record: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The values of scores, by name."""
    return {name: float(one["value"]) for name, one in record.items()}


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
