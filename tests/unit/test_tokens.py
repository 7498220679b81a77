"""What encoders make of single tokens, for heads: the states that open_clip's own forward has, in order and masked."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from data_tools.errors import UserError
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.heads.head import Head
from text_towers import CONFIGS, architecture

SIGLIP_TEXT = {**tiny.MODEL_CFG["text_cfg"], "no_causal_mask": True, "pool_type": "last", "vocab_size": 49408}


def fp64(**changes):
    return tiny.build(text_buckets=3, **changes).double().eval()


def sized(pixels):
    return tiny.SPEC.preprocess_cfg | {"size": pixels}


def test_image_tokens_are_those_that_open_clip_gives_out():
    model = fp64()
    pixels = model._pixels(tiny.batch(model, 4)[0]).double()
    features, tokens = model.encode_tokens("image", {"pixels": pixels})
    model.clip.visual.output_tokens = True
    pooled, states = model.clip.visual(pixels)
    assert torch.equal(tokens["values"], states)
    assert torch.equal(features, F.normalize(pooled.float(), dim=-1))
    assert tokens["mask"].all()
    assert model.width("image") == states.shape[-1]


def test_tokens_are_those_of_the_patches_that_are_kept():
    model = tiny.build(vision_cfg={**tiny.MODEL_CFG["vision_cfg"], "image_size": 32, "patch_size": 8}).train()
    bits = {"patch_bits": tiny.patch_bits(7, 3, range(4)), "patch_dropout": torch.tensor(0.5, dtype=torch.float64)}
    rows = {"pixels": tiny.batch(model, 4)[0], **bits}
    features, tokens = model.encode_tokens("image", rows)  # first, so that nothing was taken before it
    assert tokens["values"].shape[1] == 8  # of 16
    assert torch.equal(features, model.encode("image", rows))


def test_a_timm_tower_gives_the_states_before_its_pool():
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "avg", "timm_proj": "linear"}
    spec = replace(tiny.SPEC, model_cfg=tiny.MODEL_CFG | {"vision_cfg": vision}, preprocess_cfg=sized(224))
    model = DualEncoder(spec).double().eval()
    pixels = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    features, tokens = model.encode_tokens("image", {"pixels": pixels})
    assert torch.equal(features, model.encode("image", {"pixels": pixels}))
    assert torch.equal(tokens["values"], model.clip.visual.trunk.forward_features(pixels))
    assert tokens["values"].shape == (2, 197, model.width("image"))


@pytest.mark.parametrize("cut", [False, True])
def test_causal_text_tokens_are_those_at_full_length(cut):
    model = fp64()
    _, texts = tiny.batch(model, 7)
    rows = model.rule(texts) if cut else {"tokens": texts}
    features, tokens = model.encode_tokens("text", rows)
    lengths = texts.argmax(dim=1) + 1
    assert tokens["mask"].sum(dim=1).tolist() == lengths.tolist()
    assert tokens["values"].shape[1] == (int(lengths.max()) if cut else texts.shape[1])
    clip = model.clip
    states = clip.token_embedding(texts) + clip.positional_embedding
    states = clip.ln_final(clip.transformer(states, attn_mask=clip.attn_mask))
    for row, length in enumerate(lengths):
        assert (tokens["values"][row, :length] - states[row, :length]).abs().max() < 1e-12
    assert (features.double() - F.normalize(clip.encode_text(texts), dim=-1)).abs().max() < 1e-6
    assert model.width("text") == states.shape[-1]
    assert model.token_embedding("text") is clip.token_embedding


def test_a_tower_without_a_mask_gives_all_places():
    model = fp64(text_cfg=SIGLIP_TEXT, custom_text=True)
    _, texts = tiny.batch(model, 4)
    features, tokens = model.encode_tokens("text", model.rule(texts))
    assert tokens["values"].shape[:2] == texts.shape
    assert tokens["mask"].all()
    assert torch.equal(features, model.encode("text", model.rule(texts)))
    assert model.clip.text.output_tokens is False


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_of_transformers_stand_at_their_places(tmp_path, name):
    kind, settings, pooler = CONFIGS[name]
    kind(**settings).save_pretrained(tmp_path)
    model = build_model(architecture(tmp_path, hf_pooler_type=pooler, hf_model_pretrained=False), 0, 2).double().eval()
    texts = model.tokenize(["a dog", "two red circles above a blue square"])
    features, tokens = model.encode_tokens("text", model.rule(texts))
    tower = model.clip.text
    mask = texts != tower.config.pad_token_id
    states = tower.transformer(input_ids=texts, attention_mask=mask.long()).last_hidden_state
    longest = int(mask.sum(dim=1).max())
    assert torch.equal(tokens["mask"], mask[:, :longest])
    assert (tokens["values"] - states[:, :longest])[mask[:, :longest]].abs().max() < 1e-12
    assert (features - model.encode("text", model.rule(texts))).abs().max() < 1e-6
    assert model.width("text") == states.shape[-1]
    assert model.token_embedding("text").weight.shape[1] == states.shape[-1]


class Reading(Head):
    """Sums of tokens."""

    reads = frozenset({"text"})

    def forward(self, outputs, inputs):
        tokens = outputs["local"]["tokens"]
        return {field: own["values"].sum(dim=(1, 2)) for field, own in tokens.items()}


class Giving(Head):
    """A linear of image features."""

    gives_rows = True

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(24, 5)

    def forward(self, outputs, inputs):
        return self.linear(outputs["rows"]["image"])


def test_tokens_are_made_of_what_a_wanted_head_reads_alone(monkeypatch):
    model = tiny.build()
    model.heads["reading"], model.heads["giving"] = Reading(), Giving()
    asked = []
    plain = model.encode_tokens
    monkeypatch.setattr(model, "encode_tokens", lambda encoder, rows: asked.append(encoder) or plain(encoder, rows))
    images, texts = tiny.batch(model, 4)
    inputs = {"image": {"pixels": images}, "text": {"tokens": texts}}
    assert model(inputs)["local"] == {}
    assert model(inputs, frozenset({"giving"}))["rows"]["giving"].shape == (4, 5)
    assert asked == []
    outputs = model(inputs, frozenset({"reading", "giving"}), lambda rows: {"text#x": {"tokens": texts[:2]}})
    assert asked == ["text", "text"]
    assert outputs["local"].keys() == {"reading"}
    assert outputs["local"]["reading"]["text#x"].shape == (2,)
    assert outputs["rows"].keys() == {"image", "text", "text#x", "giving"}


def test_a_stored_field_is_its_rows():
    model = tiny.build()
    model.encoder_of["teacher"], model.sizes["teacher"] = "stored", 7
    values = torch.randn(3, 7)
    assert model({"teacher": {"values": values}})["rows"]["teacher"] is values
    assert (model.size_of("teacher"), model.size_of("image")) == (7, 24)


def test_a_pool_of_attention_tells_no_patches():
    model = tiny.build(vision_cfg={**tiny.MODEL_CFG["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2})
    with pytest.raises(UserError, match="does not tell what it makes of single patches"):
        model.width("image")
    with pytest.raises(UserError, match="no table of tokens"):
        model.token_embedding("image")


def test_a_text_tower_within_clip_tells_tokens_where_it_is_causal():
    text = {**tiny.MODEL_CFG["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    model = tiny.build(text_cfg=text)
    with pytest.raises(UserError, match=r"CLIP without a causal mask; .*custom_text: true"):
        model.width("text")
    with pytest.raises(UserError, match="does not tell what it makes of single tokens"):
        model.encode_tokens("text", {"tokens": tiny.batch(model, 2)[1]})
