"""How fast the adversarial step is: against the loop that everybody writes, and against what the machine can multiply. All in one run.

A shared machine's speed wanders by a factor of two within minutes, so rates of different runs cannot be compared. Here all contenders take turns, in
an order drawn anew in each round, and every ratio is taken within a round; what is told is the median over rounds, with the lowest and the highest.

    periplus        the step of `periplus.training.adversarial`, with all that it does at each step
    textbook_W      the loop of `periplus.textbook` on PIL pictures through a DataLoader with W worker processes; the fastest W is "the textbook"
    memory          the same loop on images that lie in memory as floats
    ..._float32     where `periplus` computes in bfloat16, loops of tutorials stay in float32, as they come. Then two more take part:
    ..._bfloat16    our step in float32, and the loop in memory under autocast
    critic steps    ours alone, without penalty, with it, and with it differentiated twice; on fakes that are given, or made within the step

The machine's rate is that of products of two square matrices, one after the other, just before or just after our turn. What a step multiplies is
counted as it runs: matrix products and convolutions, forward and backward, two operations for each multiplication. All else that it does costs time
but does not count. From both follows what bounds a ratio: a step that did nothing but these products, at that rate, would have `ratio_limit`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from periplus.config import AdversarialConfig
from periplus.data import ImageData
from periplus.errors import NonFiniteError, UsageError
from periplus.machine import commit, deterministic, environment, keep_freed_memory
from periplus.networks import AdversarialNetworks
from periplus.objectives import Penalty
from periplus.runs import build_networks
from periplus.seeds import stream
from periplus.textbook import Textbook, from_loader, in_memory
from periplus.training import cuda_index, plan
from periplus.training.adversarial import (
    PENALTIES,
    Judge,
    State,
    critic_step,
    judge,
    judge_second_order,
    make_fakes,
    new_state,
    train_step,
)
from periplus.training.steps import Batches, hold_out, on_host
from periplus.training.written import write_critic

WORKERS = (0, 1, 2)
PRODUCT_SIZE = 2048
PRODUCT_SECONDS = 0.4
WARM_UP = 3
#: The step of a run that ours is timed from. The average of a young run takes in every step, later one in eight: most of a run is later.
FROM_STEP = 2000

Step = Callable[[], None]
Record = dict[str, Any]


# ---- the benchmark --------------------------------------------------------------------------------------------------------------------------


def bench_train(
    config: AdversarialConfig,
    data: ImageData,
    batch_sizes: Sequence[int] = (64, 128, 512),
    *,
    rounds: int = 7,
    seconds: float = 1.0,
    product_size: int = PRODUCT_SIZE,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """Time the training step of a configuration at each batch size; its own batch size does not matter.

    Args:
        config: model, architecture, device, precision; everything else as well is as it would be trained.
        rounds: turns of each contender.
        seconds: how long a turn takes, about. A critic's step alone gets half of it.
        product_size: rows and columns of the matrices whose product is timed.
        say: called with a line of text at each round.

    Returns what was measured, as plain values. Raises UsageError for what cannot be served.
    """
    check(len(data) - (config.resolve(len(data)).held_out or 0), batch_sizes, rounds, seconds)
    resolved: Any = plan(dataclasses.replace(config, batch_size=max(batch_sizes)), data).config
    keep_freed_memory()  # as `train` does; the other loops have it as well, as they share the process
    started = load()
    sizes = []
    with torch.random.fork_rng(devices=cuda_index(resolved.device)):
        for size in dict.fromkeys(batch_sizes):
            contest = Contest(dataclasses.replace(resolved, batch_size=size), data, rounds, seconds, product_size)
            sizes.append(contest.run(say))
    return {
        "what": "images per second of one training step, contenders in turn, ratios within a round; medians, lowest and highest over the rounds",
        "model": resolved.model,
        "architecture": resolved.architecture,
        "data": {"name": data.name, "images": len(data) - (resolved.held_out or 0), "shape": list(data.shape)},
        "device": resolved.device,
        "precision": resolved.precision,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seconds_per_turn": seconds,
        "product_size": product_size,
        "tf32": tf32(resolved.device),
        "config": {k: v for k, v in dataclasses.asdict(resolved).items() if k not in ("batch_size", "max_steps")},
        "batch_sizes": sizes,
        "load": {"start": started, "end": load()},
        "commit": commit(),
        "machine": environment(resolved.device),
    }


def check(images: int, batch_sizes: Sequence[int], rounds: int, seconds: float) -> None:
    """Raise UsageError for settings that cannot be measured."""
    if not batch_sizes:
        raise UsageError("--batch-sizes is empty: give one or more")
    for size in batch_sizes:
        if not 2 <= size <= images:
            raise UsageError(f"--batch-sizes has {size}: from 2 to the {images} training images can be served")
    if rounds < 1:
        raise UsageError(f"--rounds is {rounds}: at least 1 is needed")
    if not 0 < seconds <= 600:
        raise UsageError(f"--seconds is {seconds:g}: more than 0 and at most 600 can be served")


def load() -> float | None:
    """Processes that want to run, over the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def tf32(device: str) -> dict[str, bool] | None:
    """Whether a GPU rounds the factors of float32 products and convolutions to 10 bits; None on the host."""
    if torch.device(device).type != "cuda":
        return None
    return {"products": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32}


