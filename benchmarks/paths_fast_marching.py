"""Minimal-cost paths in two dimensions against a solution of the eikonal equation: 200 random pairs, half of them of a smooth decoder.

    python benchmarks/paths_fast_marching.py

Decoders: VAEs trained here on the digits, two latent dimensions, with tanh (smooth) and with leaky rectifiers. Pairs: two codes of the prior with
their exact images. Ours: `minimal_path` with its defaults. Oracle: scikit-fmm's fast marching of |grad T| = c on a grid of 701 x 701 around the ends
(a square of side 2.2 l), from a circle of five cells around the start. The oracle's own error is estimated from a grid of half the spacing on some
pairs. A failure is a path more than 0.2 % dearer than the oracle; each is listed. Then iterations from the straight line for 16, 64 and 256 segments.
Writes benchmarks/results/paths_fast_marching.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import skfmm
import torch
from torch import Tensor, nn

import periplus
from periplus.autoencoders import GaussianHead
from periplus.files import write_atomically
from periplus.machine import environment
from periplus.paths.costs import ImageCost
from periplus.paths.solver import minimise
from periplus.paths.starts import straight
from periplus.runs import codes

RESULTS = Path(__file__).parent / "results"
ALLOWED, GRID, CHECKED = 2e-3, 701, 4


class Decoder(nn.Module):
    """Codes (B, 2) to logits (B, 1, 8, 8)."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 128), activation(), nn.Linear(128, 128), activation(), nn.Linear(128, 64))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).view(-1, 1, 8, 8)


class Encoder(nn.Module):
    """Images to (mean, log_scale)."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), activation()), GaussianHead(128, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.body(x))


def oracle(cost: ImageCost, pair: int, z_a: Tensor, z_b: Tensor, size: int) -> float:
    """T at z_b."""
    centre, half = (z_a + z_b) / 2, 1.1 * float((z_b - z_a).norm())
    axis = torch.linspace(-half, half, size, dtype=torch.float64)
    spacing = float(axis[1] - axis[0])
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1) + centre
    where = torch.tensor([pair])
    c = (cost(grid.reshape(1, -1, 2), where)[0] * cost.scale[pair]).view(size, size)
    radius = 5 * spacing
    circle = (grid - z_a).norm(dim=-1) - radius
    time = skfmm.travel_time(circle.numpy(), 1 / c.numpy(), dx=spacing)
    x, y = ((z_b - centre + half) / spacing).tolist()
    i, j = int(x), int(y)
    u, v = x - i, y - j
    found = (1 - u) * (1 - v) * time[i, j] + u * (1 - v) * time[i + 1, j] + (1 - u) * v * time[i, j + 1] + u * v * time[i + 1, j + 1]
    return float(found + radius * cost(z_a.view(1, 1, 2), where)[0, 0] * cost.scale[pair])


def judge(name: str, activation: type[nn.Module], pairs: int, seed: int) -> dict[str, Any]:
    """Train a decoder, solve its pairs, compare."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = periplus.AutoencoderConfig("vae", latent_dim=2, epochs=60, batch_size=64, beta=0.3, seed=seed)
        run = periplus.train(config, "digits", Path(folder) / "run", networks=(Encoder(activation), Decoder(activation)))
        layers = run.decoder.double()
    decode = lambda z: layers(z.reshape(-1, 2)).sigmoid().reshape(*z.shape[:-1], 1, 8, 8)  # noqa: E731
    z = codes(seed, "pairs", 2 * pairs, 2).double()
    z_a, z_b = z[:pairs], z[pairs:]
    x_a, x_b = decode(z_a).detach(), decode(z_b).detach()
    path = periplus.minimal_path(decode, z_a, z_b, x_a, x_b)
    cost = ImageCost(decode, x_a, x_b)
    truths = [oracle(cost, k, z_a[k], z_b[k], GRID) for k in range(pairs)]
    excess = [u / t - 1 for u, t in zip(path.cost.tolist(), truths, strict=True)]
    finer = [abs(oracle(cost, k, z_a[k], z_b[k], 2 * GRID - 1) / truths[k] - 1) for k in range(CHECKED)]
    steps = {n: float(minimise(straight(z_a, z_b, n), cost, torch.arange(pairs), 2, 1e-3).iterations.double().mean()) for n in (16, 64, 256)}
    worse = [k for k in range(pairs) if excess[k] > ALLOWED]
    return {
        "decoder": name,
        "pairs": pairs,
        "within": pairs - len(worse),
        "failures": [{"pair": k, "excess": excess[k], "z_a": z_a[k].tolist(), "z_b": z_b[k].tolist(), "start": path.start[k]} for k in worse],
        "excess": {"lowest": min(excess), "median": sorted(excess)[pairs // 2], "highest": max(excess)},
        "oracle_error": max(finer),
        "converged": int(path.converged.sum()),
        "several_minima": int((path.minima > 1).sum()),
        "starts": {kind: path.start.count(kind) for kind in sorted(set(path.start))},
        "score": {"path": float(path.score.mean()), "line": float((path.straight_cost / path.floor).mean())},
        "iterations_from_the_line": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = {"tanh": nn.Tanh, "leaky rectifier": nn.LeakyReLU}
    found = [judge(name, activation, options.pairs // 2, options.seed) for name, activation in kinds.items()]
    print(json.dumps(found, indent=1))
    record = {"command": f"python benchmarks/paths_fast_marching.py --pairs {options.pairs} --seed {options.seed}", "allowed_excess": ALLOWED}
    record |= {"grid": GRID, "decoders": found, "environment": environment("cpu")}
    write_atomically(RESULTS / "paths_fast_marching.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
