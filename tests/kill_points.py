"""A verb of data_tools killed at each of its commit points, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from packing import ROOT

# Imports once, then forks one process per point: the child counts every durable step (fsync, rename, and writes into a
# tar) and kills itself just before step `point`; a second child runs the same command undisturbed.
_DRIVER = """
import io, json, os, shutil, signal, sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from data_tools.__main__ import main
from data_tools.format import commit, writer

command, start, work = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
WRITES_BETWEEN = 7

def arm(point):
    state = {"step": 0, "writes": 0}
    def step():
        state["step"] += 1
        if state["step"] == point:
            os.kill(os.getpid(), signal.SIGKILL)
    def replace(*arguments):
        step()
        os.replace(*arguments)
    def fsync(descriptor):  # the kernel keeps what a killed process wrote: no need to wait for the disk here
        step()
    def write(self, data, original=writer._HashedFile.write):
        state["writes"] += 1
        if state["writes"] % WRITES_BETWEEN == 0:
            step()
        original(self, data)
    commit.os = SimpleNamespace(**{**vars(os), "fsync": fsync, "replace": replace})
    writer._HashedFile.write = write
    return state

def child(output, point):
    reader, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        state = arm(point)
        with redirect_stdout(io.StringIO()):
            code = main([str(output) if word == "OUTPUT" else word for word in command])
        os.write(sender, json.dumps([code, state["step"]]).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(reader) as pipe:
        sent = pipe.read()
    _, status = os.waitpid(pid, 0)
    return (json.loads(sent) if sent else None), status

def begun(name):
    if start:
        shutil.copytree(start, work / name)
    return work / name

(_, steps), _ = child(begun("whole"), 0)
print(json.dumps({"steps": steps}), flush=True)
for point in range(1, steps + 1):
    output = begun(f"point{point}")
    sent, status = child(output, point)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    shutil.copytree(output, work / f"killed{point}")
    again, _ = child(output, 0)
    print(json.dumps({"point": point, "killed": killed, "again": again}), flush=True)
"""


def killed_at_every_point(command: list[object], work: Path, start: Path | None = None) -> int:
    """Run `command`, in which OUTPUT stands for a folder, undisturbed into `work/whole`; then for each of its durable
    steps N into `work/pointN`, killed just before it, of which `work/killedN` is a copy, and then again. The folders
    begin as copies of `start`. Returns the number of steps."""
    work.mkdir(exist_ok=True)
    words = [sys.executable, "-c", _DRIVER, json.dumps(list(map(str, command))), str(start or ""), str(work)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    steps, *lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == steps["steps"] > 0
    for line in lines:
        assert line["killed"], line
        assert line["again"][0] == 0, line
    return steps["steps"]
