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

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "red", "cat")  # of a BERT tokenizer


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


def write_tokenizer(folder, words=WORDS):
    """The files of a BERT tokenizer."""
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = {"tokenizer_class": "BertTokenizer", "mask_token": "[MASK]", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
