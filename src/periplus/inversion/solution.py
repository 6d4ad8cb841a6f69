"""What an inversion found: every endpoint, what it is, what bounds it, and which of them are one minimum."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from periplus.inversion.certificates import DECREASE, FLAT, NEIGHBOURHOOD, Kind
from periplus.inversion.clusters import CODE_TOLERANCE, IMAGE_TOLERANCE
from periplus.inversion.domains import Domain


@dataclass(frozen=True)
class Minimum:
    """One of an image's distinct minima: code (d,), squared error, what it is, and the share of the image's starts that ended there."""

    z: Tensor
    error: float
    kind: Kind
    starts: int
    frequency: float

    def to_dict(self) -> dict[str, Any]:
        return {"error": self.error, "kind": self.kind.name.lower(), "starts": self.starts, "frequency": self.frequency}


@dataclass(frozen=True)
class Inversion:
    """Codes of B images from S starts each, in d dimensions. Errors are squared, summed over pixels, in float64, without any prior term.

    Attributes:
        z: (B, d) the code of lowest objective. error: (B,) its squared error. A start that escaped wins only where all did.
        all_z: (B, S, d); all_error: (B, S).
        gradient_norm: (B, S) the norm of the smallest convex combination of gradients near z (one gradient at a smooth point), for a ball its part
            along the boundary where f falls outwards; zero at a minimum. relative_slope: the same over sqrt(2 L f), free of units.
        min_eigenvalue: (B, S) of the exact Hessian on the tangent space of kink and boundary; infinite at a vertex, where none is left.
        eigenvalue_ratio: smallest over largest. kink_codimension: (B, S) directions across the kink, as far as
            the gradients that were needed tell them: a lower bound.
        sampled_slope: (B, S) the lowest slope over the sampled directions.
        kind: (B, S) of `Kind`. converged: (B, S) whether that is a minimum (smooth, kink, boundary, flat).
        cluster, image_cluster: (B, S) which starts ended at the same code, in the same image; 0 holds the lowest error.
        best: (B,) which start gave z. kept: (B, S) whether a start was searched to its end (always, unless keep="best" dropped it).
        domain: where the search looked.
    """

    z: Tensor
    error: Tensor
    all_z: Tensor
    all_error: Tensor
    gradient_norm: Tensor
    relative_slope: Tensor
    min_eigenvalue: Tensor
    eigenvalue_ratio: Tensor
    kink_codimension: Tensor
    sampled_slope: Tensor
    kind: Tensor
    converged: Tensor
    cluster: Tensor
    image_cluster: Tensor
    best: Tensor
    kept: Tensor
    domain: Domain

    def __len__(self) -> int:
        return len(self.z)

    def minima(self, image: int, converged_only: bool = True) -> list[Minimum]:
        """Distinct minima of one image by code, lowest error first, with the share of its starts that each drew (an estimate of its basin's size)."""
        found = []
        for number in range(int(self.cluster[image].max()) + 1):
            members = (self.cluster[image] == number) & (self.converged[image] | (not converged_only)) & self.kept[image]
            if bool(members.any()):
                starts = members.nonzero()[:, 0]
                best = int(starts[self.all_error[image, starts].argmin()])
                error, kind = float(self.all_error[image, best]), Kind(int(self.kind[image, best]))
                found.append(Minimum(self.all_z[image, best], error, kind, len(starts), len(starts) / self.kind.shape[1]))
        return found

    def count(self, kind: Kind) -> int:
        """How many starts ended as this kind."""
        return int(((self.kind == kind) & self.kept).sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: per image the best error, its kind and all distinct minima; over all the kinds, and the thresholds that decided. No codes."""
        images = []
        for index in range(len(self)):
            minima = self.minima(index)
            kind = Kind(int(self.kind[index, self.best[index]]))
            images.append(
                {"error": float(self.error[index]), "kind": kind.name.lower(), "distinct": len(minima), "minima": [m.to_dict() for m in minima]}
            )
        return {
            "domain": self.domain.to_dict(),
            "starts": self.kind.shape[1],
            "mean_error": float(self.error.mean()),
            "converged": float(self.converged[self.kept].double().mean()),
            "kinds": {kind.name.lower(): self.count(kind) for kind in Kind},
            "thresholds": {
                "decrease": DECREASE,
                "neighbourhood_rms": NEIGHBOURHOOD,
                "flat_ratio": FLAT,
                "same_code_rms": CODE_TOLERANCE,
                "same_image_rms": IMAGE_TOLERANCE,
            },
            "images": images,
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, on the CPU."""
        return {field.name: value.cpu().contiguous() for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


def join(parts: list[Inversion]) -> Inversion:
    """One inversion of all images of several, in their order."""
    names = [field.name for field in fields(Inversion) if field.name != "domain"]
    return Inversion(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, domain=parts[0].domain)
