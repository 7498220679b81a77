"""Text towers of transformers, small ones of every kind that open_clip has an adapter for."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import BertConfig, M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

import tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WIDE = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CONFIGS = {
    "bert": (BertConfig, {"vocab_size": 49408, "pad_token_id": 0, **SIZES}, "mean_pooler"),
    "bert, class token": (BertConfig, {"vocab_size": 49408, "pad_token_id": 0, **SIZES}, "cls_pooler"),
    "roberta": (RobertaConfig, {"vocab_size": 49408, "pad_token_id": 0, **SIZES}, "mean_pooler"),
    "xlm-roberta": (XLMRobertaConfig, {"vocab_size": 49408, "pad_token_id": 0, **SIZES}, "mean_pooler"),
    "mt5": (MT5Config, {"vocab_size": 49408, "pad_token_id": 0, **T5}, "mean_pooler"),
    "m2m_100": (M2M100Config, {"vocab_size": 49408, "pad_token_id": 0, **WIDE}, "cls_last_hidden_state_pooler"),
}


def architecture(folder: Path, **text_cfg) -> str:
    """Write the JSON of the tiny towers with the text tower whose config lies in `folder`; returns its path."""
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["text_cfg"] = {"hf_model_name": str(folder), "hf_proj_type": "linear", "context_length": 12, **text_cfg}
    (folder / "architecture.json").write_text(json.dumps(cfg))
    return str(folder / "architecture.json")
