"""Gradients of the engine on real ranks against one process in fp64, over the whole matrix of what is offered.

fp16 is not in the matrix because it is not offered: its range needs a loss scale, which autocast in bf16 does without.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import tiny
from plain_losses import SETTINGS, identities, plain_loss
from pretrain.engine.engine import Engine, NonFiniteError, bounds
from pretrain.engine.gradcache import contrastive_backward
from pretrain.objectives.contrastive import Features, contrastive_loss
from pretrain.process.agree import all_reduce_sum
from pretrain.process.runtime import start
from ranks import run_ranks

PAIRS = 16
STAGES = (0, 1, 2, 3)
# Largest relative error, in norm, of any parameter's gradient and of the loss. In bf16 it is autocast's own error, the
# 2e-2 of one process without engine, ranks or cache, and half of it to spare.
BOUND = {"fp32": 1e-5, "bf16": 3e-2}
MATRIX = list(itertools.product(STAGES, BOUND, (1, 4)))  # ZeRO stage, precision, micro-batches


def reference(autocast=False, loss="infonce", **changes):
    """Loss and full gradients, one process, plain autograd, text at full length; fp64, or fp32 under autocast."""
    model = tiny.build(**changes) if autocast else tiny.build(**changes).double()
    images, tokens = tiny.batch(model, PAIRS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        image = model.clip.encode_image(model._pixels(images))
        text = model.clip.encode_text(tokens)
    dtype = torch.float32 if autocast else torch.float64
    image, text = F.normalize(image.to(dtype), dim=-1), F.normalize(text.to(dtype), dim=-1)
    bias = getattr(model.clip, "logit_bias", None)
    value = plain_loss(SETTINGS[loss], image, text, model.clip.logit_scale.exp(), bias, identities(PAIRS))
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors(got, want):
    """Relative errors of the loss and of every parameter's gradient, by name."""
    by_name = {name: float((got[1][name].double() - grad).norm() / grad.norm()) for name, grad in want[1].items()}
    return {"loss": abs(got[0] - want[0]) / want[0], **by_name}


