"""Signals as a run takes them, in a process of its own, without torch: it starts at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from packing import ROOT

# A run that is asked to stop goes on for a while, in a call that Python's own handlers would wait for.
RUN = """
import sys, threading
from pretrain.process import stop
from pretrain.process.lifeline import Lifeline

stop._COPIES = 0.6
with Lifeline(sys.argv[1]) as life:
    life.status.checkpoint = "step-3"
    if sys.argv[2] == "training":
        life.stop.heed()
    print("ready", flush=True)
    blocked = threading.Lock()
    blocked.acquire()
    blocked.acquire(timeout=2.5)
    print(life.stop.reason, flush=True)
"""


def start(folder, phase):
    words = [sys.executable, "-c", RUN, str(folder), phase]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_signal_ends_at_once_and_says_stopped(tmp_path, number):
    process = start(tmp_path, "building")
    process.send_signal(number)
    _, errors = process.communicate(timeout=3)
    assert process.returncode == 75
    assert f"{number.name} before training began; last checkpoint: step-3" in errors
    assert (status(tmp_path)["state"], status(tmp_path)["checkpoint"]) == ("stopped", "step-3")


def test_a_launchers_copies_of_one_interrupt_do_not_count_and_a_second_one_ends_at_once(tmp_path):
    """The terminal reaches every process; a launcher passes SIGINT on, and SIGTERM after it."""
    process = start(tmp_path, "training")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.poll() is None
    assert status(tmp_path)["state"] == "running"
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)  # a scheduler's patience ends: not a user's second word
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=2)
    assert (process.returncode, output) == (130, "")
    assert errors.count("the run saves a checkpoint after this step and stops") == 1
    assert "a second SIGINT: ended without a checkpoint; last checkpoint: step-3" in errors
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == (
        "failed",
        "a second SIGINT: ended without a checkpoint",
    )


def test_the_first_request_is_the_reason(tmp_path):
    asked = [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGUSR1, signal.SIGINT]]
    processes = []  # they wait at the same time
    for numbers in asked:
        processes.append(start(tmp_path / numbers[0].name, "training"))
        for number in numbers:
            processes[-1].send_signal(number)
            time.sleep(0.1)
    said = [process.communicate(timeout=10)[0] for process in processes]
    assert said == ["SIGINT\n", "SIGTERM\n", "SIGUSR1\n"]
