"""Patch dropout (arXiv 2212.00794) that no world size, micro-batch or replay changes.

open_clip and timm draw the kept patches from the rank's generator, so that they depend on how the batch is split. Here
they follow from 64 random bits of each sample, a hash of (seed, epoch, sample id) that travels with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from data_tools.errors import UserError
from pretrain.config.tree import Phase
from pretrain.objectives.tied import hashes
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.cut import Rows
from pretrain.towers.parts import towers_of


class PatchDropout(nn.Module):
    """Keeps a share of `1 - prob` of each sample's patches, at least one, in their order; in training only.

    `prob` is the architecture's own; `take` is called before each forward. `with_indices`: return what is kept too, as
    towers with rotary positions ask for.
    """

    def __init__(self, prob: float, prefix_tokens: int, with_indices: bool = False):
        super().__init__()
        self.prob, self.prefix_tokens, self.with_indices = prob, prefix_tokens, with_indices
        self._share = prob
        self._bits: torch.Tensor | None = None

    def take(self, rows: Rows) -> None:
        """Go by the rows of these images: `patch_bits`, int64 `[n]`, random for each, and `patch_dropout`, `[]` on the
        host, the share in place of `prob`. Rows that were mined bring bits alone: the share is that of the batch, which
        went before them."""
        self._bits = rows.get("patch_bits")
        if "patch_dropout" in rows:
            self._share = float(rows["patch_dropout"])
        elif self._bits is None:
            self._share = self.prob

    def forward(self, x: torch.Tensor):
        """`[n, prefix + patches, width]` -> `[n, prefix + kept, width]`."""
        kept = None
        if self.training and self._share:
            if self._bits is None:
                raise ValueError("patch dropout needs the random bits of the samples: pass them to the towers' forward")
            prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
            kept = kept_patches(self._bits, patches.shape[1], self._share)
            patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[2]))
            x = torch.cat((prefix, patches), dim=1)
        return (x, kept) if self.with_indices else x


def kept_patches(bits: torch.Tensor, patches: int, prob: float) -> torch.Tensor:
    """Ascending indices `[n, kept]` of the patches that samples with random `bits` `[n]` keep of `patches`.

    SplitMix64's outputs number 1 .. patches of the generator that starts at a sample's bits rank its patches.
    """
    state = hashes(bits, torch.arange(1, patches + 1, device=bits.device))
    kept = max(1, int(patches * (1 - prob)))
    return state.topk(kept, dim=1).indices.sort(dim=1).values


def replace_patch_dropout(tower: nn.Module) -> PatchDropout | None:
    """Put ours in the place of the patch dropout that open_clip or timm built; None where the tower has no such place.
    An open_clip tower always has, for a phase of the run that drops patches."""
    if isinstance(tower, VisionTransformer):
        tower.patch_dropout = PatchDropout(getattr(tower.patch_dropout, "prob", 0.0), prefix_tokens=1)
        return tower.patch_dropout
    for parent in tower.modules():
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, child in children:
            kind = type(child).__name__
            if kind in ("PatchDropout", "PatchDropoutWithIndices"):
                indices = kind == "PatchDropoutWithIndices"
                ours = PatchDropout(child.prob, child.num_prefix_tokens, with_indices=indices)
                setattr(parent, name, ours)
                return ours
    return None


@dataclass(frozen=True)
class PatchPhases(Adapter):
    """Gives every phase of a run, and what comes after the last one, its share of patches that are left out."""

    phases: Sequence[Phase]

    def apply(self, model: nn.Module) -> None:
        """Sets `patch_shares` of the towers. Raises UserError where the tower has no place for a phase's."""
        towers = towers_of(model)
        for phase in self.phases:
            if phase.patch_dropout is not None and towers.patch_dropout is None:
                raise UserError(
                    "the image tower has no place to leave patches out",
                    got=f"model.phases with a patch_dropout of {phase.patch_dropout}",
                    remedy="set patch_dropout in the architecture's vision_cfg too, for what comes after the phases",
                )
        (own,) = towers.patch_shares
        asked = [own if phase.patch_dropout is None else phase.patch_dropout for phase in self.phases]
        towers.patch_shares = [*(share if share or own else None for share in asked), own]
