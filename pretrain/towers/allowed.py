"""What a file may say of a model.

Architectures come with exports, checkpoints and JSONs from anywhere, and most of what they say is handed to open_clip,
timm and transformers, some of whose arguments run code, fetch files or fill memory. So every setting is on these lists,
with the values it may have, or it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, NotRequired, TypedDict, cast

from data_tools.errors import UserError
from pretrain.towers.files import is_number


class Architecture(TypedDict):
    """An architecture as open_clip's JSON has it; the towers' settings are those of its `CLIPVisionCfg` and
    `CLIPTextCfg`."""

    embed_dim: int
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: NotRequired[bool]
    custom_text: NotRequired[bool]
    init_logit_scale: NotRequired[float]
    init_logit_bias: NotRequired[float | None]


class Preprocess(TypedDict):
    """How pictures are made ready for the image tower, as open_clip's `PreprocessCfg`."""

    size: int | list[int]
    mode: str
    mean: list[float]
    std: list[float]
    interpolation: str
    resize_mode: str
    fill_color: float | list[float] | None


Rule = tuple[Callable[[Any], bool], str]
_TIMM_NAME = re.compile(
    r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?"
)  # no hf-hub: and local-dir:, which bring settings of their own


def _count(least: int, most: int) -> Rule:
    return lambda v: is_number(v) and least <= v <= most, f"a whole number, {least} to {most}"


def _real(least: float, most: float) -> Rule:
    holds = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and least <= v <= most  # noqa: E731
    return holds, f"a number, {least:g} to {most:g}"


def _one_of(*values: object) -> Rule:
    return lambda v: any(v == value and type(v) is type(value) for value in values), "one of " + ", ".join(
        "null" if value is None else str(value) for value in values
    )


def _or_null(rule: Rule) -> Rule:
    holds, words = rule
    return lambda v: v is None or holds(v), f"{words}, or null"


def _three(rule: Rule) -> Rule:
    holds, words = rule
    return lambda v: isinstance(v, list | tuple) and len(v) == 3 and all(map(holds, v)), f"three of {words}"


def _pair_or(rule: Rule) -> Rule:
    holds, words = rule
    return lambda v: holds(v) or (isinstance(v, list | tuple) and len(v) == 2 and all(map(holds, v))), words


def _text(v: object) -> bool:
    return isinstance(v, str) and 0 < len(v) < 4096 and "\0" not in v


def _keys(**rules: Rule) -> Rule:
    def holds(value: object) -> bool:
        return isinstance(value, dict) and all(key in rules and rules[key][0](value[key]) for key in value)

    return holds, "settings: " + ", ".join(f"{key} ({words})" for key, (_, words) in rules.items())


