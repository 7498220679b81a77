"""What an image tower makes of single patches, beside the feature that it pools from them."""

from __future__ import annotations

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.clip import ImageTower


def image_tokens(visual: ImageTower, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[n, d]`, not normalised, as `visual` itself gives them, and the states of its tokens `[n, length,
    width]`: patches, or places of a convolutional tower's last map; with patch dropout those that it keeps."""
    if isinstance(visual, TimmModel):
        states = visual.trunk.forward_features(pixels)
        return visual.head(visual.trunk.forward_head(states)), _in_a_row(visual.trunk, states)
    _refuse_silent(visual)
    visual.output_tokens = True
    try:
        return visual(pixels)
    finally:
        visual.output_tokens = False


def image_width(visual: ImageTower) -> int:
    """Numbers of a token's state. Raises UserError where `image_tokens` could not tell them."""
    if isinstance(visual, TimmModel):
        return visual.trunk.num_features
    return _refuse_silent(visual).conv1.out_channels


def _in_a_row(trunk: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Tokens `[n, length, width]` of states, or of a map in timm's order."""
    if states.ndim != 4:
        return states
    return states.flatten(1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else states.flatten(2).mT


def _refuse_silent(visual: ImageTower) -> VisionTransformer:
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise UserError(
            "the image tower does not tell what it makes of single patches",
            got=f"{type(visual).__name__}{' with a pool of attention' if hasattr(visual, 'attn_pool') else ''}",
            expected="a vision transformer, or a tower of timm, which an objective over tokens needs",
        )
    return visual
