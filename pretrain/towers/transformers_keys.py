"""The names of CLIP's tensors: open_clip's native ones and those of transformers' CLIPModel, both ways."""

from __future__ import annotations

import re

import torch

_ENDS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_STACKS = {"visual.transformer.resblocks.": "vision_model", "transformer.resblocks.": "text_model"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_ENDS_BACK, _PROJECTIONS_BACK, _STACKS_BACK, _BLOCK_BACK = (
    {theirs: ours for ours, theirs in table.items()} for table in (_ENDS, _PROJECTIONS, _STACKS, _BLOCK)
)
_LAYER = re.compile(r"(vision_model|text_model)\.encoder\.layers\.([0-9]+)\.(.+)")
_SPLIT = re.compile(r"(vision_model|text_model)\.encoder\.layers\.([0-9]+)\.self_attn\.([qkv])_proj\.(weight|bias)")


def transformers_state(native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIPModel's tensors of open_clip's native ones: projections transposed, the fused query-key-value split."""
    state = {}
    for key, value in native.items():
        if key in _ENDS:
            state[_ENDS[key]] = value
        elif key in _PROJECTIONS:
            state[_PROJECTIONS[key]] = value.T.contiguous()
        else:
            state.update(_block_tensors(key, value))
    return state


def _block_tensors(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix = next(prefix for prefix in _STACKS if key.startswith(prefix))
    number, _, rest = key.removeprefix(prefix).partition(".")
    layer = f"{_STACKS[prefix]}.encoder.layers.{number}"
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{name}_proj.{kind}": part.contiguous() for name, part in parts}
    module, _, kind = rest.rpartition(".")
    return {f"{layer}.{_BLOCK[module]}.{kind}": value}


def native_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's native tensors of CLIPModel's ones, the inverse of `transformers_state`. A name that is none of
    CLIPModel's stays as it is, for whoever loads the tensors to refuse."""
    native: dict[str, torch.Tensor] = {}
    split: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}  # fused tensor -> "q", "k", "v" -> the part, named
    for key, value in state.items():
        fused = _fused(key)
        if fused is not None:
            name, part = fused
            split.setdefault(name, {})[part] = key, value
        elif key in _PROJECTIONS_BACK:
            native[_PROJECTIONS_BACK[key]] = value.T.contiguous()
        elif not key.endswith(".position_ids"):  # a constant that older versions saved
            native[_native_name(key)] = value
    for name, parts in split.items():
        whole = parts.keys() == set("qkv") and len({value.shape for _, value in parts.values()}) == 1
        native |= {name: torch.cat([parts[part][1] for part in "qkv"])} if whole else dict(parts.values())
    return native


def _fused(key: str) -> tuple[str, str] | None:
    """The fused tensor that `key` is a third of, and which: "q", "k" or "v"."""
    found = _SPLIT.fullmatch(key)
    return (f"{_STACKS_BACK[found[1]]}{found[2]}.attn.in_proj_{found[4]}", found[3]) if found else None


def _native_name(key: str) -> str:
    layer = _LAYER.fullmatch(key)
    if layer is None:
        return _ENDS_BACK.get(key, key)
    module, _, kind = layer[3].rpartition(".")
    return f"{_STACKS_BACK[layer[1]]}{layer[2]}.{_BLOCK_BACK[module]}.{kind}" if module in _BLOCK_BACK else key
