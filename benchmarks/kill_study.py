"""Kill a study at random moments, resume it each time, and compare its results with those of a study that nobody disturbed.

    python benchmarks/kill_study.py --kills 10 --out runs/kill-study

Both are of the digits (300 of them, few epochs, all chapters or those of --only). SIGKILL goes to the whole process group: the study and all its
children. A moment is drawn from the time that the undisturbed study took, and awaited as the file that it made next, and up to a second more: so
kills fall into training, measuring, drawing and writing as these took time, however often the study began again. Times differ between any two runs;
they, and only they, are left out of the comparison. Writes benchmarks/results/kill_study.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "kill_study.json"
#: Keys whose values are times, or say in which sessions and at what time something was made.
TIMES = {"seconds", "images_per_second", "seconds_per_pair", "seconds_per_image", "environment", "timing", "command", "measured_at"}


def write_data(folder: Path) -> Path:
    import numpy as np

    import periplus

    data = periplus.load_data("digits")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "few.npz", images=data.images[:300].numpy(), labels=data.labels[:300].numpy())
    return folder / "few.npz"


def begin(data: Path, out: Path, only: str) -> subprocess.Popen:
    words = ["-m", "periplus", "study", "--data", str(data), "--out", str(out), "--epochs", "2", "--seeds", "2", "--resume"]
    words += ["--only", only] if only else []
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [without_times(v) for v in value if not (isinstance(v, dict) and v.get("axis") == "seconds")]  # "at equal seconds" is a time too
    return value


def differing(a: object, b: object, path: str = "") -> list[str]:
    """Where two results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [found for key in sorted({*a, *b}) for found in differing(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [found for k, (x, y) in enumerate(zip(a, b, strict=True)) for found in differing(x, y, f"{path}/{k}")]
    return [] if a == b else [path]


def moments(whole: Path, kills: int, chance: random.Random) -> list[str]:
    """As many random moments of a finished study, each as the file that was made next, in the order of the study."""
    made = [path for path in whole.rglob("*") if path.is_file() and "logs" not in path.parts and path.name != ".lock"]
    times = {path: path.stat().st_mtime for path in made}
    drawn = sorted(chance.uniform(min(times.values()), max(times.values())) for _ in range(kills))
    return [str(min((path for path in made if times[path] >= moment), key=lambda path: times[path]).relative_to(whole)) for moment in drawn]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="chapters, such as 2a,2b; by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/kill-study"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    from periplus.machine import commit, environment

    shutil.rmtree(options.out, ignore_errors=True)
    data, chance, kills = write_data(options.out), random.Random(options.seed), []
    began = time.time()
    whole = begin(data, options.out / "whole", options.only)
    if whole.wait():
        raise SystemExit(whole.stderr.read())
    length = time.time() - began
    print(f"undisturbed: {length:.0f} s", flush=True)
    for awaited in moments(options.out / "whole", options.kills, chance):
        study, began = begin(data, options.out / "killed", options.only), time.time()
        while study.poll() is None and not (options.out / "killed" / awaited).exists():
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1))
        if study.poll():
            raise SystemExit(f"the resumed study failed: {study.stderr.read()}")
        stages = options.out / "killed" / "stages"
        done = sorted(p.stem for p in stages.glob("*.json")) if stages.is_dir() else []
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end in that second
            os.killpg(study.pid, signal.SIGKILL)
        study.wait()
        kills.append({"awaited": awaited, "after_seconds": round(time.time() - began, 1), "stages_done": done})
        print(f"kill {len(kills)} at {awaited}, stages done: {' '.join(done) or 'none'}", flush=True)
    last = begin(data, options.out / "killed", options.only)
    if last.wait():
        raise SystemExit(f"the resumed study failed: {last.stderr.read()}")
    results = [json.loads((options.out / name / "results.json").read_text()) for name in ("whole", "killed")]
    places = differing(*(json.loads(json.dumps(without_times(r)).replace("/killed", "/whole")) for r in results))
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "environment": environment("cpu"),
        "undisturbed_seconds": round(length, 1),
    }
    record |= {"kills": kills, "different": places}
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(kills)} kills, {len(places)} differences", *places[:20], sep="\n")
    return 1 if places else 0


if __name__ == "__main__":
    sys.exit(main())
