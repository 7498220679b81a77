"""The learning rate by samples, and which parameters decay."""

import math

import pytest
import torch

import tiny
from data_tools.errors import UserError
from pretrain.config.tree import OptimConfig, PartConfig
from pretrain.engine.groups import parameter_groups
from pretrain.engine.schedule import Schedule
from pretrain.towers.adapt.lock import Lock
from pretrain.towers.parts import layers_above, tower_of


def test_warmup_then_cosine_to_zero():
    schedule = Schedule("cosine", peak=1.0, warmup=100, total=1100)
    assert schedule.lr(0, 10) == pytest.approx(0.1)
    assert schedule.lr(90, 10) == pytest.approx(1.0)
    assert schedule.lr(600, 10) == pytest.approx(0.5)
    assert schedule.lr(1100, 10) == pytest.approx(0.0, abs=1e-12)


def test_constant_after_warmup():
    schedule = Schedule("constant", peak=2.0, warmup=0, total=1000)
    assert [schedule.lr(samples, 10) for samples in (0, 500, 990)] == [2.0, 2.0, 2.0]


def test_a_cooldown_ends_at_zero():
    schedule = Schedule("constant", peak=2.0, warmup=100, total=1000, cooldown=400)
    assert [schedule.lr(samples, 10) for samples in (300, 600)] == [2.0, 2.0]
    assert schedule.lr(700, 10) == pytest.approx(1.0)  # a quarter of the way: half of the fall
    assert schedule.lr(990, 10) == pytest.approx(2 * (1 - math.sqrt(390 / 400)))
    assert schedule.lr(1000, 10) == 0


def test_the_batch_does_not_move_the_schedule():
    """At the same samples seen, another batch gives the same rate once the warmup is over."""
    schedule = Schedule("cosine", peak=1.0, warmup=64, total=4096)
    assert [schedule.lr(s, 16) for s in range(64, 4096, 64)] == [schedule.lr(s, 64) for s in range(64, 4096, 64)]


def test_matrices_decay_and_vectors_do_not():
    model = tiny.build()
    names = {id(p): name for name, p in model.named_parameters()}
    decay, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, OptimConfig()))
    assert "clip.visual.conv1.weight" in decay
    assert "clip.token_embedding.weight" in decay
    assert {"clip.logit_scale", "clip.ln_final.bias", "clip.positional_embedding"} <= set(plain)
    assert {"clip.visual.positional_embedding", "clip.visual.class_embedding"} <= set(plain)
    assert len(decay) + len(plain) == len(names)
    as_open_clip, _ = parameter_groups(model, OptimConfig(decay_embeddings=True))
    assert names.keys() >= {id(p) for p in as_open_clip["params"]}
    assert {"clip.positional_embedding", "clip.visual.positional_embedding"} <= {
        names[id(p)] for p in as_open_clip["params"]
    }


PARTS = {"image": PartConfig(weight_decay=0.05), "text": PartConfig(lr=5e-4), "head": PartConfig(lr=2e-3)}


def test_a_head_has_a_rate_of_its_own():
    model = torch.nn.ModuleDict({"towers": tiny.build(), "head": torch.nn.Linear(2, 2)})
    groups = parameter_groups(model, OptimConfig(lr=1e-3, parts=PARTS))
    of_head = [group for group in groups if any(p is model["head"].weight for p in group["params"])]
    assert [(group["lr_scale"], group["weight_decay"], len(group["params"])) for group in of_head] == [(2, 0.2, 1)]


def test_rates_differ_by_tower_and_layer():
    model = tiny.build()
    optim = OptimConfig(lr=1e-3, parts=PARTS, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, optim):
        found |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    assert found["clip.visual.proj"] == (1, 0.05)
    assert found["clip.visual.transformer.resblocks.1.attn.in_proj_weight"] == (0.5, 0.05)
    assert found["clip.visual.transformer.resblocks.0.ln_1.weight"] == (0.25, 0)
    assert found["clip.visual.conv1.weight"] == (0.125, 0.05)
    assert found["clip.visual.positional_embedding"] == (0.125, 0)
    assert found["clip.text_projection"] == (0.5, 0.2)
    assert found["clip.token_embedding.weight"] == (0.0625, 0.2)
    assert found["clip.logit_scale"] == (1, 0)
    assert set(found) == set(names.values())


def test_layers_of_other_towers():
    image = [
        "clip.visual.trunk.blocks.0.attn.w",
        "clip.visual.trunk.patch_embed.proj.weight",
        "clip.visual.trunk.norm.w",
    ]
    text = [
        "clip.text.transformer.encoder.layer.1.output.dense.w",
        "clip.text.transformer.embeddings.w",
        "clip.text.proj.0.w",
    ]
    assert list(layers_above([*image, *text, "head.weight"]).values()) == [1, 2, 0, 1, 3, 0, 0]


@pytest.mark.parametrize(
    "names",
    [
        ["clip.visual.trunk.stages.0.blocks.1.w", "clip.visual.trunk.stages.1.blocks.1.w"],  # ConvNeXt
        ["clip.visual.trunk.layers.2.blocks.7.w"],  # Swin
        ["clip.visual.trunk.blocks.1.0.w"],  # Twins
        ["clip.text.transformer.encoder.block.5.layer.1.w"],  # mT5
        ["clip.visual.attnpool.w"],
    ],
)
def test_layers_that_are_not_one_row_are_refused(names):
    with pytest.raises(UserError, match=r"cannot number the layers of the (image|text) tower.*layer_decay=1\.0"):
        layers_above(names)


def test_a_locked_tower_has_no_group():
    model = tiny.build()
    Lock(["text"]).apply(model)
    learning = {id(p) for group in parameter_groups(model, OptimConfig()) for p in group["params"]}
    towers = {tower_of(name) for name, p in model.named_parameters() if id(p) in learning}
    assert towers == {"image", "logits"}
