"""What every step of every loop needs: batches and seeds as functions of (seed, step), gradients that never spoil anything, precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from periplus.checkpoints import Checkpoint
from periplus.config import Config
from periplus.data import ImageData
from periplus.errors import UsageError
from periplus.seeds import stream

#: Images on which a loop watches itself while it trains.
WATCHED = 256
#: A moment of Adam below this is zero: 1e-30 / epsilon (1e-8) moves no weight. From there, 100 steps of 0.9 do not lead below 1e-38.
NEGLIGIBLE_MOMENT = 1e-30
SWEEP_EVERY = 100

# ---- batches --------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Batches:
    """Batches as a pure function of (seed, index): each epoch is a permutation of the images, cut into whole batches. uint8, on the device."""

    images: Tensor
    batch_size: int
    seed: int
    _epoch: int = -1
    _order: Tensor | None = None

    def __post_init__(self) -> None:
        self.images = self.images.contiguous()  # gathering an image whose pixels lie far apart takes forty times as long

    @property
    def per_epoch(self) -> int:
        return len(self.images) // self.batch_size

    def __call__(self, index: int) -> Tensor:
        """Batch number `index` of the run as floats in [0, 1]: (B, C, H, W)."""
        epoch, k = divmod(index, self.per_epoch)
        if epoch != self._epoch or self._order is None:
            generator = torch.Generator().manual_seed(stream(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator).to(self.images.device)
        rows = self._order[k * self.batch_size : (k + 1) * self.batch_size]
        return to_float(self.images.index_select(0, rows))


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def hold_out(config: Config, data: ImageData) -> tuple[ImageData, ImageData | None]:
    """The images to train on, and those kept out of training (drawn by seed), if any."""
    if not config.held_out:
        return data, None
    return data.split_off(config.held_out, held_out_seed(config))


def held_out_seed(config: Config) -> int:
    """What draws the images that are kept out of training."""
    return stream(config.seed, "held-out")


def seed_step(config: Config, step: int) -> None:
    """Make everything random in this step a function of (seed, step)."""
    seed = stream(config.seed, "step", step)
    if on_host(config):
        torch.default_generator.manual_seed(seed)  # a two-hundredth of the time of torch.manual_seed, which asks every kind of device
    else:
        torch.manual_seed(seed)


def steps_in_all(config: Config, images: int) -> int:
    """Steps of a run on so many training images. Raises UsageError when not even one batch can be filled."""
    if images < 1:
        raise UsageError(f"--held-out is {config.held_out}: it leaves no image for training")
    if images < config.batch_size:
        raise UsageError(f"--batch-size is {config.batch_size}, but only {images} images are left for training: use a smaller one")
    steps = max(1, config.epochs * (images // config.batch_size) // config.batches_per_step)
    return min(steps, config.max_steps or steps)


def due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps is due after `step` of them; always at the end."""
    return step % every == 0 or step == steps


def is_snapshot(step: int, log_every: int) -> bool:
    """Whether a snapshot is kept after so many steps: log_every times 4, 8, 16, ... whatever the length of the run, which may grow."""
    lines, rest = divmod(step, log_every)
    return rest == 0 and lines >= 4 and lines.bit_count() == 1


def on_host(config: Config) -> bool:
    """True where reading a value costs nothing, because the device is the host."""
    return torch.device(config.device).type == "cpu"


# ---- gradients ------------------------------------------------------------------------------------------------------------------------------


def new_optimizer(network: nn.Module, config: Config) -> torch.optim.Adam:
    """Adam over one network's parameters, all in one fused kernel."""
    return torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(config.beta1 or 0.0, config.beta2 or 0.0), fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, prefix: str) -> None:
    """Take over an optimiser's state, bit for bit."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            states.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        state.update({name: laid_out_like(parameter, value) for name, value in state.items() if value.shape == parameter.shape})


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's state as named tensors."""
    return {f"{prefix}{i}.{k}": v for i, moments in optimizer.state_dict()["state"].items() for k, v in moments.items()}


