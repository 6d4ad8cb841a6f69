"""Judging autoencoders: floors, constants, the price of a code under the training mixture, and bounds that hold."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

import periplus
from periplus.channels import EchoChannel
from periplus.config import AutoencoderConfig
from periplus.evaluation import Sent, constant_distortion, echo_infonce, entropy_floor, evaluate_autoencoder, rate_against, splits_of

BERNOULLI = AutoencoderConfig("vae").resolve(100)


def test_a_step_of_the_recursion_shares_the_clip() -> None:
    channel = EchoChannel()
    mean, past = torch.tensor([[1.0, -2.0]]), torch.tensor([[10.0, 10.0]])
    log_scale = torch.tensor([[math.log(0.5), 3.0]])  # the second is beyond the clip
    assert torch.allclose(channel.step(mean, log_scale, past), torch.tensor([[6.0, -2.0 + 10 * channel.clip]]))
    assert torch.allclose(channel.rate(mean, log_scale), torch.tensor([math.log(2) - math.log(channel.clip)]))


def test_no_decoder_beats_the_entropy_of_grey_pixels(digits: periplus.ImageData) -> None:
    x = digits.images[:200].double() / 255
    expected = float(binary_cross_entropy(x, x, reduction="sum")) / len(x)  # the images themselves as the decoder's means
    assert entropy_floor(BERNOULLI, digits.images[:200]) == pytest.approx(expected, rel=1e-6)


def test_the_best_constant_is_the_mean_image(digits: periplus.ImageData) -> None:
    x = digits.images.double() / 255
    p = x.mean(0)
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum()
    found = constant_distortion(BERNOULLI, p.float(), digits.images)
    assert float(found) == pytest.approx(float(entropy), rel=1e-4)
    assert float(constant_distortion(BERNOULLI, (p * 0.9).float(), digits.images)) > float(found)
    gaussian = AutoencoderConfig("vae", likelihood="gaussian").resolve(100)
    variance = x.flatten(1).var(0, correction=0).sum()
    assert float(constant_distortion(gaussian, p.float(), digits.images)) == pytest.approx(float(variance), rel=1e-5)


def test_a_code_under_the_mixture_of_its_own_kind_costs_what_the_gaussians_say() -> None:
    """One training encoding: the price is log N(z; m, s) - log N(z; 0, 1), whose mean is the divergence."""
    generator = torch.Generator().manual_seed(0)
    n, scale = 20_000, 0.5
    mean, log_scale = torch.full((n, 1), 1.0), torch.full((n, 1), math.log(scale))
    z = mean + scale * torch.randn(n, 1, generator=generator)
    image = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    price = rate_against(Sent(image, mean, log_scale, z), Sent(image, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)))
    divergence = 0.5 * (scale**2 + 1 - 1) - math.log(scale)
    assert abs(float(price.mean()) - divergence) < 3 * float(price.std()) / math.sqrt(n)


def test_infonce_of_echo_noise_stays_below_the_truth_and_finds_most_of_it() -> None:
    """Gaussian data, m = x, s constant: I = -ln s, and the critic is the channel's own density."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(8000, 1, generator=generator)
    sent = Sent(torch.zeros(8000, 1, 1, 1, dtype=torch.uint8), mean, torch.full_like(mean, math.log(0.5)), mean)
    bound = echo_infonce(EchoChannel(), sent, None, generator)
    assert math.log(2) - 0.1 < bound.value < math.log(2) + 3 * bound.standard_error


def test_a_run_is_judged_within_its_bounds(digits: periplus.ImageData, tmp_path: Path) -> None:
    run = periplus.train(AutoencoderConfig("vae", epochs=10, batch_size=64, latent_dim=8, hidden=64), digits, tmp_path / "run")
    record = evaluate_autoencoder(run, *splits_of(run, digits), likelihood_images=200, samples=50)
    for judged in record["splits"].values():
        assert judged["entropy_floor"] < judged["distortion"]["value"] < judged["constant_distortion"]
        split = judged["marginal_rate"]["value"] + judged["kl_to_prior"]["value"]
        assert split == pytest.approx(judged["prior_rate"]["value"], rel=1e-6)
        low, high = judged["rate"]["interval"]
        assert 0 < low <= high <= min(judged["rate"]["ln_n"], judged["prior_rate"]["value"])
        assert judged["bound"]["value"] == pytest.approx(judged["distortion"]["value"] + judged["prior_rate"]["value"], rel=1e-6)
    told, test = record["log_likelihood"], record["splits"]["test"]
    error = math.hypot(told["standard_error"], test["bound"]["standard_error"])
    assert -test["bound"]["value"] - 3 * error < told["value"] < -test["entropy_floor"]
    assert (told["examples"], told["samples"]) == (200, 50)
