"""Where chapters work: the study's folder, its data, its runs and sweeps, and stages that are done once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from periplus.data import ImageData
from periplus.evaluation import splits_of
from periplus.files import read_json, write_atomically
from periplus.runs import Run, load_run
from periplus.study.settings import Cell, SweepCell

#: Raised when a measurement changes its meaning: results of older versions are then measured again.
STAGE_VERSION = 4


@dataclass(frozen=True)
class Swept:
    """A finished sweep: the job that made it, its folder, what its sweep.json holds."""

    cell: SweepCell
    folder: Path
    record: dict[str, Any]

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The records of its cells, by beta, then by seed."""
        return sorted(self.record["cells"], key=lambda cell: (cell["values"]["beta"], cell["seed"]))

    def run(self, cell: dict[str, Any]) -> Run:
        """The run of one cell."""
        return load_run(self.folder / cell["path"])

    def evaluation(self, cell: dict[str, Any]) -> dict[str, Any]:
        """What `periplus evaluate` found of one cell."""
        return read_json(self.folder / cell["path"] / "evaluation.json", "make the study again with --resume")

    def digest(self) -> str:
        """SHA-256 of the checkpoints of all cells and of what was found of them."""
        parts = [[cell["name"], checkpoint_digest(self.run(cell)), self.evaluation(cell)["splits"]] for cell in self.cells]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Workshop:
    """What a chapter may use: `folder`, `data`, `runs` by name (gan-0, ...) and the cells they were made from, `sweeps` by key.

    `again` gives the command that makes the figures of a chapter once more; `say` tells the person, `progress` how many parts of how many a
    measurement has done.
    """

    folder: Path
    data: ImageData
    runs: dict[str, Run]
    cells: list[Cell]
    again: Callable[[str], str]
    say: Callable[[str], None] = field(default=print)
    sweeps: dict[str, Swept] = field(default_factory=dict)
    data_root: Path | None = None
    progress: Callable[[int, int], None] = field(default=lambda done, parts: None)

    def of(self, model: str) -> list[tuple[Cell, Run]]:
        """The runs of one model, by seed."""
        return [(cell, self.runs[cell.name]) for cell in self.cells if cell.model == model]

    def splits(self, run: Run) -> tuple[ImageData, ImageData]:
        """The images that a run was trained on, and those that it is tested on."""
        return splits_of(run, self.data, self.data_root)

    def inputs(self, models: Iterable[str], sweeps: Iterable[str] = ()) -> dict[str, str]:
        """What a measurement of these models and sweeps depends on: the bytes of their newest checkpoints and of the data."""
        digests = {cell.name: checkpoint_digest(run) for model in models for cell, run in self.of(model)}
        digests |= {self.sweeps[key].cell.name: self.sweeps[key].digest() for key in sweeps}
        return {"data": self.data.content_hash(), **digests}

    def stage(self, name: str, inputs: dict[str, str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `work`, or the one kept from an earlier time with the same inputs."""
        path = self.folder / "stages" / f"{name}.json"
        key = {"version": STAGE_VERSION, **inputs}
        if path.exists():
            kept = read_json(path, "delete it, and it is measured again")
            if kept.get("inputs") == key and isinstance(kept.get("result"), dict):
                return dict(kept["result"])
        result = work()
        write_atomically(path, json.dumps({"inputs": key, "result": result}, indent=1) + "\n")
        return result


def checkpoint_digest(run: Run) -> str:
    """SHA-256 of the manifest of the run's newest good checkpoint, which holds those of its files."""
    return hashlib.sha256((run.checkpoint.path / "manifest.json").read_bytes()).hexdigest()