def engine_errors(rank, world_size):
    """The errors of this rank's gradients for each row of MATRIX."""
    from deepspeed.utils import safe_get_full_grad

    runtime, want = start(distributed=True), reference()
    torch.set_num_threads(1)
    local = PAIRS // world_size
    rows = slice(rank * local, (rank + 1) * local)
    results = {}
    for stage, precision, parts in MATRIX:
        model = tiny.build()
        images, tokens = tiny.batch(model, PAIRS)
        engine = Engine(model, *tiny.settings(PAIRS, stage, precision), runtime)
        micro_batches = tiny.micro_batches(model, images[rows], tokens[rows], local // parts)
        loss = tiny.backward(engine, micro_batches)
        loss = all_reduce_sum([loss.item()])[0] / world_size
        grads = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
        results[stage, precision, parts] = errors((loss, grads), want)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_one_process(world_size):
    for results in run_ranks(world_size, engine_errors, timeout=300):
        assert len(results) == len(MATRIX)
        for (stage, precision, parts), by_name in results.items():
            assert "clip.logit_scale" in by_name
            for name, error in by_name.items():
                place = f"stage {stage}, {precision}, {parts} micro-batches"
                assert error < BOUND[precision], f"{place}: {name} is off by {error:.1e}"


def ours(settings, identity, rows, shared):
    return contrastive_loss(Features.of(rows, shared, identity), settings)


def loss_errors(rank, world_size):
    """The errors of this rank's gradients for each loss, at ZeRO 1 and 3, cached and uncached."""
    from deepspeed.utils import safe_get_full_grad

    runtime = start(distributed=True)
    local = PAIRS // world_size
    rows = slice(rank * local, (rank + 1) * local)
    results = {}
    for name, settings in SETTINGS.items():
        changes = {"init_logit_bias": -3.0} if settings.name == "sigmoid" else {}
        want = reference(loss=name, **changes)
        for stage, parts in itertools.product((1, 3), (1, 4)):
            model = tiny.build(**changes)
            model.clip.logit_scale.requires_grad_(settings.name != "margin")
            images, tokens = tiny.batch(model, PAIRS)
            engine = Engine(model, *tiny.settings(PAIRS, stage), runtime)
            micro_batches = tiny.micro_batches(model, images[rows], tokens[rows], local // parts)
            loss_fn = functools.partial(ours, settings, identities(PAIRS)[rows])
            loss = contrastive_backward(engine, micro_batches, loss_fn)
            loss = all_reduce_sum([loss.item()])[0] / world_size
            grads = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
            assert set(grads) == set(want[1])
            results[name, stage, parts] = errors((loss, grads), want)
    return results


def test_gradients_of_every_loss_equal_one_process():
    for results in run_ranks(2, loss_errors, timeout=300):
        assert len(results) == 4 * len(SETTINGS)
        for (loss, stage, parts), by_name in results.items():
            assert ("clip.logit_bias" in by_name) == (loss == "sigmoid")
            for name, error in by_name.items():
                assert error < 1e-5, f"{loss}, stage {stage}, {parts} micro-batches: {name} is off by {error:.1e}"


def test_the_bound_of_bf16_is_the_error_of_autocast_itself():
    largest = max(errors(reference(autocast=True), reference()).values())
    assert BOUND["bf16"] / 2 < largest < BOUND["bf16"]


def poisoned(rank, world_size):
    """One rank's image tower overflows: for each stage, does every rank stop before the update?"""
    runtime = start(distributed=True)
    return [stops_before_the_update(runtime, stage) for stage in STAGES]


def stops_before_the_update(runtime, stage):
    model = tiny.build()
    images, tokens = tiny.batch(model, PAIRS)
    engine = Engine(model, *tiny.settings(PAIRS, stage), runtime)
    if runtime.rank == runtime.world_size - 1:
        engine.module.clip.visual.ln_post.register_forward_hook(lambda *a: a[2] * math.nan)
    before = sum_of_masters(engine, runtime)
    tiny.backward(engine, tiny.micro_batches(model, images, tokens, PAIRS))
    try:
        engine.update(1e-3)
    except NonFiniteError:
        return before == sum_of_masters(engine, runtime)
    return "no error"


def sum_of_masters(engine, runtime):
    fragments = engine.fragments()
    return [float(f.values["weight"].double().sum()) for f in fragments]


def test_non_finite_gradient_stops_all_ranks_before_the_update():
    assert run_ranks(2, poisoned) == [[True] * len(STAGES)] * 2


class Wrapped(torch.nn.Module):
    """The towers inside another module, as a classifier or a fusion head holds them."""

    def __init__(self, towers):
        super().__init__()
        self.towers = towers

    def forward(self, *inputs):
        return self.towers(*inputs)


def scales_after_steps(rank, world_size):
    """For each stage, bare and wrapped: the masters of log(scale) that this rank saves, all copies of it that it holds,
    and what is logged, after five steps that push the scale against its cap."""
    runtime = start(distributed=True)
    return [scale_after_steps(runtime, stage, wrap) for stage in STAGES for wrap in (False, True)]


def scale_after_steps(runtime, stage, wrap):
    towers = tiny.build()
    with torch.no_grad():
        towers.clip.logit_scale.fill_(math.log(100) - 0.01)
    batch = tiny.micro_batches(towers, *tiny.batch(towers, PAIRS), PAIRS)[0]
    engine = Engine(Wrapped(towers) if wrap else towers, *tiny.settings(PAIRS, stage), runtime)
    for _ in range(5):
        outputs = engine(batch)
        unused = sum(0 * rows.sum() for rows in outputs["rows"].values())
        engine.backward(unused - 10 * outputs["shared"]["logit_scale"].log().sum())
        engine.update(0.1)
    masters = [value for f in engine.fragments() if "logit_scale" in f.name for value in f.values["weight"].tolist()]
    copies = [value for copy in engine.zero.copies(towers.clip.logit_scale) for value in copy.view(-1).tolist()]
    return masters, copies, engine.zero.read(towers.clip.logit_scale), engine.scalars()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_clamp_reaches_the_master_and_every_copy_wherever_the_towers_are(world_size):
    found = list(zip(*run_ranks(world_size, scales_after_steps), strict=True))
    assert len(found) == 2 * len(STAGES)
    for number, of_ranks in enumerate(found):
        assert [value for masters, *_ in of_ranks for value in masters] == pytest.approx([math.log(100)])
        for _, copies, whole, scalars in of_ranks:
            assert max(copies) <= whole == pytest.approx(math.log(100))
            assert scalars == ({} if number % 2 else {"logit_scale": pytest.approx(100, rel=1e-5)})


def test_bounds_that_name_no_parameter_are_an_error():
    model = torch.nn.Linear(1, 1)
    model.bounded = {"wieght": (0.0, 1.0)}
    with pytest.raises(AttributeError, match="wieght"):
        bounds(model)
    model.bounded = {"weight": (0.0, 1.0), "bias": (2.0, 3.0)}
    model.bias.requires_grad_(False)
    assert bounds(torch.nn.Sequential(model)) == [(model.weight, 0.0, 1.0)]
