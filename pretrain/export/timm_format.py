"""The layout of timm, which transformers reads too: `config.json` and `model.safetensors` of a vision transformer that
computes a classifier's scores.

A classifier scores `scale * head @ f / |f|`, with `f` = `proj.T @ ln_post(x)` of the class token `x`; timm's ends in a
norm and a linear layer. So the folder has one layer more than the tower. It attends to nothing, and its MLP writes
`D * Q @ f`: `Q` has orthonormal columns that sum to 0, so timm's last norm, which takes the mean away and divides by
the deviation, makes `sqrt(width) * Q @ f / |f|` of it, and the head is `scale / sqrt(width) * head @ Q.T`. `D` is so
large that the `x` beside it is lost in rounding. The MLP passes `a` through its activation as act(a) - act(-a) = a,
which GELU and QuickGELU fulfil.

`Q` needs more rows than `f` has values. Where the tower is not wider than its features, every row of it is written
`copies` times: a norm of repeated values is the repeated norm, so that changes nothing that is computed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg
from safetensors.torch import save_file

from pretrain.export.open_clip_format import activation
from pretrain.export.transformers_format import vision_obstacle
from pretrain.towers.classifier import Classifier

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_ARCHITECTURE = "vit_base_patch32_clip_224"  # its norms are CLIP's; `model_args` give it the tower's sizes
_DROWNING = 2.0**30  # D
_ENDS = {
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
}
_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_STACK = "transformer.resblocks."


def obstacle(model: Classifier) -> str | None:
    """Why a classifier has no such form; None: it has one."""
    reason = vision_obstacle(model.spec)
    if reason is None and _sizes(model).hidden < 2 * model.head.in_features:
        reason = f"vision_cfg.mlp_ratio = {_vision(model).mlp_ratio}, too small for {model.head.in_features} features"
    return reason


def write(model: Classifier, folder: Path) -> None:
    """Write the layout into `folder`. The classifier must have no obstacle."""
    metadata = {"format": "pt", "activation": activation(model.towers)}
    save_file(timm_state(model), folder / WEIGHTS, metadata=metadata)
    text = json.dumps(_config(model), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Sizes:
    """Of what is written: `copies` of the tower's `own` channels make the width, `hidden` are those of an MLP."""

    own: int
    copies: int
    hidden: int

    @property
    def width(self) -> int:
        return self.own * self.copies

    def written(self, value: torch.Tensor) -> torch.Tensor:
        """What writes into the stream, or stands in it: its rows once for each copy."""
        return value.repeat(self.copies, *[1] * (value.ndim - 1))

    def read(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        """What reads the stream, with zeros for the other copies and up to so many rows."""
        columns = 0 if value.ndim == 1 else self.width - self.own
        return F.pad(value, (0, rows - len(value)) if value.ndim == 1 else (0, columns, 0, rows - len(value)))


def _vision(model: Classifier) -> CLIPVisionCfg:
    return CLIPVisionCfg(**model.spec.model_cfg["vision_cfg"])


def _sizes(model: Classifier) -> _Sizes:
    vision = _vision(model)
    copies = model.head.in_features // vision.width + 1
    return _Sizes(vision.width, copies, int(copies * vision.width * vision.mlp_ratio))


def _config(model: Classifier) -> dict:
    spec, vision, sizes = model.spec, _vision(model), _sizes(model)
    cfg, side = spec.preprocess_cfg, spec.image_size
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": len(model.classes),
        "num_features": sizes.width,
        "label_names": list(model.classes),
        "model_args": {
            "img_size": side,
            "patch_size": vision.patch_size,
            "embed_dim": sizes.width,
            "depth": vision.layers + 1,
            "num_heads": sizes.width // vision.head_width,
            "mlp_ratio": vision.mlp_ratio,
            "act_layer": activation(model.towers),
        },
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": cfg["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": "squash" if cfg["resize_mode"] == "squash" else "center",
            "mean": list(cfg["mean"]),
            "std": list(cfg["std"]),
            "num_classes": len(model.classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_state(model: Classifier) -> dict[str, torch.Tensor]:
    """timm's tensors, fp32."""
    sizes, layers = _sizes(model), _vision(model).layers
    visual = {
        name: value.detach().cpu().double()
        for name, value in model.towers.clip.get_submodule("visual").state_dict().items()
    }
    state = {
        "cls_token": sizes.written(visual["class_embedding"])[None, None],
        "pos_embed": sizes.written(visual["positional_embedding"].T).T[None],
        **{theirs: sizes.written(visual[name]) for name, theirs in _ENDS.items()},
    }
    for name, value in visual.items():
        if name.startswith(_STACK):
            number, _, inner = name.removeprefix(_STACK).partition(".")
            state[f"blocks.{number}.{_renamed(inner)}"] = _layer_tensor(inner, value, sizes)
    first = {name: value for name, value in state.items() if name.startswith("blocks.0.")}
    state |= {name.replace(".0.", f".{layers}.", 1): torch.zeros_like(value) for name, value in first.items()}
    state |= _normalise(visual, sizes, f"blocks.{layers}.")
    state["norm.weight"], state["norm.bias"] = torch.ones(sizes.width), torch.zeros(sizes.width)
    head = model.head.weight.detach().cpu().double() @ _directions(sizes.width, model.head.in_features).T
    state["head.weight"] = model.scale / math.sqrt(sizes.width) * head
    state["head.bias"] = torch.zeros(len(model.classes))
    return {name: value.float().contiguous() for name, value in state.items()}


def _renamed(inner: str) -> str:
    """timm's name of a layer's tensor."""
    found = next(name for name in _BLOCK if inner.startswith(name))
    return _BLOCK[found] + inner.removeprefix(found)


def _layer_tensor(inner: str, value: torch.Tensor, sizes: _Sizes) -> torch.Tensor:
    module, kind = inner.rsplit(".", 1)
    if kind.startswith("in_proj_"):
        return torch.cat([sizes.read(part, sizes.width) for part in value.chunk(3)])
    if module == "mlp.c_fc":
        return sizes.read(value, sizes.hidden)
    if module in ("attn.out_proj", "mlp.c_proj") and kind == "weight":
        columns = sizes.width if module == "attn.out_proj" else sizes.hidden
        value = F.pad(value, (0, columns - value.shape[1]))
    return sizes.written(value)


def _normalise(visual: dict[str, torch.Tensor], sizes: _Sizes, layer: str) -> dict[str, torch.Tensor]:
    """The tensors that are not 0 of the layer after the tower's: the MLP that writes `D * Q @ f`."""
    features = visual["proj"].T  # [features, own]
    into = torch.cat([features, -features])
    out = _DROWNING * _directions(sizes.width, len(features))
    return {
        f"{layer}norm2.weight": torch.ones(sizes.width),
        f"{layer}mlp.fc1.weight": sizes.read(into * visual["ln_post.weight"], sizes.hidden),
        f"{layer}mlp.fc1.bias": sizes.read(into @ visual["ln_post.bias"], sizes.hidden),
        f"{layer}mlp.fc2.weight": F.pad(torch.cat([out, -out], dim=1), (0, sizes.hidden - 2 * len(features))),
    }


def _directions(width: int, count: int) -> torch.Tensor:
    """`Q`, fp64 `[width, count]`: the waves of the discrete cosine transform but for the constant one."""
    rows, waves = torch.arange(width, dtype=torch.float64), torch.arange(1, count + 1, dtype=torch.float64)
    return math.sqrt(2 / width) * torch.cos(math.pi / width * (rows[:, None] + 0.5) * waves)
