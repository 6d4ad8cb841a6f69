"""The speedrun: seconds from the start of the process to a fixed score on MNIST. README.md has the rules and the records.

    python benchmarks/speedrun/run.py --runs 5
    python benchmarks/speedrun/run.py --runs 5 --entry my_entry.py --out my_entry.json
    python benchmarks/speedrun/run.py --smoke --out smoke.json     (digits, pixels for features: does the machinery run? no record)

Runs are made in turn, each in a process of its own, from seeds 0, 1, 2 ... The result is written after every run. The clock is started by this
process just before it starts the other, and stands still while a candidate is judged; so imports and the reading of data count, and judging does not.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
SAMPLES = 10_000
#: The score to reach: Frechet distance (squared) of 10,000 samples to the 10,000 test images, features of the shipped MNIST network.
#: Fixed once, such that the first entry takes minutes on two cores: 400 times the noise floor, and legible digits.
TARGET: float | None = 10.0
FEWEST_RUNS = 5
#: Each candidate is a chance to be lucky: no more of them than this.
MOST_CANDIDATES = 100
#: --smoke: digits, pixels, few samples; a score that an untrained generator misses and a few hundred steps reach.
SMOKE_TARGET, SMOKE_SAMPLES = 1.5, 1000


@dataclass
class Clock:
    """Seconds since `started` (time.time(), which processes share), without those in which it was stopped."""

    started: float
    stopped_for: float = 0.0

    def seconds(self) -> float:
        return time.time() - self.started - self.stopped_for

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Within: time that does not count."""
        wait_for_device()
        before = time.time()
        try:
            yield
        finally:
            self.stopped_for += time.time() - before


