"""Write a page's results table from what `periplus compare` or a study's chapter 2b found.

    python benchmarks/results_table.py runs/compared judged_mnist              docs/results.md, from compare.json
    python benchmarks/results_table.py runs/study-quick study_quick            README.md, from results.json of a study
    python benchmarks/results_table.py benchmarks/results/study_quick.json     the page alone, in the words of this version, from what was kept

The lines between `<!-- results -->` and `<!-- /results -->` of the page are replaced. What it is made from is copied to
benchmarks/results/NAME.json, with the figures of a comparison beside it; a study's report becomes docs/example.pdf.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from periplus.study.comparison import comparison_conclusion, protocol_sentence, score_table

HOUSE = Path(__file__).parent.parent


def table(result: dict, command: str) -> str:
    shown = score_table(result, command, "scores")
    lines = ["| " + " | ".join(shown.header) + " |", "| --- |" + " ---: |" * (len(shown.header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in shown.rows]
    parts = (protocol_sentence(result), "\n".join(lines), shown.caption, comparison_conclusion(result), f"Made by `{command}`.")
    return "\n\n".join(parts).replace("\\", "")


def keep(source: Path, name: str, study: bool) -> None:
    """Copy what a table is made from, and what is shown beside it, into the repository."""
    kept = HOUSE / "benchmarks" / "results"
    shutil.copy(source / ("results.json" if study else "compare.json"), kept / f"{name}.json")
    if study:
        shutil.copy(source / "report.pdf", HOUSE / "docs" / "example.pdf")
        return
    (kept / name).mkdir(exist_ok=True)
    for figure in sorted(source.glob("figures/*")):
        shutil.copy(figure, kept / name / figure.name)


def main() -> None:
    source = Path(sys.argv[1])
    path = source if source.is_file() else next(p for p in (source / "results.json", source / "compare.json") if p.exists())
    found = json.loads(path.read_text(encoding="utf-8"))
    study = "chapters" in found
    result, page = (found["chapters"]["2b"]["scores"], HOUSE / "README.md") if study else (found, HOUSE / "docs" / "results.md")
    if source.is_dir():
        keep(source, sys.argv[2], study)
    before, rest = page.read_text(encoding="utf-8").split("<!-- results -->")
    _, after = rest.split("<!-- /results -->")
    page.write_text(f"{before}<!-- results -->\n{table(result, found['command'])}\n<!-- /results -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
