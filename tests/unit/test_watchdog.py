"""The hang watchdog in a process of its own: it fires where nothing moves, and only there."""

import subprocess
import sys
import time

import pytest

from packing import ROOT

SCRIPT = """
import ctypes, sys, time
from pretrain import watchdog
from pretrain.watchdog import Watchdog, beat, end_process, print_stacks

watchdog._SLACK = 0.5

def hangs():
    print_stacks(f"stacks of it in {watchdog.phase()}:")
    end_process("it hangs", lambda reason: open(sys.argv[1], "w").write(reason))

dog = Watchdog(1.0, hangs)
for _ in range(6):
    time.sleep(0.4)
    beat("a phase")
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
    done, _ = run(tmp_path, 'ctypes.PyDLL("libc.so.6").sleep(50)')
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in stuck" in done.stderr


def test_a_closed_watch_does_not_fire(tmp_path):
    done, _ = run(tmp_path, "dog.close(); time.sleep(2.5)")
    assert (done.returncode, done.stderr) == (0, "")
