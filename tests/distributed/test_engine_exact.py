"""Gradients of the engine on real ranks, cached and uncached, against one process in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

import tiny
from pretrain.engine.engine import Engine, NonFiniteError
from pretrain.engine.gradcache import contrastive_backward
from pretrain.losses.contrastive import infonce
from pretrain.runtime import start
from ranks import run_ranks

PAIRS = 16


def reference():
    """Loss and full gradients, one process, fp64, plain autograd, text at full length."""
    model = tiny.build().double()
    images, tokens = tiny.batch(model, PAIRS)
    image = F.normalize(model.clip.encode_image(model._pixels(images)), dim=-1)
    text = F.normalize(model.clip.encode_text(tokens), dim=-1)
    logits = model.clip.logit_scale.exp() * image @ text.T
    target = torch.arange(PAIRS)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def gradients(rank, world_size, configurations):
    """Loss and full gradients for every (stage, precision, micro_batch) of `configurations`."""
    from deepspeed.utils import safe_get_full_grad

    runtime, results = start(distributed=True), []
    torch.set_num_threads(1)
    local = PAIRS // world_size
    for stage, precision, micro in configurations:
        model = tiny.build()
        images, tokens = tiny.batch(model, PAIRS)
        engine = Engine(model, *tiny.settings(PAIRS, stage, precision), runtime)
        rows = slice(rank * local, (rank + 1) * local)
        parts = tiny.micro_batches(model, images[rows], tokens[rows], micro or local)
        loss = contrastive_backward(engine, parts, infonce)
        grads = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
        results.append((loss.item(), grads))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_one_process(world_size):
    configurations = [(stage, "fp32", micro) for stage in (0, 1, 2, 3) for micro in (None, 2)]
    configurations += [(1, "bf16", None), (0, "bf16", 2)]
    want_loss, want = reference()
    ranks = run_ranks(world_size, gradients, configurations, timeout=300)
    for number, (stage, precision, micro) in enumerate(configurations):
        bound = 1e-5 if precision == "fp32" else 5e-2
        loss = sum(rank[number][0] for rank in ranks) / world_size
        assert abs(loss - want_loss) < bound * want_loss
        for name, grad in ranks[0][number][1].items():
            error = (grad.double() - want[name]).norm() / want[name].norm()
            assert error < bound, f"stage {stage}, {precision}, micro {micro}: {name} is off by {error:.1e}"


def poisoned(rank, world_size, stage):
    """One rank's image tower overflows: does every rank stop before the update?"""
    runtime = start(distributed=True)
    model = tiny.build()
    images, tokens = tiny.batch(model, PAIRS)
    engine = Engine(model, *tiny.settings(PAIRS, stage), runtime)
    if rank == world_size - 1:
        engine.module.clip.visual.ln_post.register_forward_hook(lambda *a: a[2] * math.nan)
    before = sum_of_masters(engine, rank, world_size)
    contrastive_backward(engine, tiny.micro_batches(model, images, tokens, PAIRS), infonce)
    try:
        engine.update(1e-3)
    except NonFiniteError:
        return before == sum_of_masters(engine, rank, world_size)
    return "no error"


def sum_of_masters(engine, rank, world_size):
    from pretrain.engine.fragments import local_fragments

    return [float(f.values["weight"].double().sum()) for f in local_fragments(engine, rank, world_size)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_gradient_stops_all_ranks_before_the_update(stage):
    assert run_ranks(2, poisoned, stage) == [True, True]


def scale_after_steps(rank, world_size, stage):
    """The master of log(scale), pushed against its cap for a few steps."""
    from pretrain.engine.fragments import local_fragments

    runtime = start(distributed=True)
    model = tiny.build()
    with torch.no_grad():
        model.clip.logit_scale.fill_(math.log(100) - 0.01)
    engine = Engine(model, *tiny.settings(PAIRS, stage), runtime)
    for _ in range(5):
        image, text, scale = engine(*tiny.micro_batches(model, *tiny.batch(model, PAIRS), PAIRS)[0])
        engine.backward(0 * image.sum() + 0 * text.sum() - 10 * scale.log().sum())
        engine.update(0.1)
    masters = [
        f.values["weight"].tolist() for f in local_fragments(engine, rank, world_size) if "logit_scale" in f.name
    ]
    return masters, engine.logit_scale()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clamp_reaches_the_master(stage):
    ranks = run_ranks(2, scale_after_steps, stage)
    masters = [value for masters, _ in ranks for master in masters for value in master]
    assert masters == pytest.approx([math.log(100)])
    assert [scale for _, scale in ranks] == pytest.approx([100, 100], rel=1e-5)
