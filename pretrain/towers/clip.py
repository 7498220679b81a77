"""open_clip's two classes of a pair of towers. They have no base in common, and come without type annotations: a type
checker takes what they have for Any."""

from __future__ import annotations

from typing import TypeAlias

from open_clip import CLIP, CustomTextCLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer

Clip: TypeAlias = CLIP | CustomTextCLIP
ImageTower: TypeAlias = VisionTransformer | TimmModel
TextTower: TypeAlias = CLIP | TextTransformer | HFTextEncoder


def text_tower(clip: Clip) -> TextTower:
    """The module that has the text tower's parts: `clip` itself where it is a plain CLIP."""
    return getattr(clip, "text", clip)
