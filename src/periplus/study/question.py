"""The common form of a chapter. Each answers one question of the sheet in three steps:

    measure(workshop) -> results        numbers from runs and data, JSON-ready; kept as a stage
    draw(results, workshop) -> figures  name -> {path, command}; files below figures/
    tell(results, study) -> blocks      prose, equations, tables, figures and a conclusion, from the results (and the study's settings) alone

`tell` sees no runs and no data: what it says follows from numbers that are in results.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from periplus.report import Block
from periplus.study.settings import Variant
from periplus.study.workshop import Workshop

Results = dict[str, Any]
Figures = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Question:
    """A question of the sheet, in our words, and how it is answered.

    `models` are those whose runs it needs, `sweeps` the sweeps, `variants` trainings of its own.
    """

    key: str
    title: str
    question: str
    models: tuple[str, ...]
    measure: Callable[[Workshop], Results]
    draw: Callable[[Results, Workshop], Figures]
    tell: Callable[[Results, Results], tuple[Block, ...]]
    sweeps: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
