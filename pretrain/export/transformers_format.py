"""The transformers layout: `CLIPModel` config and weights, `CLIPProcessor` files."""

from __future__ import annotations

import json
from pathlib import Path

from open_clip import SimpleTokenizer
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

from pretrain.export.open_clip_format import activation, native_state
from pretrain.towers.build import DualEncoder
from pretrain.towers.spec import ModelSpec
from pretrain.towers.transformers_keys import transformers_state

WEIGHTS = "model.safetensors"
START, END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of open_clip's <start_of_text>, <end_of_text>

_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers
_PLAIN_BLOCKS = {
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_VISION = {"timm_model_name": None, "attentional_pool": False, "no_ln_pre": False, "pool_type": "tok", **_PLAIN_BLOCKS}
_TEXT = {
    "hf_model_name": None,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
    **_PLAIN_BLOCKS,
}


def obstacle(model: DualEncoder) -> str | None:
    """The first setting of towers that `CLIPModel` cannot express; None: it can."""
    spec = model.spec
    if getattr(model.clip, "logit_bias", None) is not None:
        return "a logit_bias (SigLIP loss), which CLIPModel does not have"
    text = vars(CLIPTextCfg(**spec.model_cfg["text_cfg"]))
    reason = vision_obstacle(spec) or _unlike("text_cfg", text, _TEXT)
    if reason is None and text["vocab_size"] < 49408:
        reason = f"text_cfg.vocab_size = {text['vocab_size']}, fewer than the CLIP tokenizer's 49408"
    return reason


def vision_obstacle(spec: ModelSpec) -> str | None:
    """What of the image tower, or of how pictures are made ready, is not as CLIP's vision transformer has it."""
    vision = vars(CLIPVisionCfg(**spec.model_cfg["vision_cfg"]))
    reason = _unlike("vision_cfg", vision, _VISION)
    if reason is None and not isinstance(vision["layers"], int):
        reason = f"a ResNet (vision_cfg.layers = {vision['layers']})"
    if reason is None and not isinstance(vision["patch_size"], int):
        reason = f"vision_cfg.patch_size = {vision['patch_size']}"
    resize_mode, interpolation = spec.preprocess_cfg["resize_mode"], spec.preprocess_cfg["interpolation"]
    if reason is None and resize_mode not in ("shortest", "squash"):
        reason = f"preprocess_cfg.resize_mode = {resize_mode!r}"
    if reason is None and interpolation not in _RESAMPLE:
        reason = f"preprocess_cfg.interpolation = {interpolation!r}"
    return reason


def _unlike(name: str, values: dict, needed: dict) -> str | None:
    odd = (field for field, value in needed.items() if (values[field] or None) != (value or None))
    return next((f"{name}.{field} = {values[field]!r}" for field in odd), None)


def write(model: DualEncoder, folder: Path) -> None:
    """Write the layout into `folder`. The model must have no obstacle."""
    tokenizer = SimpleTokenizer()
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    specials = dict(zip(("<start_of_text>", "<end_of_text>"), (START, END), strict=True))
    _dump(folder / "config.json", clip_config(model.spec, activation(model)))
    _dump(folder / "preprocessor_config.json", _image_processor(model.spec))
    _dump(folder / "tokenizer_config.json", _tokenizer_config(model.spec.context_length))
    _dump(folder / "special_tokens_map.json", _special_tokens())
    _dump(
        folder / "vocab.json", {specials.get(token, token): index for token, index in tokenizer.encoder.items()}, None
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    state = transformers_state(native_state(model))
    save_file(state, folder / WEIGHTS, metadata={"format": "pt", "activation": activation(model)})


def clip_config(spec: ModelSpec, hidden_act: str) -> dict:
    """CLIPConfig of the towers. `hidden_act` is always written: transformers assumes quick_gelu where it is missing."""
    cfg = spec.model_cfg
    vision, text = CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": cfg["embed_dim"],
        "vision_config": {
            "model_type": "clip_vision_model",
            **_transformer_config(vision, vision.width // vision.head_width, cfg["embed_dim"], hidden_act),
            "image_size": spec.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **_transformer_config(text, text.heads, cfg["embed_dim"], hidden_act),
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
    }


def _transformer_config(tower: CLIPVisionCfg | CLIPTextCfg, heads: int, embed_dim: int, hidden_act: str) -> dict:
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": heads,
        "projection_dim": embed_dim,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
    }


def _image_processor(spec: ModelSpec) -> dict:
    cfg, side = spec.preprocess_cfg, spec.image_size
    square = {"height": side, "width": side}
    squash = cfg["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": side},
        "resample": _RESAMPLE[cfg["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
    }


def _special_tokens() -> dict:
    return {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


def _tokenizer_config(context_length: int) -> dict:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **_special_tokens(),
    }


def _dump(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
