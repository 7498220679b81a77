"""Checkpoints: exact at every stage and world size, written while training goes on, and never half there."""

import itertools
import resource
import threading

import pytest
import torch
from safetensors.torch import load_file

import tiny
from data_tools.errors import UserError
from pretrain.engine import committed
from pretrain.engine.checkpoint import Checkpoints, Extras
from pretrain.engine.committed import newest_intact
from pretrain.engine.engine import Engine
from pretrain.engine.state import TrainState
from pretrain.engine.weights import CheckpointReader, describe, restore_optimizer
from pretrain.process.collectives import all_reduce_sum, gather
from pretrain.process.runtime import start
from ranks import run_ranks

PAIRS = 16
EXTRAS = Extras(describe(tiny.SPEC), "seed: 0\n")
RUNS = {"0": (0, "fp32"), "1": (1, "fp32"), "2": (2, "fp32"), "3": (3, "fp32"), "1 bf16": (1, "bf16")}
CHAIN = (2, 4, 1, 2)  # world sizes, two steps each
STEPS = 2 * len(CHAIN)


def fresh_engine(runtime, stage, reader=None, precision="fp32"):
    torch.set_num_threads(1)
    model = tiny.build()
    if reader is not None:
        model.load_state_dict(reader.weights())
    return Engine(model, *tiny.settings(PAIRS, stage, precision, weight_decay=0.1, lr=1e-3), runtime)


def resumed_engine(runtime, stage, folder, precision="fp32"):
    reader = CheckpointReader(Checkpoints(folder, runtime).find())
    engine = fresh_engine(runtime, stage, reader, precision)
    restore_optimizer(engine, reader, reader.state().step)
    return engine, reader.state().step


def train_steps(engine, runtime, first, last):
    """Steps first .. last on seeded batches; the rank-local losses."""
    local = PAIRS // runtime.world_size
    rows = slice(runtime.rank * local, (runtime.rank + 1) * local)
    losses = []
    for step in range(first, last):
        images, tokens = tiny.batch(engine.module, PAIRS, seed=step)
        parts = tiny.micro_batches(engine.module, images[rows], tokens[rows], local)
        losses.append(float(tiny.backward(engine, parts)))
        engine.update(1e-3)
    return losses


def at(step):
    return TrainState(step=step, samples_seen=step * PAIRS)


# ---- exactness ------------------------------------------------------------------------------------------------------


def uninterrupted(rank, world_size, folder):
    """Every run to its end; the checkpoint of step 2 is written beside the steps that follow it."""
    runtime = start(distributed=True)
    losses = {}
    for name, (stage, precision) in RUNS.items():
        engine = fresh_engine(runtime, stage, precision=precision)
        store = Checkpoints(folder / name, runtime)
        before = train_steps(engine, runtime, 0, 2)
        store.begin(engine, at(2), EXTRAS)
        losses[name] = before + train_steps(engine, runtime, 2, STEPS)
        store.wait()
    return losses


def resumed(rank, world_size, folder, save, names=tuple(RUNS), other_stage=None):
    """Two steps of every run from its newest checkpoint; losses, and the optimizer's options and step counts."""
    runtime = start(distributed=True)
    losses, options = {}, {}
    for name in names:
        stage, precision = RUNS[name]
        engine, step = resumed_engine(runtime, other_stage or stage, folder / name, precision)
        losses[name] = train_steps(engine, runtime, step, step + 2)
        groups = [(g["weight_decay"], tuple(g["betas"]), g["eps"], g["lr"]) for g in engine.optimizer.param_groups]
        counts = [state["step"] for state in engine.optimizer.state.values()]
        options[name] = groups, {float(count) for count in counts}, len({id(count) for count in counts}) == len(counts)
        if save:
            Checkpoints(folder / name, runtime).save(engine, at(step + 2), EXTRAS)
    return losses, options


