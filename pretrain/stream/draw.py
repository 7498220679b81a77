"""Randomness of one sample: a hash of (seed, epoch, sample id, purpose). No rank, worker or call order enters it."""

import struct
from enum import IntEnum
from typing import NamedTuple

import xxhash

_WORDS, _WORDS_OF_VIEW = struct.Struct("<5Q"), struct.Struct("<6Q")


class Purpose(IntEnum):
    """What a random number is for. The values are part of the frozen hash: never renumber, only append."""

    CAPTION = 1
    CROP = 2
    SUBSTITUTE = 3
    PATCHES = 4
    MIRROR = 5
    COLORS = 6
    WORDS = 7
    MASKED = 8


class Draw(NamedTuple):
    """All random numbers of one sample in one epoch.

    `id` is a u64 that names the sample (its position for substitutes). `view` tells several looks at the same sample
    apart; it enters the hash only where it is not 0.
    """

    seed: int
    epoch: int
    id: int
    view: int = 0

    def bits(self, purpose: Purpose, number: int = 0) -> int:
        """64 random bits, draw `number` of its purpose: xxh3-64 of little-endian u64 words. Frozen: a change
        alters the training data of every run."""
        if self.view:
            return xxhash.xxh3_64_intdigest(_WORDS_OF_VIEW.pack(*self[:3], purpose, number, self.view))
        return xxhash.xxh3_64_intdigest(_WORDS.pack(*self[:3], purpose, number))

    def pair(self, purpose: Purpose, number: int = 0) -> tuple[float, float]:
        """Two independent uniform numbers in [0, 1), of 32 bits each."""
        bits = self.bits(purpose, number)
        return (bits >> 32) * 2.0**-32, (bits & 0xFFFFFFFF) * 2.0**-32

    def numbers(self, purpose: Purpose, count: int) -> list[float]:
        """`count` independent uniform numbers in [0, 1), those of draws 0, 1, ... in turn."""
        pairs = (self.pair(purpose, number) for number in range((count + 1) // 2))
        return [number for pair in pairs for number in pair][:count]

    def signed(self, purpose: Purpose) -> int:
        """`bits` as a tensor's int64 holds them."""
        bits = self.bits(purpose)
        return bits - (1 << 64) if bits >> 63 else bits
