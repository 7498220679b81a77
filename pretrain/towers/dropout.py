"""Dropout that an architecture brings is switched off. Its masks come from the rank's own generator, so that gradients
would depend on the number of ranks, the micro-batch and the length that texts are cut to. Patch dropout is drawn by
hash (adapt/patch_dropout.py) and stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from data_tools.errors import UserError
from pretrain.towers.spec import ModelSpec

_ASKED = ("timm_drop", "timm_drop_path")  # settings of vision_cfg that ask for dropout


def silence_dropout(clip: nn.Module) -> str:
    """Set every probability of dropout in the towers of `clip` to 0, stochastic depth and dropped layers included.
    Returns a line that says what was set, or '' where there was none."""
    found: dict[str, list[float]] = {}
    for path, module in clip.named_modules():
        for name, value in _probabilities(module):
            setattr(module, name, 0.0)
            found.setdefault("image" if path.startswith("visual") else "text", []).append(value)
    if not found:
        return ""
    places = " and ".join(
        f"of the {tower} tower {len(values)} (up to {max(values):g})" for tower, values in sorted(found.items())
    )
    return (
        f"dropout is set to 0, places {places}: masks drawn on each rank make gradients depend on the number of ranks "
        "and the micro-batch"
    )


def _probabilities(module: nn.Module) -> Iterator[tuple[str, float]]:
    """(attribute, value) of the probabilities above 0 that `module` drops by: those of torch's dropout, of DropPath and
    DropBlock, and the numbers that towers hand to the functional forms (`attention_dropout`, `drop_rate`)."""
    for name, value in list(vars(module).items()):
        known = "drop" in name.lower() or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
        if known and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            yield name, float(value)


def refuse_dropout(spec: ModelSpec, where: str, hashed: bool) -> None:
    """Raises UserError where the architecture file `where` of a user asks for dropout. `hashed`: whether the patch
    dropout of its image tower, if it asks for one, is drawn by hash."""
    vision = spec.model_cfg["vision_cfg"]
    for name in _ASKED if hashed else (*_ASKED, "patch_dropout"):
        if vision.get(name):
            raise UserError(
                f"model file {where} asks for dropout, which is drawn on each rank",
                got=f"vision_cfg.{name} {vision[name]:g}",
                expected="0: gradients must not depend on the number of ranks and the micro-batch",
                remedy=f"take {name} out; patch_dropout of open_clip's and timm's ViTs, drawn by a hash of the "
                "sample, can stay",
            )


def without_dropout(description: Mapping) -> dict:
    """A model's description (`engine.weights.describe`) but for what it asked dropout for, which changes no tensor: a
    checkpoint of a run that had some is resumed without."""
    spec = description.get("spec")
    if not isinstance(spec, dict) or not isinstance(cfg := spec.get("model_cfg"), dict):
        return dict(description)
    vision = {name: value for name, value in dict(cfg.get("vision_cfg") or {}).items() if name not in _ASKED}
    return {**description, "spec": {**spec, "model_cfg": {**cfg, "vision_cfg": vision}}}
