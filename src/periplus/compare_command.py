"""`periplus compare RUN...`: runs side by side, a table with intervals and floors, verdicts, grids, quality against epochs and seconds.

Writes compare.json (everything that was found), compare.html (one self-contained file) and figures/ into --out.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from periplus.commands import Common
from periplus.errors import UsageError
from periplus.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Compare(Common):
    """Compare runs: groups by configuration, seeds as repeats; a table with intervals and a plain verdict."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN", help="Run folders, of one data set.")]
    out: Annotated[Path, arg(help="The folder for compare.json, compare.html and figures.")] = Path("compare")
    n: Annotated[int, arg(help="Samples of each run, and as many real images (half of the data at most).")] = 10_000
    curves: Annotated[bool, arg(help="Score snapshots too: quality against epochs and seconds.")] = True
    data_root: Annotated[Path | None, arg(help="Where named sets are looked for first; else $PERIPLUS_DATA, else the cache.")] = None

    @property
    def command(self) -> str:
        """What makes the same again."""
        words = ["periplus", "compare", *map(str, self.folders), "--out", str(self.out)]
        words += ["--n", str(self.n)] if self.n != 10_000 else []
        words += [] if self.curves else ["--no-curves"]
        words += ["--data-root", str(self.data_root)] if self.data_root else []
        return shlex.join(words)

    def run(self) -> None:
        """Score what has not been scored, compare, write, say what was found."""
        from periplus.comparing import compare, group_runs
        from periplus.console import note, table
        from periplus.evaluation import data_of
        from periplus.report import Chapter, Finding, Report, plain, write_html
        from periplus.runs import load_run
        from periplus.scoring import FEWEST, reference
        from periplus.study.comparison import comparison_blocks, comparison_conclusion, draw_comparison, score_table

        if not self.folders:
            raise UsageError("periplus compare needs at least one RUN folder")
        if self.n < FEWEST:
            raise UsageError(f"--n is {self.n}: at least {FEWEST} are needed")
        runs = [load_run(folder) for folder in self.folders]
        for run in runs:
            if run.data.sha256 != runs[0].data.sha256:
                raise UsageError(f"{run.path} was trained on '{run.data.source}', {runs[0].path} on '{runs[0].data.source}': compare them apart")
            if run.config.architecture == "custom":
                raise UsageError(f"{run.path} was trained with one's own networks: only Python can sample it, periplus.comparing.compare(runs, ...)")
        data = data_of(runs[0], self.data_root)
        result = {"command": self.command, **compare(runs, reference(data, self.n, note=note), curves=self.curves, note=note)}
        figures = draw_comparison(result, group_runs(runs), data, self.out, "compare")
        write_atomically(self.out / "compare.json", json.dumps(result, indent=1) + "\n")
        blocks = (*comparison_blocks(result, figures, self.command, "compare"), Finding(comparison_conclusion(result)))
        chapter = Chapter("compare", "Side by side", "Which runs are better, by how much, and how sure is that?", blocks)
        subtitle = ", ".join(plain(group["label"]) for group in result["groups"])
        report = Report(title=f"Runs on {plain(data.source or data.name)}, compared", subtitle=subtitle, chapters=(chapter,))
        page = write_html(report, self.out / "compare.html", self.out)
        if self.json:
            self.tell(result)
            return
        shown = score_table(result, self.command, "scores")
        table(shown.header, [[str(cell).replace("\\", "") for cell in row] for row in shown.rows])
        print(comparison_conclusion(result).replace("*", "").replace("\\", ""))
        print(f"{page}, {self.out / 'compare.json'}")
