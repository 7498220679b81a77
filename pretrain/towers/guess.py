"""Which architectures a bare file of weights fits: names and shapes of its tensors tell all but what they compute."""

from __future__ import annotations

from collections.abc import Mapping

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict

Shapes = Mapping[str, tuple[int, ...]]


def architectures_of(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of open_clip's architectures, with towers of its own, whose tensors are those of `state` by name and shape.
    `ViT-B-32` and `ViT-B-32-quickgelu` are both there: their weights look alike."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    return [name for name in open_clip.list_models() if _alike(shapes, open_clip.get_model_config(name))]


def _alike(shapes: Shapes, cfg: dict) -> bool:
    if "multimodal_cfg" in cfg or "audio_cfg" in cfg:
        return False
    vision, text = CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])
    if vision.timm_model_name or text.hf_model_name or not isinstance(vision.layers, int):
        return False
    own = not any(key.startswith("text.") for key in shapes)
    patch = shapes.get("visual.conv1.weight", ())[2:]
    tokens = shapes.get("token_embedding.weight" if own else "text.token_embedding.weight")
    if patch != (vision.patch_size,) * 2 or tokens != (text.vocab_size, text.width):
        return False
    with torch.device("meta"):
        kind = CustomTextCLIP if cfg.pop("custom_text", False) else CLIP
        wanted = kind(**cfg).state_dict()
    if kind is CustomTextCLIP and own:
        shapes = convert_to_custom_text_state_dict(dict(shapes))
    single = ("logit_scale", "logit_bias")
    return wanted.keys() == shapes.keys() and all(
        key in single or tuple(wanted[key].shape) == shape for key, shape in shapes.items()
    )
