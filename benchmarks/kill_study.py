"""Kill a study at random moments, resume it each time, and compare its results with those of a study that nobody disturbed.

    python benchmarks/kill_study.py --kills 10 --out runs/kill-study

Both are of the digits (300 of them, few epochs, all chapters). SIGKILL goes to the whole process group: the study and all its children.
Times differ between any two runs; they, and only they, are left out of the comparison. Writes benchmarks/results/kill_study.json.
"""

from __future__ import annotations

import argparse
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


def begin(data: Path, out: Path) -> subprocess.Popen:
    words = ["-m", "periplus", "study", "--data", str(data), "--out", str(out), "--epochs", "2", "--seeds", "2", "--resume"]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-study"))
    options = parser.parse_args()
    from periplus.machine import commit, environment

    shutil.rmtree(options.out, ignore_errors=True)
    data, chance, kills = write_data(options.out), random.Random(options.seed), []
    began = time.time()
    whole = begin(data, options.out / "whole")
    if whole.wait():
        raise SystemExit(whole.stderr.read())
    length = time.time() - began
    print(f"undisturbed: {length:.0f} s", flush=True)
    while len(kills) < options.kills:
        study = begin(data, options.out / "killed")
        wait = chance.uniform(1, 0.5 * length)
        try:
            if study.wait(wait):
                raise SystemExit(f"the resumed study failed: {study.stderr.read()}")
            (options.out / "killed" / "results.json").unlink()  # it got to its end: its last stages again, for the kills that are left
            shutil.rmtree(options.out / "killed" / "stages")
        except subprocess.TimeoutExpired:
            stages = options.out / "killed" / "stages"
            done = sorted(p.stem for p in stages.glob("*.json")) if stages.is_dir() else []
            os.killpg(study.pid, signal.SIGKILL)
            study.wait()
            kills.append({"after_seconds": round(wait, 1), "stages_done": done})
            print(f"kill {len(kills)} after {wait:.0f} s, stages done: {' '.join(done) or 'none'}", flush=True)
    last = begin(data, options.out / "killed")
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
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(kills)} kills, {len(places)} differences", *places[:20], sep="\n")
    return 1 if places else 0


if __name__ == "__main__":
    sys.exit(main())
