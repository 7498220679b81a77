"""Checkpoints: exact at every stage and world size, and whole whenever a process is killed."""

import os
import signal
from pathlib import Path

import pytest
import torch

import tiny
from data_tools.errors import UserError
from pretrain.engine import checkpoint as checkpoints
from pretrain.engine.checkpoint import Checkpoints, Extras, fault_of, newest_intact
from pretrain.engine.engine import Engine
from pretrain.engine.gradcache import contrastive_backward
from pretrain.engine.state import TrainState
from pretrain.engine.weights import CheckpointReader, describe, restore_optimizer
from pretrain.losses.contrastive import infonce
from pretrain.runtime import start
from ranks import run_ranks

PAIRS = 16
EXTRAS = Extras(describe(tiny.SPEC), "seed: 0\n")


def fresh_engine(runtime, stage, reader=None):
    torch.set_num_threads(1)
    model = tiny.build()
    if reader is not None:
        model.load_state_dict(reader.weights())
    return Engine(model, *tiny.settings(PAIRS, stage, weight_decay=0.1, lr=1e-3), runtime)


def train_steps(engine, rank, world_size, first, last):
    """Steps first .. last on seeded batches; the rank-local losses."""
    local = PAIRS // world_size
    rows = slice(rank * local, (rank + 1) * local)
    losses = []
    for step in range(first, last):
        images, tokens = tiny.batch(engine.module, PAIRS, seed=step)
        parts = tiny.micro_batches(engine.module, images[rows], tokens[rows], local)
        losses.append(float(contrastive_backward(engine, parts, infonce)))
        engine.update(1e-3)
    return losses


def uninterrupted(rank, world_size, stage, folder):
    """Six steps; a checkpoint after the third. Returns the losses of the last three."""
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, stage)
    train_steps(engine, rank, world_size, 0, 3)
    Checkpoints(folder, runtime).save(engine, TrainState(step=3, samples_seen=3 * PAIRS), EXTRAS)
    return train_steps(engine, rank, world_size, 3, 6)


def resumed(rank, world_size, stage, folder):
    """The last three steps from the checkpoint."""
    runtime = start(distributed=True)
    reader = CheckpointReader(Checkpoints(folder, runtime).find())
    engine = fresh_engine(runtime, stage, reader)
    restore_optimizer(engine, reader, reader.state().step, rank, world_size)
    return train_steps(engine, rank, world_size, 3, 6)


def mean(ranks):
    return [sum(values) / len(ranks) for values in zip(*ranks, strict=True)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_exact_at_the_same_world_size_and_close_at_others(stage, tmp_path):
    want = run_ranks(2, uninterrupted, stage, tmp_path)
    assert run_ranks(2, resumed, stage, tmp_path) == want
    for world_size in (1, 4):
        got = mean(run_ranks(world_size, resumed, stage, tmp_path))
        assert got == pytest.approx(mean(want), rel=1e-5)


def test_resume_at_another_stage(tmp_path):
    want = mean(run_ranks(2, uninterrupted, 1, tmp_path))
    assert mean(run_ranks(2, resumed, 3, tmp_path)) == pytest.approx(want, rel=1e-5)


def save_twice(rank, world_size, folder, point, victim):
    """Commit step 1, then die at `point` while committing step 2."""
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, 1)
    store = Checkpoints(folder, runtime, keep=1)
    store.save(engine, TrainState(step=1), EXTRAS)
    (Path(folder) / f"first-{rank}").touch()

    def die(name):
        if name == point and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.commit_point = die
    store.save(engine, TrainState(step=2), EXTRAS)


POINTS = [
    ("before-rank-file", 1),
    ("rank-file-unsynced", 1),
    ("rank-file-synced", 0),
    ("before-manifest", 0),
    ("before-rename", 0),
    ("before-pointer", 0),
    ("before-pruning", 0),
    ("while-pruning", 0),
]


def test_every_commit_point_is_listed():
    source = Path(checkpoints.__file__).read_text()
    assert [name for name, _ in POINTS] == [part.split('"')[1] for part in source.split("commit_point(")[2:]]


@pytest.mark.parametrize(("point", "victim"), POINTS)
def test_sigkill_at_a_commit_point_loses_nothing(point, victim, tmp_path):
    with pytest.raises(AssertionError):
        run_ranks(2, save_twice, tmp_path, point, victim, timeout=60)
    assert (tmp_path / "first-0").exists()
    assert (tmp_path / "first-1").exists()
    found, notes = newest_intact(tmp_path / checkpoints.FOLDER)
    committed = point in ("before-pointer", "before-pruning", "while-pruning")
    assert (found.name, notes) == (f"step-{2 if committed else 1:09d}", [])
    assert fault_of(found) is None
    assert set(CheckpointReader(found).weights()) == set(dict(tiny.build().named_parameters()))
    again = run_ranks(2, save_again, tmp_path)  # what was left over does not stand in the way
    assert again == ["step-000000003"] * 2
    left = {path.name for path in (tmp_path / checkpoints.FOLDER).iterdir()}
    assert left == {"latest", "step-000000003"}


def save_again(rank, world_size, folder):
    runtime = start(distributed=True)
    return Checkpoints(folder, runtime, keep=1).save(fresh_engine(runtime, 1), TrainState(step=3), EXTRAS).name


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest"])
def test_damage_is_seen_and_the_one_before_is_used(damage, tmp_path):
    run_ranks(1, save_two, tmp_path)
    newest = tmp_path / checkpoints.FOLDER / "step-000000002"
    victim = next(newest.glob("rank-*"))
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(data[:-1])
    elif damage == "delete":
        victim.unlink()
    else:
        (newest / checkpoints.MANIFEST).write_text("{")
    found, notes = newest_intact(newest.parent)
    assert found.name == "step-000000001"
    assert len(notes) == 1
    assert str(newest) in notes[0]


def save_two(rank, world_size, folder):
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, 0)
    for step in (1, 2):
        Checkpoints(folder, runtime).save(engine, TrainState(step=step), EXTRAS)


def find_or_error(rank, world_size, folder):
    try:
        return Checkpoints(folder, start(distributed=True)).find()
    except UserError as error:
        return str(error)


def test_all_damaged_is_an_error_on_every_rank(tmp_path):
    run_ranks(1, save_two, tmp_path)
    for victim in tmp_path.glob("*/step-*/rank-*"):
        victim.unlink()
    messages = run_ranks(2, find_or_error, tmp_path)
    assert messages[0] == messages[1]
    assert "no checkpoint" in messages[0]
    assert "restore a copy" in messages[0]


def save_unwritable(rank, world_size, folder):
    """Rank 1 alone cannot write: both must hear of it."""
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, 1)
    store = Checkpoints(folder, runtime)
    if rank == 1:

        def full(path, engine):
            raise OSError(28, "No space left on device")

        store._write_rank = full
    try:
        store.save(engine, TrainState(step=1), EXTRAS)
    except UserError as error:
        return str(error)


def test_a_full_disk_on_one_rank_is_told_to_all(tmp_path):
    messages = run_ranks(2, save_unwritable, tmp_path)
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0]
    assert "No space left" in messages[0]
    assert newest_intact(tmp_path / checkpoints.FOLDER) == (None, [])
