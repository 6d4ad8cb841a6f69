"""How soon the explorer answers: decoding, the first sight of a race, certificates, a path, all asked over HTTP as the page does.

    PERIPLUS_DATA=/folder/with/mnist python benchmarks/explorer.py --run runs/wgan-d64

decode       one code, and two (what a drag asks for), `--repeat` times, alone and while an inversion is running
inversion    `--images` test images, 16 starts: seconds from the request to the first picture of the race, to the first certificates, to the end
path         between the codes found: seconds to the first path, to the converged one
start        seconds from starting the process to its first page, and to its first list of runs
export       bytes of the page with six images, and the largest error of a pixel (with --export)

Writes benchmarks/results/explorer.json. Timings belong to the machine and the load that the file names.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import periplus
from periplus.files import write_atomically
from periplus.machine import environment

RESULTS = Path(__file__).parent / "results"


class Client:
    """One kept connection, as a browser has."""

    def __init__(self, port: int) -> None:
        self.port, self.line = port, http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, method: str, path: str, record: Any = None) -> Any:
        headers = {"Content-Type": "application/json"} if record is not None else {}
        for again in (False, True):
            try:
                self.line.request(method, path, json.dumps(record) if record is not None else None, headers)
                return json.loads(self.line.getresponse().read())
            except (http.client.HTTPException, ConnectionError):
                if again:
                    raise
                self.line.close()

    def follow(self, job: str, begun: float) -> tuple[list[tuple[float, dict[str, Any]]], dict[str, Any]]:
        """Every frame of a job with the second at which it came, and its end."""
        frames, after = [], -1
        while True:
            record = self.ask("GET", f"/api/jobs/{job}?after={after}")
            if record["version"] > after and record["frame"]:
                frames.append((time.perf_counter() - begun, record["frame"]))
            after = record["version"]
            if record["state"] in ("done", "failed", "stopped"):
                return frames, record


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "max": ordered[-1]}


def decode(client: Client, codes: list[list[float]], repeat: int) -> dict[str, dict[str, float]]:
    found = {}
    for count in (1, 2):
        seconds = []
        for _ in range(repeat):
            begun = time.perf_counter()
            client.ask("POST", "/api/decode", {"codes": codes[:count]})
            seconds.append(1000 * (time.perf_counter() - begun))
        found[f"{count}_codes_ms"] = spread(seconds)
    return found


def race(client: Client, index: int) -> tuple[dict[str, Any], Any, str]:
    begun = time.perf_counter()
    told = client.ask("POST", "/api/invert", {"index": index})
    frames, ended = client.follow(told["job"], begun)
    certified = next((seconds for seconds, frame in frames if frame["stage"] == "certificate"), None)
    seconds = {"first_picture": frames[0][0], "first_certificates": certified, "end": time.perf_counter() - begun, "pictures": len(frames)}
    return seconds, ended["result"], told["image"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("runs/wgan-d64"))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--export", action="store_true")
    options = parser.parse_args()
    begun = time.perf_counter()
    command = [sys.executable, "-m", "periplus", "explore", str(options.run), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["address"]
            client = Client(int(re.search(r":(\d+)/", address)[1]))  # type: ignore[index]
            client.line.request("GET", "/")
            client.line.getresponse().read()
            start = {"first_page_s": time.perf_counter() - begun}
            client.ask("GET", "/api/runs")
            start["first_runs_s"] = time.perf_counter() - begun
            client.ask("GET", "/api/axes")
            codes = client.ask("GET", "/api/samples?count=2")["codes"]
            time.sleep(5)  # what the first visitor will ask for is being computed
            record: dict[str, Any] = {"start": start, "decode": decode(client, codes, options.repeat)}
            races = [race(client, index) for index in range(options.images)]
            record["inversion_s"] = [seconds for seconds, _, _ in races]
            record["path_s"] = []
            for (_, a, x), (_, b, y) in zip(races[:-1], races[1:], strict=True):
                begun = time.perf_counter()
                ends = [one["codes"][one["best"]] for one in (a, b)]
                frames, ended = client.follow(client.ask("POST", "/api/path", {"codes": ends, "images": [x, y]})["job"], begun)
                record["path_s"].append({"first": frames[0][0], "converged": frames[-1][0], "status": ended["result"]["status"]})
            busy = Client(client.port)
            job = busy.ask("POST", "/api/invert", {"index": 20})["job"]
            time.sleep(0.5)
            record["decode_while_inverting"] = decode(client, codes, options.repeat // 4)
            busy.ask("DELETE", f"/api/jobs/{job}")
        finally:
            process.terminate()
    if options.export:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "periplus", "explore", str(options.run), "--export", f"{folder}/page.html", "--json"]
            told = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
        record["export"] = {name: told[name] for name in ("bytes", "images", "paths", "largest_error")}
    run = periplus.load_run(options.run)
    about = {"model": run.config.model, "architecture": run.config.architecture, "latent_dim": run.config.latent_dim, "data": run.data.source}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    whole = {"command": shlex.join(["python", *sys.argv]), "environment": environment("cpu"), "load_average": load, "run": about, **record}
    write_atomically(RESULTS / "explorer.json", json.dumps(whole, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