_FLAG = _one_of(True, False)
_NAME: Rule = (_text, "a name or folder")
_RATIO = _real(0, 1)
_SIZE = _count(1, 8192)
_WIDTH = _count(1, 1 << 17)
_TOKEN = _count(0, 1 << 24)
_BLOCKS: dict[str, Rule] = {
    "mlp_ratio": _real(0.01, 64),
    "ls_init_value": _or_null(_real(0, 100)),
    "act_kwargs": _or_null(_keys(approximate=_one_of("none", "tanh"))),
    "norm_kwargs": _or_null(_keys(eps=_real(1e-12, 1))),
    "block_type": _one_of(None, "default", "custom"),
    "qk_norm": _FLAG,
    "scaled_cosine_attn": _FLAG,
    "scale_heads": _FLAG,
    "scale_attn_inner": _FLAG,
    "scale_attn": _FLAG,
    "scale_fc": _FLAG,
    "final_ln_after_pool": _FLAG,
    "output_tokens": _one_of(False),
}
_VISION: dict[str, Rule] = {
    **_BLOCKS,
    "layers": (
        lambda v: (
            _count(1, 1024)[0](v) or (isinstance(v, list | tuple) and len(v) == 4 and all(map(_count(1, 1024)[0], v)))
        ),
        "a whole number, 1 to 1024, or four of them",
    ),
    "width": _WIDTH,
    "head_width": _WIDTH,
    "patch_size": _or_null(_pair_or(_SIZE)),
    "image_size": _pair_or(_SIZE),
    "patch_dropout": (lambda v: _RATIO[0](v) and v < 1, "0 <= share < 1"),
    "attentional_pool": _one_of(True, False, "parallel", "cascade"),
    "attn_pooler_queries": _count(1, 4096),
    "attn_pooler_heads": _count(1, 1024),
    "no_ln_pre": _FLAG,
    "pos_embed_type": _one_of("learnable", "sin_cos_2d"),
    "pool_type": _one_of("tok", "avg"),
    "timm_model_name": (
        lambda v: v is None or (_text(v) and bool(_TIMM_NAME.fullmatch(v))),
        "the name of a timm model",
    ),
    "timm_model_pretrained": _FLAG,
    "timm_pool": _or_null(_one_of("", "avg", "avgmax", "max", "token", "map", "abs_attn", "rot_attn")),
    "timm_proj": _one_of(None, "", "none", "linear", "mlp"),
    "timm_proj_bias": _FLAG,
    "timm_drop": _RATIO,
    "timm_drop_path": _or_null(_RATIO),
}
_TOKENIZER = _keys(clean=_one_of("lower", "whitespace", "canonicalize"), strip_sep_token=_FLAG)
_TEXT: dict[str, Rule] = {
    **_BLOCKS,
    "layers": _count(1, 1024),
    "width": _WIDTH,
    "heads": _count(1, 4096),
    "context_length": _count(3, 1 << 16),
    "vocab_size": _count(1, 1 << 24),
    "embed_cls": _FLAG,
    "pad_id": _TOKEN,
    "eos_id": _TOKEN,
    "no_causal_mask": _FLAG,
    "pool_type": _one_of("argmax", "eos", "last", "first"),
    "proj_bias": _FLAG,
    "proj_type": _one_of(None, "linear", "none"),
    "hf_tokenizer_name": _or_null(_NAME),
    "tokenizer_mode": _one_of(None, "", "clips"),
    "tokenizer_kwargs": _or_null(_TOKENIZER),
    "hf_model_name": _or_null(_NAME),
    "hf_model_pretrained": _FLAG,
    "hf_proj_type": _one_of(None, "", "linear", "mlp"),
    "hf_pooler_type": _or_null(_one_of("mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler")),
}
_MODEL: dict[str, Rule] = {
    "embed_dim": _WIDTH,
    "quick_gelu": _FLAG,
    "custom_text": _FLAG,
    "init_logit_scale": _real(-20, 20),
    "init_logit_bias": _or_null(_real(-1000, 1000)),
    "vision_cfg": (lambda v: isinstance(v, dict), "settings"),
    "text_cfg": (lambda v: isinstance(v, dict), "settings"),
}
_PREPROCESS: dict[str, Rule] = {
    "size": _pair_or(_SIZE),
    "mode": _one_of("RGB"),
    "mean": _three(_real(-10, 10)),
    "std": _three(_real(1e-3, 10)),
    "interpolation": _one_of("bicubic", "bilinear"),
    "resize_mode": _one_of("shortest", "squash"),
    "fill_color": _or_null(_pair_or(_real(0, 255))),
}

# Of a transformers config what a text tower needs. What is not here is not passed on: to transformers it is at best a
# note (architectures, transformers_version) and at worst a request (kernels of a hub as attn_implementation).
TEXT_MODELS = ("bert", "roberta", "xlm-roberta", "mt5", "m2m_100")
_TEXT_CONFIG: dict[str, Rule] = {
    "model_type": _one_of(*TEXT_MODELS),
    "is_encoder_decoder": _FLAG,
    "position_embedding_type": _one_of("absolute"),
    "is_decoder": _one_of(False),
    "is_gated_act": _FLAG,
    "scale_embedding": _FLAG,
    "tie_word_embeddings": _FLAG,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), _or_null(_TOKEN)),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), _count(1, 1 << 24)),
    **dict.fromkeys(("type_vocab_size",), _count(1, 1 << 16)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "d_kv", "d_ff"), _WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers"), _count(1, 1024)),
    **dict.fromkeys(("num_decoder_layers", "decoder_layers"), _count(0, 1024)),
    **dict.fromkeys(("num_attention_heads", "num_heads"), _count(1, 4096)),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _count(1, 4096)),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), _count(1, 1 << 16)),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"), _RATIO),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), _RATIO),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), _RATIO),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon"), _real(1e-12, 1)),
    **dict.fromkeys(("initializer_range", "initializer_factor", "init_std"), _real(0, 10)),
    **dict.fromkeys(
        ("hidden_act", "activation_function", "dense_act_fn"),
        _one_of("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh"),
    ),
    "feed_forward_proj": _one_of("relu", "gated-gelu", "gelu", "gated-silu"),
}


