"""Losses: distortions of autoencoders, adversarial losses and the gradient penalty.

Rate and distortion, nats per example, summed over pixels; image x, decoder's output G(z), channel q(z|x):

    loss       L = D + beta R                                                         (Higgins et al. 2017, eq. 4; Alemi et al. 2018, eq. 9)
    Bernoulli  D = - sum_i [x_i ln p_i + (1 - x_i) ln(1 - p_i)],  p = sigmoid(G(z))   (grey pixels as they are: then D >= their own entropy)
    Gaussian   D = |x - G(z)|^2 / (2 sigma^2)                                         (the squared error for sigma^2 = 1/2)

The Gaussian's constant, n/2 ln(2 pi sigma^2), depends on nothing that is trained and is left out of D; likelihoods put it back. The rates R are in
`periplus.channels`, next to the noise that they are the price of.

Notation: critic (or discriminator) D: image -> score, generator G: code -> image, real images x, fakes G(z).

    GAN       L_D = BCE[D(x), 1] + BCE[D(G(z)), 0]                                 (Goodfellow et al. 2014, eq. 1)
              L_G = BCE[D(G(z)), 1]                     non-saturating              (ibid., section 3)
              L_G = -BCE[D(G(z)), 0] = log(1 - D)       saturating
    WGAN-GP   L_D = E D(G(z)) - E D(x) + lambda E (|grad D(x_hat)| - 1)^2           (Gulrajani et al. 2017, eq. 3)
              L_G = - E D(G(z))
              x_hat = e x + (1 - e) G(z),  e ~ U[0, 1] once per example
    RpGAN     L_D = E softplus(D(G(z)) - D(x)) + gamma/2 (R1 + R2)                 (Jolicoeur-Martineau 2019; Huang et al. 2024, eq. 3)
              L_G = E softplus(D(x) - D(G(z)))           each fake against one real image
              R1 = E |grad D(x)|^2,  R2 = E |grad D(G(z))|^2                       (Mescheder et al. 2018, eq. 9, 10)

The two generator losses of the GAN are different losses, not two spellings of one: they have the same fixed point, but where the discriminator
rejects a fake with confidence the saturating one has slope -sigmoid(score) -> 0 and the non-saturating one has slope -(1 - sigmoid(score)) -> -1.

Scores are logits, never probabilities: the cross-entropies are taken through softplus, which neither overflows nor loses digits.
All functions are means over the batch, in nats for the GAN and in units of the score for WGAN-GP. The adversarial losses take the dimension of the
batch as `dim`, where scores of several models lie in one tensor; by default they are means over everything. Nothing here owns a network, an
optimiser or a file, and nothing here calls `.backward()`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from periplus.errors import UsageError

Critic = Callable[[Tensor], Tensor]

#: Inside the square root of a gradient norm: keeps its derivative finite where the gradient is exactly zero.
NORM_EPSILON = 1e-12


def bernoulli_distortion(logits: Tensor, images: Tensor) -> Tensor:
    """-log p(x|z) of a Bernoulli decoder, (B,) in nats, summed over channels and pixels.

    Args:
        logits: (B, ...), the decoder's output before the sigmoid; images: the same shape, in [0, 1].

    Equals softplus(l) - x l per pixel, which neither overflows nor loses digits. Leading dimensions but the first are summed over.
    """
    return softplus(logits).flatten(1).sum(1) - (logits * images).flatten(1).sum(1)


def gaussian_distortion(mean: Tensor, images: Tensor, sigma: float) -> Tensor:
    """|x - mean|^2 / (2 sigma^2), (B,) in nats: -log p(x|z) of a Gaussian decoder without its constant (`gaussian_constant`)."""
    return (images - mean).flatten(1).square().sum(1) / (2 * sigma**2)


def gaussian_constant(pixels: int, sigma: float) -> float:
    """n/2 ln(2 pi sigma^2): what `gaussian_distortion` leaves out of -log p(x|z), in nats."""
    return pixels / 2 * math.log(2 * math.pi * sigma**2)


def gan_discriminator_loss(real_score: Tensor, fake_score: Tensor, dim: int | None = None) -> Tensor:
    """BCE[D(x), 1] + BCE[D(G(z)), 0] from logits of any shape; a scalar in nats. Equals 2 ln 2 for an undecided discriminator."""
    return softplus(-real_score).mean(dim) + softplus(fake_score).mean(dim)


def gan_generator_loss(fake_score: Tensor, form: str = "non-saturating", dim: int | None = None) -> Tensor:
    """The generator's loss from logits of its fakes; a scalar in nats.

    form: "non-saturating", -log D(G(z)), or "saturating", log(1 - D(G(z))). Raises UsageError for any other.
    """
    if form == "non-saturating":
        return softplus(-fake_score).mean(dim)
    if form == "saturating":
        return -softplus(fake_score).mean(dim)
    raise UsageError(f"generator loss '{form}' is unknown: use 'non-saturating' or 'saturating'")


def wgan_critic_loss(real_score: Tensor, fake_score: Tensor, dim: int | None = None) -> Tensor:
    """E D(G(z)) - E D(x), the negative of the critic's estimate of the Wasserstein-1 distance; a scalar in units of the score."""
    return fake_score.mean(dim) - real_score.mean(dim)


