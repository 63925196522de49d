"""Counter-based randomness: every draw is seeded by what it is for, never by call order.

A seed is a hash of names and numbers such as ``("noise", run seed, iteration, sample id, time index)``. Micro-batch
size, number of processes, evaluation and resumption therefore cannot change a draw.
"""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np


def seed_of(*parts: object) -> int:
    """Hash the purpose of a draw to a seed in [0, 2**63)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeds_of(*parts: object, ids: Iterable[object]) -> list[int]:
    """One seed per id, each as ``seed_of(*parts, id)``."""
    return [seed_of(*parts, each) for each in ids]


def generator(*parts: object) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(seed_of(*parts))
