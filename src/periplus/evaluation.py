"""Judging a run: what its codes carry and cost (autoencoders), whether it has collapsed (generators).

An autoencoder is judged on training images and on test images (held-out ones, where the data have no test split): distortion, rate with its
certificate, the split of the prior's rate into the marginal rate and the mismatch of the prior, the bound D + R on the code length, active units and,
where there is a prior and a density, the importance-sampled log-likelihood. All in nats per example, summed over pixels, with standard errors over
examples (images are the sample, the trained model is given; seeds are another matter).

Samples of either are scored against real images with what real images get themselves: `periplus.scoring`.

A generator counts as collapsed when a class of the data gets less than 0.5 % of 10,000 samples, or when its samples are on average less than half
as far apart as the data. Classes are told by nearest neighbours in pixel space, whose own error rate on held-out images is reported beside.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from periplus import information, metrics, objectives
from periplus.channels import EchoChannel
from periplus.config import AutoencoderConfig, DataRecord
from periplus.data import ImageData, load_data
from periplus.data.sources import SOURCES
from periplus.errors import UsageError
from periplus.files import write_atomically
from periplus.information import Bound, MarginalRate, RateCertificate
from periplus.machine import commit
from periplus.runs import Run
from periplus.scoring import SAMPLES, Note, reference, score_run
from periplus.seeds import stream
from periplus.training.autoencoder import distortion_of, mean_image
from periplus.training.steps import hold_out, to_float

EVALUATION = "evaluation.json"
SMALLEST_SHARE = 0.005
SMALLEST_SPREAD = 0.5
REFERENCE_IMAGES = 10_000
PAIRWISE_ROWS = 2000
#: With more classes than these, a sample's nearest image of so few a class says little: modes of stacked MNIST are counted by a digit classifier.
MOST_CLASSES = 100


#: Images of a split that an autoencoder is judged on, at most: the marginal rate takes their number squared.
JUDGED_IMAGES = 10_000
#: Pairs that InfoNCE tells apart: its ceiling is the logarithm.
CRITIC_PAIRS = 4096
DECODE_BLOCK = 1000


def pixels(images: Tensor, device: str = "cpu") -> Tensor:
    """uint8 or [0, 1] images (N, C, H, W) as float rows (N, C*H*W) in [0, 1]."""
    rows = images.to(device).flatten(1)
    return rows.float() / 255 if rows.dtype == torch.uint8 else rows


def collapse(images: Tensor, data: ImageData, device: str = "cpu") -> dict[str, Any]:
    """Class shares and spread of samples (N, C, H, W) in [0, 1] against those of the data, and the verdict.

    Returns a JSON-ready record: `shares` (value, low, high per class; None for data without labels or with more than 100 classes),
    `smallest_share`, `spread` (mean pairwise distance of the samples over that of the data), `classifier_error` (of the nearest-neighbour
    classifier on data held out from it, with its interval) and `collapsed`.
    """
    rows = pixels(images, device)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    reference = pixels(data.images[order[:REFERENCE_IMAGES]], device)
    spread = metrics.mean_pairwise_distance(rows[:PAIRWISE_ROWS]) / metrics.mean_pairwise_distance(reference[:PAIRWISE_ROWS])
    record: dict[str, Any] = {"samples": len(images), "spread": spread, "shares": None, "smallest_share": None, "classifier_error": None}
    if data.labels is not None and len(data.classes) <= MOST_CLASSES:
        labels = data.labels[order[: len(reference)]].to(device)
        shares = metrics.class_shares(metrics.neighbour_labels(rows, reference, labels), len(data.classes))
        record |= {
            "shares": [share._asdict() for share in shares],
            "smallest_share": min(shares[label].value for label in labels.unique().tolist()),  # of the classes that the data has
            "classifier_error": classifier_error(reference, labels)._asdict(),
        }
    missing = record["smallest_share"] is not None and record["smallest_share"] < SMALLEST_SHARE
    return record | {"collapsed": missing or not spread >= SMALLEST_SPREAD}  # not a number counts as collapsed


def classifier_error(reference: Tensor, labels: Tensor) -> metrics.Share:
    """Error of the nearest-neighbour classifier on a fifth of its own reference, held out."""
    cut = max(1, len(reference) // 5)
    told = metrics.neighbour_labels(reference[:cut], reference[cut:], labels[cut:])
    return metrics.wilson_interval(int((told != labels[:cut]).sum()), cut)


def evaluate_collapse(run: Run, data: ImageData, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """`collapse` of a run's own samples, with what they were drawn from."""
    return {"step": run.step, "sampling_seed": seed, **collapse(run.sample(samples, seed), data, run.device)}


