"""Text towers of transformers start from the weights that lie in their folder, and say so."""

import json

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    MT5Config,
)

import tiny
from data_tools.errors import UserError
from pretrain.config.tree import ModelConfig
from pretrain.tasks import ContrastiveConfig
from pretrain.tasks.contrastive import make_model, start_lines
from pretrain.towers.build import build_model
from text_towers import CONFIGS, SIZES, T5, architecture


def trained(kind, config, folder):
    """A model whose every tensor is random, so that a forgotten one shows."""
    torch.manual_seed(7)
    model = kind(config) if kind is not AutoModel else AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tower_is_the_one_that_open_clip_loads(tmp_path, name):
    kind, settings, pooler = CONFIGS[name]
    trained(AutoModel, kind(**settings), tmp_path)
    model = build_model(architecture(tmp_path, hf_pooler_type=pooler), 0).eval()
    reference = HFTextEncoder(str(tmp_path), 24, pooler_type=pooler, proj_type="linear").eval()
    reference.proj.load_state_dict(model.clip.text.proj.state_dict())
    want, got = reference.state_dict(), model.clip.text.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    tokens = model.tokenize(["a dog", "two red circles above a blue square"])
    with torch.no_grad():
        features = torch.nn.functional.normalize(reference(tokens), dim=-1)
        assert (model.encode_text(tokens) - features).abs().max() < 1e-6
    (line,) = model.started
    assert (
        line
        == f"text tower {tmp_path}: {len(want) - 1} of {len(want) - 1} tensors loaded; its projection starts at random"
    )


@pytest.mark.parametrize("pickled", [False, True])
def test_a_pretraining_head_is_left_and_a_missing_pooler_said(tmp_path, pickled, capfd):
    config = BertConfig(vocab_size=49408, pad_token_id=0, **SIZES)
    trained(BertForMaskedLM, config, tmp_path)
    if pickled:
        torch.save(BertForMaskedLM.from_pretrained(tmp_path).half().state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    capfd.readouterr()
    model = build_model(architecture(tmp_path, hf_pooler_type="cls_pooler"), 0)
    assert capfd.readouterr() == ("", "")  # transformers would draw bars and tables
    assert model.clip.text.transformer.embeddings.word_embeddings.weight.dtype == torch.float32
    assert "left as drawn: pooler.dense.bias, pooler.dense.weight" in model.started[0]
    assert "left as drawn" not in build_model(architecture(tmp_path, hf_pooler_type="mean_pooler"), 0).started[0]


def test_a_run_says_what_its_towers_start_from(tmp_path):
    config = BertConfig(vocab_size=49408, pad_token_id=0, **SIZES)
    trained(BertModel, config, tmp_path)
    said = {}
    for name, text_cfg in (("loaded", {}), ("asked for", {"hf_model_pretrained": False})):
        settings = ContrastiveConfig(model=ModelConfig(name=architecture(tmp_path, **text_cfg)))
        said[name] = start_lines(make_model(settings), settings)
    (tmp_path / "model.safetensors").unlink()
    said["absent"] = start_lines(
        make_model(settings := ContrastiveConfig(model=ModelConfig(name=architecture(tmp_path)))), settings
    )
    assert "tensors loaded" in said["loaded"][0]
    assert "starts at random (hf_model_pretrained: false)" in said["asked for"][0]
    assert "no weights there, it starts at random" in said["absent"][0]


def test_image_towers_of_timm_that_ask_for_weights_are_warned_of(tmp_path):
    cfg = {
        **tiny.MODEL_CFG,
        "vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_model_pretrained": True},
    }
    (tmp_path / "timm.json").write_text(json.dumps(cfg))
    assert "starts at random" in build_model(str(tmp_path / "timm.json"), 0).started[0]


def test_weights_of_another_model_are_refused(tmp_path):
    trained(BertModel, BertConfig(vocab_size=49408, pad_token_id=0, **SIZES), tmp_path)
    path = architecture(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = (tmp_path / "model.safetensors").read_bytes()
    faults = {
        "other sizes": lambda: (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64})),
        "another kind": lambda: (tmp_path / "config.json").write_text(
            json.dumps({**MT5Config(vocab_size=49408, **T5).to_dict(), "model_type": "mt5"})
        ),
        "damaged": lambda: (tmp_path / "model.safetensors").write_bytes(whole[:-100]),
        "an adapter": lambda: (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}'),
        "outside": lambda: (
            (tmp_path / "model.safetensors").unlink()
            or (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
        ),
    }
    for fault in faults.values():
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").write_bytes(whole)
        (tmp_path / "adapter_config.json").unlink(missing_ok=True)
        fault()
        with pytest.raises(UserError):
            build_model(path, 0)


def test_towers_that_a_checkpoint_fills_need_no_weights_of_their_own(tmp_path):
    """A run is gone on from where the tower's own file is damaged by now."""
    trained(BertModel, BertConfig(vocab_size=49408, pad_token_id=0, **SIZES), tmp_path)
    path = architecture(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    settings = ContrastiveConfig(model=ModelConfig(name=path))
    with pytest.raises(UserError, match="cannot be loaded"):
        make_model(settings)
    assert make_model(settings, fresh=False).started == []


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = BertModel(BertConfig(vocab_size=49408, pad_token_id=0, **SIZES))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not finite"):
        build_model(architecture(tmp_path), 0)


def test_nothing_drawn_for_what_is_missing_moves_the_seed(tmp_path):
    trained(BertForMaskedLM, BertConfig(vocab_size=49408, pad_token_id=0, **SIZES), tmp_path)
    path = architecture(tmp_path, hf_pooler_type="cls_pooler")
    first, second = (build_model(path, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
