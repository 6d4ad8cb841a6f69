"""Measures on matrices of features: pure functions, no files, no networks.

Rows are examples, columns features; `real` is (N, F), `fake` (M, F), and all sums are in float64. What the features are decides what a measure
means: pixels in [0, 1], or what an extractor makes of images, whose name belongs beside every figure.

    neighbours     who lies nearest to whom; votes; the spread of a set
    intervals      proportions and means with what bounds them
    frechet        the Frechet distance of two clouds taken as Gaussians, its standard error, its value at infinitely many rows
    kernel         the kernel distance (KID): unbiased, every pair of rows, with its variance
    support        precision, recall, density, coverage
    classes        how far class shares are from those of the data
    two_sample     can a classifier tell the two apart?
    memorisation   are fakes nearer to the training images than new images are?

Every measure comes with an interval, and its docstring says what the interval is of and what it does not cover.
"""

from periplus.metrics.classes import ClassDistance, Modes, class_distance, class_shares, modes
from periplus.metrics.frechet import (
    Extrapolation,
    FrechetDistance,
    Moments,
    Point,
    frechet_between,
    frechet_distance,
    frechet_distance_infinite,
    moments,
)
from periplus.metrics.intervals import Share, mean_interval, student, welch_interval, wilson_interval
from periplus.metrics.kernel import KernelDistance, kernel_distance
from periplus.metrics.memorisation import CopyingTest, Ratio, data_copying_test, median_ratio, neighbour_ratio
from periplus.metrics.neighbours import Neighbours, mean_pairwise_distance, nearest_neighbours, neighbour_labels
from periplus.metrics.support import Support, precision_recall_density_coverage
from periplus.metrics.two_sample import TwoSampleTest, classifier_two_sample_test

__all__ = [
    "ClassDistance",
    "CopyingTest",
    "Extrapolation",
    "FrechetDistance",
    "KernelDistance",
    "Modes",
    "Moments",
    "Neighbours",
    "Point",
    "Ratio",
    "Share",
    "Support",
    "TwoSampleTest",
    "class_distance",
    "class_shares",
    "classifier_two_sample_test",
    "data_copying_test",
    "frechet_between",
    "frechet_distance",
    "frechet_distance_infinite",
    "kernel_distance",
    "mean_interval",
    "mean_pairwise_distance",
    "median_ratio",
    "modes",
    "moments",
    "nearest_neighbours",
    "neighbour_labels",
    "neighbour_ratio",
    "precision_recall_density_coverage",
    "student",
    "welch_interval",
    "wilson_interval",
]
