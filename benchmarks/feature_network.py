"""Make the MNIST feature network that comes with the package, by its recipe, and measure it on the test images.

    python benchmarks/feature_network.py

Writes src/periplus/features/mnist.safetensors and benchmarks/results/feature_network.json. One thread; another machine rounds otherwise, and gets
another hash (to be written into SHIPPED_SHA256) with the same accuracy within its interval.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import periplus
from periplus.features import SHIPPED, train_extractor
from periplus.machine import commit, environment

RESULT = Path(__file__).parent / "results" / "feature_network.json"


def main() -> None:
    torch.set_num_threads(1)
    train, test = periplus.load_data("mnist"), periplus.load_data("mnist", "test")
    began = last = time.perf_counter()

    def tell(step: int, steps: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 30:
            last = time.perf_counter()
            print(f"step {step} of {steps}, {last - began:.0f} s", file=sys.stderr, flush=True)

    made = train_extractor(train, SHIPPED, test=test, on_step=tell)
    record = {
        "command": "python benchmarks/feature_network.py",
        "commit": commit(),
        "environment": environment("cpu"),
        "bytes": SHIPPED.stat().st_size,
        "test_images": len(test),
        "seconds": round(time.perf_counter() - began, 1),
        "extractor": made.record(),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["extractor"], indent=1))


if __name__ == "__main__":
    main()
