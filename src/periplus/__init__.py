"""Periplus: deep generative models of small images, trained, measured, located and priced.

    import periplus

    data = periplus.load_data("digits")
    run = periplus.train(periplus.AdversarialConfig("wgan-gp", epochs=50), data, "runs/first")
    images = run.sample(64)          # (64, 1, 8, 8) in [0, 1]

The names below are the front door; the rooms behind it are listed in CONTRIBUTING.md.
"""

from periplus.channels import EchoChannel, GaussianChannel
from periplus.config import AdversarialConfig, AutoencoderConfig
from periplus.data import ImageData, load_data
from periplus.errors import DataError, Interrupted, NonFiniteError, PeriplusError, RunError, UsageError
from periplus.information import MarginalRate, marginal_rate
from periplus.inversion import Inversion, invert
from periplus.metrics import frechet_distance, kernel_distance, precision_recall_density_coverage
from periplus.objectives import gradient_penalty
from periplus.paths import Path, minimal_path, minimal_path_for_cost
from periplus.runs import Run, load_run
from periplus.training import train

__version__ = "0.1.0"

__all__ = [
    "AdversarialConfig",
    "AutoencoderConfig",
    "DataError",
    "EchoChannel",
    "GaussianChannel",
    "ImageData",
    "Interrupted",
    "Inversion",
    "MarginalRate",
    "NonFiniteError",
    "Path",
    "PeriplusError",
    "Run",
    "RunError",
    "UsageError",
    "frechet_distance",
    "gradient_penalty",
    "invert",
    "kernel_distance",
    "load_data",
    "load_run",
    "marginal_rate",
    "minimal_path",
    "minimal_path_for_cost",
    "precision_recall_density_coverage",
    "train",
]
