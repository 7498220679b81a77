"""Whether two specs compute alike with the same weights. Heads, activations and pooling are not in the weights: under
another architecture of the same shapes they load without a word and give other features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from data_tools.errors import UserError
from pretrain.towers.spec import ModelSpec

_BLOCKS = (
    *("act_kwargs", "norm_kwargs", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"),
    *("scale_fc", "final_ln_after_pool", "pool_type"),
)
_VISION = ("head_width", "attentional_pool", "attn_pooler_heads", *_BLOCKS)
_TEXT = ("heads", "no_causal_mask", "embed_cls", "pad_id", *_BLOCKS)
_Picture = Literal["mean", "std", "interpolation", "resize_mode"]
_PICTURES: tuple[_Picture, ...] = (
    "mean",
    "std",
    "interpolation",
    "resize_mode",
)


def check_same(weights: ModelSpec, model: ModelSpec, source: str) -> list[str]:
    """Warnings where `model` makes pictures ready in another way than the model `weights` of `source`, whose weights it
    is to take.

    Raises:
        UserError: it would compute something else with them.
    """
    for name, theirs, ours in _settings(weights, model):
        if theirs != ours:
            raise UserError(
                f"model {model.name} would compute other features with the weights of {source} than their own does",
                got=f"{name} {ours!r}",
                expected=repr(theirs),
                remedy="set model.name to the weights' own architecture, such as the path of its open_clip_config.json",
            )
    return [
        f"warning: {source} was trained with preprocessing {name} {weights.preprocess_cfg[name]!r}, "
        f"model {model.name} has {model.preprocess_cfg[name]!r}"
        for name in _PICTURES
        if weights.preprocess_cfg[name] != model.preprocess_cfg[name]
    ]


def has_activation(spec: ModelSpec) -> bool:
    """Whether `quick_gelu` decides what a tower of `spec` computes: timm and transformers bring their own."""
    return not spec.model_cfg["vision_cfg"].get("timm_model_name") or not spec.model_cfg["text_cfg"].get(
        "hf_model_name"
    )


def _settings(weights: ModelSpec, model: ModelSpec) -> Iterator[tuple[Any, ...]]:
    """(name, the weights' own, the model's) of what weights do not tell."""
    cfgs = weights.model_cfg, model.model_cfg
    if all(map(has_activation, (weights, model))):
        yield "quick_gelu", *(cfg.get("quick_gelu", False) for cfg in cfgs)
    vision = [CLIPVisionCfg(**cfg["vision_cfg"]) for cfg in cfgs]
    if not any(tower.timm_model_name for tower in vision):
        for name in _VISION:
            yield f"vision_cfg.{name}", *(getattr(tower, name) or None for tower in vision)
    text = [CLIPTextCfg(**cfg["text_cfg"]) for cfg in cfgs]
    yield "text_cfg.tokenizer_kwargs", *(tower.tokenizer_kwargs or {} for tower in text)
    yield "a tokenizer of its own", *(bool(tower.hf_tokenizer_name) for tower in text)
    if any(tower.hf_model_name for tower in text):
        yield "text_cfg.hf_pooler_type", *(tower.hf_pooler_type for tower in text)
        return
    for name in _TEXT:
        if name != "pad_id" or text[0].embed_cls:
            yield f"text_cfg.{name}", *(getattr(tower, name) or None for tower in text)
    if text[0].pool_type == "eos":
        yield "text_cfg.eos_id", *(tower.eos_id for tower in text)
