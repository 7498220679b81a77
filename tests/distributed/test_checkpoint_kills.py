"""A save may be killed anywhere: at every commit point, on any rank, and at moments drawn by chance."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import tiny
from data_tools.corpus import open_corpus
from pretrain.config.tree import CheckpointConfig, LogConfig, OptimConfig, RunConfig, TrainConfig
from pretrain.engine import committed
from pretrain.engine.checkpoint import Checkpoints, Extras
from pretrain.engine.committed import Retention, newest_intact
from pretrain.engine.resume import find_checkpoint, start_state
from pretrain.engine.weights import CheckpointReader, restore_optimizer
from pretrain.process.collectives import all_reduce_sum
from pretrain.process.runtime import start
from pretrain.stream.fields.image import Image
from pretrain.stream.loader import StreamSettings, TrainStream
from pretrain.stream.transform import ImageSettings
from pretrain.tasks import ContrastiveConfig
from ranks import fork_ranks, run_ranks, run_warm
from stream_corpora import write_corpus
from test_checkpoint import EXTRAS, at, fresh_engine, train_steps
from training import PlainEngine, train

# ---- every commit point ---------------------------------------------------------------------------------------------

BOTH = ("copied", "before-rank-file", "rank-file-unsynced", "rank-file-synced", "all-written")
BEFORE_RENAME = ("before-manifest", "before-rename", "while-replacing")
AFTER_RENAME = ("before-latest", "before-best", "before-pruning", "while-pruning")
RETENTION = Retention(keep=1, keep_best="recall")


def save_twice(rank, world_size, folder, stage, point, victim):
    """Commit step 1, then die at `point` of a save that runs beside training."""
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, stage)
    store = Checkpoints(folder, runtime, RETENTION)
    store.save(engine, at(1), EXTRAS, {"recall": 0.1})
    (folder / f"first-{rank}").touch()

    def die(name):
        if name == point and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    committed.commit_point = die
    store.begin(engine, at(2), EXTRAS, {"recall": 0.2})
    step, saved = 2, None
    while saved is None:
        train_steps(engine, runtime, step, step + 1)
        saved = store.advance(*all_reduce_sum(store.progress()))
        step += 1


def save_again(rank, world_size, stage, folders):
    """Save step 3 in each of the folders."""
    runtime = start(distributed=True)
    engine = fresh_engine(runtime, stage)
    for folder in folders:
        Checkpoints(folder, runtime, RETENTION).save(engine, at(3), EXTRAS, {"recall": 0.3})


def test_every_commit_point_is_listed():
    sources = "".join(
        (Path(committed.__file__).parent / f"{name}.py").read_text() for name in ("checkpoint", "committed")
    )
    assert sorted(re.findall(r'commit_point\("(.+?)"\)', sources)) == sorted(BOTH + BEFORE_RENAME + AFTER_RENAME)


def kill_everywhere(stage, tmp_path):
    """[(point, victim, folder, whether the victim died of the kill)...], the ranks forked from this process."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # looks for a compiler, once for all ranks
    cases = [(point, rank) for point in BOTH for rank in (0, 1)] + [(p, 0) for p in BEFORE_RENAME + AFTER_RENAME]
    outcomes = []
    for point, victim in cases:
        folder = tmp_path / f"{point}-{victim}"
        (folder / "meeting").mkdir(parents=True)
        if point == "while-replacing":
            (folder / committed.FOLDER / "step-000000002").mkdir(parents=True)
        pids = fork_ranks(2, save_twice, (folder, stage, point, victim), folder / "meeting")
        _, status = os.waitpid(pids[victim], 0)
        time.sleep(0.01)
        os.kill(pids[1 - victim], signal.SIGKILL)  # as its launcher would, unless it has noticed and gone
        os.waitpid(pids[1 - victim], 0)
        outcomes.append((point, victim, folder, os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL))
    return outcomes


@pytest.mark.parametrize("stage", [1, 3])
def test_sigkill_at_any_commit_point_of_any_rank_loses_nothing(stage, tmp_path):
    outcomes = run_warm(kill_everywhere, stage, tmp_path)
    assert len(outcomes) == 2 * len(BOTH) + len(BEFORE_RENAME + AFTER_RENAME)
    for point, victim, folder, killed in outcomes:
        assert killed, (point, victim, [path.read_bytes() for path in (folder / "meeting").glob("rank-?")])
        assert (folder / "first-0").exists()
        found, _ = newest_intact(folder / committed.FOLDER)
        steps = {2} if point in AFTER_RENAME else {1, 2} if (point, victim) == ("all-written", 1) else {1}
        assert found is not None, point
        assert committed.step_of(found) in steps, (point, victim)
        assert set(CheckpointReader(found).weights()) == set(dict(tiny.build().named_parameters()))
    folders = [folder for _, _, folder, _ in outcomes]
    run_ranks(2, save_again, stage, folders)  # what was left over does not stand in the way, and goes
    for folder in folders:
        left = {path.name for path in (folder / committed.FOLDER).iterdir()}
        assert left == {"latest", "best", "step-000000003"}, folder


# ---- random moments -------------------------------------------------------------------------------------------------

KILLS, BATCH, SAVE_EVERY = 200, 4, 3


