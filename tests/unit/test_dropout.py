"""Dropout that a tower brings is off: in training two forwards are one, and gradients those of any split of a batch."""

import json

import open_clip
import pytest
import timm.layers
import torch
from torch import nn

import model_files
import tiny
from data_tools.errors import UserError
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.dropout import silence_dropout, without_dropout
from pretrain.towers.initialise import initialise
from pretrain.towers.spec import resolve_spec
from text_towers import CONFIGS, architecture

# What brings dropout by itself, as transformers' defaults have it, and what its places were set to.
TEXTS = {"bert": 0.1, "roberta": 0.1, "xlm-roberta": 0.1, "mt5": 0.1, "m2m_100": 0.1}
TIMM = {"timm_pool": "avg", "timm_proj": "mlp", "timm_drop": 0.2, "timm_drop_path": 0.3, "image_size": 64}


def towers_of(name, folder):
    """A dual encoder whose text tower is of this kind, with random weights; in training mode."""
    kind, settings, pooler = CONFIGS[name]
    kind(**settings).save_pretrained(folder)
    torch.manual_seed(0)
    return DualEncoder(resolve_spec(architecture(folder, hf_pooler_type=pooler))).train()


def outputs(model, rows, seed):
    """Features of these rows of a fixed batch, and whether the forward left the generator as it was."""
    size = model.spec.image_size
    images = torch.arange(8 * 3 * size * size, dtype=torch.uint8).reshape(8, 3, size, size)[rows]
    tokens = model.tokenize([" ".join(tiny.WORDS[: 2 + row]) for row in range(8)])[rows]
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    outputs = model(tiny.micro_batches(model, images, tokens, len(images), torch.arange(8)[rows])[0])
    image, text = outputs["rows"]["image"], outputs["rows"]["text"]
    return image, text, torch.equal(before, torch.get_rng_state())


def gradients(model, parts, seed):
    """Gradients of one fixed function of all features, part by part."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, 8 * model.spec.model_cfg["embed_dim"]).reshape(8, -1)
    for rows in parts:
        image, text, _ = outputs(model, rows, seed)
        ((image + text.square()) * weights[rows]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_tower_of_transformers_draws_nothing_and_says_so(tmp_path, name):
    model = towers_of(name, tmp_path)
    assert f"(up to {TEXTS[name]:g})" in model.silenced
    assert "of the text tower" in model.silenced
    assert "\n" not in model.silenced
    whole, again = (gradients(model, [slice(None)], seed) for seed in (1, 2))
    split = gradients(model, [slice(0, 3), slice(3, 8)], 3)
    assert len(whole) > 20
    for key, grad in whole.items():
        assert torch.equal(grad, again[key]), key
        assert (split[key] - grad).norm() < 1e-5 * grad.norm() + 1e-7, key
    assert outputs(model, slice(None), 4)[2]


@pytest.mark.parametrize("tower", ["test_vit", "test_vit2", "test_convnext", "test_convnext2"])
def test_an_image_tower_of_timm_draws_nothing(tmp_path, tower):
    vision = {"timm_model_name": tower, **TIMM}
    model = tiny.build(vision_cfg=vision).train()
    assert "of the image tower" in model.silenced
    first, second = (outputs(model, slice(None), seed) for seed in (1, 2))
    assert first[2]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], outputs(model.eval(), slice(None), 1)[0])


def test_an_architecture_of_open_clip_that_brings_stochastic_depth_is_built_and_said():
    cfg = open_clip.get_model_config("convnext_tiny")
    assert cfg["vision_cfg"]["timm_drop_path"] == 0.1
    small = {**tiny.MODEL_CFG, "vision_cfg": {**cfg["vision_cfg"], "timm_model_name": "test_convnext"}}
    model = tiny.build(**small)
    assert model.silenced.startswith("dropout is set to 0, places of the image tower")
    assert model.spec.model_cfg["vision_cfg"]["timm_drop_path"] == 0.1  # as open_clip writes it into exports
    assert tiny.build().silenced == ""


class Places(nn.Module):
    """Every kind of place at once."""

    def __init__(self):
        super().__init__()
        kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
        self.drops = nn.ModuleList([kind(0.5) for kind in kinds])
        self.path, self.block = timm.layers.DropPath(0.5), timm.layers.DropBlock2d(0.5)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5)
        self.attention_dropout, self.drop_rate, self.layerdrop, self.dropout_p = 0.5, 0.5, 1, 0.5
        self.p, self.drop_last = 3, True  # no probabilities


def test_every_kind_of_place_is_found():
    clip = nn.Module()
    clip.visual, clip.text = Places(), Places()
    said = silence_dropout(clip)
    assert "of the image tower 13 (up to 1)" in said
    assert "of the text tower 13 (up to 1)" in said
    for module in clip.modules():
        assert not any("drop" in name and value for name, value in vars(module).items() if type(value) is float)
        assert not isinstance(module, nn.modules.dropout._DropoutNd) or module.p == 0
    assert (clip.visual.p, clip.visual.drop_last) == (3, True)
    assert silence_dropout(clip) == ""


@pytest.mark.parametrize("name", ["timm_drop", "timm_drop_path"])
def test_a_json_that_asks_for_dropout_is_refused(tmp_path, name):
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    path = model_files.architecture_with(tmp_path / "m.json", vision_cfg={**vision, name: 0.25})
    with pytest.raises(UserError, match=rf"asks for dropout.*got vision_cfg.{name} 0.25.*expected 0.*remedy: take"):
        build_model(path, 0)
    silent = model_files.architecture_with(tmp_path / "m.json", vision_cfg={**vision, name: 0.0})
    assert build_model(silent, 0).silenced == ""


def test_patch_dropout_stays_where_it_is_drawn_by_hash(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    path = model_files.architecture_with(tmp_path / "m.json", vision_cfg={**vision, "patch_dropout": 0.5})
    model = build_model(path, 0)
    assert model.silenced == ""
    assert model.patch_dropout.prob == 0.5


def test_weights_of_an_architecture_with_dropout_still_load_and_resume(tmp_path):
    """Only a new start from a JSON is refused: the towers of exports and checkpoints are what they were."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    dropped, plain = (tiny.build(vision_cfg={**vision, **more}) for more in ({"timm_drop": 0.2}, {}))
    initialise(plain, dropped.export_state(), "a file")
    saved, now = ({"spec": {"name": "m", "model_cfg": model.spec.model_cfg}} for model in (dropped, plain))
    assert saved != now
    assert without_dropout(saved) == without_dropout(now)
    other = json.loads(json.dumps(now).replace("avg", "max"))
    assert without_dropout(other) != without_dropout(now)
    assert without_dropout({"spec": 3}) == {"spec": 3}