def wait_for_device() -> None:
    """A GPU works on after its orders were given: what it was told before the clock stops must count."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- judging --------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Referee:
    """Scores of candidates against the test split."""

    data: str
    extract: Callable[[Any], Any]
    record: dict[str, Any]
    samples: int
    real: Any = field(init=False)

    def __post_init__(self) -> None:
        from periplus import load_data

        self.real = self.extract(load_data(self.data, "test").images.float() / 255)

    def score(self, dimension: int, decode: Callable[[Any], Any], seed: int) -> float:
        """Frechet distance of samples from codes by this seed; infinite where one of them is not finite."""
        import torch

        from periplus import frechet_distance
        from periplus.runs import codes

        with torch.no_grad():
            device = next(iter(getattr(decode, "parameters", lambda: iter(()))()), torch.zeros(0)).device
            blocks = codes(seed, "speedrun", self.samples, dimension, device).split(1000)
            images = torch.cat([decode(z).float().cpu() for z in blocks]).clamp(0, 1)
        if not images.isfinite().all():
            return math.inf
        return frechet_distance(self.real, self.extract(images)).value

    def noise_floor(self) -> float:
        """The score of real images: as many of the training split, drawn by seed."""
        import torch

        from periplus import frechet_distance, load_data

        images = load_data(self.data).images
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: self.samples]
        return frechet_distance(self.real, self.extract(images[rows].float() / 255)).value


def appoint(smoke: bool) -> Referee:
    """The referee: the shipped network on MNIST, or pixels on the digits."""
    if smoke:
        return Referee("digits", lambda images: images.flatten(1), {"name": "pixels"}, SMOKE_SAMPLES)
    from periplus.features import load_extractor

    extractor = load_extractor("mnist")
    return Referee("mnist", extractor, extractor.record(), SAMPLES)


# ---- one run, in a process of its own -------------------------------------------------------------------------------------------------------


def load_entry(path: Path) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location("entry", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_run(options: argparse.Namespace) -> dict[str, Any]:
    """Train until the score is reached, the time or the candidates are used up."""
    clock = Clock(options.started)
    referee: Referee | None = None
    checks: list[dict[str, Any]] = []
    outcome: dict[str, Any] = {"seed": options.seed, "reached": False, "seconds": None, "step": None, "confirmed": None, "noise_floor": None}
    for step, dimension, decode in load_entry(options.entry).train("digits" if options.smoke else "mnist", options.seed):
        with clock.stopped():
            seconds = clock.seconds()
            referee = referee or appoint(options.smoke)
            value = referee.score(dimension, decode, seed=0)
            checks.append({"step": step, "seconds": round(seconds, 3), "value": value if math.isfinite(value) else None})
            print(f"seed {options.seed}: step {step}, {seconds:.1f} s, score {value:.4f}", file=sys.stderr, flush=True)
            if value <= options.target:
                outcome |= {"reached": True, "seconds": round(seconds, 3), "step": step}
                outcome |= {"confirmed": referee.score(dimension, decode, seed=1), "noise_floor": referee.noise_floor()}
        if outcome["reached"] or seconds > options.limit or len(checks) == MOST_CANDIDATES or not math.isfinite(value):
            break
    from periplus.machine import environment, resolve_device

    told = {"judging_seconds": round(clock.stopped_for, 3), "checks": checks, "extractor": referee.record if referee else None}
    return outcome | told | {"environment": environment(resolve_device("auto"))}


# ---- all runs -------------------------------------------------------------------------------------------------------------------------------


def start(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run in a new process, with the load of the machine before it began."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    words = [sys.executable, str(Path(__file__).resolve()), "--one", "--seed", str(seed), "--entry", str(options.entry)]
    words += ["--target", repr(options.target), "--limit", repr(options.limit), *(["--smoke"] if options.smoke else [])]
    run = subprocess.run([*words, "--started", repr(time.time())], env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"the run with seed {seed} failed (exit code {run.returncode}): its message is above")
    return {"load_before": load, **json.loads(run.stdout)}


def summarise(runs: list[dict[str, Any]], target: float, smoke: bool) -> dict[str, Any]:
    """Median and range of the seconds, and whether the rules for a record are met: enough runs, all of them there, and no luck with the samples."""
    seconds = [run["seconds"] for run in runs if run["reached"]]
    confirmed = [run["confirmed"] for run in runs if run["reached"]]
    every = len(seconds) == len(runs) > 0
    return {
        "runs": len(runs),
        "reached": len(seconds),
        "median": statistics.median(seconds) if every else None,  # with a run that did not arrive there is none
        "low": min(seconds) if every else None,
        "high": max(seconds) if every else None,
        "confirmed": statistics.fmean(confirmed) if every else None,
        "is_record": not smoke and every and len(runs) >= FEWEST_RUNS and statistics.fmean(confirmed) <= target,
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table in README.md."""
    told, environment = result["summary"], result["runs"][0]["environment"]
    seconds = "not reached" if told["median"] is None else f"{told['median']:.1f} ({told['low']:.1f} to {told['high']:.1f})"
    machine = f"{environment['processor']}, {environment['device']}, {environment['threads']} threads"
    return f"| {result['date']} | {seconds} | {told['runs']} | {environment['commit']} | {machine} | {result['entry']}, target {result['target']:g} |"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=FEWEST_RUNS)
    parser.add_argument("--entry", type=Path, default=HERE / "entry.py")
    parser.add_argument("--target", type=float, default=None, help="another score than the rules': no record")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which a run has not arrived")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true", help="the digits and their pixels: does the machinery run?")
    parser.add_argument("--out", type=Path, default=None)
    for name, kind in (("--seed", int), ("--started", float)):
        parser.add_argument(name, type=kind, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.given_target = options.target
    if options.target is None:
        options.target = SMOKE_TARGET if options.smoke else TARGET
    if options.target is None:
        parser.error("the target is not fixed yet (TARGET in this file): give one as --target")
    if options.runs < 1:
        parser.error(f"--runs is {options.runs}: at least 1 is needed, and {FEWEST_RUNS} for a record")
    if not options.entry.is_file():
        parser.error(f"--entry is {options.entry}: there is no such file")
    options.out = options.out or HERE.parent / "results" / f"speedrun_{'smoke' if options.smoke else options.entry.stem}.json"
    return options


def main() -> int:
    options = parse()
    if options.one:
        print(json.dumps(one_run(options)))
        return 0
    from periplus.files import write_atomically

    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "data": "digits" if options.smoke else "mnist",
        "target": options.target,
        "entry": options.entry.name,
        "entry_sha256": hashlib.sha256(options.entry.read_bytes()).hexdigest(),
        "runs": [],
    }
    for seed in range(options.runs):
        result["runs"].append(start(options, seed))
        result["summary"] = summarise(result["runs"], options.target, options.smoke or options.given_target is not None)
        write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(row(result))
    return 0 if result["summary"]["reached"] == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
