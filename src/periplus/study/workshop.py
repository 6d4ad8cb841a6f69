"""Where chapters work: the study's folder, its data and its runs, and stages that are done once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from periplus.data import ImageData
from periplus.files import read_json, write_atomically
from periplus.runs import Run
from periplus.study.settings import Cell

#: Raised when a measurement changes its meaning: results of older versions are then measured again.
STAGE_VERSION = 2


@dataclass(frozen=True)
class Workshop:
    """What a chapter may use: `folder`, `data`, `runs` by name (gan-0, ...) and the cells they were made from.

    `again` gives the command that makes the figures of a chapter once more; `say` tells the person.
    """

    folder: Path
    data: ImageData
    runs: dict[str, Run]
    cells: list[Cell]
    again: Callable[[str], str]
    say: Callable[[str], None] = field(default=print)

    def of(self, model: str) -> list[tuple[Cell, Run]]:
        """The runs of one model, by seed."""
        return [(cell, self.runs[cell.name]) for cell in self.cells if cell.model == model]

    def inputs(self, models: Iterable[str]) -> dict[str, str]:
        """What a measurement of these models depends on: the bytes of their newest checkpoints and of the data."""
        digests = {cell.name: checkpoint_digest(run) for model in models for cell, run in self.of(model)}
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
