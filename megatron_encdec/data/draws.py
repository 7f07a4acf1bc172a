"""Randomness as a function of a key: no generator state is kept or saved.

    1. `hash64(*parts)`                     any words and numbers -> a 64-bit key
    2. `draws(seed, stream, index, count)`  raw 64-bit words of numpy's Philox under that key
    3. `uniforms(...)`                      the same words as floats in [0, 1)
    4. `permute(n, N, key)`                 a keyed shuffle of 0..N-1, one element at a time

`stream` names the use ("mask", "length"), so that two uses of the same seed and index are independent. The words come
from Philox's `random_raw`, whose output numpy keeps stable between versions (the methods of a `Generator` may change).
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WORD = 2**64 - 1
ROUNDS = 8  # of the Feistel network


@lru_cache(maxsize=4096)
def hash64(*parts: str | int) -> int:
    """A 64-bit key from `parts`, the same in every process and version of Python."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draws(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """`count` uniform 64-bit words (uint64); a shorter draw is a prefix of a longer one."""
    key = np.array([hash64(seed, stream), index], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def uniforms(seed: int, stream: str, index: int, count: int) -> np.ndarray:
    """`count` floats uniform on [0, 1), multiples of 2**-53 (float64)."""
    return (draws(seed, stream, index, count) >> np.uint64(11)) * 2.0**-53


def permute(position: int, size: int, key: int) -> int:
    """Where `position` goes in the shuffle of [0, size) under the 64-bit `key`: a bijection for each key. An
    alternating Feistel network permutes [0, 2**b), the smallest such range that holds `size`; walking its cycle until
    it returns below `size` makes of it a permutation of [0, size) (Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002)."""
    if not 0 <= position < size:
        raise ValueError(f"position {position} is outside [0, {size})")
    bits, keys = max(2, (size - 1).bit_length()), _round_keys(key)
    halves = (bits // 2, bits - bits // 2)
    value = _feistel(position, halves, keys)
    while value >= size:
        value = _feistel(value, halves, keys)
    return value


def _feistel(value: int, halves: tuple[int, int], keys: Sequence[int]) -> int:
    """One pass over [0, 2**sum(halves))."""
    left_bits, right_bits = halves
    left_mask, right_mask = (1 << left_bits) - 1, (1 << right_bits) - 1
    left, right = value >> right_bits, value & right_mask
    for i in range(0, ROUNDS, 2):
        left = left ^ (_mix(right ^ keys[i]) & left_mask)
        right = right ^ (_mix(left ^ keys[i + 1]) & right_mask)
    return (left << right_bits) | right


def _mix(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): each bit out depends on each bit in."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


@lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_mix((key + (i + 1) * 0x9E3779B97F4A7C15) & WORD) for i in range(ROUNDS))
