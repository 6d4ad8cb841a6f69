"""Flip single random bits in the checkpoints of a run, and count how many of the flips verification finds.

    python benchmarks/flip_bits.py RUN --flips 200 --seed 0

RUN is a run folder (or its `checkpoints/`); it is not touched: the flips are made in a copy, one at a time, each undone
before the next. First a file is drawn, every file alike (or else nearly all flips would fall into the large tensors and none
into the manifest), then one of its bits. A flip counts as detected when `verify_checkpoint` raises RunError that names this
very checkpoint. The exit code is 1 if a single one is missed, and the result, with the command, goes into
benchmarks/results/flip_bits.json.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from periplus.checkpoints import list_checkpoints, verify_checkpoint
from periplus.errors import PeriplusError, RunError

RESULTS = Path(__file__).parent / "results" / "flip_bits.json"


def flip(file: Path, bit: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def detected(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except RunError as error:
        return str(checkpoint) in str(error)
    return False


def count_detected(folder: Path, flips: int, seed: int) -> dict[str, object]:
    """Flip bits in the checkpoints of `folder`, in place; raises RunError if one does not verify before or after."""
    files = [file for checkpoint in list_checkpoints(folder) for file in sorted(checkpoint.iterdir())]
    if not files:
        raise RunError(f"{folder}: no checkpoints to flip bits in")
    chance, missed = random.Random(seed), []
    tally = {file.name: {"flips": 0, "detected": 0} for file in files}
    for checkpoint in list_checkpoints(folder):
        verify_checkpoint(checkpoint)
    for _ in range(flips):
        file = chance.choice(files)
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        found = detected(file.parent)
        flip(file, bit)
        tally[file.name]["flips"] += 1
        tally[file.name]["detected"] += found
        if not found:
            missed.append({"file": str(file.relative_to(folder)), "bit": bit})
    for checkpoint in list_checkpoints(folder):
        verify_checkpoint(checkpoint)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    return {"flips": flips, "detected": flips - len(missed), "missed": missed, "by_file": tally, "bytes": sizes, "seed": seed}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    source = arguments.run / "checkpoints" if (arguments.run / "checkpoints").is_dir() else arguments.run
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "checkpoints"
        copy.mkdir()
        for checkpoint in list_checkpoints(source):
            shutil.copytree(checkpoint, copy / checkpoint.name)
        try:
            result = count_detected(copy, arguments.flips, arguments.seed)
        except PeriplusError as error:
            print(str(error).replace(str(copy), str(source)), file=sys.stderr)
            return error.exit_code
    result = {"command": shlex.join(["python", *sys.argv]), **result}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['detected']} of {result['flips']} single-bit flips detected; {arguments.out}")
    return 0 if result["detected"] == result["flips"] else 1


if __name__ == "__main__":
    sys.exit(main())
