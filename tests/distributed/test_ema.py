"""The moving average of the weights: by its definition at every stage, through a resume on other ranks, out again."""

import pytest
import torch

import tiny
from data_tools.errors import UserError
from pretrain.engine.checkpoint import Checkpoints, Extras
from pretrain.engine.committed import Retention
from pretrain.engine.engine import Engine
from pretrain.engine.state import TrainState
from pretrain.engine.weights import CheckpointReader, describe, load_trained, restore_optimizer
from pretrain.process.runtime import start
from pretrain.towers.adapt.lock import Lock
from pretrain.towers.parts import tower_of
from ranks import run_ranks

PAIRS, DECAY = 16, 0.3  # reached by the third update
STAGES = (0, 1, 2, 3)
EXTRAS = Extras(describe(tiny.SPEC), "seed: 0\n")


def trained(rank, world_size, folder, last, ema=DECAY):
    """Goes on to step `last` at every stage, a checkpoint after every step; the text tower is locked."""
    runtime = start(distributed=True)
    local = PAIRS // world_size
    rows = slice(rank * local, (rank + 1) * local)
    for stage in STAGES:
        store = Checkpoints(folder / str(stage), runtime, Retention(keep=99))
        found, model, first = store.find(), tiny.build(), 0
        Lock(["text"]).apply(model)
        reader = found and CheckpointReader(found)
        if reader:
            model.load_state_dict(reader.weights())
            first = reader.state().step
        engine = Engine(model, *tiny.settings(PAIRS, stage, ema=ema), runtime)
        if reader:
            restore_optimizer(engine, reader, first)
        for step in range(first, last):
            images, tokens = tiny.batch(model, PAIRS, seed=step)
            tiny.backward(engine, tiny.micro_batches(model, images[rows], tokens[rows], local))
            engine.update(1e-3)
            store.save(engine, TrainState(step=step + 1, samples_seen=PAIRS * (step + 1)), EXTRAS)


def averages(folder, stage, steps):
    """By definition, from the weights that were saved after each step."""
    average = {name: p.detach().clone() for name, p in tiny.build().named_parameters()}
    for step in range(1, steps + 1):
        weights = CheckpointReader(folder / str(stage) / "checkpoints" / f"step-{step:09d}").weights()
        decay = min(DECAY, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    return average


def assert_averages(folder, steps):
    for stage in STAGES:
        newest = folder / str(stage) / "checkpoints" / f"step-{steps:09d}"
        want, got = averages(folder, stage, steps), load_trained(newest, ema=True).state_dict()
        raw = load_trained(newest).state_dict()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7)
            assert torch.equal(got[name], raw[name]) == (tower_of(name) == "text"), f"stage {stage}: {name}"


def test_the_average_is_that_of_its_definition(tmp_path):
    run_ranks(2, trained, tmp_path, 3)
    assert_averages(tmp_path, 3)
    run_ranks(1, trained, tmp_path, 5)
    assert_averages(tmp_path, 5)


def test_an_average_may_begin_at_a_resume(tmp_path):
    run_ranks(1, trained, tmp_path, 2, None)
    with pytest.raises(UserError, match=r"has no moving average of its weights; remedy: train with optim\.ema"):
        load_trained(tmp_path / "1", ema=True)
    run_ranks(2, trained, tmp_path, 3)
    for stage in STAGES:
        before, now = (load_trained(tmp_path / str(stage) / "checkpoints" / f"step-{n:09d}") for n in (2, 3))
        average = load_trained(tmp_path / str(stage), ema=True)
        for name, value in average.named_parameters():
            want = DECAY * before.get_parameter(name) + (1 - DECAY) * now.get_parameter(name)
            torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-7)
