"""One HTML file of the explorer: weights, images, races and passages in it, decoded by JavaScript in any browser, from a disk or a course's site.

Weights are 16-bit integers, one scale for each row: half the bytes of float32, and at the same size closer than float16, whose steps are relative to
each weight while images feel them relative to the largest. Batch norm is folded into the layer before it, and the permutation to channels last into
its rows. What the browser will compute is computed here once, from the rounded weights, and compared with the run's own decoder: a page is only
written if no pixel of the probes differs by more than a 255th.

Data travel as JSON in a script element that is not run; the one script and the one style sheet are let in by their hashes, and nothing may be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from periplus import __version__
from periplus.errors import UsageError
from periplus.explorer.parts import PARTS, page_part
from periplus.explorer.terrain import Terrain, listed, packed, whitening
from periplus.files import write_atomically
from periplus.inversion.domains import make_domain
from periplus.locating import has_prior, radius_of
from periplus.networks import FeatureMap
from periplus.paths import minimal_path
from periplus.runs import Run

#: Frames that are kept of a race.
FRAMES = 16
PROBES = 64
#: A pixel of the exported decoder may differ by so much.
TOLERANCE = 1 / 255
POLICY = "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data: blob:; base-uri 'none'; form-action 'none'"

Layer = dict[str, Any]
Note = Callable[[str], None] | None


def write_page(terrain: Terrain, path: Path, images: int, command: str, note: Note = None) -> dict[str, Any]:
    """Write the explorer of a run as one file.

    Args:
        images: of the split, one of each class first; their races and all passages between them are computed now. command: what made it.
        note: told what is being done.

    Returns bytes, images, paths and largest_error, of a pixel. Raises UsageError for decoders that the page cannot compute.
    """
    if not 0 <= images <= 20:
        raise UsageError(f"--images is {images}: from 0 to 20 can be exported")
    layers, error = export_layers(terrain.run)
    gallery = [located(terrain, index, note) for index in first_of_classes(terrain, images)]
    if note and gallery:
        note(f"searching {len(gallery) * (len(gallery) - 1) // 2} paths")
    paths = passages_between(terrain, gallery)
    page = {
        "version": __version__,
        "command": command,
        "run": {**terrain.about(), "axes": terrain.axes.record(), "images": len(gallery), "no_images": False},
        "root": None if has_prior(terrain.run) else listed(whitening(terrain.run, terrain.latent_dim, terrain.search.seed)[1]),
        "radius": radius(terrain),
        "layers": layers,
        "gallery": [{name: value for name, value in record.items() if not name.startswith("_")} for record in gallery],
        "paths": paths,
    }
    content = assemble(page)
    write_atomically(path, content)
    return {"file": str(path), "bytes": len(content.encode()), "images": len(gallery), "paths": len(paths), "largest_error": error}


def assemble(page: dict[str, Any]) -> str:
    """The page with its parts and these data in it."""
    style = page_part("explorer.css")
    script = "\n".join(page_part(name) for name in PARTS if name.endswith(".js"))
    data = json.dumps(page, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    html = page_part("index.html")
    html = re.sub(r'<script src="[^"]+" defer></script>\n', "", html)
    policy = POLICY.format(script=digest(script), style=digest(style))
    html = html.replace('<link rel="icon" href="data:,">\n', "")
    html = html.replace('<link rel="stylesheet" href="explorer.css">', f"<style>{style}</style>")
    html = html.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">')
    ending = f'<script type="application/json" id="embedded">{data}</script>\n<script>{script}</script>\n</body>'
    return html.replace("</body>", ending)


def digest(text: str) -> str:
    """The hash by which a content security policy knows an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- what is computed beforehand ------------------------------------------------------------------------------------------------------------


def first_of_classes(terrain: Terrain, count: int) -> list[int]:
    """Positions of the first image of each class, then of the first others, in the order of the split."""
    data = terrain.data
    if data is None:
        return []
    firsts = [] if data.labels is None else [int((data.labels == k).nonzero()[0]) for k in data.labels.unique().tolist()]
    return sorted([*firsts, *(k for k in range(len(data)) if k not in firsts)][:count])