def wgan_generator_loss(fake_score: Tensor, dim: int | None = None) -> Tensor:
    """- E D(G(z)); a scalar in units of the score."""
    return -fake_score.mean(dim)


def relativistic_critic_loss(real_score: Tensor, fake_score: Tensor, dim: int | None = None) -> Tensor:
    """E softplus(D(G(z)) - D(x)), each fake paired with the real image beside it; a scalar in nats. Equals ln 2 for an undecided critic."""
    return softplus(fake_score - real_score).mean(dim)


def relativistic_generator_loss(real_score: Tensor, fake_score: Tensor, dim: int | None = None) -> Tensor:
    """E softplus(D(x) - D(G(z))): the critic's loss with the roles exchanged; a scalar in nats."""
    return softplus(real_score - fake_score).mean(dim)


Penalty = Literal["none", "interpolated", "zero-centred"]
"""interpolated: (|grad D| - 1)^2 between real and fake images. zero-centred: |grad D|^2 on real images and on fakes, R1 + R2."""


def interpolate(real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x_hat = e x + (1 - e) G(z) with one e ~ U[0, 1] per example, broadcast over channels and pixels."""
    return torch.lerp(fake, real, interpolation_weights(real, generator))


def interpolation_weights(real: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One e ~ U[0, 1] for each example of (B, ...): (B, 1, ...), of its kind."""
    device = real.device if generator is None else generator.device
    wide = real.dtype if real.dtype == torch.float64 else torch.float32  # of bfloat16 there are 256 weights only
    e = torch.rand((real.shape[0],) + (1,) * (real.dim() - 1), generator=generator, device=device, dtype=wide)
    return e.to(real.device, real.dtype)


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *,
    target: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Per-example WGAN-GP penalty (|grad D(x_hat)|_2 - target)^2, unweighted (Gulrajani et al. 2017, eq. 3).

    The norm is taken over all channels and pixels of one example; the result is differentiable with respect to the critic's parameters, and
    carries no gradient into `real` or `fake` (so none into the generator).

    Args:
        critic: any callable (B, C, H, W) -> (B,) or (B, 1).
        real, fake: floating-point images (B, C, H, W), the same shape.
        target: the norm asked for; 1 for WGAN-GP, 0 for a zero-centred penalty.
        generator: source of the interpolation weights; torch's default one if None.

    Returns:
        (B,) tensor, in squared units of score per unit of pixel value.

    Raises:
        UsageError: shapes differ, the images are not floating point, the scores are not one per example, or the critic mixes the examples of a
            batch (batch normalisation in training mode, minibatch statistics): then "the gradient of one example's score" does not exist, and
            the penalty would silently be about something else. Layer, instance and group normalisation are accepted.
    """
    _check_pair(real, fake)
    with torch.inference_mode(False), torch.enable_grad():
        x_hat = interpolate(real.detach(), fake.detach(), generator).requires_grad_()
        gradient = score_gradient(critic, x_hat, create_graph=True)
    penalty = norm_penalty(gradient, target)
    return penalty if torch.is_grad_enabled() else penalty.detach()


def zero_centred_penalty(critic: Critic, images: Tensor) -> Tensor:
    """Per-example |grad D(x)|_2^2 (B,), unweighted: R1 on real images, R2 on fakes (Mescheder et al. 2018, eq. 9 and 10).

    Differentiable with respect to the critic's parameters; carries no gradient into `images`. Raises UsageError as `gradient_penalty` does.
    """
    _check_pair(images, images)
    with torch.inference_mode(False), torch.enable_grad():
        penalty = squared_norm(score_gradient(critic, images.detach().requires_grad_(), create_graph=True))
    return penalty if torch.is_grad_enabled() else penalty.detach()


def squared_norm(gradient: Tensor) -> Tensor:
    """Squared Euclidean norm of each example's gradient (B, ...) -> (B,); float32 or better."""
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    return wide.flatten(1).square().sum(1)


def norm_penalty(gradient: Tensor, target: float = 1.0) -> Tensor:
    """(|gradient|_2 - target)^2 of each example's gradient (B, ...) -> (B,)."""
    return penalty_of_square(squared_norm(gradient), target)


def penalty_of_square(square: Tensor, target: float = 1.0) -> Tensor:
    """(sqrt(square) - target)^2 of squared norms (B,) -> (B,), with a derivative that is finite at zero."""
    return ((square + NORM_EPSILON).sqrt() - target).square()


def score_gradient(critic: Critic, images: Tensor, create_graph: bool = False) -> Tensor:
    """grad_x D(x) for every example, (B, C, H, W). `images` must require grad. Raises UsageError as `gradient_penalty` does."""
    return score_and_gradient(critic, images, create_graph)[1]


def score_and_gradient(critic: Critic, images: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """D(x) (B,) and grad_x D(x) (B, C, H, W), from one pass. `images` must require grad. Raises UsageError as `gradient_penalty` does."""
    scores = check_scores(critic(images), images.shape[0])
    if not scores.requires_grad:  # a constant critic: its gradient is zero, not an error
        return scores, torch.zeros_like(images)
    refuse_mixing(critic, scores, images)
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=create_graph, retain_graph=True, materialize_grads=True)
    return scores, gradient


def check_scores(scores: Tensor, batch: int) -> Tensor:
    """The critic's output as (B,). Raises UsageError unless it is (B,) or (B, 1)."""
    if scores.shape == (batch,):
        return scores
    if scores.shape == (batch, 1):
        return scores[:, 0]
    raise UsageError(f"the critic returned shape {tuple(scores.shape)} for a batch of {batch}: one score per example is needed, (B,) or (B, 1)")


def _check_pair(real: Tensor, fake: Tensor) -> None:
    if real.shape != fake.shape:
        raise UsageError(f"real {tuple(real.shape)} and fake {tuple(fake.shape)} images must have the same shape")
    if not real.is_floating_point() or real.dtype != fake.dtype:
        raise UsageError(
            f"images must be floating point, of one type, for a gradient penalty, not {real.dtype} and {fake.dtype}: scale uint8 by 1/255"
        )
    if real.dim() < 2:
        raise UsageError(f"images must be a batch (B, C, H, W), not of shape {tuple(real.shape)}")


# ---- critics that mix examples -------------------------------------------------------------------------------------------------------------

#: Modules (by weak reference) that passed the numerical test once. Batch norm is looked for on every call all the same: modes change.
_separable: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

MIXING = (
    "the critic mixes the examples of a batch{why}, so the gradient of one example's score depends on the others and the per-example penalty is "
    "not defined; use layer, instance or group normalisation, or none, in a penalised critic"
)


def refuse_mixing(critic: Critic, scores: Tensor, images: Tensor) -> None:
    """Raise UsageError if D's score of one example depends on another example of the batch.

    Two tests, because critics come wrapped in anything. The autograd graph of the scores is searched for batch normalisation in training mode, at
    every call. And once per module (at every call for other callables) the rows' scores are weighted by 1, 2, ... 64 in turn: the gradient of a
    separable critic is then exactly the plain gradient times these weights, row by row, whatever the critic is made of. (Powers of two, because
    they cost no rounding; seven, because groups of a minibatch lie at even strides, and rows of equal weight could mix unseen.)
    """
    if any(_normalises_batch(node) for node in _graph_nodes(scores)):
        raise UsageError(MIXING.format(why=" (batch normalisation in training mode)"))
    if images.shape[0] < 2 or (isinstance(critic, torch.nn.Module) and critic in _separable):
        return
    weights = 2.0 ** (torch.arange(images.shape[0], device=scores.device) % 7)
    (plain,) = torch.autograd.grad(scores.sum(), images, retain_graph=True, materialize_grads=True)
    (weighted,) = torch.autograd.grad((scores * weights).sum(), images, retain_graph=True, materialize_grads=True)
    difference = (weighted.flatten(1) - weights[:, None] * plain.flatten(1)).norm()
    if bool(difference > 1e-4 * plain.norm()):  # powers of two cost no rounding: a separable critic gives 0
        raise UsageError(MIXING.format(why=""))
    # What a plain function closes over may change from call to call, and an idle or silent critic has not shown anything: test these every time.
    if isinstance(critic, torch.nn.Module) and critic.training and bool(plain.norm() > 0):
        _separable.add(critic)


def _graph_nodes(scores: Tensor) -> Iterator[torch.autograd.graph.Node]:
    seen: set[object] = set()
    stack = [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def _normalises_batch(node: torch.autograd.graph.Node) -> bool:
    """True for a batch-norm node that uses the batch's own statistics (instance norm reaches the same kernel with a batch of one)."""
    if "BatchNorm" not in node.name():
        return False
    if not getattr(node, "_saved_training", True):
        return False
    saved = getattr(node, "_saved_input", None)
    return saved is None or saved.shape[0] > 1