# ---- autoencoders ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """Images of a split and what the channel made of them: encodings (N, d) and one code each."""

    images: Tensor
    mean: Tensor
    log_scale: Tensor
    z: Tensor


def evaluate_autoencoder(
    run: Run, train: ImageData, test: ImageData, *, seed: int = 0, images: int = JUDGED_IMAGES, likelihood_images: int = 1000, samples: int = 500
) -> dict[str, Any]:
    """Every measure of an autoencoder's run with what bounds it, JSON-ready.

    Args:
        run: of an AutoencoderConfig. train: the images that it was trained on. test: images that it was not.
        seed: of the codes and of which images, where a split has more than `images`.
        images: at most so many of each split.
        likelihood_images, samples: test images and importance weights of the log-likelihood (rate prior only); 0 images leave it out.

    The noise of an echo channel on test images is drawn as the decoder knows it: z = m(x) + s(x) z1 with z1 a code of the training images.
    """
    config = autoencoder_config(run)
    generator = torch.Generator().manual_seed(stream(seed, "evaluation"))
    sent_train = send(run, train, images, generator)
    sent_test = send(run, test, images, generator, sent_train.z)
    constant = mean_image(train)
    record: dict[str, Any] = {
        "step": run.step,
        "evaluation_seed": seed,
        "beta": config.beta,
        "splits": {
            "train": judge(run, sent_train, constant, generator),
            "test": judge(run, sent_test, constant, generator, sent_train),
        },
        "log_likelihood": None,
    }
    if config.rate == "prior" and likelihood_images:
        record["log_likelihood"] = log_likelihood(run, sent_test, likelihood_images, samples, generator)
    return record


def autoencoder_config(run: Run) -> AutoencoderConfig:
    """The run's configuration. Raises UsageError where it is not an autoencoder's."""
    if not isinstance(run.config, AutoencoderConfig):
        raise UsageError(f"{run.path} is not an autoencoder's ('{run.config.model}'): it has no rate")
    return run.config


@torch.no_grad()
def send(run: Run, data: ImageData, limit: int, generator: torch.Generator, past: Tensor | None = None) -> Sent:
    """Encode up to `limit` images of a split, drawn by the generator, and send each through the channel once.

    past: codes of other images, from which an echo channel takes its noise; None sends these images as one ring of their own.
    """
    rows = torch.randperm(len(data), generator=generator)[:limit].sort().values
    images = data.images[rows]
    mean, log_scale = (part.float().cpu() for part in run.encode(images))
    channel = run.channel
    if past is not None and isinstance(channel, EchoChannel):
        z = channel.step(mean, log_scale, past[torch.randint(len(past), (len(mean),), generator=generator)])
    else:
        z = channel.sample(mean, log_scale, generator)
    return Sent(images, mean, log_scale, z)


