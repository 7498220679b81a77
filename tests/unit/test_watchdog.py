"""The hang watchdog in a process of its own: it fires where nothing moves, and only there."""

import os
import signal
import subprocess
import sys
import time

import pytest

from packing import ROOT

SCRIPT = """
import ctypes, sys, time
from pretrain.process import watchdog
from pretrain.process.watchdog import Watchdog, heartbeat, end_process, print_stacks

watchdog._SLACK = 0.5

def hangs():
    print_stacks(f"stacks of it in {watchdog.phase()}:")
    end_process("it hangs", lambda reason: open(sys.argv[1], "w").write(reason))

dog = Watchdog(1.0, hangs)
for _ in range(6):
    time.sleep(0.4)
    heartbeat("a phase")
def stuck():
    STUCK
stuck()
"""


def run(tmp_path, stuck):
    started = time.monotonic()
    words = [sys.executable, "-c", SCRIPT.replace("STUCK", stuck), str(tmp_path / "status")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done, time.monotonic() - started


def test_a_hang_ends_the_process_with_its_stacks(tmp_path):
    done, seconds = run(tmp_path, "time.sleep(50)")
    assert done.returncode == 1
    assert 2.4 < seconds < 15  # progress for 2.4 seconds did not fire
    assert "stacks of it in a phase" in done.stderr
    assert "in stuck" in done.stderr
    assert "error: it hangs" in done.stderr
    assert (tmp_path / "status").read_text() == "it hangs"


@pytest.mark.skipif(sys.platform != "linux", reason="holds Python's lock through libc")
def test_a_hang_that_holds_pythons_lock_ends_too(tmp_path):
    done, seconds = run(tmp_path, 'ctypes.PyDLL("libc.so.6").sleep(50)')
    assert done.returncode == -signal.SIGUSR2
    assert seconds < 15
    assert "holds Python's lock and makes no progress" in done.stderr
    assert "in stuck" in done.stderr


def test_a_closed_watch_does_not_fire(tmp_path):
    done, _ = run(tmp_path, "dog.close(); time.sleep(2.5)")
    assert (done.returncode, done.stderr) == (0, "")


PAUSED = """
for _ in range(20):
    time.sleep(0.1)
    heartbeat("a phase")
print("waiting", flush=True)
sys.stdin.readline()  # of which it is woken before it counts as hanging
for _ in range(4):
    time.sleep(0.2)
    heartbeat()
print("goes on", flush=True)
"""


@pytest.mark.parametrize("pause", [os.kill, os.killpg], ids=["rank", "machine"])
def test_time_in_which_it_was_suspended_does_not_count(tmp_path, pause):
    """Alone, as by a debugger, or with the process that watches it, as in a job or machine that is paused."""
    script = SCRIPT.partition("for _ in range(6)")[0] + PAUSED + "def stuck():\n    time.sleep(50)\nstuck()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "status")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    for _ in range(2):
        pause(process.pid, signal.SIGSTOP)
        time.sleep(2.5)  # more than the second and a half that are allowed
        pause(process.pid, signal.SIGCONT)
        time.sleep(0.1)
    started = time.monotonic()
    out, err = process.communicate("\n", timeout=30)
    assert out == "goes on\n"
    assert process.returncode == 1  # and a hang after the pause is still one
    assert 1.5 < time.monotonic() - started < 15
    assert "error: it hangs" in err


def test_the_process_outside_goes_with_the_rank(tmp_path):
    script = SCRIPT.partition("for _ in range(6)")[0] + "print(dog._outside.pid, flush=True)\ntime.sleep(50)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    outside = int(process.stdout.readline())
    assert os.path.exists(f"/proc/{outside}")
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{outside}"):
        assert time.monotonic() < until
        time.sleep(0.05)
