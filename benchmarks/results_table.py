"""Write the README's results table from the results of a study.

    python benchmarks/results_table.py runs/quick/results.json

The lines between `<!-- results -->` and `<!-- /results -->` of README.md are replaced; copies of the results and of the sample grids go to
benchmarks/results/.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

HOUSE = Path(__file__).parent.parent
NAMES = {"gan": "`gan`", "wgan-gp": "`wgan-gp`"}


def rows(results: dict) -> list[str]:
    lines = []
    for key in ("2a", "2b"):
        chapter = results["chapters"][key]
        for run in chapter["runs"]:
            share = min(run["shares"], key=lambda s: s["value"])
            low, high = run["neighbour_ratio_interval"]
            cells = (
                NAMES[chapter["model"]],
                str(run["seed"]),
                "yes" if run["collapsed"] else "no",
                f"{100 * share['value']:.1f} ({100 * share['low']:.1f} to {100 * share['high']:.1f})",
                f"{run['spread']:.3f}",
                f"{run['neighbour_ratio']:.2f} ({low:.2f} to {high:.2f})",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def trained_at(results: dict) -> str:
    return ", ".join(sorted({run["environment"]["commit"] for key in ("2a", "2b") for run in results["chapters"][key]["runs"]}))


def table(results: dict) -> str:
    data, settings = results["data"], results["settings"]
    run = results["chapters"]["2a"]["runs"][0]
    error = run["classifier_error"]
    head = (
        f"{data['source']}, `mlp`, defaults, {settings['epochs']} epochs, {settings['seeds']} seeds, {run['samples']:,} samples of each run; made by "
        f"`{results['command']}`, trained at commits {trained_at(results)}, measured at {results['environment']['commit']}:\n\n"
        "| model | seed | collapsed | smallest class, % (95 % interval) | spread | nearest / held-out (95 % interval) |\n"
        "| --- | ---: | --- | ---: | ---: | ---: |\n"
    )
    verdicts = "; ".join(f"{row['title']}: {row['verdict']}" for row in results["chapters"]["2b"]["comparison"])
    foot = (
        f"\n\nClasses are told by three nearest neighbours in pixel space (error on real images {100 * error['value']:.1f} %, interval "
        f"{100 * error['low']:.1f} to {100 * error['high']:.1f} %). *Spread* is the mean pairwise distance of samples over that of the data. "
        "*Nearest / held-out* is the median distance to the nearest training image, samples over held-out images; 1 is as far as fresh data, well "
        f"below 1 would be copying. WGAN-GP against GAN, Welch intervals over seeds, 95 % for all measures together: {verdicts}."
    )
    return head + "\n".join(rows(results)) + foot


def main() -> None:
    source = Path(sys.argv[1])
    results = json.loads(source.read_text(encoding="utf-8"))
    name = f"{results['settings']['preset']}_{results['data']['source']}"
    kept = HOUSE / "benchmarks" / "results"
    shutil.copy(source, kept / f"{name}.json")
    grids = kept / name
    grids.mkdir(exist_ok=True)
    for figure in sorted(source.parent.glob("figures/*.png")):
        shutil.copy(figure, grids / figure.name)
    shutil.copy(source.parent / "figures" / "2b-side-by-side.png", HOUSE / "docs" / "samples.png")
    readme = HOUSE / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split("<!-- results -->")
    _, after = rest.split("<!-- /results -->")
    readme.write_text(f"{before}<!-- results -->\n{table(results)}\n<!-- /results -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
