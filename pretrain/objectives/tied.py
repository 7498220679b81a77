"""An order by value, and among equals by hash: the same at any world size and in any tiles."""

from __future__ import annotations

import torch

NONE = torch.iinfo(torch.int64).min  # below every key
LOW = (1 << 32) - 1  # the lower half of a hash
# The increment and the finaliser of SplitMix64 (Steele, Lea, Flood 2014, OOPSLA), as signed 64-bit integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def hashes(seeds: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """64 random bits for each of `seeds` `[b]` with each of `numbers` `[n]`, all int64: `[b, n]`. They are outputs
    number `numbers` of SplitMix64 generators that start at `seeds`."""
    bits = seeds[:, None] + (numbers * _INCREMENT)[None]
    bits = (bits ^ _shifted(bits, 30)) * _MULTIPLIERS[0]
    bits = (bits ^ _shifted(bits, 27)) * _MULTIPLIERS[1]
    return bits ^ _shifted(bits, 31)


def halves(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower 32 of 64 bits, as numbers from 0."""
    return _shifted(bits, 32), bits & LOW


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, fp32, of 32 random bits each: the largest of logits with it added is a draw by their softmax."""
    uniform = (bits.float() + 0.5) * 2.0**-32  # fine near 0, where the noise is large
    return -torch.log(-torch.log1p(-uniform.clamp_(max=1 - 2.0**-24)))


def keys(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """int64 keys ordered as the fp32 `values` are, and where these are equal as the 32 `bits`. What is not a number is
    above all others."""
    raw = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = raw ^ ((raw >> 31) & 0x7FFFFFFF)  # negative floats grow with their magnitude as integers do not
    return (ordered.long() << 32) | bits


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Bits moved to the right, zeros coming in: torch's shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
