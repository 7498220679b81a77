"""Steps that are left out: nothing but the samples seen changes, on all ranks, at every stage."""

import math

import torch

import tiny
from pretrain.engine.engine import Engine, NonFiniteError
from pretrain.process.runtime import start
from ranks import run_ranks

PAIRS = 16


def tensors(engine, rank, world_size):
    """Weights and Adam states that this rank holds, and how far Adam has counted."""
    held = {f"{f.name}|{k}": v.clone() for f in engine.fragments() for k, v in f.values.items()}
    return held, {float(state["step"]) for state in engine.optimizer.state.values() if "step" in state}


def same(one, other):
    """Whether both hold the same bits."""
    (held, counted), (others, others_counted) = one, other
    return counted == others_counted and held.keys() == others.keys() and all(held[n].equal(others[n]) for n in held)


def skip_the_second(rank, world_size, configurations):
    """Three batches, the second poisoned on the last rank, against the first and third alone."""
    runtime = start(distributed=True)
    torch.set_num_threads(1)
    local = PAIRS // world_size
    rows = slice(rank * local, (rank + 1) * local)

    def run(stage, micro, batches):
        model = tiny.build()
        engine = Engine(model, *tiny.settings(PAIRS, stage, lr=1e-3), runtime)
        poison = [1.0]
        engine.module.clip.visual.ln_post.register_forward_hook(lambda *a: a[2] * poison[0])
        before, kept = tensors(engine, rank, world_size), True
        for number in batches:
            poison[0] = math.nan if number == 1 and rank == world_size - 1 else 1.0
            images, tokens = tiny.batch(model, PAIRS, seed=number)
            tiny.backward(engine, tiny.micro_batches(model, images[rows], tokens[rows], micro))
            try:
                engine.update(1e-3)
                before = tensors(engine, rank, world_size)
            except NonFiniteError:
                kept = number == 1 and same(before, tensors(engine, rank, world_size))
        return kept, before

    results = []
    for stage, micro in configurations:
        kept, with_skip = run(stage, micro, (0, 1, 2))
        _, without = run(stage, micro, (0, 2))
        results.append((kept, same(with_skip, without), with_skip[1]))
    return results


def test_a_skipped_step_leaves_no_trace():
    configurations = [(0, 2), (1, PAIRS // 2), (1, 2), (2, 2), (3, 2)]  # (stage, micro-batch): whole and cached
    for results in run_ranks(2, skip_the_second, configurations):
        assert dict(zip(configurations, results, strict=True)) == dict.fromkeys(configurations, (True, True, {2.0}))
