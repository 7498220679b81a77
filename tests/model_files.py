"""Files and settings of the tiny towers, for tests of what a model may be called."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

import tiny
from pretrain.config.tree import ModelConfig
from pretrain.objectives import OBJECTIVES
from pretrain.tasks import ContrastiveConfig
from pretrain.towers.build import DualEncoder


def weights(model: DualEncoder) -> dict[str, torch.Tensor]:
    """Tensors under open_clip's keys, each with its own memory."""
    return {key: value.clone() for key, value in model.export_state().items()}


def architecture_with(path: Path, **changes) -> str:
    """Write the JSON of the tiny towers with changes (`text_cfg__heads=4`); returns its path."""
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    for key, value in changes.items():
        tower, _, name = key.partition("__")
        (cfg[tower] if name else cfg)[name or tower] = value
    path.write_text(json.dumps({**cfg, "preprocess_cfg": tiny.SPEC.preprocess_cfg}))
    return str(path)


def config_with(init: str, architecture: str, objective: str = "infonce", **settings) -> ContrastiveConfig:
    """Settings of a run that starts from `init`."""
    return ContrastiveConfig(
        model=ModelConfig(name=architecture, init=init),
        objectives={objective: OBJECTIVES[objective].settings(**settings)},
    )