def located(terrain: Terrain, index: int, note: Note) -> dict[str, Any]:
    """An image with the race of its starts and what it came to."""
    targets = terrain.target(index)
    if note:
        note(f"inverting {targets.names[0]}")
    frames: list[dict[str, Any]] = []
    ending = terrain.race(targets, terrain.run.decode, lambda frame: frames.append(frame()))
    last = len(frames) - 1
    kept = sorted({round(last * (k / (FRAMES - 1)) ** 2) for k in range(FRAMES)}) if frames else []  # most happens early
    minima = ending["minima"]
    best = minima[0]["code"] if minima and minima[0]["error"] <= 1.0001 * ending["errors"][ending["best"]] else ending["codes"][ending["best"]]
    return {
        "index": index,
        "name": targets.names[0],
        "label": targets.labels[0],
        "image": packed(targets.images)[0],
        "frames": [slim({name: value for name, value in frames[k].items() if name != "images"}) for k in kept],
        "ending": {
            **{name: value for name, value in ending.items() if name != "images"},
            "minima": [{name: value for name, value in minimum.items() if name != "picture"} for minimum in minima],
        },
        "_code": best,
        "_image": targets.images[0],
    }


def slim(frame: dict[str, Any]) -> dict[str, Any]:
    """A frame with codes of four decimals: they are only looked at."""
    return {**frame, "codes": [[round(value, 4) for value in code] for code in frame["codes"]]}