class PlainJob:
    """A job as the loop wants it, with the real stream, run folder and resume. It writes down every step's samples."""

    def __init__(self, runtime, corpus, folder, steps):
        self.config = ContrastiveConfig(
            run=RunConfig(dir=str(folder)),
            optim=OptimConfig(schedule="constant"),
            train=TrainConfig(duration=f"{steps} steps", global_batch=BATCH),
            checkpoint=CheckpointConfig(every=f"{SAVE_EVERY} steps", keep_every="300 steps"),
            log=LogConfig(every="1000000 steps"),
        )
        self.runtime = runtime
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image(ImageSettings(size=8, interpolation="bilinear"))
        settings = StreamSettings(
            fields=lambda *_: {"image": picture},
            seed=0,
            global_batch=BATCH,
            window=8,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        self.stream = TrainStream(open_corpus(corpus), settings)
        self.extras = Extras({}, "")
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(192, 32), torch.nn.Linear(32, 1))
        reader = find_checkpoint(self.config.run, runtime)
        self.state = start_state(reader, {}, "", self.stream, runtime)
        if reader is not None:
            model.load_state_dict(reader.weights())
        self.engine, self.resumed_from = PlainEngine(model, runtime.rank, runtime.world_size), reader and reader.folder
        if reader is not None:
            restore_optimizer(self.engine, reader, self.state.updates)
        self._trail = os.open(folder / f"trail-{runtime.rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(self._trail, f'["start", {self.state.step}]\n'.encode())

    def forward_backward(self, batch):
        loss = self.engine.module(batch.inputs["image"]["pixels"].flatten(1).float() / 255).square().mean()
        loss.backward()
        os.write(self._trail, (json.dumps([self.state.step, batch.keys]) + "\n").encode())
        return {"loss": loss.detach()}

    def diagnose(self, batch):
        return []

    def evaluate(self):
        return {}


def train_plainly(rank, world_size, corpus, folder, steps):
    """The final weights."""
    job = PlainJob(start(distributed=True), corpus, folder, steps)
    assert train(job) == 0
    return [parameter.detach().clone() for parameter in job.engine.module.parameters()]


def kill_one(corpus, run_dir, meeting, rng):
    """Start two ranks, kill one of them at a moment drawn by chance, then the other."""
    meeting.mkdir()
    trail = run_dir / "trail-0"
    lines = trail.read_bytes().count(b"\n") if trail.exists() else 0
    wanted = lines + rng.randint(0, 15)  # 0: while it starts
    pids = fork_ranks(2, train_plainly, (corpus, run_dir, 10**9), meeting)
    deadline = time.monotonic() + 30
    while not trail.exists() or trail.read_bytes().count(b"\n") < wanted:
        if time.monotonic() > deadline or any((meeting / f"rank-{rank}").exists() for rank in (0, 1)):
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.01))
    rng.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(rng.choice([0, 0.01]))
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert all(os.WIFSIGNALED(status) for status in statuses[:1]), [p.read_bytes() for p in meeting.glob("rank-?")]


def kill_often(corpus, run_dir, folder):
    """Kills, one after the other; the step that each resume begins at."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rng, resumes = random.Random(0), []
    for number in range(KILLS):
        kill_one(corpus, run_dir, folder / f"meeting-{number}", rng)
        found, notes = newest_intact(run_dir / committed.FOLDER)
        assert notes == []
        resumes.append(committed.step_of(found) if found else 0)
    return resumes


def incarnations(trail):
    """[(first step, [(step, keys)...])...] of the lines that a rank wrote."""
    found = []
    for line in trail.read_text().splitlines():
        step, value = json.loads(line)
        if step == "start":
            found.append((value, []))
        else:
            found[-1][1].append((step, value))
    return found


def test_200_random_kills_lose_and_repeat_no_sample(tmp_path):
    disturbed, whole, corpus = tmp_path / "disturbed", tmp_path / "whole", f"{tmp_path}/s-{{000000..000001}}.tar"
    write_corpus(tmp_path, [20, 12])
    resumes = run_warm(kill_often, corpus, disturbed, tmp_path)
    steps = resumes[-1] + 5
    got = run_ranks(2, train_plainly, corpus, disturbed, steps)
    want = run_ranks(2, train_plainly, corpus, whole, steps)
    for rank in (0, 1):
        lives = incarnations(disturbed / f"trail-{rank}")
        ((_, undisturbed),) = incarnations(whole / f"trail-{rank}")
        kept = []
        for (first, trained), (resumed, _) in zip(lives, [*lives[1:], (steps, [])], strict=True):
            assert [step for step, _ in trained] == list(range(first, first + len(trained)))
            kept += [row for row in trained if row[0] < resumed]
        assert kept == undisturbed
        assert {first for first, _ in lives} <= {0, *resumes}
        assert all(torch.equal(a, b) for a, b in zip(got[rank], want[rank], strict=True))
    assert len(set(resumes)) > KILLS / 4, "the kills came too early to mean anything"
    kept_forever = {300 * n for n in range(1, steps // 300 + 1)}
    assert kept_forever <= {committed.step_of(path) for path in committed.committed(disturbed / committed.FOLDER)}
