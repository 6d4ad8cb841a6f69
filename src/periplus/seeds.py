"""Randomness as a function: a seed for each purpose, so that no draw depends on the draws made before it."""

from __future__ import annotations

import hashlib


def stream(seed: int, *names: str | int) -> int:
    """A seed for the random numbers that these names call for: a pure function of its arguments, different for different ones."""
    key = "/".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
