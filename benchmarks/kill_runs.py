"""Kill training runs with SIGKILL, resume them, and compare every bit with a run that was left alone.

    python benchmarks/kill_runs.py --kills 64 --out DIR

For each model one reference run on the digits, uninterrupted. Then runs that are killed one to three times each, resumed after every kill, and at
last compared with the reference: `config.toml`, `metrics.jsonl`, `samples/` and `checkpoints/`, names and bytes. The kills are real (SIGKILL, real
files) and of three kinds:

    save    inside a save: the child kills itself just before or just after its k-th file operation there (fsync, rename, mkdir, unlink, rmdir), or
            with half of a file written; half of all kills
    file    the same at any file operation outside a save: config.toml, env.json, a line of metrics, a sample grid; a quarter
    moment  from outside, after a random time; a quarter

A run that cannot be resumed to its end counts as lost, one that ends with other bits as different; either makes the exit code 1. Files that a kill
left under a name beginning with a dot, and that are still there at the end, are counted as leftovers. The parent imports once and forks one child
per attempt; networks are small and everything runs on one thread. The result, with the command and with where each kill fell, is written to
benchmarks/results/kill_runs.json as it goes.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import json
import mmap
import os
import random
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from periplus import ImageData, load_data, networks, train
from periplus.config import MODELS, Config, config_for
from periplus.files import write_atomically
from periplus.machine import versions
from periplus.networks import MLPCritic, MLPGenerator
from periplus.training import adversarial, autoencoder

RESULTS = Path(__file__).parent / "results" / "kill_runs.json"
COMPARED = ("config.toml", "metrics.jsonl", "samples", "checkpoints")
OPERATIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


@dataclass(frozen=True)
class Kill:
    """When to kill: after `delay` seconds (moment), or at file operation number `number` of its kind, before, after or half way."""

    kind: str
    delay: float = 0.0
    number: int = 0
    when: str = "before"


class Board:
    """What a child says of itself, in memory that it shares with its parent and that outlives it."""

    FORMAT = "qqqq"  # generator steps done, inside a save, file operations in saves, file operations elsewhere

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, struct.calcsize(self.FORMAT))

    def read(self) -> list[int]:
        return list(struct.unpack(self.FORMAT, self.memory[:]))

    def write(self, slot: int, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * slot, value)

    def clear(self) -> None:
        self.memory[:] = bytes(len(self.memory))


# ---- in the child ---------------------------------------------------------------------------------------------------------------------------


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


class HalfWriter:
    """A file that dies with its process half way through the first write."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> NoReturn:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        die()


def arm(kill: Kill | None, board: Board) -> None:
    """Patch this process so that it counts its file operations, tells its step, and dies where it is told to."""
    update_average, autoencoder_step = adversarial.update_average, autoencoder.autoencoder_step

    def telling(save: Callable[..., None]) -> Callable[..., None]:
        def telling_save(*arguments: Any) -> None:
            board.write(1, 1)
            save(*arguments)
            board.write(1, 0)

        return telling_save

    def telling_step(state: Any, *arguments: Any) -> Any:
        outcome = autoencoder_step(state, *arguments)
        board.write(0, state.step + 1)
        return outcome

    def telling_update(ema: Any, generator: Any, decay: float, step: int) -> None:
        update_average(ema, generator, decay, step)
        board.write(0, step + 1)

    def chosen() -> bool:
        inside = board.read()[1]
        slot = 2 if inside else 3
        count = board.read()[slot] + 1
        board.write(slot, count)
        return kill is not None and kill.kind == ("save" if inside else "file") and kill.number == count

    def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def patched(*arguments: Any, **options: Any) -> Any:
            dies = chosen()
            if dies and kill is not None and kill.when == "before":
                die()
            result = operation(*arguments, **options)
            if dies:
                die()
            return result

        return patched

    def deadly_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        dies = any(letter in mode for letter in "wxa") and chosen()
        stream = builtin_open(file, mode, *arguments, **options)
        return HalfWriter(stream) if dies else stream

    builtin_open = builtins.open
    builtins.open = deadly_open  # type: ignore[assignment]
    for name in OPERATIONS:
        setattr(os, name, deadly(getattr(os, name)))
    adversarial.save, adversarial.update_average = telling(adversarial.save), telling_update
    autoencoder.save_checkpoint, autoencoder.autoencoder_step = telling(autoencoder.save_checkpoint), telling_step  # type: ignore[assignment]


