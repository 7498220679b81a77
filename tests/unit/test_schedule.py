"""The learning rate by samples, and which parameters decay."""

import pytest

import tiny
from pretrain.config import OptimConfig
from pretrain.engine.groups import parameter_groups
from pretrain.engine.schedule import Schedule


def test_warmup_then_cosine_to_zero():
    schedule = Schedule("cosine", peak=1.0, warmup=100, total=1100)
    assert schedule.lr(0, 10) == pytest.approx(0.1)
    assert schedule.lr(90, 10) == pytest.approx(1.0)
    assert schedule.lr(600, 10) == pytest.approx(0.5)
    assert schedule.lr(1100, 10) == pytest.approx(0.0, abs=1e-12)


def test_constant_after_warmup():
    schedule = Schedule("constant", peak=2.0, warmup=0, total=1000)
    assert [schedule.lr(samples, 10) for samples in (0, 500, 990)] == [2.0, 2.0, 2.0]


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
