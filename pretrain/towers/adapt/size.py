"""Images of another size than the architecture's: the position embeddings are interpolated to their grid.

The parameter keeps its size, and every forward resizes it as open_clip resizes those of loaded weights. A run whose
first phase has small images thus changes nothing that checkpoints, optimizer states or ZeRO's shards hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from data_tools.errors import UserError
from pretrain.config.tree import Phase
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.parts import towers_of


@dataclass(frozen=True)
class SizePhases(Adapter):
    """Lets the image tower take the sizes of all phases of a run."""

    phases: Sequence[Phase]

    def apply(self, model: nn.Module) -> None:
        """Where phases have sizes of their own. Raises UserError where the tower cannot take one."""
        visual = towers_of(model).clip.visual
        sizes = [phase.image_size for phase in self.phases if phase.image_size is not None]
        for size in sizes:
            _check_image_size(visual, size)
        if sizes:
            take_other_sizes(visual)


def take_other_sizes(tower: nn.Module) -> None:
    """Let open_clip's image tower take images of other sizes; its own forward does those of its size, bit for bit."""
    if isinstance(tower, VisionTransformer):
        tower._embeds = MethodType(_embeds, tower)


def _check_image_size(tower: nn.Module, size: int) -> None:
    """Raises UserError where the tower does not take images of `size` pixels."""
    if not isinstance(tower, VisionTransformer):
        raise UserError(
            "the image tower takes images of one size only",
            got=f"{type(tower).__name__}, and model.phases with an image_size",
            expected="a ViT of open_clip's own",
            remedy="leave image_size out of model.phases; patch_dropout makes a phase cheaper too",
        )
    patch = max(tower.patch_size)
    if size % patch:
        raise UserError(
            "an image_size of model.phases is no whole number of patches",
            got=f"{size} pixels, patches of {patch}",
            remedy=f"set {size // patch * patch or patch} or {(size // patch + 1) * patch}",
        )


def _embeds(tower: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Tokens `[n, 1 + patches, width]` of `images` `[n, 3, h, w]`: what stands before the layers."""
    if tuple(images.shape[-2:]) == tuple(tower.image_size):
        return VisionTransformer._embeds(tower, images)
    patches = tower.conv1(images)  # [n, width, rows, columns]
    positions = resized_positions(tower.positional_embedding, tower.grid_size, tuple(patches.shape[-2:]))
    class_token = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat((class_token, patches.flatten(2).transpose(1, 2)), dim=1)
    return tower.ln_pre(tower.patch_dropout(tokens + positions.to(tokens.dtype)))


def resized_positions(embedding: torch.Tensor, grid: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """`[1 + new rows * columns, width]` of `embedding` `[1 + rows * columns, width]`, whose first row is no patch's."""
    first, rest = embedding[:1], embedding[1:]
    planes = rest.float().unflatten(0, grid).permute(2, 0, 1)[None]  # [1, width, rows, columns]
    resized = F.interpolate(planes, new, mode="bicubic", antialias=True)
    return torch.cat((first.float(), resized[0].flatten(1).T))
