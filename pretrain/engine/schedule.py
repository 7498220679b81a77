"""The learning rate as a function of samples seen: a change of batch or world size does not move it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warmup over `warmup` samples, then a half cosine to zero at `total` samples, or constant until `cooldown`
    samples before it, where it falls by the square root of what is done (arXiv 2405.18392)."""

    kind: str
    peak: float
    warmup: int
    total: int
    cooldown: int = 0

    def lr(self, samples: int, batch: int) -> float:
        """The rate of the step that trains samples `samples` .. `samples + batch`."""
        if samples < self.warmup:
            return self.peak * min(1.0, (samples + batch) / self.warmup)
        if self.kind == "constant":
            return self.peak * (1 - math.sqrt(self.cooled(samples)))
        progress = (samples - self.warmup) / max(1, self.total - self.warmup)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def cooled(self, samples: int) -> float:
        """The share of the cooldown that is done, 0 to 1."""
        done = samples - (self.total - self.cooldown)
        return min(1.0, max(0.0, done / self.cooldown)) if self.cooldown else 0.0