# ---- in the parent --------------------------------------------------------------------------------------------------------------------------


def attempt(config: Config, data: ImageData, folder: Path, kill: Kill | None, board: Board) -> str:
    """Begin or resume the run in a forked child. Returns 'done', 'killed', or the last lines of its traceback."""
    board.clear()
    complaint = folder.with_suffix(".error")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(kill, board)
            train(config, data, folder, resume=True)
            code = 0
        except BaseException:
            complaint.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    if kill is not None and kill.kind == "moment":
        time.sleep(kill.delay)
        os.kill(child, signal.SIGKILL)  # ours and not yet waited for, so the number cannot belong to anybody else
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"ended by signal {os.WTERMSIG(status)}"
    return "done" if os.WEXITSTATUS(status) == 0 else complaint.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    """The files that must be the same, by relative name."""
    return {
        name: (folder / name).read_bytes()
        for name in sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if name.split("/")[0] in COMPARED and not is_leftover(name)
    }


def is_leftover(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts) and name != ".lock"


def leftovers(folder: Path) -> list[str]:
    return sorted(name for file in folder.rglob("*") if is_leftover(name := str(file.relative_to(folder))))


#: Every model as it comes, and the convolutional architecture of each kind.
CASES = (*MODELS, "wgan-gp conv", "vae conv")