def apply_gradients(optimizer: torch.optim.Adam, loss: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the loss with respect to the optimiser's parameters only, and step unless anything is, or ever was, non-finite.

    Returns the gradient's norm and the flag `healthy` (a boolean on the device), which once false stays false. The fused optimiser itself skips
    the step when `found_inf` is set, so nobody waits for the flag to reach the host.
    """
    parameters = [p for p in optimizer.param_groups[0]["params"] if p.requires_grad]  # a walk through the modules would take longer than a layer
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = laid_out_like(parameter, gradient)
    return step_if_healthy(optimizer, loss, total_norm(gradients), healthy)


def step_if_healthy(optimizer: torch.optim.Adam, loss: Tensor, norm: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
    """The optimiser's step with the gradients that its parameters have, of this norm; see `apply_gradients`."""
    healthy = healthy & (loss.detach() + norm).isfinite()
    optimizer.found_inf = (~healthy).to(torch.float32)  # type: ignore[attr-defined]
    adam_step(optimizer)
    return norm, healthy


class GradientRows:
    """Gradients of an optimiser's parameters, one after the other in one row, for those who write them there themselves: their norm is one product.

    `of` maps each parameter to its part. The parameters are of one type and device.
    """

    def __init__(self, optimizer: torch.optim.Adam) -> None:
        parameters = optimizer.param_groups[0]["params"]
        self.optimizer, self.row = optimizer, torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        parts = self.row.split([p.numel() for p in parameters])
        self.of: dict[Tensor, Tensor] = {p: part.view(p.shape) for p, part in zip(parameters, parts, strict=True)}

    def add(self, loss: Tensor) -> Tensor:
        """Add the gradient of a further loss, by automatic differentiation. Returns the loss without its graph."""
        for gradient, more in zip(self.of.values(), torch.autograd.grad(loss, list(self.of), materialize_grads=True), strict=True):
            gradient += more
        return loss.detach()

    def apply(self, loss: Tensor, healthy: Tensor) -> tuple[Tensor, Tensor]:
        """`apply_gradients` of a loss whose gradients lie here."""
        for parameter, gradient in self.of.items():
            parameter.grad = gradient
        return step_if_healthy(self.optimizer, loss, torch.dot(self.row, self.row).sqrt(), healthy)


def laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A value in the memory order of its parameter. The fused kernel walks through both as they lie, and asks nothing."""
    return value if value.stride() == parameter.stride() else torch.empty_like(parameter).copy_(value)


def total_norm(gradients: tuple[Tensor, ...]) -> Tensor:
    """Euclidean norm of all gradients together. `torch.nn.utils.get_total_norm` takes up to twice as long, sorting them by device and type.

    On the host a product of each with itself: it takes a third of the time of its norm, which one thread computes.
    """
    if len({(g.device, g.dtype) for g in gradients}) > 1:
        return torch.nn.utils.get_total_norm(gradients)
    if gradients[0].device.type == "cpu":
        return torch.stack([squared_sum(g) for g in gradients]).sum().sqrt()
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def squared_sum(values: Tensor) -> Tensor:
    """The sum of squares of a tensor, whatever its order in memory: a scalar."""
    dense = values if values.is_contiguous() else values.t() if values.dim() == 2 else values.contiguous()
    flat = dense.reshape(-1)
    return torch.dot(flat, flat)


@torch.no_grad()
def adam_step(optimizer: torch.optim.Adam) -> None:
    """What `optimizer.step()` does for the optimisers of `new_optimizer`, to the bit, without the half millisecond of Python around it."""
    (group,) = optimizer.param_groups
    parameters = [p for p in group["params"] if p.grad is not None]
    states = [optimizer.state[p] for p in parameters]
    if not all(states) or len({(p.device, p.dtype) for p in parameters}) > 1:  # the first step makes the moments
        optimizer.step()
        return
    steps, found_inf = [s["step"] for s in states], optimizer.found_inf  # type: ignore[attr-defined]
    torch._foreach_add_(steps, [1 - found_inf] * len(steps))  # of a skipped step the kernel reads no count
    torch._fused_adam_(
        parameters,
        [p.grad for p in parameters],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=found_inf,
    )
    if parameters[0].device.type == "cpu" and int(steps[0]) % SWEEP_EVERY == 0:
        sweep_subnormals([s[moment] for s in states for moment in ("exp_avg", "exp_avg_sq")])


def sweep_subnormals(moments: list[Tensor]) -> None:
    """Set to zero, in place, what is too small to move a weight and is on its way to numbers that processors multiply a hundred times slower.

    The weights of a pixel that is hardly ever lit have no gradient for hundreds of steps. Their mean gradient falls by beta1 at each, ends below
    1e-38 and stays there (0.9 times the smallest number rounds to itself): fifteen such columns of MNIST's 784 double the time of Adam. A sweep is a
    function of the optimiser's own count of steps, so resuming keeps the bits; the processor's own mode for it would depend on each thread's past.
    """
    for moment in moments:
        moment.copy_(torch.nn.functional.hardshrink(moment, NEGLIGIBLE_MOMENT))


def autocast(config: Config) -> contextlib.AbstractContextManager[object]:
    """bfloat16 autocast, where the (resolved) configuration says so."""
    if config.precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16)


def some_images(config: Config, data: ImageData) -> Tensor:
    """Up to WATCHED images of a set, drawn by seed, on the device."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(stream(config.seed, "watch", len(data))))
    return data.images[order[:WATCHED]].to(config.device)


@contextlib.contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Within: the modules in evaluation mode; afterwards as they were."""
    modes = [m.training for m in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def attempt(name: str, module: nn.Module, batch: Tensor, what: str) -> Tensor:
    """A module's output for a batch. Raises UsageError that says what it does not take, or returned."""
    try:
        result = module(batch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UsageError(f"{name} does not take {what} of shape {tuple(batch.shape)}: {' '.join(str(error).split())}") from None
    if not isinstance(result, Tensor):
        raise UsageError(f"{name} returned a {type(result).__name__}: one tensor is needed")
    return result
