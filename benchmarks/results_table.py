"""Write the README's results table from what `periplus compare` found.

    python benchmarks/results_table.py runs/compared judged_mnist

The lines between `<!-- results -->` and `<!-- /results -->` of README.md are replaced; compare.json and its figures are copied to
benchmarks/results/NAME.json and benchmarks/results/NAME/, the grid of samples to docs/samples.png too.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from periplus.study.comparison import comparison_conclusion, protocol_sentence, score_table

HOUSE = Path(__file__).parent.parent


def table(result: dict) -> str:
    shown = score_table(result, result["command"], "scores")
    lines = ["| " + " | ".join(shown.header) + " |", "| --- |" + " ---: |" * (len(shown.header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in shown.rows]
    parts = (protocol_sentence(result), "\n".join(lines), shown.caption, comparison_conclusion(result), f"Made by `{result['command']}`.")
    return "\n\n".join(parts).replace("\\", "")


def main() -> None:
    source, name = Path(sys.argv[1]), sys.argv[2]
    result = json.loads((source / "compare.json").read_text(encoding="utf-8"))
    kept = HOUSE / "benchmarks" / "results"
    shutil.copy(source / "compare.json", kept / f"{name}.json")
    (kept / name).mkdir(exist_ok=True)
    for figure in sorted(source.glob("figures/*")):
        shutil.copy(figure, kept / name / figure.name)
    shutil.copy(source / "figures" / "compare-side-by-side.png", HOUSE / "docs" / "samples.png")
    readme = HOUSE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split("<!-- results -->")
    _, after = rest.split("<!-- /results -->")
    readme.write_text(f"{before}<!-- results -->\n{table(result)}\n<!-- /results -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