@torch.no_grad()
def judge(run: Run, sent: Sent, constant: Tensor, generator: torch.Generator, other: Sent | None = None) -> dict[str, Any]:
    """The measures of one split. `constant`: the best constant image of the training set. `other`: the training split, when judging another."""
    config = autoencoder_config(run)
    distortion = distortions(run, sent)
    certificate, prior, marginal = certify(run, sent, generator, other)
    against = rate_against(sent, other) if config.rate == "marginal" and other is not None else None
    rates = against if against is not None else rates_of(run, sent, prior, marginal)
    split = None if prior is None or marginal is None else information.rate_split(prior, marginal)
    return {
        "examples": len(sent.mean),
        "distortion": told(distortion),
        "constant_distortion": float(constant_distortion(config, constant, sent.images)),
        "entropy_floor": entropy_floor(config, sent.images),
        "rate": certificate.record(),
        "prior_rate": None if prior is None else told(prior),
        "marginal_rate": None if marginal is None else {"value": marginal.value, "standard_error": marginal.standard_error},
        "rate_against_training": None if against is None else told(against),
        "kl_to_prior": None if split is None else {"value": split.mismatch.value, "standard_error": split.mismatch.standard_error},
        "bound": told(distortion + rates + likelihood_constant(config, sent.images)),
        "active_units": information.active_units(sent.mean),
    }


def rates_of(run: Run, sent: Sent, prior: Tensor | None, marginal: MarginalRate | None) -> Tensor:
    """What each image's code costs, (N,) nats, by the run's own notion of rate."""
    if autoencoder_config(run).rate == "marginal" and marginal is not None:
        return marginal.per_example.double()
    return (prior if prior is not None else run.channel.rate(sent.mean, sent.log_scale)).double()


def certify(run: Run, sent: Sent, generator: torch.Generator, other: Sent | None) -> tuple[RateCertificate, Tensor | None, MarginalRate | None]:
    """The rate's certificate and, for a Gaussian channel, the prior's rate of each image and the marginal rate."""
    channel = run.channel
    distinct = len(sent.images.flatten(1).unique(dim=0))
    if isinstance(channel, EchoChannel):
        lower = (echo_infonce(channel, sent, other, generator),)
        return (
            information.echo_certificate(sent.mean, sent.log_scale, sent.z, clip=channel.clip, distinct=distinct, lower=lower),
            None,
            None,
        )
    prior = channel.rate(sent.mean, sent.log_scale)
    marginal = information.marginal_rate(sent.mean, sent.log_scale, generator=generator)
    certificate = information.gaussian_certificate(
        sent.mean,
        sent.log_scale,
        prior_rate=prior if autoencoder_config(run).rate == "prior" else None,
        marginal=marginal,
        distinct=distinct,
        generator=generator,
    )
    return certificate, prior, marginal


def echo_infonce(channel: EchoChannel, sent: Sent, other: Sent | None, generator: torch.Generator) -> Bound:
    """InfoNCE of an echo channel: a lower bound on I(x;z) for any critic, never above ln of the number of pairs.

    The critic is fitted, not trained: the log-density of the Gaussian that has the recursion's own moments, N(m(x) + s(x) E z1, s(x)^2 Var z1), with
    E z1 and Var z1 from codes of other images than those of the pairs. The noise of the pairs is made of those other images too (the training split;
    when that is itself judged, one half of it for the other): InfoNCE asks for pairs that are independent of each other.
    """
    mean, log_scale, z = sent.mean, sent.log_scale, sent.z
    if other is None:
        past = channel.sample(mean[1::2], log_scale[1::2], generator)
        mean, log_scale = mean[::2][: len(past)], log_scale[::2][: len(past)]
        z = channel.step(mean, log_scale, past)
    else:
        past = other.z
    count = min(CRITIC_PAIRS, len(mean))
    scale = channel.log_scale(log_scale[:count])
    critic_mean, critic_log_scale = mean[:count] + scale.exp() * past.mean(0), scale + 0.5 * past.var(0).clamp_min(1e-12).log()
    scores = torch.cat([information.pairwise_log_density(block, critic_mean, critic_log_scale) for block in z[:count].split(DECODE_BLOCK)])
    found = information.infonce(scores.T)
    note = f"{count} pairs, never above ln {count} = {math.log(count):.3f}; critic: the Gaussian of the recursion's moments on other images"
    return Bound(found.value, found.standard_error, "lower", "InfoNCE", note)


