"""Stacked MNIST: three digits in three channels, a set whose modes can be counted (Metz et al. 2017; the protocol of Lin et al. 2018, PacGAN).

An image has one digit of MNIST in each of its channels; its class is the number that they spell, 100 a + 10 b + c, so there are a thousand classes of
almost equal weight, and a generator that leaves some out is caught by a digit classifier (`periplus.metrics.modes`).

Which digits: drawn with replacement from the same split of MNIST by a fixed seed, so that the set has one content hash everywhere; NumPy's
`RandomState` is used, because its stream is frozen by NumPy's own promise, where that of newer generators may change.

How many: 60,000 for training, as in MNIST itself, so that an epoch means the same, each digit occurs three times and each class sixty times; it takes
60,000 x 3 x 784 bytes = 141 MB. 26,000 for testing, the number of samples at which modes are counted: what the test split shows under the same
classifier is what a perfect generator would show. The literature trains on sets of 26,000 to 128,000, or draws anew for every batch.
"""

from __future__ import annotations

import numpy as np

from periplus.data.formats import Labels, Loaded
from periplus.seeds import stream

CHANNELS = 3


def stack_digits(digits: Loaded, count: int, *names: str) -> Loaded:
    """`count` images uint8 (count, 3, H, W) of three grey digits each, drawn with replacement by a seed for these names, and the numbers they spell.

    digits: images (N, 1, H, W) with labels (N,) of C classes. The classes of the result are C^3 numbers of three digits (for C = 10).
    """
    images, labels, classes = digits.images, digits.labels, digits.classes
    assert labels is not None and images.shape[1] == 1
    drawn = np.random.RandomState(stream(0, *names) % 2**32).randint(len(images), size=(count, CHANNELS))
    spelled: Labels = np.zeros(count, np.int64)
    for channel in range(CHANNELS):
        spelled = spelled * len(classes) + labels[drawn[:, channel]]
    return Loaded(np.ascontiguousarray(images[:, 0][drawn]), spelled, tuple(f"{n:0{CHANNELS}d}" for n in range(len(classes) ** CHANNELS)))
