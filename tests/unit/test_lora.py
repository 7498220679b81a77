"""Low-rank matrices beside the layers of every kind of tower: what they compute, what learns, and merging them."""

import copy
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

import checkpoints
import tiny
from data_tools.errors import UsageError, UserError
from pretrain.config.reading import load_config
from pretrain.config.tree import OptimConfig, PartConfig
from pretrain.engine.groups import parameter_groups
from pretrain.engine.weights import describe, load_trained
from pretrain.export.writer import export_model
from pretrain.tasks import ContrastiveConfig
from pretrain.towers.adapt import LoraConfig, described
from pretrain.towers.adapt.lock import Lock
from pretrain.towers.adapt.lora import Lora
from pretrain.towers.adapt.order import adapt
from pretrain.towers.adapt.split_attention import SplitAttention, splits
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.parts import tower_of
from text_towers import CONFIGS, architecture

BOTH = ["image", "text"]
TIMM = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


def randomised(model, seed=1):
    """`model` with B away from 0, where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def lora(model, *before, **settings):
    settings = {"parts": BOTH} | settings
    adapt(model, [*before, Lora(LoraConfig(**settings))])
    return model


def features(model):
    images, tokens = tiny.batch(model, 4)
    images = (images.to(model.pixel_mean.dtype) - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        return torch.cat([model.clip.encode_image(images), model.clip.encode_text(tokens)])


def custom(**cfg):
    whole = copy.deepcopy(tiny.MODEL_CFG) | {"custom_text": True}
    for tower, changes in cfg.items():
        whole[tower] = changes if "timm_model_name" in changes else whole[tower] | changes
    torch.manual_seed(0)
    return DualEncoder(replace(tiny.SPEC, model_cfg=whole), text_buckets=2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_split_attention_is_torchs_own(batch_first, masked):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    nn.init.normal_(whole.in_proj_bias)
    assert splits(whole)
    assert not splits(nn.MultiheadAttention(12, 3, kdim=5))
    assert not splits(nn.MultiheadAttention(12, 3, add_bias_kv=True))
    rows, mask = torch.randn(4, 5, 12).double(), torch.full((5, 5), -torch.inf).double().triu(1) if masked else None
    rows = rows if batch_first else rows.transpose(0, 1)
    want, _ = whole(rows, rows, rows, need_weights=False, attn_mask=mask)
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    split = SplitAttention(whole)
    torch.testing.assert_close(split(rows, rows, rows, need_weights=False, attn_mask=mask)[0], want, rtol=0, atol=1e-14)
    assert split.state_dict().keys() == state.keys()
    assert split.in_proj.weight is whole.in_proj_weight
    nn.init.zeros_(split.in_proj.weight)
    split.load_state_dict(state)
    torch.testing.assert_close(split(rows, rows, rows, attn_mask=mask)[0], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("towers", ["plain", "timm", "bert", "mt5", "m2m_100"])
def test_merged_weights_compute_what_the_matrices_do(towers, tmp_path):
    if towers == "plain":
        make = tiny.build
    elif towers == "timm":
        make = lambda: custom(vision_cfg=TIMM, text_cfg={"no_causal_mask": True, "pool_type": "last"})  # noqa: E731
    else:
        kind, sizes, pooler = CONFIGS[towers]
        kind(**sizes).save_pretrained(tmp_path)
        path = architecture(tmp_path, hf_pooler_type=pooler)
        make = lambda: build_model(path, 0)  # noqa: E731
    plain, model = make().double().eval(), lora(make()).double().eval()
    torch.testing.assert_close(features(model), features(plain), rtol=0, atol=1e-12)  # as long as B is 0
    randomised(model)
    plain.load_state_dict(model.adapters[0].merged(model.state_dict()))
    difference = (features(model) - features(plain)).abs().max()
    assert difference <= 1e-12 * features(plain).abs().max()
    assert (features(plain) - features(make().double().eval())).abs().max() > 1e-2


def test_merging_is_pefts_own():
    model = randomised(lora(tiny.build(), rank=3, alpha=5.0)).double()
    merged = model.adapters[0].merged(model.state_dict())
    for layer in (layer for layer in model.modules() if isinstance(layer, Linear)):
        layer.merge()
    state = model.state_dict()
    assert len(state) == len(merged) + 2 * 16  # A and B of 2 towers, 2 layers, 4 linear layers
    for name, value in merged.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("settings", "learning", "layers"),
    [
        ({}, {"image", "text", "logits"}, {"attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}),
        ({"targets": "mlp"}, {"image", "text", "logits"}, {"mlp.c_fc", "mlp.c_proj"}),
        ({"targets": "attention"}, {"image", "text", "logits"}, {"attn.in_proj", "attn.out_proj"}),
        ({"parts": ["text"]}, {"text", "logits"}, {"attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_what_learns_is_what_was_added(settings, learning, layers):
    """And the scalars; in `parts` alone, whose other parameters stay, while locked towers stay locked."""
    locked = [Lock(["image"])] if "parts" in settings else []
    model = lora(tiny.build(), *locked, **settings)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(map(tower_of, names)) == learning
    added = {name.split(".lora_")[0].split(".", 1)[1] for name in names if ".lora_" in name}
    assert {name.split("resblocks.")[1][2:] for name in added} == layers
    assert names - {name for name in names if ".lora_" in name} == {"clip.logit_scale"}
    assert len(added) == 2 * len(learning - {"logits"}) * len(layers)


def test_a_tower_beside_learns_whole():
    model = lora(tiny.build(), parts=["text"])
    plain = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert plain == {name for name, _ in tiny.build().named_parameters() if tower_of(name) in ("image", "logits")}


def test_rates_and_decay_of_parts_reach_the_matrices():
    model = lora(tiny.build())
    parts = {"image": PartConfig(lr=1e-4, weight_decay=0.5)}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(lr=1e-3, parts=parts, layer_decay=0.5))
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    image, text = ("resblocks.0.mlp.c_fc.lora_A.default.weight", "resblocks.1.mlp.c_fc.lora_B.default.weight")
    assert found[f"clip.visual.transformer.{image}"] == (pytest.approx(0.1 * 0.25), 0.5)
    assert found[f"clip.transformer.{text}"] == (0.5, 0.2)


def test_matrices_are_drawn_from_the_seed_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models = []
    for seed in (1, 1, 2):
        models.append(tiny.build())
        torch.manual_seed(3)
        adapt(models[-1], [Lora(LoraConfig(parts=BOTH), seed)])
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (
        torch.cat([p.flatten() for n, p in model.named_parameters() if ".lora_A." in n]) for model in models
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_export_has_the_native_names_and_computes_the_same_in_its_clients(tmp_path):
    model = randomised(lora(tiny.build(text_buckets=1))).eval()
    description = describe(model.spec, **described({"lora": model.adapters[0].settings}))
    run = checkpoints.write(tmp_path / "run", 4, model, description=description)
    names = tiny.build().state_dict().keys()
    opened = load_trained(run)
    assert opened.state_dict().keys() == names
    torch.testing.assert_close(features(opened), features(model), rtol=0, atol=1e-5)
    differences = export_model(opened, tmp_path / "out", ["open_clip", "transformers"])  # loads it there, and compares
    assert len(differences) == 6
    torch.testing.assert_close(features(load_trained(tmp_path / "out")), features(model), rtol=0, atol=1e-5)


def test_what_does_not_go_together_is_not_merged():
    state = lora(tiny.build()).state_dict()
    name = "clip.visual.transformer.resblocks.0.mlp.c_fc"
    for wrong in (
        {name: value for name, value in state.items() if "lora_B" not in name},
        state | {f"{name}.lora_A.weight": torch.zeros(8, 31)},
        state | {f"{name}.lora_B.weight": torch.zeros(128)},
        {key: value for key, value in state.items() if key != f"{name}.weight"},
    ):
        with pytest.raises(UserError, match=r"what LoRA added to clip.* does not go with its weights; got .*rank 8"):
            Lora(LoraConfig()).merged(wrong)
    with pytest.raises(UserError, match=r"got \(8, 32\).*rank 4"):
        Lora(LoraConfig(rank=4)).merged(state)


def test_dropout_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: [{urls: x}]}\nrun: {dir: x}\nadapters: {lora: {dropout: 0.1}}\n")
    with pytest.raises(UsageError, match=r"adapters.lora.dropout .*got 0.1; expected 0: masks drawn on each rank"):
        load_config(ContrastiveConfig, path)


def test_a_tower_without_a_place_says_so():
    blocks = {"block_type": "custom", "qk_norm": True}
    with pytest.raises(UserError, match=r"no place in visual\.transformer.*got Attention; .*remedy: .*targets: mlp"):
        lora(custom(vision_cfg=blocks))
    assert lora(custom(vision_cfg=blocks), targets="mlp")
    model = tiny.build()
    model.clip.visual = nn.Linear(2, 2)
    with pytest.raises(UserError, match="no place in the image tower"):
        lora(model)
