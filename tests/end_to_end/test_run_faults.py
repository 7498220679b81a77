"""Faults in the middle of a run, on real ranks: what is left out, what is written down, when it ends."""

import json
import math
from pathlib import Path

import pytest

import runs
from pretrain.config.reading import load_config
from pretrain.engine.engine import NonFiniteError
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.tasks import ContrastiveConfig
from ranks import run_ranks
from training import train


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.make_workspace(tmp_path_factory.mktemp("workspace"))


def trained(rank, world_size, workspace, folder, poisoned, overrides, high=()):
    """A run with rank 1's image tower broken at the steps `poisoned` and its loss reported 20 too high at the steps
    `high`: (exit code or error, train state)."""
    words = [f"run.dir={folder}", "data.workers=0", "evaluators={}", *overrides]
    config = load_config(ContrastiveConfig, workspace / "config.yaml", words)
    job = Job(config, start(distributed=True))
    hooked = job.model.clip.visual.ln_post
    hooked.register_forward_hook(lambda *a: a[2] * (math.nan if rank == 1 and job.state.step + 1 in poisoned else 1.0))
    plain = job.forward_backward

    def higher(batch):
        losses = plain(batch)
        return {**losses, "loss": losses["loss"] + 20 * (rank == 1 and batch.step + 1 in high)}

    job.forward_backward = higher
    try:
        return train(job), job.state.to_dict()
    except NonFiniteError as error:
        return str(error), job.state.to_dict()


def written(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def test_the_run_goes_on_and_says_which_samples(workspace, tmp_path):
    outcomes = run_ranks(2, trained, workspace, tmp_path, {2, 5}, ["guard.max_skipped=2"])
    assert [code for code, _ in outcomes] == [0, 0]
    for _, state in outcomes:
        assert (state["step"], state["skipped"], state["samples_seen"]) == (6, 2, 6 * runs.BATCH)
    first, second = written(tmp_path, "skipped.jsonl")
    assert (first["step"], first["epoch"], second["step"], second["epoch"]) == (2, 0, 5, 1)
    assert [len(keys) for keys in first["keys_by_rank"]] == [runs.BATCH // 2] * 2
    assert not set(first["keys_by_rank"][0]) & set(first["keys_by_rank"][1])
    assert "nan" in first["loss_by_rank"]
    rows = {row["step"]: row for row in runs.rows(tmp_path, "train")}
    assert "loss" not in rows[2]
    assert math.isfinite(rows[3]["loss"])
    assert rows[6]["skipped_steps"] == 2


def test_what_the_guard_knows_survives_a_resume(workspace, tmp_path):
    """Skips are counted, and the losses before the checkpoint are those that a spike is judged by."""
    words = ["guard.max_skipped=1", "log.every=5 steps", "checkpoint.every=null"]
    outcomes = run_ranks(2, trained, workspace, tmp_path, {2}, [*words, "train.duration=18 steps"])
    assert [code for code, _ in outcomes] == [0, 0]
    outcomes = run_ranks(2, trained, workspace, tmp_path, {21}, [*words, "train.duration=25 steps"], {20})
    for message, state in outcomes:
        assert "step 21 was stopped before its update" in message
        assert "ranks [" in message
        assert (state["step"], state["skipped"]) == (20, 1)
    assert [row["step"] for row in written(tmp_path, "skipped.jsonl")] == [2]
    assert runs.status(tmp_path)["state"] == "failed"
    (spike,) = written(tmp_path, "spikes.jsonl")
    assert (spike["step"], spike["epoch"]) == (20, 6)
    assert spike["expected"] < spike["threshold"] < spike["loss"]
    assert spike["loss"] == pytest.approx(sum(spike["loss_by_rank"]) / 2)
    assert [len(set(keys)) for keys in spike["keys_by_rank"]] == [runs.BATCH // 2] * 2
