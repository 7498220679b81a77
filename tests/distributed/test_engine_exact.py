"""The engine on real ranks beside its gradients (test_objectives_exact.py): what is not finite stops all of them before
the update, and a bound reaches the master of the parameter that has it.
"""

import math

import pytest
import torch

import tiny
from pretrain.engine.engine import Engine, NonFiniteError, bounds
from pretrain.process.runtime import start
from ranks import run_ranks

PAIRS = 16
STAGES = (0, 1, 2, 3)


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
