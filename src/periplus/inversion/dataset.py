"""Whole data sets: finished parts go to a folder, and a killed job goes on where it was.

    job.json                    what the job is: options, shapes, hashes of the images and of what the decoder does with fixed codes
    part-000000.safetensors     all tensors of `Inversion` for the images from that index on

A part is written whole or not at all. Parts have a fixed number of images, and an image's starts are a function of (seed, its index), so the result
does not depend on where a job was interrupted. A folder that holds another job is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from periplus.errors import RunError, UsageError
from periplus.files import discard_leftovers, read_json, write_atomically
from periplus.inversion.domains import DomainName, make_domain
from periplus.inversion.objective import BYTE_BUDGET, Decode, Objective
from periplus.inversion.search import Effort, Keep, Progress, as_targets, draw_starts, invert
from periplus.inversion.solution import Inversion, join
from periplus.inversion.starts import check_initial

JOB = "job.json"
PART = 128


def invert_dataset(
    decode: Decode,
    images: Tensor,
    latent_dim: int,
    folder: str | os.PathLike[str] | None,
    starts: int = 4,
    domain: DomainName = "free",
    *,
    radius: float | None = None,
    prior_weight: float | None = None,
    initial: Tensor | None = None,
    keep: Keep = "best",
    effort: Effort | None = None,
    seed: int = 0,
    part: int = PART,
    byte_budget: int = BYTE_BUDGET,
    progress: Progress | None = None,
    job: Mapping[str, Any] | None = None,
) -> Inversion:
    """`invert` for many images (N, C, H, W), `part` of them at a time, each part written to `folder` when done; parts that are there are not done
    again. With folder=None nothing is kept. The result lies on the CPU.

    The other arguments are those of `invert`. progress: called with (images done, N). job: JSON-ready values of which the caller knows that the
    result depends on them (a hash of the decoder's weights); they become part of what the folder's job is.

    Raises:
        UsageError, NonFiniteError: as `invert`; part < 1. RunError: the folder holds another job, or a part that does not read.
    """
    if part < 1:
        raise UsageError(f"part is {part}: at least one image is needed")
    place, effort = make_domain(domain, latent_dim, radius, prior_weight), effort or Effort()
    targets = as_targets(images, decode, latent_dim)
    options = {"starts": starts, "domain": place.to_dict(), "keep": keep, "effort": dataclasses.asdict(effort), "seed": seed, "part": part}
    if folder is not None:
        _claim(Path(folder), {**options, **_fingerprint(decode, targets, latent_dim, initial), **(job or {})})
    if initial is None:
        initial = draw_starts(Objective(decode, targets.flatten(1), latent_dim, place, byte_budget), starts, effort, seed)
    check_initial(initial, len(targets), starts, latent_dim)
    parts = []
    for first in range(0, len(targets), part):
        some = slice(first, first + part)
        path = None if folder is None else Path(folder) / f"part-{first:06d}.safetensors"
        if path is None or not path.exists():
            found = invert(
                decode, targets[some], latent_dim, starts, domain, radius=radius, prior_weight=prior_weight,
                initial=initial[some], keep=keep, effort=effort, seed=seed, byte_budget=byte_budget,
            ).tensors()  # fmt: skip
            if path is not None:
                write_atomically(path, safetensors.torch.save(found))
        else:
            found = _read(path, len(targets[some]))
        parts.append(found)
        if progress:
            progress(min(first + part, len(targets)), len(targets))
    return join([Inversion(**tensors, domain=place) for tensors in parts])


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Write the job into an empty folder, or see that the folder is of this job."""
    discard_leftovers(folder)
    path = folder / JOB
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no {JOB}: choose another folder")
        write_atomically(path, json.dumps(job, indent=2) + "\n")
        return
    there = read_json(path, "choose another folder, or delete it")
    for key in (*job, *there):
        if job.get(key) != there.get(key):
            raise RunError(f"{folder} holds another job ({key} was {there.get(key)}, is {job.get(key)}): choose another folder, or delete it")


def _fingerprint(decode: Decode, targets: Tensor, latent_dim: int, initial: Tensor | None) -> dict[str, Any]:
    probe = torch.linspace(-2, 2, 4 * latent_dim, dtype=targets.dtype, device=targets.device).reshape(4, latent_dim)
    with torch.no_grad():
        answer = decode(probe).double().cpu()
    # rounded to what threads and batch sizes leave alone
    decoder = [float(f"{float(value):.4g}") for value in (answer.mean(), answer.std(), answer[0].mean(), answer[-1].mean())]
    return {
        "latent_dim": latent_dim,
        "images": list(targets.shape),
        "type": str(targets.dtype),
        "images_sha256": _digest(targets),
        "initial_sha256": None if initial is None else _digest(initial),
        "decoder": decoder,
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _read(path: Path, images: int) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it, and it is made again") from None
    wanted = {field.name for field in dataclasses.fields(Inversion)} - {"domain"}
    if set(tensors) != wanted or len(tensors["z"]) != images:
        raise RunError(f"{path} is not a part of this job: delete it, and it is made again")
    return tensors
