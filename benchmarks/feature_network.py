"""Make the feature networks that come with the package, by their recipe, and measure them on the test images.

    python benchmarks/feature_network.py mnist digits

Writes src/periplus/features/NAME.safetensors and benchmarks/results/feature_network.json. One thread; another machine rounds otherwise, and gets
another hash (to be written into periplus.features.SHIPPED) with the same accuracy within its interval.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import periplus
from periplus.features import SHIPPED, shipped_file, train_extractor
from periplus.machine import commit, environment

RESULT = Path(__file__).parent / "results" / "feature_network.json"


def make(name: str) -> dict[str, object]:
    train, test = periplus.load_data(name), periplus.load_data(name, "test")
    began = last = time.perf_counter()

    def tell(step: int, steps: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 30:
            last = time.perf_counter()
            print(f"{name}: step {step} of {steps}, {last - began:.0f} s", file=sys.stderr, flush=True)

    made = train_extractor(train, shipped_file(name), test=test, on_step=tell)
    return {
        "command": f"python benchmarks/feature_network.py {name}",
        "commit": commit(),
        "environment": environment("cpu"),
        "bytes": shipped_file(name).stat().st_size,
        "test_images": len(test),
        "seconds": round(time.perf_counter() - began, 1),
        "extractor": made.record(),
    }


def main() -> None:
    torch.set_num_threads(1)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in sys.argv[1:] or list(SHIPPED):
        results[name] = make(name)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results[name]["extractor"], indent=1))


if __name__ == "__main__":
    main()
