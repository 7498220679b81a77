"""Randomness of one sample: a hash of (seed, epoch, sample id, purpose). No rank, worker or call order enters it."""

import struct
from enum import IntEnum

import numpy as np
import xxhash

_WORDS = struct.Struct("<5Q")


class Purpose(IntEnum):
    """What a random number is for. The values are part of the frozen hash: never renumber, only append."""

    CAPTION = 1
    CROP = 2
    SUBSTITUTE = 3
    PATCHES = 4
    MIRROR = 5
    COLORS = 6
    WORDS = 7


def random_bits(seed: int, epoch: int, sample: int, purpose: Purpose, draw: int = 0) -> int:
    """64 random bits: xxh3-64 of five little-endian u64 words. Frozen: a change alters the training data of every run.

    Args:
        sample: a u64 that names the sample (its id, or its position for substitutes).
        draw: counts the draws of one purpose.
    """
    return xxhash.xxh3_64_intdigest(_WORDS.pack(seed, epoch, sample, purpose, draw))


def random_pair(seed: int, epoch: int, sample: int, purpose: Purpose, draw: int = 0) -> tuple[float, float]:
    """Two independent uniform numbers in [0, 1), of 32 bits each."""
    bits = random_bits(seed, epoch, sample, purpose, draw)
    return (bits >> 32) * 2.0**-32, (bits & 0xFFFFFFFF) * 2.0**-32


def random_numbers(seed: int, epoch: int, sample: int, purpose: Purpose, count: int) -> list[float]:
    """`count` independent uniform numbers in [0, 1), those of draws 0, 1, ... in turn."""
    pairs = (random_pair(seed, epoch, sample, purpose, draw) for draw in range((count + 1) // 2))
    return [number for pair in pairs for number in pair][:count]


def sample_bits(seed: int, epochs: int | np.ndarray, samples: np.ndarray, purpose: Purpose) -> np.ndarray:
    """`random_bits` of each of `samples`, uint64 [n], as int64 [n]. `epochs`: one of all, or one of each."""
    epochs = np.broadcast_to(epochs, samples.shape).tolist()
    bits = [random_bits(seed, *pair, purpose) for pair in zip(epochs, samples.tolist(), strict=True)]
    return np.array(bits, dtype=np.uint64).view(np.int64)