def rate_against(sent: Sent, other: Sent) -> Tensor:
    """E log q(z|x) / q(z) per image (N,), nats, with q(z) the mixture over the encodings of another split: the price of a code under that prior."""
    own = information.pairwise_log_density(sent.z[:, None], sent.mean[:, None], sent.log_scale[:, None])[:, 0, 0]
    blocks = sent.z.split(DECODE_BLOCK)
    under = [information.pairwise_log_density(block, other.mean, other.log_scale).logsumexp(1) - math.log(len(other.mean)) for block in blocks]
    return own.double() - torch.cat(under).double()


def told(values: Tensor) -> dict[str, float]:
    """Mean over examples and its standard error."""
    wide = values.double()
    return {"value": float(wide.mean()), "standard_error": float(wide.std() / math.sqrt(len(wide))) if len(wide) > 1 else 0.0}


def distortions(run: Run, sent: Sent) -> Tensor:
    """Distortion (N,) of each image, nats, from its one code."""
    config = autoencoder_config(run)
    parts = []
    for images, z in zip(sent.images.split(DECODE_BLOCK), sent.z.split(DECODE_BLOCK), strict=True):
        parts.append(distortion_of(config, run.decoder(z.to(run.device)).float(), to_float(images).to(run.device)).cpu())
    return torch.cat(parts).double()


def constant_distortion(config: AutoencoderConfig, constant: Tensor, images: Tensor) -> Tensor:
    """What a decoder costs that ignores its code: the training mean for every image, nats per example."""
    rows = to_float(images)
    if config.likelihood == "gaussian":
        return objectives.gaussian_distortion(constant.expand_as(rows), rows, config.sigma or math.sqrt(0.5)).mean()
    # A pixel that is always black in training and not here would cost infinitely much: half an image's worth of doubt.
    p = constant.double().clamp(0.5 / 60_000, 1 - 0.5 / 60_000)
    return objectives.bernoulli_distortion(torch.logit(p).expand(rows.shape), rows.double()).mean()


def entropy_floor(config: AutoencoderConfig, images: Tensor) -> float:
    """The least distortion that any decoder can reach on these images: the entropy of grey pixels (Bernoulli), 0 (Gaussian); nats."""
    if config.likelihood == "gaussian":
        return 0.0
    x = to_float(images).double().flatten(1)
    return float(-(torch.special.xlogy(x, x) + torch.special.xlog1py(1 - x, -x)).sum(1).mean())


def likelihood_constant(config: AutoencoderConfig, images: Tensor) -> float:
    """What the distortion leaves out of -log p(x|z)."""
    return objectives.gaussian_constant(images[0].numel(), config.sigma or math.sqrt(0.5)) if config.likelihood == "gaussian" else 0.0


def log_likelihood(run: Run, sent: Sent, images: int, samples: int, generator: torch.Generator) -> dict[str, Any]:
    """Importance-sampled log p(x) of a VAE on some images of a split, nats; a lower bound in expectation, rising with the samples."""
    config = autoencoder_config(run)
    chosen = torch.randperm(len(sent.mean), generator=generator)[:images]  # not the first ones: binarised MNIST is not shuffled
    x = to_float(sent.images[chosen]).to(run.device)
    constant = likelihood_constant(config, sent.images)

    def log_density(rows: Tensor) -> Any:
        def of_codes(z: Tensor) -> Tensor:
            output = run.decoder(z.reshape(-1, z.shape[-1])).float()
            repeated = rows.expand(len(z), *rows.shape).reshape(output.shape)
            return -distortion_of(config, output, repeated).reshape(z.shape[:2]) - constant

        return of_codes

    values = []
    for start in range(0, len(x), 100):
        rows = slice(start, start + 100)
        mean, log_scale = sent.mean[chosen[rows]].to(run.device), sent.log_scale[chosen[rows]].to(run.device)
        found = information.importance_log_likelihood(log_density(x[rows]), mean, log_scale, samples=samples, generator=generator, chunk=50)
        values.append(found.per_example.cpu())
    return {**told(torch.cat(values)), "examples": len(x), "samples": samples}