_CLIP_CONFIG: dict[str, Rule] = {
    **dict.fromkeys(("hidden_size", "intermediate_size"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers",), _count(1, 1024)),
    **dict.fromkeys(("num_attention_heads",), _count(1, 4096)),
    "hidden_act": _one_of("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_eps": _real(1e-12, 1),
    "max_position_embeddings": _count(3, 1 << 16),
    "vocab_size": _count(1, 1 << 24),
    "eos_token_id": _TOKEN,
    "image_size": _SIZE,
    "patch_size": _SIZE,
    "num_channels": _one_of(3),
}


def check_clip_config(config: dict, where: str) -> dict:
    """The settings of a tower of transformers' CLIP that its form in open_clip needs. Raises UserError for values that
    it cannot have."""
    needed = {name: value for name, value in config.items() if name in _CLIP_CONFIG}
    return _check(needed, _CLIP_CONFIG, where, "")


def check_text_config(config: dict, where: str) -> dict:
    """The part of a transformers text config that may be passed on. Raises UserError for values it cannot have."""
    if config.get("model_type") not in TEXT_MODELS:
        raise UserError(
            f"{where} is not of a text tower that can be built",
            got=f"model_type {config.get('model_type')!r}",
            expected=", ".join(TEXT_MODELS),
        )
    allowed = {name: value for name, value in config.items() if name in _TEXT_CONFIG}
    return _check(allowed, _TEXT_CONFIG, where, "")


def check_model(model_cfg: object, where: str) -> Architecture:
    """`model_cfg` itself. Raises UserError where it is no architecture: `where` sets something that no file may set,
    gives a setting a value it cannot have, or lacks a tower."""
    model = _check(model_cfg, _MODEL, where, "")
    missing = [name for name in ("embed_dim", "text_cfg", "vision_cfg") if name not in model]
    if missing:
        raise UserError(f"{where} is not an open_clip architecture", got=f"no {', '.join(missing)}")
    vision = _check(model["vision_cfg"], _VISION, where, "vision_cfg.")
    text = _check(model["text_cfg"], _TEXT, where, "text_cfg.")
    if not vision.get("timm_model_name") and isinstance(vision.get("layers", 12), int):
        _check_vit(vision, where)
    if not text.get("hf_model_name"):
        width, heads = text.get("width", 512), text.get("heads", 8)
        if width % heads:
            _refuse(where, "text_cfg.heads", heads, f"a divisor of text_cfg.width = {width}")
        if text.get("embed_cls") and not model.get("custom_text"):
            _refuse(where, "text_cfg.embed_cls", True, "false, or custom_text: true, whose tower has that token")
    return cast(Architecture, model)  # nothing in it was left unseen


def check_preprocess(preprocess_cfg: object, where: str) -> dict[str, Any]:
    """`preprocess_cfg` itself, settings of `Preprocess`. Raises UserError where the preprocessing of `where` is none
    that this trainer does."""
    return _check(preprocess_cfg, _PREPROCESS, where, "preprocess_cfg.")


def _check_vit(vision: dict, where: str) -> None:
    width, of_head = vision.get("width", 768), vision.get("head_width", 64)
    if width % of_head:
        _refuse(where, "vision_cfg.head_width", of_head, f"a divisor of vision_cfg.width = {width}")
    size, patch = (vision.get(name, default) for name, default in (("image_size", 224), ("patch_size", 16)))
    if patch is None or min(_both(size)) < max(_both(patch)):
        _refuse(where, "vision_cfg.patch_size", patch, f"at most vision_cfg.image_size = {size}")


def _both(size: int | list[int]) -> list[int]:
    return [size] if isinstance(size, int) else list(size)


def _check(values: object, rules: Mapping[str, Rule], where: str, prefix: str) -> dict[str, Any]:
    """`values`, each by the rule of its name."""
    if not isinstance(values, dict):
        _refuse(where, prefix.rstrip(".") or "the architecture", values, "settings by name")
    for name, value in values.items():
        if name not in rules:
            _refuse(where, f"{prefix}{name}", value, "no such setting: a file may set " + ", ".join(rules))
        holds, words = rules[name]
        if (isinstance(value, float) and not math.isfinite(value)) or not holds(value):
            _refuse(where, f"{prefix}{name}", value, words)
    return values


def _refuse(where: str, name: str, value: object, words: str) -> NoReturn:
    raise UserError(f"{where} sets {name} to what no file may", got=repr(value), expected=words)
