"""The open_clip layout: `open_clip_config.json` and `open_clip_model.safetensors`, read by `local-dir:` names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip import CustomTextCLIP
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import save_file

from pretrain.towers.build import DualEncoder

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def native_state(model: DualEncoder) -> dict[str, torch.Tensor]:
    """fp32 tensors by open_clip's native keys, logit scale 0-dim and capped.

    A text tower of open_clip's own loses the `text.` of CustomTextCLIP: that class reads native keys, while the plain
    class does not read `text.` ones.
    """
    state = {key: value.detach().float().contiguous() for key, value in model.export_state().items()}
    if isinstance(model.clip, CustomTextCLIP):
        native = {key.removeprefix("text."): value for key, value in state.items()}
        if convert_to_custom_text_state_dict(native).keys() == state.keys():
            return native
    return state


def activation(model: DualEncoder) -> str:
    """`quick_gelu` or `gelu`. Weights do not tell: loaded under the other one they give wrong features silently."""
    return "quick_gelu" if model.spec.model_cfg.get("quick_gelu", False) else "gelu"


def write(model: DualEncoder, folder: Path) -> None:
    """Write the layout into `folder`, the files of a Hugging Face tokenizer included where the text tower has one."""
    spec = model.spec
    config = {
        "model_cfg": {**spec.model_cfg, "quick_gelu": activation(model) == "quick_gelu"},
        "preprocess_cfg": spec.preprocess_cfg,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(native_state(model), folder / WEIGHTS, metadata={"format": "pt", "activation": activation(model)})
    if spec.model_cfg["text_cfg"].get("hf_tokenizer_name"):
        model.tokenize.library.save_pretrained(folder)  # open_clip reads it from there, whatever the name says