def mean(ranks):
    return [sum(values) / len(ranks) for values in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """What the ranks of the uninterrupted run, of a resume at its own world size, and of the chain returned."""
    folder = tmp_path_factory.mktemp("chain")
    whole = run_ranks(CHAIN[0], uninterrupted, folder)
    again = run_ranks(CHAIN[0], resumed, folder, False)
    other_stage = run_ranks(2, resumed, folder, False, ("1",), 3)
    return whole, again, other_stage, [run_ranks(size, resumed, folder, True) for size in CHAIN[1:]]


@pytest.mark.parametrize("name", RUNS)
def test_a_resume_at_the_same_world_size_is_bit_exact(chain, name):
    whole, again, _, _ = chain
    for want, (got, _) in zip(whole, again, strict=True):
        assert got[name] == want[name][2:4]


def test_a_resume_at_another_stage_agrees(chain):
    whole, _, other_stage, _ = chain
    want = mean([losses["1"][2:4] for losses in whole])
    assert mean([losses["1"] for losses, _ in other_stage]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_chain_of_world_sizes_gives_the_uninterrupted_losses(chain, name):
    whole, _, _, links = chain
    want = mean([losses[name] for losses in whole])
    got = want[:2] + [loss for link in links for loss in mean([losses[name] for losses, _ in link])]
    assert got == pytest.approx(want, rel=5e-3 if name == "1 bf16" else 1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_chain_keeps_every_group_its_options_and_its_step(chain, name):
    """DeepSpeed's own conversion gives all groups of stage 3 the options of the first, and one shared step."""
    for done, link in enumerate(chain[3], 2):
        for _, options in link:
            groups, steps, separate = options[name]
            assert groups == [(decay, (0.9, 0.98), 1e-6, 1e-3) for decay in (0.1, 0.0)]
            assert steps == {2.0 * done}
            assert separate


# ---- beside the training --------------------------------------------------------------------------------------------


def hold_writers():
    """An event that every writer waits for before it writes."""
    go = threading.Event()
    committed.commit_point = lambda name: go.wait(60) if name == "before-rank-file" else None
    return go


def copies(engine, runtime):
    fragments = engine.fragments()
    return {f"{f.name}|{kind}": value.clone() for f in fragments for kind, value in f.values.items()}


def save_beside_training(rank, world_size, folder):
    """Per stage: whether training went on during the write, what the file holds and what it should hold."""
    runtime = start(distributed=True)
    outcome = {}
    for stage in (0, 1, 2, 3):
        go = hold_writers()
        engine = fresh_engine(runtime, stage)
        store = Checkpoints(folder / str(stage), runtime)
        train_steps(engine, runtime, 0, 1)
        state, want = at(1), copies(engine, runtime)
        store.begin(engine, state, EXTRAS)
        train_steps(engine, runtime, 1, 4)
        state.step = 4
        during = store.advance(*all_reduce_sum(store.progress())), store.progress(), newest_intact(store.folder)
        go.set()
        saved = store.wait()
        got = load_file(saved.folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors")
        now = copies(engine, runtime)
        same = set(got) == set(want) and all(torch.equal(got[key], want[key]) for key in want)
        moved = not any(torch.equal(want[key], now[key]) for key in want if key.endswith("|weight") and want[key].any())
        reader = CheckpointReader(saved.folder)
        outcome[stage] = during, same, moved, saved.step, reader.state().step, saved.num_bytes
        first = {key: buffer.data_ptr() for key, buffer in store._copy._buffers.items()}
        store.save(engine, at(4), EXTRAS)
        assert {key: buffer.data_ptr() for key, buffer in store._copy._buffers.items()} == first
    return outcome


def test_training_goes_on_while_a_slow_writer_saves_the_step_it_began_at(tmp_path):
    for outcome in run_ranks(2, save_beside_training, tmp_path):
        for stage, (during, same, moved, step, state_step, num_bytes) in outcome.items():
            assert during == (None, (True, False), (None, []))
            assert same, f"stage {stage} saved tensors that changed after the save began"
            assert moved
            assert step == state_step == 1
            files = (tmp_path / str(stage) / committed.FOLDER / "step-000000001").glob("rank-*")
            assert num_bytes == sum(path.stat().st_size for path in files)


# ---- faults ---------------------------------------------------------------------------------------------------------


def save_two(rank, world_size, folder):
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, 0)
    store = Checkpoints(folder, runtime)
    for step in (1, 2):
        store.save(engine, at(step), EXTRAS, {"recall": 0.5})


def test_damage_of_any_file_is_seen_and_the_one_before_is_used(tmp_path):
    run_ranks(2, save_two, tmp_path)
    newest = tmp_path / committed.FOLDER / "step-000000002"
    names = {path.name for path in newest.iterdir()}
    small = {"state.json", "model.json", "config.yaml", committed.METRICS, committed.MANIFEST}
    assert names == small | {f"rank-{rank:05d}-of-00002.safetensors" for rank in (0, 1)}
    for name, damage in itertools.product(sorted(names), (flip_first, flip_middle, flip_last, cut, None)):
        path = newest / name
        data = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage(bytearray(data)))
        found, notes = newest_intact(newest.parent)
        assert found.name == "step-000000001", (name, damage)
        assert len(notes) == 1
        assert str(newest) in notes[0]
        path.write_bytes(data)
    assert newest_intact(newest.parent) == (newest, [])


def flip_first(data):
    data[0] ^= 1
    return data


def flip_middle(data):
    data[len(data) // 2] ^= 1
    return data


def flip_last(data):
    data[-1] ^= 1
    return data


def cut(data):
    return data[:-1]


def find_or_error(rank, world_size, folder):
    try:
        return Checkpoints(folder, start(distributed=True)).find()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("victims", ["rank-*", committed.MANIFEST])
def test_all_damaged_is_an_error_on_every_rank(victims, tmp_path):
    run_ranks(1, save_two, tmp_path)
    for victim in tmp_path.glob(f"*/step-*/{victims}"):
        victim.unlink()
    messages = run_ranks(2, find_or_error, tmp_path)
    assert messages[0] == messages[1]
    assert "no checkpoint" in messages[0]
    assert "restore a copy" in messages[0]


def save_on_a_full_disk(rank, world_size, folder):
    """Step 1 is committed; then rank 1 cannot write its file of step 2, then rank 0 cannot commit step 3, then all is
    well again. Returns what the training heard at its steps' ends."""
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, 1)
    store = Checkpoints(folder, runtime)
    store.save(engine, at(1), EXTRAS)
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, whole[1]))
    heard = [train_until_told(store, engine, runtime, 2)]
    resource.setrlimit(resource.RLIMIT_FSIZE, whole)

    def full(name):
        if name == "before-manifest":
            raise OSError(28, "No space left on device")

    point, committed.commit_point = committed.commit_point, full
    heard.append(train_until_told(store, engine, runtime, 3))
    committed.commit_point = point
    left = gather(sorted(path.name for path in store.folder.iterdir()))[0]
    return [*heard, left, store.save(engine, at(4), EXTRAS).name]