def passages_between(terrain: Terrain, gallery: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The least-cost paths found between all images, nodes and what is known of each."""
    pairs = [(a, b) for a in range(len(gallery)) for b in range(a + 1, len(gallery)) if bool((gallery[a]["_image"] != gallery[b]["_image"]).any())]
    if not pairs:
        return []
    codes = torch.tensor([record["_code"] for record in gallery])
    images = torch.stack([record["_image"] for record in gallery]).float() / 255
    first, second = (torch.tensor([pair[k] for pair in pairs]) for k in (0, 1))
    found = minimal_path(
        terrain.run.decode, codes[first], codes[second], images[first], images[second], lipschitz=terrain.lipschitz, seed=terrain.search.seed
    )
    names = ("cost", "straight_cost", "lower_bound", "converged", "status", "distance", "image_distance", "minima")
    return [
        {"nodes": listed(points), "told": {name: record[name] for name in names}} for points, record in zip(found.points, found.record(), strict=True)
    ]


def radius(terrain: Terrain) -> float:
    """Of the ball that is searched."""
    asked = radius_of(terrain.run, terrain.search, terrain.pool)
    return make_domain("ball", terrain.latent_dim, asked, None).radius


# ---- the decoder ----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def export_layers(run: Run) -> tuple[list[Layer], float]:
    """A run's decoder as layers for `page/network.js`, and the largest difference of a pixel from the run's own over some codes.

    Raises UsageError for a decoder of other layers, or one whose layers in order do not compute what it does.
    """
    layers = chain_of(run)
    probe = run.sample_codes(PROBES, 0).cpu()
    own = run.decode(probe.to(run.device)).cpu().flatten(1)
    rounded = [quantised(layer) for layer in layers]
    found = compute(rounded, probe)
    if found.shape != own.shape or not float((found - own).abs().max()) <= TOLERANCE:
        raise UsageError(f"{run.path}: this decoder cannot be exported: its layers in order do not compute what it does; use 'periplus explore RUN'")
    return [encoded(layer) for layer in rounded], float((found - own).abs().max())


def chain_of(run: Run) -> list[Layer]:
    """Layers in order, batch norm folded, features in the order (C, H, W). Raises UsageError for what page/network.js has no function for."""
    shape: tuple[int, ...] = (run.config.latent_dim,)
    layers: list[Layer] = []
    for module in leaves(run.decoder):
        if isinstance(module, nn.Linear):
            layers.append({"kind": "linear", "in": module.in_features, "out": module.out_features, **affine(module)})
            shape = (module.out_features,)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            layers.append(convolution(module, shape, run))
            shape = (layers[-1]["out"], layers[-1]["outHeight"], layers[-1]["outWidth"])
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            fold(layers[-1], module)
        elif isinstance(module, nn.LeakyReLU | nn.ReLU):
            layers.append({"kind": "leaky", "slope": getattr(module, "negative_slope", 0.0)})
        elif isinstance(module, FeatureMap):
            height, width, channels = module.shape
            reorder(layers, torch.arange(height * width * channels).view(height, width, channels).permute(2, 0, 1).reshape(-1))
            shape = (channels, height, width)
        elif isinstance(module, nn.Unflatten):
            shape = tuple(module.unflattened_size)
        elif isinstance(module, nn.Sigmoid):
            layers.append({"kind": "sigmoid"})
        elif not isinstance(module, nn.Dropout | nn.Identity | nn.Flatten):
            raise UsageError(f"{run.path}: a decoder with {type(module).__name__} cannot be exported: use 'periplus explore RUN'")
    with torch.no_grad():
        probe = run.sample_codes(2, 0)
        needs = not torch.allclose(compute(layers, probe.cpu()), run.decode(probe).cpu().flatten(1), atol=1e-3)
    return [*layers, {"kind": "sigmoid"}] if needs else layers  # a sigmoid outside the modules: in forward, or of a Bernoulli likelihood


def leaves(module: nn.Module) -> list[nn.Module]:
    """Modules without children, in order."""
    return [layer for layer in module.modules() if not list(layer.children())]


def affine(module: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> Layer:
    """Weights and biases, on the CPU; zeros for an absent bias."""
    weight = module.weight.detach().float().cpu().contiguous()
    outputs = weight.shape[1] if isinstance(module, nn.ConvTranspose2d) else weight.shape[0]
    bias = torch.zeros(outputs) if module.bias is None else module.bias.detach().float().cpu()
    return {"weight": weight.clone(), "bias": bias.clone()}


def convolution(module: nn.Conv2d | nn.ConvTranspose2d, shape: tuple[int, ...], run: Run) -> Layer:
    """A convolution of an image of this shape. Raises UsageError for other kinds than square kernels with equal strides and paddings."""
    turned = isinstance(module, nn.ConvTranspose2d)
    kernel, stride, padding = (set(getattr(module, name)) for name in ("kernel_size", "stride", "padding"))
    plain = all(len(values) == 1 for values in (kernel, stride, padding)) and set(module.dilation) == {1} and module.groups == 1
    if not plain or module.padding_mode != "zeros" or any(module.output_padding) or len(shape) != 3:
        raise UsageError(f"{run.path}: a decoder with such convolutions cannot be exported: use 'periplus explore RUN'")
    (k,), (s,), (p,) = kernel, stride, padding
    height, width = ((side - 1) * s - 2 * p + k if turned else (side + 2 * p - k) // s + 1 for side in shape[1:])
    return {
        "kind": "deconv" if turned else "conv",
        "in": module.in_channels,
        "out": module.out_channels,
        "kernel": k,
        "stride": s,
        "padding": p,
        "height": shape[1],
        "width": shape[2],
        "outHeight": height,
        "outWidth": width,
        **affine(module),
    }


def fold(layer: Layer, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """Put a batch norm (evaluation mode) into the affine layer before it."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = (norm.running_var.cpu().double() + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.cpu().double())
    shift = 0 if norm.bias is None else norm.bias.cpu().double()
    outward = (1, -1, 1, 1) if layer["kind"] == "deconv" else (-1, *(1,) * (layer["weight"].dim() - 1))
    layer["weight"] = (layer["weight"].double() * scale.view(outward)).float()
    layer["bias"] = ((layer["bias"].double() - norm.running_mean.cpu().double()) * scale + shift).float()


def reorder(layers: list[Layer], order: Tensor) -> None:
    """Put the outputs of the last affine layer into another order; activations in between act on each by itself."""
    layer = next(layer for layer in reversed(layers) if "weight" in layer)
    layer["weight"], layer["bias"] = layer["weight"][order], layer["bias"][order]


def quantised(layer: Layer) -> Layer:
    """Weights (rows first) as 16-bit integers times a scale for each row."""
    if "weight" not in layer:
        return layer
    weight = layer["weight"]
    rows = weight.reshape(len(weight), -1)
    scale = (rows.abs().amax(1) / 32767).clamp(min=1e-30)
    whole = (rows / scale[:, None]).round().clamp(-32767, 32767).to(torch.int16)
    return {**layer, "integers": whole, "scale": scale, "weight": (whole.float() * scale[:, None]).view_as(weight)}


def encoded(layer: Layer) -> Layer:
    """A rounded layer, JSON-ready: base64 of little-endian bytes."""
    if "weight" not in layer:
        return layer
    told = {name: value for name, value in layer.items() if name != "integers"}
    kinds = {"weight": (layer["integers"], "<i2"), "scale": (layer["scale"], "<f4"), "bias": (layer["bias"], "<f4")}
    return {**told, **{name: base64.b64encode(value.numpy().astype(kind).tobytes()).decode() for name, (value, kind) in kinds.items()}}


def compute(layers: list[Layer], x: Tensor) -> Tensor:
    """What page/network.js computes, (n, pixels) of codes (n, d)."""
    for layer in layers:
        if layer["kind"] == "linear":
            x = functional.linear(x.flatten(1), layer["weight"], layer["bias"])
        elif layer["kind"] in ("conv", "deconv"):
            turn = functional.conv2d if layer["kind"] == "conv" else functional.conv_transpose2d
            image = x.view(len(x), layer["in"], layer["height"], layer["width"])
            x = turn(image, layer["weight"], layer["bias"], stride=layer["stride"], padding=layer["padding"])
        elif layer["kind"] == "leaky":
            x = functional.leaky_relu(x, layer["slope"])
        else:
            x = x.sigmoid()
    return x.flatten(1)