@dataclass
class Contest:
    """One batch size: its contenders and their rounds. `config` is resolved."""

    config: AdversarialConfig
    data: ImageData
    rounds: int
    seconds: float
    product_size: int

    def run(self, say: Callable[[str], None]) -> Record:
        """Everything measured at this batch size."""
        order, flop = random.Random(self.config.seed), step_flop(self.config, self.data)
        rates: list[dict[str, float]] = []
        products: list[dict[str, float]] = []
        with ExitStack() as stack:
            turns = self.turns(stack)
            for k in range(self.rounds):
                rates.append({})
                for turn in order.sample(turns, len(turns)):
                    before = self.products() if turn.name == "periplus" else {}
                    rates[-1][turn.name] = turn.rate()
                    if before:  # the machine's rate beside ours: seconds later it may be another
                        products.append({name: max(rate, before[name]) for name, rate in self.products().items()})
                said = f"periplus {rates[-1]['periplus'] * self.images_per_step:,.0f} images/s"
                say(f"batch {self.config.batch_size}, round {k + 1} of {self.rounds}: {said}")
        return self.record(Rounds(rates), Rounds(products), flop, {turn.name: turn.count for turn in turns})

    @property
    def images_per_step(self) -> int:
        return self.config.batch_size * self.config.batches_per_step

    @property
    def precisions(self) -> dict[str, torch.dtype]:
        """Those whose product is timed."""
        return {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if self.config.precision == "bfloat16" else {})

    def products(self) -> dict[str, float]:
        """The machine's rate in each precision, operations per second."""
        return {name: product_rate(dtype, self.config.device, self.product_size) for name, dtype in self.precisions.items()}

    def turns(self, stack: ExitStack) -> list[Turn]:
        """All contenders, warm; the stack ends what they started."""
        config, (train_data, _) = self.config, hold_out(self.config, self.data)
        plain = dataclasses.replace(config, precision="float32")
        steps: dict[str, Step] = {"periplus": our_step(config, train_data, FROM_STEP)}
        batches = {f"textbook_{workers}": from_loader(train_data, config.batch_size, workers) for workers in WORKERS}
        for name, source in (batches | {"memory": in_memory(train_data, config.batch_size, config.device)}).items():
            steps[name] = textbook(plain, train_data, stack.enter_context(closing(source))).step
        if config.precision == "bfloat16":
            steps["periplus_float32"] = our_step(plain, train_data, FROM_STEP)
            source = stack.enter_context(closing(in_memory(train_data, config.batch_size, config.device)))
            steps["memory_bfloat16"] = textbook(config, train_data, source).step
        turns = [Turn(name, step, self.seconds, config.device) for name, step in steps.items()]
        alone = critic_steps(config, train_data) if PENALTIES[config.model] != "none" else {}
        return turns + [Turn(name, step, self.seconds / 2, config.device) for name, step in alone.items()]

    def record(self, rates: Rounds, products: Rounds, flop: int, counts: dict[str, int]) -> Record:
        """What the rounds came to."""
        books = [f"textbook_{workers}" for workers in WORKERS]
        fastest = max(books, key=lambda name: statistics.median(rates[name]))
        extra = ("periplus_float32", "memory_bfloat16") if self.config.precision == "bfloat16" else ()
        others = {"textbook": fastest, **{name: name for name in ("memory", *extra)}}
        images, epochs = self.images_per_step, 100 * len(hold_out(self.config, self.data)[0])
        ours = {self.config.precision: "periplus"} | ({"float32": "periplus_float32"} if extra else {})
        reached = {
            kind: summary(rate * flop / product for rate, product in zip(rates[name], products[kind], strict=True)) for kind, name in ours.items()
        }
        limits = {
            name: summary(product / flop / rate for product, rate in zip(products[self.config.precision], rates[other], strict=True))
            for name, other in (("textbook", fastest), ("memory", "memory"))
        }
        pace = {name: significant(epochs / images / statistics.median(rates[name])) for name in ("periplus", fastest, "memory")}
        return {
            "batch_size": self.config.batch_size,
            "images_per_second": {name: summary(images * rate for rate in rates[name]) for name in ("periplus", *books, "memory", *extra)},
            "textbook": fastest,
            "ratio": {name: rates.ratio("periplus", other) for name, other in others.items()},
            "ratio_limit": limits,
            "seconds_per_100_epochs": pace,
            "product_gflop_per_second": {name: summary(rate / 1e9 for rate in products[name]) for name in self.precisions},
            "step_gflop": flop / 1e9,
            "step_gflop_per_second": summary(rate * flop / 1e9 for rate in rates["periplus"]),
            "share_of_product": reached,
            "penalty": None if PENALTIES[self.config.model] == "none" else {fakes: penalty_record(rates, fakes) for fakes in FAKES},
            "steps_per_turn": counts,
        }


