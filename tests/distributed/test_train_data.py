"""Whole trainings on real ranks over bad, mixed and resized data: equal steps, an exact account, nothing lost."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

import tiny
from data_tools.errors import UserError
from pretrain.config.reading import load_config
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.tasks import ContrastiveConfig
from ranks import run_ranks
from stream_corpora import picture, write_corpus
from training import train

BATCH = 16


@pytest.fixture
def workspace(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))
    (tmp_path / "config.yaml").write_text(
        f"run: {{dir: {tmp_path}/run}}\n"
        f"data: {{train: [{{urls: '{tmp_path}/s-{{000000..000003}}.tar'}}], workers: 0, window: 8}}\n"
        f"model: {{name: {tmp_path}/tiny.json}}\n"
        f"train: {{duration: 2 epochs, global_batch: {BATCH}, precision: fp32}}\n"
        "checkpoint: {every: 100 epochs}\nlog: {every: 1 steps}\n"
    )
    return tmp_path


def run(rank, world_size, workspace, *overrides):
    """(steps, bad samples, message of the error or '')."""
    config = load_config(ContrastiveConfig, workspace / "config.yaml", overrides)
    try:
        job = Job(config, start(distributed=True))
        train(job)
    except UserError as error:
        return 0, 0, str(error)
    return job.state.step, job.state.bad_samples, ""


def rows(workspace, kind):
    lines = (workspace / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def quarantined(workspace):
    return [json.loads(line) for path in workspace.glob("run/quarantine-*.jsonl") for line in path.open()]


def test_bad_samples_and_a_cut_shard_are_accounted_for_exactly(workspace):
    bad = {7: {"jpg": picture(7)[:150]}, 130: {"txt": b"", "json": b"{}"}}
    write_corpus(workspace, [50, 50, 50, 50], bad)
    tar = workspace / "s-000002.tar"
    os.truncate(tar, int(tar.stat().st_size * 0.8))
    results = run_ranks(4, run, workspace, "data.max_bad_ratio=0.2")
    steps = 2 * (200 // BATCH)
    found = quarantined(workspace)
    assert results == [(steps, len(found), "")] * 4
    accounts = rows(workspace, "data")
    assert [row["epoch"] for row in accounts] == [0, 1]
    kinds = Counter(row["kind"] for row in found)
    assert kinds["damaged"] > 10
    assert kinds["undecodable"] >= 1
    assert kinds["no_caption"] >= 1
    for row in accounts:
        own = Counter(line["kind"] for line in found if line["epoch"] == row["epoch"])
        assert row["expected"] == (200 // BATCH) * BATCH
        assert row["replaced"] == own.total()
        assert row["read"] == row["expected"] - row["replaced"]
        assert {kind: row[f"replaced_{kind}"] for kind in own} == own
    assert {line["shard"] for line in found if line["kind"] == "damaged"} == {str(tar)}
    assert len({(line["epoch"], line["shard"], line["index"]) for line in found}) == len(found)


def test_too_many_bad_samples_end_all_ranks_with_the_worst_shards_of_all(workspace):
    write_corpus(workspace, [50, 50, 50, 50], {number: {"jpg": b"x"} for number in range(100, 140)})
    messages = {message for _, _, message in run_ranks(2, run, workspace)}
    assert len(messages) == 1
    message = messages.pop()
    worst = Counter(line["shard"] for line in quarantined(workspace))
    assert set(worst) == {str(workspace / "s-000002.tar")}
    assert f"too many bad samples, most in {workspace}/s-000002.tar ({worst.total()})" in message
    assert "expected at most 0.01 of them" in message


def test_a_mixture_changes_world_size_and_global_batch(workspace):
    for name in ("a", "b"):
        (workspace / name).mkdir()
    write_corpus(workspace / "a", [60])
    write_corpus(workspace / "b", [20, 30])
    urls = [workspace / "a" / "s-000000.tar", str(workspace / "b" / "s-{000000..000001}.tar")]
    sources = f"data.train=[{{urls: '{urls[0]}', weight: 3}}, {{urls: '{urls[1]}', weight: 1, captions: txt}}]"
    assert run_ranks(2, run, workspace, sources, "train.duration=2 steps") == [(2, 0, "")] * 2
    resumed = run_ranks(4, run, workspace, sources, "train.global_batch=32", "train.duration=160 samples")
    assert resumed == [(2 + 4, 0, "")] * 4
    train_rows = rows(workspace, "train")
    assert [row["samples"] for row in train_rows] == [16, 32, 64, 96, 128, 160]
    assert [(row["share_0"], row["share_1"]) for row in train_rows] == [(0.75, 0.25)] * 6
    assert [row["expected"] for row in rows(workspace, "data")] == [32, 96, 32]