# ---- any run --------------------------------------------------------------------------------------------------------------------------------


def evaluate(run: Run, data_root: Path | None = None, *, judged: int = SAMPLES, note: Note = str, **options: Any) -> dict[str, Any]:
    """Every measure that fits a run, with the data found by the name that the run remembers.

    judged: samples that are scored against as many real images (`periplus.scoring`); 0 leaves that out. note: told of long work.
    options: of `evaluate_autoencoder`.

    Raises UsageError where the data are not those that it was trained on, DataError where they are not found.
    """
    data = data_of(run, data_root)
    record: dict[str, Any] = {"model": run.config.model}
    if isinstance(run.config, AutoencoderConfig):
        train, test = splits_of(run, data, data_root)
        record |= evaluate_autoencoder(run, train, test, **options)
    else:
        record |= evaluate_collapse(run, data)
    return record | sample_scores(run, data, judged, options.get("seed", 0), note)


def sample_scores(run: Run, data: ImageData, samples: int, seed: int, note: Note) -> dict[str, Any]:
    """`reference`, `scores` and `without_ema` of a run's samples; with `scores` None and the reason where they cannot be had."""
    if not samples:
        return {}
    try:
        return score_run(run, reference(data, samples, note=note), seed)
    except UsageError as error:
        note(f"no scores of samples: {error}")
        return {"scores": None, "no_scores": str(error)}


def data_of(run: Run, data_root: Path | None = None) -> ImageData:
    """The images of the split that a run was trained on, found by the name that it remembers.

    Raises UsageError where they are others now, DataError where they are not found.
    """
    data = load_data(run.data.source, run.data.split, root=data_root, image_size=image_size_of(run.data))
    if data.content_hash() != run.data.sha256:
        raise UsageError(f"{run.path} was trained on other data than '{run.data.source}' gives now: held-out images cannot be told from it")
    return data


def image_size_of(data: DataRecord) -> tuple[int, int] | None:
    """The (height, width) to resize the data of a run to when they are loaded again; None where they come in that size."""
    known = SOURCES.get(data.source)
    size = (data.height, data.width)
    return None if known is not None and known.shape[1:] == size else size


def splits_of(run: Run, data: ImageData, data_root: Path | None = None) -> tuple[ImageData, ImageData]:
    """The images that a run was trained on, and others: the data's test split, else those that were held out, else the training images again."""
    train, held_out = hold_out(run.config, data)
    if has_test_split(run):
        return train, load_data(run.data.source, "test", root=data_root, image_size=image_size_of(run.data))
    return train, held_out if held_out is not None else train


def has_test_split(run: Run) -> bool:
    """Whether the data that a run was trained on come with a test split."""
    known = SOURCES.get(run.data.source)
    return known is not None and run.data.split == "train" and "test" in dict(known.splits)


def other_split(run: Run) -> str:
    """How the images of `splits_of` that are not the training images are called in print."""
    return "test" if has_test_split(run) else "held out" if run.config.held_out else "train again (none held out)"


def write_evaluation(run: Run, record: dict[str, Any], command: str) -> dict[str, Any]:
    """Write a run's evaluation.json, with the command that makes it again and the commit that it was measured at; returns what was written."""
    whole = {"command": command, "measured_at": commit(), **record}
    write_atomically(run.path / EVALUATION, json.dumps(whole, indent=1) + "\n")
    return whole
