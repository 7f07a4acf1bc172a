"""Random numbers that are a function of (seed, stream, index) alone: no generator state is kept or saved.

    1. `hash64(*parts)`                     any words and numbers -> a 64-bit key
    2. `draws(seed, stream, index, count)`  raw 64-bit words of numpy's Philox under that key
    3. `uniforms(...)`                      the same words as floats in [0, 1)

`stream` names the use ("mask", "length"), so that two uses of the same seed and index are independent.
The words come from Philox's `random_raw`, whose output numpy keeps stable between versions (the methods of a
`Generator` may change).
"""

import hashlib
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4096)
def hash64(*parts: str | int) -> int:
    """A 64-bit number from `parts`, the same in every process and version of Python."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draws(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """`count` uniform 64-bit words (uint64); a shorter draw is a prefix of a longer one."""
    key = np.array([hash64(seed, stream), index], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def uniforms(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """`count` floats uniform on [0, 1), multiples of 2**-53 (float64)."""
    return (draws(seed, stream, index, count) >> np.uint64(11)) * 2.0**-53
