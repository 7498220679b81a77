"""The training benchmark for real: FLOPs and losses of both sides, and the command against open_clip's own trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from launch.benchmark.trainers import Trial
from micro_trial import micro_trial
from ranks import run_ranks


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    return micro_trial(tmp_path_factory.mktemp("benchmark"))


def test_the_cut_text_saves_flops_and_the_tokens_say_why(trial):
    from launch.benchmark.inside import step_flops

    flops = step_flops(trial, 8)
    assert flops["text_tokens"]["open_clip"] == 8 * 24
    assert flops["text_tokens"]["dualstream"] < 8 * 12
    assert flops["ratio"] == flops["open_clip"] / flops["dualstream"] > 1.2


def _loss_curves(rank, world_size, trial):
    from launch.benchmark.inside import loss_curves
    from pretrain.process.runtime import start

    return loss_curves(trial, start(distributed=True))


def test_the_loss_curves_coincide(trial):
    curves = run_ranks(1, _loss_curves, replace(trial, steps_per_epoch=5))[0]
    assert len(curves["dualstream"]) == 5
    assert curves["largest_relative_gap"] < 2e-6
    assert curves["dualstream"][0] != curves["dualstream"][-1]


def _benchmark(repo_root, trial, folder, *words) -> dict:
    if not (repo_root / ".peers" / "open_clip" / "bin" / "python").exists():
        pytest.skip("needs .peers/open_clip, which `python launch/benchmark.py train` makes on first use")
    script = str(repo_root / "launch" / "benchmark.py")
    work = ["--shards", trial.source, "--model", trial.model, "--global-batch", "8", "--workers", "0"]
    place = ["--work-dir", str(folder), "--peer-env", str(repo_root / ".peers" / "open_clip"), "--precision", "fp32"]
    command = [sys.executable, script, "train", *work, *place, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(folder.glob("train-*/report.json")).read_text())


def test_both_trainers_are_timed(repo_root, trial, tmp_path):
    words = ["--pairs", "1", "--steps", "3", "--skip-steps", "1", "--peer-ranks", "1", "--ranks", "2"]
    report = _benchmark(repo_root, trial, tmp_path, *words)
    speed = report["speed"]
    assert speed["ratio_of_medians"] == pytest.approx(speed["dualstream"]["median"] / speed["open_clip"]["median"])
    assert report["layouts"]["dualstream"].startswith("2 x")
    assert report["flops"]["ratio"] > 1


def test_both_trainers_are_evaluated_alike(repo_root, trial, tmp_path):
    words = ["--recall", "--val", trial.source, "--epochs", "2", "--seeds", "0", "--curve", "--peer-ranks", "1"]
    report = _benchmark(repo_root, trial, tmp_path, *words, "--ranks", "1")
    places = {(row["trainer"], row["epoch"], row["samples"]) for row in report["rows"]}
    assert places == {(name, epoch, epoch * 16) for name in ("dualstream", "open_clip") for epoch in (1, 2)}
    assert all(0 < row["image_to_text_recall@10"] <= 1 for row in report["rows"])
