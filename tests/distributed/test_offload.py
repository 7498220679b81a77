"""The optimizer on the host: the same steps bit for bit, and checkpoints that do not tell where they come from."""

import dataclasses
import math

import pytest
import torch

import tiny
from data_tools.errors import UsageError
from pretrain.config.check import check
from pretrain.config.tree import DataConfig, Source, TrainConfig
from pretrain.engine.checkpoint import Checkpoints, Extras
from pretrain.engine.engine import Engine
from pretrain.engine.state import TrainState
from pretrain.engine.weights import CheckpointReader, describe, restore_optimizer
from pretrain.process.runtime import start
from pretrain.tasks import ContrastiveConfig
from ranks import run_ranks

PAIRS = 16
RUNS = [(1, "fp32", 2), (2, "bf16", 1), (3, "fp32", 2)]  # ZeRO stage, precision, micro-batches


def make_engine(runtime, stage, precision, offload, reader=None):
    model = tiny.build()
    if reader is not None:
        model.load_state_dict(reader.weights())
    optim, train = tiny.settings(PAIRS, stage, precision, lr=1e-3, weight_decay=0.1)
    engine = Engine(model, optim, dataclasses.replace(train, offload_optimizer=offload), runtime)
    if reader is not None:
        restore_optimizer(engine, reader, reader.state().step)
    return engine


def train_steps(engine, runtime, parts, first, last):
    """Losses of the steps and this rank's fragments after them."""
    local = PAIRS // runtime.world_size
    rows, losses = slice(runtime.rank * local, (runtime.rank + 1) * local), []
    for step in range(first, last):
        images, tokens = tiny.batch(engine.module, PAIRS, seed=step)
        micro_batches = tiny.micro_batches(engine.module, images[rows], tokens[rows], local // parts)
        losses.append(float(tiny.backward(engine, micro_batches)))
        engine.update(1e-3)
    return losses, {f"{f.name}|{kind}": value.clone() for f in engine.fragments() for kind, value in f.values.items()}


def equal(got, want):
    (losses, fragments), (want_losses, want_fragments) = got, want
    same_keys = losses == want_losses and fragments.keys() == want_fragments.keys()
    return same_keys and all(torch.equal(fragments[key], value) for key, value in want_fragments.items())


def compare(rank, world_size, folder):
    """For each of RUNS: is the third step the same offloaded, and resumed from a checkpoint of the other kind?"""
    runtime = start(distributed=True)
    torch.set_num_threads(1)
    return [verdict(runtime, folder / str(number), *run) for number, run in enumerate(RUNS)]


def verdict(runtime, folder, stage, precision, parts):
    thirds, readers = [], []
    for offload in (False, True):
        engine = make_engine(runtime, stage, precision, offload)
        assert engine.deepspeed.zero_cpu_offload() == offload
        train_steps(engine, runtime, parts, 0, 2)
        store = Checkpoints(folder / str(offload), runtime)
        store.save(engine, TrainState(step=2, samples_seen=2 * PAIRS), Extras(describe(tiny.SPEC), ""))
        thirds.append(train_steps(engine, runtime, parts, 2, 3))
        readers.append(CheckpointReader(store.find()))
    for offload, reader in zip((True, False), readers, strict=True):
        engine = make_engine(runtime, stage, precision, offload, reader)
        thirds.append(train_steps(engine, runtime, parts, 2, 3))
    return [equal(third, thirds[0]) for third in thirds]


def test_offloaded_steps_and_checkpoints_are_the_same_bit_for_bit(tmp_path):
    assert run_ranks(2, compare, tmp_path, timeout=300) == [[[True] * 4] * len(RUNS)] * 2


def test_stage_0_has_nothing_to_offload():
    config = ContrastiveConfig(data=DataConfig([Source("s")]), train=TrainConfig(zero_stage=0, offload_optimizer=True))
    with pytest.raises(UsageError, match=r"train\.offload_optimizer"):
        check(config)


def clamped(rank, world_size):
    """By stage the offloaded master of log(scale) after a step beyond its cap, and the scale that a forward sees."""
    runtime, results = start(distributed=True), []
    for stage in (1, 3):
        engine = make_engine(runtime, stage, "fp32", True)
        outputs = engine(tiny.micro_batches(engine.module, *tiny.batch(engine.module, PAIRS), PAIRS)[0])
        unused = sum(0 * rows.sum() for rows in outputs["rows"].values())
        engine.backward(unused - 10 * outputs["shared"]["logit_scale"].log().sum())
        engine.update(9.0)
        fragments = engine.fragments()
        masters = [f.values["weight"].item() for f in fragments if "logit_scale" in f.name]
        results.append((masters, engine.scalars()["logit_scale"]))
    return results


def test_the_clamp_reaches_the_offloaded_master():
    for of_ranks in zip(*run_ranks(2, clamped), strict=True):
        assert [master for masters, _ in of_ranks for master in masters] == pytest.approx([math.log(100)])
        assert [scale for _, scale in of_ranks] == pytest.approx([100, 100], rel=1e-5)


def moved_at_once(rank, world_size, stage):
    """The most parameters that one call moves to the device while an engine is made, and how many there are."""
    runtime, moved, apply = start(distributed=True), [0], torch.nn.Module._apply  # which all of .to() goes through

    def recorded(module, *args, **kwargs):
        moved.append(sum(p.numel() for p in module.parameters()))
        return apply(module, *args, **kwargs)

    model = tiny.build()
    size = sum(p.numel() for p in model.parameters())
    torch.nn.Module._apply = recorded
    Engine(model, *tiny.settings(PAIRS, stage), runtime)
    return max(moved), size


def test_zero_3_never_has_the_whole_model_on_the_device():
    """Which may be smaller; without a GPU it can only be seen that nothing moves the model as a whole."""
    (moved, size), *_ = run_ranks(2, moved_at_once, 2)
    assert moved == size
    (moved, size), *_ = run_ranks(2, moved_at_once, 3)
    assert moved == 0
