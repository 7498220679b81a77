"""The k nearest of a bank that comes tile by tile, and their votes. Nothing depends on the order it comes in.

Images that tie at the k-th place share the places that are left: each votes with its part of the weight, which is the
expected vote where they stand in random order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Nearest:
    """Of q queries: `values` fp32 [q, k], the largest cosines so far, falling, and `labels` int64 [q, k] of these;
    `tied` int64 [q, C], how many of each class have exactly the k-th value, of all that came. A cosine of -inf has no
    vote."""

    values: torch.Tensor
    labels: torch.Tensor
    tied: torch.Tensor

    @classmethod
    def none(cls, queries: int, k: int, classes: int, device: torch.device) -> Nearest:
        """Before any came."""
        values = torch.full((queries, k), -torch.inf, device=device)
        labels, tied = (torch.zeros((queries, n), dtype=torch.int64, device=device) for n in (k, classes))
        return cls(values, labels, tied)

    def add(self, cosines: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in `cosines` [q, n] of n images with `labels` int64 [n]."""
        k, several = self.values.shape[1], labels.expand(len(cosines), -1)
        values, at = torch.cat([self.values, cosines], dim=1).topk(k, dim=1)
        last = values[:, -1:]
        rises = last > self.values[:, -1:]
        # Where the k-th value rises, all that have the new one are new or among the first k of before
        again = rises & (self.values == last)
        self.tied.masked_fill_(rises, 0).scatter_add_(1, self.labels, again.long())
        rows, columns = torch.nonzero(cosines == last, as_tuple=True)
        self.tied.index_put_((rows, labels[columns]), torch.ones_like(rows), accumulate=True)
        self.labels = torch.cat([self.labels, several], dim=1).gather(1, at)
        self.values = values

    def votes(self, temperature: float) -> torch.Tensor:
        """fp64 [q, C]: the sum over the k nearest of each class of exp((cosine - largest cosine) / `temperature`)."""
        k = self.values.shape[1]
        values, last = self.values.double(), self.values[:, -1:]
        largest = values[:, :1].clamp(min=-2.0)  # below every cosine: -inf less -inf would be no number
        weights = torch.exp((values - largest) / temperature)
        above = self.values > last
        votes = torch.zeros(self.tied.shape, dtype=torch.float64, device=values.device)
        for place in range(k):  # from the largest on, one after the other: a sum depends on the order of its terms
            column = slice(place, place + 1)
            votes.scatter_add_(1, self.labels[:, column], torch.where(above, weights, 0.0)[:, column])
        left = (k - above.sum(dim=1, keepdim=True)).double()
        part = left / self.tied.sum(dim=1, keepdim=True).clamp(min=1)
        return votes + weights[:, -1:] * part * self.tied
