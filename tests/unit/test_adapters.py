"""The adapters that settings ask for: which, and in which order."""

import pytest

import tiny
from pretrain.config.tree import DataConfig, ModelConfig, Phase, RunConfig, Source, TrainConfig
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.towers.adapt import compiling
from pretrain.towers.adapt.order import adapt, adapters_of
from pretrain.towers.classifier import Classifier
from pretrain.towers.parts import tower_of

PLACES = {"run": RunConfig("x"), "data": DataConfig([Source("x")])}
PHASES = [Phase("1 steps", image_size=16), Phase("2 steps", patch_dropout=0.5)]


def test_settings_that_ask_for_nothing_change_nothing():
    assert adapters_of(ContrastiveConfig(**PLACES)) == []


def test_there_is_one_order():
    config = ContrastiveConfig(
        **PLACES,
        model=ModelConfig(init="x", locked=["image"], phases=PHASES),
        train=TrainConfig(grad_checkpointing=["text"], compile=True),
    )
    kinds = [type(adapter).__name__ for adapter in adapters_of(config)]
    assert kinds == ["SizePhases", "PatchPhases", "Lock", "GradCheckpointing", "Compile"]


def test_all_of_them_reach_the_towers(monkeypatch):
    monkeypatch.setattr(compiling, "CompiledTowers", lambda clip, rule: (clip, rule))
    config = ContrastiveConfig(
        **PLACES,
        model=ModelConfig(init="x", locked=["text"], phases=PHASES),
        train=TrainConfig(grad_checkpointing=["image", "text"], compile=True),
    )
    model = tiny.build()
    adapt(model, adapters_of(config))
    assert model.patch_shares == [0.0, 0.5, 0.0]
    assert "_embeds" in vars(model.clip.visual)
    assert {tower_of(name) for name, p in model.named_parameters() if p.requires_grad} == {"image", "logits"}
    assert model.clip.transformer.grad_checkpointing
    assert model.clip.visual.transformer.grad_checkpointing
    assert model.compiled == (model.clip, model.rule)
    assert model.rule.multiple == 16


@pytest.mark.parametrize(("mode", "learning"), [("linear", {"head"}), ("full", {"head", "image"})])
def test_of_a_classifier_no_text_learns(mode, learning):
    towers = tiny.build(init_logit_bias=-1.0)
    model = Classifier(towers, ("a", "b"), towers.clip.text_projection.detach()[:2], 3.0)
    config = ClassifyConfig(**PLACES, mode=mode, train=TrainConfig(grad_checkpointing=["image"]))
    adapt(model, adapters_of(config))
    assert {tower_of(name) for name, p in model.named_parameters() if p.requires_grad} == learning
    assert towers.clip.visual.transformer.grad_checkpointing
    assert not towers.clip.transformer.grad_checkpointing