def penalty_record(rates: Rounds, fakes: str) -> Record:
    """A critic's step with its penalty, ours and differentiated twice, over the same step without."""
    return {
        "milliseconds": {way: summary(1e3 / rate for rate in rates[f"{fakes}_{way}"]) for way in JUDGES},
        "over_none": {way: rates.ratio(f"{fakes}_none", f"{fakes}_{way}") for way in JUDGES if way != "none"},
    }


# ---- contenders -----------------------------------------------------------------------------------------------------------------------------


def same_networks(config: AdversarialConfig, data: ImageData) -> AdversarialNetworks:
    """The networks of a run, with its first weights."""
    torch.manual_seed(stream(config.seed, "networks"))
    return AdversarialNetworks(*build_networks(config, data.shape))


def our_step(config: AdversarialConfig, data: ImageData, start: int = 0) -> Step:
    """The step of a run, with the check that the loop makes. start: how many steps it is told to have behind it; its weights are the first ones."""
    batches = Batches(data.images.to(config.device), config.batch_size, config.seed)
    state = new_state(config, same_networks(config, data), config.device)
    state.step = start
    healthy = torch.ones((), dtype=torch.bool, device=config.device)

    def step() -> None:
        nonlocal healthy
        with deterministic(config.device):
            healthy = train_step(state, config, batches, healthy)
        if on_host(config) or state.step % config.log_every == 0:
            check_healthy(healthy, config)

    return step


def check_healthy(healthy: Tensor, config: AdversarialConfig) -> None:
    """Raise NonFiniteError once the flag is down."""
    if not bool(healthy):
        raise NonFiniteError(f"a loss or gradient of {config.model} became non-finite at batch size {config.batch_size}: nothing can be timed")


def textbook(config: AdversarialConfig, data: ImageData, batches: Iterator[Tensor]) -> Textbook:
    """The textbook's loop over these batches, with the networks of a run."""
    generator, critic = (network.to(config.device).train() for network in same_networks(config, data))
    return Textbook(config, generator, critic, batches)


def without_penalty(critic: torch.nn.Module, real: Tensor, fake: Tensor, penalty: Penalty) -> tuple[Tensor, Tensor, Tensor]:
    """`judge`, whatever penalty is asked for."""
    return judge(critic, real, fake, "none")


#: How a critic is judged, by name. One that is written out is so in the first two ways.
JUDGES: dict[str, Judge] = {"none": without_penalty, "ours": judge, "double_backward": judge_second_order}
FAKES = ("given", "made")


def critic_steps(config: AdversarialConfig, data: ImageData) -> dict[str, Step]:
    """The critic's steps alone, by where their fakes come from and by how they are judged; each trains a critic of its own."""
    return {f"{fakes}_{way}": critic_step_alone(config, data, way, fakes == "made") for fakes in FAKES for way in JUDGES}


def critic_step_alone(config: AdversarialConfig, data: ImageData, way: str, made: bool) -> Step:
    """The critic's step of a run on one batch of real images, judged in one of the JUDGES' ways."""
    state = state_judged(config, data, way)
    real = Batches(data.images.to(config.device), config.batch_size, config.seed)(0)
    healthy = torch.ones((), dtype=torch.bool, device=config.device)

    @torch.no_grad()
    def fakes() -> Tensor:
        return make_fakes(state, config, real)

    given = fakes()

    def step() -> None:
        nonlocal healthy
        with deterministic(config.device):
            _, healthy = critic_step(state, config, real, fakes() if made else given, healthy, JUDGES[way])

    return step


def state_judged(config: AdversarialConfig, data: ImageData, way: str) -> State:
    """The state of a run at its first step whose critic is judged in one of the JUDGES' ways."""
    state = new_state(config, same_networks(config, data), config.device)
    if way == "none":
        state.written_critic = write_critic(state.critic, state.critic_optimizer, config, "none")
    if way == "double_backward":
        state.written_critic = None
    return state


