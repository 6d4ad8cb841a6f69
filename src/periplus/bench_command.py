"""`periplus bench train`: the training step timed against other loops, in turn."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from periplus.commands import Common
from periplus.config import AdversarialConfig, AdversarialModel, nearest
from periplus.errors import UsageError

#: Where results go in a checkout.
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class BenchTrain(Common):
    """Time one adversarial training step against the loop that tutorials write, in turn, and against the machine's matrix product."""

    model: Annotated[AdversarialModel, arg(help="What is trained, with its default settings.")] = "wgan-gp"
    architecture: Annotated[Literal["mlp", "conv"], arg(help="Of both networks.")] = "mlp"
    data: Annotated[str, arg(help="A named set (digits, mnist, fashion-mnist, ...), an .npz, an IDX file or a folder of images.")] = "mnist"
    batch_sizes: Annotated[tuple[int, ...], arg(help="Images per step; each is measured on its own.")] = (64, 128, 512)
    threads: Annotated[int | None, arg(help="Threads of one operation; default: as torch has them.")] = None
    rounds: Annotated[int, arg(help="Turns of each contender; ratios are taken within a round.")] = 7
    seconds: Annotated[float, arg(help="How long a turn takes, about.")] = 1.0
    precision: Annotated[Literal["float32", "bfloat16"], arg(help="Of our step; loops of tutorials are timed in float32.")] = "float32"
    device: Annotated[str, arg(help="auto (a GPU where there is one), cpu, cuda, cuda:N.")] = "auto"
    out: Annotated[
        Path | None, arg(help="The JSON file to write. Default: benchmarks/results/bench_train_*.json where that folder is, else ./bench_train.json.")
    ] = None
    image_size: Annotated[int | None, arg(help="Resize images to squares of so many pixels.")] = None
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first; else $PERIPLUS_DATA, else the cache.")] = None

    def run(self) -> None:
        """Measure, write the file, print the table."""
        import json

        import torch

        from periplus.benchmarking import bench_train, tables
        from periplus.console import note, table
        from periplus.data import load_data
        from periplus.files import write_atomically

        if self.threads is not None:
            if self.threads < 1:
                raise UsageError(f"--threads is {self.threads}: at least 1 is needed")
            torch.set_num_threads(self.threads)
        if self.out is not None and self.out.is_dir():
            raise UsageError(f"--out is {self.out}, a folder: name a file")
        if self.out is not None:  # before minutes of measuring, not after
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--out is {self.out}: {self.out.parent} cannot be made a folder ({error.strerror})") from None
        config = AdversarialConfig(self.model, architecture=self.architecture, precision=self.precision, device=self.device)
        data = load_data(self.data, root=self.data_root, image_size=self.image_size)
        measured = bench_train(config, data, self.batch_sizes, rounds=self.rounds, seconds=self.seconds, say=note)
        record = {"command": shlex.join(["periplus", *sys.argv[1:]]), **measured}
        out = self.out or self.place(data.name, record["device"])
        write_atomically(out, json.dumps(record, indent=1) + "\n")
        if self.json:
            self.tell(record)
            return
        title = f"{self.model}, {self.architecture}, {data.name}, {self.precision}, {record['device']}, threads: {record['threads']}"
        for header, rows in tables(record):
            table(header, rows, title=title)
        print(out)

    def place(self, data: str, device: str) -> Path:
        """Where the file goes by default: each setting has its own in a checkout."""
        if not RESULTS.is_dir():
            return Path("bench_train.json")
        name = "_".join((self.model, self.architecture, data, self.precision, device.partition(":")[0]))
        return RESULTS / f"bench_train_{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json"


def bench_options(argv: Sequence[str]) -> type[Common]:
    """The options of `periplus bench WORD`."""
    words: dict[str, type[Common]] = {"train": BenchTrain}
    if argv[0] not in words:
        raise UsageError(f"unknown word 'bench {argv[0]}'{nearest(argv[0], words)}: known are {', '.join(words)}")
    return words[argv[0]]
