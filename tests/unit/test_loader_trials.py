"""The loader benchmark: what a trial counts, the figures made of it, the order of rounds, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.errors import UserError
from launch.benchmark import cli, loader, loader_trial
from launch.benchmark.loader_trial import LoaderTrial
from micro_trial import micro_trial

TRIAL = LoaderTrial("dualstream", ("a.tar",), (0,), 1, images=20, warmup=8, batch=8, size=4, crop_scale=(0.9, 1.0))
SPIN = "import time; start = time.process_time()\nwhile time.process_time() - start < 0.3: pass"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return micro_trial(tmp_path_factory.mktemp("loader")).source


def batches(count: int, size: int = 4):
    for _ in range(count):
        yield torch.zeros(8, 3, size, size), torch.zeros(8, 77)


def test_the_warm_up_is_not_counted():
    source = batches(10)
    result = loader_trial.measure(source, TRIAL)
    assert result["images"] == 24  # three whole batches, after one
    assert len(list(source)) == 6
    assert result["cpu_seconds"] > 0
    assert result["seconds"] > 0


def test_a_wrong_picture_ends_the_trial():
    with pytest.raises(RuntimeError, match="a batch of images"):
        loader_trial.measure(batches(10, size=5), TRIAL)


def test_cpu_seconds_count_children_that_ended_and_other_sessions_not():
    work = f"import subprocess, sys, os; subprocess.run([sys.executable, '-c', {SPIN!r}])\n"
    ask = "from launch.benchmark.loader_trial import cpu_seconds; print(cpu_seconds(os.getsid(0)))"
    before = loader_trial.cpu_seconds(os.getsid(0))
    done = subprocess.run([sys.executable, "-c", work + ask], capture_output=True, text=True, start_new_session=True)
    assert 0.3 <= float(done.stdout) < 3
    assert loader_trial.cpu_seconds(os.getsid(0)) >= before + 0.3  # our own child, so its time is ours once it ended


def test_a_trial_survives_json():
    assert loader_trial.parse(loader_trial.dump(TRIAL)) == TRIAL


def test_rates_and_ratios():
    def result(images: int, seconds: float, cpu: float) -> dict:
        return {"images": images, "seconds": seconds, "cpu_seconds": cpu}

    rounds = [
        {"dualstream": result(100, 1.0, 2.0), "open_clip": result(100, 4.0, 4.0)},
        {"dualstream": result(100, 2.0, 2.0), "open_clip": result(100, 4.0, 8.0)},
    ]
    figures = loader.summary(rounds, workers=2)
    ours = figures["loaders"]["dualstream"]
    assert ours["images_per_second_per_core"] == {"median": 37.5, "min": 25.0, "max": 50.0}
    assert ours["images_per_cpu_second"] == {"median": 50.0, "min": 50.0, "max": 50.0}
    ratio = figures["ratio_per_round"]["open_clip"]
    assert ratio["images_per_second_per_core"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert ratio["images_per_cpu_second"] == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_rounds_alternate_their_order(monkeypatch):
    ran = []
    monkeypatch.setattr(loader, "run_trial", lambda trial, name, python: ran.append(name) or {"images": 1})
    python = dict.fromkeys(("dualstream", "open_clip"), Path("python"))
    results = loader.alternate(TRIAL, list(python), 3, python)
    assert ran == ["dualstream", "open_clip", "open_clip", "dualstream", "dualstream", "open_clip"]
    assert [list(result) for result in results] == [["dualstream", "open_clip"]] * 3


def test_a_failed_loader_says_why():
    with pytest.raises(UserError, match=r"the loader ffcv failed.*KeyError: 'ffcv'"):
        loader.run_trial(replace(TRIAL, cores=tuple(os.sched_getaffinity(0))), "ffcv", Path(sys.executable))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds is not positive"),
        (["--workers", "1000"], "more workers than cores"),
        (["--peers", "ffcv"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(shards, capsys, words, message):
    assert cli.main(["loader", "--shards", shards, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