def configuration(case: str, steps: int) -> Config:
    model, _, architecture = case.partition(" ")
    every = max(2, steps // 20)
    own: dict[str, object] = {"hidden": 24, "schedule": "cosine"} if model in ("vae", "echo") else {}
    own |= {"architecture": architecture} if architecture else {}
    return config_for(
        model,
        **own,
        batch_size=16,
        latent_dim=4,
        max_steps=steps,
        log_every=7,
        sample_every=max(3, steps // 10),
        checkpoint_every=every,
        epochs=1000,
        device="cpu",
        precision="float32",
        seed=5,
    )


class Campaign:
    """The kills of all models, and what became of the runs."""

    def __init__(self, kills: int, steps: int, seed: int, out: Path, results: Path) -> None:
        self.kills, self.steps, self.out, self.results = kills, steps, out, results
        self.chance, self.board, self.data = random.Random(seed), Board(), load_data("digits")
        self.record: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "seed": seed,
            "steps": steps,
            "versions": versions(),
            "kills": 0,
            "inside_a_save": 0,
            "runs": 0,
            "lost": 0,
            "different": 0,
            "leftovers": 0,
            "complete": False,
            "failures": [],
            "reference": {},
            "fell": [],
        }

    def run(self) -> int:
        """All kills; the exit code."""
        self.warm_up()
        for k, case in enumerate(CASES):
            self.visit(case, (self.kills + len(CASES) - 1 - k) // len(CASES))
        self.record["complete"] = True
        self.write()
        return 1 if self.record["lost"] or self.record["different"] else 0

    def warm_up(self) -> None:
        """Train for two steps in this process: what torch imports at first use would be imported again by every child."""
        folder = self.out / "warm-up"
        train(configuration("wgan-gp", 2), self.data, folder)
        shutil.rmtree(folder)

    def visit(self, model: str, kills: int) -> None:
        """The reference of one model, and as many kills of runs that ought to equal it."""
        config, reference = configuration(model, self.steps), self.out / f"{model}-reference"
        started = time.monotonic()
        outcome = attempt(config, self.data, reference, None, self.board)
        if outcome != "done":
            raise SystemExit(f"the reference run of {model} failed:\n{outcome}")
        self.seconds = time.monotonic() - started
        _, _, self.in_saves, self.elsewhere = self.board.read()
        self.record["reference"][model] = {
            "seconds": round(self.seconds, 2),
            "file_operations_in_saves": self.in_saves,
            "file_operations_elsewhere": self.elsewhere,
        }
        expected, given = contents(reference), 0
        while given < kills:
            given += self.one_run(model, config, expected, kills - given)
            self.write()

    def one_run(self, model: str, config: Config, expected: dict[str, bytes], limit: int) -> int:
        """One run, killed one to three times (at most `limit`), resumed to its end and compared. Returns the number of kills."""
        number = self.record["runs"]
        folder, given, wanted, step = self.out / f"{model}-{number}", 0, min(limit, self.chance.randint(1, 3)), 0
        while True:
            kill = self.choose(step) if given < wanted else None
            outcome = attempt(config, self.data, folder, kill, self.board)
            if outcome != "killed":
                break
            reached, inside, *_ = self.board.read()
            step, given = max(step, reached), given + 1
            self.record["kills"] += 1
            self.record["inside_a_save"] += inside
            self.record["fell"].append({"model": model, "run": number, "step": reached, "inside_a_save": bool(inside), **asdict(kill)})  # type: ignore[arg-type]
        self.record["runs"] += 1
        self.judge(model, number, folder, outcome, expected)
        return given

    def choose(self, step: int) -> Kill:
        """The next kill of a run that has done so many steps already: every other one inside a save."""
        left = max(0.05, 1 - step / self.steps)
        kind = ("save", "file", "save", "moment")[self.record["kills"] % 4]
        when = self.chance.choice(("before", "after"))
        if kind == "moment":
            return Kill(kind, delay=self.chance.uniform(0, self.seconds * left))
        operations = self.in_saves if kind == "save" else self.elsewhere
        if kind == "file" and self.chance.random() < 0.5:  # while the folder is laid out, or brought back to its checkpoint
            operations, left = 16, 1
        return Kill(kind, number=self.chance.randint(1, max(1, int(operations * left))), when=when)

    def judge(self, model: str, number: int, folder: Path, outcome: str, expected: dict[str, bytes]) -> None:
        left_behind = leftovers(folder) if folder.exists() else []
        self.record["leftovers"] += len(left_behind)
        failure: dict[str, Any] = {"model": model, "run": number, "folder": str(folder)}
        if outcome != "done":
            self.record["lost"] += 1
            self.record["failures"].append({**failure, "lost": outcome.strip().splitlines()[-1]})
        elif (found := contents(folder)) != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            self.record["different"] += 1
            self.record["failures"].append({**failure, "different": names})
        elif left_behind:
            self.record.setdefault("left_behind", []).extend(left_behind)
            shutil.rmtree(folder)
        else:
            shutil.rmtree(folder)

    def write(self) -> None:
        write_atomically(self.results, json.dumps(self.record, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--out", type=Path, help="where the runs go; by default a temporary folder that is removed")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks.MLPGenerator = functools.partial(MLPGenerator, widths=(16, 24))  # type: ignore[misc, assignment]
    networks.MLPCritic = functools.partial(MLPCritic, widths=(24,))  # type: ignore[misc, assignment]
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        if out.exists() and any(out.iterdir()):
            print(f"{out} is not empty: choose another --out", file=sys.stderr)
            return 2
        out.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(arguments.kills, arguments.steps, arguments.seed, out, arguments.results)
        code = campaign.run()
    r = campaign.record
    print(
        f"{r['kills']} kills ({r['inside_a_save']} inside a save) of {r['runs']} runs: {r['lost']} lost, {r['different']} different, "
        f"{r['leftovers']} leftovers; {arguments.results}"
    )
    for failure in r["failures"]:
        print(failure, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
