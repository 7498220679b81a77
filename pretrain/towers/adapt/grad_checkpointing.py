"""Activation checkpointing (arXiv 1604.06174): a layer keeps its input alone and runs again in the backward.

The layers are those of open_clip, timm and transformers, which bring it along; torch replays their random numbers and
autocast. Patch dropout stands before the layers, so that nothing of it is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from data_tools.errors import UserError
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.clip import Clip, text_tower
from pretrain.towers.parts import towers_of

_FLAGS = ("grad_checkpointing", "gradient_checkpointing")  # as open_clip and timm, and as transformers call it


@dataclass(frozen=True)
class GradCheckpointing(Adapter):
    """Makes layers of `towers` (image, text) keep their input alone and run again in the backward."""

    towers: Collection[str]

    def apply(self, model: nn.Module) -> None:
        """Switch it on. Raises UserError where such a tower cannot do it."""
        for name in self.towers:
            _SWITCHES[name](towers_of(model).clip)


def _image(clip: Clip) -> None:
    trunk = getattr(clip.visual, "trunk", clip.visual)  # timm's: open_clip's wrapper only warns where it fails
    _switch_on(trunk, lambda: trunk.set_grad_checkpointing(True), "image")


def _text(clip: Clip) -> None:
    tower = text_tower(clip)
    if hasattr(tower, "config"):  # transformers: its reentrant kind would not see the gradients of ZeRO-3
        kind = {"use_reentrant": False}
        enable = tower.transformer.gradient_checkpointing_enable
        _switch_on(tower.transformer, lambda: enable(gradient_checkpointing_kwargs=kind), "text")
    elif hasattr(tower, "visual"):  # open_clip.CLIP: its own switch is for both towers
        tower.transformer.grad_checkpointing = True
    else:
        _switch_on(tower, lambda: tower.set_grad_checkpointing(True), "text")


_SWITCHES = {"image": _image, "text": _text}


def _switch_on(tower: nn.Module, enable: Callable[[], object], which: str) -> None:
    try:
        enable()
        reason = None
    except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        reason = str(error) or type(error).__name__
    if reason or not any(getattr(module, flag, False) for module in tower.modules() for flag in _FLAGS):
        raise UserError(
            f"the {which} tower cannot checkpoint its activations",
            got=reason or type(tower).__name__,
            remedy="leave it out of train.grad_checkpointing; train.micro_batch saves memory too",
        )