# ---- clocks and counters --------------------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """A contender and how many steps its turn has: as many as take so many seconds, measured once when warm."""

    name: str
    step: Step
    seconds: float
    device: str

    def __post_init__(self) -> None:
        for _ in range(WARM_UP):
            self.step()
        self.count = max(1, round(self.seconds / seconds_for(self.step, WARM_UP, self.device) * WARM_UP))

    def rate(self) -> float:
        """Steps per second of one turn, after a quarter of it to settle: caches are another's, and workers may still be filling their queues."""
        for _ in range(max(1, self.count // 4)):
            self.step()
        return self.count / seconds_for(self.step, self.count, self.device)


def seconds_for(work: Callable[[], object], count: int, device: str) -> float:
    """Seconds that so many calls take until the device has done them."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        work()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: str) -> None:
    """Return once a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(dtype: torch.dtype, device: str, size: int = PRODUCT_SIZE) -> float:
    """Operations per second of products of square matrices, one after the other for PRODUCT_SECONDS: what the machine sustains.

    The best of a few was a third higher on two cores: a burst of the clock, and no step has its benefit.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    one = min(seconds_for(lambda: torch.mm(a, b, out=out), 1, device) for _ in range(2))
    count = max(1, math.ceil(PRODUCT_SECONDS / one))
    return 2 * size**3 * count / seconds_for(lambda: torch.mm(a, b, out=out), count, device)


def step_flop(config: AdversarialConfig, data: ImageData) -> int:
    """Floating-point operations of the matrix products and convolutions of one step of ours, forward and backward. `config` is resolved."""
    step = our_step(config, hold_out(config, data)[0])
    step()  # the first one makes the moments
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


# ---- numbers --------------------------------------------------------------------------------------------------------------------------------


class Rounds:
    """Rates by name, one for each round."""

    def __init__(self, rounds: Sequence[dict[str, float]]) -> None:
        self.rounds = rounds

    def __getitem__(self, name: str) -> list[float]:
        return [rates[name] for rates in self.rounds]

    def ratio(self, ours: str, theirs: str) -> Record:
        """One rate over another, within each round."""
        return summary(a / b for a, b in zip(self[ours], self[theirs], strict=True))


def summary(values: Iterator[float] | Sequence[float]) -> Record:
    """Median, lowest and highest, and all values in their order."""
    kept = [significant(value) for value in values]
    return {"median": significant(statistics.median(kept)), "lowest": min(kept), "highest": max(kept), "rounds": kept}


def significant(value: float, digits: int = 4) -> float:
    """A positive number rounded to so many digits."""
    return round(value, digits - 1 - math.floor(math.log10(value)))


HEADER = ("median", "lowest", "highest")
OTHERS = {
    "memory": "textbook on floats in memory",
    "periplus_float32": "periplus in float32",
    "memory_bfloat16": "textbook in memory, autocast",
}


def tables(record: Record) -> Iterator[tuple[list[str], list[list[str]]]]:
    """What was measured as header and rows for `periplus.console.table`, for each batch size."""
    for size in record["batch_sizes"]:
        rows = {
            "periplus, images/s": size["images_per_second"]["periplus"],
            **{f"textbook, workers: {workers}, images/s": size["images_per_second"][f"textbook_{workers}"] for workers in WORKERS},
            "textbook on floats in memory, images/s": size["images_per_second"]["memory"],
            "periplus / fastest textbook on pictures": size["ratio"]["textbook"],
            "its bound: our products alone": size["ratio_limit"]["textbook"],
            **{f"periplus / {OTHERS[name]}": found for name, found in size["ratio"].items() if name != "textbook"},
            "bound with floats in memory": size["ratio_limit"]["memory"],
            **{f"{kind} product, GFLOP/s": found for kind, found in size["product_gflop_per_second"].items()},
            "products of our step, GFLOP/s": size["step_gflop_per_second"],
            **{f"share of the {kind} product, our step in it": found for kind, found in size["share_of_product"].items()},
        }
        ways = {"ours": "critic's step with penalty / without", "double_backward": "differentiated twice / without"}
        for fakes, (way, words) in itertools.product(FAKES if size["penalty"] else (), ways.items()):
            rows[f"{words}, fakes {fakes}"] = size["penalty"][fakes]["over_none"][way]
        seconds = size["seconds_per_100_epochs"]["periplus"]
        last = ["100 epochs of periplus, s", f"{seconds:,.0f}", "", ""]
        yield [f"batch {size['batch_size']}", *HEADER], [[words, *(told(values[k]) for k in HEADER)] for words, values in rows.items()] + [last]


def told(value: float) -> str:
    """A number as people read it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