def train_until_told(store, engine, runtime, step):
    store.begin(engine, at(step), EXTRAS)
    for number in range(step, 1000):
        train_steps(engine, runtime, number, number + 1)
        try:
            assert store.advance(*all_reduce_sum(store.progress())) is None
        except UserError as error:
            return str(error)


def test_a_full_disk_is_told_to_all_at_a_step_and_costs_no_checkpoint(tmp_path):
    first, second = run_ranks(2, save_on_a_full_disk, tmp_path)
    assert first == second
    writing, committing, left, name = first
    assert "step-000000002 failed on rank 1" in writing
    assert "File too large" in writing
    assert "step-000000003 failed on rank 0" in committing
    assert "No space left" in committing
    assert "remedy: make room" in committing
    assert left == ["latest", "step-000000001"]
    assert name == "step-000000004"
    assert newest_intact(tmp_path / committed.FOLDER)[0].name == name


def save_where_no_folder_can_be(rank, world_size, folder):
    runtime = start(distributed=True)
    try:
        Checkpoints(folder, runtime).save(fresh_engine(runtime, 1), at(1), EXTRAS)
    except UserError as error:
        return str(error)


def test_a_folder_that_cannot_be_made_is_told_to_all(tmp_path):
    (tmp_path / committed.FOLDER).touch()
    first, second = run_ranks(2, save_where_no_folder_can_be, tmp_path)
    assert first == second
    assert "preparing checkpoint" in first
    assert "failed on rank 0" in first
